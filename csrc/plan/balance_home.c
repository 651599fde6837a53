/* balance_home.c - few bytes moved: from the homes, ranks above the limit give up units.
 *
 * Inside the node first, so that only a node's surplus leaves it; then across nodes; then small
 * exact rebuilds for what did not fit; then every unit that can goes back.  Beside it stands the
 * plan found without homes, its ranks renamed; the one with less traffic is kept. */
#include "plan/balance_parts.h"

#include <math.h>
#include <string.h>

#include "base/sort.h"

typedef struct homing {
    bal_search *search;
    bal_plan *plan;
    int64_t *head, *next;   /* units of each rank as a list, -1 ends                           */
    double limit;
} homing;

static double load_with(const homing *h, int64_t u, int64_t r)
{
    const bal_model *model = h->search->model;
    const bal_plan *plan = h->plan;
    int64_t len = bal_len(model, u) > plan->len[r] ? bal_len(model, u) : plan->len[r];
    return bal_load(model, r, plan->add[r] + model->a[u], plan->count[r] + bal_count(model, u),
                    len);
}

static bool is_over(const homing *h, int64_t r)
{
    const bal_model *model = h->search->model;
    return !bal_meets(h->plan->load[r], h->limit) || h->plan->count[r] > model->max_items ||
           h->plan->size[r] > bal_capacity(model, r);
}

/* May u leave the rank it is on for s? */
static bool may_move(const homing *h, int64_t u, int64_t s)
{
    const bal_model *model = h->search->model;
    int64_t r = h->plan->rank[u];
    return r != s && bal_admits(model, h->plan, u, s) &&
           h->plan->count[r] - bal_count(model, u) >= model->min_items &&
           bal_meets(load_with(h, u, s), h->limit);
}

static void move(homing *h, int64_t u, int64_t s)
{
    const bal_model *model = h->search->model;
    bal_plan *plan = h->plan;
    int64_t r = plan->rank[u], *link = &h->head[r];
    while (*link != u) {
        link = &h->next[*link];
    }
    *link = h->next[u];
    h->next[u] = h->head[s];
    h->head[s] = u;
    plan->add[r] = 0;
    plan->count[r] = plan->len[r] = plan->size[r] = 0;
    plan->load[r] = bal_base(model, r);
    for (int64_t v = h->head[r]; v >= 0; v = h->next[v]) {
        bal_plan_put(model, plan, v, r);
    }
    bal_plan_put(model, plan, u, s);
}

/* The unit of r to send to s: of those that do not more than empty r's excess, the most cost per
 * byte, then the largest; else the smallest that ends the excess.  -1: none may go. */
static int64_t pick_unit(const homing *h, int64_t r, int64_t s)
{
    const bal_model *model = h->search->model;
    double excess = (h->plan->load[r] - h->limit) * bal_speed(model, r);
    int64_t best = -1;
    bool best_within = false;
    for (int64_t u = h->head[r]; u >= 0; u = h->next[u]) {
        if (!may_move(h, u, s)) {
            continue;
        }
        bool within = model->a[u] <= excess, better = best < 0;
        if (!better && within != best_within) {
            better = within;
        } else if (!better && !within) {
            better = model->a[u] < model->a[best];
        } else if (!better) {
            /* bytes that are away from home already are free */
            double bytes = model->home[u] == r ? (double)model->bytes[u] : 0;
            double best_bytes = model->home[best] == r ? (double)model->bytes[best] : 0;
            double left = model->a[u] * best_bytes, right = model->a[best] * bytes;
            better = left > right || (left >= right && model->a[u] > model->a[best]);
        }
        if (better) {
            best = u;
            best_within = within;
        }
    }
    return best;
}

/* Least loaded rank of [from, to) that is below `above` and not r; -1: none. */
static int64_t emptiest(const homing *h, int64_t r, int64_t from, int64_t to, double above)
{
    int64_t best = -1;
    for (int64_t s = from; s < to; s++) {
        double load = h->plan->load[s];
        if (s != r && load > above && (best < 0 || load < h->plan->load[best]) &&
            load < h->limit) {
            best = s;
        }
    }
    return best;
}

/* Rank r gives up units to ranks of [from, to) while it is over and some rank has room. */
static void shed(homing *h, int64_t r, int64_t from, int64_t to)
{
    enum { TRIES = 8 };
    double above = -1; /* ranks up to this load had no room for any unit */
    for (int tries = 0; is_over(h, r) && tries < TRIES;) {
        int64_t s = emptiest(h, r, from, to, above);
        if (s < 0 || ovlm_meter_spend(h->search->meter, (to - from) / 8 + 1)) {
            return;
        }
        int64_t u = pick_unit(h, r, s);
        if (u >= 0) {
            move(h, u, s);
        } else {
            above = h->plan->load[s];
            tries++;
        }
    }
}

static void lists_fill(homing *h)
{
    const bal_model *model = h->search->model;
    for (int64_t r = 0; r < model->n_ranks; r++) {
        h->head[r] = -1;
    }
    for (int64_t u = model->n_units - 1; u >= 0; u--) {
        h->next[u] = h->head[h->plan->rank[u]];
        h->head[h->plan->rank[u]] = u;
    }
}

