/* test_base.c - arena, sort, random numbers and budgets against trivial implementations. */
#include "test.h"

#include <math.h>
#include <string.h>

#include "base/arena.h"
#include "base/clock.h"
#include "base/sort.h"

static void test_sort(void)
{
    for (int round = 0; round < 200; round++) {
        ovlm_arena arena = {0};
        ovlm_err err = {0};
        int64_t n = ovlm_rng_below(&test_rng, 300), key[300], order[300];
        double real[300];
        int bits = 1 + (int)ovlm_rng_below(&test_rng, 62);
        for (int64_t i = 0; i < n; i++) {
            key[i] = (int64_t)(ovlm_rng_next(&test_rng) >> (64 - bits));
            real[i] = ovlm_rng_below(&test_rng, 9) == 0 ? -0.0 : ovlm_rng_uniform(&test_rng);
        }
        CHECK(ovlm_sort_i64(key, n, order, &arena, &err) == OVLM_OK, "%s", err.message);
        for (int64_t i = 1; i < n; i++) {
            int64_t a = order[i - 1], b = order[i];
            CHECK(key[a] > key[b] || (key[a] == key[b] && a < b), "round %d at %lld", round,
                  (long long)i);
        }
        CHECK(ovlm_sort_f64(real, n, order, &arena, &err) == OVLM_OK, "%s", err.message);
        for (int64_t i = 1; i < n; i++) {
            int64_t a = order[i - 1], b = order[i];
            CHECK(real[a] > real[b] || (!(real[a] < real[b]) && a < b), "round %d", round);
        }
        ovlm_arena_free(&arena);
    }
}

static void test_arena(void)
{
    ovlm_arena arena = {0};
    ovlm_err err = {0};
    unsigned char *piece[200];
    int64_t size[200];
    for (int i = 0; i < 200; i++) {
        size[i] = ovlm_rng_below(&test_rng, 20000);
        CHECK(OVLM_ARENA_NEW(&arena, &piece[i], size[i], &err) == OVLM_OK, "%s", err.message);
        CHECK((uintptr_t)piece[i] % 64 == 0, "piece %d", i);
        for (int64_t b = 0; b < size[i]; b++) {
            CHECK(piece[i][b] == 0, "piece %d is not zeroed", i);
        }
        memset(piece[i], i, (size_t)size[i]);
    }
    for (int i = 0; i < 200; i++) {
        CHECK(size[i] == 0 || (piece[i][0] == i && piece[i][size[i] - 1] == i), "piece %d", i);
    }
    ovlm_arena_mark mark = ovlm_arena_save(&arena);
    CHECK(OVLM_ARENA_NEW(&arena, &piece[0], (int64_t)1 << 22, &err) == OVLM_OK, "grow");
    ovlm_arena_rewind(&arena, mark);
    CHECK(OVLM_ARENA_NEW(&arena, &piece[0], INT64_MAX, &err) == OVLM_E_NOMEM, "overflow");
    CHECK(OVLM_ARENA_NEW(&arena, &piece[0], -1, &err) == OVLM_E_NOMEM, "negative");
    ovlm_arena_fail_after(1);
    CHECK(OVLM_ARENA_NEW(&arena, &piece[0], 1, &err) == OVLM_OK, "the one that succeeds");
    CHECK(OVLM_ARENA_NEW(&arena, &piece[0], 1, &err) == OVLM_E_NOMEM, "the one that fails");
    ovlm_arena_fail_after(-1);
    ovlm_arena_free(&arena);
}

static int stop_at_once(void *ctx)
{
    ++*(int *)ctx;
    return 1;
}

static void test_meter(void)
{
    ovlm_meter meter;
    ovlm_meter_start(&meter, NULL, 100, 10);
    int64_t steps = 0;
    while (!ovlm_meter_spend(&meter, 1)) {
        steps++;
    }
    CHECK(steps == 99 && meter.work == 100 && !meter.cut_short, "%lld", (long long)steps);
    ovlm_budget budget = {.work_limit = -1, .time_limit_s = 0.01};
    ovlm_meter_start(&meter, &budget, INT64_MAX, 10);
    while (!ovlm_meter_spend(&meter, 1)) {
    }
    CHECK(meter.cut_short, "the clock ends it");
    CHECK(ovlm_meter_spend(&meter, 0) && ovlm_meter_spend(&meter, 1), "and it stays ended");
    CHECK(ovlm_meter_expired(&meter), "for constructions too");
    int calls = 0;
    budget = (ovlm_budget){.work_limit = -1, .poll = stop_at_once, .poll_ctx = &calls};
    ovlm_meter_start(&meter, &budget, INT64_MAX, 10);
    while (!ovlm_meter_spend(&meter, 1)) {
    }
    CHECK(meter.interrupted && calls == 1 && !meter.cut_short, "%d polls", calls);
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    test_sort();
    test_arena();
    test_meter();
    return test_end("base");
}
