/* dispatch_sum.c - the way back where rows went to several places, or to none.
 *
 * The source's rows are cut where the set of places that they went to changes; within a piece each
 * row has the same copies at consecutive places, so that whole runs are added.  The order is that
 * of the route's pieces, and elements do not depend on each other: any number of threads gives the
 * same bits. */
#include "engine/dispatch_state.h"
#include "plan/route.h"

/* Source rows that went together to one place; numbered in the order in which copies are added. */
typedef struct covers {
    int64_t n;
    int64_t *row, *end;
    dispatch_copy *copy; /* of the first row                                                    */
    int64_t *order;      /* by row                                                              */
} covers;

static ovlm_status find_covers(const ovlm_dispatch *d, covers *c, ovlm_arena *arena, ovlm_err *err)
{
    const dispatch_runs *out = &d->out;
    const dispatch_stay *stay = &d->stay;
    int64_t most = out->n + stay->n, i = 0;
    OVLM_TRY(OVLM_ARENA_RAW(arena, &c->row, most, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &c->end, most, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &c->copy, most, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &c->order, most, err));
    for (; i < out->n && out->peer[i] < d->rank; i++) {
        c->row[i] = out->row[i];
        c->end[i] = out->row[i] + out->wire[i + 1] - out->wire[i];
        c->copy[i] = (dispatch_copy){out->peer[i], out->wire[i]};
    }
    for (int64_t s = 0; s < stay->n; s++) {
        c->row[i + s] = stay->from[s];
        c->end[i + s] = stay->from[s] + stay->before[s + 1] - stay->before[s];
        c->copy[i + s] = (dispatch_copy){d->rank, stay->to[s]};
    }
    for (; i < out->n; i++) {
        c->row[i + stay->n] = out->row[i];
        c->end[i + stay->n] = out->row[i] + out->wire[i + 1] - out->wire[i];
        c->copy[i + stay->n] = (dispatch_copy){out->peer[i], out->wire[i]};
    }
    c->n = most;
    return route_sort_up(c->row, c->n, c->order, arena, err);
}

static bool covers_tile(const covers *c, int64_t rows)
{
    int64_t next = 0;
    for (int64_t i = 0; i < c->n; i++) {
        if (c->row[c->order[i]] != next) {
            return false;
        }
        next = c->end[c->order[i]];
    }
    return next == rows;
}

/* Puts cover x among those that hold the row, which are kept in their order. */
static void join_active(int64_t *active, int64_t *n, int64_t x)
{
    int64_t at = (*n)++;
    for (; at > 0 && active[at - 1] > x; at--) {
        active[at] = active[at - 1];
    }
    active[at] = x;
}

/* One sweep over the source's rows.  Without arrays in `sums` it only counts. */
static void sweep(const covers *c, int64_t rows, int64_t *active, dispatch_sums *sums,
                  int64_t *n_copies)
{
    int64_t at = 0, next = 0, n_active = 0;
    sums->n = sums->most = *n_copies = 0;
    while (at < rows) {
        for (; next < c->n && c->row[c->order[next]] == at; next++) {
            join_active(active, &n_active, c->order[next]);
        }
        int64_t end = next < c->n ? c->row[c->order[next]] : rows;
        for (int64_t i = 0; i < n_active; i++) {
            end = c->end[active[i]] < end ? c->end[active[i]] : end;
        }
        if (sums->row != NULL) {
            sums->row[sums->n] = at;
            sums->first[sums->n] = *n_copies;
            for (int64_t i = 0; i < n_active; i++) {
                dispatch_copy copy = c->copy[active[i]];
                copy.row += at - c->row[active[i]];
                sums->copy[*n_copies + i] = copy;
            }
        }
        sums->n++;
        *n_copies += n_active;
        sums->most = n_active > sums->most ? n_active : sums->most;
        int64_t left = 0;
        for (int64_t i = 0; i < n_active; i++) {
            active[left] = active[i];
            left += c->end[active[i]] > end;
        }
        n_active = left;
        at = end;
    }
    if (sums->row != NULL) {
        sums->row[sums->n] = rows;
        sums->first[sums->n] = *n_copies;
    }
}

static ovlm_status cut(ovlm_dispatch *d, const covers *c, ovlm_arena *scratch, ovlm_err *err)
{
    int64_t *active = NULL, n_copies = 0;
    OVLM_TRY(OVLM_ARENA_RAW(scratch, &active, c->n, err));
    dispatch_sums *sums = &d->sums;
    sweep(c, d->rows.source, active, sums, &n_copies);
    OVLM_TRY(OVLM_ARENA_RAW(&d->arena, &sums->row, sums->n + 1, err));
    OVLM_TRY(OVLM_ARENA_RAW(&d->arena, &sums->first, sums->n + 1, err));
    OVLM_TRY(OVLM_ARENA_RAW(&d->arena, &sums->copy, n_copies, err));
    sweep(c, d->rows.source, active, sums, &n_copies);
    d->rows.sums = sums->most > 1;
    return OVLM_OK;
}

ovlm_status dispatch_find_sums(ovlm_dispatch *d, ovlm_err *err)
{
    ovlm_arena scratch = {0};
    covers c = {0};
    ovlm_status status = OVLM_OK;
    OVLM_GOTO(done, find_covers(d, &c, &scratch, err));
    d->tiled = covers_tile(&c, d->rows.source);
    if (!d->tiled) {
        OVLM_GOTO(done, cut(d, &c, &scratch, err));
    }
done:
    ovlm_arena_free(&scratch);
    return status;
}

