/* sp_levels.c - whole steps built from nothing, towards a target time of each micro-batch.
 *
 * A micro-batch is as long as its longest group.  With hundreds of groups in each, no small change
 * shortens it: all of its longest groups would have to shrink at once.  So the search is over the
 * few target times instead.  For each vector of targets every item, longest first, goes where it
 * wastes least while using up to the targets costs nothing; what does not fit makes some
 * micro-batch longer than asked for, and the times that come out are the next vector's start. */
#include "plan/sp_levels.h"

#include "plan/sp_repair.h"

enum { CLIMBS = 2, MOST_CHANGED = 3, MOST_LOOKED = 32 };

static const sp_taste first_taste = {.excess = 0.6, .balance = 0.3, .fit = 0.05, .blink = 0.02};

/* A hill climb over the targets of a fixed number of micro-batches. */
typedef struct climb {
    const sp_model *model;
    sp_step step;
    sp_draft *best;
    double best_cost;  /* HUGE_VAL before the first build; with a penalty where items are left  */
    double *level;     /* [n_boxes] seconds: the best build's                                   */
    double *trial;     /* [n_boxes] targets now                                                 */
    int64_t *item;     /* [n] 0..n-1                                                            */
    sp_taste taste;    /* the best build's                                                      */
    ovlm_rng rng;
} climb;

/* Makespans of the draft without fixed, descending, the `count` longest; 0 beyond the draft's. */
static void draft_levels(const sp_model *model, const sp_draft *draft, int64_t count,
                         double *level)
{
    for (int64_t m = 0; m < draft->n_micro; m++) {
        double makespan = 0;
        for (int64_t g = draft->micro_start[m]; g < draft->micro_start[m + 1]; g++) {
            double time = 0;
            for (int64_t i = draft->start[g]; i < draft->start[g + 1]; i++) {
                time += sp_item_time(model, draft->item[i], draft->j[g]);
            }
            makespan = time > makespan ? time : makespan;
        }
        int64_t at = m < count ? m : count;
        for (; at > 0 && level[at - 1] < makespan; at--) {
            if (at < count) {
                level[at] = level[at - 1];
            }
        }
        if (at < count) {
            level[at] = makespan;
        }
    }
}

static ovlm_status climb_init(climb *c, const sp_model *model, const sp_draft *from,
                              int64_t n_boxes, sp_draft *into, uint64_t seed, ovlm_arena *arena,
                              ovlm_err *err)
{
    *c = (climb){.model = model, .best = into, .best_cost = HUGE_VAL, .taste = first_taste};
    ovlm_rng_init(&c->rng, seed);
    OVLM_TRY(sp_draft_init(into, model->n, arena, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &c->level, n_boxes, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &c->trial, n_boxes, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &c->item, model->n, err));
    for (int64_t k = 0; k < model->n; k++) {
        c->item[k] = k;
    }
    draft_levels(model, from, n_boxes, c->level);
    return sp_step_init(&c->step, model, n_boxes, arena, err);
}

/* value times 1 - width*above .. 1 + width*(1 - above). */
static double nudge(climb *c, double value, double width, double above)
{
    return value * (1 + width * (ovlm_rng_uniform(&c->rng) - above));
}

/* A few targets changed, rather downwards: builds overshoot.  Sometimes another taste. */
static sp_taste propose(climb *c)
{
    int64_t n_boxes = c->step.n_boxes;
    sp_taste taste = c->taste;
    for (int64_t box = 0; box < n_boxes; box++) {
        c->trial[box] = c->level[box];
    }
    taste.floor_s = c->trial;
    if (!isfinite(c->best_cost)) {
        return taste;
    }
    double width = ovlm_rng_uniform(&c->rng) < 0.5 ? 0.05 : 0.2;
    for (int64_t left = 1 + ovlm_rng_below(&c->rng, MOST_CHANGED); left > 0; left--) {
        int64_t box = ovlm_rng_below(&c->rng, n_boxes);
        c->trial[box] = nudge(c, c->trial[box], width, 0.55);
    }
    double *part[] = {&taste.excess, &taste.balance, &taste.fit, &taste.blink};
    for (int i = 0; i < 4; i++) {
        if (ovlm_rng_uniform(&c->rng) < 0.3) {
            *part[i] = nudge(c, *part[i], 0.8, 0.5);
        }
    }
    return taste;
}

