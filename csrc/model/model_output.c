/* model_output.c - what a pass found, brought to the host, and the optimizer's step. */
#include "model/model_state.h"

#include <math.h>
#include <stdlib.h>

ovlm_status ovlm_model_fetch(ovlm_model *model, void *host, const void *device, int64_t bytes,
                             ovlm_err *err)
{
    const ovlm_ops *ops = model->backend->ops;
    if (bytes > 0) {
        OVLM_TRY(ops->copy(model->queue, host, device, bytes, OVLM_TO_HOST, err));
    }
    return ops->queue_wait(model->queue, err);
}

/* Row t predicted token t+1: down by one, 0 at the start of each segment and of a shard. */
static ovlm_status fetch_shifted(ovlm_model *model, float *host, const float *device,
                                 ovlm_err *err)
{
    const ovlm_tokens *tokens = &model->decoder.tokens;
    OVLM_TRY(ovlm_model_fetch(model, host, device, tokens->T * (int64_t)sizeof *host, err));
    if (model->decoder.shard) {
        host[tokens->T] = 0.0f;
    }
    for (int64_t i = 0; i < tokens->segments; i++) {
        ovlm_token_span span = ovlm_token_span_of(tokens, i);
        for (int64_t t = span.end - span.ends; t > span.first; t--) {
            host[t] = host[t - 1];
        }
        if (span.end > span.first) {
            host[span.first] = 0.0f;
        }
    }
    return OVLM_OK;
}

int64_t ovlm_model_token_count(const ovlm_model *model)
{
    return model->has_hidden ? model->decoder.tokens.T : 0;
}

int64_t ovlm_model_label_count(const ovlm_model *model)
{
    return model->has_hidden ? model->decoder.tokens.T + model->decoder.shard : 0;
}

/* ---------------------------------------------------------------- activations */

/* In memory that lives for the call, in the exact dtype. */
static ovlm_status read_cast(ovlm_model *model, const ovlm_tensor *rows, void *memory, void *work,
                             void *host, ovlm_err *err)
{
    ovlm_scale cast = {.alpha = 1, .x = *rows, .scratch.work = work,
                       .y = ovlm_tensor_of(memory, rows->rows, rows->cols, model->exact)};
    OVLM_TRY(model->backend->ops->scale.fwd(model->queue, &cast, err));
    return ovlm_model_read(model, &cast.y, host, err);
}

ovlm_status ovlm_model_rows_read(ovlm_model *model, const ovlm_tensor *rows, void *host,
                                 ovlm_err *err)
{
    if (rows->dtype == model->exact) {
        return ovlm_model_read(model, rows, host, err);
    }
    ovlm_device_block memory = {0};
    int64_t bytes = rows->rows * rows->cols * ovlm_dtype_bytes(model->exact);
    ovlm_scale cast = {.x = *rows, .y = *rows};
    ovlm_op_bytes need = {0};
    cast.y.dtype = model->exact;
    OVLM_TRY(model->backend->ops->scale.measure(model->backend, &cast, &need, err));
    OVLM_TRY(model->backend->ops->scale.prepare(model->backend, &cast, err));
    bytes = (bytes + 63) / 64 * 64;
    OVLM_TRY(ovlm_device_block_need(model, &memory, bytes + need.fwd_work + 64, false, err));
    ovlm_status status = read_cast(model, rows, memory.data, (char *)memory.data + bytes, host,
                                   err);
    if (status != OVLM_OK) {
        (void)model->backend->ops->queue_wait(model->queue, NULL); /* before it is freed */
    }
    ovlm_device_block_free(model, &memory);
    return status;
}

ovlm_status ovlm_model_hidden_read(ovlm_model *model, void *hidden, ovlm_err *err)
{
    if (!model->has_hidden) {
        return OVLM_FAIL(err, OVLM_E_ARG, "there are no hidden states: no forward has run");
    }
    return ovlm_model_rows_read(model, &model->decoder.hidden, hidden, err);
}

const ovlm_tensor *ovlm_model_tap(const ovlm_model *model, bool vision, int64_t i)
{
    const ovlm_taps *taps = vision ? &model->vision.taps : &model->decoder.taps;
    bool kept = vision ? model->encoder[OVLM_VISION].has_features : model->has_hidden;
    return kept && i >= 0 && i < taps->n ? &taps->state[i] : NULL;
}

