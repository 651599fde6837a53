/* cpu_gemm_finish.h - what follows the sums: bias, activation, residual, rounding; and the slope of
 * the activation for the backward.  Part of cpu_gemm_code.h: compiled once per instruction set.
 *
 * Arithmetic runs on whole chunks, padded with zeros, so that an element meets the same
 * instructions wherever it stands. */

enum { CHUNK = 64 };

static inline void chunk_load(float *out, const ovlm_tensor *t, int64_t row, int64_t col, int64_t n)
{
    int64_t at = row * t->stride + col;
    if (t->dtype == OVLM_F32) {
        memcpy(out, (const float *)t->data + at, (size_t)n * sizeof *out);
    } else {
        uint16_t half[CHUNK] = {0};
        memcpy(half, (const uint16_t *)t->data + at, (size_t)n * sizeof *half);
        for (int i = 0; i < CHUNK; i++) {
            out[i] = ovlm_math_from_bf16(half[i]);
        }
    }
    for (int64_t i = n; i < CHUNK; i++) {
        out[i] = 0.0f;
    }
}

static inline void chunk_store(const ovlm_tensor *t, int64_t row, int64_t col, int64_t n,
                               const float *in)
{
    int64_t at = row * t->stride + col;
    if (t->dtype == OVLM_F32) {
        memcpy((float *)t->data + at, in, (size_t)n * sizeof *in);
        return;
    }
    uint16_t half[CHUNK];
    for (int i = 0; i < CHUNK; i++) {
        half[i] = ovlm_math_to_bf16(in[i]);
    }
    memcpy((uint16_t *)t->data + at, half, (size_t)n * sizeof *half);
}

static inline void chunk_add(float *t, const ovlm_tensor *other, int64_t row, int64_t col,
                             int64_t n)
{
    float more[CHUNK];
    chunk_load(more, other, row, col, n);
    for (int i = 0; i < CHUNK; i++) {
        t[i] += more[i];
    }
}

#define CHUNK_EACH(f)                 \
    for (int i = 0; i < CHUNK; i++) { \
        t[i] = f(t[i]);               \
    }                                 \
    break

static inline void chunk_act(float *t, ovlm_act act)
{
    switch (act) {
    case OVLM_ACT_NONE: break;
    case OVLM_ACT_GELU_ERF: CHUNK_EACH(ovlm_math_gelu_erf);
    case OVLM_ACT_GELU_TANH: CHUNK_EACH(ovlm_math_gelu_tanh);
    case OVLM_ACT_QUICK_GELU: CHUNK_EACH(ovlm_math_quick_gelu);
    case OVLM_ACT_SILU: CHUNK_EACH(ovlm_math_silu);
    }
}

static inline void chunk_act_slope(float *t, ovlm_act act)
{
    switch (act) {
    case OVLM_ACT_NONE: break;
    case OVLM_ACT_GELU_ERF: CHUNK_EACH(ovlm_math_gelu_erf_slope);
    case OVLM_ACT_GELU_TANH: CHUNK_EACH(ovlm_math_gelu_tanh_slope);
    case OVLM_ACT_QUICK_GELU: CHUNK_EACH(ovlm_math_quick_gelu_slope);
    case OVLM_ACT_SILU: CHUNK_EACH(ovlm_math_silu_slope);
    }
}
#undef CHUNK_EACH

/* One row of y from its sums, which lie `step` apart. */
static void finish_row(const ovlm_gemm *g, int64_t row, int64_t col, int64_t cols,
                       const float *sums, int64_t step)
{
    for (int64_t j = 0; j < cols; j += CHUNK) {
        int64_t n = cols - j < CHUNK ? cols - j : CHUNK;
        float t[CHUNK] = {0};
        if (step == 1) {
            memcpy(t, sums + j, (size_t)n * sizeof *t);
        } else {
            for (int64_t i = 0; i < n; i++) {
                t[i] = sums[(j + i) * step];
            }
        }
        if (ovlm_tensor_given(&g->bias)) {
            chunk_add(t, &g->bias, 0, col + j, n);
        }
        if (ovlm_tensor_given(&g->pre)) {
            chunk_store(&g->pre, row, col + j, n, t);
        }
        chunk_act(t, g->act);
        if (ovlm_tensor_given(&g->add)) {
            chunk_add(t, &g->add, row, col + j, n);
        }
        if (g->accumulate) {
            chunk_add(t, &g->y, row, col + j, n);
        }
        chunk_store(&g->y, row, col + j, n, t);
    }
}

static void GEMM_NAME(slope)(const ovlm_gemm_slope *s, int64_t first, int64_t rows, float *sums)
{
    for (int64_t j = 0; j < s->dy.cols; j += CHUNK) {
        int64_t n = s->dy.cols - j < CHUNK ? s->dy.cols - j : CHUNK;
        float sum[CHUNK] = {0};
        for (int64_t row = first; row < first + rows; row++) {
            float dy[CHUNK], t[CHUNK];
            chunk_load(dy, &s->dy, row, j, n);
            if (s->act != OVLM_ACT_NONE) {
                chunk_load(t, &s->pre, row, j, n);
                chunk_act_slope(t, s->act);
                for (int i = 0; i < CHUNK; i++) {
                    dy[i] *= t[i];
                }
            }
            for (int i = 0; i < CHUNK; i++) {
                sum[i] += dy[i];
            }
            if (s->out != NULL) {
                memcpy(s->out + row * s->dy.cols + j, dy, (size_t)n * sizeof *dy);
            }
        }
        if (sums != NULL) {
            memcpy(sums + j, sum, (size_t)n * sizeof *sum);
        }
    }
}
