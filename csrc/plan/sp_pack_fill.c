/* sp_pack_fill.c - lengths and the pool looked up, and how one group is filled. */
#include <math.h>
#include <string.h>

#include "plan/sp_pack.h"

enum { TOP_UPS = 3, TOP_UP_ITEMS = 12 };

/* Bucket of a length >= 1: exponent and three bits of the mantissa. */
static int64_t bucket_of(double s)
{
    uint64_t bits;
    memcpy(&bits, &s, sizeof bits);
    return (int64_t)(bits >> 49) - ((int64_t)1023 << 3);
}

/* bucket[b]: first item in bucket b or a lower one, so that an item of bucket b lies in
 * bucket[b] .. bucket[b-1]-1. */
void sp_pack_index(sp_pack *pack)
{
    int64_t i = pack->n;
    for (int64_t b = 0; b < SP_BUCKETS; b++) {
        while (i > 0 && bucket_of(pack->s[i - 1]) <= b) {
            i--;
        }
        pack->bucket[b] = i;
    }
}

int64_t sp_pack_first_within(const sp_pack *pack, double x)
{
    const double *s = pack->s;
    if (x >= s[0]) {
        return 0;
    }
    if (x < s[pack->n - 1]) {
        return pack->n;
    }
    int64_t b = bucket_of(x), low = pack->bucket[b];
    int64_t left = (b > 0 ? pack->bucket[b - 1] : pack->n) - low;
    while (left > 0) {
        int64_t half = left >> 1;
        bool longer = s[low + half] > x;
        low = longer ? low + half + 1 : low;
        left = longer ? left - half - 1 : half;
    }
    return low;
}

int64_t sp_pack_pool_next(const sp_pack *pack, int64_t i)
{
    if (i >= pack->n) {
        return -1;
    }
    int64_t w = i >> 6;
    uint64_t bits = pack->pool[w] & (~(uint64_t)0 << (i & 63));
    if (bits != 0) {
        return (w << 6) + __builtin_ctzll(bits);
    }
    int64_t t = ++w >> 6, tops = (pack->words + 63) >> 6;
    if (t >= tops) {
        return -1;
    }
    bits = pack->pool_top[t] & (~(uint64_t)0 << (w & 63));
    while (bits == 0) {
        if (++t >= tops) {
            return -1;
        }
        bits = pack->pool_top[t];
    }
    w = (t << 6) + __builtin_ctzll(bits);
    return (w << 6) + __builtin_ctzll(pack->pool[w]);
}

/* Last item <= i (so, not shorter) in the pool; -1 when there is none. */
static int64_t pool_prev(const sp_pack *pack, int64_t i)
{
    if (i < 0) {
        return -1;
    }
    int64_t w = i >> 6;
    uint64_t bits = pack->pool[w] & (~(uint64_t)0 >> (63 - (i & 63)));
    if (bits != 0) {
        return (w << 6) + 63 - __builtin_clzll(bits);
    }
    if (--w < 0) {
        return -1;
    }
    int64_t t = w >> 6;
    bits = pack->pool_top[t] & (~(uint64_t)0 >> (63 - (w & 63)));
    while (bits == 0) {
        if (--t < 0) {
            return -1;
        }
        bits = pack->pool_top[t];
    }
    w = (t << 6) + 63 - __builtin_clzll(bits);
    return (w << 6) + 63 - __builtin_clzll(pack->pool[w]);
}

/* The positive root in the form without cancellation. */
double sp_pack_longest_within(double quad, double lin, double time)
{
    if (time < 0) {
        return 0;
    }
    double divisor = lin + sqrt(lin * lin + 4 * quad * time);
    return divisor > 0 ? 2 * time / divisor : HUGE_VAL;
}

static void fill_take(sp_pack *pack, int64_t i)
{
    sp_fill *f = &pack->fill;
    sp_pool_unmark(pack, i);
    f->item[f->count++] = i;
    f->sum_s += pack->s[i];
    f->sum_s2 += pack->s[i] * pack->s[i];
    f->value += pack->value[i];
}

/* Length whose time per token is what the group has left: time over its fair share of tokens. */
static double matching_length(const sp_pack *pack, double time_left, double fair_cap)
{
    const sp_fill *f = &pack->fill;
    double quad = pack->model->quad[f->j], lin = pack->model->lin[f->j];
    double tokens_left = fair_cap - f->sum_s;
    if (tokens_left <= 0 || quad <= 0) {
        return HUGE_VAL;
    }
    /* Where quad*s is a twentieth of lin, shorter items save no time to speak of: keep them for
     * the last gaps. */
    double wish = (time_left / tokens_left - lin) / quad;
    return wish > 0.05 * lin / quad ? wish : 0.05 * lin / quad;
}

