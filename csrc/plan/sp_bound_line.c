/* sp_bound_line.c - linear relaxation of one micro-batch by its Lagrangian. */
#include "plan/sp_bound_line.h"

#include <math.h>
#include <string.h>

/* A block k[from..to-1] becomes its two ends: the weights keep tokens and squares,
 *   w_long + w_short = sum s,   w_long*long + w_short*short = sum s^2,
 * and are summed from non-negative terms, so that nothing cancels. */
static void add_block(const sp_model *model, const int64_t *k, int64_t from, int64_t to,
                      sp_line_items *items)
{
    int64_t long_s = model->s[k[from]], short_s = model->s[k[to - 1]];
    double w_long = 0, w_short = 0, width = (double)(long_s - short_s);
    for (int64_t i = from; i < to; i++) {
        int64_t s = model->s[k[i]];
        double part = width > 0 ? (double)(s - short_s) / width : 1;
        w_long += (double)s * part;
        w_short += width > 0 ? (double)s * ((double)(long_s - s) / width) : 0;
    }
    int64_t p = items->n_points;
    items->s[p] = (double)long_s;
    items->tokens[p] = w_long;
    items->allow_s[p++] = short_s;
    if (width > 0) {
        items->s[p] = (double)short_s;
        items->tokens[p] = w_short;
        items->allow_s[p++] = short_s;
    }
    items->n_points = p;
}

void sp_line_summarise(const sp_model *model, const int64_t *k, int64_t n_items,
                       sp_line_items *items)
{
    int64_t singles = n_items < SP_LINE_SINGLES ? n_items : SP_LINE_SINGLES;
    items->n = n_items;
    items->n_points = 0;
    items->longest = n_items > 0 ? model->s[k[0]] : 0;
    for (int64_t i = 0; i < singles; i++) {
        add_block(model, k, i, i + 1, items);
    }
    int64_t rest = n_items - singles;
    int64_t blocks = rest < SP_LINE_BLOCKS ? rest : SP_LINE_BLOCKS;
    for (int64_t b = 0; b < blocks; b++) {
        add_block(model, k, singles + rest * b / blocks, singles + rest * (b + 1) / blocks, items);
    }
}

double sp_line_longest_s(const sp_model *model, int64_t length)
{
    double s = (double)length, best = HUGE_VAL;
    for (int64_t j = 0; j < model->D; j++) {
        if (length <= model->cap[j]) {
            best = fmin(best, s * (model->quad[j] * s + model->lin[j]));
        }
    }
    return best;
}

/* The lines of one theta, and which degrees each point may use: bit j. */
typedef struct line_set {
    double slope[SP_MAX_DEGREES], offset[SP_MAX_DEGREES];
    uint64_t allowed[SP_LINE_POINTS];
} line_set;

static void set_line(const sp_model *model, double makespan, const sp_line_prices *prices,
                     int64_t j, line_set *lines)
{
    double d = (double)model->degree[j], theta = prices->theta[j];
    double per_time = theta * d / makespan;
    lines->slope[j] = per_time * model->quad[j];
    lines->offset[j] = per_time * model->lin[j];
    if (model->cap[j] > 0) {
        lines->offset[j] += (1 - theta) * d / (double)model->cap[j];
    }
}

/* Degrees whose memory and whose time at that makespan hold the block's shortest item.  The slack
 * of 1e-12 in time errs towards allowing. */
static void set_allowed(const sp_model *model, const sp_line_items *items, double makespan,
                        line_set *lines)
{
    double limit = makespan * (1 + 1e-12);
    for (int64_t p = 0; p < items->n_points; p++) {
        double s = (double)items->allow_s[p];
        uint64_t allowed = 0;
        for (int64_t j = 0; j < model->D; j++) {
            if (items->allow_s[p] <= model->cap[j] &&
                s * (model->quad[j] * s + model->lin[j]) <= limit) {
                allowed |= (uint64_t)1 << j;
            }
        }
        lines->allowed[p] = allowed;
    }
}

/* Value of the Lagrangian; *excess_j = d value / d theta_j (time minus memory load of degree j). */
static double lagrangian(const sp_model *model, const sp_line_items *items, double makespan,
                         const line_set *lines, int64_t of_j, double *excess_j)
{
    double total = 0, excess = 0;
    for (int64_t p = 0; p < items->n_points; p++) {
        double s = items->s[p], least = HUGE_VAL;
        int64_t least_j = -1;
        uint64_t allowed = lines->allowed[p];
        for (int64_t j = 0; j < model->D; j++) {
            double price = lines->slope[j] * s + lines->offset[j];
            if ((allowed >> j & 1) != 0 && price < least) {
                least = price;
                least_j = j;
            }
        }
        if (least_j < 0) {
            return HUGE_VAL; /* an item that no degree finishes in time */
        }
        total += items->tokens[p] * least;
        if (least_j == of_j) {
            double d = (double)model->degree[of_j];
            double time_price = d * (model->quad[of_j] * s + model->lin[of_j]) / makespan;
            excess += items->tokens[p] * (time_price - d / (double)model->cap[of_j]);
        }
    }
    *excess_j = excess;
    return total;
}

