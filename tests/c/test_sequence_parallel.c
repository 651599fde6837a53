/* Who has which tokens and heads in a group, and reads which of other rows, against counting one by
 * one; and exchanges between ranks, on a device that host code cannot read, too. */
#include "engine/sequence_parallel.h"

#include "comm_rig.h"
#include "cpu/async.h"
#include "cpu/cpu_device.h"

enum { HEADS_MOST = 24, WIDTH = 3 };

static void check_part(int64_t T, int64_t heads, int64_t kv_heads, int64_t degree,
                       int64_t row_ranks, int *owners, int *rows)
{
    const int64_t share = heads / kv_heads;
    for (int64_t r = 0; r < degree; r++) {
        ovlm_sequence_part part = ovlm_sequence_part_of(T, heads, kv_heads, degree, row_ranks, r);
        ovlm_head_run run[OVLM_HEAD_RUNS_MOST];
        int64_t n = ovlm_sequence_head_runs(&part, heads, kv_heads, run), next = 0;
        CHECK(n >= 1 && n <= OVLM_HEAD_RUNS_MOST, "%lld runs", (long long)n);
        for (int64_t t = part.first; t < part.first + part.rows; t++) {
            rows[t]++;
        }
        for (int64_t i = 0; i < n; i++) {
            CHECK(run[i].head == next && run[i].heads % run[i].kv_heads == 0, "run %lld",
                  (long long)i);
            for (int64_t h = 0; h < run[i].heads; h++) {
                /* As the attention reads it: head h of the call reads h * kv_heads / heads. */
                int64_t reads = part.kv_head + run[i].kv_head + h * run[i].kv_heads / run[i].heads;
                int64_t head = part.head + run[i].head + h;
                owners[head]++;
                CHECK(reads == head / share, "head %lld of %lld on %lld reads %lld",
                      (long long)head, (long long)heads, (long long)kv_heads, (long long)reads);
                CHECK(reads >= part.kv_head && reads < part.kv_head + part.kv_heads, "not held");
            }
            next += run[i].heads;
        }
        CHECK(next == part.heads, "%lld heads of %lld", (long long)next, (long long)part.heads);
        CHECK(part.kv_heads == (part.head + part.heads - 1) / share - part.head / share + 1,
              "key/value heads that nobody reads");
    }
}

static void test_parts(void)
{
    for (int64_t kv_heads = 1; kv_heads <= HEADS_MOST; kv_heads++) {
        for (int64_t heads = kv_heads; heads <= HEADS_MOST; heads += kv_heads) {
            for (int64_t degree = 1; degree <= 2 * heads; degree++) {
                int owners[HEADS_MOST] = {0}, rows[3 * HEADS_MOST] = {0};
                int64_t T = (heads * 7 + degree) % (3 * HEADS_MOST);
                int64_t across = ovlm_sequence_row_ranks(degree, heads, 0);
                check_part(T, heads, kv_heads, degree, across, owners, rows);
                for (int64_t h = 0; h < heads; h++) {
                    CHECK(owners[h] == degree / across, "head %lld has %d ranks", (long long)h,
                          owners[h]);
                }
                for (int64_t t = 0; t < T; t++) {
                    CHECK(rows[t] == 1, "token %lld has %d ranks", (long long)t, rows[t]);
                }
            }
        }
    }
}

static void test_rows(void)
{
    const int64_t cases[][4] = {{8, 3, 0, 2}, {7, 3, 0, 1},   {6, 6, 0, 6}, {12, 5, 0, 4},
                                {8, 8, 2, 2}, {6, 2, 100, 2}, {9, 8, 5, 3}, {1, 4, 3, 1}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const int64_t *c = cases[i];
        CHECK(ovlm_sequence_row_ranks(c[0], c[1], c[2]) == c[3], "%lld ranks, %lld heads",
              (long long)c[0], (long long)c[1]);
    }
}

/* ---- what rings read ---- */

