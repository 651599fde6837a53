/* cpu_attention_bwd.c - attention backward (Dao et al. 2022, algorithm 4), without atomics.
 *
 *   P = exp(scale q k^T - lse),  dP = dout v^T,  dS = scale P (dP - delta),  delta = <dout, o>
 *   dv = P^T dout,  dk = dS^T q,  dq = dS k
 *
 * Tiles of keys meet blocks of BLOCK rows; both begin at the segment's first.  A key's sums
 * run over blocks in order, a row's over tiles in order, so two ways of sharing out the work give
 * the same bits, and the number of threads may choose:
 *   together  a thread takes a segment and key/value head: five products per tile and block
 *   apart     one round by tiles of keys for dk and dv, one by blocks of rows for dq: seven
 *             products, but a single long segment keeps all threads busy */
#include <math.h>

#include "cpu/cpu_attention.h"
#include "cpu/cpu_math.h"

enum {
    KEYS_MOST = 192,
    BLOCK = 48,
    GROUP = 4 * BLOCK,      /* rows of a piece of dq: tiles are loaded once for them */
    SCORE_STEP = KEYS_MOST + 16,
    THREADS_WEIGHED = 64    /* more threads than that: apart */
};

typedef struct job {
    const ovlm_attention *a;
    const ovlm_cpu *cpu;
    const ovlm_tile_code *code;
    int64_t *start;     /* [n+1] first piece of each segment                    */
    float *delta;       /* [Tq][heads]                                          */
    float *dq;          /* [Tq][heads*D] where dq itself cannot hold the sums   */
    bool with_keys, with_queries; /* compute dk and dv, compute dq                        */
} job;

/* Keys of a tile: as many as L2 holds with their sums. */
static int64_t keys_of(int64_t d, int64_t dv)
{
    return d + dv <= 160 ? KEYS_MOST : KEYS_MOST / 2;
}

/* A thread's buffers. */
typedef struct bench {
    ovlm_attention_part p;
    const job *j;
    int64_t keys; /* of a tile */
    int64_t d_step, dv_step;
    float *key, *key_across, *value_across; /* [keys][d_step], [D][SCORE_STEP], [Dv][SCORE_STEP] */
    float *dk, *dv;                         /* [keys][d_step], [keys][dv_step]                   */
    float *q, *dout, *dq;                   /* [BLOCK][...]                                      */
    float *prob, *dscore;                   /* [BLOCK][SCORE_STEP]                               */
} bench;

static void bench_place(bench *w, float *scratch)
{
    w->keys = keys_of(w->p.d, w->p.dv);
    w->d_step = ovlm_tile_step(w->p.d);
    w->dv_step = ovlm_tile_step(w->p.dv);
    w->key = scratch;
    w->key_across = w->key + w->keys * w->d_step;
    w->value_across = w->key_across + ovlm_tile_round(w->p.d) * SCORE_STEP;
    w->dk = w->value_across + ovlm_tile_round(w->p.dv) * SCORE_STEP;
    w->dv = w->dk + w->keys * w->d_step;
    w->q = w->dv + w->keys * w->dv_step;
    w->dq = w->q + BLOCK * w->d_step;
    w->dout = w->dq + BLOCK * w->d_step;
    w->prob = w->dout + BLOCK * w->dv_step;
    w->dscore = w->prob + BLOCK * SCORE_STEP;
}

/* A row: scores and dP to P and dS; n columns of which `seen` count. */
OVLM_CPU_INLINE void slope_row_body(float *restrict p, float *restrict ds, int64_t n, int64_t seen,
                                    float scale, float saved, float delta)
{
    for (int64_t i = 0; i < n; i++) {
        p[i] = ovlm_math_exp(p[i] * scale - saved);
    }
    for (int64_t i = seen; i < n; i++) {
        p[i] = 0;
    }
    for (int64_t i = 0; i < n; i++) {
        ds[i] = scale * p[i] * (ds[i] - delta);
    }
}
OVLM_CPU_KERNEL(slope_row,
                (float *p, float *ds, int64_t n, int64_t seen, float scale, float saved,
                 float delta),
                (p, ds, n, seen, scale, saved, delta))

