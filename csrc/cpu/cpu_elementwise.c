/* cpu_elementwise.c - gated units (Shazeer 2020, eq. 5 and 6) and scale.  Parallel over rows. */
#include "cpu/cpu_load.h"
#include "cpu/cpu_math.h"

/* A loop per activation, so that each is vectorised. */
#define EACH_ACT(X)                    \
    X(OVLM_ACT_GELU_ERF, gelu_erf)          \
    X(OVLM_ACT_GELU_TANH, gelu_tanh)        \
    X(OVLM_ACT_QUICK_GELU, quick_gelu)      \
    X(OVLM_ACT_SILU, silu)

OVLM_CPU_INLINE void gated_piece_body(ovlm_act act, const float *restrict gate,
                                      const float *restrict up, float *restrict y, int64_t n)
{
    switch (act) {
    case OVLM_ACT_NONE:
        for (int64_t i = 0; i < n; i++) {
            y[i] = gate[i] * up[i];
        }
        return;
#define LOOP(name, function)                                  \
    case name:                                                 \
        for (int64_t i = 0; i < n; i++) {                      \
            y[i] = ovlm_math_##function(gate[i]) * up[i];      \
        }                                                      \
        return;
        EACH_ACT(LOOP)
#undef LOOP
    }
}
OVLM_CPU_KERNEL(gated_piece,
                (ovlm_act act, const float *gate, const float *up, float *y, int64_t n),
                (act, gate, up, y, n))

/* dgate = dy up act'(gate), dup = dy act(gate), in place of gate and up. */
OVLM_CPU_INLINE void gated_back_body(ovlm_act act, const float *restrict dy, float *restrict gate,
                                     float *restrict up, int64_t n)
{
    switch (act) {
    case OVLM_ACT_NONE:
        for (int64_t i = 0; i < n; i++) {
            float g = gate[i];
            gate[i] = dy[i] * up[i];
            up[i] = dy[i] * g;
        }
        return;
#define LOOP(name, function)                                        \
    case name:                                                       \
        for (int64_t i = 0; i < n; i++) {                            \
            float value = ovlm_math_##function(gate[i]);             \
            float slope = ovlm_math_##function##_slope(gate[i]);     \
            gate[i] = dy[i] * up[i] * slope;                         \
            up[i] = dy[i] * value;                                   \
        }                                                            \
        return;
        EACH_ACT(LOOP)
#undef LOOP
    }
}
OVLM_CPU_KERNEL(gated_back,
                (ovlm_act act, const float *dy, float *gate, float *up, int64_t n),
                (act, dy, gate, up, n))

ovlm_status ovlm_cpu_gated_measure(ovlm_backend *backend, const ovlm_gated *a,
                                   ovlm_op_bytes *bytes, ovlm_err *err)
{
    (void)backend;
    OVLM_CPU_CHECK(gated, a, MEASURE, err);
    *bytes = (ovlm_op_bytes){0};
    return OVLM_OK;
}

/* Columns at once: three or four pieces stay in the first-level cache. */
enum { PIECE = 2048 };

static int64_t piece_of(int64_t columns, int64_t from)
{
    return columns - from < PIECE ? columns - from : PIECE;
}

/* What stands for the other half where there is none. */
static void all_ones(float *up)
{
    for (int64_t i = 0; i < PIECE; i++) {
        up[i] = 1;
    }
}

static void gated_rows(const void *context, int64_t first, int64_t count, float *scratch)
{
    const ovlm_gated *a = context;
    int64_t columns = a->y.cols;
    float *gate = scratch, *ones = scratch + PIECE, *y = scratch + 2 * PIECE;
    if (a->alone) {
        all_ones(ones);
    }
    for (int64_t t = first; t < first + count; t++) {
        for (int64_t c = 0; c < columns; c += PIECE) {
            int64_t n = piece_of(columns, c);
            const float *up = a->alone ? ones
                                       : ovlm_cpu_row(&a->gate_up, t, columns + c, n, ones);
            gated_piece(a->act, ovlm_cpu_row(&a->gate_up, t, c, n, gate), up,
                        ovlm_cpu_row_out(&a->y, t, c, y), n);
            ovlm_cpu_row_done(&a->y, t, c, n, y);
        }
    }
}

