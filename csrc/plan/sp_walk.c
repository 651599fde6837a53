/* sp_walk.c - ruin and recreate over all micro-batches at once.
 *
 * The step's time is a sum of maxima, so only the longest group of each box counts: most ruins
 * start there, and what they take out goes where it costs nothing - into groups of any box that
 * have room under their box's tau.  Cooling is by threshold and in cycles of doubling length, so
 * the walk need not know its budget, and a longer one repeats a shorter one. */
#include "plan/sp_walk.h"

#include <math.h>
#include <stdlib.h>

#include "base/sort.h"

enum { CYCLE = 4000, MOST_OUT = 96 };

#define HOT 0.024 /* thresholds, relative to the step's time; this one at one GPU */
#define COLD 1e-5

ovlm_status sp_walk_init(sp_walk *walk, const sp_model *model, int64_t n_boxes,
                         const sp_draft *start, sp_style style, uint64_t seed, ovlm_arena *arena,
                         ovlm_err *err)
{
    *walk = (sp_walk){.length = CYCLE, .style = style};
    /* One change moves a larger cluster's step by less. */
    walk->hot = HOT / sqrt((double)model->n_gpus);
    ovlm_rng_init(&walk->rng, seed);
    OVLM_TRY(sp_step_init(&walk->step, model, n_boxes, arena, err));
    OVLM_TRY(sp_draft_init(&walk->best, model->n, arena, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &walk->out, model->n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &walk->place_j, model->n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &walk->place, model->n, err));
    OVLM_TRY(sp_step_load(&walk->step, start, err));
    sp_step_store(&walk->step, &walk->best);
    walk->cost = walk->best_cost = sp_step_cost(&walk->step);
    return OVLM_OK;
}

void sp_walk_release(sp_walk *walk)
{
    sp_step_release(&walk->step);
}

/* ------------------------------------------------------------------ ruin ----------------- */

static void take(sp_walk *walk, int64_t k)
{
    sp_step_take(&walk->step, k);
    walk->out[walk->n_out++] = k;
}

/* `count` random items of a group, or all of them. */
static void take_some(sp_walk *walk, int64_t slot, int64_t count)
{
    const sp_step *step = &walk->step;
    int64_t left = step->count[slot];
    for (int64_t k = step->first[slot]; k >= 0 && count > 0; left--) {
        int64_t next = step->next[k];
        if (ovlm_rng_below(&walk->rng, left) < count) {
            take(walk, k);
            count--;
        }
        k = next;
    }
}

static int64_t random_box(sp_walk *walk)
{
    int64_t box = ovlm_rng_below(&walk->rng, walk->step.n_boxes);
    while (walk->step.n_groups[box] == 0) { /* some box has groups: checked by the caller */
        box = box + 1 < walk->step.n_boxes ? box + 1 : 0;
    }
    return box;
}

/* A group of the box, or -1 when a random slot was an empty one. */
static int64_t random_group(sp_walk *walk, int64_t box)
{
    const sp_step *step = &walk->step;
    if (step->high[box] == 0) {
        return -1;
    }
    int64_t slot = box * step->box_slots + ovlm_rng_below(&walk->rng, step->high[box]);
    return step->room[slot] >= 0 ? slot : -1;
}

static int64_t longest_group(const sp_step *step, int64_t box)
{
    int64_t begin = box * step->box_slots, longest = begin;
    for (int64_t slot = begin; slot < begin + step->high[box]; slot++) {
        longest = step->time[slot] > step->time[longest] ? slot : longest;
    }
    return longest;
}

static bool coin(sp_walk *walk)
{
    return ovlm_rng_next(&walk->rng) >> 63 != 0;
}

/* The longest group of a box, whole or a few items of it, and parts of up to three others. */
static void ruin_longest(sp_walk *walk)
{
    const sp_step *step = &walk->step;
    int64_t box = random_box(walk), slot = longest_group(step, box);
    bool whole = coin(walk) && step->count[slot] <= 24;
    take_some(walk, slot, whole ? step->count[slot] : 1 + ovlm_rng_below(&walk->rng, 3));
    for (int64_t others = ovlm_rng_below(&walk->rng, 4); others > 0; others--) {
        slot = random_group(walk, coin(walk) ? box : ovlm_rng_below(&walk->rng, step->n_boxes));
        if (slot >= 0) {
            whole = coin(walk) && step->count[slot] <= 16;
            take_some(walk, slot, whole ? step->count[slot] : 1 + ovlm_rng_below(&walk->rng, 8));
        }
    }
}

/* Whole groups of one box until a random degree's worth of GPUs is idle: room for other degrees. */
static void ruin_block(sp_walk *walk)
{
    const sp_step *step = &walk->step;
    int64_t box = random_box(walk), before = step->idle[box];
    int64_t wanted = step->model->degree[ovlm_rng_below(&walk->rng, step->model->D)];
    for (int tries = 0; tries < 20 && step->idle[box] - before < wanted; tries++) {
        int64_t slot = random_group(walk, box);
        if (slot >= 0 && walk->n_out + step->count[slot] <= MOST_OUT) {
            take_some(walk, slot, step->count[slot]);
        }
    }
}

