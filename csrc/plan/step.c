/* step.c - plans a step: balance every phase, name the mini-batches, route the rows.
 *
 * The decisions are each item's rank and micro-batch, and the groups of the language phase;
 * routes, traffic and times follow from them, in ovlm_step_plan_rebuild, so that a plan that
 * travels as bytes carries the decisions alone. */
#include "plan/step.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

ovlm_budget step_budget(const ovlm_meter *clock, const ovlm_budget *budget, int64_t searches)
{
    ovlm_budget part = {.work_limit = -1};
    if (budget == NULL) {
        return part;
    }
    part = *budget;
    double left_s = ovlm_meter_left_s(clock);
    if (left_s < HUGE_VAL) {
        /* a limit of zero would mean none */
        part.time_limit_s = left_s > 1e-9 ? left_s / (double)searches : 1e-9;
    }
    return part;
}

ovlm_sp_problem step_sequence_problem(const step_input *input)
{
    const ovlm_step_problem *problem = input->problem;
    return (ovlm_sp_problem){.n = problem->n, .n_gpus = problem->n_ranks,
                             .gpus_per_node = problem->gpus_per_node, .lengths = input->tokens,
                             .cost = problem->sequence_cost, .pad_to = problem->pad_to,
                             .policy = OVLM_SP_FLEX, .threads = 1, .seed = problem->seed,
                             .warm_start = problem->warm_start};
}

static ovlm_status share_init(ovlm_step_share *share, int64_t n, int64_t n_ranks, ovlm_err *err)
{
    *share = (ovlm_step_share){.n = n, .n_micro = 1, .sampled_imbalance = 1};
    OVLM_TRY(OVLM_HEAP_RAW(&share->rank, n, err));
    OVLM_TRY(OVLM_HEAP_NEW(&share->micro, n, err));
    return OVLM_HEAP_NEW(&share->loads, n_ranks, err);
}

ovlm_status ovlm_step_plan_init(const ovlm_step_problem *problem, ovlm_step_plan **out,
                                ovlm_err *err)
{
    ovlm_step_plan *plan = NULL;
    ovlm_status status = OVLM_OK;
    if (problem->n < 0 || problem->n_phases < 0 || problem->n_ranks < 1) {
        return OVLM_FAIL(err, OVLM_E_ARG, "a step needs n >= 0, n_phases >= 0, n_ranks >= 1");
    }
    OVLM_TRY(OVLM_HEAP_NEW(&plan, 1, err));
    plan->n = problem->n;
    plan->n_ranks = problem->n_ranks;
    OVLM_GOTO(fail, OVLM_HEAP_NEW(&plan->share, problem->n_phases + 1, err));
    OVLM_GOTO(fail, OVLM_HEAP_NEW(&plan->raw, problem->n_phases, err));
    OVLM_GOTO(fail, OVLM_HEAP_NEW(&plan->back, problem->n_phases, err));
    OVLM_GOTO(fail, OVLM_HEAP_NEW(&plan->to_llm, problem->n_phases, err));
    OVLM_GOTO(fail, OVLM_HEAP_NEW(&plan->relabel, problem->n_phases + 1, err));
    plan->n_phases = problem->n_phases;
    for (int64_t p = 0; p < problem->n_phases; p++) {
        OVLM_GOTO(fail, share_init(&plan->share[p], problem->phase[p].n, problem->n_ranks, err));
    }
    int64_t n_llm = problem->sequence_parallel ? 0 : problem->n;
    OVLM_GOTO(fail, share_init(&plan->share[problem->n_phases], n_llm, problem->n_ranks, err));
    *out = plan;
    return OVLM_OK;
fail:
    ovlm_step_plan_free(plan);
    return status;
}

static void route_free(ovlm_step_route *route)
{
    ovlm_route_free(&route->route);
    free(route->place);
    route->place = NULL;
}

static void routes_free(ovlm_step_plan *plan)
{
    route_free(&plan->text);
    for (int64_t p = 0; p < plan->n_phases; p++) {
        route_free(&plan->raw[p]);
        route_free(&plan->back[p]);
        route_free(&plan->to_llm[p]);
    }
}

void ovlm_step_plan_free(ovlm_step_plan *plan)
{
    if (plan == NULL) {
        return;
    }
    routes_free(plan);
    for (int64_t p = 0; plan->share != NULL && p <= plan->n_phases; p++) {
        free(plan->share[p].rank);
        free(plan->share[p].micro);
        free(plan->share[p].loads);
    }
    free(plan->share);
    free(plan->raw);
    free(plan->back);
    free(plan->to_llm);
    free(plan->relabel);
    ovlm_sp_plan_free(plan->sequences);
    free(plan);
}

