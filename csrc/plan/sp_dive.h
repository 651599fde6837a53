/* sp_dive.h - a whole step packed group by group, one micro-batch after the other. */
#ifndef OVLM_PLAN_SP_DIVE_H
#define OVLM_PLAN_SP_DIVE_H

#include "plan/sp_draft.h"
#include "plan/sp_frame.h"
#include "plan/sp_pack.h"

typedef struct sp_dive {
    sp_pack pack;
    int64_t *item; /* [n] scratch                                                              */
    double *level; /* [n_boxes] seconds that each box of the last build was meant to take       */
} sp_dive;

/* What a dive aims at. */
typedef struct sp_aim {
    int64_t n_boxes;
    const sp_frame *frame; /* groups that the first boxes begin with, and their makespans       */
    double slack;          /* makespan of any other box, over its share of the work that is left */
    double *stretch;       /* [n_boxes] factor on either                                        */
    double *fill;          /* [n_boxes] tokens of a box, over its share of them                 */
    double theta;          /* price of time, over that of time and memory                       */
} sp_aim;

OVLM_NODISCARD ovlm_status sp_dive_init(sp_dive *dive, const sp_model *model, int64_t n_boxes,
                                        ovlm_arena *arena, ovlm_err *err);

/* Packs boxes one after the other, no group longer than its box's level, each from the longest item
 * left and with others whose time per token suits what the group has left; draft = those groups.
 * Items that found no place are in none.  Returns the items looked at. */
int64_t sp_dive_build(sp_dive *dive, const sp_aim *aim, sp_draft *draft);

#endif
