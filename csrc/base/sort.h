/* sort.h - stable radix sort of indices by key, largest first. */
#ifndef OVLM_BASE_SORT_H
#define OVLM_BASE_SORT_H

#include "base/arena.h"

/* order[0..n-1] = indices by key descending; equal keys keep their order.  Keys >= 0.
 * O(n) per varying 11-bit digit of the keys.  Scratch comes from the arena. */
OVLM_NODISCARD ovlm_status ovlm_sort_i64(const int64_t *key, int64_t n, int64_t *order,
                                         ovlm_arena *arena, ovlm_err *err);

/* The same for doubles >= 0 (finite). */
OVLM_NODISCARD ovlm_status ovlm_sort_f64(const double *key, int64_t n, int64_t *order,
                                         ovlm_arena *arena, ovlm_err *err);

/* For qsort: int64_t ascending. */
int ovlm_compare_i64(const void *left, const void *right);

#endif
