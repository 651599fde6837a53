/* test_threads_pool.c - the pool runs each piece once, with what the caller wrote before and sees
 * after; on more threads than cores, many short jobs in a row, and none at all. */
#include "test.h"

#include <string.h>
#include <time.h>

#include "base/threads.h"

enum { MOST = 300 };

typedef struct tally {
    int64_t count[MOST], thread[MOST], n, threads;
    int64_t in, out[MOST];
} tally;

/* Unsynchronised on purpose: ThreadSanitizer would report a piece that runs twice, or a caller that
 * does not see it. */
static void piece(void *context, int64_t index, int64_t thread)
{
    tally *t = context;
    t->count[index]++;
    t->thread[index] = thread;
    t->out[index] = t->in + index;
}

static void check_run(ovlm_pool *pool, tally *t, int64_t n)
{
    memset(t, 0, sizeof *t);
    t->in = ovlm_rng_below(&test_rng, 1000);
    ovlm_pool_run(pool, n, piece, t);
    for (int64_t i = 0; i < MOST; i++) {
        CHECK(t->count[i] == (i < n), "piece %lld of %lld ran %lld times", (long long)i,
              (long long)n, (long long)t->count[i]);
        CHECK(i >= n || (t->out[i] == t->in + i && t->thread[i] >= 0 &&
                         t->thread[i] < ovlm_pool_threads(pool)),
              "piece %lld", (long long)i);
    }
}

static void test_pieces(int64_t threads)
{
    ovlm_pool *pool;
    CHECK(ovlm_pool_open(threads, &pool, NULL) == OVLM_OK, "open");
    CHECK(threads == 0 ? ovlm_pool_threads(pool) >= 1 : ovlm_pool_threads(pool) == threads,
          "%lld threads", (long long)ovlm_pool_threads(pool));
    static tally t;
    for (int round = 0; round < 300; round++) {
        int64_t n = ovlm_rng_below(&test_rng, round % 3 == 0 ? MOST + 1 : 6);
        check_run(pool, &t, n);
    }
    ovlm_pool_close(pool);
}

static double used_s(void)
{
    struct timespec now;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* An idle pool sleeps: its threads get no processor time to speak of. */
static void test_idle(void)
{
    ovlm_pool *pool;
    CHECK(ovlm_pool_open(4, &pool, NULL) == OVLM_OK, "open");
    static tally t;
    check_run(pool, &t, MOST);
    struct timespec pause = {.tv_nsec = 200000000};
    double before = used_s();
    (void)nanosleep(&pause, NULL);
    CHECK(used_s() - before < 0.1, "an idle pool used %g s", used_s() - before);
    ovlm_pool_close(pool);
}

static void test_refusals(void)
{
    ovlm_pool *pool;
    ovlm_err err = {0};
    CHECK(ovlm_pool_open(-1, &pool, &err) == OVLM_E_ARG && pool == NULL, "threads -1");
    CHECK(strstr(err.message, "-1") != NULL, "%s", err.message);
    CHECK(ovlm_pool_open(1 << 20, &pool, &err) == OVLM_E_ARG && pool == NULL, "too many");
    ovlm_pool_close(NULL);
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    for (int64_t threads = 0; threads <= 7; threads++) {
        test_pieces(threads);
    }
    test_idle();
    test_refusals();
    return test_end("threads_pool");
}
