/* sp_pack.c - groups, pool, and how one group is filled. */
#include "plan/sp_pack.h"

#include <math.h>
#include <string.h>

static ovlm_status init_scratch(sp_pack *pack, ovlm_arena *arena, ovlm_err *err)
{
    int64_t n = pack->n;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &pack->fill.item, 2 * n, err));
    pack->best.item = pack->fill.item + n;
    if (!pack->model->buddy) {
        OVLM_TRY(OVLM_ARENA_NEW(arena, &pack->place_j, 2 * pack->max_groups, err));
        pack->place = pack->place_j + pack->max_groups;
    }
    return OVLM_OK;
}

/* Bucket of a length >= 1: exponent and three bits of the mantissa. */
static int64_t bucket_of(double s)
{
    uint64_t bits;
    memcpy(&bits, &s, sizeof bits);
    return (int64_t)(bits >> 49) - ((int64_t)1023 << 3);
}

/* bucket[b]: first item in bucket b or a lower one, so that an item of bucket b lies in
 * bucket[b] .. bucket[b-1]-1. */
static void fill_buckets(sp_pack *pack)
{
    int64_t i = pack->n;
    for (int64_t b = 0; b < SP_BUCKETS; b++) {
        while (i > 0 && bucket_of(pack->s[i - 1]) <= b) {
            i--;
        }
        pack->bucket[b] = i;
    }
}

ovlm_status sp_pack_init(sp_pack *pack, const sp_model *model, const int64_t *k, int64_t n,
                         ovlm_arena *arena, ovlm_err *err)
{
    int64_t most = model->n_gpus / model->degree[0];
    *pack = (sp_pack){.model = model, .n = n, .max_groups = most < n ? most : n};
    pack->words = (n + 63) / 64;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &pack->s, 2 * n, err));
    pack->value = pack->s + n;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &pack->need_j, 2 * n, err));
    pack->next = pack->need_j + n;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &pack->group, pack->max_groups, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &pack->pool, pack->words + (pack->words + 63) / 64, err));
    pack->pool_top = pack->pool + pack->words;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &pack->bucket, SP_BUCKETS, err));
    OVLM_TRY(init_scratch(pack, arena, err));
    for (int64_t i = 0; i < n; i++) {
        pack->s[i] = (double)model->s[k[i]];
    }
    fill_buckets(pack);
    for (int64_t j = 0; j < model->D; j++) {
        pack->theta[j] = 1.0;
    }
    sp_pack_clear(pack);
    return OVLM_OK;
}

static void pool_mark(sp_pack *pack, int64_t i)
{
    pack->pool[i >> 6] |= (uint64_t)1 << (i & 63);
    pack->pool_top[i >> 12] |= (uint64_t)1 << ((i >> 6) & 63);
}

