/* comm.h - the communicator: what ranks say to each other, and what carries it.
 *
 * Code above this floor holds an ovlm_comm and never asks what carries it.  An engine (local, MPI,
 * NCCL, a Python adapter) is a table of few functions over bytes; everything else - arguments,
 * reductions, start and wait, poisoning - is made once, above the table.
 *
 * Rules for all calls
 *   - Every rank of the communicator makes the same calls in the same order; counts may differ from
 *     rank to rank where the call says so, and may be 0.
 *   - One caller at a time: a call while another thread is in one is OVLM_E_ARG and does nothing.
 *     A second thread uses a dup.
 *   - Arguments are checked before anything is sent: OVLM_E_ARG leaves the communicator as it was.
 *   - OVLM_E_COMM: a rank failed, left, died, or called something else; the message names it.  No
 *     rank waits for ever.  The communicator is poisoned: all later calls fail with that message.
 *   - A forked child is no rank: its calls are OVLM_E_COMM before anything is touched, its abort
 *     does nothing, and closing frees its copy alone.
 *   - Memory may lie on a device where the engine says so; counts and offsets always on the host.
 *     `stream` is the engine's (a CUDA stream); engines of the CPU ignore it.
 *
 * Also read by C++ (nvcc): no C-only construct here. */
#ifndef OVLM_BACKEND_COMM_H
#define OVLM_BACKEND_COMM_H

#include "ovlm.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ovlm_comm ovlm_comm;

typedef enum ovlm_reduce { OVLM_SUM = 0, OVLM_MAX, OVLM_MIN } ovlm_reduce;

/* ---------------------------------------------------------------- arguments */

/* Rank r is sent send_bytes[r] bytes from send + send_at[r]; recv_bytes[s] bytes come from rank s
 * to recv + recv_at[s].  What s sends to r is what r receives from s: a rank that says otherwise is
 * named.  An offset array of NULL: one after the other, in rank order.  send and recv do not
 * overlap; places in send may (the same rows for several ranks). */
typedef struct ovlm_all_to_all {
    const void *send;
    const int64_t *send_bytes, *send_at; /* [N] >= 0                                            */
    void *recv;
    const int64_t *recv_bytes, *recv_at; /* [N] >= 0                                            */
    void *stream;
} ovlm_all_to_all;

/* Every rank gets recv_bytes[s] bytes from rank s at recv + recv_at[s].  recv_bytes is the same on
 * all ranks, and recv_bytes[own rank] bytes are read at send.  send may be the own place in recv;
 * otherwise they do not overlap. */
typedef struct ovlm_all_gather {
    const void *send;
    void *recv;
    const int64_t *recv_bytes, *recv_at; /* [N] >= 0; at NULL: one after the other              */
    void *stream;
} ovlm_all_gather;

/* recv[i] = the reduction of send[i] over all ranks, for n elements; n is the same on all ranks.
 * send may be recv; otherwise they do not overlap.
 *
 * Ranks are added in their order, whatever the engine: r0 + r1 + r2 + ...; so all ranks get the
 * same bits, and a run repeats.  bfloat16 is added in float32 and rounded once, at the end, to
 * nearest even; integers wrap around.  Max and min of a NaN and anything are NaN.
 * dtype: F32, F64, BF16, I64, I32.  (An engine with reductions of its own - NCCL - has its own
 * order; it still gives all ranks the same bits.) */
typedef struct ovlm_all_reduce {
    const void *send;
    void *recv;
    int64_t n;
    ovlm_dtype dtype;
    ovlm_reduce reduce;
    void *stream;
} ovlm_all_reduce;

/* send holds counts[0] + ... + counts[N-1] elements, one rank's after the other's; this rank gets
 * the reduction of its counts[rank] elements.  counts is the same on all ranks.  recv may be the
 * own place in send; otherwise they do not overlap.  Order and types as above. */
typedef struct ovlm_reduce_scatter {
    const void *send;
    void *recv;
    const int64_t *counts; /* [N] >= 0                                                          */
    ovlm_dtype dtype;
    ovlm_reduce reduce;
    void *stream;
} ovlm_reduce_scatter;

/* ---------------------------------------------------------------- calls */

/* The communicator of one rank: calls copy. */
OVLM_NODISCARD ovlm_status ovlm_comm_open_self(ovlm_comm **comm, ovlm_err *err);

int64_t ovlm_comm_rank(const ovlm_comm *comm);
int64_t ovlm_comm_size(const ovlm_comm *comm);
/* "local", "mpi", ... */
const char *ovlm_comm_engine_name(const ovlm_comm *comm);
/* Whether its engine may be called from a thread other than the one that opened it, and from two
 * at once over two communicators. */
bool ovlm_comm_any_thread(const ovlm_comm *comm);

/* Ranks of one color (>= 0) make a new communicator, ordered by key and then by their rank here;
 * with a negative color *out is NULL.  All ranks call it.  The new one lives by itself: it may be
 * closed before or after this one. */
