/* sp_step.h - a whole step under search: items in groups in boxes (micro-batches), with undo.
 *
 * Every change is journalled until sp_step_commit or sp_step_undo.  Sums of lengths are integers in
 * doubles, so undoing restores the very same times (as long as sums of squares stay below 2^53). */
#ifndef OVLM_PLAN_SP_STEP_H
#define OVLM_PLAN_SP_STEP_H

#include "base/rng.h"
#include "plan/sp_draft.h"

/* One journalled change; what a and b mean depends on the kind. */
typedef struct sp_step_change {
    enum { SP_TOOK, SP_PUT, SP_OPENED, SP_CLOSED, SP_TAU } kind;
    int64_t a, b;
    double tau;
} sp_step_change;

typedef struct sp_step {
    const sp_model *model;
    int64_t n_boxes, box_slots; /* micro-batches at most; group slots in each                    */

    int64_t *where;             /* [n] slot of an item; -1: in the pool                           */
    int64_t *next, *previous;   /* [n] neighbours in its group; -1: none                          */
    int64_t *pool_index;        /* [n] place in the pool                                          */

    /* [n_boxes*box_slots] box b has slots b*box_slots .. */
    double *time;               /* of the group, without fixed                                    */
    double *room;               /* tokens that still fit; -1: no group here                       */
    double *sum_s, *sum_s2;
    int64_t *j;                 /* degree index                                                   */
    int64_t *first, *count;     /* first item, number of items                                    */

    /* [n_boxes] */
    int64_t *idle;              /* GPUs without a group                                           */
    int64_t *high;              /* used slots are below this one                                  */
    int64_t *n_groups;
    double *tau;                /* largest group time                                             */
    bool *dirty;                /* tau may be too large                                           */
    bool *touched;              /* since the last commit                                          */

    int64_t *pool;              /* [n] items without a group                                      */
    int64_t n_pool;
    sp_step_change *journal;    /* grows on the heap: an arena cannot give pieces back            */
    int64_t n_journal, journal_room;
    double pool_penalty_s;      /* what an item without a group adds to the cost                  */
} sp_step;

/* An empty step: all items in the pool, n_boxes boxes without groups. */
OVLM_NODISCARD ovlm_status sp_step_init(sp_step *step, const sp_model *model, int64_t n_boxes,
                                        ovlm_arena *arena, ovlm_err *err);
void sp_step_release(sp_step *step); /* the journal; the rest is the arena's */

/* Replaces everything by a draft of at most n_boxes micro-batches; commits. */
OVLM_NODISCARD ovlm_status sp_step_load(sp_step *step, const sp_draft *draft, ovlm_err *err);
void sp_step_store(const sp_step *step, sp_draft *draft);

/* Room in the journal for at least `changes` more, so that the calls below cannot fail. */
OVLM_NODISCARD ovlm_status sp_step_reserve(sp_step *step, int64_t changes, ovlm_err *err);

/* Moves: an item to the pool (its group closes when it was the last), from the pool to a slot, and
 * a new group of degree index j in a box with enough idle GPUs and room for another group. */
void sp_step_take(sp_step *step, int64_t k);
void sp_step_put(sp_step *step, int64_t k, int64_t slot);
int64_t sp_step_open(sp_step *step, int64_t box, int64_t j);
void sp_step_close(sp_step *step, int64_t slot); /* a group without items */

/* Brings tau of every touched box up to date after items were taken. */
void sp_step_settle(sp_step *step);

/* Seconds of the step, fixed included, with a penalty per item in the pool. */
double sp_step_cost(const sp_step *step);
void sp_step_commit(sp_step *step);
void sp_step_undo(sp_step *step);

static inline int64_t sp_step_box(const sp_step *step, int64_t slot)
{
    return slot / step->box_slots;
}

#endif
