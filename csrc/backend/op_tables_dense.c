/* op_tables_dense.c - tables of the operations of a transformer block: linear, grouped_linear,
 * gated, norm, rope_table, rope, attention, merge. */
#include "backend/op_members.h"

/* Extents are taken from one member each, so that a message compares the others with it. */

static bool is_given(const ovlm_tensor *tensor)
{
    return ovlm_tensor_given(tensor);
}

/* ---- linear ---- */

#define OP ovlm_linear
enum { LINEAR_T = 1, LINEAR_K, LINEAR_N, LINEAR_W_ROWS, LINEAR_W_COLS };
static const char *const linear_dim_name[OVLM_DIMS_MOST] = {"1", "T", "K", "N", "N", "K"};

static bool linear_needs_x(const void *args, ovlm_pass pass)
{
    return pass != OVLM_PASS_BWD || is_given(&((const OP *)args)->dw);
}

static bool linear_needs_w(const void *args, ovlm_pass pass)
{
    return pass != OVLM_PASS_BWD || is_given(&((const OP *)args)->dx);
}

static bool linear_needs_pre(const void *args, ovlm_pass pass)
{
    return pass != OVLM_PASS_BWD || ((const OP *)args)->act != OVLM_ACT_NONE;
}

static const ovlm_member linear_members[] = {
    TENSOR(x, FLOAT, LINEAR_T, LINEAR_K, IN, IN, .when = linear_needs_x),
    TENSOR(w, FLOAT, LINEAR_W_ROWS, LINEAR_W_COLS, IN, IN, .when = linear_needs_w, .same = "x"),
    TENSOR(bias, FLOAT, OVLM_DIM_ONE, LINEAR_N, IN, UNUSED, OPTIONAL),
    TENSOR(pre, FLOAT, LINEAR_T, LINEAR_N, OUT, IN, OPTIONAL, .when = linear_needs_pre),
    TENSOR(add, FLOAT, LINEAR_T, LINEAR_N, IN, UNUSED, OPTIONAL, .alias = "y"),
    TENSOR(y, FLOAT, LINEAR_T, LINEAR_N, OUT, UNUSED),
    TENSOR(dy, FLOAT, LINEAR_T, LINEAR_N, UNUSED, IN),
    TENSOR(dx, FLOAT, LINEAR_T, LINEAR_K, UNUSED, INOUT, OPTIONAL, .same = "x"),
    TENSOR(dw, WIDE, LINEAR_W_ROWS, LINEAR_W_COLS, UNUSED, INOUT, OPTIONAL),
    TENSOR(dbias, WIDE, OVLM_DIM_ONE, LINEAR_N, UNUSED, INOUT, OPTIONAL),
    BETA(dx_beta, UNUSED, IN),
    BETA(dw_beta, UNUSED, IN),
};

static ovlm_status linear_scalars(const void *args, ovlm_pass pass, ovlm_err *err)
{
    (void)pass;
    REQUIRE_ACT("linear", (const OP *)args);
    return OVLM_OK;
}

static void linear_dims(const void *args, ovlm_pass pass, int64_t *dim)
{
    const OP *a = args;
    bool backward = pass == OVLM_PASS_BWD;
    dim[LINEAR_T] = backward ? a->dy.rows : a->x.rows;
    dim[LINEAR_N] = backward ? a->dy.cols : a->w_kn ? a->w.cols : a->w.rows;
    dim[LINEAR_K] = linear_needs_x(a, pass)   ? a->x.cols
                    : !linear_needs_w(a, pass) ? 0
                    : a->w_kn                 ? a->w.rows
                                              : a->w.cols;
    dim[LINEAR_W_ROWS] = a->w_kn ? dim[LINEAR_K] : dim[LINEAR_N];
    dim[LINEAR_W_COLS] = a->w_kn ? dim[LINEAR_N] : dim[LINEAR_K];
}

static ovlm_status linear_rules(const void *args, ovlm_pass pass, ovlm_err *err)
{
    const OP *a = args;
    REQUIRE(pass != OVLM_PASS_BWD || a->act == OVLM_ACT_NONE || is_given(&a->pre),
            "linear: pre is left out, but the backward of act %d needs it; give it to the forward",
            (int)a->act);
    return OVLM_OK;
}

const ovlm_op_schema ovlm_schema_linear = {
    SCHEMA(linear, OP, linear_dim_name, linear_members), .rules = linear_rules};
#undef OP

/* ---- grouped_linear ---- */

