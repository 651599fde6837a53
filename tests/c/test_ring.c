/* test_ring.c - attention around rings of ranks and its backward, against plain loops in double
 * over the group's tokens; on the device that host code cannot read, too. */
#include <math.h>

#include "engine/sequence_parallel.h"
#include "model/block.h"

#include "comm_rig.h"
#include "cpu/async.h"
#include "cpu/cpu_device.h"

enum { SEGMENTS = 5, D = 6 };

typedef struct ring_case {
    const ovlm_ops *ops;
    ovlm_dtype dtype;
    int64_t T, segments, heads, kv_heads, head_ranks;
    int32_t start[SEGMENTS + 1];
} ring_case;

/* One rank's pass; q, k, v and dout [T, heads*D] on the host are the whole group's. */
typedef struct trip {
    const ring_case *c;
    ovlm_sequence_pass *pass;
    ovlm_block_context context;
    float *q, *k, *v, *dout;
    ovlm_attention all, part[OVLM_HEAD_RUNS_MOST];
    ovlm_tensor qkv, dqkv;
} trip;

/* ---------------------------------------------------------------- what is wanted */

typedef struct want {
    double *o, *dq, *dk, *dv; /* [T, heads*D], of kv_heads for dk and dv */
} want;

static double dot(const float *a, const float *b)
{
    double sum = 0;
    for (int64_t d = 0; d < D; d++) {
        sum += (double)a[d] * (double)b[d];
    }
    return sum;
}

/* Query t of head h, which sees keys `first` to t. */
static void want_row(const trip *t, int64_t at, int64_t h, int64_t first, want *w)
{
    const ring_case *c = t->c;
    int64_t g = h * c->kv_heads / c->heads, q = (at * c->heads + h) * D;
    double p[64], sum = 0, delta = 0;
    for (int64_t j = first; j <= at; j++) {
        p[j] = exp(dot(t->q + q, t->k + (j * c->kv_heads + g) * D) / sqrt(D));
        sum += p[j];
    }
    for (int64_t j = first; j <= at; j++) {
        p[j] /= sum;
        delta += p[j] * dot(t->dout + q, t->v + (j * c->kv_heads + g) * D);
    }
    for (int64_t j = first; j <= at; j++) {
        int64_t kv = (j * c->kv_heads + g) * D;
        double ds = p[j] * (dot(t->dout + q, t->v + kv) - delta) / sqrt(D);
        for (int64_t d = 0; d < D; d++) {
            w->o[q + d] += p[j] * (double)t->v[kv + d];
            w->dq[q + d] += ds * (double)t->k[kv + d];
            w->dk[kv + d] += ds * (double)t->q[q + d];
            w->dv[kv + d] += p[j] * (double)t->dout[q + d];
        }
    }
}

/* Of the own query heads alone: ranks that share a key/value head add their parts elsewhere. */
static want want_of(const trip *t)
{
    const ring_case *c = t->c;
    const ovlm_sequence_part *own = ovlm_sequence_own(t->pass);
    size_t n = (size_t)(c->T * c->heads * D + 1);
    want w = {calloc(n, 8), calloc(n, 8), calloc(n, 8), calloc(n, 8)};
    for (int64_t i = 0; i < c->segments; i++) {
        for (int64_t at = c->start[i]; at < c->start[i + 1]; at++) {
            for (int64_t h = own->head; h < own->head + own->heads; h++) {
                want_row(t, at, h, c->start[i], &w);
            }
        }
    }
    return w;
}

/* ---------------------------------------------------------------- the pass */

