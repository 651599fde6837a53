/* test_comm.c - communicators of ranks that are threads: every call against plain loops, trees of
 * splits, starts and waits, and what must fail. */
#include "comm_rig.h"

#include <math.h>

#include "backend/comm_state.h"

static rig_rank ranks[RIG_RANKS_MOST];

/* ---------------------------------------------------------------- bytes */

/* One all-to-all with a matrix of random counts, gaps between the places or none. */
static void exchange_once(rig_rank *self, ovlm_comm *comm, int64_t salt, int64_t most, bool start)
{
    int64_t n = ovlm_comm_size(comm), me = ovlm_comm_rank(comm), sent = 0, got = 0, ticket = 0;
    int64_t send_n[RIG_RANKS_MOST], send_at[RIG_RANKS_MOST], recv_n[RIG_RANKS_MOST],
        recv_at[RIG_RANKS_MOST];
    bool dense = ovlm_rng_below(&self->shared, 2) == 0;
    int64_t giant = ovlm_rng_below(&self->shared, 3) == 0 ? ovlm_rng_below(&self->shared, n * n)
                                                          : -1;
    for (int64_t from = 0; from < n; from++) {
        for (int64_t to = 0; to < n; to++) {
            int64_t bytes = rig_size(&self->shared, from * n + to == giant ? 20 * most : most);
            send_n[to] = from == me ? bytes : send_n[to];
            recv_n[from] = to == me ? bytes : recv_n[from];
        }
    }
    for (int64_t r = 0; r < n; r++) {
        int64_t gap = dense ? 0 : ovlm_rng_below(&self->own, 9);
        send_at[r] = sent + gap;
        recv_at[r] = got + gap;
        sent = send_at[r] + send_n[r];
        got = recv_at[r] + recv_n[r];
    }
    unsigned char *send = rig_bytes(sent), *recv = rig_bytes(got + 1);
    for (int64_t to = 0; to < n; to++) {
        for (int64_t i = 0; i < send_n[to]; i++) {
            send[send_at[to] + i] = rig_byte(salt, me, to, i);
        }
    }
    const ovlm_all_to_all args = {.send = send, .send_bytes = send_n,
                                  .send_at = dense ? NULL : send_at, .recv = recv,
                                  .recv_bytes = recv_n, .recv_at = dense ? NULL : recv_at};
    if (start) {
        RTRY(self, ovlm_comm_all_to_all_start(comm, &args, &ticket, &self->err));
        RTRY(self, ovlm_comm_barrier(comm, &self->err)); /* waits its turn */
        RTRY(self, ovlm_comm_wait(comm, ticket, &self->err));
    } else {
        RTRY(self, ovlm_comm_all_to_all(comm, &args, &self->err));
    }
    int64_t wrong = 0;
    for (int64_t from = 0; from < n; from++) {
        for (int64_t i = 0; i < recv_n[from]; i++) {
            wrong += recv[recv_at[from] + i] != rig_byte(salt, from, me, i);
        }
    }
    RCHECK(self, wrong == 0 && recv[got] == 0xee, "%lld bytes are wrong", (long long)wrong);
    free(send);
    free(recv);
}

static void gather_once(rig_rank *self, ovlm_comm *comm, int64_t salt, int64_t most)
{
    int64_t n = ovlm_comm_size(comm), me = ovlm_comm_rank(comm), sum = 0, wrong = 0;
    int64_t count[RIG_RANKS_MOST], at[RIG_RANKS_MOST];
    bool inside = ovlm_rng_below(&self->shared, 2) == 0, dense = ovlm_rng_below(&self->shared, 2);
    for (int64_t r = 0; r < n; r++) {
        count[r] = rig_size(&self->shared, most);
        at[r] = sum + (dense ? 0 : ovlm_rng_below(&self->own, 9));
        sum = at[r] + count[r];
    }
    unsigned char *recv = rig_bytes(sum + 1), *send = inside ? recv + at[me] : rig_bytes(count[me]);
    for (int64_t i = 0; i < count[me]; i++) {
        send[i] = rig_byte(salt, me, 0, i);
    }
    const ovlm_all_gather args = {.send = send, .recv = recv, .recv_bytes = count,
                                  .recv_at = dense ? NULL : at};
    RTRY(self, ovlm_comm_all_gather(comm, &args, &self->err));
    for (int64_t r = 0; r < n; r++) {
        for (int64_t i = 0; i < count[r]; i++) {
            wrong += recv[at[r] + i] != rig_byte(salt, r, 0, i);
        }
    }
    RCHECK(self, wrong == 0 && recv[sum] == 0xee, "%lld bytes are wrong", (long long)wrong);
    if (!inside) {
        free(send);
    }
    free(recv);
}

