/* sp_plan.c - allocates, frees and assembles plans. */
#include "plan/sp_plan.h"

#include <stdlib.h>
#include <string.h>

#include "base/sort.h"

void ovlm_sp_plan_free(ovlm_sp_plan *plan)
{
    if (plan == NULL) {
        return;
    }
    free(plan->micro_start);
    free(plan->degree);
    free(plan->first_gpu);
    free(plan->group_start);
    free(plan->item);
    free(plan->group_time);
    free(plan);
}

static ovlm_status plan_alloc(ovlm_sp_plan **out, int64_t n, int64_t n_micro, int64_t n_groups,
                              ovlm_err *err)
{
    ovlm_status status = OVLM_OK;
    ovlm_sp_plan *plan = NULL;
    OVLM_TRY(OVLM_HEAP_NEW(&plan, 1, err));
    plan->n = n;
    plan->n_micro = n_micro;
    plan->n_groups = n_groups;
    OVLM_GOTO(fail, OVLM_HEAP_NEW(&plan->micro_start, n_micro + 1, err));
    OVLM_GOTO(fail, OVLM_HEAP_NEW(&plan->degree, n_groups, err));
    OVLM_GOTO(fail, OVLM_HEAP_NEW(&plan->first_gpu, n_groups, err));
    OVLM_GOTO(fail, OVLM_HEAP_NEW(&plan->group_start, n_groups + 1, err));
    OVLM_GOTO(fail, OVLM_HEAP_NEW(&plan->item, n, err));
    OVLM_GOTO(fail, OVLM_HEAP_NEW(&plan->group_time, n_groups, err));
    *out = plan;
    return OVLM_OK;
fail:
    ovlm_sp_plan_free(plan);
    return status;
}

/* T(S, d) of group g of the draft; sums of integers, so the order of the items does not matter. */
static double draft_time(const sp_model *model, const sp_draft *draft, int64_t g)
{
    double sum_s = 0, sum_s2 = 0;
    for (int64_t i = draft->start[g]; i < draft->start[g + 1]; i++) {
        double s = (double)model->s[draft->item[i]];
        sum_s += s;
        sum_s2 += s * s;
    }
    int64_t j = draft->j[g];
    return model->fixed + model->quad[j] * sum_s2 + model->lin[j] * sum_s;
}

static double micro_time(const sp_model *model, const sp_draft *draft, int64_t m)
{
    double most = 0;
    for (int64_t g = draft->micro_start[m]; g < draft->micro_start[m + 1]; g++) {
        double time = draft_time(model, draft, g);
        most = time > most ? time : most;
    }
    return most;
}

/* Appends group g of the draft to the plan. */
static void add_group(const sp_model *model, const sp_draft *draft, int64_t g, ovlm_sp_plan *plan)
{
    int64_t to = plan->n_groups++, begin = plan->group_start[to];
    int64_t count = draft->start[g + 1] - draft->start[g];
    for (int64_t i = 0; i < count; i++) {
        plan->item[begin + i] = model->order[draft->item[draft->start[g] + i]];
    }
    qsort(plan->item + begin, (size_t)count, sizeof *plan->item, ovlm_compare_i64);
    plan->group_start[to + 1] = begin + count;
    plan->degree[to] = model->degree[draft->j[g]];
    plan->group_time[to] = draft_time(model, draft, g);
}

/* Appends micro-batch m of the draft: widest groups first, placed. */
static ovlm_status add_micro(const sp_model *model, const sp_draft *draft, int64_t m,
                             int64_t *scratch_j, ovlm_sp_plan *plan, ovlm_err *err)
{
    int64_t first = plan->n_groups, count = 0;
    for (int64_t j = model->D - 1; j >= 0; j--) {
        for (int64_t g = draft->micro_start[m]; g < draft->micro_start[m + 1]; g++) {
            if (draft->j[g] == j) {
                add_group(model, draft, g, plan);
                scratch_j[count++] = j;
            }
        }
    }
    plan->micro_start[++plan->n_micro] = plan->n_groups;
    if (!sp_place(model, scratch_j, count, plan->first_gpu + first)) {
        return OVLM_FAIL(err, OVLM_E_INTERNAL, "micro-batch %lld cannot be placed",
                         (long long)m);
    }
    return OVLM_OK;
}

/* order[0..n_micro-1] = the micro-batches, the longest first, key[] = their times. */
static ovlm_status order_micro(const sp_model *model, const sp_draft *draft, int64_t **order,
                               double **key, ovlm_arena *arena, ovlm_err *err)
{
    OVLM_TRY(OVLM_ARENA_NEW(arena, order, draft->n_micro, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, key, draft->n_micro, err));
    for (int64_t m = 0; m < draft->n_micro; m++) {
        (*key)[m] = micro_time(model, draft, m);
    }
    return ovlm_sort_f64(*key, draft->n_micro, *order, arena, err);
}

ovlm_status sp_plan_time(const sp_model *model, const sp_draft *draft, double *time_s,
                         ovlm_arena *arena, ovlm_err *err)
{
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    int64_t *order;
    double *key;
    ovlm_status status = order_micro(model, draft, &order, &key, arena, err);
    *time_s = 0;
    for (int64_t m = 0; status == OVLM_OK && m < draft->n_micro; m++) {
        *time_s += key[order[m]];
    }
    ovlm_arena_rewind(arena, mark);
    return status;
}

ovlm_status sp_plan_assemble(const sp_model *model, const sp_draft *draft, int64_t n_micro,
                             ovlm_sp_plan **plan, ovlm_arena *arena, ovlm_err *err)
{
    ovlm_status status = OVLM_OK;
    int64_t used = draft->n_micro, total = n_micro > used ? n_micro : used;
    int64_t n_groups = draft->micro_start[used];
    int64_t *order, *scratch_j;
    double *key;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &scratch_j, n_groups, err));
    OVLM_TRY(order_micro(model, draft, &order, &key, arena, err));
    ovlm_sp_plan *made = NULL;
    OVLM_TRY(plan_alloc(&made, model->n, total, n_groups, err));
    made->n_micro = made->n_groups = 0;
    for (int64_t m = 0; m < used; m++) {
        OVLM_GOTO(fail, add_micro(model, draft, order[m], scratch_j, made, err));
        made->time += key[order[m]];
    }
    while (made->n_micro < total) {
        made->micro_start[++made->n_micro] = made->n_groups;
    }
    *plan = made;
    return OVLM_OK;
fail:
    ovlm_sp_plan_free(made);
    return status;
}
