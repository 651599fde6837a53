/* simulate.c - the event engine: tasks with dependencies on resources with first-come queues.
 *
 * Two kinds of events in one heap, ordered by (time, kind, task): ends before arrivals.  A task
 * arrives when the last task before it ends; it then joins the queue of each of its resources.  The
 * front of a queue holds or will hold the resource, so a task starts when it is at the front of all
 * of its queues.  As all queues are joined in one global order, the oldest waiting task is
 * at the front wherever nobody runs: there is no deadlock. */
#include "plan/simulate.h"

#include "base/clock.h"

typedef struct sim_event {
    double time_s;
    int64_t key; /* ends: task; arrivals: n_tasks + task */
} sim_event;

typedef struct sim_engine {
    const ovlm_simulate_problem *problem;
    int64_t *after_start, *after; /* the dependencies turned round                              */
    int64_t *pending;             /* [n] tasks before it that have not ended                    */
    int64_t *blocked;             /* [n] queues in which it is not at the front                 */
    int64_t *user;                /* [uses] task of each entry of problem->use                  */
    int64_t *next;                /* [uses] next entry in the same resource's queue, -1 = last  */
    int64_t *front, *back;        /* [R] entries; front -1 = nobody                             */
    int64_t *started, started_n;  /* tasks in the order of their starts                         */
    int64_t ended_n;
    sim_event *heap;
    int64_t heap_n;
    double *start_s, *end_s;
    int64_t *cause;
} sim_engine;

static inline bool event_less(sim_event a, sim_event b)
{
    return a.time_s < b.time_s || (a.time_s == b.time_s && a.key < b.key);
}

