/* sp_bound_batches.h - bound of a whole step by pricing whole micro-batches.
 *
 * Every item but the giants, the few longest, has a price: its least GPU-seconds over N, plus a
 * price per token of memory.  V(G, tau) bounds from above the priced content of one micro-batch of
 * makespan tau that holds exactly the giants G.  With phi(G) = min over tau of  tau + fixed - V(G,
 * tau) any plan with m micro-batches takes at least sum of all prices  +  min over ways to split
 * the giants into at most m sets of sum phi(G_i) + (m - number of sets)*phi(no giant). The giants
 * are whole and used once; all else is fluid.  What this sees and the work bound does not: a giant
 * must share its micro-batch with others as slow, or pay for a large degree, or let GPUs idle whose
 * memory is full. */
#ifndef OVLM_PLAN_SP_BOUND_BATCHES_H
#define OVLM_PLAN_SP_BOUND_BATCHES_H

#include "plan/sp_model.h"

enum { SP_GIANTS = 7, SP_GIANT_SETS = 1 << SP_GIANTS, SP_INTERVALS = 256 };

/* Makespans in [low, high].  Contents are linear in the makespan inside, so that tau - V is concave
 * and least at an end. */
typedef struct sp_interval {
    double low, high;
} sp_interval;

/* A group's content: no item is worth more than rho per share of
 *   theta*time/high + (1 - theta)*tokens/cap. */
typedef struct sp_fluid {
    double rho, theta;
} sp_fluid;

typedef struct sp_batches {
    const sp_model *model;
    int64_t giants, n_intervals;
    int64_t unit, units;   /* GPUs per unit and units of the cluster, for the giants' groups   */
    int64_t least, most;   /* non-empty micro-batches                                          */
    double *work, *price;  /* [n] least GPU-seconds over N; price                              */
    int64_t *run, n_runs;  /* first items of runs with their least work on one degree; n      */
    sp_interval *interval; /* [SP_INTERVALS]                                                   */
    sp_fluid *fluid;       /* [SP_INTERVALS*D] theta of least excess                           */
    sp_fluid *timed;       /* [SP_INTERVALS*D] theta = 1: for groups that giants fill          */
    double *phi;           /* [2*SP_INTERVALS*sets] of each interval end and set               */
    double *gain;          /* [sets*(units+1)] scratch of the giants' groups                   */
    double *sum;           /* [(giants+1)*sets] scratch of the splits                          */
} sp_batches;

/* Room for up to `giants` giants.  typical_s: where makespans are told apart finely; longest_s:
 * none above it matters. */
OVLM_NODISCARD ovlm_status sp_batches_init(sp_batches *batches, const sp_model *model,
                                           int64_t giants, double typical_s, double longest_s,
                                           ovlm_arena *arena, ovlm_err *err);

/* Bound with that price per token, for at least `least` and at most `most` non-empty micro-batches.
 */
double sp_batches_bound(sp_batches *batches, double memory_price, int64_t least, int64_t most);

/* Giants worth telling apart: their memory alone needs an eighth of the cluster. */
int64_t sp_batches_giants(const sp_model *model);

/* Work of one evaluation, in search steps. */
int64_t sp_batches_steps(const sp_batches *batches);

#endif
