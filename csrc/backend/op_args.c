/* op_args.c - copies of argument structs with all that they point to on the host. */
#include "backend/op_schema.h"

#include <string.h>

enum { PIECE_ALIGN = 16 };

static int64_t padded(int64_t bytes)
{
    return (bytes + PIECE_ALIGN - 1) / PIECE_ALIGN * PIECE_ALIGN;
}

/* Where the next piece of host memory goes; measures only while `at` is NULL. */
typedef struct packer {
    char *at;
    int64_t bytes;
} packer;

/* Copies an array and lets *pointer, a member of the copy, point to the copy. */
static void pack(packer *p, const void **pointer, int64_t bytes)
{
    if (*pointer == NULL || bytes <= 0) {
        return;
    }
    if (p->at != NULL) {
        memcpy(p->at, *pointer, (size_t)bytes);
        *pointer = p->at;
        p->at += padded(bytes);
    }
    p->bytes += padded(bytes);
}

/* A pointer member as const void *, read and written as what it is. */
static void pack_member(packer *p, void *member, int64_t bytes)
{
    const void *pointer;
    memcpy(&pointer, member, sizeof pointer);
    pack(p, &pointer, bytes);
    if (p->at != NULL) {
        memcpy(member, &pointer, sizeof pointer);
    }
}

/* What args point to on the host.  `args` is the copy when p->at is set, else the original. */
static void pack_args(packer *p, const ovlm_op_schema *schema, ovlm_pass pass, void *args)
{
    int64_t dim[OVLM_DIMS_MOST] = {1};
    schema->dims(args, pass, dim);
    for (int i = 0; i < schema->member_n; i++) {
        const ovlm_member *m = &schema->member[i];
        void *member = ovlm_member_at(m, args);
        if (m->kind == OVLM_MEMBER_HOST) {
            pack_member(p, member, dim[m->rows] * ovlm_element_bytes(m->type));
        } else if (m->kind == OVLM_MEMBER_SEGMENTS) {
            ovlm_segments *s = member;
            int64_t each = (int64_t)sizeof(int32_t);
            pack_member(p, &s->host_start, (s->n + (s->length == NULL)) * each);
            pack_member(p, &s->host_length, s->n * each);
        }
    }
    if (schema->list_bytes > 0) {
        int64_t n;
        memcpy(&n, (char *)args + schema->n_offset, sizeof n);
        pack_member(p, (char *)args + schema->list_offset, n * (int64_t)schema->list_bytes);
    }
}

int64_t ovlm_op_args_bytes(ovlm_op op, ovlm_pass pass, const void *args)
{
    const ovlm_op_schema *schema = ovlm_op_schemas[op];
    packer p = {NULL, padded((int64_t)schema->args_bytes)};
    pack_args(&p, schema, pass, (void *)(uintptr_t)args);
    return p.bytes;
}

void ovlm_op_args_copy(ovlm_op op, ovlm_pass pass, const void *args, void *to)
{
    const ovlm_op_schema *schema = ovlm_op_schemas[op];
    memcpy(to, args, schema->args_bytes);
    packer p = {(char *)to + padded((int64_t)schema->args_bytes), 0};
    pack_args(&p, schema, pass, to);
}
