/* sp_bound_price.c - a knapsack on a grid that never underestimates. */
#include "plan/sp_bound_price.h"

#include <math.h>
#include <string.h>

/* Below 1/SMALL of a group an item counts as filling. */
enum { SMALL = 24, MAX_PASSES = 768 };

ovlm_status sp_pricer_init(sp_pricer *pricer, const sp_model *model, const double *s, int64_t n,
                           ovlm_arena *arena, ovlm_err *err)
{
    int64_t passes = n < MAX_PASSES ? n : MAX_PASSES;
    *pricer = (sp_pricer){.model = model, .n = n, .s = s, .max_passes = passes};
    pricer->cells = n <= 128 ? 2048 : 1024;
    int64_t row = pricer->cells + 1;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &pricer->weight, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &pricer->value, row, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &pricer->took, passes * row, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &pricer->pass_item, passes, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &pricer->pass_cells, passes, err));
    return OVLM_ARENA_NEW(arena, &pricer->pass_many, passes, err);
}

/* Fills weight[]; -1 where the item cannot be in such a group.  Returns the first item that can:
 * lengths descend, so all later ones can, too. */
static int64_t weigh(sp_pricer *pricer, int64_t j, double makespan, double theta)
{
    const sp_model *model = pricer->model;
    double limit = makespan * (1 + 1e-12), cap = (double)model->cap[j];
    double per_time = theta / makespan, per_token = cap > 0 ? (1 - theta) / cap : 0;
    int64_t first = 0;
    while (first < pricer->n) {
        double s = pricer->s[first];
        if (s <= cap && s * (model->quad[j] * s + model->lin[j]) <= limit) {
            break;
        }
        first++;
    }
    for (int64_t i = first; i < pricer->n; i++) {
        double s = pricer->s[i];
        pricer->weight[i] = s * (per_time * (model->quad[j] * s + model->lin[j]) + per_token);
    }
    return first;
}

/* rho: the best price per weight of small items, at least the worst of all; *filler attains it. */
static double filling_ratio(const sp_pricer *pricer, const double *pi, int64_t first,
                            int64_t *filler)
{
    double small = 0, least = HUGE_VAL;
    int64_t small_i = -1, least_i = -1;
    for (int64_t i = first; i < pricer->n; i++) {
        double weight = pricer->weight[i];
        double ratio = weight > 0 ? pi[i] / weight : (pi[i] > 0 ? HUGE_VAL : 0);
        if (weight * SMALL < 1 && ratio > small) {
            small = ratio;
            small_i = i;
        }
        if (ratio < least) {
            least = ratio;
            least_i = i;
        }
    }
    *filler = small >= least ? small_i : least_i;
    return fmax(small, least);
}

/* Collects the passes: items with a premium, equal sizes together.  Where as many items share a
 * size as could fit, one pass with the best of them stands for all. */
static int64_t collect(sp_pricer *pricer, const double *pi, int64_t first, double rho)
{
    int64_t passes = 0, cells = pricer->cells;
    for (int64_t i = first; i < pricer->n;) {
        int64_t size = (int64_t)((double)cells * pricer->weight[i] * (1 - 1e-12));
        int64_t count = 0, best = i, end = i, from = passes;
        double best_gain = 0;
        for (; end < pricer->n; end++) {
            double weight = pricer->weight[end];
            if ((int64_t)((double)cells * weight * (1 - 1e-12)) != size) {
                break;
            }
            double gain = pi[end] - rho * weight;
            if (gain <= 0) {
                continue;
            }
            if (gain > best_gain) {
                best = end;
                best_gain = gain;
            }
            if (passes < pricer->max_passes) {
                pricer->pass_item[passes] = end;
                pricer->pass_cells[passes] = size;
                pricer->pass_many[passes++] = 0;
            } else {
                return -1;
            }
            count++;
        }
        if (size > 0 && count > 1 && count * size >= cells) {
            passes = from;
            pricer->pass_item[passes] = best;
            pricer->pass_cells[passes] = size;
            pricer->pass_many[passes++] = 1;
        }
        i = end;
    }
    return passes;
}

