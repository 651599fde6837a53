/* sp_levels.c - whole steps built from nothing, towards a target time of each micro-batch.
 *
 * A micro-batch is as long as its longest group.  With hundreds of groups in each, no small change
 * shortens it: all of its longest groups would have to shrink at once.  So the search is over the
 * little that decides a build: the groups of the large items (a frame), and how long each
 * micro-batch is to take.  The rest is then packed group by group, and what finds no place goes
 * where it costs least. */
#include "plan/sp_levels.h"

#include <math.h>
#include <stdlib.h>

#include "base/sort.h"
#include "plan/sp_dive.h"
#include "plan/sp_repair.h"

/* Builds of a new frame before it is judged, the first ones for its slack alone; builds of the best
 * frame between two new ones; annealing steps of a frame per large item. */
enum { SLACK_BUILDS = 5, FIRST_BUILDS = 8, MORE_BUILDS = 24, FRAME_STEPS = 3000 };
enum { MOST_CHANGED = 3 }; /* targets in one build */
/* New frames tried before the search is given up for want of a plan. */
enum { MOST_FAILED = 12 };

/* Price of memory in shares of the mean GPU-seconds per token: PRICE over the share of memory that
 * stays empty, times each of these in turn. */
#define PRICE 0.03
static const double prices[] = {1, 0.6, 1.6};
enum { PRICES = sizeof prices / sizeof *prices };

/* First slack, and the first change of it is as large as its excess over 1. */
#define SLACK 1.02

static const sp_taste taste = {.excess = 0.6, .balance = 0.3, .fit = 0.05, .blink = 0.02};

/* A frame, with the best targets known for it. */
typedef struct attempt {
    sp_frame frame;
    sp_aim aim;         /* of its best build; its frame is not used                          */
    sp_draft *draft;    /* that build; time HUGE_VAL while items are left                    */
    double cost;        /* of that build, with a penalty for items left; HUGE_VAL before it  */
    int64_t builds;
    double slack, step; /* the next build's, and its change after that                       */
} attempt;

typedef struct levels {
    const sp_model *model;
    sp_step step;
    sp_dive dive;
    attempt now, best, second;
    sp_aim trial;
    sp_draft built, scratch;
    int64_t least, most; /* numbers of micro-batches                                         */
    double price_s;      /* mean GPU-seconds per token                                       */
    double tokens;       /* of all items, in micro-batches' memories                         */
    int64_t *item;       /* [n] scratch                                                      */
    ovlm_rng rng;
} levels;

/* ------------------------------------------------------------------ set-up --------------- */

static ovlm_status aim_init(sp_aim *aim, int64_t n_boxes, ovlm_arena *arena, ovlm_err *err)
{
    OVLM_TRY(OVLM_ARENA_NEW(arena, &aim->stretch, n_boxes, err));
    return OVLM_ARENA_NEW(arena, &aim->fill, n_boxes, err);
}

static ovlm_status attempt_init(attempt *a, const sp_model *model, int64_t n_boxes,
                                sp_draft *draft, ovlm_arena *arena, ovlm_err *err)
{
    a->cost = HUGE_VAL;
    a->draft = draft;
    OVLM_TRY(sp_draft_init(draft, model->n, arena, err));
    OVLM_TRY(sp_frame_init(&a->frame, model, arena, err));
    return aim_init(&a->aim, n_boxes, arena, err);
}

static double mean_price(const sp_model *model)
{
    double work = 0;
    for (int64_t k = 0; k < model->n; k++) {
        double least = HUGE_VAL;
        for (int64_t j = model->min_j[k]; j < model->D; j++) {
            double own = sp_item_work(model, k, j);
            least = own < least ? own : least;
        }
        work += least;
    }
    return work / model->sum_s[model->n];
}

static ovlm_status levels_init(levels *l, const sp_model *model, sp_draft *into, uint64_t seed,
                               ovlm_arena *arena, ovlm_err *err)
{
    l->model = model;
    l->price_s = mean_price(model);
    ovlm_rng_init(&l->rng, seed);
    OVLM_TRY(sp_draft_init(&l->built, model->n, arena, err));
    OVLM_TRY(attempt_init(&l->now, model, l->most, &l->scratch, arena, err));
    OVLM_TRY(attempt_init(&l->best, model, l->most, &into[0], arena, err));
    OVLM_TRY(attempt_init(&l->second, model, l->most, &into[1], arena, err));
    OVLM_TRY(aim_init(&l->trial, l->most, arena, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &l->item, model->n, err));
    OVLM_TRY(sp_dive_init(&l->dive, model, l->most, arena, err));
    return sp_step_init(&l->step, model, l->most, arena, err);
}