/* The first item from i on that fits. */
static int64_t fill_skip(const sp_pack *pack, int64_t i)
{
    const sp_fill *f = &pack->fill;
    sp_group now = {.j = f->j, .sum_s = f->sum_s, .sum_s2 = f->sum_s2};
    while (i >= 0 && !sp_pack_fits(pack, &now, pack->s[i])) {
        i = sp_pack_pool_next(pack, i + 1);
    }
    return i;
}

/* Exchanges one item after the first `heads` for a longer one of the pool that uses what is left;
 * the most valuable such exchange, or false. */
static bool top_up(sp_pack *pack, int64_t heads)
{
    sp_fill *f = &pack->fill;
    const sp_model *m = pack->model;
    double quad = m->quad[f->j], lin = m->lin[f->j], cap = (double)m->cap[f->j], best = 0;
    int64_t best_a = -1, best_i = -1;
    for (int64_t a = heads; a < f->count; a++) {
        double s = pack->s[f->item[a]], sum_s = f->sum_s - s, sum_s2 = f->sum_s2 - s * s;
        double time_left = pack->tau - (quad * sum_s2 + lin * sum_s);
        double longest = fmin(sp_pack_longest_within(quad, lin, time_left), cap - sum_s);
        int64_t i = sp_pack_pool_next(pack, sp_pack_first_within(pack, longest));
        sp_group rest = {.j = f->j, .sum_s = sum_s, .sum_s2 = sum_s2};
        if (i >= 0 && pack->value[i] - pack->value[f->item[a]] > best &&
            sp_pack_fits(pack, &rest, pack->s[i])) {
            best = pack->value[i] - pack->value[f->item[a]];
            best_a = a;
            best_i = i;
        }
    }
    if (best_a < 0) {
        return false;
    }
    double out = pack->s[f->item[best_a]], in = pack->s[best_i];
    sp_pool_mark(pack, f->item[best_a]);
    sp_pool_unmark(pack, best_i);
    f->item[best_a] = best_i;
    f->sum_s += in - out;
    f->sum_s2 += in * in - out * out;
    f->value += best;
    return true;
}

/* Takes items of the pool until none fits: by falling length, or such as match `fair` tokens. */
static void fill_up(sp_pack *pack, double fair, const sp_fill_rule *rule)
{
    const sp_model *m = pack->model;
    sp_fill *f = &pack->fill;
    double quad = m->quad[f->j], lin = m->lin[f->j], cap = (double)m->cap[f->j];
    for (;;) {
        double time_left = pack->tau - (quad * f->sum_s2 + lin * f->sum_s);
        double longest = sp_pack_longest_within(quad, lin, time_left);
        longest = longest < cap - f->sum_s ? longest : cap - f->sum_s;
        if (longest < pack->s[pack->n - 1]) {
            break;
        }
        int64_t low = sp_pack_first_within(pack, longest), from = low;
        if (rule->by_ratio) {
            double wish = matching_length(pack, time_left, fair);
            if (rule->jitter > 0) {
                wish *= 1 + rule->jitter * (2 * ovlm_rng_uniform(rule->rng) - 1);
            }
            if (wish < longest) {
                from = sp_pack_first_within(pack, wish);
            }
        }
        int64_t i = sp_pack_pool_next(pack, from);
        i = i < 0 ? pool_prev(pack, from - 1) : i;
        if (i < low) {
            break;
        }
        /* `longest` is rounded: the predicate decides. */
        i = fill_skip(pack, i);
        if (i < 0) {
            break;
        }
        /* Short items go in by the handful: neighbours, up to a part of what is left. */
        double enough = f->sum_s + 0.4 * longest;
        do {
            fill_take(pack, i);
            i = sp_pack_pool_next(pack, i + 1);
        } while (i >= 0 && f->sum_s + pack->s[i] < enough);
    }
}

int64_t sp_pack_fill(sp_pack *pack, int64_t j, const int64_t *head, int64_t heads,
                     const sp_fill_rule *rule)
{
    sp_fill *f = &pack->fill;
    double fair = (double)pack->model->cap[j];
    if (rule->by_ratio) {
        /* Tokens per free GPU still to be placed, for d GPUs: what keeps the rest balanced. */
        double even = (double)pack->model->degree[j] * pack->fair_scale * sp_pack_even_tokens(pack);
        fair = even < fair ? even : fair;
    }
    *f = (sp_fill){.j = j, .item = f->item};
    for (int64_t a = 0; a < heads; a++) {
        fill_take(pack, head[a]);
    }
    fill_up(pack, fair, rule);
    int64_t work = 1 + f->count;
    int turns = rule->noise > 0 ? TOP_UPS : 1; /* constructions are to be quick */
    for (int turn = 0; turn < turns && f->count <= TOP_UP_ITEMS; turn++) {
        work += f->count;
        if (!top_up(pack, heads)) {
            break;
        }
    }
    for (int64_t a = 0; a < f->count; a++) {
        sp_pool_mark(pack, f->item[a]);
    }
    return work;
}
