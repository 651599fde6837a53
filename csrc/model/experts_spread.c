/* experts_spread.c - routed experts that lie on several ranks (expert_exchange.h).
 *
 * What comes in a layer's only round stays for the backward, where anything does; of several, each
 * is computed again there, as chunks are on one rank. */
#include "model/experts.h"

static int64_t layer_of(const ovlm_block *block, const ovlm_block_context *context)
{
    return block - context->params->decoder;
}

static ovlm_status copy_rows(ovlm_run *run, ovlm_tensor from, ovlm_tensor to)
{
    int64_t bytes = from.rows * from.cols * ovlm_dtype_bytes(from.dtype);
    if (run->measuring || bytes == 0) {
        return OVLM_OK;
    }
    return run->ops->copy(run->queue, to.data, from.data, bytes, OVLM_ON_DEVICE, run->err);
}

/* ---------------------------------------------------------------- own rows */

/* A range of own sorted rows that a round sends, from packed row `at` on. */
static int64_t range_at(const ovlm_run *run, const ovlm_expert_round *round, int64_t at,
                        int64_t *rows)
{
    *rows = round->sent;
    return run->measuring ? 0 : ovlm_expert_range(round, at, rows);
}

/* The tokens' rows of x, for the ranks of their experts. */
static ovlm_status send_tokens(ovlm_run *run, const ovlm_expert_round *round, ovlm_tensor x,
                               const ovlm_block_saved *s, ovlm_tensor packed, ovlm_tensor received)
{
    int64_t rows = 0;
    for (int64_t at = 0; at < round->sent; at += rows) {
        int64_t first = range_at(run, round, at, &rows);
        ovlm_gather take = {.taps = 1, .x = x, .y = ovlm_tensor_rows(packed, at, rows)};
        take.index = s->router.token == NULL ? NULL : s->router.token + first;
        RUN(run, gather, fwd, &take);
    }
    return ovlm_expert_send(run, round, packed, received);
}

/* Own sorted rows as they are. */
static ovlm_status send_rows(ovlm_run *run, const ovlm_expert_round *round, ovlm_tensor own,
                             ovlm_tensor received)
{
    int64_t mark = run->work->used_bytes, rows = 0;
    ovlm_tensor packed = ovlm_stack_tensor(run->work, round->sent, own.cols, own.dtype);
    for (int64_t at = 0; at < round->sent; at += rows) {
        int64_t first = range_at(run, round, at, &rows);
        OVLM_TRY(copy_rows(run, ovlm_tensor_rows(own, first, rows),
                           ovlm_tensor_rows(packed, at, rows)));
    }
    OVLM_TRY(ovlm_expert_send(run, round, packed, received));
    run->work->used_bytes = mark;
    return OVLM_OK;
}

/* Received rows back to where they came from, among own sorted rows there. */
static ovlm_status return_rows(ovlm_run *run, const ovlm_expert_round *round,
                               ovlm_tensor received, ovlm_tensor packed, ovlm_tensor own)
{
    int64_t rows = 0;
    OVLM_TRY(ovlm_expert_return(run, round, received, packed));
    for (int64_t at = 0; at < round->sent; at += rows) {
        int64_t first = range_at(run, round, at, &rows);
        OVLM_TRY(copy_rows(run, ovlm_tensor_rows(packed, at, rows),
                           ovlm_tensor_rows(own, first, rows)));
    }
    return OVLM_OK;
}

/* Rows in the order of experts back into the order in which they came. */
static ovlm_status unsort(ovlm_run *run, const ovlm_expert_round *round, ovlm_tensor sorted,
                          ovlm_tensor to)
{
    ovlm_gather take = {.taps = 1, .unique = true, .index = round->place, .x = sorted, .y = to};
    RUN(run, gather, fwd, &take);
    return OVLM_OK;
}

/* ---------------------------------------------------------------- forward */

/* Where a round's tables are now. */
static void point_at(const ovlm_expert_round *round, ovlm_block_saved *s)
{
    s->experts_up.offsets = s->experts_down.offsets = round->offsets;
    s->experts_up.index = round->arrived;
}

