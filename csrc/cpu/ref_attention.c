/* ref_attention.c - reference of rope_table, rope, attention and merge. */
#include "cpu/ref.h"

/* ---- rope_table ---- */

ovlm_status ovlm_ref_rope_table_measure(ovlm_backend *backend, const ovlm_rope_table *a,
                                        ovlm_op_bytes *bytes, ovlm_err *err)
{
    (void)backend;
    *bytes = (ovlm_op_bytes){0};
    return ovlm_op_check_rope_table(a, OVLM_PASS_MEASURE, err);
}

ovlm_status ovlm_ref_rope_table_fwd(ovlm_queue *queue, const ovlm_rope_table *a, ovlm_err *err)
{
    OVLM_TRY(ovlm_op_check_rope_table(a, OVLM_PASS_FWD, err));
    for (int64_t r = 0; r < a->cos.cols; r++) {
        if (a->axis[r] < 0 || a->axis[r] >= a->position.rows) {
            OVLM_REF_LATE(queue, "rope_table forward: axis[%lld] is %d; there are %lld axes",
                          (long long)r, (int)a->axis[r], (long long)a->position.rows);
        }
        for (int64_t t = 0; t < a->cos.rows; t++) {
            double angle = ovlm_ref_at(&a->position, a->axis[r], t) *
                           ovlm_ref_at(&a->frequency, 0, r);
            ovlm_ref_put(&a->cos, t, r, cos(angle));
            ovlm_ref_put(&a->sin, t, r, sin(angle));
        }
    }
    return OVLM_OK;
}

/* ---- rope ---- */

/* One head in double, so that y may be x and dx may be dy, and the sums of dw. */
ovlm_status ovlm_ref_rope_measure(ovlm_backend *backend, const ovlm_rope *a, ovlm_op_bytes *bytes,
                                  ovlm_err *err)
{
    (void)backend;
    *bytes = (ovlm_op_bytes){0};
    OVLM_TRY(ovlm_op_check_rope(a, OVLM_PASS_MEASURE, err));
    bytes->fwd_work = a->x.cols / a->heads * (int64_t)sizeof(double);
    bytes->bwd_work = 2 * bytes->fwd_work;
    return OVLM_OK;
}

/* Turns pairs of v[D] by the angles of row t, or back with sign = -1. */
static void rope_turn(const ovlm_rope *a, int64_t t, double *v, double sign)
{
    int64_t half = a->cos.cols;
    for (int64_t i = 0; i < half; i++) {
        int64_t one = a->interleaved ? 2 * i : i, two = a->interleaved ? 2 * i + 1 : i + half;
        double c = ovlm_ref_at(&a->cos, t, i), s = sign * ovlm_ref_at(&a->sin, t, i);
        double x = v[one], y = v[two];
        v[one] = x * c - y * s;
        v[two] = y * c + x * s;
    }
}

static double rope_rstd(const ovlm_rope *a, int64_t t, int64_t first, int64_t n)
{
    double squares = 0;
    for (int64_t i = 0; i < n; i++) {
        double x = ovlm_ref_at(&a->x, t, first + i);
        squares += x * x;
    }
    return 1 / sqrt(squares / (double)n + a->eps);
}

ovlm_status ovlm_ref_rope_fwd(ovlm_queue *queue, const ovlm_rope *a, ovlm_err *err)
{
    (void)queue;
    OVLM_TRY(ovlm_op_check_rope(a, OVLM_PASS_FWD, err));
    int64_t n = a->x.cols / a->heads;
    double *v = a->scratch.work;
    bool norm = ovlm_tensor_given(&a->w);
    for (int64_t i = 0; i < a->x.rows * a->heads; i++) {
        int64_t t = i / a->heads, first = i % a->heads * n;
        double rstd = norm ? rope_rstd(a, t, first, n) : 1;
        for (int64_t d = 0; d < n; d++) {
            double w = norm ? ovlm_ref_at(&a->w, 0, d) : 1;
            v[d] = ovlm_ref_at(&a->x, t, first + d) * rstd * w;
        }
        rope_turn(a, t, v, 1);
        for (int64_t d = 0; d < n; d++) {
            ovlm_ref_put(&a->y, t, first + d, v[d]);
        }
    }
    return OVLM_OK;
}

