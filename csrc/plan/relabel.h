/* relabel.h - which rank takes which mini-batch: the parts of ovlm_relabel_solve.
 *
 * Notation (OrchMLLM 1.4): V_ij bytes between rank i and mini-batch (label) j, A_jk = the sum of
 * V_ij over the ranks i of node k, which is what stays inside when j goes to node k. */
#ifndef OVLM_PLAN_RELABEL_H
#define OVLM_PLAN_RELABEL_H

#include "base/arena.h"
#include "base/clock.h"
#include "base/sort.h"

/* V, sparse, both ways; duplicates summed. */
typedef struct relabel_flows {
    int64_t *start; /* [N+1] per label                                                  */
    int64_t *rank;  /* ascending within a label                                         */
    int64_t *bytes;
    int64_t *rank_start; /* [N+1] per rank, entries of rank_label and rank_bytes         */
    int64_t *rank_label; /* ascending within a rank                                      */
    int64_t *rank_bytes;
    double *label_total, *rank_total; /* [N]                                             */
    double total;
} relabel_flows;

typedef struct relabel_model {
    int64_t N, K, node_size; /* N ranks in K nodes, the last of which may be smaller      */
    relabel_flows flows, ties;
} relabel_model;

static inline int64_t relabel_node_room(const relabel_model *model, int64_t node)
{
    int64_t left = model->N - node * model->node_size;
    return left < model->node_size ? left : model->node_size;
}

/* Assigns N labels to K classes, at most room[k] in class k and N <= sum of room, so that the sum
 * of gain[j*K + class] is most.  Shortest augmenting paths; exact while gains are integers whose
 * sum stays below 2^52.  *bound is at least the optimum (certified through the classes' prices),
 * and equal to it when the meter did not stop the search.  class_of[N]. */
OVLM_NODISCARD ovlm_status relabel_transport(const double *gain, int64_t N, int64_t K,
                                             const int64_t *room, ovlm_meter *meter,
                                             int64_t *class_of, double *bound, ovlm_arena *arena,
                                             ovlm_err *err);

/* Improves node_of[N] for the min-max objective by swaps of two labels, until none helps or the
 * meter stops it; *value is the objective at the end. */
OVLM_NODISCARD ovlm_status relabel_minmax(const relabel_model *model, ovlm_meter *meter,
                                          int64_t *node_of, double *value, ovlm_arena *arena,
                                          ovlm_err *err);

/* Certified lower bound for min-max; sum_bound is one for the sum of bytes between nodes.
 *
 * It looks at one label, one rank or one node at a time, and lets each node have the labels that it
 * likes best.  It is met, or nearly, where one label decides, as in language phases.  Where the
 * encoders of a step send their outputs over the whole cluster, many nodes like the same labels and
 * only one gets each, which the bound does not see: it stays tens of per cent below what is found.
 */
OVLM_NODISCARD ovlm_status relabel_minmax_bound(const relabel_model *model, double sum_bound,
                                                double *bound, ovlm_arena *arena, ovlm_err *err);

/* Sum of bytes between nodes, and the largest of any rank. */
OVLM_NODISCARD ovlm_status relabel_measure(const relabel_model *model, const relabel_flows *flows,
                                           const int64_t *node_of, double *sum, double *worst,
                                           ovlm_arena *arena, ovlm_err *err);

#endif
