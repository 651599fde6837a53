/* sp_bound_nodes.h - prices of many items through few: per token, linear in the length.
 *
 * Any prices give a valid certificate, so restricting them costs strength only: items next to each
 * other in length have nearly the same price per token, and work per token is linear in the length
 * on any one degree.  Items next to a change of the least degree are nodes themselves. */
#ifndef OVLM_PLAN_SP_BOUND_NODES_H
#define OVLM_PLAN_SP_BOUND_NODES_H

#include "plan/sp_model.h"

typedef struct sp_nodes {
    int64_t n, rows;
    const int64_t *k; /* [n] items of the model, ascending (descending lengths)      */
    int64_t *node;    /* [rows] position of that node                                */
    int64_t *left;    /* [n] node at or before the item                              */
    double *weight;   /* [n] of that node's price                                    */
    double *next;     /* [n] of the next node's price; 0 on a node                   */
    double *demand;   /* [rows] sum of the items' weights                            */
} sp_nodes;

/* Every item is a node while there are at most max_rows of them; k stays borrowed. */
OVLM_NODISCARD ovlm_status sp_nodes_init(sp_nodes *nodes, const sp_model *model, const int64_t *k,
                                         int64_t n, int64_t max_rows, ovlm_arena *arena,
                                         ovlm_err *err);

/* item_pi[0..n-1] >= 0 from pi[0..rows-1]; returns their sum. */
double sp_nodes_spread(const sp_nodes *nodes, const double *pi, double *item_pi);

#endif
