/* balance_trade.c - additive costs: the best move or swap out of the most loaded rank, repeated.
 *
 * Where many similar units share a rank, longest-first and differencing leave a gap that single
 * trades close.  With the units of both ranks sorted, the trade that brings two loads nearest to
 * each other is found in one pass over both.  Partners come by ascending load, so that the even
 * split of a pair only rises: once it is above the best trade found, the rest need no look. */
#include "plan/balance_parts.h"

enum {
    FEW = 4,             /* below so many units per rank, rebuilding from the first plan is better */
    MOST_WORK = 1 << 20, /* whatever the limit: rebuilding must get its part of the default        */
};

typedef struct trader {
    bal_search *search;
    bal_plan *plan;
    int64_t *head, *next; /* [n_ranks], [n_units] units of each rank, descending, -1 ends       */
    int64_t *by_load;     /* [n_ranks] ranks, ascending by load                                 */
} trader;

typedef struct trade {
    double larger;         /* the larger of both loads afterwards                               */
    int64_t out, in, with; /* unit that leaves, unit that comes (-1: none), the partner         */
} trade;

/* May r give `out` and take `in` (-1: nothing)? */
static bool allowed(const trader *t, int64_t r, int64_t out, int64_t in)
{
    const bal_model *model = t->search->model;
    int64_t count = t->plan->count[r], size = t->plan->size[r];
    if (out >= 0) {
        count -= bal_count(model, out);
        size -= bal_size(model, out);
    }
    if (in >= 0) {
        count += bal_count(model, in);
        size += bal_size(model, in);
    }
    return count >= model->min_items && count <= model->max_items &&
           size <= bal_capacity(model, r) && (in < 0 || !bal_is_pinned(model, in));
}

/* Load of r after it gave `out` and took `in`. */
static double load_after(const trader *t, int64_t r, int64_t out, int64_t in)
{
    const bal_model *model = t->search->model;
    double add = t->plan->add[r];
    int64_t count = t->plan->count[r];
    if (out >= 0) {
        add -= model->a[out];
        count -= bal_count(model, out);
    }
    if (in >= 0) {
        add += model->a[in];
        count += bal_count(model, in);
    }
    return bal_load(model, r, add > 0 ? add : 0, count, 0);
}

/* Keeps the trade of u on r for v on s (-1: a plain move) when it is the best so far. */
static void consider(const trader *t, int64_t r, int64_t u, int64_t s, int64_t v, trade *best)
{
    double a = load_after(t, r, u, v), b = load_after(t, s, v, u);
    double larger = a > b ? a : b;
    if (larger < best->larger && allowed(t, r, u, v) && allowed(t, s, v, u)) {
        *best = (trade){larger, u, v, s};
    }
}

/* Load at which the sums of r and s would be even, both occupied. */
static double even_load(const trader *t, int64_t r, int64_t s)
{
    const bal_plan *plan = t->plan;
    double x = bal_speed(t->search->model, r), y = bal_speed(t->search->model, s);
    return (plan->load[r] * x + plan->load[s] * y) / (x + y);
}

/* The trade that brings r and s nearest to even: for every unit of r, the two units of s whose
 * exchange carries just less and just more than that. */
static void best_trade(trader *t, int64_t r, int64_t s, trade *best)
{
    const bal_model *model = t->search->model;
    double carry = (t->plan->load[r] - even_load(t, r, s)) * bal_speed(model, r);
    int64_t above = -1, v = t->head[s], looked = 0;
    for (int64_t u = t->head[r]; u >= 0; u = t->next[u]) {
        for (; v >= 0 && model->a[v] > model->a[u] - carry; v = t->next[v], looked++) {
            above = v;
        }
        if (above >= 0) {
            consider(t, r, u, s, above, best);
        }
        consider(t, r, u, s, v, best);
        looked += 2;
    }
    t->search->meter->work += looked;
}

static void list_remove(trader *t, int64_t u)
{
    int64_t *link = &t->head[t->plan->rank[u]];
    while (*link != u) {
        link = &t->next[*link];
    }
    *link = t->next[u];
}

static void list_insert(trader *t, int64_t u, int64_t r)
{
    const double *a = t->search->model->a;
    int64_t *link = &t->head[r];
    while (*link >= 0 && a[*link] > a[u]) {
        link = &t->next[*link];
    }
    t->next[u] = *link;
    *link = u;
    t->plan->rank[u] = r;
}

