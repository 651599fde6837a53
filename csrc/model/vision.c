/* vision.c - the tower: patch embedding, positions, blocks, merger, DeepStack. */
#include "model/vision.h"

#include <math.h>

ovlm_status ovlm_rope_tables(ovlm_run *run, ovlm_stack *stack, ovlm_tensor position,
                             const float *frequency, const int32_t *axis, int64_t count,
                             ovlm_block_context *context)
{
    void *device_frequency = NULL, *device_axis = NULL;
    OVLM_TRY(ovlm_run_upload(run, stack, frequency, count * (int64_t)sizeof *frequency,
                             &device_frequency));
    OVLM_TRY(ovlm_run_upload(run, stack, axis, count * (int64_t)sizeof *axis, &device_axis));
    ovlm_rope_table table = {
        .position = position, .frequency = ovlm_tensor_of(device_frequency, 1, count, OVLM_F32),
        .axis = device_axis, .cos = ovlm_stack_tensor(stack, position.cols, count, OVLM_F32),
        .sin = ovlm_stack_tensor(stack, position.cols, count, OVLM_F32)};
    RUN(run, rope_table, fwd, &table);
    context->cos = table.cos;
    context->sin = table.sin;
    return OVLM_OK;
}

/* Where a pass keeps what only a backward of some block needs. */
static ovlm_stack *blocks_stack(const ovlm_run *run, const ovlm_vision_pass *pass)
{
    bool reached = pass->training && pass->lowest < pass->params->config.vision.depth;
    return reached ? run->keep : run->work;
}

/* The same for a backward of the patches. */
static ovlm_stack *patches_stack(const ovlm_run *run, const ovlm_vision_pass *pass)
{
    return pass->training && pass->lowest < 0 ? run->keep : run->work;
}

/* 2D RoPE: the first half of the frequencies turns by the row, the second by the column; f_j =
 * theta^(-2j/(D/2)), j < D/4. */
static ovlm_status rotary(ovlm_run *run, ovlm_vision_pass *pass)
{
    const ovlm_vision_config *c = &pass->params->config.vision;
    int64_t half = c->width / c->heads / 4;
    float frequency[OVLM_ROPE_MOST];
    int32_t axis[OVLM_ROPE_MOST];
    for (int64_t j = 0; j < half; j++) {
        frequency[j] = frequency[half + j] =
            (float)(1.0 / pow(c->theta, 2.0 * (double)j / (double)(2 * half)));
        axis[j] = 0;
        axis[half + j] = 1;
    }
    void *position = NULL;
    ovlm_stack *stack = blocks_stack(run, pass);
    OVLM_TRY(ovlm_run_upload(run, stack, pass->grid.position,
                             2 * pass->grid.patches * (int64_t)sizeof(float), &position));
    return ovlm_rope_tables(run, stack,
                            ovlm_tensor_of(position, 2, pass->grid.patches, OVLM_F32), frequency,
                            axis, 2 * half, &pass->context);
}

static ovlm_status frames(ovlm_run *run, ovlm_vision_pass *pass)
{
    void *start = NULL;
    OVLM_TRY(ovlm_run_upload(run, blocks_stack(run, pass), pass->grid.start,
                             (pass->grid.frames + 1) * (int64_t)sizeof(int32_t), &start));
    pass->context.query = (ovlm_segments){.n = pass->grid.frames, .max_len = pass->grid.max_frame,
                                          .start = start, .host_start = pass->grid.start};
    pass->context.key = pass->context.query;
    return OVLM_OK;
}

