/* async_job.c - device addresses of arguments, by the tables of op_schema.h. */
#include "cpu/async_job.h"

#include "backend/tensor.h"

#include <stdio.h>
#include <string.h>

enum { POISON = 0xff };

typedef struct translation {
    const ovlm_async_memory *memory;
    const char *op, *pass_name;
    ovlm_pass pass;
    int64_t dim[OVLM_DIMS_MOST];
    char where[32];
    ovlm_err *err;
} translation;

/* Members that this call does not use may be stale: they keep their addresses, which fault. */
static ovlm_status translate(const translation *c, void *pointer_at, int64_t bytes,
                             const char *name, bool used)
{
    void *pointer;
    const char *why = NULL;
    memcpy(&pointer, pointer_at, sizeof pointer);
    if (pointer == NULL || !used) {
        return OVLM_OK;
    }
    void *found = ovlm_async_memory_find(c->memory, pointer, bytes, &why);
    if (found == NULL) {
        return OVLM_FAIL(c->err, OVLM_E_BACKEND, "%s %s: %s%s, %lld bytes at %p, %s", c->op,
                         c->pass_name, name, c->where, (long long)bytes, pointer, why);
    }
    memcpy(pointer_at, &found, sizeof found);
    return OVLM_OK;
}

static ovlm_status translate_segments(const translation *c, const ovlm_member *m, ovlm_segments *s)
{
    int64_t each = (int64_t)sizeof(int32_t);
    OVLM_TRY(translate(c, &s->start, (s->n + (s->length == NULL)) * each, m->name, s->n > 0));
    return translate(c, &s->length, s->n * each, m->name, s->n > 0);
}

static ovlm_status translate_members(const translation *c, const ovlm_member *members, int n,
                                     void *args)
{
    for (int i = 0; i < n; i++) {
        const ovlm_member *m = &members[i];
        void *member = ovlm_member_at(m, args);
        bool used = ovlm_member_role(m, args, c->pass) != OVLM_UNUSED;
        if (m->kind == OVLM_MEMBER_SEGMENTS) {
            OVLM_TRY(translate_segments(c, m, member));
        } else if (m->kind == OVLM_MEMBER_ARRAY) {
            int64_t bytes = c->dim[m->rows] * ovlm_element_bytes(m->type);
            OVLM_TRY(translate(c, member, bytes, m->name, used && bytes > 0));
        } else if (m->kind == OVLM_MEMBER_TENSOR) {
            ovlm_tensor *t = member;
            used = used && t->rows > 0 && t->cols > 0;
            int64_t elements = used ? (t->rows - 1) * t->stride + t->cols : 0;
            OVLM_TRY(translate(c, &t->data, used ? elements * ovlm_dtype_bytes(t->dtype) : 0,
                               m->name, used));
        }
    }
    return OVLM_OK;
}

/* What measure asks for must be there, and holds nothing that the call may rely on. */
static ovlm_status take_scratch(const translation *c, void **memory, int64_t bytes,
                                const char *name, bool poison)
{
    if (*memory == NULL && bytes > 0) {
        return OVLM_FAIL(c->err, OVLM_E_BACKEND,
                         "%s %s: scratch.%s is NULL; measure asks for %lld bytes", c->op,
                         c->pass_name, name, (long long)bytes);
    }
    OVLM_TRY(translate(c, memory, bytes, name, bytes > 0));
    if (bytes > 0 && poison) {
        memset(*memory, POISON, (size_t)bytes);
    }
    return OVLM_OK;
}

static ovlm_status translate_list(translation *c, const ovlm_op_schema *schema, char *args)
{
    int64_t n;
    char *list;
    memcpy(&n, args + schema->n_offset, sizeof n);
    memcpy(&list, args + schema->list_offset, sizeof list);
    for (int64_t i = 0; i < n; i++) {
        (void)snprintf(c->where, sizeof c->where, " of part %lld", (long long)i);
        OVLM_TRY(translate_members(c, schema->list_member, schema->list_member_n,
                                   list + (size_t)i * schema->list_bytes));
    }
    return OVLM_OK;
}

ovlm_status ovlm_async_args_translate(const ovlm_async_memory *memory, const ovlm_ops *inner,
                                      ovlm_backend *backend, ovlm_op op, ovlm_pass pass,
                                      void *args, ovlm_err *err)
{
    const ovlm_op_schema *schema = ovlm_op_schemas[op];
    translation c = {.memory = memory, .op = schema->name, .pass = pass, .dim = {1}, .err = err,
                     .pass_name = pass == OVLM_PASS_BWD ? "backward" : "forward"};
    ovlm_op_bytes bytes = {0};
    schema->dims(args, pass, c.dim);
    /* A backward may have left out what only the forward needs; then its scratch is not known. */
    bool known = ovlm_op_measure(inner, op, backend, args, &bytes, NULL) == OVLM_OK;
    OVLM_TRY(translate_members(&c, schema->member, schema->member_n, args));
    if (schema->list_bytes > 0) {
        OVLM_TRY(translate_list(&c, schema, args));
        c.where[0] = '\0';
    }
    ovlm_scratch *scratch = args; /* the first member of every struct */
    bool forward = pass == OVLM_PASS_FWD;
    if (!known) {
        OVLM_TRY(translate(&c, &scratch->saved, 0, "saved", true));
        return translate(&c, &scratch->work, 0, "work", true);
    }
    OVLM_TRY(take_scratch(&c, &scratch->saved, bytes.saved, "saved", forward));
    return take_scratch(&c, &scratch->work, forward ? bytes.fwd_work : bytes.bwd_work, "work",
                        true);
}
