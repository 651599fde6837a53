/* objective.c - masked features, pairs and classes: the losses and their slopes. */
#include "model/objective.h"

#include "model/run.h"

#include <math.h>
#include <string.h>

/* Elements of logits that are held at a time, and the least rows. */
enum { BLOCK_ELEMENTS = 1 << 21, BLOCK_ROWS_LEAST = 16 };

static inline double get(const void *data, ovlm_dtype dtype, int64_t i)
{
    return dtype == OVLM_F64 ? ((const double *)data)[i] : (double)((const float *)data)[i];
}

static inline void put(void *data, ovlm_dtype dtype, int64_t i, double value)
{
    if (dtype == OVLM_F64) {
        ((double *)data)[i] = value;
    } else {
        ((float *)data)[i] = (float)value;
    }
}

static double dot(const void *a, int64_t first_a, const void *b, int64_t first_b, int64_t n,
                  ovlm_dtype dtype)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        sum += get(a, dtype, first_a + i) * get(b, dtype, first_b + i);
    }
    return sum;
}

/* Length of a row; that of a row of zeros is taken as torch does. */
static double length(const void *data, int64_t first, int64_t n, ovlm_dtype dtype)
{
    return fmax(sqrt(dot(data, first, data, first, n, dtype)), 1e-12);
}

/* ---------------------------------------------------------------- masked features */

void ovlm_masked_cosine_run(ovlm_masked_cosine *a)
{
    int64_t C = a->student.cols;
    a->loss = 0;
    for (int64_t row = 0; row < a->student.rows; row++) {
        int64_t first = row * C;
        bool masked = a->masked[row] != 0;
        double s = length(a->student.data, first, C, a->dtype);
        double t = length(a->teacher, first, C, a->dtype);
        double cosine = dot(a->student.data, first, a->teacher, first, C, a->dtype) / (s * t);
        a->loss += masked ? (1 - cosine) / a->total : 0;
        for (int64_t c = first; c < first + C; c++) {
            /* d cos / ds = (t/|t| - cos s/|s|) / |s| */
            double slope = (cosine * get(a->student.data, a->dtype, c) / s -
                            get(a->teacher, a->dtype, c) / t) / s;
            put(a->student.slope, a->dtype, c, masked ? slope / a->total : 0);
        }
    }
}

/* ---------------------------------------------------------------- products */

typedef ovlm_status (*walk_fn)(ovlm_run *run, void *args);

static ovlm_status fit_and_walk(ovlm_run *run, walk_fn walk, void *args)
{
    ovlm_backend *backend = run->queue->backend;
    OVLM_TRY(ovlm_stack_fit(run->work, backend, OVLM_STACK_DEVICE, run->work->peak_bytes,
                            run->err));
    OVLM_TRY(ovlm_stack_fit(run->stage, backend, OVLM_STACK_HOST, run->stage->peak_bytes,
                            run->err));
    run->measuring = false;
    return walk(run, args);
}

/* Runs `walk` twice: measuring, then for real, in memory that lives for the call. */
static ovlm_status walk_twice(ovlm_queue *queue, ovlm_dtype dtype, walk_fn walk, void *args,
                              ovlm_err *err)
{
    ovlm_stack work = {0}, stage = {0};
    ovlm_run run = {.queue = queue, .ops = queue->backend->ops, .measuring = true, .keep = &work,
                    .work = &work, .stage = &stage, .dtype = dtype, .exact = dtype, .err = err};
    OVLM_TRY(walk(&run, args));
    ovlm_status status = fit_and_walk(&run, walk, args);
    if (status != OVLM_OK) {
        (void)run.ops->queue_wait(queue, NULL); /* before its memory is freed */
    }
    ovlm_stack_free(&work, queue->backend, OVLM_STACK_DEVICE);
    ovlm_stack_free(&stage, queue->backend, OVLM_STACK_HOST);
    return status;
}

/* Dense rows from the host to the device. */
static ovlm_status put_rows(const ovlm_run *run, ovlm_tensor device, const void *host)
{
    int64_t bytes = device.rows * device.cols * ovlm_dtype_bytes(device.dtype);
    return run->measuring || bytes == 0 ? OVLM_OK
                                        : run->ops->copy(run->queue, device.data, host, bytes,
                                                         OVLM_TO_DEVICE, run->err);
}

/* The other way; waits. */
static ovlm_status get_rows(const ovlm_run *run, void *host, ovlm_tensor device)
{
    int64_t bytes = device.rows * device.cols * ovlm_dtype_bytes(device.dtype);
    if (run->measuring) {
        return OVLM_OK;
    }
    if (bytes > 0) {
        OVLM_TRY(run->ops->copy(run->queue, host, device.data, bytes, OVLM_TO_HOST, run->err));
    }
    return run->ops->queue_wait(run->queue, run->err);
}

