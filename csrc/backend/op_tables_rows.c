/* op_tables_rows.c - tables of the operations that move, weigh and score rows, and of the
 * optimizer: gather, scale, unfold, router, combine, balance_loss, targets, head, grad_norm,
 * adamw. */
#include "backend/op_members.h"

static ovlm_status no_scalars(const void *args, ovlm_pass pass, ovlm_err *err)
{
    (void)args;
    (void)pass;
    (void)err;
    return OVLM_OK;
}

/* ---- gather ---- */

#define OP ovlm_gather
enum { GATHER_T = 1, GATHER_S, GATHER_C, GATHER_TAPS, GATHER_T_TAPS };
static const char *const gather_dim_name[OVLM_DIMS_MOST] = {"1", "T", "S", "C", "taps", "T*taps"};

static const ovlm_member gather_members[] = {
    ARRAY(index, OVLM_I32, GATHER_T_TAPS, IN, IN),
    TENSOR(weight, WIDE, GATHER_T, GATHER_TAPS, IN, IN, OPTIONAL),
    TENSOR(x, FLOAT, GATHER_S, GATHER_C, IN, UNUSED),
    TENSOR(y, FLOAT, GATHER_T, GATHER_C, INOUT, UNUSED),
    BETA(y_beta, IN, UNUSED),
    TENSOR(dy, FLOAT, GATHER_T, GATHER_C, UNUSED, IN),
    TENSOR(dx, FLOAT, GATHER_S, GATHER_C, UNUSED, INOUT),
    BETA(dx_beta, UNUSED, IN),
};

static ovlm_status gather_scalars(const void *args, ovlm_pass pass, ovlm_err *err)
{
    (void)pass;
    REQUIRE_COUNT("gather", (const OP *)args, taps, 1);
    return OVLM_OK;
}

static void gather_dims(const void *args, ovlm_pass pass, int64_t *dim)
{
    const OP *a = args;
    bool backward = pass == OVLM_PASS_BWD;
    dim[GATHER_T] = backward ? a->dy.rows : a->y.rows;
    dim[GATHER_S] = backward ? a->dx.rows : a->x.rows;
    dim[GATHER_C] = backward ? a->dx.cols : a->x.cols;
    dim[GATHER_TAPS] = a->taps;
    dim[GATHER_T_TAPS] = ovlm_extent_mul(dim[GATHER_T], a->taps);
}

static ovlm_status gather_rules(const void *args, ovlm_pass pass, ovlm_err *err)
{
    const OP *a = args;
    int64_t rows = pass == OVLM_PASS_BWD ? a->dx.rows : a->x.rows;
    REQUIRE(rows <= INT32_MAX, "gather: x's %lld rows do not fit an index of 32 bits; use fewer",
            (long long)rows);
    return OVLM_OK;
}

const ovlm_op_schema ovlm_schema_gather = {SCHEMA(gather, OP, gather_dim_name, gather_members),
                                           .rules = gather_rules};
#undef OP

/* ---- scale ---- */

#define OP ovlm_scale
enum { SCALE_T = 1, SCALE_C };
static const char *const scale_dim_name[OVLM_DIMS_MOST] = {"1", "T", "C"};

static const ovlm_member scale_members[] = {
    TENSOR(scale, WIDE, OVLM_DIM_ONE, SCALE_C, IN, IN, OPTIONAL),
    TENSOR(shift, WIDE, OVLM_DIM_ONE, SCALE_C, IN, UNUSED, OPTIONAL),
    TENSOR(x, PIXEL, SCALE_T, SCALE_C, IN, UNUSED),
    TENSOR(y, FLOAT, SCALE_T, SCALE_C, INOUT, UNUSED, .alias = "x"),
    TENSOR(dy, FLOAT, SCALE_T, SCALE_C, UNUSED, IN),
    TENSOR(dx, FLOAT, SCALE_T, SCALE_C, UNUSED, INOUT),
    BETA(dx_beta, UNUSED, IN),
};

static ovlm_status scale_scalars(const void *args, ovlm_pass pass, ovlm_err *err)
{
    const OP *a = args;
    (void)pass;
    REQUIRE(isfinite(a->alpha), "scale: alpha must be finite; got %g", a->alpha);
    REQUIRE(isfinite(a->beta), "scale: beta must be finite; got %g", a->beta);
    return OVLM_OK;
}

