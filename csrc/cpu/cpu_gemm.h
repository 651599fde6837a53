/* cpu_gemm.h - matrix products on the CPU: y = act(a b^T + bias) + add, with float32 sums.
 *
 * y is cut into tiles; a tile is computed whole by one thread.  Along K the sum goes in blocks
 * whose sizes depend on K alone: inside a block one chain of multiply-adds in ascending order, then
 * the blocks' sums in ascending order.  Every path (packed or direct operands, full or partial
 * tiles, either operand broadcast) computes exactly this, so an element of y depends on its row of
 * a, its row of b and K, and on nothing else, to the last bit. */
#ifndef OVLM_CPU_CPU_GEMM_H
#define OVLM_CPU_CPU_GEMM_H

#include "cpu/cpu.h"

enum {
    OVLM_GEMM_K = 256,        /* most of K in a block                                       */
    OVLM_GEMM_COLS = 1024,    /* most columns of a tile                                     */
    OVLM_GEMM_AREA = 1 << 19, /* most sums of a tile in scratch                             */
    OVLM_GEMM_LEFT = 144,     /* rows of a packed at a time, about; L2 holds them           */
    OVLM_GEMM_LEFT_MOST = OVLM_GEMM_LEFT + 16
};

/* An operand.  Along K its rows are rows of a tensor: element (o, k) is data[at(o) * stride + k];
 * across, its columns: data[at(k) * stride + o].  at(i) is index[i], or i without index. */
typedef struct ovlm_gemm_side {
    const void *data;
    ovlm_dtype dtype; /* OVLM_F32 or OVLM_BF16 */
    int64_t stride;
    bool across;
    const int32_t *index;
} ovlm_gemm_side;

typedef struct ovlm_gemm {
    int64_t m, n, k;     /* k = 0: a b^T is 0                                      */
    ovlm_gemm_side a, b; /* [m,k] and [n,k]                                        */
    ovlm_tensor bias, pre, add; /* left out with cols = 0                          */
    ovlm_act act;
    ovlm_tensor y;       /* [m,n] float32 or bfloat16                              */
    bool accumulate;     /* add to y, in float32                                   */
} ovlm_gemm;

/* How y is cut; chosen for speed only. */
typedef struct ovlm_gemm_tiles {
    int64_t rows, cols;           /* of a tile            */
    int64_t row_tiles, col_tiles;
} ovlm_gemm_tiles;

/* dpre = dy act'(pre) in float32, dense like dy, into out (NULL: not wanted). */
typedef struct ovlm_gemm_slope {
    ovlm_act act;
    ovlm_tensor pre, dy;
    float *out;
} ovlm_gemm_slope;

/* One instruction set's code. */
typedef struct ovlm_gemm_code {
    const char *name;
    int64_t mr, nr;
    void (*tile)(const ovlm_gemm *g, const ovlm_gemm_tiles *tiles, int64_t index, void *scratch);
    /* Some rows of dpre, and the sums over these rows into sums [dy.cols] (NULL: not wanted). */
    void (*slope)(const ovlm_gemm_slope *s, int64_t first, int64_t rows, float *sums);
} ovlm_gemm_code;

/* The codes that this processor runs, best first: 0, 1, ... until NULL. */
const ovlm_gemm_code *ovlm_gemm_code_get(int64_t number);

ovlm_gemm_tiles ovlm_gemm_tiles_choose(const ovlm_gemm_code *code, const ovlm_gemm *g,
                                       int64_t threads);

/* Whether sums can be made in y itself: float32, and nothing follows. */
static inline bool ovlm_gemm_in_place(const ovlm_gemm *g)
{
    return g->y.dtype == OVLM_F32 && g->act == OVLM_ACT_NONE && !ovlm_tensor_given(&g->bias) &&
           !ovlm_tensor_given(&g->pre) && !ovlm_tensor_given(&g->add);
}

/* The whole product on the backend's pool. */
void ovlm_gemm_run(const ovlm_cpu *cpu, const ovlm_gemm *g);

/* A tensor as a side whose rows are the tensor's rows, or the tensor's columns. */
static inline ovlm_gemm_side ovlm_gemm_rows(const ovlm_tensor *t, const int32_t *index)
{
    ovlm_gemm_side side = {t->data, t->dtype, t->stride, false, index};
    return side;
}

static inline ovlm_gemm_side ovlm_gemm_cols(const ovlm_tensor *t, const int32_t *index)
{
    ovlm_gemm_side side = {t->data, t->dtype, t->stride, true, index};
    return side;
}

#if defined(__x86_64__)
extern const ovlm_gemm_code ovlm_gemm_avx512, ovlm_gemm_avx2;
#elif defined(__aarch64__)
extern const ovlm_gemm_code ovlm_gemm_neon;
#endif
extern const ovlm_gemm_code ovlm_gemm_plain;

#endif
