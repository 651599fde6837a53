/* sp_policy.h - whole steps from sorted chunks: the baselines, and the starts of the search. */
#ifndef OVLM_PLAN_SP_POLICY_H
#define OVLM_PLAN_SP_POLICY_H

#include "plan/sp_draft.h"
#include "plan/sp_purse.h"

/* FlexSP tries the first feasible number of micro-batches and four more. */
enum { SP_TRIES = 5, SP_DRAFTS = SP_TRIES + 2 };

/* A draft per number of micro-batches for which sorted chunks were feasible, and room for two. */
typedef struct sp_chunked {
    sp_draft draft[SP_DRAFTS];
    int64_t n_drafts, best; /* best: index of the one with the least time                        */
    bool mixed;             /* some chunk fits no single degree, so it has mixed groups          */
} sp_chunked;

/* Sorted chunks (eqs 23-24) without search; `policy` says which groups a chunk may have: one degree
 * for the whole step, one per chunk, or (chunked and flex) any mix where no single degree holds it.
 * n_micro as in the problem.  Spends no work; stops at the first draft once the clock is over. */
OVLM_NODISCARD ovlm_status sp_policy_start(const sp_model *model, ovlm_sp_policy policy,
                                           int64_t n_micro, sp_chunked *chunked, sp_purse *purse,
                                           ovlm_arena *arena, ovlm_err *err);

/* order[0..n_drafts-1] = drafts by time, the earlier one first among equals; sets best. */
void sp_policy_order(sp_chunked *chunked, int64_t *order);

/* Mixed groups, where they are better, for the chunks of the `most` best drafts; no search. */
OVLM_NODISCARD ovlm_status sp_policy_mix(const sp_model *model, sp_chunked *chunked, int64_t most,
                                         sp_purse *purse, ovlm_arena *arena, ovlm_err *err);

/* Improves every micro-batch of the draft by itself with `share` of the purse. */
OVLM_NODISCARD ovlm_status sp_policy_improve(const sp_model *model, sp_draft *draft, double share,
                                             uint64_t seed, sp_purse *purse, ovlm_arena *arena,
                                             ovlm_err *err);

/* Policy "chunked" from its starts: mixed groups, then the group solver in each chunk of each
 * draft, the best one first and longest. */
OVLM_NODISCARD ovlm_status sp_policy_chunked(const sp_model *model, sp_chunked *chunked,
                                             uint64_t seed, sp_purse *purse, ovlm_arena *arena,
                                             ovlm_err *err);

#endif
