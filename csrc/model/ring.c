/* ring.c - what a rank's queries read of earlier rows' keys and values (sequence.h).
 *
 * Forward: the core has attended to the own row's keys.  In each step those of one earlier row
 * arrive, are attended to without a mask, and the results are merged; only the queries of the
 * segment that crosses the row's beginning take part, and one step's keys are held at a time.
 * Backward: o and lse are those of all keys, so each step gives its part of dq, and the slopes of
 * its keys and values, which go back to where these came from and are added there in the order of
 * the steps.  Sums are in run->exact; what travels is in run->dtype. */
#include "model/block.h"

/* Columns of the own heads. */
typedef struct ring_cols {
    int64_t D, q, kv;
} ring_cols;

static ring_cols cols_of(const ovlm_sequence_pass *s, const ovlm_attention *all)
{
    const ovlm_sequence_part *own = ovlm_sequence_own(s);
    int64_t D = all->q.cols / own->heads;
    return (ring_cols){D, own->heads * D, own->kv_heads * D};
}

/* The last `rows` rows. */
static ovlm_tensor tail_of(ovlm_tensor tensor, int64_t rows)
{
    return ovlm_tensor_rows(tensor, tensor.rows - rows, rows);
}

/* The keys and values that any step gives away, side by side. */
static ovlm_status pack(ovlm_run *run, const ovlm_sequence_pass *s, const ovlm_attention *all,
                        ovlm_tensor *packed)
{
    ring_cols cols = cols_of(s, all);
    int64_t rows = s->ring.most_give;
    *packed = ovlm_stack_tensor(run->work, rows, 2 * cols.kv, run->dtype);
    OVLM_TRY(ovlm_run_move(run, tail_of(all->k, rows), ovlm_tensor_cols(*packed, 0, cols.kv), 0));
    return ovlm_run_move(run, tail_of(all->v, rows),
                         ovlm_tensor_cols(*packed, cols.kv, cols.kv), 0);
}

/* The call of run i of heads for a step's keys and values. */
static ovlm_attention call_of(const ovlm_block_context *context, const ovlm_attention *all,
                              int64_t step, ovlm_tensor theirs, int64_t i)
{
    const ovlm_sequence_pass *s = context->sequence;
    const ovlm_head_run *part = &s->run[i];
    ring_cols cols = cols_of(s, all);
    int64_t q = part->head * cols.D, q_cols = part->heads * cols.D;
    int64_t kv = part->kv_head * cols.D, kv_cols = part->kv_heads * cols.D;
    const int32_t *host = s->ring.bounds + s->segments + 1;
    const int32_t *device = context->ring_bounds;
    return (ovlm_attention){
        .heads = part->heads, .kv_heads = part->kv_heads, .scale = all->scale,
        .query = {.n = 1, .max_len = s->ring.queries, .start = device, .host_start = host},
        .key = {.n = 1, .max_len = s->ring.take[step],
                .start = device == NULL ? NULL : device + 2 * step, .host_start = host + 2 * step},
        .q = ovlm_tensor_cols(ovlm_tensor_rows(all->q, 0, s->ring.queries), q, q_cols),
        .k = ovlm_tensor_cols(theirs, kv, kv_cols),
        .v = ovlm_tensor_cols(theirs, cols.kv + kv, kv_cols)};
}

/* ---------------------------------------------------------------- forward */

static ovlm_status attend(ovlm_run *run, const ovlm_block_context *context,
                          const ovlm_attention *all, int64_t step, ovlm_tensor theirs,
                          ovlm_tensor sum)
{
    const ovlm_sequence_pass *s = context->sequence;
    const ovlm_sequence_part *own = ovlm_sequence_own(s);
    ring_cols cols = cols_of(s, all);
    ovlm_merge merge = {.heads = own->heads, .o = sum,
                        .lse = ovlm_tensor_rows(all->lse, 0, sum.rows)};
    merge.part = ovlm_stack_tensor(run->work, sum.rows, cols.q, run->dtype);
    merge.part_lse = ovlm_stack_tensor(run->work, sum.rows, own->heads, run->exact);
    for (int64_t i = 0; i < s->runs; i++) {
        ovlm_attention call = call_of(context, all, step, theirs, i);
        call.o = ovlm_tensor_cols(merge.part, s->run[i].head * cols.D, call.heads * cols.D);
        call.lse = ovlm_tensor_cols(merge.part_lse, s->run[i].head, call.heads);
        RUN(run, attention, fwd, &call);
    }
    RUN(run, merge, fwd, &merge);
    return OVLM_OK;
}

