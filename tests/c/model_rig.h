/* model_rig.h - tiny models of all families with random weights, and a batch for them. */
#ifndef OVLM_MODEL_RIG_H
#define OVLM_MODEL_RIG_H

#include "cpu_rig.h"
#include "model/model.h"

enum { VOCAB = 40, TOKENS = 21, SEGMENTS = 4, PATCHES = 28, PATCH_SIZE = 12, IMAGES = 2,
       IMAGE_ROWS = 7, SOUNDS = 2, FRAMES = 17, BINS = 5, SOUND_ROWS = 4, WIDTH = 20 };

/* ---- models ---- */

static inline ovlm_model_config rig_qwen(bool sparse)
{
    ovlm_model_config c = {
        .vision = {.depth = 2, .width = 16, .heads = 2, .hidden = 22, .patch = 2, .temporal = 1,
                   .channels = 3, .merge = 2, .out_width = WIDTH, .merger_hidden = 18,
                   .position_side = 3, .deepstack_n = 1, .deepstack = {1}, .patch_bias = true,
                   .merger = OVLM_MERGE_NORM_CONCAT, .act = OVLM_ACT_GELU_TANH,
                   .merger_act = OVLM_ACT_GELU_ERF, .eps = 1e-6, .theta = 1e4},
        .decoder = {.depth = 2, .width = WIDTH, .heads = 4, .kv_heads = 2, .head_dim = 8,
                    .rotary = 8, .act = OVLM_ACT_SILU,
                    .vocab = VOCAB, .hidden = 26, .k = 1, .expert_hidden = 1, .sparse_step = 1,
                    .teams = 1, .limit = 1, .section = {2, 1, 1}, .interleaved_sections = true,
                    .qk_norm = true, .tied = true, .normalise_router = true, .expert_kn = true,
                    .router_scale = 1, .eps = 1e-6, .theta = 1e4}};
    if (sparse) {
        c.decoder.experts = 5;
        c.decoder.k = 2;
        c.decoder.expert_hidden = 10;
        c.decoder.aux_coef = 0.01;
        c.decoder.tied = false;
    }
    return c;
}

/* Sigmoid routing in groups, a shared expert, a dense layer, pooling. */
static inline ovlm_model_config rig_seed(void)
{
    ovlm_model_config c = rig_qwen(true);
    c.vision.position_side = c.vision.deepstack_n = 0;
    c.vision.merger = OVLM_MERGE_POOL;
    c.vision.final_norm = true;
    c.decoder.experts = 6;
    c.decoder.teams = 3;
    c.decoder.limit = 2;
    c.decoder.shared_hidden = 7;
    c.decoder.first_dense = 1;
    c.decoder.sigmoid_router = true;
    c.decoder.qk_norm = false;
    c.decoder.qkv_bias = true;
    c.decoder.router_scale = 1.7;
    c.decoder.aux_coef = 0;
    return c;
}

/* One that hears, too. */
static inline ovlm_model_config rig_omni(void)
{
    ovlm_model_config c = rig_qwen(true);
    c.audio = (ovlm_audio_config){.depth = 2, .width = 12, .heads = 3, .hidden = 14, .bins = BINS,
                                  .channels = 3, .chunk = 10, .window = 2, .out_width = WIDTH,
                                  .act = OVLM_ACT_GELU_ERF, .eps = 1e-5};
    return c;
}

/* Host memory of a parameter, dense, with weights that leave nothing at its trivial value. */
static inline ovlm_tensor rig_param(const ovlm_param *p, ovlm_dtype dtype)
{
    ovlm_tensor host = {rig_memory(p->rows * p->cols * ovlm_dtype_bytes(dtype)), p->rows, p->cols,
                        p->cols, dtype};
    bool matrix = p->kind == OVLM_PARAM_WEIGHT || p->kind == OVLM_PARAM_ADAPTER;
    for (int64_t j = 0; j < host.rows * host.cols; j++) {
        double spread = matrix ? 0.6 / sqrt((double)host.cols) : 0.2;
        rig_set(&host, 0, j, (p->kind == OVLM_PARAM_NORM ? 1 : 0) + spread * rig_normal());
    }
    return host;
}

/* Writes weights that depend on the seed alone. */
static inline ovlm_status rig_write_weights(ovlm_model *model, uint64_t seed, ovlm_err *err)
{
    const ovlm_params *p = ovlm_model_params(model);
    ovlm_rng held = test_rng;
    ovlm_status status = OVLM_OK;
    ovlm_rng_init(&test_rng, seed);
    for (int64_t i = 0; i < p->n && status == OVLM_OK; i++) {
        ovlm_tensor host = rig_param(&p->param[i], p->param[i].w.dtype);
        status = ovlm_model_write(model, &p->param[i].w, host.data, err);
        free(host.data);
    }
    test_rng = held;
    return status;
}

/* -- a batch: an image and text, text (and a sound), nothing, an image and text (and a sound) -- */

typedef struct batch {
    int32_t id[TOKENS], start[SEGMENTS + 1], feature_row[TOKENS], label[TOKENS];
    int32_t grid[3 * IMAGES], mel_length[SOUNDS];
    float position[3 * TOKENS], weight[TOKENS], pixel[PATCHES * PATCH_SIZE], mel[FRAMES * BINS];
    bool hears;
} batch;

static inline void rig_draw_batch(batch *b, bool hears)
{
    static const int32_t start[] = {0, 10, 15, 15, TOKENS}, grid[] = {1, 4, 6, 1, 2, 2};
    static const int32_t mel_length[] = {13, 4};
    memcpy(b->start, start, sizeof start);
    memcpy(b->grid, grid, sizeof grid);
    memcpy(b->mel_length, mel_length, sizeof mel_length);
    b->hears = hears;
    int32_t image_row = 0, sound_row = IMAGE_ROWS;
    for (int t = 0; t < TOKENS; t++) {
        bool image = (t >= 2 && t < 8) || t == 16;
        bool sound = hears && ((t >= 11 && t < 14) || t == 18);
        b->id[t] = (int32_t)rig_below(VOCAB);
        b->feature_row[t] = image ? image_row++ : sound ? sound_row++ : -1;
        b->label[t] = image || sound || rig_below(4) == 0 ? -100 : b->id[t];
        b->weight[t] = (float)(0.25 + 0.25 * (double)rig_below(4));
        for (int axis = 0; axis < 3; axis++) {
            b->position[axis * TOKENS + t] = (float)(t + (image ? rig_below(3) : 0));
        }
    }
    b->label[TOKENS - 1] = b->id[TOKENS - 1]; /* at least one */
    for (int i = 0; i < PATCHES * PATCH_SIZE; i++) {
        b->pixel[i] = (float)rig_normal();
    }
    for (int i = 0; i < FRAMES * BINS; i++) {
        b->mel[i] = (float)rig_normal();
    }
}

static inline ovlm_model_inputs rig_inputs(const batch *b)
{
    ovlm_model_inputs in = {
        .tokens = {.T = TOKENS, .segments = SEGMENTS, .id = b->id, .start = b->start,
                   .position = b->position, .feature_row = b->feature_row},
        .label = b->label, .weight = b->weight, .images = IMAGES, .grid_thw = b->grid,
        .pixels = b->pixel, .pixel_dtype = OVLM_F32, .normalizer = -1};
    if (b->hears) {
        in.sounds = SOUNDS;
        in.mel_length = b->mel_length;
        in.mel = b->mel;
    }
    return in;
}

#endif
