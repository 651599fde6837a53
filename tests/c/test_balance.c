/* test_balance.c - balancing against brute force: every cost form, every constraint, alone and
 * together; bounds never above the optimum; and every allocation failing in turn. */
#include "test.h"

#include <math.h>
#include <string.h>

#include "base/arena.h"
#include "ovlm.h"

enum { MAX_N = 8, MAX_RANKS = 4 };

/* A small problem with its own storage. */
typedef struct sample {
    ovlm_balance_problem p;
    int64_t lengths[MAX_N], size[MAX_N], together[MAX_N], pinned[MAX_N], home[MAX_N];
    double squares[MAX_N], item_cost[MAX_N];
    int64_t capacity[MAX_RANKS];
    double base_load[MAX_RANKS], speed[MAX_RANKS];
} sample;

static int64_t below(int64_t n)
{
    return ovlm_rng_below(&test_rng, n);
}

static bool chance(int64_t one_in)
{
    return below(one_in) == 0;
}

/* Coefficients of one cost form: packed, padded, with attention, convolution + transformer, ... */
static ovlm_batch_cost random_cost(void)
{
    ovlm_batch_cost c = {0};
    switch (below(7)) {
    case 0: c.linear = 1; break;
    case 1: c.linear = 0.1, c.quadratic = 0.003; break;
    case 2: c.padded_linear = 1; break;
    case 3: c.padded_linear = 0.7, c.padded_quadratic = 0.01, c.per_item = 2; break;
    case 4: c.padded_linear = 1, c.linear = 0.25, c.quadratic = 0.01; break;
    case 5: c.per_item = 3; break;
    default:
        c.linear = ovlm_rng_uniform(&test_rng), c.quadratic = ovlm_rng_uniform(&test_rng) / 50;
        c.padded_linear = ovlm_rng_uniform(&test_rng);
        c.padded_quadratic = ovlm_rng_uniform(&test_rng) / 50;
    }
    c.fixed = chance(3) ? 10 : 0;
    return c;
}

/* `options` constraints at most, so that single ones and combinations both occur. */
static void random_sample(sample *s, bool with_home)
{
    memset(s, 0, sizeof *s);
    ovlm_balance_problem *p = &s->p;
    int64_t n = p->n = below(MAX_N + 1), n_ranks = p->n_ranks = 1 + below(MAX_RANKS);
    p->cost = random_cost();
    p->max_items = -1;
    p->node_size = 1 + below(3);
    p->seed = ovlm_rng_next(&test_rng);
    p->lengths = s->lengths;
    int64_t widest = chance(2) ? 10 : 200, one_in = 2 + below(8);
    for (int64_t i = 0; i < n; i++) {
        s->lengths[i] = below(widest);
        s->size[i] = below(20);
        s->together[i] = below(n) - 2;
        s->pinned[i] = chance(3) ? below(n_ranks) : -1;
        s->home[i] = below(n_ranks);
        s->squares[i] = ovlm_rng_uniform(&test_rng) * 100;
        s->item_cost[i] = chance(2) ? (double)below(30) : ovlm_rng_uniform(&test_rng);
    }
    for (int64_t r = 0; r < n_ranks; r++) {
        s->capacity[r] = 10 * n / n_ranks + below(15);
        s->base_load[r] = (double)below(50);
        s->speed[r] = 0.5 + 0.25 * (double)below(5);
    }
    p->squares = chance(one_in) ? s->squares : NULL;
    p->item_cost = chance(one_in) ? s->item_cost : NULL;
    p->size = chance(2) ? s->size : NULL;
    p->capacity = p->size != NULL && chance(one_in) ? s->capacity : NULL;
    p->together = chance(one_in) ? s->together : NULL;
    p->pinned = chance(one_in) ? s->pinned : NULL;
    p->base_load = chance(one_in) ? s->base_load : NULL;
    p->speed = chance(one_in) ? s->speed : NULL;
    p->min_items = chance(one_in) ? below(n / n_ranks + 1) : 0;
    p->max_items = chance(one_in) ? (n + n_ranks - 1) / n_ranks + below(2) : -1;
    if (with_home) {
        p->home = s->home;
        p->slack = chance(2) ? 0 : 0.3;
        p->group_size = p->together == NULL && n_ranks % 2 == 0 && chance(4) ? n_ranks / 2 : 0;
    }
}