/* Sequences of similar length, wherever they are, some with the few others of their group. */
static void ruin_alike(sp_walk *walk)
{
    const sp_step *step = &walk->step;
    int64_t n = step->model->n, k = ovlm_rng_below(&walk->rng, n);
    int64_t end = k + 1 + ovlm_rng_below(&walk->rng, 6);
    for (end = end < n ? end : n; k < end; k++) {
        int64_t slot = step->where[k];
        if (slot >= 0 && coin(walk) && step->count[slot] <= 6) {
            take_some(walk, slot, step->count[slot]);
        } else if (slot >= 0) {
            take(walk, k);
        }
    }
}

static void ruin(sp_walk *walk)
{
    walk->n_out = 0;
    if (walk->step.n_pool < walk->step.model->n) {
        double kind = ovlm_rng_uniform(&walk->rng), longest = walk->style.longest;
        if (kind < longest) {
            ruin_longest(walk);
        } else if (kind < 0.5 * (1 + longest)) {
            ruin_block(walk);
        } else {
            ruin_alike(walk);
        }
    }
    sp_step_settle(&walk->step);
}

/* ------------------------------------------------------------------ recreate ------------- */

static void shuffle(sp_walk *walk)
{
    for (int64_t i = walk->n_out - 1; i > 0; i--) {
        int64_t other = ovlm_rng_below(&walk->rng, i + 1), swap = walk->out[i];
        walk->out[i] = walk->out[other];
        walk->out[other] = swap;
    }
}

/* Everything in the pool goes back, longest first. */
static int64_t recreate(sp_walk *walk)
{
    sp_taste taste = {.excess = 0.6, .balance = walk->style.balance, .fit = 0.05, .blink = 0.06};
    sp_step *step = &walk->step;
    walk->n_out = step->n_pool;
    for (int64_t i = 0; i < step->n_pool; i++) {
        walk->out[i] = step->pool[i];
    }
    qsort(walk->out, (size_t)walk->n_out, sizeof *walk->out, ovlm_compare_i64);
    if (!isfinite(walk->best.time_s) && !walk->unsaved) {
        /* No plan yet, so memory decides: what costs least in time is a poor guide. */
        taste.blink = 0.3;
        if (coin(walk)) {
            shuffle(walk);
        }
    }
    return sp_repair(step, walk->out, walk->n_out, &taste, &walk->rng);
}

/* Whether the changed boxes' groups still have aligned blocks. */
static bool placeable(sp_walk *walk)
{
    const sp_step *step = &walk->step;
    if (step->model->buddy) {
        return true;
    }
    for (int64_t box = 0; box < step->n_boxes; box++) {
        int64_t count = 0, begin = box * step->box_slots;
        for (int64_t slot = begin; step->touched[box] && slot < begin + step->high[box]; slot++) {
            if (step->room[slot] >= 0) {
                walk->place_j[count++] = step->j[slot];
            }
        }
        if (!sp_place(step->model, walk->place_j, count, walk->place)) {
            return false;
        }
    }
    return true;
}

/* ------------------------------------------------------------------ walk ----------------- */

/* Cubic cooling, then the next cycle, twice as long. */
static double threshold(sp_walk *walk)
{
    if (walk->at++ >= walk->length) {
        walk->at = 0;
        walk->length *= 2;
    }
    double left = 1 - (double)walk->at / (double)walk->length;
    double u = ovlm_rng_uniform(&walk->rng);
    return walk->cost * (walk->hot * left * left * left + COLD) * u * u;
}

/* Writing a step down costs as much as many changes to it: a row of improvements is saved once. */
static void save(sp_walk *walk)
{
    if (walk->unsaved) {
        sp_step_store(&walk->step, &walk->best);
        walk->unsaved = false;
    }
}

ovlm_status sp_walk_run(sp_walk *walk, double target, ovlm_meter *meter, ovlm_err *err)
{
    sp_step *step = &walk->step;
    int64_t looked = 0;
    while (walk->best_cost > target && !ovlm_meter_spend(meter, 1 + looked / 128)) {
        /* Each item out is a take, a close, a put and an open, and each box once its tau. */
        OVLM_TRY(sp_step_reserve(step, 4 * step->model->n + step->n_boxes, err));
        ruin(walk);
        looked = recreate(walk);
        double cost = sp_step_cost(step);
        if (cost > walk->cost + threshold(walk) || !placeable(walk)) {
            sp_step_undo(step);
        } else if (cost > walk->cost && walk->unsaved) {
            sp_step_undo(step); /* do not leave the best before it is written down */
            save(walk);
        } else {
            sp_step_commit(step);
            walk->cost = cost;
            walk->unsaved = walk->unsaved || cost < walk->best_cost;
            walk->best_cost = cost < walk->best_cost ? cost : walk->best_cost;
        }
    }
    save(walk);
    return OVLM_OK;
}
