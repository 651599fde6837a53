/* cpu_tile.h - products of small matrices that lie in a cache, for attention, on one thread.
 *
 * c[m][n] = (c +) sum over k of a(row, k) b[k][n].  Every element is one chain of multiply-adds in
 * ascending k that starts from c or 0, whatever m and n are. */
#ifndef OVLM_CPU_CPU_TILE_H
#define OVLM_CPU_CPU_TILE_H

#include <stdbool.h>
#include <stdint.h>

typedef struct ovlm_tile {
    float *c;
    const float *a, *b;
    int64_t m, n, k;    /* n is a multiple of 8                    */
    int64_t c_step;     /* from a row to the next                  */
    int64_t a_row, a_k; /* a(row, k) = a[row * a_row + k * a_k]    */
    int64_t b_step;     /* from a k to the next                    */
    bool add;           /* to what c holds                         */
} ovlm_tile;

/* One instruction set's code. */
typedef struct ovlm_tile_code {
    void (*mul)(const ovlm_tile *t);
    /* to[c * to_step + r] = from[r * from_step + c]; rows and cols are multiples of 8. */
    void (*transpose)(float *to, int64_t to_step, const float *from, int64_t from_step,
                      int64_t rows, int64_t cols);
} ovlm_tile_code;

/* The best that this processor runs. */
const ovlm_tile_code *ovlm_tile_code_get(void);

/* Rows of tiles begin at odd multiples of 16 floats, so that a column of lines does not fall into
 * a few sets of the cache. */
static inline int64_t ovlm_tile_step(int64_t columns)
{
    return ((columns + 15) / 16 | 1) * 16;
}

static inline int64_t ovlm_tile_round(int64_t columns)
{
    return (columns + 7) / 8 * 8;
}

#if defined(__x86_64__)
extern const ovlm_tile_code ovlm_tile_avx512, ovlm_tile_avx2;
#endif
extern const ovlm_tile_code ovlm_tile_plain;

#endif