ovlm_status ovlm_ring_fwd(ovlm_run *run, const ovlm_block_context *context,
                          const ovlm_attention *all)
{
    const ovlm_sequence_pass *s = context->sequence;
    const ovlm_ring *ring = &s->ring;
    int64_t mark = run->work->used_bytes;
    bool wide = run->dtype != run->exact;
    ovlm_tensor mine, o = ovlm_tensor_rows(all->o, 0, ring->queries), sum = o;
    OVLM_TRY(pack(run, s, all, &mine));
    if (wide) {
        sum = ovlm_stack_tensor(run->work, o.rows, o.cols, run->exact);
        OVLM_TRY(ovlm_run_move(run, o, sum, 0));
    }
    for (int64_t step = 1; step <= ring->steps; step++) {
        int64_t place = run->work->used_bytes;
        ovlm_tensor theirs = ovlm_stack_tensor(run->work, ring->take[step], mine.cols, run->dtype);
        OVLM_TRY(ovlm_sequence_pass_on(run, s, step, false, tail_of(mine, ring->give[step]),
                                       theirs));
        if (theirs.rows > 0) {
            OVLM_TRY(attend(run, context, all, step, theirs, sum));
        }
        run->work->used_bytes = place;
    }
    if (wide) {
        OVLM_TRY(ovlm_run_move(run, sum, o, 0));
    }
    run->work->used_bytes = mark;
    return OVLM_OK;
}

/* ---------------------------------------------------------------- backward */

/* Adds to dq, and fills slopes [take, keys and values]. */
static ovlm_status slopes_of(ovlm_run *run, const ovlm_block_context *context,
                             const ovlm_attention *all, int64_t step, ovlm_tensor theirs,
                             ovlm_tensor d_o, ovlm_tensor dq, ovlm_tensor slopes)
{
    const ovlm_sequence_pass *s = context->sequence;
    ring_cols cols = cols_of(s, all);
    int64_t queries = s->ring.queries;
    ovlm_tensor part = ovlm_stack_tensor(run->work, queries, cols.q, run->dtype);
    for (int64_t i = 0; i < s->runs; i++) {
        ovlm_attention call = call_of(context, all, step, theirs, i);
        int64_t q = s->run[i].head * cols.D, kv = s->run[i].kv_head * cols.D;
        call.o = ovlm_tensor_cols(ovlm_tensor_rows(all->o, 0, queries), q, call.q.cols);
        call.lse = ovlm_tensor_cols(ovlm_tensor_rows(all->lse, 0, queries), s->run[i].head,
                                    call.heads);
        call.dout = ovlm_tensor_cols(ovlm_tensor_rows(d_o, 0, queries), q, call.q.cols);
        call.dq = ovlm_tensor_cols(part, q, call.q.cols);
        call.dk = ovlm_tensor_cols(slopes, kv, call.k.cols);
        call.dv = ovlm_tensor_cols(slopes, cols.kv + kv, call.v.cols);
        RUN(run, attention, bwd, &call);
    }
    return ovlm_run_move(run, part, ovlm_tensor_rows(dq, 0, queries), 1);
}

/* One step: keys and values come, their slopes go, and those of what was given away come back. */
static ovlm_status step_bwd(ovlm_run *run, const ovlm_block_context *context,
                            const ovlm_attention *all, int64_t step, ovlm_tensor mine,
                            ovlm_tensor d_o, ovlm_tensor sum)
{
    const ovlm_sequence_pass *s = context->sequence;
    int64_t place = run->work->used_bytes, q_cols = sum.cols - mine.cols;
    int64_t take = s->ring.take[step], give = s->ring.give[step];
    ovlm_tensor theirs = ovlm_stack_tensor(run->work, take, mine.cols, run->dtype);
    ovlm_tensor slopes = ovlm_stack_tensor(run->work, take, mine.cols, run->dtype);
    ovlm_tensor back = ovlm_stack_tensor(run->work, give, mine.cols, run->dtype);
    OVLM_TRY(ovlm_sequence_pass_on(run, s, step, false, tail_of(mine, give), theirs));
    if (take > 0) {
        OVLM_TRY(slopes_of(run, context, all, step, theirs, d_o, ovlm_tensor_cols(sum, 0, q_cols),
                           slopes));
    }
    OVLM_TRY(ovlm_sequence_pass_on(run, s, step, true, slopes, back));
    OVLM_TRY(ovlm_run_move(run, back, tail_of(ovlm_tensor_cols(sum, q_cols, mine.cols), give), 1));
    run->work->used_bytes = place;
    return OVLM_OK;
}

ovlm_status ovlm_ring_bwd(ovlm_run *run, const ovlm_block_context *context,
                          const ovlm_attention *all, ovlm_tensor d_o, ovlm_tensor dqkv)
{
    const ovlm_sequence_pass *s = context->sequence;
    int64_t mark = run->work->used_bytes;
    bool wide = run->dtype != run->exact;
    ovlm_tensor mine, sum = dqkv;
    OVLM_TRY(pack(run, s, all, &mine));
    if (wide) {
        sum = ovlm_stack_tensor(run->work, dqkv.rows, dqkv.cols, run->exact);
        OVLM_TRY(ovlm_run_move(run, dqkv, sum, 0));
    }
    for (int64_t step = 1; step <= s->ring.steps; step++) {
        OVLM_TRY(step_bwd(run, context, all, step, mine, d_o, sum));
    }
    if (wide) {
        OVLM_TRY(ovlm_run_move(run, sum, dqkv, 0));
    }
    run->work->used_bytes = mark;
    return OVLM_OK;
}
