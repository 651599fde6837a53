/* step_phase.c - one phase of the step: which rank takes which item, in which micro-batch.
 *
 * Ranks first, micro-batches second.  A phase that fits in one micro-batch is exactly what
 * ovlm_balance_solve solves.  One that does not is balanced over ranks as a whole, and each rank
 * then spreads its items over the micro-batches, so that every micro-batch is balanced too.  Time
 * is the sum over micro-batches of the largest load, because the ranks meet at the end of each.
 *
 * Bounds.  Without padded terms any split costs at least what the union costs on the same rank, so
 * the bound for one micro-batch holds for all numbers of them.  With padded terms splitting may
 * save padding; then, with g(l) = per_item + (linear + padded_linear)*l + quadratic*q +
 * padded_quadratic*l^2 <= the item's part of f in any company,
 *   time >= M*fixed + max(max g, sum g / N),    M >= ceil(sum l / (N*capacity)). */
#include <math.h>
#include <string.h>

#include "plan/route.h"
#include "plan/step.h"

ovlm_status step_work_init(step_work *work, const step_input *input, int64_t p, ovlm_err *err)
{
    const ovlm_step_problem *problem = input->problem;
    double per_unit = problem->llm_memory_per_token, fixed = problem->llm_memory_fixed;
    if (p < problem->n_phases) {
        const ovlm_step_items *items = &problem->phase[p];
        *work = (step_work){.name = items->name, .n = items->n, .length = items->length,
                            .bytes = items->bytes, .home = input->home[p],
                            .squares = items->squares, .cost = items->cost};
        per_unit = items->memory_per_token;
        fixed = items->memory_fixed;
    } else {
        *work = (step_work){.name = "llm", .n = problem->n, .length = input->tokens,
                            .bytes = input->llm_bytes, .home = problem->source_rank,
                            .cost = problem->llm_cost};
    }
    work->capacity = INT64_MAX;
    if (!(fixed <= problem->memory_bytes)) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "memory[%s]: %.4g fixed bytes exceed the %.4g of a GPU", work->name,
                         fixed, problem->memory_bytes);
    }
    /* what fits exactly must not fail for the rounding of a division */
    double room = per_unit > 0
                      ? floor((problem->memory_bytes - fixed) / per_unit * (1 + 1e-12))
                      : HUGE_VAL;
    if (room < 4e18) {
        work->capacity = (int64_t)room;
    }
    for (int64_t i = 0; i < work->n && work->capacity < INT64_MAX; i++) {
        if (work->length[i] > work->capacity) {
            return OVLM_FAIL(err, OVLM_E_ARG,
                             "%s item %lld has length %lld, but one GPU holds %lld (memory of "
                             "%.4g bytes, %.4g fixed and %.4g per unit of length); split it, or "
                             "give it more memory", work->name, (long long)i,
                             (long long)work->length[i], (long long)work->capacity,
                             problem->memory_bytes, fixed, per_unit);
        }
    }
    return OVLM_OK;
}

static double square_of(const step_work *work, int64_t i)
{
    double l = (double)work->length[i];
    return work->squares ? work->squares[i] : l * l;
}

/* g of the comment above. */
static double item_floor(const step_work *work, int64_t i)
{
    const ovlm_batch_cost *cost = &work->cost;
    double l = (double)work->length[i];
    return cost->per_item + (cost->linear + cost->padded_linear) * l +
           cost->quadratic * square_of(work, i) + cost->padded_quadratic * l * l;
}

static int64_t least_micro(const step_work *work, int64_t n_ranks)
{
    if (work->capacity == INT64_MAX || work->capacity == 0) {
        return 1;
    }
    int64_t total = 0;
    for (int64_t i = 0; i < work->n; i++) {
        total += work->length[i];
    }
    int64_t per_rank = total / n_ranks + (total % n_ranks != 0);
    int64_t least = per_rank / work->capacity + (per_rank % work->capacity != 0);
    return least > 1 ? least : 1;
}

