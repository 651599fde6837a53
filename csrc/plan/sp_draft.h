/* sp_draft.h - a whole step as groups in micro-batches, before it is placed and certified. */
#ifndef OVLM_PLAN_SP_DRAFT_H
#define OVLM_PLAN_SP_DRAFT_H

#include "plan/sp_micro.h"

typedef struct sp_draft {
    int64_t n_micro;
    int64_t *micro_start; /* [n_micro+1] room for n+2: groups of micro-batch m                   */
    int64_t *j;           /* [n_groups] room for n: degree index                                 */
    int64_t *start;       /* [n_groups+1] room for n+1: items of group g                         */
    int64_t *item;        /* [n] k, grouped                                                      */
    double time_s;        /* with fixed; HUGE_VAL: no plan                                       */
} sp_draft;

/* Room for n items; no plan. */
OVLM_NODISCARD ovlm_status sp_draft_init(sp_draft *draft, int64_t n, ovlm_arena *arena,
                                         ovlm_err *err);
void sp_draft_copy(sp_draft *to, const sp_draft *from);

/* An empty draft to which sp_draft_append adds micro-batches one after the other; each adds its
 * makespan and model->fixed to time_s. */
void sp_draft_begin(sp_draft *draft);
void sp_draft_append(sp_draft *draft, const sp_model *model, const sp_micro *micro);

#endif
