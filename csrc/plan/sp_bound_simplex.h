/* sp_bound_simplex.h - a small covering linear program whose columns come one by one.
 *
 *   min sum_c cost_c x_c    subject to   sum_c a_ic x_c >= demand_i,  x >= 0
 *
 * It only proposes prices; every certificate is evaluated apart from it, so that its rounding
 * errors can cost strength, never soundness.  Revised simplex, explicit inverse: rows stay below
 * ~100. */
#ifndef OVLM_PLAN_SP_BOUND_SIMPLEX_H
#define OVLM_PLAN_SP_BOUND_SIMPLEX_H

#include "plan/sp_bound_nodes.h"

typedef struct sp_simplex {
    int64_t rows, n_columns, max_columns, n_entries, max_entries;
    double *demand;           /* [rows]                                            */
    double *inverse;          /* [rows*rows] of the basis                          */
    double *x, *price, *work; /* [rows] basic values, duals, entering direction    */
    int64_t *basis;           /* [rows] column, or -1-i: the artificial of row i   */
    double *limit;            /* [rows] cost of the artificial: the price's limit  */
    double *floor;            /* [rows] least price, 0 at first; -HUGE_VAL: an equality */
    double *cost;             /* [max_columns]                                     */
    int64_t *start;           /* [max_columns+1]                                   */
    int64_t *entry_row;       /* [max_entries]                                     */
    double *entry_value;      /* [max_entries]                                     */
    uint8_t *is_basic;        /* [max_columns]                                     */
    double *saved_inverse;    /* [rows*rows]                                       */
    double *saved_x;          /* [rows]                                            */
    int64_t *saved_basis;     /* [rows]                                            */
    int64_t saved_columns, saved_entries;
} sp_simplex;

OVLM_NODISCARD ovlm_status sp_simplex_init(sp_simplex *lp, int64_t rows, int64_t max_columns,
                                           ovlm_arena *arena, ovlm_err *err);

/* Back to artificials alone; limit[] and demand[] must be set.  Columns stay. */
void sp_simplex_reset(sp_simplex *lp);

/* Remembers columns and basis, and goes back to what was remembered. */
void sp_simplex_save(sp_simplex *lp);
void sp_simplex_restore(sp_simplex *lp);

/* Begins a column, adds entries (a repeated row adds up), and ends it; false when there is no room.
 */
bool sp_simplex_begin(sp_simplex *lp, double cost);
void sp_simplex_entry(sp_simplex *lp, int64_t row, double value);
/* `amount` of an item, on the nodes beside it. */
void sp_simplex_cover(sp_simplex *lp, const sp_nodes *nodes, int64_t item, double amount);

/* Optimises over the columns there are; afterwards price[] are the duals.  Returns the optimum.
 * `max_pivots` bounds the work; *pivots counts them. */
double sp_simplex_solve(sp_simplex *lp, int64_t max_pivots, int64_t *pivots);

#endif