static int64_t block_rows(int64_t rows, int64_t cols)
{
    int64_t fit = BLOCK_ELEMENTS / (cols > 0 ? cols : 1);
    fit = fit < BLOCK_ROWS_LEAST ? BLOCK_ROWS_LEAST : fit;
    return rows < fit ? rows : fit;
}

/* From slopes of a block of logits x w^T: dx, and dw is added to. */
static ovlm_status block_back(ovlm_run *run, ovlm_linear *logits, ovlm_tensor slope,
                              ovlm_tensor dx, ovlm_tensor dw)
{
    ovlm_linear back = {.x = slope, .w = logits->w, .w_kn = true, .y = dx};
    RUN(run, linear, fwd, &back);
    logits->dy = slope;
    logits->dw = dw;
    logits->dw_beta = 1;
    RUN(run, linear, bwd, logits);
    return run->measuring ? OVLM_OK : run->ops->queue_wait(run->queue, run->err);
}

/* ---------------------------------------------------------------- pairs */

static void normalise(const ovlm_features *from, ovlm_tensor to)
{
    for (int64_t row = 0; row < from->rows; row++) {
        double size = length(from->data, row * from->cols, from->cols, to.dtype);
        for (int64_t c = row * from->cols; c < (row + 1) * from->cols; c++) {
            put(to.data, to.dtype, c, get(from->data, to.dtype, c) / size);
        }
    }
}

/* dx = (d - xhat <xhat, d>) / |x|. */
static void denormalise(const ovlm_features *to, ovlm_tensor unit, ovlm_tensor d)
{
    for (int64_t row = 0; row < to->rows; row++) {
        int64_t first = row * to->cols;
        double size = length(to->data, first, to->cols, d.dtype);
        double along = dot(unit.data, first, d.data, first, to->cols, d.dtype);
        for (int64_t c = first; c < first + to->cols; c++) {
            put(to->slope, d.dtype, c,
                (get(d.data, d.dtype, c) - along * get(unit.data, d.dtype, c)) / size);
        }
    }
}

/* -log sigmoid(u) = log(1 + e^-u), and sigmoid(-u), without overflow. */
static inline double softplus(double u, double *gate)
{
    double e = exp(-fabs(u));
    *gate = (u > 0 ? e : 1) / (1 + e);
    return fmax(-u, 0) + log1p(e);
}

/* Similarities of images first .. become slopes of theirs. */
static void siglip_pairs(ovlm_siglip *a, int64_t first, ovlm_tensor z)
{
    for (int64_t i = 0; i < z.rows; i++) {
        for (int64_t j = 0; j < z.cols; j++) {
            double similarity = get(z.data, z.dtype, i * z.cols + j), gate = 0;
            double sign = a->offset + first + i == j ? 1 : -1;
            a->loss += softplus(sign * (a->scale * similarity + a->bias), &gate) / a->total;
            double slope = -sign * gate / a->total; /* of scale <x,y> + bias */
            a->dscale += slope * similarity;
            a->dbias += slope;
            put(z.data, z.dtype, i * z.cols + j, slope * a->scale);
        }
    }
}

/* Unit vectors, on the host and on the device. */
static ovlm_status put_units(const ovlm_run *run, const ovlm_features *from, ovlm_tensor host,
                             ovlm_tensor device)
{
    if (!run->measuring) {
        normalise(from, host);
    }
    return put_rows(run, device, host.data);
}

/* From their gradients, by way of the host, to those of the features. */
static ovlm_status get_slopes(const ovlm_run *run, const ovlm_features *to, ovlm_tensor unit,
                              ovlm_tensor device)
{
    ovlm_tensor host = ovlm_stack_tensor(run->stage, device.rows, device.cols, device.dtype);
    OVLM_TRY(get_rows(run, host.data, device));
    if (!run->measuring) {
        denormalise(to, unit, host);
    }
    return OVLM_OK;
}

