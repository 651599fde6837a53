/* nnls.h - non-negative least squares. */
#ifndef OVLM_PLAN_NNLS_H
#define OVLM_PLAN_NNLS_H

#include "base/arena.h"

/* x[columns] >= 0 that minimises |A x - b|.  a[columns][rows] is column-major, rows >= 1, all
 * values finite.  Of columns that depend on each other the first that helps is used and the others
 * get 0.  O(rows*columns^2) plus O(columns^4) at worst. */
OVLM_NODISCARD ovlm_status nnls_solve(const double *a, const double *b, int64_t rows,
                                      int64_t columns, double *x, ovlm_arena *arena, ovlm_err *err);

#endif
