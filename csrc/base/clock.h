/* clock.h - the wall clock and the running side of an ovlm_budget. */
#ifndef OVLM_BASE_CLOCK_H
#define OVLM_BASE_CLOCK_H

#include "base/status.h"

/* Monotonic seconds. */
double ovlm_clock_s(void);

/* A budget being spent.  Call ovlm_meter_spend once per search step (cheap: it looks at the clock
 * every `stride` steps); stop as soon as it returns true. */
typedef struct ovlm_meter {
    int64_t work, work_limit;
    int64_t next_look, stride;
    double start_s, deadline_s; /* deadline is HUGE_VAL without a time limit           */
    double last_poll_s;
    int (*poll)(void *ctx);
    void *poll_ctx;
    bool cut_short;             /* the clock said stop                                 */
    bool interrupted;           /* poll said stop                                      */
} ovlm_meter;

/* Starts the clock.  budget NULL = no limits.  default_work applies when work_limit < 0; stride is
 * the number of steps that take about 10 us. */
void ovlm_meter_start(ovlm_meter *meter, const ovlm_budget *budget, int64_t default_work,
                      int64_t stride);

/* The clock is over or poll said stop, whatever the work: for constructions that spend none. */
bool ovlm_meter_expired(ovlm_meter *meter);

/* Accounts `steps` and tells whether to stop: work used up, time over, or interrupted. */
bool ovlm_meter_look(ovlm_meter *meter);
static inline bool ovlm_meter_spend(ovlm_meter *meter, int64_t steps)
{
    meter->work += steps;
    if (meter->work < meter->next_look && meter->work < meter->work_limit) {
        return false;
    }
    return ovlm_meter_look(meter);
}

/* Seconds until the deadline; HUGE_VAL without one. */
double ovlm_meter_left_s(const ovlm_meter *meter);

#endif
