/* model_backward.c - the phases backward, from a forward's own loss or from the caller's slopes. */
#include "model/model_state.h"

#include <string.h>

/* ---------------------------------------------------------------- slopes */

static bool own_loss(const ovlm_model_slopes *slopes)
{
    return slopes->dlogp == NULL && slopes->dentropy == NULL && slopes->dhidden == NULL &&
           slopes->row == NULL;
}

/* A slope per token, moved up by one like the labels; zero where there is none. */
static ovlm_status upload_slopes(ovlm_run *run, const ovlm_tokens *tokens, const float *host,
                                 const float **device)
{
    int64_t bytes = tokens->T * (int64_t)sizeof(float);
    float *staged = ovlm_stack_take(run->stage, bytes);
    void *memory = ovlm_stack_take(run->work, bytes);
    *device = memory;
    if (run->measuring || bytes == 0) {
        return OVLM_OK;
    }
    memset(staged, 0, (size_t)bytes);
    for (int64_t i = 0; i < tokens->segments && host != NULL; i++) {
        ovlm_token_span span = ovlm_token_span_of(tokens, i);
        for (int64_t t = span.first; t < span.end - span.ends; t++) {
            staged[t] = host[t + 1];
        }
    }
    return run->ops->copy(run->queue, memory, staged, bytes, OVLM_TO_DEVICE, run->err);
}

/* Of the log-probabilities and entropies, or of the loss where it was not computed on the way. */
static ovlm_status head_bwd(ovlm_run *run, ovlm_model *model, const ovlm_model_slopes *slopes,
                            ovlm_tensor dhidden)
{
    ovlm_head head = model->head;
    head.fused = false;
    head.dx = dhidden;
    head.w = model->params.head.w; /* it may be elsewhere than in the forward */
    head.dw = model->params.head.dw;
    head.dw_beta = 1;
    if (!own_loss(slopes)) {
        OVLM_TRY(upload_slopes(run, &model->decoder.tokens, slopes->dlogp, &head.dlogp));
    }
    if (slopes->dentropy != NULL) {
        OVLM_TRY(upload_slopes(run, &model->decoder.tokens, slopes->dentropy, &head.dentropy));
    }
    RUN(run, head, bwd, &head);
    return OVLM_OK;
}

/* Of logits = x w^T for some rows of x; beta as in an operation's. */
static ovlm_status logits_bwd(ovlm_run *run, ovlm_model *model, const ovlm_model_slopes *slopes,
                              ovlm_tensor dhidden, float beta)
{
    const ovlm_weight *w = &model->params.head;
    int64_t rows = slopes->rows, C = w->w.cols, V = w->w.rows;
    bool below = ovlm_tensor_given(&dhidden);
    int64_t mark = run->work->used_bytes;
    void *index = NULL, *dlogits = NULL;
    OVLM_TRY(ovlm_run_upload(run, run->work, slopes->row, rows * (int64_t)sizeof *slopes->row,
                             &index));
    OVLM_TRY(ovlm_run_upload(run, run->work, slopes->dlogits,
                             rows * V * (int64_t)sizeof *slopes->dlogits, &dlogits));
    ovlm_gather pick = {.taps = 1, .index = index, .x = model->decoder.hidden,
                        .y = ovlm_stack_tensor(run->work, rows, C, run->dtype)};
    RUN_IN(run, gather, fwd, &pick, run->work);
    ovlm_tensor dy = ovlm_tensor_of(dlogits, rows, V, OVLM_F32);
    ovlm_linear head = {.x = pick.y, .w = w->w, .y = dy, .dy = dy,
                        .dw = w->dw, .dw_beta = 1};
    if (below) {
        head.dx = ovlm_stack_tensor(run->work, rows, C, run->dtype);
    }
    RUN(run, linear, bwd, &head);
    if (below) {
        pick.dy = head.dx;
        pick.dx = dhidden;
        pick.dx_beta = beta;
        RUN(run, gather, bwd, &pick);
    }
    run->work->used_bytes = mark;
    return OVLM_OK;
}

/* A tied head's gradients are added to once more, by the embedding. */
static ovlm_status leave_head(ovlm_run *run, const ovlm_model *model)
{
    return model->params.config.decoder.tied ? ovlm_unit_leave_open(run) : ovlm_unit_leave(run);
}

