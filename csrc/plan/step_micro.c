/* step_micro.c - a rank's items into micro-batches: bin packing under the rank's memory.
 *
 * Best fit decreasing tells how many micro-batches a rank needs.  With as many as the neediest rank
 * has, every rank then prefers an even spread (longest first into the lightest that has room), and
 * falls back on best fit where that does not fit. */
#include <string.h>

#include "plan/route.h"
#include "plan/step.h"

/* One rank's items, longest first, and the bins they go to. */
typedef struct packing {
    const step_work *work;
    const int64_t *item; /* [n] */
    int64_t n;
    int64_t *used; /* [bins] */
    int64_t *micro;
} packing;

/* The bin that takes the item, or -1: the fullest (best fit) or the emptiest. */
static int64_t choose(const packing *pack, int64_t n_bins, int64_t length, bool best_fit)
{
    int64_t chosen = -1;
    for (int64_t b = 0; b < n_bins; b++) {
        if (length > pack->work->capacity - pack->used[b]) {
            continue;
        }
        if (chosen < 0 || (best_fit ? pack->used[b] > pack->used[chosen]
                                    : pack->used[b] < pack->used[chosen])) {
            chosen = b;
        }
    }
    return chosen;
}

static bool even_spread(packing *pack, int64_t n_bins)
{
    memset(pack->used, 0, (size_t)n_bins * sizeof *pack->used);
    for (int64_t i = 0; i < pack->n; i++) {
        int64_t length = pack->work->length[pack->item[i]];
        int64_t bin = choose(pack, n_bins, length, false);
        if (bin < 0) {
            return false;
        }
        pack->used[bin] += length;
        pack->micro[pack->item[i]] = bin;
    }
    return true;
}

/* Bins that best fit decreasing takes. */
static int64_t best_fit(packing *pack)
{
    int64_t n_bins = 0;
    for (int64_t i = 0; i < pack->n; i++) {
        int64_t length = pack->work->length[pack->item[i]];
        int64_t bin = choose(pack, n_bins, length, true);
        if (bin < 0) {
            bin = n_bins++;
            pack->used[bin] = 0;
        }
        pack->used[bin] += length;
        pack->micro[pack->item[i]] = bin;
    }
    return n_bins;
}

ovlm_status step_micro_pack(const step_work *work, int64_t n_ranks, const int64_t *rank,
                            int64_t at_least, int64_t limit, int64_t *micro, int64_t *n_micro,
                            bool *fits, ovlm_arena *arena, ovlm_err *err)
{
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    int64_t *by_length = NULL, *order = NULL, *start = NULL, *needs = NULL, *used = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &by_length, work->n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &order, work->n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &start, n_ranks + 1, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &needs, n_ranks, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &used, work->n + at_least, err));
    OVLM_TRY(ovlm_sort_i64(work->length, work->n, by_length, arena, err));
    route_group(rank, n_ranks, by_length, work->n, order, start);
    *n_micro = at_least;
    for (int64_t r = 0; r < n_ranks; r++) {
        packing pack = {work, order + start[r], start[r + 1] - start[r], used, micro};
        if (!even_spread(&pack, at_least)) {
            needs[r] = best_fit(&pack);
        }
        *n_micro = needs[r] > *n_micro ? needs[r] : *n_micro;
    }
    *fits = *n_micro <= limit;
    /* ranks that best fit had to pack: evenly after all, if the final number allows it */
    for (int64_t r = 0; r < n_ranks && *fits && *n_micro > at_least; r++) {
        packing pack = {work, order + start[r], start[r + 1] - start[r], used, micro};
        if (!even_spread(&pack, *n_micro)) {
            (void)best_fit(&pack);
        }
    }
    ovlm_arena_rewind(arena, mark);
    return OVLM_OK;
}
