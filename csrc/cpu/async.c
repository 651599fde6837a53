/* async.c - queues that run late: jobs in a list, a thread per queue, marks that other queues and
 * the host wait for.
 *
 * One mutex and one condition per backend guard all of it: this backend is for finding mistakes,
 * and is the easier to trust for that.  Jobs are numbered; a worker runs job i once `due` > i, and
 * `due` is raised by whoever waits, or by a backlog. */
#include "cpu/async.h"

#include "base/arena.h"
#include "cpu/async_job.h"
#include "cpu/cpu.h"
#include "cpu/host_life.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BACKLOG = 24 };

typedef struct async_backend {
    ovlm_backend base;
    const ovlm_ops *inner_ops;
    ovlm_backend *inner; /* answers measure and prepare */
    ovlm_backend_options options;
    ovlm_async_memory memory;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
} async_backend;

typedef struct async_queue async_queue;

/* A recorded point.  Held by its event and by the jobs that name it. */
typedef struct async_mark {
    int64_t holders;
    bool reached;
    async_queue *queue; /* valid until reached */
    uint64_t number;    /* its job             */
} async_mark;

typedef enum job_kind { JOB_OP, JOB_COPY, JOB_FILL, JOB_RECORD, JOB_FOLLOW } job_kind;

typedef struct async_job {
    struct async_job *next;
    job_kind kind;
    ovlm_op op;
    ovlm_pass pass;
    async_mark *mark;
    void *to;
    const void *from;
    int64_t bytes;
    ovlm_copy_kind copy_kind;
    uint8_t byte;
    _Alignas(16) char args[];
} async_job;

struct async_queue {
    ovlm_queue base;
    ovlm_backend *inner;
    ovlm_queue *inner_queue;
    pthread_t thread;
    async_job *first, *last;
    uint64_t put, done, due;
    bool held, closing;
    ovlm_err late;
};

struct ovlm_event {
    async_backend *backend;
    async_mark *mark; /* NULL: never recorded, which counts as reached */
};

static async_backend *backend_of(ovlm_backend *backend)
{
    return (async_backend *)(void *)backend;
}

static async_queue *queue_of(ovlm_queue *queue)
{
    return (async_queue *)(void *)queue;
}

static async_backend *owner_of(const async_queue *queue)
{
    return backend_of(queue->base.backend);
}

/* ---- running ---- */

static void mark_drop(async_mark *mark)
{
    if (mark != NULL && --mark->holders == 0) {
        free(mark);
    }
}

/* Under the mutex: lets the queue work up to job `number`. */
static void hurry(async_backend *backend, async_queue *queue, uint64_t number)
{
    if (queue->due <= number) {
        queue->due = number + 1;
        pthread_cond_broadcast(&backend->changed);
    }
}

/* Under the mutex. */
static void wait_for_mark(async_backend *backend, const async_mark *mark)
{
    while (!mark->reached) {
        hurry(backend, mark->queue, mark->number);
        pthread_cond_wait(&backend->changed, &backend->mutex);
    }
}

static ovlm_status run_copy(async_backend *backend, async_queue *queue, async_job *job,
                            ovlm_err *err)
{
    const char *why = NULL, *what = job->kind == JOB_FILL ? "fill" : "copy";
    void *to = job->to;
    const void *from = job->from;
    if (job->bytes == 0) {
        return OVLM_OK;
    }
    if (job->kind == JOB_FILL || job->copy_kind != OVLM_TO_HOST) {
        to = ovlm_async_memory_find(&backend->memory, to, job->bytes, &why);
    }
    if (job->kind == JOB_COPY && job->copy_kind != OVLM_TO_DEVICE) {
        from = ovlm_async_memory_find(&backend->memory, from, job->bytes, &why);
    }
    if (why != NULL) {
        return OVLM_FAIL(err, OVLM_E_BACKEND, "%s: %s, %lld bytes at %p, %s", what,
                         to == NULL ? "to" : "from", (long long)job->bytes,
                         to == NULL ? job->to : job->from, why);
    }
    const ovlm_ops *ops = backend->inner_ops;
    return job->kind == JOB_FILL
               ? ops->fill(queue->inner_queue, to, job->byte, job->bytes, err)
               : ops->copy(queue->inner_queue, to, from, job->bytes, job->copy_kind, err);
}

