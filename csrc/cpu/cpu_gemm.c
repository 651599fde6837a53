/* cpu_gemm.c - picks the instruction set, cuts products into tiles and hands them to the pool. */
#include "cpu/cpu_gemm.h"

#include <stddef.h>

static bool runs_here(const ovlm_gemm_code *code)
{
#if defined(__x86_64__)
    if (code == &ovlm_gemm_avx512) {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    }
    if (code == &ovlm_gemm_avx2) {
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    }
#endif
    (void)code;
    return true;
}

const ovlm_gemm_code *ovlm_gemm_code_get(int64_t number)
{
    static const ovlm_gemm_code *const codes[] = {
#if defined(__x86_64__)
        &ovlm_gemm_avx512, &ovlm_gemm_avx2,
#elif defined(__aarch64__)
        &ovlm_gemm_neon,
#endif
        &ovlm_gemm_plain,
    };
    for (size_t i = 0; i < sizeof codes / sizeof *codes; i++) {
        if (runs_here(codes[i]) && number-- == 0) {
            return codes[i];
        }
    }
    return NULL;
}

static int64_t ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

static int64_t round_up(int64_t a, int64_t b)
{
    return ceil_div(a, b) * b;
}

/* Time of one thread's share, in multiply-adds: what its tiles compute, and what they pack.  An
 * element packed takes about as long as 16 multiply-adds: it comes from memory or L3. */
static double share_cost(const ovlm_gemm_tiles *t, int64_t k, int64_t threads)
{
    enum { PACK = 16, TILE = 20000 };
    double rows = (double)t->rows, cols = (double)t->cols;
    double tile = (rows * cols + PACK * (rows + cols)) * (double)k + TILE;
    double tiles = (double)(t->row_tiles * t->col_tiles), each = tiles / (double)threads;
    double turns = (double)ceil_div(t->row_tiles * t->col_tiles, threads);
    /* Few tiles balance badly when a thread is held up. */
    return tile * (turns + (threads > 1 && each < 8 ? 0.015 * (8 - each) : 0));
}

ovlm_gemm_tiles ovlm_gemm_tiles_choose(const ovlm_gemm_code *code, const ovlm_gemm *g,
                                       int64_t threads)
{
    int64_t mr = code->mr, nr = code->nr, m = g->m, n = g->n, k = g->k;
    int64_t cols_most = OVLM_GEMM_COLS / nr * nr;
    /* Sums that wait for the next block of K lie in y or in scratch. */
    bool bounded = k > OVLM_GEMM_K && !ovlm_gemm_in_place(g);
    ovlm_gemm_tiles best = {0};
    double best_cost = 0;
    if (m <= 0 || n <= 0) {
        return best;
    }
    for (int64_t cut_cols = ceil_div(n, cols_most);; cut_cols *= 2) {
        int64_t cols = round_up(ceil_div(n, cut_cols), nr);
        int64_t rows_most = bounded ? OVLM_GEMM_AREA / cols / mr * mr : m;
        for (int64_t cut_rows = ceil_div(m, rows_most);; cut_rows *= 2) {
            int64_t rows = round_up(ceil_div(m, cut_rows), mr);
            ovlm_gemm_tiles t = {rows, cols, ceil_div(m, rows), ceil_div(n, cols)};
            double cost = share_cost(&t, k, threads);
            if (best.rows == 0 || cost < best_cost) {
                best = t;
                best_cost = cost;
            }
            if (rows <= 4 * mr) {
                break;
            }
        }
        if (cols <= 2 * nr) {
            return best;
        }
    }
}

typedef struct gemm_job {
    const ovlm_cpu *cpu;
    const ovlm_gemm *g;
    ovlm_gemm_tiles tiles;
} gemm_job;

static void run_tile(void *context, int64_t index, int64_t thread)
{
    const gemm_job *job = context;
    job->cpu->gemm->tile(job->g, &job->tiles, index, ovlm_cpu_scratch(job->cpu, thread));
}

void ovlm_gemm_run(const ovlm_cpu *cpu, const ovlm_gemm *g)
{
    int64_t threads = ovlm_pool_threads(cpu->pool);
    gemm_job job = {cpu, g, ovlm_gemm_tiles_choose(cpu->gemm, g, threads)};
    ovlm_pool_run(cpu->pool, job.tiles.row_tiles * job.tiles.col_tiles, run_tile, &job);
}
