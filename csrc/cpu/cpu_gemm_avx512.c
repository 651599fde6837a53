/* cpu_gemm_avx512.c - matrix products for AVX-512: 14 x 32 sums in 28 of 32 registers. */
#include "cpu/cpu_gemm.h"

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), \
                            apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif

#define GEMM_NAME(x) x##_avx512
#define GEMM_TITLE "avx512"
#define GEMM_MR 14
#define GEMM_LANES 16
#define GEMM_NV 2
#define GEMM_DIRECT_COLS 128
#define GEMM_FMA(sum, left, right) _mm512_fmadd_ps(_mm512_set1_ps(left), right, sum)
#define GEMM_FMA_NARROW(sum, left, right) _mm256_fmadd_ps(_mm256_set1_ps(left), right, sum)
#include "cpu/cpu_gemm_code.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
