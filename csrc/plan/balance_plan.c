/* balance_plan.c - the bookkeeping of an assignment. */
#include "plan/balance_model.h"

#include <string.h>

ovlm_status bal_plan_init(bal_plan *plan, const bal_model *model, ovlm_arena *arena, ovlm_err *err)
{
    OVLM_TRY(OVLM_ARENA_RAW(arena, &plan->rank, model->n_units, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &plan->add, model->n_ranks, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &plan->load, model->n_ranks, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &plan->count, model->n_ranks, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &plan->len, model->n_ranks, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &plan->size, model->n_ranks, err));
    bal_plan_clear(model, plan);
    return OVLM_OK;
}

/* Zero sums; the ranks of the units are left alone. */
static void clear_sums(const bal_model *model, bal_plan *plan)
{
    size_t n_ranks = (size_t)model->n_ranks;
    memset(plan->add, 0, n_ranks * sizeof *plan->add);
    memset(plan->count, 0, n_ranks * sizeof *plan->count);
    memset(plan->len, 0, n_ranks * sizeof *plan->len);
    memset(plan->size, 0, n_ranks * sizeof *plan->size);
    plan->max = 0;
    for (int64_t r = 0; r < model->n_ranks; r++) {
        plan->load[r] = bal_base(model, r);
    }
}

void bal_plan_clear(const bal_model *model, bal_plan *plan)
{
    memset(plan->rank, -1, (size_t)model->n_units * sizeof *plan->rank);
    clear_sums(model, plan);
}

void bal_plan_copy(const bal_model *model, bal_plan *to, const bal_plan *from)
{
    size_t n_ranks = (size_t)model->n_ranks;
    memcpy(to->rank, from->rank, (size_t)model->n_units * sizeof *to->rank);
    memcpy(to->add, from->add, n_ranks * sizeof *to->add);
    memcpy(to->load, from->load, n_ranks * sizeof *to->load);
    memcpy(to->count, from->count, n_ranks * sizeof *to->count);
    memcpy(to->len, from->len, n_ranks * sizeof *to->len);
    memcpy(to->size, from->size, n_ranks * sizeof *to->size);
    to->max = from->max;
}

bool bal_plan_settle(const bal_model *model, bal_plan *plan)
{
    clear_sums(model, plan);
    for (int64_t u = 0; u < model->n_units; u++) {
        int64_t r = plan->rank[u];
        if (r < 0 || (bal_is_pinned(model, u) && model->pin[u] != r)) {
            return false;
        }
        plan->add[r] += model->a[u];
        plan->count[r] += bal_count(model, u);
    }
    for (int64_t u = 0; u < model->n_units && model->size != NULL; u++) {
        int64_t r = plan->rank[u];
        if (model->size[u] > bal_capacity(model, r) - plan->size[r]) {
            return false;
        }
        plan->size[r] += model->size[u];
    }
    for (int64_t u = 0; u < model->n_units && model->len != NULL; u++) {
        int64_t r = plan->rank[u];
        plan->len[r] = model->len[u] > plan->len[r] ? model->len[u] : plan->len[r];
    }
    for (int64_t r = 0; r < model->n_ranks; r++) {
        if (plan->count[r] < model->min_items || plan->count[r] > model->max_items) {
            return false;
        }
        plan->load[r] = bal_load(model, r, plan->add[r], plan->count[r], plan->len[r]);
        plan->max = plan->load[r] > plan->max ? plan->load[r] : plan->max;
    }
    return true;
}