#define OP ovlm_grouped_linear
enum { GROUPED_T = 1, GROUPED_R, GROUPED_K, GROUPED_N, GROUPED_W_ROWS, GROUPED_W_COLS, GROUPED_E1 };
static const char *const grouped_linear_dim_name[OVLM_DIMS_MOST] = {
    "1", "T", "R", "K", "N", "E*N", "K", "E+1"};

static bool grouped_needs_x(const void *args, ovlm_pass pass)
{
    return pass != OVLM_PASS_BWD || is_given(&((const OP *)args)->dw);
}

static bool grouped_needs_w(const void *args, ovlm_pass pass)
{
    return pass != OVLM_PASS_BWD || is_given(&((const OP *)args)->dx);
}

static const ovlm_member grouped_linear_members[] = {
    ARRAY(offsets, OVLM_I32, GROUPED_E1, IN, IN),
    HOST(host_offsets, OVLM_I32, GROUPED_E1, IN, IN),
    ARRAY(index, OVLM_I32, GROUPED_R, IN, IN, OPTIONAL, .when = grouped_needs_x),
    TENSOR(x, FLOAT, GROUPED_T, GROUPED_K, IN, IN, .when = grouped_needs_x),
    TENSOR(w, FLOAT, GROUPED_W_ROWS, GROUPED_W_COLS, IN, IN, .when = grouped_needs_w,
           .same = "x"),
    TENSOR(y, FLOAT, GROUPED_R, GROUPED_N, OUT, UNUSED),
    TENSOR(dy, FLOAT, GROUPED_R, GROUPED_N, UNUSED, IN),
    TENSOR(dx, FLOAT, GROUPED_R, GROUPED_K, UNUSED, INOUT, OPTIONAL, .same = "x"),
    TENSOR(dw, WIDE, GROUPED_W_ROWS, GROUPED_W_COLS, UNUSED, INOUT, OPTIONAL),
    BETA(dx_beta, UNUSED, IN),
    BETA(dw_beta, UNUSED, IN),
};

static ovlm_status grouped_linear_scalars(const void *args, ovlm_pass pass, ovlm_err *err)
{
    (void)pass;
    REQUIRE_COUNT("grouped_linear", (const OP *)args, groups, 1);
    REQUIRE_COUNT("grouped_linear", (const OP *)args, first, 0);
    return OVLM_OK;
}

static void grouped_linear_dims(const void *args, ovlm_pass pass, int64_t *dim)
{
    const OP *a = args;
    bool backward = pass == OVLM_PASS_BWD;
    dim[GROUPED_T] = a->x.rows;
    dim[GROUPED_R] = backward ? a->dy.rows : a->y.rows;
    dim[GROUPED_N] = backward ? a->dy.cols : a->y.cols;
    dim[GROUPED_K] = grouped_needs_x(a, pass)   ? a->x.cols
                     : !grouped_needs_w(a, pass) ? 0
                     : a->w_kn                  ? a->w.rows / a->groups
                                                : a->w.cols;
    dim[GROUPED_W_ROWS] = ovlm_extent_mul(a->groups, dim[a->w_kn ? GROUPED_K : GROUPED_N]);
    dim[GROUPED_W_COLS] = dim[a->w_kn ? GROUPED_N : GROUPED_K];
    dim[GROUPED_E1] = a->groups + 1;
}

static ovlm_status grouped_linear_rules(const void *args, ovlm_pass pass, ovlm_err *err)
{
    const OP *a = args;
    int64_t rows = pass == OVLM_PASS_BWD ? a->dy.rows : a->y.rows;
    REQUIRE(rows <= INT32_MAX, "grouped_linear: %lld rows do not fit offsets of 32 bits; use fewer",
            (long long)rows);
    REQUIRE(a->index != NULL || pass == OVLM_PASS_MEASURE || !grouped_needs_x(a, pass) ||
                a->x.rows >= rows,
            "grouped_linear: x has %lld rows, but without index it needs one for each of the %lld "
            "rows of the result",
            (long long)a->x.rows, (long long)rows);
    return OVLM_OK;
}

const ovlm_op_schema ovlm_schema_grouped_linear = {
    SCHEMA(grouped_linear, OP, grouped_linear_dim_name, grouped_linear_members),
    .rules = grouped_linear_rules};
#undef OP

/* ---- gated ---- */

#define OP ovlm_gated
enum { GATED_T = 1, GATED_F, GATED_2F };
static const char *const gated_dim_name[OVLM_DIMS_MOST] = {"1", "T", "F", "2*F (F alone)"};

