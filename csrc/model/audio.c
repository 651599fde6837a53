/* audio.c - the audio tower: convolutions, positions, blocks, projection.
 *
 * A convolution is a linear layer on unfolded patches.  Patches are nine times what they are made
 * of, so they live in the workspace and the backward unfolds again. */
#include "model/audio.h"

#include <math.h>

enum { COLUMNS = OVLM_CONVOLUTIONS }; /* the stage behind the convolutions: rows become columns */

static const ovlm_audio_config *config_of(const ovlm_audio_pass *pass)
{
    return &pass->params->config.audio;
}

/* What a run of chunks is at a stage. */
static ovlm_unfold unfold_of(const ovlm_audio_pass *pass, int stage, const ovlm_sound_run *r)
{
    ovlm_unfold a = {.images = r->chunks,
                     .height = ovlm_sound_side(config_of(pass)->bins, stage),
                     .width = ovlm_sound_side(r->width, stage),
                     .kernel_height = 3, .kernel_width = 3, .stride = 2, .padding = 1};
    if (stage == COLUMNS) { /* (channel, bin) side by side, a row per frame */
        a.kernel_height = a.height;
        a.kernel_width = a.stride = 1;
        a.padding = 0;
    }
    return a;
}

static int64_t rows_out(const ovlm_unfold *a, int stage)
{
    return stage == COLUMNS
               ? a->images * a->width
               : a->images * ovlm_audio_halved(a->height) * ovlm_audio_halved(a->width);
}

/* small -> large, run by run; or back, from the gradient of large to that of small. */
static ovlm_status unfold_all(ovlm_run *run, const ovlm_audio_pass *pass, int stage, bool back,
                              ovlm_tensor small, ovlm_tensor large)
{
    int64_t from = 0, to = 0;
    for (int64_t i = 0; i < pass->sounds.runs; i++) {
        ovlm_unfold a = unfold_of(pass, stage, &pass->sounds.run[i]);
        int64_t in = a.images * a.height * a.width, out = rows_out(&a, stage);
        ovlm_tensor x = ovlm_tensor_rows(small, from, in), y = ovlm_tensor_rows(large, to, out);
        a.x = x;
        a.y = y;
        if (back) {
            a.dx = x;
            a.dy = y;
            RUN(run, unfold, bwd, &a);
        } else {
            RUN(run, unfold, fwd, &a);
        }
        from += in;
        to += out;
    }
    return OVLM_OK;
}

/* The frames as images, in the model's dtype. */
static ovlm_status load_mel(ovlm_run *run, ovlm_audio_pass *pass, ovlm_stack *stack)
{
    int64_t rows = pass->sounds.rows[0], bytes = rows * (int64_t)sizeof(float);
    pass->image[0] = ovlm_stack_tensor(stack, rows, 1, run->dtype);
    int64_t mark = run->work->used_bytes;
    /* Spread straight into the staging memory: there is no host array to copy from. */
    float *staged = ovlm_stack_take(run->stage, bytes);
    ovlm_tensor raw = ovlm_stack_tensor(run->work, rows, 1, OVLM_F32);
    if (!run->measuring) {
        ovlm_sounds_spread(&pass->sounds, config_of(pass), pass->mel, staged);
        OVLM_TRY(run->ops->copy(run->queue, raw.data, staged, bytes, OVLM_TO_DEVICE, run->err));
    }
    ovlm_scale cast = {.alpha = 1, .x = raw, .y = pass->image[0]};
    RUN(run, scale, fwd, &cast);
    run->work->used_bytes = mark;
    return OVLM_OK;
}

/* image[i] -> image[i+1] = gelu(convolution). */
static ovlm_status convolve(ovlm_run *run, ovlm_audio_pass *pass, int i, ovlm_stack *stack)
{
    const ovlm_params *p = pass->params;
    int64_t rows = pass->sounds.rows[i + 1], channels = config_of(pass)->channels;
    ovlm_linear *conv = &pass->conv[i];
    *conv = (ovlm_linear){.w = p->conv[i].w, .bias = p->conv_bias[i].w, .act = OVLM_ACT_GELU_ERF,
                          .pre = ovlm_stack_tensor(stack, rows, channels, run->dtype),
                          .y = ovlm_stack_tensor(stack, rows, channels, run->dtype)};
    pass->image[i + 1] = conv->y;
    int64_t mark = run->work->used_bytes;
    conv->x = ovlm_stack_tensor(run->work, rows, conv->w.cols, run->dtype);
    OVLM_TRY(unfold_all(run, pass, i, false, pass->image[i], conv->x));
    RUN(run, linear, fwd, conv);
    run->work->used_bytes = mark;
    return OVLM_OK;
}

/* h = the sinusoids of each token's place in its chunk: [sin | cos] of place * 10000^(-i/(C/2-1)).
 */
