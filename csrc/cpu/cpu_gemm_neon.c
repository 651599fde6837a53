/* cpu_gemm_neon.c - matrix products for 64-bit ARM: 8 x 12 sums in 24 of 32 registers. */
#include "cpu/cpu_gemm.h"

#include <stdint.h>
#include <string.h>

#if defined(__aarch64__)
#include <arm_neon.h>

#define GEMM_NAME(x) x##_neon
#define GEMM_TITLE "neon"
#define GEMM_MR 8
#define GEMM_LANES 4
#define GEMM_NV 3
#define GEMM_DIRECT_COLS 128
#define GEMM_FMA(sum, left, right) vfmaq_n_f32(sum, right, left)
#include "cpu/cpu_gemm_code.h"
#endif
