/* check_scale.c - magnitudes of the terms of each output element.
 *
 * Operations that are sums of products are simply run on the magnitudes of their inputs, without
 * activation (|act(x)| <= |x|, and slopes are at most 1.13).  The others are written out: S of an
 * output is the sum over its terms of |term| times how much rounding errors inside grow in it. */
#include "cpu/check.h"

#include "cpu/ref.h"

static double at(const ovlm_tensor *t, int64_t row, int64_t col)
{
    return ovlm_ref_at(t, row, col);
}

static double size_at(const ovlm_tensor *t, int64_t row, int64_t col)
{
    return fabs(ovlm_ref_at(t, row, col));
}

/* Adds: several terms meet in one element. */
static void grow(const ovlm_tensor *t, int64_t row, int64_t col, double size)
{
    if (ovlm_tensor_given(t)) {
        ovlm_ref_put(t, row, col, at(t, row, col) + size);
    }
}

/* ---- norm ---- */

/* Mean, 1/sigma and their condition: errors of x relative to sigma. */
typedef struct norm_part {
    int64_t row, first, n;
    double mean, rstd, condition;
} norm_part;

static norm_part norm_part_of(const ovlm_tensor *x, int64_t groups, bool rms, double eps, int64_t i)
{
    int64_t n = x->cols / groups;
    norm_part p = {.row = i / groups, .first = i % groups * n, .n = n};
    double most = 0, squares = 0;
    for (int64_t c = 0; c < n; c++) {
        p.mean += rms ? 0 : at(x, p.row, p.first + c) / (double)n;
        most = fmax(most, size_at(x, p.row, p.first + c));
    }
    for (int64_t c = 0; c < n; c++) {
        double centred = at(x, p.row, p.first + c) - p.mean;
        squares += centred * centred / (double)n;
    }
    p.rstd = 1 / sqrt(squares + eps);
    p.condition = rms ? 1 : 1 + p.rstd * most;
    return p;
}

/* xhat and the error that it carries. */
static double norm_xhat(const norm_part *p, const ovlm_tensor *x, int64_t c)
{
    return fabs((at(x, p->row, p->first + c) - p->mean) * p->rstd);
}

static double norm_xhat_error(const norm_part *p, const ovlm_tensor *x, int64_t c)
{
    double xhat = norm_xhat(p, x, c);
    return p->condition > 1 ? p->condition * (1 + xhat) : xhat;
}

static void norm_forward(const ovlm_norm *a, const ovlm_norm *s)
{
    for (int64_t i = 0; i < a->x.rows * a->groups; i++) {
        norm_part p = norm_part_of(&a->x, a->groups, a->rms, a->eps, i);
        for (int64_t c = 0; c < p.n; c++) {
            double bias = ovlm_tensor_given(&a->bias) ? size_at(&a->bias, 0, c) : 0;
            ovlm_ref_put(&s->y, p.row, p.first + c,
                         norm_xhat_error(&p, &a->x, c) * size_at(&a->w, 0, c) + bias);
        }
    }
}

static void norm_backward(const ovlm_norm *a, const ovlm_norm *s)
{
    for (int64_t i = 0; i < a->x.rows * a->groups; i++) {
        norm_part p = norm_part_of(&a->x, a->groups, a->rms, a->eps, i);
        double mean_g = 0, mean_gx = 0;
        for (int64_t c = 0; c < p.n; c++) {
            double g = size_at(&a->dy, p.row, p.first + c) * size_at(&a->w, 0, c) / (double)p.n;
            mean_g += g;
            mean_gx += g * norm_xhat_error(&p, &a->x, c);
        }
        for (int64_t c = 0; c < p.n; c++) {
            double dy = size_at(&a->dy, p.row, p.first + c), g = dy * size_at(&a->w, 0, c);
            double error = norm_xhat_error(&p, &a->x, c);
            grow(&s->dx, p.row, p.first + c,
                 p.rstd * p.condition * (g + mean_g + error * mean_gx));
            grow(&s->dw, 0, c, dy * error);
            grow(&s->dbias, 0, c, dy);
        }
    }
}

/* ---- rope ---- */

static void rope_partner(const ovlm_rope *a, int64_t i, int64_t *one, int64_t *two)
{
    *one = a->interleaved ? 2 * i : i;
    *two = a->interleaved ? 2 * i + 1 : i + a->cos.cols;
}

