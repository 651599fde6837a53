/* sp_micro.c - one micro-batch: from a time limit that fails to one that can be met. */
#include "plan/sp_micro.h"

#include <math.h>
#include <string.h>

#include "plan/sp_pack.h"

ovlm_status sp_micro_init(sp_micro *micro, int64_t n_items, ovlm_arena *arena, ovlm_err *err)
{
    *micro = (sp_micro){.makespan = HUGE_VAL};
    OVLM_TRY(OVLM_ARENA_NEW(arena, &micro->j, 3 * n_items + 1, err));
    micro->start = micro->j + n_items;
    micro->item = micro->start + n_items + 1;
    return OVLM_OK;
}

/* The packed groups as a plan, items of a group in descending length. */
static void write_plan(const sp_pack *pack, const int64_t *k, sp_micro *micro)
{
    int64_t at = 0;
    micro->n_groups = pack->n_groups;
    micro->makespan = sp_pack_makespan(pack);
    for (int64_t g = 0; g < pack->n_groups; g++) {
        micro->j[g] = pack->group[g].j;
        micro->start[g] = at;
        for (int64_t i = pack->group[g].head; i >= 0; i = pack->next[i]) {
            micro->item[at++] = k[i];
        }
    }
    micro->start[pack->n_groups] = at;
}

/* Either way of filling; the first that succeeds. */
static bool build(sp_pack *pack, double tau)
{
    int64_t work = 0;
    for (int by_ratio = 1; by_ratio >= 0; by_ratio--) {
        sp_fill_rule rule = {.by_ratio = by_ratio != 0};
        if (sp_pack_build(pack, tau, &rule, &work)) {
            return true;
        }
    }
    return false;
}

/* Doubles the distance to the floor until construction succeeds, then bisects: a construction is a
 * noisy test of a limit, so a few steps are all that pays. */
static bool construct(sp_pack *pack, double floor_s, const int64_t *k, sp_micro *micro)
{
    double fails = floor_s, step = 0.01 * floor_s;
    bool found = false;
    for (int round = 0; round < 40 && !found; round++, step *= 2) {
        found = build(pack, floor_s + step);
        fails = found ? fails : floor_s + step;
    }
    if (!found) {
        return false;
    }
    write_plan(pack, k, micro);
    for (int round = 0; round < 4 && micro->makespan > fails * 1.002; round++) {
        double middle = 0.5 * (fails + micro->makespan);
        if (build(pack, middle)) {
            write_plan(pack, k, micro);
        } else {
            fails = middle;
        }
    }
    return true;
}

ovlm_status sp_micro_construct(const sp_model *model, const int64_t *k, int64_t n_items,
                               sp_micro *micro, ovlm_arena *arena, ovlm_err *err)
{
    ovlm_status status = OVLM_OK;
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    sp_pack pack;
    micro->n_groups = 0;
    micro->makespan = n_items == 0 ? 0 : HUGE_VAL;
    if (n_items == 0) {
        return OVLM_OK;
    }
    OVLM_GOTO(done, sp_pack_init(&pack, model, k, n_items, arena, err));
    construct(&pack, sp_pack_floor(&pack), k, micro);
done:
    ovlm_arena_rewind(arena, mark);
    return status;
}
