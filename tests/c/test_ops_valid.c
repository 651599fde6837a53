/* test_ops_valid.c - the validator: what is drawn is accepted, what is spoiled is refused by name,
 * and junk never reaches memory. */
#include <string.h>

#include "cpu/cpu_device.h"
#include "cpu/ref.h"
#include "op_cases.h"
#include "test.h"

static const char *pass_name[] = {"measure", "forward", "backward"};

static ovlm_pass random_pass(ovlm_op op)
{
    return op_has_backward(op) && ovlm_rng_below(&test_rng, 2) ? OVLM_PASS_BWD : OVLM_PASS_FWD;
}

/* A member that the pass uses and that holds something. */
static const ovlm_member *random_tensor(const op_case *c, ovlm_pass pass)
{
    const ovlm_op_schema *schema = ovlm_op_schemas[c->op];
    const ovlm_member *found = NULL;
    int64_t seen = 0;
    for (int i = 0; i < schema->member_n; i++) {
        const ovlm_member *m = &schema->member[i];
        const ovlm_tensor *t = ovlm_member_at(m, &c->args);
        if (m->kind == OVLM_MEMBER_TENSOR && ovlm_member_role(m, &c->args, pass) != OVLM_UNUSED &&
            t->rows > 0 && t->cols > 0 && ovlm_rng_below(&test_rng, ++seen) == 0) {
            found = m;
        }
    }
    return found;
}

static void expect_refused(const op_case *c, ovlm_pass pass, const char *member, const char *what)
{
    ovlm_err err = {0};
    ovlm_status status = ovlm_op_check(c->op, &c->args, pass, &err);
    const char *op = ovlm_op_schemas[c->op]->name;
    CHECK(status == OVLM_E_ARG, "%s %s: %s with %s was not refused", op, pass_name[pass], member,
          what);
    CHECK(status != OVLM_E_ARG ||
              (strncmp(err.message, op, strlen(op)) == 0 && strstr(err.message, member) != NULL),
          "%s, %s: \"%s\" does not name it", member, what, err.message);
}

enum { DTYPE_UNKNOWN, DTYPE_WRONG, NARROW, NO_MEMORY, MISALIGNED, NEGATIVE, HUGE_ROWS, OVERLAP,
       SPOIL_COUNT };
static const char *spoil_name[] = {"an unknown dtype", "int64", "a stride below its columns",
                                   "no memory", "a misaligned address", "negative rows",
                                   "rows beyond all memory", "the memory of another"};

/* Spoils a tensor; false where it cannot be done so. */
static bool spoil(op_case *c, ovlm_pass pass, const ovlm_member *m, int how)
{
    ovlm_tensor *t = ovlm_member_at(m, &c->args);
    switch (how) {
    case DTYPE_UNKNOWN: memset(&t->dtype, 0x7b, sizeof t->dtype); return true;
    case DTYPE_WRONG: t->dtype = OVLM_I64; return true;
    case NARROW: t->stride = t->cols - 1; return true;
    case NO_MEMORY: t->data = NULL; return true;
    case MISALIGNED: t->data = (char *)t->data + 1; return true;
    case NEGATIVE: t->rows = -t->rows; return true;
    case HUGE_ROWS: t->rows = INT64_MAX / 2; return true;
    case OVERLAP: break;
    default: return false;
    }
    const ovlm_member *other = random_tensor(c, pass);
    const ovlm_tensor *memory = ovlm_member_at(other, &c->args);
    bool named = (m->alias != NULL && strcmp(m->alias, other->name) == 0) ||
                 (other->alias != NULL && strcmp(other->alias, m->name) == 0);
    bool written = ((ovlm_member_role(m, &c->args, pass) |
                     ovlm_member_role(other, &c->args, pass)) & OVLM_OUT) != 0;
    if (other == m || named || !written) {
        return false;
    }
    t->data = memory->data;
    return true;
}

static void test_spoiled(int rounds)
{
    for (int i = 0; i < rounds * OVLM_OP_COUNT; i++) {
        op_case c;
        op_case_draw(&c, (ovlm_op)(i % OVLM_OP_COUNT), OVLM_F32, 7, &test_rng);
        ovlm_err err = {0};
        ovlm_pass pass = c.op == OVLM_OP_head && c.args.head.fused ? OVLM_PASS_FWD
                                                                   : random_pass(c.op);
        CHECK(ovlm_op_check(c.op, &c.args, pass, &err) == OVLM_OK, "%s", err.message);
        CHECK(ovlm_op_check(c.op, &c.args, OVLM_PASS_MEASURE, &err) == OVLM_OK, "%s", err.message);
        const ovlm_member *m = random_tensor(&c, pass);
        int how = (int)ovlm_rng_below(&test_rng, SPOIL_COUNT);
        if (m != NULL && spoil(&c, pass, m, how)) {
            /* An overlap is named by either end. */
            expect_refused(&c, pass, how == OVERLAP ? "overlaps" : m->name, spoil_name[how]);
        }
        op_case_free(&c);
    }
}