/* The own row's rows and heads first .. of a host array with `heads` heads. */
static ovlm_status put(ovlm_run *run, const trip *t, const float *from, int64_t heads,
                       int64_t first, ovlm_tensor to)
{
    int64_t bytes = to.rows * to.cols * (int64_t)sizeof(float);
    float *host = ovlm_stack_take(run->stage, bytes);
    ovlm_tensor wide = ovlm_stack_tensor(run->work, to.rows, to.cols, OVLM_F32);
    if (!run->measuring && bytes > 0) {
        for (int64_t i = 0; i < to.rows; i++) {
            const float *row = from + ((t->pass->first + i) * heads + first) * D;
            memcpy(host + i * to.cols, row, (size_t)to.cols * sizeof *host);
        }
        OVLM_TRY(run->ops->copy(run->queue, wide.data, host, bytes, OVLM_TO_DEVICE, run->err));
    }
    return ovlm_run_move(run, wide, to, 0);
}

/* The own row's part of attention, or of its backward, as a block calls it. */
static ovlm_status attend(ovlm_run *run, trip *t, bool backward)
{
    const ovlm_sequence_part *own = ovlm_sequence_own(t->pass);
    for (int64_t i = 0; i < t->pass->runs; i++) {
        const ovlm_head_run *r = &t->pass->run[i];
        int64_t q = r->head * D, q_cols = r->heads * D, kv = r->kv_head * D;
        int64_t kv_cols = r->kv_heads * D, k = own->heads * D + kv, v = k + own->kv_heads * D;
        ovlm_attention *a = &t->part[i];
        if (backward) {
            a->dout = ovlm_tensor_cols(t->all.dout, q, q_cols);
            a->dq = ovlm_tensor_cols(t->dqkv, q, q_cols);
            a->dk = ovlm_tensor_cols(t->dqkv, k, kv_cols);
            a->dv = ovlm_tensor_cols(t->dqkv, v, kv_cols);
            RUN(run, attention, bwd, a);
            continue;
        }
        *a = t->all;
        a->heads = r->heads;
        a->kv_heads = r->kv_heads;
        a->q = ovlm_tensor_cols(t->all.q, q, q_cols);
        a->k = ovlm_tensor_cols(t->all.k, kv, kv_cols);
        a->v = ovlm_tensor_cols(t->all.v, kv, kv_cols);
        a->o = ovlm_tensor_cols(t->all.o, q, q_cols);
        a->lse = ovlm_tensor_cols(t->all.lse, r->head, r->heads);
        RUN_IN(run, attention, fwd, a, run->keep);
    }
    return OVLM_OK;
}

static ovlm_status walk(ovlm_run *run, trip *t)
{
    const ring_case *c = t->c;
    const ovlm_sequence_pass *s = t->pass;
    const ovlm_sequence_part *own = ovlm_sequence_own(s);
    int64_t q = own->heads * D, kv = own->kv_heads * D;
    void *bounds = NULL;
    OVLM_TRY(ovlm_run_upload(run, run->keep, s->ring.bounds,
                             s->ring.bounds_n * (int64_t)sizeof(int32_t), &bounds));
    ovlm_segments segments = {.n = c->segments, .max_len = s->longest, .start = bounds,
                              .host_start = s->ring.bounds};
    t->context = (ovlm_block_context){.sequence = s, .query = segments, .key = segments};
    t->context.ring_bounds = bounds == NULL ? NULL : (int32_t *)bounds + c->segments + 1;
    t->qkv = ovlm_stack_tensor(run->keep, s->rows, q + 2 * kv, run->dtype);
    t->dqkv = ovlm_stack_tensor(run->keep, s->rows, q + 2 * kv, run->dtype);
    t->all = (ovlm_attention){.heads = own->heads, .kv_heads = own->kv_heads, .causal = true,
                              .scale = 1 / sqrt(D), .query = segments, .key = segments,
                              .q = ovlm_tensor_cols(t->qkv, 0, q),
                              .k = ovlm_tensor_cols(t->qkv, q, kv),
                              .v = ovlm_tensor_cols(t->qkv, q + kv, kv)};
    t->all.o = ovlm_stack_tensor(run->keep, s->rows, q, run->dtype);
    t->all.lse = ovlm_stack_tensor(run->keep, s->rows, own->heads, run->exact);
    t->all.dout = ovlm_stack_tensor(run->keep, s->rows, q, run->dtype);
    OVLM_TRY(put(run, t, t->q, c->heads, own->head, t->all.q));
    OVLM_TRY(put(run, t, t->k, c->kv_heads, own->kv_head, t->all.k));
    OVLM_TRY(put(run, t, t->v, c->kv_heads, own->kv_head, t->all.v));
    OVLM_TRY(put(run, t, t->dout, c->heads, own->head, t->all.dout));
    int64_t mark = run->work->used_bytes;
    OVLM_TRY(attend(run, t, false));
    OVLM_TRY(ovlm_ring_fwd(run, &t->context, &t->all));
    OVLM_TRY(attend(run, t, true));
    OVLM_TRY(ovlm_ring_bwd(run, &t->context, &t->all, t->all.dout, t->dqkv));
    return mark == run->work->used_bytes
               ? OVLM_OK
               : OVLM_FAIL(run->err, OVLM_E_INTERNAL, "the workspace was not rewound");
}

