/* cpu_gemm_plain.c - matrix products for any processor: 4 x 8 sums in vectors of 16 bytes. */
#include "cpu/cpu_gemm.h"

#include <stdint.h>
#include <string.h>

#define GEMM_NAME(x) x##_plain
#define GEMM_TITLE "plain"
#define GEMM_MR 4
#define GEMM_LANES 4
#define GEMM_NV 2
#define GEMM_DIRECT_COLS 128
#define GEMM_FMA(sum, left, right) ((sum) + (left) * (right))
#include "cpu/cpu_gemm_code.h"
