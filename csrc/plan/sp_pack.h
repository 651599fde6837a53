/* sp_pack.h - groups being packed for a time limit tau: the state that constructors and searches of
 * one micro-batch share.
 *
 * Items are 0..n-1 here, longest first.  An item is in a group or in the pool.  Every group fits
 * tau and its memory; GPUs not in a group are free; a plan is found when the pool is empty.
 *
 * An item's value is what it must cost, in GPUs, at prices theta of the aggregate relaxation:
 *   value_i = s_i * min_j d_j*( theta_j*(quad_j*s_i + lin_j)/tau + (1 - theta_j)/cap_j )
 * over the degrees that can hold it within tau, so a group of degree d packed without loss has
 * value d, and the pool's value says how many GPUs are missing. */
#ifndef OVLM_PLAN_SP_PACK_H
#define OVLM_PLAN_SP_PACK_H

#include "base/rng.h"
#include "plan/sp_micro.h"

typedef struct sp_group {
    int64_t j, head, count; /* degree index; first item of a list through next[]; its length */
    double sum_s, sum_s2;   /* exact while below 2^53                                        */
    double value;           /* of its items, GPUs                                            */
} sp_group;

/* One candidate content of a group, before it is committed. */
typedef struct sp_fill {
    int64_t j, count;
    int64_t *item;
    double sum_s, sum_s2, value;
} sp_fill;

/* Lengths by their leading bits: 8 buckets per octave up to 2^53. */
enum { SP_BUCKETS = 54 * 8 };

typedef struct sp_pack {
    const sp_model *model;
    int64_t n;
    double *s, *value; /* [n]                                                            */
    int64_t *need_j;   /* [n] first degree index that holds the item within tau          */
    int64_t *next;     /* [n] list of the item's group; -1 ends                          */
    double tau;
    double theta[SP_MAX_DEGREES];
    bool timed;        /* the relaxation prices time alone: memory binds nowhere         */
    int64_t *bucket; /* [SP_BUCKETS] first item whose length falls in bucket b or below   */
    int64_t first[SP_MAX_DEGREES]; /* first (longest) item that fits an empty group       */

    sp_group *group; /* [max_groups] */
    int64_t n_groups, max_groups, free_gpus;
    int64_t later_gpus; /* of micro-batches that the pool is shared with, packed after this one  */
    double fair_scale;  /* tokens of a group, relative to an even spread over all these GPUs     */

    uint64_t *pool, *pool_top; /* bit i: item i is in the pool; bit w: word w is not 0      */
    int64_t pool_n, words;
    double pool_value, pool_s;

    sp_fill fill, best;       /* scratch of the fillers, [n] items each                     */
    int64_t *place_j, *place; /* scratch for sp_place; NULL where any multiset can be placed */
} sp_pack;

OVLM_NODISCARD ovlm_status sp_pack_init(sp_pack *pack, const sp_model *model, const int64_t *k,
                                        int64_t n, ovlm_arena *arena, ovlm_err *err);

/* Everything into the pool, all GPUs free. */
void sp_pack_clear(sp_pack *pack);

/* A new time limit: values, needs; groups that break it lose items to the pool until they keep it.
 * False when an item fits no degree within it. */
bool sp_pack_set_tau(sp_pack *pack, double tau);

/* A time below which no plan exists (work over GPUs; longest item at its fastest). */
double sp_pack_floor(const sp_pack *pack);

/* The pool's bits alone; its sums are the business of sp_pack.c. */
static inline void sp_pool_mark(sp_pack *pack, int64_t i)
{
    pack->pool[i >> 6] |= (uint64_t)1 << (i & 63);
    pack->pool_top[i >> 12] |= (uint64_t)1 << ((i >> 6) & 63);
}

static inline void sp_pool_unmark(sp_pack *pack, int64_t i)
{
    pack->pool[i >> 6] &= ~((uint64_t)1 << (i & 63));
    if (pack->pool[i >> 6] == 0) {
        pack->pool_top[i >> 12] &= ~((uint64_t)1 << ((i >> 6) & 63));
    }
}

