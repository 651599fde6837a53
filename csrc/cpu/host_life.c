/* host_life.c - memory, queues and events of backends that work at once. */
#include "cpu/host_life.h"

#include "base/arena.h"

#include <stdlib.h>
#include <string.h>

enum { HOST_ALIGN = 64 };

struct ovlm_event {
    ovlm_backend *backend;
};

ovlm_status ovlm_host_device_count(int64_t *count, ovlm_err *err)
{
    (void)err;
    *count = 1;
    return OVLM_OK;
}

ovlm_status ovlm_host_alloc(ovlm_backend *backend, int64_t bytes, void **out, ovlm_err *err)
{
    (void)backend;
    *out = NULL;
    if (bytes < 0) {
        return OVLM_FAIL(err, OVLM_E_ARG, "bytes must be >= 0; got %lld", (long long)bytes);
    }
    /* Exactly `bytes`, so that AddressSanitizer sees the first one beyond. */
    if (posix_memalign(out, HOST_ALIGN, bytes > 0 ? (size_t)bytes : 1) != 0) {
        *out = NULL;
        return OVLM_FAIL(err, OVLM_E_NOMEM, "out of memory: %lld bytes; use a smaller batch",
                         (long long)bytes);
    }
    return OVLM_OK;
}

void ovlm_host_free(ovlm_backend *backend, void *memory)
{
    (void)backend;
    free(memory);
}

ovlm_status ovlm_host_queue_open(ovlm_backend *backend, ovlm_queue **queue, ovlm_err *err)
{
    ovlm_host_queue *self;
    *queue = NULL;
    OVLM_TRY(OVLM_HEAP_NEW(&self, 1, err));
    self->base.backend = backend;
    *queue = &self->base;
    return OVLM_OK;
}

void ovlm_host_queue_close(ovlm_queue *queue)
{
    free(queue);
}

ovlm_status ovlm_host_queue_wait(ovlm_queue *queue, ovlm_err *err)
{
    ovlm_host_queue *self = (ovlm_host_queue *)(void *)queue;
    ovlm_status status = self->late.code;
    if (status != OVLM_OK && err != NULL) {
        *err = self->late;
    }
    self->late.code = OVLM_OK;
    return status;
}

void ovlm_host_fail_late(ovlm_queue *queue, const ovlm_err *late)
{
    ovlm_host_queue *self = (ovlm_host_queue *)(void *)queue;
    if (self->late.code == OVLM_OK) {
        self->late = *late;
    }
}

ovlm_status ovlm_host_event_open(ovlm_backend *backend, ovlm_event **event, ovlm_err *err)
{
    *event = NULL;
    OVLM_TRY(OVLM_HEAP_NEW(event, 1, err));
    (*event)->backend = backend;
    return OVLM_OK;
}

void ovlm_host_event_close(ovlm_backend *backend, ovlm_event *event)
{
    (void)backend;
    free(event);
}

ovlm_status ovlm_host_event_record(ovlm_event *event, ovlm_queue *queue, ovlm_err *err)
{
    (void)event;
    (void)queue;
    (void)err;
    return OVLM_OK;
}

ovlm_status ovlm_host_queue_follow(ovlm_queue *queue, ovlm_event *event, ovlm_err *err)
{
    return ovlm_host_event_record(event, queue, err);
}

ovlm_status ovlm_host_event_wait(ovlm_event *event, ovlm_err *err)
{
    (void)event;
    (void)err;
    return OVLM_OK;
}

bool ovlm_host_event_done(ovlm_event *event)
{
    (void)event;
    return true;
}

ovlm_status ovlm_copy_check(const void *to, const void *from, int64_t bytes, ovlm_copy_kind kind,
                            ovlm_err *err)
{
    if (bytes < 0) {
        return OVLM_FAIL(err, OVLM_E_ARG, "copy: bytes must be >= 0; got %lld", (long long)bytes);
    }
    if (bytes > 0 && (to == NULL || from == NULL)) {
        return OVLM_FAIL(err, OVLM_E_ARG, "copy: %s is NULL; it must hold %lld bytes",
                         to == NULL ? "to" : "from", (long long)bytes);
    }
    if ((unsigned)kind > (unsigned)OVLM_ON_DEVICE) {
        return OVLM_FAIL(err, OVLM_E_ARG, "copy: kind must be one of ovlm_copy_kind; got %d",
                         (int)kind);
    }
    return OVLM_OK;
}

ovlm_status ovlm_host_copy(ovlm_queue *queue, void *to, const void *from, int64_t bytes,
                           ovlm_copy_kind kind, ovlm_err *err)
{
    (void)queue;
    OVLM_TRY(ovlm_copy_check(to, from, bytes, kind, err));
    if (bytes > 0) {
        memmove(to, from, (size_t)bytes);
    }
    return OVLM_OK;
}

ovlm_status ovlm_host_fill(ovlm_queue *queue, void *to, uint8_t byte, int64_t bytes,
                           ovlm_err *err)
{
    (void)queue;
    OVLM_TRY(ovlm_copy_check(to, to, bytes, OVLM_ON_DEVICE, err));
    if (bytes > 0) {
        memset(to, byte, (size_t)bytes);
    }
    return OVLM_OK;
}
