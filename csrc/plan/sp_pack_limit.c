/* sp_pack_limit.c - a new time limit: what still fits, what items are worth, what must go. */
#include <math.h>

#include "plan/sp_pack.h"

/* Cheapest degree at current prices; HUGE_VAL when none holds the item within tau. */
static double item_value(const sp_pack *pack, int64_t i, const double *a, const double *b)
{
    double least = HUGE_VAL, s = pack->s[i];
    for (int64_t j = 0; j < pack->model->D; j++) {
        if (pack->first[j] <= i) {
            double price = a[j] * s + b[j];
            least = price < least ? price : least;
        }
    }
    return s * least;
}

static void set_first(sp_pack *pack)
{
    const sp_model *m = pack->model;
    for (int64_t j = 0; j < m->D; j++) {
        double longest = sp_pack_longest_within(m->quad[j], m->lin[j], pack->tau);
        double cap = (double)m->cap[j];
        int64_t i = sp_pack_first_within(pack, longest < cap ? longest : cap);
        /* The root is off by a few units in the last place; the predicate itself decides. */
        sp_group empty = {.j = j};
        while (i > 0 && sp_pack_fits(pack, &empty, pack->s[i - 1])) {
            i--;
        }
        while (i < pack->n && !sp_pack_fits(pack, &empty, pack->s[i])) {
            i++;
        }
        pack->first[j] = i;
    }
}

/* Until the group keeps the time limit, one item after the other goes: the shortest that is enough
 * or, where that is far more than needed, the longest that is not. */
static void trim(sp_pack *pack, int64_t g)
{
    sp_group *group = &pack->group[g];
    double quad = pack->model->quad[group->j], lin = pack->model->lin[group->j], excess;
    while ((excess = sp_pack_time(pack, group) - pack->tau) > 0) {
        int64_t before = -1, enough_before = -1, less_before = -1;
        double enough = HUGE_VAL, less = -1;
        for (int64_t i = group->head; i >= 0; before = i, i = pack->next[i]) {
            double time = pack->s[i] * (quad * pack->s[i] + lin);
            if (time >= excess && time < enough) {
                enough = time;
                enough_before = before;
            } else if (time < excess && time > less) {
                less = time;
                less_before = before;
            }
        }
        sp_pack_remove(pack, g, less < 0 || enough <= 2 * excess ? enough_before : less_before);
    }
}

/* Values of items, groups and pool at the current limit and prices. */
static bool revalue(sp_pack *pack)
{
    const sp_model *m = pack->model;
    double a[SP_MAX_DEGREES], b[SP_MAX_DEGREES], per_s = pack->tau > 0 ? 1 / pack->tau : 0;
    for (int64_t j = 0; j < m->D; j++) {
        double d = (double)m->degree[j], time = d * pack->theta[j] * per_s;
        a[j] = time * m->quad[j];
        b[j] = time * m->lin[j] + d * (1 - pack->theta[j]) / (double)(m->cap[j] > 0 ? m->cap[j] : 1);
    }
    int64_t need = 0;
    bool possible = true;
    for (int64_t i = pack->n - 1; i >= 0; i--) {
        /* Shortest first: the first degree that holds an item only moves up. */
        while (need < m->D && pack->first[need] > i) {
            need++;
        }
        possible = possible && need < m->D;
        pack->need_j[i] = need;
        pack->value[i] = item_value(pack, i, a, b);
    }
    pack->pool_value = 0;
    for (int64_t i = sp_pack_pool_next(pack, 0); i >= 0; i = sp_pack_pool_next(pack, i + 1)) {
        pack->pool_value += pack->value[i];
    }
    for (int64_t g = 0; g < pack->n_groups; g++) {
        pack->group[g].value = 0;
        for (int64_t i = pack->group[g].head; i >= 0; i = pack->next[i]) {
            pack->group[g].value += pack->value[i];
        }
    }
    return possible;
}

bool sp_pack_set_tau(sp_pack *pack, double tau)
{
    pack->tau = tau;
    set_first(pack);
    if (!revalue(pack)) {
        return false;
    }
    for (int64_t g = pack->n_groups - 1; g >= 0; g--) {
        trim(pack, g);
        if (pack->group[g].count == 0) {
            sp_pack_dissolve(pack, g);
        }
    }
    return true;
}

double sp_pack_floor(const sp_pack *pack)
{
    const sp_model *m = pack->model;
    double work = 0, longest = 0;
    for (int64_t i = 0; i < pack->n; i++) {
        double s = pack->s[i], least_work = HUGE_VAL, least_time = HUGE_VAL;
        for (int64_t j = m->D - 1; j >= 0 && s <= (double)m->cap[j]; j--) {
            double time = s * (m->quad[j] * s + m->lin[j]), gpu = time * (double)m->degree[j];
            least_time = time < least_time ? time : least_time;
            least_work = gpu < least_work ? gpu : least_work;
        }
        work += least_work;
        longest = least_time > longest ? least_time : longest;
    }
    work /= (double)m->n_gpus;
    return work > longest ? work : longest;
}
