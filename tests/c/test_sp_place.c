/* test_sp_place.c - placements re-checked, and completeness against trying every order. */
#include "test.h"

#include <string.h>

#include "plan/sp_model.h"

static sp_model make_model(int64_t n_gpus, int64_t node, const int64_t *degree, int64_t count)
{
    sp_model m = {.n_gpus = n_gpus, .gpus_per_node = node, .D = count, .buddy = true};
    for (int64_t j = 0; j < count; j++) {
        int64_t d = degree[j];
        m.degree[j] = d;
        m.buddy = m.buddy && (d <= node ? node % d == 0 : d % node == 0) &&
                  (j == 0 || d % degree[j - 1] == 0);
    }
    return m;
}

static void check_placement(const sp_model *m, const int64_t *j, int64_t n, const int64_t *first)
{
    char used[256] = {0};
    for (int64_t g = 0; g < n; g++) {
        int64_t d = m->degree[j[g]], node = m->gpus_per_node;
        CHECK(first[g] >= 0 && first[g] + d <= m->n_gpus, "group %lld outside", (long long)g);
        if (d <= node) {
            CHECK(first[g] / node == (first[g] + d - 1) / node, "%lld GPUs from %lld straddle",
                  (long long)d, (long long)first[g]);
        } else {
            CHECK(first[g] % node == 0, "%lld GPUs from %lld", (long long)d, (long long)first[g]);
        }
        CHECK(!m->buddy || first[g] % d == 0, "%lld GPUs from %lld", (long long)d,
              (long long)first[g]);
        for (int64_t x = first[g]; x < first[g] + d; x++) {
            CHECK(!used[x], "GPU %lld twice", (long long)x);
            used[x] = 1;
        }
    }
}

/* Whether the rest of the groups can be placed at all: any group, any position. */
static bool exhaustive(const sp_model *m, int64_t *left, int64_t n_left, char *used)
{
    if (n_left == 0) {
        return true;
    }
    int64_t j = m->D - 1;
    while (left[j] == 0) {
        j--;
    }
    int64_t d = m->degree[j], node = m->gpus_per_node;
    bool found = false;
    for (int64_t x = 0; x + d <= m->n_gpus && !found; x++) {
        if ((d > node && x % node != 0) || (d <= node && x / node != (x + d - 1) / node) ||
            memchr(used + x, 1, (size_t)d) != NULL) {
            continue;
        }
        memset(used + x, 1, (size_t)d);
        left[j]--;
        found = exhaustive(m, left, n_left - 1, used);
        left[j]++;
        memset(used + x, 0, (size_t)d);
    }
    return found;
}

static void test_small(void)
{
    int64_t placed = 0, refused = 0;
    for (int round = 0; round < 4000; round++) {
        int64_t degree[4], count = 0, gpus = 1 + ovlm_rng_below(&test_rng, 14);
        for (int64_t d = 1; d <= gpus && count < 4; d++) {
            if (ovlm_rng_below(&test_rng, 3) == 0) {
                degree[count++] = d;
            }
        }
        if (count == 0) {
            continue;
        }
        sp_model m = make_model(gpus, 1 + ovlm_rng_below(&test_rng, 8), degree, count);
        int64_t j[20], first[20], left[SP_MAX_DEGREES] = {0}, n = 0, room = gpus;
        while (n < 20 && room >= degree[0] && ovlm_rng_below(&test_rng, 12) > 0) {
            int64_t x = ovlm_rng_below(&test_rng, count);
            if (degree[x] <= room) {
                room -= degree[x];
                j[n++] = x;
                left[x]++;
            }
        }
        char used[64] = {0};
        bool possible = exhaustive(&m, left, n, used), answer = sp_place(&m, j, n, first);
        CHECK(answer == possible, "%lld groups on %lld GPUs: %d, should be %d", (long long)n,
              (long long)gpus, answer, possible);
        if (answer) {
            check_placement(&m, j, n, first);
            placed++;
        } else {
            refused++;
        }
    }
    CHECK(placed > 100 && refused > 10, "%lld placed, %lld refused", (long long)placed,
          (long long)refused);
}

static void test_powers_of_two(void)
{
    const int64_t degree[] = {1, 2, 4, 8, 16, 32, 64};
    for (int round = 0; round < 300; round++) {
        sp_model m = make_model(1 + ovlm_rng_below(&test_rng, 200), 8, degree, 7);
        int64_t j[200], first[200], n = 0, room = m.n_gpus;
        while (room > 0) {
            int64_t x = ovlm_rng_below(&test_rng, 7);
            if (degree[x] <= room) {
                room -= degree[x];
                j[n++] = x;
            }
        }
        CHECK(m.buddy && sp_place(&m, j, n, first), "a full cluster");
        check_placement(&m, j, n, first);
    }
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    test_small();
    test_powers_of_two();
    return test_end("sp_place");
}
