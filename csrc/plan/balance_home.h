/* balance_home.h - a plan on its way from the homes to a limit: what shedding and exchanging share.
 */
#ifndef OVLM_PLAN_BALANCE_HOME_H
#define OVLM_PLAN_BALANCE_HOME_H

#include "plan/balance_parts.h"

typedef struct homing {
    bal_search *search;
    bal_plan *plan;
    int64_t *head, *next;   /* units of each rank as a list, -1 ends                           */
    int64_t *order;         /* [n_ranks] scratch                                               */
    bool *away;             /* [n_units] scratch                                               */
    double limit;
    double *least;          /* tree over the ranks: [leaves + r] is r's load, or HUGE_VAL when it
                               takes nothing; [i] is the lesser of [2i] and [2i + 1]           */
    int64_t leaves;         /* a power of two                                                  */
} homing;

/* Unit u, which is on another rank, to s. */
void homing_move(homing *h, int64_t u, int64_t s);

/* The plan's units into the lists. */
void homing_list(homing *h);

/* Brings ranks that are a little above the limit below it, by exchanges of few units between two
 * ranks each: nodes first, then ranks inside each node.  Additive costs only.  What it cannot bring
 * below stays above. */
OVLM_NODISCARD ovlm_status homing_exchange(homing *h, ovlm_err *err);

#endif
