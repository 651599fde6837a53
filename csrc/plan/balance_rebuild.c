/* balance_rebuild.c - additive costs: a few ranks are taken apart and refilled exactly.
 *
 * To bring the largest load down to a target T, a rank above T and some partners with room give up
 * some of their units each.  The pool is then distributed anew by bin completion: rank after rank
 * takes a subset of the pool whose sum lies in [lo, hi], where hi is the rank's room at T and lo what
 * the later ranks cannot hold.  Where the ranks are nearly full, that window is narrow and the
 * search tiny, which is why this gets where single moves and swaps stop.  T starts half way between
 * the bound and the best and follows what succeeds. */
#include "plan/balance_parts.h"

#include <math.h>

enum { POOL = 24, BINS = 7, NODES = 600 };

typedef struct bin {
    int64_t rank;
    double add;                  /* of the units that stay                                      */
    int64_t count, size;         /* of the units that stay                                      */
    double room;                 /* additive cost that the pool may bring                       */
} bin;

typedef struct rebuild {
    bal_search *search;
    bal_plan *plan;
    int64_t *head, *next;        /* [n_ranks], [n_units] units of each rank, -1 ends            */
    int64_t *over, *over_at;     /* ranks above the target, and where in that list (-1: not)    */
    int64_t n_over;
    double target;
    bool same_node;              /* prefer partners of the same node                            */
    bin bin[BINS];
    int n_bins, n_pool;
    int64_t unit[POOL];          /* the pool, a descending                                      */
    double a[POOL];
    int to[POOL];                /* bin of each, -1 = open                                      */
    int64_t nodes;               /* search steps left                                           */
} rebuild;

/* What one bin may take. */
typedef struct level {
    int n, item[POOL];           /* open pool positions, a descending                           */
    double left[POOL + 1];       /* suffix sums of a                                            */
    double lo, hi;
    int64_t count_lo, count_hi, size_hi;
} level;

static bool complete(rebuild *b, int j);

/* Bin j holds `sum` so far and may still choose among level items i, i+1, ... */
static bool extend(rebuild *b, int j, const level *v, int i, double sum, int64_t count,
                   int64_t size)
{
    const bal_model *model = b->search->model;
    if (sum >= v->lo && count >= v->count_lo && complete(b, j + 1)) {
        return true;
    }
    for (int t = i; t < v->n && b->nodes > 0 && sum + v->left[t] >= v->lo; t++) {
        b->nodes--;
        int at = v->item[t];
        int64_t u = b->unit[at];
        int64_t new_count = count + bal_count(model, u), new_size = size + bal_size(model, u);
        if (sum + b->a[at] > v->hi || new_count > v->count_hi || new_size > v->size_hi) {
            continue;
        }
        b->to[at] = j;
        if (extend(b, j, v, t + 1, sum + b->a[at], new_count, new_size)) {
            return true;
        }
        b->to[at] = -1;
    }
    return false;
}

/* The last bin takes what is left, if it can. */
static bool finish(rebuild *b, const level *v)
{
    const bal_model *model = b->search->model;
    int64_t count = 0, size = 0;
    for (int t = 0; t < v->n; t++) {
        count += bal_count(model, b->unit[v->item[t]]);
        size += bal_size(model, b->unit[v->item[t]]);
    }
    if (v->left[0] > v->hi || count < v->count_lo || count > v->count_hi || size > v->size_hi) {
        return false;
    }
    for (int t = 0; t < v->n; t++) {
        b->to[v->item[t]] = b->n_bins - 1;
    }
    return true;
}

