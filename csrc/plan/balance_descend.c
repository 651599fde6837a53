/* balance_descend.c - any cost: the best move or swap out of the most loaded rank, with kicks.
 *
 * Padded costs are not sums, so what a rank pays without a unit needs the longest of the others.
 * A step looks at the fullest rank against some partners; when nothing there lowers the larger of
 * the two loads, a few random moves that stay below the best make room, and a walk that does not
 * find something better is undone. */
#include "plan/balance_parts.h"

#include <math.h>

enum { PARTNERS = 24, KICKS = 6, WALK = 40, STEP_MOVES = 2 * KICKS + 2,
       UNDO_ROOM = WALK * STEP_MOVES };

typedef struct descend {
    bal_search *search;
    bal_plan *plan;
    int64_t *head, *next, *prev; /* units of each rank as a list, -1 ends                      */
    int64_t *undo_unit, *undo_rank, n_undo; /* moves since the best plan: ring is not needed    */
    int64_t undo_room;
} descend;

/* The two longest lengths on a rank: what remains when a unit leaves. */
typedef struct tops {
    int64_t first, second;
} tops;

static tops longest_two(const descend *d, int64_t r)
{
    tops t = {0, 0};
    for (int64_t u = d->head[r]; u >= 0; u = d->next[u]) {
        int64_t len = bal_len(d->search->model, u);
        if (len > t.first) {
            t.second = t.first;
            t.first = len;
        } else if (len > t.second) {
            t.second = len;
        }
    }
    return t;
}

/* Load of r without unit `out` (-1: none) and with unit `in` (-1: none). */
static double load_after(const descend *d, int64_t r, tops t, int64_t out, int64_t in)
{
    const bal_model *model = d->search->model;
    const bal_plan *plan = d->plan;
    double add = plan->add[r];
    int64_t count = plan->count[r], len = t.first;
    if (out >= 0) {
        add -= model->a[out];
        count -= bal_count(model, out);
        len = bal_len(model, out) == t.first ? t.second : t.first;
    }
    if (in >= 0) {
        add += model->a[in];
        count += bal_count(model, in);
        len = bal_len(model, in) > len ? bal_len(model, in) : len;
    }
    return bal_load(model, r, add > 0 ? add : 0, count, len);
}

/* May r give `out` and take `in`? */
static bool allowed(const descend *d, int64_t r, int64_t out, int64_t in)
{
    const bal_model *model = d->search->model;
    int64_t count = d->plan->count[r], size = d->plan->size[r];
    if (out >= 0) {
        count -= bal_count(model, out);
        size -= bal_size(model, out);
    }
    if (in >= 0) {
        count += bal_count(model, in);
        size += bal_size(model, in);
    }
    return count >= model->min_items && count <= model->max_items &&
           size <= bal_capacity(model, r);
}

static void list_add(descend *d, int64_t u, int64_t r)
{
    d->prev[u] = -1;
    d->next[u] = d->head[r];
    if (d->head[r] >= 0) {
        d->prev[d->head[r]] = u;
    }
    d->head[r] = u;
}

static void list_remove(descend *d, int64_t u, int64_t r)
{
    if (d->prev[u] >= 0) {
        d->next[d->prev[u]] = d->next[u];
    } else {
        d->head[r] = d->next[u];
    }
    if (d->next[u] >= 0) {
        d->prev[d->next[u]] = d->prev[u];
    }
}

/* Sums of a rank from its list, so that rounding does not build up. */
static void resum(descend *d, int64_t r)
{
    const bal_model *model = d->search->model;
    bal_plan *plan = d->plan;
    plan->add[r] = 0;
    plan->count[r] = plan->len[r] = plan->size[r] = 0;
    for (int64_t u = d->head[r]; u >= 0; u = d->next[u]) {
        plan->add[r] += model->a[u];
        plan->count[r] += bal_count(model, u);
        plan->size[r] += bal_size(model, u);
        plan->len[r] = bal_len(model, u) > plan->len[r] ? bal_len(model, u) : plan->len[r];
    }
    plan->load[r] = bal_load(model, r, plan->add[r], plan->count[r], plan->len[r]);
}

static void move(descend *d, int64_t u, int64_t to)
{
    int64_t from = d->plan->rank[u];
    if (d->n_undo < d->undo_room) {
        d->undo_unit[d->n_undo] = u;
        d->undo_rank[d->n_undo++] = from;
    }
    list_remove(d, u, from);
    list_add(d, u, to);
    d->plan->rank[u] = to;
    resum(d, from);
    resum(d, to);
}

static int64_t fullest(const descend *d)
{
    int64_t best = 0;
    for (int64_t r = 1; r < d->search->model->n_ranks; r++) {
        best = d->plan->load[r] > d->plan->load[best] ? r : best;
    }
    return best;
}

typedef struct trade {
    double larger;         /* the larger of both loads afterwards                              */
    int64_t out, in, with; /* unit that leaves, unit that comes (-1: none), the partner        */
} trade;

/* Best move or swap between ranks r and s. */
static void best_trade(descend *d, int64_t r, tops tr, int64_t s, trade *best)
{
    const bal_model *model = d->search->model;
    tops ts = longest_two(d, s);
    for (int64_t u = d->head[r]; u >= 0; u = d->next[u]) {
        if (bal_is_pinned(model, u)) {
            continue;
        }
        for (int64_t v = d->head[s];; v = d->next[v]) {
            /* v = -1 is the move, after all swaps */
            if (v < 0 || !bal_is_pinned(model, v)) {
                double a = load_after(d, r, tr, u, v), b = load_after(d, s, ts, v, u);
                double larger = a > b ? a : b;
                if (larger < best->larger && allowed(d, r, u, v) && allowed(d, s, v, u)) {
                    *best = (trade){larger, u, v, s};
                }
                d->search->meter->work += 2;
            }
            if (v < 0) {
                break;
            }
        }
    }
}

