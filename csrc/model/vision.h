/* vision.h - the native-resolution vision tower: patches to one feature per language token. */
#ifndef OVLM_MODEL_VISION_H
#define OVLM_MODEL_VISION_H

#include "model/block.h"
#include "model/grid.h"

typedef struct ovlm_merge_saved {
    ovlm_norm norm;
    ovlm_gather pool;
    ovlm_linear fc1, fc2;
    ovlm_gated act; /* of fc1, where adapters come in between */
    ovlm_lora_saved fc1_lora, fc2_lora;
} ovlm_merge_saved;

/* One pass of the tower, from its forward to its backward. */
typedef struct ovlm_vision_pass {
    const ovlm_params *params;
    ovlm_grid grid;
    int64_t tokens;               /* P / merge^2                                             */
    const void *pixels;           /* [P, channels*temporal*patch^2] host                     */
    ovlm_dtype pixel_dtype;       /* float32: normalised; uint8: (x/255 - 0.5)/0.5 is done here */
    bool training;                /* a backward follows and finds something trained          */
    int64_t lowest;               /* in training: the first block that it reaches, so that it
                                     and what is above are kept (depth: none); -1: the
                                     patches too                                             */
    ovlm_block_context context;
    ovlm_taps taps;               /* entries 0 to depth                                      */
    ovlm_linear patch;
    ovlm_gather position;
    ovlm_norm final_norm;
    ovlm_block_saved *block;      /* [depth] host                                            */
    ovlm_merge_saved merger, deepstack[OVLM_DEEPSTACK_MOST];
    ovlm_tensor features;         /* [tokens, out_width]                                     */
    ovlm_tensor extra[OVLM_DEEPSTACK_MOST]; /* DeepStack's outputs, the same shape            */
} ovlm_vision_pass;

/* Features and extras, on run->keep. */
OVLM_NODISCARD ovlm_status ovlm_vision_fwd(ovlm_run *run, ovlm_vision_pass *pass);

/* From the gradients of features and extras (each may be left out) to those of the weights. */
OVLM_NODISCARD ovlm_status ovlm_vision_bwd(ovlm_run *run, ovlm_vision_pass *pass,
                                           ovlm_tensor dfeatures, const ovlm_tensor *dextra);

/* Whether any weight of the tower is trained. */
bool ovlm_vision_trained(const ovlm_params *params);

OVLM_NODISCARD ovlm_status ovlm_merger_fwd(ovlm_run *run, const ovlm_merge_weights *weights,
                                           ovlm_stack *stack, ovlm_tensor h, ovlm_tensor out,
                                           ovlm_merge_saved *saved);

/* dh gets (with beta 1: is added) the gradient of what the merger read; left out: not needed. */
OVLM_NODISCARD ovlm_status ovlm_merger_bwd(ovlm_run *run, const ovlm_merge_weights *weights,
                                           ovlm_tensor dout, ovlm_tensor dh, float beta,
                                           ovlm_merge_saved *saved);

/* cos and sin of positions [axes,T] (device) for frequencies and their axes (host). */
OVLM_NODISCARD ovlm_status ovlm_rope_tables(ovlm_run *run, ovlm_stack *stack,
                                            ovlm_tensor position, const float *frequency,
                                            const int32_t *axis, int64_t count,
                                            ovlm_block_context *context);

#endif