/* Loads by the definition; false when a constraint is broken. */
static bool evaluate(const ovlm_balance_problem *p, const int64_t *rank, double *largest,
                     double *node_bytes, double *rank_bytes)
{
    *largest = *node_bytes = *rank_bytes = 0;
    for (int64_t r = 0; r < p->n_ranks; r++) {
        int64_t count = 0, size = 0, longest = 0;
        double f = 0, a = 0;
        for (int64_t i = 0; i < p->n; i++) {
            if (rank[i] == r) {
                double l = (double)p->lengths[i];
                count++;
                size += p->size != NULL ? p->size[i] : 0;
                longest = p->lengths[i] > longest ? p->lengths[i] : longest;
                a += p->item_cost != NULL ? p->item_cost[i] : 0;
                f += p->cost.linear * l +
                     p->cost.quadratic * (p->squares != NULL ? p->squares[i] : l * l);
            }
        }
        double h = (double)longest, m = (double)count;
        f += count > 0 ? p->cost.fixed + m * (p->cost.per_item + p->cost.padded_linear * h +
                                              p->cost.padded_quadratic * h * h)
                       : 0;
        f = p->item_cost != NULL ? a : f;
        double load = (p->base_load != NULL ? p->base_load[r] : 0) +
                      f / (p->speed != NULL ? p->speed[r] : 1);
        *largest = load > *largest ? load : *largest;
        if (count < p->min_items || (p->max_items >= 0 && count > p->max_items) ||
            (p->capacity != NULL && size > p->capacity[r])) {
            return false;
        }
    }
    for (int64_t i = 0; i < p->n; i++) {
        for (int64_t k = 0; p->together != NULL && k < i; k++) {
            if (p->together[i] == p->together[k] && rank[i] != rank[k]) {
                return false;
            }
        }
        if ((p->pinned != NULL && p->pinned[i] >= 0 && p->pinned[i] != rank[i]) ||
            (p->group_size > 0 && p->home[i] / p->group_size != rank[i] / p->group_size)) {
            return false;
        }
        double bytes = (double)(p->size != NULL ? p->size[i] : p->lengths[i]);
        if (p->home != NULL && p->home[i] != rank[i]) {
            *rank_bytes += bytes;
            *node_bytes += p->home[i] / p->node_size != rank[i] / p->node_size ? bytes : 0;
        }
    }
    return true;
}

typedef struct brute {
    bool feasible;
    double best, node_bytes, rank_bytes;
} brute;

/* All n_ranks^n assignments: the least largest load, then the least traffic up to the slack. */
static brute brute_force(const ovlm_balance_problem *p)
{
    brute b = {false, HUGE_VAL, HUGE_VAL, HUGE_VAL};
    for (int pass = 0; pass < 2; pass++) {
        int64_t rank[MAX_N] = {0};
        for (;;) {
            double largest, node_bytes, rank_bytes;
            if (evaluate(p, rank, &largest, &node_bytes, &rank_bytes)) {
                b.feasible = true;
                if (pass == 0) {
                    b.best = largest < b.best ? largest : b.best;
                } else if (largest <= b.best * (1 + p->slack) * (1 + 1e-12) &&
                           (node_bytes < b.node_bytes ||
                            (node_bytes <= b.node_bytes && rank_bytes < b.rank_bytes))) {
                    b.node_bytes = node_bytes;
                    b.rank_bytes = rank_bytes;
                }
            }
            int64_t i = 0;
            while (i < p->n && ++rank[i] == p->n_ranks) {
                rank[i++] = 0;
            }
            if (i == p->n) {
                break;
            }
        }
    }
    return b;
}

