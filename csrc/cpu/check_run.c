/* check_run.c - one operation on two backends.
 *
 * A call is taken apart into slots by the tables of op_schema.h: each member that it uses is
 * fetched from the tested backend before the call, converted to float64 for the reference, fetched
 * again afterwards if it is an output, and compared. */
#include "cpu/check.h"

#include "base/arena.h"
#include "cpu/ref.h"

/* ---- a call in slots ---- */

typedef struct check_call {
    const ovlm_ops *ops; /* the tested backend's */
    ovlm_queue *tested, *reference_queue;
    ovlm_op op;
    ovlm_pass pass;
    const ovlm_op_schema *schema;
    ovlm_arena arena;
    void *reference, *scale; /* arguments of the reference; of the run on magnitudes */
    ovlm_check_slot *slot;
    int64_t slot_n;
    int64_t dim[OVLM_DIMS_MOST];
    ovlm_err *err;
} check_call;

/* In the queue's order; the host has it after a wait. */
static ovlm_status fetch(const check_call *c, void *to, const void *from, int64_t bytes)
{
    return bytes == 0 ? OVLM_OK
                      : c->ops->copy(c->tested, to, from, bytes, OVLM_TO_HOST, c->err);
}

static ovlm_status new_buffer(check_call *c, void **out, int64_t bytes)
{
    return ovlm_arena_alloc(&c->arena, out, bytes, 1, c->err);
}

static ovlm_status tensor_slot(check_call *c, ovlm_check_slot *slot, const ovlm_tensor *tested,
                               ovlm_tensor *reference, ovlm_tensor *scale)
{
    int64_t elements = tested->rows * tested->cols, each = ovlm_dtype_bytes(tested->dtype);
    slot->tested = tested->data;
    slot->rows = tested->rows;
    slot->cols = tested->cols;
    slot->stride = tested->stride;
    slot->type = (int)tested->dtype;
    slot->bytes = elements == 0 ? 0 : ((tested->rows - 1) * tested->stride + tested->cols) * each;
    *reference = ovlm_tensor_of(NULL, tested->rows, tested->cols, OVLM_F64);
    *scale = *reference;
    OVLM_TRY(new_buffer(c, &reference->data, elements * (int64_t)sizeof(double)));
    OVLM_TRY(new_buffer(c, &scale->data, elements * (int64_t)sizeof(double)));
    slot->reference = *reference;
    slot->scale = *scale;
    return OVLM_OK;
}

static ovlm_status array_slot(check_call *c, ovlm_check_slot *slot, const ovlm_member *m,
                              void *reference, void *scale)
{
    int64_t n = c->dim[m->rows];
    memcpy(&slot->tested, reference, sizeof slot->tested); /* a copy of the argument */
    if (slot->tested == NULL) {
        return OVLM_OK;
    }
    slot->rows = 1;
    slot->cols = slot->stride = n;
    slot->type = m->type;
    slot->bytes = n * ovlm_element_bytes(m->type);
    slot->reference = ovlm_tensor_of(NULL, 1, n, (ovlm_dtype)m->type);
    slot->scale = slot->reference;
    OVLM_TRY(new_buffer(c, &slot->reference.data, slot->bytes));
    OVLM_TRY(new_buffer(c, &slot->scale.data, slot->bytes));
    memcpy(reference, &slot->reference.data, sizeof(void *));
    memcpy(scale, &slot->scale.data, sizeof(void *));
    return OVLM_OK;
}

/* One array of segments, read by both sides and never changed. */
static ovlm_status fetch_indices(check_call *c, const int32_t **reference, const int32_t **scale,
                                 int64_t n)
{
    void *copy = NULL;
    if (*reference == NULL) {
        return OVLM_OK;
    }
    OVLM_TRY(new_buffer(c, &copy, n * (int64_t)sizeof(int32_t)));
    OVLM_TRY(fetch(c, copy, *reference, n * (int64_t)sizeof(int32_t)));
    *reference = *scale = copy;
    return OVLM_OK;
}