/* ---------------------------------------------------------------- what came out */

static void check(rig_rank *self, ovlm_run *run, const trip *t, const char *what,
                  ovlm_tensor tensor, int64_t heads, int64_t first, const double *wanted)
{
    int64_t element = ovlm_dtype_bytes(tensor.dtype);
    int64_t bytes = tensor.rows == 0 ? 0 : ((tensor.rows - 1) * tensor.stride + tensor.cols) *
                                               element;
    char *host = rig_bytes(bytes);
    if (bytes > 0) {
        RTRY(self, run->ops->copy(run->queue, host, tensor.data, bytes, OVLM_TO_HOST, &self->err));
    }
    RTRY(self, run->ops->queue_wait(run->queue, &self->err));
    double loose = tensor.dtype == OVLM_BF16 ? 4e-2 : 2e-5;
    for (int64_t i = 0; i < tensor.rows * tensor.cols; i++) {
        int64_t row = i / tensor.cols, col = i % tensor.cols;
        uint32_t bits = 0;
        memcpy((char *)&bits + (4 - element), host + (row * tensor.stride + col) * element,
               (size_t)element);
        float is;
        memcpy(&is, &bits, sizeof is);
        double should = wanted[(t->pass->first + row) * heads * D + first * D + col];
        RCHECK(self, fabs((double)is - should) <= loose * (1 + fabs(should)),
               "%s[%lld, %lld] is %g, not %g", what, (long long)row, (long long)col, (double)is,
               should);
    }
    free(host);
}

static void check_trip(rig_rank *self, ovlm_run *run, const trip *t)
{
    const ring_case *c = t->c;
    const ovlm_sequence_part *own = ovlm_sequence_own(t->pass);
    int64_t q = own->heads * D, kv = own->kv_heads * D;
    want w = want_of(t);
    check(self, run, t, "o", t->all.o, c->heads, own->head, w.o);
    check(self, run, t, "dq", ovlm_tensor_cols(t->dqkv, 0, q), c->heads, own->head, w.dq);
    check(self, run, t, "dk", ovlm_tensor_cols(t->dqkv, q, kv), c->kv_heads, own->kv_head, w.dk);
    check(self, run, t, "dv", ovlm_tensor_cols(t->dqkv, q + kv, kv), c->kv_heads, own->kv_head,
          w.dv);
    free(w.o);
    free(w.dq);
    free(w.dk);
    free(w.dv);
}

/* The same on all ranks; bfloat16 holds them. */
static float *numbers(rig_rank *self, int64_t n)
{
    float *out = rig_bytes((n + 1) * (int64_t)sizeof *out);
    for (int64_t i = 0; i < n; i++) {
        out[i] = (float)(ovlm_rng_below(&self->shared, 257) - 128) / 64;
    }
    return out;
}