OVLM_NODISCARD ovlm_status ovlm_comm_split(ovlm_comm *comm, int64_t color, int64_t key,
                                           ovlm_comm **out, ovlm_err *err);
/* The same ranks again, for another thread or for work that overlaps.  All ranks call it. */
OVLM_NODISCARD ovlm_status ovlm_comm_dup(ovlm_comm *comm, ovlm_comm **out, ovlm_err *err);

/* Frees this rank's end and waits for nobody.  A rank that still calls after this one has closed
 * fails with OVLM_E_COMM; closing while something started is pending is an abort.  NULL is fine. */
void ovlm_comm_close(ovlm_comm *comm);

/* Makes every rank of the job fail with OVLM_E_COMM, naming this rank and the message, in this call
 * or the next.  From any thread, also while a call runs.  Under MPI the launcher ends the job. */
void ovlm_comm_abort(ovlm_comm *comm, const char *message);

/* poll is asked every 50 ms on a thread that waits for something started; non-zero ends the wait
 * with OVLM_E_INTERRUPTED, and the job.  Children inherit it.  (Engines are given theirs when they
 * are opened.) */
void ovlm_comm_set_poll(ovlm_comm *comm, int (*poll)(void *ctx), void *ctx);

OVLM_NODISCARD ovlm_status ovlm_comm_barrier(ovlm_comm *comm, ovlm_err *err);
/* `bytes` is the same on all ranks. */
OVLM_NODISCARD ovlm_status ovlm_comm_broadcast(ovlm_comm *comm, void *data, int64_t bytes,
                                               int64_t root, void *stream, ovlm_err *err);
OVLM_NODISCARD ovlm_status ovlm_comm_all_gather(ovlm_comm *comm, const ovlm_all_gather *args,
                                                ovlm_err *err);
OVLM_NODISCARD ovlm_status ovlm_comm_all_to_all(ovlm_comm *comm, const ovlm_all_to_all *args,
                                                ovlm_err *err);
OVLM_NODISCARD ovlm_status ovlm_comm_all_reduce(ovlm_comm *comm, const ovlm_all_reduce *args,
                                                ovlm_err *err);
OVLM_NODISCARD ovlm_status ovlm_comm_reduce_scatter(ovlm_comm *comm,
                                                    const ovlm_reduce_scatter *args,
                                                    ovlm_err *err);

/* ---------------------------------------------------------------- start and wait
 *
 * Start hands a call over and returns; ranks need not wait for the same things at the same time,
 * but start in the same order.  What was started runs in the order of the starts, before any later
 * blocking call.  Memory and arrays that args point to stay untouched until the wait; args itself
 * is copied.  At most OVLM_COMM_PENDING_MOST may be pending.  Where an engine cannot run beside the
 * caller (ovlm_comm_engine.any_thread), start does it at once. */

enum { OVLM_COMM_PENDING_MOST = 256 };

OVLM_NODISCARD ovlm_status ovlm_comm_all_gather_start(ovlm_comm *comm, const ovlm_all_gather *args,
                                                      int64_t *ticket, ovlm_err *err);
OVLM_NODISCARD ovlm_status ovlm_comm_all_to_all_start(ovlm_comm *comm, const ovlm_all_to_all *args,
                                                      int64_t *ticket, ovlm_err *err);
OVLM_NODISCARD ovlm_status ovlm_comm_all_reduce_start(ovlm_comm *comm, const ovlm_all_reduce *args,
                                                      int64_t *ticket, ovlm_err *err);
OVLM_NODISCARD ovlm_status ovlm_comm_reduce_scatter_start(ovlm_comm *comm,
                                                          const ovlm_reduce_scatter *args,
                                                          int64_t *ticket, ovlm_err *err);
/* Returns when that call, and with it all that were started before, is done; at once for a ticket
 * that was waited for.  Its failure, if it failed. */
OVLM_NODISCARD ovlm_status ovlm_comm_wait(ovlm_comm *comm, int64_t ticket, ovlm_err *err);

/* ---------------------------------------------------------------- the engine */

typedef enum ovlm_comm_kind {
    OVLM_COMM_BARRIER = 0,
    OVLM_COMM_BROADCAST,
    OVLM_COMM_ALL_GATHER,
    OVLM_COMM_ALL_TO_ALL,
    OVLM_COMM_ALL_REDUCE,
    OVLM_COMM_REDUCE_SCATTER,
    OVLM_COMM_SPLIT,
    OVLM_COMM_KIND_COUNT
} ovlm_comm_kind;

/* What the caller asked for, in numbers on which all ranks must agree: engines compare it, and say
 * it in messages.  Plain integers without padding, so that bytes can be compared. */
typedef struct ovlm_comm_label {
    uint64_t comm;        /* which communicator: the same on its ranks, another for each         */
    int64_t order;        /* number of the call on it, from 1                                    */
    int64_t piece;        /* a large reduction is several exchanges                              */
    int64_t amount;       /* bytes or elements where these must agree; else -1                   */
    int32_t kind, detail; /* ovlm_comm_kind; root, or 16*dtype + reduce                          */
} ovlm_comm_label;

