/* test_simulate.c - the event engine: cases by hand, a naive stepper, bad input, no memory. */
#include "test.h"

#include <math.h>
#include <string.h>

#include "base/arena.h"

enum { MOST = 40, EDGES = 400 };

typedef struct graph {
    int64_t n, resources;
    double duration[MOST];
    int64_t before_start[MOST + 1], before[EDGES], use_start[MOST + 1], use[EDGES];
    double start[MOST], end[MOST], busy[MOST], time;
    int64_t cause[MOST];
} graph;

static ovlm_status graph_run(graph *g, ovlm_err *err)
{
    ovlm_simulate_problem problem = {g->n,      g->resources, g->duration, g->before_start,
                                     g->before, g->use_start, g->use};
    return ovlm_simulate_run(&problem, NULL, g->start, g->end, g->cause, g->busy, &g->time, err);
}

/* Adds a task with up to two predecessors and one resource; -1 = none. */
static void graph_add(graph *g, double duration, int64_t before_a, int64_t before_b, int64_t use)
{
    int64_t t = g->n++, b = g->before_start[t], u = g->use_start[t];
    g->duration[t] = duration;
    if (before_a >= 0) {
        g->before[b++] = before_a;
    }
    if (before_b >= 0) {
        g->before[b++] = before_b;
    }
    if (use >= 0) {
        g->use[u++] = use;
    }
    g->before_start[t + 1] = b;
    g->use_start[t + 1] = u;
}

/* Two ranks, 3 s and 1 s of work, a barrier, then 1 s and 2 s. */
static void test_barrier(void)
{
    graph g = {.resources = 2};
    ovlm_err err = {0};
    graph_add(&g, 3, -1, -1, 0);
    graph_add(&g, 1, -1, -1, 1);
    graph_add(&g, 0, 0, 1, -1);
    graph_add(&g, 1, 2, -1, 0);
    graph_add(&g, 2, 2, -1, 1);
    CHECK(graph_run(&g, &err) == OVLM_OK, "%s", err.message);
    CHECK(g.time == 5 && g.start[4] == 3 && g.end[3] == 4, "time %g", g.time);
    CHECK(g.busy[0] == 4 && g.busy[1] == 3, "busy %g %g", g.busy[0], g.busy[1]);
    CHECK(g.cause[4] == 2 && g.cause[2] == 0 && g.cause[0] == -1, "critical path");
}

/* First come, first served: 0 holds the link; 2 is ready before 1. */
static void test_queue(void)
{
    graph g = {.resources = 3};
    ovlm_err err = {0};
    graph_add(&g, 5, -1, -1, 0);
    graph_add(&g, 2, -1, -1, 1);
    graph_add(&g, 1, -1, -1, 2);
    graph_add(&g, 4, 1, -1, 0);
    graph_add(&g, 3, 2, -1, 0);
    CHECK(graph_run(&g, &err) == OVLM_OK, "%s", err.message);
    CHECK(g.start[4] == 5 && g.start[3] == 8 && g.time == 12, "order of the queue");
    CHECK(g.cause[3] == 4 && g.cause[4] == 0, "cause is the holder");
}

static void graph_draw(graph *g)
{
    *g = (graph){.resources = 1 + ovlm_rng_below(&test_rng, 6)};
    g->n = ovlm_rng_below(&test_rng, MOST + 1);
    for (int64_t t = 0; t < g->n; t++) {
        int64_t b = g->before_start[t], u = g->use_start[t];
        /* small integers, so that many events fall together and sums are exact */
        g->duration[t] = (double)ovlm_rng_below(&test_rng, 4);
        for (int64_t p = 0; p < t; p++) {
            if (ovlm_rng_below(&test_rng, 8) == 0 && b < EDGES) {
                g->before[b++] = p;
            }
        }
        for (int64_t r = 0; r < g->resources; r++) {
            if (ovlm_rng_below(&test_rng, 3) == 0) {
                g->use[u++] = r;
            }
        }
        g->before_start[t + 1] = b;
        g->use_start[t + 1] = u;
    }
}

/* The rules of ovlm.h once more, without heap or lists: at each instant first all ends, then the
 * one arrival with the lowest number, over and over. */
