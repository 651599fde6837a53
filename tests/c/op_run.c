/* op_run.c - puts a case on a device, runs it, brings it back. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "cpu/ref.h"
#include "op_cases.h"

enum { PIECES_MOST = 64, FILLER = 0xab };

/* Device memory of one member. */
typedef struct piece {
    void *device;
    char *raw;
    int64_t bytes;
    ovlm_tensor placed;  /* as the operation sees it; cols = 0: an array */
    ovlm_tensor *back;   /* where the values go: in the result           */
    const ovlm_member *member;
    const void *host;    /* the case's memory, to find aliases           */
} piece;

typedef struct run {
    const op_case *c;
    ovlm_queue *queue;
    const ovlm_ops *ops;
    bool float64;
    ovlm_rng *rng;
    op_args args; /* with device addresses */
    op_result *result;
    piece piece[PIECES_MOST];
    int piece_n;
    void *saved, *work;
    ovlm_err *err;
} run;

static ovlm_dtype dtype_of(const run *r, const ovlm_member *m)
{
    return r->float64                                        ? OVLM_F64
           : m->type == OVLM_TYPES_WIDE                      ? OVLM_F32
           : m->type == OVLM_TYPES_PIXEL && r->c->pixels     ? OVLM_U8
                                                             : r->c->storage;
}

static ovlm_status upload(run *r, piece *p)
{
    OVLM_TRY(r->ops->alloc(r->queue->backend, p->bytes, &p->device, r->err));
    return p->bytes == 0 ? OVLM_OK
                         : r->ops->copy(r->queue, p->device, p->raw, p->bytes, OVLM_TO_DEVICE,
                                        r->err);
}

static ovlm_status host_room(run *r, void **out, int64_t bytes)
{
    return ovlm_arena_alloc(&r->result->arena, out, bytes, 1, r->err);
}

/* The piece that this member shares, where the case is in place and the table allows it. */
static const piece *alias_of(const run *r, const ovlm_member *m, const ovlm_tensor *host)
{
    bool normed = r->c->op == OVLM_OP_rope && ovlm_tensor_given(&r->c->args.rope.w);
    if (!r->c->in_place || m->alias == NULL || (normed && strcmp(m->name, "y") == 0)) {
        return NULL;
    }
    for (int i = 0; i < r->piece_n; i++) {
        const piece *p = &r->piece[i];
        if (strcmp(p->member->name, m->alias) == 0 && p->placed.rows == host->rows &&
            p->placed.dtype == dtype_of(r, m)) {
            return p;
        }
    }
    return NULL;
}

static ovlm_status place_tensor(run *r, const ovlm_member *m, const ovlm_tensor *host,
                                ovlm_tensor *placed, ovlm_tensor *back)
{
    piece *p = &r->piece[r->piece_n];
    *back = *host;
    if (!ovlm_tensor_given(host) && !m->may_be_empty) {
        return OVLM_OK;
    }
    OVLM_TRY(host_room(r, &back->data, host->rows * host->cols * (int64_t)sizeof(double)));
    const piece *other = alias_of(r, m, host);
    *p = (piece){.back = back, .member = m, .host = host->data};
    if (other != NULL) { /* shares the memory; owns none */
        *placed = p->placed = other->placed;
        p->raw = other->raw;
        p->bytes = other->bytes;
        r->piece_n++;
        return OVLM_OK;
    }
    p->placed = *host;
    p->placed.dtype = dtype_of(r, m);
    p->placed.stride = host->cols + ovlm_rng_below(r->rng, 4);
    p->bytes = host->rows * p->placed.stride * ovlm_dtype_bytes(p->placed.dtype);
    void *raw = NULL;
    OVLM_TRY(host_room(r, &raw, p->bytes));
    p->raw = raw;
    memset(p->raw, FILLER, (size_t)p->bytes);
    ovlm_tensor view = p->placed;
    view.data = p->raw;
    for (int64_t i = 0; i < host->rows * host->cols; i++) {
        double value = ((const double *)host->data)[i];
        if (view.dtype == OVLM_U8) {
            ((uint8_t *)p->raw)[i / host->cols * view.stride + i % host->cols] = (uint8_t)value;
        } else {
            ovlm_ref_put(&view, i / host->cols, i % host->cols, value);
        }
    }
    r->piece_n++;
    OVLM_TRY(upload(r, p));
    p->placed.data = p->device;
    *placed = p->placed;
    return OVLM_OK;
}

/* n elements at *pointer, a member of the arguments; a copy of the result's goes to *back. */
static ovlm_status place_array(run *r, const ovlm_member *m, void *pointer, void *back,
                               int64_t bytes)
{
    piece *p = &r->piece[r->piece_n];
    void *host, *raw = NULL;
    memcpy(&host, pointer, sizeof host);
    if (host == NULL) {
        return OVLM_OK;
    }
    OVLM_TRY(host_room(r, &raw, bytes));
    memcpy(raw, host, (size_t)bytes);
    *p = (piece){.raw = raw, .bytes = bytes, .member = m};
    r->piece_n++;
    OVLM_TRY(upload(r, p));
    memcpy(pointer, &p->device, sizeof p->device);
    memcpy(back, &raw, sizeof raw);
    return OVLM_OK;
}

