/* fuzz_balance.c - ovlm_balance_solve: any arguments survive; plans keep every constraint; the
 * bound lies below every plan, and below the brute-force optimum of tiny instances. */
#include "fuzz.h"

enum { ITEMS = 40, RANKS = 9, TINY_ITEMS = 6, TINY_RANKS = 3 };

typedef struct instance {
    ovlm_balance_problem p;
    int64_t lengths[ITEMS], size[ITEMS], together[ITEMS], pinned[ITEMS], home[ITEMS];
    int64_t capacity[RANKS];
    double squares[ITEMS], item_cost[ITEMS], base_load[RANKS], speed[RANKS];
    bool wild; /* arguments may be invalid */
} instance;

static double draw_real(instance *x, fuzz_input *in)
{
    return x->wild ? fuzz_wild_double(in) : fuzz_coefficient(in);
}

static void draw_items(instance *x, fuzz_input *in)
{
    int64_t n = x->p.n > 0 ? x->p.n : 0, N = x->p.n_ranks;
    int64_t longest = fuzz_bytes(in, 1) % 2 ? 9 : 60000;
    for (int64_t i = 0; i < n; i++) {
        x->lengths[i] = x->wild ? fuzz_wild(in) : fuzz_range(in, 0, longest);
        x->size[i] = x->wild ? fuzz_wild(in) : fuzz_range(in, 0, 9);
        x->together[i] = x->wild ? fuzz_wild(in) : fuzz_range(in, 0, n);
        x->pinned[i] = x->wild ? fuzz_wild(in) : fuzz_range(in, -1, N - 1);
        x->home[i] = x->wild ? fuzz_wild(in) : fuzz_range(in, 0, N - 1);
        x->squares[i] = draw_real(x, in);
        x->item_cost[i] = draw_real(x, in);
    }
    for (int64_t r = 0; r < N; r++) {
        x->capacity[r] = x->wild ? fuzz_wild(in) : fuzz_range(in, 0, 40);
        x->base_load[r] = draw_real(x, in);
        x->speed[r] = x->wild ? fuzz_wild_double(in) : 0.25 * (double)fuzz_range(in, 1, 8);
    }
}

static void draw(instance *x, fuzz_input *in)
{
    uint64_t use = fuzz_bytes(in, 2);
    memset(x, 0, sizeof *x);
    x->wild = use % 8 == 7;
    use >>= 3;
    x->p.n = fuzz_range(in, 0, ITEMS);
    x->p.n_ranks = fuzz_range(in, x->wild ? -1 : 1, RANKS);
    if (use & 1) { /* tiny: brute force can follow */
        x->p.n %= TINY_ITEMS + 1;
        x->p.n_ranks = x->p.n_ranks > TINY_RANKS ? TINY_RANKS : x->p.n_ranks;
    }
    if (x->wild && fuzz_bytes(in, 1) == 0) {
        x->p.n = -fuzz_range(in, 1, 9);
    }
    draw_items(x, in);
    x->p.lengths = x->lengths;
    x->p.cost = (ovlm_batch_cost){draw_real(x, in), draw_real(x, in), draw_real(x, in),
                                  draw_real(x, in), draw_real(x, in), draw_real(x, in)};
    x->p.squares = use & 2 ? x->squares : NULL;
    x->p.item_cost = use & 4 ? x->item_cost : NULL;
    x->p.size = use & 8 ? x->size : NULL;
    x->p.capacity = (use & 24) == 24 ? x->capacity : NULL;
    x->p.together = use & 32 ? x->together : NULL;
    x->p.pinned = use & 64 ? x->pinned : NULL;
    x->p.base_load = use & 128 ? x->base_load : NULL;
    x->p.speed = use & 256 ? x->speed : NULL;
    x->p.home = use & 512 ? x->home : NULL;
    x->p.group_size = use & 512 && use & 1024 ? fuzz_range(in, 0, 3) : 0;
    x->p.min_items = use & 2048 ? fuzz_range(in, x->wild ? -1 : 0, 2) : 0;
    x->p.max_items = use & 4096 ? fuzz_range(in, 0, ITEMS) : -1;
    x->p.node_size = x->wild ? fuzz_wild(in) : fuzz_range(in, 1, 4);
    x->p.slack = x->wild ? fuzz_wild_double(in) : 0.01 * (double)fuzz_range(in, 0, 20);
    x->p.seed = fuzz_bytes(in, 2);
}

