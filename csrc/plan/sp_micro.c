/* sp_micro.c - one micro-batch: from a time limit that fails to one that can be met. */
#include "plan/sp_micro.h"

#include <math.h>

#include "plan/sp_bound_line.h"
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

/* Where to start, with prices: the relaxation's bound or, where it is more, the plain one. */
static double find_floor(sp_pack *pack, const int64_t *k)
{
    sp_line_items items;
    sp_line_prices prices;
    sp_line_summarise(pack->model, k, pack->n, &items);
    double line = sp_line_bound(pack->model, &items, 1e-3, 2, &prices);
    double plain = sp_pack_floor(pack);
    if (line > plain && line < HUGE_VAL) {
        for (int64_t j = 0; j < pack->model->D; j++) {
            pack->theta[j] = prices.theta[j];
        }
        return line;
    }
    return plain;
}

/* What constructions have shown so far. */
typedef struct builder {
    sp_pack *pack;
    sp_saved *saved;
    double lack[2]; /* share of the GPUs missing with [by_ratio], at its last failure           */
} builder;

/* One construction, at the prices that the last one taught. */
static bool build_by(builder *b, double tau, bool by_ratio)
{
    int64_t work = 0;
    sp_fill_rule rule = {.by_ratio = by_ratio};
    if (sp_pack_build(b->pack, tau, &rule, &work)) {
        sp_saved_keep(b->saved, b->pack);
        b->lack[by_ratio] = 0;
        return true;
    }
    b->lack[by_ratio] = fmin(0.5, b->pack->pool_value / (double)b->pack->model->n_gpus);
    sp_pack_learn(b->pack);
    return false;
}

/* With the rule that came closer the last time, the other one, and the better one at new prices. */
static bool build(builder *b, double tau)
{
    bool by_ratio = b->lack[1] <= b->lack[0];
    return build_by(b, tau, by_ratio) || build_by(b, tau, !by_ratio) ||
           build_by(b, tau, b->lack[1] <= b->lack[0]);
}

/* Raises the limit by a part of what was missing until construction succeeds, then bisects: a
 * construction is a noisy test of a limit, so a few steps are all that pays. */
static void construct(sp_pack *pack, double floor_s, sp_saved *saved)
{
    builder b = {.pack = pack, .saved = saved};
    double fails = floor_s, tau = floor_s * 1.003;
    for (int round = 0; round < 200; round++) {
        sp_pack_clear(pack);
        bool possible = sp_pack_set_tau(pack, tau);
        double excess = possible ? pack->pool_value / (double)pack->model->n_gpus - 1 : 0.01;
        if (possible && excess <= 0 && build(&b, tau)) {
            break;
        }
        double lack = excess > 0 ? excess : fmin(b.lack[0], b.lack[1]);
        fails = tau;
        tau *= 1.003 + (round < 20 ? 0.5 * lack : 0.5);
    }
    for (int round = 0; round < 3 && saved->makespan > fails * 1.003; round++) {
        double middle = 0.5 * (fails + saved->makespan);
        if (!isfinite(middle) || !build(&b, middle)) {
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
    construct(&pack, find_floor(&pack, k), &saved);
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
    double floor_s = find_floor(&pack, k);
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