/* ------------------------------------------------------------------ builds --------------- */

static void copy_aim(sp_aim *to, const sp_aim *from, int64_t n_boxes)
{
    to->n_boxes = from->n_boxes;
    to->theta = from->theta;
    to->slack = from->slack;
    for (int64_t box = 0; box < n_boxes; box++) {
        to->stretch[box] = from->stretch[box];
        to->fill[box] = from->fill[box];
    }
}

/* value times 1 - width/2 .. 1 + width/2. */
static double nudge(levels *l, double value, double width)
{
    return value * (1 + width * (ovlm_rng_uniform(&l->rng) - 0.5));
}

/* At first only the slack, towards the least with which everything finds a place; then a little of
 * everything. */
static void propose(levels *l, const attempt *a)
{
    sp_aim *trial = &l->trial;
    copy_aim(trial, &a->aim, l->most);
    trial->frame = &a->frame;
    if (a->builds < SLACK_BUILDS) {
        trial->slack = a->slack;
        return;
    }
    double width = ovlm_rng_uniform(&l->rng) < 0.5 ? 0.03 : 0.1;
    for (int64_t left = 1 + ovlm_rng_below(&l->rng, MOST_CHANGED); left > 0; left--) {
        int64_t box = ovlm_rng_below(&l->rng, trial->n_boxes);
        double stretch = nudge(l, trial->stretch[box], width);
        bool held = box < a->frame.n_boxes && stretch < 1;
        trial->stretch[box] = held ? 1 : stretch;
    }
    trial->slack = nudge(l, trial->slack, 0.01);
    for (int64_t box = 0; box < trial->n_boxes; box++) {
        if (ovlm_rng_uniform(&l->rng) < 0.15) {
            trial->fill[box] = nudge(l, trial->fill[box], 0.1);
        }
    }
    if (ovlm_rng_uniform(&l->rng) < 0.3) {
        double theta = trial->theta + 0.5 * (ovlm_rng_uniform(&l->rng) - 0.5);
        trial->theta = theta < 0 ? 0 : theta > 1 ? 1 : theta;
    }
}

/* One build; the attempt keeps it when it is its best. */
static ovlm_status build(levels *l, attempt *a, ovlm_meter *meter, ovlm_err *err)
{
    sp_step *step = &l->step;
    propose(l, a);
    int64_t work = sp_dive_build(&l->dive, &l->trial, &l->built);
    OVLM_TRY(sp_step_load(step, &l->built, err));
    OVLM_TRY(sp_step_reserve(step, 2 * l->model->n + step->n_boxes, err));
    int64_t left = step->n_pool;
    a->slack += left > 0 ? a->step : -a->step;
    a->step *= 0.6; /* a noisy test, so not by halves */
    for (int64_t i = 0; i < left; i++) {
        l->item[i] = step->pool[i];
    }
    qsort(l->item, (size_t)left, sizeof *l->item, ovlm_compare_i64);
    sp_taste to = taste;
    to.floor_s = l->dive.level;
    work += sp_repair(step, l->item, left, &to, &l->rng) / 8;
    double cost = sp_step_cost(step);
    sp_step_commit(step);
    a->builds++;
    if (cost < a->cost) {
        a->cost = cost;
        copy_aim(&a->aim, &l->trial, l->most);
        sp_step_store(step, a->draft);
    }
    (void)ovlm_meter_spend(meter, 1 + work);
    return OVLM_OK;
}

static ovlm_status climb(levels *l, attempt *a, int64_t builds, ovlm_meter *meter, ovlm_err *err)
{
    for (int64_t i = 0; i < builds && !ovlm_meter_look(meter); i++) {
        OVLM_TRY(build(l, a, meter, err));
    }
    return OVLM_OK;
}

/* ------------------------------------------------------------------ attempts ------------- */

