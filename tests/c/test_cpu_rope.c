/* test_cpu_rope.c - rotary positions and the norm before them against plain loops in double. */
#include "cpu_rig.h"

static void table_case(rig *r)
{
    int64_t axes = 1 + rig_below(3), rows = rig_below(50), n = 1 + rig_below(20);
    int32_t axis[20];
    ovlm_rope_table a = {.position = rig_random(axes, rows, OVLM_F32),
                         .frequency = rig_random(1, n, OVLM_F32), .axis = axis,
                         .cos = rig_empty(rows, n, OVLM_F32),
                         .sin = rig_empty(rows, n, OVLM_F32)};
    for (int64_t i = 0; i < n; i++) {
        axis[i] = (int32_t)rig_below(axes);
        rig_set(&a.frequency, 0, i, pow(10000, -(double)i / (double)n));
    }
    for (int64_t i = 0; i < axes * rows; i++) {
        rig_set(&a.position, i / rows, i % rows, (double)rig_below(100000));
    }
    RIG_SCRATCH(r, rope_table, &a);
    RIG_RUN(r, rope_table, fwd, &a);
    double *c = calloc((size_t)(rows * n + 1), 8), *s = calloc((size_t)(rows * n + 1), 8);
    for (int64_t t = 0; t < rows; t++) {
        for (int64_t i = 0; i < n; i++) { /* the angle is rounded to float32 */
            float angle = (float)rig_get(&a.position, axis[i], t) *
                          (float)rig_get(&a.frequency, 0, i);
            c[t * n + i] = cos((double)angle);
            s[t * n + i] = sin((double)angle);
        }
    }
    rig_near("cos", &a.cos, c, 2e-7);
    rig_near("sin", &a.sin, s, 2e-7);
    RIG_SCRATCH_FREE(&a);
    rig_free(&a.position);
    rig_free(&a.frequency);
    rig_free(&a.cos);
    rig_free(&a.sin);
    free(c);
    free(s);
}

/* The turned head is linear in the (normed) head: element i to a row of the rotation matrix. */
static double turn(const ovlm_rope *a, int64_t t, int64_t to, int64_t from)
{
    int64_t r = a->cos.cols;
    if (to >= 2 * r || from >= 2 * r) {
        return to == from;
    }
    int64_t pair_to = a->interleaved ? to / 2 : to % r, pair = a->interleaved ? from / 2 : from % r;
    bool second_to = a->interleaved ? to % 2 : to / r;
    bool second = a->interleaved ? from % 2 : from / r;
    if (pair_to != pair) {
        return 0;
    }
    double c = rig_get(&a->cos, t, pair), s = rig_get(&a->sin, t, pair);
    return second_to == second ? c : second_to ? s : -s;
}

static void head_reference(const ovlm_rope *a, int64_t t, int64_t head, int64_t d, double *y,
                           double *dx, double *dw)
{
    double square = 0, s = 1;
    bool norm = a->w.cols > 0;
    for (int64_t i = 0; i < d; i++) {
        square += pow(rig_get(&a->x, t, head * d + i), 2) / (double)d;
    }
    s = norm ? 1 / sqrt(square + a->eps) : 1;
    for (int64_t i = 0; i < d; i++) {
        double g = 0;
        y[i] = 0;
        for (int64_t j = 0; j < d; j++) {
            double w = norm ? rig_get(&a->w, 0, j) : 1;
            y[i] += turn(a, t, i, j) * rig_get(&a->x, t, head * d + j) * s * w;
            g += turn(a, t, j, i) * rig_get(&a->dy, t, head * d + j);
        }
        double hat = rig_get(&a->x, t, head * d + i) * s;
        dw[i] += norm ? g * hat : 0;
        for (int64_t j = 0; j < d; j++) {
            double other = rig_get(&a->x, t, head * d + j) * s;
            double slope = norm ? s * rig_get(&a->w, 0, i) * ((i == j) - hat * other / (double)d)
                                : i == j;
            dx[j] += g * slope;
        }
    }
}

static void reference(const ovlm_rope *a, double *y, double *dx, double *dw)
{
    int64_t d = a->x.cols / a->heads;
    for (int64_t t = 0; t < a->x.rows; t++) {
        for (int64_t head = 0; head < a->heads; head++) {
            int64_t at = t * a->x.cols + head * d;
            head_reference(a, t, head, d, y + at, dx + at, dw);
        }
    }
}