static ovlm_status segments_slot(check_call *c, ovlm_segments *reference, ovlm_segments *scale)
{
    int64_t n = reference->n;
    OVLM_TRY(fetch_indices(c, &reference->start, &scale->start, n + (reference->length == NULL)));
    return fetch_indices(c, &reference->length, &scale->length, n);
}

/* The member of one struct: the call's arguments, or an element of their list. */
static ovlm_status add_slot(check_call *c, const ovlm_member *m, const void *args, void *reference,
                            void *scale, int64_t part)
{
    ovlm_role role = ovlm_member_role(m, args, c->pass);
    void *to = ovlm_member_at(m, reference), *size = ovlm_member_at(m, scale);
    ovlm_check_slot *slot = &c->slot[c->slot_n];
    *slot = (ovlm_check_slot){.member = m, .role = role, .part = part};
    if (m->kind == OVLM_MEMBER_SEGMENTS) {
        return segments_slot(c, to, size);
    }
    if (m->kind == OVLM_MEMBER_TENSOR) {
        const ovlm_tensor *tested = ovlm_member_at(m, args);
        if (role == OVLM_UNUSED || (!ovlm_tensor_given(tested) && !m->may_be_empty)) {
            ((ovlm_tensor *)to)->cols = ((ovlm_tensor *)size)->cols = 0; /* stale: left out */
            return OVLM_OK;
        }
        OVLM_TRY(tensor_slot(c, slot, tested, to, size));
    } else if (m->kind == OVLM_MEMBER_ARRAY && role != OVLM_UNUSED) {
        OVLM_TRY(array_slot(c, slot, m, to, size));
    }
    if (slot->tested == NULL || slot->bytes == 0) {
        return OVLM_OK;
    }
    OVLM_TRY(new_buffer(c, &slot->raw, slot->bytes));
    c->slot_n++;
    return fetch(c, slot->raw, slot->tested, slot->bytes);
}

static ovlm_status add_list(check_call *c, const char *args)
{
    const ovlm_op_schema *schema = c->schema;
    char *list, *reference, *scale;
    int64_t n;
    memcpy(&n, args + schema->n_offset, sizeof n);
    memcpy(&list, args + schema->list_offset, sizeof list);
    memcpy(&reference, (char *)c->reference + schema->list_offset, sizeof reference);
    memcpy(&scale, (char *)c->scale + schema->list_offset, sizeof scale);
    for (int64_t i = 0; i < n; i++) {
        size_t at = (size_t)i * schema->list_bytes;
        for (int j = 0; j < schema->list_member_n; j++) {
            OVLM_TRY(add_slot(c, &schema->list_member[j], list + at, reference + at, scale + at,
                              i));
        }
    }
    return OVLM_OK;
}

static ovlm_status take_apart(check_call *c, const void *args)
{
    const ovlm_op_schema *schema = c->schema;
    int64_t bytes = ovlm_op_args_bytes(c->op, c->pass, args), list_n = 0;
    if (schema->list_bytes > 0) {
        memcpy(&list_n, (const char *)args + schema->n_offset, sizeof list_n);
    }
    int64_t slots = schema->member_n + list_n * schema->list_member_n + 1; /* one is a spare */
    OVLM_TRY(OVLM_ARENA_NEW(&c->arena, &c->slot, slots, c->err));
    OVLM_TRY(new_buffer(c, &c->reference, bytes));
    OVLM_TRY(new_buffer(c, &c->scale, bytes));
    ovlm_op_args_copy(c->op, c->pass, args, c->reference);
    ovlm_op_args_copy(c->op, c->pass, args, c->scale);
    c->dim[OVLM_DIM_ONE] = 1;
    schema->dims(args, c->pass, c->dim);
    for (int i = 0; i < schema->member_n; i++) {
        OVLM_TRY(add_slot(c, &schema->member[i], args, c->reference, c->scale, -1));
    }
    return list_n > 0 ? add_list(c, args) : OVLM_OK;
}

/* ---- values ---- */

