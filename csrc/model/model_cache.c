/* model_cache.c - decoding with kept keys and values: one pass extends all sequences.
 *
 * Sequence i owns rows i*length .. of each layer's k and v; a pass writes its new rows there and
 * attends to all of them, bottom-right causal, so that prefill and single tokens are one code. */
#include "model/model_state.h"

#include <stdlib.h>
#include <string.h>

void ovlm_model_cache_close(ovlm_model *model)
{
    ovlm_device_block_free(model, &model->cache);
    free(model->cache_used);
    free(model->cache_row);
    model->cache_used = model->cache_row = NULL;
    model->cache_sequences = model->cache_length = 0;
}

ovlm_status ovlm_model_cache_open(ovlm_model *model, int64_t sequences, int64_t length,
                                  ovlm_err *err)
{
    const ovlm_decoder_config *c = &model->params.config.decoder;
    if (sequences < 1 || length < 1 || sequences > INT32_MAX / length) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "sequences and length must be positive, their product below 2^31; got "
                         "%lld and %lld", (long long)sequences, (long long)length);
    }
    if (model->spread) { /* prompts of several lengths would not match */
        return OVLM_FAIL(err, OVLM_E_ARG, "other ranks hold some of this model's experts: it "
                                          "continues no prompt; undo that first, or open what was "
                                          "saved");
    }
    ovlm_model_cache_close(model);
    int64_t rows = sequences * length, cols = c->kv_heads * c->head_dim;
    int64_t plane = rows * cols * ovlm_dtype_bytes(model->dtype);
    OVLM_TRY(OVLM_HEAP_NEW(&model->cache_used, sequences, err));
    OVLM_TRY(OVLM_HEAP_NEW(&model->cache_row, sequences, err));
    OVLM_TRY(ovlm_device_block_need(model, &model->cache, 2 * c->depth * plane, false, err));
    for (int64_t i = 0; i < c->depth; i++) {
        char *k = (char *)model->cache.data + 2 * i * plane;
        model->layer_cache[i] = (ovlm_cache){
            .k = ovlm_tensor_of(k, rows, cols, model->dtype),
            .v = ovlm_tensor_of(k + plane, rows, cols, model->dtype),
            .first_row = model->cache_row};
    }
    model->cache_sequences = sequences;
    model->cache_length = length;
    return OVLM_OK;
}

/* Key segments: what each sequence holds after this pass. */
static ovlm_status prepare_keys(ovlm_model *model, const ovlm_tokens *tokens, int32_t **start,
                                int32_t **length, ovlm_err *err)
{
    int64_t n = tokens->segments;
    if (n != model->cache_sequences) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "the cache holds %lld sequences; the inputs have %lld segments",
                         (long long)model->cache_sequences, (long long)n);
    }
    OVLM_TRY(OVLM_ARENA_NEW(&model->call, start, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(&model->call, length, n, err));
    for (int64_t i = 0; i < n; i++) {
        int64_t held = model->cache_used[i] + tokens->start[i + 1] - tokens->start[i];
        if (held > model->cache_length) {
            return OVLM_FAIL(err, OVLM_E_ARG,
                             "sequence %lld would hold %lld tokens; the cache has room for %lld",
                             (long long)i, (long long)held, (long long)model->cache_length);
        }
        (*start)[i] = (int32_t)(i * model->cache_length);
        (*length)[i] = (int32_t)held;
        model->cache_row[i] = i * model->cache_length + model->cache_used[i];
    }
    return OVLM_OK;
}

static ovlm_status walk(ovlm_run *run, ovlm_model *model, unsigned phases, const int32_t *start,
                        const int32_t *length)
{
    ovlm_decoder_pass *pass = &model->decoder;
    int64_t n = model->cache_sequences, bytes = n * (int64_t)sizeof *start;
    void *device_start = NULL, *device_length = NULL;
    OVLM_TRY(ovlm_model_walk_encode(run, model, phases));
    ovlm_model_take_features(model);
    run->keep = &model->decoder_keep;
    OVLM_TRY(ovlm_run_upload(run, run->work, start, bytes, &device_start));
    OVLM_TRY(ovlm_run_upload(run, run->work, length, bytes, &device_length));
    pass->context.key = (ovlm_segments){
        .n = n, .max_len = model->cache_length, .start = device_start, .length = device_length,
        .host_start = start, .host_length = run->measuring ? NULL : length};
    pass->cache = model->layer_cache;
    double start_s = ovlm_run_begin(run);
    OVLM_TRY(ovlm_decoder_fwd(run, pass));
    ovlm_run_end(run, "decode", -1, start_s);
    return OVLM_OK;
}

/* Logits after the last token of each segment that has one. */
static ovlm_status last_logits(ovlm_model *model, float *logits, ovlm_err *err)
{
    const ovlm_tokens *tokens = &model->decoder.tokens;
    int64_t V = model->params.config.decoder.vocab;
    int32_t *row = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(&model->call, &row, tokens->segments, err));
    for (int64_t i = 0; i < tokens->segments; i++) {
        bool empty = tokens->start[i + 1] == tokens->start[i];
        row[i] = empty ? 0 : tokens->start[i + 1] - 1;
    }
    if (tokens->T == 0) { /* there is no row to read */
        memset(logits, 0, (size_t)(tokens->segments * V) * sizeof *logits);
    }
    return ovlm_model_logits(model, row, tokens->T > 0 ? tokens->segments : 0, logits, err);
}

ovlm_status ovlm_model_extend(ovlm_model *model, const ovlm_model_inputs *inputs,
                              const ovlm_pass_options *options, float *logits, ovlm_err *err)
{
    const ovlm_pass_options forward = {.poll = options->poll, .poll_ctx = options->poll_ctx};
    int32_t *start = NULL, *length = NULL;
    const ovlm_pass_kind kind = {.phases = ovlm_model_phases(model, inputs)};
    if (inputs->sequence != NULL) {
        return OVLM_FAIL(err, OVLM_E_ARG, "a cache holds whole sequences; give no shard");
    }
    OVLM_TRY(ovlm_model_begin(model, err));
    OVLM_TRY(ovlm_model_prepare(model, inputs, &forward, kind.phases, err));
    OVLM_TRY(prepare_keys(model, &inputs->tokens, &start, &length, err));
    model->decoder.context.count = NULL; /* statistics are of training passes */
    model->decoder.context.score_sum = NULL;
    model->decoder.count_after = NULL;
    ovlm_stack held[OVLM_MODEL_STACKS];
    ovlm_run run = ovlm_model_measure_begin(model, &forward, held, err);
    ovlm_status status = walk(&run, model, kind.phases, start, length);
    OVLM_TRY(ovlm_model_measure_end(model, held, kind.phases, status, err));
    run = ovlm_model_run(model, false, &forward, err);
    OVLM_TRY(ovlm_pass_begin(&run, &kind));
    OVLM_TRY(ovlm_pass_end(&run, walk(&run, model, kind.phases, start, length)));
    model->has_hidden = true;
    OVLM_TRY(last_logits(model, logits, err));
    for (int64_t i = 0; i < model->cache_sequences; i++) {
        model->cache_used[i] = length[i]; /* only now: an interrupted pass can be repeated */
    }
    return OVLM_OK;
}
