/* ref_ops.c - the table of the reference backend. */
#include "cpu/ref.h"

#include "backend/op_schema.h"
#include "base/arena.h"

#include <stdio.h>
#include <stdlib.h>

static ovlm_status ref_describe(int64_t device, char *text, size_t text_bytes, ovlm_err *err)
{
    if (device != 0) {
        return OVLM_FAIL(err, OVLM_E_ARG, "device must be 0, the only one; got %lld",
                         (long long)device);
    }
    (void)snprintf(text, text_bytes, "reference: plain loops in double on one thread");
    return OVLM_OK;
}

static ovlm_status ref_open(const ovlm_backend_options *options, ovlm_backend **backend,
                            ovlm_err *err)
{
    (void)options;
    *backend = NULL;
    OVLM_TRY(OVLM_HEAP_NEW(backend, 1, err));
    (*backend)->ops = &ovlm_ref_ops;
    (*backend)->host_memory = true;
    return OVLM_OK;
}

static void ref_close(ovlm_backend *backend)
{
    free(backend);
}

/* There are no plans; what is wrong with the shapes is said here already. */
#define REF_PREPARE(op, args)                                                             \
    static ovlm_status ref_##op##_prepare(ovlm_backend *backend, const args *a, ovlm_err *err) \
    {                                                                                     \
        (void)backend;                                                                    \
        return ovlm_op_check_##op(a, OVLM_PASS_MEASURE, err);                             \
    }
OVLM_OPS(REF_PREPARE)

#define REF_BOTH(op, type)                                                   \
    .op = {ovlm_ref_##op##_measure, ref_##op##_prepare, ovlm_ref_##op##_fwd, \
           ovlm_ref_##op##_bwd},
#define REF_FORWARD(op, type) \
    .op = {ovlm_ref_##op##_measure, ref_##op##_prepare, ovlm_ref_##op##_fwd, NULL},

const ovlm_ops ovlm_ref_ops = {
    .abi = OVLM_BACKEND_ABI,
    .size_bytes = sizeof(ovlm_ops),
    .name = "ref",
    .device_describe = ref_describe,
    .open = ref_open,
    .close = ref_close,
    .alloc = ovlm_host_alloc,
    .free = ovlm_host_free,
    .host_alloc = ovlm_host_alloc,
    .host_free = ovlm_host_free,
    OVLM_HOST_LIFE,
    OVLM_OPS_BOTH(REF_BOTH)
    OVLM_OPS_FORWARD(REF_FORWARD)
};
