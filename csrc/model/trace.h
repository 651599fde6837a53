/* trace.h - when each phase, layer and operation of a model ran, on the host's clock.
 *
 * Off (a NULL trace) it costs one comparison per operation.  On, every operation is waited for, so
 * that its time is its own on any backend; what would have overlapped does not. */
#ifndef OVLM_MODEL_TRACE_H
#define OVLM_MODEL_TRACE_H

#include "base/status.h"

typedef struct ovlm_trace_event {
    const char *name;      /* static string                                                    */
    int64_t index;         /* of a layer; -1: none                                             */
    double start_s, end_s; /* monotonic                                                        */
} ovlm_trace_event;

typedef struct ovlm_trace {
    ovlm_trace_event *event; /* [n] owned, in the order in which they ended                    */
    int64_t n, room;
    int64_t lost;            /* events for which there was no memory                           */
} ovlm_trace;

/* Now; 0 without a trace. */
double ovlm_trace_begin(const ovlm_trace *trace);

/* Notes what began then and ends now; nothing without a trace. */
void ovlm_trace_end(ovlm_trace *trace, const char *name, int64_t index, double start_s);

void ovlm_trace_free(ovlm_trace *trace);

#endif
