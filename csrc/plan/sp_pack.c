/* sp_pack.c - groups opened, changed and dissolved; what is not in one is in the pool. */
#include "plan/sp_pack.h"

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

ovlm_status sp_pack_init(sp_pack *pack, const sp_model *model, const int64_t *k, int64_t n,
                         ovlm_arena *arena, ovlm_err *err)
{
    int64_t most = model->n_gpus / model->degree[0];
    *pack = (sp_pack){.model = model, .n = n, .max_groups = most < n ? most : n,
                      .fair_scale = 1};
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
    sp_pack_index(pack);
    for (int64_t j = 0; j < model->D; j++) {
        pack->theta[j] = 1.0;
    }
    sp_pack_clear(pack);
    return OVLM_OK;
}

static void pool_add(sp_pack *pack, int64_t i)
{
    sp_pool_mark(pack, i);
    pack->pool_n++;
    pack->pool_s += pack->s[i];
    pack->pool_value += pack->value[i];
}

static void pool_take(sp_pack *pack, int64_t i)
{
    sp_pool_unmark(pack, i);
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

