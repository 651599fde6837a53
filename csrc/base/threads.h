/* threads.h - a pool of threads that share out numbered pieces of work.
 *
 * The caller takes part, so a pool of one has no thread of its own.  Waiting threads sleep: an idle
 * pool costs nothing.  One caller at a time. */
#ifndef OVLM_BASE_THREADS_H
#define OVLM_BASE_THREADS_H

#include "base/status.h"

typedef struct ovlm_pool ovlm_pool;

/* One piece: index in [0, n), thread in [0, threads). */
typedef void (*ovlm_pool_body)(void *ctx, int64_t index, int64_t thread);

/* threads = 0: one per core that the process may use. */
OVLM_NODISCARD ovlm_status ovlm_pool_open(int64_t threads, ovlm_pool **pool, ovlm_err *err);
void ovlm_pool_close(ovlm_pool *pool); /* NULL is fine */
int64_t ovlm_pool_threads(const ovlm_pool *pool);

/* Calls body for each index, in no particular order, and returns when all are done.  What one piece
 * writes the caller sees.  Not from within a body. */
void ovlm_pool_run(ovlm_pool *pool, int64_t n, ovlm_pool_body body, void *ctx);

#endif
