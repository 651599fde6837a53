/* cpu_merge.c - attention over two sets of keys from its parts (the combination step of Dao et al.
 * 2022, section 3.1, between calls instead of within one).
 *
 *   m = max(lse, part_lse),  a = e^(lse - m),  b = e^(part_lse - m)
 *   o = a / (a + b) o + b / (a + b) part,  lse = m + log(a + b)
 *
 * Parallel over rows. */
#include <math.h>

#include "cpu/cpu_load.h"
#include "cpu/cpu_math.h"

ovlm_status ovlm_cpu_merge_measure(ovlm_backend *backend, const ovlm_merge *a,
                                   ovlm_op_bytes *bytes, ovlm_err *err)
{
    (void)backend;
    OVLM_CPU_CHECK(merge, a, MEASURE, err);
    OVLM_TRY(ovlm_cpu_fits("merge: a head", a->o.cols / a->heads, err));
    *bytes = (ovlm_op_bytes){0};
    return OVLM_OK;
}

OVLM_CPU_INLINE void mix_body(float *restrict o, const float *restrict part, float keep, float add,
                              int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        o[i] = keep * o[i] + add * part[i];
    }
}
OVLM_CPU_KERNEL(mix, (float *o, const float *part, float keep, float add, int64_t n),
                (o, part, keep, add, n))

static void merge_rows(const void *context, int64_t first, int64_t count, float *scratch)
{
    const ovlm_merge *a = context;
    int64_t dim = a->o.cols / a->heads;
    for (int64_t i = first * a->heads; i < (first + count) * a->heads; i++) {
        int64_t t = i / a->heads, head = i % a->heads;
        float *lse = ovlm_cpu_at(&a->lse, t, head);
        float part = *(float *)ovlm_cpu_at(&a->part_lse, t, head);
        float most = *lse > part ? *lse : part;
        if (!(most > -INFINITY)) {
            continue; /* neither saw a key */
        }
        float keep = ovlm_math_exp(*lse - most), add = ovlm_math_exp(part - most);
        float sum = keep + add;
        mix(ovlm_cpu_at(&a->o, t, head * dim), ovlm_cpu_row(&a->part, t, head * dim, dim, scratch),
            keep / sum, add / sum, dim);
        *lse = most + logf(sum);
    }
}

ovlm_status ovlm_cpu_merge_fwd(ovlm_queue *queue, const ovlm_merge *a, ovlm_err *err)
{
    OVLM_CPU_CHECK(merge, a, FWD, err);
    OVLM_TRY(ovlm_cpu_fits("merge: a head", a->o.cols / a->heads, err));
    ovlm_cpu_rows(ovlm_cpu_of(queue), a->o.rows, 2 * a->o.cols, merge_rows, a);
    return OVLM_OK;
}
