/* balance.c - the call: parts, the order of the steps, and the answer.
 *
 * Groups of ranks are independent problems, solved one after the other with shares of the work;
 * the largest of their bounds is everyone's goal. */
#include "ovlm.h"

#include <math.h>
#include <stdlib.h>

#include "plan/balance_parts.h"

enum {
    STEP_STRIDE = 2048,         /* search steps of about 10 us                                  */
    EXACT_UNITS = 16,           /* branch and bound is tried up to here ...                     */
    EXACT_WORK = 1 << 22,       /* ... with at most this much work                              */
    RESERVE_BYTES = 64,         /* per item: what longest-first alone needs                     */
};
/* About 40 ms; homes take another search, and at slack 0 a longer one. */
static const int64_t DEFAULT_WORK = 6000000, DEFAULT_WORK_HOME = 24000000;
static const int64_t FIRST_ROUND = (int64_t)1 << 16, LONGEST_ROUND = (int64_t)1 << 60;

typedef struct job {
    const ovlm_balance_problem *problem;
    ovlm_meter meter;
    ovlm_arena arena;
    int64_t *rank;
    double bound; /* so far, over the parts */
} job;

/* Branch and bound where it can finish; sets *optimal when it did. */
static ovlm_status try_exact(bal_search *search, bal_plan *plan, bool *found, bool *optimal,
                             ovlm_err *err)
{
    if (search->model->n_units > EXACT_UNITS || search->meter->work_limit == 0) {
        return OVLM_OK;
    }
    return bal_exact(search, plan, HUGE_VAL, EXACT_WORK, found, optimal, err);
}

/* A first plan: longest-first, cuts where padding counts, other constructions where constraints
 * defeat these. */
static ovlm_status first_plan(bal_search *search, bal_plan *plan, bool *found, ovlm_err *err)
{
    const bal_model *model = search->model;
    OVLM_TRY(bal_greedy(model, model->order, plan, found, search->arena, err));
    if (model->padded) {
        ovlm_arena_mark mark = ovlm_arena_save(search->arena);
        bal_plan other = {0};
        bool done = false;
        OVLM_TRY(bal_plan_init(&other, model, search->arena, err));
        OVLM_TRY(bal_cuts(model, &other, &done, search->arena, err));
        if (done && (!*found || other.max < plan->max)) {
            bal_plan_copy(model, plan, &other);
            *found = true;
        }
        ovlm_arena_rewind(search->arena, mark);
    }
    if (!*found) {
        OVLM_TRY(bal_construct(model, plan, found, search->arena, err));
    }
    if (!*found) {
        OVLM_TRY(bal_repair(search, plan, found, err));
    }
    return OVLM_OK;
}

/* Differencing and its trades, when half of the work left is sure to pay for its lists. */
static ovlm_status try_difference(bal_search *search, bal_plan *plan, ovlm_err *err)
{
    const bal_model *model = search->model;
    int64_t cost = model->n_units * model->n_ranks / 4 + model->n_units;
    if (bal_meets(plan->max, search->goal) ||
        cost > (search->planned - search->meter->work) / 2) {
        return OVLM_OK;
    }
    ovlm_arena_mark mark = ovlm_arena_save(search->arena);
    bal_plan other = {0};
    bool done = false;
    OVLM_TRY(bal_plan_init(&other, model, search->arena, err));
    OVLM_TRY(bal_difference(search, &other, &done, err));
    if (done && other.max < plan->max) {
        bal_plan_copy(model, plan, &other);
        OVLM_TRY(bal_trade(search, plan, err));
    }
    ovlm_arena_rewind(search->arena, mark);
    return OVLM_OK;
}

/* Exact cover by triples, with up to a third of the work left. */
static ovlm_status try_triples(bal_search *search, bal_plan *plan, ovlm_err *err)
{
    int64_t n = search->model->n_units, left = search->planned - search->meter->work;
    if (n != 3 * search->model->n_ranks || left / 3 < n * n / 4) {
        return OVLM_OK;
    }
    ovlm_arena_mark mark = ovlm_arena_save(search->arena);
    bal_plan other = {0};
    bool done = false;
    OVLM_TRY(bal_plan_init(&other, search->model, search->arena, err));
    OVLM_TRY(bal_triples(search, &other, left / 3, &done, err));
    if (done && other.max < plan->max) {
        bal_plan_copy(search->model, plan, &other);
    }
    ovlm_arena_rewind(search->arena, mark);
    return OVLM_OK;
}

