/* config.h - what a model is made of: sizes and switches, one implementation for all families.
 *
 * Filled by the caller (the Python side reads config.json), checked once, copied into the model. */
#ifndef OVLM_MODEL_CONFIG_H
#define OVLM_MODEL_CONFIG_H

#include "backend/ops.h"
#include "base/status.h"

enum { OVLM_DEEPSTACK_MOST = 8, OVLM_AXES = 3, OVLM_ROPE_MOST = 2048 /* frequencies */ };

/* How 2x2 neighbours become one language token. */
typedef enum ovlm_merger {
    OVLM_MERGE_NORM_CONCAT, /* LayerNorm, concatenate, two linear layers (Qwen3-VL)             */
    OVLM_MERGE_CONCAT_NORM, /* concatenate, LayerNorm, two linear layers (Qwen3-VL's DeepStack) */
    OVLM_MERGE_POOL         /* average, two linear layers (Seed1.5-VL A.3)                      */
} ovlm_merger;

typedef struct ovlm_vision_config {
    int64_t depth, width, heads, hidden; /* depth 0: no vision tower                            */
    int64_t patch, temporal, channels, merge;
    int64_t out_width;            /* of the merger: the decoder's width                         */
    int64_t merger_hidden;        /* of the merger's first layer                                */
    int64_t position_side;        /* learned table of side x side positions; 0: none            */
    int64_t deepstack_n, deepstack[OVLM_DEEPSTACK_MOST]; /* after these blocks, ascending       */
    bool patch_bias, final_norm;
    ovlm_merger merger;
    ovlm_act act, merger_act;
    double eps, theta;
} ovlm_vision_config;

/* The audio encoder of Qwen3-Omni's thinker (oracles B.5). */
typedef struct ovlm_audio_config {
    int64_t depth, width, heads, hidden; /* depth 0: no audio tower                             */
    int64_t bins;                 /* of the log-mel frames                                      */
    int64_t channels;             /* of the three convolutions                                  */
    int64_t chunk;                /* frames that are convolved together                         */
    int64_t window;               /* chunks that attend to each other                           */
    int64_t out_width;            /* the decoder's width                                        */
    ovlm_act act;                 /* of the blocks and of the projection                        */
    double eps;
} ovlm_audio_config;

typedef struct ovlm_decoder_config {
    int64_t depth, width, heads, kv_heads, head_dim, vocab;
    int64_t hidden;               /* of a dense layer                                           */
    int64_t experts, k, expert_hidden; /* experts 0: dense layers only                          */
    int64_t shared_hidden;        /* of the shared expert; 0: none                              */
    int64_t first_dense;          /* layers before this one are dense                           */
    int64_t sparse_step;          /* layer l has experts when (l + 1) % sparse_step is 0        */
    int64_t teams, limit;         /* group-limited routing; teams 1: none                       */
    int64_t rotary;               /* elements of a head that turn, from the first on            */
    int64_t section[OVLM_AXES];   /* M-RoPE: frequencies of time, height, width                 */
    bool interleaved_sections;    /* axes alternate (Qwen3-VL), or stand one after the other    */
    bool qkv_bias, out_bias, qk_norm, tied; /* biases of the attention's products */
    bool sigmoid_router, normalise_router, expert_kn; /* expert weights [E,C,F] as Qwen3-VL-MoE */
    ovlm_act act;                 /* of gated layers: dense, experts, shared                    */
    double router_scale, aux_coef;
    double eps, theta;
} ovlm_decoder_config;

typedef struct ovlm_model_config {
    ovlm_vision_config vision;
    ovlm_audio_config audio;
    ovlm_decoder_config decoder;
} ovlm_model_config;

/* Rows or columns that a 3x3 convolution of stride 2 with a border of 1 leaves of n >= 1. */
static inline int64_t ovlm_audio_halved(int64_t n)
{
    return (n - 1) / 2 + 1;
}

/* Whether decoder layer l has experts. */
static inline bool ovlm_decoder_layer_sparse(const ovlm_decoder_config *config, int64_t layer)
{
    return config->experts > 0 && layer >= config->first_dense &&
           (layer + 1) % config->sparse_step == 0;
}

/* How many decoder layers have experts. */
int64_t ovlm_decoder_sparse_layers(const ovlm_decoder_config *config);

/* OVLM_E_ARG names the first size or switch that makes no model. */
OVLM_NODISCARD ovlm_status ovlm_model_config_check(const ovlm_model_config *config,
                                                   ovlm_err *err);

#endif
