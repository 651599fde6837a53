/* sp_micro_search.c - drives the time limit down: at a limit below the best makespan the groups that
 * break it fall into the pool, and a few groups at a time are dissolved and rebuilt at random, until
 * the pool is empty or patience ends. */
#include "plan/sp_micro_search.h"

#include <math.h>
#include <string.h>

enum { RUIN_GROUPS = 16, ABSORB = 8 };

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
        ruin(s, ovlm_rng_below(s->rng, pack->n_groups), &items);
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
        sp_fill old = {g->j, g->count, s->undo_item + items, g->sum_s, g->sum_s2, 0};
        sp_pack_reopen(pack, &old);
        items += g->count;
    }
}

/* One move; the pool never becomes worth more. */
static void move(search *s)
{
    sp_pack *pack = s->pack;
    double before = pack->pool_value;
    int64_t work = 1 + ruin_some(s), base = pack->n_groups;
    sp_fill_rule rule = {.by_ratio = ovlm_rng_below(s->rng, 4) > 0,
                         .jitter = ovlm_rng_uniform(s->rng),
                         .noise = 0.1 * ovlm_rng_uniform(s->rng),
                         .rng = s->rng};
    while (pack->pool_n > 0 && sp_pack_grow(pack, &rule, &work)) {
        ;
    }
    int64_t absorbed = sp_pack_absorb(pack, ABSORB, s->into);
    if (pack->pool_value > before) {
        take_back(s, base, absorbed);
    }
    ovlm_meter_spend(s->meter, work);
}

ovlm_status sp_micro_search(sp_pack *pack, sp_saved *saved, double floor_s, double target,
                            ovlm_meter *meter, ovlm_rng *rng, ovlm_arena *arena, ovlm_err *err)
{
    search s = {.pack = pack, .rng = rng, .meter = meter};
    OVLM_TRY(OVLM_ARENA_NEW(arena, &s.undo_item, pack->n, err));
    double share = 0.25; /* of the distance to the floor, tried next */
    target = target > floor_s ? target : floor_s;
    while (saved->makespan > target * (1 + 1e-9) && share > 1e-4 && !ovlm_meter_spend(meter, 1)) {
        double tau = saved->makespan - share * (saved->makespan - target);
        sp_saved_load(saved, pack);
        if (!sp_pack_set_tau(pack, tau)) {
            share *= 0.5;
            continue;
        }
        int64_t patience = 200 + 4 * pack->n;
        while (pack->pool_n > 0 && patience-- > 0 && !ovlm_meter_spend(meter, 0)) {
            move(&s);
        }
        if (pack->pool_n == 0) {
            sp_saved_keep(saved, pack);
            share = share < 0.5 ? share * 1.5 : share;
        } else {
            share *= 0.5;
        }
    }
    return OVLM_OK;
}
