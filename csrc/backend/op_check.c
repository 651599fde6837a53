/* op_check.c - the validator of all operations, over the tables of op_schema.h.
 *
 * Order: every tensor by itself, scalars, extents (which divide by scalars), extents of each
 * member, overlaps, and what the operation adds.  So each step may rely on the ones before, and no
 * product overflows: a tensor that passed the first step has a size in bytes. */
#include "backend/op_members.h"

#include <stdio.h>
#include <string.h>

typedef struct check {
    const ovlm_op_schema *schema;
    const void *args; /* or an element of the list */
    ovlm_pass pass;
    char where[32];   /* " of part 3" in a list, else "" */
    int64_t dim[OVLM_DIMS_MOST];
    ovlm_err *err;
} check;

static const ovlm_member *member_named(const ovlm_member *members, int n, const char *name)
{
    for (int i = 0; i < n; i++) {
        if (strcmp(members[i].name, name) == 0) {
            return &members[i];
        }
    }
    return NULL;
}

/* Whether the call uses the tensor: it has a role and is not left out. */
static bool tensor_used(const check *c, const ovlm_member *m)
{
    const ovlm_tensor *t = ovlm_member_at(m, c->args);
    return m->kind == OVLM_MEMBER_TENSOR &&
           ovlm_member_role(m, c->args, c->pass) != OVLM_UNUSED &&
           (ovlm_tensor_given(t) || m->may_be_empty);
}

static ovlm_status check_dtype(const check *c, const ovlm_member *m, const ovlm_tensor *t)
{
    if ((unsigned)t->dtype >= OVLM_DTYPE_COUNT) {
        return OVLM_FAIL(c->err, OVLM_E_ARG, "%s: %s%s has dtype %d, which there is not",
                         c->schema->name, m->name, c->where, (int)t->dtype);
    }
    if ((m->type >> t->dtype & 1) == 0) {
        const char *need = m->type == OVLM_TYPES_WIDE    ? "float32 (float64 in the reference)"
                           : m->type == OVLM_TYPES_PIXEL ? "float32, bfloat16, float64 or uint8"
                                                         : "float32, bfloat16 or float64";
        return OVLM_FAIL(c->err, OVLM_E_ARG, "%s: %s%s is %s; it must be %s", c->schema->name,
                         m->name, c->where, ovlm_dtype_name(t->dtype), need);
    }
    return OVLM_OK;
}

/* A tensor by itself. */
static ovlm_status check_form(const check *c, const ovlm_member *m)
{
    const ovlm_tensor *t = ovlm_member_at(m, c->args);
    const char *op = c->schema->name;
    if (t->rows < 0 || t->cols < 0) {
        return OVLM_FAIL(c->err, OVLM_E_ARG, "%s: %s%s is [%lld, %lld]; extents must be >= 0", op,
                         m->name, c->where, (long long)t->rows, (long long)t->cols);
    }
    if (t->stride < t->cols && t->rows > 0) {
        return OVLM_FAIL(c->err, OVLM_E_ARG,
                         "%s: %s%s has a stride of %lld elements, less than its %lld columns", op,
                         m->name, c->where, (long long)t->stride, (long long)t->cols);
    }
    OVLM_TRY(check_dtype(c, m, t));
    if (t->rows == 0 || t->cols == 0) {
        return OVLM_OK;
    }
    int64_t bytes = ovlm_dtype_bytes(t->dtype);
    if (t->stride > INT64_MAX / bytes / t->rows) {
        return OVLM_FAIL(c->err, OVLM_E_ARG,
                         "%s: %s%s of %lld rows with stride %lld does not fit into memory", op,
                         m->name, c->where, (long long)t->rows, (long long)t->stride);
    }
    if (c->pass == OVLM_PASS_MEASURE) {
        return OVLM_OK;
    }
    if (t->data == NULL) {
        return OVLM_FAIL(c->err, OVLM_E_ARG, "%s: %s%s has no memory (data is NULL)", op, m->name,
                         c->where);
    }
    if ((uintptr_t)t->data % (uintptr_t)bytes != 0) {
        return OVLM_FAIL(c->err, OVLM_E_ARG, "%s: %s%s is at %p, not aligned to its %lld bytes",
                         op, m->name, c->where, t->data, (long long)bytes);
    }
    if ((uint64_t)((t->rows - 1) * t->stride + t->cols) * (uint64_t)bytes >
        UINTPTR_MAX - (uintptr_t)t->data) {
        return OVLM_FAIL(c->err, OVLM_E_ARG, "%s: %s%s at %p reaches beyond all memory", op,
                         m->name, c->where, t->data);
    }
    return OVLM_OK;
}

