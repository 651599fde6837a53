/* sp_bound_cases.h - bound of a whole step by cases of its makespans, each with prices of its own.
 *
 * Let the makespans of m micro-batches be t_1 >= .. >= t_m.  For any prices per item and V(t), the
 * most priced content of a micro-batch of makespan t (sp_bound_content.h), the step takes
 *   sum over b of (t_b + fixed)  >=  sum of all prices + sum over b of phi(t_b),
 *   phi(t) = t + fixed - V(t),
 * as every item is in one micro-batch.  A case says in which interval each t_b may lie; its bound
 * is the sum of prices and of the least phi in each of these, and the greatest over all prices
 * counts.  Cases begin with one that excludes nothing, and the worst is cut in two: t_b is in an
 * interval up to i (then so are all t after it) or beyond (then all before it are).  More than m
 * micro-batches are one case more, all makespans free: prices are scaled so that phi is never
 * negative, and the step takes at least their sum + (m + 1)*least phi.
 *
 * Prices come from a linear program over the contents met so far, in a box around the best ones;
 * all prices met are kept and tried on every case. */
#ifndef OVLM_PLAN_SP_BOUND_CASES_H
#define OVLM_PLAN_SP_BOUND_CASES_H

#include "plan/sp_model.h"

/* Raises *low, a proved bound, towards `hint`, the time of a plan, for at least `least` and at most
 * `most` non-empty micro-batches of makespans of mean_s or so; a step with one above longest_s
 * takes at least the hint. */
OVLM_NODISCARD ovlm_status sp_cases_raise(const sp_model *model, int64_t least, int64_t most,
                                          double mean_s, double longest_s, double hint,
                                          ovlm_meter *meter, double *low, ovlm_arena *arena,
                                          ovlm_err *err);

#endif
