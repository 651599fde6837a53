/* balance_greedy.c - longest-first on winner trees.
 *
 * One tree per distinct speed holds its ranks by load; inside a class the least loaded rank ends
 * first, so a unit compares one winner per class.  Keys are the bits of loads >= 0, which order
 * like the loads.  After an insertion the path from the leaf to the root is replayed without a
 * branch: 163,840 units on 2,560 ranks are 2 million such steps. */
#include "plan/balance_parts.h"

#include <math.h>
#include <string.h>

#include "base/sort.h"

typedef struct tree {
    int64_t leaves;  /* a power of two                                                         */
    uint64_t *key;   /* [2*leaves] node 1 is the root, leaf i is node leaves + i               */
    uint32_t *rank;  /* [2*leaves] the rank that won the node                                  */
} tree;

typedef struct forest {
    int64_t n;          /* classes                                                             */
    tree *class;        /* [n]                                                                 */
    int64_t *class_of;  /* [n_ranks]                                                           */
    int64_t *leaf_of;   /* [n_ranks]                                                           */
} forest;

static const uint64_t CLOSED = UINT64_MAX - 1; /* above every load; + 1 does not wrap */

static uint64_t load_key(double load)
{
    uint64_t bits;
    load += 0.0; /* -0.0 would order last */
    memcpy(&bits, &load, sizeof bits);
    return bits;
}

/* Sets a leaf and replays its path; ties go to the left, that is to the lower rank.  Plain
 * selections, which compile to conditional moves: which side wins is as good as random, and one
 * mispredicted branch costs more than the whole step. */
static inline void tree_update(tree *t, int64_t leaf, uint64_t key)
{
    uint64_t *keys = t->key;
    uint32_t *ranks = t->rank;
    uint64_t node = (uint64_t)(t->leaves + leaf);
    uint32_t rank = ranks[node];
    keys[node] = key;
    while (node > 1) {
        uint64_t other = keys[node ^ 1], is_left = ~node & 1;
        uint32_t other_rank = ranks[node ^ 1];
        bool wins = key < other + is_left;
        key = wins ? key : other;
        rank = wins ? rank : other_rank;
        node >>= 1;
        keys[node] = key;
        ranks[node] = rank;
    }
}

static void tree_build(tree *t)
{
    for (int64_t node = t->leaves - 1; node >= 1; node--) {
        int64_t best = 2 * node + (t->key[2 * node + 1] < t->key[2 * node] ? 1 : 0);
        t->key[node] = t->key[best];
        t->rank[node] = t->rank[best];
    }
}

/* Ranks of equal speed form a class. */
static ovlm_status make_classes(const bal_model *model, forest *f, ovlm_arena *arena, ovlm_err *err)
{
    int64_t *order = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &f->class_of, model->n_ranks, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &f->leaf_of, model->n_ranks, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &order, model->n_ranks, err));
    f->n = 1;
    for (int64_t r = 0; r < model->n_ranks; r++) {
        f->leaf_of[r] = r;
    }
    if (model->speed != NULL) {
        OVLM_TRY(ovlm_sort_f64(model->speed, model->n_ranks, order, arena, err));
        f->leaf_of[order[0]] = 0;
        for (int64_t i = 1; i < model->n_ranks; i++) {
            int64_t r = order[i], before = order[i - 1];
            bool same = model->speed[r] >= model->speed[before];
            f->class_of[r] = same ? f->class_of[before] : f->n++;
            f->leaf_of[r] = same ? f->leaf_of[before] + 1 : 0;
        }
    }
    return OVLM_OK;
}

static ovlm_status forest_init(const bal_model *model, forest *f, ovlm_arena *arena, ovlm_err *err)
{
    OVLM_TRY(make_classes(model, f, arena, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &f->class, f->n, err));
    for (int64_t r = 0; r < model->n_ranks; r++) {
        int64_t *leaves = &f->class[f->class_of[r]].leaves;
        *leaves = f->leaf_of[r] >= *leaves ? f->leaf_of[r] + 1 : *leaves;
    }
    for (int64_t c = 0; c < f->n; c++) {
        tree *t = &f->class[c];
        int64_t leaves = 1;
        while (leaves < t->leaves) {
            leaves *= 2;
        }
        t->leaves = leaves;
        OVLM_TRY(OVLM_ARENA_NEW(arena, &t->key, 2 * leaves, err));
        OVLM_TRY(OVLM_ARENA_NEW(arena, &t->rank, 2 * leaves, err));
        for (int64_t node = 0; node < 2 * leaves; node++) {
            t->key[node] = CLOSED;
        }
    }
    return OVLM_OK;
}

