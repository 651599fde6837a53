/* ref_rows.c - reference of gather, scale, unfold and combine. */
#include "cpu/ref.h"

/* ---- gather ---- */

/* Backward: sums of one row of dx. */
ovlm_status ovlm_ref_gather_measure(ovlm_backend *backend, const ovlm_gather *a,
                                    ovlm_op_bytes *bytes, ovlm_err *err)
{
    (void)backend;
    *bytes = (ovlm_op_bytes){0};
    OVLM_TRY(ovlm_op_check_gather(a, OVLM_PASS_MEASURE, err));
    bytes->bwd_work = a->x.cols * (int64_t)sizeof(double);
    return OVLM_OK;
}

/* The first slot whose index is outside [-1, rows), or -1. */
static int64_t gather_fault(const ovlm_gather *a, int64_t slots, int64_t rows)
{
    for (int64_t i = 0; i < slots; i++) {
        if (a->index[i] < -1 || a->index[i] >= rows) {
            return i;
        }
    }
    return -1;
}

static double gather_weight(const ovlm_gather *a, int64_t t, int64_t j)
{
    return ovlm_tensor_given(&a->weight) ? ovlm_ref_at(&a->weight, t, j) : 1;
}

ovlm_status ovlm_ref_gather_fwd(ovlm_queue *queue, const ovlm_gather *a, ovlm_err *err)
{
    OVLM_TRY(ovlm_op_check_gather(a, OVLM_PASS_FWD, err));
    int64_t fault = gather_fault(a, a->y.rows * a->taps, a->x.rows);
    if (fault >= 0) {
        OVLM_REF_LATE(queue, "gather forward: index[%lld] is %d; it must be in [-1, %lld)",
                      (long long)fault, (int)a->index[fault], (long long)a->x.rows);
    }
    for (int64_t t = 0; t < a->y.rows; t++) {
        for (int64_t c = 0; c < a->y.cols; c++) {
            double sum = 0;
            for (int64_t j = 0; j < a->taps; j++) {
                int64_t s = a->index[t * a->taps + j];
                sum += s < 0 ? 0 : gather_weight(a, t, j) * ovlm_ref_at(&a->x, s, c);
            }
            ovlm_ref_add(&a->y, t, c, sum, (double)a->y_beta);
        }
    }
    return OVLM_OK;
}

ovlm_status ovlm_ref_gather_bwd(ovlm_queue *queue, const ovlm_gather *a, ovlm_err *err)
{
    OVLM_TRY(ovlm_op_check_gather(a, OVLM_PASS_BWD, err));
    int64_t slots = a->dy.rows * a->taps, fault = gather_fault(a, slots, a->dx.rows);
    if (fault >= 0) {
        OVLM_REF_LATE(queue, "gather backward: index[%lld] is %d; it must be in [-1, %lld)",
                      (long long)fault, (int)a->index[fault], (long long)a->dx.rows);
    }
    double *sum = a->scratch.work;
    for (int64_t s = 0; s < a->dx.rows; s++) {
        int64_t found = 0;
        memset(sum, 0, (size_t)a->dx.cols * sizeof *sum);
        for (int64_t i = 0; i < slots; i++) {
            if (a->index[i] != s) {
                continue;
            }
            found++;
            for (int64_t c = 0; c < a->dx.cols; c++) {
                sum[c] += gather_weight(a, i / a->taps, i % a->taps) *
                          ovlm_ref_at(&a->dy, i / a->taps, c);
            }
        }
        if (found > 1 && a->unique) {
            OVLM_REF_LATE(queue, "gather backward: unique is set, but row %lld is read %lld times",
                          (long long)s, (long long)found);
        }
        for (int64_t c = 0; c < a->dx.cols; c++) {
            ovlm_ref_add(&a->dx, s, c, sum[c], (double)a->dx_beta);
        }
    }
    return OVLM_OK;
}

/* ---- scale ---- */

ovlm_status ovlm_ref_scale_measure(ovlm_backend *backend, const ovlm_scale *a,
                                   ovlm_op_bytes *bytes, ovlm_err *err)
{
    (void)backend;
    *bytes = (ovlm_op_bytes){0};
    return ovlm_op_check_scale(a, OVLM_PASS_MEASURE, err);
}

