/* comm_mpi.c - the engine over MPI: pieces from rank to rank, and MPI's own gathering.
 *
 * Waiting yields the core and then sleeps in short naps: MPI libraries spin, and with more ranks
 * than cores a spinning rank takes the time of the one that it waits for. */
#include "base/arena.h"
#include "base/clock.h"
#include "cpu/comm_mpi_table.h"

#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

enum {
    PIECE_BYTES = 1 << 30, /* counts are ints */
    TAG = 1,
    YIELDS = 200 /* looks before the first nap */
};

typedef struct mpi_comm {
    mpi_table mpi;
    mpi_handle comm;
    int rank, size;
    pid_t process; /* a forked child must not call MPI */
    ovlm_comm_mpi_options options;
} mpi_comm;

/* One piece on its way, or one call of MPI's. */
typedef struct transfer {
    mpi_handle request;
    int bytes;    /* that are expected; -1 where nothing is received */
    int peer;
} transfer;

static ovlm_status check(const mpi_comm *self, int code, const char *what, ovlm_err *err)
{
    char text[MPI_TEXT_BYTES] = "";
    int length = 0;
    if (code == 0) {
        return OVLM_OK;
    }
    (void)self->mpi.Error_string(code, text, &length);
    return OVLM_FAIL(err, OVLM_E_COMM, "rank %d: MPI fails in %s: %.250s", self->rank, what, text);
}

/* ---------------------------------------------------------------- failure */

static void mpi_abort(void *engine, const char *message)
{
    const mpi_comm *self = engine;
    if (self->options.warn != NULL) { /* MPI_Abort ends this process too: say why while it lasts */
        char text[400];
        (void)snprintf(text, sizeof text, "rank %d failed: %.350s", self->rank, message);
        self->options.warn(self->options.ctx, text);
    }
    (void)self->mpi.Abort(self->comm, 1);
}

/* What fails inside MPI is known to this rank alone, and what it has posted still reads and writes
 * memory of the caller's: the job ends here, before anybody frees that. */
static ovlm_status end_failed(mpi_comm *self, ovlm_status status, const ovlm_err *err)
{
    if (status != OVLM_OK) {
        mpi_abort(self, err != NULL ? err->message : "a call of MPI's");
    }
    return status;
}

/* ---------------------------------------------------------------- waiting */

typedef struct patience {
    int64_t looks;
    double start_s, warn_s, poll_s;
} patience;

/* Between two looks at what has not arrived. */
static ovlm_status be_patient(const mpi_comm *self, const char *what, patience *p, ovlm_err *err)
{
    if (p->looks++ < YIELDS) {
        (void)sched_yield();
        return OVLM_OK;
    }
    const struct timespec nap = {.tv_nsec = p->looks < 2 * YIELDS ? 20000 : 200000};
    (void)nanosleep(&nap, NULL);
    double now_s = ovlm_clock_s();
    if (p->start_s == 0) {
        *p = (patience){p->looks, now_s, self->options.slow_s, now_s};
    }
    if (self->options.poll != NULL && now_s - p->poll_s > 0.05) {
        p->poll_s = now_s;
        if (self->options.poll(self->options.ctx) != 0) {
            return OVLM_FAIL(err, OVLM_E_INTERRUPTED, "interrupted in %s", what);
        }
    }
    if (self->options.warn != NULL && now_s - p->start_s > p->warn_s) {
        char message[300];
        (void)snprintf(message, sizeof message, "rank %d has waited %.3g s in %s", self->rank,
                       now_s - p->start_s, what);
        self->options.warn(self->options.ctx, message);
        p->warn_s *= 2;
    }
    return OVLM_OK;
}

/* One look; *done when it is over. */
static ovlm_status look(const mpi_comm *self, transfer *t, const char *what, bool *done,
                        ovlm_err *err)
{
    mpi_status status = {{0}};
    int flag = 0, bytes = 0;
    int code = self->mpi.Test(&t->request, &flag, &status);
    if (code != 0 && t->bytes >= 0) {
        char text[MPI_TEXT_BYTES] = "";
        int length = 0;
        (void)self->mpi.Error_string(code, text, &length);
        return OVLM_FAIL(err, OVLM_E_COMM, "rank %d expects %d bytes from rank %d in %s: %.150s",
                         self->rank, t->bytes, t->peer, what, text);
    }
    OVLM_TRY(check(self, code, what, err));
    *done = flag != 0;
    if (*done && t->bytes >= 0) {
        OVLM_TRY(check(self, self->mpi.Get_count(&status, self->mpi.byte, &bytes), what, err));
        if (bytes != t->bytes) {
            return OVLM_FAIL(err, OVLM_E_COMM, "counts disagree in %s: rank %d sends %d bytes to "
                             "rank %d, which expects %d", what, t->peer, bytes, self->rank,
                             t->bytes);
        }
    }
    return OVLM_OK;
}

