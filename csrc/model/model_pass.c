/* model_pass.c - the phases forward: encode, decode, loss.
 *
 * Each call walks its phases twice: measuring, with the backwards that may follow, so that memory
 * grows here; then for real.  Between passes the workspace and the staging memory hold nothing. */
#include "model/model_state.h"

#include <string.h>

ovlm_run ovlm_model_run(ovlm_model *model, bool measuring, const ovlm_pass_options *options,
                        ovlm_err *err)
{
    return (ovlm_run){.queue = model->queue, .ops = model->backend->ops, .measuring = measuring,
                      .keep = &model->decoder_keep, .work = &model->work, .stage = &model->stage,
                      .dtype = model->dtype, .exact = model->exact, .poll = options->poll,
                      .poll_ctx = options->poll_ctx,
                      .trace = model->tracing ? &model->trace : NULL,
                      .visit = model->hooked ? &model->visit : NULL, .err = err};
}

ovlm_status ovlm_model_begin(ovlm_model *model, ovlm_err *err)
{
    OVLM_TRY(model->backend->ops->queue_wait(model->queue, err));
    model->work.used_bytes = model->stage.used_bytes = 0;
    return OVLM_OK;
}

/* Bit i of the phases needs stack i, and all of them the last two; the host's comes last. */
#define STACKS(model)                                                                        \
    {&(model)->encoder[OVLM_VISION].keep, &(model)->encoder[OVLM_AUDIO].keep,                \
     &(model)->decoder_keep, &(model)->work, &(model)->stage}

ovlm_run ovlm_model_measure_begin(ovlm_model *model, const ovlm_pass_options *options,
                                  ovlm_stack held[OVLM_MODEL_STACKS], ovlm_err *err)
{
    ovlm_stack *const stacks[OVLM_MODEL_STACKS] = STACKS(model);
    for (int i = 0; i < OVLM_MODEL_STACKS; i++) {
        held[i] = *stacks[i];
        *stacks[i] = (ovlm_stack){0};
    }
    return ovlm_model_run(model, true, options, err);
}

ovlm_status ovlm_model_measure_end(ovlm_model *model, const ovlm_stack held[OVLM_MODEL_STACKS],
                                   unsigned phases, ovlm_status status, ovlm_err *err)
{
    ovlm_stack *const stacks[OVLM_MODEL_STACKS] = STACKS(model);
    for (int i = 0; i < OVLM_MODEL_STACKS; i++) {
        int64_t peak = stacks[i]->peak_bytes;
        *stacks[i] = held[i];
        if (status == OVLM_OK && (i > OVLM_MODALITIES || phases & 1u << i)) {
            bool host = i + 1 == OVLM_MODEL_STACKS;
            status = ovlm_stack_fit(stacks[i], model->backend,
                                    host ? OVLM_STACK_HOST : OVLM_STACK_DEVICE, peak, err);
        }
    }
    return status;
}

void ovlm_model_set_expert_rows(ovlm_model *model, int64_t rows)
{
    model->expert_rows = rows;
}

static ovlm_model_scalars *scalars(const ovlm_model *model)
{
    return model->scalars.data;
}

/* ---------------------------------------------------------------- inputs */

/* Rows of features that the tokens may name. */
static ovlm_status count_features(const ovlm_model *model, const ovlm_model_inputs *inputs,
                                  int64_t *rows, ovlm_err *err)
{
    static const char *const what[OVLM_MODALITIES] = {"images", "sounds"};
    *rows = 0;
    for (int m = 0; m < OVLM_MODALITIES; m++) {
        bool encoded = model->encoder[m].in_forward, given = inputs->given[m].features != NULL;
        if (encoded && given) {
            return OVLM_FAIL(err, OVLM_E_ARG, "features stand for the %s' own; give either "
                                              "features or %s", what[m], what[m]);
        }
        *rows += encoded ? ovlm_model_feature_rows(model, (ovlm_modality)m)
                 : given ? inputs->given[m].rows
                         : 0;
    }
    if (inputs->given[OVLM_VISION].features != NULL && inputs->extra == NULL &&
        model->params.config.vision.deepstack_n > 0) {
        return OVLM_FAIL(err, OVLM_E_ARG, "extra is missing: this model adds DeepStack's features "
                                          "after its first %lld layers",
                         (long long)model->params.config.vision.deepstack_n);
    }
    return OVLM_OK;
}