static const ovlm_member gated_members[] = {
    TENSOR(gate_up, FLOAT, GATED_T, GATED_2F, IN, IN),
    TENSOR(y, FLOAT, GATED_T, GATED_F, OUT, UNUSED),
    TENSOR(dy, FLOAT, GATED_T, GATED_F, UNUSED, IN),
    TENSOR(dgate_up, FLOAT, GATED_T, GATED_2F, UNUSED, OUT, .same = "gate_up",
           .alias = "gate_up"),
};

static ovlm_status gated_scalars(const void *args, ovlm_pass pass, ovlm_err *err)
{
    (void)pass;
    REQUIRE_ACT("gated", (const OP *)args);
    return OVLM_OK;
}

static void gated_dims(const void *args, ovlm_pass pass, int64_t *dim)
{
    const OP *a = args;
    dim[GATED_T] = a->gate_up.rows;
    dim[GATED_F] = pass == OVLM_PASS_BWD ? a->dy.cols : a->y.cols;
    dim[GATED_2F] = ovlm_extent_mul(a->alone ? 1 : 2, dim[GATED_F]);
}

const ovlm_op_schema ovlm_schema_gated = {SCHEMA(gated, OP, gated_dim_name, gated_members)};
#undef OP

/* ---- norm ---- */

#define OP ovlm_norm
enum { NORM_T = 1, NORM_C, NORM_CG };
static const char *const norm_dim_name[OVLM_DIMS_MOST] = {"1", "T", "C", "C/groups"};

static const ovlm_member norm_members[] = {
    TENSOR(x, FLOAT, NORM_T, NORM_C, IN, IN),
    TENSOR(w, FLOAT, OVLM_DIM_ONE, NORM_CG, IN, IN),
    TENSOR(bias, FLOAT, OVLM_DIM_ONE, NORM_CG, IN, UNUSED, OPTIONAL),
    TENSOR(y, FLOAT, NORM_T, NORM_C, OUT, UNUSED),
    TENSOR(dy, FLOAT, NORM_T, NORM_C, UNUSED, IN),
    TENSOR(dx, FLOAT, NORM_T, NORM_C, UNUSED, INOUT, OPTIONAL, .same = "x"),
    TENSOR(dw, WIDE, OVLM_DIM_ONE, NORM_CG, UNUSED, INOUT, OPTIONAL),
    TENSOR(dbias, WIDE, OVLM_DIM_ONE, NORM_CG, UNUSED, INOUT, OPTIONAL),
    BETA(dx_beta, UNUSED, IN),
    BETA(dw_beta, UNUSED, IN),
};

static ovlm_status norm_scalars(const void *args, ovlm_pass pass, ovlm_err *err)
{
    const OP *a = args;
    (void)pass;
    REQUIRE_COUNT("norm", a, groups, 1);
    REQUIRE(a->eps >= 0 && isfinite(a->eps), "norm: eps must be finite and >= 0; got %g", a->eps);
    REQUIRE(a->x.cols % a->groups == 0, "norm: groups = %lld must divide x's %lld columns",
            (long long)a->groups, (long long)a->x.cols);
    return OVLM_OK;
}

static void norm_dims(const void *args, ovlm_pass pass, int64_t *dim)
{
    const OP *a = args;
    (void)pass;
    dim[NORM_T] = a->x.rows;
    dim[NORM_C] = a->x.cols;
    dim[NORM_CG] = a->x.cols / a->groups;
}

const ovlm_op_schema ovlm_schema_norm = {SCHEMA(norm, OP, norm_dim_name, norm_members)};
#undef OP

/* ---- rope_table ---- */

#define OP ovlm_rope_table
enum { TABLE_A = 1, TABLE_T, TABLE_R };
static const char *const rope_table_dim_name[OVLM_DIMS_MOST] = {"1", "A", "T", "R"};

static const ovlm_member rope_table_members[] = {
    TENSOR(position, WIDE, TABLE_A, TABLE_T, IN, UNUSED, .may_be_empty = true),
    TENSOR(frequency, WIDE, OVLM_DIM_ONE, TABLE_R, IN, UNUSED),
    ARRAY(axis, OVLM_I32, TABLE_R, IN, UNUSED),
    TENSOR(cos, WIDE, TABLE_T, TABLE_R, OUT, UNUSED),
    TENSOR(sin, WIDE, TABLE_T, TABLE_R, OUT, UNUSED),
};

static ovlm_status rope_table_scalars(const void *args, ovlm_pass pass, ovlm_err *err)
{
    (void)args;
    (void)pass;
    (void)err;
    return OVLM_OK;
}

static void rope_table_dims(const void *args, ovlm_pass pass, int64_t *dim)
{
    const OP *a = args;
    (void)pass;
    dim[TABLE_A] = a->position.rows;
    dim[TABLE_T] = a->position.cols;
    dim[TABLE_R] = a->frequency.cols;
}

