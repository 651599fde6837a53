/* route.h - orders that routes and the step plan are built with. */
#ifndef OVLM_PLAN_ROUTE_H
#define OVLM_PLAN_ROUTE_H

#include "base/arena.h"
#include "base/sort.h"

/* Stable counting sort by key in [0, n_keys): out[start[b]] .. out[start[b+1]-1] are the indices
 * with key b, in the order of `in` (NULL: ascending).  out[n], start[n_keys+1].  O(n + n_keys). */
void route_group(const int64_t *key, int64_t n_keys, const int64_t *in, int64_t n, int64_t *out,
                 int64_t *start);

/* order[0..n-1] = indices by key ascending, stable; keys >= 0.  One pass when sorted already. */
OVLM_NODISCARD ovlm_status route_sort_up(const int64_t *key, int64_t n, int64_t *order,
                                         ovlm_arena *arena, ovlm_err *err);

/* Pieces by (source, send_row); checks on the way that every row of every source leaves once. */
OVLM_NODISCARD ovlm_status route_send_order(const ovlm_route *route, int64_t *order,
                                            ovlm_arena *arena, ovlm_err *err);

#endif
