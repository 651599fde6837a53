/* bench_gemm.c - times the CPU backend's products; bench_gemm.py feeds it and reads its answers.
 *
 * A line in: kind m n k groups threads, kind one of nn nt tn grouped peak.  A line out: the best
 * GFLOP/s of a few calls. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cpu/cpu_device.h"
#include "cpu/cpu_gemm.h"

/* One thread is timed by the processor time that it got, so that others on the machine do not
 * count; several by the wall. */
static double now_s(int64_t threads)
{
    struct timespec now;
    (void)clock_gettime(threads == 1 ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

enum { CALLS_LEAST = 5, CALLS_MOST = 2000 };
static const double SECONDS = 0.12;

typedef struct product {
    int64_t groups;
    int32_t *offsets;
    ovlm_linear linear;
    ovlm_grouped_linear grouped;
} product;

static ovlm_tensor fresh(int64_t rows, int64_t cols)
{
    void *memory = NULL;
    if (ovlm_cpu_alloc(NULL, rows * cols * (int64_t)sizeof(float), &memory, NULL) != OVLM_OK) {
        exit(1);
    }
    float *data = memory;
    for (int64_t i = 0; i < rows * cols; i++) {
        data[i] = (float)(i % 13 - 6) / 8;
    }
    return ovlm_tensor_of(data, rows, cols, OVLM_F32);
}

static void run(ovlm_queue *queue, const product *p, const char *kind)
{
    ovlm_err err = {0};
    ovlm_status status = strcmp(kind, "grouped") == 0
                             ? ovlm_cpu_grouped_linear_fwd(queue, &p->grouped, &err)
                         : strcmp(kind, "tn") == 0 ? ovlm_cpu_linear_bwd(queue, &p->linear, &err)
                                                   : ovlm_cpu_linear_fwd(queue, &p->linear, &err);
    if (status != OVLM_OK) {
        fprintf(stderr, "%s\n", err.message);
        exit(1);
    }
}

static product make(const char *kind, int64_t m, int64_t n, int64_t k, int64_t groups)
{
    product p = {.groups = groups};
    if (strcmp(kind, "grouped") == 0) {
        p.offsets = malloc((size_t)(groups + 1) * sizeof *p.offsets);
        for (int64_t e = 0; e <= groups; e++) {
            p.offsets[e] = (int32_t)(m * e);
        }
        p.grouped = (ovlm_grouped_linear){
            .scratch.work = fresh(groups + 1, sizeof(int64_t) / sizeof(float)).data,
            .groups = groups,
            .offsets = p.offsets, .x = fresh(m * groups, k), .w = fresh(groups * n, k),
            .y = fresh(m * groups, n)};
    } else if (strcmp(kind, "tn") == 0) { /* dw [m,n] from k rows */
        p.linear = (ovlm_linear){.x = fresh(k, n), .w = fresh(m, n), .y = fresh(k, m),
                                 .dy = fresh(k, m), .dw = fresh(m, n)};
    } else {
        bool kn = strcmp(kind, "nn") == 0;
        p.linear = (ovlm_linear){.x = fresh(m, k), .w = kn ? fresh(k, n) : fresh(n, k),
                                 .w_kn = kn, .y = fresh(m, n)};
    }
    return p;
}

static void drop(product *p)
{
    void *all[] = {p->offsets, p->linear.x.data, p->linear.w.data, p->linear.y.data,
                   p->linear.dy.data, p->linear.dw.data, p->grouped.scratch.work,
                   p->grouped.x.data, p->grouped.w.data, p->grouped.y.data};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        free(all[i]);
    }
}

static double best_seconds(ovlm_queue *queue, const product *p, const char *kind,
                           int64_t threads)
{
    double best = 1e30, total = 0;
    for (int i = 0; i < CALLS_MOST && (i < CALLS_LEAST || total < SECONDS); i++) {
        double start = now_s(threads);
        run(queue, p, kind);
        double took = now_s(threads) - start;
        best = took < best ? took : best;
        total += took;
    }
    return best;
}

/* Multiply-adds on registers alone, 12 independent chains: what a core can do at most. */
#define PEAK(name, lanes, target)                                                        \
    target static double name(void)                                                      \
    {                                                                                    \
        typedef float vec __attribute__((vector_size(lanes * 4)));                       \
        enum { CHAINS = 12, STEPS = 4000000 };                                           \
        vec sum[CHAINS], x = (vec){0} + 0.999f, y = (vec){0} + 1e-3f;                    \
        for (int i = 0; i < CHAINS; i++) {                                               \
            sum[i] = (vec){0} + (float)i;                                                \
        }                                                                                \
        double start = now_s(1);                                                         \
        for (int64_t step = 0; step < STEPS; step++) {                                   \
            for (int i = 0; i < CHAINS; i++) {                                           \
                sum[i] = sum[i] * x + y;                                                 \
            }                                                                            \
            __asm__ volatile("" : "+x"(x));                                              \
        }                                                                                \
        double took = now_s(1) - start;                                                  \
        volatile float keep = 0;                                                         \
        for (int i = 0; i < CHAINS; i++) {                                               \
            keep = keep + sum[i][0];                                                     \
        }                                                                                \
        return 2.0 * CHAINS * lanes * STEPS / took * 1e-9;                               \
    }
#if defined(__x86_64__)
PEAK(peak_avx512, 16, __attribute__((target("avx512f"))))
PEAK(peak_avx2, 8, __attribute__((target("avx2,fma"))))
#endif

/* GFLOP/s of one core, the best of a few. */
static double peak(void)
{
    double best = 0;
#if defined(__x86_64__)
    const char *name = ovlm_gemm_code_get(0)->name;
    for (int i = 0; i < 5; i++) {
        double got = strcmp(name, "avx512") == 0 ? peak_avx512()
                     : strcmp(name, "avx2") == 0 ? peak_avx2()
                                                 : 0;
        best = got > best ? got : best;
    }
#endif
    return best;
}

static int64_t open_backend(ovlm_backend **backend, int64_t threads)
{
    ovlm_cpu_close(*backend);
    ovlm_backend_options options = {.threads = threads};
    if (ovlm_cpu_open_with(NULL, &options, backend, NULL) != OVLM_OK) {
        exit(1);
    }
    return threads;
}

int main(void)
{
    char kind[16];
    long long m, n, k, groups, threads;
    ovlm_backend *backend = NULL;
    int64_t opened = 0;
    while (scanf("%15s %lld %lld %lld %lld %lld", kind, &m, &n, &k, &groups, &threads) == 6) {
        if (threads != opened) {
            opened = open_backend(&backend, threads);
        }
        if (strcmp(kind, "peak") == 0) {
            printf("%.4f\n", peak());
            (void)fflush(stdout);
            continue;
        }
        ovlm_queue queue = {backend};
        product p = make(kind, m, n, k, groups);
        double flops = 2.0 * (double)m * (double)n * (double)k * (double)groups;
        printf("%.4f\n", flops / best_seconds(&queue, &p, kind, threads) * 1e-9);
        (void)fflush(stdout);
        drop(&p);
    }
    ovlm_cpu_close(backend);
    return 0;
}
