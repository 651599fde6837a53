/* test_relabel.c - relabelling against all permutations, and the bounds against the optimum. */
#include "test.h"

#include <math.h>
#include <string.h>

#include "ovlm.h"

enum { MAX_RANKS = 8, MAX_FLOWS = 60 };

typedef struct instance {
    int64_t n, n_ranks, node_size, n_ties;
    int64_t label[MAX_FLOWS], rank[MAX_FLOWS], bytes[MAX_FLOWS];
    int64_t tie_label[MAX_FLOWS], tie_rank[MAX_FLOWS], tie_bytes[MAX_FLOWS];
} instance;

static void draw_flows(int64_t n, int64_t n_ranks, int64_t *label, int64_t *rank, int64_t *bytes)
{
    int64_t scale = ovlm_rng_below(&test_rng, 2) ? 4 : 1000000;
    for (int64_t f = 0; f < n; f++) {
        label[f] = ovlm_rng_below(&test_rng, n_ranks);
        rank[f] = ovlm_rng_below(&test_rng, n_ranks);
        bytes[f] = ovlm_rng_below(&test_rng, scale);
    }
}

static void draw(instance *x, int64_t max_ranks)
{
    x->n_ranks = 1 + ovlm_rng_below(&test_rng, max_ranks);
    x->node_size = 1 + ovlm_rng_below(&test_rng, x->n_ranks + 1);
    x->n = ovlm_rng_below(&test_rng, MAX_FLOWS);
    x->n_ties = ovlm_rng_below(&test_rng, 2) * ovlm_rng_below(&test_rng, MAX_FLOWS);
    draw_flows(x->n, x->n_ranks, x->label, x->rank, x->bytes);
    draw_flows(x->n_ties, x->n_ranks, x->tie_label, x->tie_rank, x->tie_bytes);
}

/* Objective of a permutation, straight from its definition. */
static double objective(const instance *x, const int64_t *rank_of, ovlm_relabel_mode mode)
{
    double sum = 0, sent[MAX_RANKS] = {0}, received[MAX_RANKS] = {0}, worst = 0;
    for (int64_t f = 0; f < x->n; f++) {
        int64_t to = rank_of[x->label[f]], from = x->rank[f];
        if (to / x->node_size != from / x->node_size) {
            sum += (double)x->bytes[f];
            sent[from] += (double)x->bytes[f];
            received[to] += (double)x->bytes[f];
        }
    }
    for (int64_t r = 0; r < x->n_ranks; r++) {
        worst = fmax(worst, fmax(sent[r], received[r]));
    }
    return mode == OVLM_RELABEL_SUM ? sum : worst;
}

static double ties_sum(const instance *x, const int64_t *rank_of)
{
    double sum = 0;
    for (int64_t f = 0; f < x->n_ties; f++) {
        bool apart = rank_of[x->tie_label[f]] / x->node_size != x->tie_rank[f] / x->node_size;
        sum += apart ? (double)x->tie_bytes[f] : 0;
    }
    return sum;
}

/* Least (objective, ties) over all permutations of labels d.. n-1. */
static void brute(const instance *x, ovlm_relabel_mode mode, int64_t *rank_of, int64_t d,
                  double best[2])
{
    if (d == x->n_ranks) {
        double value = objective(x, rank_of, mode), ties = ties_sum(x, rank_of);
        if (value < best[0] || (value <= best[0] && ties < best[1])) {
            best[0] = value;
            best[1] = ties;
        }
        return;
    }
    for (int64_t i = d; i < x->n_ranks; i++) {
        int64_t swap = rank_of[d];
        rank_of[d] = rank_of[i];
        rank_of[i] = swap;
        brute(x, mode, rank_of, d + 1, best);
        swap = rank_of[d];
        rank_of[d] = rank_of[i];
        rank_of[i] = swap;
    }
}

static ovlm_relabel_problem problem_of(const instance *x, ovlm_relabel_mode mode)
{
    return (ovlm_relabel_problem){
        .n = x->n, .n_ranks = x->n_ranks, .node_size = x->node_size, .label = x->label,
        .rank = x->rank, .bytes = x->bytes, .n_ties = x->n_ties, .tie_label = x->tie_label,
        .tie_rank = x->tie_rank, .tie_bytes = x->tie_bytes, .mode = mode};
}

static void check_permutation(const int64_t *rank_of, int64_t n)
{
    bool seen[MAX_RANKS] = {false};
    for (int64_t j = 0; j < n; j++) {
        CHECK(rank_of[j] >= 0 && rank_of[j] < n && !seen[rank_of[j]], "label %lld", (long long)j);
        seen[rank_of[j]] = true;
    }
}

