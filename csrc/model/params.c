/* params.c - the list of weights, in the order in which layers use them. */
#include "model/params.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* Sizes below this, with padding and eight bytes each, fit 64 bits. */
#define COUNT_MOST ((int64_t)1 << 56)

/* The list is walked twice: first to count (param NULL), then to fill. */
typedef struct builder {
    ovlm_params *params;
    int64_t n, fused, buffer_offset, count;
    int64_t units, unit;   /* how many there are, and which one is filled */
    ovlm_unit counted;     /* stands for all of them while counting */
    bool too_large;
} builder;

static int64_t round_up(int64_t value, int64_t unit)
{
    return (value + unit - 1) / unit * unit;
}

static ovlm_unit *unit_of(builder *b)
{
    return b->params->unit != NULL ? &b->params->unit[b->unit] : &b->counted;
}

/* A new unit; what is added until the next one belongs to it. */
static void begin_unit(builder *b, ovlm_unit_kind kind, int64_t index, const char *format, ...)
    OVLM_PRINTF(4, 5);

static void begin_unit(builder *b, ovlm_unit_kind kind, int64_t index, const char *format, ...)
{
    b->unit = b->units++;
    ovlm_unit *unit = unit_of(b);
    *unit = (ovlm_unit){.kind = kind, .index = index};
    va_list args;
    va_start(args, format);
    (void)vsnprintf(unit->name, sizeof unit->name, format, args);
    va_end(args);
}

/* A new product; what is added until the next one belongs to it. */
static void begin(builder *b, ovlm_weight *weight)
{
    ovlm_unit *unit = unit_of(b);
    b->fused++;
    unit->elements = round_up(unit->elements, 64); /* 64 bytes in any dtype */
    b->buffer_offset = round_up(b->buffer_offset, 64);
    *weight = (ovlm_weight){.first = b->n, .unit = b->unit};
}

static void add(builder *b, ovlm_weight *weight, ovlm_param_kind kind, int64_t n_dims,
                const int64_t *dims, const char *format, ...) OVLM_PRINTF(6, 7);

static void add(builder *b, ovlm_weight *weight, ovlm_param_kind kind, int64_t n_dims,
                const int64_t *dims, const char *format, ...)
{
    int64_t total = 1;
    for (int64_t i = 0; i < n_dims; i++) {
        if (total > COUNT_MOST / dims[i]) {
            b->too_large = true;
            return;
        }
        total *= dims[i];
    }
    b->too_large = b->too_large || b->count > COUNT_MOST - total;
    if (b->too_large) {
        return; /* nothing is listed after the first walk said so */
    }
    int64_t *offset = kind == OVLM_PARAM_BUFFER ? &b->buffer_offset : &unit_of(b)->elements;
    if (b->params->param != NULL) {
        ovlm_param *p = &b->params->param[b->n];
        *p = (ovlm_param){.kind = kind, .n_dims = n_dims, .fused = b->fused, .unit = b->unit,
                          .offset = *offset, .grad_offset = -1,
                          .trainable = kind != OVLM_PARAM_BUFFER};
        memcpy(p->dims, dims, (size_t)n_dims * sizeof *dims);
        /* Stacks of experts are one matrix of many rows; a convolution's kernel is one row. */
        p->cols = n_dims == 1 ? dims[0] : n_dims == 3 ? dims[2] : total / dims[0];
        p->rows = p->whole_rows = total / p->cols;
        va_list args;
        va_start(args, format);
        (void)vsnprintf(p->name, sizeof p->name, format, args);
        va_end(args);
    }
    weight->count++;
    b->n++;
    *offset += total;
    b->count += total;
}

#define DIMS(...) \
    (int64_t)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), (int64_t[]){__VA_ARGS__}

static void add_one(builder *b, ovlm_weight *weight, ovlm_param_kind kind, int64_t rows,
                    int64_t cols, const char *prefix, const char *name, const char *last)
{
    begin(b, weight);
    if (rows == 0) {
        add(b, weight, kind, DIMS(cols), "%s%s%s", prefix, name, last);
    } else {
        add(b, weight, kind, DIMS(rows, cols), "%s%s%s", prefix, name, last);
    }
}

/* weight and bias of a linear layer. */
static void add_linear(builder *b, ovlm_weight *weight, ovlm_weight *bias, int64_t rows,
                       int64_t cols, const char *prefix, const char *name)
{
    add_one(b, weight, OVLM_PARAM_WEIGHT, rows, cols, prefix, name, ".weight");
    add_one(b, bias, OVLM_PARAM_BIAS, 0, rows, prefix, name, ".bias");
}

