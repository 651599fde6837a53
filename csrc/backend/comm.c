/* comm.c - a communicator's life: open, split, poisoning, close; and labels. */
#include "backend/comm_state.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

ovlm_status ovlm_comm_open(const ovlm_comm_engine *engine, void *self, int64_t rank, int64_t size,
                           uint64_t id, ovlm_comm **comm, ovlm_err *err)
{
    *comm = NULL;
    ovlm_comm *made = calloc(1, sizeof *made);
    if (made == NULL) {
        engine->close(self);
        return OVLM_FAIL(err, OVLM_E_NOMEM, "out of memory for a communicator");
    }
    made->engine = engine;
    made->self = self;
    made->rank = rank;
    made->size = size;
    made->process = getpid();
    made->id = id;
    atomic_init(&made->busy, false);
    atomic_init(&made->poisoned, false);
    atomic_init(&made->failed, false);
    *comm = made;
    return OVLM_OK;
}

void ovlm_comm_close(ovlm_comm *comm)
{
    if (comm == NULL) {
        return;
    }
    ovlm_comm_queue_close(comm);
    comm->engine->close(comm->self);
    ovlm_arena_free(&comm->arena);
    free(comm->world);
    free(comm);
}

void ovlm_comm_abort(ovlm_comm *comm, const char *message)
{
    if (comm->process == getpid()) { /* a forked child is no rank that could fail */
        comm->engine->abort(comm->self, message);
    }
}

void ovlm_comm_set_debug(ovlm_comm *comm, bool debug)
{
    comm->debug = debug;
}

void ovlm_comm_set_poll(ovlm_comm *comm, int (*poll)(void *ctx), void *ctx)
{
    comm->poll = poll;
    comm->poll_ctx = ctx;
}

int64_t ovlm_comm_rank(const ovlm_comm *comm)
{
    return comm->rank;
}

int64_t ovlm_comm_size(const ovlm_comm *comm)
{
    return comm->size;
}

const char *ovlm_comm_engine_name(const ovlm_comm *comm)
{
    return comm->engine->name;
}

bool ovlm_comm_any_thread(const ovlm_comm *comm)
{
    return comm->engine->any_thread;
}

/* ---------------------------------------------------------------- use and failure */

ovlm_status ovlm_comm_enter(ovlm_comm *comm, ovlm_err *err)
{
    if (comm->process != getpid()) { /* its threads are not here, and its memory is shared */
        return OVLM_FAIL(err, OVLM_E_COMM, "a forked process is no rank; communicators stay with "
                         "the process that opened them");
    }
    if (atomic_exchange_explicit(&comm->busy, true, memory_order_acquire)) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "the communicator is in use by another thread; give each thread a dup");
    }
    if (atomic_load_explicit(&comm->failed, memory_order_acquire)) {
        ovlm_comm_leave(comm);
        return OVLM_FAIL(err, OVLM_E_COMM, "%s", comm->failure.message);
    }
    return OVLM_OK;
}

void ovlm_comm_leave(ovlm_comm *comm)
{
    atomic_store_explicit(&comm->busy, false, memory_order_release);
}

void ovlm_comm_poison(ovlm_comm *comm, ovlm_status status, const ovlm_err *err)
{
    if (status == OVLM_OK ||
        atomic_exchange_explicit(&comm->poisoned, true, memory_order_relaxed)) {
        return;
    }
    if (status != OVLM_E_COMM) { /* out of memory, interrupted: the others still wait for us */
        comm->engine->abort(comm->self, err->message);
    }
    comm->failure = *err;
    atomic_store_explicit(&comm->failed, true, memory_order_release);
}

/* ---------------------------------------------------------------- split */

/* FNV-1a over the words of a child's origin. */
static uint64_t child_id(const ovlm_comm_label *label, int64_t color)
{
    const uint64_t word[] = {label->comm, (uint64_t)label->order, (uint64_t)color};
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t w = 0; w < sizeof word / sizeof *word; w++) {
        for (int byte = 0; byte < 8; byte++) {
            hash = (hash ^ ((word[w] >> (8 * byte)) & 0xffu)) * 0x100000001b3u;
        }
    }
    return hash;
}

/* Messages name ranks as they are called in the first communicator. */
static ovlm_status gather_world(const ovlm_comm *comm, ovlm_comm *child, ovlm_err *err)
{
    const int64_t mine = ovlm_comm_world_rank(comm->world, comm->rank);
    ovlm_arena arena = {0};
    int64_t *bytes = NULL;
    ovlm_status status = OVLM_OK;
    OVLM_GOTO(done, OVLM_HEAP_NEW(&child->world, child->size, err));
    OVLM_GOTO(done, OVLM_ARENA_NEW(&arena, &bytes, child->size, err));
    for (int64_t r = 0; r < child->size; r++) {
        bytes[r] = (int64_t)sizeof mine;
    }
    const ovlm_all_gather args = {.send = &mine, .recv = child->world, .recv_bytes = bytes};
    OVLM_GOTO(done, ovlm_comm_all_gather(child, &args, err));
done:
    ovlm_arena_free(&arena);
    return status;
}

