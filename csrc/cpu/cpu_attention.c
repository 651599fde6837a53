/* cpu_attention.c - attention forward, one pass over the keys (Dao et al. 2022, algorithm 1).
 *
 *   m' = max(m, scores), P = exp(scores - m'), l' = l e^(m-m') + sum P, o' = o e^(m-m') + P v
 *   o = o / l,  kept, in lse or for the backward alone: m + log l per head and query
 *
 * A piece of work is a segment, a key/value head and up to ROWS rows (queries times heads that
 * share the key/value head): its q and o stay in L2 while tiles of keys and values pass by.  With a
 * long cache and one query per segment the rows are few, and what counts is that each key is read
 * once.  Memory beyond the result: the log-sum-exp. */
#include <math.h>

#include "cpu/cpu_attention.h"
#include "cpu/cpu_math.h"

enum {
    ROWS = 264, /* of a piece, at most                                                  */
    BLOCK = 24, /* rows whose scores are held at a time, in the first-level cache        */
    KEYS = 64, /* of a tile.  Tiles begin at the segment's first key: a row meets the same tiles,
                  and adds in the same order, whatever else is in the call                  */
    SCORE_STEP = KEYS + 16
};

/* Where the pieces of each segment begin; first member of `work`. */
typedef struct pieces {
    const ovlm_attention *a;
    const ovlm_cpu *cpu;
    const ovlm_tile_code *code;
    int64_t *start; /* [n+1] */
    int64_t most;   /* rows of a piece */
} pieces;

/* Rows of a piece: what fits the scratch of a thread beside a tile of keys and values. */
static int64_t piece_rows(int64_t d, int64_t dv)
{
    int64_t step = ovlm_tile_step(d) + ovlm_tile_step(dv);
    int64_t fixed = 2 * KEYS * step + ovlm_tile_round(d) * SCORE_STEP + BLOCK * SCORE_STEP;
    int64_t rows = (OVLM_CPU_SCRATCH_BYTES / 4 - fixed - 1024) / (step + 2);
    rows = rows < ROWS ? rows / BLOCK * BLOCK : ROWS;
    return rows;
}

ovlm_status ovlm_attention_check_width(const ovlm_attention *a, ovlm_err *err)
{
    int64_t d = a->q.cols / a->heads, dv = a->v.cols / a->kv_heads;
    if (d > OVLM_ATTENTION_WIDTH || dv > OVLM_ATTENTION_WIDTH) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "attention: heads of %lld and %lld columns; the CPU takes up to %d",
                         (long long)d, (long long)dv, (int)OVLM_ATTENTION_WIDTH);
    }
    return OVLM_OK;
}

ovlm_status ovlm_cpu_attention_measure(ovlm_backend *backend, const ovlm_attention *a,
                                       ovlm_op_bytes *bytes, ovlm_err *err)
{
    (void)backend;
    OVLM_CPU_CHECK(attention, a, MEASURE, err);
    OVLM_TRY(ovlm_attention_check_width(a, err));
    int64_t kept = ovlm_tensor_given(&a->lse) ? 0 : a->heads * a->q.rows;
    *bytes = (ovlm_op_bytes){.saved = kept * (int64_t)sizeof(float),
                             .fwd_work = (a->query.n + 1) * (int64_t)sizeof(int64_t),
                             .bwd_work = ovlm_attention_bwd_work(a)};
    return OVLM_OK;
}

/* The state of a piece, in a thread's scratch. */
typedef struct piece {
    ovlm_attention_part p;
    int64_t first, count;              /* rows                                      */
    int64_t q_step, o_step;
    float *q, *o, *most, *sum;         /* [count][q_step], [count][o_step], [count] */
    float *key_rows, *key;             /* [KEYS][q_step], [d][SCORE_STEP]           */
    float *value_rows;                 /* [KEYS][o_step]                            */
    const float *value;                /* the present tile: value_rows, or v itself */
    int64_t value_step;
    float *score;                      /* [BLOCK][SCORE_STEP]                       */
} piece;

static void piece_place(piece *w, float *scratch, int64_t rows)
{
    int64_t d = ovlm_tile_round(w->p.d);
    w->q_step = ovlm_tile_step(w->p.d);
    w->o_step = ovlm_tile_step(w->p.dv);
    w->q = scratch;
    w->o = w->q + rows * w->q_step;
    w->key_rows = w->o + rows * w->o_step;
    w->key = w->key_rows + KEYS * w->q_step;
    w->value_rows = w->key + d * SCORE_STEP;
    w->score = w->value_rows + KEYS * w->o_step;
    w->most = w->score + BLOCK * SCORE_STEP;
    w->sum = w->most + (rows + 15) / 16 * 16;
}

