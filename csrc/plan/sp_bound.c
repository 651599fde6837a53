/* sp_bound.c - entry points of the certificates. */
#include "plan/sp_bound.h"

#include <math.h>

#include "plan/sp_bound_colgen.h"
#include "plan/sp_bound_lift.h"

/* A bound this close to a plan proves it optimal. */
#define SETTLED 2e-10
enum { FIRST_NODES = 40000, SETTLING_PART = 6 };

double sp_bound_quick(const sp_model *model, const int64_t *k, int64_t n_items)
{
    sp_line_items items;
    sp_line_prices prices;
    sp_line_summarise(model, k, n_items, &items);
    return sp_line_bound(model, &items, 1e-2, 1, &prices) * sp_round_down(n_items);
}

/* Few items may be settled at once: nothing is better than the known plan.  A part of the steps may
 * go into that, no more: of a small budget prices prove more. */
static bool settled(sp_exact *exact, sp_lift *lift, double hint, ovlm_meter *meter, double *low)
{
    double below = hint * (1 - SETTLED);
    if (exact == NULL || hint == HUGE_VAL || below <= *low) {
        return false;
    }
    int64_t all = meter->work_limit;
    meter->work_limit = meter->work + (all - meter->work) / SETTLING_PART;
    sp_lift_base(lift, below);
    bool impossible = sp_exact_decide(exact, below, lift->base, lift->line_prices.theta,
                                      FIRST_NODES, meter) == SP_IMPOSSIBLE;
    meter->work_limit = all;
    *low = impossible ? below : *low;
    return impossible;
}

/* From what takes microseconds, and is done in any case, to what takes seconds: few items searched,
 * prices raised one after the other, prices from a linear program. */
static ovlm_status raise_micro(const sp_model *model, const int64_t *k, int64_t n_items,
                               double hint, ovlm_meter *meter, double *low, ovlm_arena *arena,
                               ovlm_err *err)
{
    sp_exact *exact = NULL;
    sp_lift lift;
    sp_colgen colgen;
    OVLM_TRY(sp_lift_init(&lift, model, k, n_items, arena, err));
    sp_lift_unlifted(&lift, hint, low);
    if (*low >= hint || ovlm_meter_look(meter)) {
        return OVLM_OK;
    }
    if (n_items <= SP_EXACT_ITEMS) {
        OVLM_TRY(sp_exact_init(&exact, model, lift.s, n_items, arena, err));
    }
    if (settled(exact, &lift, hint, meter, low)) {
        return OVLM_OK;
    }
    sp_lift_raise(&lift, hint, meter, low);
    if (*low < hint && !ovlm_meter_look(meter)) {
        OVLM_TRY(sp_colgen_init(&colgen, model, k, n_items, exact, arena, err));
        sp_colgen_raise(&colgen, hint, meter, low);
    }
    return OVLM_OK;
}

ovlm_status sp_bound_micro(const sp_model *model, const int64_t *k, int64_t n_items, double hint,
                           ovlm_meter *meter, double *bound_s, ovlm_arena *arena, ovlm_err *err)
{
    sp_line_items items;
    sp_line_prices prices;
    sp_line_summarise(model, k, n_items, &items);
    double low = sp_line_bound(model, &items, 1e-3, 3, &prices);
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    ovlm_status status = OVLM_OK;
    if (n_items > 1 && low > 0 && low < hint) {
        status = raise_micro(model, k, n_items, hint, meter, &low, arena, err);
    }
    ovlm_arena_rewind(arena, mark);
    *bound_s = low * sp_round_down(n_items);
    return status;
}

ovlm_status ovlm_sp_bound(const ovlm_sp_problem *problem, const ovlm_budget *budget,
                          double *bound_s, ovlm_err *err)
{
    ovlm_arena arena = {0};
    ovlm_meter meter;
    sp_model model;
    ovlm_meter_start(&meter, budget, INT64_MAX, 4096);
    *bound_s = 0;
    ovlm_status status;
    OVLM_GOTO(done, sp_model_init(&model, problem, &arena, err));
    OVLM_GOTO(done, sp_bound_step(&model, problem->micro_batches, HUGE_VAL, &meter, bound_s, &arena,
                                  err));
    if (meter.interrupted) {
        status = OVLM_FAIL(err, OVLM_E_INTERRUPTED, "interrupted");
    }
done:
    ovlm_arena_free(&arena);
    return status;
}
