/* block.c - a block's attention half, and how the halves are kept or done again.
 *
 * Memory of a layer in training: `stack` holds what the backward reads; `redo` what it computes
 * again (the same as stack without checkpointing, run->work with it). */
#include "model/block.h"

#include <math.h>

static ovlm_tensor no_tensor(void)
{
    return (ovlm_tensor){0};
}

/* New keys and values to the cache's rows, a segment at a time. */
static ovlm_status store_in_cache(ovlm_run *run, const ovlm_block_context *context, ovlm_tensor k,
                                  ovlm_tensor v)
{
    const ovlm_segments *query = &context->query;
    for (int64_t i = 0; i < query->n; i++) {
        int64_t first = query->host_start[i], rows = query->host_start[i + 1] - first;
        int64_t to = context->cache->first_row[i];
        ovlm_scale copy = {.alpha = 1, .x = ovlm_tensor_rows(k, first, rows),
                           .y = ovlm_tensor_rows(context->cache->k, to, rows)};
        RUN(run, scale, fwd, &copy);
        copy.x = ovlm_tensor_rows(v, first, rows);
        copy.y = ovlm_tensor_rows(context->cache->v, to, rows);
        RUN(run, scale, fwd, &copy);
    }
    return OVLM_OK;
}

/* Rotated queries and keys: in place without a norm, whose backward needs what it read; as they
 * are where positions were added before the blocks. */
static ovlm_status rotate(ovlm_run *run, const ovlm_block *block,
                          const ovlm_block_context *context, ovlm_stack *stack,
                          ovlm_block_saved *s)
{
    int64_t q_cols = block->heads * block->head_dim, kv_cols = block->kv_heads * block->head_dim;
    ovlm_tensor qkv = s->qkv.y, turned = qkv;
    if (block->qk_norm) {
        turned = ovlm_stack_tensor(stack, qkv.rows, q_cols + kv_cols, run->dtype);
    }
    s->q = (ovlm_rope){.heads = block->heads, .eps = block->eps,
                       .x = ovlm_tensor_cols(qkv, 0, q_cols), .w = block->q_norm.w,
                       .cos = context->cos, .sin = context->sin,
                       .y = ovlm_tensor_cols(turned, 0, q_cols)};
    s->k = (ovlm_rope){.heads = block->kv_heads, .eps = block->eps,
                       .x = ovlm_tensor_cols(qkv, q_cols, kv_cols), .w = block->k_norm.w,
                       .cos = context->cos, .sin = context->sin,
                       .y = ovlm_tensor_cols(turned, q_cols, kv_cols)};
    if (!block->unturned) {
        RUN_IN(run, rope, fwd, &s->q, stack);
        RUN_IN(run, rope, fwd, &s->k, stack);
    }
    return OVLM_OK;
}

/* h_mid = h_in + attention(norm1(h_in)). */
static ovlm_status attention_fwd(ovlm_run *run, const ovlm_block *block,
                                 const ovlm_block_context *context, ovlm_stack *stack,
                                 ovlm_stack *redo, ovlm_tensor h_mid, ovlm_block_saved *s)
{
    int64_t T = s->h_in.rows, D = block->head_dim;
    int64_t q_cols = block->heads * D, kv_cols = block->kv_heads * D;
    s->norm1 = (ovlm_norm){.rms = block->rms, .eps = block->eps, .groups = 1, .x = s->h_in,
                           .w = block->norm1.w, .bias = block->norm1_bias.w,
                           .y = ovlm_stack_tensor(redo, T, block->width, run->dtype)};
    RUN_IN(run, norm, fwd, &s->norm1, stack);
    s->qkv = (ovlm_linear){.x = s->norm1.y, .w = block->qkv.w, .bias = block->qkv_bias.w,
                           .y = ovlm_stack_tensor(stack, T, q_cols + 2 * kv_cols, run->dtype)};
    OVLM_TRY(ovlm_linear_fwd(run, &s->qkv, &block->qkv, stack, &s->qkv_lora));
    OVLM_TRY(rotate(run, block, context, stack, s));
    s->attention = (ovlm_attention){
        .heads = block->heads, .kv_heads = block->kv_heads, .causal = block->causal,
        .scale = 1 / sqrt((double)D), .query = context->query, .key = context->key,
        .q = s->q.y, .k = s->k.y,
        .v = ovlm_tensor_cols(s->qkv.y, q_cols + kv_cols, kv_cols),
        .o = ovlm_stack_tensor(stack, T, q_cols, run->dtype)};
    if (context->cache != NULL) {
        OVLM_TRY(store_in_cache(run, context, s->attention.k, s->attention.v));
        s->attention.k = context->cache->k;
        s->attention.v = context->cache->v;
    }
    RUN_IN(run, attention, fwd, &s->attention, stack);
    s->out = (ovlm_linear){.x = s->attention.o, .w = block->out.w, .bias = block->out_bias.w,
                           .add = s->h_in, .y = h_mid};
    return ovlm_linear_fwd(run, &s->out, &block->out, stack, &s->out_lora);
}