/* All open ranks into their trees.  Towards the end only ranks that lack items stay open. */
static void forest_fill(const bal_model *model, forest *f, const bal_plan *plan, bool only_lacking)
{
    for (int64_t r = 0; r < model->n_ranks; r++) {
        tree *t = &f->class[f->class_of[r]];
        bool open = plan->count[r] < (only_lacking ? model->min_items : model->max_items);
        t->rank[t->leaves + f->leaf_of[r]] = (uint32_t)r;
        t->key[t->leaves + f->leaf_of[r]] = open ? load_key(plan->load[r]) : CLOSED;
    }
    for (int64_t c = 0; c < f->n; c++) {
        tree_build(&f->class[c]);
    }
}

/* Load of r with unit u on it as well. */
static double load_with(const bal_model *model, const bal_plan *plan, int64_t u, int64_t r)
{
    int64_t len = bal_len(model, u);
    return bal_load(model, r, plan->add[r] + model->a[u], plan->count[r] + bal_count(model, u),
                    len > plan->len[r] ? len : plan->len[r]);
}

/* The rank for unit u: the best class winner; when that has no room, the best of all by a scan.
 * -1 when none admits it. */
static int64_t choose(const bal_model *model, const forest *f, const bal_plan *plan, int64_t u,
                      bool only_lacking)
{
    int64_t best = -1;
    double best_load = HUGE_VAL;
    for (int64_t c = 0; c < f->n; c++) {
        if (f->class[c].key[1] != CLOSED) {
            int64_t r = f->class[c].rank[1];
            double load = f->n > 1 ? load_with(model, plan, u, r) : 0;
            if (best < 0 || load < best_load) {
                best = r;
                best_load = load;
            }
        }
    }
    if (best >= 0 && bal_admits(model, plan, u, best)) {
        return best;
    }
    best = -1;
    best_load = HUGE_VAL;
    for (int64_t r = 0; r < model->n_ranks; r++) {
        if ((!only_lacking || plan->count[r] < model->min_items) &&
            bal_admits(model, plan, u, r)) {
            double load = f->n > 1 ? load_with(model, plan, u, r) : plan->load[r];
            if (best < 0 || load < best_load) {
                best = r;
                best_load = load;
            }
        }
    }
    return best;
}

/* Items still owed to ranks below min_items. */
static int64_t items_owed(const bal_model *model, const bal_plan *plan)
{
    int64_t owed = 0;
    for (int64_t r = 0; r < model->n_ranks; r++) {
        int64_t lack = model->min_items - plan->count[r];
        owed += lack > 0 ? lack : 0;
    }
    return owed;
}

/* Pinned units first: they have no choice.  Returns the items left, or -1. */
static int64_t put_pinned(const bal_model *model, const int64_t *order, bal_plan *plan)
{
    int64_t left = model->n;
    for (int64_t i = 0; model->pin != NULL && i < model->n_units; i++) {
        int64_t u = order[i];
        if (model->pin[u] >= 0) {
            if (!bal_admits(model, plan, u, model->pin[u])) {
                return -1;
            }
            bal_plan_put(model, plan, u, model->pin[u]);
            left -= bal_count(model, u);
        }
    }
    return left;
}

/* Scratch to put ranks in order of their loads. */
typedef struct rank_order {
    uint32_t *bucket, *by_load; /* [n_ranks]                                                   */
    double *mirrored;           /* [n_ranks] load of rank n_ranks - 1 - i                      */
    int64_t *order;             /* [n_ranks]                                                   */
} rank_order;

static ovlm_status rank_order_init(rank_order *o, int64_t n, ovlm_arena *arena, ovlm_err *err)
{
    OVLM_TRY(OVLM_ARENA_RAW(arena, &o->bucket, n, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &o->by_load, n, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &o->mirrored, n, err));
    return OVLM_ARENA_RAW(arena, &o->order, n, err);
}