/* How far down a backward will go; after the encoders are prepared. */
static void find_lowest(ovlm_model *model, const ovlm_model_inputs *inputs, bool training)
{
    const ovlm_params *p = &model->params;
    ovlm_decoder_pass *pass = &model->decoder;
    int64_t depth = p->config.decoder.depth;
    bool fed = ovlm_unit_trained(p, p->embed.unit);
    for (int m = 0; m < OVLM_MODALITIES; m++) {
        fed = fed || inputs->given[m].features != NULL ||
              (model->encoder[m].in_forward && ovlm_model_trains(model, (ovlm_modality)m));
    }
    pass->lowest = ovlm_blocks_lowest(p, p->decoder, depth, fed);
    pass->training = training && (pass->lowest < depth || ovlm_unit_trained(p, p->norm.unit));
}

/* The segments' end says how many tokens the group has, and so which of them are this rank's. */
static ovlm_status prepare_shard(ovlm_model *model, const ovlm_sequence *sequence, ovlm_err *err)
{
    const ovlm_decoder_config *c = &model->params.config.decoder;
    ovlm_decoder_pass *pass = &model->decoder;
    ovlm_sequence_pass *shard = NULL;
    int64_t total = pass->tokens.start[pass->tokens.segments];
    OVLM_TRY(ovlm_sequence_prepare(sequence, pass->tokens.start, pass->tokens.segments, c->heads,
                                   c->kv_heads, &model->call, &shard, err));
    const ovlm_sequence_part *own = ovlm_sequence_own(shard);
    if (pass->tokens.T != own->rows) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "rank %lld of a group of %lld has %lld of its %lld tokens; cu_seqlens are "
                         "the whole group's, of which this rank's share is %lld",
                         (long long)sequence->rank, (long long)sequence->degree,
                         (long long)pass->tokens.T, (long long)total, (long long)own->rows);
    }
    pass->tokens.first = own->first;
    pass->context.sequence = sequence->degree > 1 ? shard : NULL;
    pass->shard = true;
    return OVLM_OK;
}

/* All ranks that share experts say how many tokens they have. */
static ovlm_status prepare_experts(ovlm_model *model, const ovlm_pass_options *options,
                                   ovlm_err *err)
{
    const ovlm_decoder_config *c = &model->params.config.decoder;
    ovlm_decoder_pass *pass = &model->decoder;
    const ovlm_expert_terms terms = {
        .T = pass->tokens.T, .k = c->k, .layers = c->depth, .experts = c->experts,
        .chunk_rows = model->expert_rows,
        .kind = (int64_t)options->checkpoint * 2 + (int64_t)pass->training};
    ovlm_expert_pass *experts = NULL;
    OVLM_TRY(ovlm_expert_prepare(&model->expert_group, &terms, &model->call, &experts, err));
    pass->context.experts = experts;
    return OVLM_OK;
}

