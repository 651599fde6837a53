/* sp_bound.h - certified lower bounds for sequence-parallel plans.  A false bound is the worst bug
 * this library can have: every function here rounds down, and stops early rather than guess. */
#ifndef OVLM_PLAN_SP_BOUND_H
#define OVLM_PLAN_SP_BOUND_H

#include "plan/sp_model.h"

/* Lower bound on the makespan (without fixed) of ONE micro-batch of the items k[0..n_items-1]
 * (ascending k).  `hint` is the best makespan known (HUGE_VAL: none): the bound need not exceed it
 * and work stops when it is met.  More meter = a stronger bound, never a weaker one. */
OVLM_NODISCARD ovlm_status sp_bound_micro(const sp_model *model, const int64_t *k, int64_t n_items,
                                          double hint, ovlm_meter *meter, double *bound_s,
                                          ovlm_arena *arena, ovlm_err *err);

/* The cheap part of it alone (line envelope, microseconds), for use inside searches. */
double sp_bound_quick(const sp_model *model, const int64_t *k, int64_t n_items);

/* Lower bound on the step time (with fixed) of all items over exactly n_micro micro-batches (empty
 * ones allowed, they cost nothing), or over any number of them when n_micro is 0.  HUGE_VAL when
 * n_micro is proved too few.  `hint` as above, the time of a plan: the bound is at most that. */
OVLM_NODISCARD ovlm_status sp_bound_step(const sp_model *model, int64_t n_micro, double hint,
                                         ovlm_meter *meter, double *bound_s, ovlm_arena *arena,
                                         ovlm_err *err);

/* Whether sp_bound_step tells makespans apart, which takes long and proves much. */
bool sp_bound_is_by_cases(const sp_model *model);

#endif
