/* decoder.c - embedding with features in place, M-RoPE, blocks, DeepStack additions, last norm. */
#include "model/decoder.h"

#include "model/vision.h"

#include <math.h>

ovlm_status ovlm_tokens_check(const ovlm_tokens *tokens, bool shard, int64_t vocab,
                              int64_t feature_rows, int64_t *longest, ovlm_err *err)
{
    *longest = 0;
    if (tokens->start[0] != 0 || (!shard && tokens->start[tokens->segments] != tokens->T)) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "cu_seqlens must run from 0 to the %lld tokens; it runs from %d to %d",
                         (long long)tokens->T, tokens->start[0],
                         tokens->start[tokens->segments]);
    }
    for (int64_t i = 0; i < tokens->segments; i++) {
        int64_t length = (int64_t)tokens->start[i + 1] - tokens->start[i];
        if (length < 0) {
            return OVLM_FAIL(err, OVLM_E_ARG, "cu_seqlens must ascend; entry %lld does not",
                             (long long)(i + 1));
        }
        *longest = length > *longest ? length : *longest;
    }
    for (int64_t t = 0; t < tokens->T; t++) {
        if (tokens->id[t] < 0 || tokens->id[t] >= vocab) {
            return OVLM_FAIL(err, OVLM_E_ARG, "input_ids[%lld] must be in [0, %lld); got %d",
                             (long long)t, (long long)vocab, tokens->id[t]);
        }
        int64_t row = tokens->feature_row == NULL ? -1 : tokens->feature_row[t];
        if (row < -1 || row >= feature_rows) {
            return OVLM_FAIL(err, OVLM_E_ARG,
                             "token %lld stands for feature %lld, but images and sounds give %lld",
                             (long long)t, (long long)row, (long long)feature_rows);
        }
    }
    return OVLM_OK;
}

ovlm_token_span ovlm_token_span_of(const ovlm_tokens *tokens, int64_t segment)
{
    int64_t first = tokens->start[segment] - tokens->first;
    int64_t end = tokens->start[segment + 1] - tokens->first, T = tokens->T;
    ovlm_token_span span = {.first = first < 0 ? 0 : first < T ? first : T};
    span.end = end < span.first ? span.first : end < T ? end : T;
    span.begins = span.end > span.first && first == span.first;
    span.ends = span.end > span.first && end == span.end;
    return span;
}

/* What the residual stream is gathered from. */
typedef enum source { FROM_TABLE, FROM_IMAGES, FROM_SOUNDS } source;

/* Token t's row of a source, or -1 where it stands for something else. */
static int32_t row_of(const ovlm_decoder_pass *pass, int64_t t, source from)
{
    int64_t row = pass->tokens.feature_row == NULL ? -1 : pass->tokens.feature_row[t];
    int64_t images = ovlm_tensor_given(&pass->features.image) ? pass->features.image.rows : 0;
    switch (from) {
    case FROM_TABLE: return row < 0 ? pass->tokens.id[t] : -1;
    case FROM_IMAGES: return row < images ? (int32_t)row : -1;
    case FROM_SOUNDS: return row >= images ? (int32_t)(row - images) : -1;
    }
    return -1;
}

static ovlm_status upload_rows(ovlm_run *run, ovlm_decoder_pass *pass, ovlm_stack *stack,
                               source from, const int32_t **rows)
{
    int64_t T = pass->tokens.T, bytes = T * (int64_t)sizeof(int32_t);
    int32_t *staged = ovlm_stack_take(run->stage, bytes);
    int32_t *device = ovlm_stack_take(stack, bytes);
    *rows = device;
    if (run->measuring || T == 0) {
        return OVLM_OK;
    }
    for (int64_t t = 0; t < T; t++) {
        staged[t] = row_of(pass, t, from);
    }
    return run->ops->copy(run->queue, device, staged, bytes, OVLM_TO_DEVICE, run->err);
}

