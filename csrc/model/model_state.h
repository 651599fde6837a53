/* model_state.h - the inside of ovlm_model, for the files that make it up. */
#ifndef OVLM_MODEL_MODEL_STATE_H
#define OVLM_MODEL_MODEL_STATE_H

#include "model/model.h"

/* What a pass reports; on the device. */
typedef struct ovlm_model_scalars {
    double loss, aux_loss, weight_sum, total;
    int64_t target_tokens;
} ovlm_model_scalars;

/* What a call runs. */
typedef enum ovlm_phase { OVLM_PHASE_ENCODE = 1, OVLM_PHASE_DECODE = 2 } ovlm_phase;

/* One device allocation of the model. */
typedef struct ovlm_device_block {
    void *data;
    int64_t bytes;
} ovlm_device_block;

struct ovlm_model {
    ovlm_arena arena;              /* host: parameter list, layer records                      */
    ovlm_arena call, encode_call;  /* host: what a decode, an encode needs until its backward  */
    ovlm_arena lora;               /* host: the list with adapters                             */
    ovlm_params params;
    ovlm_backend *backend;
    ovlm_queue *queue;
    ovlm_dtype dtype, exact;       /* of weights and activations; of gradients and statistics  */
    ovlm_device_block weights, buffers, grads, moments, scalars, routing;
    ovlm_device_block adapters;
    ovlm_device_block average, swapped; /* laid out as the gradients                            */
    ovlm_stack vision_keep, decoder_keep, work, stage;
    ovlm_block_saved *vision_block, *decoder_block;
    ovlm_vision_pass vision;
    ovlm_decoder_pass decoder;
    ovlm_head head;
    int64_t *count, *count_after, *count_given; /* views of `routing`: [E]; [depth,E] count behind
                                                   each layer; [E] of the host                 */
    double *score_sum;             /* [E] */
    float *slope;                  /* [E] */
    bool has_vision;               /* the last forward encoded; its backward goes on there     */
    bool has_loss, can_backward, has_hidden; /* of the last forward or decode                  */
    bool has_features, can_encode_backward;  /* of the last encode                             */
    bool tracing;
    ovlm_trace trace;
    /* generation */
    ovlm_device_block cache;
    ovlm_cache *layer_cache;       /* [depth] */
    int64_t cache_sequences, cache_length;
    int64_t *cache_used, *cache_row; /* [sequences] tokens held; row of the next one           */
};

OVLM_NODISCARD ovlm_status ovlm_device_block_need(ovlm_model *model, ovlm_device_block *block,
                                                  int64_t bytes, bool zero, ovlm_err *err);
void ovlm_device_block_free(ovlm_model *model, ovlm_device_block *block);

/* Points the parameters' views at the present memory. */
void ovlm_model_rebind(ovlm_model *model);

/* Memory of the routers' statistics. */
OVLM_NODISCARD ovlm_status ovlm_model_routing_open(ovlm_model *model, ovlm_err *err);

/* At least so much free workspace; what a forward kept there for ovlm_model_logits may go. */
OVLM_NODISCARD ovlm_status ovlm_model_need_work(ovlm_model *model, int64_t bytes, ovlm_err *err);

/* Device memory to the host; waits. */
OVLM_NODISCARD ovlm_status ovlm_model_fetch(ovlm_model *model, void *host, const void *device,
                                            int64_t bytes, ovlm_err *err);

/* A pass over the model's queue; keep is set by phase. */
ovlm_run ovlm_model_run(ovlm_model *model, bool measuring, const ovlm_pass_options *options,
                        ovlm_err *err);

/* Activations to the host, dense, exact; waits.  The workspace stays as it is. */
OVLM_NODISCARD ovlm_status ovlm_model_rows_read(ovlm_model *model, const ovlm_tensor *rows,
                                                void *host, ovlm_err *err);

/* Before a pass: waits, so that stacks that hold nothing between passes are free from here on. */
OVLM_NODISCARD ovlm_status ovlm_model_begin(ovlm_model *model, ovlm_err *err);

/* Checks the inputs' images (one or more) and fills model->vision. */
OVLM_NODISCARD ovlm_status ovlm_model_vision_prepare(ovlm_model *model,
                                                     const ovlm_model_inputs *inputs,
                                                     const ovlm_pass_options *options,
                                                     ovlm_err *err);

/* Copies the host arrays of tokens, which the backward needs again, to model->call. */
OVLM_NODISCARD ovlm_status ovlm_model_tokens_prepare(ovlm_model *model,
                                                     const ovlm_model_inputs *inputs,
                                                     const ovlm_pass_options *options,
                                                     ovlm_err *err);

/* Encodes model->vision. */
OVLM_NODISCARD ovlm_status ovlm_model_walk_encode(ovlm_run *run, ovlm_model *model);

/* Backward of a decode and, where model->has_vision, of its encode.  dfeatures and dextra are, on
 * the workspace, those of given features. */
OVLM_NODISCARD ovlm_status ovlm_model_walk_backward(ovlm_run *run, ovlm_model *model,
                                                    const ovlm_model_slopes *slopes,
                                                    ovlm_tensor *dfeatures, ovlm_tensor *dextra);

OVLM_NODISCARD ovlm_status ovlm_model_walk_encode_backward(ovlm_run *run, ovlm_model *model,
                                                           const void *dfeatures,
                                                           const void *dextra);

#endif
