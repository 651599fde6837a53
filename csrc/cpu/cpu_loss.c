/* cpu_loss.c - targets, and the head of a language model without its T x V logits.
 *
 * Rows without a label are left out first.  The others go in chunks: logits of a chunk by one
 * product, then row by row
 *
 *   m = max l,  s = sum e^(l-m),  logp_j = l_j - m - log s,  H = log s - sum e^(l-m) (l-m) / s
 *   dl_j = dlogp (1[j = label] - p_j) - dentropy p_j (logp_j + H)
 *
 * in place, then dx = dl w and dw += dl^T x by two more products.  So the fused pass costs three
 * products, and a backward of its own computes the logits once more. */
#include <math.h>

#include "cpu/cpu_gemm.h"
#include "cpu/cpu_load.h"
#include "cpu/cpu_math.h"

enum { IGNORED = -100 };

/* ---- targets ---- */

ovlm_status ovlm_cpu_targets_measure(ovlm_backend *backend, const ovlm_targets *a,
                                     ovlm_op_bytes *bytes, ovlm_err *err)
{
    (void)backend;
    OVLM_CPU_CHECK(targets, a, MEASURE, err);
    *bytes = (ovlm_op_bytes){0};
    return OVLM_OK;
}

ovlm_status ovlm_cpu_targets_fwd(ovlm_queue *queue, const ovlm_targets *a, ovlm_err *err)
{
    (void)queue;
    OVLM_CPU_CHECK(targets, a, FWD, err);
    double sum = 0;
    int64_t counted = 0;
    for (int64_t t = 0; t < a->n; t++) {
        bool kept = a->label[t] != IGNORED;
        a->dlogp[t] = !kept ? 0 : a->weight != NULL ? -a->weight[t] : -1;
        sum -= (double)a->dlogp[t];
        counted += kept;
    }
    *a->count += counted;
    if (a->own_total) {
        *a->total = sum;
    }
    double total = *a->total;
    for (int64_t t = 0; t < a->n; t++) {
        a->dlogp[t] = total == 0 ? 0 : (float)((double)a->dlogp[t] / total);
    }
    return OVLM_OK;
}

/* ---- head: one row ---- */

enum {
    LOGITS = 1 << 22,  /* of a chunk, about: 16 MiB                                   */
    CHUNK_LEAST = 192, /* but this many rows, so that reading w pays                  */
    SUM_BLOCK = 512    /* elements summed in float32 before double takes over         */
};

typedef struct row_sums {
    float most;
    double sum, sum_l; /* of e^(l-m), and of e^(l-m) (l-m) */
} row_sums;

OVLM_CPU_INLINE float row_most(const float *l, int64_t n)
{
    float lane[SUM_BLOCK], most = l[0];
    int64_t i = 0;
    for (int64_t j = 0; j < SUM_BLOCK; j++) {
        lane[j] = most;
    }
    for (; i + SUM_BLOCK <= n; i += SUM_BLOCK) {
        for (int64_t j = 0; j < SUM_BLOCK; j++) {
            lane[j] = l[i + j] > lane[j] ? l[i + j] : lane[j];
        }
    }
    for (; i < n; i++) {
        most = l[i] > most ? l[i] : most;
    }
    for (int64_t j = 0; j < SUM_BLOCK; j++) {
        most = lane[j] > most ? lane[j] : most;
    }
    return most;
}

/* sum_l only with `spread`. */
OVLM_CPU_INLINE void row_sums_of_body(const float *l, int64_t n, bool spread, row_sums *r)
{
    float most = r->most = row_most(l, n), e[SUM_BLOCK] = {0}, x[SUM_BLOCK] = {0};
    r->sum = r->sum_l = 0;
    for (int64_t i = 0; i < n; i += SUM_BLOCK) {
        int64_t count = n - i < SUM_BLOCK ? n - i : SUM_BLOCK;
        for (int64_t j = 0; j < count; j++) {
            e[j] = ovlm_math_exp(l[i + j] - most);
        }
        for (int64_t j = 0; spread && j < count; j++) {
            x[j] = e[j] > 0 ? (l[i + j] - most) * e[j] : 0; /* -inf times 0 is not meant */
        }
        memset(e + count, 0, (size_t)(SUM_BLOCK - count) * sizeof *e);
        memset(x + count, 0, (size_t)(SUM_BLOCK - count) * sizeof *x);
        ovlm_f8 sum[2] = {{0}, {0}}, sum_l[2] = {{0}, {0}};
        for (int64_t j = 0; j < SUM_BLOCK; j += 16) {
            sum[0] += ovlm_f8_load(e + j);
            sum[1] += ovlm_f8_load(e + j + 8);
        }
        for (int64_t j = 0; spread && j < SUM_BLOCK; j += 16) {
            sum_l[0] += ovlm_f8_load(x + j);
            sum_l[1] += ovlm_f8_load(x + j + 8);
        }
        sum[0] += sum[1];
        sum_l[0] += sum_l[1];
        r->sum += (double)ovlm_f8_sum(&sum[0]);
        r->sum_l += (double)ovlm_f8_sum(&sum_l[0]);
    }
}
OVLM_CPU_KERNEL(row_sums_of, (const float *l, int64_t n, bool spread, row_sums *r),
                (l, n, spread, r))