static ovlm_status positions(ovlm_run *run, const ovlm_audio_pass *pass, ovlm_tensor h)
{
    int64_t places = ovlm_sound_side(config_of(pass)->chunk, OVLM_CONVOLUTIONS), half = h.cols / 2;
    int64_t bytes = places * h.cols * (int64_t)sizeof(float), mark = run->work->used_bytes;
    float *staged = ovlm_stack_take(run->stage, bytes);
    ovlm_tensor table = ovlm_stack_tensor(run->work, places, h.cols, OVLM_F32);
    if (!run->measuring) {
        double fall = half > 1 ? log(10000.0) / (double)(half - 1) : 0.0;
        for (int64_t k = 0; k < places * half; k++) {
            int64_t at = k / half, wave = k % half;
            double angle = (double)at * (double)(float)exp(-fall * (double)wave);
            staged[at * h.cols + wave] = (float)sin(angle);
            staged[at * h.cols + half + wave] = (float)cos(angle);
        }
        OVLM_TRY(run->ops->copy(run->queue, table.data, staged, bytes, OVLM_TO_DEVICE, run->err));
    }
    void *place = NULL;
    OVLM_TRY(ovlm_run_upload(run, run->work, pass->sounds.place,
                             h.rows * (int64_t)sizeof(int32_t), &place));
    ovlm_gather look_up = {.taps = 1, .index = place, .x = table, .y = h};
    RUN(run, gather, fwd, &look_up);
    run->work->used_bytes = mark;
    return OVLM_OK;
}

/* The last images' columns, projected; those that are tokens are added to their positions. */
static ovlm_status embed(ovlm_run *run, ovlm_audio_pass *pass, ovlm_stack *stack, ovlm_tensor h)
{
    const ovlm_params *p = pass->params;
    int64_t mark = run->work->used_bytes;
    pass->conv_out = (ovlm_linear){
        .w = p->conv_out.w,
        .x = ovlm_stack_tensor(run->work, pass->sounds.columns, p->conv_out.w.cols, run->dtype),
        .y = ovlm_stack_tensor(run->work, pass->sounds.columns, h.cols, run->dtype)};
    OVLM_TRY(unfold_all(run, pass, COLUMNS, false, pass->image[COLUMNS], pass->conv_out.x));
    RUN(run, linear, fwd, &pass->conv_out);
    OVLM_TRY(positions(run, pass, h));
    void *column = NULL;
    OVLM_TRY(ovlm_run_upload(run, stack, pass->sounds.column,
                             h.rows * (int64_t)sizeof(int32_t), &column));
    pass->place = (ovlm_gather){.taps = 1, .unique = true, .index = column,
                                .x = pass->conv_out.y, .y = h, .y_beta = 1};
    RUN_IN(run, gather, fwd, &pass->place, stack);
    run->work->used_bytes = mark;
    return OVLM_OK;
}

static ovlm_status windows(ovlm_run *run, ovlm_audio_pass *pass)
{
    void *start = NULL;
    bool reached = pass->training && pass->lowest < config_of(pass)->depth;
    OVLM_TRY(ovlm_run_upload(run, reached ? run->keep : run->work, pass->sounds.start,
                             (pass->sounds.windows + 1) * (int64_t)sizeof(int32_t), &start));
    pass->context.query = (ovlm_segments){.n = pass->sounds.windows,
                                          .max_len = pass->sounds.max_window, .start = start,
                                          .host_start = pass->sounds.start};
    pass->context.key = pass->context.query;
    return OVLM_OK;
}

ovlm_status ovlm_audio_fwd(ovlm_run *run, ovlm_audio_pass *pass)
{
    const ovlm_audio_config *c = config_of(pass);
    int64_t T = pass->sounds.tokens, mark = run->work->used_bytes;
    pass->features = ovlm_stack_tensor(run->keep, T, c->out_width, run->dtype);
    int64_t first = pass->training ? pass->lowest : INT64_MAX; /* that is kept */
    ovlm_stack *stack = first < 0 ? run->keep : run->work;
    ovlm_stream stream = {.rows = T, .cols = c->width};
    ovlm_tensor h = ovlm_stream_next(run, &stream, first <= 0);
    OVLM_TRY(load_mel(run, pass, stack));
    OVLM_TRY(ovlm_unit_enter(run, pass->params->conv_out.unit, OVLM_USE_FORWARD));
    for (int i = 0; i < OVLM_CONVOLUTIONS; i++) {
        OVLM_TRY(convolve(run, pass, i, stack));
    }
    OVLM_TRY(embed(run, pass, stack, h));
    OVLM_TRY(ovlm_unit_leave(run));
    OVLM_TRY(windows(run, pass));
    for (int64_t i = 0; i < c->depth; i++) {
        double start_s = ovlm_run_begin(run);
        ovlm_tensor out = ovlm_stream_next(run, &stream, first <= i + 1);
        OVLM_TRY(ovlm_block_fwd(run, &pass->params->audio[i], &pass->context, first <= i, h, out,
                                &pass->block[i]));
        h = out;
        ovlm_run_end(run, "audio block", i, start_s);
    }
    OVLM_TRY(ovlm_unit_enter(run, pass->params->project.fc1.unit, OVLM_USE_FORWARD));
    OVLM_TRY(ovlm_merger_fwd(run, &pass->params->project, pass->training ? run->keep : run->work,
                             h, pass->features, &pass->project));
    OVLM_TRY(ovlm_unit_leave(run));
    run->work->used_bytes = mark;
    return OVLM_OK;
}

