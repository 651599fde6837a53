/* simulate.h - what the event engine and its check share. */
#ifndef OVLM_PLAN_SIMULATE_H
#define OVLM_PLAN_SIMULATE_H

#include "base/arena.h"

/* E_ARG with the first bad array entry: sizes, starts that descend, names out of range, a resource
 * twice in one task, durations that are negative or not finite or add up to infinity. */
OVLM_NODISCARD ovlm_status simulate_problem_check(const ovlm_simulate_problem *problem,
                                                  ovlm_arena *arena, ovlm_err *err);

/* E_INTERNAL unless the times obey the rules of ovlm.h: durations kept, dependencies first, one
 * task at a time on each resource, every start explained by its cause.  `started` lists all tasks
 * in the order in which they started. */
OVLM_NODISCARD ovlm_status simulate_result_check(const ovlm_simulate_problem *problem,
                                                 const int64_t *started, const double *start_s,
                                                 const double *end_s, const int64_t *cause,
                                                 ovlm_arena *arena, ovlm_err *err);

#endif
