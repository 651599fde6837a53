/* experts.c - routed experts: up, gate, down on sorted rows, and a weighted sum back into tokens;
 * all rows at once or chunk by chunk (experts.h). */
#include "model/experts.h"

/* `rows` of the sorted rows, from `first` on. */
typedef struct expert_chunk {
    int64_t first, rows;
    bool whole;         /* there is no other */
    bool head, tail;    /* of those there are */
} expert_chunk;

static int64_t chunk_bound(const ovlm_block_context *context, int64_t rows)
{
    int64_t most = context->expert_rows;
    return most > 0 && most < rows ? most : rows;
}

/* The chunk that begins there; no rows are one too. */
static expert_chunk chunk_at(int64_t rows, int64_t most, int64_t first)
{
    int64_t left = rows - first;
    return (expert_chunk){.first = first, .rows = left < most ? left : most, .whole = most == rows,
                          .head = first == 0, .tail = left <= most};
}

static ovlm_status route(ovlm_run *run, const ovlm_block *block,
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

/* A chunk through up, gate and down. */
static ovlm_status chunk_experts(ovlm_run *run, const ovlm_block *block, ovlm_stack *stack,
                                 ovlm_stack *redo, const expert_chunk *chunk, ovlm_block_saved *s)
{
    const ovlm_decoder_config *moe = block->moe;
    const int32_t *token = s->router.token;
    s->experts_up = (ovlm_grouped_linear){
        .groups = moe->experts, .first = chunk->first, .offsets = s->router.offsets,
        .index = token == NULL ? NULL : token + chunk->first, .x = s->norm2.y,
        .w = block->experts_up.w, .w_kn = moe->expert_kn,
        .y = ovlm_stack_tensor(stack, chunk->rows, 2 * moe->expert_hidden, run->dtype)};
    RUN_IN(run, grouped_linear, fwd, &s->experts_up, stack);
    OVLM_TRY(ovlm_gated_fwd(run, block, redo, stack, s->experts_up.y, &s->experts_gated));
    s->experts_down = (ovlm_grouped_linear){
        .groups = moe->experts, .first = chunk->first, .offsets = s->router.offsets,
        .x = s->experts_gated.y, .w = block->experts_down.w, .w_kn = moe->expert_kn,
        .y = ovlm_stack_tensor(stack, chunk->rows, block->width, run->dtype)};
    RUN_IN(run, grouped_linear, fwd, &s->experts_down, stack);
    return OVLM_OK;
}

/* Where the chunks' sums for `to` grow, unrounded: there, if it is as wide. */
static ovlm_tensor sums_of(ovlm_run *run, ovlm_tensor to, bool whole)
{
    return whole || run->dtype == run->exact
               ? to
               : ovlm_stack_tensor(run->work, to.rows, to.cols, run->exact);
}

/* args->h's rows of a chunk into tokens: `to` is add and the sum over all chunks, in the end. */
static ovlm_status sum_chunk(ovlm_run *run, const expert_chunk *chunk, ovlm_stack *stack,
                             ovlm_tensor add, ovlm_tensor sums, ovlm_tensor to,
                             ovlm_combine *args)
{
    args->first = chunk->first;
    args->add = chunk->head ? add : sums;
    args->y = chunk->tail ? to : sums;
    RUN_IN(run, combine, fwd, args, stack);
    return OVLM_OK;
}

ovlm_status ovlm_experts_fwd(ovlm_run *run, const ovlm_block *block,
                             const ovlm_block_context *context, ovlm_stack *stack,
                             ovlm_stack *redo, bool replay, ovlm_tensor add, ovlm_block_saved *s)
{
    int64_t rows = add.rows * block->moe->k, most = chunk_bound(context, rows);
    bool whole = most == rows;
    OVLM_TRY(route(run, block, context, stack, replay, s));
    if (context->experts != NULL && !replay) {
        return ovlm_spread_fwd(run, block, context, stack, redo, add, s);
    }
    if (replay && (!whole || context->experts != NULL)) {
        return OVLM_OK; /* the backward goes chunk by chunk again, and nothing reads h_out */
    }
    /* Recomputed experts stay for their backward. */
    OVLM_TRY(ovlm_unit_enter(run, block->experts_up.unit,
                             replay ? OVLM_USE_BACKWARD : OVLM_USE_FORWARD));
    ovlm_tensor sums = sums_of(run, s->h_out, whole);
    int64_t first = 0;
    do {
        expert_chunk chunk = chunk_at(rows, most, first);
        int64_t mark = run->work->used_bytes;
        OVLM_TRY(chunk_experts(run, block, whole ? stack : run->work, whole ? redo : run->work,
                               &chunk, s));
        s->combine = (ovlm_combine){.k = block->moe->k, .row = s->router.row,
                                    .weight = s->router.weight, .h = s->experts_down.y};
        OVLM_TRY(sum_chunk(run, &chunk, whole ? stack : run->work, add, sums, s->h_out,
                           &s->combine));
        run->work->used_bytes = whole ? run->work->used_bytes : mark;
        first += chunk.rows;
    } while (first < rows);
    return replay ? OVLM_OK : ovlm_unit_leave(run);
}

/* ---------------------------------------------------------------- backward */

ovlm_status ovlm_grouped_back(ovlm_run *run, ovlm_grouped_linear *args, ovlm_tensor dy,
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

/* Gradients of a chunk's weights; those of its rows, added to the tokens'. */
static ovlm_status chunk_back(ovlm_run *run, const ovlm_block *block,
                              const ovlm_block_context *context, const expert_chunk *chunk,
                              ovlm_tensor dh, ovlm_tensor sums, ovlm_tensor dn,
                              ovlm_block_saved *s)
{
    if (!chunk->whole) {
        OVLM_TRY(chunk_experts(run, block, run->work, run->work, chunk, s));
    }
    ovlm_tensor d_expert = ovlm_stack_tensor(run->work, chunk->rows, block->width, run->dtype);
    s->combine.first = chunk->first;
    s->combine.h = s->experts_down.y;
    s->combine.dy = dh;
    s->combine.dh = d_expert;
    RUN(run, combine, bwd, &s->combine);

    s->experts_up.x = s->norm2.y; /* which may have been computed again */
    if (chunk->whole) {
        OVLM_TRY(ovlm_gated_redo(run, context, &s->experts_gated, &s->experts_down.x));
    }
    ovlm_tensor da = ovlm_stack_tensor(run->work, chunk->rows, block->moe->expert_hidden,
                                       run->dtype);
    ovlm_tensor dgate_up = {0};
    OVLM_TRY(ovlm_grouped_back(run, &s->experts_down, d_expert, &block->experts_down, da));
    OVLM_TRY(ovlm_gated_bwd(run, &s->experts_gated, da, &dgate_up));
    /* A row per slot, summed into tokens; the memory of d_expert is free again. */
    OVLM_TRY(ovlm_grouped_back(run, &s->experts_up, dgate_up, &block->experts_up, d_expert));
    ovlm_combine sum = {.k = block->moe->k, .row = s->router.row, .h = d_expert};
    return sum_chunk(run, chunk, run->work, (ovlm_tensor){0}, sums, dn, &sum);
}

/* All chunks: gradients of the experts; in dn those of what they read, in dweight those of the
 * routing weights. */
static ovlm_status chunks_back(ovlm_run *run, const ovlm_block *block,
                               const ovlm_block_context *context, ovlm_tensor dh, ovlm_tensor dn,
                               ovlm_tensor dweight, ovlm_block_saved *s)
{
    int64_t rows = dh.rows * block->moe->k, most = chunk_bound(context, rows), first = 0;
    s->combine.k = block->moe->k;
    s->combine.row = s->router.row;
    s->combine.weight = s->router.weight;
    s->combine.dweight = dweight;
    ovlm_tensor sums = sums_of(run, dn, most == rows);
    if (context->checkpoint != OVLM_CHECKPOINT_FULL || most < rows) {
        OVLM_TRY(ovlm_unit_enter(run, block->experts_up.unit, OVLM_USE_BACKWARD));
    }
    do {
        expert_chunk chunk = chunk_at(rows, most, first);
        int64_t mark = run->work->used_bytes;
        OVLM_TRY(chunk_back(run, block, context, &chunk, dh, sums, dn, s));
        run->work->used_bytes = mark;
        first += chunk.rows;
    } while (first < rows);
    return ovlm_unit_leave(run);
}

ovlm_status ovlm_experts_bwd(ovlm_run *run, const ovlm_block *block,
                             const ovlm_block_context *context, ovlm_tensor dh, ovlm_tensor dn,
                             ovlm_block_saved *s)
{
    const ovlm_decoder_config *moe = block->moe;
    s->router.dweight = ovlm_stack_tensor(run->work, dh.rows, moe->k, run->exact);
    OVLM_TRY((context->experts != NULL ? ovlm_spread_bwd : chunks_back)(
        run, block, context, dh, dn, s->router.dweight, s));
    s->router.aux = context->aux;
    s->router.dlogits = ovlm_stack_tensor(run->work, dh.rows, moe->experts, run->exact);
    RUN(run, router, bwd, &s->router);
    return ovlm_linear_back(run, &s->gate, s->router.dlogits, &block->router, NULL, dn, 1, NULL);
}
