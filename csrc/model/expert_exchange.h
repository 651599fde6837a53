/* expert_exchange.h - expert parallelism as a pass sees it: the ranks of a group hold E/d of the
 * experts of every layer each, and rows of tokens go to the ranks that hold their experts.
 *
 *   own rows, sorted by (expert, token)   --to_experts-->   [R,C] by (source rank, expert, token)
 *   what experts made of them             <--to_tokens--    [R,C]
 *
 * The backward is the mirror: slopes of what experts made go to experts, those of what they read to
 * tokens.  Gradients of routing weights are made where experts are, and travel with the latter.
 *
 * Experts: rank r of d holds [r E / d, (r+1) E / d), so that any d <= E will do.
 *
 * Rounds: every rank tells all others, in one exchange per layer, how many of its rows go to which
 * expert.  Each rank then knows what all others will receive, in the order (expert, source rank,
 * token): round i brings rank r's rows [i B_r, (i+1) B_r) of that order, so that a rank never holds
 * more than B_r, and nothing is dropped.  All ranks go as many rounds as the fullest one needs.
 * Since the order is by expert first, what a rank sends to another in a round is one range of its
 * own sorted rows.  An expert sees its rows in the order of one rank that has all tokens. */
#ifndef OVLM_MODEL_EXPERT_EXCHANGE_H
#define OVLM_MODEL_EXPERT_EXCHANGE_H

#include "base/arena.h"
#include "model/exchange.h"

/* A group, for all passes of one of its ranks: all of its ranks run passes of the same kind in the
 * same order and with the same checkpoint; one that has no tokens does so too. */
typedef struct ovlm_expert_group {
    void *ctx;
    int64_t degree, rank;
    ovlm_exchange_fn exchange;
    /* n numbers of each rank, one rank behind the other, into all [degree*n]. */
    ovlm_status (*share)(void *ctx, const int64_t *own, int64_t n, int64_t *all, ovlm_err *err);
} ovlm_expert_group;

/* Where rank r's experts of E begin; rank `degree` is the end. */
static inline int64_t ovlm_expert_cut(int64_t E, int64_t degree, int64_t r)
{
    return E * r / degree;
}

/* What a layer's rounds go by, the same on all ranks. */
typedef struct ovlm_expert_pass {
    const ovlm_expert_group *group;
    int64_t experts;
    int64_t rows;              /* of this rank's tokens: T*k                                   */
    int64_t *bound;            /* [degree] B_r                                                 */
    int64_t *count;            /* [layers,degree,E] rows of each rank for each expert          */
    int64_t *own;              /* [E] of this rank, of the present layer                       */
    int64_t *sent_first, *sent; /* [degree] of the present round: the range of own rows that
                                  goes there                                                   */
    int64_t *came;             /* [degree] rows that come from there                           */
    int64_t *send_bytes, *send_at, *recv_bytes, *recv_at; /* [degree] of the present exchange  */
} ovlm_expert_pass;

/* What ranks must agree on for their exchanges to match. */
typedef struct ovlm_expert_terms {
    int64_t T, k;
    int64_t layers, experts;
    int64_t chunk_rows;        /* B_r of this rank; 0: as its fair share and some more         */
    int64_t kind;              /* of the pass: any number                                      */
} ovlm_expert_terms;

/* All ranks.  Lives in the arena.  OVLM_E_ARG, on all ranks: passes of different kinds. */
OVLM_NODISCARD ovlm_status ovlm_expert_prepare(const ovlm_expert_group *group,
                                               const ovlm_expert_terms *terms, ovlm_arena *arena,
                                               ovlm_expert_pass **pass, ovlm_err *err);

/* All ranks: a layer's counts, from the places where its experts' own rows begin, [E+1] on the
 * device.  Waits. */
OVLM_NODISCARD ovlm_status ovlm_expert_share(ovlm_run *run, const ovlm_expert_pass *pass,
                                             int64_t layer, const int32_t *offsets);

/* One round of a layer.  Tables are on the device. */
typedef struct ovlm_expert_round {
    const ovlm_expert_pass *pass;
    int64_t rows, sent;        /* that come here; that go from here                            */
    int64_t held;              /* experts of this rank                                         */
    int32_t *offsets;          /* [held+1] where experts' rows begin, in the order of experts  */
    int32_t *arrived;          /* [rows] for each of that order, its place among what came     */
    int32_t *place;            /* [rows] the way back                                          */
} ovlm_expert_round;

/* How many rounds a layer goes, and the i-th of them, with its tables on `stack`; measuring, one,
 * the largest there can be.  Waits. */
int64_t ovlm_expert_rounds(const ovlm_run *run, const ovlm_expert_pass *pass, int64_t layer);
OVLM_NODISCARD ovlm_status ovlm_expert_round_begin(ovlm_run *run, const ovlm_expert_pass *pass,
                                                   int64_t layer, int64_t i, ovlm_stack *stack,
                                                   ovlm_expert_round *round);

/* Packed rows [sent,n] to the ranks of their experts: [rows,n], by source. */
OVLM_NODISCARD ovlm_status ovlm_expert_send(ovlm_run *run, const ovlm_expert_round *round,
                                            ovlm_tensor packed, ovlm_tensor received);

/* And back: [rows,n], by source, to packed rows [sent,n]. */
OVLM_NODISCARD ovlm_status ovlm_expert_return(ovlm_run *run, const ovlm_expert_round *round,
                                              ovlm_tensor received, ovlm_tensor packed);

/* The next range of own sorted rows that a round sends, from packed row `at` on, ranges without a
 * gap between them as one: its first row there; how many in *rows. */
int64_t ovlm_expert_range(const ovlm_expert_round *round, int64_t at, int64_t *rows);

#endif
