/* sp_micro.c - one micro-batch: from a time limit that fails to one that can be met. */
#include "plan/sp_micro.h"

#include <math.h>
#include <string.h>

#include "plan/sp_bound_line.h"
#include "plan/sp_micro_search.h"

/* Up to this many items, where every one counts, other prices are worth a try in any case. */
enum { FEW = 512 };
/* Memory is to spare where the items take up to this share of it. */
#define SPARE 0.6

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
        /* A little short of memory is short of it in some group. */
        pack->timed = pack->pool_s < SPARE * sp_model_tokens(pack->model);
        for (int64_t j = 0; j < pack->model->D; j++) {
            pack->theta[j] = prices.theta[j];
            pack->timed = pack->timed && prices.theta[j] >= 1;
        }
        return line;
    }
    return plain;
}

static bool is_timed(const sp_pack *pack)
{
    return pack->timed && pack->n > FEW;
}

/* Constructions, one after the other. */
typedef struct builder {
    sp_pack *pack;
    sp_saved *saved;
    ovlm_meter *meter;
    bool searching;     /* the meter's work ends it too; construction proper only minds the clock */
    bool longest_first; /* the rule that came closer last time is not by ratio                   */
    double lack;        /* least share of the GPUs that was missing at this limit                */
    double fails, lack_there; /* the longest limit that failed, and what was missing             */
    double dear[SP_MAX_DEGREES], cheap[SP_MAX_DEGREES]; /* prices at which time was too ...       */
    bool has_dear, has_cheap;
} builder;

static bool must_stop(const builder *b)
{
    return b->searching ? ovlm_meter_spend(b->meter, 0) : ovlm_meter_expired(b->meter);
}

/* What is left over tells which resource was priced too low: long items are left when memory was
 * (short ones went beside others for it), short ones when time was. */
static void learn(builder *b, int round)
{
    sp_pack *pack = b->pack;
    int64_t degrees = pack->model->D;
    double time = 0, memory = 0;
    sp_pack_pool_load(pack, &time, &memory);
    memcpy(time > memory ? b->cheap : b->dear, pack->theta, sizeof b->dear);
    b->has_cheap = b->has_cheap || time > memory;
    b->has_dear = b->has_dear || time <= memory;
    double rate = 0.5 / (1 + 0.5 * round);
    if (time <= memory && !b->has_cheap) {
        sp_pack_learn(pack, rate);
        return;
    }
    for (int64_t j = 0; j < degrees; j++) {
        pack->theta[j] = b->has_dear && b->has_cheap ? 0.5 * (b->cheap[j] + b->dear[j])
                                                     : pack->theta[j] + rate * (1 - pack->theta[j]);
    }
}

static bool build_by(builder *b, double tau, bool longest_first)
{
    int64_t work = 0;
    sp_fill_rule rule = {.by_ratio = !longest_first};
    bool found = sp_pack_build(b->pack, tau, &rule, &work);
    if (found) {
        sp_saved_keep(b->saved, b->pack);
    }
    double lack = found ? 0 : b->pack->pool_value / (double)b->pack->model->n_gpus;
    if (lack < b->lack) {
        b->lack = lack;
        b->longest_first = longest_first;
    }
    (void)ovlm_meter_spend(b->meter, work);
    return found;
}

/* Up to `rounds` constructions at prices that each teaches the next, and one by the other rule.
 * Where memory binds nowhere there is nothing to learn, and long items are to be spread. */
static bool build(builder *b, double tau, int rounds)
{
    bool longest_first = b->longest_first;
    b->has_dear = b->has_cheap = false;
    b->lack = HUGE_VAL;
    if (is_timed(b->pack)) {
        return build_by(b, tau, true);
    }
    for (int round = 0; round < rounds; round++) {
        if (build_by(b, tau, longest_first)) {
            return true;
        }
        learn(b, round);
        if (must_stop(b)) {
            return false;
        }
    }
    return build_by(b, tau, !longest_first);
}