/* What the fused head left: its weight's gradients are added, those of its input taken. */
static ovlm_status fused_head(ovlm_run *run, ovlm_model *model, ovlm_tensor *dhidden)
{
    *dhidden = model->head.dx;
    if (!ovlm_tensor_given(&model->head.dw)) {
        return OVLM_OK;
    }
    OVLM_TRY(ovlm_unit_enter(run, model->params.head.unit, OVLM_USE_GRADIENTS));
    ovlm_scale add = {.alpha = 1, .beta = 1, .x = model->head.dw, .y = model->params.head.dw};
    RUN(run, scale, fwd, &add);
    return leave_head(run, model);
}

static bool fused(const ovlm_model *model, const ovlm_model_slopes *slopes)
{
    return own_loss(slopes) && model->head.fused;
}

/* Whether slopes of the loss, or of log-probabilities or entropies. */
static bool of_loss(const ovlm_model_slopes *slopes)
{
    return own_loss(slopes) || slopes->dlogp != NULL || slopes->dentropy != NULL;
}

static bool of_head(const ovlm_model_slopes *slopes)
{
    return of_loss(slopes) || slopes->row != NULL;
}

/* Whether the head takes part: for its weight, or for what is trained before it. */
static bool reaches_head(const ovlm_model *model, const ovlm_model_slopes *slopes)
{
    bool trained = ovlm_tensor_given(&model->params.head.dw);
    return fused(model, slopes) ? trained
                                : of_head(slopes) && (trained || model->decoder.training);
}

/* Of the hidden states, by way of all that was computed from them; left out where nothing before
 * the head is trained. */
static ovlm_status hidden_slopes(ovlm_run *run, ovlm_model *model,
                                 const ovlm_model_slopes *slopes, ovlm_tensor *dhidden)
{
    const ovlm_tensor *hidden = &model->decoder.hidden;
    float beta = 0; /* 1 as soon as dhidden holds something */
    if (fused(model, slopes)) {
        return fused_head(run, model, dhidden);
    }
    bool head = reaches_head(model, slopes);
    if (model->decoder.training) {
        *dhidden = ovlm_stack_tensor(run->work, hidden->rows, hidden->cols, run->dtype);
    }
    if (head) {
        OVLM_TRY(ovlm_unit_enter(run, model->params.head.unit, OVLM_USE_BACKWARD));
    }
    if (head && of_loss(slopes)) {
        OVLM_TRY(head_bwd(run, model, slopes, *dhidden));
        beta = 1;
    }
    if (slopes->dhidden != NULL && model->decoder.training) {
        OVLM_TRY(ovlm_run_load(run, slopes->dhidden, dhidden, (double)beta));
        beta = 1;
    }
    if (head && slopes->row != NULL) {
        OVLM_TRY(logits_bwd(run, model, slopes, *dhidden, beta));
    }
    return head ? leave_head(run, model) : OVLM_OK;
}

/* ---------------------------------------------------------------- phases */

static ovlm_status encode_bwd(ovlm_run *run, ovlm_model *model, ovlm_modality modality,
                              const ovlm_decoder_features *d)
{
    double start_s = ovlm_run_begin(run);
    run->keep = &model->encoder[modality].keep;
    if (modality == OVLM_VISION) {
        OVLM_TRY(ovlm_vision_bwd(run, &model->vision, d->image, d->extra));
        ovlm_run_end(run, "encode vision backward", -1, start_s);
    } else {
        OVLM_TRY(ovlm_audio_bwd(run, &model->audio, d->sound));
        ovlm_run_end(run, "encode audio backward", -1, start_s);
    }
    return OVLM_OK;
}

/* Room for the gradient of x. */
static ovlm_tensor gradient_of(ovlm_run *run, const ovlm_tensor *x)
{
    return ovlm_stack_tensor(run->work, x->rows, x->cols, run->dtype);
}

/* Whether the gradient of these features has a taker: the caller, who gave them, or an encoder. */
static bool wanted(const ovlm_model *model, ovlm_modality modality, const ovlm_tensor *features)
{
    return ovlm_tensor_given(features) &&
           (!model->encoder[modality].in_forward || ovlm_model_trains(model, modality));
}