/* The i-th partner to look at: every rank in turn when there are few, else the less loaded of two
 * random ones. */
static int64_t partner(descend *d, int64_t i, int64_t start)
{
    ovlm_rng *rng = &d->search->rng;
    int64_t n_ranks = d->search->model->n_ranks;
    if (n_ranks <= PARTNERS) {
        return (start + i) % n_ranks;
    }
    int64_t s = ovlm_rng_below(rng, n_ranks), t = ovlm_rng_below(rng, n_ranks);
    return d->plan->load[s] < d->plan->load[t] ? s : t;
}

/* The best trade of the fullest rank with the first partner that has one; false when none has. */
static bool step_down(descend *d)
{
    const bal_model *model = d->search->model;
    int64_t r = fullest(d), start = ovlm_rng_below(&d->search->rng, model->n_ranks);
    tops tr = longest_two(d, r);
    trade best = {d->plan->load[r] * (1 - BAL_TOLERANCE), -1, -1, -1};
    int64_t looks = model->n_ranks < PARTNERS ? model->n_ranks : PARTNERS;
    for (int64_t i = 0; i < looks && best.out < 0; i++) {
        int64_t s = partner(d, i, start);
        if (s != r) {
            best_trade(d, r, tr, s, &best);
        }
    }
    if (best.out < 0) {
        return false;
    }
    move(d, best.out, best.with);
    if (best.in >= 0) {
        move(d, best.in, r);
    }
    return true;
}

/* Random trades that keep both ranks below the best known: new neighbours for the fullest. */
static void kick(descend *d, double below)
{
    const bal_model *model = d->search->model;
    ovlm_rng *rng = &d->search->rng;
    for (int i = 0; i < KICKS; i++) {
        int64_t u = ovlm_rng_below(rng, model->n_units), v = ovlm_rng_below(rng, model->n_units);
        int64_t r = d->plan->rank[u], s = d->plan->rank[v];
        bool swap = ovlm_rng_below(rng, 3) != 0;
        int64_t in = swap ? v : -1;
        if (r == s || bal_is_pinned(model, u) || (swap && bal_is_pinned(model, v)) ||
            !allowed(d, r, u, in) || !allowed(d, s, in, u)) {
            continue;
        }
        double a = load_after(d, r, longest_two(d, r), u, in);
        double b = load_after(d, s, longest_two(d, s), in, u);
        if (a < below && b < below) {
            move(d, u, s);
            if (swap) {
                move(d, v, r);
            }
        }
        d->search->meter->work += 16;
    }
}

/* Back to the best plan. */
static void undo(descend *d)
{
    while (d->n_undo > 0) {
        int64_t u = d->undo_unit[--d->n_undo], to = d->undo_rank[d->n_undo];
        int64_t from = d->plan->rank[u];
        list_remove(d, u, from);
        list_add(d, u, to);
        d->plan->rank[u] = to;
        resum(d, from);
        resum(d, to);
    }
}

static ovlm_status descend_init(descend *d, ovlm_err *err)
{
    const bal_model *model = d->search->model;
    ovlm_arena *arena = d->search->arena;
    d->undo_room = UNDO_ROOM;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &d->head, model->n_ranks, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &d->next, model->n_units, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &d->prev, model->n_units, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &d->undo_unit, d->undo_room, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &d->undo_rank, d->undo_room, err));
    for (int64_t r = 0; r < model->n_ranks; r++) {
        d->head[r] = -1;
    }
    for (int64_t u = 0; u < model->n_units; u++) {
        list_add(d, u, d->plan->rank[u]);
    }
    return OVLM_OK;
}

ovlm_status bal_descend(bal_search *search, bal_plan *plan, ovlm_err *err)
{
    const bal_model *model = search->model;
    if (model->n_ranks < 2 || model->n_units == 0) {
        return OVLM_OK;
    }
    ovlm_arena_mark mark = ovlm_arena_save(search->arena);
    descend d = {.search = search, .plan = plan};
    OVLM_TRY(descend_init(&d, err));
    double best = plan->max;
    int64_t walked = 0;
    while (best > search->goal * (1 + BAL_ENOUGH) &&
           !ovlm_meter_spend(search->meter, model->n_ranks)) {
        bool moved = step_down(&d);
        double now = plan->load[fullest(&d)];
        if (now < best * (1 - BAL_TOLERANCE)) {
            best = now;
            d.n_undo = walked = 0;
        } else if (!moved) {
            /* equal plans are as good to walk from; worse ones are undone */
            if (++walked >= WALK || d.n_undo + STEP_MOVES > d.undo_room) {
                undo(&d);
                walked = 0;
            }
            kick(&d, best);
        }
        if (d.n_undo + STEP_MOVES > d.undo_room) {
            undo(&d);
        }
    }
    undo(&d);
    ovlm_arena_rewind(search->arena, mark);
    (void)bal_plan_settle(model, plan);
    return search->meter->interrupted ? OVLM_FAIL(err, OVLM_E_INTERRUPTED, "interrupted") : OVLM_OK;
}
