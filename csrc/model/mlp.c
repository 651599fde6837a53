/* mlp.c - a block's second half: h_out = h_mid + mlp(norm2(h_mid)), dense, gated or with experts.
 *
 * Experts run on rows sorted by expert (T*k of them, whatever the routing, so that memory is
 * bounded by the shape): up, gate, down, and a weighted sum back into tokens. */
#include "model/block.h"

/* gate_up -> act(gate) * up, or nothing to do where the product's epilogue did it. */
static ovlm_status gated_fwd(ovlm_run *run, const ovlm_block *block, ovlm_stack *redo,
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
        OVLM_TRY(gated_fwd(run, block, redo, stack, s->up.y, &s->gated));
        hidden = s->gated.y;
    } else {
        s->up.act = block->act;
        s->up.pre = ovlm_stack_tensor(stack, T, F, run->dtype);
        s->up.y = ovlm_stack_tensor(stack, T, F, run->dtype);
        RUN_IN(run, linear, fwd, &s->up, stack);
        hidden = s->up.y;
    }
    s->down = (ovlm_linear){.x = hidden, .w = block->down.w, .bias = block->down_bias.w,
                            .add = h_mid, .y = s->h_out};
    return ovlm_linear_fwd(run, &s->down, &block->down, stack, &s->down_lora);
}

static ovlm_status route_fwd(ovlm_run *run, const ovlm_block *block,
                             const ovlm_block_context *context, ovlm_stack *stack, bool replay,
                             ovlm_block_saved *s)
{
    const ovlm_decoder_config *moe = block->moe;
    int64_t T = s->norm2.y.rows, slots = T * moe->k, int_bytes = (int64_t)sizeof(int32_t);
    s->gate = (ovlm_linear){.x = s->norm2.y, .w = block->router.w,
                            .y = ovlm_stack_tensor(stack, T, moe->experts, run->exact)};
    RUN_IN(run, linear, fwd, &s->gate, stack);
    s->router = (ovlm_router){
        .k = moe->k, .teams = moe->teams, .limit = moe->limit, .sigmoid = moe->sigmoid_router,
        .normalise = moe->normalise_router, .replay = replay, .scale = moe->router_scale,
        .logits = s->gate.y, .bias = block->router_bias.w, .expert = s->expert,
        .weight = ovlm_stack_tensor(stack, T, moe->k, run->exact),
        .row = ovlm_stack_take(stack, slots * int_bytes),
        .token = ovlm_stack_take(stack, slots * int_bytes),
        .offsets = ovlm_stack_take(stack, (moe->experts + 1) * int_bytes),
        .count = replay ? NULL : context->count, /* counted once, in the forward */
        .score_sum = replay ? NULL : context->score_sum};
    RUN_IN(run, router, fwd, &s->router, stack);
    return OVLM_OK;
}

/* The shared expert adds to the residual stream before the routed ones do. */
static ovlm_status shared_fwd(ovlm_run *run, const ovlm_block *block, ovlm_stack *stack,
                              ovlm_stack *redo, ovlm_tensor h_mid, ovlm_block_saved *s)
{
    s->shared_up = (ovlm_linear){
        .x = s->norm2.y, .w = block->shared_up.w,
        .y = ovlm_stack_tensor(stack, h_mid.rows, 2 * block->moe->shared_hidden, run->dtype)};
    OVLM_TRY(ovlm_linear_fwd(run, &s->shared_up, &block->shared_up, stack, &s->shared_up_lora));
    OVLM_TRY(gated_fwd(run, block, redo, stack, s->shared_up.y, &s->shared_gated));
    s->shared_down = (ovlm_linear){.x = s->shared_gated.y, .w = block->shared_down.w,
                                   .add = h_mid, .y = s->h_out};
    return ovlm_linear_fwd(run, &s->shared_down, &block->shared_down, stack,
                           &s->shared_down_lora);
}

static ovlm_status experts_fwd(ovlm_run *run, const ovlm_block *block,
                               const ovlm_block_context *context, ovlm_stack *stack,
                               ovlm_stack *redo, bool replay, ovlm_tensor h_mid,
                               ovlm_block_saved *s)
{
    const ovlm_decoder_config *moe = block->moe;
    int64_t rows = h_mid.rows * moe->k, F = moe->expert_hidden;
    OVLM_TRY(route_fwd(run, block, context, stack, replay, s));
    ovlm_tensor add = h_mid;
    if (moe->shared_hidden > 0) {
        OVLM_TRY(shared_fwd(run, block, stack, redo, h_mid, s));
        add = s->h_out;
    }
    /* Recomputed experts stay for their backward. */
    OVLM_TRY(ovlm_unit_enter(run, block->experts_up.unit,
                             replay ? OVLM_USE_BACKWARD : OVLM_USE_FORWARD));
    s->experts_up = (ovlm_grouped_linear){
        .groups = moe->experts, .offsets = s->router.offsets, .index = s->router.token,
        .x = s->norm2.y, .w = block->experts_up.w, .w_kn = moe->expert_kn,
        .y = ovlm_stack_tensor(stack, rows, 2 * F, run->dtype)};
    RUN_IN(run, grouped_linear, fwd, &s->experts_up, stack);
    OVLM_TRY(gated_fwd(run, block, redo, stack, s->experts_up.y, &s->experts_gated));
    s->experts_down = (ovlm_grouped_linear){
        .groups = moe->experts, .offsets = s->router.offsets, .x = s->experts_gated.y,
        .w = block->experts_down.w, .w_kn = moe->expert_kn,
        .y = ovlm_stack_tensor(stack, rows, block->width, run->dtype)};
    RUN_IN(run, grouped_linear, fwd, &s->experts_down, stack);
    if (!replay) {
        OVLM_TRY(ovlm_unit_leave(run));
    }
    s->combine = (ovlm_combine){.k = moe->k, .row = s->router.row, .weight = s->router.weight,
                                .h = s->experts_down.y, .add = add, .y = s->h_out};
    RUN_IN(run, combine, fwd, &s->combine, stack);
    return OVLM_OK;
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
    if (block->moe != NULL) {
        return experts_fwd(run, block, context, stack, redo, replay, h_mid, s);
    }
    return dense_fwd(run, block, stack, redo, h_mid, s);
}