/* g[D] = dy of a head, turned back. */
static void rope_turned_dy(const ovlm_rope *a, int64_t t, int64_t first, int64_t n, double *g)
{
    for (int64_t d = 0; d < n; d++) {
        g[d] = ovlm_ref_at(&a->dy, t, first + d);
    }
    rope_turn(a, t, g, -1);
}

/* As norm's, of RMSNorm: dx = rstd (g w - xhat mean(g w xhat)). */
static void rope_dx(const ovlm_rope *a, int64_t t, int64_t first, int64_t n, double *g)
{
    rope_turned_dy(a, t, first, n, g);
    if (!ovlm_tensor_given(&a->w)) {
        for (int64_t d = 0; d < n; d++) {
            ovlm_ref_put(&a->dx, t, first + d, g[d]);
        }
        return;
    }
    double rstd = rope_rstd(a, t, first, n), mean = 0;
    for (int64_t d = 0; d < n; d++) {
        g[d] *= ovlm_ref_at(&a->w, 0, d);
        mean += g[d] * ovlm_ref_at(&a->x, t, first + d) * rstd / (double)n;
    }
    for (int64_t d = 0; d < n; d++) {
        double xhat = ovlm_ref_at(&a->x, t, first + d) * rstd;
        ovlm_ref_put(&a->dx, t, first + d, rstd * (g[d] - xhat * mean));
    }
}

ovlm_status ovlm_ref_rope_bwd(ovlm_queue *queue, const ovlm_rope *a, ovlm_err *err)
{
    (void)queue;
    OVLM_TRY(ovlm_op_check_rope(a, OVLM_PASS_BWD, err));
    int64_t n = a->dy.cols / a->heads, parts = a->dy.rows * a->heads;
    double *g = a->scratch.work, *dw = g + n;
    memset(dw, 0, (size_t)n * sizeof *dw);
    /* dw first: dx may be dy. */
    for (int64_t i = 0; ovlm_tensor_given(&a->dw) && i < parts; i++) {
        int64_t t = i / a->heads, first = i % a->heads * n;
        double rstd = rope_rstd(a, t, first, n);
        rope_turned_dy(a, t, first, n, g);
        for (int64_t d = 0; d < n; d++) {
            dw[d] += g[d] * ovlm_ref_at(&a->x, t, first + d) * rstd;
        }
    }
    for (int64_t d = 0; ovlm_tensor_given(&a->dw) && d < n; d++) {
        ovlm_ref_add(&a->dw, 0, d, dw[d], (double)a->dw_beta);
    }
    for (int64_t i = 0; ovlm_tensor_given(&a->dx) && i < parts; i++) {
        rope_dx(a, i / a->heads, i % a->heads * n, n, g);
    }
    return OVLM_OK;
}

/* ---- attention ---- */

/* Forward: the scores of one row.  Backward: log-sum-exp and delta of every query row and head, and
 * sums of one row. */
ovlm_status ovlm_ref_attention_measure(ovlm_backend *backend, const ovlm_attention *a,
                                       ovlm_op_bytes *bytes, ovlm_err *err)
{
    (void)backend;
    *bytes = (ovlm_op_bytes){0};
    OVLM_TRY(ovlm_op_check_attention(a, OVLM_PASS_MEASURE, err));
    bytes->fwd_work = a->key.max_len * (int64_t)sizeof(double);
    bytes->bwd_work = (2 * a->q.rows * a->heads + a->q.cols + a->v.cols) * (int64_t)sizeof(double);
    return OVLM_OK;
}

