/* route_bytes.c - a route of rows as a route of bytes, for items whose rows differ in width.
 *
 * Pixels of several sizes, compressed pictures, sounds: what an item takes is known for all items
 * on all ranks, as lengths are, so nobody has to be told the sizes of what arrives. */
#include "plan/route.h"

static const int64_t MAX_BYTES = (int64_t)1 << 62;

/* rows[i] = rows of item i, over all of its pieces. */
static ovlm_status count_rows(const ovlm_route *route, int64_t n_items, int64_t *rows,
                              ovlm_err *err)
{
    for (int64_t p = 0; p < route->k; p++) {
        int64_t item = route->item[p];
        if (item >= n_items) {
            return OVLM_FAIL(err, OVLM_E_ARG,
                             "item_bytes must have an entry for every item: piece %lld of the "
                             "route carries item %lld of %lld",
                             (long long)p, (long long)item, (long long)n_items);
        }
        rows[item] += route->n_rows[p];
    }
    return OVLM_OK;
}

/* first_row and n_rows of each piece, in bytes. */
static ovlm_status scale_pieces(const ovlm_route *route, const int64_t *item_bytes,
                                const int64_t *rows, ovlm_route *out, ovlm_err *err)
{
    int64_t total = 0;
    for (int64_t p = 0; p < route->k; p++) {
        int64_t item = route->item[p], n = rows[item], bytes = item_bytes[item];
        if (bytes < 0 || bytes > MAX_BYTES) {
            return OVLM_FAIL(err, OVLM_E_ARG, "item_bytes[%lld] is %lld; it must be in [0, 2^62]",
                             (long long)item, (long long)bytes);
        }
        if (bytes % n != 0 && route->n_rows[p] != n) {
            return OVLM_FAIL(err, OVLM_E_ARG,
                             "item_bytes[%lld] is %lld for %lld rows that travel in pieces; it "
                             "must be a multiple of the rows",
                             (long long)item, (long long)bytes, (long long)n);
        }
        /* a whole piece has no remainder to lose */
        bool whole = route->n_rows[p] == n;
        out->first_row[p] = whole ? 0 : route->first_row[p] * (bytes / n);
        out->n_rows[p] = whole ? bytes : route->n_rows[p] * (bytes / n);
        if (out->n_rows[p] > MAX_BYTES - total) {
            return OVLM_FAIL(err, OVLM_E_ARG, "item_bytes: more than 2^62 bytes in all");
        }
        total += out->n_rows[p];
    }
    return OVLM_OK;
}

/* Pieces without bytes are left out: they would have no row. */
static int64_t drop_empty(const ovlm_route *route, ovlm_route *out)
{
    int64_t k = 0;
    for (int64_t p = 0; p < route->k; p++) {
        if (out->n_rows[p] > 0) {
            out->item[k] = route->item[p];
            out->first_row[k] = out->first_row[p];
            out->n_rows[k] = out->n_rows[p];
            out->source[k] = route->source[p];
            out->destination[k] = route->destination[p];
            out->send_row[k] = out->send_row[p];
            out->receive_row[k++] = out->receive_row[p];
        }
    }
    return k;
}

/* Where pieces leave from and arrive at, one after the other as their rows did. */
static void place_pieces(const ovlm_route *route, const int64_t *order, ovlm_route *out)
{
    int64_t next = 0;
    for (int64_t i = 0; i < route->k; i++) {
        int64_t p = order[i];
        next = i > 0 && route->source[p] == route->source[order[i - 1]] ? next : 0;
        out->send_row[p] = next;
        next += out->n_rows[p];
    }
    for (int64_t p = 0; p < route->k; p++) {
        next = p > 0 && route->destination[p] == route->destination[p - 1] ? next : 0;
        out->receive_row[p] = next;
        next += out->n_rows[p];
    }
}

ovlm_status ovlm_route_bytes(const ovlm_route *route, const int64_t *item_bytes, int64_t n_items,
                             ovlm_route *out, ovlm_err *err)
{
    ovlm_arena arena = {0};
    int64_t *order = NULL, *rows = NULL;
    ovlm_status status = OVLM_OK;
    *out = (ovlm_route){0};
    OVLM_GOTO(done, ovlm_route_check_arrivals(route, err));
    OVLM_GOTO(done, OVLM_ARENA_NEW(&arena, &order, route->k, err));
    OVLM_GOTO(done, route_send_order(route, order, &arena, err));
    OVLM_GOTO(done, OVLM_ARENA_NEW(&arena, &rows, n_items, err));
    OVLM_GOTO(done, count_rows(route, n_items, rows, err));
    OVLM_GOTO(done, ovlm_route_init(out, route->k, route->n_ranks, err));
    OVLM_GOTO(done, scale_pieces(route, item_bytes, rows, out, err));
    place_pieces(route, order, out);
    out->k = drop_empty(route, out);
done:
    ovlm_arena_free(&arena);
    if (status != OVLM_OK) {
        ovlm_route_free(out);
    }
    return status;
}
