/* relabel.c - names for mini-batches: gather flows, assign nodes, then ranks inside each node. */
#include "plan/relabel.h"

#include <math.h>
#include <string.h>

#include "plan/route.h"

/* 64M doubles: beyond this the gain table would not fit the machines that plan. */
static const int64_t MAX_TABLE = (int64_t)1 << 26;
/* Integers up to here are exact as doubles, with room for the sums of a path. */
static const double EXACT = 4503599627370496.0; /* 2^52 */
static const int64_t MOST_BYTES = (int64_t)1 << 52;

enum { WORK_STRIDE = 100 };
static const int64_t DEFAULT_WORK = 1000000;

static ovlm_status check_flows(const char *kind, int64_t n, int64_t n_ranks, const int64_t *label,
                               const int64_t *rank, const int64_t *bytes, ovlm_err *err)
{
    int64_t total = 0;
    for (int64_t f = 0; f < n; f++) {
        if (label[f] < 0 || label[f] >= n_ranks || rank[f] < 0 || rank[f] >= n_ranks) {
            return OVLM_FAIL(err, OVLM_E_ARG,
                             "relabel: %s %lld joins label %lld and rank %lld; both must be in "
                             "0..%lld", kind, (long long)f, (long long)label[f],
                             (long long)rank[f], (long long)n_ranks - 1);
        }
        /* Sums of bytes are taken in doubles, and bounds rest on their being exact. */
        if (bytes[f] < 0 || bytes[f] > MOST_BYTES - total) {
            return OVLM_FAIL(err, OVLM_E_ARG,
                             "relabel: %s %lld has %lld bytes; they must be >= 0 and sum to at "
                             "most 2^52", kind, (long long)f, (long long)bytes[f]);
        }
        total += bytes[f];
    }
    return OVLM_OK;
}

static ovlm_status check_problem(const ovlm_relabel_problem *problem, ovlm_err *err)
{
    if (problem->n_ranks < 1 || problem->node_size < 1 || problem->n < 0 || problem->n_ties < 0) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "relabel: n_ranks and node_size must be >= 1; got %lld and %lld",
                         (long long)problem->n_ranks, (long long)problem->node_size);
    }
    int64_t nodes = (problem->n_ranks - 1) / problem->node_size + 1;
    if (problem->n_ranks > MAX_TABLE / nodes) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "relabel: %lld ranks on %lld nodes are too many to relabel; use "
                         "relabel=None", (long long)problem->n_ranks, (long long)nodes);
    }
    OVLM_TRY(check_flows("flow", problem->n, problem->n_ranks, problem->label, problem->rank,
                         problem->bytes, err));
    return check_flows("tie", problem->n_ties, problem->n_ranks, problem->tie_label,
                       problem->tie_rank, problem->tie_bytes, err);
}

/* Flows by (label, rank), equal pairs summed, and the same by (rank, label). */
static ovlm_status gather(relabel_flows *flows, int64_t N, int64_t n, const int64_t *label,
                          const int64_t *rank, const int64_t *bytes, ovlm_arena *arena,
                          ovlm_err *err)
{
    int64_t *by_rank = NULL, *order = NULL, *end = NULL, merged = 0;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &by_rank, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &order, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &end, N + 1, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &flows->start, N + 1, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &flows->rank, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &flows->bytes, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &flows->rank_start, N + 1, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &flows->rank_label, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &flows->rank_bytes, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &flows->label_total, N, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &flows->rank_total, N, err));
    route_group(rank, N, NULL, n, by_rank, end);
    route_group(label, N, by_rank, n, order, end);
    for (int64_t j = 0; j < N; j++) {
        flows->start[j] = merged;
        for (int64_t p = end[j]; p < end[j + 1]; p++) {
            int64_t f = order[p];
            if (merged == flows->start[j] || flows->rank[merged - 1] != rank[f]) {
                flows->rank[merged++] = rank[f];
            }
            flows->bytes[merged - 1] += bytes[f];
            flows->label_total[j] += (double)bytes[f];
            flows->rank_total[rank[f]] += (double)bytes[f];
        }
        flows->total += flows->label_total[j];
    }
    flows->start[N] = merged;
    route_group(flows->rank, N, NULL, merged, order, flows->rank_start);
    int64_t j = 0;
    for (int64_t e = 0; e < merged; e++) {
        while (e >= flows->start[j + 1]) {
            j++;
        }
        by_rank[e] = j;
    }
    for (int64_t p = 0; p < merged; p++) {
        flows->rank_label[p] = by_rank[order[p]];
        flows->rank_bytes[p] = flows->bytes[order[p]];
    }
    return OVLM_OK;
}