/* More than any plan takes: with this limit, memory alone decides. */
static double no_limit(const sp_pack *pack)
{
    const sp_model *m = pack->model;
    double sum = 0, sum2 = 0, longest = 0;
    for (int64_t i = 0; i < pack->n; i++) {
        sum += pack->s[i];
        sum2 += pack->s[i] * pack->s[i];
    }
    for (int64_t j = 0; j < m->D; j++) {
        longest = fmax(longest, m->quad[j] * sum2 + m->lin[j] * sum);
    }
    return longest * 1.001;
}

/* Raises the limit by a part of what was missing until construction succeeds; boldly when the clock
 * has run out or twenty steps have not helped.  In the end only memory counts. */
static void construct(builder *b, double floor_s)
{
    double tau = floor_s * 1.003;
    b->fails = floor_s;
    for (int round = 0; round < 20 && !must_stop(b); round++) {
        sp_pack_clear(b->pack);
        bool possible = sp_pack_set_tau(b->pack, tau);
        double excess = possible ? b->pack->pool_value / (double)b->pack->model->n_gpus - 1 : 0.01;
        if (possible && excess <= 0 && build(b, tau, 2)) {
            return;
        }
        double lack = excess > 0 ? excess : fmin(b->lack, 0.5);
        b->fails = is_timed(b->pack) ? tau : b->fails; /* else other prices may succeed there */
        b->lack_there = lack;
        tau *= 1.003 + 0.8 * lack;
    }
    for (double more = 0.02; more < 10; more *= 2) {
        if (build_by(b, tau * (1 + more), b->longest_first)) {
            return;
        }
    }
    for (int64_t j = 0; j < b->pack->model->D; j++) {
        b->pack->theta[j] = 0;
    }
    build_by(b, no_limit(b->pack), true);
}

/* Down towards the longest limit that failed: a construction is a noisy test of one, so few steps
 * pay.  Where time alone counts, what it lacked there says where it may succeed. */
static void refine(builder *b, int steps, int rounds)
{
    bool timed = is_timed(b->pack);
    double tell = timed ? 1.0003 : 1.003; /* limits this close are not told apart */
    steps = timed ? 3 * steps : steps;    /* each is one construction */
    while (steps-- > 0 && isfinite(b->saved->makespan) &&
           b->saved->makespan > b->fails * tell && !must_stop(b)) {
        double middle = 0.5 * (b->fails + b->saved->makespan);
        double likely = b->fails * (1 + 1.2 * b->lack_there);
        double tau = timed && likely > b->fails * tell && likely < middle ? likely : middle;
        if (!build(b, tau, rounds)) {
            b->fails = tau;
            b->lack_there = b->lack;
        }
    }
}

/* From nothing; returns the floor. */
static double start(builder *b, const int64_t *k)
{
    double floor_s = find_floor(b->pack, k);
    construct(b, floor_s);
    refine(b, 3, 2);
    return floor_s;
}

ovlm_status sp_micro_construct(const sp_model *model, const int64_t *k, int64_t n_items,
                               ovlm_meter *meter, sp_micro *micro, ovlm_arena *arena,
                               ovlm_err *err)
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
    builder b = {.pack = &pack, .saved = &saved, .meter = meter};
    start(&b, k);
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
    double floor_s;
    if (isfinite(micro->makespan)) {
        read_plan(micro, k, &pack, &saved);
        sp_saved_load(&saved, &pack);
        pack.tau = saved.makespan;
        sp_pack_learn(&pack, 0.5);
        floor_s = sp_pack_floor(&pack);
    } else {
        builder b = {.pack = &pack, .saved = &saved, .meter = meter};
        floor_s = start(&b, k);
        b.searching = true;
        refine(&b, 6, 6);
    }
    OVLM_GOTO(done, sp_micro_search(&pack, &saved, floor_s, target, meter, rng, arena, err));
    write_plan(&saved, k, micro);
done:
    ovlm_arena_rewind(arena, mark);
    return status;
}
