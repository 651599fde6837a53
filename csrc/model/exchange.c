/* exchange.c - bytes of a pass to other ranks and from them. */
#include "model/exchange.h"

ovlm_status ovlm_run_exchange(ovlm_run *run, ovlm_exchange_fn exchange, void *ctx,
                              const ovlm_exchange *args, int64_t send_bytes, int64_t recv_bytes)
{
    /* Other uploads may still be read from the stage, so that only what is taken here is given
     * back. */
    bool reach = run->queue->backend->host_memory;
    int64_t mark = run->stage->used_bytes;
    ovlm_exchange here = *args;
    void *staged = reach ? NULL : ovlm_stack_take(run->stage, send_bytes);
    here.send = reach ? args->send : staged;
    here.recv = reach ? args->recv : ovlm_stack_take(run->stage, recv_bytes);
    run->stage->used_bytes = mark;
    if (run->measuring) {
        return OVLM_OK;
    }
    double start_s = ovlm_run_begin(run);
    if (!reach && send_bytes > 0) {
        OVLM_TRY(run->ops->copy(run->queue, staged, args->send, send_bytes, OVLM_TO_HOST,
                                run->err));
    }
    OVLM_TRY(run->ops->queue_wait(run->queue, run->err));
    OVLM_TRY(exchange(ctx, &here, run->err));
    if (!reach && recv_bytes > 0) {
        OVLM_TRY(run->ops->copy(run->queue, args->recv, here.recv, recv_bytes, OVLM_TO_DEVICE,
                                run->err));
        OVLM_TRY(run->ops->queue_wait(run->queue, run->err)); /* the stage is used again */
    }
    ovlm_run_end(run, "exchange", -1, start_s);
    return OVLM_OK;
}
