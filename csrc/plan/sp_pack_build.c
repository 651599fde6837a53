/* sp_pack_build.c - groups opened one after the other around the longest item of the pool. */
#include <math.h>

#include "plan/sp_pack.h"

/* How many degrees a head tries, where they are a chain of divisors and where they are as dense as
 * 1, 2, 3, 5; from which factor over the smallest degree's on linear cost is dear. */
enum { CANDIDATES = 4, DENSE_CANDIDATES = 8 };
#define DEAR 1.1

static void keep_best(sp_pack *pack)
{
    sp_fill swap = pack->best;
    pack->best = pack->fill;
    pack->fill = swap;
}

/* Fills by the rule and keeps the content if it is worth more per GPU than the best so far. */
static void try_fill(sp_pack *pack, int64_t j, int64_t head, const sp_fill_rule *rule, double *best,
                     int64_t *work)
{
    *work += sp_pack_fill(pack, j, &head, 1, rule);
    double score = pack->fill.value / (double)pack->model->degree[j];
    if (rule->noise > 0) {
        score *= 1 + rule->noise * ovlm_rng_uniform(rule->rng);
    }
    if (score > *best) {
        *best = score;
        keep_best(pack);
    }
}

/* Whether a head on degree index j takes more than its share of time (time it needs over time it
 * has, against its tokens over the pool's tokens per free GPU), at a degree that costs every token
 * beside it dearly.  Searches try the cheap degrees too, now and then. */
static bool head_is_dear(const sp_pack *pack, int64_t j, int64_t head, const sp_fill_rule *rule)
{
    const sp_model *m = pack->model;
    double d = (double)m->degree[j], s = pack->s[head];
    if (d * s * (m->quad[j] * s + m->lin[j]) * sp_pack_even_tokens(pack) <= pack->tau * s) {
        return false;
    }
    return (rule->noise > 0 && ovlm_rng_uniform(rule->rng) < 0.5) ||
           d * m->lin[j] > DEAR * (double)m->degree[0] * m->lin[0];
}

bool sp_pack_grow(sp_pack *pack, int64_t head, const sp_fill_rule *rule, int64_t *work)
{
    const sp_model *m = pack->model;
    int64_t tried = 0, most = m->buddy ? CANDIDATES : DENSE_CANDIDATES;
    most = rule->degrees > 0 ? rule->degrees : most;
    double best = -HUGE_VAL;
    for (int64_t j = pack->need_j[head]; j < m->D && tried < most; j++) {
        if (m->degree[j] > pack->free_gpus) {
            break;
        }
        if (pack->first[j] > head) {
            continue;
        }
        tried++;
        try_fill(pack, j, head, rule, &best, work);
        /* Either many short items beside it use its memory, or few long ones pay for its degree. */
        if (rule->by_ratio && head_is_dear(pack, j, head, rule)) {
            sp_fill_rule longest = *rule;
            longest.by_ratio = false;
            try_fill(pack, j, head, &longest, &best, work);
        }
        if (pack->best.count == pack->pool_n) {
            break; /* everything is placed: more GPUs add nothing */
        }
    }
    return tried > 0 && sp_pack_open(pack, &pack->best);
}

/* The group with the least time left that still holds the item. */
static int64_t tightest_group(const sp_pack *pack, int64_t i)
{
    int64_t found = -1;
    double least = HUGE_VAL;
    for (int64_t g = 0; g < pack->n_groups; g++) {
        const sp_group *group = &pack->group[g];
        double left = pack->tau - sp_pack_time(pack, group);
        if (left < least && sp_pack_fits(pack, group, pack->s[i])) {
            least = left;
            found = g;
        }
    }
    return found;
}

int64_t sp_pack_absorb(sp_pack *pack, int64_t most, int64_t *into, int64_t *work)
{
    int64_t absorbed = 0;
    for (int64_t i = sp_pack_pool_next(pack, 0); i >= 0 && most > 0; most--) {
        int64_t after = sp_pack_pool_next(pack, i + 1), g = tightest_group(pack, i);
        *work += 1 + pack->n_groups / 16;
        if (g >= 0) {
            sp_pack_insert(pack, g, i);
            if (into != NULL) {
                into[absorbed] = g;
            }
            absorbed++;
        }
        i = after;
    }
    return absorbed;
}

bool sp_pack_build(sp_pack *pack, double tau, const sp_fill_rule *rule, int64_t *work)
{
    sp_pack_clear(pack);
    if (!sp_pack_set_tau(pack, tau)) {
        return false;
    }
    while (pack->pool_n > 0 && sp_pack_grow(pack, sp_pack_pool_next(pack, 0), rule, work)) {
        ;
    }
    /* A plan that misses many items is no use: only the last few are worth a look around. */
    sp_pack_absorb(pack, 64, NULL, work);
    return pack->pool_n == 0;
}

void sp_pack_learn(sp_pack *pack, double rate)
{
    const sp_model *m = pack->model;
    double groups[SP_MAX_DEGREES] = {0}, timed[SP_MAX_DEGREES] = {0};
    for (int64_t g = 0; g < pack->n_groups; g++) {
        const sp_group *group = &pack->group[g];
        double memory = group->sum_s / (double)m->cap[group->j];
        groups[group->j] += 1;
        timed[group->j] += sp_pack_time(pack, group) >= memory * pack->tau ? 1 : 0;
    }
    for (int64_t j = 0; j < m->D; j++) {
        if (groups[j] > 0) {
            pack->theta[j] += rate * (timed[j] / groups[j] - pack->theta[j]);
        }
    }
}

void sp_pack_pool_load(const sp_pack *pack, double *time, double *memory)
{
    const sp_model *m = pack->model;
    double seconds = 0;
    *memory = 0;
    for (int64_t i = sp_pack_pool_next(pack, 0); i >= 0; i = sp_pack_pool_next(pack, i + 1)) {
        int64_t j = pack->need_j[i];
        double d = (double)m->degree[j], s = pack->s[i];
        seconds += d * s * (m->quad[j] * s + m->lin[j]);
        *memory += d * s / (double)m->cap[j];
    }
    *time = pack->tau > 0 ? seconds / pack->tau : 0;
}
