/* balance_parts.h - the steps of balancing; balance.c runs them in this order.
 *
 * Every step takes a model and improves a plan or a bound; none makes a plan worse.  `goal` is a
 * proven lower bound: a plan that meets it needs no more work. */
#ifndef OVLM_PLAN_BALANCE_PARTS_H
#define OVLM_PLAN_BALANCE_PARTS_H

#include "base/clock.h"
#include "base/rng.h"
#include "plan/balance_model.h"

/* The search steps share these. */
typedef struct bal_search {
    const bal_model *model;
    ovlm_meter *meter;
    ovlm_rng rng;
    ovlm_arena *arena;
    double goal;     /* stop at this largest load                                          */
    int64_t planned; /* work at which this round is meant to end; the meter may end it before */
} bal_search;

/* Searches stop this close to the goal: less cannot be measured in any training step. */
#define BAL_ENOUGH 1e-7

/* A load that counts as equal to a limit: sums of doubles come in any order. */
#define BAL_TOLERANCE 1e-12
static inline bool bal_meets(double load, double limit)
{
    return load <= limit * (1 + BAL_TOLERANCE);
}

/* Longest-first: units in `order`, each to the rank that ends first.  False through *done when a
 * constraint leaves some unit without a rank.  O(n_units log n_ranks) per distinct speed;
 * O(n_ranks) for a unit whose first choice has no room. */
OVLM_NODISCARD ovlm_status bal_greedy(const bal_model *model, const int64_t *order, bal_plan *plan,
                                      bool *done, ovlm_arena *arena, ovlm_err *err);

/* Other constructions, for when constraints defeat longest-first. */
OVLM_NODISCARD ovlm_status bal_construct(const bal_model *model, bal_plan *plan, bool *done,
                                         ovlm_arena *arena, ovlm_err *err);

/* Random repair of a plan that breaks limits, for when those fail too.  A fixed number of steps. */
OVLM_NODISCARD ovlm_status bal_repair(bal_search *search, bal_plan *plan, bool *done,
                                      ovlm_err *err);

/* Certified lower bound on the largest load, rounded down.  HUGE_VAL never. */
OVLM_NODISCARD ovlm_status bal_bound(const bal_model *model, double *bound, ovlm_arena *arena,
                                     ovlm_err *err);

/* The same for padded costs, from cuts of the sorted units.  0 when nothing is known. */
OVLM_NODISCARD ovlm_status bal_bound_padded(const bal_model *model, double *bound,
                                            ovlm_arena *arena, ovlm_err *err);

/* Padded costs: runs of the units sorted by length, by bisection on the largest load. */
OVLM_NODISCARD ovlm_status bal_cuts(const bal_model *model, bal_plan *plan, bool *done,
                                    ovlm_arena *arena, ovlm_err *err);

/* Karmarkar-Karp differencing over n_ranks sets; with equal counts per rank when the model asks
 * for them.  Only for interchangeable ranks and additive costs; *done is false elsewhere, and when
 * the meter ends. */
OVLM_NODISCARD ovlm_status bal_difference(bal_search *search, bal_plan *plan, bool *done,
                                          ovlm_err *err);

/* Three units per rank and no slack: a plan that meets the goal, by exact cover.  *done is false
 * when the structure is another, none was found, or max_work was spent. */
OVLM_NODISCARD ovlm_status bal_triples(bal_search *search, bal_plan *plan, int64_t max_work,
                                       bool *done, ovlm_err *err);

/* Additive costs: the best move or swap between the most loaded rank and another, until none
 * lowers it.  O(n_units) per trade.  Nothing for padded costs and for few units per rank. */
OVLM_NODISCARD ovlm_status bal_trade(bal_search *search, bal_plan *plan, ovlm_err *err);

/* Additive costs: takes a few ranks apart and refills them exactly, until nothing is above the
 * goal.  The largest load never rises. */
OVLM_NODISCARD ovlm_status bal_rebuild(bal_search *search, bal_plan *plan, ovlm_err *err);

/* The same with a fixed target and preference for ranks of one node; stops when all loads are at
 * most `target`. */
OVLM_NODISCARD ovlm_status bal_rebuild_to(bal_search *search, bal_plan *plan, double target,
                                          ovlm_err *err);

/* Any cost: moves and swaps out of the most loaded rank, with kicks. */
OVLM_NODISCARD ovlm_status bal_descend(bal_search *search, bal_plan *plan, ovlm_err *err);

/* What a plan moves. */
typedef struct bal_traffic {
    double node_bytes, rank_bytes; /* bytes that change their node; their rank                 */
} bal_traffic;
bal_traffic bal_traffic_of(const bal_model *model, const bal_plan *plan);
static inline bool bal_traffic_less(bal_traffic a, bal_traffic b)
{
    return a.node_bytes < b.node_bytes ||
           (a.node_bytes <= b.node_bytes && a.rank_bytes < b.rank_bytes);
}

/* Branch and bound.  limit < HUGE_VAL: least traffic among the plans with loads up to it, and
 * otherwise the least largest load.  *done: the search was exhausted, so the plan is the best (and
 * *found is false when there is none).  Spends at most max_work of the meter. */
OVLM_NODISCARD ovlm_status bal_exact(bal_search *search, bal_plan *plan, double limit,
                                     int64_t max_work, bool *found, bool *done, ovlm_err *err);

/* From the homes alone, whatever the plan: few moves until all loads are at most `limit`.  *done is
 * false, and the plan of no use, when that is not reached. */
OVLM_NODISCARD ovlm_status bal_stay(bal_search *search, bal_plan *plan, double limit, bool *done,
                                    ovlm_err *err);

/* Least traffic among plans with loads up to `limit`; `plan` is one such plan and stays one. */
OVLM_NODISCARD ovlm_status bal_home(bal_search *search, bal_plan *plan, double limit,
                                    ovlm_err *err);

#endif
