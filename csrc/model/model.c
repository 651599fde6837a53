/* model.c - life and memory of a model. */
#include "model/model_state.h"

#include <stdlib.h>
#include <string.h>

ovlm_status ovlm_device_block_need(ovlm_model *model, ovlm_device_block *block, int64_t bytes,
                                   bool zero, ovlm_err *err)
{
    if (bytes > block->bytes) {
        ovlm_device_block_free(model, block);
        OVLM_TRY(model->backend->ops->alloc(model->backend, bytes, &block->data, err));
        block->bytes = bytes;
        if (zero) {
            OVLM_TRY(model->backend->ops->fill(model->queue, block->data, 0, bytes, err));
        }
    }
    return OVLM_OK;
}

void ovlm_device_block_free(ovlm_model *model, ovlm_device_block *block)
{
    if (block->data != NULL) {
        model->backend->ops->free(model->backend, block->data);
    }
    *block = (ovlm_device_block){0};
}

void ovlm_model_forget(ovlm_model *model)
{
    model->can_backward = false;
    for (int m = 0; m < OVLM_MODALITIES; m++) {
        model->encoder[m].can_backward = false;
    }
}

static void *place_in(const ovlm_device_block *block, int64_t offset, ovlm_dtype dtype)
{
    return block->data == NULL ? NULL : (char *)block->data + offset * ovlm_dtype_bytes(dtype);
}

void ovlm_model_rebind(ovlm_model *model)
{
    ovlm_params *p = &model->params;
    for (int64_t i = 0; i < p->units; i++) {
        const ovlm_unit *unit = &p->unit[i];
        ovlm_unit_memory at = unit->at;
        if (!model->visit.hooks.weights) {
            at.weights = place_in(&model->weights, unit->offset, model->dtype);
            at.adapters = place_in(&model->adapters, unit->adapter_offset, model->dtype);
        }
        at.grads = place_in(&model->grads, unit->grad_offset, model->exact);
        ovlm_params_place(p, i, &at);
    }
}

static ovlm_status need_weights(ovlm_model *model, ovlm_err *err)
{
    int64_t element = ovlm_dtype_bytes(model->dtype);
    OVLM_TRY(ovlm_device_block_need(model, &model->weights,
                                    model->params.weight_elements * element, true, err));
    return ovlm_device_block_need(model, &model->adapters,
                                  model->params.adapter_elements * element, true, err);
}

static ovlm_status open_memory(ovlm_model *model, ovlm_err *err)
{
    ovlm_params *p = &model->params;
    OVLM_TRY(ovlm_device_block_need(model, &model->buffers,
                                    p->buffer_elements * ovlm_dtype_bytes(model->exact), true,
                                    err));
    p->dtype = model->dtype;
    p->exact = model->exact;
    p->buffers = model->buffers.data;
    if (!model->visit.hooks.weights) {
        OVLM_TRY(need_weights(model, err));
    }
    OVLM_TRY(ovlm_device_block_need(model, &model->scalars,
                                    (int64_t)(sizeof(ovlm_model_scalars) +
                                              sizeof(ovlm_grad_stats)), true, err));
    OVLM_TRY(ovlm_model_routing_open(model, err));
    OVLM_TRY(OVLM_ARENA_NEW(&model->arena, &model->vision_block, p->config.vision.depth, err));
    OVLM_TRY(OVLM_ARENA_NEW(&model->arena, &model->audio_block, p->config.audio.depth, err));
    OVLM_TRY(OVLM_ARENA_NEW(&model->arena, &model->decoder_block, p->config.decoder.depth, err));
    OVLM_TRY(OVLM_ARENA_NEW(&model->arena, &model->layer_cache, p->config.decoder.depth, err));
    ovlm_model_rebind(model);
    return OVLM_OK;
}

ovlm_status ovlm_model_open(const ovlm_model_config *config, const ovlm_ops *ops,
                            const ovlm_backend_options *options, ovlm_dtype dtype,
                            const ovlm_model_hooks *hooks, ovlm_model **model, ovlm_err *err)
{
    *model = NULL;
    if (dtype != OVLM_F32 && dtype != OVLM_BF16 && dtype != OVLM_F64) {
        return OVLM_FAIL(err, OVLM_E_ARG, "dtype must be float32 or bfloat16; got %s",
                         ovlm_dtype_name(dtype));
    }
    ovlm_model *self = NULL;
    OVLM_TRY(OVLM_HEAP_NEW(&self, 1, err));
    self->dtype = dtype;
    self->exact = dtype == OVLM_F64 ? OVLM_F64 : OVLM_F32;
    self->hooked = hooks != NULL;
    self->visit = (ovlm_visit){.params = &self->params};
    if (hooks != NULL) {
        self->visit.hooks = *hooks;
    }
    ovlm_status status = ovlm_params_init(&self->params, config, &self->arena, err);
    if (status == OVLM_OK) {
        status = ops->open(options, &self->backend, err);
    }
    if (status == OVLM_OK) {
        status = ops->queue_open(self->backend, &self->queue, err);
    }
    if (status == OVLM_OK) {
        status = open_memory(self, err);
    }
    if (status != OVLM_OK) {
        ovlm_model_close(self);
        return status;
    }
    *model = self;
    return OVLM_OK;
}