/* Turns magnitudes: both become |c||x| + |s||y|.  v reads `from` at row t, columns first .. */
static void rope_turn_sizes(const ovlm_rope *a, int64_t t, double *v)
{
    for (int64_t i = 0; i < a->cos.cols; i++) {
        int64_t one, two;
        rope_partner(a, i, &one, &two);
        double c = size_at(&a->cos, t, i), s = size_at(&a->sin, t, i), x = v[one], y = v[two];
        v[one] = x * c + y * s;
        v[two] = y * c + x * s;
    }
}

static void rope_scale(const ovlm_rope *a, const ovlm_rope *s, bool backward)
{
    const ovlm_tensor *in = backward ? &a->dy : &a->x;
    bool norm = ovlm_tensor_given(&a->w);
    int64_t n = in->cols / a->heads;
    double *v = s->scratch.work;
    for (int64_t i = 0; i < in->rows * a->heads; i++) {
        int64_t t = i / a->heads, first = i % a->heads * n;
        norm_part p = {.row = t, .first = first, .n = n, .rstd = 1, .condition = 1};
        if (norm) {
            p = norm_part_of(&a->x, a->heads, true, a->eps, i);
        }
        for (int64_t d = 0; d < n; d++) {
            double factor = !backward && norm ? p.rstd * size_at(&a->w, 0, d) : 1;
            v[d] = size_at(in, t, first + d) * factor;
        }
        rope_turn_sizes(a, t, v);
        double mean = 0;
        for (int64_t d = 0; d < n && backward && norm; d++) {
            grow(&s->dw, 0, d, v[d] * norm_xhat(&p, &a->x, d));
            v[d] *= size_at(&a->w, 0, d);
            mean += v[d] * norm_xhat(&p, &a->x, d) / (double)n;
        }
        for (int64_t d = 0; d < n; d++) {
            double xhat = backward && norm ? norm_xhat(&p, &a->x, d) : 0;
            grow(backward ? &s->dx : &s->y, t, first + d,
                 backward ? p.rstd * (v[d] + xhat * mean) : v[d]);
        }
    }
}

static void rope_table_scale(const ovlm_rope_table *a, const ovlm_rope_table *s)
{
    for (int64_t i = 0; i < a->cos.rows * a->cos.cols; i++) {
        int64_t t = i / a->cos.cols, r = i % a->cos.cols;
        double angle = at(&a->position, a->axis[r], t) * at(&a->frequency, 0, r);
        ovlm_ref_put(&s->cos, t, r, 1 + fabs(angle));
        ovlm_ref_put(&s->sin, t, r, 1 + fabs(angle));
    }
}

/* ---- attention ---- */

/* One query row of one head: p_ij and how much an error of the scores weighs. */
typedef struct attention_row {
    const ovlm_attention *a;
    int64_t query, head, kv_head, first_k, seen, dim, dim_v;
    double lse, condition; /* 1 + max_j scale <|q|, |k_j|> */
} attention_row;

static double row_score(const attention_row *r, int64_t j, bool sizes)
{
    double sum = 0;
    for (int64_t d = 0; d < r->dim; d++) {
        double term = at(&r->a->q, r->query, r->head * r->dim + d) *
                      at(&r->a->k, r->first_k + j, r->kv_head * r->dim + d);
        sum += sizes ? fabs(term) : term;
    }
    return sum * r->a->scale;
}

static attention_row attention_row_of(const ovlm_attention *a, int64_t segment, int64_t head,
                                      int64_t i, bool backward)
{
    const ovlm_segments *q = &a->query, *k = &a->key;
    int64_t nq = q->length != NULL ? q->length[segment] : q->start[segment + 1] - q->start[segment];
    int64_t nk = k->length != NULL ? k->length[segment] : k->start[segment + 1] - k->start[segment];
    attention_row r = {.a = a, .query = q->start[segment] + i, .head = head,
                       .kv_head = head * a->kv_heads / a->heads, .first_k = k->start[segment],
                       .dim = a->q.cols / a->heads, .dim_v = a->v.cols / a->kv_heads,
                       .lse = 0, .condition = 1};
    r.seen = i >= nq ? -1 : a->causal ? nk - nq + i + 1 : nk; /* -1: no such row */
    r.seen = i < nq && r.seen < 0 ? 0 : r.seen;
    if (r.seen < 0) {
        return r;
    }
    double most = -INFINITY;
    for (int64_t j = 0; j < r.seen; j++) {
        most = fmax(most, row_score(&r, j, false));
        r.condition = fmax(r.condition, 1 + fabs(row_score(&r, j, true)));
    }
    for (int64_t j = 0; j < r.seen; j++) {
        r.lse += exp(row_score(&r, j, false) - most);
    }
    bool given = backward && r.seen > 0 && ovlm_tensor_given(&a->lse);
    r.lse = given ? at(&a->lse, r.query, head) : most + log(r.lse);
    return r;
}

