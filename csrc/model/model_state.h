/* model_state.h - the inside of ovlm_model, for the files that make it up. */
#ifndef OVLM_MODEL_MODEL_STATE_H
#define OVLM_MODEL_MODEL_STATE_H

#include "model/model.h"

/* What a pass reports; on the device. */
typedef struct ovlm_model_scalars {
    double loss, aux_loss, weight_sum, total;
    int64_t target_tokens;
} ovlm_model_scalars;

/* One device allocation of the model. */
typedef struct ovlm_device_block {
    void *data;
    int64_t bytes;
} ovlm_device_block;

struct ovlm_model {
    ovlm_arena arena;              /* host: parameter list, layer records                      */
    ovlm_arena call;               /* host: what a forward needs until its backward            */
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
    bool has_vision, has_loss, can_backward, has_hidden;
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

/* Vision of the inputs, if there are images: checks them and fills model->vision. */
OVLM_NODISCARD ovlm_status ovlm_model_vision_prepare(ovlm_model *model,
                                                     const ovlm_model_inputs *inputs,
                                                     const ovlm_pass_options *options,
                                                     ovlm_err *err);

/* Copies the host arrays of tokens, which the backward needs again, to model->call. */
OVLM_NODISCARD ovlm_status ovlm_model_tokens_prepare(ovlm_model *model,
                                                     const ovlm_model_inputs *inputs,
                                                     const ovlm_pass_options *options,
                                                     ovlm_err *err);

#endif
