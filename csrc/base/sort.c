/* sort.c - least-significant-digit radix sort on (key, index) pairs.
 *
 * Digits on which all keys agree are skipped, so token counts cost two passes and not six; and
 * integers that lie within 2^32 of each other share a word with their index. */
#include "base/sort.h"

#include <string.h>

enum { DIGIT_BITS = 11, BUCKETS = 1 << DIGIT_BITS };

typedef struct pair {
    uint64_t key;
    int64_t index;
} pair;

/* One stable counting pass on the digit at `shift`. */
static void radix_pass(const pair *from, pair *to, int64_t n, int shift)
{
    int64_t count[BUCKETS + 1] = {0};
    for (int64_t i = 0; i < n; i++) {
        count[1 + ((from[i].key >> shift) & (BUCKETS - 1))]++;
    }
    for (int b = 0; b < BUCKETS; b++) {
        count[b + 1] += count[b];
    }
    for (int64_t i = 0; i < n; i++) {
        to[count[(from[i].key >> shift) & (BUCKETS - 1)]++] = from[i];
    }
}

/* Sorts ascending by pair.key, which callers complement to get a descending order. */
static void radix_sort(pair *a, pair *b, int64_t n, int64_t *order)
{
    uint64_t varying = 0;
    for (int64_t i = 1; i < n; i++) {
        varying |= a[i].key ^ a[0].key;
    }
    for (int shift = 0; shift < 64; shift += DIGIT_BITS) {
        if (((varying >> shift) & (BUCKETS - 1)) == 0) {
            continue;
        }
        radix_pass(a, b, n, shift);
        pair *swap = a;
        a = b;
        b = swap;
    }
    for (int64_t i = 0; i < n; i++) {
        order[i] = a[i].index;
    }
}

static ovlm_status sort_pairs(const void *key, bool is_double, int64_t n, int64_t *order,
                             ovlm_arena *arena, ovlm_err *err)
{
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    pair *a = NULL, *b = NULL;
    OVLM_TRY(OVLM_ARENA_RAW(arena, &a, n, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &b, n, err));
    for (int64_t i = 0; i < n; i++) {
        uint64_t bits = 0;
        /* Non-negative IEEE doubles order like their bits; + 0.0 turns -0.0 into 0.0. */
        if (is_double) {
            double value = ((const double *)key)[i] + 0.0;
            memcpy(&bits, &value, sizeof bits);
        } else {
            bits = (uint64_t)((const int64_t *)key)[i];
        }
        a[i] = (pair){~bits, i};
    }
    radix_sort(a, b, n, order);
    ovlm_arena_rewind(arena, mark);
    return OVLM_OK;
}

/* One stable counting pass over words, on `bits` bits at `shift`; the last one writes the indices,
 * which are the lower half of each word, to `order`. */
static void word_pass(const uint64_t *from, uint64_t *to, int64_t *order, int64_t n, int shift,
                      int bits)
{
    uint32_t count[BUCKETS + 1] = {0};
    uint64_t mask = ((uint64_t)1 << bits) - 1;
    for (int64_t i = 0; i < n; i++) {
        count[1 + ((from[i] >> shift) & mask)]++;
    }
    for (uint64_t b = 0; b < mask; b++) {
        count[b + 1] += count[b];
    }
    for (int64_t i = 0; i < n && order == NULL; i++) {
        to[count[(from[i] >> shift) & mask]++] = from[i];
    }
    for (int64_t i = 0; i < n && order != NULL; i++) {
        order[count[(from[i] >> shift) & mask]++] = (int64_t)(from[i] & UINT32_MAX);
    }
}

/* Keys of [most - span, most], span < 2^32: (most - key) << 32 | index. */
static ovlm_status sort_words(const int64_t *key, int64_t most, uint64_t span, int64_t n,
                              int64_t *order, ovlm_arena *arena, ovlm_err *err)
{
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    uint64_t *a = NULL, *b = NULL;
    OVLM_TRY(OVLM_ARENA_RAW(arena, &a, n, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &b, n, err));
    for (int64_t i = 0; i < n; i++) {
        a[i] = (uint64_t)(most - key[i]) << 32 | (uint64_t)i;
    }
    int width = 1;
    while (span >> width != 0) {
        width++;
    }
    /* even digits: 13 bits are 7 and 6, whose counts stay in the nearest cache */
    int passes = (width + DIGIT_BITS - 1) / DIGIT_BITS, bits = (width + passes - 1) / passes;
    for (int pass = 0; pass < passes; pass++) {
        word_pass(a, b, pass == passes - 1 ? order : NULL, n, 32 + pass * bits, bits);
        uint64_t *swap = a;
        a = b;
        b = swap;
    }
    ovlm_arena_rewind(arena, mark);
    return OVLM_OK;
}

ovlm_status ovlm_sort_i64(const int64_t *key, int64_t n, int64_t *order, ovlm_arena *arena,
                          ovlm_err *err)
{
    int64_t least = n > 0 ? key[0] : 0, most = least;
    for (int64_t i = 1; i < n; i++) {
        least = key[i] < least ? key[i] : least;
        most = key[i] > most ? key[i] : most;
    }
    uint64_t span = (uint64_t)most - (uint64_t)least;
    return n <= UINT32_MAX && span <= UINT32_MAX
               ? sort_words(key, most, span, n, order, arena, err)
               : sort_pairs(key, false, n, order, arena, err);
}

ovlm_status ovlm_sort_f64(const double *key, int64_t n, int64_t *order, ovlm_arena *arena,
                          ovlm_err *err)
{
    return sort_pairs(key, true, n, order, arena, err);
}

int ovlm_compare_i64(const void *left, const void *right)
{
    int64_t a = *(const int64_t *)left, b = *(const int64_t *)right;
    return (a > b) - (a < b);
}
