/* sp_warm.c - degrees and times of the last plan, filled with the sequences of this batch. */
#include "plan/sp_warm.h"

#include <math.h>

#include "plan/sp_repair.h"

typedef struct warming {
    const sp_model *model;
    const ovlm_sp_plan *old;
    sp_step step;
    int64_t *j, *place; /* [n] degrees opened in one box, and where they would lie              */
} warming;

static int64_t degree_index(const sp_model *model, int64_t degree)
{
    int64_t j = model->D - 1;
    while (j >= 0 && model->degree[j] != degree) {
        j--;
    }
    return j;
}

/* Old micro-batch m as box `box`: empty groups, and tau as if they were full. */
static void open_box(warming *w, int64_t m, int64_t box)
{
    sp_step *step = &w->step;
    double tau = 0;
    int64_t count = 0;
    for (int64_t g = w->old->micro_start[m]; g < w->old->micro_start[m + 1]; g++) {
        int64_t j = degree_index(w->model, w->old->degree[g]);
        if (j < 0 || w->model->degree[j] > step->idle[box] || count == step->box_slots) {
            continue;
        }
        w->j[count] = j;
        if (!sp_place(w->model, w->j, count + 1, w->place)) {
            continue;
        }
        count++;
        (void)sp_step_open(step, box, j);
        double time = w->old->group_time[g] - w->model->fixed;
        tau = time > tau && isfinite(time) ? time : tau;
    }
    step->tau[box] = tau;
}

/* Groups that got nothing give their GPUs back; tau becomes true. */
static void close_empty(sp_step *step)
{
    for (int64_t box = 0; box < step->n_boxes; box++) {
        for (int64_t i = step->high[box] - 1; i >= 0; i--) {
            int64_t slot = box * step->box_slots + i;
            if (step->room[slot] >= 0 && step->count[slot] == 0) {
                sp_step_close(step, slot);
            }
        }
        step->dirty[box] = true;
    }
    sp_step_settle(step);
}

static bool offsets_valid(const ovlm_sp_plan *old)
{
    bool valid = old->n_micro >= 0 && old->micro_start[0] == 0 &&
                 old->micro_start[old->n_micro] == old->n_groups;
    for (int64_t m = 0; m < old->n_micro && valid; m++) {
        valid = old->micro_start[m] <= old->micro_start[m + 1];
    }
    return valid;
}

static ovlm_status fill(warming *w, sp_draft *draft, ovlm_arena *arena, ovlm_err *err)
{
    /* No blinking, so no randomness matters but the sampling of crowded boxes. */
    const sp_taste taste = {.excess = 0.6, .balance = 0.3, .fit = 0.05};
    int64_t n = w->model->n, *all;
    ovlm_rng rng;
    ovlm_rng_init(&rng, 0);
    OVLM_TRY(OVLM_ARENA_NEW(arena, &all, n, err));
    for (int64_t k = 0; k < n; k++) {
        all[k] = k;
    }
    for (int64_t m = 0; m < w->old->n_micro && m < w->step.n_boxes; m++) {
        open_box(w, m, m);
    }
    (void)sp_repair(&w->step, all, n, &taste, &rng);
    close_empty(&w->step);
    sp_step_commit(&w->step);
    sp_step_store(&w->step, draft);
    return OVLM_OK;
}

ovlm_status sp_warm_start(const sp_model *model, const ovlm_sp_problem *problem, sp_draft *draft,
                          ovlm_arena *arena, ovlm_err *err)
{
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    ovlm_status status = OVLM_OK;
    warming w = {.model = model, .old = problem->warm_start};
    const sp_draft nothing = {.time_s = HUGE_VAL};
    if (!offsets_valid(w.old)) {
        return OVLM_FAIL(err, OVLM_E_ARG, "warm_start is not a plan: its micro_start is wrong");
    }
    int64_t asked = problem->micro_batches, boxes = asked > 0 ? asked : w.old->n_micro + 1;
    boxes = boxes < model->n ? boxes : model->n;
    OVLM_GOTO(done, sp_step_init(&w.step, model, boxes, arena, err));
    OVLM_GOTO(done, sp_step_load(&w.step, &nothing, err));
    OVLM_GOTO(done, OVLM_ARENA_NEW(arena, &w.j, model->n, err));
    OVLM_GOTO(done, OVLM_ARENA_NEW(arena, &w.place, model->n, err));
    /* Each slot may be opened and closed, each item put into a group of its own. */
    OVLM_GOTO(done, sp_step_reserve(&w.step, 2 * boxes * w.step.box_slots + 2 * model->n + boxes,
                                    err));
    OVLM_GOTO(done, fill(&w, draft, arena, err));
done:
    sp_step_release(&w.step);
    ovlm_arena_rewind(arena, mark);
    return status;
}
