/* test_sp_step.c - the step under search: any row of moves leaves it consistent, and undo restores
 * it; plans of random problems pass their check under allocation failures, threads and stops. */
#include <math.h>
#include <string.h>

#include "plan/sp_plan.h"
#include "plan/sp_repair.h"
#include "test.h"

enum { MOST_N = 60 };

static const int64_t powers[] = {1, 2, 4, 8, 16}, others[] = {1, 3, 4, 6};
static const double comm[] = {0, 1e-5, 2e-5, 3e-5, 9e-5};

typedef struct random_problem {
    int64_t lengths[MOST_N];
    ovlm_sp_problem problem;
} random_problem;

static void draw(random_problem *r)
{
    bool even = ovlm_rng_below(&test_rng, 3) > 0;
    int64_t n = 1 + ovlm_rng_below(&test_rng, MOST_N);
    for (int64_t i = 0; i < n; i++) {
        double u = ovlm_rng_uniform(&test_rng);
        r->lengths[i] = 1 + (int64_t)(5000 * u * u * u);
    }
    r->problem = (ovlm_sp_problem){
        .n = n, .n_gpus = even ? 16 : 13, .gpus_per_node = even ? 8 : 6, .lengths = r->lengths,
        .pad_to = 1, .policy = OVLM_SP_FLEX, .threads = 1,
        .cost = {.quadratic = 1e-7, .linear = 1e-3, .fixed = 0.2, .memory_per_token = 1,
                 .memory_limit = 1000, .degree_n = even ? 5 : 4, .degree = even ? powers : others,
                 .comm = comm}};
}

/* Everything that the step keeps, computed afresh. */
static void check_step(const sp_step *step)
{
    const sp_model *model = step->model;
    int64_t items = step->n_pool;
    for (int64_t box = 0; box < step->n_boxes; box++) {
        int64_t idle = model->n_gpus, groups = 0;
        double tau = 0;
        for (int64_t i = 0; i < step->box_slots; i++) {
            int64_t slot = box * step->box_slots + i, count = 0;
            if (i >= step->high[box] || step->room[slot] < 0) {
                CHECK(step->time[slot] == 0 && step->room[slot] < 0, "an unused slot is not clean");
                continue;
            }
            double sum = 0, time = 0;
            for (int64_t k = step->first[slot]; k >= 0; k = step->next[k], count++) {
                CHECK(step->where[k] == slot, "item %lld is not where it says", (long long)k);
                sum += (double)model->s[k];
                time += sp_item_time(model, k, step->j[slot]);
            }
            items += count;
            idle -= model->degree[step->j[slot]];
            groups++;
            tau = step->time[slot] > tau ? step->time[slot] : tau;
            CHECK(count == step->count[slot] && count > 0, "count");
            CHECK(fabs(time - step->time[slot]) <= 1e-12 * time, "time");
            CHECK(step->room[slot] == (double)model->cap[step->j[slot]] - sum, "room");
        }
        CHECK(idle == step->idle[box] && groups == step->n_groups[box], "GPUs of a box");
        CHECK(tau == step->tau[box], "tau %g is %g", step->tau[box], tau);
    }
    CHECK(items == model->n, "%lld of %lld items", (long long)items, (long long)model->n);
}

static void random_change(sp_step *step)
{
    int64_t n = step->model->n, out[MOST_N], count = 0;
    for (int64_t tries = ovlm_rng_below(&test_rng, 8); tries > 0; tries--) {
        int64_t k = ovlm_rng_below(&test_rng, n);
        if (step->where[k] >= 0) {
            sp_step_take(step, k);
        }
    }
    sp_step_settle(step);
    for (int64_t i = 0; i < step->n_pool; i++) {
        if (ovlm_rng_below(&test_rng, 4) > 0) {
            out[count++] = step->pool[i];
        }
    }
    sp_taste taste = {.excess = 1, .balance = ovlm_rng_uniform(&test_rng), .blink = 0.1};
    (void)sp_repair(step, out, count, &taste, &test_rng);
}

static void test_moves_and_undo(void)
{
    for (int round = 0; round < 60; round++) {
        random_problem r;
        ovlm_arena arena = {0};
        ovlm_err err = {0};
        sp_model model;
        sp_step step;
        sp_draft nothing = {.time_s = HUGE_VAL}, draft;
        draw(&r);
        CHECK(sp_model_init(&model, &r.problem, &arena, &err) == OVLM_OK, "%s", err.message);
        CHECK(sp_step_init(&step, &model, 1 + round % 5, &arena, &err) == OVLM_OK, "init");
        CHECK(sp_draft_init(&draft, model.n, &arena, &err) == OVLM_OK, "draft");
        CHECK(sp_step_load(&step, &nothing, &err) == OVLM_OK, "load");
        for (int change = 0; change < 100; change++) {
            CHECK(sp_step_reserve(&step, 8 * model.n + 8, &err) == OVLM_OK, "reserve");
            double before = sp_step_cost(&step);
            random_change(&step);
            if (change % 2) {
                sp_step_undo(&step);
                CHECK(sp_step_cost(&step) == before, "undo: %g, was %g", sp_step_cost(&step),
                      before);
            } else {
                sp_step_commit(&step);
            }
            check_step(&step);
        }
        sp_step_store(&step, &draft);
        if (isfinite(draft.time_s)) {
            CHECK(sp_step_load(&step, &draft, &err) == OVLM_OK, "reload");
            CHECK(fabs(sp_step_cost(&step) - draft.time_s) <= 1e-12 * draft.time_s, "round trip");
            check_step(&step);
        }
        sp_step_release(&step);
        ovlm_arena_free(&arena);
    }
}

