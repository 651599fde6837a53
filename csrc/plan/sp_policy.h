/* sp_policy.h - whole steps from sorted chunks: the baselines, and the starts of the search. */
#ifndef OVLM_PLAN_SP_POLICY_H
#define OVLM_PLAN_SP_POLICY_H

#include "plan/sp_draft.h"
#include "plan/sp_purse.h"

/* FlexSP tries the first feasible number of micro-batches and four more. */
enum { SP_TRIES = 5, SP_DRAFTS = SP_TRIES + 3 };

/* A draft per number of micro-batches for which sorted chunks were feasible, and room for three. */
typedef struct sp_chunked {
    sp_draft draft[SP_DRAFTS];
    int64_t n_drafts, best; /* best: index of the one with the least time                        */
    bool mixed;             /* some chunk fits no single degree, so it has mixed groups          */
} sp_chunked;

/* Sorted chunks (eqs 23-24) without search; `policy` says which groups a chunk may have: one degree
 * each, or (chunked and flex) any mix where no single degree holds it.  n_micro as in the problem:
 * the most.  Spends no work; stops at the first draft once the clock is over. */
OVLM_NODISCARD ovlm_status sp_policy_start(const sp_model *model, ovlm_sp_policy policy,
                                           int64_t n_micro, sp_chunked *chunked, sp_purse *purse,
                                           ovlm_arena *arena, ovlm_err *err);

/* Sorted chunks in as many micro-batches as are best for each degree alone, which may be many more
 * than the fewest that hold all: policy static has that degree throughout, any other the best one
 * for each chunk.  The best of all goes into `draft` where it is better.  Otherwise as above. */
OVLM_NODISCARD ovlm_status sp_policy_degrees(const sp_model *model, ovlm_sp_policy policy,
                                             int64_t n_micro, sp_draft *draft, sp_purse *purse,
                                             ovlm_arena *arena, ovlm_err *err);

/* order[0..n_drafts-1] = drafts by time, the earlier one first among equals; sets best. */
void sp_policy_order(sp_chunked *chunked, int64_t *order);

/* Policy "chunked" from its starts: mixed groups in the chunks of the best draft, then the group
 * solver in each chunk of each draft, the best one first and longest.  Takes a fixed share of the
 * purse's allowance and splits it in fixed parts, so that it is one computation whatever comes
 * after it, and more work is never worse. */
OVLM_NODISCARD ovlm_status sp_policy_chunked(const sp_model *model, sp_chunked *chunked,
                                             uint64_t seed, sp_purse *purse, ovlm_arena *arena,
                                             ovlm_err *err);

#endif
