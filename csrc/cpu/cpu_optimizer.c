/* cpu_optimizer.c - the norm of all gradients, and AdamW, over lists of tensors.
 *
 * Every tensor is cut into pieces of fixed size; pieces of all tensors are shared out together, and
 * each leaves its sum of squares in `work`, so that the norm does not depend on the threads. */
#include <math.h>

#include "cpu/cpu_load.h"

enum { PIECE_ELEMENTS = 1 << 15 };


static int64_t pieces_of(int64_t columns)
{
    return (columns + PIECE_ELEMENTS - 1) / PIECE_ELEMENTS;
}

static int64_t pieces_of_tensor(const ovlm_tensor *t, bool dense)
{
    return dense ? pieces_of(t->rows * t->cols) : t->rows * pieces_of(t->cols);
}

/* Piece `index` of a tensor; offsets of all tensors of a part agree when their strides do. */
static void piece_get(const ovlm_tensor *t, bool dense, int64_t index, int64_t *row, int64_t *col,
                      int64_t *n)
{
    int64_t columns = dense ? t->rows * t->cols : t->cols, per_row = pieces_of(columns);
    *row = index / per_row;
    *col = index % per_row * PIECE_ELEMENTS;
    *n = columns - *col < PIECE_ELEMENTS ? columns - *col : PIECE_ELEMENTS;
}

static bool is_dense(const ovlm_tensor *t)
{
    return t->stride == t->cols || t->rows <= 1;
}

/* ---- grad_norm ---- */

typedef struct piece_sum {
    double square;
    int64_t non_finite;
} piece_sum;

typedef double d4 __attribute__((vector_size(32)));
typedef float f4_any __attribute__((vector_size(16), aligned(4), may_alias));

/* Squares in double, in four running sums; what is not finite is counted. */
OVLM_CPU_INLINE void sum_squares_body(const float *g, int64_t n, piece_sum *out)
{
    d4 sum[2] = {{0}, {0}};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        d4 a = __builtin_convertvector(*(const f4_any *)(g + i), d4);
        d4 b = __builtin_convertvector(*(const f4_any *)(g + i + 4), d4);
        sum[0] += a * a;
        sum[1] += b * b;
    }
    double rest = 0;
    for (; i < n; i++) {
        rest += (double)g[i] * (double)g[i];
    }
    sum[0] += sum[1];
    out->square = ((sum[0][0] + sum[0][2]) + (sum[0][1] + sum[0][3])) + rest;
    int32_t bad = 0;
    for (i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &g[i], sizeof bits);
        bad += (bits & 0x7f800000u) == 0x7f800000u;
    }
    out->non_finite = bad;
}
OVLM_CPU_KERNEL(sum_squares, (const float *g, int64_t n, piece_sum *out), (g, n, out))

typedef struct norm_job {
    const ovlm_grad_norm *a;
    const int64_t *start;
    piece_sum *sum;
} norm_job;

static void norm_piece(void *context, int64_t index, int64_t thread)
{
    (void)thread;
    const norm_job *job = context;
    int64_t tensor = ovlm_cpu_find(job->start, job->a->n, index), row, col, n;
    const ovlm_tensor *t = &job->a->grad[tensor];
    piece_get(t, is_dense(t), index - job->start[tensor], &row, &col, &n);
    sum_squares(ovlm_cpu_at(t, row, col), n, &job->sum[index]);
}

ovlm_status ovlm_cpu_grad_norm_measure(ovlm_backend *backend, const ovlm_grad_norm *a,
                                       ovlm_op_bytes *bytes, ovlm_err *err)
{
    (void)backend;
    OVLM_CPU_CHECK(grad_norm, a, MEASURE, err);
    int64_t pieces = 0;
    for (int64_t i = 0; i < a->n; i++) {
        pieces += pieces_of_tensor(&a->grad[i], is_dense(&a->grad[i]));
    }
    *bytes = (ovlm_op_bytes){.fwd_work = (a->n + 1) * (int64_t)sizeof(int64_t) +
                                         pieces * (int64_t)sizeof(piece_sum)};
    return OVLM_OK;
}

ovlm_status ovlm_cpu_grad_norm_fwd(ovlm_queue *queue, const ovlm_grad_norm *a, ovlm_err *err)
{
    OVLM_CPU_CHECK(grad_norm, a, FWD, err);
    int64_t *start = a->scratch.work;
    start[0] = 0;
    for (int64_t i = 0; i < a->n; i++) {
        start[i + 1] = start[i] + pieces_of_tensor(&a->grad[i], is_dense(&a->grad[i]));
    }
    norm_job job = {a, start, (piece_sum *)(void *)(start + a->n + 1)};
    ovlm_pool_run(ovlm_cpu_of(queue)->pool, start[a->n], norm_piece, &job);
    for (int64_t i = 0; i < start[a->n]; i++) {
        a->stats->norm_sq += job.sum[i].square;
        a->stats->non_finite += job.sum[i].non_finite;
    }
    return OVLM_OK;
}

