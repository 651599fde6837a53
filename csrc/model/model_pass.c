/* model_pass.c - forward and backward of the whole model.
 *
 * Each call walks its passes twice: measuring, with the backward where one may follow, so that
 * memory grows here and nowhere else; then for real. */
#include "model/model_state.h"

#include <string.h>

ovlm_run ovlm_model_run(ovlm_model *model, bool measuring, const ovlm_pass_options *options,
                        ovlm_err *err)
{
    return (ovlm_run){.queue = model->queue, .ops = model->backend->ops, .measuring = measuring,
                      .keep = &model->decoder_keep, .work = &model->work, .stage = &model->stage,
                      .dtype = model->dtype, .exact = model->exact, .poll = options->poll,
                      .poll_ctx = options->poll_ctx, .err = err};
}

static ovlm_model_scalars *scalars(const ovlm_model *model)
{
    return model->scalars.data;
}

/* ---------------------------------------------------------------- inputs */

ovlm_status ovlm_model_vision_prepare(ovlm_model *model, const ovlm_model_inputs *inputs,
                                      const ovlm_pass_options *options, ovlm_err *err)
{
    const ovlm_vision_config *c = &model->params.config.vision;
    model->has_vision = inputs->images > 0;
    if (!model->has_vision) {
        return OVLM_OK;
    }
    if (c->depth == 0) {
        return OVLM_FAIL(err, OVLM_E_ARG, "this model has no vision tower; got %lld images",
                         (long long)inputs->images);
    }
    if (inputs->pixel_dtype != OVLM_F32 && inputs->pixel_dtype != OVLM_U8) {
        return OVLM_FAIL(err, OVLM_E_ARG, "pixels must be float32 or uint8; got %s",
                         ovlm_dtype_name(inputs->pixel_dtype));
    }
    ovlm_vision_pass *pass = &model->vision;
    *pass = (ovlm_vision_pass){.params = &model->params, .pixels = inputs->pixels,
                               .pixel_dtype = inputs->pixel_dtype,
                               .training = options->training && ovlm_vision_trained(&model->params),
                               .block = model->vision_block};
    pass->context.checkpoint = options->checkpoint;
    pass->context.params = &model->params;
    OVLM_TRY(ovlm_grid_init(&pass->grid, c, inputs->grid_thw, inputs->images, &model->call, err));
    pass->tokens = pass->grid.patches / (c->merge * c->merge);
    return OVLM_OK;
}

/* The segments' host mirror must live until the backward. */
static ovlm_status keep_copy(ovlm_model *model, const void *from, int64_t count, size_t size,
                             const void **out, ovlm_err *err)
{
    void *copy = NULL;
    OVLM_TRY(ovlm_arena_alloc_raw(&model->call, &copy, count, size, err));
    memcpy(copy, from, (size_t)count * size);
    *out = copy;
    return OVLM_OK;
}

ovlm_status ovlm_model_tokens_prepare(ovlm_model *model, const ovlm_model_inputs *inputs,
                                      const ovlm_pass_options *options, ovlm_err *err)
{
    const ovlm_tokens *tokens = &inputs->tokens;
    ovlm_decoder_pass *pass = &model->decoder;
    *pass = (ovlm_decoder_pass){.params = &model->params, .tokens = *tokens,
                                .training = options->training, .block = model->decoder_block};
    OVLM_TRY(ovlm_tokens_check(tokens, model->params.config.decoder.vocab,
                               model->has_vision ? model->vision.tokens : 0, &pass->longest, err));
    const void *start = NULL;
    OVLM_TRY(keep_copy(model, tokens->start, tokens->segments + 1, sizeof *tokens->start, &start,
                       err));
    pass->tokens.start = start;
    pass->context = (ovlm_block_context){.checkpoint = options->checkpoint,
                                         .params = &model->params, .count = model->count,
                                         .score_sum = model->score_sum};
    pass->count_after = model->count_after;
    return OVLM_OK;
}

