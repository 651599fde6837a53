/* test_ops_ref.c - the reference against what it is not made of: central differences of its own
 * forwards in double, and the formulas of the operations that have no backward. */
#include <math.h>
#include <string.h>

#include "cpu/ref.h"
#include "op_cases.h"
#include "test.h"

static ovlm_queue *queue;

/* Which member's slope another one holds. */
typedef struct slope_of {
    ovlm_op op;
    const char *of, *is;
} slope_of;

static const slope_of outputs[] = {
    {OVLM_OP_linear, "y", "dy"},       {OVLM_OP_grouped_linear, "y", "dy"},
    {OVLM_OP_gated, "y", "dy"},        {OVLM_OP_norm, "y", "dy"},
    {OVLM_OP_rope, "y", "dy"},         {OVLM_OP_attention, "o", "dout"},
    {OVLM_OP_gather, "y", "dy"},       {OVLM_OP_scale, "y", "dy"},
    {OVLM_OP_unfold, "y", "dy"},       {OVLM_OP_router, "weight", "dweight"},
    {OVLM_OP_combine, "y", "dy"},
};

static const slope_of inputs[] = {
    {OVLM_OP_linear, "x", "dx"},         {OVLM_OP_linear, "w", "dw"},
    {OVLM_OP_linear, "bias", "dbias"},   {OVLM_OP_grouped_linear, "x", "dx"},
    {OVLM_OP_grouped_linear, "w", "dw"}, {OVLM_OP_gated, "gate_up", "dgate_up"},
    {OVLM_OP_norm, "x", "dx"},           {OVLM_OP_norm, "w", "dw"},
    {OVLM_OP_norm, "bias", "dbias"},     {OVLM_OP_rope, "x", "dx"},
    {OVLM_OP_rope, "w", "dw"},           {OVLM_OP_attention, "q", "dq"},
    {OVLM_OP_attention, "k", "dk"},      {OVLM_OP_attention, "v", "dv"},
    {OVLM_OP_gather, "x", "dx"},         {OVLM_OP_scale, "x", "dx"},
    {OVLM_OP_unfold, "x", "dx"},         {OVLM_OP_router, "logits", "dlogits"},
    {OVLM_OP_combine, "h", "dh"},        {OVLM_OP_combine, "weight", "dweight"},
    {OVLM_OP_head, "x", "dx"},           {OVLM_OP_head, "w", "dw"},
};

/* Sum of slopes times log p and entropies, from x and w alone: the reference's are float32. */
static double head_objective(const ovlm_head *a)
{
    double sum = 0;
    for (int64_t t = 0; t < a->x.rows; t++) {
        double z = 0, mean = 0, own = 0;
        for (int64_t v = 0; v < a->w.rows; v++) {
            double logit = 0;
            for (int64_t c = 0; c < a->w.cols; c++) {
                logit += ((double *)a->x.data)[t * a->x.cols + c] *
                         ((double *)a->w.data)[v * a->w.cols + c];
            }
            z += exp(logit);
            mean += exp(logit) * logit;
            own = v == a->label[t] ? logit : own;
        }
        if (a->label[t] != -100) {
            double entropy = log(z) - mean / z; /* -sum p log p */
            sum += (double)a->dlogp[t] * (own - log(z));
            sum += a->dentropy == NULL ? 0 : (double)a->dentropy[t] * entropy;
        }
    }
    return sum;
}

/* The number whose gradient the backward computes. */
static double objective(op_case *c)
{
    op_result result;
    ovlm_err err = {0};
    double sum = 0;
    if (c->op == OVLM_OP_head) {
        return head_objective(&c->args.head);
    }
    CHECK(op_case_run(c, queue, true, false, &test_rng, &result, &err) == OVLM_OK, "%s",
          err.message);
    for (size_t i = 0; i < sizeof outputs / sizeof *outputs; i++) {
        if (outputs[i].op != c->op) {
            continue;
        }
        const ovlm_tensor *y = op_tensor(c->op, &result.args, outputs[i].of);
        const ovlm_tensor *dy = op_tensor(c->op, &c->args, outputs[i].is);
        for (int64_t j = 0; j < y->rows * y->cols; j++) {
            double value = ((double *)y->data)[j]; /* NaN: not written */
            sum += isnan(value) ? 0 : value * ((double *)dy->data)[j];
        }
    }
    const ovlm_router *router = &c->args.router;
    for (int64_t e = 0; c->op == OVLM_OP_router && ovlm_tensor_given(&router->aux) &&
                        e < router->logits.cols; e++) {
        sum += ((double *)router->aux.data)[e] * result.args.router.score_sum[e];
    }
    op_result_free(&result);
    return sum;
}

