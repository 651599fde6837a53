/* sp_plan.h - from a draft to the caller's plan. */
#ifndef OVLM_PLAN_SP_PLAN_H
#define OVLM_PLAN_SP_PLAN_H

#include "plan/sp_draft.h"

/* The step's time to the last bit as sp_plan_assemble will state it; drafts' own times are sums in
 * other orders, and may round the other way. */
OVLM_NODISCARD ovlm_status sp_plan_time(const sp_model *model, const sp_draft *draft,
                                        double *time_s, ovlm_arena *arena, ovlm_err *err);

/* Places, times and orders a draft: micro-batches by descending time, groups by descending degree,
 * items by the caller's index.  With n_micro > 0 the plan has that many micro-batches, the last
 * ones empty.  Bound and status are left at zero.  OVLM_E_INTERNAL when a micro-batch cannot be
 * placed. */
OVLM_NODISCARD ovlm_status sp_plan_assemble(const sp_model *model, const sp_draft *draft,
                                            int64_t n_micro, ovlm_sp_plan **plan,
                                            ovlm_arena *arena, ovlm_err *err);

#endif
