/* cpu_device.h - the fast backend's devices and memory; its queues and events are those of
 * host_life.h. */
#ifndef OVLM_CPU_CPU_DEVICE_H
#define OVLM_CPU_CPU_DEVICE_H

#include "cpu/cpu.h"

/* The table; of the fast backend. */
extern const ovlm_ops ovlm_cpu_ops;

ovlm_status ovlm_cpu_device_describe(int64_t device, char *text, size_t text_bytes,
                                     ovlm_err *err);

/* A backend with this table; ovlm_cpu_close ends it. */
ovlm_status ovlm_cpu_open_with(const ovlm_ops *ops, const ovlm_backend_options *options,
                               ovlm_backend **backend, ovlm_err *err);
void ovlm_cpu_close(ovlm_backend *backend);

ovlm_status ovlm_cpu_alloc(ovlm_backend *backend, int64_t bytes, void **out, ovlm_err *err);
void ovlm_cpu_free(ovlm_backend *backend, void *memory);

#endif