ovlm_status ovlm_ref_scale_fwd(ovlm_queue *queue, const ovlm_scale *a, ovlm_err *err)
{
    (void)queue;
    OVLM_TRY(ovlm_op_check_scale(a, OVLM_PASS_FWD, err));
    for (int64_t t = 0; t < a->y.rows; t++) {
        for (int64_t c = 0; c < a->y.cols; c++) {
            double scale = ovlm_tensor_given(&a->scale) ? ovlm_ref_at(&a->scale, 0, c) : 1;
            double shift = ovlm_tensor_given(&a->shift) ? ovlm_ref_at(&a->shift, 0, c) : 0;
            double y = a->alpha * scale * ovlm_ref_at(&a->x, t, c) + shift;
            ovlm_ref_add(&a->y, t, c, y, a->beta);
        }
    }
    return OVLM_OK;
}

ovlm_status ovlm_ref_scale_bwd(ovlm_queue *queue, const ovlm_scale *a, ovlm_err *err)
{
    (void)queue;
    OVLM_TRY(ovlm_op_check_scale(a, OVLM_PASS_BWD, err));
    for (int64_t t = 0; t < a->dx.rows; t++) {
        for (int64_t c = 0; c < a->dx.cols; c++) {
            double scale = ovlm_tensor_given(&a->scale) ? ovlm_ref_at(&a->scale, 0, c) : 1;
            ovlm_ref_add(&a->dx, t, c, a->alpha * scale * ovlm_ref_at(&a->dy, t, c),
                         (double)a->dx_beta);
        }
    }
    return OVLM_OK;
}

/* ---- unfold ---- */

ovlm_status ovlm_ref_unfold_measure(ovlm_backend *backend, const ovlm_unfold *a,
                                    ovlm_op_bytes *bytes, ovlm_err *err)
{
    (void)backend;
    *bytes = (ovlm_op_bytes){0};
    return ovlm_op_check_unfold(a, OVLM_PASS_MEASURE, err);
}

static int64_t unfold_rows(const ovlm_unfold *a)
{
    return (a->height + 2 * a->padding - a->kernel_height) / a->stride + 1;
}

static int64_t unfold_cols(const ovlm_unfold *a)
{
    return (a->width + 2 * a->padding - a->kernel_width) / a->stride + 1;
}

/* Row of x under pixel (ky, kx) of the kernel at patch p; -1 in the padding. */
static int64_t unfold_source(const ovlm_unfold *a, int64_t p, int64_t ky, int64_t kx)
{
    int64_t out_w = unfold_cols(a), out_h = unfold_rows(a);
    int64_t image = p / (out_w * out_h);
    int64_t row = p / out_w % out_h * a->stride + ky - a->padding;
    int64_t col = p % out_w * a->stride + kx - a->padding;
    bool inside = row >= 0 && row < a->height && col >= 0 && col < a->width;
    return inside ? (image * a->height + row) * a->width + col : -1;
}

ovlm_status ovlm_ref_unfold_fwd(ovlm_queue *queue, const ovlm_unfold *a, ovlm_err *err)
{
    (void)queue;
    OVLM_TRY(ovlm_op_check_unfold(a, OVLM_PASS_FWD, err));
    int64_t area = a->kernel_height * a->kernel_width;
    for (int64_t p = 0; p < a->y.rows; p++) {
        for (int64_t c = 0; c < a->y.cols; c++) {
            int64_t s = unfold_source(a, p, c % area / a->kernel_width, c % a->kernel_width);
            ovlm_ref_put(&a->y, p, c, s < 0 ? 0 : ovlm_ref_at(&a->x, s, c / area));
        }
    }
    return OVLM_OK;
}

