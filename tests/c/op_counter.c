/* op_counter.c - a backend that wraps another's operations. */
#include "op_counter.h"

#include "backend/op_schema.h"
#include "cpu/cpu.h"
#include "cpu/cpu_device.h"

enum { PLANS_MOST = 1 << 12 };

static ovlm_ops counter;
static const ovlm_ops *inner;
static op_count seen;
static int64_t plans;
static uint64_t plan[PLANS_MOST];

/* Of the operation and its extents (FNV-1a). */
static uint64_t key_of(ovlm_op op, const void *args)
{
    int64_t dim[OVLM_DIMS_MOST] = {1};
    uint64_t key = 14695981039346656037u ^ (uint64_t)op;
    ovlm_op_schemas[op]->dims(args, OVLM_PASS_FWD, dim);
    for (int i = 0; i < OVLM_DIMS_MOST; i++) {
        key = (key ^ (uint64_t)dim[i]) * 1099511628211u;
    }
    return key;
}

static bool planned(uint64_t key)
{
    int64_t i = 0;
    while (i < plans && plan[i] != key) {
        i++;
    }
    return i < plans;
}

static void note_plan(ovlm_op op, const void *args)
{
    uint64_t key = key_of(op, args);
    if (!planned(key) && plans < PLANS_MOST) {
        plan[plans++] = key;
    }
}

static void note_run(ovlm_op op, const char *name, const void *args)
{
    seen.run++;
    if (!planned(key_of(op, args))) {
        seen.unprepared++;
        seen.first = seen.first == NULL ? name : seen.first;
    }
}

#define WRAP(op, type)                                                                         \
    static ovlm_status count_##op##_prepare(ovlm_backend *backend, const type *a, ovlm_err *err) \
    {                                                                                          \
        note_plan(OVLM_OP_##op, a);                                                            \
        return inner->op.prepare(backend, a, err);                                             \
    }                                                                                          \
    static ovlm_status count_##op##_fwd(ovlm_queue *queue, const type *a, ovlm_err *err)       \
    {                                                                                          \
        note_run(OVLM_OP_##op, #op, a);                                                        \
        return inner->op.fwd(queue, a, err);                                                   \
    }
OVLM_OPS(WRAP)

#define WRAP_BACKWARD(op, type)                                                                \
    static ovlm_status count_##op##_bwd(ovlm_queue *queue, const type *a, ovlm_err *err)       \
    {                                                                                          \
        note_run(OVLM_OP_##op, #op " backward", a);                                            \
        return inner->op.bwd(queue, a, err);                                                   \
    }
OVLM_OPS_BOTH(WRAP_BACKWARD)

static ovlm_status counter_open(const ovlm_backend_options *options, ovlm_backend **backend,
                                ovlm_err *err)
{
    return ovlm_cpu_open_with(&counter, options, backend, err);
}

const ovlm_ops *op_counter_ops(void)
{
    inner = ovlm_cpu_ops_find("cpu");
    counter = *inner;
    counter.open = counter_open;
#define SET(op, type)                         \
    counter.op.prepare = count_##op##_prepare; \
    counter.op.fwd = count_##op##_fwd;
    OVLM_OPS(SET)
#define SET_BACKWARD(op, type) counter.op.bwd = count_##op##_bwd;
    OVLM_OPS_BOTH(SET_BACKWARD)
    seen = (op_count){0};
    plans = 0;
    return &counter;
}

op_count op_counter_read(void)
{
    return seen;
}