/* Pixels in the model's dtype. */
static ovlm_status load_pixels(ovlm_run *run, const ovlm_vision_pass *pass, ovlm_tensor *x)
{
    const ovlm_vision_config *c = &pass->params->config.vision;
    int64_t cols = c->channels * c->temporal * c->patch * c->patch;
    void *raw = NULL;
    *x = ovlm_stack_tensor(patches_stack(run, pass), pass->grid.patches, cols, run->dtype);
    int64_t mark = run->work->used_bytes;
    OVLM_TRY(ovlm_run_upload(run, run->work, pass->pixels,
                             x->rows * cols * ovlm_dtype_bytes(pass->pixel_dtype), &raw));
    ovlm_scale scale = {.alpha = 1, .y = *x,
                        .x = ovlm_tensor_of(raw, x->rows, cols, pass->pixel_dtype)};
    if (pass->pixel_dtype == OVLM_U8) {
        scale.alpha = 2.0 / 255.0; /* mean and deviation are 0.5 in every family */
        OVLM_TRY(ovlm_run_constant(run, run->work, -1.0f, cols, &scale.shift));
    }
    RUN(run, scale, fwd, &scale);
    run->work->used_bytes = mark;
    return OVLM_OK;
}

/* h = patch embedding + interpolated table of positions. */
static ovlm_status embed(ovlm_run *run, ovlm_vision_pass *pass, ovlm_tensor h)
{
    const ovlm_params *p = pass->params;
    ovlm_stack *stack = patches_stack(run, pass);
    OVLM_TRY(ovlm_unit_enter(run, p->patch.unit, OVLM_USE_FORWARD));
    pass->patch = (ovlm_linear){.w = p->patch.w, .bias = p->patch_bias.w, .y = h};
    OVLM_TRY(load_pixels(run, pass, &pass->patch.x));
    RUN_IN(run, linear, fwd, &pass->patch, stack);
    if (p->config.vision.position_side == 0) {
        return ovlm_unit_leave(run);
    }
    void *tap = NULL, *weight = NULL;
    int64_t taps = 4 * pass->grid.patches;
    OVLM_TRY(ovlm_run_upload(run, stack, pass->grid.tap, taps * (int64_t)sizeof(int32_t), &tap));
    OVLM_TRY(ovlm_run_upload(run, stack, pass->grid.tap_weight,
                             taps * (int64_t)sizeof(float), &weight));
    pass->position = (ovlm_gather){
        .taps = 4, .index = tap, .weight = ovlm_tensor_of(weight, h.rows, 4, OVLM_F32),
        .x = p->position.w, .y = h, .y_beta = 1};
    RUN_IN(run, gather, fwd, &pass->position, stack);
    return ovlm_unit_leave(run);
}

/* Whether the backward has something to do in DeepStack's k-th merger. */
static bool deepstack_back(const ovlm_vision_pass *pass, int64_t k)
{
    const ovlm_params *p = pass->params;
    return pass->training && (pass->lowest <= p->config.vision.deepstack[k] ||
                              ovlm_unit_trained(p, p->deepstack[k].fc1.unit));
}

/* The same for the last norm and the merger. */
static bool finish_back(const ovlm_vision_pass *pass)
{
    const ovlm_params *p = pass->params;
    return pass->training && (pass->lowest < p->config.vision.depth ||
                              ovlm_unit_trained(p, p->merger.fc1.unit));
}

/* Whether the backward reads what block i gives: the next one, the end, or a merger does. */
static bool keeps_output(const ovlm_vision_pass *pass, int64_t i)
{
    const ovlm_vision_config *c = &pass->params->config.vision;
    bool read = i + 1 == c->depth ? finish_back(pass) : pass->training && pass->lowest <= i + 1;
    for (int64_t k = 0; k < c->deepstack_n; k++) {
        read = read || (c->deepstack[k] == i && deepstack_back(pass, k));
    }
    return read;
}

/* After block i: the DeepStack output that is taken there, if any. */
static ovlm_status tap_deepstack(ovlm_run *run, ovlm_vision_pass *pass, int64_t i, ovlm_tensor h)
{
    const ovlm_vision_config *c = &pass->params->config.vision;
    for (int64_t k = 0; k < c->deepstack_n; k++) {
        if (c->deepstack[k] != i) {
            continue;
        }
        ovlm_stack *stack = deepstack_back(pass, k) ? run->keep : run->work;
        int64_t mark = run->work->used_bytes;
        OVLM_TRY(ovlm_unit_enter(run, pass->params->deepstack[k].fc1.unit, OVLM_USE_FORWARD));
        OVLM_TRY(ovlm_merger_fwd(run, &pass->params->deepstack[k], stack, h,
                                 pass->extra[k], &pass->deepstack[k]));
        OVLM_TRY(ovlm_unit_leave(run));
        run->work->used_bytes = mark;
    }
    return OVLM_OK;
}

