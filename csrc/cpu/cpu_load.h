/* cpu_load.h - what the CPU's operations share: instruction sets, eight floats at a time, rows to
 * float32 and back, and rows over threads.
 *
 * Kernels are written once, with vectors of eight floats, as an inline body without a target; a
 * kernel's wrapper holds one copy per instruction set and picks at run time.  (target_clones would
 * say the same in one word, but clang 14 does not take an `arch` there, and its ifunc resolvers run
 * before the sanitizers are ready.)  Vectors never cross a wrapper, so no calling convention
 * depends on the copy. */
#ifndef OVLM_CPU_CPU_LOAD_H
#define OVLM_CPU_CPU_LOAD_H

#include <string.h>

#include "backend/op_schema.h"
#include "cpu/cpu.h"

#define OVLM_CPU_INLINE static inline __attribute__((always_inline))

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wpsabi" /* vectors in inline functions: see above */
#endif

/* OVLM_CPU_KERNEL(name, (float *y, int64_t n), (y, n)) defines name() from name_body(). */
#if defined(__x86_64__)
#define OVLM_CPU_KERNEL(name, params, args)                                              \
    __attribute__((target("arch=x86-64-v3"), noinline)) static void name##_v3 params     \
    {                                                                                    \
        name##_body args;                                                                \
    }                                                                                    \
    static void name params                                                              \
    {                                                                                    \
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {           \
            name##_v3 args;                                                              \
        } else {                                                                         \
            name##_body args;                                                            \
        }                                                                                \
    }
#else
#define OVLM_CPU_KERNEL(name, params, args) \
    static void name params                 \
    {                                       \
        name##_body args;                   \
    }
#endif

/* Eight floats; loads and stores at any address. */
typedef float ovlm_f8 __attribute__((vector_size(32)));
typedef int32_t ovlm_i8 __attribute__((vector_size(32)));
typedef float ovlm_f8_any __attribute__((vector_size(32), aligned(4), may_alias));

OVLM_CPU_INLINE ovlm_f8 ovlm_f8_load(const float *from)
{
    return *(const ovlm_f8_any *)from;
}

/* A macro: gcc has a remark on every function with a vector as its parameter. */
#define ovlm_f8_store(to, value) ((void)(*(ovlm_f8_any *)(to) = (value)))

/* Written so that gcc makes one broadcast of it; x - 0 is x, for -0 too. */
OVLM_CPU_INLINE ovlm_f8 ovlm_f8_all(float value)
{
    return value - (ovlm_f8){0};
}

/* The first `count` < 8 elements, zeros behind. */
OVLM_CPU_INLINE ovlm_f8 ovlm_f8_load_part(const float *from, int64_t count)
{
    float buffer[8] = {0};
    memcpy(buffer, from, (size_t)count * sizeof *from);
    return ovlm_f8_load(buffer);
}

/* Sum of the eight, in one order for every kernel. */
OVLM_CPU_INLINE float ovlm_f8_sum(const ovlm_f8 *value)
{
    ovlm_f8 v = *value;
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

/* sum of a*b over n elements: four running vectors, then the rest. */
OVLM_CPU_INLINE float ovlm_f8_dot(const float *a, const float *b, int64_t n)
{
    ovlm_f8 sum[4] = {{0}, {0}, {0}, {0}};
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        for (int64_t u = 0; u < 4; u++) {
            sum[u] += ovlm_f8_load(a + i + 8 * u) * ovlm_f8_load(b + i + 8 * u);
        }
    }
    for (; i + 8 <= n; i += 8) {
        sum[0] += ovlm_f8_load(a + i) * ovlm_f8_load(b + i);
    }
    if (i < n) {
        sum[1] += ovlm_f8_load_part(a + i, n - i) * ovlm_f8_load_part(b + i, n - i);
    }
    sum[0] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    return ovlm_f8_sum(&sum[0]);
}

/* Longest piece of a row that is converted at once: eight of them fill a thread's scratch. */
enum { OVLM_CPU_ROW = OVLM_CPU_SCRATCH_BYTES / 8 / 4 };

/* n elements of float32, bfloat16, float64 or uint8 to float32, and back (not to uint8), rounded to
 * nearest even. */
void ovlm_cpu_load(float *to, const void *from, int64_t n, ovlm_dtype dtype);
void ovlm_cpu_store(void *to, const float *from, int64_t n, ovlm_dtype dtype);

/* to[i] += factor * from[i] */
void ovlm_cpu_add_scaled(float *to, const float *from, float factor, int64_t n);

/* *out = sum of x[i] * y[i] */
void ovlm_cpu_dot(const float *x, const float *y, int64_t n, float *out);

