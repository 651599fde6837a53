/* check.c - life cycle of the backend that compares: the tested backend's, with the reference
 * beside it. */
#include "cpu/check.h"

#include "base/arena.h"
#include "cpu/ref.h"

#include <stdio.h>
#include <stdlib.h>

typedef struct check_backend {
    ovlm_backend base;
    const ovlm_ops *ops; /* the tested one's */
    ovlm_backend *tested, *reference;
} check_backend;

typedef struct check_queue {
    ovlm_host_queue host; /* backend and late error */
    ovlm_queue *tested, *reference;
} check_queue;

struct ovlm_event {
    const ovlm_ops *ops;
    ovlm_event *inner;
};

static check_backend *backend_of(ovlm_backend *backend)
{
    return (check_backend *)(void *)backend;
}

static check_queue *queue_of(ovlm_queue *queue)
{
    return (check_queue *)(void *)queue;
}

static const ovlm_ops *ops_of(ovlm_queue *queue)
{
    return backend_of(queue->backend)->ops;
}

static ovlm_status check_op(ovlm_queue *queue, ovlm_op op, ovlm_pass pass, const void *args,
                            ovlm_err *err)
{
    const check_queue *self = queue_of(queue);
    ovlm_err late = {0};
    ovlm_status status = ovlm_check_run(ops_of(queue), self->tested, self->reference, op, pass,
                                        args, &late);
    if (status == OVLM_E_ARG || status == OVLM_E_NOMEM) { /* refused: nothing has run */
        if (err != NULL) {
            *err = late;
        }
        return status;
    }
    if (status != OVLM_OK) {
        ovlm_host_fail_late(queue, &late);
    }
    return OVLM_OK;
}

/* ---- life cycle: the tested backend's ---- */

static void check_close(ovlm_backend *backend)
{
    if (backend == NULL) {
        return;
    }
    check_backend *self = backend_of(backend);
    self->ops->close(self->tested);
    ovlm_ref_ops.close(self->reference);
    free(self);
}

ovlm_status ovlm_check_open(const ovlm_ops *tested, const ovlm_backend_options *options,
                            ovlm_backend **backend, ovlm_err *err)
{
    check_backend *self;
    ovlm_status status;
    *backend = NULL;
    OVLM_TRY(OVLM_HEAP_NEW(&self, 1, err));
    self->base.ops = &ovlm_check_ops;
    self->ops = tested;
    OVLM_GOTO(failed, tested->open(options, &self->tested, err));
    OVLM_GOTO(failed, ovlm_ref_ops.open(options, &self->reference, err));
    self->base.host_memory = self->tested->host_memory;
    *backend = &self->base;
    return OVLM_OK;
failed:
    check_close(&self->base);
    return status;
}

static ovlm_status check_open(const ovlm_backend_options *options, ovlm_backend **backend,
                              ovlm_err *err)
{
    return ovlm_check_open(ovlm_cpu_ops_find("cpu"), options, backend, err);
}

static ovlm_status check_describe(int64_t device, char *text, size_t text_bytes, ovlm_err *err)
{
    if (device != 0) {
        return OVLM_FAIL(err, OVLM_E_ARG, "device must be 0, the only one; got %lld",
                         (long long)device);
    }
    (void)snprintf(text, text_bytes, "CPU beside the reference, operation by operation");
    return OVLM_OK;
}

static ovlm_status check_alloc(ovlm_backend *backend, int64_t bytes, void **out, ovlm_err *err)
{
    return backend_of(backend)->ops->alloc(backend_of(backend)->tested, bytes, out, err);
}

static void check_free(ovlm_backend *backend, void *memory)
{
    backend_of(backend)->ops->free(backend_of(backend)->tested, memory);
}

static ovlm_status check_host_alloc(ovlm_backend *backend, int64_t bytes, void **out,
                                    ovlm_err *err)
{
    return backend_of(backend)->ops->host_alloc(backend_of(backend)->tested, bytes, out, err);
}

static void check_host_free(ovlm_backend *backend, void *memory)
{
    backend_of(backend)->ops->host_free(backend_of(backend)->tested, memory);
}

static void check_queue_close(ovlm_queue *queue)
{
    if (queue == NULL) {
        return;
    }
    check_queue *self = queue_of(queue);
    if (self->tested != NULL) {
        ops_of(queue)->queue_close(self->tested);
    }
    ovlm_host_queue_close(self->reference);
    free(self);
}

static ovlm_status check_queue_open(ovlm_backend *backend, ovlm_queue **queue, ovlm_err *err)
{
    check_backend *owner = backend_of(backend);
    check_queue *self;
    ovlm_status status;
    *queue = NULL;
    OVLM_TRY(OVLM_HEAP_NEW(&self, 1, err));
    self->host.base.backend = backend;
    OVLM_GOTO(failed, owner->ops->queue_open(owner->tested, &self->tested, err));
    OVLM_GOTO(failed, ovlm_host_queue_open(owner->reference, &self->reference, err));
    *queue = &self->host.base;
    return OVLM_OK;
failed:
    check_queue_close(&self->host.base);
    return status;
}

