/* model_experts.c - a model that keeps some of its experts, while other ranks have the rest. */
#include "model/model_state.h"

#include <stdlib.h>

static ovlm_status check_spread(const ovlm_model *model, const ovlm_expert_group *group,
                                ovlm_err *err)
{
    int64_t experts = model->params.config.decoder.experts;
    if (!model->spread) {
        OVLM_TRY(ovlm_model_need_own(model, "experts go to other ranks", err));
    }
    if (model->params.loras > 0) {
        return OVLM_FAIL(err, OVLM_E_ARG, "experts over ranks: not of a model with adapters, which "
                                          "trains no experts; merge and remove them first");
    }
    if (model->average.data != NULL) {
        return OVLM_FAIL(err, OVLM_E_ARG, "experts over ranks: an average of weights is kept; "
                                          "close it first");
    }
    if (group != NULL && group->degree > experts) {
        return OVLM_FAIL(err, OVLM_E_ARG, "experts over %lld ranks: the model has %lld experts; "
                         "use at most as many ranks", (long long)group->degree,
                         (long long)experts);
    }
    return OVLM_OK;
}

/* A parameter's place among all weights, and which of its rows are there. */
typedef struct rows_at {
    int64_t offset, first, rows;
} rows_at;

static rows_at where(const ovlm_param *p)
{
    return (rows_at){.offset = p->offset, .first = p->first_row, .rows = p->rows};
}

/* Rows that are there before and after. */
static ovlm_status carry(ovlm_model *model, const ovlm_param *p, const rows_at *was,
                         const void *from, void *to, ovlm_err *err)
{
    int64_t element = ovlm_dtype_bytes(model->dtype);
    const rows_at is = where(p);
    int64_t first = was->first > is.first ? was->first : is.first;
    int64_t end = was->first + was->rows, now = is.first + is.rows;
    int64_t rows = (end < now ? end : now) - first;
    if (p->kind == OVLM_PARAM_BUFFER || rows <= 0) {
        return OVLM_OK;
    }
    int64_t there = was->offset + (first - was->first) * p->cols;
    int64_t here = is.offset + (first - is.first) * p->cols;
    return model->backend->ops->copy(model->queue, (char *)to + here * element,
                                     (const char *)from + there * element,
                                     rows * p->cols * element, OVLM_ON_DEVICE, err);
}

static ovlm_status move_weights(ovlm_model *model, const rows_at *was, ovlm_device_block *made,
                                ovlm_err *err)
{
    const ovlm_params *p = &model->params;
    OVLM_TRY(ovlm_device_block_need(model, made,
                                    p->weight_elements * ovlm_dtype_bytes(model->dtype), true,
                                    err));
    for (int64_t i = 0; i < p->n; i++) {
        OVLM_TRY(carry(model, &p->param[i], &was[i], model->weights.data, made->data, err));
    }
    return ovlm_model_wait(model, err);
}

/* Gives what no longer fits away, and the rest its new places. */
static void settle(ovlm_model *model, ovlm_device_block made)
{
    ovlm_device_block_free(model, &model->weights);
    ovlm_device_block_free(model, &model->grads);
    ovlm_device_block_free(model, &model->moments);
    model->weights = made;
    ovlm_model_forget(model);
    ovlm_model_rebind(model);
}

ovlm_status ovlm_model_spread_experts(ovlm_model *model, const ovlm_expert_group *group,
                                      ovlm_err *err)
{
    ovlm_params *p = &model->params;
    const int64_t held_first = p->experts_first, held = p->experts_held;
    int64_t E = p->config.decoder.experts, first = 0, end = E;
    ovlm_device_block made = {0};
    rows_at *was = NULL;
    OVLM_TRY(check_spread(model, group, err));
    OVLM_TRY(ovlm_model_wait(model, err));
    OVLM_TRY(OVLM_HEAP_NEW(&was, p->n, err));
    for (int64_t i = 0; i < p->n; i++) {
        was[i] = where(&p->param[i]);
    }
    if (group != NULL) {
        first = ovlm_expert_cut(E, group->degree, group->rank);
        end = ovlm_expert_cut(E, group->degree, group->rank + 1);
    }
    ovlm_params_hold_experts(p, first, end - first);
    ovlm_status status = move_weights(model, was, &made, err);
    free(was);
    if (status != OVLM_OK) {
        ovlm_device_block_free(model, &made);
        ovlm_params_hold_experts(p, held_first, held);
        return status;
    }
    settle(model, made);
    model->spread = group != NULL;
    model->expert_group = group != NULL ? *group : (ovlm_expert_group){0};
    return OVLM_OK;
}

void ovlm_model_lose_experts(ovlm_model *model)
{
    if (model->spread) { /* shapes of a whole model, so that passes come as far as the hooks */
        ovlm_params_hold_experts(&model->params, 0, model->params.config.decoder.experts);
        ovlm_model_rebind(model);
    }
    model->spread = false;
    model->expert_group = (ovlm_expert_group){0};
}

bool ovlm_model_spreads_experts(const ovlm_model *model)
{
    return model->spread;
}