static void check_against_brute(const sample *s, int round)
{
    const ovlm_balance_problem *p = &s->p;
    int64_t rank[MAX_N];
    double loads[MAX_RANKS], largest, node_bytes, rank_bytes;
    ovlm_balance_result result = {0};
    ovlm_err err = {0};
    brute b = brute_force(p);
    ovlm_status status = ovlm_balance_solve(p, NULL, rank, loads, &result, &err);
    CHECK(status == (b.feasible ? OVLM_OK : OVLM_E_ARG), "round %d: %s: %s", round,
          ovlm_status_name(status), err.message);
    if (status != OVLM_OK) {
        return;
    }
    CHECK(evaluate(p, rank, &largest, &node_bytes, &rank_bytes), "round %d: infeasible", round);
    double reported = 0;
    for (int64_t r = 0; r < p->n_ranks; r++) {
        reported = loads[r] > reported ? loads[r] : reported;
    }
    CHECK(fabs(reported - largest) <= 1e-9 * largest, "round %d: loads", round);
    CHECK(result.bound <= b.best, "round %d: bound %.17g above the optimum %.17g", round,
          result.bound, b.best);
    double most = b.best * (p->home != NULL ? 1 + p->slack : 1);
    CHECK(largest <= most * (1 + 1e-9), "round %d: %.17g, best is %.17g", round, largest, most);
    if (p->home == NULL) {
        CHECK(result.status == OVLM_PLAN_OPTIMAL, "round %d: not proved: %.17g %.17g", round,
              result.bound, largest);
    } else if (p->together == NULL && p->group_size == 0) {
        CHECK(node_bytes <= b.node_bytes && rank_bytes <= b.rank_bytes,
              "round %d: moves %g/%g, least is %g/%g", round, node_bytes, rank_bytes, b.node_bytes,
              b.rank_bytes);
    }
    /* the bound without search must hold as well, and the greedy must be valid */
    ovlm_budget none = {.work_limit = 0};
    status = ovlm_balance_solve(p, &none, rank, loads, &result, &err);
    CHECK(status == OVLM_OK || status == OVLM_E_UNDECIDED, "round %d: %s", round, err.message);
    if (status == OVLM_OK) {
        CHECK(evaluate(p, rank, &largest, &node_bytes, &rank_bytes), "round %d: greedy", round);
        CHECK(result.bound <= b.best, "round %d: root bound %.17g above %.17g", round,
              result.bound, b.best);
    }
}

static void test_brute(void)
{
    for (int round = 0; round < 1500; round++) {
        sample s;
        random_sample(&s, round % 3 == 0);
        check_against_brute(&s, round);
    }
}

/* Every allocation in turn fails: the call says so, leaks nothing, and works afterwards. */
static void test_allocation_failures(void)
{
    for (int round = 0; round < 40; round++) {
        sample s;
        random_sample(&s, round % 2 == 0);
        int64_t rank[MAX_N];
        double loads[MAX_RANKS];
        ovlm_balance_result result;
        ovlm_err err;
        ovlm_budget budget = {.work_limit = 20000};
        ovlm_status wanted = ovlm_balance_solve(&s.p, &budget, rank, loads, &result, &err);
        for (int64_t fail = 0; fail < 4000; fail++) {
            ovlm_arena_fail_after(fail);
            ovlm_status status = ovlm_balance_solve(&s.p, &budget, rank, loads, &result, &err);
            ovlm_arena_fail_after(-1);
            if (status == wanted) {
                break;
            }
            CHECK(status == OVLM_E_NOMEM, "round %d, allocation %lld: %s", round, (long long)fail,
                  ovlm_status_name(status));
        }
    }
}