static ovlm_status run_op(async_backend *backend, async_queue *queue, async_job *job,
                          ovlm_err *err)
{
    const ovlm_ops *ops = backend->inner_ops;
    OVLM_TRY(ovlm_async_args_translate(&backend->memory, ops, queue->inner, job->op, job->pass,
                                       job->args, err));
    OVLM_TRY(ovlm_op_run(ops, job->op, job->pass, queue->inner_queue, job->args, err));
    return ops->queue_wait(queue->inner_queue, err);
}

/* Outside the mutex. */
static ovlm_status run_work(async_backend *backend, async_queue *queue, async_job *job,
                            ovlm_err *err)
{
    /* Holding the reader's lock: memory is not freed under a running operation. */
    pthread_rwlock_rdlock(&backend->memory.lock);
    ovlm_status status = job->kind == JOB_OP ? run_op(backend, queue, job, err)
                                             : run_copy(backend, queue, job, err);
    pthread_rwlock_unlock(&backend->memory.lock);
    return status;
}

/* Entered and left with the mutex held. */
static void run_job(async_backend *backend, async_queue *queue, async_job *job)
{
    if (job->kind == JOB_RECORD) {
        job->mark->reached = true;
    } else if (job->kind == JOB_FOLLOW) {
        wait_for_mark(backend, job->mark);
    } else if (queue->late.code == OVLM_OK) {
        ovlm_err err = {0};
        pthread_mutex_unlock(&backend->mutex);
        ovlm_status status = run_work(backend, queue, job, &err);
        pthread_mutex_lock(&backend->mutex);
        if (status != OVLM_OK) {
            err.code = OVLM_E_BACKEND; /* whatever it was, it came too late to be refused */
            queue->late = err;
        }
    }
    mark_drop(job->mark);
}

/* The job to run now, or NULL. */
static async_job *job_due(const async_queue *queue)
{
    return !queue->held && queue->done < queue->due ? queue->first : NULL;
}

static void *work(void *argument)
{
    async_queue *queue = argument;
    async_backend *backend = owner_of(queue);
    pthread_mutex_lock(&backend->mutex);
    for (;;) {
        async_job *job = NULL;
        while (!queue->closing && (job = job_due(queue)) == NULL) {
            pthread_cond_wait(&backend->changed, &backend->mutex);
        }
        if (job == NULL) { /* closing */
            break;
        }
        queue->first = job->next;
        queue->last = queue->first == NULL ? NULL : queue->last;
        run_job(backend, queue, job);
        free(job);
        queue->done++;
        pthread_cond_broadcast(&backend->changed);
    }
    pthread_mutex_unlock(&backend->mutex);
    return NULL;
}

/* ---- putting ---- */

static ovlm_status job_new(int64_t args_bytes, async_job **job, ovlm_err *err)
{
    *job = calloc(1, sizeof **job + (size_t)args_bytes);
    return *job != NULL ? OVLM_OK : OVLM_FAIL(err, OVLM_E_NOMEM, "out of memory for a queued job");
}

/* Under the mutex. */
static void put_locked(async_backend *backend, async_queue *queue, async_job *job)
{
    if (queue->last != NULL) {
        queue->last->next = job;
    } else {
        queue->first = job;
    }
    queue->last = job;
    queue->put++;
    if (queue->put > BACKLOG) {
        hurry(backend, queue, queue->put - BACKLOG - 1);
    }
}

static void put(async_queue *queue, async_job *job)
{
    async_backend *backend = owner_of(queue);
    pthread_mutex_lock(&backend->mutex);
    put_locked(backend, queue, job);
    pthread_mutex_unlock(&backend->mutex);
}

