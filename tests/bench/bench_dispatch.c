/* bench_dispatch.c - times packing and unpacking beside memcpy; bench_dispatch.py feeds it.
 *
 * A line in: ranks items rows row_bytes loads threads.  `items` pieces of about `rows` rows leave
 * from each rank for others, drawn at random, and as many arrive, as one rank of a step sees it.
 * Its communicator moves nothing, so that a transfer is packing and unpacking alone.  A line out:
 * MB sent, GB/s of memcpy between two arrays, of packing, of unpacking, of a whole apply, and
 * microseconds of prepare; the bytes of a copy are counted once. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/rng.h"
#include "engine/dispatch_state.h"

enum { CALLS_LEAST = 5, CALLS_MOST = 1000, LOADS_MOST = 8 };
static const double SECONDS = 0.15;

static double now_s(int64_t threads)
{
    struct timespec now;
    (void)clock_gettime(threads == 1 ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* ------------------------------------------------------------------ no communicator ------- */

static ovlm_status nothing(void *self, const ovlm_comm_label *label, const ovlm_all_to_all *args,
                           ovlm_err *err)
{
    (void)self;
    (void)label;
    (void)args;
    (void)err;
    return OVLM_OK;
}

static ovlm_status no_gather(void *self, const ovlm_comm_label *label, const ovlm_all_gather *args,
                             ovlm_err *err)
{
    (void)self;
    (void)label;
    (void)args;
    (void)err;
    return OVLM_OK;
}

static ovlm_status no_split(void *self, const ovlm_comm_label *label, int64_t color, int64_t key,
                            void **child, int64_t *rank, int64_t *size, ovlm_err *err)
{
    (void)self;
    (void)label;
    (void)color;
    (void)key;
    (void)rank;
    (void)size;
    *child = NULL;
    return OVLM_FAIL(err, OVLM_E_COMM, "no split");
}

static void no_abort(void *self, const char *message)
{
    (void)self;
    (void)message;
}

static void no_close(void *self)
{
    (void)self;
}

static const ovlm_comm_engine ENGINE = {
    .name = "none", .compares = true, .any_thread = true, .host_memory = true,
    .all_to_all = nothing, .all_gather = no_gather, .split = no_split, .abort = no_abort,
    .close = no_close};

/* ------------------------------------------------------------------ a step's route -------- */

static void check(ovlm_status status, const ovlm_err *err)
{
    if (status != OVLM_OK) {
        fprintf(stderr, "%s\n", err->message);
        exit(1);
    }
}

static void *fresh(int64_t bytes)
{
    void *memory = aligned_alloc(64, (size_t)((bytes + 64) / 64 * 64));
    if (memory == NULL) {
        exit(1);
    }
    memset(memory, 1, (size_t)bytes);
    return memory;
}

/* Sources hold their items in the order of the batch, and an item goes to any rank, as after a
 * balanced phase.  There they stand by their number within the source: a balanced rank's order is
 * not its sources'. */
static void draw_route(int64_t n_ranks, int64_t items, int64_t rows, ovlm_route *route)
{
    ovlm_rng rng;
    ovlm_err err = {0};
    int64_t n = n_ranks * items;
    int64_t *size = fresh(n * 8), *to = fresh(n * 8), *at = fresh(n * 8);
    int64_t *next = calloc((size_t)n_ranks + 1, sizeof *next);
    int64_t *received = calloc((size_t)n_ranks, sizeof *received);
    ovlm_rng_init(&rng, 7);
    for (int64_t i = 0; i < n; i++) {
        size[i] = 1 + ovlm_rng_below(&rng, 2 * rows);
        to[i] = ovlm_rng_below(&rng, n_ranks);
        at[i] = i % items == 0 ? 0 : at[i - 1] + size[i - 1];
        next[to[i] + 1]++;
    }
    for (int64_t r = 0; r < n_ranks; r++) {
        next[r + 1] += next[r];
    }
    check(ovlm_route_init(route, n, n_ranks, &err), &err);
    for (int64_t step = 0; step < n; step++) {
        int64_t i = step % n_ranks * items + step / n_ranks, k = next[to[i]]++;
        route->item[k] = i;
        route->first_row[k] = 0;
        route->n_rows[k] = size[i];
        route->source[k] = i / items;
        route->destination[k] = to[i];
        route->send_row[k] = at[i];
        route->receive_row[k] = received[to[i]];
        received[to[i]] += size[i];
    }
    free(size);
    free(to);
    free(at);
    free(next);
    free(received);
}

/* ------------------------------------------------------------------ timing ---------------- */

typedef enum what { MEMCPY, PACK, UNPACK, APPLY } what;

typedef struct setting {
    ovlm_dispatch *dispatch;
    ovlm_parcel parcel;
    ovlm_comm *comm;
    char *left, *right; /* of memcpy */
    int64_t copy_bytes, threads;
} setting;

/* One thread's part of a plain copy. */
static void copy_part(void *ctx, int64_t index, int64_t thread)
{
    const setting *s = ctx;
    int64_t part = s->copy_bytes / s->threads, first = index * part;
    (void)thread;
    memcpy(s->right + first, s->left + first, (size_t)part);
}

