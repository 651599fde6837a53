/* cpu_tile.c - products of small matrices for any processor, and which code to take. */
#define TILE_CODE ovlm_tile_plain
#define TILE_LANES 8
#define TILE_ROWS 4
#define TILE_FMA_wide(sum, left, right) ((sum) + (left) * (right))
#define TILE_FMA_eight TILE_FMA_wide
#include "cpu/cpu_tile_code.h"

const ovlm_tile_code *ovlm_tile_code_get(void)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
        return &ovlm_tile_avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return &ovlm_tile_avx2;
    }
#endif
    return &ovlm_tile_plain;
}