/* gain[j*K + k] = A_jk, in units that leave the ties' bytes below one unit; *unit says which. */
static ovlm_status gain_table(const relabel_model *model, double **gain, double *unit,
                              ovlm_arena *arena, ovlm_err *err)
{
    const relabel_flows *part[2] = {&model->flows, &model->ties};
    *unit = 1;
    double tie_unit = 1;
    /* unit > all ties makes the order lexicographic; coarser ties keep the sum exact. */
    while (*unit <= model->ties.total * tie_unit) {
        *unit *= 2;
    }
    while (*unit > 1 && model->flows.total * *unit >= EXACT) {
        *unit /= 2;
        tie_unit /= 2;
    }
    double weight[2] = {*unit, *unit > 1 ? tie_unit : 0};
    OVLM_TRY(OVLM_ARENA_NEW(arena, gain, model->N * model->K, err));
    for (int p = 0; p < 2; p++) {
        for (int64_t j = 0; j < model->N && weight[p] > 0; j++) {
            double *row = *gain + j * model->K;
            for (int64_t e = part[p]->start[j]; e < part[p]->start[j + 1]; e++) {
                row[part[p]->rank[e] / model->node_size] +=
                    floor(weight[p] * (double)part[p]->bytes[e]);
            }
        }
    }
    return OVLM_OK;
}

/* Least sum; *bound is certified, in bytes. */
static ovlm_status solve_sum(const relabel_model *model, ovlm_meter *meter, int64_t *node_of,
                             double *bound, ovlm_arena *arena, ovlm_err *err)
{
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    double *gain = NULL, unit = 1, most = 0;
    int64_t *room = NULL;
    OVLM_TRY(gain_table(model, &gain, &unit, arena, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &room, model->K, err));
    for (int64_t k = 0; k < model->K; k++) {
        room[k] = relabel_node_room(model, k);
    }
    OVLM_TRY(relabel_transport(gain, model->N, model->K, room, meter, node_of, &most, arena, err));
    /* Whole bytes: the ties are less than one unit.  Beyond EXACT, allow for rounding. */
    double kept = floor(most / unit);
    double least = model->flows.total - kept;
    least -= model->flows.total * unit >= EXACT ? 1e-9 * model->flows.total : 0;
    *bound = least > 0 ? least : 0;
    ovlm_arena_rewind(arena, mark);
    return OVLM_OK;
}

/* Inside a node any names do: largest flow first to its own rank, the rest where they are. */
static ovlm_status place_in_nodes(const relabel_model *model, const int64_t *node_of,
                                  int64_t *rank_of, ovlm_arena *arena, ovlm_err *err)
{
    const relabel_flows *flows = &model->flows;
    int64_t n = 0, *entry = NULL, *key = NULL, *label = NULL, *order = NULL, *next = NULL;
    bool *taken = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &entry, flows->start[model->N], err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &label, flows->start[model->N], err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &key, flows->start[model->N], err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &order, flows->start[model->N], err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &taken, model->N, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &next, model->K, err));
    for (int64_t j = 0; j < model->N; j++) {
        rank_of[j] = -1;
        for (int64_t e = flows->start[j]; e < flows->start[j + 1]; e++) {
            if (flows->rank[e] / model->node_size == node_of[j]) {
                label[n] = j;
                entry[n] = e;
                key[n++] = flows->bytes[e];
            }
        }
    }
    OVLM_TRY(ovlm_sort_i64(key, n, order, arena, err));
    for (int64_t p = 0; p < n; p++) {
        int64_t j = label[order[p]], rank = flows->rank[entry[order[p]]];
        if (rank_of[j] < 0 && !taken[rank]) {
            rank_of[j] = rank;
            taken[rank] = true;
        }
    }
    for (int64_t j = 0; j < model->N; j++) {
        if (rank_of[j] < 0 && node_of[j] == j / model->node_size && !taken[j]) {
            rank_of[j] = j;
            taken[j] = true;
        }
    }
    for (int64_t j = 0; j < model->N; j++) {
        int64_t node = node_of[j];
        while (rank_of[j] < 0) {
            int64_t rank = node * model->node_size + next[node]++;
            if (!taken[rank]) {
                rank_of[j] = rank;
                taken[rank] = true;
            }
        }
    }
    return OVLM_OK;
}

/* (objective, then ties' sum) of node_of. */
static ovlm_status grade(const relabel_model *model, ovlm_relabel_mode mode,
                         const int64_t *node_of, double value[2], ovlm_arena *arena, ovlm_err *err)
{
    double sum = 0, worst = 0, unused = 0;
    OVLM_TRY(relabel_measure(model, &model->flows, node_of, &sum, &worst, arena, err));
    value[0] = mode == OVLM_RELABEL_SUM ? sum : worst;
    return relabel_measure(model, &model->ties, node_of, &value[1], &unused, arena, err);
}

