/* sp_bound_lift.c - sequential lifting over one knapsack table per degree. */
#include "plan/sp_bound_lift.h"

#include <math.h>
#include <string.h>

/* Below 1/SMALL of its cheapest group an item counts as filling; work per search step. */
enum { ROUNDS = 9, UNLIFTED = 4, MANNERS = 3, SMALL = 16 };
enum { OPERATIONS_PER_STEP = 1024, CELLS = SP_LIFT_CELLS };
#define MARGIN 1e-9    /* relative; covers the rounding of sums of at most 1e6 terms */
#define TOLERANCE 3e-4 /* bisection on T stops here                                  */

/* How prices are raised: the shares of filling's price, and which end goes first. */
typedef struct manner {
    double keep;
    bool shortest_first;
} manner;

static const manner manners[MANNERS] = {{1, false}, {1, true}, {0.97, false}};

ovlm_status sp_lift_init(sp_lift *l, const sp_model *model, const int64_t *k, int64_t n_items,
                         ovlm_arena *arena, ovlm_err *err)
{
    *l = (sp_lift){.model = model, .n = n_items};
    OVLM_TRY(OVLM_ARENA_NEW(arena, &l->s, n_items, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &l->base, n_items, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &l->small, n_items, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &l->premium, model->D * (CELLS + 1), err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &l->before, CELLS + 1, err));
    for (int64_t i = 0; i < n_items; i++) {
        l->s[i] = (double)model->s[k[i]];
    }
    sp_line_summarise(model, k, n_items, &l->line);
    for (int64_t j = 0; j < model->D; j++) {
        l->line_prices.theta[j] = 1;
    }
    return OVLM_OK;
}

/* Share of a group of degree j; rounding is covered where it is used. */
static double share_of(const sp_lift *l, int64_t i, int64_t j)
{
    double s = l->s[i];
    return s * (l->per_time[j] * (l->model->quad[j] * s + l->model->lin[j]) + l->per_token[j]);
}

