/* sp_plan_check.c - re-verifies a plan from the problem alone, sharing nothing with the solver.
 *
 * Nothing in the plan is trusted: every offset is checked before it is followed. */
#include <math.h>
#include <stdlib.h>

#include "base/arena.h"
#include "plan/sp_model.h"

/* Times are sums of up to n rounded terms; a plan is right when they agree to this, relative. */
#define TIME_TOLERANCE 1e-9

typedef struct block {
    int64_t first, end;
} block;

typedef struct checking {
    const ovlm_sp_problem *problem;
    const ovlm_sp_plan *plan;
    bool *seen;   /* [n] items already in a group                                      */
    block *block; /* [P] blocks of one micro-batch                                     */
    bool chain;   /* blocks can all be aligned to multiples of their degree            */
} checking;

static bool close_to(double a, double b)
{
    return fabs(a - b) <= TIME_TOLERANCE * (fabs(a) + fabs(b));
}

/* start[0] = 0, never falling, start[count] = total. */
static ovlm_status check_offsets(const char *name, const int64_t *start, int64_t count,
                                 int64_t total, ovlm_err *err)
{
    if (start[0] != 0 || start[count] != total) {
        return OVLM_FAIL(err, OVLM_E_ARG, "plan: %s must run from 0 to %lld", name,
                         (long long)total);
    }
    for (int64_t i = 0; i < count; i++) {
        if (start[i] > start[i + 1]) {
            return OVLM_FAIL(err, OVLM_E_ARG, "plan: %s falls after position %lld", name,
                             (long long)i);
        }
    }
    return OVLM_OK;
}

static ovlm_status check_shape(const checking *c, ovlm_err *err)
{
    const ovlm_sp_plan *plan = c->plan;
    if (plan->n != c->problem->n || plan->n_micro < 0 || plan->n_groups < 0) {
        return OVLM_FAIL(err, OVLM_E_ARG, "plan: made for %lld sequences, the problem has %lld",
                         (long long)plan->n, (long long)c->problem->n);
    }
    if (c->problem->micro_batches > 0 && plan->n_micro != c->problem->micro_batches) {
        return OVLM_FAIL(err, OVLM_E_ARG, "plan: %lld micro-batches, %lld asked for",
                         (long long)plan->n_micro, (long long)c->problem->micro_batches);
    }
    OVLM_TRY(check_offsets("micro_start", plan->micro_start, plan->n_micro, plan->n_groups, err));
    return check_offsets("group_start", plan->group_start, plan->n_groups, plan->n, err);
}

static int64_t degree_index(const ovlm_sequence_cost *cost, int64_t degree)
{
    for (int64_t i = 0; i < cost->degree_n; i++) {
        if (cost->degree[i] == degree) {
            return i;
        }
    }
    return -1;
}

/* Aligned blocks: every degree divides the next, and the node; so no other order is ever needed. */
static bool is_chain(const ovlm_sp_problem *problem)
{
    const ovlm_sequence_cost *cost = &problem->cost;
    int64_t node = problem->gpus_per_node;
    for (int64_t i = 0; i < cost->degree_n; i++) {
        int64_t d = cost->degree[i];
        if (d > problem->n_gpus) {
            break;
        }
        if ((i > 0 && d % cost->degree[i - 1] != 0) || (d <= node ? node % d : d % node) != 0) {
            return false;
        }
    }
    return true;
}

static ovlm_status check_block(const checking *c, int64_t g, ovlm_err *err)
{
    int64_t d = c->plan->degree[g], first = c->plan->first_gpu[g];
    int64_t node = c->problem->gpus_per_node;
    if (degree_index(&c->problem->cost, d) < 0) {
        return OVLM_FAIL(err, OVLM_E_ARG, "plan: group %lld has degree %lld, not a permitted one",
                         (long long)g, (long long)d);
    }
    if (d > c->problem->n_gpus || first < 0 || first > c->problem->n_gpus - d) {
        return OVLM_FAIL(err, OVLM_E_ARG, "plan: group %lld (GPU %lld, degree %lld) leaves the "
                         "cluster", (long long)g, (long long)first, (long long)d);
    }
    bool inside = d <= node ? first % node + d <= node : first % node == 0;
    if (!inside || (c->chain && first % d != 0)) {
        return OVLM_FAIL(err, OVLM_E_ARG, "plan: group %lld (GPU %lld, degree %lld) is not aligned "
                         "to the nodes", (long long)g, (long long)first, (long long)d);
    }
    return OVLM_OK;
}

static int compare_blocks(const void *left, const void *right)
{
    const block *a = left, *b = right;
    return (a->first > b->first) - (a->first < b->first);
}

/* No GPU is in two groups of micro-batch m.  Sorted, so that a huge cluster costs nothing. */
static ovlm_status check_overlap(const checking *c, int64_t m, ovlm_err *err)
{
    int64_t begin = c->plan->micro_start[m], count = c->plan->micro_start[m + 1] - begin;
    for (int64_t i = 0; i < count; i++) {
        int64_t first = c->plan->first_gpu[begin + i];
        c->block[i] = (block){first, first + c->plan->degree[begin + i]};
    }
    qsort(c->block, (size_t)count, sizeof *c->block, compare_blocks);
    for (int64_t i = 0; i + 1 < count; i++) {
        if (c->block[i].end > c->block[i + 1].first) {
            return OVLM_FAIL(err, OVLM_E_ARG, "plan: GPU %lld is in two groups of micro-batch %lld",
                             (long long)c->block[i + 1].first, (long long)m);
        }
    }
    return OVLM_OK;
}

