/* sp_bound_price.h - how much priced content fits into one group: certified from above.
 *
 * Every item i has a price pi_i >= 0.  For a group of degree index j and makespan T let
 *   r_i = theta*t_i/T + (1-theta)*s_i/cap,   so that any feasible set S has sum r_i <= 1.
 * For any rho >= 0 the content is at most
 *   v = rho + max { sum_{i in S} (pi_i - rho*r_i) : sum_{i in S} floor(cells*r_i) <= cells },
 * a knapsack on a grid, in which rounding down can only touch the premium over rho.  rho is the
 * best ratio among items too small for the grid: they fill what is left. */
#ifndef OVLM_PLAN_SP_BOUND_PRICE_H
#define OVLM_PLAN_SP_BOUND_PRICE_H

#include "plan/sp_model.h"

enum { SP_PATTERN_ITEMS = 256, SP_THETAS = 3 };

/* A content: items and amounts (the last one fractional: filling). */
typedef struct sp_pattern {
    int64_t n;
    int64_t item[SP_PATTERN_ITEMS]; /* position i in the micro-batch           */
    double amount[SP_PATTERN_ITEMS];
} sp_pattern;

#define SP_PRICE_MARGIN 4e-6 /* rounding of the table in single precision: see run_pass */

/* One table: content(x) = rho*x + premium in floor(cells*x) cells. */
typedef struct sp_price {
    double rho, unit;
    int64_t filler; /* the item of ratio rho, or -1                            */
} sp_price;

typedef struct sp_pricer {
    const sp_model *model;
    int64_t n, cells, max_passes, passes;
    const double *s;                 /* [n] lengths, descending                           */
    double *weight;                  /* [n] r_i of the degree at hand                     */
    float *value;                    /* [cells+1] best premium in at most so many cells   */
    uint8_t *took;                   /* [max_passes*(cells+1)] whether the pass took its item */
    int64_t *pass_item, *pass_cells; /* [max_passes]                           */
    uint8_t *pass_many;              /* [max_passes] the pass may take its item repeatedly */
    int64_t spent;                   /* cells visited, for the meter                      */
} sp_pricer;

/* Scratch for items s[0..n-1]; s stays borrowed. */
OVLM_NODISCARD ovlm_status sp_pricer_init(sp_pricer *pricer, const sp_model *model, const double *s,
                                          int64_t n, ovlm_arena *arena, ovlm_err *err);

/* Fills the table of a group of degree j with that theta.  Certified content of what fits into a
 * share x in [0,1] of the group: sp_price_value.  Items may then be forced in: they take their
 * share. */
void sp_price_table(sp_pricer *pricer, const double *pi, int64_t j, double makespan, double theta,
                    sp_price *price);

static inline double sp_price_value(const sp_price *price, const float *row, int64_t cells,
                                    double x)
{
    int64_t cell = (int64_t)((double)cells * x * (1 + 1e-12) + 1e-9);
    double premium = (double)row[cell < cells ? cell : cells] * price->unit;
    return (price->rho * x + premium * (1 + SP_PRICE_MARGIN)) * (1 + 1e-11);
}

/* What attains the value of a share x, in the relaxation (it may not be a real group): items of the
 * table, then filling up to `room`. */
void sp_price_trace(const sp_pricer *pricer, const sp_price *price, double x, double room,
                    sp_pattern *pattern);

#endif
