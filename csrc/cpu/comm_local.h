/* comm_local.h - communicators of one host: ranks are threads of this process, or processes that
 * meet at a file. */
#ifndef OVLM_CPU_COMM_LOCAL_H
#define OVLM_CPU_COMM_LOCAL_H

#include "backend/comm.h"

enum { OVLM_COMM_LOCAL_RANKS_MOST = 1024 };

typedef struct ovlm_comm_local_options {
    double silent_s;      /* a rank whose process does not even run a clock for so long is taken
                             for dead; 0: 60.  (A process that ends is noticed at once.)        */
    double join_s;        /* how long processes wait for each other at the start; 0: 300        */
    double slow_s;        /* after this long in one call `warn` is told, then after twice as long
                             and so on; 0: 60                                                   */
    int64_t window_bytes; /* through which a rank's data passes; 0: between 64 KiB and 1 MiB, so
                             that a communicator takes about 4 MiB.  Less where memory is short  */
    /* Both optional, called while a rank waits, on the thread that does.  poll: non-zero stops the
     * call with OVLM_E_INTERRUPTED, and the job with it.  warn: one line on who is waited for. */
    int (*poll)(void *ctx);
    void (*warn)(void *ctx, const char *message);
    void *ctx;
} ovlm_comm_local_options;

/* n communicators, comms[r] for the thread that is rank r.  options NULL: all zero. */
OVLM_NODISCARD ovlm_status ovlm_comm_open_threads(int64_t n,
                                                  const ovlm_comm_local_options *options,
                                                  ovlm_comm **comms, ovlm_err *err);

/* This process is rank `rank` of `size` that call this with the same path: a name for a file that
 * does not exist, on a file system of this host's memory (/dev/shm) if there is one.  It is gone
 * when all have met.  OVLM_E_COMM: they did not meet within join_s, or the name is taken. */
OVLM_NODISCARD ovlm_status ovlm_comm_open_local(const char *path, int64_t rank, int64_t size,
                                                const ovlm_comm_local_options *options,
                                                ovlm_comm **comm, ovlm_err *err);

#endif