/* Where the sums of a row of dq are. */
static float *dq_row(const bench *w, int64_t row)
{
    const ovlm_attention *a = w->p.a;
    int64_t t = w->p.q0 + row / w->p.share, col = ovlm_attention_head(&w->p, row) * w->p.d;
    return w->j->dq != NULL ? w->j->dq + t * a->q.cols + col : ovlm_cpu_at(&a->dq, t, col);
}

static void dq_add(const bench *w, int64_t first, int64_t count, int64_t n)
{
    size_t bytes = (size_t)w->p.d * sizeof(float);
    for (int64_t i = 0; i < count; i++) {
        memcpy(w->dq + i * w->d_step, dq_row(w, first + i), bytes);
    }
    ovlm_tile dq = {.c = w->dq, .a = w->dscore, .b = w->key, .m = count,
                    .n = ovlm_tile_round(w->p.d), .k = n, .c_step = w->d_step,
                    .a_row = SCORE_STEP, .a_k = 1, .b_step = w->d_step, .add = true};
    w->j->code->mul(&dq);
    for (int64_t i = 0; i < count; i++) {
        memcpy(dq_row(w, first + i), w->dq + i * w->d_step, bytes);
    }
}

/* Rows from `first` on meet the tile of keys. */
static void block_tile(const bench *w, int64_t first, int64_t tile)
{
    const ovlm_attention *a = w->p.a;
    int64_t count = w->p.rows - first < BLOCK ? w->p.rows - first : BLOCK;
    int64_t seen = ovlm_attention_seen(&w->p, first + count - 1) - tile;
    if (seen <= 0) {
        return;
    }
    int64_t n = ovlm_tile_round(seen < w->keys ? seen : w->keys);
    ovlm_attention_load_rows(&w->p, &a->q, w->p.d, first, count, w->q, w->d_step);
    ovlm_attention_load_rows(&w->p, &a->dout, w->p.dv, first, count, w->dout, w->dv_step);
    ovlm_tile scores = {.c = w->prob, .a = w->q, .b = w->key_across, .m = count, .n = n,
                        .k = w->p.d, .c_step = SCORE_STEP, .a_row = w->d_step, .a_k = 1,
                        .b_step = SCORE_STEP};
    ovlm_tile slopes = {.c = w->dscore, .a = w->dout, .b = w->value_across, .m = count, .n = n,
                        .k = w->p.dv, .c_step = SCORE_STEP, .a_row = w->dv_step, .a_k = 1,
                        .b_step = SCORE_STEP};
    w->j->code->mul(&scores);
    w->j->code->mul(&slopes);
    for (int64_t i = 0; i < count; i++) {
        int64_t row = first + i, limit = ovlm_attention_seen(&w->p, row) - tile;
        int64_t left = w->p.nk - tile, head = ovlm_attention_head(&w->p, row);
        int64_t t = w->p.q0 + row / w->p.share;
        limit = limit < left ? limit : left;
        limit = limit < 0 ? 0 : limit < n ? limit : n;
        float lse = *ovlm_attention_lse(a, t, head); /* -infinity where no key is seen */
        slope_row(w->prob + i * SCORE_STEP, w->dscore + i * SCORE_STEP, n, limit,
                  (float)a->scale, lse > -INFINITY ? lse : 0, w->j->delta[t * a->heads + head]);
    }
    if (w->j->with_keys) {
        ovlm_tile dv = {.c = w->dv, .a = w->prob, .b = w->dout, .m = n,
                        .n = ovlm_tile_round(w->p.dv), .k = count, .c_step = w->dv_step,
                        .a_row = 1, .a_k = SCORE_STEP, .b_step = w->dv_step, .add = true};
        ovlm_tile dk = {.c = w->dk, .a = w->dscore, .b = w->q, .m = n,
                        .n = ovlm_tile_round(w->p.d), .k = count, .c_step = w->d_step,
                        .a_row = 1, .a_k = SCORE_STEP, .b_step = w->d_step, .add = true};
        w->j->code->mul(&dv);
        w->j->code->mul(&dk);
    }
    if (w->j->with_queries) {
        dq_add(w, first, count, n);
    }
}

static void tile_load(const bench *w, int64_t tile)
{
    const ovlm_attention *a = w->p.a;
    ovlm_attention_load_keys(&w->p, &a->v, w->p.dv, tile, w->keys, w->dv, w->dv_step);
    w->j->code->transpose(w->value_across, SCORE_STEP, w->dv, w->dv_step, w->keys,
                          ovlm_tile_round(w->p.dv));
    ovlm_attention_load_keys(&w->p, &a->k, w->p.d, tile, w->keys, w->key, w->d_step);
    w->j->code->transpose(w->key_across, SCORE_STEP, w->key, w->d_step, w->keys,
                          ovlm_tile_round(w->p.d));
}

