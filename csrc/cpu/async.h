/* async.h - a backend that makes another one behave like a device, to find what only a device
 * punishes:
 *   - Operations and copies run late, on a thread per queue, and no sooner than somebody waits for
 *     them or a backlog has built up.  Only events order queues.
 *   - Device addresses cannot be read or written by the host; the worker translates them.  Fresh
 *     and freed memory, and scratch before each operation, is full of NaN.
 *   - Wrong addresses (of the host, freed, reaching beyond an allocation) and failures of the inner
 *     backend are late errors that name the operation.  Until queue_wait reports the error, the
 *     queue skips its work. */
#ifndef OVLM_CPU_ASYNC_H
#define OVLM_CPU_ASYNC_H

#include "backend/backend.h"

/* Every queue runs on its own inner backend, which must have host memory. */
OVLM_NODISCARD ovlm_status ovlm_async_open(const ovlm_ops *inner,
                                           const ovlm_backend_options *options,
                                           ovlm_backend **backend, ovlm_err *err);

/* Test hook: while held, a queue starts nothing, whoever waits, except for queue_wait and
 * queue_close of its own, which end the hold. */
void ovlm_async_hold(ovlm_queue *queue, bool hold);

extern const ovlm_ops ovlm_async_ops;

#endif
