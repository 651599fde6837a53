/* cpu_rig.h - a CPU backend for tests of single operations, tensors full of random numbers with
 * columns between the rows that nobody may touch, and comparisons with plain loops in double. */
#ifndef OVLM_CPU_RIG_H
#define OVLM_CPU_RIG_H

#include <math.h>
#include <string.h>

#include "cpu/cpu.h"
#include "cpu/cpu_gemm.h"
#include "test.h"

typedef struct rig {
    ovlm_cpu cpu;
    ovlm_queue queue;
} rig;

static inline void *rig_memory(int64_t bytes)
{
    void *memory = NULL;
    if (posix_memalign(&memory, 64, (size_t)(bytes > 0 ? bytes : 1)) != 0) {
        fprintf(stderr, "out of memory\n");
        exit(1);
    }
    memset(memory, 0xff, (size_t)bytes); /* NaN, where nothing was written */
    return memory;
}

static inline void rig_open(rig *r, int64_t threads)
{
    memset(r, 0, sizeof *r);
    if (ovlm_pool_open(threads, &r->cpu.pool, NULL) != OVLM_OK) {
        exit(1);
    }
    r->cpu.thread_scratch = rig_memory(threads * OVLM_CPU_SCRATCH_BYTES);
    r->cpu.gemm = ovlm_gemm_code_get(0);
    r->queue.backend = &r->cpu.base;
}

static inline void rig_close(rig *r)
{
    ovlm_pool_close(r->cpu.pool);
    free(r->cpu.thread_scratch);
}

static inline int64_t rig_below(int64_t n)
{
    return ovlm_rng_below(&test_rng, n);
}

static inline double rig_normal(void)
{
    double u = ((double)rig_below(1 << 30) + 1) / (1 << 30), v = (double)rig_below(1 << 30);
    return sqrt(-2 * log(u)) * cos(v * (6.283185307179586 / (1 << 30)));
}

static inline void *rig_place(const ovlm_tensor *t, int64_t row, int64_t col)
{
    return (char *)t->data + (row * t->stride + col) * ovlm_dtype_bytes(t->dtype);
}

static inline double rig_get(const ovlm_tensor *t, int64_t row, int64_t col)
{
    const void *at = rig_place(t, row, col);
    if (t->dtype == OVLM_F64) {
        return *(const double *)at;
    }
    if (t->dtype == OVLM_U8) {
        return *(const uint8_t *)at;
    }
    uint32_t bits = 0;
    memcpy((char *)&bits + (t->dtype == OVLM_BF16 ? 2 : 0), at,
           (size_t)ovlm_dtype_bytes(t->dtype)); /* little-endian, as the library */
    float value;
    memcpy(&value, &bits, sizeof value);
    return (double)value;
}

/* Truncates to bfloat16: the numbers are random anyway. */
static inline void rig_set(const ovlm_tensor *t, int64_t row, int64_t col, double value)
{
    void *at = rig_place(t, row, col);
    float single = (float)value;
    if (t->dtype == OVLM_F64) {
        memcpy(at, &value, sizeof value);
    } else if (t->dtype == OVLM_U8) {
        *(uint8_t *)at = (uint8_t)value;
    } else {
        memcpy(at, (char *)&single + (t->dtype == OVLM_BF16 ? 2 : 0),
               (size_t)ovlm_dtype_bytes(t->dtype));
    }
}

/* rows x cols of bytes 0xff, with up to four columns between the rows. */
static inline ovlm_tensor rig_empty(int64_t rows, int64_t cols, ovlm_dtype dtype)
{
    ovlm_tensor t = {NULL, rows, cols, cols + (rows > 1 ? rig_below(5) : 0), dtype};
    t.data = rig_memory(rows * t.stride * ovlm_dtype_bytes(dtype));
    return t;
}

static inline ovlm_tensor rig_random(int64_t rows, int64_t cols, ovlm_dtype dtype)
{
    ovlm_tensor t = rig_empty(rows, cols, dtype);
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = 0; c < cols; c++) {
            rig_set(&t, r, c, rig_normal());
        }
    }
    return t;
}

