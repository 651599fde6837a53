/* cpu_tile_avx512.c - products of small matrices for AVX-512: 12 x 32 sums in 24 of 32
 * registers. */
#include "cpu/cpu_tile.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512dq,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,fma")
#endif

#define TILE_CODE ovlm_tile_avx512
#define TILE_LANES 16
#define TILE_ROWS 12
#define TILE_FMA_wide(sum, left, right) _mm512_fmadd_ps(_mm512_set1_ps(left), right, sum)
#define TILE_FMA_eight(sum, left, right) _mm256_fmadd_ps(_mm256_set1_ps(left), right, sum)
#include "cpu/cpu_tile_code.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