static void store_keys(const bench *w, const ovlm_tensor *t, int64_t width, int64_t tile,
                       const float *from, int64_t step)
{
    int64_t count = w->p.nk - tile < w->keys ? w->p.nk - tile : w->keys;
    for (int64_t i = 0; ovlm_tensor_given(t) && i < count; i++) {
        ovlm_cpu_store(ovlm_cpu_at(t, w->p.k0 + tile + i, w->p.group * width), from + i * step,
                       width, t->dtype);
    }
}

/* A tile of keys meets every row that sees one of them. */
static void tile_run(const bench *w, int64_t tile)
{
    const ovlm_attention *a = w->p.a;
    tile_load(w, tile);
    memset(w->dk, 0, (size_t)(w->keys * w->d_step) * sizeof *w->dk);
    memset(w->dv, 0, (size_t)(w->keys * w->dv_step) * sizeof *w->dv);
    int64_t unseen = a->causal ? (tile - w->p.nk + w->p.nq) * w->p.share : 0;
    for (int64_t row = unseen > 0 ? unseen / BLOCK * BLOCK : 0; row < w->p.rows; row += BLOCK) {
        block_tile(w, row, tile);
    }
    if (w->j->with_keys) {
        store_keys(w, &a->dk, w->p.d, tile, w->dk, w->d_step);
        store_keys(w, &a->dv, w->p.dv, tile, w->dv, w->dv_step);
    }
}

static void dq_begin(const bench *w, int64_t first, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        memset(dq_row(w, first + i), 0, (size_t)w->p.d * sizeof(float));
    }
}

static void dq_end(const bench *w, int64_t first, int64_t count)
{
    const ovlm_attention *a = w->p.a;
    for (int64_t i = 0; w->j->dq != NULL && i < count; i++) {
        int64_t row = first + i, t = w->p.q0 + row / w->p.share;
        ovlm_cpu_store(ovlm_cpu_at(&a->dq, t, ovlm_attention_head(&w->p, row) * w->p.d),
                       dq_row(w, row), w->p.d, a->dq.dtype);
    }
}

/* The piece's segment and head, and its number among theirs. */
static int64_t bench_of(bench *w, const job *j, int64_t index, int64_t thread)
{
    int64_t segment = ovlm_cpu_find(j->start, j->a->query.n, index);
    int64_t number = index - j->start[segment];
    w->j = j;
    w->p = ovlm_attention_part_of(j->a, segment, number % j->a->kv_heads);
    bench_place(w, ovlm_cpu_scratch(j->cpu, thread));
    return number / j->a->kv_heads;
}

static void run_together(void *context, int64_t index, int64_t thread)
{
    bench w;
    (void)bench_of(&w, context, index, thread);
    if (w.j->with_queries) {
        dq_begin(&w, 0, w.p.rows);
    }
    for (int64_t tile = 0; tile < w.p.nk; tile += w.keys) {
        tile_run(&w, tile);
    }
    if (w.j->with_queries) {
        dq_end(&w, 0, w.p.rows);
    }
}

static void run_tile(void *context, int64_t index, int64_t thread)
{
    bench w;
    int64_t number = bench_of(&w, context, index, thread);
    tile_run(&w, number * w.keys);
}

static void run_group(void *context, int64_t index, int64_t thread)
{
    bench w;
    const job *j = context;
    index = j->start[j->a->query.n] - 1 - index; /* causal: the last rows see most */
    int64_t first = bench_of(&w, j, index, thread) * GROUP;
    int64_t count = w.p.rows - first < GROUP ? w.p.rows - first : GROUP;
    int64_t seen = ovlm_attention_seen(&w.p, first + count - 1);
    dq_begin(&w, first, count);
    for (int64_t tile = 0; tile < seen; tile += w.keys) {
        tile_load(&w, tile);
        for (int64_t row = first; row < first + count; row += BLOCK) {
            block_tile(&w, row, tile);
        }
    }
    dq_end(&w, first, count);
}

