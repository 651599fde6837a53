/* cost.c - what a set of items costs on a rank, and a set of sequences on a group. */
#include "base/status.h"

#include <math.h>

/* A coefficient must be finite and >= 0. */
static ovlm_status check_coefficient(const char *name, double value, ovlm_err *err)
{
    if (!isfinite(value) || value < 0) {
        return OVLM_FAIL(err, OVLM_E_ARG, "cost.%s must be finite and >= 0; got %g", name, value);
    }
    return OVLM_OK;
}

ovlm_status ovlm_batch_cost_check(const ovlm_batch_cost *cost, ovlm_err *err)
{
    OVLM_TRY(check_coefficient("linear", cost->linear, err));
    OVLM_TRY(check_coefficient("quadratic", cost->quadratic, err));
    OVLM_TRY(check_coefficient("padded_linear", cost->padded_linear, err));
    OVLM_TRY(check_coefficient("padded_quadratic", cost->padded_quadratic, err));
    OVLM_TRY(check_coefficient("per_item", cost->per_item, err));
    OVLM_TRY(check_coefficient("fixed", cost->fixed, err));
    return OVLM_OK;
}

double ovlm_batch_cost_eval(const ovlm_batch_cost *cost, int64_t n, double sum, double sum_q,
                            double max)
{
    if (n == 0) {
        return 0.0;
    }
    double count = (double)n;
    return cost->fixed + cost->per_item * count + cost->linear * sum + cost->quadratic * sum_q +
           count * max * (cost->padded_linear + cost->padded_quadratic * max);
}

double ovlm_batch_cost_load(const ovlm_batch_cost *cost, int64_t n, const int64_t *lengths,
                            const double *squares)
{
    double sum = 0, sum_q = 0, max = 0;
    for (int64_t i = 0; i < n; i++) {
        double length = (double)lengths[i];
        sum += length;
        sum_q += squares == NULL ? length * length : squares[i];
        max = length > max ? length : max;
    }
    return ovlm_batch_cost_eval(cost, n, sum, sum_q, max);
}

ovlm_sequence_rates ovlm_sequence_cost_rates(const ovlm_sequence_cost *cost, int64_t j)
{
    int64_t degree = cost->degree[j], heads = cost->heads;
    ovlm_sequence_rates rates = {1 / (double)degree, cost->linear + cost->comm[j]};
    if (heads > 0) {
        int64_t across = degree < heads ? degree : heads;
        while (degree % across != 0) {
            across--;
        }
        int64_t row_n = degree / across, per_gpu = (heads - 1) / across + 1;
        double rows = (double)row_n;
        rates.share = (double)per_gpu / (double)heads;
        rates.share *= (2 * rows - 1) / (rows * rows); /* 1 for one row */
        rates.per_token += cost->ring * (rows - 1);
    }
    return rates;
}

double ovlm_sequence_cost_time(const ovlm_sequence_cost *cost, int64_t n, const int64_t *lengths,
                               int64_t j)
{
    if (n == 0) {
        return 0.0;
    }
    double d = (double)cost->degree[j], sum = 0, sum_2 = 0;
    ovlm_sequence_rates rates = ovlm_sequence_cost_rates(cost, j);
    for (int64_t i = 0; i < n; i++) {
        double length = (double)lengths[i];
        sum += length;
        sum_2 += length * length;
    }
    /* FlexSP 2.2, T_comp + T_comm */
    return cost->fixed + cost->quadratic * sum_2 * rates.share + rates.per_token * sum / d;
}

enum { RING_HEADS_MOST = 1 << 20 }; /* divisors up to them are tried one by one */

static ovlm_status check_degrees(const ovlm_sequence_cost *cost, ovlm_err *err)
{
    if (cost->degree_n < 1) {
        return OVLM_FAIL(err, OVLM_E_ARG, "cost.comm must name at least one degree");
    }
    for (int64_t i = 0; i < cost->degree_n; i++) {
        int64_t degree = cost->degree[i];
        if (degree < 1 || (i > 0 && degree <= cost->degree[i - 1])) {
            return OVLM_FAIL(err, OVLM_E_ARG,
                             "degrees must be positive and ascending; got %lld at position %lld",
                             (long long)degree, (long long)i);
        }
        if (cost->heads > 0 && degree > cost->heads && !cost->rings) {
            return OVLM_FAIL(err, OVLM_E_ARG,
                             "degree %lld is above heads = %lld: a head cannot be split; "
                             "leave that degree out, or say what a ring costs",
                             (long long)degree, (long long)cost->heads);
        }
        OVLM_TRY(check_coefficient("comm", cost->comm[i], err));
    }
    return OVLM_OK;
}

ovlm_status ovlm_sequence_cost_check(const ovlm_sequence_cost *cost, ovlm_err *err)
{
    OVLM_TRY(check_coefficient("quadratic", cost->quadratic, err));
    OVLM_TRY(check_coefficient("linear", cost->linear, err));
    OVLM_TRY(check_coefficient("fixed", cost->fixed, err));
    OVLM_TRY(check_coefficient("ring", cost->ring, err));
    OVLM_TRY(check_coefficient("memory_per_token", cost->memory_per_token, err));
    OVLM_TRY(check_coefficient("memory_fixed", cost->memory_fixed, err));
    if (isnan(cost->memory_limit) || cost->memory_limit < 0) {
        return OVLM_FAIL(err, OVLM_E_ARG, "cost.memory_limit must be >= 0 (inf = no limit); got %g",
                         cost->memory_limit);
    }
    if (cost->heads < 0) {
        return OVLM_FAIL(err, OVLM_E_ARG, "cost.heads must be >= 0 (0 = not modelled); got %lld",
                         (long long)cost->heads);
    }
    if (cost->rings && cost->heads > RING_HEADS_MOST) {
        return OVLM_FAIL(err, OVLM_E_ARG, "cost.heads must be at most %d with rings; got %lld",
                         (int)RING_HEADS_MOST, (long long)cost->heads);
    }
    return check_degrees(cost, err);
}