static void scale_dims(const void *args, ovlm_pass pass, int64_t *dim)
{
    const OP *a = args;
    bool backward = pass == OVLM_PASS_BWD;
    dim[SCALE_T] = backward ? a->dx.rows : a->x.rows;
    dim[SCALE_C] = backward ? a->dx.cols : a->x.cols;
}

const ovlm_op_schema ovlm_schema_scale = {SCHEMA(scale, OP, scale_dim_name, scale_members)};
#undef OP

/* ---- unfold ---- */

#define OP ovlm_unfold
enum { UNFOLD_PIXELS = 1, UNFOLD_C, UNFOLD_PATCHES, UNFOLD_PATCH };
static const char *const unfold_dim_name[OVLM_DIMS_MOST] = {
    "1", "images*height*width", "C", "images*out_h*out_w", "C*kernel_height*kernel_width"};

static const ovlm_member unfold_members[] = {
    TENSOR(x, FLOAT, UNFOLD_PIXELS, UNFOLD_C, IN, UNUSED),
    TENSOR(y, FLOAT, UNFOLD_PATCHES, UNFOLD_PATCH, OUT, UNUSED, .same = "x"),
    TENSOR(dy, FLOAT, UNFOLD_PATCHES, UNFOLD_PATCH, UNUSED, IN),
    TENSOR(dx, FLOAT, UNFOLD_PIXELS, UNFOLD_C, UNUSED, OUT, .same = "dy"),
};

static ovlm_status unfold_scalars(const void *args, ovlm_pass pass, ovlm_err *err)
{
    const OP *a = args;
    (void)pass;
    REQUIRE_COUNT("unfold", a, images, 0);
    REQUIRE_COUNT("unfold", a, height, 1);
    REQUIRE_COUNT("unfold", a, width, 1);
    REQUIRE_COUNT("unfold", a, kernel_height, 1);
    REQUIRE_COUNT("unfold", a, kernel_width, 1);
    REQUIRE_COUNT("unfold", a, stride, 1);
    REQUIRE_COUNT("unfold", a, padding, 0);
    REQUIRE(a->kernel_height <= a->height + 2 * a->padding &&
                a->kernel_width <= a->width + 2 * a->padding,
            "unfold: a kernel of %lld x %lld is larger than the padded image of %lld x %lld",
            (long long)a->kernel_height, (long long)a->kernel_width,
            (long long)(a->height + 2 * a->padding), (long long)(a->width + 2 * a->padding));
    return OVLM_OK;
}

static void unfold_dims(const void *args, ovlm_pass pass, int64_t *dim)
{
    const OP *a = args;
    int64_t out_h = (a->height + 2 * a->padding - a->kernel_height) / a->stride + 1;
    int64_t out_w = (a->width + 2 * a->padding - a->kernel_width) / a->stride + 1;
    dim[UNFOLD_PIXELS] = ovlm_extent_mul(a->images, ovlm_extent_mul(a->height, a->width));
    dim[UNFOLD_C] = pass == OVLM_PASS_BWD ? a->dx.cols : a->x.cols;
    dim[UNFOLD_PATCHES] = ovlm_extent_mul(a->images, ovlm_extent_mul(out_h, out_w));
    dim[UNFOLD_PATCH] =
        ovlm_extent_mul(dim[UNFOLD_C], ovlm_extent_mul(a->kernel_height, a->kernel_width));
}

const ovlm_op_schema ovlm_schema_unfold = {SCHEMA(unfold, OP, unfold_dim_name, unfold_members)};
#undef OP

/* ---- router ---- */

#define OP ovlm_router
enum { ROUTER_T = 1, ROUTER_E, ROUTER_K, ROUTER_TK, ROUTER_E1 };
static const char *const router_dim_name[OVLM_DIMS_MOST] = {"1", "T", "E", "k", "T*k", "E+1"};