static ovlm_status siglip_walk(ovlm_run *run, void *args)
{
    ovlm_siglip *a = args;
    int64_t n = a->image.rows, all = a->text.rows, C = a->image.cols, step = block_rows(n, all);
    ovlm_tensor x = ovlm_stack_tensor(run->work, n, C, run->dtype);
    ovlm_tensor y = ovlm_stack_tensor(run->work, all, C, run->dtype);
    ovlm_tensor dx = ovlm_stack_tensor(run->work, n, C, run->dtype);
    ovlm_tensor dy = ovlm_stack_tensor(run->work, all, C, run->exact);
    ovlm_tensor block = ovlm_stack_tensor(run->work, step, all, run->dtype);
    ovlm_tensor host_x = ovlm_stack_tensor(run->stage, n, C, run->dtype);
    ovlm_tensor host_y = ovlm_stack_tensor(run->stage, all, C, run->dtype);
    ovlm_tensor host_block = ovlm_stack_tensor(run->stage, step, all, run->dtype);
    a->loss = a->dscale = a->dbias = 0;
    OVLM_TRY(ovlm_run_zero_tensor(run, &dy));
    OVLM_TRY(put_units(run, &a->image, host_x, x));
    OVLM_TRY(put_units(run, &a->text, host_y, y));
    for (int64_t first = 0; first < n; first += step) {
        int64_t rows = n - first < step ? n - first : step;
        ovlm_tensor z = ovlm_tensor_rows(block, 0, rows);
        ovlm_linear similarity = {.x = ovlm_tensor_rows(x, first, rows), .w = y, .y = z};
        RUN(run, linear, fwd, &similarity);
        OVLM_TRY(get_rows(run, host_block.data, z));
        if (!run->measuring) {
            siglip_pairs(a, first, ovlm_tensor_rows(host_block, 0, rows));
        }
        OVLM_TRY(put_rows(run, z, host_block.data));
        OVLM_TRY(block_back(run, &similarity, z, ovlm_tensor_rows(dx, first, rows), dy));
    }
    OVLM_TRY(get_slopes(run, &a->image, host_x, dx));
    return get_slopes(run, &a->text, host_y, dy);
}

ovlm_status ovlm_siglip_run(ovlm_queue *queue, ovlm_siglip *args, ovlm_err *err)
{
    return walk_twice(queue, args->dtype, siglip_walk, args, err);
}

/* ---------------------------------------------------------------- classes */

/* Logits of one row become (softmax - target) / total. */
static void superclass_row(ovlm_superclass *a, int64_t row, ovlm_tensor z, int64_t i)
{
    int64_t V = z.cols, at = i * V;
    double most = -INFINITY, sum = 0;
    for (int64_t v = 0; v < V; v++) {
        most = fmax(most, get(z.data, z.dtype, at + v));
    }
    int64_t first = 0;
    do { /* there is a class, so the sum is 1 or more */
        sum += exp(get(z.data, z.dtype, at + first) - most);
    } while (++first < V);
    double log_sum = most + log(sum), all = 0;
    for (int64_t k = a->start[row]; k < a->start[row + 1]; k++) {
        a->loss += a->share[k] * (log_sum - get(z.data, z.dtype, at + a->token[k])) / a->total;
        all += a->share[k];
    }
    /* A caption without tokens has no loss and no slope. */
    for (int64_t v = 0; v < V; v++) {
        double p = exp(get(z.data, z.dtype, at + v) - log_sum);
        put(z.data, z.dtype, at + v, all * p / a->total);
    }
    for (int64_t k = a->start[row]; k < a->start[row + 1]; k++) {
        int64_t v = at + a->token[k];
        put(z.data, z.dtype, v, get(z.data, z.dtype, v) - a->share[k] / a->total);
    }
}

static ovlm_status superclass_walk(ovlm_run *run, void *args)
{
    ovlm_superclass *a = args;
    int64_t n = a->feature.rows, V = a->weight.rows, C = a->feature.cols, step = block_rows(n, V);
    ovlm_tensor x = ovlm_stack_tensor(run->work, n, C, run->dtype);
    ovlm_tensor w = ovlm_stack_tensor(run->work, V, C, run->dtype);
    ovlm_tensor dx = ovlm_stack_tensor(run->work, n, C, run->dtype);
    ovlm_tensor dw = ovlm_stack_tensor(run->work, V, C, run->exact);
    ovlm_tensor block = ovlm_stack_tensor(run->work, step, V, run->dtype);
    ovlm_tensor host = ovlm_stack_tensor(run->stage, step, V, run->dtype);
    a->loss = 0;
    OVLM_TRY(ovlm_run_zero_tensor(run, &dw));
    OVLM_TRY(put_rows(run, x, a->feature.data));
    OVLM_TRY(put_rows(run, w, a->weight.data));
    for (int64_t first = 0; first < n; first += step) {
        int64_t rows = n - first < step ? n - first : step;
        ovlm_tensor z = ovlm_tensor_rows(block, 0, rows);
        ovlm_linear logits = {.x = ovlm_tensor_rows(x, first, rows), .y = z, .w = w};
        RUN(run, linear, fwd, &logits);
        OVLM_TRY(get_rows(run, host.data, z));
        for (int64_t i = 0; i < rows && !run->measuring; i++) {
            superclass_row(a, first + i, host, i);
        }
        OVLM_TRY(put_rows(run, z, host.data));
        OVLM_TRY(block_back(run, &logits, z, ovlm_tensor_rows(dx, first, rows), dw));
    }
    OVLM_TRY(get_rows(run, a->feature.slope, dx));
    return get_rows(run, a->weight.slope, dw);
}

ovlm_status ovlm_superclass_run(ovlm_queue *queue, ovlm_superclass *args, ovlm_err *err)
{
    return walk_twice(queue, args->dtype, superclass_walk, args, err);
}
