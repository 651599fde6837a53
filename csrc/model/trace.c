/* trace.c - a list of timed events. */
#include "model/trace.h"

#include "base/clock.h"

#include <stdlib.h>

double ovlm_trace_begin(const ovlm_trace *trace)
{
    return trace == NULL ? 0 : ovlm_clock_s();
}

void ovlm_trace_end(ovlm_trace *trace, const char *name, int64_t index, double start_s)
{
    if (trace == NULL) {
        return;
    }
    double end_s = ovlm_clock_s();
    if (trace->n == trace->room) {
        int64_t room = trace->room == 0 ? 1024 : 2 * trace->room;
        ovlm_trace_event *grown = realloc(trace->event, (size_t)room * sizeof *grown);
        if (grown == NULL) { /* a trace must not end the work that it watches */
            trace->lost++;
            return;
        }
        trace->event = grown;
        trace->room = room;
    }
    trace->event[trace->n++] = (ovlm_trace_event){name, index, start_s, end_s};
}

void ovlm_trace_free(ovlm_trace *trace)
{
    free(trace->event);
    *trace = (ovlm_trace){0};
}