static const ovlm_member router_members[] = {
    TENSOR(logits, WIDE, ROUTER_T, ROUTER_E, IN, IN),
    TENSOR(bias, WIDE, OVLM_DIM_ONE, ROUTER_E, IN, UNUSED, OPTIONAL),
    ARRAY(expert, OVLM_I32, ROUTER_TK, INOUT, IN),
    TENSOR(weight, WIDE, ROUTER_T, ROUTER_K, OUT, UNUSED),
    ARRAY(row, OVLM_I32, ROUTER_TK, OUT, UNUSED),
    ARRAY(token, OVLM_I32, ROUTER_TK, OUT, UNUSED),
    ARRAY(offsets, OVLM_I32, ROUTER_E1, OUT, UNUSED),
    ARRAY(count, OVLM_I64, ROUTER_E, INOUT, UNUSED, OPTIONAL),
    ARRAY(score_sum, OVLM_F64, ROUTER_E, INOUT, UNUSED, OPTIONAL),
    TENSOR(dweight, WIDE, ROUTER_T, ROUTER_K, UNUSED, IN),
    TENSOR(aux, WIDE, OVLM_DIM_ONE, ROUTER_E, UNUSED, IN, OPTIONAL),
    TENSOR(dlogits, WIDE, ROUTER_T, ROUTER_E, UNUSED, OUT),
};

static ovlm_status router_scalars(const void *args, ovlm_pass pass, ovlm_err *err)
{
    const OP *a = args;
    (void)pass;
    int64_t experts = a->logits.cols;
    REQUIRE_COUNT("router", a, k, 1);
    REQUIRE_COUNT("router", a, teams, 1);
    REQUIRE(isfinite(a->scale), "router: scale must be finite; got %g", a->scale);
    REQUIRE(a->k <= experts, "router: k = %lld is more than the %lld experts", (long long)a->k,
            (long long)experts);
    REQUIRE(experts % a->teams == 0, "router: teams = %lld must divide the %lld experts",
            (long long)a->teams, (long long)experts);
    REQUIRE(a->teams == 1 || (a->limit >= 1 && a->limit <= a->teams),
            "router: limit must be in [1, teams = %lld]; got %lld", (long long)a->teams,
            (long long)a->limit);
    REQUIRE(a->teams == 1 || a->k <= a->limit * (experts / a->teams),
            "router: k = %lld is more than the %lld experts of limit = %lld teams", (long long)a->k,
            (long long)(a->limit * (experts / a->teams)), (long long)a->limit);
    return OVLM_OK;
}

static void router_dims(const void *args, ovlm_pass pass, int64_t *dim)
{
    const OP *a = args;
    (void)pass;
    dim[ROUTER_T] = a->logits.rows;
    dim[ROUTER_E] = a->logits.cols;
    dim[ROUTER_K] = a->k;
    dim[ROUTER_TK] = ovlm_extent_mul(a->logits.rows, a->k);
    dim[ROUTER_E1] = a->logits.cols + 1;
}

static ovlm_status router_rules(const void *args, ovlm_pass pass, ovlm_err *err)
{
    const OP *a = args;
    (void)pass;
    REQUIRE(ovlm_extent_mul(a->logits.rows, a->k) <= INT32_MAX,
            "router: %lld tokens x k = %lld slots do not fit rows of 32 bits; use fewer tokens",
            (long long)a->logits.rows, (long long)a->k);
    return OVLM_OK;
}

const ovlm_op_schema ovlm_schema_router = {SCHEMA(router, OP, router_dim_name, router_members),
                                           .rules = router_rules};
#undef OP

/* ---- combine ---- */

#define OP ovlm_combine
enum { COMBINE_T = 1, COMBINE_C, COMBINE_R, COMBINE_K, COMBINE_TK };
static const char *const combine_dim_name[OVLM_DIMS_MOST] = {"1", "T", "C", "R", "k", "T*k"};

static bool combine_needs_h(const void *args, ovlm_pass pass)
{
    return pass != OVLM_PASS_BWD || ovlm_tensor_given(&((const OP *)args)->dweight);
}

