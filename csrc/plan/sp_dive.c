/* sp_dive.c - a whole step packed group by group. */
#include "plan/sp_dive.h"

#include <math.h>

ovlm_status sp_dive_init(sp_dive *dive, const sp_model *model, int64_t n_boxes, ovlm_arena *arena,
                         ovlm_err *err)
{
    OVLM_TRY(OVLM_ARENA_NEW(arena, &dive->level, n_boxes, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &dive->item, model->n, err));
    for (int64_t k = 0; k < model->n; k++) {
        dive->item[k] = k;
    }
    return sp_pack_init(&dive->pack, model, dive->item, model->n, arena, err);
}

/* Seconds for the longest items of the pool up to an even share of its tokens, and no less than
 * the longest of them needs. */
static double level_of_share(const sp_pack *pack)
{
    const sp_model *m = pack->model;
    double share = sp_pack_even_tokens(pack) * (double)m->n_gpus;
    double tokens = 0, work = 0, longest = 0;
    for (int64_t k = sp_pack_pool_next(pack, 0); k >= 0 && tokens < share;
         k = sp_pack_pool_next(pack, k + 1)) {
        double least = HUGE_VAL, time = HUGE_VAL;
        for (int64_t j = m->min_j[k]; j < m->D; j++) {
            double alone = sp_item_time(m, k, j);
            time = fmin(time, alone);
            least = fmin(least, (double)m->degree[j] * alone);
        }
        longest = fmax(longest, time);
        work += least;
        tokens += pack->s[k];
    }
    return fmax(work / (double)m->n_gpus, longest);
}

/* The longest item of the pool that some degree with free GPUs holds within tau; -1: none. */
static int64_t next_head(const sp_pack *pack)
{
    int64_t first = pack->n;
    for (int64_t j = 0; j < pack->model->D && pack->model->degree[j] <= pack->free_gpus; j++) {
        first = pack->first[j] < first ? pack->first[j] : first;
    }
    return sp_pack_pool_next(pack, first);
}

/* The frame's groups of one box, filled as the frame supposed: where a degree costs more than
 * memory is worth, few long items beside the large ones pay for it. */
static int64_t open_frame(sp_dive *dive, const sp_frame *frame, int64_t box)
{
    sp_pack *pack = &dive->pack;
    int64_t work = 0;
    for (int64_t g = 0; g < frame->n_groups; g++) {
        int64_t count = 0;
        for (int64_t k = 0; k < frame->n && frame->group[g].box == box; k++) {
            if (frame->where[k] == g) {
                dive->item[count++] = k;
            }
        }
        if (count > 0) {
            int64_t j = frame->group[g].j;
            sp_fill_rule rule = {.by_ratio = frame->price_s > frame->excess[j]};
            work += sp_pack_fill(pack, j, dive->item, count, &rule);
            sp_pack_reopen(pack, &pack->fill);
        }
    }
    return work;
}

static void append_box(const sp_pack *pack, sp_draft *draft)
{
    int64_t g = draft->micro_start[draft->n_micro], i = draft->start[g];
    for (int64_t a = 0; a < pack->n_groups; a++) {
        draft->j[g] = pack->group[a].j;
        for (int64_t k = pack->group[a].head; k >= 0; k = pack->next[k]) {
            draft->item[i++] = k;
        }
        draft->start[++g] = i;
    }
    draft->micro_start[++draft->n_micro] = g;
}

static int64_t build_box(sp_dive *dive, const sp_aim *aim, int64_t box)
{
    sp_pack *pack = &dive->pack;
    sp_fill_rule rule = {.by_ratio = true, .degrees = 1};
    int64_t work = pack->n / 8;
    pack->n_groups = 0;
    pack->free_gpus = pack->model->n_gpus;
    pack->later_gpus = (aim->n_boxes - 1 - box) * pack->model->n_gpus;
    pack->fair_scale = aim->fill[box];
    bool framed = box < aim->frame->n_boxes;
    dive->level[box] = framed ? aim->stretch[box] * aim->frame->box[box].tau
                              : aim->stretch[box] * aim->slack * level_of_share(pack);
    /* Items of other boxes may be too long for this one. */
    (void)sp_pack_set_tau(pack, dive->level[box]);
    work += framed ? open_frame(dive, aim->frame, box) : 0;
    for (int64_t head = next_head(pack);
         head >= 0 && sp_pack_grow(pack, head, &rule, &work);) {
        head = next_head(pack);
    }
    return work;
}

int64_t sp_dive_build(sp_dive *dive, const sp_aim *aim, sp_draft *draft)
{
    sp_pack *pack = &dive->pack;
    int64_t work = 0;
    sp_pack_clear(pack);
    for (int64_t j = 0; j < pack->model->D; j++) {
        pack->theta[j] = aim->theta;
    }
    /* Items of the frame are in the pool, but nobody else sees them. */
    for (int64_t k = 0; k < aim->frame->n; k++) {
        sp_pool_unmark(pack, k);
    }
    sp_draft_begin(draft);
    for (int64_t box = 0; box < aim->n_boxes; box++) {
        dive->level[box] = 0;
    }
    for (int64_t box = 0; box < aim->n_boxes && pack->pool_n > 0; box++) {
        work += build_box(dive, aim, box);
        append_box(pack, draft);
    }
    return work;
}
