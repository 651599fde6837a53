/* cpu_tile_avx2.c - products of small matrices for AVX2 with FMA: 6 x 16 sums in 12 of 16
 * registers. */
#include "cpu/cpu_tile.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define TILE_CODE ovlm_tile_avx2
#define TILE_LANES 8
#define TILE_ROWS 6
#define TILE_FMA_wide(sum, left, right) _mm256_fmadd_ps(_mm256_set1_ps(left), right, sum)
#define TILE_FMA_eight(sum, left, right) _mm256_fmadd_ps(_mm256_set1_ps(left), right, sum)
#include "cpu/cpu_tile_code.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