static void add_layer_norm(builder *b, ovlm_weight *weight, ovlm_weight *bias, int64_t width,
                           const char *prefix, const char *name)
{
    add_one(b, weight, OVLM_PARAM_NORM, 0, width, prefix, name, ".weight");
    add_one(b, bias, OVLM_PARAM_BIAS, 0, width, prefix, name, ".bias");
}

/* ---------------------------------------------------------------- vision */

static void add_vision_block(builder *b, ovlm_block *block, int64_t number)
{
    const ovlm_vision_config *c = &b->params->config.vision;
    char prefix[OVLM_NAME_BYTES];
    (void)snprintf(prefix, sizeof prefix, "model.visual.blocks.%lld.", (long long)number);
    begin_unit(b, OVLM_UNIT_VISION_BLOCK, number, "model.visual.blocks.%lld", (long long)number);
    *block = (ovlm_block){.width = c->width, .heads = c->heads, .kv_heads = c->heads,
                          .head_dim = c->width / c->heads, .hidden = c->hidden, .eps = c->eps,
                          .act = c->act};
    add_layer_norm(b, &block->norm1, &block->norm1_bias, c->width, prefix, "norm1");
    add_linear(b, &block->qkv, &block->qkv_bias, 3 * c->width, c->width, prefix, "attn.qkv");
    add_linear(b, &block->out, &block->out_bias, c->width, c->width, prefix, "attn.proj");
    add_layer_norm(b, &block->norm2, &block->norm2_bias, c->width, prefix, "norm2");
    add_linear(b, &block->up, &block->up_bias, c->hidden, c->width, prefix, "mlp.linear_fc1");
    add_linear(b, &block->down, &block->down_bias, c->width, c->hidden, prefix, "mlp.linear_fc2");
}

static void add_merger(builder *b, ovlm_merge_weights *merge, ovlm_merger kind,
                       const char *prefix)
{
    const ovlm_vision_config *c = &b->params->config.vision;
    int64_t merged = kind == OVLM_MERGE_POOL ? c->width : c->width * c->merge * c->merge;
    *merge = (ovlm_merge_weights){.kind = kind, .merge = c->merge, .hidden = c->merger_hidden,
                                  .act = c->merger_act, .eps = c->eps};
    if (kind != OVLM_MERGE_POOL) {
        add_layer_norm(b, &merge->norm, &merge->norm_bias,
                       kind == OVLM_MERGE_NORM_CONCAT ? c->width : merged, prefix, "norm");
    }
    add_linear(b, &merge->fc1, &merge->fc1_bias, c->merger_hidden, merged, prefix, "linear_fc1");
    add_linear(b, &merge->fc2, &merge->fc2_bias, c->out_width, c->merger_hidden, prefix,
               "linear_fc2");
}

static void add_vision(builder *b)
{
    ovlm_params *p = b->params;
    const ovlm_vision_config *c = &p->config.vision;
    begin_unit(b, OVLM_UNIT_PATCHES, 0, "model.visual.patch_embed");
    begin(b, &p->patch);
    add(b, &p->patch, OVLM_PARAM_WEIGHT,
        DIMS(c->width, c->channels, c->temporal, c->patch, c->patch), "%s",
        "model.visual.patch_embed.proj.weight");
    if (c->patch_bias) {
        add_one(b, &p->patch_bias, OVLM_PARAM_BIAS, 0, c->width, "model.visual.",
                "patch_embed.proj", ".bias");
    }
    if (c->position_side > 0) {
        add_one(b, &p->position, OVLM_PARAM_WEIGHT, c->position_side * c->position_side, c->width,
                "model.visual.", "pos_embed", ".weight");
    }
    for (int64_t i = 0; i < c->depth; i++) {
        ovlm_block unused = {0};
        add_vision_block(b, p->vision != NULL ? &p->vision[i] : &unused, i);
    }
    begin_unit(b, OVLM_UNIT_MERGER, 0, "model.visual.merger");
    if (c->final_norm) {
        add_layer_norm(b, &p->final_norm, &p->final_norm_bias, c->width, "model.visual.", "ln");
    }
    add_merger(b, &p->merger, c->merger, "model.visual.merger.");
    for (int64_t i = 0; i < c->deepstack_n; i++) {
        char prefix[OVLM_NAME_BYTES];
        (void)snprintf(prefix, sizeof prefix, "model.visual.deepstack_merger_list.%lld.",
                       (long long)i);
        begin_unit(b, OVLM_UNIT_DEEPSTACK, i, "model.visual.deepstack_merger_list.%lld",
                   (long long)i);
        add_merger(b, &p->deepstack[i], OVLM_MERGE_CONCAT_NORM, prefix);
    }
}