/* Sums of a rank from its list, so that rounding does not build up. */
static void resum(trader *t, int64_t r)
{
    const bal_model *model = t->search->model;
    bal_plan *plan = t->plan;
    plan->add[r] = 0;
    plan->count[r] = plan->size[r] = 0;
    for (int64_t u = t->head[r]; u >= 0; u = t->next[u]) {
        plan->add[r] += model->a[u];
        plan->count[r] += bal_count(model, u);
        plan->size[r] += bal_size(model, u);
    }
    plan->load[r] = bal_load(model, r, plan->add[r], plan->count[r], 0);
}

/* Insertion sort: a trade moves two ranks. */
static void sort_ranks(trader *t)
{
    for (int64_t i = 1; i < t->search->model->n_ranks; i++) {
        int64_t r = t->by_load[i], k = i;
        for (; k > 0 && t->plan->load[t->by_load[k - 1]] > t->plan->load[r]; k--) {
            t->by_load[k] = t->by_load[k - 1];
        }
        t->by_load[k] = r;
    }
}

static void apply(trader *t, int64_t r, const trade *best)
{
    list_remove(t, best->out);
    if (best->in >= 0) {
        list_remove(t, best->in);
        list_insert(t, best->in, r);
    }
    list_insert(t, best->out, best->with);
    resum(t, r);
    resum(t, best->with);
    sort_ranks(t);
}

/* The best trade of the fullest rank; false when it has none, or the meter ended. */
static bool step_down(trader *t)
{
    int64_t n_ranks = t->search->model->n_ranks, r = t->by_load[n_ranks - 1];
    trade best = {t->plan->load[r] * (1 - BAL_TOLERANCE), -1, -1, -1};
    for (int64_t i = 0; i < n_ranks - 1; i++) {
        int64_t s = t->by_load[i];
        double even = even_load(t, r, s), goal = t->search->goal;
        if (best.larger <= (even > goal ? even : goal)) {
            break;
        }
        best_trade(t, r, s, &best);
        if (ovlm_meter_spend(t->search->meter, 1)) {
            return false;
        }
    }
    if (best.out < 0) {
        return false;
    }
    apply(t, r, &best);
    return !ovlm_meter_spend(t->search->meter, n_ranks);
}

static ovlm_status trader_init(trader *t, ovlm_err *err)
{
    const bal_model *model = t->search->model;
    OVLM_TRY(OVLM_ARENA_NEW(t->search->arena, &t->head, model->n_ranks, err));
    OVLM_TRY(OVLM_ARENA_RAW(t->search->arena, &t->next, model->n_units, err));
    OVLM_TRY(OVLM_ARENA_RAW(t->search->arena, &t->by_load, model->n_ranks, err));
    for (int64_t r = 0; r < model->n_ranks; r++) {
        t->head[r] = -1;
        t->by_load[r] = r;
    }
    for (int64_t i = model->n_units - 1; i >= 0; i--) {
        int64_t u = model->order[i], r = t->plan->rank[u];
        t->next[u] = t->head[r];
        t->head[r] = u;
    }
    sort_ranks(t);
    return OVLM_OK;
}

ovlm_status bal_trade(bal_search *search, bal_plan *plan, ovlm_err *err)
{
    const bal_model *model = search->model;
    if (model->padded || model->n_ranks < 2 || model->n_units / model->n_ranks < FEW ||
        bal_meets(plan->max, search->goal) || ovlm_meter_spend(search->meter, 1)) {
        return OVLM_OK;
    }
    ovlm_arena_mark mark = ovlm_arena_save(search->arena);
    trader t = {.search = search, .plan = plan};
    OVLM_TRY(trader_init(&t, err));
    const double *fullest = &plan->load[t.by_load[model->n_ranks - 1]];
    int64_t end = search->meter->work + MOST_WORK;
    while (*fullest > search->goal * (1 + BAL_ENOUGH) && search->meter->work < end &&
           step_down(&t)) {
        fullest = &plan->load[t.by_load[model->n_ranks - 1]];
    }
    ovlm_arena_rewind(search->arena, mark);
    (void)bal_plan_settle(model, plan);
    return search->meter->interrupted ? OVLM_FAIL(err, OVLM_E_INTERRUPTED, "interrupted") : OVLM_OK;
}