ovlm_status ovlm_cpu_gated_fwd(ovlm_queue *queue, const ovlm_gated *a, ovlm_err *err)
{
    OVLM_CPU_CHECK(gated, a, FWD, err);
    ovlm_cpu_rows(ovlm_cpu_of(queue), a->y.rows, 4 * a->y.cols, gated_rows, a);
    return OVLM_OK;
}

static void gated_back_rows(const void *context, int64_t first, int64_t count, float *scratch)
{
    const ovlm_gated *a = context;
    int64_t columns = a->dy.cols;
    float *gate = scratch, *up = scratch + PIECE, *dy = scratch + 2 * PIECE;
    for (int64_t t = first; t < first + count; t++) {
        for (int64_t c = 0; c < columns; c += PIECE) {
            int64_t n = piece_of(columns, c);
            ovlm_cpu_load(gate, ovlm_cpu_at(&a->gate_up, t, c), n, a->gate_up.dtype);
            if (a->alone) {
                all_ones(up); /* the pass before left its gradient there */
            } else {
                ovlm_cpu_load(up, ovlm_cpu_at(&a->gate_up, t, columns + c), n, a->gate_up.dtype);
            }
            gated_back(a->act, ovlm_cpu_row(&a->dy, t, c, n, dy), gate, up, n);
            ovlm_cpu_store(ovlm_cpu_at(&a->dgate_up, t, c), gate, n, a->dgate_up.dtype);
            if (!a->alone) {
                ovlm_cpu_store(ovlm_cpu_at(&a->dgate_up, t, columns + c), up, n,
                               a->dgate_up.dtype);
            }
        }
    }
}

ovlm_status ovlm_cpu_gated_bwd(ovlm_queue *queue, const ovlm_gated *a, ovlm_err *err)
{
    OVLM_CPU_CHECK(gated, a, BWD, err);
    ovlm_cpu_rows(ovlm_cpu_of(queue), a->dy.rows, 8 * a->dy.cols, gated_back_rows, a);
    return OVLM_OK;
}

/* to = factor scale x + shift + beta to. */
typedef struct line {
    const ovlm_tensor *x, *to, *scale, *shift;
    double factor, beta;
} line;

OVLM_CPU_INLINE void line_piece_body(float *to, const float *x, const float *scale,
                                     const float *shift, float factor, float beta, int64_t n)
{
    if (scale == NULL && shift == NULL) { /* sums and casts */
        for (int64_t i = 0; i < n; i++) {
            to[i] = beta == 0 ? factor * x[i] : factor * x[i] + beta * to[i];
        }
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        float value = factor * (scale != NULL ? scale[i] : 1) * x[i];
        value += shift != NULL ? shift[i] : 0;
        to[i] = beta == 0 ? value : value + beta * to[i];
    }
}
OVLM_CPU_KERNEL(line_piece,
                (float *to, const float *x, const float *scale, const float *shift, float factor,
                 float beta, int64_t n),
                (to, x, scale, shift, factor, beta, n))