/* The whole block with given places for what is kept. */
static ovlm_status compute(ovlm_run *run, const ovlm_block *block,
                           const ovlm_block_context *context, ovlm_stack *stack, ovlm_stack *redo,
                           bool replay, ovlm_block_saved *saved)
{
    ovlm_tensor h_mid = ovlm_stack_tensor(stack, saved->h_in.rows, block->width, run->dtype);
    OVLM_TRY(attention_fwd(run, block, context, stack, redo, h_mid, saved));
    return ovlm_mlp_fwd(run, block, context, stack, redo, replay, h_mid, saved->h_out, saved);
}

ovlm_tensor ovlm_stream_next(ovlm_run *run, ovlm_stream *stream, bool keep)
{
    if (keep) {
        return ovlm_stack_tensor(run->keep, stream->rows, stream->cols, run->dtype);
    }
    ovlm_tensor *place = &stream->place[stream->turn++ % 2];
    if (!ovlm_tensor_given(place)) {
        *place = ovlm_stack_tensor(run->work, stream->rows, stream->cols, run->dtype);
    }
    return *place;
}

ovlm_status ovlm_taps_init(ovlm_taps *taps, const int32_t *entry, int64_t n, int64_t depth,
                           ovlm_arena *arena, ovlm_err *err)
{
    *taps = (ovlm_taps){.n = n};
    OVLM_TRY(OVLM_ARENA_NEW(arena, &taps->entry, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &taps->state, n, err));
    for (int64_t i = 0; i < n; i++) {
        if (entry[i] < 0 || entry[i] > depth) {
            return OVLM_FAIL(err, OVLM_E_ARG, "taps[%lld] must be in [0, %lld]; got %d",
                             (long long)i, (long long)depth, (int)entry[i]);
        }
        taps->entry[i] = entry[i];
    }
    return OVLM_OK;
}

ovlm_status ovlm_taps_keep(ovlm_run *run, const ovlm_taps *taps, int64_t entry, ovlm_tensor h)
{
    for (int64_t i = 0; i < taps->n; i++) {
        if (taps->entry[i] == entry) {
            taps->state[i] = ovlm_stack_tensor(run->keep, h.rows, h.cols, run->exact);
            ovlm_scale copy = {.alpha = 1, .x = h, .y = taps->state[i]};
            RUN(run, scale, fwd, &copy);
        }
    }
    return OVLM_OK;
}

ovlm_status ovlm_block_fwd(ovlm_run *run, const ovlm_block *block,
                           const ovlm_block_context *context, bool training, ovlm_tensor h_in,
                           ovlm_tensor h_out, ovlm_block_saved *saved)
{
    OVLM_TRY(ovlm_run_poll(run));
    OVLM_TRY(ovlm_unit_enter(run, block->norm1.unit, OVLM_USE_FORWARD));
    *saved = (ovlm_block_saved){.h_in = h_in, .h_out = h_out};
    bool full = !training || context->checkpoint == OVLM_CHECKPOINT_FULL;
    ovlm_stack *stack = full ? run->work : run->keep;
    ovlm_stack *redo = full || context->checkpoint == OVLM_CHECKPOINT_SELECTIVE ? run->work : stack;
    if (block->moe != NULL) {
        saved->expert = ovlm_stack_take(training ? run->keep : run->work,
                                        h_in.rows * block->moe->k * (int64_t)sizeof(int32_t));
    }
    int64_t mark = run->work->used_bytes;
    OVLM_TRY(compute(run, block, context, stack, redo, false, saved));
    run->work->used_bytes = mark;
    return ovlm_unit_leave(run);
}

/* ---------------------------------------------------------------- backward */

ovlm_status ovlm_norm_back(ovlm_run *run, ovlm_norm *args, ovlm_tensor dy, const ovlm_weight *w,
                           const ovlm_weight *bias, ovlm_tensor dx, float dx_beta)
{
    args->dy = dy;
    args->dx = dx;
    args->dx_beta = dx_beta;
    args->w = w->w;
    args->dw = w->dw;
    args->dbias = bias->dw;
    args->dw_beta = 1;
    if (ovlm_tensor_given(&dx) || ovlm_tensor_given(&args->dw) ||
        ovlm_tensor_given(&args->dbias)) {
        RUN(run, norm, bwd, args);
    }
    return OVLM_OK;
}

