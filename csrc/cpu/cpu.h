/* cpu.h - the CPU backends: `cpu` (fast) and `ref` (plain loops in double), `async` and `check`,
 * which wrap others.  Their tables, and what their operations share. */
#ifndef OVLM_CPU_CPU_H
#define OVLM_CPU_CPU_H

#include "backend/backend.h"
#include "backend/op_check.h"
#include "backend/tensor.h"
#include "base/status.h"
#include "base/threads.h"

/* The fast backend.  Operations run on the calling thread and its pool before they return. */
typedef struct ovlm_cpu {
    ovlm_backend base;
    ovlm_pool *pool;
    char *thread_scratch; /* OVLM_CPU_SCRATCH_BYTES per thread: packed panels, partial sums */
    const struct ovlm_gemm_code *gemm; /* this processor's matrix products */
} ovlm_cpu;

enum { OVLM_CPU_SCRATCH_BYTES = 4 << 20 };

static inline ovlm_cpu *ovlm_cpu_of(ovlm_queue *queue)
{
    return (ovlm_cpu *)(void *)queue->backend;
}

static inline void *ovlm_cpu_scratch(const ovlm_cpu *cpu, int64_t thread)
{
    return cpu->thread_scratch + thread * OVLM_CPU_SCRATCH_BYTES;
}

/* ovlm_cpu_linear_fwd, ovlm_ref_linear_fwd, ...: what the two tables point to. */
#define OVLM_CPU_DECLARE(op, args)                                                        \
    ovlm_status ovlm_cpu_##op##_measure(ovlm_backend *, const args *, ovlm_op_bytes *,    \
                                        ovlm_err *);                                      \
    ovlm_status ovlm_cpu_##op##_fwd(ovlm_queue *, const args *, ovlm_err *);              \
    ovlm_status ovlm_cpu_##op##_bwd(ovlm_queue *, const args *, ovlm_err *);              \
    ovlm_status ovlm_ref_##op##_measure(ovlm_backend *, const args *, ovlm_op_bytes *,    \
                                        ovlm_err *);                                      \
    ovlm_status ovlm_ref_##op##_fwd(ovlm_queue *, const args *, ovlm_err *);              \
    ovlm_status ovlm_ref_##op##_bwd(ovlm_queue *, const args *, ovlm_err *);
OVLM_OPS(OVLM_CPU_DECLARE)
#undef OVLM_CPU_DECLARE

/* The built-in tables, by name: "cpu", "ref", "async", "check"; NULL for others. */
const ovlm_ops *ovlm_cpu_ops_find(const char *name);

#endif
