/* sp_step.c - a whole step under search: take, put, open, undo. */
#include "plan/sp_step.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

ovlm_status sp_step_init(sp_step *step, const sp_model *model, int64_t n_boxes, ovlm_arena *arena,
                         ovlm_err *err)
{
    int64_t n = model->n, slots = model->n_gpus / model->degree[0];
    slots = slots < n ? slots : n;
    *step = (sp_step){.model = model, .n_boxes = n_boxes, .box_slots = slots > 0 ? slots : 1};
    if (n_boxes > INT64_MAX / step->box_slots) {
        return OVLM_FAIL(err, OVLM_E_NOMEM, "%lld micro-batches of %lld groups are too many",
                         (long long)n_boxes, (long long)step->box_slots);
    }
    slots = n_boxes * step->box_slots;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &step->where, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &step->next, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &step->previous, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &step->pool_index, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &step->pool, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &step->time, slots, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &step->room, slots, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &step->sum_s, slots, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &step->sum_s2, slots, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &step->j, slots, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &step->first, slots, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &step->count, slots, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &step->idle, n_boxes, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &step->high, n_boxes, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &step->n_groups, n_boxes, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &step->tau, n_boxes, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &step->dirty, n_boxes, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &step->touched, n_boxes, err));
    /* Alone on the largest degree, every item is feasible: twice all of that beats any plan. */
    int64_t j = model->D - 1;
    double alone = model->quad[j] * model->sum_s2[n] + model->lin[j] * model->sum_s[n];
    step->pool_penalty_s = 2 * (alone + (double)(n + 1) * model->fixed);
    return OVLM_OK;
}

void sp_step_release(sp_step *step)
{
    free(step->journal);
    step->journal = NULL;
    step->journal_room = 0;
}

ovlm_status sp_step_reserve(sp_step *step, int64_t changes, ovlm_err *err)
{
    int64_t need = step->n_journal + changes;
    if (need <= step->journal_room) {
        return OVLM_OK;
    }
    sp_step_change *grown = NULL;
    OVLM_TRY(OVLM_HEAP_NEW(&grown, 2 * need, err));
    if (step->n_journal > 0) {
        memcpy(grown, step->journal, (size_t)step->n_journal * sizeof *grown);
    }
    free(step->journal);
    step->journal = grown;
    step->journal_room = 2 * need;
    return OVLM_OK;
}

static void note(sp_step *step, sp_step_change change)
{
    step->journal[step->n_journal++] = change;
}

static void touch(sp_step *step, int64_t box)
{
    if (!step->touched[box]) {
        step->touched[box] = true;
        note(step, (sp_step_change){.kind = SP_TAU, .a = box, .tau = step->tau[box]});
    }
}

/* ------------------------------------------------------------------ unjournalled parts --- */

static void pool_add(sp_step *step, int64_t k)
{
    step->where[k] = -1;
    step->pool_index[k] = step->n_pool;
    step->pool[step->n_pool++] = k;
}

static void pool_drop(sp_step *step, int64_t k)
{
    int64_t last = step->pool[--step->n_pool], index = step->pool_index[k];
    step->pool[index] = last;
    step->pool_index[last] = index;
}

static void retime(sp_step *step, int64_t slot, double sign, double s)
{
    const sp_model *model = step->model;
    int64_t j = step->j[slot];
    step->sum_s[slot] += sign * s;
    step->sum_s2[slot] += sign * s * s;
    step->time[slot] = model->quad[j] * step->sum_s2[slot] + model->lin[j] * step->sum_s[slot];
    step->room[slot] = (double)model->cap[j] - step->sum_s[slot];
}

static void detach(sp_step *step, int64_t k)
{
    int64_t slot = step->where[k], next = step->next[k], previous = step->previous[k];
    if (previous < 0) {
        step->first[slot] = next;
    } else {
        step->next[previous] = next;
    }
    if (next >= 0) {
        step->previous[next] = previous;
    }
    step->count[slot]--;
    retime(step, slot, -1, (double)step->model->s[k]);
    pool_add(step, k);
}

static void attach(sp_step *step, int64_t k, int64_t slot)
{
    pool_drop(step, k);
    int64_t next = step->first[slot];
    step->where[k] = slot;
    step->next[k] = next;
    step->previous[k] = -1;
    step->first[slot] = k;
    if (next >= 0) {
        step->previous[next] = k;
    }
    step->count[slot]++;
    retime(step, slot, 1, (double)step->model->s[k]);
}

static void make(sp_step *step, int64_t slot, int64_t j)
{
    int64_t box = sp_step_box(step, slot), place = slot - box * step->box_slots;
    step->j[slot] = j;
    step->first[slot] = -1;
    step->count[slot] = 0;
    step->sum_s[slot] = step->sum_s2[slot] = step->time[slot] = 0;
    step->room[slot] = (double)step->model->cap[j];
    step->idle[box] -= step->model->degree[j];
    step->n_groups[box]++;
    step->high[box] = step->high[box] > place + 1 ? step->high[box] : place + 1;
}

static void unmake(sp_step *step, int64_t slot)
{
    int64_t box = sp_step_box(step, slot), base = box * step->box_slots;
    step->room[slot] = -1;
    step->time[slot] = 0;
    step->idle[box] += step->model->degree[step->j[slot]];
    step->n_groups[box]--;
    while (step->high[box] > 0 && step->room[base + step->high[box] - 1] < 0) {
        step->high[box]--;
    }
}

/* ------------------------------------------------------------------ moves ---------------- */

