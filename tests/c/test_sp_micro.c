/* test_sp_micro.c - the engine of one micro-batch: every plan re-checked from scratch, optima of
 * small instances by brute force, and what more budget, a target or a start must mean. */
#include "test.h"

#include <math.h>
#include <string.h>

#include "plan/sp_micro.h"
#include "sp_brute.h"

enum { MOST = 400 };

typedef struct instance {
    ovlm_sp_problem problem;
    int64_t lengths[MOST], degree[8];
    double comm[8];
    ovlm_arena arena;
    sp_model model;
    int64_t k[MOST];
} instance;

/* Lengths are long-tailed; memory is anything from tight to plenty. */
static bool draw_nodes(instance *t, int64_t n, int64_t n_gpus, bool powers, int64_t node)
{
    memset(t, 0, sizeof *t);
    ovlm_sp_problem *p = &t->problem;
    *p = (ovlm_sp_problem){.n = n, .n_gpus = n_gpus, .gpus_per_node = node, .pad_to = 1,
                           .policy = OVLM_SP_FLEX, .threads = 1, .lengths = t->lengths};
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        double u = ovlm_rng_uniform(&test_rng);
        t->lengths[i] = 1 + (int64_t)(100 / (0.01 + u));
        sum += (double)t->lengths[i];
        t->k[i] = i;
    }
    int64_t count = 0;
    for (int64_t d = 1; d <= n_gpus && count < 8; d = powers ? 2 * d : d + 1) {
        if (d == 1 || ovlm_rng_below(&test_rng, 4) > 0) {
            t->comm[count] = 0.1 * (double)count * ovlm_rng_uniform(&test_rng);
            t->degree[count++] = d;
        }
    }
    double fill = 0.3 + 0.6 * ovlm_rng_uniform(&test_rng);
    p->cost = (ovlm_sequence_cost){.quadratic = 1e-3 * ovlm_rng_uniform(&test_rng),
                                   .linear = 0.5, .fixed = 3, .memory_per_token = 1,
                                   .memory_limit = sum / (double)n_gpus / fill,
                                   .degree_n = count, .degree = t->degree, .comm = t->comm};
    if (ovlm_rng_below(&test_rng, 4) == 0) {
        p->cost.heads = n_gpus + ovlm_rng_below(&test_rng, 5);
    }
    if (ovlm_rng_below(&test_rng, 4) == 0) {
        p->pad_to = 1 + ovlm_rng_below(&test_rng, 9);
    }
    if (ovlm_rng_below(&test_rng, 10) == 0) {
        p->cost.memory_limit = HUGE_VAL;
    }
    ovlm_err err = {0};
    return sp_model_init(&t->model, p, &t->arena, &err) == OVLM_OK;
}

static bool draw(instance *t, int64_t n, int64_t n_gpus, bool powers)
{
    return draw_nodes(t, n, n_gpus, powers, powers ? 8 : 6);
}

static void check_plan(const instance *t, const sp_micro *plan)
{
    const ovlm_sp_problem *p = &t->problem;
    char seen[MOST] = {0};
    int64_t first[MOST];
    double longest = 0;
    int64_t gpus = 0;
    CHECK(plan->start[0] == 0 && plan->start[plan->n_groups] == p->n, "all items");
    for (int64_t g = 0; g < plan->n_groups; g++) {
        int64_t j = plan->j[g], d = t->model.degree[j], tokens = 0;
        double time = 0, share = p->cost.heads > 0
                                     ? ceil((double)p->cost.heads / (double)d) /
                                           (double)p->cost.heads
                                     : 1 / (double)d;
        CHECK(plan->start[g] < plan->start[g + 1], "group %lld is empty", (long long)g);
        for (int64_t a = plan->start[g]; a < plan->start[g + 1]; a++) {
            int64_t i = t->model.order[plan->item[a]];
            double s = (double)p->lengths[i];
            CHECK(!seen[i], "item %lld twice", (long long)i);
            seen[i] = 1;
            tokens += p->lengths[i];
            time += p->cost.quadratic * s * s * share +
                    (p->cost.linear + t->comm[j]) * s / (double)d;
        }
        CHECK(tokens <= t->model.cap[j], "%lld tokens", (long long)tokens);
        longest = fmax(longest, time);
        gpus += d;
    }
    CHECK(gpus <= p->n_gpus, "%lld GPUs", (long long)gpus);
    CHECK(sp_place(&t->model, plan->j, plan->n_groups, first), "cannot be placed");
    CHECK(fabs(longest - plan->makespan) <= 1e-9 * longest, "makespan %.17g, really %.17g",
          plan->makespan, longest);
}

