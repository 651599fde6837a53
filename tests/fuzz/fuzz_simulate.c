/* fuzz_simulate.c - the event engine: any graph is run or refused; what runs ends, and a resource
 * is never busy for longer than the whole. */
#include "fuzz.h"

enum { TASKS = 24, ENTRIES = 96, RESOURCES = 6 };

typedef struct graph {
    double duration[TASKS];
    int64_t before_start[TASKS + 1], before[ENTRIES], use_start[TASKS + 1], use[ENTRIES];
} graph;

/* Lists of a few entries per task, mostly in range. */
static void draw_lists(fuzz_input *in, int64_t n, int64_t limit, int64_t *start, int64_t *list)
{
    for (int64_t t = 0; t < n; t++) {
        int64_t room = ENTRIES - start[t];
        start[t + 1] = start[t] + fuzz_range(in, 0, room < 4 ? room : 4);
        for (int64_t i = start[t]; i < start[t + 1]; i++) {
            list[i] = fuzz_bytes(in, 1) % 64 && limit > 0 ? fuzz_range(in, 0, limit - 1)
                                                          : fuzz_wild(in);
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input in = {data, size};
    graph g;
    double start[TASKS], end[TASKS], busy[RESOURCES], time_s = 0;
    int64_t cause[TASKS];
    memset(&g, 0, sizeof g);
    int64_t n = fuzz_range(&in, 0, TASKS), resources = fuzz_range(&in, 0, RESOURCES);
    for (int64_t t = 0; t < n; t++) {
        g.duration[t] = fuzz_bytes(&in, 1) % 32 ? fuzz_coefficient(&in) : fuzz_wild_double(&in);
    }
    draw_lists(&in, n, n, g.before_start, g.before);
    draw_lists(&in, n, resources, g.use_start, g.use);
    ovlm_simulate_problem problem = {n,        resources,   g.duration, g.before_start,
                                     g.before, g.use_start, g.use};
    ovlm_err err = {0};
    ovlm_status status = ovlm_simulate_run(&problem, NULL, start, end, cause, busy, &time_s, &err);
    fuzz_check_status(status, &err);
    for (int64_t t = 0; status == OVLM_OK && t < n; t++) {
        MUST(start[t] >= 0 && end[t] <= time_s, "task %lld outside the run", (long long)t);
    }
    for (int64_t r = 0; status == OVLM_OK && r < resources; r++) {
        MUST(busy[r] <= time_s * (1 + 1e-12), "resource %lld: %g of %g", (long long)r, busy[r],
             time_s);
    }
    return 0;
}
