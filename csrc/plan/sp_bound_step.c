/* sp_bound_step.c - lower bound on the time of a whole step. */
#include <math.h>

#include "plan/sp_bound.h"
#include "plan/sp_bound_batches.h"
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
    /* Tokens per GPU: the best degree's.  Exact in 64 bits where it matters: caps stay below 2^53. */
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
        status = sp_bound_micro(model, k, model->n, hint - model->fixed, meter, bound_s, arena, err);
        *bound_s = (*bound_s + model->fixed) * sp_round_down(0);
    }
    ovlm_arena_rewind(arena, mark);
    return status;
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
    double low = (double)least * model->fixed + work_per_gpu(model);
    double typical = work_per_gpu(model) / (double)least;
    double longest = fmin(hint - (double)least * model->fixed, serial_time(model));
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    ovlm_status status = OVLM_OK;
    if (low > 0 && low < hint && longest > 0 && !ovlm_meter_look(meter)) {
        sp_batches batches;
        OVLM_GOTO(done, sp_batches_init(&batches, model, typical, longest, arena, err));
        sp_batches_raise(&batches, least, most, hint, meter, &low);
    }
done:
    ovlm_arena_rewind(arena, mark);
    *bound_s = low * sp_round_down(model->n);
    return status;
}
