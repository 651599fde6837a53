/* balance_exact.c - branch and bound over units, largest first.
 *
 * Loads only grow along a branch, so one at or above the best known ends it; of empty ranks that
 * are alike only the first is tried.  With a limit on the loads the same search minimises traffic,
 * which grows along a branch too. */
#include "plan/balance_parts.h"

#include <math.h>

typedef struct exact {
    bal_search *search;
    bal_plan now, best;
    int64_t *order;      /* pinned units first, then largest first                             */
    double limit;        /* loads stay at or below; HUGE_VAL: minimise the largest load        */
    double best_max;     /* loads must stay below                                              */
    bal_traffic traffic, best_traffic;
    int64_t left, owed;  /* items not placed; items owed to ranks below min_items              */
    int64_t last_work;   /* stop when the meter gets here                                      */
    bool found, stopped;
} exact;

/* What moving unit u to rank r adds. */
static bal_traffic move_traffic(const bal_model *model, int64_t u, int64_t r)
{
    bal_traffic t = {0, 0};
    if (model->home != NULL && model->home[u] != r) {
        t.rank_bytes = (double)model->bytes[u];
        t.node_bytes = model->home[u] / model->node_size != r / model->node_size ? t.rank_bytes : 0;
    }
    return t;
}

bal_traffic bal_traffic_of(const bal_model *model, const bal_plan *plan)
{
    bal_traffic sum = {0, 0};
    for (int64_t u = 0; model->home != NULL && u < model->n_units; u++) {
        bal_traffic t = move_traffic(model, u, plan->rank[u]);
        sum.node_bytes += t.node_bytes;
        sum.rank_bytes += t.rank_bytes;
    }
    return sum;
}

/* An earlier empty rank that is like r in every way. */
static bool has_empty_twin(const exact *x, int64_t r)
{
    const bal_model *model = x->search->model;
    if (x->now.count[r] > 0 || model->pin != NULL || x->limit < HUGE_VAL) {
        return false;
    }
    for (int64_t s = 0; s < r; s++) {
        bool alike = bal_base(model, s) <= bal_base(model, r) &&
                     bal_base(model, s) >= bal_base(model, r) &&
                     bal_speed(model, s) <= bal_speed(model, r) &&
                     bal_speed(model, s) >= bal_speed(model, r) &&
                     bal_capacity(model, s) == bal_capacity(model, r);
        if (x->now.count[s] == 0 && alike) {
            return true;
        }
    }
    return false;
}

static void keep_best(exact *x)
{
    const bal_model *model = x->search->model;
    double max = 0;
    for (int64_t r = 0; r < model->n_ranks; r++) {
        max = x->now.load[r] > max ? x->now.load[r] : max;
    }
    x->found = true;
    x->best_max = x->limit < HUGE_VAL ? x->best_max : max;
    x->best_traffic = x->traffic;
    bal_plan_copy(model, &x->best, &x->now);
}

static void place(exact *x, int64_t depth);

/* Tries unit u on rank r; restores everything afterwards. */
static void branch(exact *x, int64_t depth, int64_t u, int64_t r)
{
    const bal_model *model = x->search->model;
    bal_plan *now = &x->now;
    double add = now->add[r], load = now->load[r];
    int64_t count = now->count[r], len = now->len[r], size = now->size[r], owed = x->owed;
    bal_traffic traffic = x->traffic, more = move_traffic(model, u, r);
    int64_t lack = model->min_items - count, n = bal_count(model, u);
    bal_plan_put(model, now, u, r);
    x->left -= n;
    x->owed -= lack > n ? n : lack > 0 ? lack : 0;
    x->traffic.node_bytes += more.node_bytes;
    x->traffic.rank_bytes += more.rank_bytes;
    bool open = x->left >= x->owed;
    if (x->limit < HUGE_VAL) {
        open = open && bal_meets(now->load[r], x->limit) &&
               (!x->found || bal_traffic_less(x->traffic, x->best_traffic));
    } else {
        open = open && now->load[r] < x->best_max;
    }
    if (open) {
        place(x, depth + 1);
    }
    now->rank[u] = -1;
    now->add[r] = add;
    now->load[r] = load;
    now->count[r] = count;
    now->len[r] = len;
    now->size[r] = size;
    x->left += n;
    x->owed = owed;
    x->traffic = traffic;
}

/* Places the unit at this depth on every rank that may hold it, and all later units below. */
static void place(exact *x, int64_t depth)
{
    const bal_model *model = x->search->model;
    x->stopped = x->stopped || ovlm_meter_spend(x->search->meter, 1) ||
                 x->search->meter->work >= x->last_work;
    if (x->stopped) {
        return;
    }
    if (depth == model->n_units) {
        keep_best(x);
        return;
    }
    int64_t u = x->order[depth];
    /* the unit's home first: good traffic early prunes most */
    int64_t first = model->home != NULL ? model->home[u] : 0;
    for (int64_t i = 0; i < model->n_ranks && !x->stopped; i++) {
        int64_t r = (first + i) % model->n_ranks;
        bool met = x->found && x->limit >= HUGE_VAL && bal_meets(x->best_max, x->search->goal);
        if (!met && bal_admits(model, &x->now, u, r) && !has_empty_twin(x, r)) {
            branch(x, depth, u, r);
        }
    }
}

static ovlm_status exact_init(exact *x, ovlm_err *err)
{
    const bal_model *model = x->search->model;
    ovlm_arena *arena = x->search->arena;
    OVLM_TRY(bal_plan_init(&x->now, model, arena, err));
    OVLM_TRY(bal_plan_init(&x->best, model, arena, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &x->order, model->n_units, err));
    int64_t n = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t i = 0; i < model->n_units; i++) {
            if (bal_is_pinned(model, model->order[i]) == (pass == 0)) {
                x->order[n++] = model->order[i];
            }
        }
    }
    x->left = model->n;
    x->owed = model->min_items * model->n_ranks;
    return OVLM_OK;
}

ovlm_status bal_exact(bal_search *search, bal_plan *plan, double limit, int64_t max_work,
                      bool *found, bool *done, ovlm_err *err)
{
    const bal_model *model = search->model;
    ovlm_arena_mark mark = ovlm_arena_save(search->arena);
    int64_t work = search->meter->work;
    exact x = {.search = search,
               .limit = limit,
               .best_max = *found ? plan->max : HUGE_VAL,
               .last_work = max_work < INT64_MAX - work ? work + max_work : INT64_MAX};
    OVLM_TRY(exact_init(&x, err));
    if (*found && limit < HUGE_VAL) {
        x.found = true;
        x.best_traffic = bal_traffic_of(model, plan);
        bal_plan_copy(model, &x.best, plan);
    }
    place(&x, 0);
    if (x.found) {
        bal_plan_copy(model, plan, &x.best);
        *found = bal_plan_settle(model, plan);
    }
    *done = !x.stopped;
    ovlm_arena_rewind(search->arena, mark);
    return search->meter->interrupted ? OVLM_FAIL(err, OVLM_E_INTERRUPTED, "interrupted") : OVLM_OK;
}