/* The same in place where that is allowed, on other threads, a part of the rows: same bits. */
static void again(rig *r, const ovlm_rope *whole, int64_t first, int64_t count)
{
    ovlm_rope a = *whole;
    bool norm = a.w.cols > 0;
    ovlm_tensor x = ovlm_tensor_rows(whole->x, first, count);
    ovlm_tensor dy = ovlm_tensor_rows(whole->dy, first, count);
    a.x = rig_copy(&x);
    a.dy = a.dx = rig_copy(&dy);
    a.y = norm ? rig_empty(count, x.cols, x.dtype) : a.x;
    a.cos = ovlm_tensor_rows(whole->cos, first, count);
    a.sin = ovlm_tensor_rows(whole->sin, first, count);
    if (norm) {
        a.dw = rig_copy(&whole->dw);
    }
    RIG_SCRATCH(r, rope, &a);
    RIG_RUN(r, rope, fwd, &a);
    RIG_RUN(r, rope, bwd, &a);
    rig_same("y", &whole->y, first, &a.y);
    rig_same("dx", &whole->dx, first, &a.dx);
    if (norm) {
        if (count == whole->x.rows && a.dw_beta == 0) {
            rig_same("dw", &whole->dw, 0, &a.dw);
        }
        rig_free(&a.y);
        rig_free(&a.dw);
    }
    RIG_SCRATCH_FREE(&a);
    rig_free(&a.x);
    rig_free(&a.dx);
}

static void rope_case(rig *one, rig *many, ovlm_dtype dtype)
{
    int64_t heads = 1 + rig_below(4), d = 1 + rig_below(50), rows = rig_below(120);
    bool norm = rig_below(2);
    ovlm_rope a = {.heads = heads, .interleaved = rig_below(2), .eps = 1e-6,
                   .x = rig_random(rows, heads * d, dtype),
                   .y = rig_empty(rows, heads * d, dtype),
                   .dy = rig_random(rows, heads * d, dtype),
                   .dx = rig_empty(rows, heads * d, dtype), .dw_beta = (float)rig_below(2)};
    int64_t r = rig_below(d / 2 + 1);
    a.cos = rig_random(rows, r, OVLM_F32);
    a.sin = rig_random(rows, r, OVLM_F32);
    double *y = calloc((size_t)(rows * heads * d + 1), 8), *dw = calloc((size_t)d, 8);
    double *dx = calloc((size_t)(rows * heads * d + 1), 8);
    if (norm) {
        a.w = rig_random(1, d, dtype);
        a.dw = rig_random(1, d, OVLM_F32);
        for (int64_t i = 0; i < d && a.dw_beta != 0; i++) {
            dw[i] = rig_get(&a.dw, 0, i);
        }
    }
    if (r > 0) {
        RIG_SCRATCH(one, rope, &a);
        RIG_RUN(one, rope, fwd, &a);
        RIG_RUN(one, rope, bwd, &a);
        reference(&a, y, dx, dw);
        rig_near("y", &a.y, y, 1e-5);
        rig_near_least("dx", &a.dx, dx, d < 4 ? 1e-1 : 1e-4, 0.1);
        again(many, &a, 0, rows);
        int64_t first = rows > 0 ? rig_below(rows) : 0;
        again(one, &a, first, rows > 0 ? 1 + rig_below(rows - first) : 0);
        if (norm) {
            rig_near("dw", &a.dw, dw, 1e-5);
        }
        RIG_SCRATCH_FREE(&a);
    }
    if (norm) {
        rig_free(&a.w);
        rig_free(&a.dw);
    }
    ovlm_tensor *all[] = {&a.x, &a.y, &a.dy, &a.dx, &a.cos, &a.sin};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        rig_free(all[i]);
    }
    free(y);
    free(dx);
    free(dw);
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    rig one, many;
    rig_open(&one, 1);
    rig_open(&many, 3);
    for (int i = 0; i < 60; i++) {
        table_case(&many);
        rope_case(&one, &many, i % 3 == 2 ? OVLM_BF16 : OVLM_F32);
    }
    rig_close(&one);
    rig_close(&many);
    return test_end("cpu_rope");
}
