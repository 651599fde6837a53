/* sp_micro.c - one micro-batch: from a time limit that fails to one that can be met. */
#include "plan/sp_micro.h"

#include <math.h>

#include "plan/sp_micro_search.h"

ovlm_status sp_micro_init(sp_micro *micro, int64_t n_items, ovlm_arena *arena, ovlm_err *err)
{
    *micro = (sp_micro){.makespan = HUGE_VAL};
    OVLM_TRY(OVLM_ARENA_NEW(arena, &micro->j, 3 * n_items + 1, err));
    micro->start = micro->j + n_items;
    micro->item = micro->start + n_items + 1;
    return OVLM_OK;
}

/* The groups kept as a plan, in the caller's item numbers. */
static void write_plan(const sp_saved *saved, const int64_t *k, sp_micro *micro)
{
    int64_t at = 0;
    micro->n_groups = saved->n_groups;
    micro->makespan = saved->makespan;
    for (int64_t g = 0; g < saved->n_groups; g++) {
        micro->j[g] = saved->group[g].j;
        micro->start[g] = at;
        for (int64_t i = saved->group[g].head; i >= 0; i = saved->next[i]) {
            micro->item[at++] = k[i];
        }
    }
    micro->start[saved->n_groups] = at;
}

/* Where k holds `item`; k ascends. */
static int64_t find_item(const int64_t *k, int64_t n, int64_t item)
{
    int64_t low = 0;
    while (n > 1) {
        int64_t half = n / 2;
        low = k[low + half] <= item ? low + half : low;
        n -= half;
    }
    return low;
}

static void read_plan(const sp_micro *micro, const int64_t *k, const sp_pack *pack, sp_saved *saved)
{
    saved->n_groups = micro->n_groups;
    saved->makespan = micro->makespan;
    for (int64_t g = 0; g < micro->n_groups; g++) {
        sp_group group = {.j = micro->j[g], .head = -1};
        for (int64_t a = micro->start[g + 1] - 1; a >= micro->start[g]; a--) {
            int64_t i = find_item(k, pack->n, micro->item[a]);
            saved->next[i] = group.head;
            group.head = i;
            group.count++;
            group.sum_s += pack->s[i];
            group.sum_s2 += pack->s[i] * pack->s[i];
        }
        saved->group[g] = group;
    }
}

/* A few constructions, each at prices that the last one taught; the first that succeeds. */
static bool build(sp_pack *pack, double tau, sp_saved *saved)
{
    int64_t work = 0;
    for (int round = 0; round < 4; round++) {
        sp_fill_rule rule = {.by_ratio = round != 1};
        if (sp_pack_build(pack, tau, &rule, &work)) {
            sp_saved_keep(saved, pack);
            return true;
        }
        sp_pack_learn(pack);
    }
    return false;
}

/* Doubles the distance to the floor until construction succeeds, then bisects: a construction is a
 * noisy test of a limit, so a few steps are all that pays. */
static void construct(sp_pack *pack, double floor_s, sp_saved *saved)
{
    double fails = floor_s, step = 0.01 * floor_s;
    for (int round = 0; round < 40 && !build(pack, floor_s + step, saved); round++) {
        fails = floor_s + step;
        step *= 2;
    }
    for (int round = 0; round < 4 && saved->makespan > fails * 1.002; round++) {
        double middle = 0.5 * (fails + saved->makespan);
        if (!isfinite(middle) || !build(pack, middle, saved)) {
            fails = middle;
        }
    }
}

ovlm_status sp_micro_construct(const sp_model *model, const int64_t *k, int64_t n_items,
                               sp_micro *micro, ovlm_arena *arena, ovlm_err *err)
{
    ovlm_status status = OVLM_OK;
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    sp_pack pack;
    sp_saved saved;
    micro->n_groups = 0;
    micro->makespan = n_items == 0 ? 0 : HUGE_VAL;
    if (n_items == 0) {
        return OVLM_OK;
    }
    OVLM_GOTO(done, sp_pack_init(&pack, model, k, n_items, arena, err));
    OVLM_GOTO(done, sp_saved_init(&saved, &pack, arena, err));
    construct(&pack, sp_pack_floor(&pack), &saved);
    write_plan(&saved, k, micro);
done:
    ovlm_arena_rewind(arena, mark);
    return status;
}

ovlm_status sp_micro_solve(const sp_model *model, const int64_t *k, int64_t n_items, double target,
                           ovlm_meter *meter, ovlm_rng *rng, sp_micro *micro, ovlm_arena *arena,
                           ovlm_err *err)
{
    ovlm_status status = OVLM_OK;
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    sp_pack pack;
    sp_saved saved;
    if (n_items == 0) {
        micro->n_groups = 0;
        micro->makespan = 0;
        return OVLM_OK;
    }
    OVLM_GOTO(done, sp_pack_init(&pack, model, k, n_items, arena, err));
    OVLM_GOTO(done, sp_saved_init(&saved, &pack, arena, err));
    double floor_s = sp_pack_floor(&pack);
    if (isfinite(micro->makespan)) {
        read_plan(micro, k, &pack, &saved);
    } else {
        construct(&pack, floor_s, &saved);
    }
    OVLM_GOTO(done, sp_micro_search(&pack, &saved, floor_s, target, meter, rng, arena, err));
    write_plan(&saved, k, micro);
done:
    ovlm_arena_rewind(arena, mark);
    return status;
}