ovlm_status ovlm_model_walk_backward(ovlm_run *run, ovlm_model *model,
                                     const ovlm_model_slopes *slopes,
                                     ovlm_decoder_features *dfeatures)
{
    const ovlm_decoder_features *f = &model->decoder.features;
    double start_s = ovlm_run_begin(run);
    ovlm_tensor dhidden = {0};
    OVLM_TRY(hidden_slopes(run, model, slopes, &dhidden));
    ovlm_run_end(run, "loss backward", -1, start_s);
    if (wanted(model, OVLM_VISION, &f->image)) {
        dfeatures->image = gradient_of(run, &f->image);
        for (int64_t k = 0; k < model->params.config.vision.deepstack_n; k++) {
            dfeatures->extra[k] = gradient_of(run, &f->image);
        }
    }
    if (wanted(model, OVLM_AUDIO, &f->sound)) {
        dfeatures->sound = gradient_of(run, &f->sound);
    }
    start_s = ovlm_run_begin(run);
    if (model->decoder.training) {
        OVLM_TRY(ovlm_decoder_bwd(run, &model->decoder, dhidden, dfeatures));
    }
    ovlm_run_end(run, "decode backward", -1, start_s);
    for (int m = OVLM_MODALITIES - 1; m >= 0; m--) {
        if (model->encoder[m].in_forward && ovlm_model_trains(model, (ovlm_modality)m)) {
            OVLM_TRY(encode_bwd(run, model, (ovlm_modality)m, dfeatures));
        }
    }
    return OVLM_OK;
}

/* A gradient of the host, in the model's dtype. */
static ovlm_status load_gradient(ovlm_run *run, const void *host, const ovlm_tensor *of,
                                 ovlm_tensor *d)
{
    *d = gradient_of(run, of);
    return ovlm_run_load(run, host, d, 0);
}

ovlm_status ovlm_model_walk_encode_backward(ovlm_run *run, ovlm_model *model,
                                            ovlm_modality modality, const void *dfeatures,
                                            const void *dextra)
{
    ovlm_decoder_features d = {0};
    if (!ovlm_model_trains(model, modality)) {
        return OVLM_OK;
    }
    if (modality == OVLM_AUDIO) {
        if (dfeatures != NULL) {
            OVLM_TRY(load_gradient(run, dfeatures, &model->audio.features, &d.sound));
        }
        return encode_bwd(run, model, modality, &d);
    }
    const ovlm_tensor *f = &model->vision.features;
    int64_t bytes = run->measuring ? 0 : f->rows * f->cols * ovlm_dtype_bytes(run->exact);
    if (dfeatures != NULL) {
        OVLM_TRY(load_gradient(run, dfeatures, f, &d.image));
    }
    for (int64_t k = 0; dextra != NULL && k < model->params.config.vision.deepstack_n; k++) {
        OVLM_TRY(load_gradient(run, (const char *)dextra + k * bytes, f, &d.extra[k]));
    }
    return encode_bwd(run, model, modality, &d);
}

/* ---------------------------------------------------------------- calls */

static ovlm_status check_slopes(const ovlm_model *model, const ovlm_model_slopes *slopes,
                                ovlm_err *err)
{
    if (!model->can_backward) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "backward follows a forward or decode in training mode, once");
    }
    if (!model->has_loss && (slopes->dlogp != NULL || slopes->dentropy != NULL)) {
        return OVLM_FAIL(err, OVLM_E_ARG, "dlogprobs and dentropy belong to a forward, which has "
                                          "labels; after decode give dhidden, or dlogits and rows");
    }
    if (!model->has_loss && own_loss(slopes)) {
        return OVLM_FAIL(err, OVLM_E_ARG, "decode has no loss of its own: give dhidden, or dlogits "
                                          "and rows");
    }
    if (slopes->dentropy != NULL && model->head.entropy == NULL) {
        return OVLM_FAIL(err, OVLM_E_ARG, "dentropy: the forward was not asked for the entropy");
    }
    for (int64_t i = 0; i < slopes->rows; i++) {
        if (slopes->row[i] < 0 || slopes->row[i] >= model->decoder.tokens.T) {
            return OVLM_FAIL(err, OVLM_E_ARG, "rows[%lld] must be in [0, %lld); got %d",
                             (long long)i, (long long)model->decoder.tokens.T, slopes->row[i]);
        }
    }
    return OVLM_OK;
}

