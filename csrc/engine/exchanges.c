/* exchanges.c - a pass's exchanges on a communicator. */
#include "engine/exchanges.h"

#include "base/clock.h"

ovlm_status ovlm_exchanges_run(void *ctx, const ovlm_exchange *args, ovlm_err *err)
{
    ovlm_exchanges *self = ctx;
    const ovlm_all_to_all call = {.send = args->send, .send_bytes = args->send_bytes,
                                  .send_at = args->send_at, .recv = args->recv,
                                  .recv_bytes = args->recv_bytes, .recv_at = args->recv_at};
    double start_s = ovlm_clock_s();
    OVLM_TRY(ovlm_comm_all_to_all(self->comm, &call, err));
    self->waited_s += ovlm_clock_s() - start_s;
    self->count++;
    for (int64_t r = 0; r < ovlm_comm_size(self->comm); r++) {
        self->sent_bytes += r != ovlm_comm_rank(self->comm) ? args->send_bytes[r] : 0;
    }
    return OVLM_OK;
}
