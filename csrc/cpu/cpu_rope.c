/* cpu_rope.c - rotary positions (Su et al. 2021, eq. 34), with the RMSNorm per head before them.
 *
 *   table: cos, sin of position[axis[r]][t] frequency[r]
 *   turn:  (a, b) -> (a cos - b sin, b cos + a sin);  backward: by the opposite angle
 *
 * Parallel over rows.  Saved for the backward: 1/sqrt of each head, with a norm only. */
#include <math.h>

#include "cpu/cpu_load.h"

ovlm_status ovlm_cpu_rope_table_measure(ovlm_backend *backend, const ovlm_rope_table *a,
                                        ovlm_op_bytes *bytes, ovlm_err *err)
{
    (void)backend;
    OVLM_CPU_CHECK(rope_table, a, MEASURE, err);
    *bytes = (ovlm_op_bytes){0};
    return OVLM_OK;
}

/* The C library's: exact for large positions too; one table serves all layers of a step. */
static void table_rows(const void *context, int64_t first, int64_t count, float *scratch)
{
    (void)scratch;
    const ovlm_rope_table *a = context;
    const float *frequency = a->frequency.data;
    for (int64_t t = first; t < first + count; t++) {
        float *c = ovlm_cpu_at(&a->cos, t, 0), *s = ovlm_cpu_at(&a->sin, t, 0);
        for (int64_t r = 0; r < a->frequency.cols; r++) {
            float angle = *(float *)ovlm_cpu_at(&a->position, a->axis[r], t) * frequency[r];
            c[r] = cosf(angle);
            s[r] = sinf(angle);
        }
    }
}

ovlm_status ovlm_cpu_rope_table_fwd(ovlm_queue *queue, const ovlm_rope_table *a, ovlm_err *err)
{
    OVLM_CPU_CHECK(rope_table, a, FWD, err);
    ovlm_cpu_rows(ovlm_cpu_of(queue), a->cos.rows, 32 * a->cos.cols, table_rows, a);
    return OVLM_OK;
}

/* One head. */
typedef struct head {
    const float *x, *w, *cos, *sin; /* w: NULL without a norm */
    float *y, *dw;                  /* y may be x             */
    const float *dy;
    int64_t n, r;                   /* D elements, 2r of them turn */
    float eps, rstd;
    bool interleaved;
} head;

/* to may be from; sign -1 turns back. */
OVLM_CPU_INLINE void turn(float *to, const float *from, const head *h, float sign)
{
    const float *restrict c = h->cos, *restrict s = h->sin;
    int64_t r = h->r;
    if (h->interleaved) {
        for (int64_t i = 0; i < r; i++) {
            float a = from[2 * i], b = from[2 * i + 1], si = sign * s[i];
            to[2 * i] = a * c[i] - b * si;
            to[2 * i + 1] = b * c[i] + a * si;
        }
    } else {
        int64_t i = 0;
        ovlm_f8 flip = ovlm_f8_all(sign);
        for (; i + 8 <= r; i += 8) {
            ovlm_f8 a = ovlm_f8_load(from + i), b = ovlm_f8_load(from + r + i);
            ovlm_f8 ci = ovlm_f8_load(c + i), si = flip * ovlm_f8_load(s + i);
            ovlm_f8_store(to + i, a * ci - b * si);
            ovlm_f8_store(to + r + i, b * ci + a * si);
        }
        for (; i < r; i++) {
            float a = from[i], b = from[r + i], si = sign * s[i];
            to[i] = a * c[i] - b * si;
            to[r + i] = b * c[i] + a * si;
        }
    }
    if (to != from) {
        memcpy(to + 2 * r, from + 2 * r, (size_t)(h->n - 2 * r) * sizeof *to);
    }
}

OVLM_CPU_INLINE void turn_head_body(head *h)
{
    if (h->w == NULL) {
        turn(h->y, h->x, h, 1);
        return;
    }
    float mean = ovlm_f8_dot(h->x, h->x, h->n) / (float)h->n;
    float rstd = h->rstd = 1 / sqrtf(mean + h->eps);
    const float *restrict x = h->x, *restrict w = h->w;
    float *restrict y = h->y;
    for (int64_t i = 0; i < h->n; i++) {
        y[i] = x[i] * rstd * w[i];
    }
    turn(y, y, h, 1);
}
OVLM_CPU_KERNEL(turn_head, (head *h), (h))

/* y is dx here.  With g = dy turned back and xhat = x rstd:
 * dx = rstd (g w - xhat mean(g w xhat)), dw += g xhat. */
OVLM_CPU_INLINE void turn_head_back_body(head *h, float *g)
{
    if (h->w == NULL) {
        turn(h->y, h->dy, h, -1);
        return;
    }
    turn(g, h->dy, h, -1);
    const float *restrict x = h->x, *restrict w = h->w;
    float rstd = h->rstd, *restrict dw = h->dw, *restrict gw = g;
    if (dw != NULL) {
        for (int64_t i = 0; i < h->n; i++) {
            dw[i] += gw[i] * (x[i] * rstd);
        }
    }
    for (int64_t i = 0; i < h->n; i++) {
        gw[i] *= w[i];
    }
    float slope = ovlm_f8_dot(gw, x, h->n) / (float)h->n * rstd * rstd;
    float *dx = h->y; /* may be dy, which is done with */
    for (int64_t i = 0; i < h->n; i++) {
        dx[i] = rstd * (gw[i] - x[i] * slope);
    }
}
OVLM_CPU_KERNEL(turn_head_back, (head *h, float *g), (h, g))