static void broadcast_once(rig_rank *self, ovlm_comm *comm, int64_t salt, int64_t most)
{
    int64_t bytes = rig_size(&self->shared, most), wrong = 0;
    int64_t root = ovlm_rng_below(&self->shared, ovlm_comm_size(comm));
    unsigned char *data = rig_bytes(bytes);
    for (int64_t i = 0; i < bytes && root == ovlm_comm_rank(comm); i++) {
        data[i] = rig_byte(salt, root, 0, i);
    }
    RTRY(self, ovlm_comm_broadcast(comm, data, bytes, root, NULL, &self->err));
    for (int64_t i = 0; i < bytes; i++) {
        wrong += data[i] != rig_byte(salt, root, 0, i);
    }
    RCHECK(self, wrong == 0, "%lld bytes are wrong", (long long)wrong);
    free(data);
}

/* ---------------------------------------------------------------- reductions */

/* Element i of a rank: sums of a few of them differ from order to order. */
static double element(int64_t salt, int64_t rank, int64_t i)
{
    int x = rig_byte(salt, rank, 1, i) - 128, scale = rig_byte(salt, rank, 2, i) % 24;
    return ldexp((double)x + 0.1, scale - 12);
}

static void put(void *data, ovlm_dtype dtype, int64_t i, double x)
{
    switch (dtype) {
    case OVLM_F32: ((float *)data)[i] = (float)x; break;
    case OVLM_F64: ((double *)data)[i] = x; break;
    case OVLM_BF16: ((uint16_t *)data)[i] = ovlm_math_to_bf16((float)x); break;
    case OVLM_I64: ((int64_t *)data)[i] = (int64_t)(x * 1e12); break;
    default: ((int32_t *)data)[i] = (int32_t)(x * 1000);
    }
}

/* One element over n ranks, in the order of the ranks, at the type's own precision. */
static void reduce_plainly(void *out, int64_t at, ovlm_dtype dtype, ovlm_reduce reduce,
                           int64_t salt, int64_t n, int64_t i)
{
    float f = 0;
    double d = 0;
    int64_t whole = 0;
    for (int64_t r = 0; r < n; r++) {
        double box;
        put(&box, dtype, 0, element(salt, r, i));
        float fx = 0;
        double dx = 0;
        int64_t wx = 0;
        int32_t small;
        uint16_t half;
        memcpy(&fx, &box, sizeof fx);
        memcpy(&dx, &box, sizeof dx);
        memcpy(&half, &box, sizeof half);
        memcpy(&small, &box, sizeof small);
        memcpy(&wx, &box, sizeof wx);
        fx = dtype == OVLM_BF16 ? ovlm_math_from_bf16(half) : fx;
        wx = dtype == OVLM_I32 ? small : wx;
        bool first = r == 0, sum = reduce == OVLM_SUM, max = reduce == OVLM_MAX;
        f = first ? fx : sum ? f + fx : max ? fmaxf(f, fx) : fminf(f, fx);
        d = first ? dx : sum ? d + dx : max ? fmax(d, dx) : fmin(d, dx);
        bool better = max ? wx > whole : wx < whole;
        int64_t together = (int64_t)((uint64_t)whole + (uint64_t)wx); /* wraps around */
        whole = first ? wx : sum ? together : better ? wx : whole;
    }
    switch (dtype) {
    case OVLM_F32: ((float *)out)[at] = f; break;
    case OVLM_F64: ((double *)out)[at] = d; break;
    case OVLM_BF16: ((uint16_t *)out)[at] = ovlm_math_to_bf16(f); break;
    case OVLM_I64: ((int64_t *)out)[at] = whole; break;
    default: ((int32_t *)out)[at] = (int32_t)whole;
    }
}

static void reduce_once(rig_rank *self, ovlm_comm *comm, int64_t salt, int64_t most, bool start)
{
    static const ovlm_dtype dtypes[] = {OVLM_F32, OVLM_F64, OVLM_BF16, OVLM_I64, OVLM_I32};
    ovlm_dtype dtype = dtypes[ovlm_rng_below(&self->shared, 5)];
    ovlm_reduce reduce = (ovlm_reduce)ovlm_rng_below(&self->shared, 3);
    int64_t n = rig_size(&self->shared, most), size = ovlm_dtype_bytes(dtype), ticket = 0;
    bool inside = ovlm_rng_below(&self->shared, 2) == 0;
    char *send = rig_bytes(n * size), *recv = inside ? send : rig_bytes(n * size),
         *want = rig_bytes(n * size);
    for (int64_t i = 0; i < n; i++) {
        put(send, dtype, i, element(salt, ovlm_comm_rank(comm), i));
        reduce_plainly(want, i, dtype, reduce, salt, ovlm_comm_size(comm), i);
    }
    const ovlm_all_reduce args = {.send = send, .recv = recv, .n = n, .dtype = dtype,
                                  .reduce = reduce};
    if (start) {
        RTRY(self, ovlm_comm_all_reduce_start(comm, &args, &ticket, &self->err));
        RTRY(self, ovlm_comm_wait(comm, ticket, &self->err));
    } else {
        RTRY(self, ovlm_comm_all_reduce(comm, &args, &self->err));
    }
    RCHECK(self, memcmp(recv, want, (size_t)(n * size)) == 0, "%lld %s, reduction %d",
           (long long)n, ovlm_dtype_name(dtype), (int)reduce);
    if (!inside) {
        free(recv);
    }
    free(send);
    free(want);
}