/* Embeddings, with features where they stand. */
static ovlm_status embed(ovlm_run *run, ovlm_decoder_pass *pass, ovlm_stack *stack, ovlm_tensor h)
{
    const int32_t *embed_row = NULL, *feature_row = NULL, *sound_row = NULL;
    OVLM_TRY(upload_rows(run, pass, stack, FROM_TABLE, &embed_row));
    OVLM_TRY(ovlm_unit_enter(run, pass->params->embed.unit, OVLM_USE_FORWARD));
    pass->embed = (ovlm_gather){.taps = 1, .index = embed_row, .x = pass->params->embed.w, .y = h};
    RUN_IN(run, gather, fwd, &pass->embed, stack);
    OVLM_TRY(ovlm_unit_leave(run));
    if (ovlm_tensor_given(&pass->features.sound)) {
        OVLM_TRY(upload_rows(run, pass, stack, FROM_SOUNDS, &sound_row));
        pass->mix_sounds = (ovlm_gather){.taps = 1, .unique = true, .index = sound_row,
                                         .x = pass->features.sound, .y = h, .y_beta = 1};
        RUN_IN(run, gather, fwd, &pass->mix_sounds, stack);
    }
    if (!ovlm_tensor_given(&pass->features.image)) {
        return OVLM_OK;
    }
    OVLM_TRY(upload_rows(run, pass, stack, FROM_IMAGES, &feature_row));
    pass->mix = (ovlm_gather){.taps = 1, .unique = true, .index = feature_row,
                              .x = pass->features.image, .y = h, .y_beta = 1};
    RUN_IN(run, gather, fwd, &pass->mix, stack);
    for (int64_t k = 0; k < pass->params->config.vision.deepstack_n; k++) {
        pass->deepstack[k] = pass->mix;
        pass->deepstack[k].x = pass->features.extra[k];
    }
    return OVLM_OK;
}

/* M-RoPE: which of the three positions turns frequency i (oracles B.3). */
static int32_t axis_of(const ovlm_decoder_config *c, int64_t i)
{
    if (c->interleaved_sections) {
        return i % 3 == 1 && i < 3 * c->section[1]   ? 1
               : i % 3 == 2 && i < 3 * c->section[2] ? 2
                                                     : 0;
    }
    return i < c->section[0] ? 0 : i < c->section[0] + c->section[1] ? 1 : 2;
}

static ovlm_status prepare_context(ovlm_run *run, ovlm_decoder_pass *pass, ovlm_stack *stack)
{
    const ovlm_decoder_config *c = &pass->params->config.decoder;
    const ovlm_tokens *tokens = &pass->tokens;
    float frequency[OVLM_ROPE_MOST];
    int32_t axis[OVLM_ROPE_MOST];
    int64_t half = c->rotary / 2;
    for (int64_t i = 0; i < half; i++) {
        frequency[i] = (float)(1.0 / pow(c->theta, 2.0 * (double)i / (double)c->rotary));
        axis[i] = axis_of(c, i);
    }
    void *position = NULL, *start = NULL;
    OVLM_TRY(ovlm_run_upload(run, stack, tokens->position,
                             OVLM_AXES * tokens->T * (int64_t)sizeof(float), &position));
    OVLM_TRY(ovlm_rope_tables(run, stack,
                              ovlm_tensor_of(position, OVLM_AXES, tokens->T, OVLM_F32), frequency,
                              axis, half, &pass->context));
    const ovlm_sequence_pass *shared = pass->context.sequence; /* else the segments are its own */
    const int32_t *bounds = shared != NULL ? shared->ring.bounds : tokens->start;
    int64_t n = tokens->segments, count = shared != NULL ? shared->ring.bounds_n : n + 1;
    OVLM_TRY(ovlm_run_upload(run, stack, bounds, count * (int64_t)sizeof *bounds, &start));
    pass->context.query = (ovlm_segments){
        .n = n, .max_len = shared != NULL ? shared->longest : pass->longest, .start = start,
        .host_start = bounds};
    pass->context.ring_bounds = start == NULL || shared == NULL ? NULL : (int32_t *)start + n + 1;
    if (pass->cache == NULL) {
        pass->context.key = pass->context.query;
    }
    return OVLM_OK;
}

/* A layer's own counts are differences of these. */
static ovlm_status note_counts(ovlm_run *run, const ovlm_decoder_pass *pass, int64_t layer)
{
    int64_t E = pass->params->config.decoder.experts;
    if (pass->count_after == NULL || E == 0 || run->measuring) {
        return OVLM_OK;
    }
    return run->ops->copy(run->queue, pass->count_after + layer * E, pass->context.count,
                          E * (int64_t)sizeof(int64_t), OVLM_ON_DEVICE, run->err);
}