/* A dense row of doubles, or of the array's own elements. */
static void load_slot(const ovlm_check_slot *slot)
{
    if (slot->member->kind == OVLM_MEMBER_ARRAY) {
        memcpy(slot->reference.data, slot->raw, (size_t)slot->bytes);
        if (slot->role != OVLM_OUT) {
            memcpy(slot->scale.data, slot->raw, (size_t)slot->bytes);
        }
        return;
    }
    ovlm_tensor raw = {slot->raw, slot->rows, slot->cols, slot->stride, (ovlm_dtype)slot->type};
    for (int64_t i = 0; i < slot->rows * slot->cols; i++) {
        double value = ovlm_ref_at(&raw, i / slot->cols, i % slot->cols);
        ((double *)slot->reference.data)[i] = value;
        ((double *)slot->scale.data)[i] = slot->role == OVLM_IN ? fabs(value) : 0;
    }
}

/* The scratch of the reference, for either run.  Not more than it has doubles in its arguments,
 * twice, and keys in a segment: a backward may have left out what measure needs. */
static ovlm_status reference_scratch(check_call *c)
{
    int64_t doubles = 64;
    for (int64_t i = 0; i < c->slot_n; i++) {
        const ovlm_check_slot *slot = &c->slot[i];
        doubles += 2 * (slot->rows * slot->cols + slot->rows + slot->cols);
    }
    for (int i = 0; i < OVLM_DIMS_MOST; i++) {
        doubles += 2 * c->dim[i];
    }
    if (c->op == OVLM_OP_attention) {
        doubles += ((const ovlm_attention *)c->reference)->key.max_len;
    }
    ovlm_scratch *one = c->reference, *two = c->scale; /* the first member of every struct */
    *one = (ovlm_scratch){0};
    OVLM_TRY(new_buffer(c, &one->work, doubles * (int64_t)sizeof(double)));
    *two = *one;
    return OVLM_OK;
}

/* ---- router ---- */

/* Whether the same experts are in both, in any order. */
static bool same_set(const int32_t *a, const int32_t *b, int64_t k)
{
    for (int64_t i = 0; i < k; i++) {
        int64_t in_a = 0, in_b = 0;
        for (int64_t j = 0; j < k; j++) {
            in_a += a[j] == a[i];
            in_b += b[j] == a[i];
        }
        if (in_a != 1 || in_b != 1) {
            return false;
        }
    }
    return true;
}

/* The reference's choice for token t, were the experts in `liked` better by a rounding error. */
static ovlm_status choose_again(const check_call *c, int64_t t, const int32_t *liked,
                                double *bias, int32_t *spare)
{
    ovlm_router one = *(const ovlm_router *)c->reference;
    int64_t experts = one.logits.cols;
    double most = 1;
    for (int64_t e = 0; e < experts; e++) {
        bias[e] = ovlm_tensor_given(&one.bias) ? ovlm_ref_at(&one.bias, 0, e) : 0;
        most = fmax(most, fabs(bias[e]));
    }
    for (int64_t j = 0; j < one.k; j++) {
        if (liked[j] >= 0 && liked[j] < experts) {
            bias[liked[j]] += 0x1p-19 * most;
        }
    }
    one.logits = ovlm_tensor_rows(one.logits, t, 1);
    one.weight = ovlm_tensor_of(bias + experts, 1, one.k, OVLM_F64);
    one.bias = ovlm_tensor_of(bias, 1, experts, OVLM_F64);
    one.replay = false;
    one.expert = spare;
    one.row = spare + one.k;
    one.token = spare + 2 * one.k;
    one.offsets = spare + 3 * one.k;
    one.count = NULL;
    one.score_sum = NULL;
    return ovlm_ref_router_fwd(c->reference_queue, &one, c->err);
}

/* Scores that are equal up to rounding may be chosen between freely, so the reference replays the
 * tested choice, once it is found to be a best one. */