/* Another tensor of that shape, with the same contents (and another stride). */
static inline ovlm_tensor rig_copy(const ovlm_tensor *from)
{
    ovlm_tensor t = rig_empty(from->rows, from->cols, from->dtype);
    for (int64_t r = 0; r < t.rows; r++) {
        memcpy(rig_place(&t, r, 0), rig_place(from, r, 0),
               (size_t)(t.cols * ovlm_dtype_bytes(t.dtype)));
    }
    return t;
}

/* Frees it, and looks whether the columns between the rows are as they were. */
static inline void rig_free(ovlm_tensor *t)
{
    int64_t size = ovlm_dtype_bytes(t->dtype), touched = 0;
    for (int64_t r = 0; r < t->rows; r++) {
        const unsigned char *gap = rig_place(t, r, t->cols);
        for (int64_t i = 0; i < (t->stride - t->cols) * size; i++) {
            touched += gap[i] != 0xff;
        }
    }
    CHECK(touched == 0, "%lld bytes between the rows were written", (long long)touched);
    free(t->data);
    memset(t, 0, sizeof *t);
}

/* Whether rows first.. of `a` are bit for bit the rows of `b`. */
static inline void rig_same(const char *what, const ovlm_tensor *a, int64_t first,
                            const ovlm_tensor *b)
{
    for (int64_t r = 0; r < b->rows; r++) {
        if (memcmp(rig_place(a, first + r, 0), rig_place(b, r, 0),
                   (size_t)(b->cols * ovlm_dtype_bytes(b->dtype))) != 0) {
            CHECK(false, "%s: row %lld differs", what, (long long)(first + r));
            return;
        }
    }
    CHECK(true, "%s", what);
}

/* Whether every element is the wanted one: within tolerance * (size of the wanted ones, at least
 * `least`), and half a unit of bfloat16 where that is how it is stored. */
static inline void rig_near_least(const char *what, const ovlm_tensor *got, const double *want,
                                  double tolerance, double least)
{
    double square = 0;
    int64_t n = got->rows * got->cols;
    for (int64_t i = 0; i < n; i++) {
        square += want[i] * want[i];
    }
    double size = n > 0 ? sqrt(square / (double)n) : 0;
    size = size > least ? size : least;
    double unit = got->dtype == OVLM_BF16 ? 1.0 / 256 : 0;
    for (int64_t i = 0; i < n; i++) {
        double is = rig_get(got, i / got->cols, i % got->cols);
        double limit = tolerance * (size + fabs(want[i])) + unit * fabs(want[i]) + 1e-30;
        if (!(fabs(is - want[i]) <= limit)) {
            CHECK(false, "%s: [%lld][%lld] is %.9g, not %.9g", what,
                  (long long)(i / got->cols), (long long)(i % got->cols), is, want[i]);
            return;
        }
    }
    CHECK(true, "%s", what);
}

static inline void rig_near(const char *what, const ovlm_tensor *got, const double *want,
                            double tolerance)
{
    rig_near_least(what, got, want, tolerance, 0);
}

/* Measures, and gives the operation exactly the memory that it asked for. */
#define RIG_SCRATCH(r, op, a)                                                              \
    do {                                                                                   \
        ovlm_op_bytes rig_bytes = {0};                                                     \
        ovlm_err rig_err = {0};                                                            \
        CHECK(ovlm_cpu_##op##_measure(&(r)->cpu.base, (a), &rig_bytes, &rig_err) == OVLM_OK, \
              "%s", rig_err.message);                                                      \
        (a)->scratch.saved = rig_memory(rig_bytes.saved);                                  \
        (a)->scratch.work = rig_memory(rig_bytes.fwd_work > rig_bytes.bwd_work             \
                                           ? rig_bytes.fwd_work                            \
                                           : rig_bytes.bwd_work);                          \
    } while (0)

#define RIG_SCRATCH_FREE(a)       \
    do {                          \
        free((a)->scratch.saved); \
        free((a)->scratch.work);  \
    } while (0)

#define RIG_RUN(r, op, pass, a)                                                             \
    do {                                                                                    \
        ovlm_err rig_err = {0};                                                             \
        CHECK(ovlm_cpu_##op##_##pass(&(r)->queue, (a), &rig_err) == OVLM_OK, "%s",          \
              rig_err.message);                                                             \
    } while (0)

#endif
