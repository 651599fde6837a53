/* clock.c - time and budgets. */
#include "base/clock.h"

#include <math.h>
#include <time.h>

double ovlm_clock_s(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

void ovlm_meter_start(ovlm_meter *meter, const ovlm_budget *budget, int64_t default_work,
                      int64_t stride)
{
    *meter = (ovlm_meter){.work_limit = default_work, .stride = stride, .next_look = stride};
    meter->start_s = meter->last_poll_s = ovlm_clock_s();
    meter->deadline_s = HUGE_VAL;
    if (budget == NULL) {
        return;
    }
    if (budget->work_limit >= 0) {
        meter->work_limit = budget->work_limit;
    }
    if (budget->time_limit_s > 0) {
        meter->deadline_s = meter->start_s + budget->time_limit_s;
    }
    meter->poll = budget->poll;
    meter->poll_ctx = budget->poll_ctx;
}

bool ovlm_meter_expired(ovlm_meter *meter)
{
    if (meter->cut_short || meter->interrupted) {
        return true;
    }
    if (meter->poll == NULL && meter->deadline_s > 1e300) {
        return false;
    }
    double now = ovlm_clock_s();
    /* 20 ms between polls: each takes the interpreter's lock. */
    if (meter->poll != NULL && now - meter->last_poll_s > 0.02) {
        meter->last_poll_s = now;
        meter->interrupted = meter->poll(meter->poll_ctx) != 0;
    }
    meter->cut_short = now >= meter->deadline_s;
    return meter->cut_short || meter->interrupted;
}

bool ovlm_meter_look(ovlm_meter *meter)
{
    if (meter->work >= meter->work_limit) {
        return true;
    }
    /* Once stopped, every later look says so again: a caller may have passed over the first. */
    bool stop = ovlm_meter_expired(meter);
    meter->next_look = stop ? 0 : meter->work + meter->stride;
    return stop;
}

double ovlm_meter_left_s(const ovlm_meter *meter)
{
    return meter->deadline_s > 1e300 ? HUGE_VAL : meter->deadline_s - ovlm_clock_s();
}
