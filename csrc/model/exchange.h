/* exchange.h - bytes between the ranks of a group in the middle of a pass.  The model packs and
 * unpacks by the op table; who moves the bytes it does not know. */
#ifndef OVLM_MODEL_EXCHANGE_H
#define OVLM_MODEL_EXCHANGE_H

#include "model/run.h"

/* In host memory; arrays have an entry for each rank of the group. */
typedef struct ovlm_exchange {
    const void *send;
    const int64_t *send_bytes, *send_at;
    void *recv;
    const int64_t *recv_bytes, *recv_at;
} ovlm_exchange;

typedef ovlm_status (*ovlm_exchange_fn)(void *ctx, const ovlm_exchange *args, ovlm_err *err);

/* Waits for run's queue, then exchanges args->send, of send_bytes in all, for args->recv; through
 * run->stage where host code cannot reach them, of which nothing stays taken. */
OVLM_NODISCARD ovlm_status ovlm_run_exchange(ovlm_run *run, ovlm_exchange_fn exchange, void *ctx,
                                             const ovlm_exchange *args, int64_t send_bytes,
                                             int64_t recv_bytes);

#endif
