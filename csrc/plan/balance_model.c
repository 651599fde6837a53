/* balance_model.c - items become units, units become costs; and the bookkeeping of a plan. */
#include "plan/balance_model.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "base/sort.h"

static int64_t part_item(const bal_part *part, int64_t i)
{
    return part->item != NULL ? part->item[i] : i;
}

/* Additive cost of one item: everything of f but the fixed and the padded terms. */
static double item_additive(const ovlm_balance_problem *p, int64_t item)
{
    if (p->item_cost != NULL) {
        return p->item_cost[item];
    }
    double length = (double)p->lengths[item];
    double square = p->squares != NULL ? p->squares[item] : length * length;
    return p->cost.per_item + p->cost.linear * length + p->cost.quadratic * square;
}

ovlm_status bal_label_units(const int64_t *label, int64_t n, int64_t *unit_of, int64_t *n_units,
                            ovlm_arena *arena, ovlm_err *err)
{
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    int64_t *order = NULL, *first = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &order, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &first, n, err));
    /* Only equal labels must become neighbours; the sort is stable, so a run starts with its
     * first item. */
    OVLM_TRY(ovlm_sort_i64(label, n, order, arena, err));
    for (int64_t i = 0; i < n; i++) {
        bool same = i > 0 && label[order[i]] == label[order[i - 1]];
        first[order[i]] = same ? first[order[i - 1]] : order[i];
    }
    *n_units = 0;
    for (int64_t i = 0; i < n; i++) {
        unit_of[i] = first[i] == i ? (*n_units)++ : unit_of[first[i]];
    }
    ovlm_arena_rewind(arena, mark);
    return OVLM_OK;
}

/* Numbers the units of a part and fills model->unit_of when items are kept together. */
static ovlm_status make_units(bal_model *model, const ovlm_balance_problem *p, const bal_part *part,
                              ovlm_arena *arena, ovlm_err *err)
{
    model->n_units = part->n_items;
    if (p->together == NULL) {
        return OVLM_OK;
    }
    OVLM_TRY(OVLM_ARENA_NEW(arena, &model->unit_of, part->n_items, err));
    int64_t *label = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &label, part->n_items, err));
    for (int64_t i = 0; i < part->n_items; i++) {
        label[i] = p->together[part_item(part, i)];
    }
    return bal_label_units(label, part->n_items, model->unit_of, &model->n_units, arena, err);
}

static ovlm_status new_arrays(bal_model *model, const ovlm_balance_problem *p, ovlm_arena *arena,
                              ovlm_err *err)
{
    int64_t n_units = model->n_units;
    if (model->unit_of != NULL) {
        OVLM_TRY(OVLM_ARENA_NEW(arena, &model->a, n_units, err));
    } else {
        OVLM_TRY(OVLM_ARENA_RAW(arena, &model->a, n_units, err));
    }
    OVLM_TRY(OVLM_ARENA_RAW(arena, &model->order, n_units, err));
    if (model->padded) {
        OVLM_TRY(OVLM_ARENA_NEW(arena, &model->len, n_units, err));
    }
    if (model->unit_of != NULL) {
        OVLM_TRY(OVLM_ARENA_NEW(arena, &model->count, n_units, err));
    }
    if (p->capacity != NULL) {
        OVLM_TRY(OVLM_ARENA_NEW(arena, &model->size, n_units, err));
    }
    if (p->pinned != NULL) {
        OVLM_TRY(OVLM_ARENA_NEW(arena, &model->pin, n_units, err));
        memset(model->pin, -1, (size_t)n_units * sizeof *model->pin);
    }
    if (p->home != NULL) {
        OVLM_TRY(OVLM_ARENA_NEW(arena, &model->bytes, n_units, err));
        OVLM_TRY(OVLM_ARENA_RAW(arena, &model->home, n_units, err));
    }
    return OVLM_OK;
}