static void attention_forward_row(const attention_row *r, const ovlm_attention *s)
{
    if (r->seen > 0) {
        grow(&s->lse, r->query, r->head, r->condition + log((double)r->seen));
    }
    for (int64_t j = 0; j < r->seen; j++) {
        double p = exp(row_score(r, j, false) - r->lse) * r->condition;
        for (int64_t d = 0; d < r->dim_v; d++) {
            grow(&s->o, r->query, r->head * r->dim_v + d,
                 p * size_at(&r->a->v, r->first_k + j, r->kv_head * r->dim_v + d));
        }
    }
}

/* |ds_ij| <= p_ij (<|dout|, |v_j|> + <|dout|, |o|>), times the condition. */
static void attention_backward_row(const attention_row *r, const ovlm_attention *s)
{
    const ovlm_attention *a = r->a;
    double delta = 0;
    for (int64_t d = 0; d < r->dim_v; d++) {
        int64_t col = r->head * r->dim_v + d;
        delta += size_at(&a->dout, r->query, col) * size_at(&a->o, r->query, col);
    }
    for (int64_t j = 0; j < r->seen; j++) {
        double p = exp(row_score(r, j, false) - r->lse) * r->condition, ds = delta;
        for (int64_t d = 0; d < r->dim_v; d++) {
            double dout = size_at(&a->dout, r->query, r->head * r->dim_v + d);
            ds += dout * size_at(&a->v, r->first_k + j, r->kv_head * r->dim_v + d);
            grow(&s->dv, r->first_k + j, r->kv_head * r->dim_v + d, p * dout);
        }
        ds *= p * fabs(a->scale);
        for (int64_t d = 0; d < r->dim; d++) {
            int64_t q_col = r->head * r->dim + d, k_col = r->kv_head * r->dim + d;
            grow(&s->dq, r->query, q_col, ds * size_at(&a->k, r->first_k + j, k_col));
            grow(&s->dk, r->first_k + j, k_col, ds * size_at(&a->q, r->query, q_col));
        }
    }
}

static void attention_scale(const ovlm_attention *a, const ovlm_attention *s, bool backward)
{
    for (int64_t i = 0; i < a->query.n * a->heads; i++) {
        for (int64_t row = 0;; row++) {
            attention_row r = attention_row_of(a, i / a->heads, i % a->heads, row, backward);
            if (r.seen < 0) {
                break;
            }
            if (backward) {
                attention_backward_row(&r, s);
            } else {
                attention_forward_row(&r, s);
            }
        }
    }
}

/* After the merge: the old o and lse are known by what they and the part became, e^(lse - m) o and
 * 1 - e^(part_lse - m).  A weight is as uncertain as its exponent. */
static void merge_scale(const ovlm_merge *a, const ovlm_merge *s)
{
    int64_t dim = a->o.cols / a->heads;
    for (int64_t i = 0; i < a->o.rows * a->heads; i++) {
        int64_t t = i / a->heads, head = i % a->heads;
        double fall = at(&a->part_lse, t, head) - at(&a->lse, t, head), weight = exp(fall);
        if (isnan(fall)) {
            continue; /* nobody saw a key */
        }
        /* Below, a weight counts for nothing in float32. */
        double condition = 1 + fmin(fabs(fall), 100) + fmin(fabs(log1p(-weight)), 100);
        ovlm_ref_put(&s->lse, t, head, 2 + size_at(&a->lse, t, head));
        for (int64_t d = head * dim; d < (head + 1) * dim; d++) {
            ovlm_ref_put(&s->o, t, d,
                         condition * (size_at(&a->o, t, d) + 2 * weight * size_at(&a->part, t, d)));
        }
    }
}

/* ---- router ---- */

/* How much errors of a logit weigh in a score: exp(l - max). */
static double router_condition(const ovlm_router *a, int64_t t)
{
    double most = 0;
    for (int64_t e = 0; e < a->logits.cols; e++) {
        most = fmax(most, size_at(&a->logits, t, e));
    }
    return 4 + 2 * most;
}

static void router_forward(const ovlm_router *a, const ovlm_router *s)
{
    double worst = 4;
    for (int64_t t = 0; t < a->logits.rows; t++) {
        double condition = router_condition(a, t);
        worst = fmax(worst, condition);
        for (int64_t j = 0; j < a->k; j++) {
            ovlm_ref_put(&s->weight, t, j, condition * size_at(&a->weight, t, j));
        }
    }
    for (int64_t e = 0; e < a->logits.cols && a->score_sum != NULL; e++) {
        s->score_sum[e] = worst * fabs(a->score_sum[e]);
    }
}

