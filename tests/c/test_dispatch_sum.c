/* test_dispatch_sum.c - routes on which rows go to several places or to none: sums on the way back
 * against plain loops, bit for bit; what is refused; every allocation failing once. */
#include "base/arena.h"
#include "base/bf16.h"
#include "dispatch_rig.h"

enum { PIECES_MOST = 60, ROWS_MOST = 30 };

static int64_t below(int64_t n)
{
    return ovlm_rng_below(&test_rng, n);
}

/* A route whose pieces leave from anywhere, with gaps between their places. */
typedef struct spread {
    ovlm_route route;
    int64_t place[PIECES_MOST];
    rig_leg leg;
    ovlm_dtype dtype[RIG_LOADS_MOST];
    int64_t n_loads, width[RIG_LOADS_MOST]; /* elements */
} spread;

static void draw_spread(spread *x, int64_t n_ranks, bool popular)
{
    int64_t n = below(PIECES_MOST), k = 0, spare = below(3);
    ovlm_err err = {0};
    CHECK(ovlm_route_init(&x->route, n, n_ranks, &err) == OVLM_OK, "%s", err.message);
    for (int64_t r = 0; r < n_ranks; r++) {
        int64_t received = 0, at = 0, end = r + 1 == n_ranks ? n : k + below(n - k + 1);
        for (; k < end; k++) {
            /* where rows are popular, most pieces come from one place */
            bool there = popular && below(3);
            x->route.n_rows[k] = 1 + below(9);
            x->route.source[k] = there ? 0 : below(n_ranks);
            x->route.destination[k] = r;
            x->route.send_row[k] = below(there ? 5 : ROWS_MOST);
            x->route.item[k] = 0; /* one item per rank, so that a row has one name */
            x->route.first_row[k] = x->route.send_row[k];
            x->route.receive_row[k] = received;
            x->place[k] = at + below(3);
            at = x->place[k] + x->route.n_rows[k];
            received += x->route.n_rows[k];
        }
    }
    x->leg = rig_leg_of(&x->route, below(2) ? x->place : NULL, spare);
}

static void draw_loads(spread *x)
{
    static const ovlm_dtype dtype[] = {OVLM_F32, OVLM_F64, OVLM_BF16};
    x->n_loads = 1 + below(3);
    for (int64_t t = 0; t < x->n_loads; t++) {
        x->dtype[t] = dtype[below(3)];
        x->width[t] = 4 * below(9); /* so that every type is aligned beside the others */
    }
}

/* Element e of the gradient of a row, of many magnitudes: sums depend on their order. */
static double gradient(int64_t rank, int64_t row, int64_t e, int64_t t)
{
    uint64_t h = rig_hash(rig_hash((uint64_t)(rank * 1000 + t)) ^ (uint64_t)(row * 4096 + e));
    double value = (double)(h >> 40) - 8388608.0; /* 24 bits: exact in float32 */
    return value * (double)((uint64_t)1 << (h & 15));
}

static void store(unsigned char *to, double value, ovlm_dtype dtype)
{
    float single = (float)value;
    uint16_t half = ovlm_math_to_bf16(single);
    switch (dtype) {
    case OVLM_F64: memcpy(to, &value, sizeof value); break;
    case OVLM_F32: memcpy(to, &single, sizeof single); break;
    default: memcpy(to, &half, sizeof half);
    }
}

static double load(const unsigned char *from, ovlm_dtype dtype)
{
    double value;
    float single;
    uint16_t half;
    switch (dtype) {
    case OVLM_F64: memcpy(&value, from, sizeof value); return value;
    case OVLM_F32: memcpy(&single, from, sizeof single); return single;
    default: memcpy(&half, from, sizeof half); return ovlm_math_from_bf16(half);
    }
}

/* Gradients that one rank holds. */
static unsigned char *gradients(const spread *x, int64_t rank, int64_t t)
{
    int64_t size = ovlm_dtype_bytes(x->dtype[t]), width = x->width[t];
    int64_t rows = x->leg.destination_rows[rank];
    unsigned char *array = rig_bytes(rows * width * size);
    for (int64_t i = 0; i < rows * width; i++) {
        store(array + i * size, gradient(rank, i / width, i % width, t), x->dtype[t]);
    }
    return array;
}

/* One element of a source row: piece after piece, in float32 unless the dtype is float64. */
static double expected(const spread *x, int64_t rank, int64_t row, int64_t e, int64_t t)
{
    const ovlm_route *route = &x->route;
    bool first = true;
    double sum = 0;
    for (int64_t p = 0; p < route->k; p++) {
        int64_t into = row - route->send_row[p];
        if (route->source[p] != rank || into < 0 || into >= route->n_rows[p]) {
            continue;
        }
        int64_t at = rig_end(&x->leg, p) - route->n_rows[p] + into;
        unsigned char stored[8];
        store(stored, gradient(route->destination[p], at, e, t), x->dtype[t]);
        double value = load(stored, x->dtype[t]);
        if (x->dtype[t] == OVLM_F64) {
            sum = first ? value : sum + value;
        } else {
            sum = first ? value : (double)((float)sum + (float)value);
        }
        first = false;
    }
    return sum;
}