static void scatter_once(rig_rank *self, ovlm_comm *comm, int64_t salt, int64_t most)
{
    ovlm_dtype dtype = ovlm_rng_below(&self->shared, 2) ? OVLM_F32 : OVLM_BF16;
    int64_t n = ovlm_comm_size(comm), me = ovlm_comm_rank(comm), size = ovlm_dtype_bytes(dtype);
    int64_t count[RIG_RANKS_MOST], sum = 0, mine = 0;
    bool inside = ovlm_rng_below(&self->shared, 2) == 0;
    for (int64_t r = 0; r < n; r++) {
        count[r] = rig_size(&self->shared, most);
        mine = r == me ? sum : mine;
        sum += count[r];
    }
    char *send = rig_bytes(sum * size), *want = rig_bytes(count[me] * size);
    char *recv = inside ? send + mine * size : rig_bytes(count[me] * size);
    for (int64_t i = 0; i < sum; i++) {
        put(send, dtype, i, element(salt, me, i));
    }
    for (int64_t i = 0; i < count[me]; i++) {
        reduce_plainly(want, i, dtype, OVLM_SUM, salt, n, mine + i);
    }
    const ovlm_reduce_scatter args = {.send = send, .recv = recv, .counts = count,
                                      .dtype = dtype};
    RTRY(self, ovlm_comm_reduce_scatter(comm, &args, &self->err));
    RCHECK(self, memcmp(recv, want, (size_t)(count[me] * size)) == 0, "%lld of %s",
           (long long)count[me], ovlm_dtype_name(dtype));
    if (!inside) {
        free(recv);
    }
    free(send);
    free(want);
}

static void call_at_random(rig_rank *self, ovlm_comm *comm, int64_t salt, int64_t most)
{
    switch (ovlm_rng_below(&self->shared, 8)) {
    case 0: RTRY(self, ovlm_comm_barrier(comm, &self->err)); break;
    case 1: gather_once(self, comm, salt, most); break;
    case 2: broadcast_once(self, comm, salt, most); break;
    case 3: reduce_once(self, comm, salt, most / 4, false); break;
    case 4: reduce_once(self, comm, salt, most / 4, true); break;
    case 5: scatter_once(self, comm, salt, most / 4); break;
    case 6: exchange_once(self, comm, salt, most, true); break;
    default: exchange_once(self, comm, salt, most, false);
    }
}

/* ---------------------------------------------------------------- bodies */

static void many_calls(rig_rank *self)
{
    for (int64_t i = 0; i < 30; i++) {
        call_at_random(self, self->comm, i, 2000);
    }
}

static void large_calls(rig_rank *self)
{
    reduce_once(self, self->comm, 1, 700000, false); /* several pieces */
    scatter_once(self, self->comm, 2, 300000);
    exchange_once(self, self->comm, 3, 600000, false);
}

static void split_tree(rig_rank *self, ovlm_comm *comm, int64_t depth)
{
    ovlm_comm *child = NULL, *twin = NULL;
    int64_t n = ovlm_comm_size(comm), me = ovlm_comm_rank(comm), better = 0, same = 0;
    int64_t color[RIG_RANKS_MOST] = {0}, key[RIG_RANKS_MOST] = {0};
    for (int64_t r = 0; r < n; r++) {
        color[r] = ovlm_rng_below(&self->shared, 3) - (depth % 2);
        key[r] = ovlm_rng_below(&self->shared, 4) - 2;
    }
    RTRY(self, ovlm_comm_split(comm, color[me], key[me], &child, &self->err));
    for (int64_t r = 0; r < n; r++) {
        same += color[r] == color[me];
        better += color[r] == color[me] && (key[r] < key[me] || (key[r] == key[me] && r < me));
    }
    RCHECK(self, (child == NULL) == (color[me] < 0), "color %lld", (long long)color[me]);
    RTRY(self, ovlm_comm_dup(comm, &twin, &self->err));
    if (child != NULL && twin != NULL) {
        RCHECK(self, ovlm_comm_size(child) == same && ovlm_comm_rank(child) == better,
               "rank %lld of %lld, not %lld of %lld", (long long)ovlm_comm_rank(child),
               (long long)ovlm_comm_size(child), (long long)better, (long long)same);
        /* From here on the ranks of one child draw the same numbers. */
        ovlm_rng_init(&self->shared, (uint64_t)(color[me] + 7 * depth + 1));
        call_at_random(self, child, depth, 500);
        if (depth > 0) {
            split_tree(self, child, depth - 1);
        }
        call_at_random(self, child, depth + 9, 500);
    }
    ovlm_comm_close(child);
    ovlm_rng_init(&self->shared, (uint64_t)depth);
    if (twin != NULL) {
        call_at_random(self, twin, depth, 500);
    }
    ovlm_comm_close(twin);
}

