/* decoder.h - the language model: tokens and features to hidden states. */
#ifndef OVLM_MODEL_DECODER_H
#define OVLM_MODEL_DECODER_H

#include "model/block.h"

/* Packed tokens of a call; host arrays. */
typedef struct ovlm_tokens {
    int64_t T, segments;
    int64_t first;              /* of a shard: the group's tokens before it; else 0          */
    const int32_t *id;          /* [T] in [0, vocab)                                         */
    const int32_t *start;       /* [segments+1] ascending from 0 to T; of a shard, to the T of
                                   its whole group                                           */
    const float *position;      /* [3,T]: time, height, width                                */
    const int32_t *feature_row; /* [T]: row of the features that stands here, or -1; or NULL.
                                   The sounds' rows follow those of the images.              */
} ovlm_tokens;

/* What stands for images and sounds, or its gradients; left out: none, or not wanted. */
typedef struct ovlm_decoder_features {
    ovlm_tensor image;          /* [F,width] device                                          */
    ovlm_tensor extra[OVLM_DEEPSTACK_MOST]; /* [F,width] each: DeepStack's part              */
    ovlm_tensor sound;          /* [S,width]                                                 */
} ovlm_decoder_features;

/* One pass, from its forward to its backward. */
typedef struct ovlm_decoder_pass {
    const ovlm_params *params;
    ovlm_tokens tokens;
    int64_t longest;            /* segment                                                   */
    bool training;              /* a backward follows and has something to do in here        */
    bool shard;                 /* tokens are one; context.sequence where it has company     */
    int64_t lowest;             /* as the vision pass's; -1: embedding or features too       */
    ovlm_decoder_features features;
    ovlm_block_context context; /* checkpoint, count, score_sum, aux are the caller's        */
    int64_t *count_after;       /* [depth,E] device: context.count behind each layer; or NULL */
    const ovlm_cache *cache;    /* [depth], with context.key; or NULL                        */
    ovlm_taps taps;             /* entries 0 to depth; the last is hidden                    */
    ovlm_gather embed, mix, mix_sounds, deepstack[OVLM_DEEPSTACK_MOST];
    ovlm_block_saved *block;    /* [depth] host                                              */
    ovlm_norm norm;
    ovlm_tensor hidden;         /* [T,width], after the last norm                            */
} ovlm_decoder_pass;

/* OVLM_E_ARG names the first id, segment or row that is out of range; of a shard, segments may end
 * anywhere. */
OVLM_NODISCARD ovlm_status ovlm_tokens_check(const ovlm_tokens *tokens, bool shard, int64_t vocab,
                                             int64_t feature_rows, int64_t *longest,
                                             ovlm_err *err);

/* What this call has of segment i: rows first .. end-1, of which there may be none. */
typedef struct ovlm_token_span {
    int64_t first, end;
    bool begins, ends;          /* the segment's first token, and its last, are among them   */
} ovlm_token_span;

ovlm_token_span ovlm_token_span_of(const ovlm_tokens *tokens, int64_t segment);

/* hidden, on run->keep. */
OVLM_NODISCARD ovlm_status ovlm_decoder_fwd(ovlm_run *run, ovlm_decoder_pass *pass);

/* Of a pass in training: from dhidden to the weights' gradients and to those of the features
 * (overwritten). */
OVLM_NODISCARD ovlm_status ovlm_decoder_bwd(ovlm_run *run, ovlm_decoder_pass *pass,
                                            ovlm_tensor dhidden,
                                            const ovlm_decoder_features *dfeatures);

#endif
