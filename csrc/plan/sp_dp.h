/* sp_dp.h - FlexSP's two dynamic programs over sorted lengths (arXiv 2412.01523, 4.1.3 and 4.2). */
#ifndef OVLM_PLAN_SP_DP_H
#define OVLM_PLAN_SP_DP_H

#include "base/arena.h"

/* Splits n lengths (descending or ascending) into n_micro consecutive, non-empty chunks so that the
 * largest sum of a chunk is least (eqs 23-24): chunk m is begin[m] .. begin[m+1]-1.  Needs
 * 1 <= n_micro <= n and a sum of lengths below 2^62.  O(n + n_micro log n log sum). */
OVLM_NODISCARD ovlm_status sp_blast(const int64_t *length, int64_t n, int64_t n_micro,
                                    int64_t *begin, ovlm_arena *arena, ovlm_err *err);

/* Splits n ascending lengths into n_buckets consecutive, non-empty buckets so that rounding each
 * length up to its bucket's largest adds the fewest tokens (eqs 15-16).  Needs 1 <= n_buckets <= n
 * and n*length[n-1] below 2^62.  O(n n_buckets log n). */
OVLM_NODISCARD ovlm_status sp_bucket(const int64_t *length, int64_t n, int64_t n_buckets,
                                     int64_t *begin, ovlm_arena *arena, ovlm_err *err);

#endif