/* One row of KEYS scores, of which `seen` count, to P.  Gives what o is to be multiplied by. */
OVLM_CPU_INLINE void softmax_row_body(float *restrict s, int64_t seen, float scale, float *most,
                                      float *sum, float *factor)
{
    float half[KEYS / 2], m = *most;
    for (int64_t i = 0; i < KEYS; i++) {
        s[i] *= scale;
    }
    for (int64_t i = seen; i < KEYS; i++) {
        s[i] = -INFINITY; /* gives P = 0 */
    }
    for (int64_t i = 0; i < KEYS / 2; i++) {
        half[i] = s[i] > s[i + KEYS / 2] ? s[i] : s[i + KEYS / 2];
    }
    for (int64_t i = 0; i < KEYS / 4; i++) {
        half[i] = half[i] > half[i + KEYS / 4] ? half[i] : half[i + KEYS / 4];
    }
    for (int64_t i = 0; i < KEYS / 8; i++) {
        half[i] = half[i] > half[i + KEYS / 8] ? half[i] : half[i + KEYS / 8];
    }
    for (int64_t i = 0; i < KEYS / 8; i++) {
        m = half[i] > m ? half[i] : m;
    }
    for (int64_t i = 0; i < KEYS; i++) {
        s[i] = ovlm_math_exp(s[i] - m);
    }
    ovlm_f8 total = {0};
    for (int64_t i = 0; i < KEYS; i += 8) {
        total += ovlm_f8_load(s + i);
    }
    *factor = m == *most ? 1 : ovlm_math_exp(*most - m); /* 0 at first: most is -infinity */
    *sum = *sum * *factor + ovlm_f8_sum(&total);
    *most = m;
}
OVLM_CPU_KERNEL(softmax_row,
                (float *s, int64_t seen, float scale, float *most, float *sum, float *factor),
                (s, seen, scale, most, sum, factor))

OVLM_CPU_INLINE void multiply_row_body(float *x, float factor, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        x[i] *= factor;
    }
}
OVLM_CPU_KERNEL(multiply_row, (float *x, float factor, int64_t n), (x, factor, n))

/* A block of rows meets a tile of keys that begins at `tile`. */
static void block_tile(const piece *w, const ovlm_tile_code *code, int64_t block, int64_t tile)
{
    int64_t count = w->count - block < BLOCK ? w->count - block : BLOCK;
    int64_t seen = ovlm_attention_seen(&w->p, w->first + block + count - 1) - tile;
    if (seen <= 0) {
        return; /* the last row of the block sees most */
    }
    int64_t n = ovlm_tile_round(seen < KEYS ? seen : KEYS);
    ovlm_tile scores = {.c = w->score, .a = w->q + block * w->q_step, .b = w->key, .m = count,
                        .n = n, .k = w->p.d, .c_step = SCORE_STEP, .a_row = w->q_step, .a_k = 1,
                        .b_step = SCORE_STEP};
    code->mul(&scores);
    for (int64_t i = 0; i < count; i++) {
        int64_t row = block + i, limit = ovlm_attention_seen(&w->p, w->first + row);
        limit = limit < w->p.nk ? limit : w->p.nk;
        limit = limit - tile < n ? limit - tile : n;
        float *s = w->score + i * SCORE_STEP, factor;
        if (limit <= 0) {
            memset(s, 0, (size_t)n * sizeof *s);
            continue;
        }
        softmax_row(s, limit, (float)w->p.a->scale, &w->most[row], &w->sum[row], &factor);
        if (factor != 1) {
            multiply_row(w->o + row * w->o_step, factor, ovlm_tile_round(w->p.dv));
        }
    }
    ovlm_tile values = {.c = w->o + block * w->o_step, .a = w->score, .b = w->value, .m = count,
                        .n = ovlm_tile_round(w->p.dv), .k = n, .c_step = w->o_step,
                        .a_row = SCORE_STEP, .a_k = 1, .b_step = w->value_step, .add = true};
    code->mul(&values);
}

static void piece_begin(const piece *w)
{
    const ovlm_attention *a = w->p.a;
    ovlm_attention_load_rows(&w->p, &a->q, w->p.d, w->first, w->count, w->q, w->q_step);
    memset(w->o, 0, (size_t)(w->count * w->o_step) * sizeof *w->o);
    for (int64_t i = 0; i < w->count; i++) {
        w->most[i] = -INFINITY;
        w->sum[i] = 0;
    }
}

