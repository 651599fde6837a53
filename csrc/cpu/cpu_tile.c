/* cpu_tile.c - products of small matrices: 6 x 16 sums in twelve registers. */
#include "cpu/cpu_tile.h"

#include "cpu/cpu_load.h"

enum { ROWS = 6, VECTORS = 2 };

/* rows x 8*vectors elements of c; both are constants after inlining. */
OVLM_CPU_INLINE void multiply(const int rows, const int vectors, const ovlm_tile *t, int64_t row,
                              int64_t col)
{
    ovlm_f8 sum[ROWS][VECTORS];
    float *c = t->c + row * t->c_step + col;
    const float *a = t->a + row * t->a_row, *b = t->b + col;
    int64_t a_row = t->a_row, a_k = t->a_k, b_step = t->b_step, c_step = t->c_step;
    for (int r = 0; r < rows; r++) {
        for (int v = 0; v < vectors; v++) {
            sum[r][v] = t->add ? ovlm_f8_load(c + r * c_step + 8 * v) : ovlm_f8_all(0);
        }
    }
    for (int64_t k = 0; k < t->k; k++) {
        ovlm_f8 right[VECTORS];
        for (int v = 0; v < vectors; v++) {
            right[v] = ovlm_f8_load(b + 8 * v);
        }
        for (int r = 0; r < rows; r++) {
            ovlm_f8 left = ovlm_f8_all(a[r * a_row]);
            for (int v = 0; v < vectors; v++) {
                sum[r][v] += left * right[v];
            }
        }
        a += a_k;
        b += b_step;
    }
    for (int r = 0; r < rows; r++) {
        for (int v = 0; v < vectors; v++) {
            ovlm_f8_store(c + r * c_step + 8 * v, sum[r][v]);
        }
    }
}

OVLM_CPU_INLINE void multiply_panel(const int vectors, const ovlm_tile *t, int64_t col)
{
    int64_t row = 0;
    for (; row + ROWS <= t->m; row += ROWS) {
        multiply(ROWS, vectors, t, row, col);
    }
    switch (t->m - row) {
    case 5: multiply(5, vectors, t, row, col); return;
    case 4: multiply(4, vectors, t, row, col); return;
    case 3: multiply(3, vectors, t, row, col); return;
    case 2: multiply(2, vectors, t, row, col); return;
    case 1: multiply(1, vectors, t, row, col); return;
    default: return;
    }
}

/* A panel of b stays in the first-level cache while all rows of a pass by. */
OVLM_CPU_INLINE void tile_mul_body(const ovlm_tile *t)
{
    int64_t col = 0;
    for (; col + 16 <= t->n; col += 16) {
        multiply_panel(2, t, col);
    }
    if (col < t->n) {
        multiply_panel(1, t, col);
    }
}
OVLM_CPU_KERNEL(tile_mul, (const ovlm_tile *t), (t))

void ovlm_tile_mul(const ovlm_tile *t)
{
    tile_mul(t);
}

#define SHUFFLE __builtin_shufflevector

/* 8 x 8: pairs of rows interleaved, then pairs of pairs, then halves exchanged. */
OVLM_CPU_INLINE void transpose_block(float *to, int64_t to_step, const float *from,
                                     int64_t from_step)
{
    ovlm_f8 r[8], s[8];
    for (int i = 0; i < 8; i++) {
        r[i] = ovlm_f8_load(from + i * from_step);
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
        ovlm_f8_store(to + i * to_step, s[i]);
    }
}

OVLM_CPU_INLINE void transpose_body(float *to, int64_t to_step, const float *from,
                                    int64_t from_step, int64_t rows, int64_t cols)
{
    for (int64_t r = 0; r < rows; r += 8) {
        for (int64_t c = 0; c < cols; c += 8) {
            transpose_block(to + c * to_step + r, to_step, from + r * from_step + c, from_step);
        }
    }
}
OVLM_CPU_KERNEL(transpose,
                (float *to, int64_t to_step, const float *from, int64_t from_step, int64_t rows,
                 int64_t cols),
                (to, to_step, from, from_step, rows, cols))

void ovlm_tile_transpose(float *to, int64_t to_step, const float *from, int64_t from_step,
                         int64_t rows, int64_t cols)
{
    transpose(to, to_step, from, from_step, rows, cols);
}
