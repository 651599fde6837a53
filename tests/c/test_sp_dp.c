/* test_sp_dp.c - FlexSP's two DPs against all ways of cutting. */
#include "plan/sp_dp.h"
#include "test.h"

enum { MOST = 10 };

/* Least objective over all cuts of n sorted lengths into `parts` parts, from the first on. */
static int64_t best_cut(const int64_t *s, int64_t n, int64_t parts, bool bucket)
{
    if (parts == 0) {
        return n == 0 ? 0 : INT64_MAX;
    }
    int64_t best = INT64_MAX, sum = 0;
    for (int64_t size = 1; size <= n; size++) {
        sum += s[size - 1];
        int64_t rest = best_cut(s + size, n - size, parts - 1, bucket);
        if (rest == INT64_MAX) {
            continue;
        }
        int64_t own = bucket ? size * s[size - 1] - sum : sum;
        int64_t total = bucket ? own + rest : (own > rest ? own : rest);
        best = total < best ? total : best;
    }
    return best;
}

static int64_t value(const int64_t *s, const int64_t *begin, int64_t parts, bool bucket)
{
    int64_t total = 0;
    for (int64_t q = 0; q < parts; q++) {
        int64_t sum = 0;
        for (int64_t i = begin[q]; i < begin[q + 1]; i++) {
            sum += s[i];
        }
        int64_t own = bucket ? (begin[q + 1] - begin[q]) * s[begin[q + 1] - 1] - sum : sum;
        total = bucket ? total + own : (own > total ? own : total);
    }
    return total;
}

static int compare(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static void test_against_all_cuts(void)
{
    for (int round = 0; round < 3000; round++) {
        int64_t s[MOST], begin[MOST + 1], n = 1 + ovlm_rng_below(&test_rng, MOST);
        int64_t parts = 1 + ovlm_rng_below(&test_rng, n);
        int64_t longest = 1 + ovlm_rng_below(&test_rng, round % 2 ? 6 : 100000);
        for (int64_t i = 0; i < n; i++) {
            s[i] = ovlm_rng_below(&test_rng, longest + 1);
        }
        qsort(s, (size_t)n, sizeof *s, compare);
        for (int bucket = 0; bucket < 2; bucket++) {
            ovlm_arena arena = {0};
            ovlm_err err = {0};
            ovlm_status status = bucket ? sp_bucket(s, n, parts, begin, &arena, &err)
                                        : sp_blast(s, n, parts, begin, &arena, &err);
            CHECK(status == OVLM_OK, "%s", err.message);
            CHECK(begin[0] == 0 && begin[parts] == n, "cuts do not cover the list");
            for (int64_t q = 0; q < parts; q++) {
                CHECK(begin[q] < begin[q + 1], "part %lld is empty", (long long)q);
            }
            int64_t got = value(s, begin, parts, bucket), best = best_cut(s, n, parts, bucket);
            CHECK(got == best, "%s: %lld, best %lld (n %lld, parts %lld)",
                  bucket ? "bucket" : "blast", (long long)got, (long long)best, (long long)n,
                  (long long)parts);
            ovlm_arena_free(&arena);
        }
    }
}

static void test_public_calls(void)
{
    int64_t lengths[] = {50, 1, 49, 2, 3}, part[5], longest[5], used = 0;
    ovlm_err err = {0};
    CHECK(ovlm_sp_bucket(lengths, 5, 2, part, longest, &used, &err) == OVLM_OK, "%s", err.message);
    CHECK(used == 2 && longest[0] == 3 && longest[1] == 50, "longest of the buckets");
    CHECK(part[0] == 1 && part[1] == 0 && part[2] == 1 && part[4] == 0, "buckets");
    CHECK(ovlm_sp_blast(lengths, 5, 9, part, longest, &used, &err) == OVLM_OK && used == 5,
          "more parts than lengths");
    CHECK(ovlm_sp_blast(lengths, 0, 3, part, longest, &used, &err) == OVLM_OK && used == 0,
          "no lengths");
    CHECK(ovlm_sp_blast(lengths, 5, 0, part, longest, &used, &err) == OVLM_E_ARG, "no parts");
    lengths[2] = -1;
    CHECK(ovlm_sp_bucket(lengths, 5, 2, part, longest, &used, &err) == OVLM_E_ARG, "negative");
    lengths[2] = INT64_MAX / 4;
    CHECK(ovlm_sp_bucket(lengths, 5, 2, part, longest, &used, &err) == OVLM_E_ARG, "too large");
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    test_against_all_cuts();
    test_public_calls();
    return test_end("sp_dp");
}
