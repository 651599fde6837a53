/* sequence_parallel.c - exchanges of a group on its communicator. */
#include "engine/sequence_parallel.h"

#include "base/clock.h"

static ovlm_status exchange(void *ctx, const ovlm_sequence_exchange *args, ovlm_err *err)
{
    ovlm_sequence_group *group = ctx;
    const ovlm_all_to_all call = {.send = args->send, .send_bytes = args->send_bytes,
                                  .send_at = args->send_at, .recv = args->recv,
                                  .recv_bytes = args->recv_bytes, .recv_at = args->recv_at};
    double start_s = ovlm_clock_s();
    OVLM_TRY(ovlm_comm_all_to_all(group->comm, &call, err));
    group->waited_s += ovlm_clock_s() - start_s;
    group->exchanges++;
    for (int64_t r = 0; r < group->table.degree; r++) {
        group->sent_bytes += r != group->table.rank ? args->send_bytes[r] : 0;
    }
    return OVLM_OK;
}

void ovlm_sequence_group_init(ovlm_sequence_group *group, ovlm_comm *comm, int64_t head_ranks)
{
    *group = (ovlm_sequence_group){.comm = comm};
    group->table = (ovlm_sequence){.ctx = group, .degree = ovlm_comm_size(comm),
                                   .rank = ovlm_comm_rank(comm), .head_ranks = head_ranks,
                                   .exchange = exchange};
}
