/* test_ops_check.c - every operation of a backend against the reference, and proof that the
 * comparison finds what is wrong. */
#include <string.h>

#include "cpu/async.h"
#include "cpu/check.h"
#include "cpu/cpu_device.h"
#include "cpu/ref.h"
#include "op_cases.h"
#include "test.h"

/* All operations of `tested`, beside the reference, in both storage dtypes. */
static void test_backend(const ovlm_ops *tested, int rounds, int64_t size)
{
    ovlm_backend_options options = {.threads = 2};
    ovlm_backend *backend = NULL;
    ovlm_queue *queue = NULL;
    ovlm_err err = {0};
    CHECK(ovlm_check_open(tested, &options, &backend, &err) == OVLM_OK, "%s", err.message);
    CHECK(backend->ops->queue_open(backend, &queue, &err) == OVLM_OK, "%s", err.message);
    for (int i = 0; i < rounds * OVLM_OP_COUNT; i++) {
        op_case c;
        op_result result;
        ovlm_op op = (ovlm_op)(i % OVLM_OP_COUNT);
        op_case_draw(&c, op, i / OVLM_OP_COUNT % 2 ? OVLM_BF16 : OVLM_F32, size, &test_rng);
        ovlm_status status = op_case_run(&c, queue, false, true, &test_rng, &result, &err);
        CHECK(status == OVLM_OK, "%s, %s %s: %s", tested->name, ovlm_dtype_name(c.storage),
              ovlm_op_schemas[op]->name, err.message);
        op_result_free(&result);
        op_case_free(&c);
    }
    backend->ops->queue_close(queue);
    backend->ops->close(backend);
}

/* ---- planted mistakes ---- */

/* Each runs the reference and then spoils one element of what it wrote. */
static void spoil(const ovlm_tensor *t)
{
    if (t->rows > 0 && t->cols > 0) {
        int64_t row = t->rows / 2, col = t->cols - 1;
        double value = ovlm_ref_at(t, row, col);
        ovlm_ref_put(t, row, col, value + 0.02 * (1 + (value < 0 ? -value : value)));
    }
}

#define SPOILED(op, type, pass, member)                                                      \
    static ovlm_status spoiled_##op##_##pass##_##member(ovlm_queue *queue, const type *a,    \
                                                        ovlm_err *err)                       \
    {                                                                                        \
        ovlm_status status = ovlm_ref_##op##_##pass(queue, a, err);                          \
        if (status == OVLM_OK) {                                                             \
            spoil(&a->member);                                                               \
        }                                                                                    \
        return status;                                                                       \
    }
#define SPOILED_OPS(X)                                \
    X(linear, ovlm_linear, fwd, y)                    \
    X(linear, ovlm_linear, bwd, dw)                   \
    X(grouped_linear, ovlm_grouped_linear, fwd, y)    \
    X(grouped_linear, ovlm_grouped_linear, bwd, dx)   \
    X(gated, ovlm_gated, fwd, y)                      \
    X(gated, ovlm_gated, bwd, dgate_up)               \
    X(norm, ovlm_norm, fwd, y)                        \
    X(norm, ovlm_norm, bwd, dx)                       \
    X(rope_table, ovlm_rope_table, fwd, cos)          \
    X(rope, ovlm_rope, fwd, y)                        \
    X(rope, ovlm_rope, bwd, dx)                       \
    X(attention, ovlm_attention, fwd, o)              \
    X(attention, ovlm_attention, bwd, dk)             \
    X(attention, ovlm_attention, fwd, lse)            \
    X(merge, ovlm_merge, fwd, o)                      \
    X(merge, ovlm_merge, fwd, lse)                    \
    X(gather, ovlm_gather, fwd, y)                    \
    X(gather, ovlm_gather, bwd, dx)                   \
    X(scale, ovlm_scale, fwd, y)                      \
    X(scale, ovlm_scale, bwd, dx)                     \
    X(unfold, ovlm_unfold, fwd, y)                    \
    X(unfold, ovlm_unfold, bwd, dx)                   \
    X(router, ovlm_router, fwd, weight)               \
    X(router, ovlm_router, bwd, dlogits)              \
    X(combine, ovlm_combine, fwd, y)                  \
    X(combine, ovlm_combine, bwd, dh)                 \
    X(balance_loss, ovlm_balance_loss, fwd, bias)     \
    X(head, ovlm_head, bwd, dx)
