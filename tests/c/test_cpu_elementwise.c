/* test_cpu_elementwise.c - gated units and scale against the C library in double. */
#include "cpu_rig.h"

static double activate(ovlm_act act, double x)
{
    switch (act) {
    case OVLM_ACT_GELU_ERF: return x / 2 * (1 + erf(x / sqrt(2)));
    case OVLM_ACT_GELU_TANH:
        return x / 2 * (1 + tanh(sqrt(2 / 3.141592653589793) * (x + 0.044715 * x * x * x)));
    case OVLM_ACT_QUICK_GELU: return x / (1 + exp(-1.702 * x));
    case OVLM_ACT_SILU: return x / (1 + exp(-x));
    case OVLM_ACT_NONE: return x;
    }
    return NAN;
}

static void gated_case(rig *one, rig *many, ovlm_dtype dtype, ovlm_act act, bool alone)
{
    int64_t rows = rig_below(40), n = 1 + rig_below(rig_below(4) == 0 ? 5000 : 90);
    int64_t wide = alone ? n : 2 * n;
    ovlm_gated a = {.act = act, .alone = alone, .gate_up = rig_random(rows, wide, dtype),
                    .y = rig_empty(rows, n, dtype), .dy = rig_random(rows, n, dtype),
                    .dgate_up = rig_empty(rows, wide, dtype)};
    RIG_SCRATCH(one, gated, &a);
    RIG_RUN(one, gated, fwd, &a);
    RIG_RUN(one, gated, bwd, &a);
    double *y = calloc((size_t)(rows * n + 1), 8), *slope = calloc((size_t)(rows * n + 1) * 2, 8);
    for (int64_t i = 0; i < rows * n; i++) {
        int64_t t = i / n, c = i % n;
        double gate = rig_get(&a.gate_up, t, c);
        double up = alone ? 1 : rig_get(&a.gate_up, t, n + c);
        double dy = rig_get(&a.dy, t, c), step = 1e-5;
        y[i] = activate(act, gate) * up;
        slope[t * wide + c] = dy * up *
                               (activate(act, gate + step) - activate(act, gate - step)) / 2 /
                               step;
        if (!alone) {
            slope[t * wide + n + c] = dy * activate(act, gate);
        }
    }
    rig_near("gated y", &a.y, y, 1e-6);
    rig_near("dgate_up", &a.dgate_up, slope, 2e-6);
    /* One row alone on other threads, the backward in place. */
    if (rows > 0) {
        int64_t row = rig_below(rows);
        ovlm_gated b = a;
        b.gate_up = ovlm_tensor_rows(a.gate_up, row, 1);
        b.gate_up = rig_copy(&b.gate_up);
        b.dy = ovlm_tensor_rows(a.dy, row, 1);
        b.y = rig_empty(1, n, dtype);
        b.dgate_up = b.gate_up;
        RIG_RUN(many, gated, fwd, &b);
        RIG_RUN(many, gated, bwd, &b);
        rig_same("gated y of a row", &a.y, row, &b.y);
        rig_same("dgate_up of a row", &a.dgate_up, row, &b.dgate_up);
        rig_free(&b.y);
        rig_free(&b.gate_up);
    }
    RIG_SCRATCH_FREE(&a);
    rig_free(&a.gate_up);
    rig_free(&a.y);
    rig_free(&a.dy);
    rig_free(&a.dgate_up);
    free(y);
    free(slope);
}

static ovlm_tensor drawn(int64_t rows, int64_t cols, ovlm_dtype dtype)
{
    ovlm_tensor t = rig_random(rows, cols, dtype);
    for (int64_t i = 0; dtype == OVLM_U8 && i < rows * cols; i++) {
        rig_set(&t, i / cols, i % cols, (double)rig_below(256));
    }
    return t;
}

static void scale_case(rig *r)
{
    const ovlm_dtype from[] = {OVLM_F32, OVLM_BF16, OVLM_F64, OVLM_U8};
    ovlm_dtype x_type = from[rig_below(4)], y_type = from[rig_below(3)];
    int64_t rows = rig_below(40), n = 1 + rig_below(rig_below(4) == 0 ? 5000 : 90);
    ovlm_scale a = {.alpha = rig_normal(), .beta = rig_below(2) ? rig_normal() : 0,
                    .x = drawn(rows, n, x_type), .y = rig_random(rows, n, y_type),
                    .dy = rig_random(rows, n, y_type),
                    .dx = rig_random(rows, n, from[rig_below(3)]),
                    .dx_beta = (float)rig_below(2)};
    if (rig_below(2)) {
        a.scale = rig_random(1, n, OVLM_F32);
    }
    if (rig_below(2)) {
        a.shift = rig_random(1, n, OVLM_F32);
    }
    double *y = calloc((size_t)(rows * n + 1), 8), *dx = calloc((size_t)(rows * n + 1), 8);
    for (int64_t i = 0; i < rows * n; i++) {
        int64_t t = i / n, c = i % n;
        double factor = a.alpha * (a.scale.cols > 0 ? rig_get(&a.scale, 0, c) : 1);
        y[i] = factor * rig_get(&a.x, t, c) + (a.shift.cols > 0 ? rig_get(&a.shift, 0, c) : 0) +
               a.beta * rig_get(&a.y, t, c);
        dx[i] = factor * rig_get(&a.dy, t, c) + (double)a.dx_beta * rig_get(&a.dx, t, c);
    }
    RIG_SCRATCH(r, scale, &a);
    RIG_RUN(r, scale, fwd, &a);
    RIG_RUN(r, scale, bwd, &a);
    rig_near("scale y", &a.y, y, x_type == OVLM_F64 && y_type == OVLM_F64 ? 1e-14 : 1e-6);
    rig_near("scale dx", &a.dx, dx, 1e-6);
    RIG_SCRATCH_FREE(&a);
    rig_free(&a.x);
    rig_free(&a.y);
    rig_free(&a.dy);
    rig_free(&a.dx);
    free(a.scale.data);
    free(a.shift.data);
    free(y);
    free(dx);
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    rig one, many;
    rig_open(&one, 1);
    rig_open(&many, 3);
    for (int i = 0; i < 60; i++) {
        gated_case(&one, &many, i % 3 == 2 ? OVLM_BF16 : OVLM_F32, (ovlm_act)(i % 5),
                   i % 4 == 1);
        scale_case(i % 2 ? &one : &many);
    }
    rig_close(&one);
    rig_close(&many);
    return test_end("cpu_elementwise");
}
