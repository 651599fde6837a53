/* comm_queue.c - start and wait: work in the order of its starts, on the engine's own queue, on a
 * helper thread, or at once where an engine allows neither.
 *
 * The helper sleeps while there is nothing to do.  One piece of work runs at a time, and a blocking
 * call drains the queue first, so that the engine never sees two calls at once. */
#include "backend/comm_state.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

typedef struct ovlm_comm_queue {
    ovlm_comm *comm;
    pthread_t thread;
    bool helped; /* the thread runs */
    pthread_mutex_t mutex;
    pthread_cond_t work, done;
    int64_t started, finished; /* tickets up to these */
    bool closing;
    ovlm_comm_work ring[OVLM_COMM_PENDING_MOST];
    void *request[OVLM_COMM_PENDING_MOST]; /* of an engine with its own starts */
} comm_queue;

static void *help(void *argument)
{
    comm_queue *q = argument;
    pthread_mutex_lock(&q->mutex);
    for (;;) {
        while (!q->closing && q->finished == q->started) {
            pthread_cond_wait(&q->work, &q->mutex);
        }
        if (q->finished == q->started) {
            break;
        }
        const ovlm_comm_work work = q->ring[q->finished % OVLM_COMM_PENDING_MOST];
        pthread_mutex_unlock(&q->mutex);
        if (!atomic_load_explicit(&q->comm->failed, memory_order_acquire)) {
            (void)!ovlm_comm_run(q->comm, &work, NULL); /* a failure is kept by poisoning */
        }
        pthread_mutex_lock(&q->mutex);
        q->finished++;
        pthread_cond_broadcast(&q->done);
    }
    pthread_mutex_unlock(&q->mutex);
    return NULL;
}

static ovlm_status open_queue(ovlm_comm *comm, ovlm_err *err)
{
    if (comm->queue != NULL) {
        return OVLM_OK;
    }
    comm_queue *q = calloc(1, sizeof *q);
    if (q == NULL) {
        return OVLM_FAIL(err, OVLM_E_NOMEM, "out of memory for the queue of started calls");
    }
    q->comm = comm;
    pthread_mutex_init(&q->mutex, NULL);
    pthread_cond_init(&q->work, NULL);
    pthread_cond_init(&q->done, NULL);
    comm->queue = q;
    if (comm->engine->start == NULL && comm->engine->any_thread) {
        if (pthread_create(&q->thread, NULL, help, q) != 0) {
            ovlm_comm_queue_close(comm);
            return OVLM_FAIL(err, OVLM_E_NOMEM, "the system refused a thread for started calls");
        }
        q->helped = true;
    }
    return OVLM_OK;
}

void ovlm_comm_queue_close(ovlm_comm *comm)
{
    comm_queue *q = comm->queue;
    if (q == NULL) {
        return;
    }
    comm->queue = NULL;
    if (comm->process != getpid()) { /* its locks may be held by nobody, for ever */
        free(q);
        return;
    }
    pthread_mutex_lock(&q->mutex);
    int64_t pending = q->started - q->finished;
    q->closing = true;
    pthread_cond_broadcast(&q->work);
    pthread_mutex_unlock(&q->mutex);
    if (pending > 0) {
        char message[80];
        (void)snprintf(message, sizeof message,
                       "a communicator was closed with %lld started calls pending",
                       (long long)pending);
        comm->engine->abort(comm->self, message); /* so that the helper comes back */
    }
    if (q->helped) {
        pthread_join(q->thread, NULL);
    }
    pthread_cond_destroy(&q->work);
    pthread_cond_destroy(&q->done);
    pthread_mutex_destroy(&q->mutex);
    free(q);
}

/* ---------------------------------------------------------------- */

/* On the engine's own queue. */
static ovlm_status start_native(ovlm_comm *comm, const ovlm_comm_work *work, void **request,
                                ovlm_err *err)
{
    ovlm_err local = {0};
    const ovlm_arena_mark mark = ovlm_arena_save(&comm->arena);
    ovlm_status status = ovlm_comm_compare(comm, work, &local);
    ovlm_arena_rewind(&comm->arena, mark);
    if (status == OVLM_OK) {
        status = comm->engine->start(comm->self, work, request, &local);
    }
    ovlm_comm_poison(comm, status, &local);
    if (status != OVLM_OK && err != NULL) {
        *err = local;
    }
    return status;
}