/* Before any work: on the device it would be found late, and the queue be lost. */
static ovlm_status check_labels(const ovlm_model *model, const ovlm_model_inputs *inputs,
                                ovlm_err *err)
{
    int64_t vocab = model->params.config.decoder.vocab;
    for (int64_t t = 0; inputs->label != NULL && t < inputs->tokens.T; t++) {
        int32_t label = inputs->label[t];
        if (label != -100 && (label < 0 || label >= vocab)) {
            return OVLM_FAIL(err, OVLM_E_ARG, "labels[%lld] is %d; it must be -100 or in [0, %lld)",
                             (long long)t, (int)label, (long long)vocab);
        }
    }
    return OVLM_OK;
}

/* ---------------------------------------------------------------- loss */

/* Row t of the head predicts token t+1 of its segment: labels and weights move up by one. */
static ovlm_status upload_targets(ovlm_run *run, const ovlm_model_inputs *inputs,
                                  const int32_t **label, const float **weight)
{
    const ovlm_tokens *tokens = &inputs->tokens;
    int64_t T = tokens->T, bytes = T * (int64_t)sizeof(int32_t);
    int32_t *labels = ovlm_stack_take(run->stage, bytes);
    float *weights = inputs->weight != NULL ? ovlm_stack_take(run->stage, bytes) : NULL;
    void *device_labels = ovlm_stack_take(run->keep, bytes);
    void *device_weights = inputs->weight != NULL ? ovlm_stack_take(run->keep, bytes) : NULL;
    *label = device_labels;
    *weight = device_weights;
    if (run->measuring || T == 0) {
        return OVLM_OK;
    }
    for (int64_t i = 0; i < tokens->segments; i++) {
        for (int64_t t = tokens->start[i]; t < tokens->start[i + 1]; t++) {
            bool last = t + 1 == tokens->start[i + 1];
            labels[t] = last ? -100 : inputs->label[t + 1];
            if (weights != NULL) {
                weights[t] = last ? 0.0f : inputs->weight[t + 1];
            }
        }
    }
    OVLM_TRY(run->ops->copy(run->queue, device_labels, labels, bytes, OVLM_TO_DEVICE, run->err));
    if (weights != NULL) {
        OVLM_TRY(run->ops->copy(run->queue, device_weights, weights, bytes, OVLM_TO_DEVICE,
                                run->err));
    }
    return OVLM_OK;
}

static ovlm_status target_weights(ovlm_run *run, ovlm_model *model,
                                  const ovlm_model_inputs *inputs, const int32_t *label,
                                  const float *weight, float *dlogp)
{
    ovlm_model_scalars *s = scalars(model);
    bool own = inputs->normalizer < 0;
    ovlm_targets targets = {.n = inputs->tokens.T, .label = label, .weight = weight,
                            .own_total = true, .total = &s->weight_sum,
                            .count = &s->target_tokens, .dlogp = dlogp};
    RUN(run, targets, fwd, &targets);
    if (own) {
        return OVLM_OK;
    }
    void *total = NULL;
    int64_t mark = run->work->used_bytes;
    OVLM_TRY(ovlm_run_upload(run, run->work, &inputs->normalizer, sizeof inputs->normalizer,
                             &total));
    int64_t *again = ovlm_stack_take(run->work, (int64_t)sizeof *again); /* counted above */
    targets.own_total = false;
    targets.total = total;
    targets.count = again;
    RUN(run, targets, fwd, &targets);
    run->work->used_bytes = mark;
    return OVLM_OK;
}

static ovlm_status head_fwd(ovlm_run *run, ovlm_model *model, const ovlm_model_inputs *inputs,
                            const ovlm_pass_options *options)
{
    int64_t bytes = inputs->tokens.T * (int64_t)sizeof(float);
    const int32_t *label = NULL;
    const float *weight = NULL;
    float *dlogp = ovlm_stack_take(run->keep, bytes);
    OVLM_TRY(upload_targets(run, inputs, &label, &weight));
    OVLM_TRY(target_weights(run, model, inputs, label, weight, dlogp));
    model->head = (ovlm_head){
        .x = model->decoder.hidden, .w = model->params.head.w, .label = label,
        .logp = ovlm_stack_take(run->keep, bytes),
        .entropy = options->entropy ? ovlm_stack_take(run->keep, bytes) : NULL, .dlogp = dlogp,
        .loss = &scalars(model)->loss};
    RUN_IN(run, head, fwd, &model->head, run->keep);
    return OVLM_OK;
}

