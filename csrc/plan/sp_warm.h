/* sp_warm.h - a start for one batch from the plan of another. */
#ifndef OVLM_PLAN_SP_WARM_H
#define OVLM_PLAN_SP_WARM_H

#include "plan/sp_draft.h"

/* Opens the degrees of problem->warm_start's micro-batches, with its times as targets, and puts the
 * new items in.  draft->time_s stays HUGE_VAL when that does not hold them all.  Nothing of the old
 * plan is trusted: a degree that is not permitted, or has no room, is left out. */
OVLM_NODISCARD ovlm_status sp_warm_start(const sp_model *model, const ovlm_sp_problem *problem,
                                         sp_draft *draft, ovlm_arena *arena, ovlm_err *err);

#endif