/* With homes: `best`, a largest load or a bound on it, sets the limit, then traffic counts. */
static ovlm_status settle_homes(bal_search *search, bal_plan *plan, double best, double slack,
                                ovlm_err *err)
{
    double limit = best * (1 + slack);
    OVLM_TRY(bal_home(search, plan, limit, err));
    if (search->model->n_units <= EXACT_UNITS && search->meter->work_limit > 0) {
        bool found = true, done = false;
        OVLM_TRY(bal_exact(search, plan, limit, EXACT_WORK, &found, &done, err));
    }
    return OVLM_OK;
}

static ovlm_status no_plan(const bal_search *search, bool proved, ovlm_err *err)
{
    if (proved) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "no assignment satisfies capacity, min_items, max_items, pinned and "
                         "keep_together together (proved by exhaustive search)");
    }
    return OVLM_FAIL(err, OVLM_E_UNDECIDED,
                     "found no assignment that satisfies capacity, min_items, max_items, pinned "
                     "and keep_together within %lld search steps, and no proof that none exists; "
                     "raise work_limit or loosen a constraint",
                     (long long)search->meter->work);
}

/* Improves the plan by search: exact for small parts, otherwise what suits the cost. */
static ovlm_status improve(bal_search *search, bal_plan *plan, bool *found, bool *optimal,
                           ovlm_err *err)
{
    if (*found) {
        /* trades first: more work must not mean fewer of them on the same plan */
        OVLM_TRY(bal_trade(search, plan, err));
        OVLM_TRY(try_difference(search, plan, err));
    }
    if (!*found || !bal_meets(plan->max, search->goal)) {
        OVLM_TRY(try_exact(search, plan, found, optimal, err));
    }
    if (!*found) {
        return no_plan(search, *optimal, err);
    }
    if (*optimal || bal_meets(plan->max, search->goal)) {
        return OVLM_OK;
    }
    OVLM_TRY(try_triples(search, plan, err));
    return search->model->padded ? bal_descend(search, plan, err)
                                 : bal_rebuild(search, plan, err);
}

/* Rounds of growing length, each from the plan of the one before.  What a round does depends on its
 * own length, never on the limit, so a shorter search is the beginning of a longer one: more work
 * cannot give a worse plan. */
static ovlm_status improve_in_rounds(bal_search *search, bal_plan *plan, bool *found,
                                     bool *optimal, ovlm_err *err)
{
    ovlm_meter *meter = search->meter;
    int64_t limit = meter->work_limit;
    ovlm_status status = OVLM_OK;
    /* Without a first plan, finding one gets everything in one round; with homes, the largest
     * load is not what counts in the end. */
    bool rounds = *found && search->model->home == NULL;
    int64_t length = rounds ? FIRST_ROUND : limit - meter->work;
    for (; status == OVLM_OK; length = length < LONGEST_ROUND ? 4 * length : length) {
        bool last = length >= limit - meter->work;
        search->planned = length < INT64_MAX - meter->work ? meter->work + length : INT64_MAX;
        meter->work_limit = last ? limit : search->planned;
        status = improve(search, plan, found, optimal, err);
        if (last || *optimal || bal_meets(plan->max, search->goal) || meter->cut_short ||
            meter->interrupted) {
            break;
        }
    }
    meter->work_limit = limit;
    return status;
}

/* Any plan first, then the homes; raises *bound when the plan is proved optimal. */
static ovlm_status solve_afresh(bal_search *search, bal_plan *plan, double slack, double *bound,
                                ovlm_err *err)
{
    const bal_model *model = search->model;
    ovlm_meter *meter = search->meter;
    bool found = false, optimal = false;
    OVLM_TRY(first_plan(search, plan, &found, err));
    /* half of what is left is for the homes; and what slack gives away need not be searched for */
    int64_t work_limit = meter->work_limit;
    bool near = found && slack > 0 && model->n_units > EXACT_UNITS &&
                plan->max <= search->goal * (1 + slack / 4);
    if (model->home != NULL && found) {
        meter->work_limit -= (work_limit - meter->work) / 2;
    }
    if (!near) {
        OVLM_TRY(improve_in_rounds(search, plan, &found, &optimal, err));
    }
    meter->work_limit = work_limit;
    double best = plan->max;
    if (model->home != NULL) {
        OVLM_TRY(settle_homes(search, plan, near ? search->goal : best, slack, err));
    }
    /* a plan that meets the goal ended the search early, and the goal is its bound */
    if (optimal && !bal_meets(best, search->goal) && best * model->down > *bound) {
        *bound = best * model->down;
    }
    return OVLM_OK;
}

/* With slack, a plan within it of the goal needs no other plan to compare with: tried from the
 * homes alone, with a quarter of the work. */
