/* cpu_norm.c - LayerNorm and RMSNorm over parts of a row.
 *
 *   y = (x - mean)/sqrt(var + eps) w + bias       (LayerNorm; Ba, Kiros, Hinton 2016, eq. 3, 4)
 *   y = x/sqrt(mean(x^2) + eps) w                 (RMSNorm; Zhang, Sennrich 2019, eq. 4)
 *
 * Parallel over rows.  Saved for the backward: mean and 1/sqrt of each part.  Gradients of the
 * weight are summed in fixed chunks of rows. */
#include <math.h>

#include "cpu/cpu_load.h"

/* One part of a row: n elements. */
typedef struct part {
    const float *x, *w, *bias, *dy;
    float *y;                       /* or dx            */
    float *dw, *dbias;              /* added to; may be NULL */
    int64_t n;
    float eps;
    float mean, rstd;
    bool rms, biased, add;          /* add to dx */
} part;

OVLM_CPU_INLINE float sum_of(const float *x, int64_t n)
{
    ovlm_f8 sum[2] = {{0}, {0}};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        sum[0] += ovlm_f8_load(x + i);
        sum[1] += ovlm_f8_load(x + i + 8);
    }
    for (; i < n; i += 8) {
        sum[0] += n - i < 8 ? ovlm_f8_load_part(x + i, n - i) : ovlm_f8_load(x + i);
    }
    sum[0] += sum[1];
    return ovlm_f8_sum(&sum[0]);
}

/* sum of (x - mean)^2 */
OVLM_CPU_INLINE float spread_of(const float *x, float mean, int64_t n)
{
    ovlm_f8 sum[2] = {{0}, {0}}, m = ovlm_f8_all(mean);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        ovlm_f8 a = ovlm_f8_load(x + i) - m, b = ovlm_f8_load(x + i + 8) - m;
        sum[0] += a * a;
        sum[1] += b * b;
    }
    float rest = 0;
    for (; i < n; i++) {
        rest += (x[i] - mean) * (x[i] - mean);
    }
    sum[0] += sum[1];
    return ovlm_f8_sum(&sum[0]) + rest;
}

OVLM_CPU_INLINE void norm_part_body(part *p)
{
    float inverse = 1 / (float)p->n;
    p->mean = p->rms ? 0 : sum_of(p->x, p->n) * inverse;
    float spread = p->rms ? ovlm_f8_dot(p->x, p->x, p->n) : spread_of(p->x, p->mean, p->n);
    p->rstd = 1 / sqrtf(spread * inverse + p->eps);
    float mean = p->mean, rstd = p->rstd;
    const float *restrict x = p->x, *restrict w = p->w, *restrict bias = p->bias;
    float *restrict y = p->y;
    if (p->biased) {
        for (int64_t i = 0; i < p->n; i++) {
            y[i] = (x[i] - mean) * rstd * w[i] + bias[i];
        }
    } else {
        for (int64_t i = 0; i < p->n; i++) {
            y[i] = (x[i] - mean) * rstd * w[i];
        }
    }
}
OVLM_CPU_KERNEL(norm_part, (part *p), (p))

/* With xhat = (x - mean) rstd and g = dy w:  dx = rstd (g - mean(g) - xhat mean(g xhat)), without
 * mean(g) for RMSNorm; dw += dy xhat, dbias += dy. */
OVLM_CPU_INLINE void norm_part_back_body(part *p)
{
    const float *restrict x = p->x, *restrict w = p->w, *restrict dy = p->dy;
    float *restrict dx = p->y;
    float mean = p->mean, rstd = p->rstd;
    if (dx != NULL) {
        ovlm_f8 g_sum = {0}, gx_sum = {0}, m = ovlm_f8_all(mean);
        int64_t i = 0;
        for (; i + 8 <= p->n; i += 8) {
            ovlm_f8 g = ovlm_f8_load(dy + i) * ovlm_f8_load(w + i);
            g_sum += g;
            gx_sum += g * (ovlm_f8_load(x + i) - m);
        }
        float g_rest = 0, gx_rest = 0;
        for (; i < p->n; i++) {
            float g = dy[i] * w[i];
            g_rest += g;
            gx_rest += g * (x[i] - mean);
        }
        float inverse = 1 / (float)p->n;
        float g_mean = p->rms ? 0 : (ovlm_f8_sum(&g_sum) + g_rest) * inverse;
        float slope = (ovlm_f8_sum(&gx_sum) + gx_rest) * inverse * rstd * rstd;
        if (p->add) {
            for (i = 0; i < p->n; i++) {
                dx[i] += rstd * (dy[i] * w[i] - g_mean - (x[i] - mean) * slope);
            }
        } else {
            for (i = 0; i < p->n; i++) {
                dx[i] = rstd * (dy[i] * w[i] - g_mean - (x[i] - mean) * slope);
            }
        }
    }
    float *restrict dw = p->dw, *restrict dbias = p->dbias;
    if (dw != NULL) {
        for (int64_t i = 0; i < p->n; i++) {
            dw[i] += dy[i] * ((x[i] - mean) * rstd);
        }
    }
    if (dbias != NULL) {
        for (int64_t i = 0; i < p->n; i++) {
            dbias[i] += dy[i];
        }
    }
}
OVLM_CPU_KERNEL(norm_part_back, (part *p), (p))