ovlm_status ovlm_model_tap_read(ovlm_model *model, bool vision, int64_t i, void *state,
                                ovlm_err *err)
{
    const ovlm_tensor *tap = ovlm_model_tap(model, vision, i);
    if (tap == NULL) {
        return OVLM_FAIL(err, OVLM_E_ARG, "the last pass kept no hidden states number %lld",
                         (long long)i);
    }
    return ovlm_model_read(model, tap, state, err);
}

/* ---------------------------------------------------------------- the loss */

ovlm_status ovlm_model_output_read(ovlm_model *model, ovlm_model_output *output, float *logp,
                                   float *entropy, ovlm_err *err)
{
    ovlm_model_scalars s = {0};
    if (!model->has_hidden) {
        return OVLM_FAIL(err, OVLM_E_ARG, "there is no output: no forward has run");
    }
    OVLM_TRY(ovlm_model_fetch(model, &s, model->scalars.data, (int64_t)sizeof s, err));
    *output = (ovlm_model_output){.loss = s.loss, .aux_loss = s.aux_loss,
                                  .weight_sum = s.weight_sum, .target_tokens = s.target_tokens};
    if (logp != NULL && model->has_loss) {
        OVLM_TRY(fetch_shifted(model, logp, model->head.logp, err));
    }
    if (entropy != NULL && model->has_loss && model->head.entropy != NULL) {
        OVLM_TRY(fetch_shifted(model, entropy, model->head.entropy, err));
    }
    return OVLM_OK;
}

/* Logits of some rows, all of it on the workspace. */
static ovlm_status walk_logits(ovlm_run *run, const ovlm_model *model, const int32_t *row,
                               int64_t rows, ovlm_tensor *logits)
{
    int64_t V = model->params.config.decoder.vocab, C = model->params.config.decoder.width;
    int64_t bytes = rows * (int64_t)sizeof *row;
    int32_t *index = ovlm_stack_take(run->work, bytes);
    if (!run->measuring && rows > 0) {
        OVLM_TRY(run->ops->copy(run->queue, index, row, bytes, OVLM_TO_DEVICE, run->err));
    }
    ovlm_gather pick = {.taps = 1, .index = index, .x = model->decoder.hidden,
                        .y = ovlm_stack_tensor(run->work, rows, C, model->dtype)};
    RUN(run, gather, fwd, &pick);
    *logits = ovlm_stack_tensor(run->work, rows, V, OVLM_F32);
    OVLM_TRY(ovlm_unit_enter(run, model->params.head.unit, OVLM_USE_FORWARD));
    ovlm_linear head = {.x = pick.y, .w = model->params.head.w, .y = *logits};
    RUN(run, linear, fwd, &head);
    return ovlm_unit_leave(run);
}

/* With memory that lives for one call. */
static ovlm_status logits_of(ovlm_model *model, ovlm_device_block *memory, const int32_t *row,
                             int64_t rows, float *logits, ovlm_err *err)
{
    const ovlm_pass_kind kind = {.phases = OVLM_PHASE_HEAD};
    ovlm_stack work = {0};
    ovlm_tensor y = {0};
    ovlm_run run = ovlm_model_run(model, true, &(ovlm_pass_options){0}, err);
    run.work = &work;
    OVLM_TRY(walk_logits(&run, model, row, rows, &y));
    OVLM_TRY(ovlm_device_block_need(model, memory, work.peak_bytes, false, err));
    work = (ovlm_stack){.base = memory->data, .size_bytes = memory->bytes};
    run.measuring = false;
    double start_s = ovlm_run_begin(&run);
    OVLM_TRY(ovlm_pass_begin(&run, &kind));
    OVLM_TRY(ovlm_pass_end(&run, walk_logits(&run, model, row, rows, &y)));
    ovlm_run_end(&run, "logits", -1, start_s);
    return ovlm_model_fetch(model, logits, y.data,
                            rows * y.cols * (int64_t)sizeof *logits, err);
}