ovlm_status ovlm_comm_queue_start(ovlm_comm *comm, const ovlm_comm_work *work, int64_t *ticket,
                                  ovlm_err *err)
{
    ovlm_err local = {0};
    ovlm_status status = open_queue(comm, &local);
    if (status != OVLM_OK) {
        ovlm_comm_poison(comm, status, &local); /* the others count on this call */
        return OVLM_FAIL(err, status, "%s", local.message);
    }
    comm_queue *q = comm->queue;
    pthread_mutex_lock(&q->mutex);
    bool full = q->started - q->finished == OVLM_COMM_PENDING_MOST;
    if (!full && q->helped) {
        q->ring[q->started % OVLM_COMM_PENDING_MOST] = *work;
        *ticket = ++q->started;
        pthread_cond_signal(&q->work);
    }
    pthread_mutex_unlock(&q->mutex);
    if (full) {
        comm->order--; /* the call was not made */
        return OVLM_FAIL(err, OVLM_E_ARG, "%d started calls are pending; wait for one first",
                         OVLM_COMM_PENDING_MOST);
    }
    if (q->helped) {
        return OVLM_OK;
    }
    if (comm->engine->start != NULL) {
        void **request = &q->request[q->started % OVLM_COMM_PENDING_MOST];
        OVLM_TRY(start_native(comm, work, request, err));
    } else {
        OVLM_TRY(ovlm_comm_run(comm, work, err));
        q->finished++;
    }
    *ticket = ++q->started;
    return OVLM_OK;
}

static ovlm_status wait_native(ovlm_comm *comm, comm_queue *q, int64_t ticket, ovlm_err *err)
{
    while (q->finished < ticket) {
        ovlm_err local = {0};
        void *request = q->request[q->finished++ % OVLM_COMM_PENDING_MOST];
        ovlm_status status = comm->engine->wait(comm->self, request, &local);
        ovlm_comm_poison(comm, status, &local);
        if (status != OVLM_OK) {
            return OVLM_FAIL(err, status, "%s", local.message);
        }
    }
    return OVLM_OK;
}

/* One slice of waiting for the helper, with the mutex held. */
static void wait_slice(comm_queue *q)
{
    struct timespec until;
    (void)clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += 50000000;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    (void)pthread_cond_timedwait(&q->done, &q->mutex, &until);
}

static ovlm_status wait_helped(ovlm_comm *comm, comm_queue *q, int64_t ticket, ovlm_err *err)
{
    bool stop = false;
    pthread_mutex_lock(&q->mutex);
    while (q->finished < ticket && !stop) {
        wait_slice(q);
        if (q->finished < ticket && comm->poll != NULL) {
            pthread_mutex_unlock(&q->mutex);
            stop = comm->poll(comm->poll_ctx) != 0;
            pthread_mutex_lock(&q->mutex);
        }
    }
    pthread_mutex_unlock(&q->mutex);
    if (stop) {
        comm->engine->abort(comm->self, "interrupted");
        return OVLM_FAIL(err, OVLM_E_INTERRUPTED, "interrupted while waiting for other ranks");
    }
    if (atomic_load_explicit(&comm->failed, memory_order_acquire)) {
        return OVLM_FAIL(err, comm->failure.code, "%s", comm->failure.message);
    }
    return OVLM_OK;
}

ovlm_status ovlm_comm_queue_wait(ovlm_comm *comm, int64_t ticket, ovlm_err *err)
{
    comm_queue *q = comm->queue;
    if (ticket < 1 || q == NULL || ticket > q->started) {
        return OVLM_FAIL(err, OVLM_E_ARG, "ticket %lld was not given by this communicator",
                         (long long)ticket);
    }
    if (comm->engine->start != NULL) {
        return wait_native(comm, q, ticket, err);
    }
    return wait_helped(comm, q, ticket, err);
}

ovlm_status ovlm_comm_queue_drain(ovlm_comm *comm, ovlm_err *err)
{
    return comm->queue == NULL || comm->queue->started == 0
               ? OVLM_OK
               : ovlm_comm_queue_wait(comm, comm->queue->started, err);
}