static ovlm_status check_choice(check_call *c)
{
    ovlm_router *a = c->reference;
    double *bias;
    int32_t *spare;
    for (int64_t i = 0; i < c->slot_n; i++) {
        if (strcmp(c->slot[i].member->name, "expert") == 0) {
            memcpy(c->slot[i].reference.data, c->slot[i].raw, (size_t)c->slot[i].bytes);
            memcpy(c->slot[i].scale.data, c->slot[i].raw, (size_t)c->slot[i].bytes);
        }
    }
    OVLM_TRY(OVLM_ARENA_NEW(&c->arena, &bias, a->logits.cols + a->k, c->err));
    OVLM_TRY(OVLM_ARENA_NEW(&c->arena, &spare, 3 * a->k + a->logits.cols + 1, c->err));
    for (int64_t t = 0; t < a->logits.rows && !a->replay; t++) {
        const int32_t *chosen = a->expert + t * a->k;
        OVLM_TRY(choose_again(c, t, chosen, bias, spare));
        if (!same_set(chosen, spare, a->k)) {
            int32_t first = spare[0];
            return OVLM_FAIL(c->err, OVLM_E_BACKEND,
                             "router forward: expert[%lld, ...] is %d and others, not the best; "
                             "the reference has %d first", (long long)t, (int)chosen[0],
                             (int)first);
        }
    }
    a->replay = true;
    return OVLM_OK;
}

/* ---- the comparison ---- */

static ovlm_status run_tested(check_call *c, const void *args)
{
    OVLM_TRY(ovlm_op_run(c->ops, c->op, c->pass, c->tested, args, c->err));
    for (int64_t i = 0; i < c->slot_n; i++) {
        const ovlm_check_slot *slot = &c->slot[i];
        if ((slot->role & OVLM_OUT) != 0) {
            OVLM_TRY(fetch(c, slot->raw, slot->tested, slot->bytes));
        }
    }
    return c->ops->queue_wait(c->tested, c->err);
}

static ovlm_status run_reference(check_call *c)
{
    OVLM_TRY(reference_scratch(c));
    if (c->op == OVLM_OP_router && c->pass == OVLM_PASS_FWD) {
        OVLM_TRY(check_choice(c));
        ((ovlm_router *)c->scale)->replay = true;
    }
    OVLM_TRY(ovlm_op_run(&ovlm_ref_ops, c->op, c->pass, c->reference_queue, c->reference,
                         c->err));
    OVLM_TRY(ovlm_host_queue_wait(c->reference_queue, c->err));
    return ovlm_check_scale(c->op, c->pass, c->reference_queue, c->reference, c->scale, c->err);
}

static ovlm_status compare(const check_call *c)
{
    int64_t terms = 1;
    double eps = 0x1p-24;
    for (int i = 0; i < OVLM_DIMS_MOST; i++) {
        terms = c->dim[i] > terms ? c->dim[i] : terms;
    }
    for (int64_t i = 0; i < c->slot_n; i++) {
        /* Tensor cores take P and dS in the dtype of q. */
        if (c->op == OVLM_OP_attention && c->slot[i].type == (int)OVLM_BF16) {
            eps = 0x1p-8;
        }
    }
    for (int64_t i = 0; i < c->slot_n; i++) {
        if ((c->slot[i].role & OVLM_OUT) != 0) {
            OVLM_TRY(ovlm_check_compare(c->schema->name, c->pass, &c->slot[i], terms, eps,
                                        c->err));
        }
    }
    return OVLM_OK;
}

static ovlm_status run_call(check_call *c, const void *args)
{
    OVLM_TRY(take_apart(c, args));
    OVLM_TRY(c->ops->queue_wait(c->tested, c->err));
    for (int64_t i = 0; i < c->slot_n; i++) {
        load_slot(&c->slot[i]);
    }
    OVLM_TRY(run_tested(c, args));
    OVLM_TRY(run_reference(c));
    return compare(c);
}

ovlm_status ovlm_check_run(const ovlm_ops *ops, ovlm_queue *tested, ovlm_queue *reference,
                           ovlm_op op, ovlm_pass pass, const void *args, ovlm_err *err)
{
    OVLM_TRY(ovlm_op_check(op, args, pass, err));
    check_call c = {.ops = ops, .tested = tested, .reference_queue = reference, .op = op,
                    .pass = pass, .schema = ovlm_op_schemas[op], .err = err};
    ovlm_status status = run_call(&c, args);
    ovlm_arena_free(&c.arena);
    return status;
}
