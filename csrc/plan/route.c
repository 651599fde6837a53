/* route.c - rows between ranks: check, invert, compose.
 *
 * A route is a bijection between the rows that all ranks hold before and after, kept as intervals.
 * Composition intersects the intervals that `first` delivers with those that `second` sends, in one
 * sweep: the item numbers need not be looked at, and are compared only to refuse routes that do not
 * belong together. */
#include "plan/route.h"

#include <stdlib.h>
#include <string.h>

static const int64_t MAX_ROWS = (int64_t)1 << 62;

void route_group(const int64_t *key, int64_t n_keys, const int64_t *in, int64_t n, int64_t *out,
                 int64_t *start)
{
    memset(start, 0, (size_t)(n_keys + 1) * sizeof *start);
    for (int64_t i = 0; i < n; i++) {
        start[key[i] + 1]++;
    }
    for (int64_t b = 0; b < n_keys; b++) {
        start[b + 1] += start[b];
    }
    /* start[b] serves as the cursor of b and ends as the start of b + 1: shifted back below. */
    for (int64_t p = 0; p < n; p++) {
        int64_t i = in ? in[p] : p;
        out[start[key[i]]++] = i;
    }
    memmove(start + 1, start, (size_t)n_keys * sizeof *start);
    start[0] = 0;
}

ovlm_status route_sort_up(const int64_t *key, int64_t n, int64_t *order, ovlm_arena *arena,
                          ovlm_err *err)
{
    int64_t max = 0;
    bool sorted = true;
    for (int64_t i = 0; i < n; i++) {
        order[i] = i;
        max = key[i] > max ? key[i] : max;
        sorted = sorted && (i == 0 || key[i - 1] <= key[i]);
    }
    if (sorted) {
        return OVLM_OK;
    }
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    int64_t *down = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &down, n, err));
    for (int64_t i = 0; i < n; i++) {
        down[i] = max - key[i];
    }
    OVLM_TRY(ovlm_sort_i64(down, n, order, arena, err));
    ovlm_arena_rewind(arena, mark);
    return OVLM_OK;
}

ovlm_status ovlm_route_init(ovlm_route *route, int64_t k, int64_t n_ranks, ovlm_err *err)
{
    *route = (ovlm_route){.k = k, .n_ranks = n_ranks};
    int64_t **column[] = {&route->item,        &route->first_row, &route->n_rows,
                          &route->source,      &route->destination, &route->send_row,
                          &route->receive_row};
    for (size_t c = 0; c < sizeof column / sizeof column[0]; c++) {
        ovlm_status status = OVLM_HEAP_RAW(column[c], k, err);
        if (status != OVLM_OK) {
            ovlm_route_free(route);
            return status;
        }
    }
    return OVLM_OK;
}

void ovlm_route_free(ovlm_route *route)
{
    free(route->item);
    free(route->first_row);
    free(route->n_rows);
    free(route->source);
    free(route->destination);
    free(route->send_row);
    free(route->receive_row);
    *route = (ovlm_route){0};
}

static ovlm_status check_ranges(const ovlm_route *route, ovlm_err *err)
{
    if (route->n_ranks < 1 || route->k < 0) {
        return OVLM_FAIL(err, OVLM_E_ARG, "a route needs n_ranks >= 1; got %lld",
                         (long long)route->n_ranks);
    }
    int64_t total = 0;
    for (int64_t p = 0; p < route->k; p++) {
        int64_t source = route->source[p], destination = route->destination[p];
        if (source < 0 || source >= route->n_ranks || destination < 0 ||
            destination >= route->n_ranks) {
            return OVLM_FAIL(err, OVLM_E_ARG,
                             "route piece %lld goes from rank %lld to rank %lld; ranks are 0 to "
                             "%lld",
                             (long long)p, (long long)source, (long long)destination,
                             (long long)route->n_ranks - 1);
        }
        if (route->item[p] < 0 || route->first_row[p] < 0 || route->first_row[p] >= MAX_ROWS ||
            route->n_rows[p] < 1 || route->n_rows[p] > MAX_ROWS - total) {
            return OVLM_FAIL(err, OVLM_E_ARG,
                             "route piece %lld has item %lld, first row %lld, %lld rows",
                             (long long)p, (long long)route->item[p],
                             (long long)route->first_row[p], (long long)route->n_rows[p]);
        }
        total += route->n_rows[p];
    }
    return OVLM_OK;
}

