/* sp_solve.c - plan_sequences: bound, start, search, stronger bound, plan, check. */
#include <math.h>

#include "plan/sp_bound.h"
#include "plan/sp_flex.h"
#include "plan/sp_levels.h"
#include "plan/sp_plan.h"
#include "plan/sp_warm.h"

/* About 10 us of work between looks at the clock. */
enum { STRIDE = 16 };

#define DEFAULT_WORK 4000000
#define OPTIMAL_GAP 1e-9

/* Seconds per sequence to write a plan down, check it and hand it over; at most half of the limit
 * is set aside for that. */
#define FINISH_S 1e-6

/* Shares of what is left of the budget: a first bound; then search and bound in turns, so that each
 * knows what the other found; the search has the rest. */
#define FIRST_BOUND 0.0 /* only what takes microseconds */
#define BOUND_AT_LEAST 0.08 /* of all steps, where the shares below come to less */
#define LEVELS 0.6 /* where there are several micro-batches */
typedef struct shares {
    double search, bound;
} shares;
static const shares usual = {0.6, 0.4};
/* Where one micro-batch is all there is, the group solver has done most of the search. */
static const shares alone = {0.15, 0.8};
/* Where makespans are told apart, a second proves more than the search finds in it. */
static const shares told_apart = {0.2, 0.75};

typedef struct solving {
    const ovlm_sp_problem *problem;
    sp_model model;
    sp_purse purse;
    sp_draft best;
    double bound;
    int64_t reserved; /* steps of the bound, whatever the searches before it took beyond theirs */
    ovlm_arena arena;
} solving;

static bool is_optimal(double time, double bound)
{
    return isfinite(time) && time - bound <= OPTIMAL_GAP * time;
}

static ovlm_status raise_bound(solving *s, double share, ovlm_err *err)
{
    double bound = 0;
    ovlm_meter part = sp_purse_part(&s->purse, share);
    if (share > 0 && part.work_limit < s->reserved) {
        part.work_limit = s->reserved;
    }
    OVLM_TRY(sp_bound_step(&s->model, s->problem->micro_batches, s->best.time_s, &part, &bound,
                           &s->arena, err));
    (void)sp_purse_absorb(&s->purse, &part);
    s->bound = bound > s->bound ? bound : s->bound;
    return OVLM_OK;
}

/* ------------------------------------------------------------------ policies ------------- */

/* Keeps the draft where its plan will be better, were it by one bit. */
static ovlm_status take(solving *s, const sp_draft *draft, ovlm_err *err)
{
    double time_s;
    if (!isfinite(draft->time_s)) {
        return OVLM_OK;
    }
    OVLM_TRY(sp_plan_time(&s->model, draft, &time_s, &s->arena, err));
    if (time_s < s->best.time_s) {
        sp_draft_copy(&s->best, draft);
        s->best.time_s = time_s;
    }
    return OVLM_OK;
}

static ovlm_status take_all(solving *s, const sp_chunked *from, ovlm_err *err)
{
    for (int64_t i = 0; i < from->n_drafts; i++) {
        OVLM_TRY(take(s, &from->draft[i], err));
    }
    return OVLM_OK;
}

static ovlm_status start(solving *s, ovlm_sp_policy policy, sp_chunked *chunked, ovlm_err *err)
{
    OVLM_TRY(sp_policy_start(&s->model, policy, s->problem->micro_batches, chunked, &s->purse,
                             &s->arena, err));
    return take_all(s, chunked, err);
}

/* As many micro-batches as are best for some degree; the best such step also joins the drafts. */
static ovlm_status start_by_degrees(solving *s, ovlm_sp_policy policy, sp_chunked *drafts,
                                    ovlm_err *err)
{
    sp_draft *draft = &drafts->draft[drafts->n_drafts];
    int64_t order[SP_DRAFTS];
    OVLM_TRY(sp_draft_init(draft, s->model.n, &s->arena, err));
    OVLM_TRY(sp_policy_degrees(&s->model, policy, s->problem->micro_batches, draft, &s->purse,
                               &s->arena, err));
    drafts->n_drafts += isfinite(draft->time_s);
    sp_policy_order(drafts, order);
    return take(s, draft, err);
}