/* delta of every query and head. */
static void delta_rows(const void *context, int64_t first, int64_t count, float *scratch)
{
    const job *j = context;
    const ovlm_attention *a = j->a;
    int64_t dv = a->o.cols / a->heads;
    float *o = scratch, *dout = scratch + dv;
    for (int64_t t = first; t < first + count; t++) {
        for (int64_t head = 0; head < a->heads; head++) {
            ovlm_cpu_dot(ovlm_cpu_row(&a->o, t, head * dv, dv, o),
                         ovlm_cpu_row(&a->dout, t, head * dv, dv, dout), dv,
                         &j->delta[t * a->heads + head]);
        }
    }
}

enum { BY_HEAD, BY_TILE, BY_GROUP };

static int64_t count_pieces(const job *j, int by)
{
    const ovlm_attention *a = j->a;
    j->start[0] = 0;
    for (int64_t i = 0; i < a->query.n; i++) {
        ovlm_attention_part p = ovlm_attention_part_of(a, i, 0);
        int64_t keys = keys_of(p.d, p.dv);
        int64_t n = by == BY_TILE    ? (p.nk + keys - 1) / keys
                    : by == BY_GROUP ? (p.rows + GROUP - 1) / GROUP
                                     : 1;
        j->start[i + 1] = j->start[i] + n * a->kv_heads;
    }
    return j->start[a->query.n];
}

/* Whether the threads would be done sooner with whole segments and heads, five products against
 * seven.  Work goes to the thread that is free first, as in the pool. */
static bool is_even(const ovlm_attention *a, int64_t threads)
{
    double load[THREADS_WEIGHED] = {0}, total = 0, longest = 0;
    if (threads == 1 || threads > THREADS_WEIGHED) {
        return threads == 1;
    }
    for (int64_t i = 0; i < a->query.n; i++) {
        ovlm_attention_part p = ovlm_attention_part_of(a, i, 0);
        for (int64_t group = 0; group < a->kv_heads; group++) {
            int64_t least = 0;
            for (int64_t t = 1; t < threads; t++) {
                least = load[t] < load[least] ? t : least;
            }
            double cost = (double)p.rows * (double)p.nk; /* about */
            load[least] += cost;
            total += cost;
        }
    }
    for (int64_t t = 0; t < threads; t++) {
        longest = load[t] > longest ? load[t] : longest;
    }
    return 5 * longest <= 7 * total / (double)threads;
}

int64_t ovlm_attention_bwd_work(const ovlm_attention *a)
{
    int64_t sums = a->q.dtype == OVLM_F32 ? 0 : a->q.rows * a->q.cols;
    return (a->query.n + 1) * (int64_t)sizeof(int64_t) +
           (a->q.rows * a->heads + sums) * (int64_t)sizeof(float);
}

ovlm_status ovlm_cpu_attention_bwd(ovlm_queue *queue, const ovlm_attention *a, ovlm_err *err)
{
    OVLM_CPU_CHECK(attention, a, BWD, err);
    OVLM_TRY(ovlm_attention_check_width(a, err));
    ovlm_cpu *cpu = ovlm_cpu_of(queue);
    job j = {.a = a, .cpu = cpu, .code = ovlm_tile_code_get(), .start = a->scratch.work,
             .with_keys = ovlm_tensor_given(&a->dk) || ovlm_tensor_given(&a->dv),
             .with_queries = ovlm_tensor_given(&a->dq)};
    j.delta = (float *)(void *)(j.start + a->query.n + 1);
    j.dq = a->q.dtype == OVLM_F32 ? NULL : j.delta + a->q.rows * a->heads;
    ovlm_cpu_rows(cpu, a->q.rows, 2 * a->o.cols, delta_rows, &j);
    if (is_even(a, ovlm_pool_threads(cpu->pool))) {
        ovlm_pool_run(cpu->pool, count_pieces(&j, BY_HEAD), run_together, &j);
        return OVLM_OK;
    }
    job keys = j, queries = j;
    keys.with_queries = queries.with_keys = false;
    if (j.with_keys) {
        ovlm_pool_run(cpu->pool, count_pieces(&keys, BY_TILE), run_tile, &keys);
    }
    if (j.with_queries) {
        ovlm_pool_run(cpu->pool, count_pieces(&queries, BY_GROUP), run_group, &queries);
    }
    return OVLM_OK;
}