/* Received rows through up, gate and down; what a backward reads is on `stack` and `redo`. */
static ovlm_status run_experts(ovlm_run *run, const ovlm_block *block, ovlm_stack *stack,
                               ovlm_stack *redo, const ovlm_expert_round *round, ovlm_tensor x,
                               ovlm_block_saved *s)
{
    const ovlm_decoder_config *moe = block->moe;
    s->experts_up = (ovlm_grouped_linear){
        .groups = round->held, .offsets = round->offsets, .index = round->arrived, .x = x,
        .w = block->experts_up.w, .w_kn = moe->expert_kn,
        .y = ovlm_stack_tensor(stack, round->rows, 2 * moe->expert_hidden, run->dtype)};
    RUN_IN(run, grouped_linear, fwd, &s->experts_up, stack);
    OVLM_TRY(ovlm_gated_fwd(run, block, redo, stack, s->experts_up.y, &s->experts_gated));
    s->experts_down = (ovlm_grouped_linear){
        .groups = round->held, .offsets = round->offsets, .x = s->experts_gated.y,
        .w = block->experts_down.w, .w_kn = moe->expert_kn,
        .y = ovlm_stack_tensor(stack, round->rows, block->width, run->dtype)};
    RUN_IN(run, grouped_linear, fwd, &s->experts_down, stack);
    return OVLM_OK;
}

/* One round there and back; `made` are own sorted rows of what experts make. */
static ovlm_status round_fwd(ovlm_run *run, const ovlm_block *block,
                             const ovlm_block_context *context, ovlm_stack *stack,
                             ovlm_stack *redo, int64_t i, ovlm_tensor made, ovlm_block_saved *s)
{
    int64_t mark = run->work->used_bytes;
    ovlm_expert_round round;
    OVLM_TRY(ovlm_expert_round_begin(run, context->experts, layer_of(block, context), i,
                                     run->work, &round));
    ovlm_tensor packed = ovlm_stack_tensor(run->work, round.sent, block->width, run->dtype);
    ovlm_tensor x = ovlm_stack_tensor(stack, round.rows, block->width, run->dtype);
    OVLM_TRY(send_tokens(run, &round, s->norm2.y, s, packed, x));
    OVLM_TRY(run_experts(run, block, stack, redo, &round, x, s));
    ovlm_tensor back = ovlm_stack_tensor(run->work, round.rows, block->width, run->dtype);
    OVLM_TRY(unsort(run, &round, s->experts_down.y, back));
    OVLM_TRY(return_rows(run, &round, back, packed, made));
    run->work->used_bytes = mark;
    return OVLM_OK;
}

ovlm_status ovlm_spread_fwd(ovlm_run *run, const ovlm_block *block,
                            const ovlm_block_context *context, ovlm_stack *stack,
                            ovlm_stack *redo, ovlm_tensor add, ovlm_block_saved *s)
{
    int64_t layer = layer_of(block, context), mark = run->work->used_bytes;
    OVLM_TRY(ovlm_expert_share(run, context->experts, layer, s->router.offsets));
    int64_t rounds = ovlm_expert_rounds(run, context->experts, layer);
    s->kept = stack != run->work && rounds <= 1;
    OVLM_TRY(ovlm_unit_enter(run, block->experts_up.unit, OVLM_USE_FORWARD));
    ovlm_tensor made = ovlm_stack_tensor(run->work, context->experts->rows, block->width,
                                         run->dtype);
    if (run->measuring) { /* both ways: which it will be, tokens say */
        OVLM_TRY(round_fwd(run, block, context, run->work, run->work, 0, made, s));
    }
    for (int64_t i = 0; i < rounds; i++) {
        OVLM_TRY(round_fwd(run, block, context, s->kept ? stack : run->work,
                           s->kept ? redo : run->work, i, made, s));
    }
    ovlm_combine sum = {.k = block->moe->k, .row = s->router.row, .weight = s->router.weight,
                        .h = made, .add = add, .y = s->h_out};
    RUN(run, combine, fwd, &sum);
    run->work->used_bytes = mark;
    return ovlm_unit_leave(run);
}

/* ---------------------------------------------------------------- backward */

/* Own sorted rows: the routing weights; slopes of them, and of what experts read. */
typedef struct own_rows {
    ovlm_tensor weight, dweight, dx;
} own_rows;

/* Gradients of a round's experts, from the slopes that came; those of x, in the order in which it
 * came, replace them. */
static ovlm_status experts_back(ovlm_run *run, const ovlm_block *block,
                                const ovlm_block_context *context, const ovlm_expert_round *round,
                                ovlm_tensor came, ovlm_combine *weigh, ovlm_block_saved *s)
{
    ovlm_tensor d_expert = ovlm_stack_tensor(run->work, round->rows, block->width, run->dtype);
    weigh->k = 1;
    weigh->row = round->place;
    weigh->h = s->experts_down.y;
    weigh->y = weigh->dy = came; /* of y only the shape is asked */
    weigh->dh = d_expert;
    RUN(run, combine, bwd, weigh);
    if (s->kept) {
        OVLM_TRY(ovlm_gated_redo(run, context, &s->experts_gated, &s->experts_down.x));
    }
    ovlm_tensor da = ovlm_stack_tensor(run->work, round->rows, block->moe->expert_hidden,
                                       run->dtype);
    ovlm_tensor dgate_up = {0};
    OVLM_TRY(ovlm_grouped_back(run, &s->experts_down, d_expert, &block->experts_down, da));
    OVLM_TRY(ovlm_gated_bwd(run, &s->experts_gated, da, &dgate_up));
    OVLM_TRY(ovlm_grouped_back(run, &s->experts_up, dgate_up, &block->experts_up, d_expert));
    return unsort(run, round, d_expert, came);
}