/* ---------------------------------------------------------------- audio */

/* q, k and v are three parameters of one product. */
static void add_audio_qkv(builder *b, ovlm_block *block, const char *prefix)
{
    static const char *const names[] = {"q_proj", "k_proj", "v_proj"};
    int64_t width = block->width;
    begin(b, &block->qkv);
    for (int i = 0; i < 3; i++) {
        add(b, &block->qkv, OVLM_PARAM_WEIGHT, DIMS(width, width), "%sself_attn.%s.weight", prefix,
            names[i]);
    }
    begin(b, &block->qkv_bias);
    for (int i = 0; i < 3; i++) {
        add(b, &block->qkv_bias, OVLM_PARAM_BIAS, DIMS(width), "%sself_attn.%s.bias", prefix,
            names[i]);
    }
}

static void add_audio_block(builder *b, ovlm_block *block, int64_t number)
{
    const ovlm_audio_config *c = &b->params->config.audio;
    char prefix[OVLM_NAME_BYTES];
    (void)snprintf(prefix, sizeof prefix, "model.audio_tower.layers.%lld.", (long long)number);
    begin_unit(b, OVLM_UNIT_AUDIO_LAYER, number, "model.audio_tower.layers.%lld",
               (long long)number);
    *block = (ovlm_block){.width = c->width, .heads = c->heads, .kv_heads = c->heads,
                          .head_dim = c->width / c->heads, .hidden = c->hidden, .eps = c->eps,
                          .act = c->act, .unturned = true};
    add_layer_norm(b, &block->norm1, &block->norm1_bias, c->width, prefix, "self_attn_layer_norm");
    add_audio_qkv(b, block, prefix);
    add_linear(b, &block->out, &block->out_bias, c->width, c->width, prefix, "self_attn.out_proj");
    add_layer_norm(b, &block->norm2, &block->norm2_bias, c->width, prefix, "final_layer_norm");
    add_linear(b, &block->up, &block->up_bias, c->hidden, c->width, prefix, "fc1");
    add_linear(b, &block->down, &block->down_bias, c->width, c->hidden, prefix, "fc2");
}

static void add_audio(builder *b)
{
    ovlm_params *p = b->params;
    const ovlm_audio_config *c = &p->config.audio;
    static const char prefix[] = "model.audio_tower.";
    begin_unit(b, OVLM_UNIT_FRONT, 0, "%sconv", prefix);
    for (int i = 0; i < OVLM_CONVOLUTIONS; i++) {
        begin(b, &p->conv[i]);
        add(b, &p->conv[i], OVLM_PARAM_WEIGHT, DIMS(c->channels, i == 0 ? 1 : c->channels, 3, 3),
            "%sconv2d%d.weight", prefix, i + 1);
        begin(b, &p->conv_bias[i]);
        add(b, &p->conv_bias[i], OVLM_PARAM_BIAS, DIMS(c->channels), "%sconv2d%d.bias", prefix,
            i + 1);
    }
    int64_t bins = c->bins;
    for (int i = 0; i < OVLM_CONVOLUTIONS; i++) {
        bins = ovlm_audio_halved(bins);
    }
    add_one(b, &p->conv_out, OVLM_PARAM_WEIGHT, c->width, c->channels * bins, prefix, "conv_out",
            ".weight");
    for (int64_t i = 0; i < c->depth; i++) {
        ovlm_block unused = {0};
        add_audio_block(b, p->audio != NULL ? &p->audio[i] : &unused, i);
    }
    begin_unit(b, OVLM_UNIT_PROJECT, 0, "%sproj", prefix);
    p->project = (ovlm_merge_weights){.kind = OVLM_MERGE_NORM_CONCAT, .merge = 1,
                                      .hidden = c->width, .act = c->act, .eps = c->eps};
    add_layer_norm(b, &p->project.norm, &p->project.norm_bias, c->width, prefix, "ln_post");
    add_linear(b, &p->project.fc1, &p->project.fc1_bias, c->width, c->width, prefix, "proj1");
    add_linear(b, &p->project.fc2, &p->project.fc2_bias, c->out_width, c->width, prefix, "proj2");
}

/* ---------------------------------------------------------------- decoder */