enum { RING_TOKENS = 40, RING_SEGMENTS = 6 };

/* Row of ranks that token t is in. */
static int64_t row_of(int64_t t, int64_t T, int64_t degree, int64_t across)
{
    int64_t r = 0;
    while (ovlm_sequence_cut(T, degree, r + 1) <= t) {
        r++;
    }
    return r / across;
}

/* Counts, pair by pair of tokens, what each row's queries read of each other row. */
static void check_ring(const ovlm_sequence_pass *s, const int32_t *start, int64_t segments)
{
    int64_t T = start[segments], degree = s->group->degree, across = s->row_ranks, reads = 0;
    bool read[RING_TOKENS] = {false}, asks[RING_TOKENS] = {false}, gives[RING_TOKENS] = {false};
    for (int64_t i = 0; i < segments; i++) {
        for (int64_t q = start[i]; q < start[i + 1]; q++) {
            for (int64_t k = start[i]; k <= q; k++) {
                int64_t asking = row_of(q, T, degree, across), far = asking;
                far -= row_of(k, T, degree, across);
                reads = far > reads ? far : reads;
                read[k] |= far > 0 && asking == s->row;
                asks[q] |= far > 0 && asking == s->row;
                gives[k] |= far > 0 && asking - far == s->row;
            }
        }
    }
    CHECK(s->ring.steps == reads, "%lld steps, not %lld", (long long)s->ring.steps,
          (long long)reads);
    int64_t taken = 0, queries = 0, given = 0, keys = 0;
    for (int64_t t = 0; t < T; t++) {
        taken += read[t];
        given += gives[t];
        queries += asks[t];
        CHECK(!asks[t] || t < s->first + s->ring.queries, "query %lld is left out", (long long)t);
    }
    for (int64_t step = 1; step <= s->ring.steps; step++) {
        keys += s->ring.take[step];
        CHECK(s->ring.give[step] <= s->ring.most_give && s->ring.give[step] <= s->rows, "gives");
    }
    CHECK(keys == taken && queries == s->ring.queries && given == s->ring.most_give,
          "%lld keys, %lld queries, %lld given; %lld, %lld, %lld", (long long)keys,
          (long long)s->ring.queries, (long long)s->ring.most_give, (long long)taken,
          (long long)queries, (long long)given);
}

static void test_rings(void)
{
    for (int i = 0; i < 300; i++) {
        int32_t start[RING_SEGMENTS + 1] = {0};
        int64_t segments = ovlm_rng_below(&test_rng, RING_SEGMENTS + 1);
        for (int64_t k = 0; k < segments; k++) {
            int64_t most = ovlm_rng_below(&test_rng, 2) ? 3 : RING_TOKENS;
            int64_t left = RING_TOKENS - start[k] + 1;
            start[k + 1] = start[k] + (int32_t)ovlm_rng_below(&test_rng, left < most ? left : most);
        }
        const int64_t degree = 1 + ovlm_rng_below(&test_rng, 10);
        const int64_t heads = 1 + ovlm_rng_below(&test_rng, 4);
        for (int64_t r = 0; r < degree; r++) {
            const ovlm_sequence group = {.degree = degree, .rank = r};
            ovlm_arena arena = {0};
            ovlm_sequence_pass *pass = NULL;
            ovlm_err err = {0};
            CHECK(ovlm_sequence_prepare(&group, start, segments, heads, 1, &arena, &pass, &err) ==
                      OVLM_OK, "%s", err.message);
            check_ring(pass, start, segments);
            ovlm_arena_free(&arena);
        }
    }
}

/* ---- exchanges ---- */

typedef struct trip_case {
    const ovlm_ops *ops;
    int64_t T, heads, kv_heads;
} trip_case;

/* What stands in row t, column c of tensor `which`. */
static float number(int64_t which, int64_t t, int64_t c)
{
    return (float)(which * 10000 + t * 100 + c);
}

