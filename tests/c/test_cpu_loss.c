/* test_cpu_loss.c - targets and the head of a language model against plain loops in double. */
#include "cpu_rig.h"

static void targets_case(rig *r)
{
    int64_t n = rig_below(50), count = 5, labelled = 0;
    int32_t label[50];
    float weight[50], dlogp[50];
    double sum = 0, total = 7;
    bool weighted = rig_below(2);
    for (int64_t t = 0; t < n; t++) {
        label[t] = rig_below(3) == 0 ? -100 : (int32_t)rig_below(9);
        weight[t] = (float)rig_below(4);
        sum += label[t] == -100 ? 0 : weighted ? (double)weight[t] : 1;
        labelled += label[t] != -100;
    }
    ovlm_targets a = {.n = n, .label = label, .weight = weighted ? weight : NULL,
                      .own_total = rig_below(2), .total = &total, .count = &count,
                      .dlogp = dlogp};
    RIG_RUN(r, targets, fwd, &a);
    sum = a.own_total ? sum : 7;
    CHECK(total == sum, "total %g, not %g", total, sum);
    CHECK(count == 5 + labelled, "count");
    for (int64_t t = 0; t < n; t++) {
        double want = weighted ? (double)weight[t] / sum : 1 / sum;
        want = label[t] == -100 || sum == 0 ? 0 : want;
        CHECK(fabs((double)dlogp[t] + want) <= 1e-7 * want, "dlogp");
    }
}

typedef struct want {
    double *logp, *entropy, *dx, *dw, loss;
} want;

static void reference(const ovlm_head *a, want *w)
{
    int64_t n = a->w.rows, columns = a->x.cols;
    double *p = calloc((size_t)n, 8);
    for (int64_t t = 0; t < a->x.rows; t++) {
        double sum = 0;
        w->logp[t] = w->entropy[t] = 0;
        if (a->label[t] == -100) {
            continue;
        }
        for (int64_t v = 0; v < n; v++) {
            p[v] = 0;
            for (int64_t c = 0; c < columns; c++) {
                p[v] += rig_get(&a->x, t, c) * rig_get(&a->w, v, c);
            }
            sum += exp(p[v]); /* logits are small here */
        }
        for (int64_t v = 0; v < n; v++) {
            w->entropy[t] -= exp(p[v]) / sum * (p[v] - log(sum));
        }
        w->logp[t] = p[a->label[t]] - log(sum);
        w->loss += (double)a->dlogp[t] * w->logp[t];
        for (int64_t v = 0; v < n; v++) {
            double logp = p[v] - log(sum), prob = exp(logp);
            double dl = (double)a->dlogp[t] * ((v == a->label[t]) - prob);
            dl -= a->dentropy != NULL ? (double)a->dentropy[t] * prob * (logp + w->entropy[t]) : 0;
            for (int64_t c = 0; c < columns; c++) {
                w->dx[t * columns + c] += dl * rig_get(&a->w, v, c);
                w->dw[v * columns + c] += dl * rig_get(&a->x, t, c);
            }
        }
    }
    free(p);
}

/* Fused, or a forward and a backward; also a part of the rows: the same bits per row. */
static void again(rig *r, const ovlm_head *whole, const ovlm_tensor *dx0, const ovlm_tensor *dw0,
                  int64_t first, int64_t count)
{
    float *logp = malloc((size_t)count * 4 + 4), *entropy = malloc((size_t)count * 4 + 4);
    ovlm_tensor dx = ovlm_tensor_rows(*dx0, first, count);
    ovlm_head a = *whole;
    a.fused = !whole->fused;
    a.x = ovlm_tensor_rows(whole->x, first, count);
    a.label += first;
    a.dlogp += first;
    a.dentropy = a.dentropy != NULL ? a.dentropy + first : NULL;
    a.logp = logp;
    a.entropy = entropy;
    a.loss = NULL;
    a.dx = rig_copy(&dx);
    a.dw = rig_copy(dw0);
    RIG_SCRATCH(r, head, &a);
    RIG_RUN(r, head, fwd, &a);
    if (!a.fused) {
        RIG_RUN(r, head, bwd, &a);
    }
    CHECK(memcmp(logp, whole->logp + first, (size_t)count * 4) == 0, "logp of a part");
    CHECK(whole->entropy == NULL ||
              memcmp(entropy, whole->entropy + first, (size_t)count * 4) == 0, "entropy of a part");
    rig_same("dx of a part", &whole->dx, first, &a.dx);
    if (count == whole->x.rows) {
        rig_same("dw", &whole->dw, 0, &a.dw);
    }
    RIG_SCRATCH_FREE(&a);
    rig_free(&a.dx);
    rig_free(&a.dw);
    free(logp);
    free(entropy);
}

