/* mlp.c - a block's second half: h_out = h_mid + mlp(norm2(h_mid)), dense, gated or with experts
 * (experts.c), which may have a dense one beside them. */
#include "model/experts.h"

ovlm_status ovlm_gated_fwd(ovlm_run *run, const ovlm_block *block, ovlm_stack *redo,
                           ovlm_stack *stack, ovlm_tensor gate_up, ovlm_gated *args)
{
    *args = (ovlm_gated){.act = block->act, .gate_up = gate_up,
                         .y = ovlm_stack_tensor(redo, gate_up.rows, gate_up.cols / 2,
                                                run->dtype)};
    RUN_IN(run, gated, fwd, args, stack);
    return OVLM_OK;
}

static ovlm_status dense_fwd(ovlm_run *run, const ovlm_block *block, ovlm_stack *stack,
                             ovlm_stack *redo, ovlm_tensor h_mid, ovlm_block_saved *s)
{
    int64_t T = h_mid.rows, F = block->hidden;
    s->up = (ovlm_linear){.x = s->norm2.y, .w = block->up.w, .bias = block->up_bias.w};
    ovlm_tensor hidden = {0};
    if (block->gated) {
        s->up.y = ovlm_stack_tensor(stack, T, 2 * F, run->dtype);
        OVLM_TRY(ovlm_linear_fwd(run, &s->up, &block->up, stack, &s->up_lora));
        OVLM_TRY(ovlm_gated_fwd(run, block, redo, stack, s->up.y, &s->gated));
        hidden = s->gated.y;
    } else {
        OVLM_TRY(ovlm_acted_fwd(run, &s->up, &block->up, block->act, stack, &s->gated,
                                &s->up_lora, &hidden));
    }
    s->down = (ovlm_linear){.x = hidden, .w = block->down.w, .bias = block->down_bias.w,
                            .add = h_mid, .y = s->h_out};
    return ovlm_linear_fwd(run, &s->down, &block->down, stack, &s->down_lora);
}

/* The shared expert adds to the residual stream before the routed ones do. */
static ovlm_status shared_fwd(ovlm_run *run, const ovlm_block *block, ovlm_stack *stack,
                              ovlm_stack *redo, ovlm_tensor h_mid, ovlm_block_saved *s)
{
    s->shared_up = (ovlm_linear){
        .x = s->norm2.y, .w = block->shared_up.w,
        .y = ovlm_stack_tensor(stack, h_mid.rows, 2 * block->moe->shared_hidden, run->dtype)};
    OVLM_TRY(ovlm_linear_fwd(run, &s->shared_up, &block->shared_up, stack, &s->shared_up_lora));
    OVLM_TRY(ovlm_gated_fwd(run, block, redo, stack, s->shared_up.y, &s->shared_gated));
    s->shared_down = (ovlm_linear){.x = s->shared_gated.y, .w = block->shared_down.w,
                                   .add = h_mid, .y = s->h_out};
    return ovlm_linear_fwd(run, &s->shared_down, &block->shared_down, stack,
                           &s->shared_down_lora);
}

ovlm_status ovlm_mlp_fwd(ovlm_run *run, const ovlm_block *block,
                         const ovlm_block_context *context, ovlm_stack *stack, ovlm_stack *redo,
                         bool replay, ovlm_tensor h_mid, ovlm_tensor h_out, ovlm_block_saved *s)
{
    s->h_out = h_out;
    s->norm2 = (ovlm_norm){.rms = block->rms, .eps = block->eps, .groups = 1, .x = h_mid,
                           .w = block->norm2.w, .bias = block->norm2_bias.w,
                           .y = ovlm_stack_tensor(redo, h_mid.rows, block->width, run->dtype)};
    RUN_IN(run, norm, fwd, &s->norm2, stack);
    if (block->moe == NULL) {
        return dense_fwd(run, block, stack, redo, h_mid, s);
    }
    if (block->moe->shared_hidden > 0) {
        OVLM_TRY(shared_fwd(run, block, stack, redo, h_mid, s));
        h_mid = h_out;
    }
    return ovlm_experts_fwd(run, block, context, stack, redo, replay, h_mid, s);
}

/* ---------------------------------------------------------------- backward */