static ovlm_status prepare_tokens(ovlm_model *model, const ovlm_model_inputs *inputs,
                                  const ovlm_pass_options *options, ovlm_err *err)
{
    const ovlm_decoder_config *c = &model->params.config.decoder;
    const ovlm_tokens *tokens = &inputs->tokens;
    ovlm_decoder_pass *pass = &model->decoder;
    *pass = (ovlm_decoder_pass){.params = &model->params, .tokens = *tokens,
                                .block = model->decoder_block};
    int64_t rows = 0;
    find_lowest(model, inputs, options->training);
    OVLM_TRY(count_features(model, inputs, &rows, err));
    OVLM_TRY(ovlm_tokens_check(tokens, inputs->sequence != NULL, c->vocab, rows, &pass->longest,
                               err));
    int32_t *start = NULL; /* must live until the backward */
    OVLM_TRY(OVLM_ARENA_RAW(&model->call, &start, tokens->segments + 1, err));
    memcpy(start, tokens->start, (size_t)(tokens->segments + 1) * sizeof *start);
    pass->tokens.start = start;
    OVLM_TRY(ovlm_taps_init(&pass->taps, options->taps.entry, options->taps.n, c->depth,
                            &model->call, err));
    pass->context = (ovlm_block_context){.checkpoint = options->checkpoint,
                                         .expert_rows = model->expert_rows,
                                         .params = &model->params, .count = model->count,
                                         .score_sum = model->score_sum};
    pass->count_after = model->count_after;
    if (inputs->sequence != NULL) {
        OVLM_TRY(prepare_shard(model, inputs->sequence, err));
    }
    return model->spread ? prepare_experts(model, options, err) : OVLM_OK;
}

