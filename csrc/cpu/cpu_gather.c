/* cpu_gather.c - weighted sums of indexed rows, and patches of images.
 *
 * Parallel over the rows that are written.  Where indices repeat, the backward first sorts the taps
 * by the row that they read (a counting sort, in the order of the taps), so that each row of dx is
 * one thread's and its sum has one order. */
#include "cpu/cpu_load.h"

/* Columns at once: they stay in the first-level cache while several rows are added. */
enum { GATHER_COLUMNS = 2048 };

static float weight_of(const ovlm_gather *a, int64_t slot)
{
    if (!ovlm_tensor_given(&a->weight)) {
        return 1;
    }
    return *(float *)ovlm_cpu_at(&a->weight, slot / a->taps, slot % a->taps);
}

/* What a row of the backward adds up: taps order[first[s]] .. order[first[s+1]-1]. */
typedef struct gather_back {
    const ovlm_gather *a;
    const int32_t *first, *order;
} gather_back;

ovlm_status ovlm_cpu_gather_measure(ovlm_backend *backend, const ovlm_gather *a,
                                    ovlm_op_bytes *bytes, ovlm_err *err)
{
    (void)backend;
    OVLM_CPU_CHECK(gather, a, MEASURE, err);
    *bytes = (ovlm_op_bytes){0};
    if (!a->unique) {
        int64_t rows = a->dx.rows > a->x.rows ? a->dx.rows : a->x.rows;
        int64_t taken = a->dy.rows > a->y.rows ? a->dy.rows : a->y.rows;
        bytes->bwd_work = (rows + 1 + taken * a->taps) * (int64_t)sizeof(int32_t);
    }
    return OVLM_OK;
}

static void forward_rows(const void *context, int64_t first, int64_t count, float *scratch)
{
    const ovlm_gather *a = context;
    float *x = scratch, *y = scratch + GATHER_COLUMNS;
    for (int64_t t = first; t < first + count; t++) {
        for (int64_t c = 0; c < a->y.cols; c += GATHER_COLUMNS) {
            int64_t n = a->y.cols - c < GATHER_COLUMNS ? a->y.cols - c : GATHER_COLUMNS;
            float *out = ovlm_cpu_row_out(&a->y, t, c, y);
            if (a->y_beta == 0) {
                memset(out, 0, (size_t)n * sizeof *out);
            } else if (out == y) {
                (void)ovlm_cpu_row(&a->y, t, c, n, y);
            }
            for (int64_t slot = t * a->taps; slot < (t + 1) * a->taps; slot++) {
                if (a->index[slot] >= 0) {
                    ovlm_cpu_add_scaled(out, ovlm_cpu_row(&a->x, a->index[slot], c, n, x),
                               weight_of(a, slot), n);
                }
            }
            ovlm_cpu_row_done(&a->y, t, c, n, y);
        }
    }
}

static ovlm_status check_index(const ovlm_gather *a, int64_t rows, int64_t slots, ovlm_err *err)
{
    for (int64_t i = 0; i < slots; i++) {
        if (a->index[i] < -1 || a->index[i] >= rows) {
            return OVLM_FAIL(err, OVLM_E_ARG,
                             "gather: index[%lld] is %d; it must be in [-1, %lld)", (long long)i,
                             (int)a->index[i], (long long)rows);
        }
    }
    return OVLM_OK;
}

ovlm_status ovlm_cpu_gather_fwd(ovlm_queue *queue, const ovlm_gather *a, ovlm_err *err)
{
    OVLM_CPU_CHECK(gather, a, FWD, err);
    OVLM_TRY(check_index(a, a->x.rows, a->y.rows * a->taps, err));
    ovlm_cpu_rows(ovlm_cpu_of(queue), a->y.rows, (a->taps + 1) * a->y.cols, forward_rows, a);
    return OVLM_OK;
}

