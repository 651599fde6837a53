/* sort.c - least-significant-digit radix sort on (key, index) pairs.
 *
 * Digits on which all keys agree are skipped, so token counts cost two passes and not six. */
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

static ovlm_status sort_keys(const void *key, bool is_double, int64_t n, int64_t *order,
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

ovlm_status ovlm_sort_i64(const int64_t *key, int64_t n, int64_t *order, ovlm_arena *arena,
                          ovlm_err *err)
{
    return sort_keys(key, false, n, order, arena, err);
}

ovlm_status ovlm_sort_f64(const double *key, int64_t n, int64_t *order, ovlm_arena *arena,
                          ovlm_err *err)
{
    return sort_keys(key, true, n, order, arena, err);
}