static bool sums_weights(const ovlm_norm *a)
{
    return ovlm_tensor_given(&a->dw) || ovlm_tensor_given(&a->dbias);
}

ovlm_status ovlm_cpu_norm_measure(ovlm_backend *backend, const ovlm_norm *a, ovlm_op_bytes *bytes,
                                  ovlm_err *err)
{
    (void)backend;
    OVLM_CPU_CHECK(norm, a, MEASURE, err);
    int64_t chunks = sums_weights(a) ? ovlm_cpu_chunks(a->x.rows) : 0;
    *bytes = (ovlm_op_bytes){.saved = a->x.rows * a->groups * 2 * (int64_t)sizeof(float),
                             .bwd_work = chunks * 2 * a->w.cols * (int64_t)sizeof(float)};
    return OVLM_OK;
}

static void forward_rows(const void *context, int64_t first, int64_t count, float *scratch)
{
    const ovlm_norm *a = context;
    int64_t n = a->w.cols;
    float *saved = a->scratch.saved, *x = scratch, *y = scratch + OVLM_CPU_ROW;
    part p = {.n = n, .eps = (float)a->eps, .rms = a->rms,
              .biased = ovlm_tensor_given(&a->bias)};
    p.w = ovlm_cpu_row(&a->w, 0, 0, n, scratch + 2 * OVLM_CPU_ROW);
    if (p.biased) {
        p.bias = ovlm_cpu_row(&a->bias, 0, 0, n, scratch + 3 * OVLM_CPU_ROW);
    }
    for (int64_t row = first; row < first + count; row++) {
        for (int64_t group = 0; group < a->groups; group++) {
            p.x = ovlm_cpu_row(&a->x, row, group * n, n, x);
            p.y = ovlm_cpu_row_out(&a->y, row, group * n, y);
            norm_part(&p);
            ovlm_cpu_row_done(&a->y, row, group * n, n, y);
            float *kept = saved + 2 * (row * a->groups + group);
            kept[0] = p.mean;
            kept[1] = p.rstd;
        }
    }
}

ovlm_status ovlm_cpu_norm_fwd(ovlm_queue *queue, const ovlm_norm *a, ovlm_err *err)
{
    OVLM_CPU_CHECK(norm, a, FWD, err);
    OVLM_TRY(ovlm_cpu_fits("norm: columns of a group", a->w.cols, err));
    ovlm_cpu_rows(ovlm_cpu_of(queue), a->x.rows, a->x.cols, forward_rows, a);
    return OVLM_OK;
}

/* The chunk's sums: dw, then dbias, in its part of `work`. */
static void backward_chunk(const void *context, int64_t chunk, int64_t first, int64_t count,
                           float *scratch)
{
    const ovlm_norm *a = context;
    int64_t n = a->w.cols;
    const float *saved = a->scratch.saved;
    float *x = scratch, *dx = scratch + OVLM_CPU_ROW, *dy = scratch + 2 * OVLM_CPU_ROW;
    part p = {.n = n, .rms = a->rms, .add = a->dx_beta != 0};
    p.w = ovlm_cpu_row(&a->w, 0, 0, n, scratch + 3 * OVLM_CPU_ROW);
    if (sums_weights(a)) {
        float *sums = (float *)a->scratch.work + chunk * 2 * n;
        memset(sums, 0, (size_t)(2 * n) * sizeof *sums);
        p.dw = ovlm_tensor_given(&a->dw) ? sums : NULL;
        p.dbias = ovlm_tensor_given(&a->dbias) ? sums + n : NULL;
    }
    bool with_dx = ovlm_tensor_given(&a->dx);
    for (int64_t row = first; row < first + count; row++) {
        for (int64_t group = 0; group < a->groups; group++) {
            const float *kept = saved + 2 * (row * a->groups + group);
            p.mean = kept[0];
            p.rstd = kept[1];
            p.x = ovlm_cpu_row(&a->x, row, group * n, n, x);
            p.dy = ovlm_cpu_row(&a->dy, row, group * n, n, dy);
            if (with_dx) {
                p.y = ovlm_cpu_row_out(&a->dx, row, group * n, dx);
                if (p.add && p.y == dx) {
                    (void)ovlm_cpu_row(&a->dx, row, group * n, n, dx);
                }
            }
            norm_part_back(&p);
            if (with_dx) {
                ovlm_cpu_row_done(&a->dx, row, group * n, n, dx);
            }
        }
    }
}

ovlm_status ovlm_cpu_norm_bwd(ovlm_queue *queue, const ovlm_norm *a, ovlm_err *err)
{
    OVLM_CPU_CHECK(norm, a, BWD, err);
    OVLM_TRY(ovlm_cpu_fits("norm: columns of a group", a->w.cols, err));
    ovlm_cpu *cpu = ovlm_cpu_of(queue);
    int64_t n = a->w.cols, chunks = ovlm_cpu_chunks(a->x.rows);
    const float *sums = a->scratch.work;
    ovlm_cpu_chunks_run(cpu, a->x.rows, backward_chunk, a);
    if (sums_weights(a)) {
        ovlm_cpu_fold(cpu, sums, chunks, 2 * n, &a->dw, a->dw_beta);
        ovlm_cpu_fold(cpu, sums + n, chunks, 2 * n, &a->dbias, a->dw_beta);
    }
    return OVLM_OK;
}
