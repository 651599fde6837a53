/* sp_exact.h - is there a plan of one micro-batch within a makespan?  Exact search for few items.
 *
 * Bin completion: the longest item that is left heads the next group; its degree and companions are
 * enumerated, fullest first.  Prices by which no group of degree d is worth more than d tell how
 * many GPUs are still wasted at most: a group that wastes more cannot be part of a plan. */
#ifndef OVLM_PLAN_SP_EXACT_H
#define OVLM_PLAN_SP_EXACT_H

#include "plan/sp_model.h"

enum { SP_EXACT_ITEMS = 64 };

typedef enum sp_answer {
    SP_IMPOSSIBLE, /* proved: no plan within the makespan, wherever groups are placed            */
    SP_POSSIBLE,   /* a set of groups exists                                                     */
    SP_UNDECIDED   /* the search was cut                                                         */
} sp_answer;

typedef struct sp_exact sp_exact;

OVLM_NODISCARD ovlm_status sp_exact_init(sp_exact **exact, const sp_model *model, const double *s,
                                         int64_t n, ovlm_arena *arena, ovlm_err *err);

/* s[0..n-1] descending (borrowed since init), n <= SP_EXACT_ITEMS.  Any set of items that a group
 * of degree d holds within `makespan` has a sum of pi[] of at most d.  theta[j]: how to weigh time
 * against memory where the room that is left is estimated; any value in [0,1] is sound.  At most
 * `nodes` steps of search, which the meter may end before. */
sp_answer sp_exact_decide(sp_exact *exact, double makespan, const double *pi, const double *theta,
                          int64_t nodes, ovlm_meter *meter);

#endif
