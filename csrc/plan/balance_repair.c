/* balance_repair.c - a plan that satisfies tight constraints, where constructions found none.
 *
 * Longest-first without the limits, then random moves and swaps that never raise the total
 * violation: items above max_items or below min_items, and size above capacity in mean sizes.  The
 * number of steps depends on the problem alone, so that a first plan is the same at every work
 * limit. */
#include "plan/balance_parts.h"

typedef struct repair {
    const bal_model *model;
    bal_plan *plan;
    ovlm_rng *rng;
    double per_size; /* violation of one unit of size                                          */
} repair;

/* Violation of a rank with these sums. */
static double violation(const repair *x, int64_t r, int64_t count, int64_t size)
{
    const bal_model *model = x->model;
    double v = 0;
    if (count > model->max_items) {
        v += (double)(count - model->max_items);
    } else if (count < model->min_items) {
        v += (double)(model->min_items - count);
    }
    int64_t capacity = bal_capacity(model, r);
    return size > capacity ? v + x->per_size * (double)(size - capacity) : v;
}

static double violation_now(const repair *x, int64_t r)
{
    return violation(x, r, x->plan->count[r], x->plan->size[r]);
}

/* A free unit on r (any: r < 0), from a random start; -1: none. */
static int64_t random_unit(const repair *x, int64_t r)
{
    const bal_model *model = x->model;
    int64_t start = ovlm_rng_below(x->rng, model->n_units);
    for (int64_t i = 0; i < model->n_units; i++) {
        int64_t u = start + i < model->n_units ? start + i : start + i - model->n_units;
        if ((r < 0 || x->plan->rank[u] == r) && !bal_is_pinned(model, u)) {
            return u;
        }
    }
    return -1;
}

static void transfer(repair *x, int64_t u, int64_t to)
{
    int64_t from = x->plan->rank[u], count = bal_count(x->model, u), size = bal_size(x->model, u);
    x->plan->count[from] -= count;
    x->plan->size[from] -= size;
    x->plan->count[to] += count;
    x->plan->size[to] += size;
    x->plan->rank[u] = to;
}

/* Moves u to s, and v (-1: nothing) back in exchange, unless that raises the violation. */
static void try_exchange(repair *x, int64_t u, int64_t s, int64_t v)
{
    int64_t r = x->plan->rank[u];
    double before = violation_now(x, r) + violation_now(x, s);
    transfer(x, u, s);
    if (v >= 0) {
        transfer(x, v, r);
    }
    if (violation_now(x, r) + violation_now(x, s) > before) {
        transfer(x, u, r);
        if (v >= 0) {
            transfer(x, v, s);
        }
    }
}

/* One step for a violated rank r: give, take or swap. */
static void step(repair *x, int64_t r)
{
    const bal_model *model = x->model;
    bool lacks = x->plan->count[r] < model->min_items;
    int64_t other = random_unit(x, -1), s = ovlm_rng_below(x->rng, model->n_ranks);
    if (other < 0) {
        return;
    }
    if (lacks && ovlm_rng_below(x->rng, 2) == 0) {
        if (x->plan->rank[other] != r) {
            try_exchange(x, other, r, -1);
        }
        return;
    }
    int64_t mine = random_unit(x, r);
    bool swap = ovlm_rng_below(x->rng, 2) == 0;
    s = swap ? x->plan->rank[other] : s;
    if (mine >= 0 && s != r) {
        try_exchange(x, mine, s, swap ? other : -1);
    }
}

/* The next violated rank after r, cyclically; -1: none. */
static int64_t next_violated(const repair *x, int64_t r)
{
    int64_t n_ranks = x->model->n_ranks;
    for (int64_t i = 1; i <= n_ranks; i++) {
        int64_t s = r + i < n_ranks ? r + i : r + i - n_ranks;
        if (violation_now(x, s) > 0) {
            return s;
        }
    }
    return -1;
}

ovlm_status bal_repair(bal_search *search, bal_plan *plan, bool *done, ovlm_err *err)
{
    const bal_model *model = search->model;
    bal_model loose = *model;
    loose.capacity = NULL;
    loose.min_items = 0;
    loose.max_items = model->n;
    OVLM_TRY(bal_greedy(&loose, model->order, plan, done, search->arena, err));
    if (!*done || model->n_units == 0) {
        return OVLM_OK;
    }
    double size = 0;
    for (int64_t u = 0; u < model->n_units; u++) {
        size += (double)bal_size(model, u);
    }
    repair x = {model, plan, &search->rng, size > 0 ? (double)model->n_units / size : 0};
    int64_t steps = 20000 + 64 * model->n_units, r = model->n_ranks - 1;
    for (int64_t i = 0; i < steps && (r = next_violated(&x, r)) >= 0; i++) {
        step(&x, r);
    }
    *done = bal_plan_settle(model, plan);
    return OVLM_OK;
}
