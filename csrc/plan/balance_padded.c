/* balance_padded.c - padded costs: cuts of the sorted units, and what they prove.
 *
 * With a cost that depends on the number and the longest of a rank's items alone, some optimum
 * consists of consecutive runs of the sorted list: give the rank with the largest maximum the
 * longest items, as many as it has, then the next rank, and so on; counts stay, maxima do not
 * rise.  The same argument serves the sum of the padded costs.  (OrchMLLM 1.3, algorithm 2.) */
#include "plan/balance_parts.h"

#include <math.h>
#include <string.h>

#include "base/sort.h"

typedef struct cuts {
    const bal_model *model;
    const int64_t *by_len; /* [n_units] longest first                                          */
    double *add;           /* [n_units+1] prefix sums of the additive cost in that order        */
    int64_t *size;         /* [n_units+1]; NULL without capacity                                */
} cuts;

/* Load of rank r with the run [from, to). */
static double run_load(const cuts *c, int64_t r, int64_t from, int64_t to)
{
    int64_t longest = to > from ? bal_len(c->model, c->by_len[from]) : 0;
    return bal_load(c->model, r, c->add[to] - c->add[from], to - from, longest);
}

static bool run_fits(const cuts *c, int64_t r, int64_t from, int64_t to, double limit)
{
    return run_load(c, r, from, to) <= limit &&
           (c->size == NULL || c->size[to] - c->size[from] <= bal_capacity(c->model, r));
}

/* Longest run from `from` that rank r takes at this limit, found by doubling, then halving. */
static int64_t run_end(const cuts *c, int64_t r, int64_t from, int64_t most, double limit)
{
    int64_t good = from, step = 1;
    while (good + step <= most && run_fits(c, r, from, good + step, limit)) {
        good += step;
        step *= 2;
    }
    for (; step > 0; step /= 2) {
        if (good + step <= most && run_fits(c, r, from, good + step, limit)) {
            good += step;
        }
    }
    return good;
}

/* Can ranks 0, 1, ... take all units in order?  end[r] answers when not NULL. */
static bool cut_at(const cuts *c, double limit, int64_t *end)
{
    const bal_model *model = c->model;
    int64_t at = 0, n = model->n_units, N = model->n_ranks;
    for (int64_t r = 0; r < N; r++) {
        /* leave enough for the ranks to come */
        int64_t most = n - model->min_items * (N - 1 - r) - at;
        most = most > model->max_items ? model->max_items : most;
        int64_t to = run_end(c, r, at, at + most, limit);
        if (to - at < model->min_items) {
            return false;
        }
        at = to;
        if (end != NULL) {
            end[r] = at;
        }
    }
    return at == n;
}

/* Least limit that cut_at accepts, to the last bit; HUGE_VAL when none is. */
static double least_limit(const cuts *c)
{
    uint64_t lo = 0, hi;
    double limit = 0;
    for (int64_t r = 0; r < c->model->n_ranks; r++) {
        double all = bal_load(c->model, r, c->add[c->model->n_units], c->model->n_units,
                              c->model->n_units > 0 ? bal_len(c->model, c->by_len[0]) : 0);
        limit = all > limit ? all : limit;
    }
    if (!cut_at(c, limit, NULL)) {
        return HUGE_VAL;
    }
    /* non-negative doubles order like their bits */
    memcpy(&hi, &limit, sizeof hi);
    while (lo < hi) {
        uint64_t mid = lo + (hi - lo) / 2;
        memcpy(&limit, &mid, sizeof limit);
        if (cut_at(c, limit, NULL)) {
            hi = mid;
        } else {
            lo = mid + 1;
        }
    }
    memcpy(&limit, &hi, sizeof limit);
    return limit;
}

/* Sorted list and prefix sums; flat != NULL replaces every additive cost by that value. */
static ovlm_status cuts_init(const bal_model *model, cuts *c, const double *flat,
                             ovlm_arena *arena, ovlm_err *err)
{
    int64_t n = model->n_units, *order = NULL;
    *c = (cuts){.model = model};
    OVLM_TRY(OVLM_ARENA_NEW(arena, &order, n, err));
    OVLM_TRY(ovlm_sort_i64(model->len, n, order, arena, err));
    c->by_len = order;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &c->add, n + 1, err));
    if (model->capacity != NULL) {
        OVLM_TRY(OVLM_ARENA_NEW(arena, &c->size, n + 1, err));
    }
    for (int64_t i = 0; i < n; i++) {
        c->add[i + 1] = flat != NULL ? *flat * (double)(i + 1) : c->add[i] + model->a[order[i]];
        if (c->size != NULL) {
            c->size[i + 1] = c->size[i] + model->size[order[i]];
        }
    }
    return OVLM_OK;
}

ovlm_status bal_cuts(const bal_model *model, bal_plan *plan, bool *done, ovlm_arena *arena,
                     ovlm_err *err)
{
    *done = false;
    if (!model->padded || model->count != NULL || model->pin != NULL) {
        return OVLM_OK;
    }
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    cuts c;
    int64_t *end = NULL;
    OVLM_TRY(cuts_init(model, &c, NULL, arena, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &end, model->n_ranks, err));
    double limit = least_limit(&c);
    if (limit < HUGE_VAL && cut_at(&c, limit, end)) {
        int64_t at = 0;
        for (int64_t r = 0; r < model->n_ranks; r++) {
            for (; at < end[r]; at++) {
                plan->rank[c.by_len[at]] = r;
            }
        }
        *done = bal_plan_settle(model, plan);
    }
    ovlm_arena_rewind(arena, mark);
    return OVLM_OK;
}