static ovlm_status check_queue_wait(ovlm_queue *queue, ovlm_err *err)
{
    ovlm_status status = ovlm_host_queue_wait(queue, err);
    ovlm_status tested = ops_of(queue)->queue_wait(queue_of(queue)->tested,
                                                   status == OVLM_OK ? err : NULL);
    return status != OVLM_OK ? status : tested;
}

static ovlm_status check_event_open(ovlm_backend *backend, ovlm_event **event, ovlm_err *err)
{
    check_backend *owner = backend_of(backend);
    *event = NULL;
    OVLM_TRY(OVLM_HEAP_NEW(event, 1, err));
    (*event)->ops = owner->ops;
    ovlm_status status = owner->ops->event_open(owner->tested, &(*event)->inner, err);
    if (status != OVLM_OK) {
        free(*event);
        *event = NULL;
    }
    return status;
}

static void check_event_close(ovlm_backend *backend, ovlm_event *event)
{
    if (event != NULL) {
        event->ops->event_close(backend_of(backend)->tested, event->inner);
        free(event);
    }
}

static ovlm_status check_event_record(ovlm_event *event, ovlm_queue *queue, ovlm_err *err)
{
    return event->ops->event_record(event->inner, queue_of(queue)->tested, err);
}

static ovlm_status check_queue_follow(ovlm_queue *queue, ovlm_event *event, ovlm_err *err)
{
    return event->ops->queue_follow(queue_of(queue)->tested, event->inner, err);
}

static ovlm_status check_event_wait(ovlm_event *event, ovlm_err *err)
{
    return event->ops->event_wait(event->inner, err);
}

static bool check_event_done(ovlm_event *event)
{
    return event->ops->event_done(event->inner);
}

static ovlm_status check_copy(ovlm_queue *queue, void *to, const void *from, int64_t bytes,
                              ovlm_copy_kind kind, ovlm_err *err)
{
    return ops_of(queue)->copy(queue_of(queue)->tested, to, from, bytes, kind, err);
}

static ovlm_status check_fill(ovlm_queue *queue, void *to, uint8_t byte, int64_t bytes,
                              ovlm_err *err)
{
    return ops_of(queue)->fill(queue_of(queue)->tested, to, byte, bytes, err);
}

#define CHECK_WRAP(op, type)                                                                    \
    static ovlm_status check_##op##_measure(ovlm_backend *backend, const type *a,               \
                                            ovlm_op_bytes *bytes, ovlm_err *err)                \
    {                                                                                           \
        check_backend *self = backend_of(backend);                                              \
        return self->ops->op.measure(self->tested, a, bytes, err);                              \
    }                                                                                           \
    static ovlm_status check_##op##_prepare(ovlm_backend *backend, const type *a, ovlm_err *err) \
    {                                                                                           \
        check_backend *self = backend_of(backend);                                              \
        return self->ops->op.prepare(self->tested, a, err);                                     \
    }                                                                                           \
    static ovlm_status check_##op##_fwd(ovlm_queue *queue, const type *a, ovlm_err *err)        \
    {                                                                                           \
        return check_op(queue, OVLM_OP_##op, OVLM_PASS_FWD, a, err);                            \
    }
OVLM_OPS(CHECK_WRAP)

#define CHECK_WRAP_BACKWARD(op, type)                                                           \
    static ovlm_status check_##op##_bwd(ovlm_queue *queue, const type *a, ovlm_err *err)        \
    {                                                                                           \
        return check_op(queue, OVLM_OP_##op, OVLM_PASS_BWD, a, err);                              \
    }
OVLM_OPS_BOTH(CHECK_WRAP_BACKWARD)

#define CHECK_BOTH(op, type) \
    .op = {check_##op##_measure, check_##op##_prepare, check_##op##_fwd, check_##op##_bwd},
#define CHECK_FORWARD(op, type) \
    .op = {check_##op##_measure, check_##op##_prepare, check_##op##_fwd, NULL},

const ovlm_ops ovlm_check_ops = {
    .abi = OVLM_BACKEND_ABI,
    .size_bytes = sizeof(ovlm_ops),
    .name = "check",
    .device_count = ovlm_host_device_count,
    .device_describe = check_describe,
    .open = check_open,
    .close = check_close,
    .alloc = check_alloc,
    .free = check_free,
    .host_alloc = check_host_alloc,
    .host_free = check_host_free,
    .queue_open = check_queue_open,
    .queue_close = check_queue_close,
    .queue_wait = check_queue_wait,
    .event_open = check_event_open,
    .event_close = check_event_close,
    .event_record = check_event_record,
    .queue_follow = check_queue_follow,
    .event_wait = check_event_wait,
    .event_done = check_event_done,
    .copy = check_copy,
    .fill = check_fill,
    OVLM_OPS_BOTH(CHECK_BOTH)
    OVLM_OPS_FORWARD(CHECK_FORWARD)
};