/* The sort for loads that crowd in a few buckets. */
static ovlm_status sort_crowded(rank_order *o, const double *load, int64_t n, ovlm_arena *arena,
                                ovlm_err *err)
{
    for (int64_t i = 0; i < n; i++) {
        o->mirrored[i] = load[n - 1 - i];
    }
    OVLM_TRY(ovlm_sort_f64(o->mirrored, n, o->order, arena, err));
    for (int64_t k = 0; k < n; k++) {
        /* read from the end, so that ties go to the lower rank */
        o->by_load[k] = (uint32_t)(n - 1 - o->order[n - 1 - k]);
    }
    return OVLM_OK;
}

/* Ranks by ascending load, ties by number: buckets over the spread, mostly of one rank each, and an
 * insertion sort for what shares one. */
static ovlm_status sort_ranks(rank_order *o, const double *load, int64_t n, ovlm_arena *arena,
                              ovlm_err *err)
{
    enum { BUCKETS = 2048, CROWD = 16 };
    uint32_t start[BUCKETS + 1] = {0};
    int64_t pairs = 0; /* what the insertion sort looks at, about */
    double least = load[0], most = load[0];
    for (int64_t r = 1; r < n; r++) {
        least = load[r] < least ? load[r] : least;
        most = load[r] > most ? load[r] : most;
    }
    double scale = most > least ? (BUCKETS - 1) / (most - least) : 0;
    if (!(scale < HUGE_VAL)) {
        return sort_crowded(o, load, n, arena, err);
    }
    for (int64_t r = 0; r < n; r++) {
        o->bucket[r] = (uint32_t)((load[r] - least) * scale);
        start[o->bucket[r] + 1]++;
    }
    for (int b = 0; b < BUCKETS; b++) {
        pairs += (int64_t)start[b + 1] * start[b + 1];
        start[b + 1] += start[b];
    }
    if (pairs > CROWD * n && most > least) {
        return sort_crowded(o, load, n, arena, err);
    }
    for (int64_t r = 0; r < n; r++) {
        o->by_load[start[o->bucket[r]]++] = (uint32_t)r;
    }
    for (int64_t k = 1; k < n; k++) {
        uint32_t r = o->by_load[k];
        int64_t at = k;
        for (; at > 0 && load[o->by_load[at - 1]] > load[r]; at--) {
            o->by_load[at] = o->by_load[at - 1];
        }
        o->by_load[at] = r;
    }
    return OVLM_OK;
}

/* Units at, at + 1, ... of `order` go to ranks of ascending load, one each, for as long as that is
 * what longest-first does: until a rank that has its unit ends before the next one without.
 * Returns how many went. */
static int64_t place_round(const bal_model *model, const int64_t *order, int64_t at,
                           const rank_order *ranks, bal_plan *plan)
{
    int64_t left = model->n_units - at, most = left < model->n_ranks ? left : model->n_ranks, k = 0;
    double least = HUGE_VAL;
    for (; k < most; k++) {
        int64_t r = ranks->by_load[k], u = order[at + k];
        if (plan->load[r] > least) {
            break;
        }
        plan->load[r] += model->a[u];
        plan->rank[u] = r;
        least = plan->load[r] < least ? plan->load[r] : least;
    }
    return k;
}

/* The next units, up to `end`, one by one: the key of the winner is its load, so nothing but the
 * tree is read. */
static void place_singly(const bal_model *model, const int64_t *order, int64_t at, int64_t end,
                         forest *f, bal_plan *plan)
{
    tree *t = &f->class[0];
    forest_fill(model, f, plan, false);
    for (int64_t i = at; i < end; i++) {
        uint32_t r = t->rank[1];
        double load;
        memcpy(&load, &t->key[1], sizeof load);
        plan->load[r] = load + model->a[order[i]];
        plan->rank[order[i]] = r;
        tree_update(t, r, load_key(plan->load[r]));
    }
}

/* Like ranks without limits: in rounds, for which one sort of the ranks serves many units, and
 * singly where the ranks' loads are too different.  Adding `fixed` to every rank in use would not
 * change who is least loaded. */
static ovlm_status place_simple(const bal_model *model, const int64_t *order, forest *f,
                                bal_plan *plan, ovlm_arena *arena, ovlm_err *err)
{
    int64_t N = model->n_ranks, n = model->n_units;
    rank_order ranks;
    OVLM_TRY(rank_order_init(&ranks, N, arena, err));
    memset(plan->load, 0, (size_t)N * sizeof *plan->load);
    for (int64_t at = 0; at < n;) {
        OVLM_TRY(sort_ranks(&ranks, plan->load, N, arena, err));
        int64_t placed = place_round(model, order, at, &ranks, plan);
        at += placed;
        if (placed < N / 8) {
            int64_t end = n - at < N ? n : at + N;
            place_singly(model, order, at, end, f, plan);
            at = end;
        }
    }
    return OVLM_OK;
}