/* Least sum over runs of count * longest * g(longest) + price per run, by dynamic programming on
 * the lower envelope of lines: slopes fall, queries grow, so a pointer walk suffices.  *runs
 * counts. */
static double priced_runs(const double *pad, int64_t n, double price, double *cost, int64_t *from,
                          int64_t *used, int64_t *runs)
{
    int64_t head = 0, tail = 0; /* from[head..tail): candidate starts, a queue */
    cost[0] = 0;
    used[0] = 0;
    for (int64_t j = 1; j <= n; j++) {
        /* line of start i at j: cost[i] + (j - i)*pad[i] + price */
        int64_t i = j - 1;
        double b = cost[i] - (double)i * pad[i];
        while (tail - head >= 2) {
            int64_t p = from[tail - 2], q = from[tail - 1];
            double bp = cost[p] - (double)p * pad[p], bq = cost[q] - (double)q * pad[q];
            /* q is never best when (p, i) cross before (p, q) do */
            if ((b - bp) * (pad[p] - pad[q]) > (bq - bp) * (pad[p] - pad[i])) {
                break;
            }
            tail--;
        }
        from[tail++] = i;
        while (tail - head >= 2) {
            int64_t p = from[head], q = from[head + 1];
            if (cost[p] + (double)(j - p) * pad[p] < cost[q] + (double)(j - q) * pad[q]) {
                break;
            }
            head++;
        }
        int64_t start = from[head];
        cost[j] = cost[start] + (double)(j - start) * pad[start] + price;
        used[j] = used[start] + 1;
    }
    *runs = used[n];
    return cost[n];
}

/* The sum of all ranks' padded costs is at least the returned value: any price gives
 * min(sum + price*runs) - price*N (Lagrange), and the number of runs says which way to go. */
static ovlm_status least_padded_sum(const bal_model *model, const int64_t *by_len, double *least,
                                    ovlm_arena *arena, ovlm_err *err)
{
    int64_t n = model->n_units, *from = NULL, *used = NULL, runs = 0;
    double *pad = NULL, *cost = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &pad, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &cost, n + 1, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &from, n + 1, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &used, n + 1, err));
    for (int64_t i = 0; i < n; i++) {
        double h = (double)bal_len(model, by_len[i]);
        pad[i] = h * (model->padded_linear + model->padded_quadratic * h);
    }
    double lo = 0, hi = (double)n * pad[0];
    *least = 0;
    for (int step = 0; step < 32; step++) {
        double price = lo + (hi - lo) / 2;
        double value = priced_runs(pad, n, price, cost, from, used, &runs);
        /* absolute error of one step is some 2^-52 of n*pad[0]; one step per run */
        double error = 0x1p-48 * (double)(runs + 1) * ((double)n * pad[0] + price);
        double sum = value - price * (double)model->n_ranks - error;
        *least = sum > *least ? sum : *least;
        if (runs > model->n_ranks) {
            lo = price;
        } else {
            hi = price;
        }
    }
    return OVLM_OK;
}

ovlm_status bal_bound_padded(const bal_model *model, double *bound, ovlm_arena *arena,
                             ovlm_err *err)
{
    *bound = 0;
    int64_t n = model->n_units;
    if (model->count != NULL || n == 0) {
        return OVLM_OK;
    }
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    double least_a = HUGE_VAL, most_a = 0;
    double best_speed = 0, least_base = HUGE_VAL, sum_speed = 0;
    for (int64_t u = 0; u < n; u++) {
        least_a = model->a[u] < least_a ? model->a[u] : least_a;
        most_a = model->a[u] > most_a ? model->a[u] : most_a;
    }
    for (int64_t r = 0; r < model->n_ranks; r++) {
        double speed = bal_speed(model, r), base = bal_base(model, r);
        best_speed = speed > best_speed ? speed : best_speed;
        least_base = base < least_base ? base : least_base;
        sum_speed += speed;
    }
    /* Every rank as fast and as free as the best, no capacity: what remains is solved exactly. */
    bal_model easy = *model;
    easy.base_load = easy.speed = NULL;
    easy.capacity = NULL;
    cuts c;
    OVLM_TRY(cuts_init(&easy, &c, &least_a, arena, err));
    double rounding = 1 - (double)(n + 64) * 0x1p-52;
    double exact = least_limit(&c);
    if (exact < HUGE_VAL) {
        *bound = (least_base + exact / best_speed) * model->down;
    }
    bool pure = most_a <= least_a && model->uniform && model->capacity == NULL;
    if (pure) {
        ovlm_arena_rewind(arena, mark);
        return OVLM_OK; /* the cuts are an optimum: nothing can be added */
    }
    /* The mean over the ranks. */
    double padded = 0;
    OVLM_TRY(least_padded_sum(model, c.by_len, &padded, arena, err));
    double mean = least_base + (model->total + padded) / sum_speed;
    mean += model->base_load == NULL && model->speed == NULL ? model->fixed : 0;
    *bound = mean * rounding > *bound ? mean * rounding : *bound;
    ovlm_arena_rewind(arena, mark);
    return OVLM_OK;
}