static void split_calls(rig_rank *self)
{
    split_tree(self, self->comm, 2);
    exchange_once(self, self->comm, 5, 300, false);
}

/* Many starts on two communicators, waited for in another order. */
static void start_calls(rig_rank *self)
{
    enum { MANY = 40 };
    ovlm_comm *twin = NULL;
    RTRY(self, ovlm_comm_dup(self->comm, &twin, &self->err));
    int64_t ticket[2][MANY], value[2][MANY];
    for (int64_t i = 0; i < MANY; i++) {
        for (int64_t c = 0; c < 2; c++) {
            value[c][i] = self->rank + i;
            const ovlm_all_reduce args = {.send = &value[c][i], .recv = &value[c][i], .n = 1,
                                          .dtype = OVLM_I64};
            RTRY(self, ovlm_comm_all_reduce_start(c ? twin : self->comm, &args, &ticket[c][i],
                                                  &self->err));
        }
    }
    for (int64_t i = MANY - 1; i >= 0; i--) {
        for (int64_t c = 1; c >= 0; c--) {
            RTRY(self, ovlm_comm_wait(c ? twin : self->comm, ticket[c][i], &self->err));
            RCHECK(self, value[c][i] == self->n * (self->n - 1) / 2 + self->n * i, "sum %lld",
                   (long long)value[c][i]);
        }
    }
    RCHECK(self, ovlm_comm_wait(twin, 0, &self->err) == OVLM_E_ARG &&
                     ovlm_comm_wait(twin, MANY + 1, &self->err) == OVLM_E_ARG, "no such tickets");
    ovlm_comm_close(twin);
}

static void test_calls(void)
{
    static const int64_t windows[] = {1, 64, 1000, 0};
    for (int64_t n = 1; n <= RIG_RANKS_MOST; n += 1 + n / 5) {
        ovlm_comm_local_options options = {.silent_s = 5, .window_bytes = windows[n % 4]};
        rig_run("many calls", n, &options, many_calls, NULL, ranks);
        rig_run("splits", n, &options, split_calls, NULL, ranks);
        rig_run("starts", n, &options, start_calls, NULL, ranks);
    }
    rig_run("large calls", 3, NULL, large_calls, NULL, ranks);
    rig_run("large calls", 1, NULL, large_calls, NULL, ranks);
}

static void test_self(void)
{
    memset(ranks, 0, sizeof ranks);
    CHECK(ovlm_comm_open_self(&ranks[0].comm, NULL) == OVLM_OK, "self");
    ranks[0].n = 1;
    many_calls(&ranks[0]);
    split_calls(&ranks[0]);
    start_calls(&ranks[0]);
    CHECK(ranks[0].failures == 0, "self: %s", ranks[0].first);
    ovlm_comm_abort(ranks[0].comm, "enough");
    CHECK(ovlm_comm_barrier(ranks[0].comm, NULL) == OVLM_E_COMM, "aborted");
    ovlm_comm_close(ranks[0].comm);
}

/* A NaN in one place of one rank comes through maximum and minimum. */
static void test_nan(void)
{
    float a[3] = {1, NAN, -2}, b[3] = {NAN, 3, 5}, out[3];
    const void *parts[2] = {a, b};
    ovlm_comm_reduce_parts(out, parts, 2, 3, OVLM_F32, OVLM_MAX);
    CHECK(isnan(out[0]) && isnan(out[1]) && out[2] == 5, "max %g %g %g", (double)out[0],
          (double)out[1], (double)out[2]);
    ovlm_comm_reduce_parts(out, parts, 2, 3, OVLM_F32, OVLM_MIN);
    CHECK(isnan(out[0]) && isnan(out[1]) && out[2] == -2, "min %g %g %g", (double)out[0],
          (double)out[1], (double)out[2]);
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    test_nan();
    test_self();
    test_calls();
    return test_end("comm");
}
