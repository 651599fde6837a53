/* cpu_matmul.c - linear layers.
 *
 * y = act(x w^T + bias) + add is one product with an epilogue.  Backward: dpre = dy act'(pre) once
 * into scratch, since both dx = dpre w and dw = dpre^T x read it; column sums of dpre on the way.
 * Sums over T go in blocks of SUM_ROWS rows and then over blocks, for any number of threads. */
#include "cpu/cpu_gemm.h"
#include "cpu/cpu_load.h"

enum { SUM_ROWS = 256, ALIGN = 64 };

static int64_t sum_blocks(int64_t rows)
{
    return (rows + SUM_ROWS - 1) / SUM_ROWS;
}

static int64_t aligned(int64_t bytes)
{
    return (bytes + ALIGN - 1) / ALIGN * ALIGN;
}

/* Bytes of dpre in scratch: without an activation it is dy. */
static int64_t slope_bytes(const ovlm_linear *a)
{
    return a->act == OVLM_ACT_NONE ? 0 : aligned(a->x.rows * a->y.cols * (int64_t)sizeof(float));
}

ovlm_status ovlm_cpu_linear_measure(ovlm_backend *backend, const ovlm_linear *a,
                                    ovlm_op_bytes *bytes, ovlm_err *err)
{
    (void)backend;
    OVLM_CPU_CHECK(linear, a, MEASURE, err);
    int64_t sums = ovlm_tensor_given(&a->dbias)
                       ? aligned(sum_blocks(a->x.rows) * a->y.cols * (int64_t)sizeof(float))
                       : 0;
    *bytes = (ovlm_op_bytes){.bwd_work = slope_bytes(a) + sums};
    return OVLM_OK;
}

ovlm_status ovlm_cpu_linear_fwd(ovlm_queue *queue, const ovlm_linear *a, ovlm_err *err)
{
    OVLM_CPU_CHECK(linear, a, FWD, err);
    ovlm_gemm g = {.m = a->x.rows, .n = a->y.cols, .k = a->x.cols,
                   .a = ovlm_gemm_rows(&a->x, NULL),
                   .b = a->w_kn ? ovlm_gemm_cols(&a->w, NULL) : ovlm_gemm_rows(&a->w, NULL),
                   .bias = a->bias, .pre = a->pre, .add = a->add, .act = a->act, .y = a->y};
    ovlm_gemm_run(ovlm_cpu_of(queue), &g);
    return OVLM_OK;
}

typedef struct slope_job {
    const ovlm_gemm_code *code;
    ovlm_gemm_slope slope;
    float *sums; /* [blocks, N] or NULL */
} slope_job;

static void run_slope(void *context, int64_t index, int64_t thread)
{
    (void)thread;
    const slope_job *job = context;
    int64_t first = index * SUM_ROWS, rest = job->slope.dy.rows - first;
    float *sums = job->sums != NULL ? job->sums + index * job->slope.dy.cols : NULL;
    job->code->slope(&job->slope, first, rest < SUM_ROWS ? rest : SUM_ROWS, sums);
}

/* dbias (+)= the blocks' sums. */
static void add_sums(const ovlm_linear *a, const float *sums)
{
    float *dbias = a->dbias.data;
    for (int64_t j = 0; j < a->dbias.cols; j++) {
        float sum = 0.0f;
        for (int64_t b = 0; b < sum_blocks(a->dy.rows); b++) {
            sum += sums[b * a->dbias.cols + j];
        }
        dbias[j] = a->dw_beta != 0.0f ? dbias[j] + sum : sum;
    }
}

/* dpre, and dbias. */
static ovlm_tensor make_slope(const ovlm_cpu *cpu, const ovlm_linear *a)
{
    bool act = a->act != OVLM_ACT_NONE, bias = ovlm_tensor_given(&a->dbias);
    float *out = act ? a->scratch.work : NULL;
    float *sums = bias ? (float *)(void *)((char *)a->scratch.work + slope_bytes(a)) : NULL;
    slope_job job = {cpu->gemm, {a->act, a->pre, a->dy, out}, sums};
    if (act || bias) {
        ovlm_pool_run(cpu->pool, sum_blocks(a->dy.rows), run_slope, &job);
    }
    if (bias) {
        add_sums(a, sums);
    }
    return act ? ovlm_tensor_of(out, a->dy.rows, a->dy.cols, OVLM_F32) : a->dy;
}

ovlm_status ovlm_cpu_linear_bwd(ovlm_queue *queue, const ovlm_linear *a, ovlm_err *err)
{
    OVLM_CPU_CHECK(linear, a, BWD, err);
    const ovlm_cpu *cpu = ovlm_cpu_of(queue);
    ovlm_tensor dpre = make_slope(cpu, a);
    if (ovlm_tensor_given(&a->dx)) {
        ovlm_gemm g = {.m = dpre.rows, .n = a->dx.cols, .k = dpre.cols,
                       .a = ovlm_gemm_rows(&dpre, NULL),
                       .b = a->w_kn ? ovlm_gemm_rows(&a->w, NULL) : ovlm_gemm_cols(&a->w, NULL),
                       .y = a->dx, .accumulate = a->dx_beta != 0.0f};
        ovlm_gemm_run(cpu, &g);
    }
    if (ovlm_tensor_given(&a->dw)) {
        const ovlm_tensor *left = a->w_kn ? &a->x : &dpre, *right = a->w_kn ? &dpre : &a->x;
        ovlm_gemm g = {.m = left->cols, .n = right->cols, .k = dpre.rows,
                       .a = ovlm_gemm_cols(left, NULL), .b = ovlm_gemm_cols(right, NULL),
                       .y = a->dw, .accumulate = a->dw_beta != 0.0f};
        ovlm_gemm_run(cpu, &g);
    }
    return OVLM_OK;
}