static void draw_rows(const ovlm_head *a, int32_t *label, float *dlogp, float *dentropy)
{
    int64_t ignored = rig_below(4); /* of four */
    for (int64_t t = 0; t < a->x.rows; t++) {
        label[t] = rig_below(4) < ignored ? -100 : (int32_t)rig_below(a->w.rows);
        dlogp[t] = (float)rig_normal();
        dentropy[t] = (float)rig_normal();
    }
}

static void head_case(rig *one, rig *many, ovlm_dtype dtype, bool large)
{
    int64_t rows = large ? 300 : rig_below(40), columns = 1 + rig_below(large ? 8 : 40);
    int64_t n = large ? 22000 : 1 + rig_below(rig_below(3) ? 60 : 1500);
    size_t wide = (size_t)rows + 1;
    int32_t *label = malloc(wide * 4);
    float *row = malloc(4 * wide * 4);
    double loss = 3;
    ovlm_head a = {.x = rig_random(rows, columns, dtype), .w = rig_random(n, columns, dtype),
                   .label = label, .logp = row, .entropy = rig_below(2) ? row + wide : NULL,
                   .dlogp = row + 2 * wide, .dentropy = rig_below(2) ? row + 3 * wide : NULL,
                   .fused = rig_below(2), .loss = &loss, .dx = rig_random(rows, columns, dtype),
                   .dw = rig_random(n, columns, OVLM_F32), .dx_beta = (float)rig_below(2),
                   .dw_beta = (float)rig_below(2)};
    draw_rows(&a, label, row + 2 * wide, row + 3 * wide);
    for (int64_t i = 0; i < n * columns; i++) {
        rig_set(&a.w, i / columns, i % columns, rig_normal() / sqrt((double)columns));
    }
    ovlm_tensor dx0 = rig_copy(&a.dx), dw0 = rig_copy(&a.dw);
    want w = {calloc(wide, 8), calloc(wide, 8), calloc(wide * (size_t)columns, 8),
              calloc((size_t)(n * columns), 8), 3};
    for (int64_t i = 0; i < rows * columns && a.dx_beta != 0; i++) {
        w.dx[i] = rig_get(&a.dx, i / columns, i % columns);
    }
    for (int64_t i = 0; i < n * columns && a.dw_beta != 0; i++) {
        w.dw[i] = rig_get(&a.dw, i / columns, i % columns);
    }
    reference(&a, &w);
    RIG_SCRATCH(one, head, &a);
    RIG_RUN(one, head, fwd, &a);
    if (!a.fused) {
        RIG_RUN(one, head, bwd, &a);
    }
    for (int64_t t = 0; t < rows; t++) {
        CHECK(fabs((double)a.logp[t] - w.logp[t]) < 2e-6 * (1 + fabs(w.logp[t])), "logp %g, not %g",
              (double)a.logp[t], w.logp[t]);
        CHECK(a.entropy == NULL || fabs((double)a.entropy[t] - w.entropy[t]) < 1e-5, "entropy");
    }
    CHECK(fabs(loss - w.loss) < 1e-5 * (1 + fabs(w.loss)), "loss %g, not %g", loss, w.loss);
    rig_near_least("dx", &a.dx, w.dx, 2e-5, 0.1);
    rig_near_least("dw", &a.dw, w.dw, 2e-5, 0.01);
    again(many, &a, &dx0, &dw0, 0, rows);
    int64_t first = rows > 0 ? rig_below(rows) : 0;
    again(many, &a, &dx0, &dw0, first, rows > 0 ? 1 + rig_below(rows - first) : 0);
    if (rows > 0) {
        label[rows - 1] = (int32_t)n;
        CHECK(ovlm_cpu_head_fwd(&one->queue, &a, NULL) != OVLM_OK, "a label out of range");
    }
    RIG_SCRATCH_FREE(&a);
    ovlm_tensor *all[] = {&a.x, &a.w, &a.dx, &a.dw, &dx0, &dw0};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        rig_free(all[i]);
    }
    free(label);
    free(row);
    free(w.logp);
    free(w.entropy);
    free(w.dx);
    free(w.dw);
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    rig one, many;
    rig_open(&one, 1);
    rig_open(&many, 3);
    for (int i = 0; i < 40; i++) {
        targets_case(&one);
        head_case(&one, &many, i % 3 == 2 ? OVLM_BF16 : OVLM_F32, i == 0);
    }
    rig_close(&one);
    rig_close(&many);
    return test_end("cpu_loss");
}