/* Moves theta_j to the maximum of a concave function of one variable, by the sign of its slope. */
static double climb(const sp_model *model, const sp_line_items *items, double makespan,
                    sp_line_prices *prices, line_set *lines, int64_t j)
{
    double low = 0, high = 1, excess = 0, best = -1, best_theta = prices->theta[j];
    for (int step = 0; step < 7; step++) {
        set_line(model, makespan, prices, j, lines);
        double value = lagrangian(model, items, makespan, lines, j, &excess);
        if (value > best) {
            best = value;
            best_theta = prices->theta[j];
        }
        if (excess == 0 || (excess > 0 && prices->theta[j] >= 1) ||
            (excess < 0 && prices->theta[j] <= 0)) {
            break;
        }
        if (excess > 0) {
            low = prices->theta[j];
        } else {
            high = prices->theta[j];
        }
        /* The ends first: most degrees are bound by one resource only. */
        prices->theta[j] = step == 0 ? (excess > 0 ? 1 : 0) : (low + high) / 2;
    }
    prices->theta[j] = best_theta;
    set_line(model, makespan, prices, j, lines);
    return best;
}

double sp_line_gpus(const sp_model *model, const sp_line_items *items, double makespan,
                    sp_line_prices *prices, int passes)
{
    line_set lines;
    set_allowed(model, items, makespan, &lines);
    for (int64_t j = 0; j < model->D; j++) {
        set_line(model, makespan, prices, j, &lines);
    }
    double excess = 0, best = lagrangian(model, items, makespan, &lines, -1, &excess);
    double enough = (double)model->n_gpus * 1.001;
    for (int pass = 0; pass < passes && best < enough; pass++) {
        double before = best;
        for (int64_t j = 0; j < model->D && best < enough; j++) {
            best = climb(model, items, makespan, prices, &lines, j);
        }
        if (best <= before * (1 + 1e-6)) {
            break;
        }
    }
    return best * sp_round_down(items->n);
}

/* Longer than any makespan can be useful: every item on every degree, one after the other. */
static double longest_useful_s(const sp_model *model, const sp_line_items *items)
{
    double longest = 0;
    for (int64_t j = 0; j < model->D; j++) {
        double total = 0;
        for (int64_t p = 0; p < items->n_points; p++) {
            total += items->tokens[p] * (model->quad[j] * items->s[p] + model->lin[j]);
        }
        longest = fmax(longest, total);
    }
    return longest * (1 + 1e-6);
}

double sp_line_bound(const sp_model *model, const sp_line_items *items, double tolerance,
                     int passes, sp_line_prices *prices)
{
    if (items->n == 0) {
        return 0;
    }
    double gpus = (double)model->n_gpus, top = longest_useful_s(model, items);
    double low = sp_line_longest_s(model, items->longest) * sp_round_down(items->n);
    for (int64_t j = 0; j < model->D; j++) {
        prices->theta[j] = 1;
    }
    if (top <= 0) { /* all times are zero: memory alone decides */
        memset(prices, 0, sizeof *prices);
        return sp_line_gpus(model, items, 1, prices, 0) > gpus ? HUGE_VAL : 0;
    }
    double high = HUGE_VAL, makespan = fmax(low, top * 1e-9);
    for (int round = 0; round < 60 && high > low * (1 + tolerance); round++) {
        double need = sp_line_gpus(model, items, makespan, prices, passes);
        if (need > gpus) {
            if (makespan >= top) {
                return HUGE_VAL;
            }
            low = makespan;
        } else {
            high = makespan;
        }
        /* Needs fall at most like 1/T: T*need/N is a lower estimate of the answer when memory is
         * not binding, and a fair step when it is. */
        double guess = makespan * fmin(need / gpus, 4);
        if (high >= HUGE_VAL) {
            makespan = fmin(fmax(guess, low * (1 + 0.25 * fmax(tolerance, 1e-6))), top);
        } else {
            makespan = guess > low * (1 + 0.2 * tolerance) && guess < high * (1 - 0.2 * tolerance)
                           ? guess
                           : (low + high) / 2;
        }
    }
    return low;
}