void ovlm_model_close(ovlm_model *model)
{
    if (model == NULL) {
        return;
    }
    if (model->queue != NULL) {
        model->backend->ops->queue_close(model->queue);
    }
    if (model->backend != NULL) {
        ovlm_device_block *blocks[] = {&model->weights, &model->buffers, &model->grads,
                                       &model->moments, &model->scalars, &model->routing,
                                       &model->average, &model->swapped, &model->adapters};
        for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) {
            ovlm_device_block_free(model, blocks[i]);
        }
        ovlm_model_cache_close(model);
        ovlm_stack *stacks[] = {&model->encoder[OVLM_VISION].keep,
                                &model->encoder[OVLM_AUDIO].keep, &model->decoder_keep,
                                &model->work};
        for (size_t i = 0; i < sizeof stacks / sizeof *stacks; i++) {
            ovlm_stack_free(stacks[i], model->backend, OVLM_STACK_DEVICE);
        }
        ovlm_stack_free(&model->stage, model->backend, OVLM_STACK_HOST);
        model->backend->ops->close(model->backend);
    }
    ovlm_trace_free(&model->trace);
    for (int m = 0; m < OVLM_MODALITIES; m++) {
        ovlm_arena_free(&model->encoder[m].call);
    }
    ovlm_arena_free(&model->call);
    ovlm_arena_free(&model->lora);
    ovlm_arena_free(&model->arena);
    free(model);
}

const ovlm_params *ovlm_model_params(const ovlm_model *model)
{
    return &model->params;
}

ovlm_backend *ovlm_model_backend(const ovlm_model *model)
{
    return model->backend;
}

ovlm_queue *ovlm_model_queue(const ovlm_model *model)
{
    return model->queue;
}

ovlm_status ovlm_model_wait(ovlm_model *model, ovlm_err *err)
{
    return model->backend->ops->queue_wait(model->queue, err);
}

ovlm_status ovlm_model_train_only(ovlm_model *model, const bool *trainable, ovlm_err *err)
{
    if (model->average.data != NULL) {
        return OVLM_FAIL(err, OVLM_E_ARG, "an average of what is trained is kept; close it before "
                                          "changing what that is");
    }
    OVLM_TRY(ovlm_params_train_only(&model->params, trainable, err));
    ovlm_status status = model->backend->ops->queue_wait(model->queue, err);
    ovlm_device_block_free(model, &model->grads);
    ovlm_device_block_free(model, &model->moments);
    ovlm_model_forget(model);
    ovlm_model_rebind(model);
    return status;
}

ovlm_status ovlm_model_reach(const ovlm_tensor *tensor, ovlm_err *err)
{
    if (tensor->data == NULL && tensor->rows * tensor->cols > 0) {
        return OVLM_FAIL(err, OVLM_E_ARG, "the tensor is in no memory now: the model's hooks "
                                          "hold it; ask there");
    }
    return OVLM_OK;
}

/* Rows one by one where the view is not dense. */
static ovlm_status copy_rows(ovlm_model *model, const ovlm_tensor *tensor, void *host,
                             ovlm_copy_kind kind, ovlm_err *err)
{
    const ovlm_ops *ops = model->backend->ops;
    OVLM_TRY(ovlm_model_reach(tensor, err));
    int64_t row_bytes = tensor->cols * ovlm_dtype_bytes(tensor->dtype);
    bool dense = tensor->stride == tensor->cols;
    int64_t steps = dense ? 1 : tensor->rows, bytes = dense ? tensor->rows * row_bytes : row_bytes;
    int64_t stride_bytes = tensor->stride * ovlm_dtype_bytes(tensor->dtype);
    for (int64_t i = 0; i < steps && bytes > 0; i++) {
        void *device = (char *)tensor->data + i * stride_bytes;
        void *there = (char *)host + i * bytes;
        OVLM_TRY(kind == OVLM_TO_HOST
                     ? ops->copy(model->queue, there, device, bytes, kind, err)
                     : ops->copy(model->queue, device, there, bytes, kind, err));
    }
    return ops->queue_wait(model->queue, err);
}