static ovlm_status check_forms(const check *c, const ovlm_member *members, int n)
{
    for (int i = 0; i < n; i++) {
        const ovlm_member *m = &members[i];
        if (m->kind != OVLM_MEMBER_TENSOR ||
            ovlm_member_role(m, c->args, c->pass) == OVLM_UNUSED) {
            continue;
        }
        if (tensor_used(c, m)) {
            OVLM_TRY(check_form(c, m));
        } else if (!m->optional) {
            return OVLM_FAIL(c->err, OVLM_E_ARG, "%s: %s%s is left out; this call needs it",
                             c->schema->name, m->name, c->where);
        }
    }
    return OVLM_OK;
}

/* A tensor among the others. */
static ovlm_status check_extents(const check *c, const ovlm_member *m, const ovlm_member *members,
                                 int n)
{
    const ovlm_tensor *t = ovlm_member_at(m, c->args);
    if (t->rows != c->dim[m->rows] || t->cols != c->dim[m->cols]) {
        return OVLM_FAIL(c->err, OVLM_E_ARG,
                         "%s: %s%s is [%lld, %lld]; it must be [%s, %s] = [%lld, %lld]",
                         c->schema->name, m->name, c->where, (long long)t->rows,
                         (long long)t->cols, c->schema->dim_name[m->rows],
                         c->schema->dim_name[m->cols], (long long)c->dim[m->rows],
                         (long long)c->dim[m->cols]);
    }
    const ovlm_member *same = m->same == NULL ? NULL : member_named(members, n, m->same);
    if (same != NULL && tensor_used(c, same)) {
        const ovlm_tensor *other = ovlm_member_at(same, c->args);
        if (other->dtype != t->dtype) {
            return OVLM_FAIL(c->err, OVLM_E_ARG, "%s: %s%s is %s, but %s is %s; they must agree",
                             c->schema->name, m->name, c->where, ovlm_dtype_name(t->dtype),
                             same->name, ovlm_dtype_name(other->dtype));
        }
    }
    return OVLM_OK;
}

static ovlm_status check_array(const check *c, const ovlm_member *m)
{
    const void *pointer = *(void *const *)ovlm_member_at(m, c->args);
    /* A double needs 8 bytes, the structs of statistics too. */
    int64_t align = ovlm_element_bytes(m->type);
    align = align > 8 ? 8 : align;
    if (pointer == NULL) {
        if (!m->optional && c->pass != OVLM_PASS_MEASURE && c->dim[m->rows] > 0) {
            return OVLM_FAIL(c->err, OVLM_E_ARG, "%s: %s is NULL; this call needs %s = %lld of it",
                             c->schema->name, m->name, c->schema->dim_name[m->rows],
                             (long long)c->dim[m->rows]);
        }
        return OVLM_OK;
    }
    if ((uintptr_t)pointer % (uintptr_t)align != 0) {
        return OVLM_FAIL(c->err, OVLM_E_ARG, "%s: %s is at %p, not aligned to %lld bytes",
                         c->schema->name, m->name, pointer, (long long)align);
    }
    return OVLM_OK;
}

static ovlm_status check_segments(const check *c, const ovlm_member *m)
{
    const ovlm_segments *s = ovlm_member_at(m, c->args);
    if (s->n < 0 || s->n >= INT32_MAX || s->max_len < 0 || s->max_len > INT32_MAX) {
        return OVLM_FAIL(c->err, OVLM_E_ARG,
                         "%s: %s has n = %lld and max_len = %lld; both must be in [0, 2^31)",
                         c->schema->name, m->name, (long long)s->n, (long long)s->max_len);
    }
    if (c->pass != OVLM_PASS_MEASURE && s->n > 0 && s->start == NULL) {
        return OVLM_FAIL(c->err, OVLM_E_ARG, "%s: %s.start is NULL; give %lld device entries",
                         c->schema->name, m->name,
                         (long long)(s->length == NULL ? s->n + 1 : s->n));
    }
    if (((uintptr_t)s->start | (uintptr_t)s->length | (uintptr_t)s->host_start |
         (uintptr_t)s->host_length) % sizeof(int32_t) != 0) {
        return OVLM_FAIL(c->err, OVLM_E_ARG, "%s: %s has an array that is not aligned to 4 bytes",
                         c->schema->name, m->name);
    }
    if (s->host_start != NULL && (s->length == NULL) != (s->host_length == NULL)) {
        return OVLM_FAIL(c->err, OVLM_E_ARG,
                         "%s: %s.host_start must have the form of start: give both lengths or none",
                         c->schema->name, m->name);
    }
    return OVLM_OK;
}

