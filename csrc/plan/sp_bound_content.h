/* sp_bound_content.h - the most that a micro-batch holds beyond what it costs, for any prices.
 *
 * Makespans are cut into intervals.  For a group of degree j within [low, high] let an item be big
 * when a second one as long would not fit beside it, in memory or in time `high`: a group holds at
 * most one big item, its head.  With theta in [0,1] and r = theta*time/high + (1-theta)*tokens/cap,
 * the items beside a head h in a group that takes t <= high satisfy
 *   sum r <= x(t) = theta*t/high + 1 - theta - r_h,
 * and each of them fits beside h by itself.  With rho the greatest price over r of the items that
 * do, the content of the group is at most V(t) = price_h + rho*x(t); without a head the same holds
 * with r_h = 0 and the items that are not big.  A micro-batch is groups on at most N GPUs, so it
 * holds at most N*V(t)/degree of the best degree and head, and with
 *   phi = fixed + the least over degrees, heads, and t of  t - N*V(t)/degree
 * a micro-batch of that interval costs at least phi more than it holds.  Theta and rho depend on
 * the head, not on t: so V is linear, and t is an end - high, or the larger of low and time_h, as
 * no group ends before its head.  Heads are taken together from node to node, where price per token
 * is
 * linear in the length: with one theta and one rho, that of the shortest of them beside which most
 * fits, both ends are quadratic in the head's length, and their least is known.
 *
 * What a fluid does not see and heads do: an item that takes more than half of a group leaves a
 * rest into which no other one like it fits. */
#ifndef OVLM_PLAN_SP_BOUND_CONTENT_H
#define OVLM_PLAN_SP_BOUND_CONTENT_H

#include "plan/sp_bound_nodes.h"

enum { SP_CONTENT_INTERVALS = 64, SP_CONTENT_THETAS = 33 };

/* What holds the most beyond its cost at one end of an interval: groups of degree j that take t,
 * with that head (-1: none) and items from `first` on beside it. */
typedef struct sp_holder {
    double phi, t;
    int64_t j, head, first, theta;
} sp_holder;

/* Items, and how much of each, that a micro-batch of such groups holds. */
typedef struct sp_filling {
    int64_t n, item[3];
    double amount[3];
} sp_filling;

typedef struct sp_contents {
    const sp_model *model;
    sp_nodes nodes;
    int64_t *all;                     /* [n] 0, 1, ..: the items of nodes                       */
    double *pi;                       /* [n] prices                                             */
    double *suffix;                   /* [(rows+1)*THETAS] greatest ratio of a node and all after */
    int64_t n_intervals;
    double low[SP_CONTENT_INTERVALS], high[SP_CONTENT_INTERVALS];
    sp_holder *holder;                /* [2*INTERVALS] each interval's low end and high end      */
    int64_t visits;                   /* work so far, about a nanosecond each                   */
} sp_contents;

/* Prices at up to max_rows nodes; intervals from zero to longest_s, fine from first_s on. */
OVLM_NODISCARD ovlm_status sp_contents_init(sp_contents *contents, const sp_model *model,
                                            int64_t max_rows, double first_s, double longest_s,
                                            ovlm_arena *arena, ovlm_err *err);

/* Prices node_pi >= 0 at the nodes; finds what holds the most; returns the sum of all prices. */
double sp_contents_evaluate(sp_contents *contents, const double *node_pi);

/* Something that the holder at an end of the interval holds: a proposal, close to the most. */
void sp_contents_fill(const sp_contents *contents, int64_t interval, bool at_high,
                      sp_filling *filling);

#endif
