/* model_lora.c - a model's adapters: made, merged into its weights, taken away. */
#include "model/lora.h"
#include "model/model_state.h"

#include <stdlib.h>

/* Trains the adapters alone, or the whole base when there are none. */
static ovlm_status train_adapters(ovlm_model *model, ovlm_err *err)
{
    const ovlm_params *p = &model->params;
    bool *mask = NULL;
    OVLM_TRY(OVLM_HEAP_NEW(&mask, p->n, err));
    for (int64_t i = 0; i < p->n; i++) {
        mask[i] = p->lora == NULL || p->param[i].kind == OVLM_PARAM_ADAPTER;
    }
    ovlm_status status = ovlm_model_train_only(model, mask, err);
    free(mask);
    return status;
}

/* The list of before, which gradients and moments of adapters do not fit. */
static void drop(ovlm_model *model)
{
    ovlm_params_unadapt(&model->params);
    ovlm_device_block_free(model, &model->adapters);
    ovlm_device_block_free(model, &model->grads);
    ovlm_device_block_free(model, &model->moments);
    ovlm_arena_free(&model->lora);
    ovlm_params_place_grads(&model->params);
    ovlm_model_rebind(model);
}

ovlm_status ovlm_model_lora_open(ovlm_model *model, const bool *adapted, int64_t rank,
                                 double scale, ovlm_err *err)
{
    ovlm_params *p = &model->params;
    if (p->lora != NULL || model->average.data != NULL) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         p->lora != NULL ? "this model has adapters already; remove them first"
                                         : "an average of what is trained is kept; close it "
                                           "before changing what that is");
    }
    OVLM_TRY(ovlm_model_need_own(model, "adapters", err));
    OVLM_TRY(ovlm_params_adapt(p, adapted, rank, scale, &model->lora, err));
    ovlm_status status = ovlm_device_block_need(
        model, &model->adapters, p->adapter_elements * ovlm_dtype_bytes(model->dtype), true, err);
    if (status == OVLM_OK) {
        status = train_adapters(model, err);
    }
    if (status != OVLM_OK) {
        drop(model);
    }
    return status;
}

ovlm_status ovlm_model_lora_close(ovlm_model *model, ovlm_err *err)
{
    if (model->params.lora == NULL || model->average.data != NULL) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         model->params.lora == NULL
                             ? "this model has no adapters"
                             : "an average of what is trained is kept; close it before changing "
                               "what that is");
    }
    OVLM_TRY(ovlm_model_need_own(model, "adapters", err));
    OVLM_TRY(model->backend->ops->queue_wait(model->queue, err));
    model->has_hidden = false;
    drop(model);
    return train_adapters(model, err);
}

/* w += sign scale B A, for each module of a product. */
static ovlm_status merge_product(ovlm_run *run, const ovlm_weight *product, double sign)
{
    const ovlm_lora *lora = product->lora;
    for (int64_t i = 0; i < lora->n; i++) {
        int64_t mark = run->work->used_bytes, rows = lora->b[i].w.rows;
        ovlm_scale scale = {.alpha = sign * lora->scale, .x = lora->b[i].w,
                            .y = ovlm_stack_tensor(run->work, rows, lora->rank, run->dtype)};
        RUN(run, scale, fwd, &scale);
        ovlm_tensor w = ovlm_tensor_rows(product->w, lora->col[i], rows);
        ovlm_linear add = {.x = scale.y, .w_kn = true, .add = w, .y = w,
                           .w = ovlm_tensor_rows(lora->a.w, i * lora->rank, lora->rank)};
        RUN(run, linear, fwd, &add);
        run->work->used_bytes = mark;
    }
    return OVLM_OK;
}

static ovlm_status merge_unit(ovlm_run *run, ovlm_params *params, int64_t i, double sign)
{
    ovlm_weight *product[OVLM_ADAPTABLE];
    int64_t n = ovlm_params_adaptable(params, i, product);
    for (int64_t k = 0; k < n; k++) {
        if (product[k]->lora != NULL) {
            OVLM_TRY(merge_product(run, product[k], sign));
        }
    }
    return OVLM_OK;
}

typedef struct merge_args {
    ovlm_params *params;
    double sign;
} merge_args;

static ovlm_status walk_merge(ovlm_run *run, void *args)
{
    const merge_args *merge = args;
    for (int64_t i = 0; i < ovlm_params_adaptables(merge->params); i++) {
        OVLM_TRY(merge_unit(run, merge->params, i, merge->sign));
    }
    return OVLM_OK;
}

bool ovlm_model_lora_merged(const ovlm_model *model)
{
    return model->params.lora != NULL && model->params.lora[0].merged;
}

ovlm_status ovlm_model_lora_merge(ovlm_model *model, bool in, ovlm_err *err)
{
    ovlm_params *p = &model->params;
    if (p->lora == NULL || in == p->lora[0].merged || ovlm_model_average_in(model)) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         p->lora == NULL           ? "this model has no adapters"
                         : in != p->lora[0].merged ? "the weights are those of the average now"
                         : in                      ? "the adapters are merged already"
                                                   : "the adapters are not merged");
    }
    OVLM_TRY(ovlm_model_need_own(model, "adapters", err));
    merge_args args = {.params = p, .sign = in ? 1 : -1};
    ovlm_model_forget(model);
    model->has_hidden = false;
    OVLM_TRY(ovlm_model_walk_alone(model, walk_merge, &args, err));
    for (int64_t i = 0; i < p->loras; i++) {
        p->lora[i].merged = in;
    }
    return model->backend->ops->queue_wait(model->queue, err);
}