/* One build; keeps it when it is the best. */
static ovlm_status build(climb *c, int64_t *looked, ovlm_err *err)
{
    sp_step *step = &c->step;
    sp_draft nothing = {.time_s = HUGE_VAL};
    sp_taste taste = propose(c);
    OVLM_TRY(sp_step_load(step, &nothing, err));
    OVLM_TRY(sp_step_reserve(step, 2 * c->model->n + step->n_boxes, err));
    *looked = sp_repair(step, c->item, c->model->n, &taste, &c->rng);
    double cost = sp_step_cost(step);
    sp_step_commit(step);
    if (cost < c->best_cost) {
        c->best_cost = cost;
        c->taste = taste;
        for (int64_t box = 0; box < step->n_boxes; box++) {
            c->level[box] = step->tau[box];
        }
        sp_step_store(step, c->best);
    }
    return OVLM_OK;
}

/* Seconds that one build takes, by the groups that it looks at: up to MOST_LOOKED in each box. */
static double build_s(const climb *c)
{
    int64_t looked = c->step.box_slots < MOST_LOOKED ? c->step.box_slots : MOST_LOOKED;
    return 1.5e-9 * (double)c->model->n * (double)c->step.n_boxes * (double)looked;
}

static ovlm_status run(climb *c, double share, sp_purse *purse, ovlm_err *err)
{
    ovlm_meter part = sp_purse_part(purse, share);
    ovlm_status status = OVLM_OK;
    int64_t looked = 0;
    while (status == OVLM_OK && !ovlm_meter_spend(&part, 1 + looked / 128)) {
        /* A build does not mind the clock; the first one is worth most of what is left. */
        double left_s = isfinite(c->best_cost) ? ovlm_meter_left_s(&part)
                                               : 0.7 * ovlm_meter_left_s(&purse->meter);
        if (build_s(c) > left_s) {
            part.cut_short = true;
            break;
        }
        status = build(c, &looked, err);
    }
    (void)sp_purse_absorb(purse, &part);
    return status;
}

/* Whether n_boxes micro-batches could hold all tokens. */
static bool holds(const sp_model *model, int64_t n_boxes)
{
    double per_gpu = 0;
    for (int64_t j = 0; j < model->D; j++) {
        double tokens = (double)model->cap[j] / (double)model->degree[j];
        per_gpu = tokens > per_gpu ? tokens : per_gpu;
    }
    return model->sum_s[model->n] <= per_gpu * (double)model->n_gpus * (double)n_boxes;
}

ovlm_status sp_levels_improve(const sp_model *model, sp_chunked *starts, int64_t n_micro,
                              double share, uint64_t seed, sp_purse *purse, ovlm_arena *arena,
                              ovlm_err *err)
{
    ovlm_status status = OVLM_OK;
    climb climbs[CLIMBS];
    int64_t count = 0;
    /* Built groups are placed only where any set of them can be. */
    if (starts->n_drafts == 0 || !model->buddy || starts->draft[starts->best].n_micro < 2) {
        return OVLM_OK;
    }
    const sp_draft *from = &starts->draft[starts->best];
    for (int64_t fewer = 0; fewer < (n_micro > 0 ? 1 : CLIMBS); fewer++) {
        int64_t n_boxes = from->n_micro - fewer;
        if (n_boxes > 1 && holds(model, n_boxes)) {
            OVLM_GOTO(done, climb_init(&climbs[count], model, from, n_boxes,
                                       &starts->draft[starts->n_drafts + count],
                                       seed + (uint64_t)fewer, arena, err));
            count++;
        }
    }
    /* A quarter for each number of micro-batches, and the rest for the better one. */
    double used = 0;
    for (int64_t i = 0; count > 1 && i < count; i++, used += 0.25) {
        OVLM_GOTO(done, run(&climbs[i], 0.25 * share / (1 - used * share), purse, err));
    }
    int64_t better = count > 1 && climbs[1].best_cost < climbs[0].best_cost;
    if (count > 0) {
        OVLM_GOTO(done, run(&climbs[better], (1 - used) * share / (1 - used * share), purse, err));
    }
    starts->n_drafts += count;
    int64_t order[SP_DRAFTS];
    sp_policy_order(starts, order);
done:
    for (int64_t i = 0; i < count; i++) {
        sp_step_release(&climbs[i].step);
    }
    return status;
}
