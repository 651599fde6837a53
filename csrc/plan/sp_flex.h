/* sp_flex.h - policy "flex": several walks from different numbers of micro-batches. */
#ifndef OVLM_PLAN_SP_FLEX_H
#define OVLM_PLAN_SP_FLEX_H

#include "plan/sp_policy.h"

typedef struct sp_flex sp_flex;

/* Of the drafts, the best ones that walks start from. */
enum { SP_FLEX_STARTS = 2 };

/* Prepares walks from the best of the drafts, and from the warm start when its time is finite. */
OVLM_NODISCARD ovlm_status sp_flex_open(sp_flex **flex, const sp_model *model,
                                        const ovlm_sp_problem *problem, sp_chunked *starts,
                                        const sp_draft *warm, ovlm_err *err);
void sp_flex_close(sp_flex *flex); /* NULL is fine */

/* Spends `share` of the purse, stops at `target`; `best` only gets better. */
OVLM_NODISCARD ovlm_status sp_flex_run(sp_flex *flex, double target, double share,
                                       sp_purse *purse, sp_draft *best, ovlm_err *err);

#endif