static double solve(instance *t, int64_t work, uint64_t seed, double target, sp_micro *plan)
{
    ovlm_err err = {0};
    ovlm_meter meter;
    ovlm_rng rng;
    ovlm_budget budget = {.work_limit = work};
    ovlm_meter_start(&meter, &budget, 0, 100);
    ovlm_rng_init(&rng, seed);
    CHECK(sp_micro_solve(&t->model, t->k, t->problem.n, target, &meter, &rng, plan, &t->arena,
                         &err) == OVLM_OK,
          "%s", err.message);
    if (isfinite(plan->makespan)) {
        check_plan(t, plan);
    }
    return plan->makespan;
}

static sp_micro new_plan(instance *t)
{
    ovlm_err err = {0};
    sp_micro plan;
    CHECK(sp_micro_init(&plan, t->problem.n, &t->arena, &err) == OVLM_OK, "%s", err.message);
    return plan;
}

/* Degrees for the groups g.. so that each takes less than `limit` and all can be placed. */
static bool place_below(const instance *t, const unsigned *group, int n_groups, int g, int64_t *j,
                        int64_t gpus, double limit)
{
    const sp_model *m = &t->model;
    int64_t first_gpu[MOST];
    double sum_s = 0, sum_s2 = 0;
    if (g == n_groups) {
        return sp_place(m, j, n_groups, first_gpu);
    }
    for (int64_t k = 0; k < m->n; k++) {
        double s = group[g] >> k & 1 ? (double)m->s[k] : 0;
        sum_s += s;
        sum_s2 += s * s;
    }
    for (j[g] = 0; j[g] < m->D && m->degree[j[g]] <= gpus; j[g]++) {
        if (sum_s <= (double)m->cap[j[g]] &&
            m->quad[j[g]] * sum_s2 + m->lin[j[g]] * sum_s < limit &&
            place_below(t, group, n_groups, g + 1, j, gpus - m->degree[j[g]], limit)) {
            return true;
        }
    }
    return false;
}

/* Whether some partition of the items, k.. not yet in a group, has a plan below the limit. */
static bool exists_below(const instance *t, unsigned *group, int n_groups, int k, double limit)
{
    int64_t j[MOST];
    if (k == t->problem.n) {
        return place_below(t, group, n_groups, 0, j, t->problem.n_gpus, limit);
    }
    for (int g = 0; g <= n_groups; g++) {
        group[g] = (g < n_groups ? group[g] : 0) | 1u << k;
        if (exists_below(t, group, g < n_groups ? n_groups : n_groups + 1, k + 1, limit)) {
            return true;
        }
        group[g] &= ~(1u << k);
    }
    return false;
}

/* Never below the optimum; at it nearly always.  The brute force does not place its groups: where
 * it finds less, all plans are tried for one that can be placed. */
static void test_optima(bool powers, int64_t node)
{
    int64_t solved = 0, optimal = 0;
    double worst = 0;
    for (int round = 0; round < 400; round++) {
        instance t;
        sp_brute brute;
        int64_t n = 1 + ovlm_rng_below(&test_rng, 7);
        if (draw_nodes(&t, n, 1 + ovlm_rng_below(&test_rng, 8), powers, node)) {
            brute_solve(&t.problem, &brute);
            double best = brute.makespan[(1u << n) - 1];
            sp_micro plan = new_plan(&t);
            double found = solve(&t, 200000, 1, 0, &plan);
            CHECK(found >= best * (1 - 1e-9), "%.17g is below the optimum %.17g", found, best);
            unsigned group[BRUTE_N + 1];
            bool missed = found > best * (1 + 1e-9) &&
                          exists_below(&t, group, 0, 0, found * (1 - 1e-9));
            solved += isfinite(best);
            optimal += isfinite(best) && !missed;
            worst = missed && isfinite(found) ? fmax(worst, found / best - 1) : worst;
        }
        ovlm_arena_free(&t.arena);
    }
    printf("  %lld of %lld small instances at the optimum (%s degrees, nodes of %lld), the others "
           "at most %.2f %% above\n", (long long)optimal, (long long)solved,
           powers ? "chained" : "any", (long long)node, 100 * worst);
    CHECK(optimal * 100 >= solved * 96, "%lld of %lld", (long long)optimal, (long long)solved);
}

