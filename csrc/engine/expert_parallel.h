/* expert_parallel.h - ranks that hold some of the experts each: the exchanges of
 * model/expert_exchange.h on a communicator. */
#ifndef OVLM_ENGINE_EXPERT_PARALLEL_H
#define OVLM_ENGINE_EXPERT_PARALLEL_H

#include "base/arena.h"
#include "engine/exchanges.h"
#include "model/expert_exchange.h"

typedef struct ovlm_expert_ranks {
    ovlm_expert_group table;   /* for a model; refers to this struct, which stays where it is     */
    ovlm_exchanges on;
    int64_t *bytes;            /* [degree] of the present gather                                  */
} ovlm_expert_ranks;

/* Of a communicator's ranks; lists live in the arena. */
OVLM_NODISCARD ovlm_status ovlm_expert_ranks_init(ovlm_expert_ranks *ranks, ovlm_comm *comm,
                                                  ovlm_arena *arena, ovlm_err *err);

#endif