static inline void *ovlm_cpu_at(const ovlm_tensor *tensor, int64_t row, int64_t col)
{
    return (char *)tensor->data + (row * tensor->stride + col) * ovlm_dtype_bytes(tensor->dtype);
}

/* n elements of a row from `col` on as float32: where they are, or converted into the buffer. */
static inline const float *ovlm_cpu_row(const ovlm_tensor *tensor, int64_t row, int64_t col,
                                        int64_t n, float *buffer)
{
    const void *from = ovlm_cpu_at(tensor, row, col);
    if (tensor->dtype == OVLM_F32) {
        return from;
    }
    ovlm_cpu_load(buffer, from, n, tensor->dtype);
    return buffer;
}

/* Where to put such a piece of a row as float32; ovlm_cpu_row_done then stores it. */
static inline float *ovlm_cpu_row_out(const ovlm_tensor *tensor, int64_t row, int64_t col,
                                      float *buffer)
{
    return tensor->dtype == OVLM_F32 ? ovlm_cpu_at(tensor, row, col) : buffer;
}

static inline void ovlm_cpu_row_done(const ovlm_tensor *tensor, int64_t row, int64_t col,
                                     int64_t n, const float *buffer)
{
    if (tensor->dtype != OVLM_F32) {
        ovlm_cpu_store(ovlm_cpu_at(tensor, row, col), buffer, n, tensor->dtype);
    }
}

/* The validator of all backends, and OVLM_E_ARG for float64, which only the reference computes in:
 * OVLM_CPU_CHECK(norm, a, FWD, err). */
#define OVLM_CPU_CHECK(op, a, pass, err)                              \
    do {                                                              \
        OVLM_TRY(ovlm_op_check_##op((a), OVLM_PASS_##pass, (err)));   \
        OVLM_TRY(ovlm_cpu_check_types(OVLM_OP_##op, (a), OVLM_PASS_##pass, (err))); \
    } while (0)
OVLM_NODISCARD ovlm_status ovlm_cpu_check_types(ovlm_op op, const void *args, ovlm_pass pass,
                                                ovlm_err *err);

/* OVLM_E_ARG when a piece of a row that must be held at once is longer than OVLM_CPU_ROW. */
OVLM_NODISCARD ovlm_status ovlm_cpu_fits(const char *what, int64_t columns, ovlm_err *err);

/* Rows first .. first + count - 1, with the thread's scratch. */
typedef void (*ovlm_cpu_rows_body)(const void *ctx, int64_t first, int64_t count, float *scratch);

/* Shares rows out over the pool, in pieces of about `OVLM_CPU_PIECE` elements. */
enum { OVLM_CPU_PIECE = 1 << 15 };
void ovlm_cpu_rows(ovlm_cpu *cpu, int64_t rows, int64_t row_elements, ovlm_cpu_rows_body body,
                   const void *ctx);

/* The last i < n with start[i] <= index: whose piece number `index` is. */
static inline int64_t ovlm_cpu_find(const int64_t *start, int64_t n, int64_t index)
{
    int64_t low = 0, high = n;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (start[middle] <= index) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

/* Every element to 0. */
void ovlm_cpu_clear(ovlm_cpu *cpu, const ovlm_tensor *tensor);

/* Sums over rows are taken in chunks that the number of rows alone decides, so that they do not
 * depend on the number of threads: each chunk sums into its own part of `work`. */
enum { OVLM_CPU_CHUNK_LEAST = 32, OVLM_CPU_CHUNKS_MOST = 64 };

static inline int64_t ovlm_cpu_chunk_rows(int64_t rows)
{
    int64_t per_chunk = (rows + OVLM_CPU_CHUNKS_MOST - 1) / OVLM_CPU_CHUNKS_MOST;
    return per_chunk < OVLM_CPU_CHUNK_LEAST ? OVLM_CPU_CHUNK_LEAST : per_chunk;
}

static inline int64_t ovlm_cpu_chunks(int64_t rows)
{
    int64_t per_chunk = ovlm_cpu_chunk_rows(rows);
    return (rows + per_chunk - 1) / per_chunk;
}

typedef void (*ovlm_cpu_chunk_body)(const void *ctx, int64_t chunk, int64_t first, int64_t count,
                                    float *scratch);
void ovlm_cpu_chunks_run(ovlm_cpu *cpu, int64_t rows, ovlm_cpu_chunk_body body, const void *ctx);

/* to[c] = beta*to[c] + partial[c] + partial[stride + c] + ..., `chunks` terms in order.  `to` is
 * one row of float32, or left out. */
void ovlm_cpu_fold(ovlm_cpu *cpu, const float *partial, int64_t chunks, int64_t stride,
                   const ovlm_tensor *to, float beta);

#endif
