/* cpu_grouped.c - a linear layer per expert: one list of tiles over all experts, so that a full
 * expert is shared by threads and an empty one costs nothing.  The gather of rows happens while
 * operands are packed. */
#include "cpu/cpu_gemm.h"
#include "cpu/cpu_load.h"

typedef enum grouped_pass { GROUPED_Y, GROUPED_DX, GROUPED_DW } grouped_pass;

typedef struct grouped_job {
    const ovlm_cpu *cpu;
    const ovlm_grouped_linear *a;
    grouped_pass pass;
    int64_t rows, cols;  /* of a tile */
    int64_t *first_tile; /* [E+1], in scratch */
} grouped_job;

/* Widths of the layer. */
static int64_t in_cols(const ovlm_grouped_linear *a)
{
    return a->x.cols;
}

static int64_t out_cols(const ovlm_grouped_linear *a)
{
    return a->w_kn ? a->w.cols : a->w.rows / a->groups;
}

/* Where expert e's rows begin among those of the call, which are rows of y or, backward, of dy. */
static int64_t begin_of(const grouped_job *job, int64_t e)
{
    const ovlm_grouped_linear *a = job->a;
    int64_t begin = a->offsets[e] - a->first;
    int64_t rows = job->pass == GROUPED_Y ? a->y.rows : a->dy.rows;
    return begin < 0 ? 0 : begin > rows ? rows : begin;
}

/* x's rows of an expert, as rows or as columns of an operand. */
static ovlm_gemm_side side_of_x(const ovlm_grouped_linear *a, int64_t first, int64_t rows,
                                bool across)
{
    ovlm_tensor x = a->x;
    const int32_t *index = a->index;
    if (index != NULL) {
        index += first;
    } else {
        x = ovlm_tensor_rows(x, first, rows);
    }
    return across ? ovlm_gemm_cols(&x, index) : ovlm_gemm_rows(&x, index);
}

/* Expert e's share of a matrix that stacks the experts'. */
static ovlm_tensor share_of(const ovlm_grouped_linear *a, ovlm_tensor stack, int64_t e)
{
    int64_t rows = a->w_kn ? in_cols(a) : out_cols(a);
    return ovlm_tensor_rows(stack, e * rows, rows);
}

static ovlm_gemm product_of(const grouped_job *job, int64_t e)
{
    const ovlm_grouped_linear *a = job->a;
    int64_t first = begin_of(job, e), rows = begin_of(job, e + 1) - first;
    ovlm_tensor w = share_of(a, a->w, e), dy = {0};
    if (job->pass != GROUPED_Y) {
        dy = ovlm_tensor_rows(a->dy, first, rows);
    }
    if (job->pass == GROUPED_Y) {
        return (ovlm_gemm){.m = rows, .n = out_cols(a), .k = in_cols(a),
                           .a = side_of_x(a, first, rows, false),
                           .b = a->w_kn ? ovlm_gemm_cols(&w, NULL) : ovlm_gemm_rows(&w, NULL),
                           .y = ovlm_tensor_rows(a->y, first, rows)};
    }
    if (job->pass == GROUPED_DX) {
        return (ovlm_gemm){.m = rows, .n = in_cols(a), .k = out_cols(a),
                           .a = ovlm_gemm_rows(&dy, NULL),
                           .b = a->w_kn ? ovlm_gemm_rows(&w, NULL) : ovlm_gemm_cols(&w, NULL),
                           .y = ovlm_tensor_rows(a->dx, first, rows),
                           .accumulate = a->dx_beta != 0.0f};
    }
    ovlm_gemm_side of_dy = ovlm_gemm_cols(&dy, NULL), of_x = side_of_x(a, first, rows, true);
    ovlm_tensor dw = share_of(a, a->dw, e);
    return (ovlm_gemm){.m = dw.rows, .n = dw.cols, .k = rows,
                       .a = a->w_kn ? of_x : of_dy, .b = a->w_kn ? of_dy : of_x,
                       .y = dw, .accumulate = a->dw_beta != 0.0f};
}

