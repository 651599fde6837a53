/* expert_parallel.c - counts and rows between ranks that hold experts. */
#include "engine/expert_parallel.h"

#include "base/clock.h"

static ovlm_status exchange(void *ctx, const ovlm_exchange *args, ovlm_err *err)
{
    return ovlm_exchanges_run(&((ovlm_expert_ranks *)ctx)->on, args, err);
}

static ovlm_status share(void *ctx, const int64_t *own, int64_t n, int64_t *all, ovlm_err *err)
{
    ovlm_expert_ranks *ranks = ctx;
    int64_t bytes = n * (int64_t)sizeof *own;
    for (int64_t r = 0; r < ranks->table.degree; r++) {
        ranks->bytes[r] = bytes;
    }
    const ovlm_all_gather args = {.send = own, .recv = all, .recv_bytes = ranks->bytes};
    double start_s = ovlm_clock_s();
    OVLM_TRY(ovlm_comm_all_gather(ranks->on.comm, &args, err));
    ranks->on.waited_s += ovlm_clock_s() - start_s;
    ranks->on.count++;
    ranks->on.sent_bytes += (ranks->table.degree - 1) * bytes;
    return OVLM_OK;
}

ovlm_status ovlm_expert_ranks_init(ovlm_expert_ranks *ranks, ovlm_comm *comm, ovlm_arena *arena,
                                   ovlm_err *err)
{
    *ranks = (ovlm_expert_ranks){.on = {.comm = comm}};
    ranks->table = (ovlm_expert_group){.ctx = ranks, .degree = ovlm_comm_size(comm),
                                       .rank = ovlm_comm_rank(comm), .exchange = exchange,
                                       .share = share};
    return OVLM_ARENA_NEW(arena, &ranks->bytes, ranks->table.degree, err);
}
