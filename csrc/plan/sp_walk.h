/* sp_walk.h - a random walk over whole steps: ruin, recreate, accept what is not much worse. */
#ifndef OVLM_PLAN_SP_WALK_H
#define OVLM_PLAN_SP_WALK_H

#include "plan/sp_repair.h"

typedef struct sp_walk {
    sp_step step;
    sp_draft best;      /* the best step seen; time HUGE_VAL while items are in the pool         */
    double cost;        /* of the step now                                                       */
    double best_cost;
    bool unsaved;       /* the step now is the best, and not in `best` yet                       */
    ovlm_rng rng;
    double balance;     /* taste of this walk: small suits many small groups, large few wide ones */
    int64_t at, length; /* iterations done in this cycle of cooling, and its length              */
    int64_t *out;       /* [n] items of the ruin, in the order in which they go back             */
    int64_t n_out;
    int64_t *place_j, *place; /* [n] scratch for sp_place                                        */
} sp_walk;

/* A walk from a draft (time HUGE_VAL: from all items in the pool) over at most n_boxes boxes. */
OVLM_NODISCARD ovlm_status sp_walk_init(sp_walk *walk, const sp_model *model, int64_t n_boxes,
                                        const sp_draft *start, double balance, uint64_t seed,
                                        ovlm_arena *arena, ovlm_err *err);
void sp_walk_release(sp_walk *walk);

/* Walks until the meter says stop, or the best is at most `target`. */
OVLM_NODISCARD ovlm_status sp_walk_run(sp_walk *walk, double target, ovlm_meter *meter,
                                       ovlm_err *err);

#endif