static ovlm_status put_op(ovlm_queue *queue, ovlm_op op, ovlm_pass pass, const void *args,
                          ovlm_err *err)
{
    async_job *job;
    OVLM_TRY(ovlm_op_check(op, args, pass, err));
    OVLM_TRY(job_new(ovlm_op_args_bytes(op, pass, args), &job, err));
    job->kind = JOB_OP;
    job->op = op;
    job->pass = pass;
    ovlm_op_args_copy(op, pass, args, job->args);
    put(queue_of(queue), job);
    return OVLM_OK;
}

static ovlm_status async_copy(ovlm_queue *queue, void *to, const void *from, int64_t bytes,
                              ovlm_copy_kind kind, ovlm_err *err)
{
    async_job *job;
    OVLM_TRY(ovlm_copy_check(to, from, bytes, kind, err));
    OVLM_TRY(job_new(0, &job, err));
    *job = (async_job){.kind = JOB_COPY, .to = to, .from = from, .bytes = bytes,
                       .copy_kind = kind};
    put(queue_of(queue), job);
    return OVLM_OK;
}

static ovlm_status async_fill(ovlm_queue *queue, void *to, uint8_t byte, int64_t bytes,
                              ovlm_err *err)
{
    async_job *job;
    OVLM_TRY(ovlm_copy_check(to, to, bytes, OVLM_ON_DEVICE, err));
    OVLM_TRY(job_new(0, &job, err));
    *job = (async_job){.kind = JOB_FILL, .to = to, .byte = byte, .bytes = bytes};
    put(queue_of(queue), job);
    return OVLM_OK;
}

/* ---- queues ---- */

static ovlm_status async_queue_open(ovlm_backend *backend, ovlm_queue **out, ovlm_err *err)
{
    async_backend *self = backend_of(backend);
    async_queue *queue;
    ovlm_status status;
    *out = NULL;
    OVLM_TRY(OVLM_HEAP_NEW(&queue, 1, err));
    queue->base.backend = backend;
    OVLM_GOTO(failed, self->inner_ops->open(&self->options, &queue->inner, err));
    OVLM_GOTO(failed, self->inner_ops->queue_open(queue->inner, &queue->inner_queue, err));
    if (pthread_create(&queue->thread, NULL, work, queue) != 0) {
        status = OVLM_FAIL(err, OVLM_E_NOMEM, "the system refused a thread for the queue");
        goto failed;
    }
    *out = &queue->base;
    return OVLM_OK;
failed:
    if (queue->inner_queue != NULL) {
        self->inner_ops->queue_close(queue->inner_queue);
    }
    self->inner_ops->close(queue->inner);
    free(queue);
    return status;
}

/* Under the mutex. */
static void drain(async_backend *backend, async_queue *queue)
{
    uint64_t put = queue->put;
    queue->held = false;
    if (put > 0) {
        hurry(backend, queue, put - 1);
    }
    pthread_cond_broadcast(&backend->changed);
    while (queue->done < put) {
        pthread_cond_wait(&backend->changed, &backend->mutex);
    }
}

static void async_queue_close(ovlm_queue *queue)
{
    if (queue == NULL) {
        return;
    }
    async_queue *self = queue_of(queue);
    async_backend *backend = owner_of(self);
    pthread_mutex_lock(&backend->mutex);
    drain(backend, self);
    self->closing = true;
    pthread_cond_broadcast(&backend->changed);
    pthread_mutex_unlock(&backend->mutex);
    pthread_join(self->thread, NULL);
    backend->inner_ops->queue_close(self->inner_queue);
    backend->inner_ops->close(self->inner);
    free(self);
}

static ovlm_status async_queue_wait(ovlm_queue *queue, ovlm_err *err)
{
    async_queue *self = queue_of(queue);
    async_backend *backend = owner_of(self);
    pthread_mutex_lock(&backend->mutex);
    drain(backend, self);
    ovlm_status status = self->late.code;
    if (status != OVLM_OK && err != NULL) {
        *err = self->late;
    }
    self->late.code = OVLM_OK;
    pthread_mutex_unlock(&backend->mutex);
    return status;
}

void ovlm_async_hold(ovlm_queue *queue, bool hold)
{
    async_queue *self = queue_of(queue);
    async_backend *backend = owner_of(self);
    pthread_mutex_lock(&backend->mutex);
    self->held = hold;
    pthread_cond_broadcast(&backend->changed);
    pthread_mutex_unlock(&backend->mutex);
}