static ovlm_status check_members(const check *c, const ovlm_member *members, int n)
{
    for (int i = 0; i < n; i++) {
        const ovlm_member *m = &members[i];
        if (ovlm_member_role(m, c->args, c->pass) == OVLM_UNUSED) {
            continue;
        }
        if (m->kind == OVLM_MEMBER_ARRAY || m->kind == OVLM_MEMBER_HOST) {
            OVLM_TRY(check_array(c, m));
        } else if (m->kind == OVLM_MEMBER_SEGMENTS) {
            OVLM_TRY(check_segments(c, m));
        } else if (m->kind == OVLM_MEMBER_BETA) {
            float beta = *(const float *)ovlm_member_at(m, c->args);
            if (!(beta == 0.0f || beta == 1.0f)) {
                return OVLM_FAIL(c->err, OVLM_E_ARG, "%s: %s is %g; it must be 0 or 1",
                                 c->schema->name, m->name, (double)beta);
            }
        } else if (tensor_used(c, m)) {
            OVLM_TRY(check_extents(c, m, members, n));
        }
    }
    return OVLM_OK;
}

/* Memory of a member as rows of bytes. */
typedef struct span {
    uintptr_t first, end; /* [first, end) holds it all */
    int64_t rows;
    uint64_t width, stride;
} span;

static bool member_span(const check *c, const ovlm_member *m, span *out)
{
    if (ovlm_member_role(m, c->args, c->pass) == OVLM_UNUSED) {
        return false;
    }
    if (m->kind == OVLM_MEMBER_ARRAY) {
        uint64_t bytes = (uint64_t)ovlm_extent_mul(c->dim[m->rows], ovlm_element_bytes(m->type));
        out->first = (uintptr_t) * (void *const *)ovlm_member_at(m, c->args);
        out->rows = 1;
        out->width = out->stride = bytes;
        out->end = bytes > UINTPTR_MAX - out->first ? UINTPTR_MAX : out->first + bytes;
        return out->first != 0 && bytes > 0;
    }
    if (!tensor_used(c, m)) {
        return false;
    }
    const ovlm_tensor *t = ovlm_member_at(m, c->args);
    if (t->rows == 0 || t->cols == 0) {
        return false;
    }
    uint64_t bytes = (uint64_t)ovlm_dtype_bytes(t->dtype);
    out->first = (uintptr_t)t->data;
    out->rows = t->rows;
    out->width = (uint64_t)t->cols * bytes;
    out->stride = (uint64_t)t->stride * bytes;
    out->end = out->first + (uint64_t)(t->rows - 1) * out->stride + out->width;
    return true;
}

/* Column slices of one matrix lie between each other without sharing an element. */
static bool spans_meet(const span *a, const span *b)
{
    if (a->end <= b->first || b->end <= a->first) {
        return false;
    }
    if (a->rows > 1 && b->rows > 1 && a->stride != b->stride) {
        return true; /* may share nothing, but nobody lays memory out so */
    }
    uint64_t stride = a->rows > 1 ? a->stride : b->stride;
    if ((a->rows == 1 && b->rows == 1) || a->width > stride || b->width > stride) {
        return true;
    }
    uint64_t offset = (a->first < b->first ? stride - (b->first - a->first) % stride
                                           : a->first - b->first) % stride;
    /* a begins `offset` bytes into b's row: it must begin after b ends, and end before the next. */
    return !(offset >= b->width && offset + a->width <= stride);
}

