/* sp_draft.c - a whole step as groups in micro-batches. */
#include "plan/sp_draft.h"

#include <math.h>
#include <string.h>

ovlm_status sp_draft_init(sp_draft *draft, int64_t n, ovlm_arena *arena, ovlm_err *err)
{
    *draft = (sp_draft){.time_s = HUGE_VAL};
    OVLM_TRY(OVLM_ARENA_NEW(arena, &draft->micro_start, n + 2, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &draft->j, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &draft->start, n + 1, err));
    return OVLM_ARENA_NEW(arena, &draft->item, n, err);
}

static void copy(int64_t *to, const int64_t *from, int64_t count)
{
    memcpy(to, from, (size_t)count * sizeof *to);
}

void sp_draft_copy(sp_draft *to, const sp_draft *from)
{
    int64_t n_groups = from->micro_start[from->n_micro];
    to->n_micro = from->n_micro;
    to->time_s = from->time_s;
    copy(to->micro_start, from->micro_start, from->n_micro + 1);
    copy(to->j, from->j, n_groups);
    copy(to->start, from->start, n_groups + 1);
    copy(to->item, from->item, from->start[n_groups]);
}

void sp_draft_begin(sp_draft *draft)
{
    draft->n_micro = 0;
    draft->micro_start[0] = 0;
    draft->start[0] = 0;
    draft->time_s = 0;
}

void sp_draft_append(sp_draft *draft, const sp_model *model, const sp_micro *micro)
{
    if (micro->n_groups == 0) {
        return;
    }
    int64_t g0 = draft->micro_start[draft->n_micro], i0 = draft->start[g0];
    copy(draft->j + g0, micro->j, micro->n_groups);
    copy(draft->item + i0, micro->item, micro->start[micro->n_groups]);
    for (int64_t g = 1; g <= micro->n_groups; g++) {
        draft->start[g0 + g] = i0 + micro->start[g];
    }
    draft->micro_start[++draft->n_micro] = g0 + micro->n_groups;
    draft->time_s += micro->makespan + model->fixed;
}