static ovlm_status wait_all(const mpi_comm *self, const ovlm_comm_label *label, transfer *t,
                            int64_t n, ovlm_err *err)
{
    char what[OVLM_COMM_TEXT_BYTES];
    patience p = {0};
    ovlm_comm_label_describe(label, what);
    while (n > 0) {
        int64_t left = 0;
        for (int64_t i = 0; i < n; i++) {
            bool done = false;
            OVLM_TRY(look(self, &t[i], what, &done, err));
            if (!done) {
                t[left++] = t[i];
            }
        }
        p.looks = left < n ? 0 : p.looks; /* something came: the rest may be near */
        n = left;
        if (n > 0) {
            OVLM_TRY(be_patient(self, what, &p, err));
        }
    }
    return OVLM_OK;
}

/* ---------------------------------------------------------------- exchanges */

static int64_t pieces_of(int64_t bytes)
{
    return (bytes + PIECE_BYTES - 1) / PIECE_BYTES;
}

/* Posts what goes to, or comes from, one rank. */
static ovlm_status post(const mpi_comm *self, int peer, bool receive, char *data, int64_t bytes,
                        transfer *t, int64_t *n, ovlm_err *err)
{
    for (int64_t at = 0; at < bytes; at += PIECE_BYTES) {
        int piece = bytes - at < PIECE_BYTES ? (int)(bytes - at) : PIECE_BYTES;
        transfer *one = &t[(*n)++];
        *one = (transfer){.bytes = receive ? piece : -1, .peer = peer};
        int code = receive ? self->mpi.Irecv(data + at, piece, self->mpi.byte, peer, TAG,
                                             self->comm, &one->request)
                           : self->mpi.Isend(data + at, piece, self->mpi.byte, peer, TAG,
                                             self->comm, &one->request);
        OVLM_TRY(check(self, code, receive ? "MPI_Irecv" : "MPI_Isend", err));
    }
    return OVLM_OK;
}

static ovlm_status exchange(const mpi_comm *self, const ovlm_comm_label *label,
                            const ovlm_all_to_all *args, ovlm_arena *arena, ovlm_err *err)
{
    int64_t most = 0, n = 0;
    transfer *t = NULL;
    for (int r = 0; r < self->size; r++) {
        most += pieces_of(args->send_bytes[r]) + pieces_of(args->recv_bytes[r]);
    }
    OVLM_TRY(OVLM_ARENA_NEW(arena, &t, most, err));
    for (int step = 1; step < self->size; step++) { /* receives first: what comes finds its place */
        int from = (self->rank + self->size - step) % self->size;
        OVLM_TRY(post(self, from, true, (char *)args->recv + args->recv_at[from],
                      args->recv_bytes[from], t, &n, err));
    }
    for (int step = 1; step < self->size; step++) {
        int to = (self->rank + step) % self->size;
        OVLM_TRY(post(self, to, false, (char *)(uintptr_t)args->send + args->send_at[to],
                      args->send_bytes[to], t, &n, err));
    }
    return wait_all(self, label, t, n, err);
}

static ovlm_status mpi_all_to_all(void *engine, const ovlm_comm_label *label,
                                  const ovlm_all_to_all *args, ovlm_err *err)
{
    mpi_comm *self = engine;
    ovlm_arena arena = {0};
    ovlm_status status = end_failed(self, exchange(self, label, args, &arena, err), err);
    ovlm_arena_free(&arena);
    if (status == OVLM_OK && args->send_bytes[self->rank] > 0) {
        memcpy((char *)args->recv + args->recv_at[self->rank],
               (const char *)args->send + args->send_at[self->rank],
               (size_t)args->send_bytes[self->rank]);
    }
    return status;
}

/* MPI's own gathering, where its ints suffice: all ranks know all counts, and so agree.  At most
 * 1 MiB, and gaps do not matter: it gathers into a place of its own. */
static ovlm_status gather_small(const mpi_comm *self, const ovlm_comm_label *label,
                                const ovlm_all_gather *args, ovlm_arena *arena, ovlm_err *err)
{
    int *count = NULL, *at = NULL, sum = 0;
    char *all = NULL;
    transfer t = {.bytes = -1};
    OVLM_TRY(OVLM_ARENA_NEW(arena, &count, self->size, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &at, self->size, err));
    for (int r = 0; r < self->size; r++) {
        count[r] = (int)args->recv_bytes[r];
        at[r] = sum;
        sum += count[r];
    }
    OVLM_TRY(OVLM_ARENA_RAW(arena, &all, sum, err));
    OVLM_TRY(check(self, self->mpi.Iallgatherv(args->send, count[self->rank], self->mpi.byte, all,
                                               count, at, self->mpi.byte, self->comm, &t.request),
                   "MPI_Iallgatherv", err));
    OVLM_TRY(wait_all(self, label, &t, 1, err));
    for (int r = 0; r < self->size; r++) {
        if (count[r] > 0) {
            memcpy((char *)args->recv + args->recv_at[r], all + at[r], (size_t)count[r]);
        }
    }
    return OVLM_OK;
}

