/* model.h - a vision-language model on one device: weights, passes, optimizer, generation.
 *
 * One call at a time (the caller guards that).  Host arrays are borrowed for the call.  A failed or
 * interrupted call leaves weights and optimizer as they were; what a forward kept is gone. */
#ifndef OVLM_MODEL_MODEL_H
#define OVLM_MODEL_MODEL_H

#include "model/audio.h"
#include "model/decoder.h"
#include "model/vision.h"

typedef struct ovlm_model ovlm_model;

/* Allocates the weights (contents undefined until written), unless the hooks (or NULL) hold them.
 * `ops` outlives the model. */
OVLM_NODISCARD ovlm_status ovlm_model_open(const ovlm_model_config *config, const ovlm_ops *ops,
                                           const ovlm_backend_options *options, ovlm_dtype dtype,
                                           const ovlm_model_hooks *hooks, ovlm_model **model,
                                           ovlm_err *err);
void ovlm_model_close(ovlm_model *model); /* NULL is fine */

const ovlm_params *ovlm_model_params(const ovlm_model *model);
ovlm_backend *ovlm_model_backend(const ovlm_model *model);
ovlm_queue *ovlm_model_queue(const ovlm_model *model);

/* ------------------------------------------------------------ hooks (hooks.h) */

/* From the next pass on; NULL: none.  What the hooks hold from now on is given up, with the
 * optimizer's state, and has no place until ovlm_model_place; what they no longer hold is
 * allocated, and is zero.  No backward may follow a pass of before.  Waits.  OVLM_E_ARG, and
 * nothing changes, while an average is kept. */
OVLM_NODISCARD ovlm_status ovlm_model_set_hooks(ovlm_model *model, const ovlm_model_hooks *hooks,
                                                ovlm_err *err);

/* Where a unit is from now on, of what the hooks hold (the rest is passed over); NULL: nowhere.
 * 64-byte aligned, laid out as ovlm_unit says.  ovlm_model_train_only takes all gradients' places
 * away. */
void ovlm_model_place(ovlm_model *model, int64_t unit, const ovlm_unit_memory *memory);

/* OVLM_E_ARG, for what needs all weights or gradients, when hooks or other ranks hold them. */
OVLM_NODISCARD ovlm_status ovlm_model_need_own(const ovlm_model *model, const char *what,
                                               ovlm_err *err);

/* OVLM_E_ARG when a product's weights would be trained in part.  Gradients and optimizer state are
 * released: they have other places now. */
OVLM_NODISCARD ovlm_status ovlm_model_train_only(ovlm_model *model, const bool *trainable,
                                                 ovlm_err *err);

/* No backward may follow what was run so far: the weights are not what the passes saw. */
void ovlm_model_forget(ovlm_model *model);

/* Until all work is done. */
OVLM_NODISCARD ovlm_status ovlm_model_wait(ovlm_model *model, ovlm_err *err);

/* One weight to and from host memory, in the dtype that it is stored in, dense; waits.  OVLM_E_ARG
 * when hooks hold it and it has no place now. */
OVLM_NODISCARD ovlm_status ovlm_model_read(ovlm_model *model, const ovlm_tensor *tensor,
                                           void *host, ovlm_err *err);
OVLM_NODISCARD ovlm_status ovlm_model_write(ovlm_model *model, const ovlm_tensor *tensor,
                                            const void *host, ovlm_err *err);

/* OVLM_E_ARG when the tensor is there but, for the moment, in no memory. */
OVLM_NODISCARD ovlm_status ovlm_model_reach(const ovlm_tensor *tensor, ovlm_err *err);

/* Makes gradients (zero) where there are none yet, and sets them to zero; nothing where hooks hold
 * them. */
OVLM_NODISCARD ovlm_status ovlm_model_need_grads(ovlm_model *model, ovlm_err *err);
OVLM_NODISCARD ovlm_status ovlm_model_zero_grad(ovlm_model *model, ovlm_err *err);

/* ------------------------------------------------------------ passes
 *
 * A forward is phases: encode (images to features, sounds to features) and decode (tokens and
 * features to hidden states and the loss); each can be run alone, with what lies between them in
 * the caller's hands.  Each keeps what its backward needs until it is run again, whatever the
 * others do meanwhile.
 * Memory grows in forward, encode, decode and, for dhidden and dlogits, backward; never between
 * the layers of a pass.  "exact" is float32 (float64 in models of that dtype).
 *
 * Where tokens are a shard (sequence.h), every array of labels, and of what is per label - weights,
 * logp, entropy, their slopes - has one entry more: T + 1, the last of them of the token behind the
 * shard, which the shard's last row predicts; the first entry is predicted by the shard before, and
 * not read, or 0.  Behind the group's last token there is none: -100, 0.  A loss without a
 * normalizer is over this shard's weights.
 *
 * Nothing to do is work like any other: with T = 0, with no segments, no images or no sounds every
 * call runs its phases through all units (hooks.h), gives a loss of 0 and empty rows, and adds
 * nothing to gradients.  Which phases there are is said by pointers, not by counts: an encode in a
 * forward by grid_thw or mel_length, features by theirs, a loss by label, a slope by its own.
 * Ranks that match give the same ones, if need be of nothing. */