/* The balanced phases and the groups; every search gets an equal part of the time, but the groups,
 * the hardest of them, as much as SEARCHES_LLM others. */
static ovlm_status decide(const step_input *input, const ovlm_meter *clock,
                          const ovlm_budget *budget, ovlm_step_plan *plan, ovlm_arena *arena,
                          ovlm_err *err)
{
    enum { SEARCHES_LLM = 9 };
    const ovlm_step_problem *problem = input->problem;
    bool groups = problem->sequence_parallel;
    int64_t searches = groups ? SEARCHES_LLM : 1;
    int64_t names = problem->relabel == OVLM_RELABEL_NONE ? 0 : problem->n_phases + 1;
    for (int64_t p = 0; p < problem->n_phases + !groups; p++) {
        step_work work;
        int64_t left = problem->n_phases + !groups - p;
        ovlm_budget part = step_budget(clock, budget, left + names + (groups ? searches : 0));
        OVLM_TRY(step_work_init(&work, input, p, err));
        OVLM_TRY(step_share_solve(input, &work, &part, &plan->share[p], &plan->cut_short, arena,
                                  err));
        OVLM_TRY(step_share_sampled(&work, plan->n_ranks, &plan->share[p], arena, err));
    }
    if (groups) {
        ovlm_sp_problem sequences = step_sequence_problem(input);
        ovlm_budget part = step_budget(clock, budget, 1);
        if (part.time_limit_s > 0) {
            part.time_limit_s *= (double)SEARCHES_LLM / (double)(SEARCHES_LLM + names);
        }
        OVLM_TRY(ovlm_sp_solve(&sequences, &part, &plan->sequences, err));
        plan->cut_short = plan->cut_short || plan->sequences->cut_short;
    }
    return OVLM_OK;
}

/* traffic is laid out as step_traffic fills it. */
static void keep_before(ovlm_step_plan *plan, const ovlm_traffic *traffic)
{
    plan->text.before = traffic[0];
    for (int64_t p = 0; p < plan->n_phases; p++) {
        plan->raw[p].before = traffic[1 + 3 * p];
        plan->back[p].before = traffic[2 + 3 * p];
        plan->to_llm[p].before = traffic[3 + 3 * p];
    }
}

static void keep_after(ovlm_step_plan *plan, const ovlm_traffic *traffic)
{
    plan->text.after = traffic[0];
    plan->exposed_s = 0;
    for (int64_t p = 0; p < plan->n_phases; p++) {
        plan->raw[p].after = traffic[1 + 3 * p];
        plan->back[p].after = traffic[2 + 3 * p];
        plan->to_llm[p].after = traffic[3 + 3 * p];
        /* forward, and the gradients the same way back */
        plan->exposed_s += 2 * (plan->back[p].after.seconds + plan->to_llm[p].after.seconds);
    }
}

/* Routes, traffic, time and bound, from the decisions. */
static ovlm_status follow_up(const step_input *input, const step_cells *cells,
                             const step_pieces *pieces, bool relabelled, ovlm_step_plan *plan,
                             ovlm_arena *arena, ovlm_err *err)
{
    ovlm_traffic *traffic = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &traffic, 1 + 3 * plan->n_phases, err));
    OVLM_TRY(step_routes(input, cells, pieces, plan, traffic, arena, err));
    if (!relabelled) {
        keep_before(plan, traffic);
    }
    keep_after(plan, traffic);
    plan->time = plan->exposed_s;
    plan->bound = 0;
    for (int64_t p = 0; p <= plan->n_phases; p++) {
        ovlm_step_share *share = &plan->share[p];
        share->status = share->time <= share->bound * (1 + 1e-9) ? OVLM_PLAN_OPTIMAL
                                                                 : OVLM_PLAN_FEASIBLE;
        plan->time += share->time;
        plan->bound += share->bound;
    }
    plan->time += plan->sequences ? plan->sequences->time : 0;
    plan->bound += plan->sequences ? plan->sequences->bound : 0;
    return OVLM_OK;
}

