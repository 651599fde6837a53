/* lora.h - low-rank adapters beside linear layers: y = W x + scale B A x (Hu et al. 2021, eq. 3).
 *
 * Modules that one product serves (q, k and v; gate and up) have adapters of their own; their A's
 * lie one after another and are one product. */
#ifndef OVLM_MODEL_LORA_H
#define OVLM_MODEL_LORA_H

#include "model/hooks.h"

/* What a forward leaves for its backward. */
typedef struct ovlm_lora_saved {
    ovlm_linear down, up[OVLM_FUSED_MOST];
} ovlm_lora_saved;

/* A linear layer without an activation, and its adapters. */
OVLM_NODISCARD ovlm_status ovlm_linear_fwd(ovlm_run *run, ovlm_linear *args, const ovlm_weight *w,
                                           ovlm_stack *stack, ovlm_lora_saved *saved);

/* Backward of a linear layer whose arguments the forward filled: adds to dw and dbias, and to the
 * adapters' gradients, where they are trained; writes dx where it is given. */
OVLM_NODISCARD ovlm_status ovlm_linear_back(ovlm_run *run, ovlm_linear *args, ovlm_tensor dy,
                                            const ovlm_weight *w, const ovlm_weight *bias,
                                            ovlm_tensor dx, float dx_beta,
                                            ovlm_lora_saved *saved);

/* y = act(x w^T + bias + adapters), on the stack; args has x, w and bias.  The activation is in the
 * product's epilogue where nothing comes in between, else an operation of its own.  The backward
 * writes dx where it is given. */
OVLM_NODISCARD ovlm_status ovlm_acted_fwd(ovlm_run *run, ovlm_linear *args, const ovlm_weight *w,
                                          ovlm_act act, ovlm_stack *stack, ovlm_gated *gated,
                                          ovlm_lora_saved *saved, ovlm_tensor *y);
OVLM_NODISCARD ovlm_status ovlm_acted_back(ovlm_run *run, ovlm_linear *args, ovlm_tensor dy,
                                           const ovlm_weight *w, const ovlm_weight *bias,
                                           ovlm_tensor dx, ovlm_gated *gated,
                                           ovlm_lora_saved *saved);

/* Lists adapters of the modules adapted[n] behind the other parameters, in the arena.  OVLM_E_ARG,
 * and nothing changes, when one cannot have any: only linear layers of blocks, of mergers and of
 * the audio projection can; experts in one tensor, convolutions, embeddings and adapters cannot. */
OVLM_NODISCARD ovlm_status ovlm_params_adapt(ovlm_params *params, const bool *adapted,
                                             int64_t rank, double scale, ovlm_arena *arena,
                                             ovlm_err *err);

/* Takes them away: the arena may go. */
void ovlm_params_unadapt(ovlm_params *params);

/* Units whose products can have adapters - the blocks, the mergers, the audio projection - and the
 * products of the i-th; how many: none where the model has no such unit. */
enum { OVLM_ADAPTABLE = 6 };
int64_t ovlm_params_adaptables(const ovlm_params *params);
int64_t ovlm_params_adaptable(ovlm_params *params, int64_t i,
                              ovlm_weight *product[OVLM_ADAPTABLE]);

#endif
