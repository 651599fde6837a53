/* params.h - the weights of a model: names, shapes, where they lie, and views for the layers.
 *
 * Names and layouts are those of Qwen3-VL on the hub; other families are renamed by whoever reads
 * files.  Weights of products that have the same input (q, k, v; gate, up) lie one after the
 * other, so that one product serves them. */
#ifndef OVLM_MODEL_PARAMS_H
#define OVLM_MODEL_PARAMS_H

#include "base/arena.h"
#include "model/config.h"

enum { OVLM_DIMS_MOST = 5, OVLM_NAME_BYTES = 96, OVLM_CONVOLUTIONS = 3,
       OVLM_FUSED_MOST = 3 /* modules of a product */ };

typedef enum ovlm_param_kind {
    OVLM_PARAM_WEIGHT,   /* of a product or an embedding: decays        */
    OVLM_PARAM_NORM,     /* starts at 1                                 */
    OVLM_PARAM_BIAS,     /* starts at 0                                 */
    OVLM_PARAM_BUFFER,   /* not trained by gradients (router correction) */
    OVLM_PARAM_ADAPTER   /* A or B of a low-rank adapter: decays         */
} ovlm_param_kind;

typedef struct ovlm_param {
    char name[OVLM_NAME_BYTES];
    ovlm_param_kind kind;
    int64_t n_dims, dims[OVLM_DIMS_MOST]; /* as on the hub                                  */
    int64_t rows, cols;   /* the matrix that layers see: of what this rank holds            */
    int64_t first_row, whole_rows; /* where that begins in all that is on the hub, and how many
                             rows that has: other ranks hold other experts                  */
    int64_t fused;        /* number of the product it belongs to: one more than the last
                             parameter's, or the same                                       */
    int64_t unit;         /* number of the unit that it belongs to                          */
    bool trainable;
    int64_t offset;       /* elements from the start of the weights, buffers or adapters     */
    int64_t grad_offset;  /* elements from the start of the gradients; -1: none             */
    ovlm_tensor w, grad;  /* views, of the moment; grad left out when it is not trained     */
} ovlm_param;

/* What is gathered and reduced as one (hooks.h), in the order of the list of parameters.  Routed
 * experts are a unit of their own beside the rest of their layer: they are most of its bytes, are
 * needed last, and may be spread over other ranks than what every token passes through. */
typedef enum ovlm_unit_kind {
    OVLM_UNIT_PATCHES,       /* vision: patch embedding and table of positions              */
    OVLM_UNIT_VISION_BLOCK,
    OVLM_UNIT_MERGER,        /* with the tower's last norm                                  */
    OVLM_UNIT_DEEPSTACK,     /* one of its mergers                                          */
    OVLM_UNIT_FRONT,         /* audio: convolutions                                         */
    OVLM_UNIT_AUDIO_LAYER,
    OVLM_UNIT_PROJECT,       /* audio: last norm and projection                             */
    OVLM_UNIT_EMBED,         /* of tokens; the head as well where it is tied                */
    OVLM_UNIT_LAYER,         /* of the decoder, without its routed experts                  */
    OVLM_UNIT_EXPERTS,
    OVLM_UNIT_NORM,          /* the last                                                    */
    OVLM_UNIT_HEAD
} ovlm_unit_kind;

/* Where a unit's weights, adapters and gradients are, each in one piece; NULL: nowhere now. */
typedef struct ovlm_unit_memory {
    void *weights, *adapters, *grads;
} ovlm_unit_memory;

/* Sizes and places are in elements, with padding; those of adapters and gradients change with what
 * is adapted and trained.  Buffers (routers' corrections) are in no unit's memory. */
typedef struct ovlm_unit {
    char name[OVLM_NAME_BYTES]; /* as a module on the hub                                   */
    ovlm_unit_kind kind;
    int64_t index;        /* of the block, layer or DeepStack output; else 0                */
    int64_t offset, elements;   /* its part of all weights: [offset, offset + elements)     */
    int64_t adapter_offset, adapter_elements;
    int64_t grad_offset, grad_elements; /* 0 elements: nothing is trained                   */
    ovlm_unit_memory at;
} ovlm_unit;

/* One product's weights: `count` parameters from `first` on. */
typedef struct ovlm_weight {
    int64_t first, count, unit;
    ovlm_tensor w, dw;    /* views, of the moment: nobody keeps them from one pass to another;
                             both left out when the model has no such weight                */
    struct ovlm_lora *lora; /* its adapters, or NULL                                        */
} ovlm_weight;

/* Low-rank adapters of one product: see lora.h. */
typedef struct ovlm_lora {
    double scale;
    int64_t rank, n;      /* n modules of the product have one                              */
    ovlm_weight a;        /* [n*rank,K]                                                     */
    ovlm_weight b[OVLM_FUSED_MOST]; /* [N_i,rank]                                           */
    int64_t col[OVLM_FUSED_MOST];   /* where module i's columns begin in the product's y    */
    bool merged;          /* added to the weights: nothing to do in a pass                  */
} ovlm_lora;