typedef struct trip {
    ovlm_sequence_pass *pass;
    ovlm_tensor rows[2], own; /* query and key/value heads of own tokens; own heads of all */
} trip;

/* There, looked at, and back: key/value heads come back as many times as ranks hold them. */
static ovlm_status walk(ovlm_run *run, trip *t)
{
    const ovlm_lane lane[] = {{t->rows[0], false}, {t->rows[1], true}};
    OVLM_TRY(ovlm_sequence_to_heads(run, t->pass, lane, 2, t->own));
    return ovlm_sequence_to_tokens(run, t->pass, lane, 2, t->own);
}

static void fill(ovlm_tensor *host, int64_t which, int64_t first)
{
    for (int64_t t = 0; t < host->rows; t++) {
        for (int64_t c = 0; c < host->cols; c++) {
            ((float *)host->data)[t * host->cols + c] = number(which, first + t, c);
        }
    }
}

static ovlm_status put(ovlm_run *run, ovlm_tensor to, int64_t which, int64_t first)
{
    ovlm_tensor host = to;
    int64_t bytes = to.rows * to.cols * (int64_t)sizeof(float);
    host.data = ovlm_stack_take(run->stage, bytes);
    if (run->measuring || bytes == 0) {
        return OVLM_OK;
    }
    fill(&host, which, first);
    return run->ops->copy(run->queue, to.data, host.data, bytes, OVLM_TO_DEVICE, run->err);
}

static ovlm_status lay_out_and_walk(ovlm_run *run, trip *t)
{
    const ovlm_sequence_pass *s = t->pass;
    const ovlm_sequence_part *own = ovlm_sequence_own(s);
    t->rows[0] = ovlm_stack_tensor(run->keep, own->rows, s->heads * WIDTH, OVLM_F32);
    t->rows[1] = ovlm_stack_tensor(run->keep, own->rows, s->kv_heads * WIDTH, OVLM_F32);
    t->own = ovlm_stack_tensor(run->keep, s->rows, (own->heads + own->kv_heads) * WIDTH, OVLM_F32);
    OVLM_TRY(put(run, t->rows[0], 1, own->first));
    OVLM_TRY(put(run, t->rows[1], 2, own->first));
    return walk(run, t);
}

/* A tensor's numbers, as the host sees them. */
static float *fetched(rig_rank *self, ovlm_run *run, const ovlm_tensor *tensor)
{
    int64_t bytes = tensor->rows * tensor->cols * (int64_t)sizeof(float);
    float *host = rig_bytes(bytes);
    if (bytes > 0) {
        RTRY(self, run->ops->copy(run->queue, host, tensor->data, bytes, OVLM_TO_HOST,
                                  &self->err));
    }
    RTRY(self, run->ops->queue_wait(run->queue, &self->err));
    return host;
}

static void check_own(rig_rank *self, ovlm_run *run, const trip *t)
{
    const ovlm_sequence_part *own = ovlm_sequence_own(t->pass);
    float *host = fetched(self, run, &t->own);
    for (int64_t row = 0; row < t->own.rows; row++) {
        for (int64_t c = 0; c < t->own.cols; c++) {
            bool kv = c >= own->heads * WIDTH;
            int64_t from = kv ? c - own->heads * WIDTH + own->kv_head * WIDTH
                              : c + own->head * WIDTH;
            float is = host[row * t->own.cols + c];
            float wanted = number(kv ? 2 : 1, t->pass->first + row, from);
            RCHECK(self, is == wanted, "own %lld, %lld: %g, not %g", (long long)row, (long long)c,
                   (double)is, (double)wanted);
        }
    }
    free(host);
}

