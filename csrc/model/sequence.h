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
 * that any d <= H will do; and the key/value heads that they read, some on several ranks. */
#ifndef OVLM_MODEL_SEQUENCE_H
#define OVLM_MODEL_SEQUENCE_H

#include "base/arena.h"
#include "model/exchange.h"

/* A group, for the passes of one of its ranks.  All of its ranks run passes over the same segments,
 * of the same kind and with the same checkpoint, so that exchanges match; one that has no tokens
 * does so too. */
typedef struct ovlm_sequence {
    void *ctx;
    int64_t degree, rank;
    ovlm_exchange_fn exchange;
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

ovlm_sequence_part ovlm_sequence_part_of(int64_t T, int64_t heads, int64_t kv_heads,
                                         int64_t degree, int64_t rank);

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

/* What the blocks of a pass go by. */
typedef struct ovlm_sequence_pass {
    const ovlm_sequence *group;
    int64_t T, heads, kv_heads;
    const ovlm_sequence_part *part; /* [degree]                                                */
    int64_t runs;
    ovlm_head_run run[OVLM_HEAD_RUNS_MOST];
    int64_t *send_bytes, *send_at, *recv_bytes, *recv_at; /* [degree] of the present exchange  */
} ovlm_sequence_pass;

/* For T tokens of the whole group; lives in the arena.  OVLM_E_ARG: more ranks than query heads. */
OVLM_NODISCARD ovlm_status ovlm_sequence_prepare(const ovlm_sequence *group, int64_t T,
                                                 int64_t heads, int64_t kv_heads,
                                                 ovlm_arena *arena, ovlm_sequence_pass **pass,
                                                 ovlm_err *err);

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

/* own [T, this rank's heads of each lane, one lane behind the other]: from the lanes of all ranks
 * (to_heads), or back to them (to_tokens), each in one exchange that waits for run's queue.  A
 * key/value head that comes from several ranks is their sum, in the order of the ranks, made in
 * run->exact and rounded once. */
OVLM_NODISCARD ovlm_status ovlm_sequence_to_heads(ovlm_run *run, const ovlm_sequence_pass *pass,
                                                  const ovlm_lane *lane, int64_t lanes,
                                                  ovlm_tensor own);
OVLM_NODISCARD ovlm_status ovlm_sequence_to_tokens(ovlm_run *run, const ovlm_sequence_pass *pass,
                                                   const ovlm_lane *lane, int64_t lanes,
                                                   ovlm_tensor own);

#endif