/* Sums of lengths and squares of group g, every item new. */
static ovlm_status sum_items(const checking *c, int64_t g, double *sum_s, double *sum_s2,
                             ovlm_err *err)
{
    *sum_s = *sum_s2 = 0;
    if (c->plan->group_start[g] == c->plan->group_start[g + 1]) {
        return OVLM_FAIL(err, OVLM_E_ARG, "plan: group %lld is empty", (long long)g);
    }
    for (int64_t i = c->plan->group_start[g]; i < c->plan->group_start[g + 1]; i++) {
        int64_t item = c->plan->item[i];
        if (item < 0 || item >= c->plan->n || c->seen[item]) {
            return OVLM_FAIL(err, OVLM_E_ARG, "plan: sequence %lld is not there, or is in two "
                             "groups", (long long)item);
        }
        c->seen[item] = true;
        double s = (double)c->problem->lengths[item];
        *sum_s += s;
        *sum_s2 += s * s;
    }
    return OVLM_OK;
}

static bool memory_fits(const ovlm_sp_problem *problem, double tokens, int64_t degree)
{
    double shard = tokens / (double)degree, pad = (double)problem->pad_to;
    if (problem->pad_to > 1) {
        shard = ceil(shard / pad) * pad;
    }
    const ovlm_sequence_cost *cost = &problem->cost;
    return cost->memory_fixed + cost->memory_per_token * shard <=
           cost->memory_limit * (1 + TIME_TOLERANCE);
}

/* The fewest equal rows of a group that have no more GPUs than heads. */
static int64_t count_rows(const ovlm_sequence_cost *cost, int64_t degree)
{
    if (cost->heads == 0 || degree <= cost->heads) {
        return 1;
    }
    int64_t row = cost->heads;
    while (degree % row != 0) {
        row--;
    }
    return degree / row;
}

static ovlm_status check_group(const checking *c, int64_t g, ovlm_err *err)
{
    const ovlm_sequence_cost *cost = &c->problem->cost;
    double sum_s, sum_s2;
    OVLM_TRY(check_block(c, g, err));
    OVLM_TRY(sum_items(c, g, &sum_s, &sum_s2, err));
    int64_t d = c->plan->degree[g];
    if (!memory_fits(c->problem, sum_s, d)) {
        return OVLM_FAIL(err, OVLM_E_ARG, "plan: group %lld holds %.0f tokens, more than the "
                         "memory of %lld GPUs", (long long)g, sum_s, (long long)d);
    }
    double degree = (double)d, share = 1 / degree, rows = (double)count_rows(cost, d);
    if (cost->heads > 0) {
        share = ceil((double)cost->heads * rows / degree) / (double)cost->heads;
        share *= 1 - (1 - 1 / rows) * (1 - 1 / rows); /* the last row's of all causal pairs */
    }
    double linear = cost->linear + cost->comm[degree_index(cost, d)] + cost->ring * (rows - 1);
    double time = cost->fixed + cost->quadratic * share * sum_s2 + linear * sum_s / degree;
    if (!close_to(time, c->plan->group_time[g])) {
        return OVLM_FAIL(err, OVLM_E_ARG, "plan: group %lld takes %.17g s, not %.17g",
                         (long long)g, time, c->plan->group_time[g]);
    }
    return OVLM_OK;
}

static ovlm_status check_times(const checking *c, double time, ovlm_err *err)
{
    const ovlm_sp_plan *plan = c->plan;
    if (!close_to(time, plan->time)) {
        return OVLM_FAIL(err, OVLM_E_ARG, "plan: the step takes %.17g s, not %.17g", time,
                         plan->time);
    }
    if (!(plan->bound >= 0 && plan->bound <= plan->time)) {
        return OVLM_FAIL(err, OVLM_E_ARG, "plan: bound %.17g s is not in [0, time %.17g]",
                         plan->bound, plan->time);
    }
    bool optimal = plan->time - plan->bound <= TIME_TOLERANCE * plan->time;
    if (plan->status != OVLM_PLAN_FEASIBLE && !(plan->status == OVLM_PLAN_OPTIMAL && optimal)) {
        return OVLM_FAIL(err, OVLM_E_ARG, "plan: status %d does not follow from time and bound",
                         (int)plan->status);
    }
    return OVLM_OK;
}

static ovlm_status check_all(const checking *c, ovlm_err *err)
{
    const ovlm_sp_plan *plan = c->plan;
    double time = 0;
    OVLM_TRY(check_shape(c, err));
    for (int64_t m = 0; m < plan->n_micro; m++) {
        double most = 0;
        for (int64_t g = plan->micro_start[m]; g < plan->micro_start[m + 1]; g++) {
            OVLM_TRY(check_group(c, g, err));
            most = plan->group_time[g] > most ? plan->group_time[g] : most;
        }
        OVLM_TRY(check_overlap(c, m, err));
        time += most;
    }
    return check_times(c, time, err); /* offsets cover n items, none twice: each is there once */
}

ovlm_status ovlm_sp_plan_check(const ovlm_sp_problem *problem, const ovlm_sp_plan *plan,
                               ovlm_err *err)
{
    ovlm_arena arena = {0};
    ovlm_status status = OVLM_OK;
    sp_model model; /* for its checks of the problem only */
    checking c = {.problem = problem, .plan = plan};
    OVLM_GOTO(done, sp_model_init(&model, problem, &arena, err));
    c.chain = is_chain(problem); /* divides by what was checked just now */
    OVLM_GOTO(done, OVLM_ARENA_NEW(&arena, &c.seen, problem->n, err));
    OVLM_GOTO(done, OVLM_ARENA_NEW(&arena, &c.block, plan->n_groups, err));
    OVLM_GOTO(done, check_all(&c, err));
done:
    ovlm_arena_free(&arena);
    return status;
}
