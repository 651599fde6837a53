/* test_cpu_attention.c - attention against plain loops in double, bit for bit the same however
 * queries are batched and shared out, and from parts of its keys. */
#include "cpu_rig.h"

enum { SEGMENTS_MOST = 6 };

typedef struct sizes {
    int64_t n, heads, kv_heads, d, dv;
    int64_t nq[SEGMENTS_MOST], nk[SEGMENTS_MOST];
    int32_t q_start[SEGMENTS_MOST + 1], k_start[SEGMENTS_MOST + 1];
    int32_t q_len[SEGMENTS_MOST], k_len[SEGMENTS_MOST];
    int64_t tq, tk;
} sizes;

/* Segments with rows between them that belong to none, or back to back. */
static void draw(sizes *s, int64_t longest, bool gaps)
{
    s->tq = s->tk = 0;
    for (int64_t i = 0; i < s->n; i++) {
        int64_t pad = gaps ? rig_below(3) : 0;
        s->nq[i] = rig_below(4) == 0 ? rig_below(2) : rig_below(longest);
        s->nk[i] = rig_below(4) == 0 ? rig_below(2) : rig_below(2 * longest);
        s->nk[i] = rig_below(2) ? s->nq[i] : s->nk[i];
        s->q_start[i] = (int32_t)(s->tq + pad);
        s->k_start[i] = (int32_t)(s->tk + pad);
        s->q_len[i] = (int32_t)s->nq[i];
        s->k_len[i] = (int32_t)s->nk[i];
        s->tq += pad + s->nq[i];
        s->tk += pad + s->nk[i];
    }
    s->q_start[s->n] = (int32_t)s->tq;
    s->k_start[s->n] = (int32_t)s->tk;
}

static ovlm_attention attention_of(const sizes *s, bool gaps, bool causal, double scale)
{
    ovlm_attention a = {.heads = s->heads, .kv_heads = s->kv_heads, .causal = causal,
                        .scale = scale,
                        .query = {.n = s->n, .max_len = s->tq, .start = s->q_start},
                        .key = {.n = s->n, .max_len = s->tk, .start = s->k_start}};
    if (gaps) {
        a.query.length = s->q_len;
        a.key.length = s->k_len;
    }
    return a;
}

typedef struct want {
    double *o, *dq, *dk, *dv;
} want;

/* One segment and head. */
static void reference(const ovlm_attention *a, const sizes *s, int64_t segment, int64_t head,
                      want *w)
{
    int64_t nq = s->nq[segment], nk = s->nk[segment], q0 = s->q_start[segment];
    int64_t k0 = s->k_start[segment], g = head * s->kv_heads / s->heads;
    double *p = calloc((size_t)nk + 1, 8), *dp = calloc((size_t)nk + 1, 8);
    for (int64_t i = 0; i < nq; i++) {
        int64_t seen = a->causal ? nk - nq + i + 1 : nk;
        double most = -INFINITY, sum = 0, delta = 0;
        for (int64_t j = 0; j < seen; j++) {
            p[j] = 0;
            for (int64_t c = 0; c < s->d; c++) {
                p[j] += a->scale * rig_get(&a->q, q0 + i, head * s->d + c) *
                        rig_get(&a->k, k0 + j, g * s->d + c);
            }
            most = p[j] > most ? p[j] : most;
        }
        for (int64_t j = 0; j < seen; j++) {
            p[j] = exp(p[j] - most);
            sum += p[j];
        }
        for (int64_t j = 0; j < seen; j++) {
            p[j] /= sum;
            dp[j] = 0;
            for (int64_t c = 0; c < s->dv; c++) {
                int64_t at = (q0 + i) * s->heads * s->dv + head * s->dv + c;
                double dout = rig_get(&a->dout, q0 + i, head * s->dv + c);
                w->o[at] += p[j] * rig_get(&a->v, k0 + j, g * s->dv + c);
                dp[j] += dout * rig_get(&a->v, k0 + j, g * s->dv + c);
                w->dv[(k0 + j) * s->kv_heads * s->dv + g * s->dv + c] += p[j] * dout;
            }
            delta += p[j] * dp[j];
        }
        for (int64_t j = 0; j < seen; j++) {
            double ds = a->scale * p[j] * (dp[j] - delta);
            for (int64_t c = 0; c < s->d; c++) {
                w->dq[(q0 + i) * s->heads * s->d + head * s->d + c] +=
                    ds * rig_get(&a->k, k0 + j, g * s->d + c);
                w->dk[(k0 + j) * s->kv_heads * s->d + g * s->d + c] +=
                    ds * rig_get(&a->q, q0 + i, head * s->d + c);
            }
        }
    }
    free(p);
    free(dp);
}

