/* ref_dense.c - reference of linear, grouped_linear, gated and norm. */
#include "cpu/ref.h"

/* ---- activations ---- */

static double sigmoid(double x)
{
    return 1 / (1 + exp(-x));
}

double ovlm_ref_act(ovlm_act act, double x)
{
    const double sqrt_half = 0.70710678118654752440, sqrt_2_over_pi = 0.79788456080286535588;
    switch (act) {
    case OVLM_ACT_NONE: break;
    case OVLM_ACT_GELU_ERF: return 0.5 * x * (1 + erf(x * sqrt_half));
    case OVLM_ACT_GELU_TANH:
        return 0.5 * x * (1 + tanh(sqrt_2_over_pi * (x + 0.044715 * x * x * x)));
    case OVLM_ACT_QUICK_GELU: return x * sigmoid(1.702 * x);
    case OVLM_ACT_SILU: return x * sigmoid(x);
    }
    return x;
}

double ovlm_ref_act_slope(ovlm_act act, double x)
{
    const double sqrt_half = 0.70710678118654752440, sqrt_2_over_pi = 0.79788456080286535588;
    const double density = 0.39894228040143267794; /* 1/sqrt(2 pi) */
    double s, t;
    switch (act) {
    case OVLM_ACT_NONE: break;
    case OVLM_ACT_GELU_ERF:
        return 0.5 * (1 + erf(x * sqrt_half)) + x * density * exp(-0.5 * x * x);
    case OVLM_ACT_GELU_TANH:
        t = tanh(sqrt_2_over_pi * (x + 0.044715 * x * x * x));
        return 0.5 * (1 + t) +
               0.5 * x * (1 - t * t) * sqrt_2_over_pi * (1 + 3 * 0.044715 * x * x);
    case OVLM_ACT_QUICK_GELU:
        s = sigmoid(1.702 * x);
        return s + 1.702 * x * s * (1 - s);
    case OVLM_ACT_SILU:
        s = sigmoid(x);
        return s + x * s * (1 - s);
    }
    return 1;
}

/* ---- linear ---- */

ovlm_status ovlm_ref_linear_measure(ovlm_backend *backend, const ovlm_linear *a,
                                    ovlm_op_bytes *bytes, ovlm_err *err)
{
    (void)backend;
    *bytes = (ovlm_op_bytes){0};
    OVLM_TRY(ovlm_op_check_linear(a, OVLM_PASS_MEASURE, err));
    bytes->bwd_work = a->y.rows * a->y.cols * (int64_t)sizeof(double); /* dpre */
    return OVLM_OK;
}

static double weight_at(const ovlm_tensor *w, bool w_kn, int64_t n, int64_t k)
{
    return w_kn ? ovlm_ref_at(w, k, n) : ovlm_ref_at(w, n, k);
}

ovlm_status ovlm_ref_linear_fwd(ovlm_queue *queue, const ovlm_linear *a, ovlm_err *err)
{
    (void)queue;
    OVLM_TRY(ovlm_op_check_linear(a, OVLM_PASS_FWD, err));
    for (int64_t t = 0; t < a->y.rows; t++) {
        for (int64_t n = 0; n < a->y.cols; n++) {
            double pre = ovlm_tensor_given(&a->bias) ? ovlm_ref_at(&a->bias, 0, n) : 0;
            for (int64_t k = 0; k < a->x.cols; k++) {
                pre += ovlm_ref_at(&a->x, t, k) * weight_at(&a->w, a->w_kn, n, k);
            }
            if (ovlm_tensor_given(&a->pre)) {
                ovlm_ref_put(&a->pre, t, n, pre);
            }
            double y = ovlm_ref_act(a->act, pre);
            if (ovlm_tensor_given(&a->add)) {
                y += ovlm_ref_at(&a->add, t, n);
            }
            ovlm_ref_put(&a->y, t, n, y);
        }
    }
    return OVLM_OK;
}

/* dpre = dy act'(pre), [T,N] dense. */
static void linear_dpre(const ovlm_linear *a, double *dpre)
{
    for (int64_t t = 0; t < a->dy.rows; t++) {
        for (int64_t n = 0; n < a->dy.cols; n++) {
            double slope = a->act == OVLM_ACT_NONE
                               ? 1
                               : ovlm_ref_act_slope(a->act, ovlm_ref_at(&a->pre, t, n));
            dpre[t * a->dy.cols + n] = ovlm_ref_at(&a->dy, t, n) * slope;
        }
    }
}