/* Loads of an assignment, from the definition. */
static double loads_of(const ovlm_balance_problem *p, const int64_t *rank, double *loads)
{
    double largest = 0;
    for (int64_t r = 0; r < p->n_ranks; r++) {
        double sum = 0, sum_q = 0, max = 0, cost = 0;
        int64_t count = 0;
        for (int64_t i = 0; i < p->n; i++) {
            if (rank[i] != r) {
                continue;
            }
            double l = (double)p->lengths[i];
            count++;
            sum += l;
            sum_q += p->squares ? p->squares[i] : l * l;
            max = l > max ? l : max;
            cost += p->item_cost ? p->item_cost[i] : 0;
        }
        double f = p->item_cost ? cost : ovlm_batch_cost_eval(&p->cost, count, sum, sum_q, max);
        loads[r] = (p->base_load ? p->base_load[r] : 0) + f / (p->speed ? p->speed[r] : 1);
        largest = loads[r] > largest ? loads[r] : largest;
    }
    return largest;
}

/* Whether an assignment keeps every constraint. */
static bool allowed(const ovlm_balance_problem *p, const int64_t *rank)
{
    for (int64_t r = 0; r < p->n_ranks; r++) {
        int64_t count = 0, size = 0;
        for (int64_t i = 0; i < p->n; i++) {
            count += rank[i] == r;
            size += rank[i] == r && p->size ? p->size[i] : 0;
        }
        if (count < p->min_items || (p->max_items >= 0 && count > p->max_items) ||
            (p->capacity && size > p->capacity[r])) {
            return false;
        }
    }
    for (int64_t i = 0; i < p->n; i++) {
        if (rank[i] < 0 || rank[i] >= p->n_ranks ||
            (p->pinned && p->pinned[i] >= 0 && rank[i] != p->pinned[i]) ||
            (p->group_size > 0 && rank[i] / p->group_size != p->home[i] / p->group_size)) {
            return false;
        }
        for (int64_t k = 0; p->together && k < i; k++) {
            if (p->together[i] == p->together[k] && rank[i] != rank[k]) {
                return false;
            }
        }
    }
    return true;
}

/* The least largest load over all assignments; HUGE_VAL when none is allowed. */
static double brute_force(const ovlm_balance_problem *p)
{
    int64_t rank[TINY_ITEMS] = {0}, at = 0;
    double best = HUGE_VAL, loads[RANKS];
    while (at < p->n || p->n == 0) {
        if (allowed(p, rank)) {
            double largest = loads_of(p, rank, loads);
            best = largest < best ? largest : best;
        }
        for (at = 0; at < p->n && ++rank[at] == p->n_ranks; at++) {
            rank[at] = 0;
        }
        if (p->n == 0) {
            break;
        }
    }
    return best;
}

static void check_plan(const instance *x, const int64_t *rank, const double *loads,
                       const ovlm_balance_result *result)
{
    double want[RANKS], largest = loads_of(&x->p, rank, want);
    MUST(allowed(&x->p, rank), "a constraint is broken");
    for (int64_t r = 0; r < x->p.n_ranks; r++) {
        MUST(fabs(loads[r] - want[r]) <= 1e-9 * fabs(want[r]), "load[%lld] = %.17g, not %.17g",
             (long long)r, loads[r], want[r]);
    }
    MUST(result->bound <= largest * (1 + 1e-9), "bound %.17g above %.17g", result->bound, largest);
    MUST(result->status != OVLM_PLAN_OPTIMAL || result->bound >= largest * (1 - 1e-8),
         "optimal at %.17g with bound %.17g", largest, result->bound);
    MUST(!result->cut_short, "no clock was running");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input in = {data, size};
    static instance x;
    draw(&x, &in);
    ovlm_budget budget = {.work_limit = fuzz_range(&in, 0, 3) * 700};
    int64_t rank[ITEMS], again[ITEMS];
    double loads[RANKS], loads_again[RANKS];
    ovlm_balance_result result = {0}, result_again = {0};
    ovlm_err err = {0};
    ovlm_status status = ovlm_balance_solve(&x.p, &budget, rank, loads, &result, &err);
    fuzz_check_status(status, &err);
    bool tiny = !x.wild && x.p.n <= TINY_ITEMS && x.p.n_ranks <= TINY_RANKS;
    bool valid_groups = x.p.group_size == 0 || x.p.n_ranks % x.p.group_size == 0;
    double best = tiny && valid_groups ? brute_force(&x.p) : HUGE_VAL;
    if (status != OVLM_OK) {
        MUST(best >= HUGE_VAL || status != OVLM_E_ARG, "refused, yet %.17g is possible: %s", best,
             err.message);
        return 0;
    }
    check_plan(&x, rank, loads, &result);
    MUST(result.bound <= best * (1 + 1e-9), "bound %.17g above the optimum %.17g", result.bound,
         best);
    status = ovlm_balance_solve(&x.p, &budget, again, loads_again, &result_again, &err);
    MUST(status == OVLM_OK && result_again.bound == result.bound &&
             memcmp(rank, again, (size_t)x.p.n * sizeof *rank) == 0, "not deterministic");
    return 0;
}
