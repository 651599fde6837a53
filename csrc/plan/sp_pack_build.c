/* sp_pack_build.c - groups opened one after the other around the longest item of the pool. */
#include <math.h>

#include "plan/sp_pack.h"

/* Degrees beyond the third that holds an item have never been the better ones. */
enum { CANDIDATES = 4 };

static void keep_best(sp_pack *pack)
{
    sp_fill swap = pack->best;
    pack->best = pack->fill;
    pack->fill = swap;
}

bool sp_pack_grow(sp_pack *pack, const sp_fill_rule *rule, int64_t *work)
{
    int64_t head = sp_pack_pool_next(pack, 0), tried = 0;
    double best = -HUGE_VAL;
    for (int64_t j = pack->need_j[head]; j < pack->model->D && tried < CANDIDATES; j++) {
        if (pack->model->degree[j] > pack->free_gpus) {
            break;
        }
        if (pack->first[j] > head) {
            continue;
        }
        tried++;
        sp_pack_fill(pack, j, head, rule);
        *work += 1 + pack->fill.count;
        double score = pack->fill.value / (double)pack->model->degree[j];
        if (rule->noise > 0) {
            score *= 1 + rule->noise * ovlm_rng_uniform(rule->rng);
        }
        if (score > best) {
            best = score;
            keep_best(pack);
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

int64_t sp_pack_absorb(sp_pack *pack, int64_t most, int64_t *into)
{
    int64_t absorbed = 0;
    for (int64_t i = sp_pack_pool_next(pack, 0); i >= 0 && most > 0; most--) {
        int64_t after = sp_pack_pool_next(pack, i + 1), g = tightest_group(pack, i);
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
    while (pack->pool_n > 0 && sp_pack_grow(pack, rule, work)) {
        ;
    }
    /* A plan that misses many items is no use: only the last few are worth a look around. */
    sp_pack_absorb(pack, 64, NULL);
    *work += 64;
    return pack->pool_n == 0;
}

void sp_pack_learn(sp_pack *pack)
{
    const sp_model *m = pack->model;
    double time[SP_MAX_DEGREES] = {0}, memory[SP_MAX_DEGREES] = {0}, groups[SP_MAX_DEGREES] = {0};
    for (int64_t g = 0; g < pack->n_groups; g++) {
        const sp_group *group = &pack->group[g];
        time[group->j] += sp_pack_time(pack, group) / pack->tau;
        memory[group->j] += group->sum_s / (double)m->cap[group->j];
        groups[group->j] += 1;
    }
    for (int64_t j = 0; j < m->D; j++) {
        /* Halfway towards the resource of which less is left. */
        if (groups[j] > 0) {
            pack->theta[j] = 0.5 * pack->theta[j] + (time[j] >= memory[j] ? 0.5 : 0.0);
        }
    }
}