static ovlm_status finish(ovlm_run *run, ovlm_vision_pass *pass, ovlm_tensor h)
{
    const ovlm_params *p = pass->params;
    ovlm_stack *stack = finish_back(pass) ? run->keep : run->work;
    int64_t mark = run->work->used_bytes;
    OVLM_TRY(ovlm_unit_enter(run, p->merger.fc1.unit, OVLM_USE_FORWARD));
    if (p->config.vision.final_norm) {
        pass->final_norm = (ovlm_norm){
            .eps = p->config.vision.eps, .groups = 1, .x = h, .w = p->final_norm.w,
            .bias = p->final_norm_bias.w,
            .y = ovlm_stack_tensor(stack, h.rows, h.cols, run->dtype)};
        RUN_IN(run, norm, fwd, &pass->final_norm, stack);
        h = pass->final_norm.y;
    }
    OVLM_TRY(ovlm_merger_fwd(run, &p->merger, stack, h, pass->features, &pass->merger));
    run->work->used_bytes = mark;
    return ovlm_unit_leave(run);
}

ovlm_status ovlm_vision_fwd(ovlm_run *run, ovlm_vision_pass *pass)
{
    const ovlm_vision_config *c = &pass->params->config.vision;
    int64_t P = pass->grid.patches;
    int64_t mark = run->work->used_bytes;
    pass->tokens = P / (c->merge * c->merge);
    pass->features = ovlm_stack_tensor(run->keep, pass->tokens, c->out_width, run->dtype);
    for (int64_t k = 0; k < c->deepstack_n; k++) {
        pass->extra[k] = ovlm_stack_tensor(run->keep, pass->tokens, c->out_width, run->dtype);
    }
    ovlm_stream stream = {.rows = P, .cols = c->width};
    ovlm_tensor h = ovlm_stream_next(run, &stream, keeps_output(pass, -1));
    OVLM_TRY(embed(run, pass, h));
    OVLM_TRY(rotary(run, pass));
    OVLM_TRY(frames(run, pass));
    OVLM_TRY(ovlm_taps_keep(run, &pass->taps, 0, h));
    for (int64_t i = 0; i < c->depth; i++) {
        double start_s = ovlm_run_begin(run);
        ovlm_tensor out = ovlm_stream_next(run, &stream, keeps_output(pass, i));
        OVLM_TRY(ovlm_block_fwd(run, &pass->params->vision[i], &pass->context,
                                pass->training && pass->lowest <= i, h, out, &pass->block[i]));
        h = out;
        OVLM_TRY(ovlm_taps_keep(run, &pass->taps, i + 1, h));
        OVLM_TRY(tap_deepstack(run, pass, i, h));
        ovlm_run_end(run, "vision block", i, start_s);
    }
    OVLM_TRY(finish(run, pass, h));
    run->work->used_bytes = mark;
    return OVLM_OK;
}

/* ---------------------------------------------------------------- backward */

bool ovlm_vision_trained(const ovlm_params *params)
{
    return ovlm_units_trained(params, OVLM_UNIT_PATCHES, OVLM_UNIT_DEEPSTACK);
}

static ovlm_status embed_bwd(ovlm_run *run, ovlm_vision_pass *pass, ovlm_tensor dh)
{
    const ovlm_params *p = pass->params;
    /* Nothing below is trained, so that no slope goes through the weights. */
    OVLM_TRY(ovlm_unit_enter(run, p->patch.unit, OVLM_USE_GRADIENTS));
    if (ovlm_tensor_given(&p->position.dw)) {
        pass->position.dy = dh;
        pass->position.dx = p->position.dw;
        pass->position.dx_beta = 1;
        RUN(run, gather, bwd, &pass->position);
    }
    OVLM_TRY(ovlm_linear_back(run, &pass->patch, dh, &p->patch, &p->patch_bias, (ovlm_tensor){0},
                              0, NULL));
    return ovlm_unit_leave(run);
}

