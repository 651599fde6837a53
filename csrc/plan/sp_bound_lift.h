/* sp_bound_lift.h - bound of one micro-batch by prices raised one item after the other.
 *
 * Short items keep a share of their price in the line envelope.  Each other item i, in turn, gets
 * the highest price that no group contradicts, with V_j(x) the most that the items priced before
 * are worth in a share x of a group of degree j:
 *   pi_i = min over allowed j of  d_j - V_j(1 - r_ij).
 * A group is then worth at most its degree, whichever of its items came last, so a makespan is
 * impossible when all prices together exceed N.  What this sees and the line envelope does not: a
 * whole group goes with a long item, whose degree makes everything beside it dear. */
#ifndef OVLM_PLAN_SP_BOUND_LIFT_H
#define OVLM_PLAN_SP_BOUND_LIFT_H

#include "plan/sp_bound_line.h"

typedef struct sp_lift {
    const sp_model *model;
    int64_t n;
    double *s;           /* [n] lengths, descending                                           */
    double *base;        /* [n] prices in the line envelope                                   */
    uint8_t *small;      /* [n] filling: keeps a share of that price                          */
    double *premium;     /* [D*(SP_LIFT_CELLS+1)] V_j beyond rho_j per share, on a grid       */
    double *before;      /* [SP_LIFT_CELLS+1] scratch                                         */
    double per_time[SP_MAX_DEGREES], per_token[SP_MAX_DEGREES], rho[SP_MAX_DEGREES];
    int64_t first[SP_MAX_DEGREES]; /* longest item that a group of that degree may hold       */
    sp_line_items line;
    sp_line_prices line_prices;
} sp_lift;

enum { SP_LIFT_CELLS = 512 };

OVLM_NODISCARD ovlm_status sp_lift_init(sp_lift *lift, const sp_model *model, const int64_t *k,
                                        int64_t n_items, ovlm_arena *arena, ovlm_err *err);

/* lift->base = prices at that makespan such that a group of degree d is worth at most d; HUGE_VAL
 * where no degree finishes the item.  lift->line_prices: their multipliers. */
void sp_lift_base(sp_lift *lift, double makespan);

/* Raise *low, a makespan that is proved too small, towards `hint` (HUGE_VAL: as far as it goes):
 * by prices as they are, O(n) and as quick as a sort, and by lifted ones. */
void sp_lift_unlifted(sp_lift *lift, double hint, double *low);
void sp_lift_raise(sp_lift *lift, double hint, ovlm_meter *meter, double *low);

#endif