/* dx[row] = beta dx[row] + the taps of order[0 .. n-1]. */
static void backward_row(const ovlm_gather *a, int64_t row, const int32_t *order, int64_t n_taps,
                         float beta, float *scratch)
{
    float *dy = scratch, *dx = scratch + GATHER_COLUMNS;
    for (int64_t c = 0; c < a->dx.cols; c += GATHER_COLUMNS) {
        int64_t n = a->dx.cols - c < GATHER_COLUMNS ? a->dx.cols - c : GATHER_COLUMNS;
        float *out = ovlm_cpu_row_out(&a->dx, row, c, dx);
        if (beta == 0) {
            memset(out, 0, (size_t)n * sizeof *out);
        } else if (out == dx) {
            (void)ovlm_cpu_row(&a->dx, row, c, n, dx);
        }
        for (int64_t i = 0; i < n_taps; i++) {
            ovlm_cpu_add_scaled(out, ovlm_cpu_row(&a->dy, order[i] / a->taps, c, n, dy),
                       weight_of(a, order[i]), n);
        }
        ovlm_cpu_row_done(&a->dx, row, c, n, dx);
    }
}

static void backward_rows(const void *context, int64_t first, int64_t count, float *scratch)
{
    const gather_back *g = context;
    for (int64_t row = first; row < first + count; row++) {
        int64_t n = g->first[row + 1] - g->first[row];
        if (n > 0 || g->a->dx_beta == 0) {
            backward_row(g->a, row, g->order + g->first[row], n, g->a->dx_beta, scratch);
        }
    }
}

static void scatter_rows(const void *context, int64_t first, int64_t count, float *scratch)
{
    const ovlm_gather *a = context;
    for (int64_t slot = first * a->taps; slot < (first + count) * a->taps; slot++) {
        int32_t tap = (int32_t)slot;
        if (a->index[slot] >= 0) {
            backward_row(a, a->index[slot], &tap, 1, a->dx_beta, scratch);
        }
    }
}

/* Counts, then starts, then each tap to its place; first[] ends up as starts again. */
static void sort_taps(const ovlm_gather *a, int32_t *first, int32_t *order)
{
    int64_t rows = a->dx.rows, slots = a->dy.rows * a->taps;
    memset(first, 0, (size_t)(rows + 1) * sizeof *first);
    for (int64_t slot = 0; slot < slots; slot++) {
        if (a->index[slot] >= 0) {
            first[a->index[slot] + 1]++;
        }
    }
    for (int64_t row = 0; row < rows; row++) {
        first[row + 1] += first[row];
    }
    for (int64_t slot = 0; slot < slots; slot++) {
        if (a->index[slot] >= 0) {
            order[first[a->index[slot]]++] = (int32_t)slot;
        }
    }
    memmove(first + 1, first, (size_t)rows * sizeof *first);
    first[0] = 0;
}

ovlm_status ovlm_cpu_gather_bwd(ovlm_queue *queue, const ovlm_gather *a, ovlm_err *err)
{
    OVLM_CPU_CHECK(gather, a, BWD, err);
    if (a->dy.rows * a->taps > INT32_MAX) {
        return OVLM_FAIL(err, OVLM_E_ARG, "gather: %lld taps do not fit 32 bits; use fewer rows",
                         (long long)(a->dy.rows * a->taps));
    }
    OVLM_TRY(check_index(a, a->dx.rows, a->dy.rows * a->taps, err));
    ovlm_cpu *cpu = ovlm_cpu_of(queue);
    if (a->unique) {
        if (a->dx_beta == 0) {
            ovlm_cpu_clear(cpu, &a->dx);
        }
        ovlm_cpu_rows(cpu, a->dy.rows, a->taps * a->dy.cols, scatter_rows, a);
        return OVLM_OK;
    }
    int32_t *first = a->scratch.work, *order = first + a->dx.rows + 1;
    sort_taps(a, first, order);
    gather_back g = {a, first, order};
    ovlm_cpu_rows(cpu, a->dx.rows, a->dx.cols, backward_rows, &g);
    return OVLM_OK;
}

/* ---- unfold ---- */

typedef struct grid {
    const ovlm_unfold *a;
    int64_t out_h, out_w;
} grid;

static grid grid_of(const ovlm_unfold *a)
{
    grid g = {a, (a->height + 2 * a->padding - a->kernel_height) / a->stride + 1,
              (a->width + 2 * a->padding - a->kernel_width) / a->stride + 1};
    return g;
}

ovlm_status ovlm_cpu_unfold_measure(ovlm_backend *backend, const ovlm_unfold *a,
                                    ovlm_op_bytes *bytes, ovlm_err *err)
{
    (void)backend;
    OVLM_CPU_CHECK(unfold, a, MEASURE, err);
    *bytes = (ovlm_op_bytes){0};
    return OVLM_OK;
}