/* dw[n][k] = sum over rows first .. end-1 of dpre[t][n] x[row_of(t)][k]. */
static void weight_gradient(const double *dpre, int64_t cols, int64_t first, int64_t end,
                            const ovlm_tensor *x, const int32_t *index, const ovlm_tensor *dw,
                            bool w_kn, double beta)
{
    for (int64_t n = 0; n < cols; n++) {
        for (int64_t k = 0; k < x->cols; k++) {
            double sum = 0;
            for (int64_t t = first; t < end; t++) {
                sum += dpre[t * cols + n] * ovlm_ref_at(x, index == NULL ? t : index[t], k);
            }
            ovlm_ref_add(dw, w_kn ? k : n, w_kn ? n : k, sum, beta);
        }
    }
}

/* dx[t][k] = sum over n of dpre[t][n] w[n][k], rows first .. end-1. */
static void input_gradient(const double *dpre, int64_t cols, int64_t first, int64_t end,
                           const ovlm_tensor *w, bool w_kn, const ovlm_tensor *dx, double beta)
{
    for (int64_t t = first; t < end; t++) {
        for (int64_t k = 0; k < dx->cols; k++) {
            double sum = 0;
            for (int64_t n = 0; n < cols; n++) {
                sum += dpre[t * cols + n] * weight_at(w, w_kn, n, k);
            }
            ovlm_ref_add(dx, t, k, sum, beta);
        }
    }
}

ovlm_status ovlm_ref_linear_bwd(ovlm_queue *queue, const ovlm_linear *a, ovlm_err *err)
{
    (void)queue;
    OVLM_TRY(ovlm_op_check_linear(a, OVLM_PASS_BWD, err));
    double *dpre = a->scratch.work;
    int64_t rows = a->dy.rows, cols = a->dy.cols;
    linear_dpre(a, dpre);
    if (ovlm_tensor_given(&a->dx)) {
        input_gradient(dpre, cols, 0, rows, &a->w, a->w_kn, &a->dx, (double)a->dx_beta);
    }
    if (ovlm_tensor_given(&a->dw)) {
        weight_gradient(dpre, cols, 0, rows, &a->x, NULL, &a->dw, a->w_kn, (double)a->dw_beta);
    }
    for (int64_t n = 0; ovlm_tensor_given(&a->dbias) && n < cols; n++) {
        double sum = 0;
        for (int64_t t = 0; t < rows; t++) {
            sum += dpre[t * cols + n];
        }
        ovlm_ref_add(&a->dbias, 0, n, sum, (double)a->dw_beta);
    }
    return OVLM_OK;
}

/* ---- grouped_linear ---- */

ovlm_status ovlm_ref_grouped_linear_measure(ovlm_backend *backend, const ovlm_grouped_linear *a,
                                            ovlm_op_bytes *bytes, ovlm_err *err)
{
    (void)backend;
    *bytes = (ovlm_op_bytes){0};
    OVLM_TRY(ovlm_op_check_grouped_linear(a, OVLM_PASS_MEASURE, err));
    bytes->bwd_work = a->y.rows * a->y.cols * (int64_t)sizeof(double);
    return OVLM_OK;
}

/* Where expert e's rows begin among the call's `rows`. */
static int64_t grouped_begin(const ovlm_grouped_linear *a, int64_t rows, int64_t e)
{
    int64_t begin = a->offsets[e] - a->first;
    return begin < 0 ? 0 : begin > rows ? rows : begin;
}

/* NULL, or what is wrong with the offsets and the index. */
static const char *grouped_fault(const ovlm_grouped_linear *a, int64_t rows, bool reads_x)
{
    if (a->offsets[0] != 0) {
        return "offsets must begin with 0";
    }
    for (int64_t e = 0; e < a->groups; e++) {
        if (a->offsets[e + 1] < a->offsets[e]) {
            return "offsets must not descend";
        }
        if (a->host_offsets != NULL && a->host_offsets[e + 1] != a->offsets[e + 1]) {
            return "host_offsets differ from offsets";
        }
    }
    int64_t end = grouped_begin(a, rows, a->groups);
    for (int64_t r = 0; reads_x && a->index != NULL && r < end; r++) {
        if (a->index[r] < 0 || a->index[r] >= a->x.rows) {
            return "index must be in [0, x.rows)";
        }
    }
    return NULL;
}

/* The weight of expert e. */
static ovlm_tensor expert_rows(const ovlm_grouped_linear *a, ovlm_tensor w, int64_t e)
{
    int64_t rows = w.rows / a->groups;
    return ovlm_tensor_rows(w, e * rows, rows);
}