static double floor_bound(const step_work *work, int64_t n_ranks)
{
    double sum = 0, most = 0;
    for (int64_t i = 0; i < work->n; i++) {
        double g = item_floor(work, i);
        sum += g;
        most = g > most ? g : most;
    }
    double mean = sum / (double)n_ranks, fixed = work->cost.fixed;
    double bound = (double)least_micro(work, n_ranks) * fixed + (mean > most ? mean : most);
    /* 1e-10: more than the rounding of a sum of 2^20 terms */
    return work->n > 0 ? bound * (1 - 1e-10) : 0;
}

/* Of the items of one rank in one micro-batch. */
typedef struct mini_batch {
    int64_t n;
    double sum, sum_q, max;
} mini_batch;

/* loads[N] and *time of an assignment; micro NULL: one micro-batch. */
static ovlm_status measure(const step_work *work, int64_t n_ranks, const int64_t *rank,
                           const int64_t *micro, int64_t n_micro, double *loads, double *time,
                           ovlm_arena *arena, ovlm_err *err)
{
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    mini_batch *cell = NULL;
    if (n_micro > INT64_MAX / 64 / n_ranks) {
        return OVLM_FAIL(err, OVLM_E_NOMEM, "%s: %lld micro-batches", work->name,
                         (long long)n_micro);
    }
    OVLM_TRY(OVLM_ARENA_NEW(arena, &cell, n_micro * n_ranks, err));
    for (int64_t i = 0; i < work->n; i++) {
        mini_batch *t = &cell[(micro != NULL ? micro[i] * n_ranks : 0) + rank[i]];
        double l = (double)work->length[i];
        t->n++;
        t->sum += l;
        t->sum_q += square_of(work, i);
        t->max = l > t->max ? l : t->max;
    }
    *time = 0;
    memset(loads, 0, (size_t)n_ranks * sizeof *loads);
    for (int64_t m = 0; m < n_micro; m++) {
        double slowest = 0;
        for (int64_t r = 0; r < n_ranks; r++) {
            const mini_batch *t = &cell[m * n_ranks + r];
            double load = ovlm_batch_cost_eval(&work->cost, t->n, t->sum, t->sum_q, t->max);
            loads[r] += load;
            slowest = load > slowest ? load : slowest;
        }
        *time += slowest;
    }
    ovlm_arena_rewind(arena, mark);
    return isfinite(*time)
               ? OVLM_OK
               : OVLM_FAIL(err, OVLM_E_ARG, "costs[%s]: the cost of a rank overflows", work->name);
}

ovlm_status step_share_measure(const step_work *work, int64_t n_ranks, ovlm_step_share *share,
                               ovlm_arena *arena, ovlm_err *err)
{
    return measure(work, n_ranks, share->rank, share->n_micro > 1 ? share->micro : NULL,
                   share->n_micro, share->loads, &share->time, arena, err);
}

ovlm_status step_share_sampled(const step_work *work, int64_t n_ranks, ovlm_step_share *share,
                               ovlm_arena *arena, ovlm_err *err)
{
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    double *loads = NULL, sum = 0;
    OVLM_TRY(OVLM_ARENA_RAW(arena, &loads, n_ranks, err));
    OVLM_TRY(measure(work, n_ranks, work->home, NULL, 1, loads, &share->sampled_time, arena,
                     err));
    for (int64_t r = 0; r < n_ranks; r++) {
        sum += loads[r];
    }
    share->sampled_imbalance = sum > 0 ? share->sampled_time / (sum / (double)n_ranks) : 1;
    ovlm_arena_rewind(arena, mark);
    return OVLM_OK;
}

/* A step has several searches to pay for: above 10,000 items each has fewer steps, as they take
 * longer and gain less; and none where ranks hold so many items that longest-first is within 0.1 %
 * without.  With homes a search mostly moves few bytes, which needs its steps. */
static ovlm_budget balance_budget(const ovlm_budget *budget, int64_t n, int64_t n_ranks,
                                  bool homes)
{
    enum { MANY = 32 };
    static const int64_t default_work = 6000000, homes_work = 3000000, large = 10000;
    ovlm_budget part = *budget;
    if (part.work_limit < 0) {
        int64_t times = 1 + n / large, work = default_work / times / times;
        part.work_limit = homes ? homes_work : work < n && n / n_ranks >= MANY ? 0 : work;
    }
    return part;
}

