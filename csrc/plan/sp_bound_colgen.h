/* sp_bound_colgen.h - bound of one micro-batch by column generation.
 *
 * For a makespan T the items need at least as many GPUs as
 *   max sum_i pi_i   subject to   sum_{i in S} pi_i <= d   for every group S of degree d within T,
 * the dual of covering the items by groups.  Prices come from a small linear program over the
 * groups generated so far; the certificate is one evaluation of them (Farley's bound): with v_d the
 * certified content of a group of degree d, T is impossible when sum pi_i exceeds the content of
 * every mix of groups on N GPUs.  Where items are few and the prices do not disprove T, they guide
 * an exact search. */
#ifndef OVLM_PLAN_SP_BOUND_COLGEN_H
#define OVLM_PLAN_SP_BOUND_COLGEN_H

#include "plan/sp_bound_line.h"
#include "plan/sp_bound_price.h"
#include "plan/sp_bound_simplex.h"
#include "plan/sp_exact.h"

typedef struct sp_colgen {
    const sp_model *model;
    int64_t n;
    double *s;            /* [n] lengths, descending                                      */
    double *pi, *best_pi; /* [rows] at the nodes; between them prices are linear in s     */
    double *item_pi;      /* [n]                                                          */
    sp_nodes nodes;
    double theta[SP_MAX_DEGREES][SP_THETAS];
    int64_t favourite[SP_MAX_DEGREES];
    double *content; /* [n_gpus+1] where mixes need it                               */
    double ratio;    /* most content per GPU of a group, of the last evaluation      */
    sp_exact *exact; /* where items are few; else NULL                               */
    sp_pricer pricer;
    sp_simplex lp;
    sp_pattern *pattern; /* [D+1]                                                        */
    sp_line_items line;
    sp_line_prices line_prices;
} sp_colgen;

/* exact: prepared for the same items, or NULL. */
OVLM_NODISCARD ovlm_status sp_colgen_init(sp_colgen *colgen, const sp_model *model,
                                          const int64_t *k, int64_t n_items, sp_exact *exact,
                                          ovlm_arena *arena, ovlm_err *err);

/* Raises *low, a makespan that is proved too small, towards `hint` (HUGE_VAL: as far as it goes).
 */
void sp_colgen_raise(sp_colgen *colgen, double hint, ovlm_meter *meter, double *low);

#endif