/* Copies elements as they are: 2 or 4 bytes. */
static void copy_element(void *to, const void *from, int64_t bytes)
{
    if (bytes == 4) {
        memcpy(to, from, 4);
    } else {
        memcpy(to, from, 2);
    }
}

static void unfold_rows(const void *context, int64_t first, int64_t count, float *scratch)
{
    (void)scratch;
    const grid *g = context;
    const ovlm_unfold *a = g->a;
    int64_t bytes = ovlm_dtype_bytes(a->y.dtype), taps = a->kernel_height * a->kernel_width;
    for (int64_t row = first; row < first + count; row++) {
        int64_t image = row / (g->out_h * g->out_w), place = row % (g->out_h * g->out_w);
        char *y = ovlm_cpu_at(&a->y, row, 0);
        for (int64_t tap = 0; tap < taps; tap++) {
            int64_t i = place / g->out_w * a->stride + tap / a->kernel_width - a->padding;
            int64_t j = place % g->out_w * a->stride + tap % a->kernel_width - a->padding;
            if (i < 0 || i >= a->height || j < 0 || j >= a->width) {
                for (int64_t c = 0; c < a->x.cols; c++) {
                    memset(y + (c * taps + tap) * bytes, 0, (size_t)bytes);
                }
                continue;
            }
            const char *x = ovlm_cpu_at(&a->x, (image * a->height + i) * a->width + j, 0);
            for (int64_t c = 0; c < a->x.cols; c++) {
                copy_element(y + (c * taps + tap) * bytes, x + c * bytes, bytes);
            }
        }
    }
}

ovlm_status ovlm_cpu_unfold_fwd(ovlm_queue *queue, const ovlm_unfold *a, ovlm_err *err)
{
    OVLM_CPU_CHECK(unfold, a, FWD, err);
    grid g = grid_of(a);
    ovlm_cpu_rows(ovlm_cpu_of(queue), a->y.rows, 2 * a->y.cols, unfold_rows, &g);
    return OVLM_OK;
}

/* A pixel collects from the patches that hold it, tap by tap. */
static void fold_rows(const void *context, int64_t first, int64_t count, float *scratch)
{
    const grid *g = context;
    const ovlm_unfold *a = g->a;
    int64_t taps = a->kernel_height * a->kernel_width, size = ovlm_dtype_bytes(a->dy.dtype);
    for (int64_t row = first; row < first + count; row++) {
        int64_t j = row % a->width, i = row / a->width % a->height;
        int64_t image = row / (a->width * a->height);
        float *dx = ovlm_cpu_row_out(&a->dx, row, 0, scratch);
        memset(dx, 0, (size_t)a->dx.cols * sizeof *dx);
        for (int64_t tap = 0; tap < taps; tap++) {
            int64_t top = i + a->padding - tap / a->kernel_width;
            int64_t left = j + a->padding - tap % a->kernel_width;
            if (top < 0 || left < 0 || top % a->stride != 0 || left % a->stride != 0 ||
                top / a->stride >= g->out_h || left / a->stride >= g->out_w) {
                continue;
            }
            int64_t patch = (image * g->out_h + top / a->stride) * g->out_w + left / a->stride;
            const char *dy = ovlm_cpu_at(&a->dy, patch, tap);
            for (int64_t c = 0; c < a->dx.cols; c++) {
                float value;
                ovlm_cpu_load(&value, dy + c * taps * size, 1, a->dy.dtype);
                dx[c] += value;
            }
        }
        ovlm_cpu_row_done(&a->dx, row, 0, a->dx.cols, scratch);
    }
}

ovlm_status ovlm_cpu_unfold_bwd(ovlm_queue *queue, const ovlm_unfold *a, ovlm_err *err)
{
    OVLM_CPU_CHECK(unfold, a, BWD, err);
    OVLM_TRY(ovlm_cpu_fits("unfold: columns of dx", a->dx.cols, err));
    grid g = grid_of(a);
    ovlm_cpu_rows(ovlm_cpu_of(queue), a->dx.rows,
                  a->kernel_height * a->kernel_width * a->dx.cols, fold_rows, &g);
    return OVLM_OK;
}