/* Sums an item into its unit. */
static ovlm_status add_item(bal_model *model, const ovlm_balance_problem *p, const bal_part *part,
                            int64_t item, int64_t u, ovlm_err *err)
{
    model->a[u] = (model->unit_of != NULL ? model->a[u] : 0) + item_additive(p, item);
    if (model->len != NULL && p->lengths[item] > model->len[u]) {
        model->len[u] = p->lengths[item];
    }
    if (model->count != NULL) {
        model->count[u]++;
    }
    if (model->size != NULL) {
        model->size[u] += p->size[item];
    }
    if (model->pin != NULL && p->pinned[item] >= 0) {
        int64_t rank = p->pinned[item] - part->first_rank;
        if (rank < 0 || rank >= part->n_ranks) {
            return OVLM_FAIL(err, OVLM_E_ARG,
                             "pinned[%lld] = %lld is outside the group of ranks of its home",
                             (long long)item, (long long)p->pinned[item]);
        }
        if (model->pin[u] >= 0 && model->pin[u] != rank) {
            return OVLM_FAIL(err, OVLM_E_ARG,
                             "item %lld is kept together with one pinned to rank %lld, but pinned "
                             "to rank %lld",
                             (long long)item, (long long)(model->pin[u] + part->first_rank),
                             (long long)p->pinned[item]);
        }
        model->pin[u] = rank;
    }
    return OVLM_OK;
}

/* A unit's home is the rank that holds most of its bytes; found by sums per (unit, home). */
static ovlm_status find_homes(bal_model *model, const ovlm_balance_problem *p, const bal_part *part,
                              ovlm_arena *arena, ovlm_err *err)
{
    for (int64_t i = 0; model->unit_of == NULL && i < part->n_items; i++) {
        int64_t item = part_item(part, i);
        model->bytes[i] = p->size != NULL ? p->size[item] : p->lengths[item];
        model->home[i] = p->home[item] - part->first_rank;
    }
    if (model->unit_of == NULL) {
        return OVLM_OK;
    }
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    int64_t *key = NULL, *order = NULL, *most = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &key, part->n_items, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &order, part->n_items, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &most, model->n_units, err));
    memset(most, -1, (size_t)model->n_units * sizeof *most);
    for (int64_t i = 0; i < part->n_items; i++) {
        int64_t item = part_item(part, i), u = model->unit_of[i];
        key[i] = u * part->n_ranks + p->home[item] - part->first_rank;
    }
    OVLM_TRY(ovlm_sort_i64(key, part->n_items, order, arena, err));
    int64_t run_bytes = 0;
    for (int64_t i = 0; i < part->n_items; i++) {
        int64_t item = part_item(part, order[i]), u = key[order[i]] / part->n_ranks;
        int64_t bytes = p->size != NULL ? p->size[item] : p->lengths[item];
        run_bytes = i > 0 && key[order[i]] == key[order[i - 1]] ? run_bytes + bytes : bytes;
        model->bytes[u] += bytes;
        if (run_bytes > most[u]) {
            most[u] = run_bytes;
            model->home[u] = key[order[i]] % part->n_ranks;
        }
    }
    ovlm_arena_rewind(arena, mark);
    return OVLM_OK;
}

/* Units by the cost of a rank that holds one alone, largest first. */
static ovlm_status sort_units(bal_model *model, const ovlm_balance_problem *p,
                              const bal_part *part, ovlm_arena *arena, ovlm_err *err)
{
    /* Every term grows with the length, so plain lengths need not be turned into costs: their
     * keys have fewer digits. */
    if (p->item_cost == NULL && p->squares == NULL && model->unit_of == NULL &&
        part->item == NULL) {
        return ovlm_sort_i64(p->lengths, part->n_items, model->order, arena, err);
    }
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    double *key = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &key, model->n_units, err));
    for (int64_t u = 0; u < model->n_units; u++) {
        double h = (double)bal_len(model, u);
        key[u] = model->a[u] + (double)bal_count(model, u) * h *
                                   (model->padded_linear + model->padded_quadratic * h);
    }
    OVLM_TRY(ovlm_sort_f64(key, model->n_units, model->order, arena, err));
    ovlm_arena_rewind(arena, mark);
    return OVLM_OK;
}

