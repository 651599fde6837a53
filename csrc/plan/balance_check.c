/* balance_check.c - every balancing argument is refused here, before any work, or never. */
#include "plan/balance_model.h"

#include <math.h>

#define CHECK_ARG(condition, ...)                          \
    do {                                                   \
        if (!(condition)) {                                \
            return OVLM_FAIL(err, OVLM_E_ARG, __VA_ARGS__); \
        }                                                  \
    } while (0)

/* Values in [least, most]. */
static ovlm_status check_i64(const char *name, const int64_t *value, int64_t n, int64_t least,
                             int64_t most, ovlm_err *err)
{
    for (int64_t i = 0; value != NULL && i < n; i++) {
        CHECK_ARG(value[i] >= least, "%s[%lld] must be >= %lld; got %lld", name, (long long)i,
                  (long long)least, (long long)value[i]);
        CHECK_ARG(value[i] <= most, "%s[%lld] must be <= %lld; got %lld", name, (long long)i,
                  (long long)most, (long long)value[i]);
    }
    return OVLM_OK;
}

/* Values >= 0 (or > 0) and finite. */
static ovlm_status check_f64(const char *name, const double *value, int64_t n, bool positive,
                             ovlm_err *err)
{
    for (int64_t i = 0; value != NULL && i < n; i++) {
        CHECK_ARG(isfinite(value[i]) && (positive ? value[i] > 0 : value[i] >= 0),
                  "%s[%lld] must be finite and %s 0; got %g", name, (long long)i,
                  positive ? ">" : ">=", value[i]);
    }
    return OVLM_OK;
}

/* A sum that stays below 2^62. */
static ovlm_status check_sum(const char *name, const int64_t *value, int64_t n, ovlm_err *err)
{
    int64_t sum = 0;
    for (int64_t i = 0; value != NULL && i < n; i++) {
        CHECK_ARG(value[i] <= INT64_MAX / 2 - sum, "the sum of %s reaches 2^62 at element %lld",
                  name, (long long)i);
        sum += value[i];
    }
    return OVLM_OK;
}

static ovlm_status check_counts(const ovlm_balance_problem *p, ovlm_err *err)
{
    CHECK_ARG(p->min_items >= 0, "min_items must be >= 0; got %lld", (long long)p->min_items);
    CHECK_ARG(p->max_items < 0 || p->min_items <= p->max_items,
              "min_items = %lld is above max_items = %lld", (long long)p->min_items,
              (long long)p->max_items);
    CHECK_ARG(p->min_items <= p->n / p->n_ranks,
              "min_items = %lld on %lld ranks needs more than the %lld items there are",
              (long long)p->min_items, (long long)p->n_ranks, (long long)p->n);
    CHECK_ARG(p->n == 0 || p->max_items < 0 || p->max_items > (p->n - 1) / p->n_ranks,
              "max_items = %lld on %lld ranks holds fewer than the %lld items there are",
              (long long)p->max_items, (long long)p->n_ranks, (long long)p->n);
    return OVLM_OK;
}

static ovlm_status check_places(const ovlm_balance_problem *p, ovlm_err *err)
{
    CHECK_ARG(p->capacity == NULL || p->size != NULL, "capacity needs size");
    OVLM_TRY(check_i64("size", p->size, p->n, 0, INT64_MAX, err));
    OVLM_TRY(check_sum("size", p->size, p->n, err));
    OVLM_TRY(check_i64("capacity", p->capacity, p->n_ranks, 0, INT64_MAX, err));
    OVLM_TRY(check_i64("pinned", p->pinned, p->n, -1, p->n_ranks - 1, err));
    OVLM_TRY(check_i64("home", p->home, p->n, 0, p->n_ranks - 1, err));
    CHECK_ARG(p->group_size >= 0, "group_size must be >= 0; got %lld", (long long)p->group_size);
    if (p->group_size > 0) {
        CHECK_ARG(p->home != NULL, "group_size needs home: it says which group an item is in");
        CHECK_ARG(p->n_ranks % p->group_size == 0,
                  "group_size = %lld does not divide n_ranks = %lld", (long long)p->group_size,
                  (long long)p->n_ranks);
    }
    CHECK_ARG(p->node_size > 0, "node_size must be positive; got %lld", (long long)p->node_size);
    CHECK_ARG(isfinite(p->slack) && p->slack >= 0, "slack must be finite and >= 0; got %g",
              p->slack);
    return OVLM_OK;
}

ovlm_status bal_problem_check(const ovlm_balance_problem *p, ovlm_err *err)
{
    CHECK_ARG(p->n >= 0, "the number of items must be >= 0; got %lld", (long long)p->n);
    CHECK_ARG(p->n_ranks >= 1, "n_ranks must be >= 1; got %lld", (long long)p->n_ranks);
    CHECK_ARG(p->n_ranks <= INT32_MAX / 4, "n_ranks = %lld is too many", (long long)p->n_ranks);
    CHECK_ARG(p->n <= INT32_MAX, "%lld items are too many", (long long)p->n);
    CHECK_ARG(p->n == 0 || p->lengths != NULL, "lengths is missing");
    OVLM_TRY(check_i64("lengths", p->lengths, p->n, 0, INT64_MAX, err));
    OVLM_TRY(check_sum("lengths", p->lengths, p->n, err));
    OVLM_TRY(check_f64("squares", p->squares, p->n, false, err));
    OVLM_TRY(check_f64("cost", p->item_cost, p->n, false, err));
    OVLM_TRY(ovlm_batch_cost_check(&p->cost, err));
    OVLM_TRY(check_f64("base_load", p->base_load, p->n_ranks, false, err));
    OVLM_TRY(check_f64("speed", p->speed, p->n_ranks, true, err));
    OVLM_TRY(check_counts(p, err));
    return check_places(p, err);
}
