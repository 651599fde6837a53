/* sequence_parallel.h - a group of ranks that share the tokens of their sequences: the exchanges of
 * model/sequence.h on a communicator, one all-to-all each.
 *
 * A rank whose pass fails tells nobody: its caller aborts or closes the communicator, and the
 * others fail. */
#ifndef OVLM_ENGINE_SEQUENCE_PARALLEL_H
#define OVLM_ENGINE_SEQUENCE_PARALLEL_H

#include "backend/comm.h"
#include "model/sequence.h"

typedef struct ovlm_sequence_group {
    ovlm_sequence table; /* for the inputs of passes; refers to this struct, which stays where it
                            is                                                               */
    ovlm_comm *comm;     /* borrowed; of the group's ranks alone, and nobody else's meanwhile */
    int64_t exchanges;   /* so far                                                           */
    int64_t sent_bytes;  /* to the other ranks                                               */
    double waited_s;     /* in all-to-alls, for slower ranks too                             */
} ovlm_sequence_group;

/* head_ranks: at most so many share heads (ovlm_sequence); 0: no limit but the heads. */
void ovlm_sequence_group_init(ovlm_sequence_group *group, ovlm_comm *comm, int64_t head_ranks);

#endif