/* The scores of one token, in scratch. */
static void router_scores(const ovlm_router *a, int64_t t, double *score)
{
    double most = -INFINITY, sum = 0;
    for (int64_t e = 0; e < a->logits.cols; e++) {
        most = fmax(most, at(&a->logits, t, e));
    }
    for (int64_t e = 0; e < a->logits.cols; e++) {
        double logit = at(&a->logits, t, e);
        score[e] = a->sigmoid ? 1 / (1 + exp(-logit)) : exp(logit - most);
        sum += score[e];
    }
    for (int64_t e = 0; e < a->logits.cols && !a->sigmoid; e++) {
        score[e] /= sum;
    }
}

static void router_backward(const ovlm_router *a, const ovlm_router *s)
{
    double *score = s->scratch.work;
    for (int64_t t = 0; t < a->logits.rows; t++) {
        double total = a->normalise ? 1e-20 : 1, slope = 0, aux = 0;
        router_scores(a, t, score);
        for (int64_t j = 0; j < a->k && a->normalise; j++) {
            total += score[a->expert[t * a->k + j]];
        }
        for (int64_t j = 0; j < a->k; j++) {
            slope += 2 * size_at(&a->dweight, t, j) * fabs(a->scale) / total;
        }
        for (int64_t e = 0; e < a->logits.cols && ovlm_tensor_given(&a->aux); e++) {
            aux = fmax(aux, size_at(&a->aux, 0, e));
        }
        for (int64_t e = 0; e < a->logits.cols; e++) {
            ovlm_ref_put(&s->dlogits, t, e, router_condition(a, t) * score[e] * (slope + 2 * aux));
        }
    }
}

/* ---- head ---- */

/* Magnitudes of one token: of its logits (the largest), of log p. */
typedef struct head_sizes {
    double logit, logp, entropy;
} head_sizes;

/* logp[V]; work of the reference's forward. */
static head_sizes head_sizes_of(const ovlm_head *a, int64_t t, double *logp)
{
    head_sizes out = {0};
    double most = -INFINITY, sum = 0;
    for (int64_t v = 0; v < a->w.rows; v++) {
        double size = 0;
        logp[v] = 0;
        for (int64_t c = 0; c < a->w.cols; c++) {
            double term = at(&a->x, t, c) * at(&a->w, v, c);
            logp[v] += term;
            size += fabs(term);
        }
        most = fmax(most, logp[v]);
        out.logit = fmax(out.logit, size);
    }
    for (int64_t v = 0; v < a->w.rows; v++) {
        sum += exp(logp[v] - most);
    }
    for (int64_t v = 0; v < a->w.rows; v++) {
        logp[v] -= most + log(sum);
        out.logp = fmax(out.logp, fabs(logp[v]));
        out.entropy -= exp(logp[v]) * logp[v];
    }
    out.logit += 1 + log((double)a->w.rows);
    return out;
}

static void head_gradient_sizes(const ovlm_head *a, const ovlm_head *s, int64_t t,
                                const head_sizes *sizes, const double *logp)
{
    double dlogp = fabs((double)a->dlogp[t]);
    double dentropy = a->dentropy == NULL ? 0 : fabs((double)a->dentropy[t]);
    for (int64_t v = 0; v < a->w.rows; v++) {
        double p = exp(logp[v]);
        double size = dlogp * ((v == a->label[t] ? 1 : 0) + p * sizes->logit) +
                      dentropy * p * (fabs(logp[v]) + sizes->entropy + 1) * sizes->logit;
        for (int64_t c = 0; c < a->w.cols; c++) {
            grow(&s->dx, t, c, size * size_at(&a->w, v, c));
            grow(&s->dw, v, c, size * size_at(&a->x, t, c));
        }
    }
}

static void head_scale(const ovlm_head *a, const ovlm_head *s, bool gradients, bool forward)
{
    double *logp = s->scratch.work, loss = 0;
    for (int64_t t = 0; t < a->x.rows; t++) {
        if (a->label[t] == -100) {
            continue;
        }
        head_sizes sizes = head_sizes_of(a, t, logp);
        double own = sizes.logit + fabs(logp[a->label[t]]);
        if (forward) {
            s->logp[t] = (float)own;
            loss += a->loss != NULL ? fabs((double)a->dlogp[t]) * own : 0;
        }
        if (forward && a->entropy != NULL) {
            s->entropy[t] = (float)(sizes.logit * (1 + sizes.logp));
        }
        if (gradients) {
            head_gradient_sizes(a, s, t, &sizes, logp);
        }
    }
    if (forward && a->loss != NULL) {
        *s->loss = loss + fabs(*a->loss);
    }
}