/* Takes `candidate` when it is better than what node_of holds. */
static ovlm_status keep_better(const relabel_model *model, ovlm_relabel_mode mode,
                               const int64_t *candidate, int64_t *node_of, double value[2],
                               ovlm_arena *arena, ovlm_err *err)
{
    double other[2] = {0, 0};
    OVLM_TRY(grade(model, mode, candidate, other, arena, err));
    if (other[0] < value[0] || (other[0] <= value[0] && other[1] < value[1])) {
        memcpy(node_of, candidate, (size_t)model->N * sizeof *node_of);
        value[0] = other[0];
        value[1] = other[1];
    }
    return OVLM_OK;
}

static ovlm_status solve_nodes(const relabel_model *model, ovlm_relabel_mode mode,
                               ovlm_meter *meter, int64_t *node_of, ovlm_relabel_result *result,
                               ovlm_arena *arena, ovlm_err *err)
{
    int64_t *best = NULL, *other = NULL;
    double value[2] = {0, 0}, improved = 0;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &best, model->N, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &other, model->N, err));
    for (int64_t j = 0; j < model->N; j++) {
        node_of[j] = best[j] = j / model->node_size;
    }
    OVLM_TRY(grade(model, mode, best, value, arena, err));
    result->before = value[0];
    if (value[0] > 0 || value[1] > 0) {
        OVLM_TRY(solve_sum(model, meter, other, &result->bound, arena, err));
        OVLM_TRY(keep_better(model, mode, other, best, value, arena, err));
        if (mode == OVLM_RELABEL_MINMAX) {
            OVLM_TRY(relabel_minmax(model, meter, other, &improved, arena, err));
            OVLM_TRY(keep_better(model, mode, other, best, value, arena, err));
            OVLM_TRY(relabel_minmax(model, meter, node_of, &improved, arena, err));
            OVLM_TRY(keep_better(model, mode, node_of, best, value, arena, err));
            OVLM_TRY(relabel_minmax_bound(model, result->bound, &result->bound, arena, err));
        }
    }
    memcpy(node_of, best, (size_t)model->N * sizeof *node_of);
    result->value = value[0];
    result->bound = result->bound < result->value ? result->bound : result->value;
    result->status = result->value <= result->bound * (1 + 1e-9) ? OVLM_PLAN_OPTIMAL
                                                                 : OVLM_PLAN_FEASIBLE;
    return OVLM_OK;
}

ovlm_status ovlm_relabel_solve(const ovlm_relabel_problem *problem, const ovlm_budget *budget,
                               int64_t *rank_of, ovlm_relabel_result *result, ovlm_err *err)
{
    OVLM_TRY(check_problem(problem, err));
    *result = (ovlm_relabel_result){.status = OVLM_PLAN_OPTIMAL};
    for (int64_t j = 0; j < problem->n_ranks; j++) {
        rank_of[j] = j;
    }
    if (problem->mode == OVLM_RELABEL_NONE) {
        return OVLM_OK;
    }
    ovlm_arena arena = {0};
    ovlm_meter meter;
    ovlm_meter_start(&meter, budget, DEFAULT_WORK, WORK_STRIDE);
    relabel_model model = {.N = problem->n_ranks, .node_size = problem->node_size};
    int64_t *node_of = NULL;
    ovlm_status status = OVLM_OK;
    model.node_size = model.node_size < model.N ? model.node_size : model.N;
    model.K = (model.N - 1) / model.node_size + 1;
    OVLM_GOTO(done, gather(&model.flows, model.N, problem->n, problem->label, problem->rank,
                           problem->bytes, &arena, err));
    OVLM_GOTO(done, gather(&model.ties, model.N, problem->n_ties, problem->tie_label,
                           problem->tie_rank, problem->tie_bytes, &arena, err));
    OVLM_GOTO(done, OVLM_ARENA_NEW(&arena, &node_of, model.N, err));
    OVLM_GOTO(done, solve_nodes(&model, problem->mode, &meter, node_of, result, &arena, err));
    if (meter.interrupted) {
        OVLM_GOTO(done, OVLM_FAIL(err, OVLM_E_INTERRUPTED, "relabelling was interrupted"));
    }
    OVLM_GOTO(done, place_in_nodes(&model, node_of, rank_of, &arena, err));
    result->cut_short = meter.cut_short;
    result->work = meter.work;
done:
    ovlm_arena_free(&arena);
    return status;
}
