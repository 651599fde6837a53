/* test_step.c - step plans of random problems: the independent check, repeatability, decisions that
 * come back, damage that is found, and every allocation failing once. */
#include "test.h"

#include <math.h>
#include <string.h>

#include "base/arena.h"
#include "ovlm.h"

enum { MAX_N = 60, MAX_ITEMS = 80, PHASES = 2, MAX_DEGREES = 4 };

typedef struct instance {
    ovlm_step_problem problem;
    ovlm_step_items phase[PHASES];
    int64_t text[MAX_N], source[MAX_N], degree[MAX_DEGREES];
    int64_t sample[PHASES][MAX_ITEMS], position[PHASES][MAX_ITEMS], length[PHASES][MAX_ITEMS];
    int64_t out[PHASES][MAX_ITEMS], bytes[PHASES][MAX_ITEMS];
    double comm[MAX_DEGREES];
} instance;

static int64_t below(int64_t n)
{
    return ovlm_rng_below(&test_rng, n);
}

static double coefficient(void)
{
    return below(2) ? ovlm_rng_uniform(&test_rng) : 0;
}

static ovlm_batch_cost draw_cost(void)
{
    return (ovlm_batch_cost){coefficient(), coefficient(), coefficient(),
                             coefficient(), coefficient(), coefficient()};
}

static void draw_phase(instance *x, int p, int64_t *taken)
{
    static const char *name[PHASES] = {"vision", "audio"};
    int64_t n = x->problem.n, k = n ? below(MAX_ITEMS) : 0;
    for (int64_t i = 0; i < k; i++) {
        int64_t s = below(n);
        x->sample[p][i] = s;
        x->position[p][i] = taken[s] + below(3);
        x->out[p][i] = below(9);
        x->length[p][i] = below(20);
        x->bytes[p][i] = below(5000);
        /* the gap is text */
        x->text[s] += x->position[p][i] - taken[s];
        taken[s] = x->position[p][i] + x->out[p][i];
    }
    x->phase[p] = (ovlm_step_items){
        .name = name[p], .n = k, .sample = x->sample[p], .position = x->position[p],
        .length = x->length[p], .out_tokens = x->out[p], .bytes = x->bytes[p],
        .out_bytes_per_token = (double)below(100), .cost = draw_cost(),
        .memory_per_token = below(2) ? 1000.0 / (double)(20 + below(30)) : 0};
}

static void draw_groups(instance *x, int64_t longest)
{
    ovlm_step_problem *problem = &x->problem;
    int64_t n_degrees = 0;
    for (int64_t d = 1; d <= problem->n_ranks && n_degrees < MAX_DEGREES; d *= 2) {
        x->degree[n_degrees] = d;
        x->comm[n_degrees++] = d > 1 ? 1e-3 : 0;
    }
    problem->sequence_parallel = true;
    problem->pad_to = 1 + below(4);
    problem->sequence_cost = (ovlm_sequence_cost){
        .quadratic = 1e-3, .linear = 1e-2, .fixed = 0.05, .memory_per_token = 1,
        .memory_limit = (double)(longest + 64), .degree_n = n_degrees, .degree = x->degree,
        .comm = x->comm};
}

static void draw(instance *x, bool groups)
{
    int64_t taken[MAX_N] = {0}, longest = 0;
    memset(x, 0, sizeof *x);
    ovlm_step_problem *problem = &x->problem;
    problem->gpus_per_node = (int64_t)1 << below(4);
    problem->n_ranks = problem->gpus_per_node * (1 + below(4));
    problem->n = below(MAX_N);
    problem->memory_bytes = 1000;
    problem->intra_bandwidth = 1e6;
    problem->inter_bandwidth = 1e5;
    problem->text_bytes_per_token = 8;
    problem->n_phases = below(PHASES + 1);
    problem->phase = x->phase;
    problem->text_tokens = x->text;
    problem->source_rank = x->source;
    for (int p = 0; p < problem->n_phases; p++) {
        draw_phase(x, p, taken);
    }
    for (int64_t i = 0; i < problem->n; i++) {
        int64_t tail = groups + below(20);
        x->text[i] += tail;
        x->source[i] = below(problem->n_ranks);
        longest = taken[i] + tail > longest ? taken[i] + tail : longest;
    }
    problem->llm_cost = draw_cost();
    problem->llm_memory_per_token = below(2) ? 1000.0 / (double)(longest + 1) : 0;
    problem->pad_to = 1;
    problem->relabel = (ovlm_relabel_mode)below(3);
    problem->slack = (double[]){-1, 0, 0.1}[below(3)];
    problem->compose = below(2) != 0;
    if (groups) {
        draw_groups(x, longest);
    }
}

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
