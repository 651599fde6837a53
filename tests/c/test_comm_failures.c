/* test_comm_failures.c - ranks that are threads: what is refused, and how all ranks hear of a
 * failure. */
#include <stdatomic.h>

#include "backend/comm_state.h"
#include "comm_rig.h"
#include "cpu/comm_local_state.h"

static rig_rank ranks[RIG_RANKS_MOST];
static const ovlm_comm_local_options options = {.silent_s = 5, .window_bytes = 128};

static ovlm_status exchange(rig_rank *self, const int64_t *send_n, const int64_t *recv_n)
{
    static char memory[RIG_RANKS_MOST][2][4096];
    const ovlm_all_to_all args = {.send = memory[self->rank][0], .send_bytes = send_n,
                                  .recv = memory[self->rank][1], .recv_bytes = recv_n};
    return ovlm_comm_all_to_all(self->comm, &args, &self->err);
}

/* What all ranks say after a body that fails; and whether it took less than the limit. */
static void expect(const char *what, int64_t n, const char *message)
{
    for (int64_t r = 0; r < n; r++) {
        CHECK(ranks[r].status == OVLM_E_COMM && strstr(ranks[r].err.message, message) != NULL,
              "%s: rank %lld: %d \"%s\", not \"%s\"", what, (long long)r, (int)ranks[r].status,
              ranks[r].err.message, message);
        CHECK(ranks[r].took_s < 30, "%s: rank %lld took %g s", what, (long long)r, ranks[r].took_s);
    }
}

/* ---------------------------------------------------------------- refused, and nothing happened */

static void refusals(rig_rank *self)
{
    int64_t count[RIG_RANKS_MOST] = {0}, bad[RIG_RANKS_MOST] = {0}, ticket = 0, x = 1;
    bad[self->n - 1] = -1;
    RCHECK(self, exchange(self, bad, count) == OVLM_E_ARG, "%s", self->err.message);
    RCHECK(self, strstr(self->err.message, "send_bytes") != NULL, "%s", self->err.message);
    RCHECK(self, exchange(self, count, bad) == OVLM_E_ARG, "%s", self->err.message);
    bad[self->n - 1] = INT64_MAX;
    bad[0] += 1;
    RCHECK(self, exchange(self, bad, count) == OVLM_E_ARG, "%s", self->err.message);
    int64_t to_self[RIG_RANKS_MOST] = {0};
    to_self[self->rank] = 4;
    RCHECK(self, exchange(self, to_self, count) == OVLM_E_ARG, "%s", self->err.message);
    RCHECK(self, exchange(self, NULL, count) == OVLM_E_ARG, "%s", self->err.message);
    const ovlm_all_reduce reductions[] = {
        {.send = &x, .recv = &x, .n = -1, .dtype = OVLM_I64},
        {.send = &x, .recv = &x, .n = 1, .dtype = OVLM_U8},
        {.send = &x, .recv = &x, .n = 1, .dtype = OVLM_F16},
        {.send = &x, .recv = &x, .n = 1, .dtype = OVLM_I64, .reduce = (ovlm_reduce)3},
        {.send = NULL, .recv = &x, .n = 1, .dtype = OVLM_I64},
        {.send = &x, .recv = NULL, .n = 1, .dtype = OVLM_I64}};
    for (size_t i = 0; i < sizeof reductions / sizeof *reductions; i++) {
        RCHECK(self, ovlm_comm_all_reduce(self->comm, &reductions[i], &self->err) == OVLM_E_ARG &&
                         ovlm_comm_all_reduce_start(self->comm, &reductions[i], &ticket, NULL) ==
                             OVLM_E_ARG, "reduction %zu", i);
    }
    int64_t huge[RIG_RANKS_MOST] = {INT64_MAX / 8, INT64_MAX / 16};
    const ovlm_reduce_scatter scatter = {.send = &x, .recv = &x, .counts = huge,
                                         .dtype = OVLM_I64};
    RCHECK(self, ovlm_comm_reduce_scatter(self->comm, &scatter, &self->err) == OVLM_E_ARG, "%s",
           self->err.message);
    RCHECK(self, ovlm_comm_broadcast(self->comm, &x, 8, self->n, NULL, &self->err) == OVLM_E_ARG &&
                     ovlm_comm_broadcast(self->comm, &x, -8, 0, NULL, NULL) == OVLM_E_ARG &&
                     ovlm_comm_broadcast(self->comm, NULL, 8, 0, NULL, NULL) == OVLM_E_ARG,
           "broadcasts");
    x = self->rank;
    const ovlm_all_reduce sum = {.send = &x, .recv = &x, .n = 1, .dtype = OVLM_I64};
    RTRY(self, ovlm_comm_all_reduce(self->comm, &sum, &self->err));
    RCHECK(self, x == self->n * (self->n - 1) / 2, "the sum after refusals is %lld", (long long)x);
}

