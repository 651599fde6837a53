/* relabel_transport.c - labels to classes with room, most gain: successive shortest paths.
 *
 * The transportation form of the Hungarian method (Jonker and Volgenant 1987; Tomizawa 1971):
 * classes are nodes with several places, so Dijkstra runs over K classes instead of N ranks.
 * price[k] <= 0 makes a full class less attractive; every label sits where gain + price is most,
 * which is the proof of optimality.  Gains are doubles that hold integers, because comparing
 * doubles vectorises on every machine and comparing 64-bit integers does not. */
#include "plan/relabel.h"

#include <math.h>

typedef struct transport {
    const double *gain;
    int64_t N, K, n_open; /* n_open: classes that this search has not settled                  */
    const int64_t *room;
    int64_t *class_of;
    int64_t *member, *first; /* labels of class k: member[first[k]] .., count[k] of them        */
    int64_t *count, *slot;   /* slot[j]: where label j stands in member                         */
    double *price;
    double *dist;    /* open classes: length of the best path; settled ones: -HUGE_VAL          */
    double *settled; /* their lengths                                                           */
    double *from;    /* label through which the path enters; double, to vectorise with dist     */
    int64_t *popped; /* classes in the order of settling                                        */
} transport;

static void relax(transport *t, int64_t label, double base)
{
    const double *gain = t->gain + label * t->K, *price = t->price;
    double *dist = t->dist, *from = t->from, name = (double)label;
    for (int64_t k = 0; k < t->K; k++) {
        double length = base - gain[k] - price[k];
        int less = length < dist[k];
        dist[k] = less ? length : dist[k];
        from[k] = less ? name : from[k];
    }
}

static int64_t nearest_open(const transport *t)
{
    int64_t best = -1;
    double least = HUGE_VAL;
    for (int64_t k = 0; k < t->K; k++) {
        if (t->dist[k] > -HUGE_VAL && t->dist[k] < least) {
            least = t->dist[k];
            best = k;
        }
    }
    return best;
}

static void put(transport *t, int64_t label, int64_t class, int64_t slot)
{
    t->member[slot] = label;
    t->slot[label] = slot;
    t->class_of[label] = class;
}

/* Moves labels along the path that ends in `class`, which has room. */
static void augment(transport *t, int64_t label, int64_t class)
{
    int64_t slot = t->first[class] + t->count[class]++;
    for (;;) {
        int64_t mover = (int64_t)t->from[class];
        int64_t came_from = mover == label ? -1 : t->class_of[mover];
        int64_t vacated = mover == label ? -1 : t->slot[mover];
        put(t, mover, class, slot);
        if (mover == label) {
            return;
        }
        class = came_from;
        slot = vacated;
    }
}

/* Shortest path for one label.  False when the meter stops it; then nothing has changed. */
static bool insert(transport *t, int64_t label, ovlm_meter *meter)
{
    for (int64_t k = 0; k < t->K; k++) {
        t->dist[k] = HUGE_VAL;
    }
    relax(t, label, 0.0);
    int64_t n_popped = 0, end = -1;
    double reach = 0;
    while (end < 0) {
        int64_t class = nearest_open(t);
        reach = t->dist[class];
        if (t->count[class] < t->room[class]) {
            end = class;
            break;
        }
        if (ovlm_meter_spend(meter, 1 + t->count[class] * t->K / 64)) {
            return false;
        }
        t->popped[n_popped++] = class;
        t->settled[class] = reach;
        t->dist[class] = -HUGE_VAL;
        for (int64_t m = 0; m < t->count[class]; m++) {
            int64_t other = t->member[t->first[class] + m];
            relax(t, other, reach + t->gain[other * t->K + class] + t->price[class]);
        }
    }
    for (int64_t p = 0; p < n_popped; p++) {
        t->price[t->popped[p]] += t->settled[t->popped[p]] - reach;
    }
    augment(t, label, end);
    return true;
}

/* Without budget: the best class that has room. */
static void insert_greedily(transport *t, int64_t label)
{
    int64_t best = -1;
    for (int64_t k = 0; k < t->K; k++) {
        const double *gain = t->gain + label * t->K;
        if (t->count[k] < t->room[k] && (best < 0 || gain[k] > gain[best])) {
            best = k;
        }
    }
    put(t, label, best, t->first[best] + t->count[best]);
    t->count[best]++;
}

/* Lagrangian: sum_j max_k(gain + price) - sum_k room*price, an upper bound for any price <= 0. */
static double upper_bound(const transport *t)
{
    double bound = 0;
    for (int64_t j = 0; j < t->N; j++) {
        double most = -HUGE_VAL;
        for (int64_t k = 0; k < t->K; k++) {
            double value = t->gain[j * t->K + k] + t->price[k];
            most = value > most ? value : most;
        }
        bound += most;
    }
    for (int64_t k = 0; k < t->K; k++) {
        bound -= (double)t->room[k] * t->price[k];
    }
    return bound;
}

static ovlm_status transport_init(transport *t, ovlm_arena *arena, ovlm_err *err)
{
    int64_t places = 0;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &t->first, t->K, err));
    for (int64_t k = 0; k < t->K; k++) {
        t->first[k] = places;
        places += t->room[k];
    }
    OVLM_TRY(OVLM_ARENA_NEW(arena, &t->member, places, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &t->count, t->K, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &t->slot, t->N, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &t->price, t->K, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &t->dist, t->K, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &t->settled, t->K, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &t->from, t->K, err));
    return OVLM_ARENA_NEW(arena, &t->popped, t->K, err);
}

ovlm_status relabel_transport(const double *gain, int64_t N, int64_t K, const int64_t *room,
                              ovlm_meter *meter, int64_t *class_of, double *bound,
                              ovlm_arena *arena, ovlm_err *err)
{
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    transport t = {.gain = gain, .N = N, .K = K, .room = room, .class_of = class_of};
    OVLM_TRY(transport_init(&t, arena, err));
    bool stopped = false;
    for (int64_t j = 0; j < N; j++) {
        stopped = stopped || ovlm_meter_spend(meter, 1 + K / 64) || !insert(&t, j, meter);
        if (stopped) {
            insert_greedily(&t, j);
        }
    }
    *bound = upper_bound(&t);
    ovlm_arena_rewind(arena, mark);
    return OVLM_OK;
}
