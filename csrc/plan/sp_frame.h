/* sp_frame.h - the large items of a step in groups, with least waste.
 *
 * Large items are those that need a degree whose communication is dear.  They are few, but whatever
 * shares a group with them pays for its degree as well, so their groups and micro-batches decide
 * how long a step takes.  All other items are a fluid here: a token of it is worth its least
 * GPU-seconds and a price for the memory that it takes, and it fills what time and memory the
 * groups have left.  Cost is the content's worth that the same GPU-seconds could have held. */
#ifndef OVLM_PLAN_SP_FRAME_H
#define OVLM_PLAN_SP_FRAME_H

#include "base/rng.h"
#include "plan/sp_model.h"

enum { SP_FRAME_BOXES = 16, SP_FRAME_ITEMS = 256 };

typedef struct sp_frame_group {
    int64_t j, box, count; /* degree index; micro-batch; items                               */
    double sum_s, sum_s2;
    double cost;           /* GPU-seconds                                                    */
} sp_frame_group;

typedef struct sp_frame_box {
    double tau;   /* seconds                                                                 */
    double worth; /* of the fluid on one GPU, GPU-seconds                                    */
    int64_t used, n_groups; /* GPUs; groups                                                  */
} sp_frame_box;

typedef struct sp_frame {
    const sp_model *model;
    int64_t n;                       /* large items: 0..n-1                                  */
    double fluid_s;                  /* longest item of the fluid                            */
    double excess[SP_MAX_DEGREES];   /* GPU-seconds per token above the cheapest degree      */
    double price_s;                  /* GPU-seconds per token of memory                      */
    int64_t n_boxes;
    sp_frame_box box[SP_FRAME_BOXES];
    double cost;                     /* of all boxes with groups; HUGE_VAL: no arrangement   */
    sp_frame_group *group;           /* [n+1]                                                */
    int64_t n_groups;
    int64_t *where;                  /* [n] group of an item                                 */
} sp_frame;

/* Finds the large items, at most SP_FRAME_ITEMS; nothing is arranged yet. */
OVLM_NODISCARD ovlm_status sp_frame_init(sp_frame *frame, const sp_model *model, ovlm_arena *arena,
                                         ovlm_err *err);

/* From nothing: groups of the large items in at most `most` micro-batches, then `steps` of
 * annealing, or fewer when the meter says so.  frame->cost is HUGE_VAL when no groups were found.
 * Boxes come out longest first, those without groups not at all. */
void sp_frame_arrange(sp_frame *frame, int64_t most, double price_s, int64_t steps,
                      ovlm_meter *meter, ovlm_rng *rng);

#endif