static ovlm_status try_homes(bal_search *search, bal_plan *plan, double slack, bool *done,
                             ovlm_err *err)
{
    ovlm_meter *meter = search->meter;
    int64_t work_limit = meter->work_limit;
    *done = false;
    if (!(slack > 0) || search->model->n_units <= EXACT_UNITS) {
        return OVLM_OK;
    }
    if (work_limit > meter->work) {
        meter->work_limit = meter->work + (work_limit - meter->work) / 4;
    }
    OVLM_TRY(bal_stay(search, plan, search->goal * (1 + slack), done, err));
    meter->work_limit = work_limit;
    return OVLM_OK;
}

/* Solves one prepared part and writes its ranks. */
static ovlm_status solve_part(job *j, const bal_model *model, const bal_part *part, double bound,
                              ovlm_err *err)
{
    bal_search search = {.model = model, .meter = &j->meter, .arena = &j->arena,
                         .goal = j->bound > bound ? j->bound : bound};
    ovlm_rng_init(&search.rng, j->problem->seed);
    double slack = model->home != NULL ? j->problem->slack : 0;
    bal_plan plan = {0};
    bool done = false;
    OVLM_TRY(bal_plan_init(&plan, model, &j->arena, err));
    OVLM_TRY(try_homes(&search, &plan, slack, &done, err));
    if (!done) {
        OVLM_TRY(solve_afresh(&search, &plan, slack, &bound, err));
    }
    j->bound = bound > j->bound ? bound : j->bound;
    for (int64_t i = 0; i < part->n_items; i++) {
        int64_t u = model->unit_of != NULL ? model->unit_of[i] : i;
        int64_t item = part->item != NULL ? part->item[i] : i;
        j->rank[item] = part->first_rank + plan.rank[u];
    }
    return OVLM_OK;
}

/* The items of every group of ranks: item[start[g]] ... item[start[g + 1] - 1]. */
static void group_items(const ovlm_balance_problem *p, int64_t n_groups, int64_t *start,
                        int64_t *item)
{
    for (int64_t i = 0; i < p->n; i++) {
        start[p->home[i] / p->group_size + 1]++;
    }
    for (int64_t g = 0; g < n_groups; g++) {
        start[g + 1] += start[g];
    }
    for (int64_t i = p->n - 1; i >= 0; i--) {
        int64_t g = p->home[i] / p->group_size;
        item[--start[g + 1]] = i;
    }
    /* each start[g + 1] now is where group g begins */
    for (int64_t g = 0; g < n_groups; g++) {
        start[g] = start[g + 1];
    }
    start[n_groups] = p->n;
}

static int by_label(const void *a, const void *b)
{
    const int64_t *x = a, *y = b;
    return x[0] < y[0] ? -1 : x[0] > y[0];
}

/* Labels must not cross groups. */
static ovlm_status check_labels(job *j, ovlm_err *err)
{
    const ovlm_balance_problem *p = j->problem;
    if (p->together == NULL) {
        return OVLM_OK;
    }
    int64_t(*pair)[2] = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(&j->arena, &pair, p->n, err));
    for (int64_t i = 0; i < p->n; i++) {
        pair[i][0] = p->together[i];
        pair[i][1] = p->home[i] / p->group_size;
    }
    qsort(pair, (size_t)p->n, sizeof *pair, by_label);
    for (int64_t i = 1; i < p->n; i++) {
        if (pair[i][0] == pair[i - 1][0] && pair[i][1] != pair[i - 1][1]) {
            return OVLM_FAIL(err, OVLM_E_ARG,
                             "keep_together label %lld has homes in two groups of ranks",
                             (long long)pair[i][0]);
        }
    }
    return OVLM_OK;
}

