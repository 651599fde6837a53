/* op_schema.h - what the members of an operation's argument struct are: which are tensors or device
 * arrays, of which extent, and what each pass does with them.
 *
 * The validator, `async` and `check` are written once over these tables, so a new operation needs
 * its struct, its table here and its implementations.  A pass reads and writes only what its roles
 * say; other members may be left out or stale. */
#ifndef OVLM_BACKEND_OP_SCHEMA_H
#define OVLM_BACKEND_OP_SCHEMA_H

#include "backend/backend.h"
#include "backend/op_check.h"

typedef enum ovlm_role {
    OVLM_UNUSED = 0,
    OVLM_IN = 1,
    OVLM_OUT = 2, /* parts of it may stay as they were */
    OVLM_INOUT = 3
} ovlm_role;

typedef enum ovlm_member_kind {
    OVLM_MEMBER_TENSOR,   /* ovlm_tensor                              */
    OVLM_MEMBER_ARRAY,    /* pointer to `rows` elements on the device */
    OVLM_MEMBER_HOST,     /* the same on the host, read by the call   */
    OVLM_MEMBER_SEGMENTS, /* ovlm_segments                            */
    OVLM_MEMBER_BETA      /* float, 0 or 1                            */
} ovlm_member_kind;

/* Element types of arrays beyond ovlm_dtype. */
enum { OVLM_ELEMENT_STATS = OVLM_DTYPE_COUNT };

/* Sets of dtypes that a tensor may have. */
enum {
    OVLM_TYPES_FLOAT = 1 << OVLM_F32 | 1 << OVLM_BF16 | 1 << OVLM_F64,
    OVLM_TYPES_WIDE = 1 << OVLM_F32 | 1 << OVLM_F64, /* what ops.h calls float32 */
    OVLM_TYPES_PIXEL = OVLM_TYPES_FLOAT | 1 << OVLM_U8
};

enum { OVLM_DIMS_MOST = 12, OVLM_MEMBERS_MOST = 20 };

/* Extents by number: OVLM_DIM_ONE, then an operation's own. */
enum { OVLM_DIM_ONE = 0 };

typedef struct ovlm_member {
    const char *name;
    size_t offset;
    ovlm_member_kind kind;
    int type;             /* tensor: set of dtypes; array: element type                    */
    int rows, cols;       /* numbers of extents; an array has rows only                    */
    ovlm_role fwd, bwd;
    bool optional;
    bool may_be_empty;    /* a tensor with cols = 0 is not left out but empty              */
    const char *same;     /* member whose dtype it must have                               */
    const char *alias;    /* member that it may be, exactly                                */
    bool (*when)(const void *args, ovlm_pass pass); /* false: not used by this call        */
} ovlm_member;

typedef struct ovlm_op_schema {
    const char *name;
    size_t args_bytes;
    const char *const *dim_name; /* [OVLM_DIMS_MOST] */
    int member_n;
    const ovlm_member *member;
    /* Checks scalars, which the extents divide by. */
    ovlm_status (*scalars)(const void *args, ovlm_pass pass, ovlm_err *err);
    /* Fills dim[OVLM_DIMS_MOST]; dim[0] is 1 already. */
    void (*dims)(const void *args, ovlm_pass pass, int64_t *dim);
    /* What no table says; may be NULL. */
    ovlm_status (*rules)(const void *args, ovlm_pass pass, ovlm_err *err);
    /* Operations on a host list of structs of tensors, `n` of them; list_bytes = 0: none.  The
     * extents of its members are those of the first one. */
    size_t list_offset, list_bytes, n_offset;
    int list_member_n;
    const ovlm_member *list_member;
} ovlm_op_schema;

extern const ovlm_op_schema *const ovlm_op_schemas[OVLM_OP_COUNT];

/* OVLM_OPS in two parts: operations with a backward, and without. */
#define OVLM_OPS_BOTH(X)                  \
    X(linear, ovlm_linear)                \
    X(grouped_linear, ovlm_grouped_linear)\
    X(gated, ovlm_gated)                  \
    X(norm, ovlm_norm)                    \
    X(rope, ovlm_rope)                    \
    X(attention, ovlm_attention)          \
    X(gather, ovlm_gather)                \
    X(scale, ovlm_scale)                  \
    X(unfold, ovlm_unfold)                \
    X(router, ovlm_router)                \
    X(combine, ovlm_combine)              \
    X(head, ovlm_head)
#define OVLM_OPS_FORWARD(X)               \
    X(rope_table, ovlm_rope_table)        \
    X(merge, ovlm_merge)                  \
    X(balance_loss, ovlm_balance_loss)    \
    X(targets, ovlm_targets)              \
    X(grad_norm, ovlm_grad_norm)          \
    X(adamw, ovlm_adamw)

/* What this call does with the member. */
ovlm_role ovlm_member_role(const ovlm_member *member, const void *args, ovlm_pass pass);

static inline void *ovlm_member_at(const ovlm_member *member, const void *args)
{
    return (char *)(uintptr_t)args + member->offset;
}

int64_t ovlm_element_bytes(int type);

/* a*b, or INT64_MAX where that does not fit or either is negative. */
int64_t ovlm_extent_mul(int64_t a, int64_t b);

/* A copy of valid arguments with all that they point to on the host (mirrors, lists), so that the
 * call can run later: its size, and the copy into `to`, 16-byte aligned. */
int64_t ovlm_op_args_bytes(ovlm_op op, ovlm_pass pass, const void *args);
void ovlm_op_args_copy(ovlm_op op, ovlm_pass pass, const void *args, void *to);

/* Calls an operation by number. */
ovlm_status ovlm_op_check(ovlm_op op, const void *args, ovlm_pass pass, ovlm_err *err);
ovlm_status ovlm_op_measure(const ovlm_ops *ops, ovlm_op op, ovlm_backend *backend,
                            const void *args, ovlm_op_bytes *bytes, ovlm_err *err);
ovlm_status ovlm_op_prepare(const ovlm_ops *ops, ovlm_op op, ovlm_backend *backend,
                            const void *args, ovlm_err *err);
ovlm_status ovlm_op_run(const ovlm_ops *ops, ovlm_op op, ovlm_pass pass, ovlm_queue *queue,
                        const void *args, ovlm_err *err);

#endif