static int64_t segment_length(const ovlm_segments *s, int64_t i)
{
    return s->length != NULL ? s->length[i] : s->start[i + 1] - s->start[i];
}

/* NULL, or what is wrong with the segments. */
static const char *segments_fault(const ovlm_segments *s, int64_t rows)
{
    for (int64_t i = 0; i < s->n; i++) {
        int64_t length = segment_length(s, i);
        if (length < 0 || length > s->max_len) {
            return "a segment is longer than max_len, or shorter than nothing";
        }
        if (s->start[i] < 0 || s->start[i] + length > rows) {
            return "a segment reaches out of its rows";
        }
        if (s->host_start != NULL && (s->host_start[i] != s->start[i] ||
                                      (s->host_length != NULL && s->host_length[i] != length))) {
            return "host_start or host_length differs from the device's";
        }
    }
    return NULL;
}

static const char *attention_fault(const ovlm_attention *a)
{
    const char *fault = segments_fault(&a->query, a->q.rows);
    return fault != NULL ? fault : segments_fault(&a->key, a->k.rows);
}

/* One head of one segment. */
typedef struct head_view {
    const ovlm_attention *a;
    int64_t head, kv_head;
    int64_t first_q, nq, first_k, nk, dim, dim_v;
} head_view;

static head_view head_of(const ovlm_attention *a, int64_t segment, int64_t head)
{
    return (head_view){
        .a = a,
        .head = head,
        .kv_head = head * a->kv_heads / a->heads,
        .first_q = a->query.start[segment],
        .nq = segment_length(&a->query, segment),
        .first_k = a->key.start[segment],
        .nk = segment_length(&a->key, segment),
        .dim = a->q.cols / a->heads,
        .dim_v = a->v.cols / a->kv_heads,
    };
}

/* How many keys query i sees: 0 .. nk - nq + i when causal. */
static int64_t keys_seen(const head_view *h, int64_t i)
{
    int64_t seen = h->a->causal ? h->nk - h->nq + i + 1 : h->nk;
    return seen < 0 ? 0 : seen;
}

/* s_ij = scale <q_i, k_j>. */
static double score(const head_view *h, int64_t i, int64_t j)
{
    double sum = 0;
    for (int64_t d = 0; d < h->dim; d++) {
        sum += ovlm_ref_at(&h->a->q, h->first_q + i, h->head * h->dim + d) *
               ovlm_ref_at(&h->a->k, h->first_k + j, h->kv_head * h->dim + d);
    }
    return sum * h->a->scale;
}

/* log sum_j exp(s_ij) over the keys that query i sees. */
static double log_sum_exp(const head_view *h, int64_t i)
{
    double most = -INFINITY, sum = 0;
    int64_t seen = keys_seen(h, i);
    for (int64_t j = 0; j < seen; j++) {
        most = fmax(most, score(h, i, j));
    }
    for (int64_t j = 0; j < seen; j++) {
        sum += exp(score(h, i, j) - most);
    }
    return seen == 0 ? -INFINITY : most + log(sum);
}

ovlm_status ovlm_ref_attention_fwd(ovlm_queue *queue, const ovlm_attention *a, ovlm_err *err)
{
    OVLM_TRY(ovlm_op_check_attention(a, OVLM_PASS_FWD, err));
    const char *fault = attention_fault(a);
    if (fault != NULL) {
        OVLM_REF_LATE(queue, "attention forward: %s", fault);
    }
    double *p = a->scratch.work;
    for (int64_t s = 0; s < a->query.n * a->heads; s++) {
        head_view h = head_of(a, s / a->heads, s % a->heads);
        for (int64_t i = 0; i < h.nq; i++) {
            int64_t seen = keys_seen(&h, i);
            double lse = log_sum_exp(&h, i);
            if (ovlm_tensor_given(&a->lse)) {
                ovlm_ref_put(&a->lse, h.first_q + i, h.head, lse);
            }
            for (int64_t j = 0; j < seen; j++) {
                p[j] = exp(score(&h, i, j) - lse);
            }
            for (int64_t d = 0; d < h.dim_v; d++) {
                double sum = 0;
                for (int64_t j = 0; j < seen; j++) {
                    sum += p[j] * ovlm_ref_at(&a->v, h.first_k + j, h.kv_head * h.dim_v + d);
                }
                ovlm_ref_put(&a->o, h.first_q + i, h.head * h.dim_v + d, sum);
            }
        }
    }
    return OVLM_OK;
}