/* Larger problems of every kind: valid, deterministic, better with more work, bound below. */
static void test_larger(void)
{
    enum { N = 120, R = 12 };
    static int64_t lengths[N], rank[N], again[N], pinned[N], size[N], capacity[R];
    double loads[R], speed[R];
    for (int round = 0; round < 60; round++) {
        ovlm_balance_problem p = {.n = N, .n_ranks = R, .lengths = lengths, .max_items = -1,
                                  .node_size = 4, .cost = random_cost()};
        for (int i = 0; i < N; i++) {
            lengths[i] = 1 + below(1000);
            pinned[i] = chance(8) ? below(R) : -1;
            size[i] = below(100);
        }
        for (int r = 0; r < R; r++) {
            speed[r] = r % 3 == 0 ? 1 : 1.5;
            capacity[r] = 50 * N / R * 5 / 4;
        }
        p.pinned = chance(4) ? pinned : NULL;
        p.speed = chance(4) ? speed : NULL;
        p.size = chance(2) ? size : NULL;
        p.capacity = p.size != NULL && chance(2) ? capacity : NULL;
        p.min_items = chance(4) && p.pinned == NULL ? 10 : 0;
        p.max_items = chance(4) && p.pinned == NULL ? 10 : -1;
        double last = HUGE_VAL, bound = 0;
        for (int64_t work = 0; work <= 1000000; work = work * 10 + 1000) {
            ovlm_budget budget = {.work_limit = work};
            ovlm_balance_result result;
            ovlm_err err = {0};
            ovlm_status status = ovlm_balance_solve(&p, &budget, rank, loads, &result, &err);
            CHECK(status == OVLM_OK, "round %d: %s", round, err.message);
            double largest = 0, node_bytes, rank_bytes;
            CHECK(status == OVLM_OK && evaluate(&p, rank, &largest, &node_bytes, &rank_bytes),
                  "round %d, work %lld: invalid", round, (long long)work);
            CHECK(largest <= last * (1 + 1e-9), "round %d: more work made %g of %g", round, largest,
                  last);
            last = largest;
            bound = result.bound > bound ? result.bound : bound;
            status = ovlm_balance_solve(&p, &budget, again, loads, &result, &err);
            CHECK(status == OVLM_OK && memcmp(rank, again, sizeof rank) == 0,
                  "round %d: not deterministic", round);
        }
        CHECK(bound <= last * (1 + 1e-12), "round %d: bound %g above plan %g", round, bound, last);
    }
}

static int stop(void *ctx)
{
    ++*(int *)ctx;
    return 1;
}

/* A caller's wish to stop ends every kind of search; so does the clock, with a plan. */
static void test_interrupts(void)
{
    enum { N = 300, R = 100 };
    static int64_t lengths[N], rank[N];
    double loads[R];
    for (int padded = 0; padded < 2; padded++) {
        for (int i = 0; i < N; i++) {
            lengths[i] = 2500000 + below(2500000);
        }
        ovlm_balance_problem p = {.n = N, .n_ranks = R, .lengths = lengths, .max_items = -1,
                                  .node_size = 8, .cost = {.linear = 1, .padded_linear = padded}};
        int calls = 0;
        ovlm_budget budget = {.work_limit = INT64_MAX, .poll = stop, .poll_ctx = &calls};
        ovlm_balance_result result = {0};
        ovlm_err err = {0};
        ovlm_status status = ovlm_balance_solve(&p, &budget, rank, loads, &result, &err);
        CHECK(status == OVLM_E_INTERRUPTED && calls == 1, "%s, %d calls",
              ovlm_status_name(status), calls);
        budget = (ovlm_budget){.work_limit = INT64_MAX, .time_limit_s = 0.01};
        status = ovlm_balance_solve(&p, &budget, rank, loads, &result, &err);
        CHECK(status == OVLM_OK && result.cut_short, "%s", err.message);
    }
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    test_brute();
    test_allocation_failures();
    test_larger();
    test_interrupts();
    return test_end("balance");
}