static double naive_run(const graph *g, double *start)
{
    int64_t arrived[MOST], arrived_n = 0, ended = 0;
    int state[MOST] = {0}; /* 0 waits for tasks, 1 queues, 2 runs, 3 ended */
    double end[MOST] = {0}, now = 0;
    while (ended < g->n) {
        bool moved = false;
        for (int64_t t = 0; t < g->n; t++) {
            if (state[t] == 2 && end[t] <= now) {
                state[t] = 3;
                ended++;
                moved = true;
            }
        }
        for (int64_t i = 0; i < arrived_n; i++) { /* may it start? */
            int64_t t = arrived[i];
            bool free = state[t] == 1;
            for (int64_t j = 0; j < i && free; j++) { /* nobody older wants or holds the same */
                for (int64_t u = g->use_start[t]; u < g->use_start[t + 1]; u++) {
                    for (int64_t v = g->use_start[arrived[j]]; v < g->use_start[arrived[j] + 1];
                         v++) {
                        free = free && (state[arrived[j]] == 3 || g->use[u] != g->use[v]);
                    }
                }
            }
            if (free) {
                state[t] = 2;
                start[t] = now;
                end[t] = now + g->duration[t];
                moved = true;
            }
        }
        for (int64_t t = 0; t < g->n && !moved; t++) {
            bool ready = state[t] == 0;
            for (int64_t i = g->before_start[t]; i < g->before_start[t + 1]; i++) {
                ready = ready && state[g->before[i]] == 3;
            }
            if (ready) {
                state[t] = 1;
                arrived[arrived_n++] = t;
                moved = true;
            }
        }
        double next = HUGE_VAL;
        for (int64_t t = 0; t < g->n && !moved; t++) {
            next = state[t] == 2 ? fmin(next, end[t]) : next;
        }
        now = moved ? now : next;
    }
    return now;
}

static void test_random(void)
{
    for (int round = 0; round < 3000; round++) {
        graph g;
        ovlm_err err = {0};
        double start[MOST] = {0}, busy = 0, asked = 0;
        graph_draw(&g);
        CHECK(graph_run(&g, &err) == OVLM_OK, "%s", err.message);
        double time = naive_run(&g, start);
        CHECK(g.time == time, "round %d: %g instead of %g", round, g.time, time);
        for (int64_t t = 0; t < g.n; t++) {
            CHECK(g.start[t] == start[t], "round %d task %lld: %g instead of %g", round,
                  (long long)t, g.start[t], start[t]);
            asked += g.duration[t] * (double)(g.use_start[t + 1] - g.use_start[t]);
        }
        for (int64_t r = 0; r < g.resources; r++) {
            CHECK(g.busy[r] <= g.time, "a resource is busy for longer than the step");
            busy += g.busy[r];
        }
        CHECK(busy == asked, "busy time %g instead of %g", busy, asked);
    }
}

static void expect_bad(graph *g, const char *word)
{
    ovlm_err err = {0};
    CHECK(graph_run(g, &err) == OVLM_E_ARG, "accepted: %s", word);
    CHECK(strstr(err.message, word) != NULL, "message \"%s\" lacks \"%s\"", err.message, word);
}

static void test_bad_input(void)
{
    graph g = {.resources = 1};
    graph_add(&g, 1, -1, -1, 0);
    graph_add(&g, 1, 0, -1, 0);
    graph bad = g;
    bad.duration[1] = (double)NAN;
    expect_bad(&bad, "duration[1]");
    bad = g;
    bad.duration[0] = bad.duration[1] = 1e308;
    expect_bad(&bad, "infinity");
    bad = g;
    bad.before[0] = 2;
    expect_bad(&bad, "before[0]");
    bad = g;
    bad.use[1] = -1;
    expect_bad(&bad, "use[1]");
    bad = g;
    bad.use_start[1] = 2;
    bad.use_start[2] = 2;
    expect_bad(&bad, "twice");
    bad = g;
    bad.use_start[1] = 3;
    expect_bad(&bad, "descend");
    bad = g;
    bad.n = -1;
    expect_bad(&bad, "n_tasks");
    bad = g;
    graph_add(&bad, 1, 3, -1, 0); /* 2 follows 3, which follows 2 */
    graph_add(&bad, 1, 2, -1, 0);
    expect_bad(&bad, "cycle");
}

static void test_no_memory(void)
{
    graph g = {.resources = 1};
    ovlm_err err = {0};
    graph_add(&g, 1, -1, -1, 0);
    int64_t allowed = 0;
    ovlm_status status = OVLM_E_NOMEM;
    for (; status == OVLM_E_NOMEM && allowed < 50; allowed++) {
        ovlm_arena_fail_after(allowed);
        status = graph_run(&g, &err);
    }
    ovlm_arena_fail_after(-1);
    CHECK(status == OVLM_OK && allowed > 5, "after %lld allocations: %s", (long long)allowed,
          err.message);
}

static void test_limits(void)
{
    graph g = {.resources = 1};
    ovlm_err err = {0};
    graph_add(&g, 1, -1, -1, 0);
    ovlm_simulate_problem problem = {g.n,      g.resources, g.duration, g.before_start,
                                     g.before, g.use_start, g.use};
    ovlm_budget budget = {.work_limit = 1};
    CHECK(ovlm_simulate_run(&problem, &budget, g.start, g.end, g.cause, g.busy, &g.time, &err) ==
              OVLM_E_UNDECIDED, "work limit");
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    test_barrier();
    test_queue();
    test_random();
    test_bad_input();
    test_no_memory();
    test_limits();
    return test_end("simulate");
}
