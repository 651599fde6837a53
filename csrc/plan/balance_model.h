/* balance_model.h - one balancing instance, prepared, and a plan of it.
 *
 * Items that must stay together are merged into units, so that everything below sees units only.
 * With A the sum of the units' additive costs a, m their items and h their longest length,
 *   load[r] = base_load[r] + (fixed + A + m*h*(padded_linear + padded_quadratic*h)) / speed[r]
 * and base_load[r] when r is empty (OrchMLLM 1.3).  Adding a unit never lowers a load. */
#ifndef OVLM_PLAN_BALANCE_MODEL_H
#define OVLM_PLAN_BALANCE_MODEL_H

#include "base/arena.h"

/* Arrays that are NULL have the value in brackets everywhere. */
typedef struct bal_model {
    int64_t n, n_ranks, n_units;
    double fixed, padded_linear, padded_quadratic;
    double *a;            /* [n_units] additive cost                                          */
    int64_t *len;         /* [n_units] longest length; NULL when no term is padded             */
    int64_t *count;       /* [n_units] items in it (1)                                        */
    int64_t *size;        /* [n_units] second resource, only with capacity (0)                */
    int64_t *bytes;       /* [n_units] what a move costs, only with home                      */
    int64_t *pin;         /* [n_units] rank or -1 (-1)                                        */
    int64_t *home;        /* [n_units] rank that holds most of its bytes now; NULL: no homes  */
    int64_t *unit_of;     /* [n] item -> unit (identity)                                      */
    int64_t *order;       /* [n_units] by the cost of a rank that holds it alone, descending  */
    const double *base_load; /* [n_ranks] (0)                                                 */
    const double *speed;     /* [n_ranks] (1)                                                 */
    const int64_t *capacity; /* [n_ranks] (no limit)                                          */
    int64_t min_items, max_items;
    int64_t node_size;
    double total;         /* sum of a                                                         */
    double grain;         /* > 0: every a is a multiple of it, up to rounding; 0: unknown     */
    double down;          /* factor that makes any computed load a safe lower bound: 1 when all
                             loads are whole numbers, so exact; else 1 less all rounding      */
    bool padded;          /* a padded coefficient is not zero                                 */
    bool uniform;         /* all ranks are alike and no unit is pinned                        */
} bal_model;

/* A part of the caller's problem: the items (NULL: all n) among n_ranks ranks from first_rank. */
typedef struct bal_part {
    const int64_t *item;
    int64_t n_items, first_rank, n_ranks;
} bal_part;

/* Checks every argument that needs no search: values, shapes, overflow, counting arguments. */
OVLM_NODISCARD ovlm_status bal_problem_check(const ovlm_balance_problem *problem, ovlm_err *err);

/* Prepares a part of a checked problem; everything new lives in the arena. */
OVLM_NODISCARD ovlm_status bal_model_init(bal_model *model, const ovlm_balance_problem *problem,
                                          const bal_part *part, ovlm_arena *arena, ovlm_err *err);

/* units[label of item] for keep_together: numbers units by first appearance. */
OVLM_NODISCARD ovlm_status bal_label_units(const int64_t *label, int64_t n, int64_t *unit_of,
                                           int64_t *n_units, ovlm_arena *arena, ovlm_err *err);

/* Every unit on a rank, and the sums per rank that its load follows from. */
typedef struct bal_plan {
    int64_t *rank;  /* [n_units], -1 = not placed                                              */
    double *add;    /* [n_ranks] sum of a                                                      */
    double *load;   /* [n_ranks]                                                               */
    int64_t *count; /* [n_ranks] items                                                         */
    int64_t *len;   /* [n_ranks] longest length                                                */
    int64_t *size;  /* [n_ranks]                                                               */
    double max;     /* largest load                                                            */
} bal_plan;

OVLM_NODISCARD ovlm_status bal_plan_init(bal_plan *plan, const bal_model *model, ovlm_arena *arena,
                                         ovlm_err *err);
/* No unit placed. */
void bal_plan_clear(const bal_model *model, bal_plan *plan);
void bal_plan_copy(const bal_model *model, bal_plan *to, const bal_plan *from);
/* Recomputes all sums from rank, in unit order; true when every unit is placed and every
 * constraint holds. */
bool bal_plan_settle(const bal_model *model, bal_plan *plan);

static inline int64_t bal_count(const bal_model *model, int64_t u)
{
    return model->count != NULL ? model->count[u] : 1;
}

static inline int64_t bal_size(const bal_model *model, int64_t u)
{
    return model->size != NULL ? model->size[u] : 0;
}

static inline int64_t bal_len(const bal_model *model, int64_t u)
{
    return model->len != NULL ? model->len[u] : 0;
}

static inline bool bal_is_pinned(const bal_model *model, int64_t u)
{
    return model->pin != NULL && model->pin[u] >= 0;
}

static inline double bal_base(const bal_model *model, int64_t r)
{
    return model->base_load != NULL ? model->base_load[r] : 0.0;
}

static inline double bal_speed(const bal_model *model, int64_t r)
{
    return model->speed != NULL ? model->speed[r] : 1.0;
}

static inline int64_t bal_capacity(const bal_model *model, int64_t r)
{
    return model->capacity != NULL ? model->capacity[r] : INT64_MAX;
}

/* load[r] of a rank with these sums. */
static inline double bal_load(const bal_model *model, int64_t r, double add, int64_t count,
                              int64_t len)
{
    if (count == 0) {
        return bal_base(model, r);
    }
    double cost = model->fixed + add;
    if (model->padded) {
        double h = (double)len;
        cost += (double)count * h * (model->padded_linear + model->padded_quadratic * h);
    }
    return model->speed != NULL ? bal_base(model, r) + cost / model->speed[r]
                                : bal_base(model, r) + cost;
}

/* Additive cost that keeps an unpadded load[r] at most `target`; negative: not even fixed. */
static inline double bal_room(const bal_model *model, int64_t r, double target)
{
    return (target - bal_base(model, r)) * bal_speed(model, r) - model->fixed;
}

/* Would unit u be admitted to r, the items' lower limits aside? */
static inline bool bal_admits(const bal_model *model, const bal_plan *plan, int64_t u, int64_t r)
{
    return plan->count[r] + bal_count(model, u) <= model->max_items &&
           bal_size(model, u) <= bal_capacity(model, r) - plan->size[r] &&
           (!bal_is_pinned(model, u) || model->pin[u] == r);
}

/* Adds unit u to rank r; plan->max is left alone. */
static inline void bal_plan_put(const bal_model *model, bal_plan *plan, int64_t u, int64_t r)
{
    plan->rank[u] = r;
    plan->add[r] += model->a[u];
    plan->count[r] += bal_count(model, u);
    plan->size[r] += bal_size(model, u);
    int64_t len = bal_len(model, u);
    plan->len[r] = len > plan->len[r] ? len : plan->len[r];
    plan->load[r] = bal_load(model, r, plan->add[r], plan->count[r], plan->len[r]);
}

#endif