static ovlm_status split(ovlm_comm *comm, int64_t color, int64_t key, ovlm_comm **out,
                         ovlm_err *err)
{
    const ovlm_comm_work work = ovlm_comm_work_next(comm, OVLM_COMM_SPLIT, 0, -1);
    void *child = NULL;
    int64_t rank = 0, size = 0;
    OVLM_TRY(ovlm_comm_queue_drain(comm, err));
    OVLM_TRY(ovlm_comm_compare(comm, &work, err));
    OVLM_TRY(comm->engine->split(comm->self, &work.label, color, key, &child, &rank, &size, err));
    if (child == NULL) {
        return OVLM_OK;
    }
    OVLM_TRY(ovlm_comm_open(comm->engine, child, rank, size, child_id(&work.label, color), out,
                            err));
    (*out)->debug = comm->debug;
    ovlm_comm_set_poll(*out, comm->poll, comm->poll_ctx);
    return gather_world(comm, *out, err);
}

ovlm_status ovlm_comm_split(ovlm_comm *comm, int64_t color, int64_t key, ovlm_comm **out,
                            ovlm_err *err)
{
    ovlm_err local = {0};
    *out = NULL;
    OVLM_TRY(ovlm_comm_enter(comm, err));
    ovlm_status status = split(comm, color, key, out, &local);
    ovlm_comm_poison(comm, status, &local);
    ovlm_comm_leave(comm);
    if (status != OVLM_OK) {
        ovlm_comm_close(*out);
        *out = NULL;
        return OVLM_FAIL(err, status, "%s", local.message);
    }
    return OVLM_OK;
}

ovlm_status ovlm_comm_dup(ovlm_comm *comm, ovlm_comm **out, ovlm_err *err)
{
    return ovlm_comm_split(comm, 0, comm->rank, out, err);
}

/* ---------------------------------------------------------------- labels */

ovlm_comm_work ovlm_comm_work_next(ovlm_comm *comm, ovlm_comm_kind kind, int64_t detail,
                                   int64_t amount)
{
    const ovlm_comm_work work = {
        .label = {.comm = comm->id, .order = ++comm->order, .amount = amount,
                  .kind = (int32_t)kind, .detail = (int32_t)detail},
        .compare = comm->debug && !comm->engine->compares};
    return work;
}

void ovlm_comm_label_describe(const ovlm_comm_label *label, char text[OVLM_COMM_TEXT_BYTES])
{
    static const char *const names[OVLM_COMM_KIND_COUNT] = {
        "barrier", "broadcast", "all_gather", "all_to_all", "all_reduce", "reduce_scatter",
        "split"};
    static const char *const reduces[] = {"sum", "max", "min"};
    const char *name = label->kind >= 0 && label->kind < OVLM_COMM_KIND_COUNT ? names[label->kind]
                                                                             : "unknown call";
    char what[64] = "";
    if (label->kind == OVLM_COMM_BROADCAST) {
        (void)snprintf(what, sizeof what, " of %lld bytes from rank %d", (long long)label->amount,
                       (int)label->detail);
    } else if (label->kind == OVLM_COMM_ALL_GATHER) {
        (void)snprintf(what, sizeof what, " of %lld bytes", (long long)label->amount);
    } else if (label->kind == OVLM_COMM_ALL_REDUCE || label->kind == OVLM_COMM_REDUCE_SCATTER) {
        int dtype = label->detail / 16, reduce = label->detail % 16;
        (void)snprintf(what, sizeof what, " (%s) of %lld %s",
                       reduce >= 0 && reduce < 3 ? reduces[reduce] : "?",
                       (long long)label->amount,
                       dtype >= 0 && dtype < OVLM_DTYPE_COUNT
                           ? ovlm_dtype_name((ovlm_dtype)dtype)
                           : "?");
    }
    (void)snprintf(text, OVLM_COMM_TEXT_BYTES, "%s%s, call %lld of communicator %08llx", name,
                   what, (long long)label->order,
                   (unsigned long long)(label->comm & 0xffffffffu));
}

int64_t ovlm_comm_world_rank(const int64_t *world, int64_t rank)
{
    return world != NULL ? world[rank] : rank;
}

ovlm_status ovlm_comm_labels_compare(const ovlm_comm_label *first, int64_t n,
                                     int64_t stride_bytes, const int64_t *world, ovlm_err *err)
{
    for (int64_t r = 1; r < n; r++) {
        const ovlm_comm_label *other =
            (const ovlm_comm_label *)(const void *)((const char *)first + r * stride_bytes);
        if (memcmp(first, other, sizeof *first) != 0) {
            char ours[OVLM_COMM_TEXT_BYTES], theirs[OVLM_COMM_TEXT_BYTES];
            ovlm_comm_label_describe(first, ours);
            ovlm_comm_label_describe(other, theirs);
            return OVLM_FAIL(err, OVLM_E_COMM,
                             "ranks call different things: rank %lld %s; rank %lld %s",
                             (long long)ovlm_comm_world_rank(world, 0), ours,
                             (long long)ovlm_comm_world_rank(world, r), theirs);
        }
    }
    return OVLM_OK;
}