static ovlm_status place_members(run *r, const ovlm_member *members, int n, const void *host,
                                 void *placed, void *back, const int64_t *dim)
{
    for (int i = 0; i < n; i++) {
        const ovlm_member *m = &members[i];
        void *to = ovlm_member_at(m, placed), *result = ovlm_member_at(m, back);
        if (m->kind == OVLM_MEMBER_TENSOR) {
            OVLM_TRY(place_tensor(r, m, ovlm_member_at(m, host), to, result));
        } else if (m->kind == OVLM_MEMBER_ARRAY) {
            OVLM_TRY(place_array(r, m, to, result, dim[m->rows] * ovlm_element_bytes(m->type)));
        } else if (m->kind == OVLM_MEMBER_SEGMENTS) {
            ovlm_segments *s = to, *t = result;
            int64_t each = (int64_t)sizeof(int32_t);
            OVLM_TRY(place_array(r, m, &s->start, &t->start,
                                 (s->n + (s->length == NULL)) * each));
            OVLM_TRY(place_array(r, m, &s->length, &t->length, s->n * each));
        }
    }
    return OVLM_OK;
}

static ovlm_status place(run *r)
{
    const op_case *c = r->c;
    const ovlm_op_schema *schema = ovlm_op_schemas[c->op];
    int64_t dim[OVLM_DIMS_MOST] = {1};
    r->args = r->result->args = c->args;
    schema->dims(&c->args, OVLM_PASS_FWD, dim);
    OVLM_TRY(place_members(r, schema->member, schema->member_n, &c->args, &r->args,
                           &r->result->args, dim));
    if (schema->list_bytes == 0) {
        return OVLM_OK;
    }
    int64_t n;
    const char *host;
    void *placed, *back;
    memcpy(&n, (const char *)&c->args + schema->n_offset, sizeof n);
    memcpy(&host, (const char *)&c->args + schema->list_offset, sizeof host);
    OVLM_TRY(host_room(r, &placed, n * (int64_t)schema->list_bytes));
    OVLM_TRY(host_room(r, &back, n * (int64_t)schema->list_bytes));
    memcpy(placed, host, (size_t)n * schema->list_bytes);
    memcpy(back, host, (size_t)n * schema->list_bytes);
    memcpy((char *)&r->args + schema->list_offset, &placed, sizeof placed);
    memcpy((char *)&r->result->args + schema->list_offset, &back, sizeof back);
    for (int64_t i = 0; i < n; i++) {
        size_t at = (size_t)i * schema->list_bytes;
        OVLM_TRY(place_members(r, schema->list_member, schema->list_member_n, host + at,
                               (char *)placed + at, (char *)back + at, dim));
    }
    return OVLM_OK;
}

static ovlm_status give_scratch(run *r)
{
    ovlm_op_bytes bytes;
    OVLM_TRY(ovlm_op_measure(r->ops, r->c->op, r->queue->backend, &r->args, &bytes, r->err));
    OVLM_TRY(ovlm_op_prepare(r->ops, r->c->op, r->queue->backend, &r->args, r->err));
    int64_t work = bytes.fwd_work > bytes.bwd_work ? bytes.fwd_work : bytes.bwd_work;
    OVLM_TRY(r->ops->alloc(r->queue->backend, bytes.saved, &r->saved, r->err));
    OVLM_TRY(r->ops->alloc(r->queue->backend, work, &r->work, r->err));
    r->args.scratch = (ovlm_scratch){.saved = r->saved, .work = r->work};
    return OVLM_OK;
}

/* Puts one pass on the queue from a copy of the arguments that dies at once. */
static ovlm_status put(run *r, ovlm_pass pass)
{
    op_args args = r->args;
    ovlm_status status = ovlm_op_run(r->ops, r->c->op, pass, r->queue, &args, r->err);
    memset(&args, 0xee, sizeof args);
    return status;
}

static ovlm_status read_back(run *r)
{
    for (int i = 0; i < r->piece_n; i++) {
        const piece *p = &r->piece[i];
        if (p->device != NULL && p->bytes > 0) {
            OVLM_TRY(r->ops->copy(r->queue, p->raw, p->device, p->bytes, OVLM_TO_HOST, r->err));
        }
    }
    OVLM_TRY(r->ops->queue_wait(r->queue, r->err));
    for (int i = 0; i < r->piece_n; i++) {
        const piece *p = &r->piece[i];
        if (p->back == NULL) {
            continue;
        }
        ovlm_tensor view = p->placed;
        int64_t each = ovlm_dtype_bytes(view.dtype);
        view.data = p->raw;
        p->back->dtype = OVLM_F64;
        for (int64_t j = 0; j < view.rows * view.cols; j++) {
            ((double *)p->back->data)[j] = ovlm_ref_at(&view, j / view.cols, j % view.cols);
        }
        for (int64_t j = 0; j < p->bytes; j++) {
            if (j / each % view.stride >= view.cols && (uint8_t)p->raw[j] != FILLER) {
                return OVLM_FAIL(r->err, OVLM_E_INTERNAL, "%s: written between the columns of %s",
                                 ovlm_op_schemas[r->c->op]->name, p->member->name);
            }
        }
    }
    return OVLM_OK;
}