/* Another frame: each number of micro-batches and price in turn, then those around the best's. */
static void arrange(levels *l, int64_t round, ovlm_meter *meter)
{
    attempt *a = &l->now;
    int64_t counts = l->most - l->least + 1, n_boxes = l->least + round % counts;
    double full = l->tokens / (double)n_boxes;
    double price = PRICE * prices[round / counts % PRICES] / fmax(1 - full, PRICE) * l->price_s;
    if (round >= counts * PRICES && round % 4 != 0 && l->best.cost < HUGE_VAL) {
        n_boxes = l->best.aim.n_boxes;
        price = nudge(l, l->best.frame.price_s, 0.8);
    }
    int64_t steps = FRAME_STEPS * a->frame.n;
    sp_frame_arrange(&a->frame, n_boxes, price, steps, meter, &l->rng);
    (void)ovlm_meter_spend(meter, 1); /* so that it ends where there is nothing to arrange */
    a->cost = HUGE_VAL;
    a->builds = 0;
    a->aim.n_boxes = n_boxes;
    a->aim.theta = 0.5;
    a->slack = SLACK;
    a->step = SLACK - 1;
    for (int64_t box = 0; box < l->most; box++) {
        a->aim.stretch[box] = 1;
        a->aim.fill[box] = 1;
    }
}

/* Whether the frames are one and the same, as far as times tell. */
static bool alike(const attempt *a, const attempt *b)
{
    bool same = a->frame.n_boxes == b->frame.n_boxes && a->aim.n_boxes == b->aim.n_boxes;
    for (int64_t box = 0; same && box < a->frame.n_boxes; box++) {
        same = fabs(a->frame.box[box].tau - b->frame.box[box].tau) < 1e-3 * b->frame.box[box].tau;
    }
    return same;
}

static void swap(attempt *a, attempt *b)
{
    attempt other = *a;
    *a = *b;
    *b = other;
}

/* The new attempt takes its place among the best two, which differ. */
static void rank(levels *l)
{
    bool better = l->now.cost < l->best.cost;
    if (alike(&l->now, &l->best) && l->best.cost < HUGE_VAL) {
        if (better) {
            swap(&l->now, &l->best);
        }
        return;
    }
    if (better) {
        swap(&l->now, &l->best);
    }
    if (l->now.cost < l->second.cost) {
        swap(&l->now, &l->second);
    }
}

static ovlm_status run(levels *l, ovlm_meter *meter, ovlm_err *err)
{
    for (int64_t round = 0; !ovlm_meter_look(meter); round++) {
        if (round == MOST_FAILED && l->best.cost == HUGE_VAL) {
            return OVLM_OK;
        }
        arrange(l, round, meter);
        if (l->now.frame.cost < HUGE_VAL) {
            OVLM_TRY(climb(l, &l->now, FIRST_BUILDS, meter, err));
            rank(l);
        }
        OVLM_TRY(climb(l, &l->best, l->best.cost < HUGE_VAL ? MORE_BUILDS : 0, meter, err));
        OVLM_TRY(climb(l, &l->second, l->second.cost < HUGE_VAL ? FIRST_BUILDS : 0, meter, err));
        if (l->second.cost < l->best.cost) {
            swap(&l->second, &l->best);
        }
    }
    return OVLM_OK;
}

ovlm_status sp_levels_improve(const sp_model *model, sp_chunked *starts, int64_t n_micro,
                              double share, uint64_t seed, sp_purse *purse, ovlm_arena *arena,
                              ovlm_err *err)
{
    ovlm_status status = OVLM_OK;
    levels l = {.model = model};
    /* Built groups are placed only where any set of them can be. */
    if (starts->n_drafts == 0 || !model->buddy || starts->draft[starts->best].n_micro < 2) {
        return OVLM_OK;
    }
    l.tokens = model->sum_s[model->n] / sp_model_tokens(model);
    double least = fmin(ceil(l.tokens), (double)model->n);
    l.least = least < 2 ? 2 : (int64_t)least;
    l.most = n_micro > 0 && n_micro <= l.least ? n_micro : l.least + 1;
    l.least = l.least < l.most ? l.least : l.most;
    OVLM_GOTO(done, levels_init(&l, model, &starts->draft[starts->n_drafts], seed, arena, err));
    ovlm_meter part = sp_purse_part(purse, share);
    status = run(&l, &part, err);
    (void)sp_purse_absorb(purse, &part);
    /* They changed places while ranked: those without a plan last. */
    sp_draft drafts[2] = {*l.best.draft, *l.second.draft};
    for (int i = 0; i < 2; i++) {
        if (drafts[i].time_s < HUGE_VAL) {
            starts->draft[starts->n_drafts++] = drafts[i];
        }
    }
    int64_t order[SP_DRAFTS];
    sp_policy_order(starts, order);
done:
    sp_step_release(&l.step);
    return status;
}
