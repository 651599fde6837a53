/* balance_home.c - few bytes moved: from the homes, ranks above the limit give up units.
 *
 * Inside the node first, so that only a node's surplus leaves it; then across nodes; then small
 * exact rebuilds for what did not fit; then every unit that can goes back.  Beside it stands the
 * plan found without homes, its ranks renamed; the one with less traffic is kept. */
#include "plan/balance_home.h"

#include <math.h>
#include <string.h>

#include "base/sort.h"

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

void homing_move(homing *h, int64_t u, int64_t s)
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
    plan->count[r] -= bal_count(model, u);
    plan->size[r] -= bal_size(model, u);
    /* what rounding leaves over is far below BAL_TOLERANCE, and goes when the plan is settled */
    plan->add[r] = plan->count[r] > 0 ? plan->add[r] - model->a[u] : 0;
    if (model->len != NULL && model->len[u] == plan->len[r]) {
        plan->len[r] = 0;
        for (int64_t v = h->head[r]; v >= 0; v = h->next[v]) {
            plan->len[r] = model->len[v] > plan->len[r] ? model->len[v] : plan->len[r];
        }
    }
    plan->load[r] = bal_load(model, r, plan->add[r], plan->count[r], plan->len[r]);
    bal_plan_put(model, plan, u, s);
}

/* A unit that may go to s, and how it compares. */
typedef struct choice {
    int64_t u; /* -1: none */
    double a, bytes;
    bool within; /* it does not more than empty the excess */
} choice;

/* Does unit x suit better than y?  Of those within the excess, the most cost per byte, then the
 * largest; else the smallest that ends the excess. */
static inline bool is_better(const choice *x, const choice *y)
{
    if (y->u < 0 || x->within != y->within) {
        return y->u < 0 || x->within;
    }
    double left = x->a * y->bytes, right = y->a * x->bytes;
    return !x->within ? x->a < y->a : left > right || (left >= right && x->a > y->a);
}

/* The unit of r to send to s; -1: none may go. */
static int64_t pick_unit(const homing *h, int64_t r, int64_t s)
{
    const bal_model *model = h->search->model;
    double excess = (h->plan->load[r] - h->limit) * bal_speed(model, r);
    /* most units are too large, which one comparison tells; may_move decides */
    double room = bal_room(model, s, h->limit * (1 + 2 * BAL_TOLERANCE)) - h->plan->add[s];
    choice best = {.u = -1};
    for (int64_t u = h->head[r]; u >= 0; u = h->next[u]) {
        if (model->a[u] > room) {
            continue;
        }
        /* bytes that are away from home already are free */
        choice one = {u, model->a[u], model->home[u] == r ? (double)model->bytes[u] : 0,
                      model->a[u] <= excess};
        if (is_better(&one, &best) && may_move(h, u, s)) {
            best = one;
        }
    }
    return best.u;
}

static void leaf_set(homing *h, int64_t r, double value)
{
    double *least = h->least;
    int64_t i = h->leaves + r;
    least[i] = value;
    for (i /= 2; i > 0; i /= 2) {
        least[i] = least[2 * i] < least[2 * i + 1] ? least[2 * i] : least[2 * i + 1];
    }
}

static double leaf_value(const homing *h, int64_t r)
{
    return h->plan->load[r] < h->limit ? h->plan->load[r] : HUGE_VAL;
}

static void leaves_fill(homing *h)
{
    for (int64_t r = 0; r < h->leaves; r++) {
        h->least[h->leaves + r] = r < h->search->model->n_ranks ? leaf_value(h, r) : HUGE_VAL;
    }
    for (int64_t i = h->leaves - 1; i > 0; i--) {
        h->least[i] = h->least[2 * i] < h->least[2 * i + 1] ? h->least[2 * i]
                                                            : h->least[2 * i + 1];
    }
}

/* Least loaded rank of [from, to) that takes units; -1: none. */
static int64_t emptiest(const homing *h, int64_t from, int64_t to)
{
    const double *least = h->least;
    int64_t best = h->leaves + from;
    /* the range is made of whole subtrees, found from its two ends upwards */
    for (int64_t i = h->leaves + from, end = h->leaves + to; i < end; i /= 2, end /= 2) {
        if (i % 2 == 1) {
            best = least[i] < least[best] ? i : best;
            i++;
        }
        if (end % 2 == 1) {
            end--;
            best = least[end] < least[best] ? end : best;
        }
    }
    if (!(least[best] < HUGE_VAL)) {
        return -1;
    }
    while (best < h->leaves) {
        best = 2 * best + (least[2 * best] > least[best]);
    }
    return best - h->leaves;
}

/* Rank r gives up units to ranks of [from, to) while it is over and some rank has room. */
static void shed(homing *h, int64_t r, int64_t from, int64_t to)
{
    enum { TRIES = 8 };
    int64_t tried[TRIES]; /* ranks that have no room for any unit of r */
    int n_tried = 0;
    leaf_set(h, r, HUGE_VAL);
    while (is_over(h, r) && n_tried < TRIES) {
        int64_t s = emptiest(h, from, to);
        if (s < 0 || ovlm_meter_spend(h->search->meter, h->plan->count[r] / 2 + 1)) {
            break;
        }
        int64_t u = pick_unit(h, r, s);
        if (u >= 0) {
            homing_move(h, u, s);
            leaf_set(h, s, leaf_value(h, s));
        } else {
            leaf_set(h, s, HUGE_VAL);
            tried[n_tried++] = s;
        }
    }
    leaf_set(h, r, leaf_value(h, r));
    for (int i = 0; i < n_tried; i++) {
        leaf_set(h, tried[i], leaf_value(h, tried[i]));
    }
}

