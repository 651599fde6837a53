/* dispatch.h - a plan's routes on data: rows from the ranks that hold them to the ranks that use
 * them, in one all-to-all, and gradients back.
 *
 *   ovlm_dispatch_prepare(&spec, &d, err)             once per route and rank
 *   ovlm_dispatch_measure(d, &parcel, &bytes, err)    the scratch that a parcel takes
 *   ovlm_dispatch_apply(d, &parcel, comm, err)        forward along the route
 *   ovlm_dispatch_reverse(d, &parcel, comm, err)      gradients back
 *   ovlm_dispatch_start / _start_reverse ... _wait    the same, with work in between
 *
 * What travels is rows of any width: token ids, patches, features; several arrays in one
 * all-to-all (features and the DeepStack features with them).  Items whose rows differ in width
 * travel by a route of bytes (ovlm_route_bytes) as rows of one byte.  Rows that stay on their rank
 * are copied once and never packed; where the rows for each rank lie together, nothing is packed.
 *
 * What arrives depends on the route alone: a composed route gives the bits that its two steps give,
 * one after the other.
 *
 * Memory is the host's (and that of backends with host_memory, once their queue was waited for).
 * On a device the same runs become an index of rows: packing is the op table's gather from the
 * array to the wire, unpacking its backward with `unique` set, and where rows are summed its
 * backward without; the wire is what the communicator's stream moves. */
#ifndef OVLM_ENGINE_DISPATCH_H
#define OVLM_ENGINE_DISPATCH_H

#include "backend/comm.h"
#include "base/threads.h"

/* One rank's part in a route; only read after it was prepared, so that several transfers may use it
 * at the same time. */
typedef struct ovlm_dispatch ovlm_dispatch;

typedef struct ovlm_dispatch_spec {
    const ovlm_route *route; /* rows may leave several times, or never                          */
    int64_t rank;
    const int64_t *place;     /* [k] where a piece's first row stands in its destination's array,
                                 ascending, pieces apart; NULL: at receive_row                  */
    int64_t source_rows;      /* rows of this rank's array before; -1: as far as the route reads */
    int64_t destination_rows; /* and after; -1: as far as the route writes                      */
} ovlm_dispatch_spec;

/* Prepares; on OVLM_OK the caller owns *out, which does not refer to the spec any more.
 * O(k + N), and per source row that is used m > 1 times, O(m). */
OVLM_NODISCARD ovlm_status ovlm_dispatch_prepare(const ovlm_dispatch_spec *spec,
                                                 ovlm_dispatch **out, ovlm_err *err);
void ovlm_dispatch_free(ovlm_dispatch *dispatch); /* NULL is fine */

/* What the route does at this rank, in rows: of its arrays, of those that leave for each rank and
 * that come from each (own rank: both what stays). */
typedef struct ovlm_dispatch_rows {
    int64_t source, destination;
    int64_t sent, received, stay;
    bool sums; /* reverse adds: some row goes to several places                                 */
} ovlm_dispatch_rows;

ovlm_dispatch_rows ovlm_dispatch_count(const ovlm_dispatch *dispatch);

/* One array of rows, on both sides of the route.  The two do not overlap. */
typedef struct ovlm_load {
    const void *from;  /* there: [source rows]; back: [destination rows]                        */
    void *to;          /* there: [destination rows], rows where nothing arrives stay as they
                          were; back: [source rows], 0 where nothing returns                    */
    int64_t row_bytes; /* >= 0                                                                  */
    ovlm_dtype dtype;  /* looked at where rows are summed, which float32, float64 and bfloat16
                          can be                                                                */
} ovlm_load;

/* What travels in one all-to-all.  row_bytes and dtypes are the same on all ranks. */
typedef struct ovlm_parcel {
    int64_t n;
    const ovlm_load *load; /* [n]                                                               */
    void *scratch;         /* 64-byte aligned                                                   */
    int64_t scratch_bytes; /* at least what ovlm_dispatch_measure says                          */
    ovlm_pool *pool;       /* threads that copy; NULL: the caller's alone                       */
} ovlm_parcel;

/* Scratch that a transfer of these loads takes, either way.  OVLM_E_ARG: a load that cannot travel
 * (which, and why), or more than 2^62 bytes. */
OVLM_NODISCARD ovlm_status ovlm_dispatch_measure(const ovlm_dispatch *dispatch,
                                                 const ovlm_parcel *parcel, int64_t *scratch_bytes,
                                                 ovlm_err *err);

/* Rows along the route.  All ranks call it. */
OVLM_NODISCARD ovlm_status ovlm_dispatch_apply(const ovlm_dispatch *dispatch,
                                               const ovlm_parcel *parcel, ovlm_comm *comm,
                                               ovlm_err *err);

/* Gradients of what arrived to where it came from.  A row that went to several places gets the sum
 * over them in the order of (destination, receive_row): r0 + r1 + r2 + ..., in its dtype, bfloat16
 * in float32 and rounded once.  So the bits depend on the route alone, not on threads. */
OVLM_NODISCARD ovlm_status ovlm_dispatch_reverse(const ovlm_dispatch *dispatch,
                                                 const ovlm_parcel *parcel, ovlm_comm *comm,
                                                 ovlm_err *err);

/* A transfer under way; the members are the dispatcher's own. */
typedef struct ovlm_trip {
    const ovlm_dispatch *dispatch;
    ovlm_comm *comm;
    ovlm_parcel parcel;
    bool back;
    int64_t ticket;
} ovlm_trip;

/* Packs and hands over; `from` and `to`, the loads and the scratch stay untouched until the wait.
 * Rows that stay are copied here too, while the others travel.  Fails without anything started. */
OVLM_NODISCARD ovlm_status ovlm_dispatch_start(const ovlm_dispatch *dispatch,
                                               const ovlm_parcel *parcel, ovlm_comm *comm,
                                               ovlm_trip *trip, ovlm_err *err);
OVLM_NODISCARD ovlm_status ovlm_dispatch_start_reverse(const ovlm_dispatch *dispatch,
                                                       const ovlm_parcel *parcel, ovlm_comm *comm,
                                                       ovlm_trip *trip, ovlm_err *err);
/* Waits for the rows and unpacks them.  Once per trip, in any order. */
OVLM_NODISCARD ovlm_status ovlm_dispatch_wait(ovlm_trip *trip, ovlm_err *err);

#endif