static ovlm_status rope_back(ovlm_run *run, ovlm_rope *args, ovlm_tensor d,
                             const ovlm_weight *norm)
{
    args->dy = args->dx = d;
    args->w = norm->w;
    args->dw = norm->dw;
    args->dw_beta = 1;
    RUN(run, rope, bwd, args);
    return OVLM_OK;
}

static ovlm_status attention_bwd(ovlm_run *run, const ovlm_block *block, bool below,
                                 ovlm_tensor dh, ovlm_block_saved *s)
{
    int64_t T = dh.rows, D = block->head_dim;
    int64_t q_cols = block->heads * D, kv_cols = block->kv_heads * D;
    ovlm_tensor d_o = ovlm_stack_tensor(run->work, T, q_cols, run->dtype);
    OVLM_TRY(ovlm_linear_back(run, &s->out, dh, &block->out, &block->out_bias, d_o, 0,
                              &s->out_lora));
    ovlm_tensor dqkv = ovlm_stack_tensor(run->work, T, q_cols + 2 * kv_cols, run->dtype);
    s->attention.dout = d_o;
    s->attention.dq = ovlm_tensor_cols(dqkv, 0, q_cols);
    s->attention.dk = ovlm_tensor_cols(dqkv, q_cols, kv_cols);
    s->attention.dv = ovlm_tensor_cols(dqkv, q_cols + kv_cols, kv_cols);
    RUN(run, attention, bwd, &s->attention);
    if (!block->unturned) {
        OVLM_TRY(rope_back(run, &s->q, s->attention.dq, &block->q_norm));
        OVLM_TRY(rope_back(run, &s->k, s->attention.dk, &block->k_norm));
    }
    bool norm_trained = ovlm_tensor_given(&block->norm1.dw) ||
                        ovlm_tensor_given(&block->norm1_bias.dw);
    ovlm_tensor dn = no_tensor();
    if (below || norm_trained) {
        dn = ovlm_stack_tensor(run->work, T, block->width, run->dtype);
    }
    OVLM_TRY(ovlm_linear_back(run, &s->qkv, dqkv, &block->qkv, &block->qkv_bias, dn, 0,
                              &s->qkv_lora));
    if (below || norm_trained) {
        OVLM_TRY(ovlm_norm_back(run, &s->norm1, dn, &block->norm1, &block->norm1_bias,
                                below ? dh : no_tensor(), 1));
    }
    return OVLM_OK;
}

ovlm_status ovlm_norm_redo(ovlm_run *run, ovlm_norm *args, const ovlm_weight *w,
                           const ovlm_weight *bias)
{
    args->w = w->w;
    args->bias = bias->w;
    args->y = ovlm_stack_tensor(run->work, args->x.rows, args->x.cols, run->dtype);
    RUN(run, norm, fwd, args);
    return OVLM_OK;
}

ovlm_status ovlm_block_bwd(ovlm_run *run, const ovlm_block *block,
                           const ovlm_block_context *context, bool below, ovlm_tensor dh,
                           ovlm_block_saved *saved)
{
    OVLM_TRY(ovlm_run_poll(run));
    if (!below && !ovlm_block_trained(context->params, block)) {
        return OVLM_OK;
    }
    OVLM_TRY(ovlm_unit_enter(run, block->norm1.unit, OVLM_USE_BACKWARD));
    int64_t mark = run->work->used_bytes;
    if (context->checkpoint == OVLM_CHECKPOINT_FULL) {
        /* The output is computed again as well: the last product's input is what is needed, and
         * its own cost is small beside keeping a second code path. */
        saved->h_out = ovlm_stack_tensor(run->work, dh.rows, dh.cols, run->dtype);
        OVLM_TRY(compute(run, block, context, run->work, run->work, true, saved));
    }
    int64_t half = run->work->used_bytes;
    OVLM_TRY(ovlm_mlp_bwd(run, block, context, dh, saved));
    run->work->used_bytes = half;
    if (context->checkpoint == OVLM_CHECKPOINT_SELECTIVE) {
        OVLM_TRY(ovlm_norm_redo(run, &saved->norm1, &block->norm1, &block->norm1_bias));
        saved->qkv.x = saved->norm1.y;
    }
    OVLM_TRY(attention_bwd(run, block, below, dh, saved));
    run->work->used_bytes = mark;
    return ovlm_unit_leave(run);
}