typedef struct ovlm_model_inputs {
    ovlm_tokens tokens;
    const ovlm_sequence *sequence; /* tokens are the shard of one of its ranks; NULL: they are
                                  whole.  Stays until the backward                             */
    const int32_t *label;      /* [T]: token t's own label; it is predicted from t-1 of its segment;
                                  NULL: no loss                                                */
    const float *weight;       /* [T] of the labels, or NULL                                   */
    int64_t images;
    const int32_t *grid_thw;   /* [images,3]; NULL: nothing is encoded                         */
    const void *pixels;        /* [P, ...]                                                     */
    ovlm_dtype pixel_dtype;
    int64_t sounds;
    const int32_t *mel_length; /* [sounds]; NULL: nothing is encoded                           */
    const float *mel;          /* [frames, bins]                                               */
    struct {
        int64_t rows;
        const void *features;  /* [rows,width] exact, which stand for the images' or sounds'
                                  own; NULL: there are none                                    */
    } given[OVLM_MODALITIES];
    const void *extra;         /* [deepstack_n,rows,width] exact, of the images; NULL without  */
    double normalizer;         /* what the loss is divided by; < 0: this call's weight sum     */
    const int64_t *router_count; /* [E] of the whole global batch, or NULL: this call's        */
    double router_rows;        /* layers x tokens that router_count was taken over             */
} ovlm_model_inputs;

typedef struct ovlm_model_output {
    double loss, aux_loss;     /* loss includes aux_coef * aux_loss                            */
    double weight_sum;         /* of this call's labels                                        */
    int64_t target_tokens;
} ovlm_model_output;

/* Entries of a tower's hidden states that a pass keeps; 0 is what its first block reads. */
typedef struct ovlm_tap_list {
    int64_t n;
    const int32_t *entry;      /* [n] in [0, depth]                                            */
} ovlm_tap_list;

typedef struct ovlm_pass_options {
    bool training;             /* a backward may follow                                        */
    bool entropy;
    bool own_loss;             /* it will be of this forward's loss: the head's gradients are
                                  computed on the way                                          */
    ovlm_checkpoint checkpoint;
    ovlm_tap_list vision_taps, taps;
    int (*poll)(void *ctx);    /* between layers; non-zero stops; or NULL                      */
    void *poll_ctx;
} ovlm_pass_options;

/* Passes from now on run their routed experts in chunks of at most so many rows (T*k in all), with
 * a workspace that is bounded by a chunk; 0: all at once.  Outputs are the same to the last bit. */
void ovlm_model_set_expert_rows(ovlm_model *model, int64_t rows);

/* Experts on several ranks from now on (expert_exchange.h): this rank keeps its own, with their
 * gradients and optimizer state.  NULL: all of them again, where those of other ranks are to be
 * written.  What is trained stays; gradients and optimizer state are gone.  Waits.  OVLM_E_ARG, and
 * nothing changes: fewer experts than ranks, adapters, an average of weights, hooks that hold
 * weights or gradients. */
OVLM_NODISCARD ovlm_status ovlm_model_spread_experts(ovlm_model *model,
                                                     const ovlm_expert_group *group,
                                                     ovlm_err *err);

/* Whether experts are on several ranks. */
bool ovlm_model_spreads_experts(const ovlm_model *model);

/* The group is gone while experts are still on several ranks; hooks hold the weights, and let no
 * pass begin any more. */
void ovlm_model_lose_experts(ovlm_model *model);

/* The decode, after an encode of the images and one of the sounds, where there are any.  With label
 * NULL there is no loss but the routers' balance. */
OVLM_NODISCARD ovlm_status ovlm_model_forward(ovlm_model *model, const ovlm_model_inputs *inputs,
                                              const ovlm_pass_options *options, ovlm_err *err);

/* An encode alone: reads images, grid_thw and pixels of the inputs; or sounds, mel_length and mel.
 */
OVLM_NODISCARD ovlm_status ovlm_model_encode(ovlm_model *model, ovlm_modality modality,
                                             const ovlm_model_inputs *inputs,
                                             const ovlm_pass_options *options, ovlm_err *err);

/* Waits.  features [rows,width] and, of images, extra [deepstack_n,rows,width] of the last encode
 * (either may be NULL), exact. */
OVLM_NODISCARD ovlm_status ovlm_model_features_read(ovlm_model *model, ovlm_modality modality,
                                                    void *features, void *extra, ovlm_err *err);

