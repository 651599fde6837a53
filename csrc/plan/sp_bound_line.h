/* sp_bound_line.h - the line-envelope bound: the linear relaxation of one micro-batch.
 *
 * For a makespan T let groups of one degree share their time and memory, and let the number of
 * groups be real.  The GPUs that the items then need are, by linear-programming duality,
 *   g(T) = max over theta in [0,1]^D of
 *          sum_k s_k * min over allowed j of  theta_j*d_j*(quad_j*s_k + lin_j)/T +
 * (1-theta_j)*d_j/cap_j and T is impossible when g(T) > N.  The price per token is a lower envelope
 * of lines in s_k. */
#ifndef OVLM_PLAN_SP_BOUND_LINE_H
#define OVLM_PLAN_SP_BOUND_LINE_H

#include "plan/sp_model.h"

enum {
    SP_LINE_SINGLES = 24,
    SP_LINE_BLOCKS = 24,
    SP_LINE_POINTS = 2 * SP_LINE_BLOCKS + SP_LINE_SINGLES
};

/* Items summarised: the longest one by one, the others in blocks of neighbours.  The price per
 * token is concave in the length, so a block weighs at least as much as the same tokens and
 * squares moved to its two ends; `allow_s`, its shortest length, decides which degrees it may use.
 */
typedef struct sp_line_items {
    int64_t n, n_points;
    double s[SP_LINE_POINTS], tokens[SP_LINE_POINTS];
    int64_t allow_s[SP_LINE_POINTS];
    int64_t longest;
} sp_line_items;

/* Multipliers of one evaluation; theta persists so that the next T starts from it. */
typedef struct sp_line_prices {
    double theta[SP_MAX_DEGREES];
} sp_line_prices;

void sp_line_summarise(const sp_model *model, const int64_t *k, int64_t n_items,
                       sp_line_items *items);

/* GPUs that makespan T needs at least (already rounded down); improves prices by `passes` rounds of
 * coordinate ascent. */
double sp_line_gpus(const sp_model *model, const sp_line_items *items, double makespan,
                    sp_line_prices *prices, int passes);

/* Largest makespan, within `tolerance` relative, that the relaxation proves to be too small;
 * HUGE_VAL when no makespan is long enough (memory alone). */
double sp_line_bound(const sp_model *model, const sp_line_items *items, double tolerance,
                     int passes, sp_line_prices *prices);

/* Least time of the longest item on any degree that holds it. */
double sp_line_longest_s(const sp_model *model, int64_t length);

/* Factor below one by which a positive sum of n terms is multiplied so that its rounding errors are
 * covered: each addition and each of a few multiplications per term errs by at most 2^-53. */
static inline double sp_round_down(int64_t n)
{
    return 1 - (double)(n + 64) * 0x1.0p-50;
}

#endif
