/* balance_rebuild.c - additive costs: a few ranks are taken apart and refilled exactly.
 *
 * To bring the largest load down to a target T, a rank above T and some partners give up some of
 * their units each, and bin completion distributes the pool anew: this gets where single moves
 * and swaps stop.  T starts half way between the bound and the best and follows what succeeds.
 * When that fails for a while, the excess is also handed on: a different filling with the same
 * excess on another rank opens new neighbours. */
#include "plan/balance_complete.h"

enum { NODES = 600 }; /* search steps per attempt */

/* Ranks in no order; at[r] is r's place in the list, or -1. */
typedef struct rank_set {
    int64_t *list, *at, n;
} rank_set;

typedef struct rebuild {
    bal_search *search;
    bal_plan *plan;
    int64_t *head, *next;        /* [n_ranks], [n_units] units of each rank, -1 ends            */
    rank_set over, under;        /* ranks above the target; ranks with room                     */
    double target;
    bool gentle;                 /* with homes: few units, of ranks of one node, where possible */
    int64_t failed;              /* attempts in a row that changed nothing                      */
    bal_pool pool;
} rebuild;

/* Moves up to `most` units of bin j into the pool, evenly spread over its list. */
static void draw(rebuild *b, int j, int64_t most)
{
    const bal_model *model = b->search->model;
    bal_bin *bj = &b->pool.bin[j];
    int64_t n = 0, at = 0;
    for (int64_t u = b->head[bj->rank]; u >= 0; u = b->next[u]) {
        n++;
    }
    int64_t step = n <= most ? 1 : (n + most - 1) / most;
    int64_t skip = step > 1 ? ovlm_rng_below(&b->search->rng, step) : 0;
    *bj = (bal_bin){.rank = bj->rank};
    for (int64_t u = b->head[bj->rank]; u >= 0; u = b->next[u], at++) {
        if (at % step == skip && !bal_is_pinned(model, u) && b->pool.n_pool < BAL_POOL) {
            int k = b->pool.n_pool++;
            for (; k > 0 && b->pool.a[k - 1] < model->a[u]; k--) {
                b->pool.a[k] = b->pool.a[k - 1];
                b->pool.unit[k] = b->pool.unit[k - 1];
            }
            b->pool.a[k] = model->a[u];
            b->pool.unit[k] = u;
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
    for (int k = 0; k < b->pool.n_pool; k++) {
        need += b->pool.a[k];
    }
    for (int j = 0; j < b->pool.n_bins; j++) {
        int64_t r = b->pool.bin[j].rank;
        need += b->pool.bin[j].add + model->fixed + bal_base(model, r) * bal_speed(model, r);
        speed += bal_speed(model, r);
    }
    double even = need / speed;
    double target = b->target;
    if (even > target) {
        target = even + (largest - even) / 2;
    }
    for (int j = 0; j < b->pool.n_bins; j++) {
        double room = bal_room(model, b->pool.bin[j].rank, target * (1 + BAL_TOLERANCE / 2));
        b->pool.bin[j].room = room - b->pool.bin[j].add;
    }
    return target;
}

static void set_member(rank_set *set, int64_t r, bool is)
{
    if (is && set->at[r] < 0) {
        set->at[r] = set->n;
        set->list[set->n++] = r;
    } else if (!is && set->at[r] >= 0) {
        int64_t last = set->list[--set->n];
        set->list[set->at[r]] = last;
        set->at[last] = set->at[r];
        set->at[r] = -1;
    }
}

/* Files rank r by its load. */
static void classify(rebuild *b, int64_t r)
{
    set_member(&b->over, r, !bal_meets(b->plan->load[r], b->target));
    set_member(&b->under, r, b->plan->load[r] < b->target * (1 - BAL_TOLERANCE));
}

/* Takes the found distribution over, unless it is no better after all. */
static bool apply(rebuild *b, double limit)
{
    const bal_model *model = b->search->model;
    bal_plan *plan = b->plan;
    for (int j = 0; j < b->pool.n_bins; j++) {
        double add = b->pool.bin[j].add;
        int64_t count = b->pool.bin[j].count;
        for (int k = 0; k < b->pool.n_pool; k++) {
            add += b->pool.to[k] == j ? b->pool.a[k] : 0;
            count += b->pool.to[k] == j ? bal_count(model, b->pool.unit[k]) : 0;
        }
        if (!bal_meets(bal_load(model, b->pool.bin[j].rank, add, count, 0), limit)) {
            return false;
        }
    }
    for (int k = 0; k < b->pool.n_pool; k++) {
        int64_t from = plan->rank[b->pool.unit[k]];
        int64_t *link = &b->head[from];
        while (*link != b->pool.unit[k]) {
            link = &b->next[*link];
        }
        *link = b->next[b->pool.unit[k]];
    }
    for (int k = 0; k < b->pool.n_pool; k++) {
        int64_t u = b->pool.unit[k], r = b->pool.bin[b->pool.to[k]].rank;
        plan->rank[u] = r;
        b->next[u] = b->head[r];
        b->head[r] = u;
    }
    for (int j = 0; j < b->pool.n_bins; j++) {
        int64_t r = b->pool.bin[j].rank;
        plan->add[r] = 0;
        plan->count[r] = plan->size[r] = 0;
        for (int64_t u = b->head[r]; u >= 0; u = b->next[u]) {
            plan->add[r] += model->a[u];
            plan->count[r] += bal_count(model, u);
            plan->size[r] += bal_size(model, u);
        }
        plan->load[r] = bal_load(model, r, plan->add[r], plan->count[r], 0);
        classify(b, r);
    }
    return true;
}

/* A partner not yet in the set: the least loaded of some random ranks. -1: none found. */
static int64_t pick_partner(rebuild *b)
{
    const bal_model *model = b->search->model;
    ovlm_rng *rng = &b->search->rng;
    int64_t best = -1, tries = 1 + ovlm_rng_below(rng, 8);
    int64_t node = b->pool.bin[0].rank / model->node_size * model->node_size;
    int64_t node_end = node + model->node_size < model->n_ranks ? node + model->node_size
                                                                : model->n_ranks;
    bool near = b->gentle && ovlm_rng_below(rng, 8) != 0;
    /* without room somewhere in the set there is nothing to find */
    bool roomy = !near && b->pool.n_bins == 1 && b->under.n > 0 && ovlm_rng_below(rng, 4) != 0;
    for (int64_t t = 0; t < tries; t++) {
        int64_t r = near    ? node + ovlm_rng_below(rng, node_end - node)
                    : roomy ? b->under.list[ovlm_rng_below(rng, b->under.n)]
                            : ovlm_rng_below(rng, model->n_ranks);
        bool taken = false;
        for (int j = 0; j < b->pool.n_bins; j++) {
            taken = taken || b->pool.bin[j].rank == r;
        }
        if (!taken && (best < 0 || b->plan->load[r] < b->plan->load[best])) {
            best = r;
        }
    }
    return best;
}

/* A rank above the target and partners for it; returns the largest of their loads. */
static double pick_bins(rebuild *b)
{
    const bal_model *model = b->search->model;
    ovlm_rng *rng = &b->search->rng;
    int64_t most = model->n_units / model->n_ranks <= 4 ? BAL_BINS : 4;
    most = most < model->n_ranks ? most : model->n_ranks;
    int64_t want = 2 + ovlm_rng_below(rng, most - 1);
    b->pool.bin[0].rank = b->over.list[ovlm_rng_below(rng, b->over.n)];
    b->pool.n_bins = 1;
    double largest = b->plan->load[b->pool.bin[0].rank];
    for (int64_t i = 1; i < want; i++) {
        int64_t r = pick_partner(b);
        if (r >= 0) {
            b->pool.bin[b->pool.n_bins++].rank = r;
            largest = b->plan->load[r] > largest ? b->plan->load[r] : largest;
        }
    }
    return largest;
}

/* Permits one bin the present excess, but not the present filling: one neighbour of the largest
 * unit of the pool is banned from its bin. */
static void hand_on(rebuild *b, double largest)
{
    const bal_model *model = b->search->model;
    int j = ovlm_rng_below(&b->search->rng, 2) == 0 ? 0 : b->pool.n_bins - 1;
    b->pool.bin[j].room = bal_room(model, b->pool.bin[j].rank, largest * (1 + BAL_TOLERANCE / 2)) -
                     b->pool.bin[j].add;
    int64_t same = b->plan->rank[b->pool.unit[0]];
    for (int k = 1; k < b->pool.n_pool; k++) {
        if (b->plan->rank[b->pool.unit[k]] == same &&
            (b->pool.banned < 0 || ovlm_rng_below(&b->search->rng, 2) == 0)) {
            b->pool.banned = k;
        }
    }
}

/* One attempt; true when fewer ranks, or the same by less, are above the target. */
static bool attempt(rebuild *b)
{
    const bal_model *model = b->search->model;
    double largest = pick_bins(b);
    bool few = b->gentle && ovlm_rng_below(&b->search->rng, 4) != 0;
    b->pool.n_pool = 0;
    b->pool.banned = -1;
    for (int j = 0; j < b->pool.n_bins; j++) {
        draw(b, j, few ? 4 : BAL_POOL / b->pool.n_bins);
    }
    double limit = set_rooms(b, largest);
    bool whole = model->uniform;
    for (int j = 0; j < b->pool.n_bins; j++) {
        whole = whole && b->pool.bin[j].count == 0;
    }
    bool on = b->failed > 32 && b->failed % 2 == 0 && whole && b->pool.n_pool > 2;
    if (on) {
        hand_on(b, largest);
        limit = largest;
    }
    b->pool.nodes = NODES;
    bool found = bal_complete(&b->pool);
    b->search->meter->work += NODES - b->pool.nodes;
    return found && apply(b, limit) && !on;
}

/* Files all ranks by a new target. */
static void set_target(rebuild *b, double target)
{
    b->target = target;
    b->over.n = b->under.n = 0;
    for (int64_t r = 0; r < b->search->model->n_ranks; r++) {
        b->over.at[r] = b->under.at[r] = -1;
        classify(b, r);
    }
}

/* Works until no rank is above the target, the meter ends, or `patience` attempts in a row fail. */
static bool drive(rebuild *b, int64_t patience)
{
    b->failed = 0;
    while (b->over.n > 0) {
        if (ovlm_meter_spend(b->search->meter, 8) || b->failed > patience) {
            return false;
        }
        b->failed = attempt(b) ? 0 : b->failed + 1;
    }
    return true;
}

static ovlm_status rebuild_init(rebuild *b, bal_search *search, bal_plan *plan, ovlm_err *err)
{
    const bal_model *model = search->model;
    *b = (rebuild){.search = search, .plan = plan, .pool.model = model};
    OVLM_TRY(OVLM_ARENA_NEW(search->arena, &b->head, model->n_ranks, err));
    OVLM_TRY(OVLM_ARENA_RAW(search->arena, &b->next, model->n_units, err));
    OVLM_TRY(OVLM_ARENA_NEW(search->arena, &b->over.list, model->n_ranks, err));
    OVLM_TRY(OVLM_ARENA_NEW(search->arena, &b->over.at, model->n_ranks, err));
    OVLM_TRY(OVLM_ARENA_NEW(search->arena, &b->under.list, model->n_ranks, err));
    OVLM_TRY(OVLM_ARENA_NEW(search->arena, &b->under.at, model->n_ranks, err));
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
    if (model->n_ranks < 2 || model->n_units == 0 || ovlm_meter_spend(search->meter, 0)) {
        return OVLM_OK;
    }
    ovlm_arena_mark mark = ovlm_arena_save(search->arena);
    rebuild b;
    OVLM_TRY(rebuild_init(&b, search, plan, err));
    double best = plan->max, refused = search->goal;
    int64_t patience = 64 + 4 * model->n_ranks;
    bool at_goal = false;
    while (best > search->goal * (1 + BAL_ENOUGH) &&
           !ovlm_meter_spend(search->meter, model->n_ranks)) {
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
        if (best - refused < 0.02 * (best - search->goal)) {
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
    b.gentle = true;
    set_target(&b, target);
    (void)drive(&b, 256 + 16 * model->n_ranks);
    ovlm_arena_rewind(search->arena, mark);
    (void)bal_plan_settle(model, plan);
    return search->meter->interrupted ? OVLM_FAIL(err, OVLM_E_INTERRUPTED, "interrupted") : OVLM_OK;
}
