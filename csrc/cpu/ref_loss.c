/* ref_loss.c - reference of targets, head, grad_norm and adamw. */
#include "cpu/ref.h"

enum { IGNORED = -100 };

/* ---- targets ---- */

ovlm_status ovlm_ref_targets_measure(ovlm_backend *backend, const ovlm_targets *a,
                                     ovlm_op_bytes *bytes, ovlm_err *err)
{
    (void)backend;
    *bytes = (ovlm_op_bytes){0};
    return ovlm_op_check_targets(a, OVLM_PASS_MEASURE, err);
}

/* 0 where ignored. */
static double target_weight(const ovlm_targets *a, int64_t t)
{
    return a->label[t] == IGNORED ? 0 : a->weight == NULL ? 1 : (double)a->weight[t];
}

ovlm_status ovlm_ref_targets_fwd(ovlm_queue *queue, const ovlm_targets *a, ovlm_err *err)
{
    (void)queue;
    OVLM_TRY(ovlm_op_check_targets(a, OVLM_PASS_FWD, err));
    double sum = 0;
    for (int64_t t = 0; t < a->n; t++) {
        sum += target_weight(a, t);
        *a->count += a->label[t] != IGNORED;
    }
    if (a->own_total) {
        *a->total = sum;
    }
    for (int64_t t = 0; t < a->n; t++) {
        double weight = target_weight(a, t);
        a->dlogp[t] = *a->total == 0 || a->label[t] == IGNORED ? 0 : (float)(-weight / *a->total);
    }
    return OVLM_OK;
}

/* ---- head ---- */

/* log softmax of one token, [V]; and dw's sums, [V,C], since rows of dw are rounded once. */
ovlm_status ovlm_ref_head_measure(ovlm_backend *backend, const ovlm_head *a, ovlm_op_bytes *bytes,
                                  ovlm_err *err)
{
    (void)backend;
    *bytes = (ovlm_op_bytes){0};
    OVLM_TRY(ovlm_op_check_head(a, OVLM_PASS_MEASURE, err));
    bytes->bwd_work = (a->w.rows + a->w.rows * a->w.cols) * (int64_t)sizeof(double);
    bytes->fwd_work = a->fused ? bytes->bwd_work : a->w.rows * (int64_t)sizeof(double);
    return OVLM_OK;
}

/* logp[V] of token t, and the entropy of that distribution. */
static double head_logps(const ovlm_head *a, int64_t t, double *logp)
{
    double most = -INFINITY, sum = 0, entropy = 0;
    for (int64_t v = 0; v < a->w.rows; v++) {
        logp[v] = 0;
        for (int64_t c = 0; c < a->w.cols; c++) {
            logp[v] += ovlm_ref_at(&a->x, t, c) * ovlm_ref_at(&a->w, v, c);
        }
        most = fmax(most, logp[v]);
    }
    for (int64_t v = 0; v < a->w.rows; v++) {
        sum += exp(logp[v] - most);
    }
    for (int64_t v = 0; v < a->w.rows; v++) {
        logp[v] -= most + log(sum);
        entropy -= exp(logp[v]) * logp[v];
    }
    return entropy;
}

/* Turns logp[V] into dlogit: dlogp (1[v = label] - p) - dentropy p (log p + entropy). */
static void head_dlogits(const ovlm_head *a, int64_t t, double entropy, double *logp)
{
    double dlogp = (double)a->dlogp[t];
    double dentropy = a->dentropy == NULL ? 0 : (double)a->dentropy[t];
    for (int64_t v = 0; v < a->w.rows; v++) {
        double p = exp(logp[v]);
        double spread = p > 0 ? p * (logp[v] + entropy) : 0;
        logp[v] = dlogp * ((v == a->label[t] ? 1 : 0) - p) - dentropy * spread;
    }
}

/* dx of token t, and its part of dw[V,C]. */
static void head_gradients(const ovlm_head *a, int64_t t, const double *dlogit, double *dw)
{
    for (int64_t c = 0; c < a->w.cols; c++) {
        double dx = 0;
        for (int64_t v = 0; v < a->w.rows; v++) {
            dx += dlogit[v] * ovlm_ref_at(&a->w, v, c);
            dw[v * a->w.cols + c] += dlogit[v] * ovlm_ref_at(&a->x, t, c);
        }
        if (ovlm_tensor_given(&a->dx)) {
            ovlm_ref_add(&a->dx, t, c, dx, (double)a->dx_beta);
        }
    }
}

/* The gradients of all tokens. */
static void head_backward(const ovlm_head *a)
{
    double *logp = a->scratch.work, *dw = logp + a->w.rows;
    memset(dw, 0, (size_t)(a->w.rows * a->w.cols) * sizeof *dw);
    for (int64_t t = 0; t < a->x.rows; t++) {
        if (a->label[t] == IGNORED) {
            memset(logp, 0, (size_t)a->w.rows * sizeof *logp);
        } else {
            head_dlogits(a, t, head_logps(a, t, logp), logp);
        }
        head_gradients(a, t, logp, dw);
    }
    for (int64_t i = 0; ovlm_tensor_given(&a->dw) && i < a->w.rows * a->w.cols; i++) {
        ovlm_ref_add(&a->dw, i / a->w.cols, i % a->w.cols, dw[i], (double)a->dw_beta);
    }
}