/* Rows outside every segment must stay as they were: set them in what is wanted and in what is
 * got to 0 after looking. */
static void outside(const char *what, ovlm_tensor *t, int64_t n, const int32_t *start,
                    const int64_t *length)
{
    for (int64_t row = 0; row < t->rows; row++) {
        bool inside = false;
        for (int64_t i = 0; i < n; i++) {
            inside |= row >= start[i] && row < start[i] + length[i];
        }
        for (int64_t c = 0; !inside && c < t->cols; c++) {
            const unsigned char *byte = rig_place(t, row, c);
            CHECK(byte[0] == 0xff && byte[1] == 0xff, "%s: row %lld is outside, but written", what,
                  (long long)row);
            rig_set(t, row, c, 0);
        }
    }
}

static void forward_again(rig *r, const ovlm_attention *whole, const sizes *s, int64_t segment,
                          int64_t first, int64_t count)
{
    int64_t nk = s->nk[segment];
    if (whole->causal) { /* the last of these queries must be at the end of the keys */
        nk = nk - s->nq[segment] + first + count;
        nk = nk < 0 ? 0 : nk;
        if (nk == 0) {
            return;
        }
    }
    int32_t q_start[2] = {0, (int32_t)count}, k_start[2] = {0, (int32_t)nk};
    ovlm_attention a = *whole;
    a.query = (ovlm_segments){.n = 1, .max_len = count, .start = q_start};
    a.key = (ovlm_segments){.n = 1, .max_len = nk, .start = k_start};
    a.q = ovlm_tensor_rows(whole->q, s->q_start[segment] + first, count);
    a.k = ovlm_tensor_rows(whole->k, s->k_start[segment], nk);
    a.v = ovlm_tensor_rows(whole->v, s->k_start[segment], nk);
    a.o = rig_empty(count, whole->o.cols, whole->o.dtype);
    RIG_SCRATCH(r, attention, &a);
    RIG_RUN(r, attention, fwd, &a);
    rig_same("o of some queries", &whole->o, s->q_start[segment] + first, &a.o);
    RIG_SCRATCH_FREE(&a);
    rig_free(&a.o);
}

static void backward_again(rig *r, const ovlm_attention *whole)
{
    ovlm_attention a = *whole;
    a.o = rig_copy(&whole->o);
    a.dq = rig_empty(a.q.rows, a.q.cols, a.q.dtype);
    a.dk = rig_empty(a.k.rows, a.k.cols, a.q.dtype);
    a.dv = rig_empty(a.v.rows, a.v.cols, a.q.dtype);
    RIG_SCRATCH(r, attention, &a);
    RIG_RUN(r, attention, fwd, &a);
    RIG_RUN(r, attention, bwd, &a);
    rig_same("o", &whole->o, 0, &a.o);
    rig_same("dq", &whole->dq, 0, &a.dq);
    rig_same("dk", &whole->dk, 0, &a.dk);
    rig_same("dv", &whole->dv, 0, &a.dv);
    RIG_SCRATCH_FREE(&a);
    rig_free(&a.o);
    rig_free(&a.dq);
    rig_free(&a.dk);
    rig_free(&a.dv);
}

static double *zeros(int64_t rows, int64_t cols)
{
    return calloc((size_t)(rows * cols + 1), sizeof(double));
}

