/* cpu_gemm_code.h - the micro-kernel and the walk over a tile, written once and compiled once per
 * instruction set by the files that define
 *
 *   GEMM_NAME(x)  x with the set's suffix      GEMM_LANES  floats in a vector
 *   GEMM_MR       rows of a micro-tile         GEMM_NV     vectors in a row of it
 *   GEMM_FMA(sum, left, right)                 sum + left right, left a float: fused where the set
 *                                              has it, by name, so that no compiler decides
 *   GEMM_FMA_NARROW(sum, left, right)          the same of eight floats; or left out
 *
 * The micro-tile's MR x NV sums fill the registers: every step of K loads NV vectors of one panel,
 * MR single floats of the other, and does MR * NV multiply-adds.  A panel of b (NR rows by one
 * block of K) stays in L1 while panels of a pass it from L2 (Goto and van de Geijn, "Anatomy of
 * high-performance matrix multiplication", 2008). */
#include "cpu/cpu_math.h"

#define GEMM_NR (GEMM_LANES * GEMM_NV)
#define GEMM_WIDEST (GEMM_NR > GEMM_MR ? GEMM_NR : GEMM_MR)

#include "cpu/cpu_gemm_pack.h"
#include "cpu/cpu_gemm_finish.h"

typedef float vec __attribute__((vector_size(GEMM_LANES * 4)));
typedef float vec_memory __attribute__((vector_size(GEMM_LANES * 4), aligned(4), may_alias));

/* c (+)= a b over one block of K, kc >= 1.  Row i of a at step k: a[i * a_row + k * a_step].  With
 * `ahead`, rows that many floats further on are fetched meanwhile. */
static inline __attribute__((always_inline)) void
micro(int64_t kc, const float *a, int64_t a_row, int64_t a_step, int64_t ahead, const float *b,
      float *c, int64_t c_row, bool accumulate)
{
    vec sum[GEMM_MR][GEMM_NV];
    for (int i = 0; i < GEMM_MR; i++) {
        for (int j = 0; j < GEMM_NV; j++) {
            sum[i][j] = (vec){0};
        }
        __builtin_prefetch(c + i * c_row, 1); /* needed only after the loop */
        __builtin_prefetch(c + i * c_row + GEMM_NR - 1, 1);
    }
    do {
        int64_t steps = ahead == 0 || kc < LINE ? kc : LINE;
        kc -= steps;
        for (int i = 0; ahead != 0 && i < GEMM_MR; i++) {
            __builtin_prefetch((const void *)((uintptr_t)a +
                                              (uintptr_t)(i * a_row + ahead) * sizeof *a));
        }
        do { /* tested at its end: a loop that may not run keeps the sums in memory */
            vec right[GEMM_NV];
            for (int j = 0; j < GEMM_NV; j++) {
                right[j] = ((const vec_memory *)b)[j];
            }
            for (int i = 0; i < GEMM_MR; i++) {
                float left = a[i * a_row];
                for (int j = 0; j < GEMM_NV; j++) {
                    sum[i][j] = GEMM_FMA(sum[i][j], left, right[j]);
                }
            }
            a += a_step;
            b += GEMM_NR;
        } while (--steps > 0);
    } while (kc > 0);
    if (accumulate) {
        for (int i = 0; i < GEMM_MR; i++) {
            vec_memory *out = (vec_memory *)(c + i * c_row);
            for (int j = 0; j < GEMM_NV; j++) {
                out[j] += sum[i][j];
            }
        }
        return;
    }
    for (int i = 0; i < GEMM_MR; i++) {
        vec_memory *out = (vec_memory *)(c + i * c_row);
        for (int j = 0; j < GEMM_NV; j++) {
            out[j] = sum[i][j];
        }
    }
}

#if defined(GEMM_FMA_NARROW)
/* The first eight columns of a panel of b, in vectors of eight: a few rows of y, turned, would
 * leave most of a whole micro-tile unused.  The same chains of sums. */
enum { NARROW = 8 };
typedef float narrow __attribute__((vector_size(NARROW * 4)));
typedef float narrow_memory __attribute__((vector_size(NARROW * 4), aligned(4), may_alias));

static __attribute__((noinline)) void
micro_narrow(int64_t kc, const float *a, int64_t a_row, const float *b, float *c, int64_t c_row,
             bool accumulate)
{
    narrow sum[GEMM_MR];
    for (int i = 0; i < GEMM_MR; i++) {
        sum[i] = (narrow){0};
    }
    do {
        narrow right = *(const narrow_memory *)b;
        for (int i = 0; i < GEMM_MR; i++) {
            sum[i] = GEMM_FMA_NARROW(sum[i], a[i * a_row], right);
        }
        a++;
        b += GEMM_NR;
    } while (--kc > 0);
    for (int i = 0; i < GEMM_MR; i++) {
        narrow_memory *out = (narrow_memory *)(c + i * c_row);
        if (accumulate) {
            sum[i] += *out;
        }
        *out = sum[i];
    }
}