/* Tokens of the last forward, or 0 when what it kept is gone: the T of the calls below.  Rows of
 * the features that it was given, or of those that the last encode made; -1: none. */
int64_t ovlm_model_token_count(const ovlm_model *model);
/* The same of labels: one more in a shard. */
int64_t ovlm_model_label_count(const ovlm_model *model);
int64_t ovlm_model_given_rows(const ovlm_model *model, ovlm_modality modality);
int64_t ovlm_model_encoded_rows(const ovlm_model *model, ovlm_modality modality);

/* Waits.  Hidden states [T,width] after the last norm of the last forward, exact. */
OVLM_NODISCARD ovlm_status ovlm_model_hidden_read(ovlm_model *model, void *hidden, ovlm_err *err);

/* Waits.  What options->taps (or vision_taps) number i of the last pass kept: [T,width] (or
 * [P,vision width]) exact; its extents come from ovlm_model_tap, NULL when it is gone. */
const ovlm_tensor *ovlm_model_tap(const ovlm_model *model, bool vision, int64_t i);
OVLM_NODISCARD ovlm_status ovlm_model_tap_read(ovlm_model *model, bool vision, int64_t i,
                                               void *state, ovlm_err *err);

/* Waits.  logp and entropy [labels] (or NULL) belong to the token at which they were predicted:
 * entry t is of token t's label, 0 at the start of a segment. */
OVLM_NODISCARD ovlm_status ovlm_model_output_read(ovlm_model *model, ovlm_model_output *output,
                                                  float *logp, float *entropy, ovlm_err *err);

/* [E] routed slots of the last forward over all layers; waits. */
OVLM_NODISCARD ovlm_status ovlm_model_router_read(ovlm_model *model, int64_t *count,
                                                  ovlm_err *err);

/* The same by layer with experts, [ovlm_decoder_sparse_layers,E]; waits. */
OVLM_NODISCARD ovlm_status ovlm_model_router_layers(ovlm_model *model, int64_t *count,
                                                    ovlm_err *err);

/* Moves the corrections of sigmoid routers against such counts, of a whole global batch: up by
 * speed where an expert got fewer slots than the mean of its layer, down where more.  Waits. */
OVLM_NODISCARD ovlm_status ovlm_model_router_correct(ovlm_model *model, const int64_t *count,
                                                     double speed, ovlm_err *err);

/* Float32 logits [rows, vocab] of rows of the last forward's hidden states; waits.  A pass of its
 * own, of the head alone. */
OVLM_NODISCARD ovlm_status ovlm_model_logits(ovlm_model *model, const int32_t *row, int64_t rows,
                                             float *logits, ovlm_err *err);

/* Slopes of a loss of the caller's, which may read all of these; what it does not read is NULL.
 * Host arrays. */
typedef struct ovlm_model_slopes {
    const float *dlogp;        /* [labels], in the order of ovlm_model_output_read             */
    const float *dentropy;     /* [labels]; the forward was asked for the entropy              */
    const void *dhidden;       /* [T,width] exact: of ovlm_model_hidden_read                   */
    int64_t rows;
    const int32_t *row;        /* [rows], may repeat                                           */
    const float *dlogits;      /* [rows,vocab] of ovlm_model_logits                            */
} ovlm_model_slopes;

/* Where gradients of given features go, exact; NULL: not wanted. */
typedef struct ovlm_feature_slopes {
    void *dfeatures[OVLM_MODALITIES]; /* [rows,width]                                          */
    void *dextra;              /* [deepstack_n,rows,width] of the images                       */
} ovlm_feature_slopes;

/* Adds the gradients of the caller's loss, or, with no slope at all, of the last forward's own; in
 * both cases with that of the routers' balance loss.  Once per forward.  Goes through the encoders
 * that the forward ran; writes the gradients of the features that it was given, and waits. */
OVLM_NODISCARD ovlm_status ovlm_model_backward(ovlm_model *model, const ovlm_model_slopes *slopes,
                                               const ovlm_feature_slopes *dfeatures,
                                               const ovlm_pass_options *options, ovlm_err *err);

/* Adds the encoder's gradients from those of features and, of images, extra of the last encode in
 * training, exact (NULL: zero).  Once per encode. */
OVLM_NODISCARD ovlm_status ovlm_model_encode_backward(ovlm_model *model, ovlm_modality modality,
                                                      const void *dfeatures, const void *dextra,
                                                      const ovlm_pass_options *options,
                                                      ovlm_err *err);

/* ------------------------------------------------------------ trace */

/* Starts to note when phases, layers and operations run; what was noted before is forgotten. */
void ovlm_model_trace_start(ovlm_model *model);

/* Ends that; *trace is what was noted, to be freed with ovlm_trace_free. */
void ovlm_model_trace_stop(ovlm_model *model, ovlm_trace *trace);

