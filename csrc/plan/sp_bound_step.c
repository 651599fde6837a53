/* sp_bound_step.c - lower bound on the time of a whole step. */
#include <math.h>

#include "plan/sp_bound.h"
#include "plan/sp_bound_batches.h"
#include "plan/sp_bound_cases.h"
#include "plan/sp_bound_line.h"

/* GPU-seconds of all items, each on the degree where that is least, over N GPUs: no set of
 * micro-batches has a smaller sum of makespans. */
static double work_per_gpu(const sp_model *model)
{
    double total = 0;
    for (int64_t k = 0; k < model->n; k++) {
        double least = HUGE_VAL;
        for (int64_t j = model->min_j[k]; j < model->D; j++) {
            least = fmin(least, sp_item_work(model, k, j));
        }
        total += least;
    }
    return total / (double)model->n_gpus * sp_round_down(model->n);
}

/* Least number of micro-batches whose memory holds all tokens. */
static int64_t least_micro(const sp_model *model)
{
    /* Tokens per GPU: the best degree's.  Exact in 64 bits where it matters: caps stay below 2^53.
     */
    double per_gpu = 0;
    for (int64_t j = 0; j < model->D; j++) {
        per_gpu = fmax(per_gpu, (double)model->cap[j] / (double)model->degree[j]);
    }
    double room = per_gpu * (double)model->n_gpus;
    int64_t least = 1;
    while (least < model->n && (double)least * room < model->sum_s[model->n] * (1 - 1e-12)) {
        double next = model->sum_s[model->n] * (1 - 1e-12) / room;
        least = next > (double)least + 1 ? (int64_t)next : least + 1;
    }
    return least;
}

/* No makespan needs to be longer: one micro-batch's longest useful one. */
static double serial_time(const sp_model *model)
{
    double longest = 0;
    for (int64_t j = 0; j < model->D; j++) {
        longest = fmax(longest, model->quad[j] * model->sum_s2[model->n] +
                                    model->lin[j] * model->sum_s[model->n]);
    }
    return longest * (1 + 1e-9);
}

/* All items in one micro-batch. */
static ovlm_status bound_single(const sp_model *model, double hint, ovlm_meter *meter,
                                double *bound_s, ovlm_arena *arena, ovlm_err *err)
{
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    int64_t *k = NULL;
    ovlm_status status = OVLM_ARENA_NEW(arena, &k, model->n, err);
    for (int64_t i = 0; status == OVLM_OK && i < model->n; i++) {
        k[i] = i;
    }
    if (status == OVLM_OK) {
        status =
            sp_bound_micro(model, k, model->n, hint - model->fixed, meter, bound_s, arena, err);
        *bound_s = (*bound_s + model->fixed) * sp_round_down(0);
    }
    ovlm_arena_rewind(arena, mark);
    return status;
}

/* Raises *low by evaluations with 0 to 7 giants, and for each number of them a search for the price
 * of memory: the bound is a concave function of it. */
static ovlm_status raise_by_batches(const sp_model *model, int64_t least, int64_t most, double hint,
                                    ovlm_meter *meter, double *low, ovlm_arena *arena,
                                    ovlm_err *err)
{
    int64_t all = sp_batches_giants(model);
    double typical = work_per_gpu(model) / (double)least, price = 0;
    double longest = fmin(hint - (double)least * model->fixed, serial_time(model));
    double step = 0.5 * model->fixed * (double)least / model->sum_s[model->n];
    for (int64_t giants = all < 3 ? all : 3; longest > 0;
         giants = giants + 2 < all ? giants + 2 : all) {
        ovlm_arena_mark mark = ovlm_arena_save(arena);
        sp_batches batches;
        OVLM_TRY(sp_batches_init(&batches, model, giants, typical, longest, arena, err));
        double best = 0, width = giants == all && all > 3 ? step / 4 : step;
        bool stop = false;
        for (int tries = 0; tries < 12 && !stop && *low < hint; tries++) {
            /* First the price that was best with fewer giants, then steps around it. */
            double trial = tries == 0 ? price : price + width;
            double proved = trial < 0 ? 0 : sp_batches_bound(&batches, trial, least, most);
            if (proved > best) {
                best = proved;
                price = trial;
                width *= tries == 0 ? 1 : 1.5;
            } else {
                width *= -0.5;
            }
            /* Makespans above `longest` make a step at least as long as the hint. */
            *low = fmin(fmax(*low, proved), hint);
            stop = ovlm_meter_spend(meter, sp_batches_steps(&batches));
        }
        ovlm_arena_rewind(arena, mark);
        if (stop || giants == all || *low >= hint) {
            break;
        }
    }
    return OVLM_OK;
}

/* The longest sequence alone, at its fastest: some micro-batch lasts that long. */
static double longest_item_s(const sp_model *model)
{
    double least = HUGE_VAL;
    for (int64_t j = model->min_j[0]; j < model->D; j++) {
        least = fmin(least, sp_item_time(model, 0, j));
    }
    return least;
}

/* One micro-batch may hold everything: then either it does, or `fixed` is paid at least twice. */
static ovlm_status raise_by_single(const sp_model *model, double sum_s, double hint,
                                   ovlm_meter *meter, double *low, ovlm_arena *arena,
                                   ovlm_err *err)
{
    double several = 2 * model->fixed + sum_s, single = 0;
    OVLM_TRY(bound_single(model, fmin(hint, several), meter, &single, arena, err));
    *low = fmax(*low, fmin(several, single));
    return OVLM_OK;
}

/* Without giants: those are told apart one by one in place of makespans. */
bool sp_bound_is_by_cases(const sp_model *model)
{
    return sp_batches_giants(model) == 0;
}

ovlm_status sp_bound_step(const sp_model *model, int64_t n_micro, double hint, ovlm_meter *meter,
                          double *bound_s, ovlm_arena *arena, ovlm_err *err)
{
    *bound_s = 0;
    if (model->n == 0) {
        return OVLM_OK;
    }
    int64_t least = least_micro(model), most = n_micro > 0 ? n_micro : model->n;
    if (most < least) {
        *bound_s = HUGE_VAL;
        return OVLM_OK;
    }
    if (most == 1) {
        return bound_single(model, hint, meter, bound_s, arena, err);
    }
    double sum_s = fmax(work_per_gpu(model), longest_item_s(model));
    double low = (double)least * model->fixed + sum_s;
    if (least == 1) {
        OVLM_TRY(raise_by_single(model, sum_s, hint, meter, &low, arena, err));
    }
    if (low > 0 && low < hint && !ovlm_meter_look(meter)) {
        OVLM_TRY(raise_by_batches(model, least, most, hint, meter, &low, arena, err));
    }
    if (sp_bound_is_by_cases(model) && low > 0 && low < hint && !ovlm_meter_look(meter)) {
        double mean = work_per_gpu(model) / (double)least;
        double longest = fmin(hint - (double)least * model->fixed, serial_time(model));
        OVLM_TRY(sp_cases_raise(model, least, most, mean, longest, hint, meter, &low, arena, err));
    }
    *bound_s = low * sp_round_down(model->n);
    return OVLM_OK;
}
