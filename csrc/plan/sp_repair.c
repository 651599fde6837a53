/* sp_repair.c - the recreate half: each item goes where it costs least.
 *
 * cost of item k in a group of degree d, box b, N GPUs:
 *   growth of tau_b  +  excess  * (W_kd - min_d W_kd)/N
 *                    +  balance * d*tau_b/N * growth of |T/tau_b - tokens/cap_d|
 *                    +  fit     * d/N * (tau_b - T)
 * The first term is the step's time.  The others are worth nothing today: they keep short sequences
 * off wide groups, and long ones where time rather than memory is left. */
#include "plan/sp_repair.h"

#include <math.h>

enum { MOST_GROUPS = 64, SAMPLE = 32 };

typedef struct insertion {
    const sp_step *step;
    const sp_taste *taste;
    double s, s2;
    double time[SP_MAX_DEGREES];   /* of the item alone on that degree                          */
    double excess[SP_MAX_DEGREES]; /* weighted                                                  */
    double share[SP_MAX_DEGREES];  /* d/N                                                       */
    double fill[SP_MAX_DEGREES];   /* 1/cap                                                     */
    int64_t min_j;
    double cost;                   /* best so far                                               */
    int64_t slot, box, j;          /* slot -1: open a group of degree index j in the box        */
} insertion;

static void prepare(insertion *in, int64_t k)
{
    const sp_model *model = in->step->model;
    double least = HUGE_VAL, n_gpus = (double)model->n_gpus;
    in->s = (double)model->s[k];
    in->min_j = model->min_j[k];
    for (int64_t j = in->min_j; j < model->D; j++) {
        in->time[j] = in->s * (model->quad[j] * in->s + model->lin[j]);
        in->excess[j] = (double)model->degree[j] * in->time[j];
        least = in->excess[j] < least ? in->excess[j] : least;
    }
    for (int64_t j = in->min_j; j < model->D; j++) {
        in->excess[j] = in->taste->excess * (in->excess[j] - least) / n_gpus;
    }
    in->cost = HUGE_VAL;
}

/* Tastes of a group that then takes `time` and `tokens`, before that `time0` and `tokens0`. */
static double waste(const insertion *in, int64_t j, double tau, double time0, double tokens0,
                    double time, double tokens)
{
    double before = time0 - tau * tokens0 * in->fill[j], after = time - tau * tokens * in->fill[j];
    return in->share[j] * (in->taste->balance * (fabs(after) - fabs(before)) +
                           in->taste->fit * (tau - time));
}

/* What the box takes anyhow. */
static double known_tau(const insertion *in, int64_t box)
{
    double tau = in->step->n_groups[box] > 0 ? in->step->tau[box] : 0;
    const double *floor_s = in->taste->floor_s;
    return floor_s != NULL && floor_s[box] > tau ? floor_s[box] : tau;
}

/* Groups of one box; of a box with many, a random stretch: among hundreds of groups that are much
 * alike, the best of a sample is nearly the best of all. */
static int64_t try_groups(insertion *in, int64_t box, ovlm_rng *rng)
{
    const sp_step *step = in->step;
    double tau = known_tau(in, box), s = in->s;
    int64_t slot = box * step->box_slots, count = step->high[box];
    if (count > MOST_GROUPS) {
        slot += ovlm_rng_below(rng, count - SAMPLE + 1);
        count = SAMPLE;
    }
    int64_t fits[MOST_GROUPS], n_fits = 0;
    for (int64_t i = 0; i < count; i++) { /* apart, and without a branch to mispredict */
        fits[n_fits] = slot + i;
        n_fits += step->room[slot + i] >= s;
    }
    /* Unevenness falls by no more than this item's own. */
    double least[SP_MAX_DEGREES];
    for (int64_t j = in->min_j; j < step->model->D; j++) {
        least[j] = in->excess[j] - in->share[j] * in->taste->balance *
                   fabs(in->time[j] - tau * s * in->fill[j]);
    }
    for (int64_t i = 0; i < n_fits; i++) {
        slot = fits[i]; /* filled above: NOLINT */
        int64_t j = step->j[slot];
        double time = step->time[slot] + in->time[j];
        double growth = time > tau ? time - tau : 0, cost = growth + in->excess[j];
        /* a group with room for the item has a degree that may hold it */
        /* cppcheck-suppress uninitvar */
        if (growth + least[j] >= in->cost) {
            continue;
        }
        cost += waste(in, j, tau + growth, step->time[slot], step->sum_s[slot], time,
                      step->sum_s[slot] + s);
        if (cost < in->cost && ovlm_rng_uniform(rng) >= in->taste->blink) {
            in->cost = cost;
            in->slot = slot;
        }
    }
    return count + 1;
}

static void try_opening(insertion *in, int64_t box, ovlm_rng *rng)
{
    const sp_step *step = in->step;
    bool empty = step->n_groups[box] == 0 && in->taste->floor_s == NULL;
    double tau = known_tau(in, box);
    for (int64_t j = in->min_j; j < step->model->D; j++) {
        if (step->model->degree[j] > step->idle[box]) {
            break;
        }
        double time = in->time[j], growth = time > tau ? time - tau : 0;
        double cost = growth + in->excess[j] + (empty ? step->model->fixed : 0);
        cost += waste(in, j, tau + growth, 0, 0, time, in->s);
        if (cost < in->cost && ovlm_rng_uniform(rng) >= in->taste->blink) {
            in->cost = cost;
            in->slot = -1;
            in->box = box;
            in->j = j;
        }
    }
}

int64_t sp_repair(sp_step *step, const int64_t *k, int64_t n_items, const sp_taste *taste,
                  ovlm_rng *rng)
{
    const sp_model *model = step->model;
    insertion in = {.step = step, .taste = taste};
    for (int64_t j = 0; j < model->D; j++) {
        in.share[j] = (double)model->degree[j] / (double)model->n_gpus;
        in.fill[j] = model->cap[j] > 0 ? 1 / (double)model->cap[j] : 0;
    }
    int64_t looked = 0;
    for (int64_t i = 0; i < n_items; i++) {
        prepare(&in, k[i]);
        bool tried_empty = false;
        for (int64_t box = 0; box < step->n_boxes; box++) {
            bool empty = step->n_groups[box] == 0 && taste->floor_s == NULL;
            if (empty && tried_empty) {
                continue; /* empty boxes are all alike */
            }
            tried_empty = tried_empty || empty;
            looked += try_groups(&in, box, rng);
            try_opening(&in, box, rng);
        }
        if (in.cost < HUGE_VAL) {
            sp_step_put(step, k[i], in.slot >= 0 ? in.slot : sp_step_open(step, in.box, in.j));
        }
    }
    return looked;
}
