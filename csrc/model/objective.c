/* objective.c - masked features, pairs and classes: the losses and their slopes. */
#include "model/objective.h"

#include "cpu/cpu.h"
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

/* Runs `walk` twice over a backend of its own: measuring, then for real. */
typedef ovlm_status (*walk_fn)(ovlm_run *run, void *args);

static ovlm_status walk_twice(ovlm_run *run, walk_fn walk, void *args)
{
    ovlm_stack work = {0};
    run->work = run->keep = &work;
    run->measuring = true;
    OVLM_TRY(walk(run, args));
    ovlm_status status = ovlm_stack_fit(&work, run->queue->backend, OVLM_STACK_DEVICE,
                                        work.peak_bytes, run->err);
    if (status == OVLM_OK) {
        run->measuring = false;
        status = walk(run, args);
    }
    if (status == OVLM_OK) {
        status = run->ops->queue_wait(run->queue, run->err);
    }
    ovlm_stack_free(&work, run->queue->backend, OVLM_STACK_DEVICE);
    return status;
}

static ovlm_status on_host(ovlm_dtype dtype, int64_t threads, walk_fn walk, void *args,
                           ovlm_err *err)
{
    const ovlm_ops *ops = ovlm_cpu_ops_find(dtype == OVLM_F64 ? "ref" : "cpu");
    ovlm_backend *backend = NULL;
    OVLM_TRY(ops->open(&(ovlm_backend_options){.threads = threads}, &backend, err));
    ovlm_run run = {.ops = ops, .dtype = dtype, .exact = dtype, .err = err};
    ovlm_status status = ops->queue_open(backend, &run.queue, err);
    if (status == OVLM_OK) {
        status = walk_twice(&run, walk, args);
        ops->queue_close(run.queue);
    }
    ops->close(backend);
    return status;
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

static ovlm_tensor view(const void *data, int64_t rows, int64_t cols, ovlm_dtype dtype)
{
    return ovlm_tensor_of((void *)(uintptr_t)data, rows, cols, dtype);
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

static ovlm_status siglip_walk(ovlm_run *run, void *args)
{
    ovlm_siglip *a = args;
    int64_t n = a->image.rows, all = a->text.rows, C = a->image.cols;
    ovlm_tensor x = ovlm_stack_tensor(run->work, n, C, run->dtype);
    ovlm_tensor y = ovlm_stack_tensor(run->work, all, C, run->dtype);
    ovlm_tensor dx = ovlm_stack_tensor(run->work, n, C, run->dtype);
    ovlm_tensor dy = ovlm_stack_tensor(run->work, all, C, run->exact);
    int64_t step = block_rows(n, all);
    ovlm_tensor block = ovlm_stack_tensor(run->work, step, all, run->dtype);
    a->loss = a->dscale = a->dbias = 0;
    OVLM_TRY(ovlm_run_zero_tensor(run, &dy));
    if (!run->measuring) {
        normalise(&a->image, x);
        normalise(&a->text, y);
    }
    for (int64_t first = 0; first < n; first += step) {
        int64_t rows = n - first < step ? n - first : step;
        ovlm_tensor z = ovlm_tensor_rows(block, 0, rows);
        ovlm_linear similarity = {.x = ovlm_tensor_rows(x, first, rows), .w = y, .y = z};
        RUN(run, linear, fwd, &similarity);
        if (!run->measuring) {
            OVLM_TRY(run->ops->queue_wait(run->queue, run->err));
            siglip_pairs(a, first, z);
        }
        OVLM_TRY(block_back(run, &similarity, z, ovlm_tensor_rows(dx, first, rows), dy));
    }
    if (!run->measuring) {
        denormalise(&a->image, x, dx);
        denormalise(&a->text, y, dy);
    }
    return OVLM_OK;
}

ovlm_status ovlm_siglip_run(ovlm_siglip *args, ovlm_err *err)
{
    return on_host(args->dtype, args->threads, siglip_walk, args, err);
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
    int64_t n = a->feature.rows, V = a->weight.rows, C = a->feature.cols;
    int64_t step = block_rows(n, V);
    ovlm_tensor block = ovlm_stack_tensor(run->work, step, V, run->dtype);
    ovlm_tensor x = view(a->feature.data, n, C, run->dtype);
    ovlm_tensor dx = view(a->feature.slope, n, C, run->dtype);
    ovlm_tensor dw = view(a->weight.slope, V, C, run->exact);
    a->loss = 0;
    OVLM_TRY(ovlm_run_zero_tensor(run, &dw));
    for (int64_t first = 0; first < n; first += step) {
        int64_t rows = n - first < step ? n - first : step;
        ovlm_tensor z = ovlm_tensor_rows(block, 0, rows);
        ovlm_linear logits = {.x = ovlm_tensor_rows(x, first, rows), .y = z,
                              .w = view(a->weight.data, V, C, run->dtype)};
        RUN(run, linear, fwd, &logits);
        if (!run->measuring) {
            OVLM_TRY(run->ops->queue_wait(run->queue, run->err));
        }
        for (int64_t i = 0; i < rows && !run->measuring; i++) {
            superclass_row(a, first + i, z, i);
        }
        OVLM_TRY(block_back(run, &logits, z, ovlm_tensor_rows(dx, first, rows), dw));
    }
    return OVLM_OK;
}

ovlm_status ovlm_superclass_run(ovlm_superclass *args, ovlm_err *err)
{
    return on_host(args->dtype, args->threads, superclass_walk, args, err);
}