/* ---- losses and optimizer ---- */

static void targets_scale(const ovlm_targets *a, const ovlm_targets *s)
{
    *s->total = 0;
    for (int64_t t = 0; t < a->n; t++) {
        *s->total += a->weight == NULL ? 1 : fabs((double)a->weight[t]);
        s->dlogp[t] = a->dlogp[t];
    }
}

static void balance_scale(const ovlm_balance_loss *a, const ovlm_balance_loss *s)
{
    for (int64_t e = 0; e < a->experts; e++) {
        if (a->slope != NULL) {
            s->slope[e] = a->slope[e];
        }
        grow(&s->bias, 0, e, fabs(a->speed));
    }
    if (a->loss != NULL) {
        *s->loss += fabs(*a->loss);
    }
}

/* After the step: w, m and v are the new ones, which differ from the old by terms that count. */
static void adamw_scale(const ovlm_adamw *a, const ovlm_adamw *s)
{
    double correct1 = 1 - pow(a->beta1, (double)a->step);
    double correct2 = 1 - pow(a->beta2, (double)a->step);
    for (int64_t i = 0; i < a->n; i++) {
        const ovlm_adamw_part *p = &a->part[i], *q = &s->part[i];
        const ovlm_tensor *master = ovlm_tensor_given(&p->master) ? &p->master : &p->w;
        for (int64_t at_i = 0; at_i < p->w.rows * p->w.cols; at_i++) {
            int64_t row = at_i / p->w.cols, col = at_i % p->w.cols;
            double m = size_at(&p->m, row, col) + size_at(&p->grad, row, col) * a->stats->clip;
            double v = at(&p->v, row, col), w = size_at(master, row, col);
            double step = fabs(p->lr) * (m / correct1 / (sqrt(v / correct2) + a->eps) +
                                         fabs(p->weight_decay) * w);
            ovlm_ref_put(&q->m, row, col, m);
            ovlm_ref_put(&q->v, row, col, v);
            ovlm_ref_put(&q->w, row, col, w + step);
            if (ovlm_tensor_given(&q->master)) {
                ovlm_ref_put(&q->master, row, col, w + step);
            }
        }
    }
}

/* ---- all ---- */

ovlm_status ovlm_check_scale(ovlm_op op, ovlm_pass pass, ovlm_queue *queue, const void *args,
                             void *scale, ovlm_err *err)
{
    bool backward = pass == OVLM_PASS_BWD;
    switch (op) {
    case OVLM_OP_linear: ((ovlm_linear *)scale)->act = OVLM_ACT_NONE; break;
    case OVLM_OP_gated: ((ovlm_gated *)scale)->act = OVLM_ACT_NONE; break;
    case OVLM_OP_scale:
        ((ovlm_scale *)scale)->alpha = fabs(((ovlm_scale *)scale)->alpha);
        ((ovlm_scale *)scale)->beta = fabs(((ovlm_scale *)scale)->beta);
        break;
    case OVLM_OP_grouped_linear:
    case OVLM_OP_gather:
    case OVLM_OP_unfold:
    case OVLM_OP_combine:
    case OVLM_OP_grad_norm: break;
    case OVLM_OP_norm: (backward ? norm_backward : norm_forward)(args, scale); return OVLM_OK;
    case OVLM_OP_rope_table: rope_table_scale(args, scale); return OVLM_OK;
    case OVLM_OP_rope: rope_scale(args, scale, backward); return OVLM_OK;
    case OVLM_OP_attention: attention_scale(args, scale, backward); return OVLM_OK;
    case OVLM_OP_merge: merge_scale(args, scale); return OVLM_OK;
    case OVLM_OP_router: (backward ? router_backward : router_forward)(args, scale); return OVLM_OK;
    case OVLM_OP_balance_loss: balance_scale(args, scale); return OVLM_OK;
    case OVLM_OP_targets: targets_scale(args, scale); return OVLM_OK;
    case OVLM_OP_head:
        head_scale(args, scale, backward || ((const ovlm_head *)args)->fused, !backward);
        return OVLM_OK;
    case OVLM_OP_adamw: adamw_scale(args, scale); return OVLM_OK;
    case OVLM_OP_COUNT: break;
    }
    return ovlm_op_run(&ovlm_ref_ops, op, pass, queue, scale, err);
}