/* Room for slopes whose size the forward did not know. */
static ovlm_status measure_backward(ovlm_model *model, const ovlm_model_slopes *slopes,
                                    const ovlm_pass_options *options, ovlm_err *err)
{
    ovlm_decoder_features dfeatures = {0};
    ovlm_stack work = model->work, stage = model->stage;
    model->work = model->stage = (ovlm_stack){0};
    ovlm_run run = ovlm_model_run(model, true, options, err);
    ovlm_status status = ovlm_model_walk_backward(&run, model, slopes, &dfeatures);
    int64_t work_bytes = model->work.peak_bytes, stage_bytes = model->stage.peak_bytes;
    model->work = work;
    model->stage = stage;
    OVLM_TRY(status);
    OVLM_TRY(ovlm_stack_fit(&model->work, model->backend, OVLM_STACK_DEVICE, work_bytes, err));
    return ovlm_stack_fit(&model->stage, model->backend, OVLM_STACK_HOST, stage_bytes, err);
}

static ovlm_pass_kind kind_of(const ovlm_model *model, const ovlm_model_slopes *slopes)
{
    const ovlm_decoder_features *f = &model->decoder.features;
    ovlm_pass_kind kind = {.backward = true, .phases = OVLM_PHASE_DECODE};
    kind.features = wanted(model, OVLM_VISION, &f->image) || wanted(model, OVLM_AUDIO, &f->sound);
    if (reaches_head(model, slopes)) {
        kind.phases |= OVLM_PHASE_HEAD;
    }
    for (int m = 0; m < OVLM_MODALITIES; m++) {
        if (model->encoder[m].in_forward && ovlm_model_trains(model, (ovlm_modality)m)) {
            kind.phases |= 1u << m;
        }
    }
    return kind;
}

/* Where there is such a gradient and a taker. */
static ovlm_status read_gradient(ovlm_model *model, const ovlm_tensor *d, void *host,
                                 ovlm_err *err)
{
    return host != NULL && ovlm_tensor_given(d) ? ovlm_model_rows_read(model, d, host, err)
                                                : OVLM_OK;
}

ovlm_status ovlm_model_backward(ovlm_model *model, const ovlm_model_slopes *slopes,
                                const ovlm_feature_slopes *dfeatures,
                                const ovlm_pass_options *options, ovlm_err *err)
{
    ovlm_decoder_features d = {0};
    OVLM_TRY(check_slopes(model, slopes, err));
    OVLM_TRY(ovlm_model_begin(model, err));
    model->can_backward = false;
    if (slopes->dhidden != NULL || slopes->row != NULL) {
        OVLM_TRY(measure_backward(model, slopes, options, err));
    }
    ovlm_run run = ovlm_model_run(model, false, options, err);
    const ovlm_pass_kind kind = kind_of(model, slopes);
    OVLM_TRY(ovlm_pass_begin(&run, &kind));
    OVLM_TRY(ovlm_pass_end(&run, ovlm_model_walk_backward(&run, model, slopes, &d)));
    model->work.used_bytes = 0;
    OVLM_TRY(read_gradient(model, &d.image, dfeatures->dfeatures[OVLM_VISION], err));
    OVLM_TRY(read_gradient(model, &d.sound, dfeatures->dfeatures[OVLM_AUDIO], err));
    int64_t bytes = d.image.rows * d.image.cols * ovlm_dtype_bytes(model->exact);
    for (int64_t k = 0; dfeatures->dextra != NULL && k < OVLM_DEEPSTACK_MOST; k++) {
        OVLM_TRY(read_gradient(model, &d.extra[k], (char *)dfeatures->dextra + k * bytes, err));
    }
    return OVLM_OK;
}

ovlm_status ovlm_model_encode_backward(ovlm_model *model, ovlm_modality modality,
                                       const void *dfeatures, const void *dextra,
                                       const ovlm_pass_options *options, ovlm_err *err)
{
    if (!model->encoder[modality].can_backward) {
        return OVLM_FAIL(err, OVLM_E_ARG, "encode_backward follows an encode in training mode, "
                                          "once");
    }
    OVLM_TRY(ovlm_model_begin(model, err));
    model->encoder[modality].can_backward = false;
    ovlm_run run = ovlm_model_run(model, false, options, err);
    const ovlm_pass_kind kind = {.backward = true,
                                 .phases = ovlm_model_trains(model, modality) ? 1u << modality
                                                                              : 0u};
    OVLM_TRY(ovlm_pass_begin(&run, &kind));
    OVLM_TRY(ovlm_pass_end(&run, ovlm_model_walk_encode_backward(&run, model, modality, dfeatures,
                                                                 dextra)));
    model->work.used_bytes = 0;
    return OVLM_OK;
}