/* Displaced units back to their rank, or at least their node, where there is room. */
static void go_home(homing *h)
{
    const bal_model *model = h->search->model;
    for (int64_t i = 0; i < model->n_units; i++) {
        int64_t u = model->order[i], home = model->home[u], r = h->plan->rank[u];
        if (r == home || ovlm_meter_spend(h->search->meter, 1)) {
            continue;
        }
        if (may_move(h, u, home)) {
            move(h, u, home);
            continue;
        }
        int64_t from = home / model->node_size * model->node_size;
        int64_t to = from + model->node_size < model->n_ranks ? from + model->node_size
                                                              : model->n_ranks;
        for (int64_t s = from; s < to && r / model->node_size != home / model->node_size; s++) {
            if (may_move(h, u, s)) {
                move(h, u, s);
                break;
            }
        }
    }
}

/* From the homes to a plan below the limit; false when that is not reached. */
static ovlm_status from_homes(homing *h, bool *done, ovlm_err *err)
{
    const bal_model *model = h->search->model;
    bal_plan_clear(model, h->plan);
    for (int64_t u = 0; u < model->n_units; u++) {
        bal_plan_put(model, h->plan, u, bal_is_pinned(model, u) ? model->pin[u] : model->home[u]);
    }
    lists_fill(h);
    for (int64_t r = 0; r < model->n_ranks; r++) {
        int64_t node = r / model->node_size * model->node_size;
        int64_t end = node + model->node_size;
        shed(h, r, node, end < model->n_ranks ? end : model->n_ranks);
    }
    for (int64_t r = 0; r < model->n_ranks; r++) {
        shed(h, r, 0, model->n_ranks);
    }
    *done = bal_plan_settle(model, h->plan);
    if (*done && !bal_meets(h->plan->max, h->limit) && !model->padded) {
        OVLM_TRY(bal_rebuild_to(h->search, h->plan, h->limit, err));
        lists_fill(h);
    }
    *done = *done && bal_meets(h->plan->max, h->limit);
    if (*done) {
        go_home(h);
        *done = bal_plan_settle(model, h->plan) && bal_meets(h->plan->max, h->limit);
    }
    return OVLM_OK;
}

/* Renames interchangeable ranks so that large parts stay where they are, largest overlap first. */
static ovlm_status rename_ranks(const bal_model *model, bal_plan *plan, ovlm_arena *arena,
                                ovlm_err *err)
{
    int64_t n = model->n_units, N = model->n_ranks;
    int64_t *key = NULL, *order = NULL, *sum = NULL, *name = NULL, *taken = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &key, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &order, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &sum, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &name, N, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &taken, N, err));
    for (int64_t u = 0; u < n; u++) {
        key[u] = plan->rank[u] * N + model->home[u];
    }
    OVLM_TRY(ovlm_sort_i64(key, n, order, arena, err));
    for (int64_t i = 0, first = 0; i < n; i++) {
        first = i > 0 && key[order[i]] == key[order[i - 1]] ? first : order[i];
        sum[first] += model->bytes[order[i]];
    }
    OVLM_TRY(ovlm_sort_i64(sum, n, order, arena, err));
    memset(name, -1, (size_t)N * sizeof *name);
    for (int64_t i = 0; i < n; i++) {
        int64_t from = plan->rank[order[i]], to = model->home[order[i]];
        if (name[from] < 0 && !taken[to]) {
            name[from] = to;
            taken[to] = 1;
        }
    }
    for (int64_t r = 0, free = 0; r < N; r++) {
        while (name[r] < 0 && taken[free]) {
            free++;
        }
        if (name[r] < 0) {
            name[r] = free;
            taken[free] = 1;
        }
    }
    for (int64_t u = 0; u < n; u++) {
        plan->rank[u] = name[plan->rank[u]];
    }
    (void)bal_plan_settle(model, plan);
    return OVLM_OK;
}

ovlm_status bal_home(bal_search *search, bal_plan *plan, double limit, ovlm_err *err)
{
    const bal_model *model = search->model;
    ovlm_arena_mark mark = ovlm_arena_save(search->arena);
    bal_plan other = {0};
    bool done = false;
    homing h = {.search = search, .plan = &other, .limit = limit};
    OVLM_TRY(bal_plan_init(&other, model, search->arena, err));
    OVLM_TRY(OVLM_ARENA_NEW(search->arena, &h.head, model->n_ranks, err));
    OVLM_TRY(OVLM_ARENA_NEW(search->arena, &h.next, model->n_units, err));
    OVLM_TRY(from_homes(&h, &done, err));
    if (done && bal_traffic_less(bal_traffic_of(model, &other), bal_traffic_of(model, plan))) {
        bal_plan_copy(model, plan, &other);
    } else if (!done) {
        bal_plan_copy(model, &other, plan);
        if (model->uniform) {
            OVLM_TRY(rename_ranks(model, &other, search->arena, err));
        }
        lists_fill(&h);
        go_home(&h);
        if (bal_plan_settle(model, &other) && bal_meets(other.max, limit) &&
            bal_traffic_less(bal_traffic_of(model, &other), bal_traffic_of(model, plan))) {
            bal_plan_copy(model, plan, &other);
        }
    }
    ovlm_arena_rewind(search->arena, mark);
    return search->meter->interrupted ? OVLM_FAIL(err, OVLM_E_INTERRUPTED, "interrupted") : OVLM_OK;
}
