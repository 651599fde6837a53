/* test_cpu_gather.c - gather and unfold against plain loops in double. */
#include "cpu_rig.h"

static int32_t *draw_index(int64_t n, int64_t rows, bool unique)
{
    int32_t *index = malloc((size_t)(n + 1) * sizeof *index);
    bool *used = calloc((size_t)rows + 1, sizeof *used);
    for (int64_t i = 0; i < n; i++) {
        index[i] = (int32_t)rig_below(rows + 1) - 1;
        if (unique && index[i] >= 0 && used[index[i]]) {
            index[i] = -1;
        }
        if (index[i] >= 0) {
            used[index[i]] = true;
        }
    }
    free(used);
    return index;
}

static double weight(const ovlm_gather *a, int64_t t, int64_t j)
{
    return a->weight.cols > 0 ? rig_get(&a->weight, t, j) : 1;
}

static void gather_case(rig *one, rig *many, ovlm_dtype dtype)
{
    int64_t taps = 1 + rig_below(4), rows = rig_below(60), from = rig_below(50);
    int64_t n = 1 + rig_below(rig_below(8) == 0 ? 5000 : 60);
    bool unique = rig_below(2);
    int32_t *index = draw_index(rows * taps, from, unique);
    ovlm_gather a = {.taps = taps, .unique = unique, .index = index,
                     .x = rig_random(from, n, dtype), .y = rig_random(rows, n, dtype),
                     .y_beta = (float)rig_below(2), .dy = rig_random(rows, n, dtype),
                     .dx = rig_random(from, n, rig_below(2) ? OVLM_F32 : dtype),
                     .dx_beta = (float)rig_below(2)};
    if (rig_below(2)) {
        a.weight = rig_random(rows, taps, OVLM_F32);
    }
    double *y = calloc((size_t)(rows * n + 1), 8), *dx = calloc((size_t)(from * n + 1), 8);
    for (int64_t i = 0; i < rows * n; i++) {
        y[i] = a.y_beta != 0 ? rig_get(&a.y, i / n, i % n) : 0;
    }
    for (int64_t i = 0; i < from * n; i++) {
        dx[i] = a.dx_beta != 0 ? rig_get(&a.dx, i / n, i % n) : 0;
    }
    for (int64_t slot = 0; slot < rows * taps; slot++) {
        int64_t t = slot / taps;
        for (int64_t c = 0; c < n && index[slot] >= 0; c++) {
            y[t * n + c] += weight(&a, t, slot % taps) * rig_get(&a.x, index[slot], c);
            dx[index[slot] * n + c] += weight(&a, t, slot % taps) * rig_get(&a.dy, t, c);
        }
    }
    ovlm_gather b = a;
    b.y = rig_copy(&a.y);
    b.dx = rig_copy(&a.dx);
    RIG_SCRATCH(one, gather, &a);
    RIG_SCRATCH(many, gather, &b);
    RIG_RUN(one, gather, fwd, &a);
    RIG_RUN(one, gather, bwd, &a);
    RIG_RUN(many, gather, fwd, &b);
    RIG_RUN(many, gather, bwd, &b);
    rig_near("gather y", &a.y, y, 1e-6);
    rig_near("gather dx", &a.dx, dx, a.dx.dtype == OVLM_BF16 ? 1e-2 : 1e-6);
    rig_same("gather y", &a.y, 0, &b.y);
    rig_same("gather dx", &a.dx, 0, &b.dx);
    if (rows > 0) {
        index[0] = (int32_t)from;
        CHECK(ovlm_cpu_gather_fwd(&one->queue, &a, NULL) != OVLM_OK, "an index out of range");
        CHECK(ovlm_cpu_gather_bwd(&one->queue, &a, NULL) != OVLM_OK, "an index out of range");
    }
    RIG_SCRATCH_FREE(&a);
    RIG_SCRATCH_FREE(&b);
    ovlm_tensor *all[] = {&a.x, &a.y, &a.dy, &a.dx, &b.y, &b.dx};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        rig_free(all[i]);
    }
    free(a.weight.data);
    free(index);
    free(y);
    free(dx);
}

static void unfold_case(rig *r, ovlm_dtype dtype)
{
    ovlm_unfold a = {.images = rig_below(4), .height = 1 + rig_below(8), .width = 1 + rig_below(8),
                     .stride = 1 + rig_below(3), .padding = rig_below(3)};
    a.kernel_height = 1 + rig_below(a.height + 2 * a.padding);
    a.kernel_width = 1 + rig_below(a.width + 2 * a.padding);
    int64_t high = a.kernel_height, wide = a.kernel_width, taps = high * wide;
    int64_t n = 1 + rig_below(6);
    int64_t out_h = (a.height + 2 * a.padding - high) / a.stride + 1;
    int64_t out_w = (a.width + 2 * a.padding - wide) / a.stride + 1;
    int64_t pixels = a.images * a.height * a.width, patches = a.images * out_h * out_w;
    a.x = rig_random(pixels, n, dtype);
    a.y = rig_empty(patches, n * taps, dtype);
    a.dy = rig_random(patches, n * taps, dtype);
    a.dx = rig_empty(pixels, n, dtype);
    double *y = calloc((size_t)(patches * n * taps + 1), 8);
    double *dx = calloc((size_t)(pixels * n + 1), 8);
    for (int64_t p = 0; p < patches; p++) {
        int64_t image = p / (out_h * out_w), oi = p / out_w % out_h, oj = p % out_w;
        for (int64_t c = 0; c < n * taps; c++) {
            int64_t i = oi * a.stride + c % taps / wide - a.padding;
            int64_t j = oj * a.stride + c % wide - a.padding;
            if (i >= 0 && i < a.height && j >= 0 && j < a.width) {
                int64_t pixel = (image * a.height + i) * a.width + j;
                y[p * n * taps + c] = rig_get(&a.x, pixel, c / taps);
                dx[pixel * n + c / taps] += rig_get(&a.dy, p, c);
            }
        }
    }
    RIG_SCRATCH(r, unfold, &a);
    RIG_RUN(r, unfold, fwd, &a);
    RIG_RUN(r, unfold, bwd, &a);
    rig_near("unfold y", &a.y, y, 0);
    rig_near("unfold dx", &a.dx, dx, 1e-6);
    RIG_SCRATCH_FREE(&a);
    rig_free(&a.x);
    rig_free(&a.y);
    rig_free(&a.dy);
    rig_free(&a.dx);
    free(y);
    free(dx);
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    rig one, many;
    rig_open(&one, 1);
    rig_open(&many, 3);
    for (int i = 0; i < 80; i++) {
        gather_case(&one, &many, i % 3 == 2 ? OVLM_BF16 : OVLM_F32);
        unfold_case(i % 2 ? &one : &many, i % 3 == 2 ? OVLM_BF16 : OVLM_F32);
    }
    rig_close(&one);
    rig_close(&many);
    return test_end("cpu_gather");
}