static ovlm_status round_bwd(ovlm_run *run, const ovlm_block *block,
                             const ovlm_block_context *context, int64_t i, ovlm_tensor dh,
                             const own_rows *own, ovlm_block_saved *s)
{
    int64_t mark = run->work->used_bytes;
    ovlm_expert_round round;
    OVLM_TRY(ovlm_expert_round_begin(run, context->experts, layer_of(block, context), i,
                                     run->work, &round));
    ovlm_tensor packed = ovlm_stack_tensor(run->work, round.sent, block->width, run->dtype);
    if (!s->kept) {
        ovlm_tensor x = ovlm_stack_tensor(run->work, round.rows, block->width, run->dtype);
        OVLM_TRY(send_tokens(run, &round, s->norm2.y, s, packed, x));
        OVLM_TRY(run_experts(run, block, run->work, run->work, &round, x, s));
    }
    point_at(&round, s);
    ovlm_tensor came = ovlm_stack_tensor(run->work, round.rows, block->width, run->dtype);
    ovlm_combine weigh = {.weight = ovlm_stack_tensor(run->work, round.rows, 1, run->exact),
                          .dweight = ovlm_stack_tensor(run->work, round.rows, 1, run->exact)};
    OVLM_TRY(send_tokens(run, &round, dh, s, packed, came));
    OVLM_TRY(send_rows(run, &round, own->weight, weigh.weight));
    OVLM_TRY(experts_back(run, block, context, &round, came, &weigh, s));
    OVLM_TRY(return_rows(run, &round, came, packed, own->dx));
    packed = ovlm_stack_tensor(run->work, round.sent, 1, run->exact);
    OVLM_TRY(return_rows(run, &round, weigh.dweight, packed, own->dweight));
    run->work->used_bytes = mark;
    return OVLM_OK;
}

/* Between a number per slot, [T,k], and own sorted rows: slots are read where rows stand in them,
 * and written as the gradient of that. */
static ovlm_gather slots_of(const ovlm_run *run, const ovlm_block_saved *s, ovlm_tensor slots,
                            ovlm_tensor sorted)
{
    ovlm_tensor flat = ovlm_tensor_of(slots.data, sorted.rows, 1, run->exact);
    return (ovlm_gather){.taps = 1, .unique = true, .index = s->router.row, .x = sorted,
                         .y = flat, .dy = flat, .dx = sorted};
}

ovlm_status ovlm_spread_bwd(ovlm_run *run, const ovlm_block *block,
                            const ovlm_block_context *context, ovlm_tensor dh, ovlm_tensor dn,
                            ovlm_tensor dweight, ovlm_block_saved *s)
{
    int64_t rows = context->experts->rows, mark = run->work->used_bytes;
    int64_t rounds = ovlm_expert_rounds(run, context->experts, layer_of(block, context));
    const own_rows own = {.weight = ovlm_stack_tensor(run->work, rows, 1, run->exact),
                          .dweight = ovlm_stack_tensor(run->work, rows, 1, run->exact),
                          .dx = ovlm_stack_tensor(run->work, rows, block->width, run->dtype)};
    ovlm_gather sort = slots_of(run, s, s->router.weight, own.weight);
    RUN(run, gather, bwd, &sort);
    OVLM_TRY(ovlm_unit_enter(run, block->experts_up.unit, OVLM_USE_BACKWARD));
    for (int64_t i = 0; i < rounds; i++) {
        OVLM_TRY(round_bwd(run, block, context, i, dh, &own, s));
    }
    if (run->measuring && s->kept) { /* and as if it were not */
        s->kept = false;
        OVLM_TRY(round_bwd(run, block, context, 0, dh, &own, s));
    }
    OVLM_TRY(ovlm_unit_leave(run));
    ovlm_gather back = slots_of(run, s, dweight, own.dweight);
    RUN(run, gather, fwd, &back);
    ovlm_combine sum = {.k = block->moe->k, .row = s->router.row, .h = own.dx, .y = dn};
    RUN(run, combine, fwd, &sum);
    run->work->used_bytes = mark;
    return OVLM_OK;
}
