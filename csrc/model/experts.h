/* experts.h - the routed experts of a block: route | experts | combine.
 *
 * Experts run on rows sorted by expert, T*k of them whatever the routing, so that memory is bounded
 * by the shape.  Beyond context->expert_rows they come in chunks of so many, one after the other in
 * the same workspace; what a chunk's backward reads is computed again there.  A token's rows are
 * summed in ascending order and in run->exact either way, so that results and the gradients of
 * activations are the same to the last bit; the weights' gradients are sums of the chunks'. */
#ifndef OVLM_MODEL_EXPERTS_H
#define OVLM_MODEL_EXPERTS_H

#include "model/block.h"

/* s->h_out = add + experts(s->norm2.y); add may be s->h_out. */
OVLM_NODISCARD ovlm_status ovlm_experts_fwd(ovlm_run *run, const ovlm_block *block,
                                            const ovlm_block_context *context, ovlm_stack *stack,
                                            ovlm_stack *redo, bool replay, ovlm_tensor add,
                                            ovlm_block_saved *s);

/* Gradient of the experts and of the router, in dn. */
OVLM_NODISCARD ovlm_status ovlm_experts_bwd(ovlm_run *run, const ovlm_block *block,
                                            const ovlm_block_context *context, ovlm_tensor dh,
                                            ovlm_tensor dn, ovlm_block_saved *s);

/* ------------------------------------------------------------ over ranks (experts_spread.c)
 *
 * The same behind and before the router, where context->experts says that experts are on several
 * ranks.  dn is set; dweight [T,k] are the slopes of the routing weights. */

OVLM_NODISCARD ovlm_status ovlm_spread_fwd(ovlm_run *run, const ovlm_block *block,
                                           const ovlm_block_context *context, ovlm_stack *stack,
                                           ovlm_stack *redo, ovlm_tensor add, ovlm_block_saved *s);
OVLM_NODISCARD ovlm_status ovlm_spread_bwd(ovlm_run *run, const ovlm_block *block,
                                           const ovlm_block_context *context, ovlm_tensor dh,
                                           ovlm_tensor dn, ovlm_tensor dweight,
                                           ovlm_block_saved *s);

/* Gradients of a product of experts: of w, and in dx of what it read. */
OVLM_NODISCARD ovlm_status ovlm_grouped_back(ovlm_run *run, ovlm_grouped_linear *args,
                                             ovlm_tensor dy, const ovlm_weight *w, ovlm_tensor dx);

/* ------------------------------------------------------------ gates of either MLP (mlp.c) */

OVLM_NODISCARD ovlm_status ovlm_gated_fwd(ovlm_run *run, const ovlm_block *block,
                                          ovlm_stack *redo, ovlm_stack *stack,
                                          ovlm_tensor gate_up, ovlm_gated *args);

/* The output, when it was left out, for the product that follows. */
OVLM_NODISCARD ovlm_status ovlm_gated_redo(ovlm_run *run, const ovlm_block_context *context,
                                           ovlm_gated *args, ovlm_tensor *reader);

/* Gradient of what a gate read. */
OVLM_NODISCARD ovlm_status ovlm_gated_bwd(ovlm_run *run, ovlm_gated *args, ovlm_tensor dy,
                                          ovlm_tensor *dgate_up);

#endif