static void run_case(rig *one, rig *many, ovlm_dtype dtype, int64_t longest)
{
    bool gaps = rig_below(2), causal = rig_below(2);
    sizes s = {.n = rig_below(SEGMENTS_MOST + 1), .kv_heads = 1 + rig_below(3),
               .d = 1 + rig_below(40), .dv = 1 + rig_below(40)};
    s.heads = s.kv_heads * (1 + rig_below(4));
    if (rig_below(2)) { /* whole vectors: keys and values are read where they are */
        s.d = (s.d + 7) / 8 * 8;
        s.dv = (s.dv + 7) / 8 * 8;
    }
    draw(&s, longest, gaps);
    ovlm_attention a = attention_of(&s, gaps, causal, 0.5 / sqrt((double)s.d));
    a.q = rig_random(s.tq, s.heads * s.d, dtype);
    a.k = rig_random(s.tk, s.kv_heads * s.d, dtype);
    a.v = rig_random(s.tk, s.kv_heads * s.dv, dtype);
    a.dout = rig_random(s.tq, s.heads * s.dv, dtype);
    a.o = rig_empty(s.tq, s.heads * s.dv, dtype);
    a.dq = rig_empty(s.tq, s.heads * s.d, dtype);
    a.dk = rig_empty(s.tk, s.kv_heads * s.d, dtype);
    a.dv = rig_empty(s.tk, s.kv_heads * s.dv, dtype);
    RIG_SCRATCH(one, attention, &a);
    RIG_RUN(one, attention, fwd, &a);
    RIG_RUN(one, attention, bwd, &a);
    backward_again(many, &a);
    for (int64_t i = 0; i < s.n; i++) {
        int64_t half = s.nq[i] / 2;
        forward_again(many, &a, &s, i, 0, half);
        forward_again(one, &a, &s, i, half, s.nq[i] - half);
        forward_again(one, &a, &s, i, s.nq[i] > 0 ? s.nq[i] - 1 : 0, s.nq[i] > 0);
    }
    want w = {zeros(s.tq, a.o.cols), zeros(s.tq, a.q.cols), zeros(s.tk, a.k.cols),
              zeros(s.tk, a.v.cols)};
    for (int64_t i = 0; i < s.n; i++) {
        for (int64_t head = 0; head < s.heads; head++) {
            reference(&a, &s, i, head, &w);
        }
    }
    outside("o", &a.o, s.n, s.q_start, s.nq);
    outside("dq", &a.dq, s.n, s.q_start, s.nq);
    outside("dk", &a.dk, s.n, s.k_start, s.nk);
    outside("dv", &a.dv, s.n, s.k_start, s.nk);
    /* dP - delta cancels, wholly where one key is seen; in bfloat16 o and so delta are rounded. */
    double loose = dtype == OVLM_BF16 ? 5e-2 : 5e-5;
    rig_near("o", &a.o, w.o, loose);
    rig_near_least("dq", &a.dq, w.dq, loose, 0.2);
    rig_near_least("dk", &a.dk, w.dk, loose, 0.2);
    rig_near("dv", &a.dv, w.dv, loose);
    RIG_SCRATCH_FREE(&a);
    ovlm_tensor *all[] = {&a.q, &a.k, &a.v, &a.dout, &a.o, &a.dq, &a.dk, &a.dv};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        rig_free(all[i]);
    }
    free(w.o);
    free(w.dq);
    free(w.dk);
    free(w.dv);
}

/* ---- keys in parts ---- */

/* Queries that are the last of their segment, with as many keys of their own, and keys before. */
typedef struct parts {
    rig *r;
    ovlm_attention whole;
    int64_t nq, before, cut; /* keys [0, cut), [cut, before), and the queries' own */
    ovlm_tensor lse, sum[3]; /* of o, of dq: float32; what a part gives            */
} parts;

/* Keys first .. first + count - 1 alone; its gradients are views of the whole's. */
static ovlm_attention part_of(const parts *p, int64_t first, int64_t count, int32_t bounds[4])
{
    ovlm_attention a = p->whole;
    bounds[0] = bounds[2] = 0;
    bounds[1] = (int32_t)p->nq;
    bounds[3] = (int32_t)count;
    a.causal = first == p->before; /* keys before the queries are all seen */
    a.query = (ovlm_segments){.n = 1, .max_len = p->nq, .start = bounds};
    a.key = (ovlm_segments){.n = 1, .max_len = count, .start = bounds + 2};
    a.k = ovlm_tensor_rows(a.k, first, count);
    a.v = ovlm_tensor_rows(a.v, first, count);
    a.dk = ovlm_tensor_rows(a.dk, first, count);
    a.dv = ovlm_tensor_rows(a.dv, first, count);
    return a;
}

/* to = beta to + from */
static void add_to(rig *r, const ovlm_tensor *to, const ovlm_tensor *from, double beta)
{
    ovlm_scale sum = {.alpha = 1, .beta = beta, .x = *from, .y = *to};
    RIG_SCRATCH(r, scale, &sum);
    RIG_RUN(r, scale, fwd, &sum);
    RIG_SCRATCH_FREE(&sum);
}

static void forward_part(parts *p, int64_t first, int64_t count, bool begin)
{
    int32_t bounds[4];
    ovlm_attention a = part_of(p, first, count, bounds);
    a.lse = begin ? p->lse : rig_empty(p->nq, a.heads, OVLM_F32);
    a.o = p->sum[2];
    RIG_SCRATCH(p->r, attention, &a);
    RIG_RUN(p->r, attention, fwd, &a);
    RIG_SCRATCH_FREE(&a);
    if (begin) {
        add_to(p->r, &p->sum[0], &a.o, 0);
        return;
    }
    ovlm_merge merge = {.heads = a.heads, .o = p->sum[0], .lse = p->lse, .part = a.o,
                        .part_lse = a.lse};
    RIG_SCRATCH(p->r, merge, &merge);
    RIG_RUN(p->r, merge, fwd, &merge);
    RIG_SCRATCH_FREE(&merge);
    rig_free(&a.lse);
}

