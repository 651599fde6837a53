/* test_step.c - step plans of random problems: the independent check, repeatability, decisions that
 * come back, damage that is found, and every allocation failing once. */
#include "base/arena.h"
#include "step_draw.h"

static bool same_route(const ovlm_step_route *a, const ovlm_step_route *b)
{
    size_t bytes = (size_t)a->route.k * sizeof(int64_t);
    return a->route.k == b->route.k &&
           (bytes == 0 || (memcmp(a->route.item, b->route.item, bytes) == 0 &&
                           memcmp(a->route.n_rows, b->route.n_rows, bytes) == 0 &&
                           memcmp(a->route.source, b->route.source, bytes) == 0 &&
                           memcmp(a->route.destination, b->route.destination, bytes) == 0 &&
                           memcmp(a->route.send_row, b->route.send_row, bytes) == 0 &&
                           memcmp(a->route.receive_row, b->route.receive_row, bytes) == 0));
}

static bool same_plan(const ovlm_step_plan *a, const ovlm_step_plan *b)
{
    bool same = a->time == b->time && a->bound == b->bound && a->exposed_s == b->exposed_s &&
                same_route(&a->text, &b->text);
    for (int64_t p = 0; p < a->n_phases && same; p++) {
        same = same_route(&a->raw[p], &b->raw[p]) && same_route(&a->back[p], &b->back[p]) &&
               same_route(&a->to_llm[p], &b->to_llm[p]);
    }
    return same;
}

/* The decisions of a plan alone, into an empty one. */
static ovlm_step_plan *rebuilt(const instance *x, ovlm_step_plan *plan)
{
    ovlm_step_plan *again = NULL;
    ovlm_err err = {0};
    CHECK(ovlm_step_plan_init(&x->problem, &again, &err) == OVLM_OK, "%s", err.message);
    for (int64_t p = 0; p <= plan->n_phases; p++) {
        const ovlm_step_share *from = &plan->share[p];
        ovlm_step_share *to = &again->share[p];
        memcpy(to->rank, from->rank, (size_t)from->n * sizeof *to->rank);
        memcpy(to->micro, from->micro, (size_t)from->n * sizeof *to->micro);
        to->n_micro = from->n_micro;
        to->bound = from->bound;
    }
    again->sequences = plan->sequences;
    CHECK(ovlm_step_plan_rebuild(&x->problem, again, &err) == OVLM_OK, "%s", err.message);
    return again;
}

static void damage(const instance *x, ovlm_step_plan *plan)
{
    ovlm_err err = {0};
    if (plan->text.route.k == 0) {
        return;
    }
    int64_t k = below(plan->text.route.k);
    plan->text.place[k]++;
    CHECK(ovlm_step_plan_check(&x->problem, plan, &err) == OVLM_E_ARG, "a shifted place");
    plan->text.place[k]--;
    plan->text.route.source[k] = (plan->text.route.source[k] + 1) % plan->n_ranks;
    CHECK(plan->n_ranks == 1 || ovlm_step_plan_check(&x->problem, plan, &err) == OVLM_E_ARG,
          "another source");
    plan->text.route.source[k] = x->source[plan->text.route.item[k]];
    plan->time += 1;
    CHECK(ovlm_step_plan_check(&x->problem, plan, &err) == OVLM_E_ARG, "another time");
    plan->time -= 1;
}

static void test_random(bool groups, int rounds)
{
    static instance x;
    for (int round = 0; round < rounds; round++) {
        draw(&x, groups);
        ovlm_budget budget = {.work_limit = below(2) * 300};
        ovlm_step_plan *one = NULL, *two = NULL;
        ovlm_err err = {0};
        ovlm_status status = ovlm_step_solve(&x.problem, &budget, &one, &err);
        if (status == OVLM_E_UNDECIDED) {
            continue;
        }
        CHECK(status == OVLM_OK, "round %d: %s", round, err.message);
        CHECK(ovlm_step_solve(&x.problem, &budget, &two, &err) == OVLM_OK, "%s", err.message);
        if (one == NULL || two == NULL) {
            return;
        }
        CHECK(ovlm_step_plan_check(&x.problem, one, &err) == OVLM_OK, "round %d: %s", round,
              err.message);
        CHECK(one->bound <= one->time * (1 + 1e-9), "%g <= %g", one->bound, one->time);
        CHECK(same_plan(one, two), "round %d is repeatable", round);
        ovlm_step_plan *again = rebuilt(&x, one);
        CHECK(same_plan(one, again), "round %d follows from its decisions", round);
        again->sequences = NULL;
        damage(&x, one);
        ovlm_step_plan_free(one);
        ovlm_step_plan_free(two);
        ovlm_step_plan_free(again);
    }
}

static void test_out_of_memory(bool groups)
{
    static instance x;
    do {
        draw(&x, groups);
    } while (x.problem.n == 0);
    ovlm_budget budget = {.work_limit = 10};
    for (int64_t allocations = 0;; allocations++) {
        ovlm_step_plan *plan = NULL;
        ovlm_err err = {0};
        ovlm_arena_fail_after(allocations);
        ovlm_status status = ovlm_step_solve(&x.problem, &budget, &plan, &err);
        ovlm_arena_fail_after(-1);
        if (status != OVLM_E_NOMEM) {
            CHECK(status == OVLM_OK || status == OVLM_E_UNDECIDED, "%s", err.message);
            ovlm_step_plan_free(plan);
            break;
        }
        CHECK(plan == NULL && err.message[0] != 0, "nothing is left behind");
    }
}

static int stop(void *ctx)
{
    (void)ctx;
    return 1;
}

static void test_interrupted(void)
{
    static instance x;
    draw(&x, false);
    ovlm_budget budget = {.work_limit = -1, .poll = stop};
    ovlm_step_plan *plan = NULL;
    ovlm_err err = {0};
    ovlm_status status = ovlm_step_solve(&x.problem, &budget, &plan, &err);
    CHECK(status == OVLM_OK || status == OVLM_E_INTERRUPTED, "%s", err.message);
    ovlm_step_plan_free(plan);
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    test_random(false, 150);
    test_random(true, 60);
    test_out_of_memory(false);
    test_out_of_memory(true);
    test_interrupted();
    return test_end("step");
}