/* Group after group; the largest bound of all is known before the first search. */
static ovlm_status solve_groups(job *j, ovlm_err *err)
{
    const ovlm_balance_problem *p = j->problem;
    int64_t n_groups = p->n_ranks / p->group_size, *start = NULL, *item = NULL;
    bal_model *model = NULL;
    double *bound = NULL;
    OVLM_TRY(check_labels(j, err));
    OVLM_TRY(OVLM_ARENA_NEW(&j->arena, &start, n_groups + 1, err));
    OVLM_TRY(OVLM_ARENA_NEW(&j->arena, &item, p->n, err));
    OVLM_TRY(OVLM_ARENA_NEW(&j->arena, &model, n_groups, err));
    OVLM_TRY(OVLM_ARENA_NEW(&j->arena, &bound, n_groups, err));
    group_items(p, n_groups, start, item);
    for (int64_t g = 0; g < n_groups; g++) {
        bal_part part = {item + start[g], start[g + 1] - start[g], g * p->group_size,
                         p->group_size};
        OVLM_TRY(bal_model_init(&model[g], p, &part, &j->arena, err));
        OVLM_TRY(bal_bound(&model[g], &bound[g], &j->arena, err));
        j->bound = bound[g] > j->bound ? bound[g] : j->bound;
    }
    int64_t limit = j->meter.work_limit;
    for (int64_t g = 0; g < n_groups; g++) {
        bal_part part = {item + start[g], start[g + 1] - start[g], g * p->group_size,
                         p->group_size};
        /* what is left is shared evenly by the groups to come */
        j->meter.work_limit = limit == INT64_MAX ? limit
                                                 : j->meter.work + (limit - j->meter.work > 0
                                                       ? (limit - j->meter.work) / (n_groups - g)
                                                       : 0);
        ovlm_arena_mark mark = ovlm_arena_save(&j->arena);
        OVLM_TRY(solve_part(j, &model[g], &part, bound[g], err));
        ovlm_arena_rewind(&j->arena, mark);
    }
    return OVLM_OK;
}

static ovlm_status solve_whole(job *j, ovlm_err *err)
{
    const ovlm_balance_problem *p = j->problem;
    bal_part part = {NULL, p->n, 0, p->n_ranks};
    bal_model model;
    double bound = 0;
    OVLM_TRY(bal_model_init(&model, p, &part, &j->arena, err));
    OVLM_TRY(bal_bound(&model, &bound, &j->arena, err));
    return solve_part(j, &model, &part, bound, err);
}

/* The loads by the formula itself, items in order; returns the largest. */
static ovlm_status final_loads(job *j, double *loads, double *largest, ovlm_err *err)
{
    const ovlm_balance_problem *p = j->problem;
    double *sum = NULL, *sum_q = NULL, *longest = NULL;
    int64_t *count = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(&j->arena, &sum, p->n_ranks, err));
    OVLM_TRY(OVLM_ARENA_NEW(&j->arena, &sum_q, p->n_ranks, err));
    OVLM_TRY(OVLM_ARENA_NEW(&j->arena, &longest, p->n_ranks, err));
    OVLM_TRY(OVLM_ARENA_NEW(&j->arena, &count, p->n_ranks, err));
    for (int64_t i = 0; i < p->n; i++) {
        int64_t r = j->rank[i];
        double length = (double)p->lengths[i];
        sum[r] += p->item_cost != NULL ? p->item_cost[i] : length;
        if (p->cost.quadratic > 0) {
            sum_q[r] += p->squares != NULL ? p->squares[i] : length * length;
        }
        longest[r] = length > longest[r] ? length : longest[r];
        count[r]++;
    }
    *largest = 0;
    for (int64_t r = 0; r < p->n_ranks; r++) {
        double f = p->item_cost != NULL
                       ? sum[r]
                       : ovlm_batch_cost_eval(&p->cost, count[r], sum[r], sum_q[r], longest[r]);
        loads[r] = (p->base_load != NULL ? p->base_load[r] : 0) +
                   (p->speed != NULL ? f / p->speed[r] : f);
        *largest = loads[r] > *largest ? loads[r] : *largest;
    }
    return OVLM_OK;
}

ovlm_status ovlm_balance_solve(const ovlm_balance_problem *problem, const ovlm_budget *budget,
                               int64_t *rank, double *loads, ovlm_balance_result *result,
                               ovlm_err *err)
{
    ovlm_status status = OVLM_OK;
    job j = {.problem = problem, .rank = rank};
    double largest = 0;
    ovlm_meter_start(&j.meter, budget, problem->home != NULL ? DEFAULT_WORK_HOME : DEFAULT_WORK,
                     STEP_STRIDE);
    OVLM_GOTO(done, bal_problem_check(problem, err));
    OVLM_GOTO(done, ovlm_arena_reserve(&j.arena, RESERVE_BYTES * problem->n, err));
    OVLM_GOTO(done, problem->group_size > 0 ? solve_groups(&j, err) : solve_whole(&j, err));
    OVLM_GOTO(done, final_loads(&j, loads, &largest, err));
    /* a bound above the plan could only be rounding */
    *result = (ovlm_balance_result){
        .bound = j.bound < largest ? j.bound : largest,
        .status = largest <= j.bound * (1 + 1e-9) ? OVLM_PLAN_OPTIMAL : OVLM_PLAN_FEASIBLE,
        .cut_short = j.meter.cut_short,
        .work = j.meter.work,
    };
done:
    ovlm_arena_free(&j.arena);
    return status;
}
