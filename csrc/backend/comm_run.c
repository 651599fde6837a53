/* comm_run.c - work over the engine: offsets filled in, comparisons before, poisoning after. */
#include "backend/comm_state.h"

#include <string.h>

/* Offsets that were left out: one after the other. */
static ovlm_status fill_offsets(ovlm_comm *comm, const int64_t *count, const int64_t **at,
                                ovlm_err *err)
{
    int64_t *made = NULL;
    if (*at != NULL) {
        return OVLM_OK;
    }
    OVLM_TRY(OVLM_ARENA_NEW(&comm->arena, &made, comm->size, err));
    for (int64_t r = 1; r < comm->size; r++) {
        made[r] = made[r - 1] + count[r - 1];
    }
    *at = made;
    return OVLM_OK;
}

static ovlm_status gather(ovlm_comm *comm, const ovlm_comm_label *label, ovlm_all_gather args,
                          ovlm_err *err)
{
    OVLM_TRY(fill_offsets(comm, args.recv_bytes, &args.recv_at, err));
    return comm->engine->all_gather(comm->self, label, &args, err);
}

static ovlm_status exchange(ovlm_comm *comm, const ovlm_comm_label *label, ovlm_all_to_all args,
                            ovlm_err *err)
{
    OVLM_TRY(fill_offsets(comm, args.send_bytes, &args.send_at, err));
    OVLM_TRY(fill_offsets(comm, args.recv_bytes, &args.recv_at, err));
    return comm->engine->all_to_all(comm->self, label, &args, err);
}

/* ---------------------------------------------------------------- comparisons */

/* The same number of bytes of every rank, at all ranks. */
static ovlm_status gather_equal(ovlm_comm *comm, const ovlm_comm_label *label, const void *mine,
                                int64_t bytes, void *all, ovlm_err *err)
{
    int64_t *counts = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(&comm->arena, &counts, comm->size, err));
    for (int64_t r = 0; r < comm->size; r++) {
        counts[r] = bytes;
    }
    const ovlm_all_gather args = {.send = mine, .recv = all, .recv_bytes = counts};
    return gather(comm, label, args, err);
}

/* Everybody sees the whole matrix, so that all ranks fail, with the same words. */
static ovlm_status compare_pairs(ovlm_comm *comm, const ovlm_comm_work *work, ovlm_err *err)
{
    const int64_t n = comm->size;
    int64_t *mine = NULL, *all = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(&comm->arena, &mine, 2 * n, err));
    OVLM_TRY(OVLM_ARENA_NEW(&comm->arena, &all, 2 * n * n, err));
    memcpy(mine, work->of.all_to_all.send_bytes, (size_t)n * sizeof *mine);
    memcpy(mine + n, work->of.all_to_all.recv_bytes, (size_t)n * sizeof *mine);
    OVLM_TRY(gather_equal(comm, &work->label, mine, 2 * n * (int64_t)sizeof *mine, all, err));
    return ovlm_comm_counts_compare(&work->label, all, all + n, n, 2 * n, comm->world, err);
}

static ovlm_status compare_rows(ovlm_comm *comm, const ovlm_comm_label *label,
                                const int64_t *mine, ovlm_err *err)
{
    const int64_t n = comm->size;
    int64_t *all = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(&comm->arena, &all, n * n, err));
    OVLM_TRY(gather_equal(comm, label, mine, n * (int64_t)sizeof *mine, all, err));
    return ovlm_comm_rows_compare(label, all, n, n, comm->world, err);
}

static ovlm_status compare_counts(ovlm_comm *comm, const ovlm_comm_work *work, ovlm_err *err)
{
    switch ((ovlm_comm_kind)work->label.kind) {
    case OVLM_COMM_ALL_TO_ALL: return compare_pairs(comm, work, err);
    case OVLM_COMM_ALL_GATHER:
        return compare_rows(comm, &work->label, work->of.all_gather.recv_bytes, err);
    case OVLM_COMM_REDUCE_SCATTER:
        return compare_rows(comm, &work->label, work->of.reduce_scatter.counts, err);
    default: return OVLM_OK; /* the label says it all */
    }
}