/* What the patches hand back to channel c of pixel (image, row, col). */
static double unfold_sum(const ovlm_unfold *a, int64_t image, int64_t row, int64_t col, int64_t c)
{
    int64_t out_h = unfold_rows(a), out_w = unfold_cols(a);
    double sum = 0;
    for (int64_t ky = 0; ky < a->kernel_height; ky++) {
        for (int64_t kx = 0; kx < a->kernel_width; kx++) {
            int64_t y = row + a->padding - ky, x = col + a->padding - kx;
            if (y < 0 || x < 0 || y % a->stride != 0 || x % a->stride != 0 ||
                y / a->stride >= out_h || x / a->stride >= out_w) {
                continue;
            }
            int64_t p = (image * out_h + y / a->stride) * out_w + x / a->stride;
            sum += ovlm_ref_at(&a->dy, p, (c * a->kernel_height + ky) * a->kernel_width + kx);
        }
    }
    return sum;
}

ovlm_status ovlm_ref_unfold_bwd(ovlm_queue *queue, const ovlm_unfold *a, ovlm_err *err)
{
    (void)queue;
    OVLM_TRY(ovlm_op_check_unfold(a, OVLM_PASS_BWD, err));
    int64_t area = a->height * a->width;
    for (int64_t s = 0; s < a->dx.rows; s++) {
        for (int64_t c = 0; c < a->dx.cols; c++) {
            double sum = unfold_sum(a, s / area, s % area / a->width, s % a->width, c);
            ovlm_ref_put(&a->dx, s, c, sum);
        }
    }
    return OVLM_OK;
}

/* ---- combine ---- */

ovlm_status ovlm_ref_combine_measure(ovlm_backend *backend, const ovlm_combine *a,
                                     ovlm_op_bytes *bytes, ovlm_err *err)
{
    (void)backend;
    *bytes = (ovlm_op_bytes){0};
    return ovlm_op_check_combine(a, OVLM_PASS_MEASURE, err);
}

/* The slot's row among the `rows` of the call, or -1. */
static int64_t combine_row(const ovlm_combine *a, int64_t rows, int64_t slot)
{
    int64_t row = a->row[slot] - a->first;
    return a->row[slot] >= 0 && row < rows && row >= 0 ? row : -1;
}

static double combine_weight(const ovlm_combine *a, int64_t t, int64_t j)
{
    return ovlm_tensor_given(&a->weight) ? ovlm_ref_at(&a->weight, t, j) : 1;
}

ovlm_status ovlm_ref_combine_fwd(ovlm_queue *queue, const ovlm_combine *a, ovlm_err *err)
{
    (void)queue;
    OVLM_TRY(ovlm_op_check_combine(a, OVLM_PASS_FWD, err));
    for (int64_t t = 0; t < a->y.rows; t++) {
        for (int64_t c = 0; c < a->y.cols; c++) {
            double sum = ovlm_tensor_given(&a->add) ? ovlm_ref_at(&a->add, t, c) : 0;
            for (int64_t j = 0; j < a->k; j++) {
                int64_t r = combine_row(a, a->h.rows, t * a->k + j);
                sum += r < 0 ? 0 : combine_weight(a, t, j) * ovlm_ref_at(&a->h, r, c);
            }
            ovlm_ref_put(&a->y, t, c, sum);
        }
    }
    return OVLM_OK;
}

ovlm_status ovlm_ref_combine_bwd(ovlm_queue *queue, const ovlm_combine *a, ovlm_err *err)
{
    (void)queue;
    OVLM_TRY(ovlm_op_check_combine(a, OVLM_PASS_BWD, err));
    bool with_dh = ovlm_tensor_given(&a->dh), with_dweight = ovlm_tensor_given(&a->dweight);
    int64_t rows = with_dweight ? a->h.rows : a->dh.rows;
    for (int64_t i = 0; i < a->dy.rows * a->k; i++) {
        int64_t t = i / a->k, j = i % a->k, r = combine_row(a, rows, i);
        double dweight = 0;
        for (int64_t c = 0; r >= 0 && c < a->dy.cols; c++) {
            double dy = ovlm_ref_at(&a->dy, t, c);
            if (with_dh) {
                ovlm_ref_put(&a->dh, r, c, combine_weight(a, t, j) * dy);
            }
            dweight += with_dweight ? dy * ovlm_ref_at(&a->h, r, c) : 0;
        }
        if (with_dweight && (r >= 0 || a->row[i] < 0)) {
            ovlm_ref_put(&a->dweight, t, j, dweight);
        }
    }
    return OVLM_OK;
}