ovlm_status ovlm_model_logits(ovlm_model *model, const int32_t *row, int64_t rows, float *logits,
                              ovlm_err *err)
{
    if (!model->has_hidden) {
        return OVLM_FAIL(err, OVLM_E_ARG, "there are no hidden states: no forward has run");
    }
    for (int64_t i = 0; i < rows; i++) {
        if (row[i] < 0 || row[i] >= model->decoder.tokens.T) {
            return OVLM_FAIL(err, OVLM_E_ARG, "rows[%lld] must be in [0, %lld); got %d",
                             (long long)i, (long long)model->decoder.tokens.T, row[i]);
        }
    }
    ovlm_device_block memory = {0};
    ovlm_status status = logits_of(model, &memory, row, rows, logits, err);
    if (status != OVLM_OK && memory.data != NULL) {
        (void)model->backend->ops->queue_wait(model->queue, NULL); /* before it is freed */
    }
    ovlm_device_block_free(model, &memory);
    return status;
}

/* ---------------------------------------------------------------- between passes */

ovlm_status ovlm_model_need_work(ovlm_model *model, int64_t bytes, ovlm_err *err)
{
    if (model->work.size_bytes < bytes) { /* the queue may still use what is freed */
        OVLM_TRY(model->backend->ops->queue_wait(model->queue, err));
    }
    return ovlm_stack_fit(&model->work, model->backend, OVLM_STACK_DEVICE, bytes, err);
}

ovlm_status ovlm_model_walk_alone(ovlm_model *model, ovlm_model_walk_fn walk, void *args,
                                  ovlm_err *err)
{
    const ovlm_pass_options options = {0};
    ovlm_stack work = {0};
    ovlm_run run = ovlm_model_run(model, true, &options, err);
    run.work = &work;
    OVLM_TRY(walk(&run, args));
    OVLM_TRY(ovlm_model_need_work(model, work.peak_bytes, err));
    run = ovlm_model_run(model, false, &options, err);
    return walk(&run, args);
}

static ovlm_status walk_scale(ovlm_run *run, void *args)
{
    ovlm_scale *scale = args;
    RUN(run, scale, fwd, scale);
    return OVLM_OK;
}

ovlm_status ovlm_model_scale(ovlm_model *model, ovlm_scale *args, ovlm_err *err)
{
    return ovlm_model_walk_alone(model, walk_scale, args, err);
}

/* ---------------------------------------------------------------- optimizer */

ovlm_status ovlm_model_renew_master(ovlm_model *model, int64_t parameter, ovlm_err *err)
{
    ovlm_tensor m = {0}, v = {0}, master = {0};
    if (model->moments.data == NULL || model->dtype == model->exact) {
        return OVLM_OK;
    }
    OVLM_TRY(ovlm_model_moments(model, parameter, &m, &v, &master, err));
    if (!ovlm_tensor_given(&master)) {
        return OVLM_OK;
    }
    ovlm_scale cast = {.alpha = 1, .x = model->params.param[parameter].w, .y = master};
    OVLM_TRY(ovlm_model_scale(model, &cast, err));
    return model->backend->ops->queue_wait(model->queue, err);
}

/* m, v and, for models in bfloat16, the float32 master: each laid out as the gradients are. */
static ovlm_status need_moments(ovlm_model *model, ovlm_err *err)
{
    if (model->moments.data != NULL || model->params.grad_elements == 0) {
        return OVLM_OK;
    }
    bool master = model->dtype != model->exact;
    int64_t bytes = model->params.grad_elements * ovlm_dtype_bytes(model->exact);
    OVLM_TRY(ovlm_device_block_need(model, &model->moments, bytes * (master ? 3 : 2), true, err));
    ovlm_status status = OVLM_OK;
    for (int64_t i = 0; master && i < model->params.n && status == OVLM_OK; i++) {
        status = ovlm_model_renew_master(model, i, err);
    }
    if (status != OVLM_OK) { /* a master that is not the weights' is worse than none */
        (void)model->backend->ops->queue_wait(model->queue, NULL);
        ovlm_device_block_free(model, &model->moments);
    }
    return status;
}

bool ovlm_model_has_grads(const ovlm_model *model)
{
    return model->grads.data != NULL;
}

bool ovlm_model_has_moments(const ovlm_model *model)
{
    return model->moments.data != NULL;
}

