/* exchanges.h - exchanges of a pass (model/exchange.h) on a communicator, one all-to-all each.
 *
 * A rank whose pass fails tells nobody: its caller aborts or closes the communicator, and the
 * others fail. */
#ifndef OVLM_ENGINE_EXCHANGES_H
#define OVLM_ENGINE_EXCHANGES_H

#include "backend/comm.h"
#include "model/exchange.h"

typedef struct ovlm_exchanges {
    ovlm_comm *comm;     /* borrowed; of the group's ranks alone, and nobody else's meanwhile */
    int64_t count;       /* so far                                                           */
    int64_t sent_bytes;  /* to the other ranks                                               */
    double waited_s;     /* in all-to-alls, for slower ranks too                             */
} ovlm_exchanges;

/* An ovlm_exchange_fn: ctx is an ovlm_exchanges. */
OVLM_NODISCARD ovlm_status ovlm_exchanges_run(void *ctx, const ovlm_exchange *args, ovlm_err *err);

#endif