static void check_sums(rig_rank *self, const spread *x, const rig_transfer *way)
{
    for (int64_t t = 0; t < x->n_loads; t++) {
        int64_t size = ovlm_dtype_bytes(x->dtype[t]), width = x->width[t];
        const unsigned char *got = way->load[t].to;
        for (int64_t i = 0; i < x->leg.source_rows[self->rank] * width; i++) {
            unsigned char want[8];
            store(want, expected(x, self->rank, i / width, i % width, t), x->dtype[t]);
            RCHECK(self, memcmp(got + i * size, want, (size_t)size) == 0,
                   "load %lld, %s, row %lld, element %lld: %.9g, not %.9g", (long long)t,
                   ovlm_dtype_name(x->dtype[t]), (long long)(i / width), (long long)(i % width),
                   load(got + i * size, x->dtype[t]), load(want, x->dtype[t]));
        }
    }
}

/* There, every byte; back, every sum; each also with a start and a wait, and with threads. */
static void there_and_back(rig_rank *self)
{
    const spread *x = self->ctx;
    int64_t row_bytes[RIG_LOADS_MOST];
    ovlm_pool *pool = NULL;
    RTRY(self, ovlm_pool_open(1 + ovlm_rng_below(&self->own, 3), &pool, &self->err));
    for (int64_t t = 0; t < x->n_loads; t++) {
        row_bytes[t] = x->width[t] * ovlm_dtype_bytes(x->dtype[t]);
    }
    rig_transfer way;
    rig_open(self, &way, &x->leg, x->n_loads, row_bytes, pool);
    for (int64_t t = 0; t < x->n_loads; t++) {
        way.load[t].dtype = x->dtype[t];
    }
    rig_fill(self, &way, false);
    RTRY(self, ovlm_dispatch_apply(way.dispatch, &way.parcel, self->comm, &self->err));
    rig_compare(self, &way, false, "there");
    for (int round = 0; round < 2; round++) {
        rig_empty(&way);
        for (int64_t t = 0; t < x->n_loads; t++) {
            way.load[t].from = gradients(x, self->rank, t);
            way.load[t].to = rig_bytes(x->leg.source_rows[self->rank] * row_bytes[t]);
        }
        if (round == 0) {
            RTRY(self, ovlm_dispatch_reverse(way.dispatch, &way.parcel, self->comm, &self->err));
        } else {
            RTRY(self, ovlm_dispatch_start_reverse(way.dispatch, &way.parcel, self->comm,
                                                   &way.trip, &self->err));
            RTRY(self, ovlm_dispatch_wait(&way.trip, &self->err));
        }
        check_sums(self, x, &way);
    }
    rig_close(&way);
    ovlm_pool_close(pool);
}

static void test_sums(int rounds)
{
    static rig_rank ranks[RIG_RANKS_MOST];
    static spread x;
    for (int round = 0; round < rounds; round++) {
        memset(&x, 0, sizeof x);
        int64_t n_ranks = 1 + below(round % 4 ? 5 : RIG_RANKS_MOST);
        draw_spread(&x, n_ranks, round % 2);
        draw_loads(&x);
        rig_run("sums", n_ranks, NULL, there_and_back, &x, ranks);
        ovlm_route_free(&x.route);
    }
}

/* ------------------------------------------------------------------ refusals -------------- */

/* One rank alone: row 0 twice, row 1 never, row 2 once. */
static int64_t zeros[2], two[2] = {2, 1}, sends[2] = {0, 2}, arrives[2] = {0, 2}, twice[2] = {0, 0};

static ovlm_route small_route(void)
{
    return (ovlm_route){.k = 2, .n_ranks = 1, .item = zeros, .first_row = zeros, .n_rows = two,
                        .source = zeros, .destination = zeros, .send_row = sends,
                        .receive_row = arrives};
}

static void refuse_prepare(ovlm_dispatch_spec spec, const char *message)
{
    ovlm_dispatch *d = NULL;
    ovlm_err err = {0};
    CHECK(ovlm_dispatch_prepare(&spec, &d, &err) == OVLM_E_ARG && d == NULL, "%s", message);
    CHECK(strstr(err.message, message) != NULL, "%s: %s", message, err.message);
}

static void test_refused_specs(void)
{
    ovlm_route route = small_route(), other = small_route();
    const int64_t backwards[] = {2, 0}, early[] = {-1, 5}, far[] = {0, INT64_MAX};
    refuse_prepare((ovlm_dispatch_spec){&route, 1, NULL, -1, -1}, "rank is 1");
    refuse_prepare((ovlm_dispatch_spec){&route, -1, NULL, -1, -1}, "rank is -1");
    refuse_prepare((ovlm_dispatch_spec){&route, 0, NULL, 2, -1}, "2 rows before");
    refuse_prepare((ovlm_dispatch_spec){&route, 0, NULL, -1, 2}, "and 2 after");
    refuse_prepare((ovlm_dispatch_spec){&route, 0, backwards, -1, -1}, "place[1] is 0");
    refuse_prepare((ovlm_dispatch_spec){&route, 0, early, -1, -1}, "place[0] is -1");
    refuse_prepare((ovlm_dispatch_spec){&route, 0, far, -1, -1}, "place[1] is");
    int64_t wrong[] = {0, -1};
    other.send_row = wrong;
    refuse_prepare((ovlm_dispatch_spec){&other, 0, NULL, -1, -1}, "leaves from row -1");
    wrong[1] = INT64_MAX;
    refuse_prepare((ovlm_dispatch_spec){&other, 0, NULL, -1, -1}, "leaves from row 9");
    other = small_route();
    other.receive_row = wrong;
    refuse_prepare((ovlm_dispatch_spec){&other, 0, NULL, -1, -1}, "row 2 is next");
}