SPOILED_OPS(SPOILED)

/* A router that takes the worst expert instead of the best. */
static ovlm_status wrong_choice(ovlm_queue *queue, const ovlm_router *a, ovlm_err *err)
{
    ovlm_status status = ovlm_ref_router_fwd(queue, a, err);
    for (int64_t t = 0; status == OVLM_OK && t < a->logits.rows; t++) {
        int32_t worst = 0;
        for (int64_t e = 1; e < a->logits.cols; e++) {
            worst = ovlm_ref_at(&a->logits, t, e) < ovlm_ref_at(&a->logits, t, worst) ? (int32_t)e
                                                                                      : worst;
        }
        a->expert[t * a->k] = worst;
    }
    return status;
}

/* Leaves out the last row of a segmented result. */
static ovlm_status row_left_out(ovlm_queue *queue, const ovlm_attention *a, ovlm_err *err)
{
    ovlm_attention b = *a;
    ovlm_segments *s = &b.query;
    if (s->length != NULL && s->n > 0) {
        s->n--;
        b.key.n--;
    }
    return ovlm_ref_attention_fwd(queue, &b, err);
}

/* Cases until one is found wrong; how many were, of those where it could show. */
static void find_mistake(const ovlm_ops *spoiled, ovlm_op op, const char *what)
{
    ovlm_backend_options options = {.threads = 1};
    ovlm_backend *backend = NULL;
    ovlm_queue *queue = NULL;
    ovlm_err err = {0};
    int found = 0;
    CHECK(ovlm_check_open(spoiled, &options, &backend, &err) == OVLM_OK, "%s", err.message);
    CHECK(backend->ops->queue_open(backend, &queue, &err) == OVLM_OK, "%s", err.message);
    for (int i = 0; i < 40 && found == 0; i++) {
        op_case c;
        op_result result;
        op_case_draw(&c, op, OVLM_F32, 9, &test_rng);
        c.in_place = false;
        ovlm_status status = op_case_run(&c, queue, false, true, &test_rng, &result, &err);
        if (status != OVLM_OK) {
            found++;
            CHECK(status == OVLM_E_BACKEND, "%s: %d", what, (int)status);
            CHECK(strncmp(err.message, ovlm_op_schemas[op]->name,
                          strlen(ovlm_op_schemas[op]->name)) == 0 &&
                      strstr(err.message, what) != NULL,
                  "%s is not named by \"%s\"", what, err.message);
        }
        op_result_free(&result);
        op_case_free(&c);
    }
    CHECK(found > 0, "the mistake in %s of %s was not found", what, ovlm_op_schemas[op]->name);
    backend->ops->queue_close(queue);
    backend->ops->close(backend);
}

static ovlm_ops planted; /* the reference's table with one wrong entry; open() shows it */

static ovlm_status planted_open(const ovlm_backend_options *options, ovlm_backend **backend,
                                ovlm_err *err)
{
    ovlm_status status = ovlm_ref_ops.open(options, backend, err);
    if (status == OVLM_OK) {
        (*backend)->ops = &planted;
    }
    return status;
}

static void plant(void)
{
    planted = ovlm_ref_ops;
    planted.name = "planted";
    planted.open = planted_open;
}

static void test_planted(void)
{
#define PLANT(op, type, pass, member)                  \
    plant();                                           \
    planted.op.pass = spoiled_##op##_##pass##_##member;           \
    find_mistake(&planted, OVLM_OP_##op, #member);
    SPOILED_OPS(PLANT)
    plant();
    planted.router.fwd = wrong_choice;
    find_mistake(&planted, OVLM_OP_router, "expert");
    plant();
    planted.attention.fwd = row_left_out;
    find_mistake(&planted, OVLM_OP_attention, "o[");
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    test_backend(&ovlm_ref_ops, 40, 9);
    test_backend(&ovlm_ref_ops, 2, 70);
    test_planted();
    test_backend(&ovlm_cpu_ops, 40, 9);
    test_backend(&ovlm_cpu_ops, 4, 70);
    return test_end("ops_check");
}
