/* comm_calls.c - the public calls: arguments are checked, become work, and run or are started. */
#include "backend/comm_state.h"

/* Counts of a call, and the place of the last byte. */
static ovlm_status check_counts(const ovlm_comm *comm, const char *name, const int64_t *count,
                                const int64_t *at, int64_t unit_bytes, const void *data,
                                int64_t *sum, ovlm_err *err)
{
    *sum = 0;
    if (count == NULL) {
        return OVLM_FAIL(err, OVLM_E_ARG, "%s is NULL; give one count per rank", name);
    }
    for (int64_t r = 0; r < comm->size; r++) {
        if (count[r] < 0 || count[r] > INT64_MAX / unit_bytes - *sum) {
            return OVLM_FAIL(err, OVLM_E_ARG, "%s[%lld] is %lld; it must be >= 0, and all bytes "
                             "together below 2^63", name, (long long)r, (long long)count[r]);
        }
        if (at != NULL && (at[r] < 0 || at[r] > INT64_MAX - count[r])) {
            return OVLM_FAIL(err, OVLM_E_ARG, "the offset of %s[%lld] is %lld; it must be >= 0",
                             name, (long long)r, (long long)at[r]);
        }
        *sum += count[r];
    }
    if (*sum > 0 && data == NULL) {
        return OVLM_FAIL(err, OVLM_E_ARG, "the data of %s is NULL, with %lld to move", name,
                         (long long)*sum);
    }
    return OVLM_OK;
}

static ovlm_status check_reduction(const ovlm_comm *comm, ovlm_dtype dtype, ovlm_reduce reduce,
                                   ovlm_err *err)
{
    if (dtype != OVLM_F32 && dtype != OVLM_F64 && dtype != OVLM_BF16 && dtype != OVLM_I64 &&
        dtype != OVLM_I32) {
        return OVLM_FAIL(err, OVLM_E_ARG, "dtype must be float32, float64, bfloat16, int64 or "
                         "int32 to be reduced; got number %d", (int)dtype);
    }
    if (reduce != OVLM_SUM && reduce != OVLM_MAX && reduce != OVLM_MIN) {
        return OVLM_FAIL(err, OVLM_E_ARG, "reduce must be sum, max or min; got number %d",
                         (int)reduce);
    }
    if (comm->engine->all_reduce == NULL && !comm->engine->host_memory) {
        return OVLM_FAIL(err, OVLM_E_BACKEND, "%s has no reductions", comm->engine->name);
    }
    return OVLM_OK;
}

/* ---------------------------------------------------------------- work from arguments */

static ovlm_status make_all_gather(ovlm_comm *comm, const ovlm_all_gather *args,
                                   ovlm_comm_work *work, ovlm_err *err)
{
    int64_t sum = 0;
    OVLM_TRY(check_counts(comm, "recv_bytes", args->recv_bytes, args->recv_at, 1, args->recv, &sum,
                          err));
    if (args->recv_bytes[comm->rank] > 0 && args->send == NULL) {
        return OVLM_FAIL(err, OVLM_E_ARG, "send is NULL, with %lld bytes to send",
                         (long long)args->recv_bytes[comm->rank]);
    }
    *work = ovlm_comm_work_next(comm, OVLM_COMM_ALL_GATHER, 0, sum);
    work->of.all_gather = *args;
    return OVLM_OK;
}

static ovlm_status make_all_to_all(ovlm_comm *comm, const ovlm_all_to_all *args,
                                   ovlm_comm_work *work, ovlm_err *err)
{
    int64_t sum = 0;
    OVLM_TRY(check_counts(comm, "send_bytes", args->send_bytes, args->send_at, 1, args->send, &sum,
                          err));
    OVLM_TRY(check_counts(comm, "recv_bytes", args->recv_bytes, args->recv_at, 1, args->recv, &sum,
                          err));
    int64_t to_self = args->send_bytes[comm->rank], from_self = args->recv_bytes[comm->rank];
    if (to_self != from_self) {
        return OVLM_FAIL(err, OVLM_E_ARG, "rank %lld sends %lld bytes to itself and receives %lld",
                         (long long)comm->rank, (long long)to_self, (long long)from_self);
    }
    *work = ovlm_comm_work_next(comm, OVLM_COMM_ALL_TO_ALL, 0, -1);
    work->of.all_to_all = *args;
    return OVLM_OK;
}

static ovlm_status make_all_reduce(ovlm_comm *comm, const ovlm_all_reduce *args,
                                   ovlm_comm_work *work, ovlm_err *err)
{
    OVLM_TRY(check_reduction(comm, args->dtype, args->reduce, err));
    if (args->n < 0 || args->n > INT64_MAX / 8) {
        return OVLM_FAIL(err, OVLM_E_ARG, "n must be in [0, 2^60); got %lld", (long long)args->n);
    }
    if (args->n > 0 && (args->send == NULL || args->recv == NULL)) {
        return OVLM_FAIL(err, OVLM_E_ARG, "%s is NULL, with %lld elements to reduce",
                         args->send == NULL ? "send" : "recv", (long long)args->n);
    }
    *work = ovlm_comm_work_next(comm, OVLM_COMM_ALL_REDUCE,
                                16 * (int64_t)args->dtype + (int64_t)args->reduce, args->n);
    work->of.all_reduce = *args;
    return OVLM_OK;
}