/* float64 on either side is computed in float64. */
static void line_double(const line *l, int64_t t)
{
    for (int64_t c = 0; c < l->x->cols; c++) {
        float single;
        const void *from = ovlm_cpu_at(l->x, t, c);
        ovlm_cpu_load(&single, from, 1, l->x->dtype);
        double x = l->x->dtype == OVLM_F64 ? *(const double *)from : (double)single;
        double scale = l->scale != NULL ? (double)((float *)l->scale->data)[c] : 1;
        double value = l->factor * scale * x;
        value += l->shift != NULL ? (double)((float *)l->shift->data)[c] : 0;
        void *to = ovlm_cpu_at(l->to, t, c);
        if (l->beta != 0) {
            ovlm_cpu_load(&single, to, 1, l->to->dtype);
            value += l->beta * (l->to->dtype == OVLM_F64 ? *(double *)to : (double)single);
        }
        if (l->to->dtype == OVLM_F64) {
            *(double *)to = value;
        } else {
            single = (float)value;
            ovlm_cpu_store(to, &single, 1, l->to->dtype);
        }
    }
}

static void line_rows(const void *context, int64_t first, int64_t count, float *scratch)
{
    const line *l = context;
    float *x = scratch, *to = scratch + PIECE;
    bool precise = l->x->dtype == OVLM_F64 || l->to->dtype == OVLM_F64;
    for (int64_t t = first; t < first + count; t++) {
        if (precise) {
            line_double(l, t);
            continue;
        }
        for (int64_t c = 0; c < l->x->cols; c += PIECE) {
            int64_t n = piece_of(l->x->cols, c);
            float *out = ovlm_cpu_row_out(l->to, t, c, to);
            if (l->beta != 0 && out == to) {
                (void)ovlm_cpu_row(l->to, t, c, n, to);
            }
            line_piece(out, ovlm_cpu_row(l->x, t, c, n, x),
                       l->scale != NULL ? (float *)l->scale->data + c : NULL,
                       l->shift != NULL ? (float *)l->shift->data + c : NULL, (float)l->factor,
                       (float)l->beta, n);
            ovlm_cpu_row_done(l->to, t, c, n, to);
        }
    }
}

/* x and y may be float64, for sums; the factors are float32. */
static ovlm_status check_factors(const ovlm_scale *a, ovlm_err *err)
{
    if ((ovlm_tensor_given(&a->scale) && a->scale.dtype != OVLM_F32) ||
        (ovlm_tensor_given(&a->shift) && a->shift.dtype != OVLM_F32)) {
        return OVLM_FAIL(err, OVLM_E_ARG, "scale: scale and shift must be float32 on the CPU");
    }
    return OVLM_OK;
}

ovlm_status ovlm_cpu_scale_measure(ovlm_backend *backend, const ovlm_scale *a,
                                   ovlm_op_bytes *bytes, ovlm_err *err)
{
    (void)backend;
    OVLM_TRY(ovlm_op_check_scale(a, OVLM_PASS_MEASURE, err));
    *bytes = (ovlm_op_bytes){0};
    return OVLM_OK;
}

ovlm_status ovlm_cpu_scale_fwd(ovlm_queue *queue, const ovlm_scale *a, ovlm_err *err)
{
    OVLM_TRY(ovlm_op_check_scale(a, OVLM_PASS_FWD, err));
    OVLM_TRY(check_factors(a, err));
    line l = {&a->x, &a->y, ovlm_tensor_given(&a->scale) ? &a->scale : NULL,
              ovlm_tensor_given(&a->shift) ? &a->shift : NULL, a->alpha, a->beta};
    ovlm_cpu_rows(ovlm_cpu_of(queue), a->x.rows, a->x.cols, line_rows, &l);
    return OVLM_OK;
}

ovlm_status ovlm_cpu_scale_bwd(ovlm_queue *queue, const ovlm_scale *a, ovlm_err *err)
{
    OVLM_TRY(ovlm_op_check_scale(a, OVLM_PASS_BWD, err));
    OVLM_TRY(check_factors(a, err));
    line l = {&a->dy, &a->dx, ovlm_tensor_given(&a->scale) ? &a->scale : NULL, NULL, a->alpha,
              (double)a->dx_beta};
    ovlm_cpu_rows(ovlm_cpu_of(queue), a->dy.rows, a->dy.cols, line_rows, &l);
    return OVLM_OK;
}
