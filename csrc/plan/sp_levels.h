/* sp_levels.h - whole steps built from nothing, towards a target time of each micro-batch. */
#ifndef OVLM_PLAN_SP_LEVELS_H
#define OVLM_PLAN_SP_LEVELS_H

#include "plan/sp_policy.h"

/* Searches with `share` of the purse over the fewest micro-batches that hold all tokens and one
 * more (n_micro > 0: but no more than that); adds the best plans of two arrangements to the drafts.
 * Nothing to do, and nothing done, for steps of one micro-batch or without a draft. */
OVLM_NODISCARD ovlm_status sp_levels_improve(const sp_model *model, sp_chunked *starts,
                                             int64_t n_micro, double share, uint64_t seed,
                                             sp_purse *purse, ovlm_arena *arena, ovlm_err *err);

#endif