ovlm_status ovlm_cpu_rope_measure(ovlm_backend *backend, const ovlm_rope *a, ovlm_op_bytes *bytes,
                                  ovlm_err *err)
{
    (void)backend;
    OVLM_CPU_CHECK(rope, a, MEASURE, err);
    *bytes = (ovlm_op_bytes){0};
    if (ovlm_tensor_given(&a->w)) {
        bytes->saved = a->x.rows * a->heads * (int64_t)sizeof(float);
    }
    if (ovlm_tensor_given(&a->dw)) {
        bytes->bwd_work = ovlm_cpu_chunks(a->x.rows) * a->dw.cols * (int64_t)sizeof(float);
    }
    return OVLM_OK;
}

static head head_of(const ovlm_rope *a, int64_t columns, float *weight)
{
    head h = {.n = columns / a->heads, .r = a->cos.cols, .eps = (float)a->eps,
              .interleaved = a->interleaved};
    if (ovlm_tensor_given(&a->w)) {
        h.w = ovlm_cpu_row(&a->w, 0, 0, h.n, weight);
    }
    return h;
}

static void forward_rows(const void *context, int64_t first, int64_t count, float *scratch)
{
    const ovlm_rope *a = context;
    head h = head_of(a, a->x.cols, scratch);
    float *x = scratch + OVLM_CPU_ROW, *y = scratch + 2 * OVLM_CPU_ROW;
    float *saved = a->scratch.saved;
    for (int64_t t = first; t < first + count; t++) {
        h.cos = ovlm_cpu_at(&a->cos, t, 0);
        h.sin = ovlm_cpu_at(&a->sin, t, 0);
        for (int64_t i = 0; i < a->heads; i++) {
            h.x = ovlm_cpu_row(&a->x, t, i * h.n, h.n, x);
            h.y = ovlm_cpu_row_out(&a->y, t, i * h.n, y);
            turn_head(&h);
            ovlm_cpu_row_done(&a->y, t, i * h.n, h.n, y);
            if (h.w != NULL) {
                saved[t * a->heads + i] = h.rstd;
            }
        }
    }
}

ovlm_status ovlm_cpu_rope_fwd(ovlm_queue *queue, const ovlm_rope *a, ovlm_err *err)
{
    OVLM_CPU_CHECK(rope, a, FWD, err);
    OVLM_TRY(ovlm_cpu_fits("rope: columns of a head", a->x.cols / a->heads, err));
    ovlm_cpu_rows(ovlm_cpu_of(queue), a->x.rows, a->x.cols, forward_rows, a);
    return OVLM_OK;
}

static void backward_chunk(const void *context, int64_t chunk, int64_t first, int64_t count,
                           float *scratch)
{
    const ovlm_rope *a = context;
    head h = head_of(a, a->dy.cols, scratch);
    float *x = scratch + OVLM_CPU_ROW, *dx = scratch + 2 * OVLM_CPU_ROW;
    float *dy = scratch + 3 * OVLM_CPU_ROW, *g = scratch + 4 * OVLM_CPU_ROW;
    const float *saved = a->scratch.saved;
    if (ovlm_tensor_given(&a->dw)) {
        h.dw = (float *)a->scratch.work + chunk * h.n;
        memset(h.dw, 0, (size_t)h.n * sizeof *h.dw);
    }
    for (int64_t t = first; t < first + count; t++) {
        h.cos = ovlm_cpu_at(&a->cos, t, 0);
        h.sin = ovlm_cpu_at(&a->sin, t, 0);
        for (int64_t i = 0; i < a->heads; i++) {
            if (h.w != NULL) {
                h.x = ovlm_cpu_row(&a->x, t, i * h.n, h.n, x);
                h.rstd = saved[t * a->heads + i];
            }
            h.dy = ovlm_cpu_row(&a->dy, t, i * h.n, h.n, dy);
            h.y = ovlm_tensor_given(&a->dx) ? ovlm_cpu_row_out(&a->dx, t, i * h.n, dx) : dx;
            turn_head_back(&h, g);
            if (ovlm_tensor_given(&a->dx)) {
                ovlm_cpu_row_done(&a->dx, t, i * h.n, h.n, dx);
            }
        }
    }
}

ovlm_status ovlm_cpu_rope_bwd(ovlm_queue *queue, const ovlm_rope *a, ovlm_err *err)
{
    OVLM_CPU_CHECK(rope, a, BWD, err);
    OVLM_TRY(ovlm_cpu_fits("rope: columns of a head", a->dy.cols / a->heads, err));
    ovlm_cpu *cpu = ovlm_cpu_of(queue);
    ovlm_cpu_chunks_run(cpu, a->dy.rows, backward_chunk, a);
    ovlm_cpu_fold(cpu, a->scratch.work, ovlm_cpu_chunks(a->dy.rows), a->dw.cols, &a->dw,
                  a->dw_beta);
    return OVLM_OK;
}
