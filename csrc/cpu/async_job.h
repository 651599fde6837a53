/* async_job.h - an operation that waits in a queue of the `async` backend: arguments copied with
 * all that they point to on the host, device addresses translated when it runs. */
#ifndef OVLM_CPU_ASYNC_JOB_H
#define OVLM_CPU_ASYNC_JOB_H

#include "backend/op_schema.h"
#include "cpu/async_memory.h"

/* Bytes of a copy. */
int64_t ovlm_async_args_bytes(ovlm_op op, ovlm_pass pass, const void *args);

/* Copies the arguments into `to`, 16-byte aligned. */
void ovlm_async_args_copy(ovlm_op op, ovlm_pass pass, const void *args, void *to);

/* Replaces the device addresses in such a copy, under the memory's reader lock, and poisons the
 * scratch of the call.  OVLM_E_BACKEND names the member that is no good. */
ovlm_status ovlm_async_args_translate(const ovlm_async_memory *memory, const ovlm_ops *inner,
                                      ovlm_backend *backend, ovlm_op op, ovlm_pass pass,
                                      void *args, ovlm_err *err);

#endif