const ovlm_op_schema ovlm_schema_rope_table = {
    SCHEMA(rope_table, OP, rope_table_dim_name, rope_table_members)};
#undef OP

/* ---- rope ---- */

#define OP ovlm_rope
enum { ROPE_T = 1, ROPE_HD, ROPE_D, ROPE_R };
static const char *const rope_dim_name[OVLM_DIMS_MOST] = {"1", "T", "heads*D", "D", "R"};

/* A rotation alone is undone from dy; the norm's backward reads x and w. */
static bool rope_needs_x(const void *args, ovlm_pass pass)
{
    return pass != OVLM_PASS_BWD || is_given(&((const OP *)args)->w);
}

static const ovlm_member rope_members[] = {
    TENSOR(x, FLOAT, ROPE_T, ROPE_HD, IN, IN, .when = rope_needs_x),
    TENSOR(w, FLOAT, OVLM_DIM_ONE, ROPE_D, IN, IN, OPTIONAL),
    TENSOR(cos, WIDE, ROPE_T, ROPE_R, IN, IN),
    TENSOR(sin, WIDE, ROPE_T, ROPE_R, IN, IN),
    TENSOR(y, FLOAT, ROPE_T, ROPE_HD, OUT, UNUSED, .same = "x", .alias = "x"),
    TENSOR(dy, FLOAT, ROPE_T, ROPE_HD, UNUSED, IN),
    TENSOR(dx, FLOAT, ROPE_T, ROPE_HD, UNUSED, OUT, OPTIONAL, .same = "x", .alias = "dy"),
    TENSOR(dw, WIDE, OVLM_DIM_ONE, ROPE_D, UNUSED, INOUT, OPTIONAL),
    BETA(dw_beta, UNUSED, IN),
};

static ovlm_status rope_scalars(const void *args, ovlm_pass pass, ovlm_err *err)
{
    const OP *a = args;
    int64_t cols = pass == OVLM_PASS_BWD ? a->dy.cols : a->x.cols;
    REQUIRE_COUNT("rope", a, heads, 1);
    REQUIRE(a->eps >= 0 && isfinite(a->eps), "rope: eps must be finite and >= 0; got %g", a->eps);
    REQUIRE(cols % a->heads == 0, "rope: heads = %lld must divide the %lld columns",
            (long long)a->heads, (long long)cols);
    REQUIRE(a->cos.cols <= cols / a->heads / 2,
            "rope: cos has %lld columns, which turn twice as many elements of a head of %lld; give "
            "at most half",
            (long long)a->cos.cols, (long long)(cols / a->heads));
    return OVLM_OK;
}

static void rope_dims(const void *args, ovlm_pass pass, int64_t *dim)
{
    const OP *a = args;
    bool backward = pass == OVLM_PASS_BWD;
    dim[ROPE_T] = backward ? a->dy.rows : a->x.rows;
    dim[ROPE_HD] = backward ? a->dy.cols : a->x.cols;
    dim[ROPE_D] = dim[ROPE_HD] / a->heads;
    dim[ROPE_R] = a->cos.cols;
}

static ovlm_status rope_rules(const void *args, ovlm_pass pass, ovlm_err *err)
{
    const OP *a = args;
    bool norm = is_given(&a->w);
    REQUIRE(pass != OVLM_PASS_FWD || !norm || a->y.data != a->x.data || a->x.data == NULL ||
                a->x.rows == 0, /* tensors without rows may share an address */
            "rope: y may be x only without w; the norm's backward needs x");
    REQUIRE(pass != OVLM_PASS_BWD || norm || !is_given(&a->dw),
            "rope: dw is given, but w is left out; leave both out or give both");
    return OVLM_OK;
}

const ovlm_op_schema ovlm_schema_rope = {SCHEMA(rope, OP, rope_dim_name, rope_members),
                                         .rules = rope_rules};
#undef OP

/* ---- attention ---- */

#define OP ovlm_attention
enum {
    ATTENTION_TQ = 1, ATTENTION_TK, ATTENTION_HD, ATTENTION_GD, ATTENTION_GDV, ATTENTION_HDV,
    ATTENTION_H
};
static const char *const attention_dim_name[OVLM_DIMS_MOST] = {
    "1", "Tq", "Tk", "heads*D", "kv_heads*D", "kv_heads*Dv", "heads*Dv", "heads"};