static ovlm_sp_plan *solve(const ovlm_sp_problem *problem, const ovlm_budget *budget,
                           ovlm_status *status, ovlm_err *err)
{
    ovlm_sp_plan *plan = NULL;
    *status = ovlm_sp_solve(problem, budget, &plan, err);
    CHECK((*status == OVLM_OK) == (plan != NULL), "a plan exactly when it succeeds");
    return plan;
}

static void test_policies(void)
{
    for (int round = 0; round < 30; round++) {
        random_problem r;
        draw(&r);
        for (int policy = 0; policy < 4; policy++) {
            ovlm_budget budget = {.work_limit = 500 * (round % 3)};
            ovlm_err err = {0};
            ovlm_status status;
            r.problem.policy = (ovlm_sp_policy)policy;
            ovlm_sp_plan *plan = solve(&r.problem, &budget, &status, &err);
            CHECK(status == OVLM_OK, "policy %d: %s", policy, err.message);
            if (plan != NULL) {
                CHECK(ovlm_sp_plan_check(&r.problem, plan, &err) == OVLM_OK, "%s", err.message);
                CHECK(!plan->cut_short, "no clock, not cut short");
            }
            ovlm_sp_plan_free(plan);
        }
    }
}

static void test_threads_do_not_matter(void)
{
    for (int round = 0; round < 8; round++) {
        random_problem r;
        ovlm_sp_plan *plan[2];
        draw(&r);
        for (int i = 0; i < 2; i++) {
            ovlm_budget budget = {.work_limit = 4000};
            ovlm_status status;
            ovlm_err err = {0};
            r.problem.threads = i ? 4 : 1;
            plan[i] = solve(&r.problem, &budget, &status, &err);
        }
        if (plan[0] != NULL && plan[1] != NULL) {
            CHECK(plan[0]->time == plan[1]->time && plan[0]->work == plan[1]->work, "times");
            CHECK(memcmp(plan[0]->item, plan[1]->item,
                         (size_t)r.problem.n * sizeof *plan[0]->item) == 0, "items");
        }
        ovlm_sp_plan_free(plan[0]);
        ovlm_sp_plan_free(plan[1]);
    }
}

static int stop_at_once(void *ctx)
{
    (void)ctx;
    return 1;
}

static void test_stop_and_failures(void)
{
    random_problem r;
    ovlm_status status;
    ovlm_err err = {0};
    draw(&r);
    r.problem.threads = 2;
    ovlm_budget forever = {.work_limit = INT64_MAX / 8, .poll = stop_at_once};
    ovlm_sp_plan *plan = solve(&r.problem, &forever, &status, &err);
    CHECK(status == OVLM_E_INTERRUPTED || status == OVLM_OK, "stopped: %s", err.message);
    ovlm_sp_plan_free(plan);
    r.problem.threads = 1;
    for (int64_t allocations = 0; allocations < 400; allocations += 1 + allocations / 16) {
        ovlm_budget budget = {.work_limit = 200};
        ovlm_arena_fail_after(allocations);
        plan = solve(&r.problem, &budget, &status, &err);
        ovlm_arena_fail_after(-1);
        CHECK(status == OVLM_OK || status == OVLM_E_NOMEM, "out of memory: %d %s", (int)status,
              err.message);
        ovlm_sp_plan_free(plan);
    }
}

/* A problem that is no problem is refused before anything is computed from it. */
static void test_check_of_bad_problems(void)
{
    random_problem r;
    draw(&r);
    ovlm_budget budget = {.work_limit = 0};
    ovlm_err err = {0};
    ovlm_status status;
    ovlm_sp_plan *plan = solve(&r.problem, &budget, &status, &err);
    int64_t *field[] = {&r.problem.n_gpus, &r.problem.gpus_per_node, &r.problem.pad_to};
    for (size_t i = 0; plan != NULL && i < sizeof field / sizeof field[0]; i++) {
        int64_t good = *field[i];
        *field[i] = -(int64_t)ovlm_rng_below(&test_rng, 2);
        CHECK(ovlm_sp_plan_check(&r.problem, plan, &err) == OVLM_E_ARG, "field %d", (int)i);
        *field[i] = good;
    }
    ovlm_sp_plan_free(plan);
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    test_moves_and_undo();
    test_policies();
    test_threads_do_not_matter();
    test_stop_and_failures();
    test_check_of_bad_problems();
    return test_end("sp_step");
}