static void heap_push(sim_engine *e, sim_event event)
{
    int64_t i = e->heap_n++;
    while (i > 0 && event_less(event, e->heap[(i - 1) / 2])) {
        e->heap[i] = e->heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    e->heap[i] = event;
}

static sim_event heap_pop(sim_engine *e)
{
    sim_event top = e->heap[0], moved = e->heap[--e->heap_n];
    int64_t i = 0;
    for (int64_t child = 1; child < e->heap_n; child = 2 * i + 1) {
        if (child + 1 < e->heap_n && event_less(e->heap[child + 1], e->heap[child])) {
            child++;
        }
        if (!event_less(e->heap[child], moved)) {
            break;
        }
        e->heap[i] = e->heap[child];
        i = child;
    }
    e->heap[i] = moved;
    return top;
}

/* Turns "t follows b" into "b is followed by t". */
static ovlm_status engine_reverse(sim_engine *e, ovlm_arena *arena, ovlm_err *err)
{
    const ovlm_simulate_problem *p = e->problem;
    int64_t n = p->n_tasks, edges = p->before_start[n];
    OVLM_TRY(OVLM_ARENA_NEW(arena, &e->after_start, n + 2, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &e->after, edges, err));
    /* counted two places up, so that filling leaves the starts in place */
    for (int64_t i = 0; i < edges; i++) {
        e->after_start[p->before[i] + 2]++;
    }
    for (int64_t t = 0; t < n; t++) {
        e->after_start[t + 2] += e->after_start[t + 1];
    }
    for (int64_t t = 0; t < n; t++) {
        for (int64_t i = p->before_start[t]; i < p->before_start[t + 1]; i++) {
            e->after[e->after_start[p->before[i] + 1]++] = t;
        }
    }
    return OVLM_OK;
}

static ovlm_status engine_init(sim_engine *e, ovlm_arena *arena, ovlm_err *err)
{
    const ovlm_simulate_problem *p = e->problem;
    int64_t n = p->n_tasks, uses = p->use_start[n];
    OVLM_TRY(engine_reverse(e, arena, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &e->pending, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &e->blocked, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &e->started, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &e->heap, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &e->user, uses, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &e->next, uses, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &e->front, p->n_resources, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &e->back, p->n_resources, err));
    for (int64_t r = 0; r < p->n_resources; r++) {
        e->front[r] = -1;
    }
    for (int64_t t = 0; t < n; t++) {
        e->pending[t] = p->before_start[t + 1] - p->before_start[t];
        e->cause[t] = -1;
        for (int64_t u = p->use_start[t]; u < p->use_start[t + 1]; u++) {
            e->user[u] = t;
        }
        if (e->pending[t] == 0) {
            heap_push(e, (sim_event){0.0, n + t});
        }
    }
    return OVLM_OK;
}

static void task_start(sim_engine *e, int64_t t, double now_s)
{
    e->start_s[t] = now_s;
    e->end_s[t] = now_s + e->problem->duration_s[t];
    e->started[e->started_n++] = t;
    heap_push(e, (sim_event){e->end_s[t], t});
}

/* Joins the queue of each resource; starts when it is at the front of all. */
static void task_arrive(sim_engine *e, int64_t t, double now_s)
{
    const ovlm_simulate_problem *p = e->problem;
    for (int64_t u = p->use_start[t]; u < p->use_start[t + 1]; u++) {
        int64_t r = p->use[u];
        e->next[u] = -1;
        if (e->front[r] < 0) {
            e->front[r] = u;
        } else {
            e->next[e->back[r]] = u;
            e->blocked[t]++;
        }
        e->back[r] = u;
    }
    if (e->blocked[t] == 0) {
        task_start(e, t, now_s);
    }
}

/* Leaves its queues, lets those behind it start, and tells the tasks after it. */
static void task_end(sim_engine *e, int64_t t, double now_s)
{
    const ovlm_simulate_problem *p = e->problem;
    e->ended_n++;
    for (int64_t u = p->use_start[t]; u < p->use_start[t + 1]; u++) {
        int64_t behind = e->next[u];
        e->front[p->use[u]] = behind;
        if (behind >= 0 && --e->blocked[e->user[behind]] == 0) {
            e->cause[e->user[behind]] = t;
            task_start(e, e->user[behind], now_s);
        }
    }
    for (int64_t i = e->after_start[t]; i < e->after_start[t + 1]; i++) {
        int64_t follower = e->after[i];
        if (--e->pending[follower] == 0) {
            e->cause[follower] = t;
            heap_push(e, (sim_event){now_s, p->n_tasks + follower});
        }
    }
}

/* Some tasks never became ready.  Each of them follows another such task, so going back from any of
 * them ends on a cycle after at most n steps. */
static ovlm_status cycle_report(const sim_engine *e, ovlm_err *err)
{
    const ovlm_simulate_problem *p = e->problem;
    int64_t t = 0;
    while (e->pending[t] == 0) {
        t++;
    }
    for (int64_t step = 0; step < p->n_tasks; step++) {
        int64_t i = p->before_start[t];
        while (e->pending[p->before[i]] == 0) {
            i++;
        }
        t = p->before[i];
    }
    return OVLM_FAIL(err, OVLM_E_ARG, "the dependencies form a cycle through task %lld",
                     (long long)t);
}

static ovlm_status engine_run(sim_engine *e, const ovlm_budget *budget, ovlm_err *err)
{
    ovlm_meter meter;
    ovlm_meter_start(&meter, budget, INT64_MAX, 64);
    while (e->heap_n > 0) {
        sim_event event = heap_pop(e);
        if (ovlm_meter_spend(&meter, 1)) {
            return meter.interrupted
                       ? OVLM_FAIL(err, OVLM_E_INTERRUPTED, "interrupted")
                       : OVLM_FAIL(err, OVLM_E_UNDECIDED, "the limit ended the simulation after "
                                   "%lld of %lld tasks", (long long)e->ended_n,
                                   (long long)e->problem->n_tasks);
        }
        if (event.key < e->problem->n_tasks) {
            task_end(e, event.key, event.time_s);
        } else {
            task_arrive(e, event.key - e->problem->n_tasks, event.time_s);
        }
    }
    return e->ended_n == e->problem->n_tasks ? OVLM_OK : cycle_report(e, err);
}

ovlm_status ovlm_simulate_run(const ovlm_simulate_problem *problem, const ovlm_budget *budget,
                              double *start_s, double *end_s, int64_t *cause, double *busy_s,
                              double *time_s, ovlm_err *err)
{
    ovlm_arena arena = {0};
    ovlm_status status = OVLM_OK;
    sim_engine e = {.problem = problem, .start_s = start_s, .end_s = end_s, .cause = cause};
    OVLM_GOTO(done, simulate_problem_check(problem, &arena, err));
    OVLM_GOTO(done, engine_init(&e, &arena, err));
    OVLM_GOTO(done, engine_run(&e, budget, err));
    OVLM_GOTO(done, simulate_result_check(problem, e.started, start_s, end_s, cause, &arena, err));
    *time_s = 0.0;
    for (int64_t r = 0; r < problem->n_resources; r++) {
        busy_s[r] = 0.0;
    }
    for (int64_t t = 0; t < problem->n_tasks; t++) {
        *time_s = end_s[t] > *time_s ? end_s[t] : *time_s;
        for (int64_t u = problem->use_start[t]; u < problem->use_start[t + 1]; u++) {
            busy_s[problem->use[u]] += problem->duration_s[t];
        }
    }
done:
    ovlm_arena_free(&arena);
    return status;
}