enum { OVLM_COMM_TEXT_BYTES = 120 };

/* One line, e.g. "all_reduce of 12 float32 (sum), call 7". */
void ovlm_comm_label_describe(const ovlm_comm_label *label, char text[OVLM_COMM_TEXT_BYTES]);
/* OVLM_E_COMM names the first rank whose label is not the first rank's, with both calls.  Labels
 * lie stride_bytes apart.  world[n]: the ranks' names in messages; NULL: 0, 1, ... */
OVLM_NODISCARD ovlm_status ovlm_comm_labels_compare(const ovlm_comm_label *first, int64_t n,
                                                    int64_t stride_bytes, const int64_t *world,
                                                    ovlm_err *err);
/* The same for an all-to-all: send[r*stride + s] bytes go from r to s, which expects
 * recv[s*stride + r]. */
OVLM_NODISCARD ovlm_status ovlm_comm_counts_compare(const ovlm_comm_label *label,
                                                    const int64_t *send, const int64_t *recv,
                                                    int64_t n, int64_t stride,
                                                    const int64_t *world, ovlm_err *err);

/* The same for counts of which every rank says all: count[r*stride + s] is what r says of s, in
 * elements for a reduce-scatter, else in bytes. */
OVLM_NODISCARD ovlm_status ovlm_comm_rows_compare(const ovlm_comm_label *label,
                                                  const int64_t *count, int64_t n, int64_t stride,
                                                  const int64_t *world, ovlm_err *err);

/* What starts hand over. */
typedef struct ovlm_comm_work {
    ovlm_comm_label label;
    bool compare; /* over the ranks, before it is made: ovlm_comm_set_debug as of the call      */
    union {
        ovlm_all_gather all_gather;
        ovlm_all_to_all all_to_all;
        ovlm_all_reduce all_reduce;
        ovlm_reduce_scatter reduce_scatter;
    } of;
} ovlm_comm_work;

/* What carries bytes.  `self` is the engine's own; calls on one self never overlap, calls on
 * different ones may, and a forked child makes none but close.  Arguments were checked: counts
 * >= 0, offset arrays never NULL, pointers not NULL where there are bytes.  An all_gather whose
 * label is a barrier gathers nothing, and returns after all ranks have called it; one whose label
 * is a broadcast gathers from one rank.  Failures are OVLM_E_COMM (which the other ranks know of,
 * or were told by the engine), OVLM_E_NOMEM or OVLM_E_INTERRUPTED (of which abort tells them);
 * after one the communicator is never used again, only closed. */
typedef struct ovlm_comm_engine {
    const char *name; /* static                                                                 */
    bool compares;    /* it compares labels and counts at each call; otherwise that is done above
                         it, with ovlm_comm_set_debug                                           */
    bool any_thread;  /* calls may come from a thread other than the one that opened it          */
    bool host_memory; /* it takes host memory: reductions can be made above it                   */

    ovlm_status (*all_to_all)(void *self, const ovlm_comm_label *label,
                              const ovlm_all_to_all *args, ovlm_err *err);
    ovlm_status (*all_gather)(void *self, const ovlm_comm_label *label,
                              const ovlm_all_gather *args, ovlm_err *err);
    /* Fills *child, *rank and *size; *child is NULL where color < 0. */
    ovlm_status (*split)(void *self, const ovlm_comm_label *label, int64_t color, int64_t key,
                         void **child, int64_t *rank, int64_t *size, ovlm_err *err);

    /* Both NULL: made above, in the order of the ranks. */
    ovlm_status (*all_reduce)(void *self, const ovlm_comm_label *label,
                              const ovlm_all_reduce *args, ovlm_err *err);
    ovlm_status (*reduce_scatter)(void *self, const ovlm_comm_label *label,
                                  const ovlm_reduce_scatter *args, ovlm_err *err);

    /* Both NULL: the calls above on a helper thread, or at once without any_thread.  Work is copied
     * by start; waits come in the order of the starts, one for each. */
    ovlm_status (*start)(void *self, const ovlm_comm_work *work, void **request, ovlm_err *err);
    ovlm_status (*wait)(void *self, void *request, ovlm_err *err);

    void (*abort)(void *self, const char *message); /* from any thread                          */
    void (*close)(void *self); /* never communicates; in a forked child it only frees memory     */
} ovlm_comm_engine;

/* A communicator over an engine.  It owns `self` from here on, and closes it also when this call
 * fails.  `id` is the same on all of its ranks; engine stays (static). */
OVLM_NODISCARD ovlm_status ovlm_comm_open(const ovlm_comm_engine *engine, void *self, int64_t rank,
                                          int64_t size, uint64_t id, ovlm_comm **comm,
                                          ovlm_err *err);

/* Compares each call and its counts over the ranks before it is made, at the price of two small
 * exchanges; engines that compare do so in any case.  Children inherit it.  The same on all ranks,
 * between the same calls: it holds for what is called or started from then on. */
void ovlm_comm_set_debug(ovlm_comm *comm, bool debug);

#ifdef __cplusplus
}
#endif
#endif