/* Adds the gradient that came by way of DeepStack after block i. */
static ovlm_status deepstack_bwd(ovlm_run *run, ovlm_vision_pass *pass, int64_t i,
                                 const ovlm_tensor *dextra, ovlm_tensor dh)
{
    const ovlm_vision_config *c = &pass->params->config.vision;
    for (int64_t k = 0; k < c->deepstack_n; k++) {
        if (c->deepstack[k] != i || !deepstack_back(pass, k)) {
            continue;
        }
        OVLM_TRY(ovlm_unit_enter(run, pass->params->deepstack[k].fc1.unit, OVLM_USE_BACKWARD));
        if (ovlm_tensor_given(&dextra[k])) {
            OVLM_TRY(ovlm_merger_bwd(run, &pass->params->deepstack[k], dextra[k],
                                     pass->lowest <= i ? dh : (ovlm_tensor){0}, 1,
                                     &pass->deepstack[k]));
        }
        OVLM_TRY(ovlm_unit_leave(run));
    }
    return OVLM_OK;
}

/* dh, left out where no block needs it, becomes the gradient of the last one's output. */
static ovlm_status finish_bwd(ovlm_run *run, ovlm_vision_pass *pass, ovlm_tensor dfeatures,
                              ovlm_tensor dh)
{
    const ovlm_params *p = pass->params;
    bool below = ovlm_tensor_given(&dh);
    if (!ovlm_tensor_given(&dfeatures)) {
        return below ? ovlm_run_zero_tensor(run, &dh) : OVLM_OK;
    }
    if (!p->config.vision.final_norm) {
        return ovlm_merger_bwd(run, &p->merger, dfeatures, dh, 0, &pass->merger);
    }
    int64_t mark = run->work->used_bytes;
    ovlm_tensor dy = {0};
    if (below || ovlm_tensor_given(&p->final_norm.dw) ||
        ovlm_tensor_given(&p->final_norm_bias.dw)) {
        dy = ovlm_stack_tensor(run->work, pass->grid.patches, p->config.vision.width, run->dtype);
    }
    OVLM_TRY(ovlm_merger_bwd(run, &p->merger, dfeatures, dy, 0, &pass->merger));
    OVLM_TRY(ovlm_norm_back(run, &pass->final_norm, dy, &p->final_norm, &p->final_norm_bias, dh,
                            0));
    run->work->used_bytes = mark;
    return OVLM_OK;
}

ovlm_status ovlm_vision_bwd(ovlm_run *run, ovlm_vision_pass *pass, ovlm_tensor dfeatures,
                            const ovlm_tensor *dextra)
{
    const ovlm_params *p = pass->params;
    int64_t mark = run->work->used_bytes;
    ovlm_tensor dh = {0};
    if (pass->lowest < p->config.vision.depth) {
        dh = ovlm_stack_tensor(run->work, pass->grid.patches, p->config.vision.width, run->dtype);
    }
    if (finish_back(pass)) {
        OVLM_TRY(ovlm_unit_enter(run, p->merger.fc1.unit, OVLM_USE_BACKWARD));
        OVLM_TRY(finish_bwd(run, pass, dfeatures, dh));
        OVLM_TRY(ovlm_unit_leave(run));
    }
    for (int64_t i = p->config.vision.depth - 1; i >= 0; i--) {
        double start_s = ovlm_run_begin(run);
        OVLM_TRY(deepstack_bwd(run, pass, i, dextra, dh));
        OVLM_TRY(ovlm_block_bwd(run, &p->vision[i], &pass->context, pass->lowest < i, dh,
                                &pass->block[i]));
        ovlm_run_end(run, "vision block backward", i, start_s);
    }
    if (pass->lowest < 0) {
        OVLM_TRY(embed_bwd(run, pass, dh));
    }
    run->work->used_bytes = mark;
    return OVLM_OK;
}
