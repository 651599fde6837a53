/* op_schema.c - calls by number, and the roles of a call. */
#include "backend/op_schema.h"

#include "backend/op_members.h"

const ovlm_op_schema *const ovlm_op_schemas[OVLM_OP_COUNT] = {
#define OVLM_SCHEMA_OF(op, type) &ovlm_schema_##op,
    OVLM_OPS(OVLM_SCHEMA_OF)
#undef OVLM_SCHEMA_OF
};

ovlm_role ovlm_member_role(const ovlm_member *member, const void *args, ovlm_pass pass)
{
    ovlm_role role = pass == OVLM_PASS_BWD ? member->bwd : member->fwd;
    if (role != OVLM_UNUSED && member->when != NULL && !member->when(args, pass)) {
        return OVLM_UNUSED;
    }
    return role;
}

int64_t ovlm_element_bytes(int type)
{
    return type == OVLM_ELEMENT_STATS ? (int64_t)sizeof(ovlm_grad_stats)
                                      : ovlm_dtype_bytes((ovlm_dtype)type);
}

int64_t ovlm_extent_mul(int64_t a, int64_t b)
{
    if (a < 0 || b < 0 || (a > 0 && b > INT64_MAX / a)) {
        return INT64_MAX;
    }
    return a * b;
}

ovlm_status ovlm_op_check(ovlm_op op, const void *args, ovlm_pass pass, ovlm_err *err)
{
    switch (op) {
#define OVLM_CHECK_CASE(op, type) case OVLM_OP_##op: return ovlm_op_check_##op(args, pass, err);
        OVLM_OPS(OVLM_CHECK_CASE)
#undef OVLM_CHECK_CASE
    case OVLM_OP_COUNT: break;
    }
    return OVLM_FAIL(err, OVLM_E_ARG, "there is no operation %d", (int)op);
}

ovlm_status ovlm_op_measure(const ovlm_ops *ops, ovlm_op op, ovlm_backend *backend,
                            const void *args, ovlm_op_bytes *bytes, ovlm_err *err)
{
    switch (op) {
#define OVLM_MEASURE_CASE(op, type) \
    case OVLM_OP_##op: return ops->op.measure(backend, args, bytes, err);
        OVLM_OPS(OVLM_MEASURE_CASE)
#undef OVLM_MEASURE_CASE
    case OVLM_OP_COUNT: break;
    }
    return OVLM_FAIL(err, OVLM_E_ARG, "there is no operation %d", (int)op);
}

ovlm_status ovlm_op_prepare(const ovlm_ops *ops, ovlm_op op, ovlm_backend *backend,
                            const void *args, ovlm_err *err)
{
    switch (op) {
#define OVLM_PREPARE_CASE(op, type) \
    case OVLM_OP_##op: return ops->op.prepare(backend, args, err);
        OVLM_OPS(OVLM_PREPARE_CASE)
#undef OVLM_PREPARE_CASE
    case OVLM_OP_COUNT: break;
    }
    return OVLM_FAIL(err, OVLM_E_ARG, "there is no operation %d", (int)op);
}

ovlm_status ovlm_op_run(const ovlm_ops *ops, ovlm_op op, ovlm_pass pass, ovlm_queue *queue,
                        const void *args, ovlm_err *err)
{
    switch (op) {
#define OVLM_RUN_CASE(op, type)                                              \
    case OVLM_OP_##op:                                                       \
        if (pass == OVLM_PASS_BWD && ops->op.bwd != NULL) {                  \
            return ops->op.bwd(queue, args, err);                            \
        }                                                                    \
        if (pass == OVLM_PASS_FWD && ops->op.fwd != NULL) {                  \
            return ops->op.fwd(queue, args, err);                            \
        }                                                                    \
        return OVLM_FAIL(err, OVLM_E_ARG, "%s: %s does not have that pass", #op, ops->name);
        OVLM_OPS(OVLM_RUN_CASE)
#undef OVLM_RUN_CASE
    case OVLM_OP_COUNT: break;
    }
    return OVLM_FAIL(err, OVLM_E_ARG, "there is no operation %d", (int)op);
}