/* Fills bins j, j+1, ... with the open part of the pool. */
static bool complete(rebuild *b, int j)
{
    const bal_model *model = b->search->model;
    const bin *bj = &b->bin[j];
    level v = {.hi = bj->room,
               .count_lo = model->min_items - bj->count,
               .count_hi = model->max_items - bj->count,
               .size_hi = bal_capacity(model, bj->rank) - bj->size};
    for (int at = 0; at < b->n_pool; at++) {
        if (b->to[at] < 0) {
            v.item[v.n++] = at;
        }
    }
    for (int t = v.n - 1; t >= 0; t--) {
        v.left[t] = v.left[t + 1] + b->a[v.item[t]];
    }
    if (j == b->n_bins - 1) {
        return finish(b, &v);
    }
    v.lo = v.left[0];
    for (int later = j + 1; later < b->n_bins; later++) {
        v.lo -= b->bin[later].room;
    }
    /* rounding of the differences must not close an exact window */
    v.lo -= BAL_TOLERANCE * v.left[0];
    if (v.lo > v.hi || v.hi < 0 || v.size_hi < 0 || v.count_hi < 0) {
        return false;
    }
    bool alike = model->uniform;
    for (int later = j; later < b->n_bins; later++) {
        alike = alike && b->bin[later].count == 0;
    }
    if (alike && v.n > 0) {
        /* empty bins are interchangeable: this one takes the largest unit left */
        int64_t u = b->unit[v.item[0]];
        if (b->a[v.item[0]] > v.hi || bal_size(model, u) > v.size_hi ||
            bal_count(model, u) > v.count_hi) {
            return false;
        }
        b->to[v.item[0]] = j;
        if (extend(b, j, &v, 1, b->a[v.item[0]], bal_count(model, u), bal_size(model, u))) {
            return true;
        }
        b->to[v.item[0]] = -1;
        return false;
    }
    return extend(b, j, &v, 0, 0, 0, 0);
}

/* Moves up to `most` units of bin j into the pool, evenly spread over its list. */
static void draw(rebuild *b, int j, int64_t most)
{
    const bal_model *model = b->search->model;
    bin *bj = &b->bin[j];
    int64_t n = 0, at = 0;
    for (int64_t u = b->head[bj->rank]; u >= 0; u = b->next[u]) {
        n++;
    }
    int64_t step = n <= most ? 1 : (n + most - 1) / most;
    int64_t skip = step > 1 ? ovlm_rng_below(&b->search->rng, step) : 0;
    *bj = (bin){.rank = bj->rank};
    for (int64_t u = b->head[bj->rank]; u >= 0; u = b->next[u], at++) {
        if (at % step == skip && !bal_is_pinned(model, u) && b->n_pool < POOL) {
            int k = b->n_pool++;
            for (; k > 0 && b->a[k - 1] < model->a[u]; k--) {
                b->a[k] = b->a[k - 1];
                b->unit[k] = b->unit[k - 1];
            }
            b->a[k] = model->a[u];
            b->unit[k] = u;
        } else {
            bj->add += model->a[u];
            bj->count += bal_count(model, u);
            bj->size += bal_size(model, u);
        }
    }
    b->search->meter->work += n;
}

/* The target for this set of bins: T, or, where even a perfect split of it stays above T, half way
 * from the perfect split to the present largest.  Returns it, and sets the bins' rooms. */
static double set_rooms(rebuild *b, double largest)
{
    const bal_model *model = b->search->model;
    double need = 0, speed = 0;
    for (int k = 0; k < b->n_pool; k++) {
        need += b->a[k];
    }
    for (int j = 0; j < b->n_bins; j++) {
        int64_t r = b->bin[j].rank;
        need += b->bin[j].add + model->fixed + bal_base(model, r) * bal_speed(model, r);
        speed += bal_speed(model, r);
    }
    double even = need / speed;
    double target = b->target;
    if (even > target) {
        target = even + (largest - even) / 2;
    }
    for (int j = 0; j < b->n_bins; j++) {
        double room = bal_room(model, b->bin[j].rank, target * (1 + BAL_TOLERANCE / 2));
        b->bin[j].room = room - b->bin[j].add;
    }
    return target;
}

static void over_set(rebuild *b, int64_t r)
{
    bool is = !bal_meets(b->plan->load[r], b->target);
    if (is && b->over_at[r] < 0) {
        b->over_at[r] = b->n_over;
        b->over[b->n_over++] = r;
    } else if (!is && b->over_at[r] >= 0) {
        int64_t last = b->over[--b->n_over];
        b->over[b->over_at[r]] = last;
        b->over_at[last] = b->over_at[r];
        b->over_at[r] = -1;
    }
}

