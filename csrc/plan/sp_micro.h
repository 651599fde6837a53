/* sp_micro.h - one micro-batch: groups for a given set of sequences, least makespan.
 *
 * "Makespan" is without model->fixed. */
#ifndef OVLM_PLAN_SP_MICRO_H
#define OVLM_PLAN_SP_MICRO_H

#include "base/rng.h"
#include "plan/sp_model.h"

typedef struct sp_micro {
    int64_t n_groups;
    int64_t *j;      /* [n_groups] degree index; room for n_items entries                       */
    int64_t *start;  /* [n_groups+1] room for n_items+1                                         */
    int64_t *item;   /* [n_items] k, grouped                                                    */
    double makespan; /* seconds; HUGE_VAL while no plan is known                                */
} sp_micro;

/* Room for a micro-batch of up to n_items; makespan HUGE_VAL. */
OVLM_NODISCARD ovlm_status sp_micro_init(sp_micro *micro, int64_t n_items, ovlm_arena *arena,
                                         ovlm_err *err);

/* Least makespan over mixed groups of items k[0..n_items-1] (ascending k, so longest first).  On
 * entry `micro` may hold a plan of the same items (micro->makespan finite) to improve; it only gets
 * better.  Stops when the meter says so, when `target` is reached, or when stuck; the construction
 * is completed even when no work is allowed.  A step of work is an item looked at, some 50 ns.
 * Without any plan micro->makespan stays HUGE_VAL.  Scratch comes from the arena and goes back. */
OVLM_NODISCARD ovlm_status sp_micro_solve(const sp_model *model, const int64_t *k, int64_t n_items,
                                          double target, ovlm_meter *meter, ovlm_rng *rng,
                                          sp_micro *micro, ovlm_arena *arena, ovlm_err *err);

/* Construction alone: no search; the start of the above.  The meter counts, and only its clock
 * ends it. */
OVLM_NODISCARD ovlm_status sp_micro_construct(const sp_model *model, const int64_t *k,
                                              int64_t n_items, ovlm_meter *meter, sp_micro *micro,
                                              ovlm_arena *arena, ovlm_err *err);

/* All groups of one degree index j; longest first onto the least loaded group.  False through
 * makespan HUGE_VAL when that degree cannot hold them. */
OVLM_NODISCARD ovlm_status sp_micro_homogeneous(const sp_model *model, const int64_t *k,
                                                int64_t n_items, int64_t j, sp_micro *micro,
                                                ovlm_arena *arena, ovlm_err *err);

#endif