ovlm_status ovlm_gated_redo(ovlm_run *run, const ovlm_block_context *context, ovlm_gated *args,
                            ovlm_tensor *reader)
{
    if (context->checkpoint == OVLM_CHECKPOINT_SELECTIVE) {
        args->y = ovlm_stack_tensor(run->work, args->y.rows, args->y.cols, run->dtype);
        RUN(run, gated, fwd, args);
        *reader = args->y;
    }
    return OVLM_OK;
}

ovlm_status ovlm_gated_bwd(ovlm_run *run, ovlm_gated *args, ovlm_tensor dy,
                           ovlm_tensor *dgate_up)
{
    *dgate_up = ovlm_stack_tensor(run->work, args->gate_up.rows, args->gate_up.cols, run->dtype);
    args->dy = dy;
    args->dgate_up = *dgate_up;
    RUN(run, gated, bwd, args);
    return OVLM_OK;
}

/* The parts of a SwiGLU layer of linear products, which a block has up to twice. */
typedef struct gated_parts {
    ovlm_linear *up, *down;
    ovlm_gated *gated;
    const ovlm_weight *up_w, *down_w;
    ovlm_lora_saved *up_lora, *down_lora;
} gated_parts;

/* dn is set, or added to with beta. */
static ovlm_status gated_mlp_bwd(ovlm_run *run, const ovlm_block_context *context,
                                 const gated_parts *p, ovlm_tensor dh, ovlm_tensor dn, float beta)
{
    ovlm_tensor da = ovlm_stack_tensor(run->work, p->gated->y.rows, p->gated->y.cols, run->dtype);
    ovlm_tensor dgate_up = {0};
    OVLM_TRY(ovlm_gated_redo(run, context, p->gated, &p->down->x));
    OVLM_TRY(ovlm_linear_back(run, p->down, dh, p->down_w, NULL, da, 0, p->down_lora));
    OVLM_TRY(ovlm_gated_bwd(run, p->gated, da, &dgate_up));
    return ovlm_linear_back(run, p->up, dgate_up, p->up_w, NULL, dn, beta, p->up_lora);
}

static ovlm_status plain_mlp_bwd(ovlm_run *run, const ovlm_block *block, ovlm_tensor dh,
                                 ovlm_tensor dn, ovlm_block_saved *s)
{
    ovlm_tensor da = ovlm_stack_tensor(run->work, dh.rows, block->hidden, run->dtype);
    OVLM_TRY(ovlm_linear_back(run, &s->down, dh, &block->down, &block->down_bias, da, 0,
                              &s->down_lora));
    return ovlm_acted_back(run, &s->up, da, &block->up, &block->up_bias, dn, &s->gated,
                           &s->up_lora);
}

ovlm_status ovlm_mlp_bwd(ovlm_run *run, const ovlm_block *block,
                         const ovlm_block_context *context, ovlm_tensor dh, ovlm_block_saved *s)
{
    ovlm_tensor dn = ovlm_stack_tensor(run->work, dh.rows, block->width, run->dtype);
    if (context->checkpoint == OVLM_CHECKPOINT_SELECTIVE) {
        OVLM_TRY(ovlm_norm_redo(run, &s->norm2, &block->norm2, &block->norm2_bias));
        s->up.x = s->gate.x = s->shared_up.x = s->norm2.y;
    }
    if (block->moe != NULL) {
        OVLM_TRY(ovlm_experts_bwd(run, block, context, dh, dn, s));
        if (block->moe->shared_hidden > 0) {
            const gated_parts shared = {&s->shared_up, &s->shared_down, &s->shared_gated,
                                        &block->shared_up, &block->shared_down,
                                        &s->shared_up_lora, &s->shared_down_lora};
            OVLM_TRY(gated_mlp_bwd(run, context, &shared, dh, dn, 1));
        }
    } else if (block->gated) {
        const gated_parts dense = {&s->up, &s->down, &s->gated, &block->up, &block->down,
                                   &s->up_lora, &s->down_lora};
        OVLM_TRY(gated_mlp_bwd(run, context, &dense, dh, dn, 0));
    } else {
        OVLM_TRY(plain_mlp_bwd(run, block, dh, dn, s));
    }
    return ovlm_norm_back(run, &s->norm2, dn, &block->norm2, &block->norm2_bias, dh, 1);
}
