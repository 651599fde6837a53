/* sequence_parallel.c - a group on its communicator. */
#include "engine/sequence_parallel.h"

void ovlm_sequence_group_init(ovlm_sequence_group *group, ovlm_comm *comm, int64_t head_ranks)
{
    *group = (ovlm_sequence_group){.on = {.comm = comm}};
    group->table = (ovlm_sequence){.ctx = &group->on, .degree = ovlm_comm_size(comm),
                                   .rank = ovlm_comm_rank(comm), .head_ranks = head_ranks,
                                   .exchange = ovlm_exchanges_run};
}