void homing_list(homing *h)
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
    /* most are at home, which one byte each says better than a look at their ranks in this order */
    for (int64_t u = 0; u < model->n_units; u++) {
        h->away[u] = h->plan->rank[u] != model->home[u];
    }
    for (int64_t i = 0; i < model->n_units; i++) {
        int64_t u = model->order[i];
        if (!h->away[u] || ovlm_meter_spend(h->search->meter, 1)) {
            continue;
        }
        int64_t home = model->home[u], r = h->plan->rank[u];
        if (may_move(h, u, home)) {
            homing_move(h, u, home);
            continue;
        }
        int64_t from = home / model->node_size * model->node_size;
        int64_t to = from + model->node_size < model->n_ranks ? from + model->node_size
                                                              : model->n_ranks;
        for (int64_t s = from; s < to && r / model->node_size != home / model->node_size; s++) {
            if (may_move(h, u, s)) {
                homing_move(h, u, s);
                break;
            }
        }
    }
}

/* Every rank above the limit sheds within its block of `reach` ranks: the most loaded first, so
 * that large units meet large rooms, and what is small fills what they leave. */
static ovlm_status shed_all(homing *h, int64_t reach, ovlm_err *err)
{
    int64_t n_ranks = h->search->model->n_ranks;
    OVLM_TRY(ovlm_sort_f64(h->plan->load, n_ranks, h->order, h->search->arena, err));
    for (int64_t i = 0; i < n_ranks; i++) {
        int64_t r = h->order[i], from = r / reach * reach;
        if (is_over(h, r)) {
            shed(h, r, from, from + reach < n_ranks ? from + reach : n_ranks);
        }
    }
    return OVLM_OK;
}

static ovlm_status homing_init(homing *h, bal_search *search, bal_plan *plan, double limit,
                               ovlm_err *err)
{
    const bal_model *model = search->model;
    *h = (homing){.search = search, .plan = plan, .limit = limit, .leaves = 1};
    while (h->leaves < model->n_ranks) {
        h->leaves *= 2;
    }
    OVLM_TRY(OVLM_ARENA_NEW(search->arena, &h->least, 2 * h->leaves, err));
    OVLM_TRY(OVLM_ARENA_NEW(search->arena, &h->order, model->n_ranks, err));
    OVLM_TRY(OVLM_ARENA_NEW(search->arena, &h->head, model->n_ranks, err));
    OVLM_TRY(OVLM_ARENA_RAW(search->arena, &h->away, model->n_units, err));
    return OVLM_ARENA_RAW(search->arena, &h->next, model->n_units, err);
}

/* From the homes to a plan below the limit; false when that is not reached. */
static ovlm_status from_homes(homing *h, bool *done, ovlm_err *err)
{
    const bal_model *model = h->search->model;
    bal_plan_clear(model, h->plan);
    for (int64_t u = 0; u < model->n_units; u++) {
        bal_plan_put(model, h->plan, u, bal_is_pinned(model, u) ? model->pin[u] : model->home[u]);
    }
    homing_list(h);
    leaves_fill(h);
    OVLM_TRY(shed_all(h, model->node_size, err));
    OVLM_TRY(shed_all(h, model->n_ranks, err));
    if (!model->padded) {
        OVLM_TRY(homing_exchange(h, err));
    }
    *done = bal_plan_settle(model, h->plan);
    if (*done && !bal_meets(h->plan->max, h->limit) && !model->padded) {
        OVLM_TRY(bal_rebuild_to(h->search, h->plan, h->limit, err));
        homing_list(h);
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

ovlm_status bal_stay(bal_search *search, bal_plan *plan, double limit, bool *done, ovlm_err *err)
{
    ovlm_arena_mark mark = ovlm_arena_save(search->arena);
    homing h;
    OVLM_TRY(homing_init(&h, search, plan, limit, err));
    OVLM_TRY(from_homes(&h, done, err));
    ovlm_arena_rewind(search->arena, mark);
    return search->meter->interrupted ? OVLM_FAIL(err, OVLM_E_INTERRUPTED, "interrupted") : OVLM_OK;
}

ovlm_status bal_home(bal_search *search, bal_plan *plan, double limit, ovlm_err *err)
{
    const bal_model *model = search->model;
    ovlm_arena_mark mark = ovlm_arena_save(search->arena);
    bal_plan other = {0};
    bool done = false;
    homing h;
    OVLM_TRY(bal_plan_init(&other, model, search->arena, err));
    OVLM_TRY(homing_init(&h, search, &other, limit, err));
    OVLM_TRY(from_homes(&h, &done, err));
    if (done && bal_traffic_less(bal_traffic_of(model, &other), bal_traffic_of(model, plan))) {
        bal_plan_copy(model, plan, &other);
    } else if (!done) {
        bal_plan_copy(model, &other, plan);
        if (model->uniform) {
            OVLM_TRY(rename_ranks(model, &other, search->arena, err));
        }
        homing_list(&h);
        go_home(&h);
        if (bal_plan_settle(model, &other) && bal_meets(other.max, limit) &&
            bal_traffic_less(bal_traffic_of(model, &other), bal_traffic_of(model, plan))) {
            bal_plan_copy(model, plan, &other);
        }
    }
    ovlm_arena_rewind(search->arena, mark);
    return search->meter->interrupted ? OVLM_FAIL(err, OVLM_E_INTERRUPTED, "interrupted") : OVLM_OK;
}
