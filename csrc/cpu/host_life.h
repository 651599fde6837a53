/* host_life.h - life cycle of backends whose work is done when the call returns: memory is the
 * host's, a queue only keeps its first late error, an event is always done. */
#ifndef OVLM_CPU_HOST_LIFE_H
#define OVLM_CPU_HOST_LIFE_H

#include "backend/backend.h"
#include "base/status.h"

typedef struct ovlm_host_queue {
    ovlm_queue base;
    ovlm_err late; /* code OVLM_OK: none */
} ovlm_host_queue;

/* Members of a table. */
ovlm_status ovlm_host_device_count(int64_t *count, ovlm_err *err);
ovlm_status ovlm_host_alloc(ovlm_backend *backend, int64_t bytes, void **out, ovlm_err *err);
void ovlm_host_free(ovlm_backend *backend, void *memory);
ovlm_status ovlm_host_queue_open(ovlm_backend *backend, ovlm_queue **queue, ovlm_err *err);
void ovlm_host_queue_close(ovlm_queue *queue);
ovlm_status ovlm_host_queue_wait(ovlm_queue *queue, ovlm_err *err);
ovlm_status ovlm_host_event_open(ovlm_backend *backend, ovlm_event **event, ovlm_err *err);
void ovlm_host_event_close(ovlm_backend *backend, ovlm_event *event);
ovlm_status ovlm_host_event_record(ovlm_event *event, ovlm_queue *queue, ovlm_err *err);
ovlm_status ovlm_host_queue_follow(ovlm_queue *queue, ovlm_event *event, ovlm_err *err);
ovlm_status ovlm_host_event_wait(ovlm_event *event, ovlm_err *err);
bool ovlm_host_event_done(ovlm_event *event);
ovlm_status ovlm_host_copy(ovlm_queue *queue, void *to, const void *from, int64_t bytes,
                           ovlm_copy_kind kind, ovlm_err *err);
ovlm_status ovlm_host_fill(ovlm_queue *queue, void *to, uint8_t byte, int64_t bytes,
                           ovlm_err *err);

/* Keeps a late error, unless there is one already. */
void ovlm_host_fail_late(ovlm_queue *queue, const ovlm_err *late);

/* Refuses a copy or fill that no backend can do; `to` and `from` may be any address. */
ovlm_status ovlm_copy_check(const void *to, const void *from, int64_t bytes, ovlm_copy_kind kind,
                            ovlm_err *err);

/* Of a table: the device, queues, events and copies. */
#define OVLM_HOST_LIFE                                                                  \
    .device_count = ovlm_host_device_count, .queue_open = ovlm_host_queue_open,         \
    .queue_close = ovlm_host_queue_close, .queue_wait = ovlm_host_queue_wait,           \
    .event_open = ovlm_host_event_open, .event_close = ovlm_host_event_close,           \
    .event_record = ovlm_host_event_record, .queue_follow = ovlm_host_queue_follow,     \
    .event_wait = ovlm_host_event_wait, .event_done = ovlm_host_event_done,             \
    .copy = ovlm_host_copy, .fill = ovlm_host_fill

#endif