ovlm_status ovlm_decoder_fwd(ovlm_run *run, ovlm_decoder_pass *pass)
{
    const ovlm_decoder_config *c = &pass->params->config.decoder;
    int64_t T = pass->tokens.T, depth = c->depth;
    int64_t first = pass->training ? pass->lowest : INT64_MAX; /* that is kept */
    ovlm_stream stream = {.rows = T, .cols = c->width};
    int64_t mark = run->work->used_bytes;
    pass->hidden = ovlm_stack_tensor(run->keep, T, c->width, run->dtype);
    ovlm_tensor h = ovlm_stream_next(run, &stream, first <= 0);
    OVLM_TRY(embed(run, pass, first < 0 ? run->keep : run->work, h));
    OVLM_TRY(prepare_context(run, pass, first < depth ? run->keep : run->work));
    OVLM_TRY(ovlm_taps_keep(run, &pass->taps, 0, h));
    for (int64_t i = 0; i < depth; i++) {
        double start_s = ovlm_run_begin(run);
        ovlm_tensor out = ovlm_stream_next(run, &stream, first <= i + 1);
        pass->context.cache = pass->cache != NULL ? &pass->cache[i] : NULL;
        OVLM_TRY(ovlm_block_fwd(run, &pass->params->decoder[i], &pass->context, first <= i, h, out,
                                &pass->block[i]));
        OVLM_TRY(note_counts(run, pass, i));
        h = out;
        if (i + 1 < depth) {
            OVLM_TRY(ovlm_taps_keep(run, &pass->taps, i + 1, h));
        }
        if (ovlm_tensor_given(&pass->features.image) &&
            i < pass->params->config.vision.deepstack_n) {
            pass->deepstack[i].y = h;
            RUN(run, gather, fwd, &pass->deepstack[i]);
        }
        ovlm_run_end(run, "decoder layer", i, start_s);
    }
    OVLM_TRY(ovlm_unit_enter(run, pass->params->norm.unit, OVLM_USE_FORWARD));
    pass->norm = (ovlm_norm){.rms = true, .eps = c->eps, .groups = 1, .x = h,
                             .w = pass->params->norm.w, .y = pass->hidden};
    RUN_IN(run, norm, fwd, &pass->norm, pass->training ? run->keep : run->work);
    OVLM_TRY(ovlm_unit_leave(run));
    OVLM_TRY(ovlm_taps_keep(run, &pass->taps, depth, pass->hidden));
    run->work->used_bytes = mark;
    return OVLM_OK;
}

/* ---------------------------------------------------------------- backward */

/* Gradient of rows that were gathered into the residual stream. */
static ovlm_status gather_back(ovlm_run *run, ovlm_gather *args, ovlm_tensor dh, ovlm_tensor dx,
                               float beta)
{
    if (!ovlm_tensor_given(&dx)) {
        return OVLM_OK;
    }
    args->dy = dh;
    args->dx = dx;
    args->dx_beta = beta;
    RUN(run, gather, bwd, args);
    return OVLM_OK;
}

ovlm_status ovlm_decoder_bwd(ovlm_run *run, ovlm_decoder_pass *pass, ovlm_tensor dhidden,
                             const ovlm_decoder_features *dfeatures)
{
    const ovlm_params *p = pass->params;
    int64_t mark = run->work->used_bytes;
    bool images = ovlm_tensor_given(&dfeatures->image);
    ovlm_weight none = {0};
    ovlm_tensor dh = {0};
    if (pass->lowest < p->config.decoder.depth) {
        dh = ovlm_stack_tensor(run->work, dhidden.rows, dhidden.cols, run->dtype);
    }
    OVLM_TRY(ovlm_unit_enter(run, p->norm.unit, OVLM_USE_BACKWARD));
    OVLM_TRY(ovlm_norm_back(run, &pass->norm, dhidden, &p->norm, &none, dh, 0));
    OVLM_TRY(ovlm_unit_leave(run));
    for (int64_t i = p->config.decoder.depth - 1; i >= 0; i--) {
        double start_s = ovlm_run_begin(run);
        if (images && i < p->config.vision.deepstack_n) {
            OVLM_TRY(gather_back(run, &pass->deepstack[i], dh, dfeatures->extra[i], 0));
        }
        pass->context.cache = NULL;
        OVLM_TRY(ovlm_block_bwd(run, &p->decoder[i], &pass->context, pass->lowest < i, dh,
                                &pass->block[i]));
        ovlm_run_end(run, "decoder layer backward", i, start_s);
    }
    OVLM_TRY(gather_back(run, &pass->mix, dh, dfeatures->image, 0));
    OVLM_TRY(gather_back(run, &pass->mix_sounds, dh, dfeatures->sound, 0));
    if (ovlm_unit_trained(p, p->embed.unit)) {
        OVLM_TRY(ovlm_unit_enter(run, p->embed.unit, OVLM_USE_GRADIENTS));
        OVLM_TRY(gather_back(run, &pass->embed, dh, p->embed.dw, 1));
        OVLM_TRY(ovlm_unit_leave(run));
    }
    run->work->used_bytes = mark;
    return OVLM_OK;
}