/* ------------------------------------------------------------ optimizer */

typedef struct ovlm_model_adamw {
    const double *lr, *weight_decay; /* [n] per parameter */
    double beta1, beta2, eps, max_norm;
    int64_t step;                    /* 1, 2, ...          */
} ovlm_model_adamw;

typedef struct ovlm_model_step {
    double grad_norm, clip;
    int64_t non_finite;              /* > 0: nothing was changed */
} ovlm_model_step;

/* OVLM_E_ARG when hooks hold weights or gradients. */
OVLM_NODISCARD ovlm_status ovlm_model_adamw_step(ovlm_model *model,
                                                 const ovlm_model_adamw *options,
                                                 ovlm_model_step *step, ovlm_err *err);

/* First and second moment, or float32 master (left out for float32 models), of a parameter; made
 * when missing.  OVLM_E_ARG when hooks hold weights or gradients. */
OVLM_NODISCARD ovlm_status ovlm_model_moments(ovlm_model *model, int64_t parameter, ovlm_tensor *m,
                                              ovlm_tensor *v, ovlm_tensor *master, ovlm_err *err);

/* Whether gradients, and optimizer state, are held: calls that ask for one make it. */
bool ovlm_model_has_grads(const ovlm_model *model);
bool ovlm_model_has_moments(const ovlm_model *model);

/* To be called after a weight was written: a master that exists takes its value.  Waits. */
OVLM_NODISCARD ovlm_status ovlm_model_renew_master(ovlm_model *model, int64_t parameter,
                                                   ovlm_err *err);

/* ------------------------------------------------------------ average of the weights */

/* A float32 moving average of what is trained, from its present values; one per model, until it is
 * closed.  What is trained cannot change meanwhile.  OVLM_E_ARG when hooks hold weights or
 * gradients. */
OVLM_NODISCARD ovlm_status ovlm_model_average_open(ovlm_model *model, ovlm_err *err);
OVLM_NODISCARD ovlm_status ovlm_model_average_close(ovlm_model *model, ovlm_err *err);

/* average = decay average + (1 - decay) weight.  Waits. */
OVLM_NODISCARD ovlm_status ovlm_model_average_update(ovlm_model *model, double decay,
                                                     ovlm_err *err);

/* The averages become the model's weights (in), or its own come back, to the bit.  No optimizer
 * step meanwhile.  Waits. */
OVLM_NODISCARD ovlm_status ovlm_model_average_swap(ovlm_model *model, bool in, ovlm_err *err);
bool ovlm_model_average_in(const ovlm_model *model);

/* A parameter's average; left out where there is none. */
ovlm_tensor ovlm_model_average(const ovlm_model *model, int64_t parameter);

/* ------------------------------------------------------------ adapters */

/* Low-rank adapters (zero) of the weights adapted[n], behind the other parameters:
 * y += scale B A x.  They are what is trained from then on.  OVLM_E_ARG when one of the weights
 * cannot have any, and here and below when hooks hold weights or gradients. */
OVLM_NODISCARD ovlm_status ovlm_model_lora_open(ovlm_model *model, const bool *adapted,
                                                int64_t rank, double scale, ovlm_err *err);

/* Takes them away; the whole model is trained again. */
OVLM_NODISCARD ovlm_status ovlm_model_lora_close(ovlm_model *model, ovlm_err *err);

/* Adds them to the weights, so that passes cost nothing more, or takes them out again (up to
 * rounding).  Merged, there is no training.  Waits. */
OVLM_NODISCARD ovlm_status ovlm_model_lora_merge(ovlm_model *model, bool in, ovlm_err *err);
bool ovlm_model_lora_merged(const ovlm_model *model);

/* ------------------------------------------------------------ generation */

/* Room for `sequences` of at most `length` tokens each. */
OVLM_NODISCARD ovlm_status ovlm_model_cache_open(ovlm_model *model, int64_t sequences,
                                                 int64_t length, ovlm_err *err);
void ovlm_model_cache_close(ovlm_model *model);

/* Appends inputs' segment i to sequence i (all of them; a segment may be empty) and returns the
 * float32 logits [sequences, vocab] after the last token of each that is not empty; waits. */
OVLM_NODISCARD ovlm_status ovlm_model_extend(ovlm_model *model, const ovlm_model_inputs *inputs,
                                             const ovlm_pass_options *options, float *logits,
                                             ovlm_err *err);

/* ------------------------------------------------------------ memory */

typedef struct ovlm_model_memory {
    int64_t weights_bytes, training_bytes, activations_bytes, workspace_bytes, cache_bytes;
} ovlm_model_memory;

/* What is held now. */
void ovlm_model_memory_read(const ovlm_model *model, ovlm_model_memory *memory);

#endif