static ovlm_status run_all(run *r, bool backward)
{
    OVLM_TRY(place(r));
    OVLM_TRY(give_scratch(r));
    OVLM_TRY(put(r, OVLM_PASS_FWD));
    bool fused = r->c->op == OVLM_OP_head && r->c->args.head.fused;
    if (backward && op_has_backward(r->c->op) && !fused) {
        OVLM_TRY(put(r, OVLM_PASS_BWD));
    }
    return read_back(r);
}

ovlm_status op_case_run(const op_case *c, ovlm_queue *queue, bool float64, bool backward,
                        ovlm_rng *rng, op_result *result, ovlm_err *err)
{
    run r = {.c = c, .queue = queue, .ops = queue->backend->ops, .float64 = float64, .rng = rng,
             .result = result, .err = err};
    *result = (op_result){0};
    ovlm_status status = run_all(&r, backward);
    if (status != OVLM_OK) {
        (void)r.ops->queue_wait(queue, NULL); /* nothing may run into memory that is freed */
    }
    for (int i = 0; i < r.piece_n; i++) {
        r.ops->free(queue->backend, r.piece[i].device);
    }
    r.ops->free(queue->backend, r.saved);
    r.ops->free(queue->backend, r.work);
    return status;
}

void op_result_free(op_result *result)
{
    ovlm_arena_free(&result->arena);
}

static const char *difference(const ovlm_member *members, int n, const void *a, const void *b,
                              const int64_t *dim, char *text, size_t text_bytes)
{
    for (int i = 0; i < n; i++) {
        const ovlm_member *m = &members[i];
        const void *one = ovlm_member_at(m, a), *two = ovlm_member_at(m, b);
        int64_t count = 0, each = (int64_t)sizeof(double);
        const char *p = NULL, *q = NULL;
        if (m->kind == OVLM_MEMBER_TENSOR) {
            const ovlm_tensor *s = one, *t = two;
            count = ovlm_tensor_given(s) ? s->rows * s->cols : 0;
            p = s->data;
            q = t->data;
        } else if (m->kind == OVLM_MEMBER_ARRAY) {
            memcpy(&p, one, sizeof p);
            memcpy(&q, two, sizeof q);
            each = ovlm_element_bytes(m->type);
            count = p == NULL ? 0 : dim[m->rows];
        }
        for (int64_t j = 0; j < count; j++) {
            double u, v; /* the sign of a NaN means nothing */
            if (each >= (int64_t)sizeof u) {
                memcpy(&u, p + j * each, sizeof u);
                memcpy(&v, q + j * each, sizeof v);
                if (isnan(u) && isnan(v)) {
                    continue;
                }
            }
            if (memcmp(p + j * each, q + j * each, (size_t)each) != 0) {
                (void)snprintf(text, text_bytes, "%s[%lld]", m->name, (long long)j);
                return text;
            }
        }
    }
    return NULL;
}

const char *op_result_difference(const op_case *c, const op_result *a, const op_result *b,
                                 char text[64])
{
    const ovlm_op_schema *schema = ovlm_op_schemas[c->op];
    int64_t dim[OVLM_DIMS_MOST] = {1};
    schema->dims(&c->args, OVLM_PASS_FWD, dim);
    const char *found = difference(schema->member, schema->member_n, &a->args, &b->args, dim, text,
                                   64);
    if (found != NULL || schema->list_bytes == 0) {
        return found;
    }
    int64_t n;
    const char *one, *two;
    memcpy(&n, (const char *)&c->args + schema->n_offset, sizeof n);
    memcpy(&one, (const char *)&a->args + schema->list_offset, sizeof one);
    memcpy(&two, (const char *)&b->args + schema->list_offset, sizeof two);
    for (int64_t i = 0; i < n && found == NULL; i++) {
        size_t at = (size_t)i * schema->list_bytes;
        found = difference(schema->list_member, schema->list_member_n, one + at, two + at, dim,
                           text, 64);
    }
    return found;
}

/* ---- tables ---- */

bool op_has_backward(ovlm_op op)
{
#define HAS_BACKWARD(name, type) || op == OVLM_OP_##name
    return false OVLM_OPS_BOTH(HAS_BACKWARD);
#undef HAS_BACKWARD
}

const ovlm_member *op_member(ovlm_op op, const char *name)
{
    const ovlm_op_schema *schema = ovlm_op_schemas[op];
    for (int i = 0; i < schema->member_n; i++) {
        if (strcmp(schema->member[i].name, name) == 0) {
            return &schema->member[i];
        }
    }
    return NULL;
}

ovlm_tensor *op_tensor(ovlm_op op, void *args, const char *name)
{
    const ovlm_member *m = op_member(op, name);
    return m == NULL || m->kind != OVLM_MEMBER_TENSOR ? NULL : ovlm_member_at(m, args);
}