static const ovlm_member combine_members[] = {
    ARRAY(row, OVLM_I32, COMBINE_TK, IN, IN),
    TENSOR(weight, WIDE, COMBINE_T, COMBINE_K, IN, IN, OPTIONAL),
    TENSOR(h, FLOAT, COMBINE_R, COMBINE_C, IN, IN, .when = combine_needs_h),
    TENSOR(add, FLOAT, COMBINE_T, COMBINE_C, IN, UNUSED, OPTIONAL, .alias = "y"),
    TENSOR(y, FLOAT, COMBINE_T, COMBINE_C, OUT, UNUSED),
    TENSOR(dy, FLOAT, COMBINE_T, COMBINE_C, UNUSED, IN),
    TENSOR(dh, FLOAT, COMBINE_R, COMBINE_C, UNUSED, OUT, OPTIONAL, .same = "h"),
    TENSOR(dweight, WIDE, COMBINE_T, COMBINE_K, UNUSED, OUT, OPTIONAL),
};

static ovlm_status combine_scalars(const void *args, ovlm_pass pass, ovlm_err *err)
{
    (void)pass;
    REQUIRE_COUNT("combine", (const OP *)args, k, 1);
    REQUIRE_COUNT("combine", (const OP *)args, first, 0);
    return OVLM_OK;
}

static void combine_dims(const void *args, ovlm_pass pass, int64_t *dim)
{
    const OP *a = args;
    bool backward = pass == OVLM_PASS_BWD;
    dim[COMBINE_T] = backward ? a->dy.rows : a->y.rows;
    dim[COMBINE_C] = backward ? a->dy.cols : a->y.cols;
    dim[COMBINE_R] = combine_needs_h(a, pass) ? a->h.rows : a->dh.rows;
    dim[COMBINE_K] = a->k;
    dim[COMBINE_TK] = ovlm_extent_mul(dim[COMBINE_T], a->k);
}

const ovlm_op_schema ovlm_schema_combine = {
    SCHEMA(combine, OP, combine_dim_name, combine_members)};
#undef OP

/* ---- balance_loss ---- */

#define OP ovlm_balance_loss
enum { BALANCE_E = 1 };
static const char *const balance_loss_dim_name[OVLM_DIMS_MOST] = {"1", "E"};

static const ovlm_member balance_loss_members[] = {
    ARRAY(count, OVLM_I64, BALANCE_E, IN, UNUSED),
    ARRAY(score_sum, OVLM_F64, BALANCE_E, IN, UNUSED, OPTIONAL),
    ARRAY(loss, OVLM_F64, OVLM_DIM_ONE, INOUT, UNUSED, OPTIONAL),
    ARRAY(slope, OVLM_F32, BALANCE_E, OUT, UNUSED, OPTIONAL),
    TENSOR(bias, WIDE, OVLM_DIM_ONE, BALANCE_E, INOUT, UNUSED, OPTIONAL),
};

static ovlm_status balance_loss_scalars(const void *args, ovlm_pass pass, ovlm_err *err)
{
    const OP *a = args;
    (void)pass;
    REQUIRE_COUNT("balance_loss", a, experts, 1);
    REQUIRE(a->rows >= 0 && isfinite(a->rows), "balance_loss: rows must be finite and >= 0; got %g",
            a->rows);
    REQUIRE(isfinite(a->coef), "balance_loss: coef must be finite; got %g", a->coef);
    REQUIRE(isfinite(a->speed), "balance_loss: speed must be finite; got %g", a->speed);
    return OVLM_OK;
}

static void balance_loss_dims(const void *args, ovlm_pass pass, int64_t *dim)
{
    (void)pass;
    dim[BALANCE_E] = ((const OP *)args)->experts;
}

const ovlm_op_schema ovlm_schema_balance_loss = {
    SCHEMA(balance_loss, OP, balance_loss_dim_name, balance_loss_members)};
#undef OP

/* ---- targets ---- */

#define OP ovlm_targets
enum { TARGETS_T = 1 };
static const char *const targets_dim_name[OVLM_DIMS_MOST] = {"1", "T"};

static const ovlm_member targets_members[] = {
    ARRAY(label, OVLM_I32, TARGETS_T, IN, UNUSED),
    ARRAY(weight, OVLM_F32, TARGETS_T, IN, UNUSED, OPTIONAL),
    ARRAY(total, OVLM_F64, OVLM_DIM_ONE, INOUT, UNUSED),
    ARRAY(count, OVLM_I64, OVLM_DIM_ONE, INOUT, UNUSED),
    ARRAY(dlogp, OVLM_F32, TARGETS_T, OUT, UNUSED),
};

