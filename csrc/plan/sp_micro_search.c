/* sp_micro_search.c - drives the time limit down (a dual approximation): at a limit below the best
 * makespan, groups lose items to the pool until they keep it; then pool items change places with
 * others and a few groups at a time are dissolved and rebuilt at random, until the pool is empty or
 * patience ends. */
#include "plan/sp_micro_search.h"

#include <math.h>
#include <string.h>

/* First step down, and how often patience doubles before the search gives up. */
#define SHARE 0.06
enum { ROUNDS = 8 };

/* Limits of a move: groups dissolved, pool items tried elsewhere after it; of an exchange: groups
 * looked at, and the items that such a group may have. */
enum { RUIN_GROUPS = 16, ABSORB = 8, EXCHANGE_GROUPS = 4, EXCHANGE_ITEMS = 64 };

typedef struct search {
    sp_pack *pack;
    ovlm_rng *rng;
    ovlm_meter *meter;
    sp_group undo[RUIN_GROUPS]; /* groups dissolved by the current move                        */
    int64_t undo_n, *undo_item; /* their items, one group after the other                      */
    int64_t into[ABSORB];       /* groups that took an item of the pool                        */
} search;

ovlm_status sp_saved_init(sp_saved *saved, const sp_pack *pack, ovlm_arena *arena, ovlm_err *err)
{
    *saved = (sp_saved){.makespan = HUGE_VAL};
    OVLM_TRY(OVLM_ARENA_NEW(arena, &saved->group, pack->max_groups, err));
    return OVLM_ARENA_NEW(arena, &saved->next, pack->n, err);
}

void sp_saved_keep(sp_saved *saved, const sp_pack *pack)
{
    memcpy(saved->group, pack->group, (size_t)pack->n_groups * sizeof *saved->group);
    memcpy(saved->next, pack->next, (size_t)pack->n * sizeof *saved->next);
    saved->n_groups = pack->n_groups;
    saved->makespan = sp_pack_makespan(pack);
}

void sp_saved_load(const sp_saved *saved, sp_pack *pack)
{
    sp_pack_clear(pack);
    memcpy(pack->group, saved->group, (size_t)saved->n_groups * sizeof *saved->group);
    memcpy(pack->next, saved->next, (size_t)pack->n * sizeof *saved->next);
    memset(pack->pool, 0, (size_t)(pack->words + (pack->words + 63) / 64) * sizeof *pack->pool);
    pack->n_groups = saved->n_groups;
    pack->pool_n = 0;
    pack->pool_value = pack->pool_s = 0;
    for (int64_t g = 0; g < saved->n_groups; g++) {
        pack->free_gpus -= pack->model->degree[saved->group[g].j];
    }
}

/* Dissolves group g and remembers it. */
static void ruin(search *s, int64_t g, int64_t *items)
{
    sp_pack *pack = s->pack;
    for (int64_t i = pack->group[g].head; i >= 0; i = pack->next[i]) {
        s->undo_item[(*items)++] = i;
    }
    s->undo[s->undo_n++] = pack->group[g];
    sp_pack_dissolve(pack, g);
}

/* Share of the group's GPUs that its content is not worth. */
static double waste(const sp_pack *pack, int64_t g)
{
    return 1 - pack->group[g].value / (double)pack->model->degree[pack->group[g].j];
}

/* The more wasteful of two. */
static int64_t wasteful_group(search *s)
{
    int64_t a = ovlm_rng_below(s->rng, s->pack->n_groups);
    int64_t b = ovlm_rng_below(s->rng, s->pack->n_groups);
    return waste(s->pack, a) > waste(s->pack, b) ? a : b;
}

/* At random, at least enough GPUs for the longest item of the pool. */
static int64_t ruin_some(search *s)
{
    sp_pack *pack = s->pack;
    int64_t items = 0, wanted = 1 + ovlm_rng_below(s->rng, 4);
    int64_t head = sp_pack_pool_next(pack, 0);
    int64_t gpus = pack->model->degree[pack->need_j[head]];
    s->undo_n = 0;
    while (s->undo_n < RUIN_GROUPS && pack->n_groups > 0 &&
           (s->undo_n < wanted || pack->free_gpus < gpus)) {
        ruin(s, wasteful_group(s), &items);
    }
    return items;
}

static void take_back(search *s, int64_t base, int64_t absorbed)
{
    sp_pack *pack = s->pack;
    while (absorbed > 0) {
        sp_pack_pop(pack, s->into[--absorbed]);
    }
    while (pack->n_groups > base) {
        sp_pack_dissolve(pack, pack->n_groups - 1);
    }
    int64_t items = 0;
    for (int64_t u = 0; u < s->undo_n; u++) {
        const sp_group *g = &s->undo[u];
        sp_fill old = {g->j, g->count, s->undo_item + items, g->sum_s, g->sum_s2, g->value};
        sp_pack_reopen(pack, &old);
        items += g->count;
    }
}