static const ovlm_member attention_members[] = {
    SEGMENTS(query),
    SEGMENTS(key),
    TENSOR(q, FLOAT, ATTENTION_TQ, ATTENTION_HD, IN, IN),
    TENSOR(k, FLOAT, ATTENTION_TK, ATTENTION_GD, IN, IN, .same = "q"),
    TENSOR(v, FLOAT, ATTENTION_TK, ATTENTION_GDV, IN, IN, .same = "q"),
    TENSOR(o, FLOAT, ATTENTION_TQ, ATTENTION_HDV, OUT, IN, .same = "q"),
    TENSOR(lse, WIDE, ATTENTION_TQ, ATTENTION_H, OUT, IN, OPTIONAL),
    TENSOR(dout, FLOAT, ATTENTION_TQ, ATTENTION_HDV, UNUSED, IN, .same = "q"),
    TENSOR(dq, FLOAT, ATTENTION_TQ, ATTENTION_HD, UNUSED, OUT, OPTIONAL, .same = "q"),
    TENSOR(dk, FLOAT, ATTENTION_TK, ATTENTION_GD, UNUSED, OUT, OPTIONAL, .same = "q"),
    TENSOR(dv, FLOAT, ATTENTION_TK, ATTENTION_GDV, UNUSED, OUT, OPTIONAL, .same = "q"),
};

static ovlm_status attention_scalars(const void *args, ovlm_pass pass, ovlm_err *err)
{
    const OP *a = args;
    (void)pass;
    REQUIRE_COUNT("attention", a, heads, 1);
    REQUIRE_COUNT("attention", a, kv_heads, 1);
    REQUIRE(a->heads % a->kv_heads == 0, "attention: kv_heads = %lld must divide heads = %lld",
            (long long)a->kv_heads, (long long)a->heads);
    REQUIRE(isfinite(a->scale), "attention: scale must be finite; got %g", a->scale);
    REQUIRE(a->query.n == a->key.n,
            "attention: %lld query segments meet %lld key segments; give as many of each",
            (long long)a->query.n, (long long)a->key.n);
    REQUIRE(a->q.cols % a->heads == 0, "attention: heads = %lld must divide q's %lld columns",
            (long long)a->heads, (long long)a->q.cols);
    REQUIRE(a->v.cols % a->kv_heads == 0, "attention: kv_heads = %lld must divide v's %lld columns",
            (long long)a->kv_heads, (long long)a->v.cols);
    return OVLM_OK;
}

static void attention_dims(const void *args, ovlm_pass pass, int64_t *dim)
{
    const OP *a = args;
    (void)pass;
    dim[ATTENTION_TQ] = a->q.rows;
    dim[ATTENTION_TK] = a->k.rows;
    dim[ATTENTION_HD] = a->q.cols;
    dim[ATTENTION_GD] = ovlm_extent_mul(a->q.cols / a->heads, a->kv_heads);
    dim[ATTENTION_GDV] = a->v.cols;
    dim[ATTENTION_HDV] = ovlm_extent_mul(a->v.cols / a->kv_heads, a->heads);
    dim[ATTENTION_H] = a->heads;
}

const ovlm_op_schema ovlm_schema_attention = {
    SCHEMA(attention, OP, attention_dim_name, attention_members)};
#undef OP

/* ---- merge ---- */

#define OP ovlm_merge
enum { MERGE_T = 1, MERGE_HDV, MERGE_H };
static const char *const merge_dim_name[OVLM_DIMS_MOST] = {"1", "T", "heads*Dv", "heads"};

static const ovlm_member merge_members[] = {
    TENSOR(o, WIDE, MERGE_T, MERGE_HDV, INOUT, UNUSED),
    TENSOR(lse, WIDE, MERGE_T, MERGE_H, INOUT, UNUSED),
    TENSOR(part, FLOAT, MERGE_T, MERGE_HDV, IN, UNUSED),
    TENSOR(part_lse, WIDE, MERGE_T, MERGE_H, IN, UNUSED),
};

static ovlm_status merge_scalars(const void *args, ovlm_pass pass, ovlm_err *err)
{
    const OP *a = args;
    (void)pass;
    REQUIRE_COUNT("merge", a, heads, 1);
    REQUIRE(a->o.cols % a->heads == 0, "merge: heads = %lld must divide o's %lld columns",
            (long long)a->heads, (long long)a->o.cols);
    return OVLM_OK;
}

static void merge_dims(const void *args, ovlm_pass pass, int64_t *dim)
{
    const OP *a = args;
    (void)pass;
    dim[MERGE_T] = a->o.rows;
    dim[MERGE_HDV] = a->o.cols;
    dim[MERGE_H] = a->heads;
}

const ovlm_op_schema ovlm_schema_merge = {SCHEMA(merge, OP, merge_dim_name, merge_members)};
#undef OP
