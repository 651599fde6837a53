/* sp_bound_batches.h - bound of a whole step by pricing whole micro-batches.
 *
 * Prices pi_k >= 0 for the items; V(G, tau) certifies from above the content of one micro-batch of
 * makespan tau that holds exactly the giants G, the few longest items.  With
 *   phi(G) = min over tau of  tau + fixed - V(G, tau)
 * any plan of m micro-batches takes at least
 *   sum of all pi_k  +  min over ways to split the giants into at most m sets of
 *                       sum phi(G_i) + (m - number of sets)*phi(no giant).
 * Treating giants as sets forbids what a mere linear program does: one giant at half weight in both
 * halves of the cluster. */
#ifndef OVLM_PLAN_SP_BOUND_BATCHES_H
#define OVLM_PLAN_SP_BOUND_BATCHES_H

#include "plan/sp_bound_price.h"
#include "plan/sp_bound_simplex.h"

enum { SP_GIANTS = 5, SP_GIANT_SETS = 1 << SP_GIANTS, SP_UNITS = 64, SP_LIFTS = 3 };

/* Makespans in [low, high]: capacities are those of `high`, and the fluid part is corrected to each
 * end, so that the width costs strength to second order only. */
typedef struct sp_interval {
    double low, high;
} sp_interval;

/* The best micro-batch of one interval end and one set of giants. */
typedef struct sp_batch_best {
    double phi;
    int64_t interval;
    bool at_high;
} sp_batch_best;

typedef struct sp_batches {
    const sp_model *model;
    int64_t giants, n_rest;
    int64_t unit, units;         /* GPUs per unit and units of the cluster, for the giants' groups */
    int64_t *k;                  /* [n] 0, 1, ...                                             */
    double *s, *item_pi;         /* [n] lengths; [n_rest] prices                              */
    sp_nodes nodes;
    sp_pricer pricer;            /* of the items after the giants                             */
    sp_simplex lp;               /* rows: nodes, sets of giants, one split of the giants      */
    sp_interval *interval;       /* [n_intervals]                                             */
    int64_t n_intervals;
    sp_price *price;             /* [n_intervals*D]                                           */
    double *time_rho;            /* [n_intervals*D] best price per share of the time          */
    float *row;                  /* [n_intervals*D*(cells+1)]                                 */
    sp_batch_best best[SP_GIANT_SETS];
    double *interval_phi;        /* [n_intervals*2*sets] phi of each end and set              */
    double *gain;                /* [sets*(units+1)] scratch of the giants' groups            */
    int64_t *from;               /* [sets*(units+1)] its way back                             */
    double *pi, *best_pi;        /* [nodes.rows]                                              */
    int64_t least;               /* micro-batches at least                                    */
    sp_pattern *pattern;
    int64_t rounds;
} sp_batches;

/* `typical_s`: where makespans are to be told apart finely; `longest_s`: none above it matters. */
OVLM_NODISCARD ovlm_status sp_batches_init(sp_batches *batches, const sp_model *model,
                                           double typical_s, double longest_s, ovlm_arena *arena,
                                           ovlm_err *err);

/* Raises *low, a lower bound on the step time with at least `least` and at most `most` non-empty
 * micro-batches, towards hint. */
void sp_batches_raise(sp_batches *batches, int64_t least, int64_t most, double hint,
                      ovlm_meter *meter, double *low);

#endif