ovlm_status ovlm_model_moments(ovlm_model *model, int64_t parameter, ovlm_tensor *m,
                               ovlm_tensor *v, ovlm_tensor *master, ovlm_err *err)
{
    const ovlm_param *p = &model->params.param[parameter];
    *m = *v = *master = (ovlm_tensor){0};
    OVLM_TRY(ovlm_model_need_own(model, "optimizer state", err));
    OVLM_TRY(need_moments(model, err));
    if (p->grad_offset < 0) {
        return OVLM_OK;
    }
    int64_t element = ovlm_dtype_bytes(model->exact);
    char *base = (char *)model->moments.data + p->grad_offset * element;
    int64_t plane = model->params.grad_elements * element;
    *m = ovlm_tensor_of(base, p->rows, p->cols, model->exact);
    *v = ovlm_tensor_of(base + plane, p->rows, p->cols, model->exact);
    if (model->dtype != model->exact) {
        *master = ovlm_tensor_of(base + 2 * plane, p->rows, p->cols, model->exact);
    }
    return OVLM_OK;
}

static ovlm_status fill_parts(ovlm_model *model, const ovlm_model_adamw *options,
                              ovlm_adamw_part *part, int64_t *n, ovlm_err *err)
{
    *n = 0;
    for (int64_t i = 0; i < model->params.n; i++) {
        const ovlm_param *p = &model->params.param[i];
        if (p->grad_offset < 0) {
            continue;
        }
        ovlm_adamw_part *one = &part[(*n)++];
        *one = (ovlm_adamw_part){.w = p->w, .grad = p->grad, .lr = options->lr[i],
                                 .weight_decay = options->weight_decay[i]};
        OVLM_TRY(ovlm_model_moments(model, i, &one->m, &one->v, &one->master, err));
    }
    return OVLM_OK;
}

typedef struct step_args {
    ovlm_grad_norm norm;
    ovlm_adamw adamw;
} step_args;

static ovlm_status walk_step(ovlm_run *run, void *args)
{
    step_args *step = args;
    double start_s = ovlm_run_begin(run);
    OVLM_TRY(ovlm_run_zero(run, step->norm.stats, (int64_t)sizeof *step->norm.stats));
    RUN(run, grad_norm, fwd, &step->norm);
    RUN(run, adamw, fwd, &step->adamw);
    ovlm_run_end(run, "optimizer", -1, start_s);
    return OVLM_OK;
}

static ovlm_status run_step(ovlm_model *model, const ovlm_model_adamw *options,
                            ovlm_adamw_part *part, ovlm_model_step *step, ovlm_err *err)
{
    ovlm_model_scalars *s = model->scalars.data;
    ovlm_grad_stats *stats = (ovlm_grad_stats *)(void *)(s + 1), seen = {0};
    ovlm_tensor grads = ovlm_tensor_of(model->grads.data, 1, model->params.grad_elements,
                                       model->exact);
    step_args args = {.norm = {.n = 1, .grad = &grads, .stats = stats},
                      .adamw = {.part = part, .step = options->step, .beta1 = options->beta1,
                                .beta2 = options->beta2, .eps = options->eps,
                                .max_norm = options->max_norm, .stats = stats}};
    OVLM_TRY(fill_parts(model, options, part, &args.adamw.n, err));
    OVLM_TRY(ovlm_model_walk_alone(model, walk_step, &args, err));
    OVLM_TRY(ovlm_model_fetch(model, &seen, stats, (int64_t)sizeof seen, err));
    *step = (ovlm_model_step){.grad_norm = sqrt(seen.norm_sq), .clip = seen.clip,
                              .non_finite = seen.non_finite};
    return OVLM_OK;
}

ovlm_status ovlm_model_adamw_step(ovlm_model *model, const ovlm_model_adamw *options,
                                  ovlm_model_step *step, ovlm_err *err)
{
    *step = (ovlm_model_step){.clip = 1};
    OVLM_TRY(ovlm_model_need_own(model, "optimizer step", err));
    if (options->step < 1) {
        return OVLM_FAIL(err, OVLM_E_ARG, "step must be at least 1; got %lld",
                         (long long)options->step);
    }
    if (ovlm_model_average_in(model)) {
        return OVLM_FAIL(err, OVLM_E_ARG, "the weights are those of the average; a step is of the "
                                          "model's own");
    }
    if (model->params.grad_elements == 0) {
        return OVLM_OK;
    }
    OVLM_TRY(ovlm_model_need_grads(model, err));
    ovlm_adamw_part *part = NULL;
    OVLM_TRY(OVLM_HEAP_NEW(&part, model->params.n, err));
    ovlm_status status = run_step(model, options, part, step, err);
    ovlm_model_forget(model);
    free(part);
    return status;
}