/* Pieces by (destination, receive_row), each beginning where the one before it ends. */
static ovlm_status check_arrivals(const ovlm_route *route, ovlm_err *err)
{
    int64_t next = 0;
    for (int64_t p = 0; p < route->k; p++) {
        if (p > 0 && route->destination[p] != route->destination[p - 1]) {
            next = 0;
        }
        if (route->receive_row[p] != next ||
            (p > 0 && route->destination[p] < route->destination[p - 1])) {
            return OVLM_FAIL(err, OVLM_E_ARG,
                             "route piece %lld arrives at row %lld of rank %lld; row %lld is next",
                             (long long)p, (long long)route->receive_row[p],
                             (long long)route->destination[p], (long long)next);
        }
        next += route->n_rows[p];
    }
    return OVLM_OK;
}

ovlm_status ovlm_route_check_arrivals(const ovlm_route *route, ovlm_err *err)
{
    OVLM_TRY(check_ranges(route, err));
    return check_arrivals(route, err);
}

ovlm_status route_send_order(const ovlm_route *route, int64_t *order, ovlm_arena *arena,
                             ovlm_err *err)
{
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    int64_t *by_row = NULL, *start = NULL;
    for (int64_t p = 0; p < route->k; p++) {
        if (route->send_row[p] < 0) {
            return OVLM_FAIL(err, OVLM_E_ARG, "route piece %lld leaves from row %lld",
                             (long long)p, (long long)route->send_row[p]);
        }
    }
    OVLM_TRY(OVLM_ARENA_NEW(arena, &by_row, route->k, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &start, route->n_ranks + 1, err));
    OVLM_TRY(route_sort_up(route->send_row, route->k, by_row, arena, err));
    route_group(route->source, route->n_ranks, by_row, route->k, order, start);
    int64_t next = 0;
    for (int64_t i = 0; i < route->k; i++) {
        int64_t p = order[i];
        next = i > 0 && route->source[p] == route->source[order[i - 1]] ? next : 0;
        if (route->send_row[p] != next) {
            return OVLM_FAIL(err, OVLM_E_ARG,
                             "route piece %lld leaves from row %lld of rank %lld; row %lld is next",
                             (long long)p, (long long)route->send_row[p],
                             (long long)route->source[p], (long long)next);
        }
        next += route->n_rows[p];
    }
    ovlm_arena_rewind(arena, mark);
    return OVLM_OK;
}

/* Everything about a route, leaving the pieces' order of departure in `order`. */
static ovlm_status check_all(const ovlm_route *route, int64_t **order, ovlm_arena *arena,
                             ovlm_err *err)
{
    OVLM_TRY(ovlm_route_check_arrivals(route, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, order, route->k, err));
    return route_send_order(route, *order, arena, err);
}

ovlm_status ovlm_route_check(const ovlm_route *route, ovlm_err *err)
{
    ovlm_arena arena = {0};
    int64_t *order = NULL;
    ovlm_status status = check_all(route, &order, &arena, err);
    ovlm_arena_free(&arena);
    return status;
}

ovlm_status ovlm_route_invert(const ovlm_route *route, ovlm_route *out, ovlm_err *err)
{
    ovlm_arena arena = {0};
    int64_t *order = NULL;
    ovlm_status status = OVLM_OK;
    OVLM_GOTO(done, check_all(route, &order, &arena, err));
    OVLM_GOTO(done, ovlm_route_init(out, route->k, route->n_ranks, err));
    for (int64_t i = 0; i < route->k; i++) {
        int64_t p = order[i];
        out->item[i] = route->item[p];
        out->first_row[i] = route->first_row[p];
        out->n_rows[i] = route->n_rows[p];
        out->source[i] = route->destination[p];
        out->destination[i] = route->source[p];
        out->send_row[i] = route->receive_row[p];
        out->receive_row[i] = route->send_row[p];
    }
done:
    ovlm_arena_free(&arena);
    return status;
}

/* One interval that both routes carry: piece a of the first, piece b of the second. */
typedef struct meeting {
    int64_t a, b, row, n_rows; /* row: on the rank between them */
} meeting;