/* An extent that is off by one is refused unless it is free (as x's rows are for gather), and then
 * what runs stays inside (AddressSanitizer watches). */
static void test_off_by_one(ovlm_queue *queue, int rounds)
{
    int refused = 0;
    for (int i = 0; i < rounds * OVLM_OP_COUNT; i++) {
        op_case c;
        ovlm_err err = {0};
        ovlm_op op = (ovlm_op)(i % OVLM_OP_COUNT);
        op_case_draw(&c, op, OVLM_F32, 7, &test_rng);
        const ovlm_member *m = random_tensor(&c, OVLM_PASS_FWD);
        if (m != NULL) {
            ovlm_tensor *t = ovlm_member_at(m, &c.args);
            bool rows = ovlm_rng_below(&test_rng, 2);
            t->rows -= rows;
            t->cols -= !rows;
            ovlm_op_bytes bytes;
            ovlm_status status = ovlm_op_measure(&ovlm_ref_ops, op, queue->backend, &c.args,
                                                 &bytes, &err);
            void *work = NULL;
            if (status == OVLM_OK &&
                ovlm_arena_alloc(&c.arena, &work, bytes.fwd_work, 1, &err) == OVLM_OK) {
                c.args.scratch.work = work;
                status = ovlm_op_run(&ovlm_ref_ops, op, OVLM_PASS_FWD, queue, &c.args, &err);
                (void)queue->backend->ops->queue_wait(queue, NULL);
            }
            CHECK(status == OVLM_OK || status == OVLM_E_ARG, "%s", err.message);
            refused += status == OVLM_E_ARG;
        }
        op_case_free(&c);
    }
    CHECK(refused > rounds, "only %d were refused", refused);
}

/* Whole structs of junk in the members that have a form of their own. */
static void test_junk(int rounds)
{
    for (int i = 0; i < rounds * OVLM_OP_COUNT; i++) {
        op_case c;
        ovlm_err err = {0};
        ovlm_op op = (ovlm_op)(i % OVLM_OP_COUNT);
        const ovlm_op_schema *schema = ovlm_op_schemas[op];
        op_case_draw(&c, op, OVLM_F32, 7, &test_rng);
        for (int j = 0; j < schema->member_n; j++) {
            const ovlm_member *m = &schema->member[j];
            size_t bytes = m->kind == OVLM_MEMBER_TENSOR     ? sizeof(ovlm_tensor)
                           : m->kind == OVLM_MEMBER_SEGMENTS ? sizeof(ovlm_segments)
                                                             : sizeof(float);
            for (size_t k = 0; k < bytes && ovlm_rng_below(&test_rng, 2); k++) {
                char *at = ovlm_member_at(m, &c.args);
                at[ovlm_rng_below(&test_rng, (int64_t)bytes)] = (char)ovlm_rng_next(&test_rng);
            }
        }
        for (int pass = OVLM_PASS_MEASURE; pass <= OVLM_PASS_BWD; pass++) {
            ovlm_status status = ovlm_op_check(op, &c.args, (ovlm_pass)pass, &err);
            CHECK(status == OVLM_OK || status == OVLM_E_ARG, "%d", (int)status);
        }
        op_case_free(&c);
    }
}

/* ---- scalars and rules, one by one ---- */

/* A case that the pass takes. */
static void draw_valid(op_case *c, ovlm_op op, ovlm_pass pass)
{
    op_case_draw(c, op, OVLM_F32, 7, &test_rng);
    while (ovlm_op_check(op, &c->args, pass, NULL) != OVLM_OK) {
        op_case_free(c);
        op_case_draw(c, op, OVLM_F32, 7, &test_rng);
    }
}