static void once(setting *s, what kind)
{
    ovlm_err err = {0};
    dispatch_scratch scratch;
    (void)dispatch_lay_out(s->dispatch, &s->parcel, s->parcel.scratch, &scratch);
    dispatch_move move = {.dispatch = s->dispatch, .parcel = &s->parcel,
                          .width = dispatch_width(&s->parcel)};
    switch (kind) {
    case MEMCPY:
        if (s->parcel.pool != NULL) {
            ovlm_pool_run(s->parcel.pool, s->threads, copy_part, s);
        } else {
            copy_part(s, 0, 0);
        }
        break;
    case PACK:
        move.runs = &s->dispatch->out;
        move.wire = scratch.out;
        dispatch_pack(&move);
        break;
    case UNPACK:
        move.runs = &s->dispatch->in;
        move.wire = scratch.in;
        dispatch_unpack(&move);
        break;
    default:
        check(ovlm_dispatch_apply(s->dispatch, &s->parcel, s->comm, &err), &err);
    }
}

/* Best GB/s of a few calls that move `bytes` each; 0 where rows are sent from where they are, or
 * arrive where they belong. */
static double speed(setting *s, what kind, int64_t bytes)
{
    const ovlm_dispatch *d = s->dispatch;
    if (s->parcel.n == 1 &&
        ((kind == PACK && d->out.direct) || (kind == UNPACK && d->in.direct))) {
        return 0;
    }
    double best = 1e30, total = 0;
    for (int calls = 0; calls < CALLS_LEAST || (total < SECONDS && calls < CALLS_MOST); calls++) {
        double start = now_s(s->threads);
        once(s, kind);
        double took = now_s(s->threads) - start;
        best = took < best ? took : best;
        total += took;
    }
    return 1e-9 * (double)bytes / best;
}

static double prepare_us(const ovlm_dispatch_spec *spec, ovlm_dispatch **out)
{
    double best = 1e30;
    ovlm_err err = {0};
    for (int call = 0; call < 10; call++) {
        ovlm_dispatch_free(*out);
        double start = now_s(1);
        check(ovlm_dispatch_prepare(spec, out, &err), &err);
        double took = now_s(1) - start;
        best = took < best ? took : best;
    }
    return 1e6 * best;
}

static void run(int64_t n_ranks, int64_t items, int64_t rows, int64_t row_bytes, int64_t loads,
                int64_t threads)
{
    ovlm_route route = {0};
    ovlm_err err = {0};
    setting s = {.threads = threads};
    ovlm_load load[LOADS_MOST];
    draw_route(n_ranks, items, rows, &route);
    ovlm_dispatch_spec spec = {&route, n_ranks / 2, NULL, -1, -1};
    double prepared_us = prepare_us(&spec, &s.dispatch);
    ovlm_dispatch_rows count = ovlm_dispatch_count(s.dispatch);
    for (int64_t t = 0; t < loads; t++) {
        load[t] = (ovlm_load){fresh(count.source * row_bytes), fresh(count.destination * row_bytes),
                              row_bytes, OVLM_U8};
    }
    s.parcel = (ovlm_parcel){.n = loads, .load = load};
    if (threads > 1) {
        check(ovlm_pool_open(threads, &s.parcel.pool, &err), &err);
    }
    check(ovlm_dispatch_measure(s.dispatch, &s.parcel, &s.parcel.scratch_bytes, &err), &err);
    s.parcel.scratch = fresh(s.parcel.scratch_bytes);
    check(ovlm_comm_open(&ENGINE, NULL, spec.rank, n_ranks, 1, &s.comm, &err), &err);
    int64_t sent = count.sent * row_bytes * loads, received = count.received * row_bytes * loads;
    s.copy_bytes = sent / threads * threads;
    s.left = fresh(sent);
    s.right = fresh(sent);
    double plain = speed(&s, MEMCPY, sent), pack = speed(&s, PACK, sent);
    double unpack = speed(&s, UNPACK, received), again = speed(&s, MEMCPY, sent);
    double both = speed(&s, APPLY, sent + received + count.stay * row_bytes * loads);
    printf("%.3f %.4f %.4f %.4f %.4f %.1f\n", 1e-6 * (double)sent, plain > again ? plain : again,
           pack, unpack, both, prepared_us);
    fflush(stdout);
    ovlm_comm_close(s.comm);
    ovlm_pool_close(s.parcel.pool);
    ovlm_dispatch_free(s.dispatch);
    ovlm_route_free(&route);
    for (int64_t t = 0; t < loads; t++) {
        free((void *)(uintptr_t)load[t].from);
        free(load[t].to);
    }
    free(s.parcel.scratch);
    free(s.left);
    free(s.right);
}

int main(void)
{
    long long n[6];
    while (scanf("%lld %lld %lld %lld %lld %lld", &n[0], &n[1], &n[2], &n[3], &n[4], &n[5]) == 6) {
        if (n[0] < 2 || n[1] < 1 || n[2] < 1 || n[4] < 1 || n[4] > LOADS_MOST) {
            return 1;
        }
        run(n[0], n[1], n[2], n[3], n[4], n[5]);
    }
    return 0;
}