static ovlm_status targets_scalars(const void *args, ovlm_pass pass, ovlm_err *err)
{
    (void)pass;
    REQUIRE_COUNT("targets", (const OP *)args, n, 0);
    return OVLM_OK;
}

static void targets_dims(const void *args, ovlm_pass pass, int64_t *dim)
{
    (void)pass;
    dim[TARGETS_T] = ((const OP *)args)->n;
}

const ovlm_op_schema ovlm_schema_targets = {
    SCHEMA(targets, OP, targets_dim_name, targets_members)};
#undef OP

/* ---- head ---- */

#define OP ovlm_head
enum { HEAD_T = 1, HEAD_C, HEAD_V };
static const char *const head_dim_name[OVLM_DIMS_MOST] = {"1", "T", "C", "V"};

/* The forward takes gradients when it computes them too, or the loss. */
static bool head_uses_dlogp(const void *args, ovlm_pass pass)
{
    const OP *a = args;
    return pass == OVLM_PASS_BWD || a->fused || a->loss != NULL;
}

static bool head_has_gradients(const void *args, ovlm_pass pass)
{
    return pass == OVLM_PASS_BWD || ((const OP *)args)->fused;
}

static const ovlm_member head_members[] = {
    TENSOR(x, FLOAT, HEAD_T, HEAD_C, IN, IN),
    TENSOR(w, FLOAT, HEAD_V, HEAD_C, IN, IN, .same = "x"),
    ARRAY(label, OVLM_I32, HEAD_T, IN, IN),
    ARRAY(logp, OVLM_F32, HEAD_T, OUT, UNUSED),
    ARRAY(entropy, OVLM_F32, HEAD_T, OUT, UNUSED, OPTIONAL),
    ARRAY(dlogp, OVLM_F32, HEAD_T, IN, IN, .when = head_uses_dlogp),
    ARRAY(dentropy, OVLM_F32, HEAD_T, IN, IN, OPTIONAL, .when = head_has_gradients),
    ARRAY(loss, OVLM_F64, OVLM_DIM_ONE, INOUT, UNUSED, OPTIONAL),
    TENSOR(dx, FLOAT, HEAD_T, HEAD_C, INOUT, INOUT, OPTIONAL, .same = "x",
           .when = head_has_gradients),
    TENSOR(dw, WIDE, HEAD_V, HEAD_C, INOUT, INOUT, OPTIONAL, .when = head_has_gradients),
    BETA(dx_beta, IN, IN),
    BETA(dw_beta, IN, IN),
};

#define head_scalars no_scalars

static void head_dims(const void *args, ovlm_pass pass, int64_t *dim)
{
    const OP *a = args;
    (void)pass;
    dim[HEAD_T] = a->x.rows;
    dim[HEAD_C] = a->x.cols;
    dim[HEAD_V] = a->w.rows;
}

static ovlm_status head_rules(const void *args, ovlm_pass pass, ovlm_err *err)
{
    const OP *a = args;
    REQUIRE(a->w.rows >= 1 && a->w.rows <= INT32_MAX,
            "head: w must have between 1 and 2^31-1 rows (V); got %lld", (long long)a->w.rows);
    REQUIRE(pass != OVLM_PASS_BWD || !a->fused,
            "head: fused is set, so the forward has computed the gradients; do not call the "
            "backward");
    return OVLM_OK;
}

const ovlm_op_schema ovlm_schema_head = {SCHEMA(head, OP, head_dim_name, head_members),
                                         .rules = head_rules};
#undef OP

/* ---- grad_norm and adamw: a host list of tensors ---- */

enum { LIST_ROWS = 1, LIST_COLS };
static const char *const list_dim_name[OVLM_DIMS_MOST] = {"1", "w's rows", "w's columns"};

static void list_dims(const void *args, ovlm_pass pass, int64_t *dim)
{
    (void)args;
    (void)pass;
    dim[LIST_ROWS] = dim[LIST_COLS] = 0; /* set for each element of the list */
}

#define OP ovlm_grad_norm
static const ovlm_member grad_norm_members[] = {
    ARRAY(stats, OVLM_ELEMENT_STATS, OVLM_DIM_ONE, INOUT, UNUSED),
};
static const ovlm_member grad_norm_list[] = {
    {.name = "grad", .kind = OVLM_MEMBER_TENSOR, .type = OVLM_TYPES_WIDE, .rows = LIST_ROWS,
     .cols = LIST_COLS, .fwd = OVLM_IN},
};