/* Before any work: on the device it would be found late, and the queue be lost. */
static ovlm_status check_labels(const ovlm_model *model, const ovlm_model_inputs *inputs,
                                ovlm_err *err)
{
    int64_t vocab = model->params.config.decoder.vocab;
    int64_t labels = inputs->tokens.T + model->decoder.shard;
    for (int64_t t = 0; inputs->label != NULL && t < labels; t++) {
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
static ovlm_status upload_targets(ovlm_run *run, const ovlm_model *model,
                                  const ovlm_model_inputs *inputs, const int32_t **label,
                                  const float **weight)
{
    const ovlm_tokens *tokens = &model->decoder.tokens;
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
        ovlm_token_span span = ovlm_token_span_of(tokens, i);
        for (int64_t t = span.first; t < span.end; t++) {
            bool last = span.ends && t + 1 == span.end;
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
    OVLM_TRY(upload_targets(run, model, inputs, &label, &weight));
    OVLM_TRY(target_weights(run, model, inputs, label, weight, dlogp));
    model->head = (ovlm_head){
        .x = model->decoder.hidden, .label = label,
        .logp = ovlm_stack_take(run->keep, bytes),
        .entropy = options->entropy ? ovlm_stack_take(run->keep, bytes) : NULL, .dlogp = dlogp,
        .loss = &scalars(model)->loss};
    bool trained = ovlm_tensor_given(&model->params.head.dw);
    if (options->own_loss && options->training && (trained || model->decoder.training)) {
        /* The head's gradients in the pass that has the logits at hand; they wait for the
         * backward, as a forward alone changes no gradient. */
        const ovlm_tensor *x = &model->head.x, *w = &model->params.head.w;
        model->head.fused = true;
        if (model->decoder.training) {
            model->head.dx = ovlm_stack_tensor(run->keep, x->rows, x->cols, run->dtype);
        }
        if (trained) {
            model->head.dw = ovlm_stack_tensor(run->keep, w->rows, w->cols, run->exact);
        }
    }
    OVLM_TRY(ovlm_unit_enter(run, model->params.head.unit, OVLM_USE_FORWARD));
    model->head.w = model->params.head.w;
    RUN_IN(run, head, fwd, &model->head, run->keep);
    return ovlm_unit_leave(run);
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

/* ---------------------------------------------------------------- phases */

/* Rows of the host, in the model's dtype. */
static ovlm_status load_rows(ovlm_run *run, const ovlm_model *model, const void *host,
                             int64_t rows, ovlm_tensor *to)
{
    *to = ovlm_stack_tensor(run->keep, rows, model->params.config.decoder.width, run->dtype);
    return ovlm_run_load(run, host, to, 0);
}

/* Features that the caller gives. */
static ovlm_status load_features(ovlm_run *run, ovlm_model *model, const ovlm_model_inputs *inputs)
{
    ovlm_decoder_features *to = &model->decoder.features;
    ovlm_tensor *all[OVLM_MODALITIES] = {&to->image, &to->sound};
    for (int m = 0; m < OVLM_MODALITIES; m++) {
        if (inputs->given[m].features != NULL) {
            OVLM_TRY(load_rows(run, model, inputs->given[m].features, inputs->given[m].rows,
                               all[m]));
        }
    }
    if (inputs->given[OVLM_VISION].features == NULL) {
        return OVLM_OK;
    }
    int64_t rows = inputs->given[OVLM_VISION].rows;
    int64_t bytes = rows * model->params.config.decoder.width * ovlm_dtype_bytes(run->exact);
    for (int64_t k = 0; k < model->params.config.vision.deepstack_n; k++) {
        OVLM_TRY(load_rows(run, model, (const char *)inputs->extra + k * bytes, rows,
                           &to->extra[k]));
    }
    return OVLM_OK;
}

static ovlm_status walk_decode(ovlm_run *run, ovlm_model *model, const ovlm_model_inputs *inputs,
                               const ovlm_pass_options *options)
{
    double start_s = ovlm_run_begin(run);
    run->keep = &model->decoder_keep;
    OVLM_TRY(ovlm_run_zero(run, model->scalars.data, (int64_t)sizeof(ovlm_model_scalars)));
    OVLM_TRY(ovlm_run_zero(run, model->routing.data, model->routing.bytes));
    ovlm_model_take_features(model);
    OVLM_TRY(load_features(run, model, inputs));
    OVLM_TRY(ovlm_decoder_fwd(run, &model->decoder));
    ovlm_run_end(run, "decode", -1, start_s);
    start_s = ovlm_run_begin(run);
    if (inputs->label != NULL) {
        OVLM_TRY(head_fwd(run, model, inputs, options));
    }
    OVLM_TRY(balance_fwd(run, model, inputs));
    ovlm_run_end(run, "loss", -1, start_s);
    return OVLM_OK;
}

static ovlm_status walk(ovlm_run *run, ovlm_model *model, const ovlm_model_inputs *inputs,
                        const ovlm_pass_options *options, unsigned phases)
{
    OVLM_TRY(ovlm_model_walk_encode(run, model, phases));
    return phases & OVLM_PHASE_DECODE ? walk_decode(run, model, inputs, options) : OVLM_OK;
}

/* What may follow, with the slopes that take the most memory of those whose size is known. */
static ovlm_status measure_backward(ovlm_run *run, ovlm_model *model,
                                    const ovlm_model_inputs *inputs,
                                    const ovlm_pass_options *options, unsigned phases)
{
    const float some = 0; /* is not read while measuring */
    ovlm_decoder_features dfeatures = {0};
    ovlm_model_slopes slopes = {0};
    run->work->used_bytes = run->stage->used_bytes = 0;
    if (!(phases & OVLM_PHASE_DECODE)) {
        return ovlm_model_walk_encode_backward(
            run, model, phases & 1u << OVLM_VISION ? OVLM_VISION : OVLM_AUDIO, &some, &some);
    }
    if (inputs->label != NULL) {
        slopes.dlogp = &some;
        slopes.dentropy = options->entropy ? &some : NULL;
    } else {
        slopes.dhidden = &some;
    }
    OVLM_TRY(ovlm_model_walk_backward(run, model, &slopes, &dfeatures));
    if (inputs->label == NULL || !model->head.fused) {
        return OVLM_OK;
    }
    /* The loss's own slopes, which the head left behind, go another way. */
    run->work->used_bytes = run->stage->used_bytes = 0;
    dfeatures = (ovlm_decoder_features){0};
    return ovlm_model_walk_backward(run, model, &(ovlm_model_slopes){0}, &dfeatures);
}

/* Sizes of the phases and of the backwards that may follow; makes room for them. */
static ovlm_status measure(ovlm_model *model, const ovlm_model_inputs *inputs,
                           const ovlm_pass_options *options, unsigned phases, ovlm_err *err)
{
    ovlm_stack held[OVLM_MODEL_STACKS];
    ovlm_run run = ovlm_model_measure_begin(model, options, held, err);
    ovlm_status status = walk(&run, model, inputs, options, phases);
    if (status == OVLM_OK && options->training) {
        status = measure_backward(&run, model, inputs, options, phases);
    }
    return ovlm_model_measure_end(model, held, phases, status, err);
}

/* ---------------------------------------------------------------- calls */

unsigned ovlm_model_phases(const ovlm_model *model, const ovlm_model_inputs *inputs)
{
    const ovlm_model_config *c = &model->params.config;
    const int64_t items[OVLM_MODALITIES] = {inputs->images, inputs->sounds};
    const int64_t depth[OVLM_MODALITIES] = {c->vision.depth, c->audio.depth};
    const int32_t *const sizes[OVLM_MODALITIES] = {inputs->grid_thw, inputs->mel_length};
    unsigned phases = OVLM_PHASE_DECODE;
    for (int m = 0; m < OVLM_MODALITIES; m++) {
        /* None of them are still a phase, where there is a tower and nothing stands for it. */
        bool none = depth[m] > 0 && sizes[m] != NULL && inputs->given[m].features == NULL;
        phases |= items[m] > 0 || none ? 1u << m : 0u;
    }
    return phases;
}

ovlm_status ovlm_model_prepare(ovlm_model *model, const ovlm_model_inputs *inputs,
                               const ovlm_pass_options *options, unsigned phases, ovlm_err *err)
{
    bool decode = phases & OVLM_PHASE_DECODE;
    if (decode) {
        model->can_backward = model->has_hidden = model->has_loss = false;
        ovlm_arena_free(&model->call);
    }
    for (int m = 0; m < OVLM_MODALITIES; m++) {
        bool encode = phases & 1u << m;
        if (decode) {
            model->encoder[m].in_forward = encode;
        }
        if (encode) {
            OVLM_TRY(ovlm_model_encode_prepare(model, (ovlm_modality)m, inputs, options, err));
        }
    }
    if (decode) {
        OVLM_TRY(prepare_tokens(model, inputs, options, err));
        OVLM_TRY(check_labels(model, inputs, err));
    }
    return options->training ? ovlm_model_need_grads(model, err) : OVLM_OK;
}

static ovlm_status run_phases(ovlm_model *model, const ovlm_model_inputs *inputs,
                              const ovlm_pass_options *options, unsigned phases, ovlm_err *err)
{
    if (options->training && ovlm_model_lora_merged(model)) {
        return OVLM_FAIL(err, OVLM_E_ARG, "the adapters are merged: unmerge them to train, or pass "
                                          "training=False");
    }
    OVLM_TRY(ovlm_model_begin(model, err));
    OVLM_TRY(ovlm_model_prepare(model, inputs, options, phases, err));
    OVLM_TRY(measure(model, inputs, options, phases, err));
    ovlm_run run = ovlm_model_run(model, false, options, err);
    bool decode = phases & OVLM_PHASE_DECODE;
    const ovlm_pass_kind kind = {
        .phases = phases | (decode && inputs->label != NULL ? (unsigned)OVLM_PHASE_HEAD : 0u)};
    OVLM_TRY(ovlm_pass_begin(&run, &kind));
    OVLM_TRY(ovlm_pass_end(&run, walk(&run, model, inputs, options, phases)));
    for (int m = 0; m < OVLM_MODALITIES; m++) {
        if (phases & 1u << m) {
            model->encoder[m].has_features = true;
            model->encoder[m].can_backward = options->training && !decode;
        }
    }
    if (decode) {
        model->has_hidden = true;
        model->has_loss = inputs->label != NULL;
        model->can_backward = options->training;
    }
    return OVLM_OK;
}

ovlm_status ovlm_model_encode(ovlm_model *model, ovlm_modality modality,
                              const ovlm_model_inputs *inputs, const ovlm_pass_options *options,
                              ovlm_err *err)
{
    return run_phases(model, inputs, options, 1u << modality, err);
}

ovlm_status ovlm_model_forward(ovlm_model *model, const ovlm_model_inputs *inputs,
                               const ovlm_pass_options *options, ovlm_err *err)
{
    return run_phases(model, inputs, options, ovlm_model_phases(model, inputs), err);
}