/* A second caller is refused while the first one waits: rank 1 arrives only when that was seen. */
static atomic_bool seen;

static void *intrude(void *argument)
{
    ovlm_comm *comm = argument;
    ovlm_err err = {0};
    const struct timespec nap = {.tv_nsec = 1000000};
    while (!atomic_load(&comm->busy)) { /* until the first caller is inside */
        (void)nanosleep(&nap, NULL);
    }
    ovlm_status status = ovlm_comm_barrier(comm, &err);
    atomic_store(&seen, status == OVLM_E_ARG && strstr(err.message, "another thread") != NULL);
    return NULL;
}

static void one_at_a_time(rig_rank *self)
{
    pthread_t thread;
    if (self->rank == 0) {
        RCHECK(self, pthread_create(&thread, NULL, intrude, self->comm) == 0, "thread");
        RTRY(self, ovlm_comm_barrier(self->comm, &self->err));
        pthread_join(thread, NULL);
        return;
    }
    for (int look = 0; look < 400 && !atomic_load(&seen); look++) {
        const struct timespec nap = {.tv_nsec = 10000000};
        (void)nanosleep(&nap, NULL);
    }
    RTRY(self, ovlm_comm_barrier(self->comm, &self->err));
    RCHECK(self, atomic_load(&seen), "the second caller was let in");
}

/* ---------------------------------------------------------------- failures */

/* Rank 1 sends 5 bytes to rank 2, which expects 6. */
static void wrong_counts(rig_rank *self)
{
    int64_t send_n[RIG_RANKS_MOST] = {0}, recv_n[RIG_RANKS_MOST] = {0};
    send_n[2] = self->rank == 1 ? 5 : 0;
    recv_n[1] = self->rank == 2 ? 6 : 0;
    self->status = exchange(self, send_n, recv_n);
    RCHECK(self, ovlm_comm_barrier(self->comm, &self->err) == OVLM_E_COMM, "poisoned");
}

/* In a group of ranks 1 and 3 the first one sends, and both keep their names. */
static void wrong_part(rig_rank *self)
{
    ovlm_comm *part = NULL;
    int64_t send_n[2] = {0}, recv_n[2] = {0};
    char byte = 0, room = 0;
    self->status = ovlm_comm_split(self->comm, self->rank % 2, 0, &part, &self->err);
    if (self->status != OVLM_OK) {
        return; /* the others failed already */
    }
    send_n[1] = self->rank == 1 ? 1 : 0;
    const ovlm_all_to_all args = {.send = &byte, .send_bytes = send_n, .recv = &room,
                                  .recv_bytes = recv_n};
    self->status = ovlm_comm_all_to_all(part, &args, &self->err);
    if (self->status == OVLM_OK) { /* the other group hears of it later */
        self->status = ovlm_comm_barrier(self->comm, &self->err);
    }
    ovlm_comm_close(part);
}

static void wrong_gather(rig_rank *self)
{
    char memory[64] = {0};
    int64_t count[RIG_RANKS_MOST] = {0};
    count[0] = self->rank == 2 ? 3 : 4;
    count[1] = self->rank == 2 ? 4 : 3;
    const ovlm_all_gather args = {.send = memory + 32, .recv = memory, .recv_bytes = count};
    self->status = ovlm_comm_all_gather(self->comm, &args, &self->err);
}

static void wrong_kind(rig_rank *self)
{
    int64_t x = 0;
    const ovlm_all_reduce args = {.send = &x, .recv = &x, .n = 1, .dtype = OVLM_I64};
    self->status = self->rank == 3 ? ovlm_comm_all_reduce(self->comm, &args, &self->err)
                                   : ovlm_comm_barrier(self->comm, &self->err);
}

static void wrong_type(rig_rank *self)
{
    int64_t x = 0;
    const ovlm_all_reduce args = {.send = &x, .recv = &x, .n = self->rank == 1 ? 0 : 1,
                                  .dtype = OVLM_F64};
    self->status = ovlm_comm_all_reduce(self->comm, &args, &self->err);
}

static void abort_one(rig_rank *self)
{
    ovlm_comm *twin = NULL;
    RTRY(self, ovlm_comm_dup(self->comm, &twin, &self->err));
    if (self->rank == self->n - 1) {
        ovlm_comm_abort(twin, "ValueError: the sea is too wet");
    }
    self->status = ovlm_comm_barrier(self->comm, &self->err);
    RCHECK(self, ovlm_comm_barrier(twin, &self->err) == OVLM_E_COMM, "the twin is poisoned too");
    ovlm_comm_close(twin);
    RCHECK(self, ovlm_comm_dup(self->comm, &twin, NULL) == OVLM_E_COMM && twin == NULL, "dup");
}

