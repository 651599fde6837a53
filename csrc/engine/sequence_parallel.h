/* sequence_parallel.h - a group of ranks that share the tokens of their sequences: the exchanges of
 * model/sequence.h on a communicator. */
#ifndef OVLM_ENGINE_SEQUENCE_PARALLEL_H
#define OVLM_ENGINE_SEQUENCE_PARALLEL_H

#include "engine/exchanges.h"
#include "model/sequence.h"

typedef struct ovlm_sequence_group {
    ovlm_sequence table; /* for the inputs of passes; refers to this struct, which stays where it
                            is                                                               */
    ovlm_exchanges on;
} ovlm_sequence_group;

/* head_ranks: at most so many share heads (ovlm_sequence); 0: no limit but the heads. */
void ovlm_sequence_group_init(ovlm_sequence_group *group, ovlm_comm *comm, int64_t head_ranks);

#endif