ovlm_status ovlm_ref_grouped_linear_fwd(ovlm_queue *queue, const ovlm_grouped_linear *a,
                                        ovlm_err *err)
{
    OVLM_TRY(ovlm_op_check_grouped_linear(a, OVLM_PASS_FWD, err));
    const char *fault = grouped_fault(a, a->y.rows, true);
    if (fault != NULL) {
        OVLM_REF_LATE(queue, "grouped_linear forward: %s", fault);
    }
    for (int64_t e = 0; e < a->groups; e++) {
        ovlm_tensor w = expert_rows(a, a->w, e);
        int64_t end = grouped_begin(a, a->y.rows, e + 1);
        for (int64_t r = grouped_begin(a, a->y.rows, e); r < end; r++) {
            int64_t source = a->index == NULL ? r : a->index[r];
            for (int64_t n = 0; n < a->y.cols; n++) {
                double sum = 0;
                for (int64_t k = 0; k < a->x.cols; k++) {
                    sum += ovlm_ref_at(&a->x, source, k) * weight_at(&w, a->w_kn, n, k);
                }
                ovlm_ref_put(&a->y, r, n, sum);
            }
        }
    }
    return OVLM_OK;
}

ovlm_status ovlm_ref_grouped_linear_bwd(ovlm_queue *queue, const ovlm_grouped_linear *a,
                                        ovlm_err *err)
{
    OVLM_TRY(ovlm_op_check_grouped_linear(a, OVLM_PASS_BWD, err));
    const char *fault = grouped_fault(a, a->dy.rows, ovlm_tensor_given(&a->dw));
    if (fault != NULL) {
        OVLM_REF_LATE(queue, "grouped_linear backward: %s", fault);
    }
    double *dy = a->scratch.work;
    int64_t cols = a->dy.cols, rows = a->dy.rows, held = grouped_begin(a, rows, a->groups);
    for (int64_t r = 0; r < held; r++) {
        for (int64_t n = 0; n < cols; n++) {
            dy[r * cols + n] = ovlm_ref_at(&a->dy, r, n);
        }
    }
    for (int64_t e = 0; e < a->groups; e++) {
        int64_t first = grouped_begin(a, rows, e), end = grouped_begin(a, rows, e + 1);
        if (ovlm_tensor_given(&a->dx)) {
            ovlm_tensor w = expert_rows(a, a->w, e);
            input_gradient(dy, cols, first, end, &w, a->w_kn, &a->dx, (double)a->dx_beta);
        }
        if (ovlm_tensor_given(&a->dw)) {
            ovlm_tensor dw = expert_rows(a, a->dw, e);
            weight_gradient(dy, cols, first, end, &a->x, a->index, &dw, a->w_kn,
                            (double)a->dw_beta);
        }
    }
    return OVLM_OK;
}

/* ---- gated ---- */

ovlm_status ovlm_ref_gated_measure(ovlm_backend *backend, const ovlm_gated *a,
                                   ovlm_op_bytes *bytes, ovlm_err *err)
{
    (void)backend;
    *bytes = (ovlm_op_bytes){0};
    return ovlm_op_check_gated(a, OVLM_PASS_MEASURE, err);
}

ovlm_status ovlm_ref_gated_fwd(ovlm_queue *queue, const ovlm_gated *a, ovlm_err *err)
{
    (void)queue;
    OVLM_TRY(ovlm_op_check_gated(a, OVLM_PASS_FWD, err));
    int64_t cols = a->y.cols;
    for (int64_t t = 0; t < a->y.rows; t++) {
        for (int64_t f = 0; f < cols; f++) {
            double gate = ovlm_ref_at(&a->gate_up, t, f);
            double up = a->alone ? 1 : ovlm_ref_at(&a->gate_up, t, cols + f);
            ovlm_ref_put(&a->y, t, f, ovlm_ref_act(a->act, gate) * up);
        }
    }
    return OVLM_OK;
}

ovlm_status ovlm_ref_gated_bwd(ovlm_queue *queue, const ovlm_gated *a, ovlm_err *err)
{
    (void)queue;
    OVLM_TRY(ovlm_op_check_gated(a, OVLM_PASS_BWD, err));
    int64_t cols = a->dy.cols;
    for (int64_t t = 0; t < a->dy.rows; t++) {
        for (int64_t f = 0; f < cols; f++) {
            double gate = ovlm_ref_at(&a->gate_up, t, f);
            double up = a->alone ? 1 : ovlm_ref_at(&a->gate_up, t, cols + f);
            double dy = ovlm_ref_at(&a->dy, t, f);
            ovlm_ref_put(&a->dgate_up, t, f, dy * up * ovlm_ref_act_slope(a->act, gate));
            if (!a->alone) {
                ovlm_ref_put(&a->dgate_up, t, cols + f, dy * ovlm_ref_act(a->act, gate));
            }
        }
    }
    return OVLM_OK;
}

/* ---- norm ---- */