/* One rank ends while the others still call. */
static void leave_one(rig_rank *self)
{
    RTRY(self, ovlm_comm_barrier(self->comm, &self->err));
    if (self->rank == 1) {
        self->status = OVLM_E_COMM; /* as expected of the others */
        (void)snprintf(self->err.message, sizeof self->err.message, "rank 1 closed");
        return;
    }
    self->status = ovlm_comm_barrier(self->comm, &self->err);
}

/* Something started is pending when a rank gives up. */
static void close_pending(rig_rank *self)
{
    ovlm_comm *twin = NULL;
    int64_t x = 1, ticket = 0;
    const ovlm_all_reduce args = {.send = &x, .recv = &x, .n = 1, .dtype = OVLM_I64};
    RTRY(self, ovlm_comm_dup(self->comm, &twin, &self->err));
    if (self->rank == 0) {
        RTRY(self, ovlm_comm_all_reduce_start(twin, &args, &ticket, &self->err));
        ovlm_comm_close(twin);
        twin = NULL;
    }
    self->status = ovlm_comm_barrier(self->comm, &self->err);
    ovlm_comm_close(twin);
}

static void abort_started(rig_rank *self)
{
    int64_t x = 1, ticket = 0;
    const ovlm_all_reduce args = {.send = &x, .recv = &x, .n = 1, .dtype = OVLM_I64};
    if (self->rank == 0) {
        ovlm_comm_abort(self->comm, "no");
        self->status = ovlm_comm_barrier(self->comm, &self->err);
    } else {
        ovlm_status status = ovlm_comm_all_reduce_start(self->comm, &args, &ticket, &self->err);
        self->status = status == OVLM_OK ? ovlm_comm_wait(self->comm, ticket, &self->err) : status;
    }
}

/* Comparing begins while something started has not yet run on rank 0, and has on rank 1: what was
 * started before is compared nowhere, what comes later everywhere. */
static void debug_later(rig_rank *self)
{
    ovlm_comm_engine blind = *self->comm->engine;
    int64_t x[2] = {1, 1}, ticket = 0;
    const struct timespec nap = {.tv_nsec = 200000000};
    blind.compares = false;
    self->comm->engine = &blind;
    if (self->rank == 1) {
        (void)nanosleep(&nap, NULL); /* rank 0 has started both by then */
    }
    for (int i = 0; i < 2; i++) {
        const ovlm_all_reduce args = {.send = &x[i], .recv = &x[i], .n = 1, .dtype = OVLM_I64};
        RTRY(self, ovlm_comm_all_reduce_start(self->comm, &args, &ticket, &self->err));
    }
    if (self->rank == 1) {
        RTRY(self, ovlm_comm_wait(self->comm, ticket, &self->err));
    }
    ovlm_comm_set_debug(self->comm, true);
    RTRY(self, ovlm_comm_wait(self->comm, ticket, &self->err));
    RTRY(self, ovlm_comm_barrier(self->comm, &self->err));
    RCHECK(self, x[0] == 2 && x[1] == 2, "%lld %lld", (long long)x[0], (long long)x[1]);
    self->comm->engine = &ovlm_local_engine;
}

/* Counts of which every rank says all, over an engine that does not compare: rank 1 errs. */
static void wrong_rows(rig_rank *self)
{
    const bool scatter = *(const bool *)self->ctx;
    ovlm_comm_engine blind = *self->comm->engine;
    int64_t count[RIG_RANKS_MOST] = {2, 2, 2}, x[16] = {0}, y[16] = {0};
    const ovlm_reduce_scatter reduction = {.send = x, .recv = y, .counts = count,
                                           .dtype = OVLM_I64};
    const ovlm_all_gather gather = {.send = x, .recv = y, .recv_bytes = count};
    if (self->rank == 1) { /* the same sum */
        count[0]++;
        count[1]--;
    }
    blind.compares = false;
    self->comm->engine = &blind;
    ovlm_comm_set_debug(self->comm, true);
    self->status = scatter ? ovlm_comm_reduce_scatter(self->comm, &reduction, &self->err)
                           : ovlm_comm_all_gather(self->comm, &gather, &self->err);
    self->comm->engine = &ovlm_local_engine;
}

static int stop(void *ctx)
{
    (void)ctx;
    return 1;
}

static void interrupted(rig_rank *self)
{
    if (self->rank == 0) {
        const struct timespec nap = {.tv_nsec = 300000000};
        (void)nanosleep(&nap, NULL); /* the others are asked whether to go on, and say no */
    }
    self->status = ovlm_comm_barrier(self->comm, &self->err);
    RCHECK(self, self->rank == 0 ? self->status == OVLM_E_COMM
                                 : self->status == OVLM_E_INTERRUPTED ||
                                       self->status == OVLM_E_COMM, "%s", self->err.message);
}