/* Takes the found distribution over, unless it is no better after all. */
static bool apply(rebuild *b, double limit)
{
    const bal_model *model = b->search->model;
    bal_plan *plan = b->plan;
    for (int j = 0; j < b->n_bins; j++) {
        double add = b->bin[j].add;
        int64_t count = b->bin[j].count;
        for (int k = 0; k < b->n_pool; k++) {
            add += b->to[k] == j ? b->a[k] : 0;
            count += b->to[k] == j ? bal_count(model, b->unit[k]) : 0;
        }
        if (!bal_meets(bal_load(model, b->bin[j].rank, add, count, 0), limit)) {
            return false;
        }
    }
    for (int k = 0; k < b->n_pool; k++) {
        int64_t from = plan->rank[b->unit[k]];
        int64_t *link = &b->head[from];
        while (*link != b->unit[k]) {
            link = &b->next[*link];
        }
        *link = b->next[b->unit[k]];
    }
    for (int k = 0; k < b->n_pool; k++) {
        int64_t u = b->unit[k], r = b->bin[b->to[k]].rank;
        plan->rank[u] = r;
        b->next[u] = b->head[r];
        b->head[r] = u;
    }
    for (int j = 0; j < b->n_bins; j++) {
        int64_t r = b->bin[j].rank;
        plan->add[r] = 0;
        plan->count[r] = plan->size[r] = 0;
        for (int64_t u = b->head[r]; u >= 0; u = b->next[u]) {
            plan->add[r] += model->a[u];
            plan->count[r] += bal_count(model, u);
            plan->size[r] += bal_size(model, u);
        }
        plan->load[r] = bal_load(model, r, plan->add[r], plan->count[r], 0);
        over_set(b, r);
    }
    return true;
}

/* A partner not yet in the set: the least loaded of some random ranks. -1: none found. */
static int64_t pick_partner(rebuild *b)
{
    const bal_model *model = b->search->model;
    ovlm_rng *rng = &b->search->rng;
    int64_t best = -1, tries = 1 + ovlm_rng_below(rng, 8);
    int64_t node = b->bin[0].rank / model->node_size * model->node_size;
    int64_t node_end = node + model->node_size < model->n_ranks ? node + model->node_size
                                                                : model->n_ranks;
    bool near = b->same_node && ovlm_rng_below(rng, 8) != 0;
    for (int64_t t = 0; t < tries; t++) {
        int64_t r = near ? node + ovlm_rng_below(rng, node_end - node)
                         : ovlm_rng_below(rng, model->n_ranks);
        bool taken = false;
        for (int j = 0; j < b->n_bins; j++) {
            taken = taken || b->bin[j].rank == r;
        }
        if (!taken && (best < 0 || b->plan->load[r] < b->plan->load[best])) {
            best = r;
        }
    }
    return best;
}

/* One attempt; true when the plan has changed. */
static bool attempt(rebuild *b)
{
    const bal_model *model = b->search->model;
    ovlm_rng *rng = &b->search->rng;
    int64_t units_each = model->n_units / model->n_ranks;
    int64_t most_bins = units_each <= 4 ? BINS : 4;
    most_bins = most_bins < model->n_ranks ? most_bins : model->n_ranks;
    int64_t want = 2 + ovlm_rng_below(rng, most_bins - 1);
    b->bin[0].rank = b->over[ovlm_rng_below(rng, b->n_over)];
    b->n_bins = 1;
    double largest = b->plan->load[b->bin[0].rank];
    for (int64_t i = 1; i < want; i++) {
        int64_t r = pick_partner(b);
        if (r >= 0) {
            b->bin[b->n_bins++].rank = r;
            largest = b->plan->load[r] > largest ? b->plan->load[r] : largest;
        }
    }
    b->n_pool = 0;
    for (int j = 0; j < b->n_bins; j++) {
        draw(b, j, POOL / b->n_bins);
    }
    for (int k = 0; k < b->n_pool; k++) {
        b->to[k] = -1;
    }
    double limit = set_rooms(b, largest);
    b->nodes = NODES;
    bool found = b->n_bins > 1 && complete(b, 0);
    b->search->meter->work += NODES - b->nodes;
    return found && apply(b, limit);
}

