/* dispatch.c - one rank's part in a route: which of its rows go where, as runs.
 *
 * Pieces of a route come by (destination, receive_row).  Both ends of a pair of ranks put their
 * rows on the wire in that order, so neither has to tell the other what comes.  Pieces that follow
 * each other in the array as on the wire become one run, one memcpy. */
#include "engine/dispatch.h"

#include <stdlib.h>

#include "engine/dispatch_state.h"
#include "plan/route.h"

static int64_t at_destination(const ovlm_dispatch_spec *spec, int64_t p)
{
    return spec->place != NULL ? spec->place[p] : spec->route->receive_row[p];
}

/* First piece that arrives at `rank` or at a rank above. */
static int64_t first_arrival(const ovlm_route *route, int64_t rank)
{
    int64_t low = 0, high = route->k;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (route->destination[middle] < rank) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

/* Rows of the arrays: as the spec says, or as far as pieces reach. */
static ovlm_status settle_rows(const ovlm_dispatch_spec *spec, int64_t begin, int64_t end,
                               ovlm_dispatch *d, ovlm_err *err)
{
    const ovlm_route *route = spec->route;
    int64_t source = 0, destination = 0;
    for (int64_t p = 0; p < route->k; p++) {
        if (route->source[p] != spec->rank) {
            continue;
        }
        if (route->send_row[p] < 0 || route->send_row[p] > INT64_MAX - route->n_rows[p]) {
            return OVLM_FAIL(err, OVLM_E_ARG, "route piece %lld leaves from row %lld", (long long)p,
                             (long long)route->send_row[p]);
        }
        int64_t last = route->send_row[p] + route->n_rows[p];
        source = last > source ? last : source;
    }
    for (int64_t p = begin; p < end; p++) {
        int64_t at = at_destination(spec, p);
        if (at < destination || at > INT64_MAX - route->n_rows[p]) {
            return OVLM_FAIL(err, OVLM_E_ARG,
                             "place[%lld] is %lld; places ascend within a rank, and row %lld is "
                             "the next that is free",
                             (long long)p, (long long)at, (long long)destination);
        }
        destination = at + route->n_rows[p];
    }
    d->rows.source = spec->source_rows < 0 ? source : spec->source_rows;
    d->rows.destination = spec->destination_rows < 0 ? destination : spec->destination_rows;
    if (source > d->rows.source || destination > d->rows.destination) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "rank %lld has arrays of %lld rows before and %lld after; the route takes "
                         "%lld and %lld",
                         (long long)spec->rank, (long long)d->rows.source,
                         (long long)d->rows.destination, (long long)source,
                         (long long)destination);
    }
    return OVLM_OK;
}

static ovlm_status new_runs(dispatch_runs *runs, int64_t most, int64_t n_ranks, ovlm_arena *arena,
                            ovlm_err *err)
{
    runs->n = 0;
    runs->direct = true;
    OVLM_TRY(OVLM_ARENA_RAW(arena, &runs->row, most, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &runs->peer, most, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &runs->wire, most + 1, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &runs->peer_wire, n_ranks + 1, err));
    return OVLM_ARENA_NEW(arena, &runs->peer_row, n_ranks, err);
}

/* Peers come in ascending order.  peer_wire[r + 1] holds r's rows until end_runs. */
static void add_run(dispatch_runs *runs, int64_t peer, int64_t row, int64_t n_rows)
{
    int64_t last = runs->n - 1;
    bool again = last >= 0 && runs->peer[last] == peer;
    int64_t ends = again ? runs->row[last] + runs->wire[last + 1] - runs->wire[last] : -1;
    runs->peer_wire[peer + 1] += n_rows;
    if (again && ends == row) {
        runs->wire[last + 1] += n_rows;
        return;
    }
    runs->direct = runs->direct && !again;
    runs->peer_row[peer] = row;
    runs->row[runs->n] = row;
    runs->peer[runs->n] = peer;
    runs->n++;
    runs->wire[runs->n] = runs->wire[runs->n - 1] + n_rows;
}

static void end_runs(dispatch_runs *runs, int64_t n_ranks)
{
    for (int64_t r = 0; r < n_ranks; r++) {
        runs->peer_wire[r + 1] += runs->peer_wire[r];
    }
}

static void add_stay(dispatch_stay *stay, int64_t from, int64_t to, int64_t n_rows)
{
    int64_t last = stay->n - 1;
    if (last >= 0) {
        int64_t rows = stay->before[last + 1] - stay->before[last];
        if (stay->from[last] + rows == from && stay->to[last] + rows == to) {
            stay->before[last + 1] += n_rows;
            return;
        }
    }
    stay->from[stay->n] = from;
    stay->to[stay->n] = to;
    stay->n++;
    stay->before[stay->n] = stay->before[stay->n - 1] + n_rows;
}