ovlm_status ovlm_model_read(ovlm_model *model, const ovlm_tensor *tensor, void *host,
                            ovlm_err *err)
{
    return copy_rows(model, tensor, host, OVLM_TO_HOST, err);
}

ovlm_status ovlm_model_write(ovlm_model *model, const ovlm_tensor *tensor, const void *host,
                             ovlm_err *err)
{
    return copy_rows(model, tensor, (void *)(uintptr_t)host, OVLM_TO_DEVICE, err);
}

ovlm_status ovlm_model_need_grads(ovlm_model *model, ovlm_err *err)
{
    if (model->grads.data == NULL && model->params.grad_elements > 0 &&
        !model->visit.hooks.grads) {
        OVLM_TRY(ovlm_device_block_need(
            model, &model->grads,
            model->params.grad_elements * ovlm_dtype_bytes(model->exact), true, err));
        ovlm_model_rebind(model);
    }
    return OVLM_OK;
}

ovlm_status ovlm_model_zero_grad(ovlm_model *model, ovlm_err *err)
{
    if (model->grads.data == NULL) {
        return OVLM_OK;
    }
    return model->backend->ops->fill(model->queue, model->grads.data, 0, model->grads.bytes, err);
}

/* ---------------------------------------------------------------- hooks */

ovlm_status ovlm_model_need_own(const ovlm_model *model, const char *what, ovlm_err *err)
{
    if (model->visit.hooks.weights || model->visit.hooks.grads) {
        return OVLM_FAIL(err, OVLM_E_ARG, "%s: hooks hold this model's weights or gradients; do it "
                                          "before they are set, or through them", what);
    }
    if (model->spread) {
        return OVLM_FAIL(err, OVLM_E_ARG, "%s: other ranks hold some of this model's experts; do "
                                          "it before it is shared out", what);
    }
    return OVLM_OK;
}

ovlm_status ovlm_model_set_hooks(ovlm_model *model, const ovlm_model_hooks *hooks, ovlm_err *err)
{
    const ovlm_model_hooks next = hooks != NULL ? *hooks : (ovlm_model_hooks){0};
    if (model->average.data != NULL && (next.weights || next.grads)) {
        return OVLM_FAIL(err, OVLM_E_ARG, "an average of weights is kept; close it before hooks "
                                          "hold them");
    }
    OVLM_TRY(model->backend->ops->queue_wait(model->queue, err));
    if (!next.weights) {
        OVLM_TRY(need_weights(model, err));
    } else {
        ovlm_device_block_free(model, &model->weights);
        ovlm_device_block_free(model, &model->adapters);
    }
    if (next.grads) {
        ovlm_device_block_free(model, &model->grads);
    }
    if (next.weights || next.grads) {
        ovlm_device_block_free(model, &model->moments);
    }
    for (int64_t i = 0; i < model->params.units; i++) { /* none is where it was */
        model->params.unit[i].at = (ovlm_unit_memory){0};
    }
    model->hooked = hooks != NULL;
    model->visit.hooks = next;
    ovlm_model_forget(model);
    ovlm_model_rebind(model);
    return OVLM_OK;
}

void ovlm_model_place(ovlm_model *model, int64_t unit, const ovlm_unit_memory *memory)
{
    ovlm_unit_memory at = model->params.unit[unit].at;
    if (model->visit.hooks.weights) {
        at.weights = memory->weights;
        at.adapters = memory->adapters;
    }
    if (model->visit.hooks.grads) {
        at.grads = memory->grads;
    }
    ovlm_params_place(&model->params, unit, &at);
}

/* ---------------------------------------------------------------- what is held, what happened */

void ovlm_model_memory_read(const ovlm_model *model, ovlm_model_memory *memory)
{
    *memory = (ovlm_model_memory){
        .weights_bytes = model->weights.bytes + model->buffers.bytes + model->adapters.bytes,
        .training_bytes = model->grads.bytes + model->moments.bytes + model->average.bytes +
                          model->swapped.bytes,
        .activations_bytes = model->encoder[OVLM_VISION].keep.size_bytes +
                             model->encoder[OVLM_AUDIO].keep.size_bytes +
                             model->decoder_keep.size_bytes,
        .workspace_bytes = model->work.size_bytes, .cache_bytes = model->cache.bytes};
}

void ovlm_model_trace_start(ovlm_model *model)
{
    ovlm_trace_free(&model->trace);
    model->tracing = true;
}

void ovlm_model_trace_stop(ovlm_model *model, ovlm_trace *trace)
{
    *trace = model->trace;
    model->trace = (ovlm_trace){0};
    model->tracing = false;
}
