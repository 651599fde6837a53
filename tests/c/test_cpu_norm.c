/* test_cpu_norm.c - LayerNorm and RMSNorm against plain loops in double. */
#include "cpu_rig.h"

typedef struct want {
    double *y, *dx, *dw, *dbias;
} want;

static double at(const ovlm_tensor *t, int64_t row, int64_t col, double missing)
{
    return t->cols > 0 ? rig_get(t, row, col) : missing;
}

/* dx by the derivative of every output after every input, which no implementation would do. */
static void reference(const ovlm_norm *a, const ovlm_tensor *dx0, want *w)
{
    int64_t n = a->w.cols;
    for (int64_t t = 0; t < a->x.rows; t++) {
        for (int64_t g = 0; g < a->groups; g++) {
            double mean = 0, square = 0;
            for (int64_t i = 0; i < n; i++) {
                mean += rig_get(&a->x, t, g * n + i) / (double)n;
            }
            mean = a->rms ? 0 : mean;
            for (int64_t i = 0; i < n; i++) {
                square += pow(rig_get(&a->x, t, g * n + i) - mean, 2) / (double)n;
            }
            double s = 1 / sqrt(square + a->eps);
            for (int64_t i = 0; i < n; i++) {
                int64_t c = g * n + i;
                double hat = (rig_get(&a->x, t, c) - mean) * s, dy = rig_get(&a->dy, t, c);
                w->y[t * a->x.cols + c] = hat * rig_get(&a->w, 0, i) + at(&a->bias, 0, i, 0);
                w->dw[i] += dy * hat;
                w->dbias[i] += dy;
                double sum = a->dx_beta != 0 ? rig_get(dx0, t, c) : 0;
                for (int64_t j = 0; j < n; j++) {
                    double other = (rig_get(&a->x, t, g * n + j) - mean) * s;
                    double slope = s * ((i == j) - (a->rms ? 0 : 1.0 / (double)n) -
                                        hat * other / (double)n);
                    sum += rig_get(&a->dy, t, g * n + j) * rig_get(&a->w, 0, j) * slope;
                }
                w->dx[t * a->x.cols + c] = sum;
            }
        }
    }
}

/* Rows first.. alone, on another number of threads, give the same bits. */
static void part_of(rig *r, const ovlm_norm *whole, const ovlm_tensor *dx0, int64_t first,
                    int64_t count)
{
    ovlm_norm a = *whole;
    a.x = ovlm_tensor_rows(whole->x, first, count);
    a.dy = ovlm_tensor_rows(whole->dy, first, count);
    a.y = rig_empty(count, a.x.cols, a.x.dtype);
    ovlm_tensor start = ovlm_tensor_rows(*dx0, first, count);
    a.dx = rig_copy(&start);
    a.dw = rig_copy(&whole->dw);
    a.dbias = rig_copy(&whole->dbias);
    RIG_SCRATCH(r, norm, &a);
    RIG_RUN(r, norm, fwd, &a);
    RIG_RUN(r, norm, bwd, &a);
    rig_same("y of a part", &whole->y, first, &a.y);
    rig_same("dx of a part", &whole->dx, first, &a.dx);
    if (count == whole->x.rows && a.dw_beta == 0) {
        rig_same("dw", &whole->dw, 0, &a.dw);
        rig_same("dbias", &whole->dbias, 0, &a.dbias);
    }
    RIG_SCRATCH_FREE(&a);
    rig_free(&a.y);
    rig_free(&a.dx);
    rig_free(&a.dw);
    rig_free(&a.dbias);
}

static void run_case(rig *one, rig *many, ovlm_dtype dtype)
{
    int64_t groups = 1 + rig_below(3), n = 1 + rig_below(70), rows = rig_below(150);
    ovlm_norm a = {.rms = rig_below(2), .eps = 1e-6, .groups = groups,
                   .x = rig_random(rows, groups * n, dtype), .w = rig_random(1, n, dtype),
                   .y = rig_empty(rows, groups * n, dtype),
                   .dy = rig_random(rows, groups * n, dtype),
                   .dx = rig_random(rows, groups * n, dtype),
                   .dw = rig_random(1, n, OVLM_F32), .dbias = rig_random(1, n, OVLM_F32),
                   .dx_beta = (float)rig_below(2), .dw_beta = (float)rig_below(2)};
    if (!a.rms) {
        a.bias = rig_random(1, n, dtype);
    }
    ovlm_tensor dx0 = rig_copy(&a.dx);
    size_t size = (size_t)(rows * groups * n + 1), wide = (size_t)n;
    want w = {calloc(size, 8), calloc(size, 8), calloc(wide, 8), calloc(wide, 8)};
    for (int64_t i = 0; i < n; i++) {
        w.dw[i] = a.dw_beta != 0 ? rig_get(&a.dw, 0, i) : 0;
        w.dbias[i] = a.dw_beta != 0 ? rig_get(&a.dbias, 0, i) : 0;
    }
    RIG_SCRATCH(one, norm, &a);
    RIG_RUN(one, norm, fwd, &a);
    reference(&a, &dx0, &w);
    RIG_RUN(one, norm, bwd, &a);
    /* A part of one or two elements can have a variance near eps, where 1/sqrt is steep. */
    double loose = n < 4 ? 1e-2 : 1e-4;
    rig_near("y", &a.y, w.y, loose);
    rig_near_least("dx", &a.dx, w.dx, n < 4 ? 1 : loose, 0.1); /* 0 for a part of one */
    rig_near("dw", &a.dw, w.dw, loose);
    rig_near("dbias", &a.dbias, w.dbias, 1e-5);
    part_of(many, &a, &dx0, 0, rows);
    if (rows > 0) {
        int64_t first = rig_below(rows);
        part_of(many, &a, &dx0, first, 1 + rig_below(rows - first));
    }
    RIG_SCRATCH_FREE(&a);
    ovlm_tensor *all[] = {&a.x, &a.w, &a.y, &a.dy, &a.dx, &a.dw, &a.dbias, &dx0};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        rig_free(all[i]);
    }
    free(a.bias.data);
    free(w.y);
    free(w.dx);
    free(w.dw);
    free(w.dbias);
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    rig one, many;
    rig_open(&one, 1);
    rig_open(&many, 3);
    for (int i = 0; i < 60; i++) {
        run_case(&one, &many, i % 3 == 2 ? OVLM_BF16 : OVLM_F32);
    }
    rig_close(&one);
    rig_close(&many);
    return test_end("cpu_norm");
}