/* Pieces that leave, in the route's order. */
static ovlm_status find_departures(const ovlm_dispatch_spec *spec, ovlm_dispatch *d, ovlm_err *err)
{
    const ovlm_route *route = spec->route;
    int64_t n_out = 0, n_stay = 0;
    for (int64_t p = 0; p < route->k; p++) {
        bool own = route->source[p] == spec->rank, stays = route->destination[p] == spec->rank;
        n_out += own && !stays;
        n_stay += own && stays;
    }
    OVLM_TRY(new_runs(&d->out, n_out, d->n_ranks, &d->arena, err));
    OVLM_TRY(OVLM_ARENA_RAW(&d->arena, &d->stay.from, n_stay, err));
    OVLM_TRY(OVLM_ARENA_RAW(&d->arena, &d->stay.to, n_stay, err));
    OVLM_TRY(OVLM_ARENA_NEW(&d->arena, &d->stay.before, n_stay + 1, err));
    for (int64_t p = 0; p < route->k; p++) {
        if (route->source[p] != spec->rank) {
            continue;
        }
        if (route->destination[p] == spec->rank) {
            add_stay(&d->stay, route->send_row[p], at_destination(spec, p), route->n_rows[p]);
        } else {
            add_run(&d->out, route->destination[p], route->send_row[p], route->n_rows[p]);
        }
    }
    end_runs(&d->out, d->n_ranks);
    return OVLM_OK;
}

/* Pieces begin .. end-1 arrive: by source, and for each in the route's order. */
static ovlm_status find_arrivals(const ovlm_dispatch_spec *spec, int64_t begin, int64_t end,
                                 ovlm_dispatch *d, ovlm_err *err)
{
    const ovlm_route *route = spec->route;
    int64_t n = end - begin, *order = NULL, *start = NULL;
    OVLM_TRY(new_runs(&d->in, n, d->n_ranks, &d->arena, err));
    ovlm_arena_mark mark = ovlm_arena_save(&d->arena);
    OVLM_TRY(OVLM_ARENA_RAW(&d->arena, &order, n, err));
    OVLM_TRY(OVLM_ARENA_RAW(&d->arena, &start, d->n_ranks + 1, err));
    route_group(route->source + begin, d->n_ranks, NULL, n, order, start);
    for (int64_t i = 0; i < n; i++) {
        int64_t p = begin + order[i];
        if (route->source[p] != spec->rank) {
            add_run(&d->in, route->source[p], at_destination(spec, p), route->n_rows[p]);
        }
    }
    end_runs(&d->in, d->n_ranks);
    ovlm_arena_rewind(&d->arena, mark);
    return OVLM_OK;
}

static ovlm_status fill(const ovlm_dispatch_spec *spec, ovlm_dispatch *d, ovlm_err *err)
{
    const ovlm_route *route = spec->route;
    OVLM_TRY(ovlm_route_check_arrivals(route, err));
    if (spec->rank < 0 || spec->rank >= route->n_ranks) {
        return OVLM_FAIL(err, OVLM_E_ARG, "rank is %lld; the route has ranks 0 to %lld",
                         (long long)spec->rank, (long long)route->n_ranks - 1);
    }
    int64_t begin = first_arrival(route, spec->rank);
    int64_t end = first_arrival(route, spec->rank + 1);
    d->rank = spec->rank;
    d->n_ranks = route->n_ranks;
    OVLM_TRY(settle_rows(spec, begin, end, d, err));
    OVLM_TRY(find_departures(spec, d, err));
    OVLM_TRY(find_arrivals(spec, begin, end, d, err));
    d->rows.sent = d->out.wire[d->out.n];
    d->rows.received = d->in.wire[d->in.n];
    d->rows.stay = d->stay.before[d->stay.n];
    return dispatch_find_sums(d, err);
}

ovlm_status ovlm_dispatch_prepare(const ovlm_dispatch_spec *spec, ovlm_dispatch **out,
                                  ovlm_err *err)
{
    *out = NULL;
    ovlm_dispatch *d = NULL;
    OVLM_TRY(OVLM_HEAP_NEW(&d, 1, err));
    ovlm_status status = fill(spec, d, err);
    if (status != OVLM_OK) {
        ovlm_dispatch_free(d);
        return status;
    }
    *out = d;
    return OVLM_OK;
}

void ovlm_dispatch_free(ovlm_dispatch *dispatch)
{
    if (dispatch != NULL) {
        ovlm_arena_free(&dispatch->arena);
        free(dispatch);
    }
}

ovlm_dispatch_rows ovlm_dispatch_count(const ovlm_dispatch *dispatch)
{
    return dispatch->rows;
}
