/* sp_micro_search.h - the search of one micro-batch below the makespan that is known. */
#ifndef OVLM_PLAN_SP_MICRO_SEARCH_H
#define OVLM_PLAN_SP_MICRO_SEARCH_H

#include "plan/sp_pack.h"

/* A packing put aside: the same arrays as in sp_pack. */
typedef struct sp_saved {
    sp_group *group; /* [max_groups] */
    int64_t *next;   /* [n]          */
    int64_t n_groups;
    double makespan; /* HUGE_VAL: nothing saved */
} sp_saved;

OVLM_NODISCARD ovlm_status sp_saved_init(sp_saved *saved, const sp_pack *pack, ovlm_arena *arena,
                                         ovlm_err *err);

/* Keeps the packing, whose pool must be empty. */
void sp_saved_keep(sp_saved *saved, const sp_pack *pack);
void sp_saved_load(const sp_saved *saved, sp_pack *pack);

/* Improves `saved` until the meter stops it, `target` is reached or nothing helps.  floor_s: no
 * plan is better. */
OVLM_NODISCARD ovlm_status sp_micro_search(sp_pack *pack, sp_saved *saved, double floor_s,
                                           double target, ovlm_meter *meter, ovlm_rng *rng,
                                           ovlm_arena *arena, ovlm_err *err);

#endif