static void add_attention(builder *b, ovlm_block *block, const char *prefix)
{
    const ovlm_decoder_config *c = &b->params->config.decoder;
    int64_t q = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim;
    static const char *const names[] = {"q_proj", "k_proj", "v_proj"};
    int64_t rows[] = {q, kv, kv};
    begin(b, &block->qkv);
    for (int i = 0; i < 3; i++) {
        add(b, &block->qkv, OVLM_PARAM_WEIGHT, DIMS(rows[i], c->width), "%sself_attn.%s.weight",
            prefix, names[i]);
    }
    if (c->qkv_bias) {
        begin(b, &block->qkv_bias);
        for (int i = 0; i < 3; i++) {
            add(b, &block->qkv_bias, OVLM_PARAM_BIAS, DIMS(rows[i]), "%sself_attn.%s.bias",
                prefix, names[i]);
        }
    }
    if (c->qk_norm) {
        add_one(b, &block->q_norm, OVLM_PARAM_NORM, 0, c->head_dim, prefix,
                "self_attn.q_norm", ".weight");
        add_one(b, &block->k_norm, OVLM_PARAM_NORM, 0, c->head_dim, prefix,
                "self_attn.k_norm", ".weight");
    }
    add_one(b, &block->out, OVLM_PARAM_WEIGHT, c->width, q, prefix, "self_attn.o_proj", ".weight");
    if (c->out_bias) {
        add_one(b, &block->out_bias, OVLM_PARAM_BIAS, 0, c->width, prefix, "self_attn.o_proj",
                ".bias");
    }
}

/* gate, up and down of a SwiGLU layer. */
static void add_gated(builder *b, ovlm_weight *up, ovlm_weight *down, int64_t width,
                      int64_t hidden, const char *prefix, const char *name)
{
    begin(b, up);
    add(b, up, OVLM_PARAM_WEIGHT, DIMS(hidden, width), "%s%sgate_proj.weight", prefix, name);
    add(b, up, OVLM_PARAM_WEIGHT, DIMS(hidden, width), "%s%sup_proj.weight", prefix, name);
    begin(b, down);
    add(b, down, OVLM_PARAM_WEIGHT, DIMS(width, hidden), "%s%sdown_proj.weight", prefix, name);
}

static void add_experts(builder *b, ovlm_block *block, const char *prefix)
{
    const ovlm_decoder_config *c = &b->params->config.decoder;
    int64_t C = c->width, F = c->expert_hidden, E = c->experts;
    add_one(b, &block->router, OVLM_PARAM_WEIGHT, E, C, prefix, "mlp.gate", ".weight");
    if (c->sigmoid_router) {
        add_one(b, &block->router_bias, OVLM_PARAM_BUFFER, 0, E, prefix,
                "mlp.gate.e_score_correction_bias", "");
    }
    int64_t layer = b->unit;
    begin_unit(b, OVLM_UNIT_EXPERTS, unit_of(b)->index, "%smlp.experts", prefix);
    begin(b, &block->experts_up);
    add(b, &block->experts_up, OVLM_PARAM_WEIGHT,
        DIMS(E, c->expert_kn ? C : 2 * F, c->expert_kn ? 2 * F : C), "%smlp.experts.gate_up_proj",
        prefix);
    begin(b, &block->experts_down);
    add(b, &block->experts_down, OVLM_PARAM_WEIGHT,
        DIMS(E, c->expert_kn ? F : C, c->expert_kn ? C : F), "%smlp.experts.down_proj", prefix);
    b->unit = layer;
    if (c->shared_hidden > 0) {
        add_gated(b, &block->shared_up, &block->shared_down, C, c->shared_hidden, prefix,
                  "mlp.shared_experts.");
    }
}

static void add_decoder_block(builder *b, ovlm_block *block, int64_t number)
{
    const ovlm_decoder_config *c = &b->params->config.decoder;
    bool sparse = ovlm_decoder_layer_sparse(c, number);
    char prefix[OVLM_NAME_BYTES];
    (void)snprintf(prefix, sizeof prefix, "model.language_model.layers.%lld.", (long long)number);
    begin_unit(b, OVLM_UNIT_LAYER, number, "model.language_model.layers.%lld", (long long)number);
    *block = (ovlm_block){.width = c->width, .heads = c->heads, .kv_heads = c->kv_heads,
                          .head_dim = c->head_dim, .hidden = sparse ? c->expert_hidden : c->hidden,
                          .rms = true, .causal = true, .gated = true, .qk_norm = c->qk_norm,
                          .eps = c->eps, .act = c->act, .moe = sparse ? c : NULL};
    add_one(b, &block->norm1, OVLM_PARAM_NORM, 0, c->width, prefix, "input_layernorm", ".weight");
    add_attention(b, block, prefix);
    add_one(b, &block->norm2, OVLM_PARAM_NORM, 0, c->width, prefix,
            "post_attention_layernorm", ".weight");
    if (sparse) {
        add_experts(b, block, prefix);
    } else {
        add_gated(b, &block->up, &block->down, c->width, c->hidden, prefix, "mlp.");
    }
}

