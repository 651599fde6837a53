/* fuzz_graph.c - routes from anywhere, relabelling and the event simulator: any arrays survive, and
 * what is accepted keeps its definition. */
#include "fuzz.h"

enum { PIECES = 12, RANKS = 6, FLOWS = 24, TASKS = 16, EDGES = 32, RESOURCES = 5 };

static int64_t draw_int(fuzz_input *in, bool wild, int64_t low, int64_t high)
{
    return wild && fuzz_bytes(in, 1) % 8 == 0 ? fuzz_wild(in) : fuzz_range(in, low, high);
}

/* An arbitrary route is refused or inverts twice into itself. */
static void run_route(fuzz_input *in)
{
    int64_t column[7][PIECES];
    ovlm_route back = {0}, again = {0};
    ovlm_err err = {0};
    ovlm_route route = {.k = fuzz_range(in, 0, PIECES), .n_ranks = draw_int(in, true, 0, RANKS),
                        .item = column[0], .first_row = column[1], .n_rows = column[2],
                        .source = column[3], .destination = column[4], .send_row = column[5],
                        .receive_row = column[6]};
    for (int64_t p = 0; p < route.k; p++) {
        for (int c = 0; c < 7; c++) {
            column[c][p] = draw_int(in, true, 0, 3);
        }
    }
    if (route.n_ranks > 4096) {
        return; /* valid, only large */
    }
    ovlm_status status = ovlm_route_check(&route, &err);
    fuzz_check_status(status, &err);
    if (status != OVLM_OK) {
        return;
    }
    MUST(ovlm_route_invert(&route, &back, &err) == OVLM_OK, "%s", err.message);
    MUST(ovlm_route_invert(&back, &again, &err) == OVLM_OK, "%s", err.message);
    size_t bytes = (size_t)route.k * sizeof(int64_t);
    MUST(again.k == route.k && memcmp(again.source, route.source, bytes) == 0 &&
             memcmp(again.send_row, route.send_row, bytes) == 0, "there and back differs");
    ovlm_route_free(&back);
    ovlm_route_free(&again);
}

static void run_relabel(fuzz_input *in)
{
    int64_t label[FLOWS], rank[FLOWS], bytes[FLOWS], rank_of[RANKS];
    bool wild = fuzz_bytes(in, 1) % 4 == 0, seen[RANKS] = {false};
    ovlm_relabel_problem problem = {.n = fuzz_range(in, 0, FLOWS),
                                    .n_ranks = fuzz_range(in, wild ? -1 : 1, RANKS),
                                    .node_size = draw_int(in, wild, 1, 4), .label = label,
                                    .rank = rank, .bytes = bytes,
                                    .mode = (ovlm_relabel_mode)fuzz_range(in, 1, 2)};
    for (int64_t i = 0; i < problem.n; i++) {
        label[i] = draw_int(in, wild, 0, problem.n_ranks - 1);
        rank[i] = draw_int(in, wild, 0, problem.n_ranks - 1);
        bytes[i] = draw_int(in, wild, 0, 900);
    }
    ovlm_budget budget = {.work_limit = fuzz_range(in, 0, 3) * 300};
    ovlm_relabel_result result = {0};
    ovlm_err err = {0};
    ovlm_status status = ovlm_relabel_solve(&problem, &budget, rank_of, &result, &err);
    fuzz_check_status(status, &err);
    for (int64_t r = 0; status == OVLM_OK && r < problem.n_ranks; r++) {
        MUST(rank_of[r] >= 0 && rank_of[r] < problem.n_ranks && !seen[rank_of[r]],
             "no permutation");
        seen[rank_of[r]] = true;
    }
    MUST(status != OVLM_OK || (result.bound <= result.value && result.value <= result.before),
         "bound %g, value %g, before %g", result.bound, result.value, result.before);
}

/* Ascending offsets from 0, or not. */
static void draw_starts(fuzz_input *in, bool wild, int64_t n, int64_t total, int64_t *start)
{
    start[0] = 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t left = total - start[i];
        int64_t step = fuzz_range(in, 0, left < 3 ? left : 3);
        start[i + 1] = start[i] + step;
    }
    if (wild && n > 0) { /* may fall, but never points past what is there */
        start[fuzz_range(in, 0, n - 1)] = fuzz_range(in, -2, start[n]);
    }
}

static void run_simulation(fuzz_input *in)
{
    double duration[TASKS], start_s[TASKS], end_s[TASKS], busy[RESOURCES], time_s = 0;
    int64_t before_start[TASKS + 1], before[EDGES], use_start[TASKS + 1], use[EDGES];
    int64_t cause[TASKS];
    bool wild = fuzz_bytes(in, 1) % 4 == 0;
    ovlm_simulate_problem problem = {.n_tasks = fuzz_range(in, 0, TASKS),
                                     .n_resources = fuzz_range(in, 0, RESOURCES),
                                     .duration_s = duration, .before_start = before_start,
                                     .before = before, .use_start = use_start, .use = use};
    draw_starts(in, wild, problem.n_tasks, EDGES, before_start);
    draw_starts(in, wild, problem.n_tasks, EDGES, use_start);
    for (int64_t t = 0; t < problem.n_tasks; t++) {
        duration[t] = wild ? fuzz_wild_double(in) : fuzz_coefficient(in);
    }
    for (int64_t e = 0; e < EDGES; e++) {
        before[e] = draw_int(in, wild, 0, problem.n_tasks);
        use[e] = draw_int(in, wild, 0, problem.n_resources);
    }
    ovlm_err err = {0};
    ovlm_status status = ovlm_simulate_run(&problem, NULL, start_s, end_s, cause, busy, &time_s,
                                           &err);
    fuzz_check_status(status, &err);
    for (int64_t t = 0; status == OVLM_OK && t < problem.n_tasks; t++) {
        MUST(end_s[t] <= time_s && start_s[t] <= end_s[t], "task %lld", (long long)t);
        for (int64_t e = before_start[t]; e < before_start[t + 1]; e++) {
            MUST(end_s[before[e]] <= start_s[t], "task %lld starts early", (long long)t);
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input in = {data, size};
    switch (fuzz_bytes(&in, 1) % 3) {
    case 0: run_route(&in); break;
    case 1: run_relabel(&in); break;
    default: run_simulation(&in); break;
    }
    return 0;
}
