/* sp_bound.c - entry points of the certificates. */
#include "plan/sp_bound.h"

#include <math.h>

#include "plan/sp_bound_colgen.h"

double sp_bound_quick(const sp_model *model, const int64_t *k, int64_t n_items)
{
    sp_line_items items;
    sp_line_prices prices;
    sp_line_summarise(model, k, n_items, &items);
    return sp_line_bound(model, &items, 1e-2, 1, &prices) * sp_round_down(n_items);
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
    if (n_items > 1 && low > 0 && low < hint && !ovlm_meter_look(meter)) {
        sp_colgen colgen;
        OVLM_GOTO(done, sp_colgen_init(&colgen, model, k, n_items, arena, err));
        sp_colgen_raise(&colgen, hint, meter, &low);
    }
done:
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
