/* balance_complete.c - bin completion with sum windows, by depth-first search. */
#include "plan/balance_complete.h"

/* What one bin may take. */
typedef struct level {
    int n, item[BAL_POOL];       /* open pool positions, a descending                           */
    double left[BAL_POOL + 1];   /* suffix sums of a                                            */
    double lo, hi;
    int64_t count_lo, count_hi, size_hi;
} level;

static bool complete(bal_pool *b, int j);

/* Can a bin that has `count` units still end inside its window, choosing from t, t+1, ...?  With
 * one item per unit, the number still needed says what the choice costs at least and brings at
 * most. */
static inline bool in_reach(const bal_pool *b, const level *v, int t, double sum, int64_t count)
{
    if (sum + v->left[t] < v->lo) {
        return false;
    }
    if (b->model->count != NULL) {
        return true;
    }
    int64_t need = v->count_lo - count, may = v->count_hi - count, open = v->n - t;
    if (need > open || (need > 0 && sum + v->left[v->n - need] > v->hi)) {
        return false;
    }
    return may >= open || sum + v->left[t] - v->left[t + may] >= v->lo;
}

/* Bin j holds `sum` so far and may still choose among level items i, i+1, ... */
static bool extend(bal_pool *b, int j, const level *v, int i, double sum, int64_t count,
                   int64_t size)
{
    const bal_model *model = b->model;
    if (sum >= v->lo && count >= v->count_lo && complete(b, j + 1)) {
        return true;
    }
    for (int t = i; t < v->n && b->nodes > 0 && in_reach(b, v, t, sum, count); t++) {
        b->nodes--;
        int at = v->item[t];
        int64_t u = b->unit[at];
        int64_t new_count = count + bal_count(model, u), new_size = size + bal_size(model, u);
        if (sum + b->a[at] > v->hi || new_count > v->count_hi || new_size > v->size_hi ||
            (j == 0 && at == b->banned)) {
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
static bool finish(bal_pool *b, const level *v)
{
    const bal_model *model = b->model;
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
static bool complete(bal_pool *b, int j)
{
    const bal_model *model = b->model;
    const bal_bin *bj = &b->bin[j];
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

bool bal_complete(bal_pool *b)
{
    for (int k = 0; k < b->n_pool; k++) {
        b->to[k] = -1;
    }
    return b->n_bins > 1 && complete(b, 0);
}