/* d objective / d *x by central differences of fourth order. */
static double difference(op_case *c, double *x, double h)
{
    double x0 = *x, f[4];
    const double at[4] = {1, -1, 2, -2};
    for (int i = 0; i < 4; i++) {
        *x = x0 + at[i] * h;
        f[i] = objective(c);
    }
    *x = x0;
    return (8 * (f[0] - f[1]) - (f[2] - f[3])) / (12 * h);
}

/* What the backward says of element `at` of the input: one element of the gradient, or, where rows
 * are read by index, the sum over those who read it. */
static double said(const op_case *c, const slope_of *s, const ovlm_tensor *gradient, int64_t at)
{
    const ovlm_grouped_linear *a = &c->args.grouped_linear;
    if (c->op != OVLM_OP_grouped_linear || strcmp(s->of, "x") != 0) {
        return ((double *)gradient->data)[at];
    }
    double sum = 0;
    for (int64_t r = 0; r < a->y.rows && a->first + r < a->offsets[a->groups]; r++) {
        int64_t source = a->index == NULL ? r : a->index[r];
        sum += source == at / a->x.cols ? ((double *)gradient->data)[r * a->x.cols + at % a->x.cols]
                                        : 0;
    }
    return sum;
}

/* Random elements of one input; `before` is what the gradient was added to. */
static void check_input(op_case *c, const slope_of *s, const op_result *result)
{
    ovlm_tensor *x = op_tensor(c->op, &c->args, s->of);
    const ovlm_tensor *before = op_tensor(c->op, &c->args, s->is);
    ovlm_tensor gradient = *op_tensor(c->op, (void *)(uintptr_t)&result->args, s->is);
    int64_t n = x->rows * x->cols, m = gradient.rows * gradient.cols;
    if (!ovlm_tensor_given(x) || !ovlm_tensor_given(before) || n == 0) {
        return;
    }
    double squares = 0;
    for (int64_t i = 0; i < m; i++) {
        double old = ((double *)before->data)[i];
        double *g = &((double *)gradient.data)[i];
        *g -= isnan(old) ? 0 : old;
        squares += isnan(*g) ? 0 : *g * *g;
    }
    for (int i = 0; i < 4; i++) {
        int64_t at = ovlm_rng_below(&test_rng, n);
        double g = said(c, s, &gradient, at), fd = 0, size = 0;
        g = isnan(g) ? 0 : g; /* a row that no segment holds */
        /* A norm of a part that hardly varies bends sharply, which needs a smaller step. */
        for (double h = 1e-3; h > 1e-6; h /= 10) {
            fd = difference(c, (double *)x->data + at, h);
            size = fmax(fabs(fd), sqrt(squares / (double)m));
            if (fabs(fd - g) <= 1e-6 * size + 1e-9) {
                break;
            }
        }
        CHECK(fabs(fd - g) <= 1e-6 * size + 1e-9, "%s: %s[%lld] is %.12g, differences give %.12g",
              ovlm_op_schemas[c->op]->name, s->is, (long long)at, g, fd);
    }
}

/* A choice must not change under a perturbation, so it is replayed. */
static void fix_choice(op_case *c)
{
    op_result result;
    ovlm_router *a = &c->args.router;
    ovlm_err err = {0};
    static double none[64];
    a->score_sum = a->score_sum == NULL ? none : a->score_sum;
    CHECK(op_case_run(c, queue, true, false, &test_rng, &result, &err) == OVLM_OK, "%s",
          err.message);
    memcpy(a->expert, result.args.router.expert,
           (size_t)(a->logits.rows * a->k) * sizeof *a->expert);
    a->replay = true;
    op_result_free(&result);
}