/* Router loss over all layers of this call, with the whole batch's counts where they are given. */
static ovlm_status balance_fwd(ovlm_run *run, ovlm_model *model, const ovlm_model_inputs *inputs)
{
    const ovlm_decoder_config *c = &model->params.config.decoder;
    ovlm_model_scalars *s = scalars(model);
    if (c->experts == 0) {
        return OVLM_OK;
    }
    double rows = (double)(ovlm_decoder_sparse_layers(c) * inputs->tokens.T);
    void *count = model->count;
    int64_t mark = run->work->used_bytes;
    if (inputs->router_count != NULL) {
        OVLM_TRY(ovlm_run_upload(run, run->work, inputs->router_count,
                                 c->experts * (int64_t)sizeof(int64_t), &count));
        rows = inputs->router_rows;
    }
    ovlm_balance_loss loss = {.experts = c->experts, .rows = rows > 0 ? rows : 1, .coef = 1,
                              .count = count, .score_sum = model->score_sum,
                              .loss = &s->aux_loss};
    RUN(run, balance_loss, fwd, &loss);
    if (c->aux_coef > 0) {
        loss.coef = c->aux_coef;
        loss.loss = &s->loss;
        loss.slope = model->slope;
        RUN(run, balance_loss, fwd, &loss);
        model->decoder.context.aux = ovlm_tensor_of(model->slope, 1, c->experts, OVLM_F32);
    }
    run->work->used_bytes = mark;
    return OVLM_OK;
}

/* ---------------------------------------------------------------- forward */

static ovlm_status walk_forward(ovlm_run *run, ovlm_model *model, const ovlm_model_inputs *inputs,
                                const ovlm_pass_options *options)
{
    ovlm_decoder_pass *decoder = &model->decoder;
    OVLM_TRY(ovlm_run_zero(run, model->scalars.data, (int64_t)sizeof(ovlm_model_scalars)));
    OVLM_TRY(ovlm_run_zero(run, model->routing.data, model->routing.bytes));
    if (model->has_vision) {
        run->keep = &model->vision_keep;
        OVLM_TRY(ovlm_vision_fwd(run, &model->vision));
        decoder->features = model->vision.features;
        memcpy(decoder->extra, model->vision.extra, sizeof decoder->extra);
        run->keep = &model->decoder_keep;
    }
    OVLM_TRY(ovlm_decoder_fwd(run, decoder));
    if (inputs->label != NULL) {
        OVLM_TRY(head_fwd(run, model, inputs, options));
        OVLM_TRY(balance_fwd(run, model, inputs));
    }
    return OVLM_OK;
}

static ovlm_status walk_backward(ovlm_run *run, ovlm_model *model)
{
    const ovlm_params *p = &model->params;
    ovlm_decoder_pass *decoder = &model->decoder;
    ovlm_head *head = &model->head;
    head->dx = ovlm_stack_tensor(run->work, decoder->hidden.rows, decoder->hidden.cols,
                                 run->dtype);
    head->dw = p->head.dw;
    head->dw_beta = 1;
    RUN(run, head, bwd, head);
    ovlm_tensor dfeatures = {0}, dextra[OVLM_DEEPSTACK_MOST] = {{0}};
    bool vision = model->has_vision && model->vision.training;
    if (vision) {
        const ovlm_tensor *f = &model->vision.features;
        dfeatures = ovlm_stack_tensor(run->work, f->rows, f->cols, run->dtype);
        for (int64_t k = 0; k < p->config.vision.deepstack_n; k++) {
            dextra[k] = ovlm_stack_tensor(run->work, f->rows, f->cols, run->dtype);
        }
    }
    OVLM_TRY(ovlm_decoder_bwd(run, decoder, head->dx, dfeatures, dextra));
    if (vision) {
        run->keep = &model->vision_keep;
        OVLM_TRY(ovlm_vision_bwd(run, &model->vision, dfeatures, dextra));
    }
    return OVLM_OK;
}