/* First item >= i (so, not longer) in the pool; -1 when there is none. */
int64_t sp_pack_pool_next(const sp_pack *pack, int64_t i);

/* Prepares the look-up of lengths; the first item whose length is at most x (n: none is). */
void sp_pack_index(sp_pack *pack);
int64_t sp_pack_first_within(const sp_pack *pack, double x);

/* Largest s with quad*s^2 + lin*s <= time, up to rounding. */
double sp_pack_longest_within(double quad, double lin, double time);

/* Opens a group with this content, whose items must be in the pool; false (and nothing done) when
 * its GPUs are not free or cannot be placed. */
bool sp_pack_open(sp_pack *pack, const sp_fill *fill);

/* The same where a place is certain: the groups were open together before. */
void sp_pack_reopen(sp_pack *pack, const sp_fill *fill);

/* The group's items go to the pool, its GPUs are free, the last group takes its index. */
void sp_pack_dissolve(sp_pack *pack, int64_t g);

/* Item i of the pool into group g; the group's latest item back into the pool. */
void sp_pack_insert(sp_pack *pack, int64_t g, int64_t i);
void sp_pack_pop(sp_pack *pack, int64_t g);

/* The item after `before` in the group's list (its first one for -1) goes into the pool. */
void sp_pack_remove(sp_pack *pack, int64_t g, int64_t before);

/* Whether group g also holds item i. */
static inline bool sp_pack_fits(const sp_pack *pack, const sp_group *g, double s)
{
    const sp_model *m = pack->model;
    return m->quad[g->j] * (g->sum_s2 + s * s) + m->lin[g->j] * (g->sum_s + s) <= pack->tau &&
           g->sum_s + s <= (double)m->cap[g->j];
}

static inline double sp_pack_time(const sp_pack *pack, const sp_group *g)
{
    return pack->model->quad[g->j] * g->sum_s2 + pack->model->lin[g->j] * g->sum_s;
}

/* GPUs that the pool takes by time, and by memory, at the degrees it needs. */
void sp_pack_pool_load(const sp_pack *pack, double *time, double *memory);

double sp_pack_makespan(const sp_pack *pack);

/* How a group is filled after its head. */
typedef struct sp_fill_rule {
    bool by_ratio;  /* next item: the one whose time per token is what the group has left of both;
                       else the longest that fits */
    int64_t degrees; /* how many a head tries at most; 0: the usual number */
    double jitter;  /* the wished length is off by up to this share                      */
    double noise;   /* the degrees' merits are off by up to this share                   */
    ovlm_rng *rng;  /* needed where jitter or noise > 0                                  */
} sp_fill_rule;

/* pack->fill = a group of degree index j around the items head[0..heads-1], which it holds, filled
 * from the pool.  The pool is the same afterwards.  Returns the steps it took. */
int64_t sp_pack_fill(sp_pack *pack, int64_t j, const int64_t *head, int64_t heads,
                     const sp_fill_rule *rule);

/* Opens the best group around item `head` of the pool, by value per GPU; false when none can be.
 * `work` counts the items looked at. */
bool sp_pack_grow(sp_pack *pack, int64_t head, const sp_fill_rule *rule, int64_t *work);

/* Tokens per GPU when the pool is spread evenly over the GPUs that are left for it. */
static inline double sp_pack_even_tokens(const sp_pack *pack)
{
    return pack->pool_s / (double)(pack->free_gpus + pack->later_gpus);
}

/* Up to `most` pool items, longest first, into groups that have room; into[a], if given, is the
 * group of the a-th one absorbed.  Returns how many; `work` counts the items looked at, and groups
 * by the handful. */
int64_t sp_pack_absorb(sp_pack *pack, int64_t most, int64_t *into, int64_t *work);

/* From nothing, at limit tau; true when the pool came out empty. */
bool sp_pack_build(sp_pack *pack, double tau, const sp_fill_rule *rule, int64_t *work);

/* Moves the price of time at each degree towards the share of its groups that time fills rather
 * than memory. */
void sp_pack_learn(sp_pack *pack, double rate);

#endif