/* Ruin and rebuild; kept unless the pool becomes worth more by over a hundredth of a GPU. */
static void move(search *s)
{
    sp_pack *pack = s->pack;
    double before = pack->pool_value;
    int64_t work = 1 + ruin_some(s), base = pack->n_groups;
    /* One statement each: the order of draws in an initialiser is the compiler's choice. */
    sp_fill_rule rule = {.rng = s->rng};
    rule.by_ratio = ovlm_rng_below(s->rng, 4) > 0;
    rule.jitter = ovlm_rng_uniform(s->rng);
    rule.noise = ovlm_rng_below(s->rng, 8) == 0 ? 1.0 : 0.1 * ovlm_rng_uniform(s->rng);
    while (pack->pool_n > 0 && sp_pack_grow(pack, sp_pack_pool_next(pack, 0), &rule, &work)) {
        ;
    }
    int64_t absorbed = sp_pack_absorb(pack, ABSORB, s->into, &work);
    if (pack->pool_value > before + 0.01 * ovlm_rng_uniform(s->rng)) {
        take_back(s, base, absorbed);
    }
    ovlm_meter_spend(s->meter, work);
}

/* A random item of the pool takes the place of a less valuable one in some group. */
static void exchange(search *s)
{
    sp_pack *pack = s->pack;
    int64_t i = sp_pack_pool_next(pack, ovlm_rng_below(s->rng, pack->n)), work = 1;
    i = i < 0 ? sp_pack_pool_next(pack, 0) : i;
    double si = pack->s[i], best = 0;
    int64_t best_g = -1, best_before = -1;
    for (int64_t tries = 0; tries < EXCHANGE_GROUPS && pack->n_groups > 0; tries++) {
        int64_t g = ovlm_rng_below(s->rng, pack->n_groups), before = -1;
        sp_group rest = pack->group[g];
        if (si > (double)pack->model->cap[rest.j] || rest.count > EXCHANGE_ITEMS) {
            continue;
        }
        work += rest.count;
        for (int64_t o = rest.head; o >= 0; before = o, o = pack->next[o]) {
            double so = pack->s[o], gain = pack->value[i] - pack->value[o];
            sp_group without = rest;
            without.sum_s -= so;
            without.sum_s2 -= so * so;
            if (gain > best && sp_pack_fits(pack, &without, si)) {
                best = gain;
                best_g = g;
                best_before = before;
            }
        }
    }
    if (best_g >= 0) {
        sp_pack_remove(pack, best_g, best_before);
        sp_pack_insert(pack, best_g, i);
    }
    ovlm_meter_spend(s->meter, work);
}

/* Moves until the pool is empty, `patience` of them have not made it worth less, or the meter
 * stops. */
static void drive(search *s, int64_t patience)
{
    sp_pack *pack = s->pack;
    double best = pack->pool_value;
    int64_t left = patience;
    while (pack->pool_n > 0 && left-- > 0 && !ovlm_meter_spend(s->meter, 0)) {
        if (pack->n_groups > 0 && ovlm_rng_below(s->rng, 4) > 0) {
            exchange(s);
        } else {
            move(s);
        }
        if (pack->pool_value < best) {
            best = pack->pool_value;
            left = patience;
        }
    }
}

ovlm_status sp_micro_search(sp_pack *pack, sp_saved *saved, double floor_s, double target,
                            ovlm_meter *meter, ovlm_rng *rng, ovlm_arena *arena, ovlm_err *err)
{
    search s = {.pack = pack, .rng = rng, .meter = meter};
    OVLM_TRY(OVLM_ARENA_NEW(arena, &s.undo_item, pack->n, err));
    double share = SHARE; /* of the distance to the target, tried next */
    int64_t patience = 100 + pack->n / 5;
    target = target > floor_s ? target : floor_s;
    if (!isfinite(saved->makespan)) {
        /* Construction left a pool at a limit that only memory decides. */
        drive(&s, 100 * patience);
        if (pack->pool_n > 0) {
            return OVLM_OK;
        }
        sp_saved_keep(saved, pack);
    }
    for (int rounds = 0; rounds < ROUNDS && saved->makespan > target * (1 + 1e-9);) {
        sp_saved_load(saved, pack);
        bool possible = sp_pack_set_tau(pack, saved->makespan - share * (saved->makespan - target));
        if (possible) {
            drive(&s, patience);
        }
        if (possible && pack->pool_n == 0) {
            sp_saved_keep(saved, pack);
            share = share < 0.5 ? share * 1.5 : share;
        } else {
            share *= 0.5;
        }
        if (share < 1e-3) {
            share = SHARE;
            patience *= 2;
            rounds++;
        }
        if (ovlm_meter_spend(meter, 1 + pack->n / 4)) { /* loaded and valued anew */
            break;
        }
    }
    return OVLM_OK;
}