static char warning[400];
static pthread_mutex_t warning_mutex = PTHREAD_MUTEX_INITIALIZER;

static void keep_warning(void *ctx, const char *message)
{
    (void)ctx;
    pthread_mutex_lock(&warning_mutex);
    (void)snprintf(warning, sizeof warning, "%s", message);
    pthread_mutex_unlock(&warning_mutex);
}

static void slow_one(rig_rank *self)
{
    if (self->rank == 1) {
        const struct timespec nap = {.tv_nsec = 400000000};
        (void)nanosleep(&nap, NULL);
    }
    RTRY(self, ovlm_comm_barrier(self->comm, &self->err));
}

/* A caller and the helper fail at the same time: one message stays, whole. */
typedef struct failing {
    ovlm_comm *comm;
    atomic_int *ready;
    char letter;
} failing;

static void *fail_beside(void *argument)
{
    const failing *f = argument;
    ovlm_err err = {.code = OVLM_E_COMM};
    memset(err.message, f->letter, sizeof err.message - 1);
    atomic_fetch_add(f->ready, 1);
    while (atomic_load(f->ready) < 2) {
    }
    ovlm_comm_poison(f->comm, OVLM_E_COMM, &err);
    return NULL;
}

static void test_two_failures(void)
{
    for (int trial = 0; trial < 50; trial++) {
        ovlm_comm *comm = NULL;
        ovlm_err err = {0};
        pthread_t thread;
        atomic_int ready = 0;
        CHECK(ovlm_comm_open_self(&comm, &err) == OVLM_OK, "%s", err.message);
        failing a = {comm, &ready, 'a'}, b = {comm, &ready, 'b'};
        CHECK(pthread_create(&thread, NULL, fail_beside, &a) == 0, "thread");
        (void)fail_beside(&b);
        (void)pthread_join(thread, NULL);
        CHECK(ovlm_comm_barrier(comm, &err) == OVLM_E_COMM &&
                  strspn(err.message, (char[]){err.message[0], 0}) == sizeof err.message - 1,
              "%s", err.message);
        ovlm_comm_close(comm);
    }
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    test_two_failures();
    rig_run("refusals", 4, &options, refusals, NULL, ranks);
    rig_run("one at a time", 2, &options, one_at_a_time, NULL, ranks);
    rig_run("wrong counts", 4, &options, wrong_counts, NULL, ranks);
    expect("wrong counts", 4, "rank 1 sends 5 bytes to rank 2, which expects 6");
    rig_run("wrong part", 4, &options, wrong_part, NULL, ranks);
    expect("wrong part", 4, "rank 1 sends 1 bytes to rank 3, which expects 0");
    rig_run("wrong gather", 3, &options, wrong_gather, NULL, ranks);
    expect("wrong gather", 3, "rank 0 says that rank 0 has 4 bytes, rank 2 says 3");
    rig_run("wrong kind", 5, &options, wrong_kind, NULL, ranks);
    expect("wrong kind", 5, "rank 0 barrier, call 1");
    expect("wrong kind", 5, "rank 3 all_reduce (sum) of 1 int64, call 1");
    rig_run("wrong type", 3, &options, wrong_type, NULL, ranks);
    expect("wrong type", 3, "rank 1 all_reduce (sum) of 0 float64");
    rig_run("abort", 6, &options, abort_one, NULL, ranks);
    expect("abort", 6, "rank 5 failed: ValueError: the sea is too wet");
    rig_run("abort of a start", 3, &options, abort_started, NULL, ranks);
    expect("abort of a start", 3, "rank 0 failed: no");
    rig_run("debug later", 2, &options, debug_later, NULL, ranks);
    for (int scatter = 0; scatter < 2; scatter++) {
        const bool ctx = scatter == 1;
        rig_run("wrong rows", 3, &options, wrong_rows, &ctx, ranks);
        expect("wrong rows", 3, ctx ? "rank 0 says that rank 0 has 2 elements, rank 1 says 3"
                                    : "rank 0 says that rank 0 has 2 bytes, rank 1 says 3");
    }
    rig_run("leave", 4, &options, leave_one, NULL, ranks);
    expect("leave", 4, "rank 1 closed");
    rig_run("close", 3, &options, close_pending, NULL, ranks);
    expect("close", 3, "rank 0 failed: a communicator was closed with 1 started calls pending");
    ovlm_comm_local_options polled = options;
    polled.poll = stop;
    rig_run("interrupt", 3, &polled, interrupted, NULL, ranks);
    ovlm_comm_local_options patient = options;
    patient.slow_s = 0.1;
    patient.warn = keep_warning;
    rig_run("slow", 2, &patient, slow_one, NULL, ranks);
    CHECK(strstr(warning, "rank 0 has waited") != NULL && strstr(warning, "for rank 1 in barrier"),
          "warning: %s", warning);
    return test_end("comm_failures");
}