static bool place_all(const bal_model *model, const int64_t *order, forest *f, bal_plan *plan)
{
    int64_t left = put_pinned(model, order, plan), owed = items_owed(model, plan);
    if (left < 0) {
        return false;
    }
    bool only_lacking = model->min_items > 0 && left <= owed;
    forest_fill(model, f, plan, only_lacking);
    for (int64_t i = 0; i < model->n_units; i++) {
        int64_t u = order[i];
        if (plan->rank[u] >= 0) {
            continue;
        }
        int64_t r = choose(model, f, plan, u, only_lacking);
        if (r < 0) {
            return false;
        }
        int64_t lack = model->min_items - plan->count[r], count = bal_count(model, u);
        bal_plan_put(model, plan, u, r);
        owed -= lack > count ? count : lack > 0 ? lack : 0;
        left -= count;
        if (!only_lacking && model->min_items > 0 && left <= owed) {
            only_lacking = true;
            forest_fill(model, f, plan, true);
            continue;
        }
        bool open = plan->count[r] < (only_lacking ? model->min_items : model->max_items);
        tree_update(&f->class[f->class_of[r]], f->leaf_of[r],
                    open ? load_key(plan->load[r]) : CLOSED);
    }
    return true;
}

ovlm_status bal_greedy(const bal_model *model, const int64_t *order, bal_plan *plan, bool *done,
                       ovlm_arena *arena, ovlm_err *err)
{
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    forest f = {0};
    OVLM_TRY(forest_init(model, &f, arena, err));
    bal_plan_clear(model, plan);
    bool simple = model->uniform && !model->padded && model->count == NULL &&
                  model->capacity == NULL && model->min_items == 0 && model->max_items >= model->n;
    if (simple) {
        OVLM_TRY(place_simple(model, order, &f, plan, arena, err));
        *done = bal_plan_settle(model, plan);
    } else {
        *done = place_all(model, order, &f, plan) && bal_plan_settle(model, plan);
    }
    ovlm_arena_rewind(arena, mark);
    return OVLM_OK;
}

/* Best fit: each unit to the rank whose remaining capacity it fills most, lacking ranks first. */
static bool best_fit(const bal_model *model, const int64_t *order, bal_plan *plan)
{
    bal_plan_clear(model, plan);
    if (put_pinned(model, order, plan) < 0) {
        return false;
    }
    for (int64_t i = 0; i < model->n_units; i++) {
        int64_t u = order[i], best = -1, best_room = 0;
        bool best_lacks = false;
        for (int64_t r = 0; plan->rank[u] < 0 && r < model->n_ranks; r++) {
            if (bal_admits(model, plan, u, r)) {
                bool lacks = plan->count[r] < model->min_items;
                int64_t room = bal_capacity(model, r) - plan->size[r];
                if (best < 0 || (lacks && !best_lacks) ||
                    (lacks == best_lacks && room < best_room)) {
                    best = r;
                    best_room = room;
                    best_lacks = lacks;
                }
            }
        }
        if (plan->rank[u] < 0) {
            if (best < 0) {
                return false;
            }
            bal_plan_put(model, plan, u, best);
        }
    }
    return bal_plan_settle(model, plan);
}

ovlm_status bal_construct(const bal_model *model, bal_plan *plan, bool *done, ovlm_arena *arena,
                          ovlm_err *err)
{
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    int64_t *order = NULL, *key = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &order, model->n_units, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &key, model->n_units, err));
    *done = false;
    /* By size with load as tie, then by items in the unit: what is hard to place goes first. */
    for (int pass = 0; pass < 2 && !*done; pass++) {
        for (int64_t u = 0; u < model->n_units; u++) {
            key[u] = pass == 0 ? bal_size(model, u) : bal_count(model, u);
        }
        OVLM_TRY(ovlm_sort_i64(key, model->n_units, order, arena, err));
        OVLM_TRY(bal_greedy(model, order, plan, done, arena, err));
        if (!*done) {
            *done = best_fit(model, order, plan);
        }
    }
    ovlm_arena_rewind(arena, mark);
    return OVLM_OK;
}