/* ---------------------------------------------------------------- backward */

bool ovlm_audio_trained(const ovlm_params *params)
{
    return ovlm_units_trained(params, OVLM_UNIT_FRONT, OVLM_UNIT_PROJECT);
}

/* Whether anything is trained before stage i: a convolution, or conv_out behind the last. */
static bool trained_before(const ovlm_params *params, int stage)
{
    for (int i = 0; i < stage; i++) {
        if (ovlm_weight_trained(params, &params->conv[i]) ||
            ovlm_weight_trained(params, &params->conv_bias[i])) {
            return true;
        }
    }
    return false;
}

/* dimage, left out where nothing is trained before, becomes the gradient of what the stage read. */
static ovlm_status linear_stage_bwd(ovlm_run *run, const ovlm_audio_pass *pass, int stage,
                                    ovlm_linear *args, const ovlm_weight *w,
                                    const ovlm_weight *bias, ovlm_tensor dy, ovlm_tensor dimage)
{
    int64_t mark = run->work->used_bytes;
    ovlm_tensor dpatches = {0};
    args->x = ovlm_stack_tensor(run->work, dy.rows, w->w.cols, run->dtype);
    OVLM_TRY(unfold_all(run, pass, stage, false, pass->image[stage], args->x));
    if (ovlm_tensor_given(&dimage)) {
        dpatches = ovlm_stack_tensor(run->work, dy.rows, w->w.cols, run->dtype);
    }
    OVLM_TRY(ovlm_linear_back(run, args, dy, w, bias, dpatches, 0, NULL));
    if (ovlm_tensor_given(&dimage)) {
        OVLM_TRY(unfold_all(run, pass, stage, true, dimage, dpatches));
    }
    run->work->used_bytes = mark;
    return OVLM_OK;
}

static ovlm_tensor gradient_of(ovlm_run *run, const ovlm_audio_pass *pass, int stage)
{
    const ovlm_tensor *image = &pass->image[stage];
    return trained_before(pass->params, stage)
               ? ovlm_stack_tensor(run->work, image->rows, image->cols, run->dtype)
               : (ovlm_tensor){0};
}

static ovlm_status embed_bwd(ovlm_run *run, ovlm_audio_pass *pass, ovlm_tensor dh)
{
    const ovlm_params *p = pass->params;
    OVLM_TRY(ovlm_unit_enter(run, p->conv_out.unit, OVLM_USE_BACKWARD));
    ovlm_tensor dcolumns = ovlm_stack_tensor(run->work, pass->sounds.columns, dh.cols, run->dtype);
    pass->place.dy = dh;
    pass->place.dx = dcolumns;
    RUN(run, gather, bwd, &pass->place);
    ovlm_tensor d = gradient_of(run, pass, COLUMNS);
    OVLM_TRY(linear_stage_bwd(run, pass, COLUMNS, &pass->conv_out, &p->conv_out, NULL, dcolumns,
                              d));
    for (int i = OVLM_CONVOLUTIONS - 1; i >= 0 && ovlm_tensor_given(&d); i--) {
        ovlm_tensor before = gradient_of(run, pass, i);
        OVLM_TRY(linear_stage_bwd(run, pass, i, &pass->conv[i], &p->conv[i], &p->conv_bias[i], d,
                                  before));
        d = before;
    }
    return ovlm_unit_leave(run);
}

ovlm_status ovlm_audio_bwd(ovlm_run *run, ovlm_audio_pass *pass, ovlm_tensor dfeatures)
{
    const ovlm_params *p = pass->params;
    int64_t mark = run->work->used_bytes;
    bool below = pass->lowest < p->config.audio.depth;
    ovlm_tensor dh = {0};
    if (below) {
        dh = ovlm_stack_tensor(run->work, pass->sounds.tokens, p->config.audio.width, run->dtype);
    }
    OVLM_TRY(ovlm_unit_enter(run, p->project.fc1.unit, OVLM_USE_BACKWARD));
    if (ovlm_tensor_given(&dfeatures)) {
        OVLM_TRY(ovlm_merger_bwd(run, &p->project, dfeatures, dh, 0, &pass->project));
    } else if (below) {
        OVLM_TRY(ovlm_run_zero_tensor(run, &dh));
    }
    OVLM_TRY(ovlm_unit_leave(run));
    for (int64_t i = p->config.audio.depth - 1; i >= 0; i--) {
        double start_s = ovlm_run_begin(run);
        OVLM_TRY(ovlm_block_bwd(run, &p->audio[i], &pass->context, pass->lowest < i, dh,
                                &pass->block[i]));
        ovlm_run_end(run, "audio block backward", i, start_s);
    }
    if (pass->lowest < 0) {
        OVLM_TRY(embed_bwd(run, pass, dh));
    }
    run->work->used_bytes = mark;
    return OVLM_OK;
}