ovlm_status ovlm_step_solve(const ovlm_step_problem *problem, const ovlm_budget *budget,
                            ovlm_step_plan **out, ovlm_err *err)
{
    ovlm_arena arena = {0};
    ovlm_meter clock;
    ovlm_meter_start(&clock, budget, INT64_MAX, 1);
    step_input input;
    ovlm_step_plan *plan = NULL;
    ovlm_traffic *before = NULL;
    step_cells cells;
    step_pieces *pieces = NULL;
    bool names = problem->relabel != OVLM_RELABEL_NONE;
    ovlm_status status = OVLM_OK;
    OVLM_GOTO(done, step_input_init(&input, problem, &arena, err));
    OVLM_GOTO(done, ovlm_step_plan_init(problem, &plan, err));
    OVLM_GOTO(done, decide(&input, &clock, budget, plan, &arena, err));
    OVLM_GOTO(done, step_cells_init(&cells, &input, plan, &arena, err));
    OVLM_GOTO(done, step_pieces_init(&pieces, &input, &cells, &arena, err));
    if (names) {
        OVLM_GOTO(done, OVLM_ARENA_NEW(&arena, &before, 1 + 3 * plan->n_phases, err));
        OVLM_GOTO(done, step_traffic(&input, plan, &cells, pieces, before, &arena, err));
        keep_before(plan, before);
        OVLM_GOTO(done, step_relabel(&input, &cells, pieces, &clock, budget, plan, &arena, err));
    }
    OVLM_GOTO(done, follow_up(&input, &cells, pieces, names, plan, &arena, err));
    *out = plan;
    plan = NULL;
done:
    ovlm_step_plan_free(plan);
    ovlm_arena_free(&arena);
    return status;
}

/* Decisions that came from elsewhere may say anything. */
static ovlm_status check_decisions(const step_input *input, const ovlm_step_plan *plan,
                                   ovlm_err *err)
{
    const ovlm_step_problem *problem = input->problem;
    for (int64_t p = 0; p < problem->n_phases + !problem->sequence_parallel; p++) {
        const ovlm_step_share *share = &plan->share[p];
        const char *name = p < problem->n_phases ? problem->phase[p].name : "llm";
        if (share->n_micro < 1 || share->n_micro > (share->n > 1 ? share->n : 1)) {
            return OVLM_FAIL(err, OVLM_E_ARG, "plan: %s has %lld micro-batches for %lld items",
                             name, (long long)share->n_micro, (long long)share->n);
        }
        for (int64_t i = 0; i < share->n; i++) {
            if (share->rank[i] < 0 || share->rank[i] >= plan->n_ranks || share->micro[i] < 0 ||
                share->micro[i] >= share->n_micro) {
                return OVLM_FAIL(err, OVLM_E_ARG,
                                 "plan: %s item %lld goes to rank %lld, micro-batch %lld; there "
                                 "are %lld and %lld", name, (long long)i,
                                 (long long)share->rank[i], (long long)share->micro[i],
                                 (long long)plan->n_ranks, (long long)share->n_micro);
            }
        }
    }
    if (!problem->sequence_parallel) {
        return OVLM_OK;
    }
    if (plan->sequences == NULL) {
        return OVLM_FAIL(err, OVLM_E_ARG, "plan: the groups of the language phase are missing");
    }
    ovlm_sp_problem sequences = step_sequence_problem(input);
    return ovlm_sp_plan_check(&sequences, plan->sequences, err);
}

ovlm_status ovlm_step_plan_rebuild(const ovlm_step_problem *problem, ovlm_step_plan *plan,
                                   ovlm_err *err)
{
    ovlm_arena arena = {0};
    step_input input;
    step_cells cells;
    step_pieces *pieces = NULL;
    ovlm_status status = OVLM_OK;
    OVLM_GOTO(done, step_input_init(&input, problem, &arena, err));
    OVLM_GOTO(done, check_decisions(&input, plan, err));
    for (int64_t p = 0; p < problem->n_phases + !problem->sequence_parallel; p++) {
        step_work work;
        OVLM_GOTO(done, step_work_init(&work, &input, p, err));
        OVLM_GOTO(done, step_share_measure(&work, plan->n_ranks, &plan->share[p], &arena, err));
        OVLM_GOTO(done, step_share_sampled(&work, plan->n_ranks, &plan->share[p], &arena, err));
    }
    routes_free(plan);
    OVLM_GOTO(done, step_cells_init(&cells, &input, plan, &arena, err));
    OVLM_GOTO(done, step_pieces_init(&pieces, &input, &cells, &arena, err));
    OVLM_GOTO(done, follow_up(&input, &cells, pieces, true, plan, &arena, err));
done:
    ovlm_arena_free(&arena);
    return status;
}