static void test_gradients(ovlm_op op, int rounds)
{
    for (int i = 0; i < rounds; i++) {
        op_case c;
        op_result result;
        ovlm_err err = {0};
        op_case_draw(&c, op, OVLM_F32, 6, &test_rng);
        c.pixels = false;
        if (op == OVLM_OP_router) {
            fix_choice(&c);
        }
        CHECK(op_case_run(&c, queue, true, true, &test_rng, &result, &err) == OVLM_OK, "%s",
              err.message);
        c.in_place = false;
        for (size_t j = 0; j < sizeof inputs / sizeof *inputs; j++) {
            if (inputs[j].op == op) {
                check_input(&c, &inputs[j], &result);
            }
        }
        op_result_free(&result);
        op_case_free(&c);
    }
}

/* Log p and entropy of the head, which are float32, against another way to compute them. */
static void test_head_values(int rounds)
{
    for (int i = 0; i < rounds; i++) {
        op_case c;
        op_result result;
        ovlm_err err = {0};
        double loss = 0;
        op_case_draw(&c, OVLM_OP_head, OVLM_F32, 8, &test_rng);
        ovlm_head one = c.args.head;
        CHECK(op_case_run(&c, queue, true, false, &test_rng, &result, &err) == OVLM_OK, "%s",
              err.message);
        for (int64_t t = 0; t < one.x.rows; t++) {
            float unit = 1, zero = 0;
            ovlm_head row = one;
            row.x = ovlm_tensor_rows(one.x, t, 1);
            row.label = one.label + t;
            row.dlogp = &unit;
            row.dentropy = NULL;
            double logp = head_objective(&row);
            row.dlogp = &zero;
            row.dentropy = &unit;
            double entropy = head_objective(&row);
            loss += (double)one.dlogp[t] * logp;
            CHECK(fabs((double)result.args.head.logp[t] - logp) <= 1e-6 * (1 + fabs(logp)),
                  "logp %g %g", (double)result.args.head.logp[t], logp);
            CHECK(one.entropy == NULL ||
                      fabs((double)result.args.head.entropy[t] - entropy) <= 1e-6 * (1 + entropy),
                  "entropy");
        }
        CHECK(one.loss == NULL || fabs(*result.args.head.loss - *one.loss - loss) <= 1e-9, "loss");
        op_result_free(&result);
        op_case_free(&c);
    }
}

/* Rows of a router: sorted by expert, then token, and back. */
static void test_router_rows(int rounds)
{
    for (int i = 0; i < rounds; i++) {
        op_case c;
        op_result result;
        ovlm_err err = {0};
        op_case_draw(&c, OVLM_OP_router, OVLM_F32, 9, &test_rng);
        CHECK(op_case_run(&c, queue, true, false, &test_rng, &result, &err) == OVLM_OK, "%s",
              err.message);
        const ovlm_router *a = &result.args.router, *old = &c.args.router;
        int64_t slots = a->logits.rows * a->k, experts = a->logits.cols;
        CHECK(a->offsets[0] == 0 && a->offsets[experts] == slots, "offsets");
        for (int64_t s = 0; s < slots; s++) {
            int64_t row = a->row[s], e = a->expert[s];
            CHECK(row >= a->offsets[e] && row < a->offsets[e + 1], "row of another expert");
            CHECK(a->token[row] == s / a->k, "token");
        }
        for (int64_t e = 0; e < experts; e++) {
            for (int64_t r = a->offsets[e] + 1; r < a->offsets[e + 1]; r++) {
                CHECK(a->token[r] > a->token[r - 1], "tokens of an expert ascend");
            }
            CHECK(a->count == NULL ||
                      a->count[e] - old->count[e] == a->offsets[e + 1] - a->offsets[e], "count");
        }
        op_result_free(&result);
        op_case_free(&c);
    }
}

