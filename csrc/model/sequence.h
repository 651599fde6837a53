/* sequence.h - sequence parallelism as a pass sees it (Ulysses, arXiv 2309.14509; FlexSP 2.1): the
 * ranks of a group hold shards of one packed token axis, and around the attention core shards of
 * tokens become shards of heads.
 *
 *   q, k, v [T_r, all heads]  --to_heads-->  [T, heads of rank r]  attention over the group's T
 *   o       [T_r, all heads]  <-to_tokens--  [T, heads of rank r]
 *
 * The backward is the mirror: slopes of o go to heads, those of q, k and v to tokens, where slopes
 * of key/value heads that several ranks hold are summed.
 *
 * Tokens: rank r of d holds rows [r T / d, (r+1) T / d).  Query heads: [r H / d, (r+1) H / d), so
 * that any d <= H will do; and the key/value heads that they read, some of them on several ranks.
 *
 * With more ranks than heads, or by choice, d = h c: c rows of h ranks each (Ring Attention, arXiv
 * 2310.01889).  Ranks i h to (i+1) h - 1 are row i, whose tokens follow those of row i - 1; among
 * them heads are shared as above, T being the row's tokens.  The c ranks that have the same heads
 * are a ring: queries stay, and keys and values of earlier rows come in steps, s = 1, 2, ..., from
 * the row s before.  Causal attention reads of these only the one segment that crosses the row's
 * beginning, all of what is there of it, so that just those keys travel, and a step that no row of
 * the group needs is left out by all.  Partial results are merged by their log-sum-exp; in the
 * backward the keys and values come again, and their slopes go back.
 *
 * The model packs and unpacks by the op table; who moves the bytes it does not know. */
#ifndef OVLM_MODEL_SEQUENCE_H
#define OVLM_MODEL_SEQUENCE_H

#include "base/arena.h"
#include "model/run.h"

/* Bytes between the ranks of a group, in host memory; arrays are [degree]. */
typedef struct ovlm_sequence_exchange {
    const void *send;
    const int64_t *send_bytes, *send_at;
    void *recv;
    const int64_t *recv_bytes, *recv_at;
} ovlm_sequence_exchange;

/* A group, for the passes of one of its ranks.  All of its ranks run passes over the same segments,
 * of the same kind and with the same checkpoint, so that exchanges match; one that has no tokens
 * does so too. */
typedef struct ovlm_sequence {
    void *ctx;
    int64_t degree, rank;
    int64_t head_ranks;        /* at most so many share heads, more make rings; 0: the heads alone
                                  say how many                                                 */
    ovlm_status (*exchange)(void *ctx, const ovlm_sequence_exchange *args, ovlm_err *err);
} ovlm_sequence;

/* Where rank r's rows of T begin; rank `degree` is the end. */
static inline int64_t ovlm_sequence_cut(int64_t T, int64_t degree, int64_t r)
{
    return T * r / degree;
}

/* A rank's rows of the token axis, its query heads, and the key/value heads that these read. */
typedef struct ovlm_sequence_part {
    int64_t first, rows;
    int64_t head, heads;
    int64_t kv_head, kv_heads;
} ovlm_sequence_part;

/* h, ranks of a row: the largest divisor of the degree that is neither above the query heads nor
 * above head_ranks, where that is not 0. */
int64_t ovlm_sequence_row_ranks(int64_t degree, int64_t heads, int64_t head_ranks);

ovlm_sequence_part ovlm_sequence_part_of(int64_t T, int64_t heads, int64_t kv_heads,
                                         int64_t degree, int64_t row_ranks, int64_t rank);

/* Heads of one attention call, counted from the part's first: its kv_heads divide its heads. */
typedef struct ovlm_head_run {
    int64_t head, heads;
    int64_t kv_head, kv_heads;
} ovlm_head_run;

/* A part may begin and end inside the queries of a key/value head: those, and the whole ones
 * between.  How many runs. */
enum { OVLM_HEAD_RUNS_MOST = 3 };
int64_t ovlm_sequence_head_runs(const ovlm_sequence_part *part, int64_t heads, int64_t kv_heads,
                                ovlm_head_run run[OVLM_HEAD_RUNS_MOST]);

/* The ring of a rank's row; arrays are [steps + 1], entry 0 unused. */
typedef struct ovlm_ring {
    int64_t steps;             /* that some row of the group needs; 0: attention as within a row */
    int64_t queries;           /* the row's first, which belong to a segment of earlier rows     */
    int64_t *take;             /* keys that come from the row s before: its last                 */
    int64_t *give;             /* and that go to the row s behind: this row's last               */
    int64_t most_give;
    int32_t *bounds;           /* [bounds_n] for segments: the packed ones, clipped to the row,
                                  then 0, queries, then 0, take[1], 0, take[2] ...               */
    int64_t bounds_n;
} ovlm_ring;

/* What the blocks of a pass go by. */
typedef struct ovlm_sequence_pass {
    const ovlm_sequence *group;
    int64_t heads, kv_heads;
    int64_t row_ranks, row;         /* h, and which row this rank is in                        */
    int64_t first, rows;            /* tokens of that row, of the group's                      */
    int64_t segments, longest;      /* of the group; the longest clipped to the row            */
    const ovlm_sequence_part *part; /* [degree]                                                */
    int64_t runs;
    ovlm_head_run run[OVLM_HEAD_RUNS_MOST];
    ovlm_ring ring;
    int64_t *send_bytes, *send_at, *recv_bytes, *recv_at; /* [degree] of the present exchange  */
} ovlm_sequence_pass;

/* For the segments of the whole group, start[segments+1] on the host; lives in the arena. */
OVLM_NODISCARD ovlm_status ovlm_sequence_prepare(const ovlm_sequence *group, const int32_t *start,
                                                 int64_t segments, int64_t heads,
                                                 int64_t kv_heads, ovlm_arena *arena,
                                                 ovlm_sequence_pass **pass, ovlm_err *err);

/* This rank's part. */
static inline const ovlm_sequence_part *ovlm_sequence_own(const ovlm_sequence_pass *pass)
{
    return &pass->part[pass->group->rank];
}

/* Tensors [T_r, all heads] that travel together. */
typedef struct ovlm_lane {
    ovlm_tensor rows;
    bool kv;                   /* of the key/value heads, else of the query heads              */
} ovlm_lane;

/* own [rows, this rank's heads of each lane, one lane behind the other]: from the lanes of all
 * ranks of the row (to_heads), or back to them (to_tokens), each in one exchange that waits for
 * run's queue.  A key/value head that comes from several ranks is their sum, in the order of the
 * ranks, made in run->exact and rounded once. */
OVLM_NODISCARD ovlm_status ovlm_sequence_to_heads(ovlm_run *run, const ovlm_sequence_pass *pass,
                                                  const ovlm_lane *lane, int64_t lanes,
                                                  ovlm_tensor own);
OVLM_NODISCARD ovlm_status ovlm_sequence_to_tokens(ovlm_run *run, const ovlm_sequence_pass *pass,
                                                   const ovlm_lane *lane, int64_t lanes,
                                                   ovlm_tensor own);

/* Step `step` of the ring, in one exchange as above: `send` goes to the rank of the row `step`
 * behind and `recv` comes from the one `step` before; with `back` the other way.  Both dense; one
 * that has no rows has no rank at its other end. */
OVLM_NODISCARD ovlm_status ovlm_sequence_pass_on(ovlm_run *run, const ovlm_sequence_pass *pass,
                                                 int64_t step, bool back, ovlm_tensor send,
                                                 ovlm_tensor recv);

#endif