/* Sorted chunks, and the group solver in each: a policy, and what flex does first. */
static ovlm_status search_chunks(solving *s, sp_chunked *chunked, ovlm_err *err)
{
    OVLM_TRY(start(s, OVLM_SP_CHUNKED, chunked, err));
    OVLM_TRY(sp_policy_chunked(&s->model, chunked, s->problem->seed, &s->purse, &s->arena, err));
    return take_all(s, chunked, err);
}

static ovlm_status solve_chunked(solving *s, ovlm_err *err)
{
    sp_chunked chunked;
    OVLM_TRY(search_chunks(s, &chunked, err));
    return is_optimal(s->best.time_s, s->bound) ? OVLM_OK : raise_bound(s, 1, err);
}

/* All that the other policies do, so that flex is never worse than they (of what the clock leaves
 * time for); chunks of one degree each are the homogeneous ones, unless that policy has to use more
 * micro-batches, and those are no worse than the static ones. */
static ovlm_status solve_others(solving *s, sp_chunked *starts, ovlm_err *err)
{
    sp_chunked other;
    OVLM_TRY(search_chunks(s, starts, err));
    if (starts->mixed && !sp_purse_expired(&s->purse)) {
        OVLM_TRY(start(s, OVLM_SP_HOMOGENEOUS, &other, err));
    }
    return sp_purse_expired(&s->purse) ? OVLM_OK
                                       : start_by_degrees(s, OVLM_SP_HOMOGENEOUS, starts, err);
}

static ovlm_status solve_flex(solving *s, ovlm_err *err)
{
    ovlm_status status = OVLM_OK;
    sp_flex *flex = NULL;
    sp_chunked starts;
    sp_draft warm, found;
    OVLM_TRY(sp_draft_init(&warm, s->model.n, &s->arena, err));
    OVLM_TRY(sp_draft_init(&found, s->model.n, &s->arena, err));
    if (s->problem->warm_start != NULL) {
        OVLM_TRY(sp_warm_start(&s->model, s->problem, &warm, &s->arena, err));
    }
    OVLM_TRY(solve_others(s, &starts, err));
    OVLM_TRY(take(s, &warm, err));
    if (isfinite(s->best.time_s) && ovlm_meter_look(&s->purse.meter)) {
        /* no search: not even what it would start from */
        return is_optimal(s->best.time_s, s->bound) ? OVLM_OK : raise_bound(s, 1, err);
    }
    OVLM_TRY(sp_levels_improve(&s->model, &starts, s->problem->micro_batches, LEVELS,
                               s->problem->seed, &s->purse, &s->arena, err));
    OVLM_TRY(take_all(s, &starts, err));
    sp_draft_copy(&found, &s->best);
    OVLM_GOTO(done, sp_flex_open(&flex, &s->model, s->problem, &starts, &warm, err));
    const shares *part = sp_bound_is_by_cases(&s->model) ? &told_apart : &usual;
    part = s->best.n_micro == 1 ? &alone : part;
    for (int turn = 0; turn < 2 && !is_optimal(s->best.time_s, s->bound); turn++) {
        double share = turn ? 1 : part->search;
        OVLM_GOTO(done, sp_flex_run(flex, s->bound * (1 + OPTIMAL_GAP), share, &s->purse, &found,
                                    err));
        OVLM_GOTO(done, take(s, &found, err));
        if (turn == 0 && !is_optimal(s->best.time_s, s->bound)) {
            OVLM_GOTO(done, raise_bound(s, part->bound, err));
        }
    }
done:
    sp_flex_close(flex);
    return status;
}

/* ------------------------------------------------------------------ answer --------------- */

