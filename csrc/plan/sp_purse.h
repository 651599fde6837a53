/* sp_purse.h - one budget shared by several searches, each with a meter of its own. */
#ifndef OVLM_PLAN_SP_PURSE_H
#define OVLM_PLAN_SP_PURSE_H

#include <math.h>

#include "base/clock.h"

typedef struct sp_purse {
    ovlm_meter meter;  /* the whole                                                       */
    bool cut_short;    /* the clock ended some part: the plan depends on the machine      */
    int64_t allowance; /* steps that the budget is good for, its time counted at 50 ns a
                          step: the same on every machine                                 */
} sp_purse;

#define SP_STEP_S 50e-9 /* the least; up to 100 ns where there are many sequences */

static inline void sp_purse_open(sp_purse *purse, const ovlm_budget *budget, int64_t default_work,
                                 int64_t stride)
{
    double limit_s = budget != NULL ? budget->time_limit_s : 0;
    bool timed = limit_s > 0 && limit_s < SP_STEP_S * 1e18;
    *purse = (sp_purse){0};
    ovlm_meter_start(&purse->meter, budget, timed ? INT64_MAX / 4 : default_work, stride);
    purse->allowance = purse->meter.work_limit;
    if (timed && limit_s / SP_STEP_S < (double)purse->allowance) {
        purse->allowance = (int64_t)(limit_s / SP_STEP_S);
    }
}

/* A meter with `share` of the work and of the time that is left. */
static inline ovlm_meter sp_purse_part(const sp_purse *purse, double share)
{
    ovlm_meter part = purse->meter;
    double left_s = ovlm_meter_left_s(&purse->meter);
    part.work = part.next_look = 0;
    part.work_limit = (int64_t)((double)(purse->meter.work_limit - purse->meter.work) * share);
    part.deadline_s = left_s < HUGE_VAL ? ovlm_clock_s() + share * left_s : HUGE_VAL;
    return part;
}

/* A meter with that many steps, and the time that is left. */
static inline ovlm_meter sp_purse_steps(const sp_purse *purse, int64_t steps)
{
    ovlm_meter part = purse->meter;
    part.work = part.next_look = 0;
    part.work_limit = steps;
    return part;
}

/* Accounts for a part; true when nothing is left, or the caller was asked to stop. */
static inline bool sp_purse_absorb(sp_purse *purse, const ovlm_meter *part)
{
    purse->meter.work += part->work;
    purse->meter.last_poll_s = part->last_poll_s;
    purse->meter.interrupted = purse->meter.interrupted || part->interrupted;
    bool over = ovlm_meter_look(&purse->meter);
    purse->cut_short = purse->cut_short || part->cut_short || purse->meter.cut_short;
    return over;
}

/* For constructions, which spend no work: the clock is over, or the caller wants to stop. */
static inline bool sp_purse_expired(sp_purse *purse)
{
    bool over = ovlm_meter_expired(&purse->meter);
    purse->cut_short = purse->cut_short || purse->meter.cut_short;
    return over;
}

#endif