static bool same_view(const check *c, const ovlm_member *a, const ovlm_member *b)
{
    if (a->kind != OVLM_MEMBER_TENSOR || b->kind != OVLM_MEMBER_TENSOR) {
        return false;
    }
    const ovlm_tensor *s = ovlm_member_at(a, c->args), *t = ovlm_member_at(b, c->args);
    bool named = (a->alias != NULL && strcmp(a->alias, b->name) == 0) ||
                 (b->alias != NULL && strcmp(b->alias, a->name) == 0);
    return named && s->data == t->data && s->dtype == t->dtype &&
           (s->stride == t->stride || s->rows == 1);
}

static ovlm_status check_overlaps(const check *c, const ovlm_member *members, int n)
{
    span a, b;
    for (int i = 0; i < n; i++) {
        const ovlm_member *one = &members[i];
        if ((ovlm_member_role(one, c->args, c->pass) & OVLM_OUT) == 0 ||
            !member_span(c, one, &a)) {
            continue;
        }
        for (int j = 0; j < n; j++) {
            const ovlm_member *other = &members[j];
            if (j != i && member_span(c, other, &b) && spans_meet(&a, &b) &&
                !same_view(c, one, other)) {
                return OVLM_FAIL(c->err, OVLM_E_ARG,
                                 "%s: %s%s overlaps %s; give it memory of its own",
                                 c->schema->name, one->name, c->where, other->name);
            }
        }
    }
    return OVLM_OK;
}

static ovlm_status check_scratch(const check *c)
{
    const ovlm_scratch *scratch = c->args; /* the first member of every struct */
    if (((uintptr_t)scratch->saved | (uintptr_t)scratch->work) % 64 != 0) {
        return OVLM_FAIL(c->err, OVLM_E_ARG,
                         "%s: scratch (saved %p, work %p) is not aligned to 64 bytes",
                         c->schema->name, scratch->saved, scratch->work);
    }
    return OVLM_OK;
}

/* The tensors of a host list, element by element. */
static ovlm_status check_list(check *c)
{
    const ovlm_op_schema *schema = c->schema;
    const char *args = c->args;
    if (schema->list_bytes == 0) {
        return OVLM_OK;
    }
    int64_t n = *(const int64_t *)(const void *)(args + schema->n_offset);
    const char *list = *(const char *const *)(const void *)(args + schema->list_offset);
    check part = *c;
    for (int64_t i = 0; i < n; i++) {
        part.args = list + (size_t)i * schema->list_bytes;
        (void)snprintf(part.where, sizeof part.where, " of part %lld", (long long)i);
        OVLM_TRY(check_forms(&part, schema->list_member, schema->list_member_n));
        const ovlm_tensor *first = ovlm_member_at(&schema->list_member[0], part.args);
        part.dim[schema->list_member[0].rows] = first->rows;
        part.dim[schema->list_member[0].cols] = first->cols;
        OVLM_TRY(check_members(&part, schema->list_member, schema->list_member_n));
        if (c->pass != OVLM_PASS_MEASURE) {
            OVLM_TRY(check_overlaps(&part, schema->list_member, schema->list_member_n));
        }
    }
    return OVLM_OK;
}

static ovlm_status check_args(ovlm_op op, const void *args, ovlm_pass pass, ovlm_err *err)
{
    const ovlm_op_schema *schema = ovlm_op_schemas[op];
    check c = {.schema = schema, .args = args, .pass = pass, .where = "", .dim = {1}, .err = err};
    OVLM_TRY(check_forms(&c, schema->member, schema->member_n));
    OVLM_TRY(schema->scalars(args, pass, err));
    schema->dims(args, pass, c.dim);
    OVLM_TRY(check_members(&c, schema->member, schema->member_n));
    OVLM_TRY(check_list(&c));
    if (pass != OVLM_PASS_MEASURE) {
        OVLM_TRY(check_scratch(&c));
        OVLM_TRY(check_overlaps(&c, schema->member, schema->member_n));
    }
    return schema->rules == NULL ? OVLM_OK : schema->rules(args, pass, err);
}

#define OVLM_DEFINE_CHECK(op, type)                                               \
    ovlm_status ovlm_op_check_##op(const type *a, ovlm_pass pass, ovlm_err *err)  \
    {                                                                             \
        return check_args(OVLM_OP_##op, a, pass, err);                            \
    }
OVLM_OPS(OVLM_DEFINE_CHECK)