/* Sizes of a forward and of the backward that may follow. */
static ovlm_status measure(ovlm_model *model, const ovlm_model_inputs *inputs,
                           const ovlm_pass_options *options, ovlm_err *err)
{
    ovlm_stack *stacks[] = {&model->vision_keep, &model->decoder_keep, &model->work,
                            &model->stage};
    ovlm_stack held[4];
    for (int i = 0; i < 4; i++) {
        held[i] = *stacks[i];
        *stacks[i] = (ovlm_stack){0};
    }
    ovlm_run run = ovlm_model_run(model, true, options, err);
    ovlm_status status = walk_forward(&run, model, inputs, options);
    if (status == OVLM_OK && options->training && inputs->label != NULL) {
        /* dlogp and dentropy of the caller are uploaded to the workspace. */
        int64_t bytes = inputs->tokens.T * (int64_t)sizeof(float);
        for (int i = 0; i < 2; i++) {
            (void)ovlm_stack_take(run.work, bytes);
            (void)ovlm_stack_take(run.stage, bytes);
        }
        status = walk_backward(&run, model);
    }
    for (int i = 0; i < 4; i++) {
        int64_t peak = stacks[i]->peak_bytes;
        *stacks[i] = held[i];
        if (status == OVLM_OK) {
            status = ovlm_stack_fit(stacks[i], model->backend,
                                    i == 3 ? OVLM_STACK_HOST : OVLM_STACK_DEVICE, peak, err);
        }
    }
    return status;
}

ovlm_status ovlm_model_forward(ovlm_model *model, const ovlm_model_inputs *inputs,
                               const ovlm_pass_options *options, ovlm_err *err)
{
    model->can_backward = model->has_hidden = false;
    if (options->training && ovlm_model_lora_merged(model)) {
        return OVLM_FAIL(err, OVLM_E_ARG, "the adapters are merged: unmerge them to train, or call "
                                          "forward with training=False");
    }
    OVLM_TRY(model->backend->ops->queue_wait(model->queue, err)); /* memory below is free now */
    ovlm_arena_free(&model->call);
    OVLM_TRY(ovlm_model_vision_prepare(model, inputs, options, err));
    OVLM_TRY(ovlm_model_tokens_prepare(model, inputs, options, err));
    OVLM_TRY(check_labels(model, inputs, err));
    if (options->training) {
        OVLM_TRY(ovlm_model_need_grads(model, err));
    }
    OVLM_TRY(measure(model, inputs, options, err));
    ovlm_run run = ovlm_model_run(model, false, options, err);
    OVLM_TRY(walk_forward(&run, model, inputs, options));
    model->has_loss = inputs->label != NULL;
    model->can_backward = options->training && model->has_loss;
    model->has_hidden = true;
    return OVLM_OK;
}

/* The caller's slopes, moved up by one like the labels; the forward's own when NULL. */
static ovlm_status upload_slopes(ovlm_run *run, const ovlm_tokens *tokens, const float *host,
                                 const float **device)
{
    if (host == NULL) {
        return OVLM_OK;
    }
    int64_t bytes = tokens->T * (int64_t)sizeof(float);
    float *staged = ovlm_stack_take(run->stage, bytes);
    void *memory = ovlm_stack_take(run->work, bytes);
    *device = memory;
    for (int64_t i = 0; i < tokens->segments; i++) {
        for (int64_t t = tokens->start[i]; t < tokens->start[i + 1]; t++) {
            staged[t] = t + 1 < tokens->start[i + 1] ? host[t + 1] : 0.0f;
        }
    }
    if (bytes == 0) {
        return OVLM_OK;
    }
    return run->ops->copy(run->queue, memory, staged, bytes, OVLM_TO_DEVICE, run->err);
}

ovlm_status ovlm_model_backward(ovlm_model *model, const float *dlogp, const float *dentropy,
                                const ovlm_pass_options *options, ovlm_err *err)
{
    if (!model->can_backward) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "backward follows a forward with labels in training mode, once");
    }
    if (dentropy != NULL && model->head.entropy == NULL) {
        return OVLM_FAIL(err, OVLM_E_ARG, "dentropy: the forward was not asked for the entropy");
    }
    model->can_backward = false;
    ovlm_run run = ovlm_model_run(model, false, options, err);
    int64_t mark = run.work->used_bytes;
    OVLM_TRY(upload_slopes(&run, &model->decoder.tokens, dlogp, &model->head.dlogp));
    OVLM_TRY(upload_slopes(&run, &model->decoder.tokens, dentropy, &model->head.dentropy));
    OVLM_TRY(walk_backward(&run, model));
    run.work->used_bytes = mark;
    return OVLM_OK;
}
