/* block.c - a block's attention half, and how the halves are kept or done again.
 *
 * Memory of a layer in training: `stack` holds what the backward reads; `redo` what it computes
 * again (the same as stack without checkpointing, run->work with it). */
#include "model/block.h"

#include <math.h>
#include <string.h>

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
 * are where positions were added before the blocks.  Of a shard they are not kept: the backward of
 * the core reads what the exchange brought. */
static ovlm_status rotate(ovlm_run *run, const ovlm_block *block,
                          const ovlm_block_context *context, ovlm_stack *stack,
                          ovlm_block_saved *s)
{
    int64_t q_cols = block->heads * block->head_dim, kv_cols = block->kv_heads * block->head_dim;
    ovlm_tensor qkv = s->qkv.y, turned = qkv;
    if (block->qk_norm) {
        turned = ovlm_stack_tensor(context->sequence != NULL ? run->work : stack, qkv.rows,
                                   q_cols + kv_cols, run->dtype);
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

/* ---------------------------------------------------------------- the core
 *
 * Attention itself, on the heads of q, k and v that lie in one tensor: all of the model's, or with
 * a sequence table this rank's, of its row's tokens. */

/* The calls it takes; all heads are one. */
static int64_t head_runs(const ovlm_block *block, const ovlm_block_context *context,
                         ovlm_head_run run[OVLM_HEAD_RUNS_MOST])
{
    if (context->sequence == NULL) {
        run[0] = (ovlm_head_run){.heads = block->heads, .kv_heads = block->kv_heads};
        return 1;
    }
    memcpy(run, context->sequence->run, sizeof context->sequence->run);
    return context->sequence->runs;
}

/* Columns of query heads, and of the key/value heads behind them. */
typedef struct core_cols {
    int64_t q, kv;
} core_cols;

static core_cols cols_of(const ovlm_block *block, const ovlm_block_context *context)
{
    const ovlm_sequence_part *own = NULL;
    if (context->sequence != NULL) {
        own = ovlm_sequence_own(context->sequence);
    }
    return (core_cols){(own != NULL ? own->heads : block->heads) * block->head_dim,
                       (own != NULL ? own->kv_heads : block->kv_heads) * block->head_dim};
}

static ovlm_status core_fwd(ovlm_run *run, const ovlm_block *block,
                            const ovlm_block_context *context, ovlm_stack *stack,
                            const ovlm_attention *all, ovlm_block_saved *s)
{
    ovlm_head_run part[OVLM_HEAD_RUNS_MOST];
    int64_t D = block->head_dim, n = head_runs(block, context, part);
    for (int64_t i = 0; i < n; i++) {
        ovlm_attention *call = &s->attention[i];
        int64_t q = part[i].head * D, q_cols = part[i].heads * D;
        int64_t kv = part[i].kv_head * D, kv_cols = part[i].kv_heads * D;
        *call = *all;
        call->heads = part[i].heads;
        call->kv_heads = part[i].kv_heads;
        call->q = ovlm_tensor_cols(all->q, q, q_cols);
        call->k = ovlm_tensor_cols(all->k, kv, kv_cols);
        call->v = ovlm_tensor_cols(all->v, kv, kv_cols);
        call->o = ovlm_tensor_cols(all->o, q, q_cols);
        if (ovlm_tensor_given(&all->lse)) {
            call->lse = ovlm_tensor_cols(all->lse, part[i].head, part[i].heads);
        }
        RUN_IN(run, attention, fwd, call, stack);
    }
    return OVLM_OK;
}

/* From slopes of o to those of q, k and v, one behind the other in dqkv. */
static ovlm_status core_bwd(ovlm_run *run, const ovlm_block *block,
                            const ovlm_block_context *context, ovlm_tensor d_o, ovlm_tensor dqkv,
                            ovlm_block_saved *s)
{
    ovlm_head_run part[OVLM_HEAD_RUNS_MOST];
    core_cols cols = cols_of(block, context);
    int64_t D = block->head_dim, n = head_runs(block, context, part);
    for (int64_t i = 0; i < n; i++) {
        ovlm_attention *call = &s->attention[i];
        int64_t q = part[i].head * D, q_cols = part[i].heads * D;
        int64_t k = cols.q + part[i].kv_head * D, kv_cols = part[i].kv_heads * D;
        call->dout = ovlm_tensor_cols(d_o, q, q_cols);
        call->dq = ovlm_tensor_cols(dqkv, q, q_cols);
        call->dk = ovlm_tensor_cols(dqkv, k, kv_cols);
        call->dv = ovlm_tensor_cols(dqkv, k + cols.kv, kv_cols);
        RUN(run, attention, bwd, call);
    }
    return OVLM_OK;
}

/* The three parts of dqkv, or of what it is the slope of, as they travel. */
static void lanes_of(const ovlm_block *block, ovlm_tensor qkv, ovlm_lane lane[3])
{
    int64_t q_cols = block->heads * block->head_dim, kv_cols = block->kv_heads * block->head_dim;
    lane[0] = (ovlm_lane){ovlm_tensor_cols(qkv, 0, q_cols), false};
    lane[1] = (ovlm_lane){ovlm_tensor_cols(qkv, q_cols, kv_cols), true};
    lane[2] = (ovlm_lane){ovlm_tensor_cols(qkv, q_cols + kv_cols, kv_cols), true};
}

/* The core on this rank's heads of its row's tokens, and around its ring; all->q, k, v and o are of
 * its own tokens and all heads. */
static ovlm_status shared_core_fwd(ovlm_run *run, const ovlm_block *block,
                                   const ovlm_block_context *context, ovlm_stack *stack,
                                   ovlm_attention *all, ovlm_block_saved *s)
{
    const ovlm_sequence_pass *sequence = context->sequence;
    core_cols cols = cols_of(block, context);
    const ovlm_lane in[] = {{all->q, false}, {all->k, true}, {all->v, true}};
    const ovlm_lane out = {all->o, false};
    ovlm_tensor qkv = ovlm_stack_tensor(stack, sequence->rows, cols.q + 2 * cols.kv, run->dtype);
    OVLM_TRY(ovlm_sequence_to_heads(run, sequence, in, 3, qkv));
    all->q = ovlm_tensor_cols(qkv, 0, cols.q);
    all->k = ovlm_tensor_cols(qkv, cols.q, cols.kv);
    all->v = ovlm_tensor_cols(qkv, cols.q + cols.kv, cols.kv);
    all->o = ovlm_stack_tensor(stack, sequence->rows, cols.q, run->dtype);
    bool ring = sequence->ring.steps > 0;
    if (ring) {
        all->lse = ovlm_stack_tensor(stack, sequence->rows, cols.q / block->head_dim, run->exact);
    }
    OVLM_TRY(core_fwd(run, block, context, stack, all, s));
    if (ring) {
        s->ring = *all;
        OVLM_TRY(ovlm_ring_fwd(run, context, all));
    }
    return ovlm_sequence_to_tokens(run, sequence, &out, 1, all->o);
}

static ovlm_status shared_core_bwd(ovlm_run *run, const ovlm_block *block,
                                   const ovlm_block_context *context, ovlm_tensor d_o,
                                   ovlm_tensor dqkv, ovlm_block_saved *s)
{
    const ovlm_sequence_pass *sequence = context->sequence;
    core_cols cols = cols_of(block, context);
    const ovlm_lane in = {d_o, false};
    ovlm_lane out[3];
    int64_t mark = run->work->used_bytes;
    lanes_of(block, dqkv, out);
    ovlm_tensor d_own = ovlm_stack_tensor(run->work, sequence->rows, cols.q, run->dtype);
    OVLM_TRY(ovlm_sequence_to_heads(run, sequence, &in, 1, d_own));
    ovlm_tensor dqkv_own = ovlm_stack_tensor(run->work, sequence->rows, cols.q + 2 * cols.kv,
                                             run->dtype);
    OVLM_TRY(core_bwd(run, block, context, d_own, dqkv_own, s));
    if (sequence->ring.steps > 0) {
        OVLM_TRY(ovlm_ring_bwd(run, context, &s->ring, d_own, dqkv_own));
    }
    OVLM_TRY(ovlm_sequence_to_tokens(run, sequence, out, 3, dqkv_own));
    run->work->used_bytes = mark;
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
    bool passing = context->sequence != NULL && !block->qk_norm; /* nobody reads it again */
    s->qkv = (ovlm_linear){.x = s->norm1.y, .w = block->qkv.w, .bias = block->qkv_bias.w,
                           .y = ovlm_stack_tensor(passing ? run->work : stack, T,
                                                  q_cols + 2 * kv_cols, run->dtype)};
    OVLM_TRY(ovlm_linear_fwd(run, &s->qkv, &block->qkv, stack, &s->qkv_lora));
    OVLM_TRY(rotate(run, block, context, stack, s));
    ovlm_attention all = {.causal = block->causal, .scale = 1 / sqrt((double)D),
                          .query = context->query, .key = context->key, .q = s->q.y, .k = s->k.y,
                          .v = ovlm_tensor_cols(s->qkv.y, q_cols + kv_cols, kv_cols),
                          .o = ovlm_stack_tensor(stack, T, q_cols, run->dtype)};
    ovlm_tensor o = all.o;
    if (context->cache != NULL) {
        OVLM_TRY(store_in_cache(run, context, all.k, all.v));
        all.k = context->cache->k;
        all.v = context->cache->v;
    }
    OVLM_TRY(context->sequence != NULL ? shared_core_fwd(run, block, context, stack, &all, s)
                                       : core_fwd(run, block, context, stack, &all, s));
    s->out = (ovlm_linear){.x = o, .w = block->out.w, .bias = block->out_bias.w, .add = s->h_in,
                           .y = h_mid};
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

static ovlm_status attention_bwd(ovlm_run *run, const ovlm_block *block,
                                 const ovlm_block_context *context, bool below, ovlm_tensor dh,
                                 ovlm_block_saved *s)
{
    int64_t T = dh.rows, D = block->head_dim;
    int64_t q_cols = block->heads * D, kv_cols = block->kv_heads * D;
    ovlm_tensor d_o = ovlm_stack_tensor(run->work, T, q_cols, run->dtype);
    OVLM_TRY(ovlm_linear_back(run, &s->out, dh, &block->out, &block->out_bias, d_o, 0,
                              &s->out_lora));
    ovlm_tensor dqkv = ovlm_stack_tensor(run->work, T, q_cols + 2 * kv_cols, run->dtype);
    OVLM_TRY(context->sequence != NULL ? shared_core_bwd(run, block, context, d_o, dqkv, s)
                                       : core_bwd(run, block, context, d_o, dqkv, s));
    if (!block->unturned) {
        OVLM_TRY(rope_back(run, &s->q, ovlm_tensor_cols(dqkv, 0, q_cols), &block->q_norm));
        OVLM_TRY(rope_back(run, &s->k, ovlm_tensor_cols(dqkv, q_cols, kv_cols), &block->k_norm));
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
    OVLM_TRY(attention_bwd(run, block, context, below, dh, saved));
    run->work->used_bytes = mark;
    return ovlm_unit_leave(run);
}
