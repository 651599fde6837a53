/* dispatch_state.h - the inside of a dispatcher, for its files. */
#ifndef OVLM_ENGINE_DISPATCH_STATE_H
#define OVLM_ENGINE_DISPATCH_STATE_H

#include "base/arena.h"
#include "engine/dispatch.h"

/* Rows that this rank exchanges with others, as runs of one array.  On the wire they stand rank
 * after rank, those of one rank in the order of the route; own rows are not among them. */
typedef struct dispatch_runs {
    int64_t n;
    int64_t *row;       /* [n] first row in the array                                           */
    int64_t *peer;      /* [n] rank at the other end, ascending                                 */
    int64_t *wire;      /* [n+1] rows on the wire before the run                                */
    int64_t *peer_wire; /* [N+1] rows on the wire before the rank's                             */
    int64_t *peer_row;  /* [N] first row in the array where `direct`                            */
    bool direct;        /* one run per rank at most: the array can be the wire                  */
} dispatch_runs;

/* Rows that stay: run i is rows before[i] .. before[i+1]-1 of them. */
typedef struct dispatch_stay {
    int64_t n;
    int64_t *from, *to; /* [n] first row, before and after                                      */
    int64_t *before;    /* [n+1]                                                                */
} dispatch_stay;

/* One place that rows of the source went to. */
typedef struct dispatch_copy {
    int64_t peer, row; /* row of the wire; of the destination array where peer is the own rank  */
} dispatch_copy;

/* The source's rows cut where the set of their copies changes: piece s has rows row[s] ..
 * row[s+1]-1 and copies first[s] .. first[s+1]-1, in the order in which they are added. */
typedef struct dispatch_sums {
    int64_t n, most; /* most copies that a row has                                              */
    int64_t *row;   /* [n+1] */
    int64_t *first; /* [n+1] */
    dispatch_copy *copy;
} dispatch_sums;

struct ovlm_dispatch {
    int64_t rank, n_ranks;
    ovlm_dispatch_rows rows;
    dispatch_runs out, in;
    dispatch_stay stay;
    bool tiled;         /* every row of the source leaves once: the way back only moves rows    */
    dispatch_sums sums; /* where not                                                            */
    ovlm_arena arena;   /* owns all arrays                                                      */
};

/* Fills tiled and, where it is not, sums and rows.sums (dispatch_sums.c). */
OVLM_NODISCARD ovlm_status dispatch_find_sums(ovlm_dispatch *dispatch, ovlm_err *err);

/* Where a transfer has its scratch. */
typedef struct dispatch_scratch {
    int64_t *send_bytes, *send_at, *recv_bytes, *recv_at; /* [N]                                */
    char *out, *in;     /* the wires of those runs, NULL where the array is the wire            */
    const void **parts; /* [threads, sums.most] what a thread adds                              */
} dispatch_scratch;

/* Places all of it from `base` on (NULL: only measures); the bytes it takes.  Loads are checked. */
int64_t dispatch_lay_out(const ovlm_dispatch *dispatch, const ovlm_parcel *parcel, char *base,
                         dispatch_scratch *scratch);

/* Bytes of a row of all loads together. */
int64_t dispatch_width(const ovlm_parcel *parcel);

/* Rows of a transfer on their way through memory, shared out over the parcel's threads. */
typedef struct dispatch_move {
    const ovlm_dispatch *dispatch;
    const ovlm_parcel *parcel;
    const dispatch_runs *runs; /* what stands on the wire                                       */
    char *wire;
    int64_t width; /* dispatch_width                                                            */
    bool back;     /* what stays goes from its place after to its place before                  */
    const void **parts;
} dispatch_move;

void dispatch_pack(const dispatch_move *move);   /* from -> wire                                */
void dispatch_unpack(const dispatch_move *move); /* wire -> to                                  */
void dispatch_keep(const dispatch_move *move);   /* from -> to, what stays                      */
void dispatch_add(const dispatch_move *move);    /* wire and from -> to, with sums              */

#endif
