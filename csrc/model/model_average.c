/* model_average.c - a moving average of what is trained, and the model with it for a while.
 *
 * Float32 (float64 with the reference backend), laid out as the gradients are; of bfloat16 models
 * the average is over the optimizer's float32 masters where there are any. */
#include "model/model_state.h"

/* What the average follows. */
static ovlm_status source(ovlm_model *model, int64_t parameter, ovlm_tensor *from, ovlm_err *err)
{
    ovlm_tensor m = {0}, v = {0}, master = {0};
    if (model->moments.data != NULL) {
        OVLM_TRY(ovlm_model_moments(model, parameter, &m, &v, &master, err));
    }
    *from = ovlm_tensor_given(&master) ? master : model->params.param[parameter].w;
    return OVLM_OK;
}

/* y = alpha x + beta y. */
static ovlm_status blend(ovlm_model *model, double alpha, ovlm_tensor x, double beta,
                         ovlm_tensor y, ovlm_err *err)
{
    ovlm_scale args = {.alpha = alpha, .beta = beta, .x = x, .y = y};
    return ovlm_model_scale(model, &args, err);
}

ovlm_tensor ovlm_model_average(const ovlm_model *model, int64_t parameter)
{
    const ovlm_param *p = &model->params.param[parameter];
    if (model->average.data == NULL || p->grad_offset < 0) {
        return (ovlm_tensor){0};
    }
    char *base = model->average.data;
    return ovlm_tensor_of(base + p->grad_offset * ovlm_dtype_bytes(model->exact), p->rows, p->cols,
                          model->exact);
}

static ovlm_status move_all(ovlm_model *model, double decay, ovlm_err *err)
{
    if (model->swapped.data != NULL) {
        return OVLM_FAIL(err, OVLM_E_ARG, "the weights are those of the average now; it cannot "
                                          "follow them");
    }
    for (int64_t i = 0; i < model->params.n; i++) {
        ovlm_tensor average = ovlm_model_average(model, i), from = {0};
        if (ovlm_tensor_given(&average)) {
            OVLM_TRY(source(model, i, &from, err));
            OVLM_TRY(blend(model, 1 - decay, from, decay, average, err));
        }
    }
    return model->backend->ops->queue_wait(model->queue, err);
}

ovlm_status ovlm_model_average_open(ovlm_model *model, ovlm_err *err)
{
    if (model->average.data != NULL) {
        return OVLM_FAIL(err, OVLM_E_ARG, "this model has an average already; close it first");
    }
    OVLM_TRY(ovlm_model_need_own(model, "average", err));
    if (model->params.grad_elements == 0) {
        return OVLM_FAIL(err, OVLM_E_ARG, "nothing is trained, so there is nothing to average");
    }
    OVLM_TRY(ovlm_device_block_need(
        model, &model->average, model->params.grad_elements * ovlm_dtype_bytes(model->exact), true,
        err));
    return move_all(model, 0, err);
}

ovlm_status ovlm_model_average_update(ovlm_model *model, double decay, ovlm_err *err)
{
    if (model->average.data == NULL) {
        return OVLM_FAIL(err, OVLM_E_ARG, "there is no average: it was closed, or what is trained "
                                          "has changed");
    }
    return move_all(model, decay, err);
}

/* Weights of the model to `swapped`, or back from there. */
static ovlm_status stash(ovlm_model *model, bool back, ovlm_err *err)
{
    for (int64_t i = 0; i < model->params.n; i++) {
        const ovlm_param *p = &model->params.param[i];
        if (p->grad_offset < 0) {
            continue;
        }
        int64_t element = ovlm_dtype_bytes(model->dtype);
        char *kept = (char *)model->swapped.data + p->grad_offset * element;
        OVLM_TRY(model->backend->ops->copy(model->queue, back ? p->w.data : kept,
                                           back ? kept : p->w.data, p->rows * p->cols * element,
                                           OVLM_ON_DEVICE, err));
    }
    return model->backend->ops->queue_wait(model->queue, err);
}

ovlm_status ovlm_model_average_swap(ovlm_model *model, bool in, ovlm_err *err)
{
    if (model->average.data == NULL || in != (model->swapped.data == NULL)) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         model->average.data == NULL
                             ? "there is no average: it was closed, or what is trained has changed"
                         : in ? "the weights are those of the average already"
                              : "the weights are the model's own already");
    }
    ovlm_model_forget(model);
    model->has_hidden = false;
    if (!in) {
        OVLM_TRY(stash(model, true, err));
        ovlm_device_block_free(model, &model->swapped);
        return OVLM_OK;
    }
    OVLM_TRY(ovlm_device_block_need(
        model, &model->swapped, model->params.grad_elements * ovlm_dtype_bytes(model->dtype), false,
        err));
    OVLM_TRY(stash(model, false, err));
    for (int64_t i = 0; i < model->params.n; i++) {
        ovlm_tensor average = ovlm_model_average(model, i);
        if (ovlm_tensor_given(&average)) {
            OVLM_TRY(blend(model, 1, average, 0, model->params.param[i].w, err));
        }
    }
    return model->backend->ops->queue_wait(model->queue, err);
}

bool ovlm_model_average_in(const ovlm_model *model)
{
    return model->swapped.data != NULL;
}

ovlm_status ovlm_model_average_close(ovlm_model *model, ovlm_err *err)
{
    if (model->swapped.data != NULL) {
        OVLM_TRY(ovlm_model_average_swap(model, false, err));
    }
    ovlm_device_block_free(model, &model->average);
    return OVLM_OK;
}