static void piece_end(const piece *w)
{
    const ovlm_attention *a = w->p.a;
    for (int64_t i = 0; i < w->count; i++) {
        int64_t row = w->first + i, head = ovlm_attention_head(&w->p, row);
        int64_t t = w->p.q0 + row / w->p.share;
        float *o = w->o + i * w->o_step;
        bool any = w->sum[i] != 0; /* a row that sees no key gives 0 */
        multiply_row(o, any ? 1 / w->sum[i] : 0, w->p.dv);
        ovlm_cpu_store(ovlm_cpu_at(&a->o, t, head * w->p.dv), o, w->p.dv, a->o.dtype);
        *ovlm_attention_lse(a, t, head) = any ? w->most[i] + logf(w->sum[i]) : -INFINITY;
    }
}

/* The keys of a tile go across, so that a vector holds one element of several keys.  Whole tiles
 * of float32 are read where they are: keys always, values where so few rows meet them that a copy
 * would not pay. */
static void tile_load(piece *w, const ovlm_tile_code *code, int64_t tile)
{
    const ovlm_tensor *k = &w->p.a->k, *v = &w->p.a->v;
    int64_t d = w->p.d, dv = w->p.dv, first = w->p.k0 + tile;
    bool whole = w->p.nk - tile >= KEYS;
    const float *key = w->key_rows;
    int64_t key_step = w->q_step;
    if (whole && k->dtype == OVLM_F32 && d % 8 == 0) {
        key = ovlm_cpu_at(k, first, w->p.group * d);
        key_step = k->stride;
    } else {
        ovlm_attention_load_keys(&w->p, k, d, tile, KEYS, w->key_rows, w->q_step);
    }
    code->transpose(w->key, SCORE_STEP, key, key_step, KEYS, ovlm_tile_round(d));
    if (whole && v->dtype == OVLM_F32 && dv % 8 == 0 && w->count <= BLOCK) {
        w->value = ovlm_cpu_at(v, first, w->p.group * dv);
        w->value_step = v->stride;
    } else {
        ovlm_attention_load_keys(&w->p, v, dv, tile, KEYS, w->value_rows, w->o_step);
        w->value = w->value_rows;
        w->value_step = w->o_step;
    }
}

static void run_piece(void *context, int64_t index, int64_t thread)
{
    const pieces *all = context;
    const ovlm_attention *a = all->a;
    index = all->start[a->query.n] - 1 - index; /* causal: the last rows see most; they go first */
    int64_t segment = ovlm_cpu_find(all->start, a->query.n, index);
    int64_t number = index - all->start[segment];
    piece w = {.p = ovlm_attention_part_of(a, segment, number % a->kv_heads)};
    w.first = number / a->kv_heads * all->most;
    w.count = w.p.rows - w.first < all->most ? w.p.rows - w.first : all->most;
    piece_place(&w, ovlm_cpu_scratch(all->cpu, thread), all->most);
    piece_begin(&w);
    int64_t seen = ovlm_attention_seen(&w.p, w.first + w.count - 1);
    for (int64_t tile = 0; tile < seen; tile += KEYS) {
        tile_load(&w, all->code, tile);
        for (int64_t block = 0; block < w.count; block += BLOCK) {
            block_tile(&w, all->code, block, tile);
        }
    }
    piece_end(&w);
}

ovlm_status ovlm_cpu_attention_fwd(ovlm_queue *queue, const ovlm_attention *a, ovlm_err *err)
{
    OVLM_CPU_CHECK(attention, a, FWD, err);
    OVLM_TRY(ovlm_attention_check_width(a, err));
    ovlm_cpu *cpu = ovlm_cpu_of(queue);
    pieces all = {a, cpu, ovlm_tile_code_get(), a->scratch.work,
                  piece_rows(a->q.cols / a->heads, a->v.cols / a->kv_heads)};
    all.start[0] = 0;
    for (int64_t i = 0; i < a->query.n; i++) {
        int64_t rows = ovlm_attention_part_of(a, i, 0).rows;
        all.start[i + 1] = all.start[i] + (rows + all.most - 1) / all.most * a->kv_heads;
    }
    ovlm_pool_run(cpu->pool, all.start[a->query.n], run_piece, &all);
    return OVLM_OK;
}