static void refuse_back(const ovlm_dispatch *d, ovlm_parcel *parcel, ovlm_comm *comm,
                        const char *message)
{
    ovlm_err err = {0};
    CHECK(ovlm_dispatch_reverse(d, parcel, comm, &err) == OVLM_E_ARG, "%s", message);
    CHECK(strstr(err.message, message) != NULL, "%s: %s", message, err.message);
}

static void test_refused_parcels(void)
{
    ovlm_route route = small_route();
    route.send_row = twice;
    ovlm_dispatch_spec spec = {&route, 0, NULL, 4, -1};
    ovlm_dispatch *d = NULL;
    ovlm_comm *comm = NULL;
    ovlm_err err = {0};
    CHECK(ovlm_dispatch_prepare(&spec, &d, &err) == OVLM_OK, "%s", err.message);
    CHECK(ovlm_comm_open_self(&comm, &err) == OVLM_OK, "%s", err.message);
    ovlm_dispatch_rows rows = ovlm_dispatch_count(d);
    CHECK(rows.source == 4 && rows.destination == 3 && rows.stay == 3 && rows.sent == 0 &&
              rows.received == 0 && rows.sums, "counted");
    float from[3] = {1, 2, 4}, to[4] = {9, 9, 9, 9};
    static _Alignas(64) char scratch[1024];
    ovlm_load load[2] = {{from, to, 4, OVLM_F32}, {from, to, 2, OVLM_BF16}};
    ovlm_parcel parcel = {1, load, scratch, sizeof scratch, NULL};
    CHECK(ovlm_dispatch_reverse(d, &parcel, comm, &err) == OVLM_OK, "%s", err.message);
    CHECK(to[0] == 5 && to[1] == 2 && to[2] == 0 && to[3] == 0, "1+4, 2, nothing, nothing");
    parcel.n = 2;
    refuse_back(d, &parcel, comm, "load 0: float32 is not aligned");
    parcel.n = 1;
    load[0].dtype = OVLM_I64;
    refuse_back(d, &parcel, comm, "bfloat16; got int64");
    load[0] = (ovlm_load){from, to, 6, OVLM_F32};
    refuse_back(d, &parcel, comm, "no whole number of float32");
    load[0] = (ovlm_load){from, NULL, 4, OVLM_F32};
    refuse_back(d, &parcel, comm, "to is NULL, and has 4 rows");
    load[0] = (ovlm_load){from, to, -1, OVLM_F32};
    refuse_back(d, &parcel, comm, "row_bytes is -1");
    load[0] = (ovlm_load){from, to, INT64_MAX / 2, OVLM_F32};
    refuse_back(d, &parcel, comm, "below 2^62");
    load[0] = (ovlm_load){from, to, 4, OVLM_F32};
    parcel.scratch_bytes = 16;
    refuse_back(d, &parcel, comm, "scratch has 16 bytes; the transfer takes");
    ovlm_dispatch_free(d);
    route.n_ranks = 2;
    CHECK(ovlm_dispatch_prepare(&spec, &d, &err) == OVLM_OK, "%s", err.message);
    refuse_back(d, &parcel, comm, "comm is rank 0 of 1; the dispatcher was prepared for rank 0 of");
    ovlm_dispatch_free(d);
    ovlm_dispatch_free(NULL);
    ovlm_comm_close(comm);
}

/* ------------------------------------------------------------------ memory ---------------- */

static void test_out_of_memory(void)
{
    static spread x;
    draw_spread(&x, 4, true);
    ovlm_dispatch_spec spec = {&x.route, 0, NULL, -1, -1};
    for (int64_t allocations = 0;; allocations++) {
        ovlm_dispatch *d = NULL;
        ovlm_err err = {0};
        ovlm_arena_fail_after(allocations);
        ovlm_status status = ovlm_dispatch_prepare(&spec, &d, &err);
        ovlm_arena_fail_after(-1);
        if (status != OVLM_E_NOMEM) {
            CHECK(status == OVLM_OK, "%s", err.message);
            ovlm_dispatch_free(d);
            break;
        }
        CHECK(d == NULL && err.message[0] != 0, "nothing is left behind");
    }
    ovlm_route_free(&x.route);
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    test_sums(40);
    test_refused_specs();
    test_refused_parcels();
    test_out_of_memory();
    return test_end("dispatch_sum");
}