static ovlm_status make_reduce_scatter(ovlm_comm *comm, const ovlm_reduce_scatter *args,
                                       ovlm_comm_work *work, ovlm_err *err)
{
    int64_t sum = 0;
    OVLM_TRY(check_reduction(comm, args->dtype, args->reduce, err));
    OVLM_TRY(check_counts(comm, "counts", args->counts, NULL, 8, args->send, &sum, err));
    if (args->counts[comm->rank] > 0 && args->recv == NULL) {
        return OVLM_FAIL(err, OVLM_E_ARG, "recv is NULL, with %lld elements to receive",
                         (long long)args->counts[comm->rank]);
    }
    *work = ovlm_comm_work_next(comm, OVLM_COMM_REDUCE_SCATTER,
                                16 * (int64_t)args->dtype + (int64_t)args->reduce, sum);
    work->of.reduce_scatter = *args;
    return OVLM_OK;
}

/* ---------------------------------------------------------------- calls */

static ovlm_status run_now(ovlm_comm *comm, const ovlm_comm_work *work, ovlm_err *err)
{
    OVLM_TRY(ovlm_comm_queue_drain(comm, err));
    return ovlm_comm_run(comm, work, err);
}

/* The two ways of a call of many counts. */
#define CALLS(name)                                                                               \
    ovlm_status ovlm_comm_##name(ovlm_comm *comm, const ovlm_##name *args, ovlm_err *err)         \
    {                                                                                             \
        ovlm_comm_work work = {0};                                                                \
        OVLM_TRY(ovlm_comm_enter(comm, err));                                                     \
        ovlm_status status = make_##name(comm, args, &work, err);                                 \
        status = status == OVLM_OK ? run_now(comm, &work, err) : status;                          \
        ovlm_comm_leave(comm);                                                                    \
        return status;                                                                            \
    }                                                                                             \
    ovlm_status ovlm_comm_##name##_start(ovlm_comm *comm, const ovlm_##name *args,                \
                                         int64_t *ticket, ovlm_err *err)                          \
    {                                                                                             \
        ovlm_comm_work work = {0};                                                                \
        OVLM_TRY(ovlm_comm_enter(comm, err));                                                     \
        ovlm_status status = make_##name(comm, args, &work, err);                                 \
        status = status == OVLM_OK ? ovlm_comm_queue_start(comm, &work, ticket, err) : status;    \
        ovlm_comm_leave(comm);                                                                    \
        return status;                                                                            \
    }
CALLS(all_gather)
CALLS(all_to_all)
CALLS(all_reduce)
CALLS(reduce_scatter)

ovlm_status ovlm_comm_wait(ovlm_comm *comm, int64_t ticket, ovlm_err *err)
{
    OVLM_TRY(ovlm_comm_enter(comm, err));
    ovlm_status status = ovlm_comm_queue_wait(comm, ticket, err);
    ovlm_comm_leave(comm);
    return status;
}

/* An all-gather in which the root alone has something to say. */
static ovlm_status gather_from(ovlm_comm *comm, ovlm_comm_work work, void *data, int64_t bytes,
                               int64_t root, void *stream, ovlm_err *err)
{
    ovlm_arena arena = {0};
    int64_t *counts = NULL;
    ovlm_status status = OVLM_OK;
    OVLM_GOTO(done, OVLM_ARENA_NEW(&arena, &counts, comm->size, err));
    if (bytes > 0) {
        counts[root] = bytes;
    }
    work.of.all_gather = (ovlm_all_gather){.send = data, .recv = data, .recv_bytes = counts,
                                           .stream = stream};
    OVLM_GOTO(done, run_now(comm, &work, err));
done:
    ovlm_comm_poison(comm, status, err);
    ovlm_arena_free(&arena);
    return status;
}

ovlm_status ovlm_comm_barrier(ovlm_comm *comm, ovlm_err *err)
{
    ovlm_err local = {0};
    err = err != NULL ? err : &local;
    OVLM_TRY(ovlm_comm_enter(comm, err));
    ovlm_status status = gather_from(comm, ovlm_comm_work_next(comm, OVLM_COMM_BARRIER, 0, -1),
                                     NULL, 0, 0, NULL, err);
    ovlm_comm_leave(comm);
    return status;
}

ovlm_status ovlm_comm_broadcast(ovlm_comm *comm, void *data, int64_t bytes, int64_t root,
                                void *stream, ovlm_err *err)
{
    ovlm_err local = {0};
    err = err != NULL ? err : &local;
    if (root < 0 || root >= comm->size) {
        return OVLM_FAIL(err, OVLM_E_ARG, "root must be in [0, %lld); got %lld",
                         (long long)comm->size, (long long)root);
    }
    if (bytes < 0 || (bytes > 0 && data == NULL)) {
        return OVLM_FAIL(err, OVLM_E_ARG, "broadcast of %lld bytes from %s", (long long)bytes,
                         data == NULL ? "NULL; give the data" : "there; bytes must be >= 0");
    }
    OVLM_TRY(ovlm_comm_enter(comm, err));
    ovlm_comm_work work = ovlm_comm_work_next(comm, OVLM_COMM_BROADCAST, root, bytes);
    ovlm_status status = gather_from(comm, work, data, bytes, root, stream, err);
    ovlm_comm_leave(comm);
    return status;
}