/* ---- adamw ---- */

/* Factors of one part, in the names of algorithm 2. */
typedef struct adam_factors {
    float clip, beta1, rest1, beta2, rest2, eps;
    float decay;  /* 1 - lr weight_decay         */
    float rate;   /* lr / (1 - beta1^step)       */
    float root2;  /* 1 / sqrt(1 - beta2^step)    */
} adam_factors;

OVLM_CPU_INLINE void adam_piece_body(float *restrict w, float *restrict m, float *restrict v,
                                     const float *restrict grad, int64_t n, const adam_factors *f)
{
    adam_factors k = *f;
    for (int64_t i = 0; i < n; i++) {
        float g = k.clip * grad[i];
        m[i] = k.beta1 * m[i] + k.rest1 * g;          /* lines 7, 8  */
        v[i] = k.beta2 * v[i] + k.rest2 * (g * g);
        float step = m[i] / (sqrtf(v[i]) * k.root2 + k.eps);
        w[i] = k.decay * w[i] - k.rate * step;        /* line 12     */
    }
}
OVLM_CPU_KERNEL(adam_piece,
                (float *w, float *m, float *v, const float *grad, int64_t n,
                 const adam_factors *f),
                (w, m, v, grad, n, f))

typedef struct adam_job {
    const ovlm_adamw *a;
    const int64_t *start;
    float clip;
} adam_job;

static const ovlm_tensor *master_of(const ovlm_adamw_part *p)
{
    return ovlm_tensor_given(&p->master) ? &p->master : &p->w;
}

static bool part_is_dense(const ovlm_adamw_part *p)
{
    return is_dense(&p->w) && is_dense(master_of(p)) && is_dense(&p->m) && is_dense(&p->v) &&
           is_dense(&p->grad);
}

static void adam_one(void *context, int64_t index, int64_t thread)
{
    (void)thread;
    const adam_job *job = context;
    const ovlm_adamw *a = job->a;
    int64_t number = ovlm_cpu_find(job->start, a->n, index), row, col, n;
    const ovlm_adamw_part *p = &a->part[number];
    const ovlm_tensor *master = master_of(p);
    piece_get(&p->w, part_is_dense(p), index - job->start[number], &row, &col, &n);
    double steps = (double)a->step;
    adam_factors f = {.clip = job->clip, .beta1 = (float)a->beta1, .rest1 = (float)(1 - a->beta1),
                      .beta2 = (float)a->beta2, .rest2 = (float)(1 - a->beta2),
                      .eps = (float)a->eps, .decay = (float)(1 - p->lr * p->weight_decay),
                      .rate = (float)(p->lr / (1 - pow(a->beta1, steps))),
                      .root2 = (float)(1 / sqrt(1 - pow(a->beta2, steps)))};
    float *w = ovlm_cpu_at(master, row, col);
    adam_piece(w, ovlm_cpu_at(&p->m, row, col), ovlm_cpu_at(&p->v, row, col),
               ovlm_cpu_at(&p->grad, row, col), n, &f);
    if (master != &p->w) {
        ovlm_cpu_store(ovlm_cpu_at(&p->w, row, col), w, n, p->w.dtype);
    }
}

ovlm_status ovlm_cpu_adamw_measure(ovlm_backend *backend, const ovlm_adamw *a,
                                   ovlm_op_bytes *bytes, ovlm_err *err)
{
    (void)backend;
    OVLM_CPU_CHECK(adamw, a, MEASURE, err);
    *bytes = (ovlm_op_bytes){.fwd_work = (a->n + 1) * (int64_t)sizeof(int64_t)};
    return OVLM_OK;
}

ovlm_status ovlm_cpu_adamw_fwd(ovlm_queue *queue, const ovlm_adamw *a, ovlm_err *err)
{
    OVLM_CPU_CHECK(adamw, a, FWD, err);
    double clip = a->max_norm / (sqrt(a->stats->norm_sq) + 1e-6);
    clip = a->max_norm > 0 && clip < 1 ? clip : 1;
    a->stats->clip = clip;
    if (a->stats->non_finite > 0) {
        return OVLM_OK;
    }
    int64_t *start = a->scratch.work;
    start[0] = 0;
    for (int64_t i = 0; i < a->n; i++) {
        start[i + 1] = start[i] + pieces_of_tensor(&a->part[i].w, part_is_dense(&a->part[i]));
    }
    adam_job job = {a, start, (float)clip};
    ovlm_pool_run(ovlm_cpu_of(queue)->pool, start[a->n], adam_one, &job);
    return OVLM_OK;
}
