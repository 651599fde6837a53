/* merger.c - merge x merge neighbouring patches become one language token. */
#include "model/vision.h"

/* m*m consecutive rows (merge-block order) as one. */
static ovlm_tensor joined(ovlm_tensor x, int64_t m)
{
    x.rows /= m * m;
    x.cols *= m * m;
    x.stride = x.cols;
    return x;
}

/* Index and weights of the average over consecutive rows. */
static ovlm_status pool_fwd(ovlm_run *run, ovlm_stack *stack, int64_t m, ovlm_tensor h,
                            ovlm_gather *pool)
{
    int64_t tokens = h.rows / (m * m), bytes = h.rows * (int64_t)sizeof(int32_t);
    /* Written straight into the staging memory: there is no host array to copy from. */
    int32_t *staged = ovlm_stack_take(run->stage, bytes);
    void *index = ovlm_stack_take(stack, bytes);
    ovlm_tensor weight = {0};
    OVLM_TRY(ovlm_run_constant(run, stack, 1.0f / (float)(m * m), h.rows, &weight));
    weight.rows = tokens;
    weight.cols = weight.stride = m * m;
    if (!run->measuring && h.rows > 0) {
        for (int64_t i = 0; i < h.rows; i++) {
            staged[i] = (int32_t)i;
        }
        OVLM_TRY(run->ops->copy(run->queue, index, staged, bytes, OVLM_TO_DEVICE, run->err));
    }
    *pool = (ovlm_gather){.taps = m * m, .unique = true, .index = index, .weight = weight, .x = h,
                          .y = ovlm_stack_tensor(stack, tokens, h.cols, run->dtype)};
    RUN_IN(run, gather, fwd, pool, stack);
    return OVLM_OK;
}

ovlm_status ovlm_merger_fwd(ovlm_run *run, const ovlm_merge_weights *weights, ovlm_stack *stack,
                            ovlm_tensor h, ovlm_tensor out, ovlm_merge_saved *s)
{
    int64_t m = weights->merge;
    ovlm_tensor x;
    *s = (ovlm_merge_saved){0};
    if (weights->kind == OVLM_MERGE_POOL) {
        OVLM_TRY(pool_fwd(run, stack, m, h, &s->pool));
        x = s->pool.y;
    } else {
        ovlm_tensor in = weights->kind == OVLM_MERGE_CONCAT_NORM ? joined(h, m) : h;
        s->norm = (ovlm_norm){.eps = weights->eps, .groups = 1, .x = in, .w = weights->norm.w,
                              .bias = weights->norm_bias.w,
                              .y = ovlm_stack_tensor(stack, in.rows, in.cols, run->dtype)};
        RUN_IN(run, norm, fwd, &s->norm, stack);
        x = weights->kind == OVLM_MERGE_CONCAT_NORM ? s->norm.y : joined(s->norm.y, m);
    }
    ovlm_tensor hidden;
    s->fc1 = (ovlm_linear){.x = x, .w = weights->fc1.w, .bias = weights->fc1_bias.w};
    OVLM_TRY(ovlm_acted_fwd(run, &s->fc1, &weights->fc1, weights->act, stack, &s->act,
                            &s->fc1_lora, &hidden));
    s->fc2 = (ovlm_linear){.x = hidden, .w = weights->fc2.w, .bias = weights->fc2_bias.w,
                           .y = out};
    return ovlm_linear_fwd(run, &s->fc2, &weights->fc2, stack, &s->fc2_lora);
}

ovlm_status ovlm_merger_bwd(ovlm_run *run, const ovlm_merge_weights *weights, ovlm_tensor dout,
                            ovlm_tensor dh, float beta, ovlm_merge_saved *s)
{
    int64_t mark = run->work->used_bytes;
    bool below = ovlm_tensor_given(&dh);
    bool norm_trained = ovlm_tensor_given(&weights->norm.dw) ||
                        ovlm_tensor_given(&weights->norm_bias.dw);
    ovlm_tensor da = {0}, dx = {0};
    if (below || norm_trained || ovlm_tensor_given(&weights->fc1.dw) ||
        ovlm_tensor_given(&weights->fc1_bias.dw) || weights->fc1.lora != NULL) {
        da = ovlm_stack_tensor(run->work, s->fc1.y.rows, s->fc1.y.cols, run->dtype);
    }
    OVLM_TRY(ovlm_linear_back(run, &s->fc2, dout, &weights->fc2, &weights->fc2_bias, da, 0,
                              &s->fc2_lora));
    if (below || norm_trained) {
        dx = ovlm_stack_tensor(run->work, s->fc1.x.rows, s->fc1.x.cols, run->dtype);
    }
    if (ovlm_tensor_given(&da)) {
        OVLM_TRY(ovlm_acted_back(run, &s->fc1, da, &weights->fc1, &weights->fc1_bias, dx, &s->act,
                                 &s->fc1_lora));
    }
    if (weights->kind == OVLM_MERGE_POOL && below) {
        s->pool.dy = dx;
        s->pool.dx = dh;
        s->pool.dx_beta = beta;
        RUN(run, gather, bwd, &s->pool);
    } else if (weights->kind != OVLM_MERGE_POOL && (below || norm_trained)) {
        /* The joined view and the rows of dh are the same memory, in the norm's shape. */
        dx.rows = s->norm.x.rows;
        dx.cols = dx.stride = s->norm.x.cols;
        if (below) {
            dh.rows = dx.rows;
            dh.cols = dh.stride = dx.cols;
        }
        OVLM_TRY(ovlm_norm_back(run, &s->norm, dx, &weights->norm, &weights->norm_bias, dh, beta));
    }
    run->work->used_bytes = mark;
    return OVLM_OK;
}