static ovlm_status fail_without_plan(const solving *s, ovlm_err *err)
{
    if (s->purse.meter.interrupted) {
        return OVLM_FAIL(err, OVLM_E_INTERRUPTED, "interrupted");
    }
    if (!isfinite(s->bound)) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "micro_batches = %lld is too few: no plan exists; leave it out or ask for "
                         "more", (long long)s->problem->micro_batches);
    }
    return OVLM_FAIL(err, OVLM_E_UNDECIDED,
                     "undecided: no plan with micro_batches = %lld was found within the limit and "
                     "none was ruled out; raise the limit, or ask for more micro-batches",
                     (long long)s->problem->micro_batches);
}

/* The draft as a plan with its certificate, verified. */
static ovlm_status finish(solving *s, ovlm_sp_plan **out, ovlm_err *err)
{
    ovlm_sp_plan *plan = NULL;
    OVLM_TRY(sp_plan_assemble(&s->model, &s->best, s->problem->micro_batches, &plan, &s->arena,
                              err));
    /* A bound above the time by rounding alone is the time itself; by more, the check refuses. */
    plan->bound = s->bound;
    if (plan->bound > plan->time && plan->bound <= plan->time * (1 + OPTIMAL_GAP)) {
        plan->bound = plan->time;
    }
    plan->status = is_optimal(plan->time, plan->bound) ? OVLM_PLAN_OPTIMAL : OVLM_PLAN_FEASIBLE;
    plan->cut_short = s->purse.cut_short;
    plan->work = s->purse.meter.work;
    ovlm_err why = {0};
    ovlm_status checked = ovlm_sp_plan_check(s->problem, plan, &why);
    if (checked != OVLM_OK) {
        ovlm_sp_plan_free(plan);
        if (checked == OVLM_E_NOMEM) {
            return OVLM_FAIL(err, checked, "%s", why.message);
        }
        return OVLM_FAIL(err, OVLM_E_INTERNAL, "a bug: the plan failed its check: %s",
                         why.message);
    }
    *out = plan;
    return OVLM_OK;
}

static ovlm_status search(solving *s, ovlm_err *err)
{
    sp_chunked chunked = {0};
    s->reserved = (int64_t)(BOUND_AT_LEAST * (double)s->purse.meter.work_limit);
    OVLM_TRY(raise_bound(s, FIRST_BOUND, err));
    if (!isfinite(s->bound)) {
        return fail_without_plan(s, err);
    }
    switch (s->problem->policy) {
    case OVLM_SP_STATIC:
    case OVLM_SP_HOMOGENEOUS:
        if (s->problem->policy == OVLM_SP_HOMOGENEOUS) {
            OVLM_TRY(start(s, OVLM_SP_HOMOGENEOUS, &chunked, err));
        }
        OVLM_TRY(start_by_degrees(s, s->problem->policy, &chunked, err));
        OVLM_TRY(raise_bound(s, 1, err));
        break;
    case OVLM_SP_CHUNKED: OVLM_TRY(solve_chunked(s, err)); break;
    default: OVLM_TRY(solve_flex(s, err)); break;
    }
    bool none = !isfinite(s->best.time_s) || !isfinite(s->bound);
    return none || s->purse.meter.interrupted ? fail_without_plan(s, err) : OVLM_OK;
}

ovlm_status ovlm_sp_solve(const ovlm_sp_problem *problem, const ovlm_budget *budget,
                          ovlm_sp_plan **plan, ovlm_err *err)
{
    ovlm_status status = OVLM_OK;
    solving s = {.problem = problem};
    *plan = NULL;
    sp_purse_open(&s.purse, budget, DEFAULT_WORK, STRIDE);
    double left_s = ovlm_meter_left_s(&s.purse.meter);
    if (left_s < HUGE_VAL) {
        s.purse.meter.deadline_s -= fmin(FINISH_S * (double)problem->n, 0.5 * left_s);
    }
    OVLM_GOTO(done, sp_model_init(&s.model, problem, &s.arena, err));
    OVLM_GOTO(done, sp_draft_init(&s.best, problem->n, &s.arena, err));
    sp_draft_begin(&s.best);
    if (problem->n > 0) {
        s.best.time_s = HUGE_VAL;
        OVLM_GOTO(done, search(&s, err));
    }
    OVLM_GOTO(done, finish(&s, plan, err));
done:
    ovlm_arena_free(&s.arena);
    return status;
}
