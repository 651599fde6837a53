/* cpu_tile_code.h - products of small matrices, written once and compiled once per instruction set
 * by the files that define
 *
 *   TILE_CODE   name of the set's ovlm_tile_code     TILE_LANES  floats in a vector, 8 or 16
 *   TILE_ROWS   rows of a micro-tile
 *   TILE_FMA_wide(sum, left, right), TILE_FMA_eight   sum + left right, left a float: fused where
 *               the set has it, by name, so that no compiler decides
 *
 * The micro-tile's TILE_ROWS x 2 vectors of sums stay in registers. */
#include "cpu/cpu_tile.h"

typedef float wide __attribute__((vector_size(TILE_LANES * 4)));
typedef float wide_any __attribute__((vector_size(TILE_LANES * 4), aligned(4), may_alias));
typedef float eight __attribute__((vector_size(32)));
typedef float eight_any __attribute__((vector_size(32), aligned(4), may_alias));

#define ALWAYS static inline __attribute__((always_inline))

/* rows x (vectors of TYPE) elements of c; rows and vectors are constants after inlining. */
#define DEFINE_MULTIPLY(name, TYPE, LANES)                                                  \
    ALWAYS void name(const int rows, const int vectors, const ovlm_tile *t, int64_t row,    \
                     int64_t col)                                                           \
    {                                                                                       \
        TYPE sum[TILE_ROWS][2];                                                             \
        float *c = t->c + row * t->c_step + col;                                            \
        const float *a = t->a + row * t->a_row, *b = t->b + col;                            \
        int64_t a_row = t->a_row, a_k = t->a_k, b_step = t->b_step, c_step = t->c_step;     \
        for (int r = 0; r < rows; r++) {                                                    \
            for (int v = 0; v < vectors; v++) {                                             \
                sum[r][v] = (TYPE){0};                                                      \
                if (t->add) {                                                               \
                    sum[r][v] = *(const TYPE##_any *)(c + r * c_step + LANES * v);          \
                }                                                                           \
            }                                                                               \
        }                                                                                   \
        for (int64_t k = 0; k < t->k; k++) {                                                \
            TYPE right[2];                                                                  \
            for (int v = 0; v < vectors; v++) {                                             \
                right[v] = *(const TYPE##_any *)(b + LANES * v);                            \
            }                                                                               \
            for (int r = 0; r < rows; r++) {                                                \
                float left = a[r * a_row];                                                  \
                for (int v = 0; v < vectors; v++) {                                         \
                    sum[r][v] = TILE_FMA_##TYPE(sum[r][v], left, right[v]);                 \
                }                                                                           \
            }                                                                               \
            a += a_k;                                                                       \
            b += b_step;                                                                    \
        }                                                                                   \
        for (int r = 0; r < rows; r++) {                                                    \
            for (int v = 0; v < vectors; v++) {                                             \
                *(TYPE##_any *)(c + r * c_step + LANES * v) = sum[r][v];                    \
            }                                                                               \
        }                                                                                   \
    }
DEFINE_MULTIPLY(multiply, wide, TILE_LANES)
DEFINE_MULTIPLY(multiply_eight, eight, 8)

/* All rows against one panel of b, which stays in the first-level cache meanwhile. */
#define DEFINE_PANEL(name, mul, vectors)                                   \
    static void name(const ovlm_tile *t, int64_t col)                      \
    {                                                                      \
        int64_t row = 0;                                                   \
        for (; row + TILE_ROWS <= t->m; row += TILE_ROWS) {                \
            mul(TILE_ROWS, vectors, t, row, col);                          \
        }                                                                  \
        for (; row + 4 <= t->m; row += 4) {                                \
            mul(4, vectors, t, row, col);                                  \
        }                                                                  \
        if (row + 2 <= t->m) {                                             \
            mul(2, vectors, t, row, col);                                  \
            row += 2;                                                      \
        }                                                                  \
        if (row < t->m) {                                                  \
            mul(1, vectors, t, row, col);                                  \
        }                                                                  \
    }
DEFINE_PANEL(panel, multiply, 2)
DEFINE_PANEL(panel_sixteen, multiply_eight, 2)
DEFINE_PANEL(panel_eight, multiply_eight, 1)

static void tile_mul(const ovlm_tile *t)
{
    int64_t col = 0;
    for (; col + 2 * TILE_LANES <= t->n; col += 2 * TILE_LANES) {
        panel(t, col);
    }
    if (col + 16 <= t->n) {
        panel_sixteen(t, col);
        col += 16;
    }
    if (col < t->n) {
        panel_eight(t, col);
    }
}

#define SHUFFLE __builtin_shufflevector

/* 8 x 8: pairs of rows interleaved, then pairs of pairs, then halves exchanged. */
ALWAYS void transpose_block(float *to, int64_t to_step, const float *from, int64_t from_step)
{
    eight r[8], s[8];
    for (int i = 0; i < 8; i++) {
        r[i] = *(const eight_any *)(from + i * from_step);
    }
    for (int i = 0; i < 8; i += 2) {
        s[i] = SHUFFLE(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        s[i + 1] = SHUFFLE(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = SHUFFLE(s[i], s[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        r[i + 1] = SHUFFLE(s[i], s[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        r[i + 2] = SHUFFLE(s[i + 1], s[i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
        r[i + 3] = SHUFFLE(s[i + 1], s[i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    for (int i = 0; i < 4; i++) {
        s[i] = SHUFFLE(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        s[i + 4] = SHUFFLE(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
    for (int i = 0; i < 8; i++) {
        *(eight_any *)(to + i * to_step) = s[i];
    }
}

static void tile_transpose(float *to, int64_t to_step, const float *from, int64_t from_step,
                           int64_t rows, int64_t cols)
{
    for (int64_t r = 0; r < rows; r += 8) {
        for (int64_t c = 0; c < cols; c += 8) {
            transpose_block(to + c * to_step + r, to_step, from + r * from_step + c, from_step);
        }
    }
}

const ovlm_tile_code TILE_CODE = {tile_mul, tile_transpose};