/* <dout_i, v_j>. */
static double dout_v(const head_view *h, int64_t i, int64_t j)
{
    double sum = 0;
    for (int64_t d = 0; d < h->dim_v; d++) {
        sum += ovlm_ref_at(&h->a->dout, h->first_q + i, h->head * h->dim_v + d) *
               ovlm_ref_at(&h->a->v, h->first_k + j, h->kv_head * h->dim_v + d);
    }
    return sum;
}

/* lse_i, and delta_i = <dout_i, o_i> = sum_j p_ij <dout_i, v_j>. */
static void attention_statistics(const ovlm_attention *a, double *lse, double *delta)
{
    for (int64_t s = 0; s < a->query.n * a->heads; s++) {
        head_view h = head_of(a, s / a->heads, s % a->heads);
        for (int64_t i = 0; i < h.nq; i++) {
            int64_t at = (h.first_q + i) * a->heads + h.head;
            lse[at] = ovlm_tensor_given(&a->lse) ? ovlm_ref_at(&a->lse, h.first_q + i, h.head)
                                                 : log_sum_exp(&h, i);
            delta[at] = 0;
            for (int64_t d = 0; d < h.dim_v; d++) {
                int64_t col = h.head * h.dim_v + d;
                delta[at] += ovlm_ref_at(&a->dout, h.first_q + i, col) *
                             ovlm_ref_at(&a->o, h.first_q + i, col);
            }
        }
    }
}

/* p_ij and ds_ij = p_ij (<dout_i, v_j> - delta_i). */
static void pair(const head_view *h, const double *lse, const double *delta, int64_t i, int64_t j,
                 double *p, double *ds)
{
    int64_t at = (h->first_q + i) * h->a->heads + h->head;
    *p = exp(score(h, i, j) - lse[at]);
    *ds = *p * (dout_v(h, i, j) - delta[at]);
}

/* dq_i = scale sum_j ds_ij k_j.  acc[D]. */
static void attention_dq(const head_view *h, const double *lse, const double *delta, double *acc)
{
    const ovlm_attention *a = h->a;
    for (int64_t i = 0; i < h->nq; i++) {
        double p, ds;
        memset(acc, 0, (size_t)h->dim * sizeof *acc);
        for (int64_t j = 0; j < keys_seen(h, i); j++) {
            pair(h, lse, delta, i, j, &p, &ds);
            for (int64_t d = 0; d < h->dim; d++) {
                acc[d] += ds * a->scale *
                          ovlm_ref_at(&a->k, h->first_k + j, h->kv_head * h->dim + d);
            }
        }
        for (int64_t d = 0; d < h->dim; d++) {
            ovlm_ref_put(&a->dq, h->first_q + i, h->head * h->dim + d, acc[d]);
        }
    }
}

/* Adds query head h's part of dk_j = scale sum_i ds_ij q_i and dv_j = sum_i p_ij dout_i. */
static void key_part(const head_view *h, int64_t j, const double *lse, const double *delta,
                     double *dk, double *dv)
{
    double p, ds;
    for (int64_t i = 0; i < h->nq; i++) {
        if (j >= keys_seen(h, i)) {
            continue;
        }
        pair(h, lse, delta, i, j, &p, &ds);
        for (int64_t d = 0; d < h->dim; d++) {
            dk[d] += ds * h->a->scale *
                     ovlm_ref_at(&h->a->q, h->first_q + i, h->head * h->dim + d);
        }
        for (int64_t d = 0; d < h->dim_v; d++) {
            dv[d] += p * ovlm_ref_at(&h->a->dout, h->first_q + i, h->head * h->dim_v + d);
        }
    }
}

