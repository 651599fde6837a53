/* op_members.h - how op_tables_*.c write their tables down.  OP is the struct of the table. */
#ifndef OVLM_BACKEND_OP_MEMBERS_H
#define OVLM_BACKEND_OP_MEMBERS_H

#include "backend/op_schema.h"
#include "backend/tensor.h"
#include "base/status.h"

#include <math.h>

/* TENSOR(x, FLOAT, T, K, IN, UNUSED, more designated members). */
#define TENSOR(member, types, row_dim, col_dim, f, b, ...)                                    \
    {.name = #member, .offset = offsetof(OP, member), .kind = OVLM_MEMBER_TENSOR,             \
     .type = OVLM_TYPES_##types, .rows = row_dim, .cols = col_dim, .fwd = OVLM_##f,           \
     .bwd = OVLM_##b, __VA_ARGS__}
#define ARRAY(member, element, count_dim, f, b, ...)                                          \
    {.name = #member, .offset = offsetof(OP, member), .kind = OVLM_MEMBER_ARRAY,              \
     .type = element, .rows = count_dim, .fwd = OVLM_##f, .bwd = OVLM_##b, __VA_ARGS__}
#define HOST(member, element, count_dim, f, b)                                                \
    {.name = #member, .offset = offsetof(OP, member), .kind = OVLM_MEMBER_HOST,               \
     .type = element, .rows = count_dim, .fwd = OVLM_##f, .bwd = OVLM_##b, .optional = true}
#define SEGMENTS(member)                                                                      \
    {.name = #member, .offset = offsetof(OP, member), .kind = OVLM_MEMBER_SEGMENTS,           \
     .fwd = OVLM_IN, .bwd = OVLM_IN}
#define BETA(member, f, b)                                                                    \
    {.name = #member, .offset = offsetof(OP, member), .kind = OVLM_MEMBER_BETA,               \
     .fwd = OVLM_##f, .bwd = OVLM_##b}
#define OPTIONAL .optional = true

#define SCHEMA(op, op_type, dim_names, members)                                               \
    .name = #op, .args_bytes = sizeof(op_type), .dim_name = dim_names,                        \
    .member_n = (int)(sizeof members / sizeof *members), .member = members,                   \
    .scalars = op##_scalars, .dims = op##_dims

/* Scalars. */
#define REQUIRE(condition, ...)                        \
    do {                                               \
        if (!(condition)) {                            \
            return OVLM_FAIL(err, OVLM_E_ARG, __VA_ARGS__); \
        }                                              \
    } while (0)

/* A count whose products with others stay harmless. */
#define REQUIRE_COUNT(op, args, member, least)                                                \
    REQUIRE((args)->member >= (least) && (args)->member <= INT32_MAX,                         \
            op ": " #member " must be in [%d, 2^31); got %lld", (int)(least),                 \
            (long long)(args)->member)

#define REQUIRE_ACT(op, args)                                                                 \
    REQUIRE((unsigned)(args)->act <= (unsigned)OVLM_ACT_SILU,                                 \
            op ": act must be one of ovlm_act (0 to %d); got %d", (int)OVLM_ACT_SILU,         \
            (int)(args)->act)

/* Of tables in the other files. */
extern const ovlm_op_schema ovlm_schema_linear, ovlm_schema_grouped_linear, ovlm_schema_gated,
    ovlm_schema_norm, ovlm_schema_rope_table, ovlm_schema_rope, ovlm_schema_attention,
    ovlm_schema_merge, ovlm_schema_gather, ovlm_schema_scale, ovlm_schema_unfold,
    ovlm_schema_router, ovlm_schema_combine, ovlm_schema_balance_loss, ovlm_schema_targets,
    ovlm_schema_head, ovlm_schema_grad_norm, ovlm_schema_adamw;

#endif