static ovlm_status do_not_meet(const ovlm_route *second, int64_t b, int64_t rank, ovlm_err *err)
{
    if (b < 0) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "routes do not compose: rank %lld receives rows that the second does not "
                         "send", (long long)rank);
    }
    return OVLM_FAIL(err, OVLM_E_ARG,
                     "routes do not compose: at rank %lld the second sends item %lld from row "
                     "%lld, which the first does not deliver there",
                     (long long)rank, (long long)second->item[b], (long long)second->first_row[b]);
}

/* Both lists of intervals tile the same rows, so one sweep meets them all: at most k1 + k2. */
static ovlm_status meet(const ovlm_route *first, const ovlm_route *second, const int64_t *order,
                        meeting *met, int64_t *n_met, ovlm_err *err)
{
    int64_t i = 0, a = 0, row = 0, n = 0;
    for (; i < second->k && a < first->k; n++) {
        int64_t b = order[i], rank = second->source[b];
        int64_t from_a = row - first->receive_row[a], from_b = row - second->send_row[b];
        if (first->destination[a] != rank || from_b < 0 || from_a < 0 ||
            first->item[a] != second->item[b] ||
            first->first_row[a] + from_a != second->first_row[b] + from_b) {
            return do_not_meet(second, b, rank, err);
        }
        int64_t left_a = first->n_rows[a] - from_a, left_b = second->n_rows[b] - from_b;
        int64_t step = left_a < left_b ? left_a : left_b;
        met[n] = (meeting){a, b, row, step};
        row += step;
        a += step == left_a;
        i += step == left_b;
        if (a < first->k && first->destination[a] != rank && step == left_a) {
            row = 0;
        }
    }
    if (a < first->k) {
        return do_not_meet(second, -1, first->destination[a], err);
    }
    *n_met = n;
    return i == second->k ? OVLM_OK
                          : do_not_meet(second, order[i], second->source[order[i]], err);
}

/* The composed route from the meetings, in order of (destination, receive_row). */
static ovlm_status join(const ovlm_route *first, const ovlm_route *second, const meeting *met,
                        int64_t n, ovlm_route *out, ovlm_arena *arena, ovlm_err *err)
{
    int64_t *piece = NULL, *start = NULL, *order = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &piece, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &order, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &start, second->k + 1, err));
    for (int64_t m = 0; m < n; m++) {
        piece[m] = met[m].b;
    }
    /* the second's pieces are in the wanted order, and meetings of one piece come row by row */
    route_group(piece, second->k, NULL, n, order, start);
    OVLM_TRY(ovlm_route_init(out, n, second->n_ranks, err));
    for (int64_t i = 0; i < n; i++) {
        const meeting *x = &met[order[i]];
        int64_t from_a = x->row - first->receive_row[x->a];
        out->item[i] = first->item[x->a];
        out->first_row[i] = first->first_row[x->a] + from_a;
        out->n_rows[i] = x->n_rows;
        out->source[i] = first->source[x->a];
        out->destination[i] = second->destination[x->b];
        out->send_row[i] = first->send_row[x->a] + from_a;
        out->receive_row[i] = second->receive_row[x->b] + x->row - second->send_row[x->b];
    }
    return OVLM_OK;
}

ovlm_status ovlm_route_compose(const ovlm_route *first, const ovlm_route *second, ovlm_route *out,
                               ovlm_err *err)
{
    ovlm_arena arena = {0};
    int64_t *order = NULL, *departures = NULL, n = 0;
    meeting *met = NULL;
    ovlm_status status = OVLM_OK;
    if (first->n_ranks != second->n_ranks) {
        return OVLM_FAIL(err, OVLM_E_ARG, "routes do not compose: %lld ranks, then %lld",
                         (long long)first->n_ranks, (long long)second->n_ranks);
    }
    OVLM_GOTO(done, check_all(first, &departures, &arena, err));
    OVLM_GOTO(done, check_all(second, &order, &arena, err));
    OVLM_GOTO(done, OVLM_ARENA_NEW(&arena, &met, first->k + second->k, err));
    OVLM_GOTO(done, meet(first, second, order, met, &n, err));
    OVLM_GOTO(done, join(first, second, met, n, out, &arena, err));
done:
    ovlm_arena_free(&arena);
    return status;
}