static inline narrow narrow_at(const float *at)
{
    return *(const narrow_memory *)at;
}

/* Eight rows at eight positions of K, turned: vector k holds position k of all rows. */
static inline __attribute__((always_inline)) void turn_eight(const float *a, int64_t a_row,
                                                             narrow out[NARROW])
{
    narrow pair[NARROW], four[NARROW];
    for (int i = 0; i < NARROW; i += 2) {
        narrow even = narrow_at(a + i * a_row), odd = narrow_at(a + (i + 1) * a_row);
        pair[i] = __builtin_shufflevector(even, odd, 0, 8, 1, 9, 4, 12, 5, 13);
        pair[i + 1] = __builtin_shufflevector(even, odd, 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < NARROW; i += 4) {
        for (int j = 0; j < 2; j++) {
            four[i + 2 * j] = __builtin_shufflevector(pair[i + j], pair[i + j + 2],
                                                      0, 1, 8, 9, 4, 5, 12, 13);
            four[i + 2 * j + 1] = __builtin_shufflevector(pair[i + j], pair[i + j + 2],
                                                          2, 3, 10, 11, 6, 7, 14, 15);
        }
    }
    for (int k = 0; k < NARROW / 2; k++) {
        out[k] = __builtin_shufflevector(four[k], four[k + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        out[k + 4] = __builtin_shufflevector(four[k], four[k + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

/* The first column of a panel of b alone, as when one token is generated: lanes are rows of a,
 * whose sums are the same chains.  A cache line of eight rows is used up before the next rows':
 * they are often a power of two apart. */
enum { SINGLE_GROUPS = 4, SINGLE_ROWS = SINGLE_GROUPS * NARROW };

static __attribute__((noinline)) void
micro_single(int64_t kc, const float *a, int64_t a_row, const float *b, float *c, int64_t c_row,
             bool accumulate)
{
    narrow sum[SINGLE_GROUPS] = {0}, column[SINGLE_GROUPS][LINE];
    int64_t k = 0;
    for (; k + LINE <= kc; k += LINE, b += LINE * GEMM_NR) {
        for (int g = 0; g < SINGLE_GROUPS; g++) {
            const float *rows = a + g * NARROW * a_row + k;
            turn_eight(rows, a_row, column[g]);
            turn_eight(rows + NARROW, a_row, column[g] + NARROW);
        }
        for (int i = 0; i < LINE; i++) { /* chains of all groups side by side */
            for (int g = 0; g < SINGLE_GROUPS; g++) {
                sum[g] = GEMM_FMA_NARROW(sum[g], b[i * GEMM_NR], column[g][i]);
            }
        }
    }
    for (; k < kc; k++, b += GEMM_NR) {
        for (int g = 0; g < SINGLE_GROUPS; g++) {
            narrow last = {0};
            for (int i = 0; i < NARROW; i++) {
                last[i] = a[(g * NARROW + i) * a_row + k];
            }
            sum[g] = GEMM_FMA_NARROW(sum[g], *b, last);
        }
    }
    for (int i = 0; i < SINGLE_ROWS; i++) {
        float made = sum[i / NARROW][i % NARROW];
        c[i * c_row] = accumulate ? c[i * c_row] + made : made;
    }
}
#endif

static __attribute__((noinline)) void
micro_packed(int64_t kc, const float *a, const float *b, float *c, int64_t c_row, bool accumulate)
{
    micro(kc, a, 1, GEMM_MR, 0, b, c, c_row, accumulate);
}

static __attribute__((noinline)) void
micro_direct(int64_t kc, const float *a, int64_t a_row, const float *b, float *c, int64_t c_row,
             bool accumulate)
{
    micro(kc, a, a_row, 1, GEMM_MR * a_row, b, c, c_row, accumulate);
}

/* A micro-tile that sticks out of c: by way of a whole one. */
static void micro_edge(int64_t kc, const float *a, const float *b, float *c, int64_t c_row,
                       bool accumulate, int64_t rows, int64_t cols)
{
    float whole[GEMM_MR * GEMM_NR] = {0};
    for (int64_t i = 0; accumulate && i < rows; i++) {
        memcpy(whole + i * GEMM_NR, c + i * c_row, (size_t)cols * sizeof *c);
    }
    micro_packed(kc, a, b, whole, GEMM_NR, accumulate);
    for (int64_t i = 0; i < rows; i++) {
        memcpy(c + i * c_row, whole + i * GEMM_NR, (size_t)cols * sizeof *c);
    }
}

static __attribute__((noinline)) void pack_left(const ovlm_gemm_side *s, int64_t first,
                                                int64_t have, int64_t k0, int64_t kc, float *out)
{
    pack_panels(s, first, have, k0, kc, GEMM_MR, out);
}

static __attribute__((noinline)) void pack_right(const ovlm_gemm_side *s, int64_t first,
                                                 int64_t have, int64_t k0, int64_t kc, float *out)
{
    pack_panels(s, first, have, k0, kc, GEMM_NR, out);
}

/* A tile of y, or of y transposed: `left` is walked by MR rows, `right` by NR. */
typedef struct walk {
    const ovlm_gemm *g;
    const ovlm_gemm_side *left, *right;
    int64_t left0, left_n, right0, right_n;
    bool turned;      /* left is b: sums are y transposed                                   */
    bool in_place;    /* sums go straight into y, which is float32 and has no epilogue      */
    bool direct;      /* whole panels of left are read where they are                       */
    bool once;        /* one block of K: sums are used up before the next rows' are made    */
    int64_t sums_row; /* from a row of sums to the next                                     */
    float *sums, *left_pack, *right_pack;
} walk;

/* Sums of left's rows from `at` on. */
static float *walk_sums(const walk *w, int64_t at)
{
    return w->sums + (w->once && !w->in_place ? 0 : at * w->sums_row);
}

/* Panels of left from `at` on, packed, against all panels of right. */
static void walk_packed(const walk *w, int64_t at, int64_t n, int64_t kc, bool accumulate)
{
    for (int64_t j = 0; j < w->right_n; j += GEMM_NR) {
        const float *b = w->right_pack + j * kc;
        int64_t cols = w->right_n - j < GEMM_NR ? w->right_n - j : GEMM_NR;
        for (int64_t i = 0; i < n; i += GEMM_MR) {
            const float *a = w->left_pack + i * kc;
            float *c = walk_sums(w, at) + i * w->sums_row + j;
            int64_t rows = n - i < GEMM_MR ? n - i : GEMM_MR;
            if (rows == GEMM_MR && (cols == GEMM_NR || !w->in_place)) {
                micro_packed(kc, a, b, c, w->sums_row, accumulate);
            } else {
                micro_edge(kc, a, b, c, w->sums_row, accumulate, rows, cols);
            }
        }
    }
}

/* The same, left read where it is: once, so its panels are the outer loop.  For partial
 * micro-tiles they are packed as well. */
static void walk_direct(const walk *w, int64_t at, int64_t n, int64_t k0, int64_t kc,
                        bool accumulate)
{
    int64_t i = 0;
#if defined(GEMM_FMA_NARROW)
    for (; w->right_n == 1 && !w->in_place && i + SINGLE_ROWS <= n; i += SINGLE_ROWS) {
        const float *a = (const float *)w->left->data + (w->left0 + at + i) * w->left->stride + k0;
        micro_single(kc, a, w->left->stride, w->right_pack, walk_sums(w, at) + i * w->sums_row,
                     w->sums_row, accumulate);
    }
#endif
    for (; i < n; i += GEMM_MR) {
        int64_t row = w->left0 + at + i, rows = n - i < GEMM_MR ? n - i : GEMM_MR;
        const float *a = (const float *)w->left->data + row * w->left->stride + k0;
        bool whole = rows == GEMM_MR && (w->right_n % GEMM_NR == 0 || !w->in_place);
        if (!whole) {
            pack_left(w->left, row, rows, k0, kc, w->left_pack);
        }
        for (int64_t j = 0; j < w->right_n; j += GEMM_NR) {
            const float *b = w->right_pack + j * kc;
            float *c = walk_sums(w, at) + i * w->sums_row + j;
            int64_t cols = w->right_n - j < GEMM_NR ? w->right_n - j : GEMM_NR;
#if defined(GEMM_FMA_NARROW)
            if (rows == GEMM_MR && cols <= NARROW && !w->in_place) {
                micro_narrow(kc, a, w->left->stride, b, c, w->sums_row, accumulate);
                continue;
            }
#endif
            if (rows == GEMM_MR && (cols == GEMM_NR || !w->in_place)) {
                micro_direct(kc, a, w->left->stride, b, c, w->sums_row, accumulate);
            } else {
                micro_edge(kc, w->left_pack, b, c, w->sums_row, accumulate, rows, cols);
            }
        }
    }
}

/* Rows (turned: columns) of y whose sums are complete. */
static void walk_finish(const walk *w, int64_t at, int64_t n)
{
    const ovlm_gemm *g = w->g;
    if (w->turned) {
        for (int64_t i = 0; i < w->right_n; i++) {
            finish_row(g, w->right0 + i, w->left0 + at, n, walk_sums(w, at) + i, w->sums_row);
        }
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        finish_row(g, w->left0 + at + i, w->right0, w->right_n,
                   walk_sums(w, at) + i * w->sums_row, 1);
    }
}

/* K = 0. */
static void walk_zero(const walk *w, int64_t step)
{
    for (int64_t at = 0; at < w->left_n; at += step) {
        int64_t n = w->left_n - at < step ? w->left_n - at : step;
        for (int64_t i = 0; i < n && !(w->in_place && w->g->accumulate); i++) {
            memset(walk_sums(w, at) + i * w->sums_row, 0, (size_t)w->right_n * sizeof(float));
        }
        if (!w->in_place) {
            walk_finish(w, at, n);
        }
    }
}

static void walk_run(const walk *w)
{
    int64_t k_all = w->g->k, step = GEMM_MR * (OVLM_GEMM_LEFT / GEMM_MR);
    bool accumulate = w->in_place && w->g->accumulate;
    if (k_all == 0) {
        walk_zero(w, step);
        return;
    }
    int64_t blocks = (k_all + OVLM_GEMM_K - 1) / OVLM_GEMM_K;
    int64_t block = (k_all + blocks - 1) / blocks;
    for (int64_t k0 = 0; k0 < k_all; k0 += block, accumulate = true) {
        int64_t kc = k_all - k0 < block ? k_all - k0 : block;
        pack_right(w->right, w->right0, w->right_n, k0, kc, w->right_pack);
        for (int64_t at = 0; at < w->left_n; at += step) {
            int64_t n = w->left_n - at < step ? w->left_n - at : step;
            if (w->direct) {
                walk_direct(w, at, n, k0, kc, accumulate);
            } else {
                pack_left(w->left, w->left0 + at, n, k0, kc, w->left_pack);
                walk_packed(w, at, n, kc, accumulate);
            }
            if (k0 + kc == k_all && !w->in_place) {
                walk_finish(w, at, n);
            }
        }
    }
}

/* Packing b takes about as long as 8 rows of y; turned, it is read where it is, but y's rows count
 * in whole vectors, unless there is one alone. */
static bool turn_pays(const ovlm_gemm *g, int64_t rows)
{
    int64_t turned = (rows + GEMM_NR - 1) / GEMM_NR * GEMM_NR;
    int64_t straight = (rows + GEMM_MR - 1) / GEMM_MR * GEMM_MR + 8;
    return rows <= GEMM_DIRECT_COLS && !g->b.across && (rows == 1 || turned <= straight);
}

_Static_assert((OVLM_GEMM_LEFT_MOST + OVLM_GEMM_COLS) * OVLM_GEMM_K + OVLM_GEMM_AREA <=
                   OVLM_CPU_SCRATCH_BYTES / 4,
               "a tile's panels and sums fit into a thread's scratch");

static void GEMM_NAME(tile)(const ovlm_gemm *g, const ovlm_gemm_tiles *tiles, int64_t index,
                            void *scratch)
{
    int64_t row = index / tiles->col_tiles * tiles->rows;
    int64_t col = index % tiles->col_tiles * tiles->cols;
    int64_t rows = g->m - row < tiles->rows ? g->m - row : tiles->rows;
    int64_t cols = g->n - col < tiles->cols ? g->n - col : tiles->cols;
    walk w = {.g = g, .left = &g->a, .right = &g->b, .left0 = row, .left_n = rows,
              .right0 = col, .right_n = cols, .turned = turn_pays(g, rows)};
    if (w.turned) {
        w = (walk){.g = g, .left = &g->b, .right = &g->a, .left0 = col, .left_n = cols,
                   .right0 = row, .right_n = rows, .turned = true};
    }
    w.direct = !w.left->across && w.left->dtype == OVLM_F32 && w.left->index == NULL &&
               w.right_n <= GEMM_DIRECT_COLS;
    w.in_place = !w.turned && ovlm_gemm_in_place(g);
    w.once = g->k <= OVLM_GEMM_K;
    w.left_pack = scratch;
    w.right_pack = w.left_pack + OVLM_GEMM_LEFT_MOST * OVLM_GEMM_K;
    if (w.in_place) {
        w.sums = (float *)g->y.data + row * g->y.stride + col;
        w.sums_row = g->y.stride;
    } else {
        w.sums = w.right_pack + OVLM_GEMM_COLS * OVLM_GEMM_K;
        w.sums_row = (w.right_n + GEMM_NR - 1) / GEMM_NR * GEMM_NR;
    }
    walk_run(&w);
}

const ovlm_gemm_code GEMM_NAME(ovlm_gemm) = {
    .name = GEMM_TITLE, .mr = GEMM_MR, .nr = GEMM_NR,
    .tile = GEMM_NAME(tile), .slope = GEMM_NAME(slope),
};