static void pool_unmark(sp_pack *pack, int64_t i)
{
    pack->pool[i >> 6] &= ~((uint64_t)1 << (i & 63));
    if (pack->pool[i >> 6] == 0) {
        pack->pool_top[i >> 12] &= ~((uint64_t)1 << ((i >> 6) & 63));
    }
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

static void pool_add(sp_pack *pack, int64_t i)
{
    pool_mark(pack, i);
    pack->pool_n++;
    pack->pool_s += pack->s[i];
    pack->pool_value += pack->value[i];
}

static void pool_take(sp_pack *pack, int64_t i)
{
    pool_unmark(pack, i);
    pack->pool_n--;
    pack->pool_s -= pack->s[i];
    /* An empty pool is worth nothing: rounding must not pile up. */
    pack->pool_value = pack->pool_n == 0 ? 0.0 : pack->pool_value - pack->value[i];
}

void sp_pack_clear(sp_pack *pack)
{
    pack->n_groups = 0;
    pack->free_gpus = pack->model->n_gpus;
    pack->pool_n = 0;
    pack->pool_value = pack->pool_s = 0.0;
    for (int64_t i = 0; i < pack->n; i++) {
        pool_add(pack, i);
    }
}

/* First item whose length is at most x. */
static int64_t first_within(const sp_pack *pack, double x)
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

/* Largest s with quad*s^2 + lin*s <= time, up to rounding; in the form without cancellation. */
static double longest_within(double quad, double lin, double time)
{
    if (time <= 0) {
        return 0;
    }
    double divisor = lin + sqrt(lin * lin + 4 * quad * time);
    return divisor > 0 ? 2 * time / divisor : HUGE_VAL;
}

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
        double longest = longest_within(m->quad[j], m->lin[j], pack->tau);
        double cap = (double)m->cap[j];
        int64_t i = first_within(pack, longest < cap ? longest : cap);
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

double sp_pack_makespan(const sp_pack *pack)
{
    double longest = 0;
    for (int64_t g = 0; g < pack->n_groups; g++) {
        double time = sp_pack_time(pack, &pack->group[g]);
        longest = time > longest ? time : longest;
    }
    return longest;
}

/* Whether one more group of degree index j has a place. */
static bool can_open(sp_pack *pack, int64_t j)
{
    if (pack->model->degree[j] > pack->free_gpus || pack->n_groups == pack->max_groups) {
        return false;
    }
    if (pack->place == NULL) {
        return true;
    }
    for (int64_t g = 0; g < pack->n_groups; g++) {
        pack->place_j[g] = pack->group[g].j;
    }
    pack->place_j[pack->n_groups] = j;
    return sp_place(pack->model, pack->place_j, pack->n_groups + 1, pack->place);
}

void sp_pack_reopen(sp_pack *pack, const sp_fill *fill)
{
    sp_group *g = &pack->group[pack->n_groups++];
    *g = (sp_group){fill->j, -1, fill->count, fill->sum_s, fill->sum_s2, fill->value};
    pack->free_gpus -= pack->model->degree[fill->j];
    for (int64_t a = fill->count - 1; a >= 0; a--) {
        int64_t i = fill->item[a];
        pool_take(pack, i);
        pack->next[i] = g->head;
        g->head = i;
    }
}

bool sp_pack_open(sp_pack *pack, const sp_fill *fill)
{
    if (!can_open(pack, fill->j)) {
        return false;
    }
    sp_pack_reopen(pack, fill);
    return true;
}

void sp_pack_dissolve(sp_pack *pack, int64_t g)
{
    for (int64_t i = pack->group[g].head; i >= 0; i = pack->next[i]) {
        pool_add(pack, i);
    }
    pack->free_gpus += pack->model->degree[pack->group[g].j];
    pack->group[g] = pack->group[--pack->n_groups];
}

void sp_pack_insert(sp_pack *pack, int64_t g, int64_t i)
{
    sp_group *to = &pack->group[g];
    pool_take(pack, i);
    pack->next[i] = to->head;
    to->head = i;
    to->count++;
    to->sum_s += pack->s[i];
    to->sum_s2 += pack->s[i] * pack->s[i];
    to->value += pack->value[i];
}

void sp_pack_remove(sp_pack *pack, int64_t g, int64_t before)
{
    sp_group *from = &pack->group[g];
    int64_t *link = before < 0 ? &from->head : &pack->next[before];
    int64_t i = *link;
    *link = pack->next[i];
    from->count--;
    from->sum_s -= pack->s[i];
    from->sum_s2 -= pack->s[i] * pack->s[i];
    from->value -= pack->value[i];
    pool_add(pack, i);
}

void sp_pack_pop(sp_pack *pack, int64_t g)
{
    sp_pack_remove(pack, g, -1);
}

/* Until the group keeps the time limit: the shortest item that is enough goes, else the longest. */
static void trim(sp_pack *pack, int64_t g)
{
    sp_group *group = &pack->group[g];
    while (sp_pack_time(pack, group) > pack->tau) {
        int64_t before = -1, chosen = -1, chosen_before = -1;
        bool chosen_enough = false;
        for (int64_t i = group->head; i >= 0; before = i, i = pack->next[i]) {
            double s = pack->s[i];
            sp_group rest = {.j = group->j, .sum_s = group->sum_s - s, .sum_s2 = group->sum_s2 - s * s};
            bool enough = sp_pack_time(pack, &rest) <= pack->tau;
            bool better = chosen < 0 || (enough && !chosen_enough) ||
                          (enough == chosen_enough && enough == (s < pack->s[chosen]));
            if (better) {
                chosen = i;
                chosen_before = before;
                chosen_enough = enough;
            }
        }
        sp_pack_remove(pack, g, chosen_before);
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

static void fill_take(sp_pack *pack, int64_t i)
{
    sp_fill *f = &pack->fill;
    pool_unmark(pack, i);
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
    /* Below a twentieth of lin, shorter items save no time to speak of: keep them for the last gaps. */
    double wish = (time_left / tokens_left - lin) / quad;
    return wish > 0.05 * lin / quad ? wish : 0.05 * lin / quad;
}

void sp_pack_fill(sp_pack *pack, int64_t j, int64_t head, const sp_fill_rule *rule)
{
    const sp_model *m = pack->model;
    sp_fill *f = &pack->fill;
    double quad = m->quad[j], lin = m->lin[j], cap = (double)m->cap[j], d = (double)m->degree[j];
    double fair = cap;
    if (rule->by_ratio) {
        /* Tokens per free GPU still to be placed, for d GPUs: what keeps the rest balanced. */
        fair = d * pack->pool_s / (double)pack->free_gpus;
        fair = fair < cap ? fair : cap;
    }
    *f = (sp_fill){.j = j, .item = f->item};
    fill_take(pack, head);
    for (;;) {
        double time_left = pack->tau - (quad * f->sum_s2 + lin * f->sum_s);
        double longest = longest_within(quad, lin, time_left);
        longest = longest < cap - f->sum_s ? longest : cap - f->sum_s;
        if (longest < pack->s[pack->n - 1]) {
            break;
        }
        int64_t low = first_within(pack, longest), from = low;
        if (rule->by_ratio) {
            double wish = matching_length(pack, time_left, fair);
            if (rule->jitter > 0) {
                wish *= 1 + rule->jitter * (2 * ovlm_rng_uniform(rule->rng) - 1);
            }
            if (wish < longest) {
                from = first_within(pack, wish);
            }
        }
        int64_t i = sp_pack_pool_next(pack, from);
        i = i < 0 ? pool_prev(pack, from - 1) : i;
        if (i < low) {
            break;
        }
        /* `longest` is rounded: the predicate decides. */
        sp_group now = {.j = j, .sum_s = f->sum_s, .sum_s2 = f->sum_s2};
        while (i >= 0 && !sp_pack_fits(pack, &now, pack->s[i])) {
            i = sp_pack_pool_next(pack, i + 1);
        }
        if (i < 0) {
            break;
        }
        fill_take(pack, i);
    }
    for (int64_t a = 0; a < f->count; a++) {
        pool_mark(pack, f->item[a]);
    }
}