/* No expert that was left is better than one that was taken, team by team. */
static void test_router_choice(int rounds)
{
    for (int i = 0; i < rounds; i++) {
        op_case c;
        op_result result;
        ovlm_err err = {0};
        op_case_draw(&c, OVLM_OP_router, OVLM_F32, 9, &test_rng);
        CHECK(op_case_run(&c, queue, true, false, &test_rng, &result, &err) == OVLM_OK, "%s",
              err.message);
        const ovlm_router *a = &result.args.router;
        int64_t experts = a->logits.cols, each = experts / a->teams;
        for (int64_t t = 0; t < a->logits.rows; t++) {
            double choice[32], z = 0;
            bool taken[32] = {false}, team[32] = {false};
            for (int64_t e = 0; e < experts; e++) {
                choice[e] = exp(((double *)a->logits.data)[t * experts + e]);
                z += choice[e];
            }
            int64_t teams = 0;
            for (int64_t e = 0; e < experts; e++) {
                choice[e] = a->sigmoid ? choice[e] / (1 + choice[e]) : choice[e] / z;
                choice[e] += ovlm_tensor_given(&a->bias) ? ((double *)a->bias.data)[e] : 0;
            }
            for (int64_t j = 0; j < a->k; j++) {
                int32_t e = a->expert[t * a->k + j];
                CHECK(!taken[e], "expert twice");
                taken[e] = true;
                teams += !team[e / each];
                team[e / each] = true;
            }
            CHECK(a->teams == 1 || teams <= a->limit, "too many teams");
            for (int64_t e = 0; e < experts; e++) {
                for (int64_t f = 0; f < experts; f++) { /* e taken, f left, in a team in use */
                    bool rivals = taken[e] && !taken[f] && team[f / each];
                    CHECK(!rivals || choice[e] >= choice[f] - 1e-12,
                          "expert %lld beats %lld", (long long)f, (long long)e);
                }
            }
        }
        op_result_free(&result);
        op_case_free(&c);
    }
}

/* ---- forwards without a backward ---- */

static void test_rope_table(void)
{
    double position[] = {3, 5}, frequency[] = {0.5, 2}, c[2], s[2];
    int32_t axis[] = {1, 0};
    ovlm_rope_table a = {.axis = axis};
    a.position = ovlm_tensor_of(position, 2, 1, OVLM_F64);
    a.frequency = ovlm_tensor_of(frequency, 1, 2, OVLM_F64);
    a.cos = ovlm_tensor_of(c, 1, 2, OVLM_F64);
    a.sin = ovlm_tensor_of(s, 1, 2, OVLM_F64);
    CHECK(ovlm_ref_rope_table_fwd(queue, &a, NULL) == OVLM_OK, "rope_table");
    CHECK(fabs(c[0] - cos(2.5)) < 1e-15 && fabs(s[1] - sin(6)) < 1e-15, "cos and sin");
}

static void test_targets(void)
{
    int32_t label[] = {4, -100, 0};
    float weight[] = {1, 9, 3}, dlogp[3];
    double total = 0;
    int64_t count = 5;
    ovlm_targets a = {.n = 3, .label = label, .weight = weight, .own_total = true,
                      .total = &total, .count = &count, .dlogp = dlogp};
    CHECK(ovlm_ref_targets_fwd(queue, &a, NULL) == OVLM_OK, "targets");
    CHECK(total == 4 && count == 7, "total %g, count %lld", total, (long long)count);
    CHECK(dlogp[0] == -0.25f && dlogp[1] == 0 && dlogp[2] == -0.75f, "dlogp");
    total = 0;
    a.own_total = false;
    CHECK(ovlm_ref_targets_fwd(queue, &a, NULL) == OVLM_OK && dlogp[0] == 0, "no target, no slope");
}

static void test_balance_loss(void)
{
    int64_t count[] = {6, 2};
    double score_sum[] = {5, 3}, loss = 1, bias[] = {0, 0};
    float slope[2];
    ovlm_balance_loss a = {.experts = 2, .rows = 8, .coef = 0.5, .speed = 0.25, .count = count,
                           .score_sum = score_sum, .loss = &loss, .slope = slope};
    a.bias = ovlm_tensor_of(bias, 1, 2, OVLM_F64);
    CHECK(ovlm_ref_balance_loss_fwd(queue, &a, NULL) == OVLM_OK, "balance_loss");
    /* f = 3/4, 1/4; mean scores 5/8, 3/8: 1 + 0.5 * 2 * (15/32 + 3/32) */
    CHECK(fabs(loss - 1.5625) < 1e-15, "loss %g", loss);
    CHECK(slope[0] == 0.09375f && slope[1] == 0.03125f, "slope");
    CHECK(bias[0] == -0.25 && bias[1] == 0.25, "bias");
}