/* Everything to everybody, in pieces. */
static ovlm_status gather_large(const mpi_comm *self, const ovlm_comm_label *label,
                                const ovlm_all_gather *args, ovlm_arena *arena, ovlm_err *err)
{
    const int64_t own = args->recv_bytes[self->rank];
    int64_t *send_bytes = NULL, *send_at = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &send_bytes, self->size, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &send_at, self->size, err));
    for (int r = 0; r < self->size; r++) {
        send_bytes[r] = own;
    }
    const ovlm_all_to_all all = {.send = args->send, .send_bytes = send_bytes, .send_at = send_at,
                                 .recv = args->recv, .recv_bytes = args->recv_bytes,
                                 .recv_at = args->recv_at};
    OVLM_TRY(exchange(self, label, &all, arena, err));
    char *place = (char *)args->recv + args->recv_at[self->rank];
    if (own > 0 && place != args->send) {
        memcpy(place, args->send, (size_t)own);
    }
    return OVLM_OK;
}

static ovlm_status gather(const mpi_comm *self, const ovlm_comm_label *label,
                          const ovlm_all_gather *args, ovlm_arena *arena, ovlm_err *err)
{
    int64_t sum = 0;
    if (label->kind == OVLM_COMM_BARRIER) { /* a gathering of nothing need not wait for anybody */
        transfer t = {.bytes = -1};
        OVLM_TRY(check(self, self->mpi.Ibarrier(self->comm, &t.request), "MPI_Ibarrier", err));
        return wait_all(self, label, &t, 1, err);
    }
    for (int r = 0; r < self->size; r++) {
        sum += args->recv_bytes[r];
    }
    return sum <= 1 << 20 ? gather_small(self, label, args, arena, err)
                          : gather_large(self, label, args, arena, err);
}

static ovlm_status mpi_all_gather(void *engine, const ovlm_comm_label *label,
                                  const ovlm_all_gather *args, ovlm_err *err)
{
    mpi_comm *self = engine;
    ovlm_arena arena = {0};
    ovlm_status status = end_failed(self, gather(self, label, args, &arena, err), err);
    ovlm_arena_free(&arena);
    return status;
}

/* ---------------------------------------------------------------- life */

/* MPI_Comm_free is local in both libraries, although the standard calls it collective. */
static void mpi_close(void *engine)
{
    mpi_comm *self = engine;
    int finalized = 0;
    if (self->process == getpid()) {
        (void)self->mpi.Finalized(&finalized);
        if (finalized == 0 && self->comm != 0) {
            (void)self->mpi.Comm_free(&self->comm);
        }
    }
    free(self);
}

/* What a new communicator of MPI's needs. */
static ovlm_status settle(mpi_comm *self, ovlm_err *err)
{
    OVLM_TRY(check(self, self->mpi.Comm_set_errhandler(self->comm, self->mpi.errors_return),
                   "MPI_Comm_set_errhandler", err));
    OVLM_TRY(check(self, self->mpi.Comm_rank(self->comm, &self->rank), "MPI_Comm_rank", err));
    return check(self, self->mpi.Comm_size(self->comm, &self->size), "MPI_Comm_size", err);
}

static ovlm_status new_comm(const mpi_comm *like, mpi_comm **out, ovlm_err *err)
{
    *out = malloc(sizeof **out);
    if (*out == NULL) {
        return OVLM_FAIL(err, OVLM_E_NOMEM, "out of memory for a communicator");
    }
    **out = *like;
    (*out)->comm = 0;
    return OVLM_OK;
}

/* Colors and keys of 64 bits as small numbers: the first rank of the color, the place in it. */
static ovlm_status shrink_wish(mpi_comm *self, const ovlm_comm_label *label, int64_t color,
                               int64_t key, int *first, int *place, ovlm_arena *arena,
                               ovlm_err *err)
{
    const int64_t mine[2] = {color, key};
    int64_t *all = NULL, *bytes = NULL, *at = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &all, 2 * (int64_t)self->size, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &bytes, self->size, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &at, self->size, err));
    for (int r = 0; r < self->size; r++) {
        bytes[r] = (int64_t)sizeof mine;
        at[r] = r * (int64_t)sizeof mine;
    }
    const ovlm_all_gather args = {.send = mine, .recv = all, .recv_bytes = bytes, .recv_at = at};
    OVLM_TRY(mpi_all_gather(self, label, &args, err));
    *first = color < 0 ? MPI_NO_COLOR : self->rank;
    *place = 0;
    for (int r = self->size - 1; r >= 0; r--) {
        if (color >= 0 && all[2 * r] == color) {
            *first = r;
            *place += all[2 * r + 1] < key || (all[2 * r + 1] == key && r < self->rank);
        }
    }
    return OVLM_OK;
}