/* dk and dv of a key/value head: sums over the query heads that read it.  acc[D + Dv]. */
static void attention_dkv(const ovlm_attention *a, int64_t segment, int64_t kv_head,
                          const double *lse, const double *delta, double *acc)
{
    int64_t share = a->heads / a->kv_heads;
    head_view h = head_of(a, segment, kv_head * share);
    for (int64_t j = 0; j < h.nk; j++) {
        double *dk = acc, *dv = acc + h.dim;
        memset(acc, 0, (size_t)(h.dim + h.dim_v) * sizeof *acc);
        for (int64_t head = kv_head * share; head < (kv_head + 1) * share; head++) {
            h = head_of(a, segment, head);
            key_part(&h, j, lse, delta, dk, dv);
        }
        for (int64_t d = 0; ovlm_tensor_given(&a->dk) && d < h.dim; d++) {
            ovlm_ref_put(&a->dk, h.first_k + j, kv_head * h.dim + d, dk[d]);
        }
        for (int64_t d = 0; ovlm_tensor_given(&a->dv) && d < h.dim_v; d++) {
            ovlm_ref_put(&a->dv, h.first_k + j, kv_head * h.dim_v + d, dv[d]);
        }
    }
}

ovlm_status ovlm_ref_attention_bwd(ovlm_queue *queue, const ovlm_attention *a, ovlm_err *err)
{
    OVLM_TRY(ovlm_op_check_attention(a, OVLM_PASS_BWD, err));
    const char *fault = attention_fault(a);
    if (fault != NULL) {
        OVLM_REF_LATE(queue, "attention backward: %s", fault);
    }
    double *lse = a->scratch.work, *delta = lse + a->q.rows * a->heads;
    double *acc = delta + a->q.rows * a->heads;
    attention_statistics(a, lse, delta);
    for (int64_t s = 0; ovlm_tensor_given(&a->dq) && s < a->query.n * a->heads; s++) {
        head_view h = head_of(a, s / a->heads, s % a->heads);
        attention_dq(&h, lse, delta, acc);
    }
    for (int64_t s = 0; s < a->key.n * a->kv_heads; s++) {
        attention_dkv(a, s / a->kv_heads, s % a->kv_heads, lse, delta, acc);
    }
    return OVLM_OK;
}

/* ---- merge ---- */

ovlm_status ovlm_ref_merge_measure(ovlm_backend *backend, const ovlm_merge *a,
                                   ovlm_op_bytes *bytes, ovlm_err *err)
{
    (void)backend;
    *bytes = (ovlm_op_bytes){0};
    return ovlm_op_check_merge(a, OVLM_PASS_MEASURE, err);
}

ovlm_status ovlm_ref_merge_fwd(ovlm_queue *queue, const ovlm_merge *a, ovlm_err *err)
{
    (void)queue;
    OVLM_TRY(ovlm_op_check_merge(a, OVLM_PASS_FWD, err));
    int64_t dim = a->o.cols / a->heads;
    for (int64_t i = 0; i < a->o.rows * a->heads; i++) {
        int64_t t = i / a->heads, head = i % a->heads;
        double lse = ovlm_ref_at(&a->lse, t, head), part = ovlm_ref_at(&a->part_lse, t, head);
        double most = fmax(lse, part), sum = most + log(exp(lse - most) + exp(part - most));
        for (int64_t d = head * dim; most > -INFINITY && d < (head + 1) * dim; d++) {
            ovlm_ref_put(&a->o, t, d,
                         exp(lse - sum) * ovlm_ref_at(&a->o, t, d) +
                             exp(part - sum) * ovlm_ref_at(&a->part, t, d));
        }
        ovlm_ref_put(&a->lse, t, head, most > -INFINITY ? sum : most);
    }
    return OVLM_OK;
}