/* Ten steps of one weight, by the algorithm as printed, and the gate on what is not finite. */
static void test_adamw(void)
{
    double w = 2, m = 0, v = 0, g = 0, our = 2, our_m = 0, our_v = 0;
    ovlm_grad_stats stats = {0};
    ovlm_adamw_part part = {.lr = 0.1, .weight_decay = 0.01};
    part.w = ovlm_tensor_of(&w, 1, 1, OVLM_F64);
    part.m = ovlm_tensor_of(&m, 1, 1, OVLM_F64);
    part.v = ovlm_tensor_of(&v, 1, 1, OVLM_F64);
    part.grad = ovlm_tensor_of(&g, 1, 1, OVLM_F64);
    ovlm_grad_norm norm = {.n = 1, .grad = &part.grad, .stats = &stats};
    ovlm_adamw a = {.n = 1, .part = &part, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8,
                    .max_norm = 1, .stats = &stats};
    for (int t = 1; t <= 10; t++) {
        g = 3 * ovlm_rng_uniform(&test_rng) - 1;
        stats = (ovlm_grad_stats){0};
        a.step = t;
        CHECK(ovlm_ref_grad_norm_fwd(queue, &norm, NULL) == OVLM_OK, "grad_norm");
        CHECK(ovlm_ref_adamw_fwd(queue, &a, NULL) == OVLM_OK, "adamw");
        double clip = fabs(g) > 1 ? 1 / (fabs(g) + 1e-6) : 1, gc = g * clip;
        our -= 0.1 * 0.01 * our;
        our_m = 0.9 * our_m + 0.1 * gc;
        our_v = 0.95 * our_v + 0.05 * gc * gc;
        our -= 0.1 * (our_m / (1 - pow(0.9, t))) / (sqrt(our_v / (1 - pow(0.95, t))) + 1e-8);
        CHECK(fabs(w - our) < 1e-6, "step %d: %.12g, %.12g", t, w, our);
    }
    double before = w;
    g = (double)NAN;
    CHECK(ovlm_ref_grad_norm_fwd(queue, &norm, NULL) == OVLM_OK, "grad_norm");
    CHECK(ovlm_ref_adamw_fwd(queue, &a, NULL) == OVLM_OK, "adamw");
    CHECK(stats.non_finite == 1 && w == before, "a step was made with a NaN");
}

/* Rounding on store: to nearest, ties to even. */
static void test_bf16(void)
{
    CHECK(ovlm_ref_to_bf16(1 + 0x1p-8) == 0x3f80 && ovlm_ref_to_bf16(1 + 0x3p-8) == 0x3f82, "ties");
    CHECK(ovlm_ref_to_bf16(1 + 0x1.01p-8) == 0x3f81, "above a tie");
    CHECK(ovlm_ref_to_bf16((double)INFINITY) == 0x7f80, "infinity");
    CHECK(isnan(ovlm_ref_of_bf16(ovlm_ref_to_bf16((double)NAN))), "NaN");
}

/* What only the device knows is reported late, naming the operation. */
static void test_late(void)
{
    int32_t index[] = {0, 7};
    double x[2] = {0}, y[2];
    ovlm_err err = {0};
    ovlm_gather a = {.taps = 1, .index = index};
    a.x = ovlm_tensor_of(x, 2, 1, OVLM_F64);
    a.y = ovlm_tensor_of(y, 2, 1, OVLM_F64);
    CHECK(ovlm_ref_gather_fwd(queue, &a, NULL) == OVLM_OK, "late, not now");
    CHECK(queue->backend->ops->queue_wait(queue, &err) == OVLM_E_BACKEND, "late");
    CHECK(strstr(err.message, "gather forward: index[1] is 7") != NULL, "%s", err.message);
    CHECK(queue->backend->ops->queue_wait(queue, &err) == OVLM_OK, "reported once");
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    ovlm_backend_options options = {0};
    ovlm_backend *backend = NULL;
    ovlm_err err = {0};
    CHECK(ovlm_ref_ops.open(&options, &backend, &err) == OVLM_OK, "%s", err.message);
    CHECK(ovlm_ref_ops.queue_open(backend, &queue, &err) == OVLM_OK, "%s", err.message);
    for (int op = 0; op < OVLM_OP_COUNT; op++) {
        if (op_has_backward((ovlm_op)op)) {
            test_gradients((ovlm_op)op, 25);
        }
    }
    test_head_values(30);
    test_router_rows(30);
    test_router_choice(60);
    test_rope_table();
    test_targets();
    test_balance_loss();
    test_adamw();
    test_bf16();
    test_late();
    ovlm_ref_ops.queue_close(queue);
    ovlm_ref_ops.close(backend);
    return test_end("ops_ref");
}
