/* cpu_gemm_avx2.c - matrix products for AVX2 with FMA: 6 x 16 sums in 12 of 16 registers. */
#include "cpu/cpu_gemm.h"

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define GEMM_NAME(x) x##_avx2
#define GEMM_TITLE "avx2"
#define GEMM_MR 6
#define GEMM_LANES 8
#define GEMM_NV 2
#define GEMM_DIRECT_COLS 128
#define GEMM_FMA(sum, left, right) _mm256_fmadd_ps(_mm256_set1_ps(left), right, sum)
#define GEMM_FMA_NARROW(sum, left, right) _mm256_fmadd_ps(_mm256_set1_ps(left), right, sum)
#include "cpu/cpu_gemm_code.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