/* Balances; limit > 0: with at most that length per rank. */
static ovlm_status balance(const step_input *input, const step_work *work, int64_t limit,
                           const ovlm_budget *budget, ovlm_step_share *share,
                           ovlm_balance_result *result, ovlm_arena *arena, ovlm_err *err)
{
    const ovlm_step_problem *problem = input->problem;
    bool homes = problem->slack >= 0;
    int64_t *capacity = NULL;
    if (limit > 0) {
        OVLM_TRY(OVLM_ARENA_NEW(arena, &capacity, problem->n_ranks, err));
        for (int64_t r = 0; r < problem->n_ranks; r++) {
            capacity[r] = limit;
        }
    }
    ovlm_balance_problem balance_problem = {
        .n = work->n, .n_ranks = problem->n_ranks, .lengths = work->length,
        .squares = work->squares, .cost = work->cost,
        .size = capacity ? work->length : work->bytes, .capacity = capacity, .max_items = -1,
        .home = homes ? work->home : NULL, .node_size = problem->gpus_per_node,
        .slack = homes ? problem->slack : 0, .seed = problem->seed};
    ovlm_budget part = balance_budget(budget, work->n, problem->n_ranks, homes);
    return ovlm_balance_solve(&balance_problem, &part, share->rank, share->loads, result, err);
}

/* Again under a limit of length per rank, when the balance by cost needs more micro-batches than
 * the lengths do: the fewest micro-batches come first. */
static ovlm_status fewer_micro(const step_input *input, const step_work *work, int64_t least,
                               const ovlm_budget *budget, ovlm_step_share *share, bool *cut_short,
                               ovlm_arena *arena, ovlm_err *err)
{
    int64_t n_ranks = input->problem->n_ranks, most = share->n_micro;
    ovlm_step_share other = *share;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &other.rank, work->n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &other.micro, work->n, err));
    for (int64_t limit = least; limit < most; limit++) {
        ovlm_balance_result result = {0};
        bool fits = false;
        if (limit > INT64_MAX / work->capacity) {
            return OVLM_OK;
        }
        ovlm_status status = balance(input, work, limit * work->capacity, budget, &other, &result,
                                     arena, err);
        *cut_short = *cut_short || result.cut_short;
        if (status == OVLM_E_ARG || status == OVLM_E_UNDECIDED) {
            continue;
        }
        OVLM_TRY(status);
        OVLM_TRY(step_micro_pack(work, n_ranks, other.rank, limit, limit, other.micro,
                                 &other.n_micro, &fits, arena, err));
        if (fits) {
            memcpy(share->rank, other.rank, (size_t)work->n * sizeof *share->rank);
            memcpy(share->micro, other.micro, (size_t)work->n * sizeof *share->micro);
            share->n_micro = other.n_micro;
            return OVLM_OK;
        }
    }
    return OVLM_OK;
}

ovlm_status step_share_solve(const step_input *input, const step_work *work,
                             const ovlm_budget *budget, ovlm_step_share *share, bool *cut_short,
                             ovlm_arena *arena, ovlm_err *err)
{
    const ovlm_step_problem *problem = input->problem;
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    ovlm_balance_result result = {0};
    bool fits = true, padded = work->cost.padded_linear > 0 || work->cost.padded_quadratic > 0;
    int64_t least = least_micro(work, problem->n_ranks);
    OVLM_TRY(balance(input, work, 0, budget, share, &result, arena, err));
    *cut_short = *cut_short || result.cut_short;
    share->n_micro = 1;
    if (work->capacity != INT64_MAX) {
        OVLM_TRY(step_micro_pack(work, problem->n_ranks, share->rank, least, INT64_MAX,
                                 share->micro, &share->n_micro, &fits, arena, err));
        if (share->n_micro > least) {
            OVLM_TRY(fewer_micro(input, work, least, budget, share, cut_short, arena, err));
        }
    }
    OVLM_TRY(step_share_measure(work, problem->n_ranks, share, arena, err));
    share->bound = result.bound;
    if (share->n_micro > 1) {
        double other = floor_bound(work, problem->n_ranks);
        share->bound = padded || other > share->bound ? other : share->bound;
    }
    share->bound = share->bound < share->time ? share->bound : share->time;
    ovlm_arena_rewind(arena, mark);
    return OVLM_OK;
}