ovlm_status ovlm_comm_rows_compare(const ovlm_comm_label *label, const int64_t *count, int64_t n,
                                   int64_t stride, const int64_t *world, ovlm_err *err)
{
    const char *unit = label->kind == OVLM_COMM_REDUCE_SCATTER ? "elements" : "bytes";
    for (int64_t r = 1; r < n; r++) {
        for (int64_t s = 0; s < n; s++) {
            if (count[r * stride + s] != count[s]) {
                char text[OVLM_COMM_TEXT_BYTES];
                ovlm_comm_label_describe(label, text);
                return OVLM_FAIL(err, OVLM_E_COMM,
                                 "counts disagree in %s: rank %lld says that rank %lld has %lld "
                                 "%s, rank %lld says %lld", text,
                                 (long long)ovlm_comm_world_rank(world, 0),
                                 (long long)ovlm_comm_world_rank(world, s), (long long)count[s],
                                 unit, (long long)ovlm_comm_world_rank(world, r),
                                 (long long)count[r * stride + s]);
            }
        }
    }
    return OVLM_OK;
}

ovlm_status ovlm_comm_counts_compare(const ovlm_comm_label *label, const int64_t *send,
                                     const int64_t *recv, int64_t n, int64_t stride,
                                     const int64_t *world, ovlm_err *err)
{
    for (int64_t from = 0; from < n; from++) {
        for (int64_t to = 0; to < n; to++) {
            int64_t sends = send[from * stride + to], expects = recv[to * stride + from];
            if (sends != expects) {
                char text[OVLM_COMM_TEXT_BYTES];
                ovlm_comm_label_describe(label, text);
                return OVLM_FAIL(err, OVLM_E_COMM,
                                 "counts disagree in %s: rank %lld sends %lld bytes to rank %lld, "
                                 "which expects %lld", text,
                                 (long long)ovlm_comm_world_rank(world, from), (long long)sends,
                                 (long long)ovlm_comm_world_rank(world, to), (long long)expects);
            }
        }
    }
    return OVLM_OK;
}

ovlm_status ovlm_comm_compare(ovlm_comm *comm, const ovlm_comm_work *work, ovlm_err *err)
{
    ovlm_comm_label *all = NULL;
    if (!work->compare) {
        return OVLM_OK;
    }
    OVLM_TRY(OVLM_ARENA_NEW(&comm->arena, &all, comm->size, err));
    OVLM_TRY(gather_equal(comm, &work->label, &work->label, (int64_t)sizeof work->label, all,
                          err));
    OVLM_TRY(ovlm_comm_labels_compare(all, comm->size, (int64_t)sizeof *all, comm->world, err));
    return compare_counts(comm, work, err);
}

/* ---------------------------------------------------------------- work */

static ovlm_status dispatch(ovlm_comm *comm, const ovlm_comm_work *work, ovlm_err *err)
{
    const ovlm_comm_engine *engine = comm->engine;
    const ovlm_comm_label *label = &work->label;
    switch ((ovlm_comm_kind)label->kind) {
    case OVLM_COMM_ALL_TO_ALL: return exchange(comm, label, work->of.all_to_all, err);
    case OVLM_COMM_ALL_REDUCE:
        return engine->all_reduce != NULL
                   ? engine->all_reduce(comm->self, label, &work->of.all_reduce, err)
                   : ovlm_comm_run_all_reduce(comm, label, &work->of.all_reduce, err);
    case OVLM_COMM_REDUCE_SCATTER:
        return engine->reduce_scatter != NULL
                   ? engine->reduce_scatter(comm->self, label, &work->of.reduce_scatter, err)
                   : ovlm_comm_run_reduce_scatter(comm, label, &work->of.reduce_scatter, err);
    default: return gather(comm, label, work->of.all_gather, err);
    }
}

ovlm_status ovlm_comm_run(ovlm_comm *comm, const ovlm_comm_work *work, ovlm_err *err)
{
    ovlm_err local = {0};
    const ovlm_arena_mark mark = ovlm_arena_save(&comm->arena);
    ovlm_status status = ovlm_comm_compare(comm, work, &local);
    if (status == OVLM_OK) {
        status = dispatch(comm, work, &local);
    }
    ovlm_arena_rewind(&comm->arena, mark);
    ovlm_comm_poison(comm, status, &local);
    if (status != OVLM_OK && err != NULL) {
        *err = local;
    }
    return status;
}