static void test_brute_force(void)
{
    int64_t met = 0, rounds = 600;
    for (int64_t round = 0; round < rounds; round++) {
        instance x;
        draw(&x, round % 20 ? 6 : 8);
        for (int mode = OVLM_RELABEL_SUM; mode <= OVLM_RELABEL_MINMAX; mode++) {
            ovlm_relabel_problem problem = problem_of(&x, (ovlm_relabel_mode)mode);
            ovlm_relabel_result result;
            ovlm_err err = {0};
            int64_t rank_of[MAX_RANKS], names[MAX_RANKS] = {0, 1, 2, 3, 4, 5, 6, 7};
            CHECK(ovlm_relabel_solve(&problem, NULL, rank_of, &result, &err) == OVLM_OK, "%s",
                  err.message);
            check_permutation(rank_of, x.n_ranks);
            double best[2] = {HUGE_VAL, HUGE_VAL};
            brute(&x, (ovlm_relabel_mode)mode, names, 0, best);
            double value = objective(&x, rank_of, (ovlm_relabel_mode)mode);
            CHECK(value == result.value, "%g said, %g done", result.value, value);
            CHECK(result.before == objective(&x, names, (ovlm_relabel_mode)mode), "before");
            CHECK(result.bound <= best[0] && value >= best[0], "round %lld: %g <= %g <= %g",
                  (long long)round, result.bound, best[0], value);
            CHECK(result.status != OVLM_PLAN_OPTIMAL || value <= best[0] * (1 + 1e-9), "optimal");
            if (mode == OVLM_RELABEL_SUM) {
                double ties = ties_sum(&x, rank_of);
                CHECK(value == best[0] && result.bound == best[0] && ties == best[1],
                      "sum is exact: %g, ties %g of %g", value, ties, best[1]);
            } else {
                met += value <= best[0];
            }
        }
    }
    CHECK(met >= rounds * 3 / 4, "minmax met the optimum in %lld of %lld", (long long)met,
          (long long)rounds);
}

static void test_budget(void)
{
    for (int round = 0; round < 100; round++) {
        instance x;
        draw(&x, MAX_RANKS);
        ovlm_relabel_problem problem = problem_of(&x, OVLM_RELABEL_MINMAX);
        for (int64_t work = 0; work < 200; work = 2 * work + 1) {
            ovlm_budget budget = {.work_limit = work};
            ovlm_relabel_result result;
            ovlm_err err = {0};
            int64_t rank_of[MAX_RANKS], again[MAX_RANKS];
            int64_t names[MAX_RANKS] = {0, 1, 2, 3, 4, 5, 6, 7};
            double best[2] = {HUGE_VAL, HUGE_VAL};
            CHECK(ovlm_relabel_solve(&problem, &budget, rank_of, &result, &err) == OVLM_OK, "ok");
            check_permutation(rank_of, x.n_ranks);
            CHECK(result.value <= result.before, "never worse than staying");
            CHECK(ovlm_relabel_solve(&problem, &budget, again, &result, &err) == OVLM_OK, "ok");
            CHECK(memcmp(rank_of, again, (size_t)x.n_ranks * sizeof *again) == 0, "repeatable");
            if (x.n_ranks <= 6) {
                brute(&x, OVLM_RELABEL_MINMAX, names, 0, best);
                CHECK(result.bound <= best[0], "bound %g above %g", result.bound, best[0]);
            }
        }
    }
}

static void test_bad_input(void)
{
    instance x = {.n = 1, .n_ranks = 4, .node_size = 2, .bytes = {1}};
    ovlm_relabel_result result;
    ovlm_err err = {0};
    int64_t rank_of[MAX_RANKS];
    ovlm_relabel_problem problem = problem_of(&x, OVLM_RELABEL_SUM);
    x.label[0] = 4;
    CHECK(ovlm_relabel_solve(&problem, NULL, rank_of, &result, &err) == OVLM_E_ARG, "label");
    x.label[0] = 0;
    x.bytes[0] = -1;
    CHECK(ovlm_relabel_solve(&problem, NULL, rank_of, &result, &err) == OVLM_E_ARG, "bytes");
    x.bytes[0] = INT64_MAX;
    CHECK(ovlm_relabel_solve(&problem, NULL, rank_of, &result, &err) == OVLM_E_ARG, "overflow");
    x.bytes[0] = ((int64_t)1 << 52) + 1; /* doubles would round, and a bound with them */
    CHECK(ovlm_relabel_solve(&problem, NULL, rank_of, &result, &err) == OVLM_E_ARG, "inexact");
    x.bytes[0] = (int64_t)1 << 52;
    CHECK(ovlm_relabel_solve(&problem, NULL, rank_of, &result, &err) == OVLM_OK, "%s", err.message);
    problem.node_size = 0;
    CHECK(ovlm_relabel_solve(&problem, NULL, rank_of, &result, &err) == OVLM_E_ARG, "node_size");
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    test_brute_force();
    test_budget();
    test_bad_input();
    return test_end("relabel");
}