void sp_step_take(sp_step *step, int64_t k)
{
    int64_t slot = step->where[k], box = sp_step_box(step, slot);
    touch(step, box);
    step->dirty[box] = true;
    detach(step, k);
    note(step, (sp_step_change){.kind = SP_TOOK, .a = k, .b = slot});
    if (step->count[slot] == 0) {
        sp_step_close(step, slot);
    }
}

void sp_step_close(sp_step *step, int64_t slot)
{
    note(step, (sp_step_change){.kind = SP_CLOSED, .a = slot, .b = step->j[slot]});
    unmake(step, slot);
}

void sp_step_put(sp_step *step, int64_t k, int64_t slot)
{
    int64_t box = sp_step_box(step, slot);
    touch(step, box);
    attach(step, k, slot);
    note(step, (sp_step_change){.kind = SP_PUT, .a = k});
    if (step->time[slot] > step->tau[box]) {
        step->tau[box] = step->time[slot];
    }
}

int64_t sp_step_open(sp_step *step, int64_t box, int64_t j)
{
    int64_t slot = box * step->box_slots, end = slot + step->high[box];
    slot = step->n_groups[box] == step->high[box] ? end : slot; /* no gaps: do not look for one */
    while (slot < end && step->room[slot] >= 0) {
        slot++;
    }
    touch(step, box);
    make(step, slot, j);
    note(step, (sp_step_change){.kind = SP_OPENED, .a = slot});
    return slot;
}

static void settle_box(sp_step *step, int64_t box)
{
    const double *time = step->time + box * step->box_slots;
    double tau = 0;
    for (int64_t i = 0; i < step->high[box]; i++) {
        tau = time[i] > tau ? time[i] : tau; /* an unused slot has time 0 */
    }
    step->tau[box] = tau;
    step->dirty[box] = false;
}

void sp_step_settle(sp_step *step)
{
    for (int64_t box = 0; box < step->n_boxes; box++) {
        if (step->dirty[box]) {
            settle_box(step, box);
        }
    }
}

double sp_step_cost(const sp_step *step)
{
    double cost = (double)step->n_pool * step->pool_penalty_s;
    for (int64_t box = 0; box < step->n_boxes; box++) {
        if (step->n_groups[box] > 0) {
            cost += step->tau[box] + step->model->fixed;
        }
    }
    return cost;
}

void sp_step_commit(sp_step *step)
{
    for (int64_t i = 0; i < step->n_journal; i++) {
        if (step->journal[i].kind == SP_TAU) {
            step->touched[step->journal[i].a] = false;
        }
    }
    step->n_journal = 0;
}

void sp_step_undo(sp_step *step)
{
    while (step->n_journal > 0) {
        const sp_step_change *change = &step->journal[--step->n_journal];
        switch (change->kind) {
        case SP_TOOK: attach(step, change->a, change->b); break;
        case SP_PUT: detach(step, change->a); break;
        case SP_OPENED: unmake(step, change->a); break;
        case SP_CLOSED: make(step, change->a, change->b); break;
        case SP_TAU:
            step->tau[change->a] = change->tau;
            step->touched[change->a] = step->dirty[change->a] = false;
            break;
        }
    }
}

/* ------------------------------------------------------------------ drafts --------------- */

static void clear(sp_step *step)
{
    step->n_pool = step->n_journal = 0;
    for (int64_t k = 0; k < step->model->n; k++) {
        pool_add(step, k);
    }
    for (int64_t slot = 0; slot < step->n_boxes * step->box_slots; slot++) {
        step->room[slot] = -1;
        step->time[slot] = 0;
    }
    for (int64_t box = 0; box < step->n_boxes; box++) {
        step->idle[box] = step->model->n_gpus;
        step->high[box] = step->n_groups[box] = 0;
        step->tau[box] = 0;
        step->dirty[box] = step->touched[box] = false;
    }
}

ovlm_status sp_step_load(sp_step *step, const sp_draft *draft, ovlm_err *err)
{
    clear(step);
    if (!isfinite(draft->time_s)) {
        return OVLM_OK;
    }
    OVLM_TRY(sp_step_reserve(step, 2 * step->model->n + step->n_boxes, err));
    for (int64_t m = 0; m < draft->n_micro; m++) {
        for (int64_t g = draft->micro_start[m]; g < draft->micro_start[m + 1]; g++) {
            int64_t slot = sp_step_open(step, m, draft->j[g]);
            for (int64_t i = draft->start[g]; i < draft->start[g + 1]; i++) {
                sp_step_put(step, draft->item[i], slot);
            }
        }
    }
    sp_step_commit(step);
    return OVLM_OK;
}

void sp_step_store(const sp_step *step, sp_draft *draft)
{
    int64_t g = 0, i = 0, m = 0;
    for (int64_t box = 0; box < step->n_boxes; box++) {
        if (step->n_groups[box] == 0) {
            continue;
        }
        draft->micro_start[m++] = g;
        for (int64_t x = 0; x < step->high[box]; x++) {
            int64_t slot = box * step->box_slots + x;
            if (step->room[slot] < 0) {
                continue;
            }
            draft->j[g] = step->j[slot];
            draft->start[g++] = i;
            for (int64_t k = step->first[slot]; k >= 0; k = step->next[k]) {
                draft->item[i++] = k;
            }
        }
    }
    draft->micro_start[m] = g;
    draft->start[g] = i;
    draft->n_micro = m;
    draft->time_s = step->n_pool > 0 ? HUGE_VAL : sp_step_cost(step);
}