static void test_large(void)
{
    for (int round = 0; round < 60; round++) {
        instance t;
        bool powers = round % 2 == 0;
        int64_t n = 1 + ovlm_rng_below(&test_rng, MOST);
        if (!draw(&t, n, 1 + ovlm_rng_below(&test_rng, 70), powers)) {
            ovlm_arena_free(&t.arena);
            continue;
        }
        ovlm_err err = {0};
        sp_micro plan = new_plan(&t), start = new_plan(&t), uniform = new_plan(&t);
        ovlm_meter meter;
        ovlm_meter_start(&meter, NULL, 0, 100);
        CHECK(sp_micro_construct(&t.model, t.k, n, &meter, &plan, &t.arena, &err) == OVLM_OK, "%s",
              err.message);
        if (isfinite(plan.makespan)) {
            check_plan(&t, &plan);
        }
        double less = solve(&t, 1000, 7, 0, &start);
        start.makespan = HUGE_VAL;
        double more = solve(&t, 300000, 7, 0, &start);
        CHECK(more <= less, "more work is worse: %.17g > %.17g", more, less);
        sp_micro again = new_plan(&t);
        CHECK(fabs(solve(&t, 300000, 7, 0, &again) - more) <= 0 || !isfinite(more), "repeatable");
        CHECK(again.n_groups == start.n_groups &&
                  memcmp(again.item, start.item, (size_t)n * sizeof *again.item) == 0,
              "the same plan");
        for (int64_t j = 0; j < t.model.D; j++) {
            CHECK(sp_micro_homogeneous(&t.model, t.k, n, j, &uniform, &t.arena, &err) == OVLM_OK,
                  "%s", err.message);
            if (isfinite(uniform.makespan)) {
                check_plan(&t, &uniform);
                double before = uniform.makespan;
                CHECK(solve(&t, 2000, 3, 0, &uniform) <= before, "a start may not get worse");
            }
        }
        ovlm_arena_free(&t.arena);
    }
}

static void test_target(void)
{
    instance t;
    while (!draw(&t, 200, 32, true)) {
        ovlm_arena_free(&t.arena);
    }
    sp_micro plan = new_plan(&t);
    double found = solve(&t, 1000000, 1, HUGE_VAL, &plan);
    CHECK(isfinite(found), "any plan will do");
    sp_micro free_plan = new_plan(&t);
    CHECK(solve(&t, 1000000, 1, 0, &free_plan) <= found, "without a target it goes on");
    ovlm_arena_free(&t.arena);
}

/* Times may all be zero, and there may be nothing to do. */
static void test_degenerate(void)
{
    instance t;
    while (!draw(&t, 30, 8, true)) {
        ovlm_arena_free(&t.arena);
    }
    sp_micro plan = new_plan(&t);
    CHECK(fabs(solve(&t, 0, 1, 0, &plan)) < HUGE_VAL || plan.n_groups == 0, "work limit 0");
    t.problem.cost.quadratic = t.problem.cost.linear = 0;
    memset(t.comm, 0, sizeof t.comm);
    ovlm_err err = {0};
    CHECK(sp_model_init(&t.model, &t.problem, &t.arena, &err) == OVLM_OK, "%s", err.message);
    plan.makespan = HUGE_VAL;
    double found = solve(&t, 10000, 1, 0, &plan);
    CHECK(found <= 0 || !isfinite(found), "all times are zero: %g", found);
    t.problem.n = 0;
    CHECK(solve(&t, 10000, 1, 0, &plan) <= 0 && plan.n_groups == 0, "no items");
    ovlm_arena_free(&t.arena);
}

static void test_allocation_failures(void)
{
    instance t;
    while (!draw(&t, 50, 16, false)) {
        ovlm_arena_free(&t.arena);
    }
    ovlm_status status = OVLM_E_NOMEM;
    for (int64_t after = 0; status != OVLM_OK && after < 100; after++) {
        ovlm_arena arena = {0};
        ovlm_err err = {0};
        ovlm_meter meter;
        ovlm_rng rng;
        sp_micro plan;
        ovlm_meter_start(&meter, NULL, 1000, 100);
        ovlm_rng_init(&rng, 1);
        ovlm_arena_fail_after(after);
        status = sp_micro_init(&plan, 50, &arena, &err);
        if (status == OVLM_OK) {
            status = sp_micro_homogeneous(&t.model, t.k, 50, 0, &plan, &arena, &err);
        }
        if (status == OVLM_OK) {
            plan.makespan = HUGE_VAL;
            status = sp_micro_solve(&t.model, t.k, 50, 0, &meter, &rng, &plan, &arena, &err);
        }
        ovlm_arena_fail_after(-1);
        CHECK(status == OVLM_OK || status == OVLM_E_NOMEM, "after %lld", (long long)after);
        ovlm_arena_free(&arena);
    }
    CHECK(status == OVLM_OK, "with enough memory");
    ovlm_arena_free(&t.arena);
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    test_optima(true, 8);
    test_optima(false, 8);
    test_optima(false, 6);
    test_large();
    test_target();
    test_degenerate();
    test_allocation_failures();
    return test_end("sp_micro");
}