/* A transformer block of any tower. */
typedef struct ovlm_block {
    int64_t width, heads, kv_heads, head_dim, hidden;
    bool rms, causal, gated, qk_norm, unturned; /* unturned: no rotary embedding            */
    double eps;
    ovlm_act act;
    const ovlm_decoder_config *moe; /* NULL: dense                                          */
    ovlm_weight norm1, norm1_bias, qkv, qkv_bias, q_norm, k_norm, out, out_bias;
    ovlm_weight norm2, norm2_bias, up, up_bias, down, down_bias; /* up: gate and up         */
    ovlm_weight router, router_bias, experts_up, experts_down, shared_up, shared_down;
} ovlm_block;

/* merge^2 neighbouring rows become one feature; 1: only normalised and projected. */
typedef struct ovlm_merge_weights {
    ovlm_merger kind;
    int64_t merge, hidden;
    ovlm_act act;
    double eps;
    ovlm_weight norm, norm_bias, fc1, fc1_bias, fc2, fc2_bias;
} ovlm_merge_weights;

typedef struct ovlm_params {
    ovlm_model_config config;
    int64_t n, base_n;                                   /* with and without adapters       */
    ovlm_param *param, *base_param;                      /* [n], [base_n]                   */
    int64_t units;
    ovlm_unit *unit;                                     /* [units]                         */
    ovlm_weight patch, patch_bias, position, final_norm, final_norm_bias;
    ovlm_block *vision;                                  /* [vision.depth]                  */
    ovlm_merge_weights merger, deepstack[OVLM_DEEPSTACK_MOST];
    ovlm_weight conv[OVLM_CONVOLUTIONS], conv_bias[OVLM_CONVOLUTIONS], conv_out;
    ovlm_block *audio;                                   /* [audio.depth]                   */
    ovlm_merge_weights project;                          /* of sounds                       */
    ovlm_weight embed, norm, head;                       /* head is embed when tied         */
    ovlm_block *decoder;                                 /* [decoder.depth]                 */
    int64_t experts_first, experts_held; /* of a layer, those of this rank                  */
    int64_t weight_elements, buffer_elements, grad_elements; /* with padding                */
    int64_t count;                                       /* parameters, without padding     */
    int64_t loras, adapter_elements;
    ovlm_lora *lora;                                     /* [loras], or NULL                */
    ovlm_dtype dtype, exact; /* of weights and adapters; of gradients and buffers           */
    void *buffers;           /* device, or NULL while nothing is allocated                  */
} ovlm_params;

/* Lists the weights of a checked configuration, all trainable but buffers; memory comes from the
 * arena.  Nothing is allocated for the weights themselves. */
OVLM_NODISCARD ovlm_status ovlm_params_init(ovlm_params *params, const ovlm_model_config *config,
                                            ovlm_arena *arena, ovlm_err *err);

/* Trains these [n] and no others; buffers are never trained.  OVLM_E_ARG, and nothing changes,
 * when only some of the weights of one product are named. */
OVLM_NODISCARD ovlm_status ovlm_params_train_only(ovlm_params *params, const bool *trainable,
                                                  ovlm_err *err);

/* This rank has these experts of every layer alone: their weights are a range of what is on the
 * hub, and all places are others than before.  There are no adapters. */
void ovlm_params_hold_experts(ovlm_params *params, int64_t first, int64_t held);

/* Offsets of gradients, from `trainable`. */
void ovlm_params_place_grads(ovlm_params *params);

/* From now on the unit is there, and all views of it point there.  Unit u's weights in a model's
 * own memory begin at element offset, parameter p's at p's offset (and so on for adapters and
 * gradients): inside a unit the distances are the same wherever it is. */
void ovlm_params_place(ovlm_params *params, int64_t unit, const ovlm_unit_memory *memory);

/* Blocks of all towers, and the i-th of them. */
int64_t ovlm_params_blocks(const ovlm_params *params);
ovlm_block *ovlm_params_block(const ovlm_params *params, int64_t i);

/* Whether anything of a weight, of a unit, of units of some kinds, or of a block, is trained. */
bool ovlm_weight_trained(const ovlm_params *params, const ovlm_weight *weight);
bool ovlm_unit_trained(const ovlm_params *params, int64_t unit);
bool ovlm_units_trained(const ovlm_params *params, ovlm_unit_kind first, ovlm_unit_kind last);
bool ovlm_block_trained(const ovlm_params *params, const ovlm_block *block);

/* The first of a tower's blocks before which nothing needs a gradient; -1: what they read does. */
int64_t ovlm_blocks_lowest(const ovlm_params *params, const ovlm_block *block, int64_t depth,
                           bool fed);

#endif
