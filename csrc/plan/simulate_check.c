/* simulate_check.c - checks of the event engine's input and of its result. */
#include "plan/simulate.h"

#include <math.h>

static const int64_t MOST_TASKS = (int64_t)1 << 40; /* indices stay far from overflow */

static ovlm_status durations_check(const ovlm_simulate_problem *problem, ovlm_err *err)
{
    double total_s = 0.0;
    for (int64_t t = 0; t < problem->n_tasks; t++) {
        double d = problem->duration_s[t];
        if (!(d >= 0.0) || isinf(d)) {
            return OVLM_FAIL(err, OVLM_E_ARG, "duration[%lld] must be finite and >= 0; got %g",
                             (long long)t, d);
        }
        total_s += d;
    }
    if (isinf(total_s)) {
        return OVLM_FAIL(err, OVLM_E_ARG, "the durations add up to infinity");
    }
    return OVLM_OK;
}

/* Starts ascend from 0 and every name is in [0, limit). */
static ovlm_status lists_check(const char *name, const int64_t *start, const int64_t *list,
                               int64_t n_tasks, int64_t limit, ovlm_err *err)
{
    if (start[0] != 0) {
        return OVLM_FAIL(err, OVLM_E_ARG, "%s_start[0] must be 0; got %lld", name,
                         (long long)start[0]);
    }
    for (int64_t t = 0; t < n_tasks; t++) {
        if (start[t + 1] < start[t]) {
            return OVLM_FAIL(err, OVLM_E_ARG, "%s_start must not descend; it does at %lld", name,
                             (long long)(t + 1));
        }
    }
    for (int64_t i = 0; i < start[n_tasks]; i++) {
        if (list[i] < 0 || list[i] >= limit) {
            return OVLM_FAIL(err, OVLM_E_ARG, "%s[%lld] must be in [0, %lld); got %lld", name,
                             (long long)i, (long long)limit, (long long)list[i]);
        }
    }
    return OVLM_OK;
}

ovlm_status simulate_problem_check(const ovlm_simulate_problem *problem, ovlm_arena *arena,
                                   ovlm_err *err)
{
    if (problem->n_tasks < 0 || problem->n_resources < 0 || problem->n_tasks > MOST_TASKS) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "n_tasks and n_resources must be >= 0, tasks below 2^40; got %lld, %lld",
                         (long long)problem->n_tasks, (long long)problem->n_resources);
    }
    OVLM_TRY(durations_check(problem, err));
    OVLM_TRY(lists_check("before", problem->before_start, problem->before, problem->n_tasks,
                         problem->n_tasks, err));
    OVLM_TRY(lists_check("use", problem->use_start, problem->use, problem->n_tasks,
                         problem->n_resources, err));
    /* a task that queues twice at one resource would wait for itself */
    int64_t *last = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &last, problem->n_resources, err));
    for (int64_t t = 0; t < problem->n_tasks; t++) {
        for (int64_t u = problem->use_start[t]; u < problem->use_start[t + 1]; u++) {
            int64_t r = problem->use[u];
            if (last[r] == t + 1) {
                return OVLM_FAIL(err, OVLM_E_ARG, "task %lld names resource %lld twice",
                                 (long long)t, (long long)r);
            }
            last[r] = t + 1;
        }
    }
    return OVLM_OK;
}

#define BROKEN(err, task, rule)                                                              \
    OVLM_FAIL(err, OVLM_E_INTERNAL, "simulated task %lld breaks a rule: %s", (long long)(task), \
              rule)

/* Dependencies and cause of one task. */
static ovlm_status task_check(const ovlm_simulate_problem *problem, int64_t t,
                              const double *start_s, const double *end_s, const int64_t *cause,
                              ovlm_err *err)
{
    if (end_s[t] != start_s[t] + problem->duration_s[t]) {
        return BROKEN(err, t, "end = start + duration");
    }
    for (int64_t i = problem->before_start[t]; i < problem->before_start[t + 1]; i++) {
        if (end_s[problem->before[i]] > start_s[t]) {
            return BROKEN(err, t, "starts after the tasks before it");
        }
    }
    double explained_s = cause[t] < 0 ? 0.0 : end_s[cause[t]];
    return explained_s == start_s[t] ? OVLM_OK : BROKEN(err, t, "starts when its cause ends");
}

ovlm_status simulate_result_check(const ovlm_simulate_problem *problem, const int64_t *started,
                                  const double *start_s, const double *end_s,
                                  const int64_t *cause, ovlm_arena *arena, ovlm_err *err)
{
    double *free_s = NULL; /* when the resource's last task ended */
    OVLM_TRY(OVLM_ARENA_NEW(arena, &free_s, problem->n_resources, err));
    for (int64_t i = 0; i < problem->n_tasks; i++) {
        int64_t t = started[i];
        OVLM_TRY(task_check(problem, t, start_s, end_s, cause, err));
        for (int64_t u = problem->use_start[t]; u < problem->use_start[t + 1]; u++) {
            if (free_s[problem->use[u]] > start_s[t]) {
                return BROKEN(err, t, "one task at a time on a resource");
            }
            free_s[problem->use[u]] = end_s[t];
        }
    }
    return OVLM_OK;
}