/* l to dl: p_j (-dlogp - dentropy (logp_j + H)); the label's own part is added by the caller. */
OVLM_CPU_INLINE void row_slopes_body(float *l, int64_t n, float shift, float dlogp, float dentropy,
                                     float entropy)
{
    if (dentropy == 0) {
        for (int64_t j = 0; j < n; j++) {
            l[j] = -dlogp * ovlm_math_exp(l[j] - shift);
        }
        return;
    }
    for (int64_t j = 0; j < n; j++) {
        float logp = l[j] - shift, p = ovlm_math_exp(logp);
        float slope = p * (-dlogp - dentropy * (logp + entropy));
        l[j] = p > 0 ? slope : 0;
    }
}
OVLM_CPU_KERNEL(row_slopes,
                (float *l, int64_t n, float shift, float dlogp, float dentropy, float entropy),
                (l, n, shift, dlogp, dentropy, entropy))

/* ---- head: all rows ---- */

/* `work`: numbers of the rows with a label [T], logits of a chunk, dx of a chunk. */
typedef struct head_job {
    const ovlm_head *a;
    const int32_t *row; /* of the present chunk */
    float *logits, *dx;
    bool outputs, gradients;
} head_job;

static int64_t chunk_rows(const ovlm_head *a)
{
    int64_t rows = LOGITS / a->w.rows;
    rows = rows < CHUNK_LEAST ? CHUNK_LEAST : rows;
    return rows < a->x.rows ? rows : a->x.rows;
}

static int64_t aligned_floats(int64_t n)
{
    return (n + 15) / 16 * 16;
}

ovlm_status ovlm_cpu_head_measure(ovlm_backend *backend, const ovlm_head *a, ovlm_op_bytes *bytes,
                                  ovlm_err *err)
{
    (void)backend;
    OVLM_CPU_CHECK(head, a, MEASURE, err);
    int64_t rows = chunk_rows(a);
    int64_t work = aligned_floats(a->x.rows) + aligned_floats(rows * a->w.rows) + rows * a->x.cols;
    *bytes = (ovlm_op_bytes){.fwd_work = work * (int64_t)sizeof(float),
                             .bwd_work = work * (int64_t)sizeof(float)};
    return OVLM_OK;
}

static void chunk_row_sums(const void *context, int64_t first, int64_t count, float *scratch)
{
    (void)scratch;
    const head_job *job = context;
    const ovlm_head *a = job->a;
    int64_t vocabulary = a->w.rows;
    for (int64_t i = first; i < first + count; i++) {
        int64_t t = job->row[i];
        float *l = job->logits + i * vocabulary;
        row_sums r;
        row_sums_of(l, vocabulary, a->entropy != NULL || a->dentropy != NULL, &r);
        double log_sum = log(r.sum), entropy = log_sum - r.sum_l / r.sum;
        float shift = (float)((double)r.most + log_sum);
        if (job->outputs) {
            a->logp[t] = (float)((double)l[a->label[t]] - (double)r.most - log_sum);
            if (a->entropy != NULL) {
                a->entropy[t] = (float)entropy;
            }
        }
        if (job->gradients) {
            float dentropy = a->dentropy != NULL ? a->dentropy[t] : 0;
            row_slopes(l, vocabulary, shift, a->dlogp[t], dentropy, (float)entropy);
            l[a->label[t]] += a->dlogp[t];
        }
    }
}

/* dx of the chunk's rows to where they belong. */
static void scatter_dx(const void *context, int64_t first, int64_t count, float *scratch)
{
    const head_job *job = context;
    const ovlm_head *a = job->a;
    int64_t columns = a->x.cols;
    for (int64_t i = first; i < first + count; i++) {
        const float *from = job->dx + i * columns;
        for (int64_t c = 0; c < columns; c += OVLM_CPU_ROW) {
            int64_t n = columns - c < OVLM_CPU_ROW ? columns - c : OVLM_CPU_ROW;
            void *to = ovlm_cpu_at(&a->dx, job->row[i], c);
            if (a->dx_beta == 0) {
                ovlm_cpu_store(to, from + c, n, a->dx.dtype);
            } else {
                ovlm_cpu_load(scratch, to, n, a->dx.dtype);
                ovlm_cpu_add_scaled(scratch, from + c, 1, n);
                ovlm_cpu_store(to, scratch, n, a->dx.dtype);
            }
        }
    }
}