static void backward_part(parts *p, int64_t first, int64_t count, bool begin)
{
    int32_t bounds[4];
    ovlm_attention a = part_of(p, first, count, bounds);
    a.lse = p->lse;
    a.dq = rig_empty(p->nq, a.q.cols, a.q.dtype);
    RIG_SCRATCH(p->r, attention, &a);
    RIG_RUN(p->r, attention, bwd, &a);
    add_to(p->r, &p->sum[1], &a.dq, begin ? 0 : 1);
    RIG_SCRATCH_FREE(&a);
    rig_free(&a.dq);
}

static void check_whole(const parts *p, double loose)
{
    const ovlm_attention *a = &p->whole;
    sizes s = {.n = 1, .heads = a->heads, .kv_heads = a->kv_heads, .d = a->q.cols / a->heads,
               .dv = a->v.cols / a->kv_heads, .nq = {p->nq}, .nk = {a->k.rows}};
    want w = {zeros(p->nq, a->o.cols), zeros(p->nq, a->q.cols), zeros(a->k.rows, a->k.cols),
              zeros(a->v.rows, a->v.cols)};
    for (int64_t head = 0; head < s.heads; head++) {
        reference(a, &s, 0, head, &w);
    }
    rig_near("merged o", &a->o, w.o, loose);
    rig_near_least("dq of parts", &p->sum[1], w.dq, loose, 0.2);
    rig_near_least("dk of parts", &a->dk, w.dk, loose, 0.2);
    rig_near("dv of parts", &a->dv, w.dv, loose);
    free(w.o);
    free(w.dq);
    free(w.dk);
    free(w.dv);
}

static void run_parts(rig *r, ovlm_dtype dtype)
{
    int64_t d = 1 + rig_below(40), dv = 1 + rig_below(40), kv_heads = 1 + rig_below(3);
    int64_t heads = kv_heads * (1 + rig_below(3));
    parts p = {.r = r, .nq = 1 + rig_below(70), .before = rig_below(150)};
    p.cut = rig_below(p.before + 1);
    int64_t nk = p.before + p.nq;
    ovlm_attention *a = &p.whole;
    *a = (ovlm_attention){.heads = heads, .kv_heads = kv_heads, .causal = true,
                          .scale = 0.5 / sqrt((double)d)};
    a->q = rig_random(p.nq, heads * d, dtype);
    a->k = rig_random(nk, kv_heads * d, dtype);
    a->v = rig_random(nk, kv_heads * dv, dtype);
    a->dout = rig_random(p.nq, heads * dv, dtype);
    a->o = rig_empty(p.nq, heads * dv, dtype);
    a->dk = rig_empty(nk, kv_heads * d, dtype);
    a->dv = rig_empty(nk, kv_heads * dv, dtype);
    p.lse = rig_empty(p.nq, heads, OVLM_F32);
    p.sum[0] = rig_empty(p.nq, heads * dv, OVLM_F32);
    p.sum[1] = rig_empty(p.nq, heads * d, OVLM_F32);
    p.sum[2] = rig_empty(p.nq, heads * dv, dtype);
    forward_part(&p, p.before, p.nq, true);
    forward_part(&p, 0, p.cut, false); /* of no key, at times */
    forward_part(&p, p.cut, p.before - p.cut, false);
    add_to(r, &a->o, &p.sum[0], 0);
    backward_part(&p, 0, p.cut, true);
    backward_part(&p, p.cut, p.before - p.cut, false);
    backward_part(&p, p.before, p.nq, false);
    check_whole(&p, dtype == OVLM_BF16 ? 5e-2 : 5e-5);
    ovlm_tensor *all[] = {&a->q, &a->k, &a->v, &a->dout, &a->o, &a->dk, &a->dv, &p.lse,
                          &p.sum[0], &p.sum[1], &p.sum[2]};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        rig_free(all[i]);
    }
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    rig one, many;
    rig_open(&one, 1);
    rig_open(&many, 3);
    for (int i = 0; i < 40; i++) {
        run_case(&one, &many, i % 4 == 3 ? OVLM_BF16 : OVLM_F32, i % 8 == 0 ? 200 : 30);
    }
    for (int i = 0; i < 24; i++) {
        run_parts(i % 2 ? &one : &many, i % 3 == 2 ? OVLM_BF16 : OVLM_F32);
    }
    rig_close(&one);
    rig_close(&many);
    return test_end("cpu_attention");
}
