/* cpu_gemm_pack.h - copies rows of an operand into panels that the micro-kernel reads in order.
 * Part of cpu_gemm_code.h: compiled once per instruction set.
 *
 * A panel holds W rows for one block of K: out[k * W + i].  Rows that are missing are 0; what the
 * kernel makes of them is thrown away. */

/* A row of zeros stands in for missing rows; long enough for a block of K in either dtype. */
static const float pack_zeros[OVLM_GEMM_K];

enum {
    LINE = 16, /* floats of a cache line                                                     */
    STEPS = 8  /* positions of K that pack_across takes at a time                            */
};

typedef float vec4 __attribute__((vector_size(16)));

static inline vec4 pack_load4(const void *data, int64_t at, bool bf16)
{
    vec4 v;
    if (!bf16) {
        memcpy(&v, (const float *)data + at, sizeof v);
        return v;
    }
    uint16_t half[4];
    memcpy(half, (const uint16_t *)data + at, sizeof half);
    uint32_t whole[4];
    for (int i = 0; i < 4; i++) {
        whole[i] = (uint32_t)half[i] << 16;
    }
    memcpy(&v, whole, sizeof v);
    return v;
}

static inline float pack_load(const void *data, int64_t at, bool bf16)
{
    return bf16 ? ovlm_math_from_bf16(((const uint16_t *)data)[at]) : ((const float *)data)[at];
}

static inline void pack_store4(float *out, vec4 v)
{
    memcpy(out, &v, sizeof v);
}

/* Four rows, four positions: out[k * width + row]. */
static inline void pack_transpose4(const void *const row[4], int64_t k, bool bf16, int64_t width,
                                   float *out)
{
    vec4 a = pack_load4(row[0], k, bf16), b = pack_load4(row[1], k, bf16);
    vec4 c = pack_load4(row[2], k, bf16), d = pack_load4(row[3], k, bf16);
    vec4 ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    vec4 ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    vec4 cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5);
    vec4 cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    pack_store4(out, __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5));
    pack_store4(out + width, __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7));
    pack_store4(out + 2 * width, __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5));
    pack_store4(out + 3 * width, __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7));
}

/* Rows contiguous along K.  Four rows at a time for a cache line of each: rows are often a power of
 * two apart, where more of them would push each other out of L1. */
static inline __attribute__((always_inline)) void
pack_along(const ovlm_gemm_side *s, int64_t first, int64_t have, int64_t k0, int64_t kc, bool bf16,
           int64_t width, float *out)
{
    const void *row[GEMM_WIDEST];
    int64_t bytes = bf16 ? 2 : 4;
    for (int64_t i = 0; i < width; i++) {
        int64_t at = i < have ? (s->index != NULL ? s->index[first + i] : first + i) : 0;
        row[i] = i < have ? (const char *)s->data + (at * s->stride + k0) * bytes
                          : (const char *)pack_zeros;
    }
    int64_t k = 0;
    for (int64_t line = 0; line + 4 <= kc; line = k) {
        int64_t end = line + LINE <= kc ? line + LINE : kc / 4 * 4;
        for (int64_t i = 0; i < width; i += 4) {
            /* A width that is no multiple of 4 writes a few rows twice. */
            int64_t from = i + 4 <= width ? i : width - 4;
            for (k = line; k < end; k += 4) {
                pack_transpose4(row + from, k, bf16, width, out + k * width + from);
            }
        }
    }
    for (; k < kc; k++) {
        for (int64_t i = 0; i < width; i++) {
            out[k * width + i] = pack_load(row[i], k, bf16);
        }
    }
}

/* One position of K of a panel whose rows lie next to each other. */
static inline __attribute__((always_inline)) void
pack_step(const void *data, int64_t from, int64_t have, bool bf16, int64_t width, float *out)
{
    if (have == width && !bf16) {
        memcpy(out, (const float *)data + from, (size_t)width * sizeof(float));
        return;
    }
    if (have == width) {
        uint16_t half[GEMM_WIDEST];
        memcpy(half, (const uint16_t *)data + from, (size_t)width * sizeof *half);
        for (int64_t i = 0; i < width; i++) {
            out[i] = ovlm_math_from_bf16(half[i]);
        }
        return;
    }
    for (int64_t i = 0; i < width; i++) {
        out[i] = i < have ? pack_load(data, from + i, bf16) : 0.0f;
    }
}

/* All panels at once, a few positions of K at a time: the operand is read in its own order. */
static inline __attribute__((always_inline)) void
pack_across(const ovlm_gemm_side *s, int64_t first, int64_t have, int64_t k0, int64_t kc, bool bf16,
            int64_t width, float *out)
{
    for (int64_t k = 0; k < kc; k += STEPS) {
        int64_t end = k + STEPS < kc ? k + STEPS : kc;
        for (int64_t i = 0; i < have; i += width) {
            int64_t here = have - i < width ? have - i : width;
            for (int64_t step = k; step < end; step++) {
                int64_t at = s->index != NULL ? s->index[k0 + step] : k0 + step;
                pack_step(s->data, at * s->stride + first + i, here, bf16, width,
                          out + i * kc + step * width);
            }
        }
    }
}

/* `have` rows from `first` on, as panels of `width` rows, one after the other. */
static inline __attribute__((always_inline)) void
pack_panels(const ovlm_gemm_side *s, int64_t first, int64_t have, int64_t k0, int64_t kc,
            int64_t width, float *out)
{
    bool bf16 = s->dtype == OVLM_BF16;
    if (s->across && bf16) {
        pack_across(s, first, have, k0, kc, true, width, out);
        return;
    }
    if (s->across) {
        pack_across(s, first, have, k0, kc, false, width, out);
        return;
    }
    for (int64_t i = 0; i < have; i += width, out += width * kc) {
        int64_t here = have - i < width ? have - i : width;
        if (bf16) {
            pack_along(s, first + i, here, k0, kc, true, width, out);
        } else {
            pack_along(s, first + i, here, k0, kc, false, width, out);
        }
    }
}