void sp_lift_base(sp_lift *l, double makespan)
{
    const sp_model *model = l->model;
    double limit = makespan * (1 + 1e-12);
    (void)sp_line_gpus(model, &l->line, makespan, &l->line_prices, 2);
    for (int64_t j = 0; j < model->D; j++) {
        double theta = l->line_prices.theta[j], cap = (double)model->cap[j];
        l->per_time[j] = theta / makespan;
        l->per_token[j] = cap > 0 ? (1 - theta) / cap : 0;
        int64_t low = 0, high = l->n;
        while (low < high) {
            int64_t middle = low + (high - low) / 2;
            double s = l->s[middle];
            if (s <= cap && s * (model->quad[j] * s + model->lin[j]) <= limit) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        l->first[j] = low;
    }
    for (int64_t i = 0; i < l->n; i++) {
        double least = HUGE_VAL, share = 0;
        for (int64_t j = 0; j < model->D; j++) {
            double r = share_of(l, i, j), price = (double)model->degree[j] * r;
            if (i >= l->first[j] && price < least) {
                least = price;
                share = r;
            }
        }
        l->base[i] = least * (1 - MARGIN);
        l->small[i] = share * SMALL < 1;
    }
}

/* The price of filling per share of each degree, and nothing yet beside it; their sum. */
static double price_filling(sp_lift *l, double keep)
{
    double total = 0;
    memset(l->premium, 0, (size_t)(l->model->D * (CELLS + 1)) * sizeof *l->premium);
    memset(l->rho, 0, sizeof l->rho);
    for (int64_t i = 0; i < l->n; i++) {
        if (!l->small[i]) {
            continue;
        }
        double price = keep * l->base[i];
        total += price;
        for (int64_t j = 0; j < l->model->D; j++) {
            double share = share_of(l, i, j);
            /* An item that weighs nothing costs nothing at that degree, hence has no price. */
            l->rho[j] = share > 0 && i >= l->first[j] ? fmax(l->rho[j], price / share) : l->rho[j];
        }
    }
    return total;
}

/* The highest price of item i beside all that have one. */
static double lifted(const sp_lift *l, int64_t i)
{
    double least = HUGE_VAL;
    for (int64_t j = 0; j < l->model->D; j++) {
        if (i < l->first[j]) {
            continue;
        }
        double room = fmax(1 - share_of(l, i, j) * (1 - 1e-12) + 1e-12, 0);
        int64_t cell = (int64_t)((double)CELLS * room + 1e-9);
        const double *premium = l->premium + j * (CELLS + 1);
        double beside = l->rho[j] * room + premium[cell < CELLS ? cell : CELLS];
        least = fmin(least, (double)l->model->degree[j] * (1 - MARGIN) - beside * (1 + MARGIN));
    }
    return fmax(least, 0);
}

/* Enters item i with that price where it is worth more than filling; returns the operations. */
static int64_t enter(sp_lift *l, int64_t i, double price)
{
    int64_t operations = 0;
    for (int64_t j = 0; j < l->model->D; j++) {
        double share = share_of(l, i, j), gain = price - l->rho[j] * share * (1 - MARGIN);
        if (i < l->first[j] || gain <= 0) {
            continue;
        }
        int64_t size = (int64_t)((double)CELLS * share * (1 - 1e-12));
        if (size > CELLS) {
            continue; /* share is 1 but for rounding, and so is the only content */
        }
        double *restrict to = l->premium + j * (CELLS + 1);
        double *restrict from = l->before;
        memcpy(from, to, (CELLS + 1) * sizeof *to);
        for (int64_t g = size; g <= CELLS; g++) {
            double with = from[g - size] + gain;
            to[g] = with > to[g] ? with : to[g];
        }
        operations += CELLS;
    }
    return operations;
}

/* GPUs that the makespan of sp_lift_base needs at least. */
static double gpus_needed(sp_lift *l, const manner *how, ovlm_meter *meter)
{
    double total = price_filling(l, how->keep);
    int64_t operations = l->n * l->model->D;
    for (int64_t turn = 0; turn < l->n; turn++) {
        int64_t i = how->shortest_first ? l->n - 1 - turn : turn;
        if (!l->small[i]) {
            double price = lifted(l, i);
            total += price;
            operations += enter(l, i, price);
        }
    }
    (void)ovlm_meter_spend(meter, 1 + operations / OPERATIONS_PER_STEP);
    return total * (1 - MARGIN);
}

/* GPUs that it needs at prices as they are: the line envelope of the items themselves, where
 * sp_line_bound sees blocks of them.  What lifting adds, its grid may take away again. */
static double gpus_unlifted(const sp_lift *l)
{
    double total = 0;
    for (int64_t i = 0; i < l->n; i++) {
        total += l->base[i];
    }
    return total * (1 - MARGIN);
}

/* What is needed falls about as 1/T, so few steps do. */
void sp_lift_unlifted(sp_lift *l, double hint, double *low)
{
    double have = (double)l->model->n_gpus, high = hint, makespan = *low;
    for (int round = 0; round < UNLIFTED && *low > 0 && makespan < high; round++) {
        sp_lift_base(l, makespan);
        double need = gpus_unlifted(l); /* infinite where no degree finishes some item */
        if (need <= have) {
            high = makespan;
        } else {
            *low = fmax(*low, makespan);
        }
        double guess = makespan * fmin(need / have, 2) * (1 - 0.1 * TOLERANCE);
        makespan = guess > *low && guess < high ? guess : fmin((*low + high) / 2, *low * 2);
        if (makespan < *low * (1 + 0.3 * TOLERANCE)) {
            break;
        }
    }
}

/* More than `have` GPUs where some manner needs them: *way, then the others.  Infinitely many where
 * some item has no degree that finishes it. */
static double most_needed(sp_lift *l, double makespan, double have, int64_t *way,
                          ovlm_meter *meter)
{
    double most = 0;
    int64_t first = *way;
    sp_lift_base(l, makespan);
    if (l->base[0] >= HUGE_VAL) {
        return HUGE_VAL;
    }
    for (int64_t turn = 0; turn < MANNERS && most <= have && !ovlm_meter_look(meter); turn++) {
        int64_t other = (first + turn) % MANNERS;
        double need = gpus_needed(l, &manners[other], meter);
        if (need > most) {
            most = need;
            *way = other;
        }
    }
    return most;
}

void sp_lift_raise(sp_lift *l, double hint, ovlm_meter *meter, double *low)
{
    if (*low <= 0) {
        return;
    }
    int64_t way = 0;
    double have = (double)l->model->n_gpus, high = hint, makespan = *low;
    for (int round = 0; round < ROUNDS && high > *low * (1 + TOLERANCE); round++) {
        double need = most_needed(l, makespan, have, &way, meter);
        if (need > have) {
            *low = fmax(*low, makespan);
        } else if (ovlm_meter_look(meter)) {
            return; /* cut: perhaps it needs more */
        } else {
            high = makespan;
        }
        /* What is needed falls about as 1/T. */
        double guess = makespan * fmin(need / have, 2) * (1 - 0.3 * TOLERANCE);
        makespan = guess > *low && guess < high ? guess : fmin((*low + high) / 2, *low * 2);
    }
}