/* Collects the ranks above the target. */
static void set_target(rebuild *b, double target)
{
    b->target = target;
    b->n_over = 0;
    for (int64_t r = 0; r < b->search->model->n_ranks; r++) {
        b->over_at[r] = -1;
        over_set(b, r);
    }
}

/* Works until no rank is above the target, the meter ends, or `patience` attempts in a row fail. */
static bool drive(rebuild *b, int64_t patience)
{
    int64_t failed = 0;
    while (b->n_over > 0) {
        if (ovlm_meter_spend(b->search->meter, 8) || failed > patience) {
            return false;
        }
        failed = attempt(b) ? 0 : failed + 1;
    }
    return true;
}

static ovlm_status rebuild_init(rebuild *b, bal_search *search, bal_plan *plan, ovlm_err *err)
{
    const bal_model *model = search->model;
    *b = (rebuild){.search = search, .plan = plan};
    OVLM_TRY(OVLM_ARENA_NEW(search->arena, &b->head, model->n_ranks, err));
    OVLM_TRY(OVLM_ARENA_NEW(search->arena, &b->next, model->n_units, err));
    OVLM_TRY(OVLM_ARENA_NEW(search->arena, &b->over, model->n_ranks, err));
    OVLM_TRY(OVLM_ARENA_NEW(search->arena, &b->over_at, model->n_ranks, err));
    for (int64_t r = 0; r < model->n_ranks; r++) {
        b->head[r] = -1;
    }
    for (int64_t u = 0; u < model->n_units; u++) {
        b->next[u] = b->head[plan->rank[u]];
        b->head[plan->rank[u]] = u;
    }
    return OVLM_OK;
}

static double largest_load(const bal_model *model, const bal_plan *plan)
{
    double largest = 0;
    for (int64_t r = 0; r < model->n_ranks; r++) {
        largest = plan->load[r] > largest ? plan->load[r] : largest;
    }
    return largest;
}

ovlm_status bal_rebuild(bal_search *search, bal_plan *plan, ovlm_err *err)
{
    const bal_model *model = search->model;
    if (model->n_ranks < 2 || model->n_units == 0) {
        return OVLM_OK;
    }
    ovlm_arena_mark mark = ovlm_arena_save(search->arena);
    rebuild b;
    OVLM_TRY(rebuild_init(&b, search, plan, err));
    double best = plan->max, refused = search->goal;
    int64_t patience = 64 + 4 * model->n_ranks;
    bool at_goal = false;
    while (!bal_meets(best, search->goal) && !ovlm_meter_spend(search->meter, model->n_ranks)) {
        /* the goal itself first when near, half way to what was refused otherwise */
        double target = at_goal ? search->goal : refused + (best - refused) / 2;
        set_target(&b, target);
        bool reached = drive(&b, patience);
        best = largest_load(model, plan);
        if (reached) {
            at_goal = refused <= search->goal && best - search->goal < 1e-3 * search->goal;
            continue;
        }
        refused = target;
        at_goal = false;
        if (best - refused < 1e-5 * best || refused >= best) {
            /* nothing left between: begin again from the goal with more patience */
            refused = search->goal;
            patience *= 2;
            at_goal = true;
        }
    }
    ovlm_arena_rewind(search->arena, mark);
    (void)bal_plan_settle(model, plan);
    return search->meter->interrupted ? OVLM_FAIL(err, OVLM_E_INTERRUPTED, "interrupted") : OVLM_OK;
}

ovlm_status bal_rebuild_to(bal_search *search, bal_plan *plan, double target, ovlm_err *err)
{
    const bal_model *model = search->model;
    if (model->n_ranks < 2 || model->n_units == 0) {
        return OVLM_OK;
    }
    ovlm_arena_mark mark = ovlm_arena_save(search->arena);
    rebuild b;
    OVLM_TRY(rebuild_init(&b, search, plan, err));
    b.same_node = true;
    set_target(&b, target);
    (void)drive(&b, 256 + 16 * model->n_ranks);
    ovlm_arena_rewind(search->arena, mark);
    (void)bal_plan_settle(model, plan);
    return search->meter->interrupted ? OVLM_FAIL(err, OVLM_E_INTERRUPTED, "interrupted") : OVLM_OK;
}