/* ---- events ---- */

static ovlm_status async_event_open(ovlm_backend *backend, ovlm_event **event, ovlm_err *err)
{
    *event = NULL;
    OVLM_TRY(OVLM_HEAP_NEW(event, 1, err));
    (*event)->backend = backend_of(backend);
    return OVLM_OK;
}

static void async_event_close(ovlm_backend *backend, ovlm_event *event)
{
    if (event == NULL) {
        return;
    }
    pthread_mutex_lock(&backend_of(backend)->mutex);
    mark_drop(event->mark);
    pthread_mutex_unlock(&backend_of(backend)->mutex);
    free(event);
}

static ovlm_status async_event_record(ovlm_event *event, ovlm_queue *queue, ovlm_err *err)
{
    async_queue *self = queue_of(queue);
    async_backend *backend = event->backend;
    async_mark *mark;
    async_job *job;
    OVLM_TRY(job_new(0, &job, err));
    mark = calloc(1, sizeof *mark);
    if (mark == NULL) {
        free(job);
        return OVLM_FAIL(err, OVLM_E_NOMEM, "out of memory for a recorded event");
    }
    pthread_mutex_lock(&backend->mutex);
    *mark = (async_mark){.holders = 2, .queue = self, .number = self->put};
    mark_drop(event->mark);
    event->mark = mark;
    job->kind = JOB_RECORD;
    job->mark = mark;
    put_locked(backend, self, job);
    pthread_mutex_unlock(&backend->mutex);
    return OVLM_OK;
}

static ovlm_status async_queue_follow(ovlm_queue *queue, ovlm_event *event, ovlm_err *err)
{
    async_backend *backend = event->backend;
    async_job *job;
    OVLM_TRY(job_new(0, &job, err));
    pthread_mutex_lock(&backend->mutex);
    if (event->mark == NULL) {
        free(job);
    } else {
        event->mark->holders++;
        job->kind = JOB_FOLLOW;
        job->mark = event->mark;
        put_locked(backend, queue_of(queue), job);
    }
    pthread_mutex_unlock(&backend->mutex);
    return OVLM_OK;
}

static ovlm_status async_event_wait(ovlm_event *event, ovlm_err *err)
{
    async_backend *backend = event->backend;
    (void)err;
    pthread_mutex_lock(&backend->mutex);
    async_mark *mark = event->mark;
    if (mark != NULL) {
        mark->holders++; /* another thread may record anew meanwhile */
        wait_for_mark(backend, mark);
        mark_drop(mark);
    }
    pthread_mutex_unlock(&backend->mutex);
    return OVLM_OK;
}

static bool async_event_done(ovlm_event *event)
{
    async_backend *backend = event->backend;
    pthread_mutex_lock(&backend->mutex);
    bool done = event->mark == NULL || event->mark->reached;
    if (!done) {
        hurry(backend, event->mark->queue, event->mark->number); /* else polling never ends */
    }
    pthread_mutex_unlock(&backend->mutex);
    return done;
}

/* ---- backend ---- */

static void async_close(ovlm_backend *backend)
{
    if (backend == NULL) {
        return;
    }
    async_backend *self = backend_of(backend);
    self->inner_ops->close(self->inner);
    ovlm_async_memory_free(&self->memory);
    pthread_cond_destroy(&self->changed);
    pthread_mutex_destroy(&self->mutex);
    free(self);
}

ovlm_status ovlm_async_open(const ovlm_ops *inner, const ovlm_backend_options *options,
                            ovlm_backend **backend, ovlm_err *err)
{
    async_backend *self;
    *backend = NULL;
    OVLM_TRY(OVLM_HEAP_NEW(&self, 1, err));
    self->base.ops = &ovlm_async_ops;
    self->inner_ops = inner;
    self->options = *options;
    ovlm_async_memory_init(&self->memory);
    pthread_mutex_init(&self->mutex, NULL);
    pthread_cond_init(&self->changed, NULL);
    ovlm_status status = inner->open(options, &self->inner, err);
    if (status == OVLM_OK && !self->inner->host_memory) {
        status = OVLM_FAIL(err, OVLM_E_ARG, "async needs an inner backend with host memory; %s has "
                           "memory of its own", inner->name);
    }
    if (status != OVLM_OK) {
        async_close(&self->base);
        return status;
    }
    *backend = &self->base;
    return OVLM_OK;
}