static void ring_rank(rig_rank *self)
{
    const ring_case *c = self->ctx;
    const ovlm_backend_options options = {.threads = 1};
    ovlm_backend *backend = NULL;
    ovlm_queue *queue = NULL;
    ovlm_arena arena = {0};
    ovlm_sequence_group group;
    trip t = {.c = c, .q = numbers(self, c->T * c->heads * D),
              .k = numbers(self, c->T * c->kv_heads * D),
              .v = numbers(self, c->T * c->kv_heads * D),
              .dout = numbers(self, c->T * c->heads * D)};
    ovlm_stack keep = {0}, work = {0}, stage = {0};
    ovlm_sequence_group_init(&group, self->comm, c->head_ranks);
    RTRY(self, c->ops->open(&options, &backend, &self->err));
    RTRY(self, c->ops->queue_open(backend, &queue, &self->err));
    RTRY(self, ovlm_sequence_prepare(&group.table, c->start, c->segments, c->heads, c->kv_heads,
                                     &arena, &t.pass, &self->err));
    ovlm_run run = {.queue = queue, .ops = c->ops, .measuring = true, .keep = &keep, .work = &work,
                    .stage = &stage, .dtype = c->dtype, .exact = OVLM_F32, .err = &self->err};
    RTRY(self, walk(&run, &t));
    RTRY(self, ovlm_stack_fit(&keep, backend, OVLM_STACK_DEVICE, keep.peak_bytes, &self->err));
    RTRY(self, ovlm_stack_fit(&work, backend, OVLM_STACK_DEVICE, work.peak_bytes, &self->err));
    RTRY(self, ovlm_stack_fit(&stage, backend, OVLM_STACK_HOST, stage.peak_bytes, &self->err));
    run.measuring = false;
    RTRY(self, walk(&run, &t));
    check_trip(self, &run, &t);
    RCHECK(self, group.on.count == 3 * t.pass->ring.steps, "%lld exchanges in %lld steps",
           (long long)group.on.count, (long long)t.pass->ring.steps);
    ovlm_stack_free(&keep, backend, OVLM_STACK_DEVICE);
    ovlm_stack_free(&work, backend, OVLM_STACK_DEVICE);
    ovlm_stack_free(&stage, backend, OVLM_STACK_HOST);
    c->ops->queue_close(queue);
    c->ops->close(backend);
    ovlm_arena_free(&arena);
    free(t.q);
    free(t.k);
    free(t.v);
    free(t.dout);
}

int main(int argc, char **argv)
{
    rig_rank ranks[RIG_RANKS_MOST];
    const ovlm_ops *const ops[] = {&ovlm_cpu_ops, &ovlm_async_ops};
    test_start(argc, argv);
    for (int i = 0; i < 30; i++) {
        ring_case c = {.ops = ops[i % 2], .dtype = i % 5 == 4 ? OVLM_BF16 : OVLM_F32,
                       .kv_heads = 1 + ovlm_rng_below(&test_rng, 3),
                       .head_ranks = ovlm_rng_below(&test_rng, 4),
                       .segments = ovlm_rng_below(&test_rng, SEGMENTS + 1)};
        c.heads = c.kv_heads * (1 + ovlm_rng_below(&test_rng, 3));
        for (int64_t k = 0; k < c.segments; k++) { /* none of many, of few, or some that are long */
            int64_t most = ovlm_rng_below(&test_rng, 3);
            most = most == 0 ? 3 : most == 1 ? 8 : 50 - c.start[k];
            most = most < 50 - c.start[k] ? most : 50 - c.start[k];
            c.start[k + 1] = c.start[k] + (int32_t)ovlm_rng_below(&test_rng, most + 1);
        }
        c.T = c.start[c.segments];
        rig_run("ring", 1 + ovlm_rng_below(&test_rng, 8), NULL, ring_rank, &c, ranks);
    }
    return test_end("ring");
}