#define REFUSED(op, pass, change, text)                                                     \
    do {                                                                                    \
        op_case c;                                                                          \
        ovlm_err err = {0};                                                                 \
        draw_valid(&c, OVLM_OP_##op, pass);                                                 \
        c.args.op.change;                                                                   \
        CHECK(ovlm_op_check_##op(&c.args.op, pass, &err) == OVLM_E_ARG, "%s", #change);      \
        CHECK(strstr(err.message, text) != NULL, "%s: %s", #change, err.message);           \
        op_case_free(&c);                                                                   \
    } while (0)

static void test_scalars(void)
{
    REFUSED(linear, OVLM_PASS_FWD, act = (ovlm_act)9, "act must be");
    REFUSED(linear, OVLM_PASS_BWD, dx_beta = 0.5f, "dx_beta is 0.5");
    REFUSED(linear, OVLM_PASS_FWD, y.cols += 1, "linear: ");
    REFUSED(linear, OVLM_PASS_FWD, scratch.work = (void *)32, "not aligned to 64 bytes");
    REFUSED(grouped_linear, OVLM_PASS_FWD, groups = 0, "groups must be in [1");
    REFUSED(grouped_linear, OVLM_PASS_FWD, groups = INT64_MAX, "groups must be in [1");
    REFUSED(grouped_linear, OVLM_PASS_FWD, first = -1, "first must be in [0");
    REFUSED(norm, OVLM_PASS_FWD, groups = 1000, "groups = 1000 must divide");
    REFUSED(norm, OVLM_PASS_FWD, eps = -1, "eps must be");
    REFUSED(rope, OVLM_PASS_FWD, heads = 0, "heads must be");
    REFUSED(rope, OVLM_PASS_FWD, heads = 1000, "heads = 1000 must divide");
    REFUSED(attention, OVLM_PASS_FWD, kv_heads = 5, "kv_heads = 5 must divide");
    REFUSED(attention, OVLM_PASS_FWD, query.n += 1, "give as many of each");
    REFUSED(attention, OVLM_PASS_FWD, query.max_len = -1, "query has n");
    REFUSED(gather, OVLM_PASS_FWD, taps = 0, "taps must be");
    REFUSED(scale, OVLM_PASS_FWD, alpha = 1.0 / 0.0, "alpha must be finite");
    REFUSED(unfold, OVLM_PASS_FWD, kernel_height = 100, "larger than the padded image");
    REFUSED(unfold, OVLM_PASS_FWD, kernel_width = 100, "larger than the padded image");
    REFUSED(unfold, OVLM_PASS_FWD, kernel_width = 0, "kernel_width must be");
    REFUSED(unfold, OVLM_PASS_FWD, stride = 0, "stride must be");
    REFUSED(router, OVLM_PASS_FWD, k = 100, "k = 100 is more than");
    REFUSED(router, OVLM_PASS_FWD, teams = 77, "teams = 77 must divide");
    REFUSED(combine, OVLM_PASS_FWD, k = -1, "k must be");
    REFUSED(combine, OVLM_PASS_BWD, first = -1, "first must be");
    REFUSED(balance_loss, OVLM_PASS_FWD, count = NULL, "count is NULL");
    REFUSED(balance_loss, OVLM_PASS_FWD, rows = -1, "rows must be");
    REFUSED(targets, OVLM_PASS_FWD, total = NULL, "total is NULL");
    REFUSED(head, OVLM_PASS_BWD, fused = true, "do not call the backward");
    REFUSED(grad_norm, OVLM_PASS_FWD, n = -1, "n must be");
    REFUSED(adamw, OVLM_PASS_FWD, step = 0, "step counts from 1");
    REFUSED(adamw, OVLM_PASS_FWD, beta1 = 1, "beta1 must be in");
}

/* A tensor of a list is named with its place. */
static void test_list(void)
{
    float memory[8] = {0};
    ovlm_grad_stats stats = {0};
    ovlm_err err = {0};
    ovlm_adamw_part part[2] = {0};
    ovlm_adamw a = {.n = 2, .step = 1, .part = part, .stats = &stats};
    for (int i = 0; i < 2; i++) {
        part[i].w = ovlm_tensor_of(memory + 4 * i, 1, 1, OVLM_F32);
        part[i].m = ovlm_tensor_of(memory + 4 * i + 1, 1, 1, OVLM_F32);
        part[i].v = ovlm_tensor_of(memory + 4 * i + 2, 1, 1, OVLM_F32);
        part[i].grad = ovlm_tensor_of(memory + 4 * i + 3, 1, 1, OVLM_F32);
    }
    CHECK(ovlm_op_check_adamw(&a, OVLM_PASS_FWD, &err) == OVLM_OK, "%s", err.message);
    part[1].v.cols = 2;
    CHECK(ovlm_op_check_adamw(&a, OVLM_PASS_FWD, &err) == OVLM_E_ARG, "v is wider than w");
    CHECK(strstr(err.message, "v of part 1") != NULL, "%s", err.message);
    part[1].v = part[1].m;
    CHECK(ovlm_op_check_adamw(&a, OVLM_PASS_FWD, &err) == OVLM_E_ARG, "v is m");
    part[1].v = ovlm_tensor_of(memory + 6, 1, 1, OVLM_F32);
    part[1].w.dtype = OVLM_BF16;
    CHECK(ovlm_op_check_adamw(&a, OVLM_PASS_FWD, &err) == OVLM_E_ARG, "bfloat16 without a master");
}

/* Slices of one matrix: they lie between each other, and overlap when one is wider. */
static void test_slices(void)
{
    static float qkv[4 * 12], o[4 * 4];
    static int32_t start[] = {0, 4};
    ovlm_tensor all = ovlm_tensor_of(qkv, 4, 12, OVLM_F32);
    ovlm_attention a = {.heads = 1, .kv_heads = 1, .scale = 1};
    a.query = a.key = (ovlm_segments){.n = 1, .max_len = 4, .start = start};
    a.q = a.k = a.v = ovlm_tensor_of(o, 4, 4, OVLM_F32);
    a.o = a.dout = a.q;
    a.dq = ovlm_tensor_cols(all, 0, 4);
    a.dk = ovlm_tensor_cols(all, 4, 4);
    a.dv = ovlm_tensor_cols(all, 8, 4);
    ovlm_err err = {0};
    CHECK(ovlm_op_check_attention(&a, OVLM_PASS_BWD, &err) == OVLM_OK, "%s", err.message);
    a.dk = ovlm_tensor_cols(all, 3, 4);
    CHECK(ovlm_op_check_attention(&a, OVLM_PASS_BWD, &err) == OVLM_E_ARG &&
              strstr(err.message, "overlaps") != NULL, "%s", err.message);
    a.dk = ovlm_tensor_cols(all, 9, 3);
    CHECK(ovlm_op_check_attention(&a, OVLM_PASS_BWD, &err) == OVLM_E_ARG, "dk of 3 columns");
}

static bool any_columns(const ovlm_member *member, int n, const void *args)
{
    bool found = false;
    for (int i = 0; i < n; i++) {
        const ovlm_tensor *t = (const void *)((const char *)args + member[i].offset);
        found = found || (member[i].kind == OVLM_MEMBER_TENSOR && t->cols > 0);
    }
    return found;
}

/* Whether a case has a tensor at all. */
static bool has_tensor(const op_case *c)
{
    const ovlm_op_schema *schema = ovlm_op_schemas[c->op];
    const char *args = (const char *)&c->args;
    bool found = any_columns(schema->member, schema->member_n, args);
    if (schema->list_bytes != 0) {
        int64_t n = *(const int64_t *)(const void *)(args + schema->n_offset);
        const char *list = *(const char *const *)(const void *)(args + schema->list_offset);
        for (int64_t i = 0; i < n; i++) {
            found = found || any_columns(schema->list_member, schema->list_member_n,
                                         list + (size_t)i * schema->list_bytes);
        }
    }
    return found;
}

/* The CPU backend computes float64 in no operation but scale, and says so: never garbage. */
static void test_float64_is_refused(int draws)
{
    const ovlm_backend_options options = {.threads = 1};
    ovlm_backend *backend = NULL;
    ovlm_queue *queue = NULL;
    CHECK(ovlm_cpu_ops.open(&options, &backend, NULL) == OVLM_OK, "open");
    CHECK(ovlm_cpu_ops.queue_open(backend, &queue, NULL) == OVLM_OK, "queue");
    for (int i = 0; i < draws * OVLM_OP_COUNT; i++) {
        ovlm_op op = (ovlm_op)(i % OVLM_OP_COUNT);
        op_case c;
        op_result result;
        ovlm_err err = {0};
        op_case_draw(&c, op, OVLM_F32, 9, &test_rng);
        ovlm_status status = op_case_run(&c, queue, true, op_has_backward(op), &test_rng, &result,
                                         &err);
        op_result_free(&result);
        CHECK(op == OVLM_OP_scale || !has_tensor(&c) ||
                  (status == OVLM_E_ARG && strstr(err.message, "float64") != NULL),
              "%s: %s", ovlm_op_schemas[op]->name, err.message);
        op_case_free(&c);
    }
    ovlm_cpu_ops.queue_close(queue);
    ovlm_cpu_ops.close(backend);
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    ovlm_backend_options options = {0};
    ovlm_backend *backend = NULL;
    ovlm_queue *queue = NULL;
    CHECK(ovlm_ref_ops.open(&options, &backend, NULL) == OVLM_OK, "open");
    CHECK(ovlm_ref_ops.queue_open(backend, &queue, NULL) == OVLM_OK, "queue");
    test_spoiled(300);
    test_off_by_one(queue, 100);
    test_junk(500);
    test_scalars();
    test_list();
    test_slices();
    test_float64_is_refused(20);
    ovlm_ref_ops.queue_close(queue);
    ovlm_ref_ops.close(backend);
    return test_end("ops_valid");
}
