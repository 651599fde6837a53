/* async_job.h - an operation of the `async` backend comes to run: its device addresses are
 * translated. */
#ifndef OVLM_CPU_ASYNC_JOB_H
#define OVLM_CPU_ASYNC_JOB_H

#include "backend/op_schema.h"
#include "cpu/async_memory.h"

/* Replaces the device addresses in a copy of arguments (ovlm_op_args_copy), under the memory's
 * reader lock, and poisons the scratch of the call.  OVLM_E_BACKEND names the member that is no
 * good. */
ovlm_status ovlm_async_args_translate(const ovlm_async_memory *memory, const ovlm_ops *inner,
                                      ovlm_backend *backend, ovlm_op op, ovlm_pass pass,
                                      void *args, ovlm_err *err);

#endif