static void run_chunk(ovlm_cpu *cpu, const head_job *job, int64_t rows, bool first)
{
    const ovlm_head *a = job->a;
    ovlm_tensor logits = ovlm_tensor_of(job->logits, rows, a->w.rows, OVLM_F32);
    ovlm_gemm product = {.m = rows, .n = a->w.rows, .k = a->x.cols,
                         .a = ovlm_gemm_rows(&a->x, job->row),
                         .b = ovlm_gemm_rows(&a->w, NULL), .y = logits};
    ovlm_gemm_run(cpu, &product);
    ovlm_cpu_rows(cpu, rows, 4 * a->w.rows, chunk_row_sums, job);
    if (job->gradients && ovlm_tensor_given(&a->dx)) {
        ovlm_gemm dx = {.m = rows, .n = a->x.cols, .k = a->w.rows,
                        .a = ovlm_gemm_rows(&logits, NULL), .b = ovlm_gemm_cols(&a->w, NULL),
                        .y = ovlm_tensor_of(job->dx, rows, a->x.cols, OVLM_F32)};
        ovlm_gemm_run(cpu, &dx);
        ovlm_cpu_rows(cpu, rows, a->x.cols, scatter_dx, job);
    }
    if (job->gradients && ovlm_tensor_given(&a->dw)) {
        ovlm_gemm dw = {.m = a->w.rows, .n = a->x.cols, .k = rows,
                        .a = ovlm_gemm_cols(&logits, NULL),
                        .b = ovlm_gemm_cols(&a->x, job->row), .y = a->dw,
                        .accumulate = !first || a->dw_beta != 0};
        ovlm_gemm_run(cpu, &dw);
    }
}

/* What ignored rows and no rows at all give. */
static void begin(ovlm_cpu *cpu, const head_job *job, int64_t labelled)
{
    const ovlm_head *a = job->a;
    for (int64_t t = 0; job->outputs && t < a->x.rows; t++) {
        a->logp[t] = 0;
        if (a->entropy != NULL) {
            a->entropy[t] = 0;
        }
    }
    if (job->gradients && ovlm_tensor_given(&a->dx) && a->dx_beta == 0 &&
        labelled < a->x.rows) {
        ovlm_cpu_clear(cpu, &a->dx);
    }
    if (job->gradients && ovlm_tensor_given(&a->dw) && a->dw_beta == 0 && labelled == 0) {
        ovlm_cpu_clear(cpu, &a->dw);
    }
}

static ovlm_status run_head(ovlm_cpu *cpu, const ovlm_head *a, bool outputs, bool gradients,
                            ovlm_err *err)
{
    int64_t most = chunk_rows(a), labelled = 0;
    int32_t *row = a->scratch.work;
    head_job job = {.a = a, .outputs = outputs, .gradients = gradients};
    job.logits = (float *)a->scratch.work + aligned_floats(a->x.rows);
    job.dx = job.logits + aligned_floats(most * a->w.rows);
    for (int64_t t = 0; t < a->x.rows; t++) {
        if (a->label[t] == IGNORED) {
            continue;
        }
        if (a->label[t] < 0 || a->label[t] >= a->w.rows) {
            return OVLM_FAIL(err, OVLM_E_ARG,
                             "head: label[%lld] is %d; it must be -100 or in [0, %lld)",
                             (long long)t, (int)a->label[t], (long long)a->w.rows);
        }
        row[labelled++] = (int32_t)t;
    }
    begin(cpu, &job, labelled);
    for (int64_t first = 0; first < labelled; first += most) {
        job.row = row + first;
        run_chunk(cpu, &job, labelled - first < most ? labelled - first : most, first == 0);
    }
    return OVLM_OK;
}

ovlm_status ovlm_cpu_head_fwd(ovlm_queue *queue, const ovlm_head *a, ovlm_err *err)
{
    OVLM_CPU_CHECK(head, a, FWD, err);
    OVLM_TRY(run_head(ovlm_cpu_of(queue), a, true, a->fused, err));
    for (int64_t t = 0; a->loss != NULL && t < a->x.rows; t++) {
        *a->loss += (double)a->dlogp[t] * (double)a->logp[t];
    }
    return OVLM_OK;
}

ovlm_status ovlm_cpu_head_bwd(ovlm_queue *queue, const ovlm_head *a, ovlm_err *err)
{
    OVLM_CPU_CHECK(head, a, BWD, err);
    return run_head(ovlm_cpu_of(queue), a, false, true, err);
}
