/* sp_bound_nodes.h - prices of many items through few: linear in the length between nodes.
 *
 * Any prices give a valid certificate, so restricting them costs strength only: items next to each
 * other in length have nearly the same price. */
#ifndef OVLM_PLAN_SP_BOUND_NODES_H
#define OVLM_PLAN_SP_BOUND_NODES_H

#include "base/arena.h"

typedef struct sp_nodes {
    int64_t n, rows;
    const double *s;   /* [n] lengths, descending                                     */
    int64_t *node;     /* [rows] item at that node                                    */
    int64_t *left;     /* [n] node at or before the item                              */
    double *share;     /* [n] weight of that node; the rest belongs to the next       */
    double *demand;    /* [rows] sum of the items' weights                            */
} sp_nodes;

/* Every item is a node while there are at most max_rows of them. */
OVLM_NODISCARD ovlm_status sp_nodes_init(sp_nodes *nodes, const double *s, int64_t n,
                                         int64_t max_rows, ovlm_arena *arena, ovlm_err *err);

/* item_pi[0..n-1] >= 0 from pi[0..rows-1]; returns the sum from item `first` on. */
double sp_nodes_spread(const sp_nodes *nodes, const double *pi, int64_t first, double *item_pi);

#endif
