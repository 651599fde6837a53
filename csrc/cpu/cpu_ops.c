/* cpu_ops.c - the table of the fast CPU backend. */
#include "cpu/cpu_device.h"
#include "cpu/host_life.h"

/* Nothing to plan or tune: the code was chosen when the backend was opened. */
#define PREPARE(op, args)                                                                       \
    static ovlm_status prepare_##op(ovlm_backend *backend, const args *a, ovlm_err *err)        \
    {                                                                                           \
        (void)backend;                                                                          \
        (void)a;                                                                                \
        (void)err;                                                                              \
        return OVLM_OK;                                                                         \
    }
OVLM_OPS(PREPARE)

static ovlm_status open_cpu(const ovlm_backend_options *options, ovlm_backend **backend,
                            ovlm_err *err)
{
    return ovlm_cpu_open_with(&ovlm_cpu_ops, options, backend, err);
}

#define FORWARD(op) {ovlm_cpu_##op##_measure, prepare_##op, ovlm_cpu_##op##_fwd, NULL}
#define BOTH(op) \
    {ovlm_cpu_##op##_measure, prepare_##op, ovlm_cpu_##op##_fwd, ovlm_cpu_##op##_bwd}

const ovlm_ops ovlm_cpu_ops = {
    .abi = OVLM_BACKEND_ABI,
    .size_bytes = sizeof(ovlm_ops),
    .name = "cpu",
    .device_describe = ovlm_cpu_device_describe,
    .open = open_cpu,
    .close = ovlm_cpu_close,
    .alloc = ovlm_cpu_alloc,
    .free = ovlm_cpu_free,
    .host_alloc = ovlm_cpu_alloc,
    .host_free = ovlm_cpu_free,
    OVLM_HOST_LIFE,
    .linear = BOTH(linear),
    .grouped_linear = BOTH(grouped_linear),
    .gated = BOTH(gated),
    .norm = BOTH(norm),
    .rope_table = FORWARD(rope_table),
    .rope = BOTH(rope),
    .attention = BOTH(attention),
    .merge = FORWARD(merge),
    .gather = BOTH(gather),
    .scale = BOTH(scale),
    .unfold = BOTH(unfold),
    .router = BOTH(router),
    .combine = BOTH(combine),
    .balance_loss = FORWARD(balance_loss),
    .targets = FORWARD(targets),
    .head = BOTH(head),
    .grad_norm = FORWARD(grad_norm),
    .adamw = FORWARD(adamw),
};