/* ---------------------------------------------------------------- backward */

/* A gate's output, when it was left out, for the product that follows. */
static ovlm_status redo_gated(ovlm_run *run, const ovlm_block_context *context, ovlm_gated *args,
                              ovlm_tensor *reader)
{
    if (context->checkpoint == OVLM_CHECKPOINT_SELECTIVE) {
        args->y = ovlm_stack_tensor(run->work, args->y.rows, args->y.cols, run->dtype);
        RUN(run, gated, fwd, args);
        *reader = args->y;
    }
    return OVLM_OK;
}

/* Gradient of what a gate read. */
static ovlm_status gated_bwd(ovlm_run *run, ovlm_gated *args, ovlm_tensor dy,
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
    OVLM_TRY(redo_gated(run, context, p->gated, &p->down->x));
    OVLM_TRY(ovlm_linear_back(run, p->down, dh, p->down_w, NULL, da, 0, p->down_lora));
    OVLM_TRY(gated_bwd(run, p->gated, da, &dgate_up));
    return ovlm_linear_back(run, p->up, dgate_up, p->up_w, NULL, dn, beta, p->up_lora);
}

static ovlm_status plain_mlp_bwd(ovlm_run *run, const ovlm_block *block, ovlm_tensor dh,
                                 ovlm_tensor dn, ovlm_block_saved *s)
{
    ovlm_tensor da = ovlm_stack_tensor(run->work, dh.rows, block->hidden, run->dtype);
    OVLM_TRY(ovlm_linear_back(run, &s->down, dh, &block->down, &block->down_bias, da, 0,
                              &s->down_lora));
    return ovlm_linear_back(run, &s->up, da, &block->up, &block->up_bias, dn, 0, NULL);
}

static ovlm_status grouped_back(ovlm_run *run, ovlm_grouped_linear *args, ovlm_tensor dy,
                                const ovlm_weight *w, ovlm_tensor dx)
{
    args->dy = dy;
    args->dx = dx;
    args->w = w->w;
    args->dw = w->dw;
    args->dw_beta = 1;
    RUN(run, grouped_linear, bwd, args);
    return OVLM_OK;
}

/* Gradient of the routed experts and of the router, in dn. */
static ovlm_status experts_bwd(ovlm_run *run, const ovlm_block *block,
                               const ovlm_block_context *context, ovlm_tensor dh, ovlm_tensor dn,
                               ovlm_block_saved *s)
{
    const ovlm_decoder_config *moe = block->moe;
    int64_t T = dh.rows, rows = T * moe->k;
    ovlm_tensor d_expert = ovlm_stack_tensor(run->work, rows, block->width, run->dtype);
    s->combine.dy = dh;
    s->combine.dh = d_expert;
    s->combine.dweight = ovlm_stack_tensor(run->work, T, moe->k, run->exact);
    RUN(run, combine, bwd, &s->combine);

    if (context->checkpoint != OVLM_CHECKPOINT_FULL) {
        OVLM_TRY(ovlm_unit_enter(run, block->experts_up.unit, OVLM_USE_BACKWARD));
    }
    OVLM_TRY(redo_gated(run, context, &s->experts_gated, &s->experts_down.x));
    ovlm_tensor da = ovlm_stack_tensor(run->work, rows, moe->expert_hidden, run->dtype);
    ovlm_tensor dgate_up = {0};
    OVLM_TRY(grouped_back(run, &s->experts_down, d_expert, &block->experts_down, da));
    OVLM_TRY(gated_bwd(run, &s->experts_gated, da, &dgate_up));
    /* A row per slot, summed into tokens; the memory of d_expert is free again. */
    OVLM_TRY(grouped_back(run, &s->experts_up, dgate_up, &block->experts_up, d_expert));
    OVLM_TRY(ovlm_unit_leave(run));
    ovlm_gather sum = {.taps = moe->k, .index = s->router.row, .x = d_expert, .y = dn};
    RUN(run, gather, fwd, &sum);

    s->router.dweight = s->combine.dweight;
    s->router.aux = context->aux;
    s->router.dlogits = ovlm_stack_tensor(run->work, T, moe->experts, run->exact);
    RUN(run, router, bwd, &s->router);
    return ovlm_linear_back(run, &s->gate, s->router.dlogits, &block->router, NULL, dn, 1, NULL);
}

ovlm_status ovlm_mlp_bwd(ovlm_run *run, const ovlm_block *block,
                         const ovlm_block_context *context, ovlm_tensor dh, ovlm_block_saved *s)
{
    ovlm_tensor dn = ovlm_stack_tensor(run->work, dh.rows, block->width, run->dtype);
    if (context->checkpoint == OVLM_CHECKPOINT_SELECTIVE) {
        OVLM_TRY(ovlm_norm_redo(run, &s->norm2, &block->norm2, &block->norm2_bias));
        s->up.x = s->gate.x = s->experts_up.x = s->shared_up.x = s->norm2.y;
    }
    if (block->moe != NULL) {
        OVLM_TRY(experts_bwd(run, block, context, dh, dn, s));
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
