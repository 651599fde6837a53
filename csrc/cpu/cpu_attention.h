/* cpu_attention.h - what the attention's forward and backward share.
 *
 * The query heads that read one key/value head are taken together: "row" i of a segment and a
 * key/value head is query i / share of query head g*share + i % share, so that every tile of keys
 * and values is loaded once for all of them. */
#ifndef OVLM_CPU_CPU_ATTENTION_H
#define OVLM_CPU_CPU_ATTENTION_H

#include "cpu/cpu_load.h"
#include "cpu/cpu_tile.h"

/* Columns of a head, at most: its tiles must fit a thread's scratch. */
enum { OVLM_ATTENTION_WIDTH = 640 };
OVLM_NODISCARD ovlm_status ovlm_attention_check_width(const ovlm_attention *a, ovlm_err *err);

/* Bytes of work that the backward needs. */
int64_t ovlm_attention_bwd_work(const ovlm_attention *a);

/* One segment and key/value head. */
typedef struct ovlm_attention_part {
    const ovlm_attention *a;
    int64_t d, dv, share;
    int64_t segment, group;
    int64_t q0, nq, k0, nk; /* rows of q and k                       */
    int64_t rows;           /* nq * share                            */
} ovlm_attention_part;

static inline void ovlm_attention_segment(const ovlm_segments *s, int64_t i, int64_t *first,
                                          int64_t *length)
{
    *first = s->start[i];
    *length = s->length != NULL ? s->length[i] : s->start[i + 1] - s->start[i];
}

static inline ovlm_attention_part ovlm_attention_part_of(const ovlm_attention *a, int64_t segment,
                                                         int64_t group)
{
    ovlm_attention_part p = {.a = a, .segment = segment, .group = group};
    p.d = a->q.cols / a->heads;
    p.dv = a->v.cols / a->kv_heads;
    p.share = a->heads / a->kv_heads;
    ovlm_attention_segment(&a->query, segment, &p.q0, &p.nq);
    ovlm_attention_segment(&a->key, segment, &p.k0, &p.nk);
    p.rows = p.nq * p.share;
    return p;
}

/* How many of the segment's keys, from the first on, the row sees: bottom-right causal. */
static inline int64_t ovlm_attention_seen(const ovlm_attention_part *p, int64_t row)
{
    if (!p->a->causal) {
        return p->nk;
    }
    int64_t seen = p->nk - p->nq + row / p->share + 1;
    return seen < 0 ? 0 : seen;
}

static inline int64_t ovlm_attention_head(const ovlm_attention_part *p, int64_t row)
{
    return p->group * p->share + row % p->share;
}

/* Where the log-sum-exp of query row t of the call is: in lse, or in what the forward keeps. */
static inline float *ovlm_attention_lse(const ovlm_attention *a, int64_t t, int64_t head)
{
    return ovlm_tensor_given(&a->lse) ? ovlm_cpu_at(&a->lse, t, head)
                                      : (float *)a->scratch.saved + head * a->q.rows + t;
}

/* `count` rows from `first` on, columns of their heads, as float32 with zeros behind: of q and dq
 * (width d), or of o and dout (width dv). */
static inline void ovlm_attention_load_rows(const ovlm_attention_part *p, const ovlm_tensor *t,
                                            int64_t width, int64_t first, int64_t count, float *to,
                                            int64_t step)
{
    for (int64_t i = 0; i < count; i++) {
        int64_t row = first + i, head = ovlm_attention_head(p, row);
        float *out = to + i * step;
        ovlm_cpu_load(out, ovlm_cpu_at(t, p->q0 + row / p->share, head * width), width, t->dtype);
        memset(out + width, 0, (size_t)(ovlm_tile_round(width) - width) * sizeof *out);
    }
}

/* Keys or values `first` .. of the segment, zeros behind the last key and column, `most` rows. */
static inline void ovlm_attention_load_keys(const ovlm_attention_part *p, const ovlm_tensor *t,
                                            int64_t width, int64_t first, int64_t most, float *to,
                                            int64_t step)
{
    int64_t padded = ovlm_tile_round(width);
    int64_t count = p->nk - first < most ? p->nk - first : most;
    for (int64_t i = 0; i < count; i++) {
        float *out = to + i * step;
        ovlm_cpu_load(out, ovlm_cpu_at(t, p->k0 + first + i, p->group * width), width, t->dtype);
        memset(out + width, 0, (size_t)(padded - width) * sizeof *out);
    }
    for (int64_t i = count; i < most; i++) {
        memset(to + i * step, 0, (size_t)padded * sizeof *to);
    }
}

#endif