static void add_all(builder *b)
{
    ovlm_params *p = b->params;
    const ovlm_decoder_config *c = &p->config.decoder;
    if (p->config.vision.depth > 0) {
        add_vision(b);
    }
    if (p->config.audio.depth > 0) {
        add_audio(b);
    }
    begin_unit(b, OVLM_UNIT_EMBED, 0, "model.language_model.embed_tokens");
    add_one(b, &p->embed, OVLM_PARAM_WEIGHT, c->vocab, c->width, "model.language_model.",
            "embed_tokens", ".weight");
    for (int64_t i = 0; i < c->depth; i++) {
        ovlm_block unused = {0};
        add_decoder_block(b, p->decoder != NULL ? &p->decoder[i] : &unused, i);
    }
    begin_unit(b, OVLM_UNIT_NORM, 0, "model.language_model.norm");
    add_one(b, &p->norm, OVLM_PARAM_NORM, 0, c->width, "model.language_model.", "norm", ".weight");
    if (!c->tied) {
        begin_unit(b, OVLM_UNIT_HEAD, 0, "lm_head");
        add_one(b, &p->head, OVLM_PARAM_WEIGHT, c->vocab, c->width, "", "lm_head", ".weight");
    } else {
        p->head = p->embed;
    }
}

/* Units one after the other; so far their parameters counted from their own starts. */
static void place_units(ovlm_params *params)
{
    int64_t offset = 0;
    for (int64_t i = 0; i < params->units; i++) {
        ovlm_unit *unit = &params->unit[i];
        unit->elements = round_up(unit->elements, 64);
        unit->offset = offset;
        offset += unit->elements;
    }
    params->weight_elements = offset;
    for (int64_t i = 0; i < params->n; i++) {
        ovlm_param *p = &params->param[i];
        p->offset += p->kind == OVLM_PARAM_BUFFER ? 0 : params->unit[p->unit].offset;
    }
}

void ovlm_params_hold_experts(ovlm_params *params, int64_t first, int64_t held)
{
    int64_t experts = params->config.decoder.experts;
    for (int64_t i = 0; i < params->n; i++) {
        ovlm_param *p = &params->param[i];
        p->offset -= p->kind == OVLM_PARAM_BUFFER ? 0 : params->unit[p->unit].offset;
    }
    for (int64_t i = 0; i < params->units; i++) {
        ovlm_unit *unit = &params->unit[i];
        unit->elements = unit->kind == OVLM_UNIT_EXPERTS ? 0 : unit->elements;
    }
    for (int64_t i = 0; i < params->n; i++) { /* each of them is a product of its own */
        ovlm_param *p = &params->param[i];
        ovlm_unit *unit = &params->unit[p->unit];
        if (unit->kind == OVLM_UNIT_EXPERTS) {
            p->first_row = p->whole_rows / experts * first;
            p->rows = p->whole_rows / experts * held;
            p->offset = round_up(unit->elements, 64);
            unit->elements = p->offset + p->rows * p->cols;
        }
    }
    params->experts_first = first;
    params->experts_held = held;
    place_units(params);
    ovlm_params_place_grads(params);
}

ovlm_status ovlm_params_init(ovlm_params *params, const ovlm_model_config *config,
                             ovlm_arena *arena, ovlm_err *err)
{
    *params = (ovlm_params){.config = *config};
    OVLM_TRY(ovlm_model_config_check(config, err));
    builder count = {.params = params};
    add_all(&count);
    if (count.too_large) {
        return OVLM_FAIL(err, OVLM_E_ARG, "the model would have more than 2^56 parameters");
    }
    OVLM_TRY(OVLM_ARENA_NEW(arena, &params->param, count.n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &params->unit, count.units, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &params->vision, config->vision.depth, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &params->audio, config->audio.depth, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &params->decoder, config->decoder.depth, err));
    builder fill = {.params = params};
    add_all(&fill);
    params->n = params->base_n = fill.n;
    params->base_param = params->param;
    params->units = fill.units;
    params->count = fill.count;
    params->experts_held = config->decoder.experts;
    place_units(params);
    params->buffer_elements = round_up(fill.buffer_offset, 64);
    ovlm_params_place_grads(params);
    return OVLM_OK;
}
