/* cpu_device.h - life cycle, memory, queues and events of the CPU backends.  Work runs before a
 * call returns, so queues and events have nothing to remember. */
#ifndef OVLM_CPU_CPU_DEVICE_H
#define OVLM_CPU_CPU_DEVICE_H

#include "cpu/cpu.h"

/* The table; of the fast backend. */
extern const ovlm_ops ovlm_cpu_ops;

ovlm_status ovlm_cpu_device_count(int64_t *count, ovlm_err *err);
ovlm_status ovlm_cpu_device_describe(int64_t device, char *text, size_t text_bytes,
                                     ovlm_err *err);

/* A backend with this table; ovlm_cpu_close ends it. */
ovlm_status ovlm_cpu_open_with(const ovlm_ops *ops, const ovlm_backend_options *options,
                               ovlm_backend **backend, ovlm_err *err);
void ovlm_cpu_close(ovlm_backend *backend);

ovlm_status ovlm_cpu_alloc(ovlm_backend *backend, int64_t bytes, void **out, ovlm_err *err);
void ovlm_cpu_free(ovlm_backend *backend, void *memory);

ovlm_status ovlm_cpu_queue_open(ovlm_backend *backend, ovlm_queue **queue, ovlm_err *err);
void ovlm_cpu_queue_close(ovlm_queue *queue);
ovlm_status ovlm_cpu_queue_wait(ovlm_queue *queue, ovlm_err *err);

ovlm_status ovlm_cpu_event_open(ovlm_backend *backend, ovlm_event **event, ovlm_err *err);
void ovlm_cpu_event_close(ovlm_backend *backend, ovlm_event *event);
ovlm_status ovlm_cpu_event_record(ovlm_event *event, ovlm_queue *queue, ovlm_err *err);
ovlm_status ovlm_cpu_queue_follow(ovlm_queue *queue, ovlm_event *event, ovlm_err *err);
ovlm_status ovlm_cpu_event_wait(ovlm_event *event, ovlm_err *err);
bool ovlm_cpu_event_done(ovlm_event *event);

ovlm_status ovlm_cpu_copy(ovlm_queue *queue, void *to, const void *from, int64_t bytes,
                          ovlm_copy_kind kind, ovlm_err *err);
ovlm_status ovlm_cpu_fill(ovlm_queue *queue, void *to, uint8_t byte, int64_t bytes,
                          ovlm_err *err);

#endif