static ovlm_status mpi_split(void *engine, const ovlm_comm_label *label, int64_t color, int64_t key,
                             void **child, int64_t *rank, int64_t *size, ovlm_err *err)
{
    mpi_comm *self = engine, *made = NULL;
    ovlm_arena arena = {0};
    int first = 0, place = 0;
    mpi_handle handle = 0;
    *child = NULL;
    ovlm_status status = shrink_wish(self, label, color, key, &first, &place, &arena, err);
    ovlm_arena_free(&arena);
    if (status == OVLM_OK) {
        status = end_failed(self, check(self, self->mpi.Comm_split(self->comm, first, place,
                                                                   &handle),
                                        "MPI_Comm_split", err), err);
    }
    if (status != OVLM_OK || color < 0) {
        return status;
    }
    OVLM_TRY(new_comm(self, &made, err));
    made->comm = handle;
    status = settle(made, err);
    if (status != OVLM_OK) {
        mpi_close(made);
        return status;
    }
    *child = made;
    *rank = made->rank;
    *size = made->size;
    return OVLM_OK;
}

static const ovlm_comm_engine one_thread = {
    .name = "mpi", .host_memory = true, .all_to_all = mpi_all_to_all,
    .all_gather = mpi_all_gather, .split = mpi_split, .abort = mpi_abort, .close = mpi_close};

/* Where MPI allows calls from several threads, what is started runs beside the caller. */
static const ovlm_comm_engine many_threads = {
    .name = "mpi", .any_thread = true, .host_memory = true, .all_to_all = mpi_all_to_all,
    .all_gather = mpi_all_gather, .split = mpi_split, .abort = mpi_abort, .close = mpi_close};

static ovlm_status initialise(const mpi_comm *self, bool *initialised, int *threads, ovlm_err *err)
{
    int before = 0, after = 0;
    OVLM_TRY(check(self, self->mpi.Finalized(&after), "MPI_Finalized", err));
    if (after != 0) {
        return OVLM_FAIL(err, OVLM_E_COMM, "MPI was finalized; it cannot be started again");
    }
    OVLM_TRY(check(self, self->mpi.Initialized(&before), "MPI_Initialized", err));
    if (before != 0) {
        return check(self, self->mpi.Query_thread(threads), "MPI_Query_thread", err);
    }
    OVLM_TRY(check(self, self->mpi.Init_thread(NULL, NULL, MPI_MANY_THREADS, threads),
                   "MPI_Init_thread", err));
    *initialised = true;
    return OVLM_OK;
}

ovlm_status ovlm_comm_open_mpi(const ovlm_comm_mpi_options *options, bool *initialised,
                               ovlm_comm **comm, ovlm_err *err)
{
    mpi_comm draft = {.process = getpid(), .options = *options}, *self = NULL;
    int threads = 0;
    *comm = NULL;
    *initialised = false;
    draft.options.slow_s = options->slow_s > 0 ? options->slow_s : 60;
    OVLM_TRY(ovlm_mpi_load(options->library, options->n, &draft.mpi, err));
    OVLM_TRY(initialise(&draft, initialised, &threads, err));
    OVLM_TRY(new_comm(&draft, &self, err));
    mpi_handle from = options->handle != 0 ? options->handle : draft.mpi.world;
    ovlm_status status = check(self, self->mpi.Comm_dup(from, &self->comm), "MPI_Comm_dup", err);
    if (status == OVLM_OK) {
        status = settle(self, err);
    }
    if (status != OVLM_OK) {
        mpi_close(self);
        return status;
    }
    self->options.library = NULL; /* was the caller's */
    return ovlm_comm_open(threads >= MPI_MANY_THREADS ? &many_threads : &one_thread, self,
                          self->rank, self->size, 1, comm, err);
}

void ovlm_comm_mpi_finalize(const char *const *library, int64_t n)
{
    mpi_table table = {0};
    int before = 0, after = 0;
    if (ovlm_mpi_load(library, n, &table, NULL) == OVLM_OK &&
        table.Initialized(&before) == 0 && before != 0 && table.Finalized(&after) == 0 &&
        after == 0) {
        (void)table.Finalize();
    }
}
