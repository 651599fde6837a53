/* sp_repair.h - ruin and recreate on a whole step: the search behind policy "flex". */
#ifndef OVLM_PLAN_SP_REPAIR_H
#define OVLM_PLAN_SP_REPAIR_H

#include "plan/sp_step.h"

/* Where to put an item counts, besides the growth of the step's time, what it wastes. */
typedef struct sp_taste {
    double excess;  /* weight of GPU time beyond that of the item's cheapest degree              */
    double balance; /* weight of using up time and memory of a group unevenly                    */
    double fit;     /* weight of the time that the group has left                                */
    double blink;   /* probability of passing over a group                                       */
    const double *floor_s; /* [n_boxes] growth up to this is free; NULL: 0, and a box costs fixed */
} sp_taste;

/* Puts the pooled items k[0..n_items-1], in that order, where they cost least; those that fit
 * nowhere stay in the pool.  Returns the number of groups looked at. */
int64_t sp_repair(sp_step *step, const int64_t *k, int64_t n_items, const sp_taste *taste,
                  ovlm_rng *rng);

#endif