static ovlm_status grad_norm_scalars(const void *args, ovlm_pass pass, ovlm_err *err)
{
    const OP *a = args;
    (void)pass;
    REQUIRE_COUNT("grad_norm", a, n, 0);
    REQUIRE(a->n == 0 || a->grad != NULL, "grad_norm: grad is NULL; give the %lld tensors",
            (long long)a->n);
    return OVLM_OK;
}

#define grad_norm_dims list_dims
const ovlm_op_schema ovlm_schema_grad_norm = {
    SCHEMA(grad_norm, OP, list_dim_name, grad_norm_members),
    .list_offset = offsetof(OP, grad), .list_bytes = sizeof(ovlm_tensor),
    .n_offset = offsetof(OP, n), .list_member_n = 1, .list_member = grad_norm_list};
#undef OP

#define OP ovlm_adamw_part
static bool adamw_master_given(const void *part, ovlm_pass pass)
{
    (void)pass;
    return ovlm_tensor_given(&((const OP *)part)->master);
}

static const ovlm_member adamw_list[] = {
    TENSOR(w, FLOAT, LIST_ROWS, LIST_COLS, INOUT, UNUSED),
    TENSOR(master, WIDE, LIST_ROWS, LIST_COLS, INOUT, UNUSED, OPTIONAL,
           .when = adamw_master_given),
    TENSOR(m, WIDE, LIST_ROWS, LIST_COLS, INOUT, UNUSED),
    TENSOR(v, WIDE, LIST_ROWS, LIST_COLS, INOUT, UNUSED),
    TENSOR(grad, WIDE, LIST_ROWS, LIST_COLS, IN, UNUSED),
};
#undef OP

#define OP ovlm_adamw
static const ovlm_member adamw_members[] = {
    ARRAY(stats, OVLM_ELEMENT_STATS, OVLM_DIM_ONE, INOUT, UNUSED),
};

static ovlm_status adamw_scalars(const void *args, ovlm_pass pass, ovlm_err *err)
{
    const OP *a = args;
    (void)pass;
    REQUIRE_COUNT("adamw", a, n, 0);
    REQUIRE(a->n == 0 || a->part != NULL, "adamw: part is NULL; give the %lld parts",
            (long long)a->n);
    REQUIRE(a->step >= 1, "adamw: step counts from 1; got %lld", (long long)a->step);
    REQUIRE(a->beta1 >= 0 && a->beta1 < 1, "adamw: beta1 must be in [0, 1); got %g", a->beta1);
    REQUIRE(a->beta2 >= 0 && a->beta2 < 1, "adamw: beta2 must be in [0, 1); got %g", a->beta2);
    REQUIRE(a->eps >= 0 && isfinite(a->eps), "adamw: eps must be finite and >= 0; got %g", a->eps);
    REQUIRE(!isnan(a->max_norm), "adamw: max_norm is not a number; use 0 for no clipping");
    return OVLM_OK;
}

static ovlm_status adamw_rules(const void *args, ovlm_pass pass, ovlm_err *err)
{
    const OP *a = args;
    (void)pass;
    for (int64_t i = 0; i < a->n; i++) {
        const ovlm_adamw_part *part = &a->part[i];
        REQUIRE(isfinite(part->lr) && isfinite(part->weight_decay),
                "adamw: lr and weight_decay of part %lld must be finite; got %g and %g",
                (long long)i, part->lr, part->weight_decay);
        REQUIRE(ovlm_tensor_given(&part->master) || part->w.dtype != OVLM_BF16,
                "adamw: master of part %lld is left out, but w is bfloat16, which is too coarse "
                "to train; give float32 masters",
                (long long)i);
    }
    return OVLM_OK;
}

#define adamw_dims list_dims
const ovlm_op_schema ovlm_schema_adamw = {
    SCHEMA(adamw, OP, list_dim_name, adamw_members), .rules = adamw_rules,
    .list_offset = offsetof(OP, part), .list_bytes = sizeof(ovlm_adamw_part),
    .n_offset = offsetof(OP, n), .list_member_n = 5, .list_member = adamw_list};
#undef OP
