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

/* What an encoder's last pass left. */
typedef struct ovlm_encoder {
    ovlm_arena call;               /* host: what it needs until its backward                   */
    ovlm_stack keep;
    bool in_forward;               /* the last forward encoded; its backward goes on there     */
    bool has_features;
    bool can_backward;             /* after an encode                                          */
} ovlm_encoder;

struct ovlm_model {
    ovlm_arena arena;              /* host: parameter list, layer records                      */
    ovlm_arena call;               /* host: what a decode needs until its backward             */
    ovlm_arena lora;               /* host: the list with adapters                             */
    ovlm_params params;
    bool hooked;
    ovlm_visit visit;              /* hooks; those of a model without any hold nothing         */
    ovlm_backend *backend;
    ovlm_queue *queue;
    ovlm_dtype dtype, exact;       /* of weights and activations; of gradients and statistics  */
    ovlm_device_block weights, buffers, grads, moments, scalars, routing;
    ovlm_device_block adapters;
    ovlm_device_block average, swapped; /* laid out as the gradients                            */
    ovlm_stack decoder_keep, work, stage;
    ovlm_encoder encoder[OVLM_MODALITIES];
    ovlm_block_saved *vision_block, *audio_block, *decoder_block;
    ovlm_vision_pass vision;
    ovlm_audio_pass audio;
    ovlm_decoder_pass decoder;
    ovlm_head head;
    int64_t expert_rows;           /* bound of a chunk of experts' rows; 0: none               */
    bool spread;                   /* experts are on several ranks: of this group              */
    ovlm_expert_group expert_group;
    int64_t *count, *count_after, *count_given; /* views of `routing`: [E]; [depth,E] count behind
                                                   each layer; [E] of the host                 */
    double *score_sum;             /* [E] */
    float *slope;                  /* [E] */
    bool has_loss, can_backward, has_hidden; /* of the last forward or decode                  */
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

/* Points the parameters' views at the model's own memory; weights that hooks hold stay where they
 * were placed. */
void ovlm_model_rebind(ovlm_model *model);

/* Memory of the routers' statistics. */
OVLM_NODISCARD ovlm_status ovlm_model_routing_open(ovlm_model *model, ovlm_err *err);

/* At least so much workspace, between passes. */
OVLM_NODISCARD ovlm_status ovlm_model_need_work(ovlm_model *model, int64_t bytes, ovlm_err *err);

/* A few operations between passes, on the workspace, walked twice as a pass is. */
typedef ovlm_status (*ovlm_model_walk_fn)(ovlm_run *run, void *args);
OVLM_NODISCARD ovlm_status ovlm_model_walk_alone(ovlm_model *model, ovlm_model_walk_fn walk,
                                                 void *args, ovlm_err *err);

/* One scale between passes. */
OVLM_NODISCARD ovlm_status ovlm_model_scale(ovlm_model *model, ovlm_scale *args, ovlm_err *err);

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

/* Forgets what the phases kept, checks their inputs and fills their passes. */
OVLM_NODISCARD ovlm_status ovlm_model_prepare(ovlm_model *model, const ovlm_model_inputs *inputs,
                                              const ovlm_pass_options *options, unsigned phases,
                                              ovlm_err *err);

/* The phases of a forward of the inputs but the head: what it encodes, and the decode. */
unsigned ovlm_model_phases(const ovlm_model *model, const ovlm_model_inputs *inputs);

/* A pass that only counts what it takes of the stacks, which `held` keeps meanwhile; and its end,
 * which makes room for as much on those that the phases need, unless the pass failed. */
enum { OVLM_MODEL_STACKS = OVLM_MODALITIES + 3 };
ovlm_run ovlm_model_measure_begin(ovlm_model *model, const ovlm_pass_options *options,
                                  ovlm_stack held[OVLM_MODEL_STACKS], ovlm_err *err);
OVLM_NODISCARD ovlm_status ovlm_model_measure_end(ovlm_model *model,
                                                  const ovlm_stack held[OVLM_MODEL_STACKS],
                                                  unsigned phases, ovlm_status status,
                                                  ovlm_err *err);

/* Checks the inputs' images or sounds and fills model->vision or model->audio. */
OVLM_NODISCARD ovlm_status ovlm_model_encode_prepare(ovlm_model *model, ovlm_modality modality,
                                                     const ovlm_model_inputs *inputs,
                                                     const ovlm_pass_options *options,
                                                     ovlm_err *err);

/* Features that a prepared encoder makes. */
int64_t ovlm_model_feature_rows(const ovlm_model *model, ovlm_modality modality);

/* Whether a backward of the encoder's last pass has something to do. */
bool ovlm_model_trains(const ovlm_model *model, ovlm_modality modality);

/* Those of the phases that encode. */
OVLM_NODISCARD ovlm_status ovlm_model_walk_encode(ovlm_run *run, ovlm_model *model,
                                                  unsigned phases);

/* For the decoder, what the encoders of its forward made. */
void ovlm_model_take_features(ovlm_model *model);

/* Backward of a decode and of the encodes in its forward.  *dfeatures is, on the workspace, the
 * gradient of the features. */
OVLM_NODISCARD ovlm_status ovlm_model_walk_backward(ovlm_run *run, ovlm_model *model,
                                                    const ovlm_model_slopes *slopes,
                                                    ovlm_decoder_features *dfeatures);

OVLM_NODISCARD ovlm_status ovlm_model_walk_encode_backward(ovlm_run *run, ovlm_model *model,
                                                           ovlm_modality modality,
                                                           const void *dfeatures,
                                                           const void *dextra);

#endif