static ovlm_gemm_tiles tiles_of(const grouped_job *job, const ovlm_gemm *g)
{
    ovlm_gemm_tiles tiles = {job->rows, job->cols, (g->m + job->rows - 1) / job->rows,
                             (g->n + job->cols - 1) / job->cols};
    return tiles;
}

static void run_tile(void *context, int64_t index, int64_t thread)
{
    const grouped_job *job = context;
    int64_t low = 0, high = job->a->groups; /* first_tile[low] <= index < first_tile[high] */
    while (high - low > 1) {
        int64_t middle = low + (high - low) / 2;
        if (job->first_tile[middle] <= index) {
            low = middle;
        } else {
            high = middle;
        }
    }
    ovlm_gemm g = product_of(job, low);
    ovlm_gemm_tiles tiles = tiles_of(job, &g);
    job->cpu->gemm->tile(&g, &tiles, index - job->first_tile[low],
                         ovlm_cpu_scratch(job->cpu, thread));
}

/* A tile's shape comes from the mean expert; a fuller one has more tiles. */
static void run_pass(const ovlm_cpu *cpu, const ovlm_grouped_linear *a, grouped_pass pass)
{
    grouped_job job = {.cpu = cpu, .a = a, .pass = pass, .first_tile = a->scratch.work};
    int64_t groups = a->groups, threads = ovlm_pool_threads(cpu->pool);
    int64_t mean = (begin_of(&job, groups) - begin_of(&job, 0) + groups - 1) / groups;
    ovlm_gemm g = product_of(&job, 0);
    *(pass == GROUPED_DW ? &g.k : &g.m) = mean > 0 ? mean : 1;
    /* Of several experts each needs but a few tiles for all threads to be busy. */
    int64_t share = threads == 1 ? 1 : (4 * threads + groups - 1) / groups;
    ovlm_gemm_tiles tiles = ovlm_gemm_tiles_choose(cpu->gemm, &g, share);
    job.rows = tiles.rows;
    job.cols = tiles.cols;
    job.first_tile[0] = 0;
    for (int64_t e = 0; e < groups; e++) {
        g = product_of(&job, e);
        tiles = tiles_of(&job, &g);
        job.first_tile[e + 1] = job.first_tile[e] + tiles.row_tiles * tiles.col_tiles;
    }
    ovlm_pool_run(cpu->pool, job.first_tile[groups], run_tile, &job);
}

ovlm_status ovlm_cpu_grouped_linear_measure(ovlm_backend *backend, const ovlm_grouped_linear *a,
                                            ovlm_op_bytes *bytes, ovlm_err *err)
{
    (void)backend;
    OVLM_CPU_CHECK(grouped_linear, a, MEASURE, err);
    int64_t list = (a->groups + 1) * (int64_t)sizeof(int64_t);
    *bytes = (ovlm_op_bytes){.fwd_work = list, .bwd_work = list};
    return OVLM_OK;
}

ovlm_status ovlm_cpu_grouped_linear_fwd(ovlm_queue *queue, const ovlm_grouped_linear *a,
                                        ovlm_err *err)
{
    OVLM_CPU_CHECK(grouped_linear, a, FWD, err);
    run_pass(ovlm_cpu_of(queue), a, GROUPED_Y);
    return OVLM_OK;
}

ovlm_status ovlm_cpu_grouped_linear_bwd(ovlm_queue *queue, const ovlm_grouped_linear *a,
                                        ovlm_err *err)
{
    OVLM_CPU_CHECK(grouped_linear, a, BWD, err);
    if (ovlm_tensor_given(&a->dx)) {
        run_pass(ovlm_cpu_of(queue), a, GROUPED_DX);
    }
    if (ovlm_tensor_given(&a->dw)) {
        run_pass(ovlm_cpu_of(queue), a, GROUPED_DW);
    }
    return OVLM_OK;
}