static int64_t head_fault(const ovlm_head *a)
{
    for (int64_t t = 0; t < a->x.rows; t++) {
        if (a->label[t] != IGNORED && (a->label[t] < 0 || a->label[t] >= a->w.rows)) {
            return t;
        }
    }
    return -1;
}

ovlm_status ovlm_ref_head_fwd(ovlm_queue *queue, const ovlm_head *a, ovlm_err *err)
{
    OVLM_TRY(ovlm_op_check_head(a, OVLM_PASS_FWD, err));
    int64_t fault = head_fault(a);
    if (fault >= 0) {
        OVLM_REF_LATE(queue, "head forward: label[%lld] is %d; it must be -100 or in [0, %lld)",
                      (long long)fault, (int)a->label[fault], (long long)a->w.rows);
    }
    double *logp = a->scratch.work, loss = 0;
    for (int64_t t = 0; t < a->x.rows; t++) {
        bool ignored = a->label[t] == IGNORED;
        double entropy = ignored ? 0 : head_logps(a, t, logp);
        double own = ignored ? 0 : logp[a->label[t]];
        a->logp[t] = (float)own;
        if (a->entropy != NULL) {
            a->entropy[t] = (float)entropy;
        }
        if (a->loss != NULL) {
            loss += (double)a->dlogp[t] * own;
        }
    }
    if (a->loss != NULL) {
        *a->loss += loss;
    }
    if (a->fused) {
        head_backward(a);
    }
    return OVLM_OK;
}

ovlm_status ovlm_ref_head_bwd(ovlm_queue *queue, const ovlm_head *a, ovlm_err *err)
{
    OVLM_TRY(ovlm_op_check_head(a, OVLM_PASS_BWD, err));
    int64_t fault = head_fault(a);
    if (fault >= 0) {
        OVLM_REF_LATE(queue, "head backward: label[%lld] is %d; it must be -100 or in [0, %lld)",
                      (long long)fault, (int)a->label[fault], (long long)a->w.rows);
    }
    head_backward(a);
    return OVLM_OK;
}

/* ---- grad_norm ---- */

ovlm_status ovlm_ref_grad_norm_measure(ovlm_backend *backend, const ovlm_grad_norm *a,
                                       ovlm_op_bytes *bytes, ovlm_err *err)
{
    (void)backend;
    *bytes = (ovlm_op_bytes){0};
    return ovlm_op_check_grad_norm(a, OVLM_PASS_MEASURE, err);
}

ovlm_status ovlm_ref_grad_norm_fwd(ovlm_queue *queue, const ovlm_grad_norm *a, ovlm_err *err)
{
    (void)queue;
    OVLM_TRY(ovlm_op_check_grad_norm(a, OVLM_PASS_FWD, err));
    for (int64_t i = 0; i < a->n; i++) {
        for (int64_t at = 0; at < a->grad[i].rows * a->grad[i].cols; at++) {
            double g = ovlm_ref_at(&a->grad[i], at / a->grad[i].cols, at % a->grad[i].cols);
            a->stats->norm_sq += g * g;
            a->stats->non_finite += !isfinite(g);
        }
    }
    return OVLM_OK;
}

/* ---- adamw ---- */

ovlm_status ovlm_ref_adamw_measure(ovlm_backend *backend, const ovlm_adamw *a,
                                   ovlm_op_bytes *bytes, ovlm_err *err)
{
    (void)backend;
    *bytes = (ovlm_op_bytes){0};
    return ovlm_op_check_adamw(a, OVLM_PASS_MEASURE, err);
}

/* One element; algorithm 2, lines 6 to 12, with the schedule multiplier in lr. */
static void adamw_element(const ovlm_adamw *a, const ovlm_adamw_part *part, int64_t row,
                          int64_t col)
{
    const ovlm_tensor *master = ovlm_tensor_given(&part->master) ? &part->master : &part->w;
    double g = a->stats->clip * ovlm_ref_at(&part->grad, row, col);
    double m = a->beta1 * ovlm_ref_at(&part->m, row, col) + (1 - a->beta1) * g;
    double v = a->beta2 * ovlm_ref_at(&part->v, row, col) + (1 - a->beta2) * g * g;
    double m_hat = m / (1 - pow(a->beta1, (double)a->step));
    double v_hat = v / (1 - pow(a->beta2, (double)a->step));
    double w = ovlm_ref_at(master, row, col);
    w -= part->lr * (m_hat / (sqrt(v_hat) + a->eps) + part->weight_decay * w);
    ovlm_ref_put(&part->m, row, col, m);
    ovlm_ref_put(&part->v, row, col, v);
    ovlm_ref_put(master, row, col, w);
    /* The model's weight comes from the master as it is stored. */
    ovlm_ref_put(&part->w, row, col, ovlm_ref_at(master, row, col));
}

ovlm_status ovlm_ref_adamw_fwd(ovlm_queue *queue, const ovlm_adamw *a, ovlm_err *err)
{
    (void)queue;
    OVLM_TRY(ovlm_op_check_adamw(a, OVLM_PASS_FWD, err));
    double factor = a->max_norm / (sqrt(a->stats->norm_sq) + 1e-6);
    a->stats->clip = a->max_norm <= 0 ? 1 : fmin(1, factor);
    for (int64_t i = 0; a->stats->non_finite == 0 && i < a->n; i++) {
        const ovlm_tensor *w = &a->part[i].w;
        for (int64_t at = 0; at < w->rows * w->cols; at++) {
            adamw_element(a, &a->part[i], at / w->cols, at % w->cols);
        }
    }
    return OVLM_OK;
}