static ovlm_status async_open(const ovlm_backend_options *options, ovlm_backend **backend,
                              ovlm_err *err)
{
    return ovlm_async_open(ovlm_cpu_ops_find("cpu"), options, backend, err);
}

static ovlm_status async_describe(int64_t device, char *text, size_t text_bytes, ovlm_err *err)
{
    if (device != 0) {
        return OVLM_FAIL(err, OVLM_E_ARG, "device must be 0, the only one; got %lld",
                         (long long)device);
    }
    (void)snprintf(text, text_bytes, "CPU that behaves like a device, for tests");
    return OVLM_OK;
}

static ovlm_status async_alloc(ovlm_backend *backend, int64_t bytes, void **out, ovlm_err *err)
{
    return ovlm_async_memory_alloc(&backend_of(backend)->memory, bytes, out, err);
}

static void async_free(ovlm_backend *backend, void *memory)
{
    if (memory != NULL) {
        ovlm_async_memory_release(&backend_of(backend)->memory, memory);
    }
}

#define ASYNC_WRAP(op, type)                                                                    \
    static ovlm_status async_##op##_measure(ovlm_backend *backend, const type *a,               \
                                            ovlm_op_bytes *bytes, ovlm_err *err)                \
    {                                                                                           \
        async_backend *self = backend_of(backend);                                              \
        return self->inner_ops->op.measure(self->inner, a, bytes, err);                         \
    }                                                                                           \
    static ovlm_status async_##op##_prepare(ovlm_backend *backend, const type *a, ovlm_err *err) \
    {                                                                                           \
        async_backend *self = backend_of(backend);                                              \
        return self->inner_ops->op.prepare(self->inner, a, err);                                \
    }                                                                                           \
    static ovlm_status async_##op##_fwd(ovlm_queue *queue, const type *a, ovlm_err *err)        \
    {                                                                                           \
        return put_op(queue, OVLM_OP_##op, OVLM_PASS_FWD, a, err);                              \
    }
OVLM_OPS(ASYNC_WRAP)

#define ASYNC_WRAP_BACKWARD(op, type)                                                           \
    static ovlm_status async_##op##_bwd(ovlm_queue *queue, const type *a, ovlm_err *err)        \
    {                                                                                           \
        return put_op(queue, OVLM_OP_##op, OVLM_PASS_BWD, a, err);                              \
    }
OVLM_OPS_BOTH(ASYNC_WRAP_BACKWARD)

#define ASYNC_BOTH(op, type) \
    .op = {async_##op##_measure, async_##op##_prepare, async_##op##_fwd, async_##op##_bwd},
#define ASYNC_FORWARD(op, type) \
    .op = {async_##op##_measure, async_##op##_prepare, async_##op##_fwd, NULL},

const ovlm_ops ovlm_async_ops = {
    .abi = OVLM_BACKEND_ABI,
    .size_bytes = sizeof(ovlm_ops),
    .name = "async",
    .device_count = ovlm_host_device_count,
    .device_describe = async_describe,
    .open = async_open,
    .close = async_close,
    .alloc = async_alloc,
    .free = async_free,
    .host_alloc = ovlm_host_alloc,
    .host_free = ovlm_host_free,
    .queue_open = async_queue_open,
    .queue_close = async_queue_close,
    .queue_wait = async_queue_wait,
    .event_open = async_event_open,
    .event_close = async_event_close,
    .event_record = async_event_record,
    .queue_follow = async_queue_follow,
    .event_wait = async_event_wait,
    .event_done = async_event_done,
    .copy = async_copy,
    .fill = async_fill,
    OVLM_OPS_BOTH(ASYNC_BOTH)
    OVLM_OPS_FORWARD(ASYNC_FORWARD)
};
