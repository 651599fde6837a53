/* balance_triples.c - three units per rank and no slack at all: an exact cover.
 *
 * When n = 3N, no rank can hold two or four units at the goal T, and the units sum to N*T, every
 * rank must hold a triple that sums to T.  Where few triples do, a depth-first search that always
 * branches on the unit in the fewest of them finds the plan that no local search can approach. */
#include "plan/balance_parts.h"

#include <math.h>

enum { TRIPLES_PER_UNIT = 32, MOST_RANKS = 1024 };

typedef struct triple {
    int64_t unit[3];
} triple;

typedef struct cover {
    bal_search *search;
    bal_plan *plan;
    triple *triple;
    int64_t n_triples, room;
    int64_t *uses;      /* [n_units] triples that are still possible with it                    */
    int64_t last_work;  /* stop when the meter gets here                                        */
    bool stopped;
} cover;

/* Does the structure force triples of sum `target`? */
static bool is_forced(const bal_model *model, double target)
{
    int64_t n = model->n_units, N = model->n_ranks;
    if (!model->uniform || model->padded || model->count != NULL || model->capacity != NULL ||
        model->down < 1 || n != 3 * N || N > MOST_RANKS || model->min_items > 3 ||
        model->max_items < 3) {
        return false;
    }
    double most = model->a[model->order[0]], least = model->a[model->order[n - 1]];
    return model->total >= target * (double)N && 2 * most < target && 4 * least > target;
}

/* All triples of sum `target`, by two pointers per first unit; false when there are too many. */
static bool list_triples(cover *c, double target)
{
    const bal_model *model = c->search->model;
    const int64_t *order = model->order;
    for (int64_t i = 0; i + 2 < model->n_units; i++) {
        int64_t lo = i + 1, hi = model->n_units - 1;
        while (lo < hi) {
            double sum = model->a[order[i]] + model->a[order[lo]] + model->a[order[hi]];
            if (sum > target) {
                lo++;
            } else if (sum < target) {
                hi--;
            } else {
                /* equal units may stand on either side: list this pair, then all its like */
                for (int64_t k = hi; k > lo && model->a[order[k]] <= model->a[order[hi]]; k--) {
                    if (c->n_triples == c->room) {
                        return false;
                    }
                    c->triple[c->n_triples++] = (triple){{order[i], order[lo], order[k]}};
                }
                lo++;
            }
        }
    }
    return true;
}

static bool is_open(const cover *c, const triple *t)
{
    const int64_t *rank = c->plan->rank;
    return rank[t->unit[0]] < 0 && rank[t->unit[1]] < 0 && rank[t->unit[2]] < 0;
}

/* The open unit in the fewest open triples. */
static int64_t hardest_unit(cover *c)
{
    const bal_model *model = c->search->model;
    for (int64_t u = 0; u < model->n_units; u++) {
        c->uses[u] = 0;
    }
    for (int64_t t = 0; t < c->n_triples; t++) {
        for (int k = 0; k < 3 && is_open(c, &c->triple[t]); k++) {
            c->uses[c->triple[t].unit[k]]++;
        }
    }
    int64_t best = -1;
    for (int64_t u = 0; u < model->n_units; u++) {
        if (c->plan->rank[u] < 0 && (best < 0 || c->uses[u] < c->uses[best])) {
            best = u;
        }
    }
    return best;
}

static void assign(cover *c, const triple *t, int64_t rank)
{
    for (int k = 0; k < 3; k++) {
        c->plan->rank[t->unit[k]] = rank;
    }
}

/* Covers ranks r, r + 1, ...; true when all are. */
static bool cover_from(cover *c, int64_t r)
{
    if (r == c->search->model->n_ranks) {
        return true;
    }
    c->stopped = c->stopped || c->search->meter->work >= c->last_work ||
                 ovlm_meter_spend(c->search->meter, c->n_triples / 2 + 1);
    int64_t u = hardest_unit(c);
    for (int64_t t = 0; t < c->n_triples && c->uses[u] > 0 && !c->stopped; t++) {
        const triple *x = &c->triple[t];
        bool has = x->unit[0] == u || x->unit[1] == u || x->unit[2] == u;
        if (has && is_open(c, x)) {
            assign(c, x, r);
            if (cover_from(c, r + 1)) {
                return true;
            }
            assign(c, x, -1);
            /* deeper levels used the array: keep the loop going while u is open */
            c->uses[u] = 1;
        }
    }
    return false;
}

ovlm_status bal_triples(bal_search *search, bal_plan *plan, int64_t max_work, bool *done,
                        ovlm_err *err)
{
    const bal_model *model = search->model;
    double target = search->goal - model->fixed;
    *done = false;
    if (model->n_units == 0 || !is_forced(model, target)) {
        return OVLM_OK;
    }
    ovlm_arena_mark mark = ovlm_arena_save(search->arena);
    int64_t work = search->meter->work;
    cover c = {.search = search, .plan = plan, .room = TRIPLES_PER_UNIT * model->n_units,
               .last_work = max_work < INT64_MAX - work ? work + max_work : INT64_MAX};
    OVLM_TRY(OVLM_ARENA_NEW(search->arena, &c.triple, c.room, err));
    OVLM_TRY(OVLM_ARENA_NEW(search->arena, &c.uses, model->n_units, err));
    bal_plan_clear(model, plan);
    (void)ovlm_meter_spend(search->meter, model->n_units * model->n_units / 4);
    *done = list_triples(&c, target) && cover_from(&c, 0) && bal_plan_settle(model, plan);
    ovlm_arena_rewind(search->arena, mark);
    return OVLM_OK;
}