static int64_t gcd(int64_t a, int64_t b)
{
    while (b != 0) {
        int64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

/* The grain of the additive costs: whole numbers have their greatest common divisor, a purely
 * linear cost that of the lengths times the coefficient. */
static double find_grain(const bal_model *model, const ovlm_balance_problem *p,
                         const bal_part *part)
{
    const ovlm_batch_cost *c = &p->cost;
    bool linear = p->item_cost == NULL && c->quadratic <= 0 && c->per_item <= 0 && c->linear > 0;
    int64_t divisor = 0;
    if (linear) {
        for (int64_t i = 0; i < part->n_items && divisor != 1; i++) {
            divisor = gcd(p->lengths[part_item(part, i)], divisor);
        }
        return c->linear * (double)divisor;
    }
    for (int64_t u = 0; u < model->n_units && divisor != 1; u++) {
        divisor = gcd((int64_t)model->a[u], divisor);
    }
    return (double)divisor;
}

/* Of values >= 0. */
static bool is_whole(double value)
{
    return value < 0x1p53 && value <= (double)(int64_t)value;
}

/* Additive costs that are whole numbers, with exact sums. */
static bool whole_costs(const bal_model *model, const ovlm_balance_problem *p)
{
    const ovlm_batch_cost *c = &p->cost;
    bool whole = model->total < 0x1p53;
    if (p->item_cost == NULL && is_whole(c->per_item) && is_whole(c->linear) &&
        c->quadratic <= 0) {
        return whole;
    }
    for (int64_t u = 0; u < model->n_units && whole; u++) {
        whole = is_whole(model->a[u]);
    }
    return whole;
}

/* Loads that are whole numbers, up to `worst`. */
static bool whole_loads(const bal_model *model, const ovlm_balance_problem *p, double worst)
{
    bool whole = whole_costs(model, p) && model->speed == NULL && worst < 0x1p52 &&
                 is_whole(model->fixed) && is_whole(model->padded_linear) &&
                 is_whole(model->padded_quadratic);
    for (int64_t r = 0; whole && r < model->n_ranks; r++) {
        whole = bal_base(model, r) < 0x1p52 && is_whole(bal_base(model, r));
    }
    return whole;
}

/* One unit per item, which has nothing but a cost and a length: the usual case, without a branch
 * per item. */
static void fill_plain(bal_model *model, const ovlm_balance_problem *p, int64_t n)
{
    for (int64_t i = 0; i < n && p->item_cost != NULL; i++) {
        model->a[i] = p->item_cost[i];
    }
    for (int64_t i = 0; i < n && p->item_cost == NULL; i++) {
        model->a[i] = item_additive(p, i);
    }
    if (model->len != NULL) {
        memcpy(model->len, p->lengths, (size_t)n * sizeof *model->len);
    }
}

static ovlm_status fill(bal_model *model, const ovlm_balance_problem *p, const bal_part *part,
                        ovlm_err *err)
{
    double longest = 0;
    if (part->item == NULL && model->unit_of == NULL && model->size == NULL && model->pin == NULL) {
        fill_plain(model, p, part->n_items);
    } else {
        for (int64_t i = 0; i < part->n_items; i++) {
            int64_t u = model->unit_of != NULL ? model->unit_of[i] : i;
            OVLM_TRY(add_item(model, p, part, part_item(part, i), u, err));
        }
    }
    for (int64_t u = 0; u < model->n_units; u++) {
        model->total += model->a[u];
    }
    for (int64_t u = 0; u < model->n_units && model->len != NULL; u++) {
        double h = (double)model->len[u];
        longest = h > longest ? h : longest;
    }
    double worst = model->fixed + model->total + (double)part->n_items * longest *
                   (model->padded_linear + model->padded_quadratic * longest);
    for (int64_t r = 0; r < part->n_ranks; r++) {
        /* Half of the range: sums over ranks and squares of roots must stay finite too. */
        if (!(bal_base(model, r) + worst / bal_speed(model, r) < DBL_MAX / 1e10)) {
            return OVLM_FAIL(err, OVLM_E_ARG, "the cost of all items on rank %lld overflows",
                             (long long)(part->first_rank + r));
        }
    }
    /* sums of n terms, then a handful of operations: each off by 2^-53 at most */
    model->down = whole_loads(model, p, worst) ? 1 : 1 - (double)(part->n_items + 64) * 0x1p-52;
    return OVLM_OK;
}

/* Counting arguments that show at once that no plan exists. */
static ovlm_status check_fit(const bal_model *model, const bal_part *part, ovlm_err *err)
{
    int64_t largest = model->capacity != NULL ? 0 : INT64_MAX;
    double room = 0, need = 0;
    if (model->capacity == NULL && model->count == NULL) {
        return OVLM_OK; /* an item alone, and max_items >= 1 where there are items */
    }
    for (int64_t r = 0; model->capacity != NULL && r < model->n_ranks; r++) {
        largest = model->capacity[r] > largest ? model->capacity[r] : largest;
        room += (double)model->capacity[r];
    }
    for (int64_t u = 0; u < model->n_units; u++) {
        need += (double)bal_size(model, u);
        if (bal_size(model, u) > largest || bal_count(model, u) > model->max_items) {
            int64_t i = model->unit_of != NULL ? 0 : u;
            while (model->unit_of != NULL && model->unit_of[i] != u) {
                i++;
            }
            return OVLM_FAIL(err, OVLM_E_ARG,
                             "item %lld%s (size %lld, %lld items) fits on no rank: capacity is at "
                             "most %lld, max_items %lld",
                             (long long)part_item(part, i),
                             model->unit_of != NULL ? " with those kept together" : "",
                             (long long)bal_size(model, u), (long long)bal_count(model, u),
                             (long long)largest, (long long)model->max_items);
        }
    }
    if (model->capacity != NULL && need > room) {
        return OVLM_FAIL(err, OVLM_E_ARG, "sizes sum to %.0f but capacities only to %.0f", need,
                         room);
    }
    return OVLM_OK;
}

/* All ranks alike, nothing pinned: names of ranks are interchangeable. */
static bool is_uniform(const bal_model *model)
{
    bool same = model->base_load == NULL && model->speed == NULL && model->pin == NULL;
    for (int64_t r = 1; model->capacity != NULL && same && r < model->n_ranks; r++) {
        same = model->capacity[r] == model->capacity[0];
    }
    return same;
}

ovlm_status bal_model_init(bal_model *model, const ovlm_balance_problem *p, const bal_part *part,
                           ovlm_arena *arena, ovlm_err *err)
{
    bool by_item = p->item_cost != NULL;
    *model = (bal_model){
        .n = part->n_items,
        .n_ranks = part->n_ranks,
        .fixed = by_item ? 0 : p->cost.fixed,
        .padded_linear = by_item ? 0 : p->cost.padded_linear,
        .padded_quadratic = by_item ? 0 : p->cost.padded_quadratic,
        .base_load = p->base_load != NULL ? p->base_load + part->first_rank : NULL,
        .speed = p->speed != NULL ? p->speed + part->first_rank : NULL,
        .capacity = p->capacity != NULL ? p->capacity + part->first_rank : NULL,
        .min_items = p->min_items,
        .max_items = p->max_items < 0 ? part->n_items : p->max_items,
        .node_size = p->node_size,
    };
    if (p->min_items > part->n_items / part->n_ranks ||
        (part->n_items > 0 && model->max_items <= (part->n_items - 1) / part->n_ranks)) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "%lld items on %lld ranks cannot have between %lld and %lld each",
                         (long long)part->n_items, (long long)part->n_ranks,
                         (long long)model->min_items, (long long)model->max_items);
    }
    model->padded = model->padded_linear > 0 || model->padded_quadratic > 0;
    OVLM_TRY(make_units(model, p, part, arena, err));
    OVLM_TRY(new_arrays(model, p, arena, err));
    OVLM_TRY(fill(model, p, part, err));
    OVLM_TRY(check_fit(model, part, err));
    if (model->home != NULL) {
        OVLM_TRY(find_homes(model, p, part, arena, err));
    }
    OVLM_TRY(sort_units(model, p, part, arena, err));
    const ovlm_batch_cost *c = &p->cost;
    bool linear = !by_item && c->quadratic <= 0 && c->per_item <= 0;
    model->grain = linear || whole_costs(model, p) ? find_grain(model, p, part) : 0;
    model->uniform = is_uniform(model);
    return OVLM_OK;
}