static void check_back(rig_rank *self, ovlm_run *run, const trip *t, bool kv)
{
    const ovlm_sequence_pass *s = t->pass;
    float *host = fetched(self, run, &t->rows[kv]);
    for (int64_t row = 0; row < t->rows[kv].rows; row++) {
        for (int64_t c = 0; c < t->rows[kv].cols; c++) {
            int64_t times = kv ? 0 : 1;
            for (int64_t p = 0; kv && p < s->row_ranks; p++) { /* as the same place of each row */
                int64_t head = c / WIDTH - s->part[p].kv_head;
                times += head >= 0 && head < s->part[p].kv_heads;
            }
            float wanted = (float)times * number(kv ? 2 : 1, ovlm_sequence_own(s)->first + row, c);
            float is = host[row * t->rows[kv].cols + c];
            RCHECK(self, is == wanted, "back %lld, %lld: %g, not %g", (long long)row, (long long)c,
                   (double)is, (double)wanted);
        }
    }
    free(host);
}

static void exchange_rank(rig_rank *self)
{
    const trip_case *c = self->ctx;
    const ovlm_backend_options options = {.threads = 1};
    ovlm_backend *backend = NULL;
    ovlm_queue *queue = NULL;
    ovlm_arena arena = {0};
    ovlm_sequence_group group;
    trip t = {0};
    ovlm_stack keep = {0}, work = {0}, stage = {0};
    const int32_t start[2] = {0, (int32_t)c->T};
    ovlm_sequence_group_init(&group, self->comm, 0);
    RTRY(self, c->ops->open(&options, &backend, &self->err));
    RTRY(self, c->ops->queue_open(backend, &queue, &self->err));
    RTRY(self, ovlm_sequence_prepare(&group.table, start, 1, c->heads, c->kv_heads, &arena, &t.pass,
                                     &self->err));
    ovlm_run run = {.queue = queue, .ops = c->ops, .measuring = true, .keep = &keep, .work = &work,
                    .stage = &stage, .dtype = OVLM_F32, .exact = OVLM_F32, .err = &self->err};
    RTRY(self, lay_out_and_walk(&run, &t));
    RCHECK(self, group.on.count == 0, "exchanged while measuring");
    RTRY(self, ovlm_stack_fit(&keep, backend, OVLM_STACK_DEVICE, keep.peak_bytes, &self->err));
    RTRY(self, ovlm_stack_fit(&work, backend, OVLM_STACK_DEVICE, work.peak_bytes, &self->err));
    RTRY(self, ovlm_stack_fit(&stage, backend, OVLM_STACK_HOST, stage.peak_bytes, &self->err));
    run.measuring = false;
    RTRY(self, lay_out_and_walk(&run, &t));
    check_own(self, &run, &t);
    check_back(self, &run, &t, false);
    check_back(self, &run, &t, true);
    RCHECK(self, group.on.count == 2 && work.used_bytes == 0, "%lld exchanges, %lld bytes kept",
           (long long)group.on.count, (long long)work.used_bytes);
    ovlm_stack_free(&keep, backend, OVLM_STACK_DEVICE);
    ovlm_stack_free(&work, backend, OVLM_STACK_DEVICE);
    ovlm_stack_free(&stage, backend, OVLM_STACK_HOST);
    c->ops->queue_close(queue);
    c->ops->close(backend);
    ovlm_arena_free(&arena);
}

static void test_exchanges(void)
{
    rig_rank ranks[RIG_RANKS_MOST];
    const ovlm_ops *const ops[] = {&ovlm_cpu_ops, &ovlm_async_ops};
    for (int i = 0; i < 24; i++) {
        trip_case c = {.ops = ops[i % 2], .kv_heads = 1 + ovlm_rng_below(&test_rng, 4)};
        c.heads = c.kv_heads * (1 + ovlm_rng_below(&test_rng, 4));
        c.T = ovlm_rng_below(&test_rng, 20);
        rig_run("exchange", 1 + ovlm_rng_below(&test_rng, 8), NULL, exchange_rank, &c, ranks);
    }
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    test_parts();
    test_rows();
    test_rings();
    test_exchanges();
    return test_end("sequence_parallel");
}
