/* block.h - a transformer block of either tower: pre-norm attention and a dense or mixture-of-
 * experts MLP on a residual stream. */
#ifndef OVLM_MODEL_BLOCK_H
#define OVLM_MODEL_BLOCK_H

#include "model/expert_exchange.h"
#include "model/lora.h"
#include "model/sequence.h"

/* What is kept between forward and backward. */
typedef enum ovlm_checkpoint {
    OVLM_CHECKPOINT_NONE,      /* everything                                                   */
    OVLM_CHECKPOINT_SELECTIVE, /* not the outputs of norms and gates, which cost little to redo */
    OVLM_CHECKPOINT_FULL       /* the residual stream and the routers' choices                 */
} ovlm_checkpoint;

/* Keys and values of earlier tokens, for decoding: segment i's rows start at start[i]. */
typedef struct ovlm_cache {
    ovlm_tensor k, v;          /* [rows, kv_heads*D] of this layer                             */
    const int64_t *first_row;  /* [segments] host: where the new rows of a segment go          */
} ovlm_cache;

/* What all blocks of a tower share in a pass. */
typedef struct ovlm_block_context {
    ovlm_tensor cos, sin;          /* [T,R]                                                    */
    ovlm_segments query, key;
    int64_t *count;                /* [E] device: routed slots over all layers; or NULL        */
    double *score_sum;             /* [E] device: router probabilities over all layers         */
    ovlm_tensor aux;               /* [1,E]: slope of the balance loss; backward               */
    ovlm_checkpoint checkpoint;
    int64_t expert_rows;           /* of a chunk, at most; 0: all at once (experts.h)          */
    const ovlm_params *params;
    const ovlm_cache *cache;       /* decoding; or NULL                                        */
    const ovlm_sequence_pass *sequence; /* T is a shard; query and key are its row's; or NULL  */
    const int32_t *ring_bounds;    /* device: sequence->ring.bounds behind the segments        */
    const ovlm_expert_pass *experts; /* they are on several ranks; or NULL                     */
} ovlm_block_context;

/* The operations of a block with the places of their tensors, from the forward to the backward. */
typedef struct ovlm_block_saved {
    ovlm_tensor h_in, h_out;
    ovlm_norm norm1, norm2;
    ovlm_linear qkv, out, up, down, gate;
    ovlm_rope q, k;
    ovlm_attention attention[OVLM_HEAD_RUNS_MOST];
    ovlm_attention ring;           /* all own heads, where there are steps                     */
    ovlm_gated gated;
    ovlm_router router;
    ovlm_grouped_linear experts_up, experts_down;
    ovlm_gated experts_gated;
    ovlm_combine combine;
    ovlm_linear shared_up, shared_down;
    ovlm_gated shared_gated;
    ovlm_lora_saved qkv_lora, out_lora, up_lora, down_lora, shared_up_lora, shared_down_lora;
    int32_t *expert;               /* [T*k] device: what the router chose                      */
    bool kept;                     /* of experts on several ranks: rows came in one round, and
                                      what their backward reads stayed                         */
} ovlm_block_saved;

/* Hidden states that the caller wants to see: entry 0 is what a tower's first block reads, entry i
 * what block i-1 gives. */
typedef struct ovlm_taps {
    int64_t n;
    int32_t *entry;                /* [n] host                                                 */
    ovlm_tensor *state;            /* [n] host: where they are, in run->exact on run->keep     */
} ovlm_taps;

/* A tower's residual stream, [rows,cols] after each block: on run->keep where a backward reads it,
 * else in two places of the workspace that take turns. */
typedef struct ovlm_stream {
    int64_t rows, cols, turn;
    ovlm_tensor place[2];
} ovlm_stream;

/* Where the next of them goes; outside of a block, so that the places outlive it. */
ovlm_tensor ovlm_stream_next(ovlm_run *run, ovlm_stream *stream, bool keep);

/* Copies n entries, each in [0, depth], to the arena. */
OVLM_NODISCARD ovlm_status ovlm_taps_init(ovlm_taps *taps, const int32_t *entry, int64_t n,
                                          int64_t depth, ovlm_arena *arena, ovlm_err *err);

/* Keeps h where entry is asked for. */
OVLM_NODISCARD ovlm_status ovlm_taps_keep(ovlm_run *run, const ovlm_taps *taps, int64_t entry,
                                          ovlm_tensor h);

/* h_out = block(h_in); both [T,width].  With a checkpoint of NONE or SELECTIVE what the backward
 * needs stays on run->keep; FULL keeps the routers' choices alone. training = false keeps nothing
 * (all memory is rewound). */
OVLM_NODISCARD ovlm_status ovlm_block_fwd(ovlm_run *run, const ovlm_block *block,
                                          const ovlm_block_context *context, bool training,
                                          ovlm_tensor h_in, ovlm_tensor h_out,
                                          ovlm_block_saved *saved);

/* dh, on entry the gradient of h_out, becomes that of h_in where below is true (something is
 * trained before this block); weights' gradients are added to. */
OVLM_NODISCARD ovlm_status ovlm_block_bwd(ovlm_run *run, const ovlm_block *block,
                                          const ovlm_block_context *context, bool below,
                                          ovlm_tensor dh, ovlm_block_saved *saved);

/* The halves, for the two files of this module. */
OVLM_NODISCARD ovlm_status ovlm_mlp_fwd(ovlm_run *run, const ovlm_block *block,
                                        const ovlm_block_context *context, ovlm_stack *stack,
                                        ovlm_stack *redo, bool replay, ovlm_tensor h_mid,
                                        ovlm_tensor h_out, ovlm_block_saved *saved);
OVLM_NODISCARD ovlm_status ovlm_mlp_bwd(ovlm_run *run, const ovlm_block *block,
                                        const ovlm_block_context *context, ovlm_tensor dh,
                                        ovlm_block_saved *saved);

/* The ring around the core (sequence.h), one exchange per step.  `all` has the own row's tokens and
 * the own heads: q, k, v, and of causal attention o and lse, which the forward makes those of all
 * keys.  The backward, with these, adds to dqkv what the other rows' keys have in it. */
OVLM_NODISCARD ovlm_status ovlm_ring_fwd(ovlm_run *run, const ovlm_block_context *context,
                                         const ovlm_attention *all);
OVLM_NODISCARD ovlm_status ovlm_ring_bwd(ovlm_run *run, const ovlm_block_context *context,
                                         const ovlm_attention *all, ovlm_tensor d_o,
                                         ovlm_tensor dqkv);

/* A norm's output once more, for a backward whose forward left it out. */
OVLM_NODISCARD ovlm_status ovlm_norm_redo(ovlm_run *run, ovlm_norm *args, const ovlm_weight *w,
                                          const ovlm_weight *bias);

/* Backward of a norm whose arguments the forward filled, as ovlm_linear_back. */
OVLM_NODISCARD ovlm_status ovlm_norm_back(ovlm_run *run, ovlm_norm *args, ovlm_tensor dy,
                                          const ovlm_weight *w, const ovlm_weight *bias,
                                          ovlm_tensor dx, float dx_beta);

#endif