ovlm_status ovlm_ref_norm_measure(ovlm_backend *backend, const ovlm_norm *a, ovlm_op_bytes *bytes,
                                  ovlm_err *err)
{
    (void)backend;
    *bytes = (ovlm_op_bytes){0};
    OVLM_TRY(ovlm_op_check_norm(a, OVLM_PASS_MEASURE, err));
    bytes->bwd_work = 2 * a->x.cols / a->groups * (int64_t)sizeof(double); /* sums of dw, dbias */
    return OVLM_OK;
}

/* Mean (0 for RMSNorm) and 1/sqrt(variance + eps) of columns first .. first+n-1 of a row. */
static void norm_statistics(const ovlm_norm *a, int64_t t, int64_t first, int64_t n, double *mean,
                            double *rstd)
{
    double sum = 0, squares = 0;
    for (int64_t c = first; c < first + n; c++) {
        sum += ovlm_ref_at(&a->x, t, c);
    }
    *mean = a->rms ? 0 : sum / (double)n;
    for (int64_t c = first; c < first + n; c++) {
        double centred = ovlm_ref_at(&a->x, t, c) - *mean;
        squares += centred * centred;
    }
    *rstd = 1 / sqrt(squares / (double)n + a->eps);
}

ovlm_status ovlm_ref_norm_fwd(ovlm_queue *queue, const ovlm_norm *a, ovlm_err *err)
{
    (void)queue;
    OVLM_TRY(ovlm_op_check_norm(a, OVLM_PASS_FWD, err));
    int64_t n = a->x.cols / a->groups;
    for (int64_t i = 0; i < a->x.rows * a->groups; i++) {
        int64_t t = i / a->groups, first = i % a->groups * n;
        double mean, rstd;
        norm_statistics(a, t, first, n, &mean, &rstd);
        for (int64_t c = 0; c < n; c++) {
            double y = (ovlm_ref_at(&a->x, t, first + c) - mean) * rstd * ovlm_ref_at(&a->w, 0, c);
            y += ovlm_tensor_given(&a->bias) ? ovlm_ref_at(&a->bias, 0, c) : 0;
            ovlm_ref_put(&a->y, t, first + c, y);
        }
    }
    return OVLM_OK;
}

/* With g = dy w and xhat = (x - mean) rstd:
 * dx = rstd (g - mean(g) - xhat mean(g xhat)), without mean(g) for RMSNorm. */
static void norm_dx(const ovlm_norm *a, int64_t t, int64_t first, int64_t n)
{
    double mean, rstd, mean_g = 0, mean_gx = 0;
    norm_statistics(a, t, first, n, &mean, &rstd);
    for (int64_t c = 0; c < n; c++) {
        double g = ovlm_ref_at(&a->dy, t, first + c) * ovlm_ref_at(&a->w, 0, c);
        mean_g += a->rms ? 0 : g / (double)n;
        mean_gx += g * (ovlm_ref_at(&a->x, t, first + c) - mean) * rstd / (double)n;
    }
    for (int64_t c = 0; c < n; c++) {
        double g = ovlm_ref_at(&a->dy, t, first + c) * ovlm_ref_at(&a->w, 0, c);
        double xhat = (ovlm_ref_at(&a->x, t, first + c) - mean) * rstd;
        ovlm_ref_add(&a->dx, t, first + c, rstd * (g - mean_g - xhat * mean_gx),
                     (double)a->dx_beta);
    }
}

ovlm_status ovlm_ref_norm_bwd(ovlm_queue *queue, const ovlm_norm *a, ovlm_err *err)
{
    (void)queue;
    OVLM_TRY(ovlm_op_check_norm(a, OVLM_PASS_BWD, err));
    int64_t n = a->x.cols / a->groups, parts = a->x.rows * a->groups;
    for (int64_t i = 0; ovlm_tensor_given(&a->dx) && i < parts; i++) {
        norm_dx(a, i / a->groups, i % a->groups * n, n);
    }
    double *dw = a->scratch.work, *dbias = dw + n;
    memset(dw, 0, (size_t)(2 * n) * sizeof *dw);
    for (int64_t i = 0; i < parts; i++) {
        int64_t t = i / a->groups, first = i % a->groups * n;
        double mean, rstd;
        norm_statistics(a, t, first, n, &mean, &rstd);
        for (int64_t c = 0; c < n; c++) {
            double dy = ovlm_ref_at(&a->dy, t, first + c);
            dw[c] += dy * (ovlm_ref_at(&a->x, t, first + c) - mean) * rstd;
            dbias[c] += dy;
        }
    }
    for (int64_t c = 0; ovlm_tensor_given(&a->dw) && c < n; c++) {
        ovlm_ref_add(&a->dw, 0, c, dw[c], (double)a->dw_beta);
    }
    for (int64_t c = 0; ovlm_tensor_given(&a->dbias) && c < n; c++) {
        ovlm_ref_add(&a->dbias, 0, c, dbias[c], (double)a->dw_beta);
    }
    return OVLM_OK;
}