/* Also built for 256-bit vectors where the loader can choose: the same sums, far sooner. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif

WIDE static void relax(const float *restrict from, float *restrict to, uint8_t *restrict took,
                       int64_t count, float gain)
{
    for (int64_t c = 0; c < count; c++) {
        float with = from[c] + gain;
        took[c] = with > to[c];
        to[c] = with > to[c] ? with : to[c];
    }
}

/* One pass of the knapsack, in stretches no longer than the item, so that what is read is not what
 * is written: from the top down, or from the bottom up where the item may be taken again.  Single
 * precision: an item with a premium weighs at least 1/SMALL, hence no value is a sum of more than
 * SMALL + 1 terms, and SP_PRICE_MARGIN covers their rounding (each at most 2^-24 relative). */
static void run_pass(const sp_pricer *pricer, int64_t pass, float gain)
{
    int64_t size = pricer->pass_cells[pass], row = pricer->cells + 1;
    float *value = pricer->value;
    uint8_t *took = pricer->took + pass * row;
    if (size == 0) { /* a premium by rounding alone */
        for (int64_t g = 0; g < row; g++) {
            value[g] += gain;
        }
        memset(took, 1, (size_t)row);
        return;
    }
    memset(took, 0, (size_t)size);
    bool many = pricer->pass_many[pass] != 0;
    for (int64_t done = 0; done < row - size;) {
        int64_t count = size < row - size - done ? size : row - size - done;
        int64_t at = many ? size + done : row - done - count;
        relax(value + at - size, value + at, took + at, count, gain);
        done += count;
    }
}

static void push(sp_pattern *pattern, int64_t item, double amount)
{
    if (pattern->n < SP_PATTERN_ITEMS) {
        pattern->item[pattern->n] = item;
        pattern->amount[pattern->n++] = amount;
    }
}

/* The way back through the passes, then filling with the item of ratio rho. */
void sp_price_trace(const sp_pricer *pricer, const sp_price *price, double x, double room,
                    sp_pattern *pattern)
{
    int64_t row = pricer->cells + 1, g = (int64_t)((double)pricer->cells * x);
    pattern->n = 0;
    for (int64_t pass = pricer->passes - 1; pass >= 0; pass--) {
        const uint8_t *took = pricer->took + pass * row;
        while (took[g]) {
            g -= pricer->pass_cells[pass];
            room -= pricer->weight[pricer->pass_item[pass]];
            push(pattern, pricer->pass_item[pass], 1);
            if (!pricer->pass_many[pass]) {
                break;
            }
        }
    }
    if (price->filler >= 0 && pricer->weight[price->filler] > 0 && room > 0) {
        push(pattern, price->filler, room / pricer->weight[price->filler]);
    }
}

/* No weight at all, or too many different items: everything that is allowed, together. */
static void price_all(sp_pricer *pricer, const double *pi, int64_t first, sp_price *price)
{
    double total = 0;
    for (int64_t i = first; i < pricer->n; i++) {
        total += pi[i];
    }
    for (int64_t g = 0; g <= pricer->cells; g++) {
        pricer->value[g] = (float)(total / price->unit);
    }
    price->rho = 0;
    pricer->passes = 0;
}

void sp_price_table(sp_pricer *pricer, const double *pi, int64_t j, double makespan, double theta,
                    sp_price *price)
{
    int64_t first = weigh(pricer, j, makespan, theta);
    *price = (sp_price){.unit = (double)pricer->model->degree[j], .filler = -1};
    memset(pricer->value, 0, (size_t)(pricer->cells + 1) * sizeof *pricer->value);
    pricer->spent += pricer->n;
    pricer->passes = 0;
    if (first >= pricer->n) {
        return;
    }
    price->rho = filling_ratio(pricer, pi, first, &price->filler);
    int64_t passes = price->rho < HUGE_VAL ? collect(pricer, pi, first, price->rho) : -1;
    if (passes < 0) {
        price->filler = -1;
        price_all(pricer, pi, first, price);
        return;
    }
    for (int64_t pass = 0; pass < passes; pass++) {
        int64_t i = pricer->pass_item[pass];
        run_pass(pricer, pass, (float)((pi[i] - price->rho * pricer->weight[i]) / price->unit));
    }
    pricer->spent += passes * pricer->cells;
    pricer->passes = passes;
}
