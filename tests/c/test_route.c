/* test_route.c - routes moved by hand: every row carries (item, row), ranks are plain arrays; the
 * same for rows of several widths, byte by byte. */
#include "test.h"

#include <string.h>

#include "ovlm.h"

enum { MAX_ITEMS = 40, MAX_ROWS = 400, MAX_N = 16 };

typedef struct rows {
    int64_t count[MAX_N];
    int64_t id[MAX_N][MAX_ROWS]; /* item*MAX_ROWS + row; -1 = nothing */
} rows;

/* Items in pieces over ranks in some order: one way to hold the same rows. */
typedef struct layout {
    int64_t n, item[MAX_ROWS], first[MAX_ROWS], n_rows[MAX_ROWS], rank[MAX_ROWS];
} layout;

static void draw_layout(layout *x, int64_t n_items, const int64_t *length, int64_t n_ranks,
                        bool whole)
{
    x->n = 0;
    for (int64_t i = 0; i < n_items; i++) {
        for (int64_t row = 0; row < length[i];) {
            int64_t left = length[i] - row;
            int64_t step = whole ? left : 1 + ovlm_rng_below(&test_rng, left);
            x->item[x->n] = i;
            x->first[x->n] = row;
            x->n_rows[x->n] = step;
            x->rank[x->n++] = ovlm_rng_below(&test_rng, n_ranks);
            row += step;
        }
    }
    for (int64_t p = x->n - 1; p > 0; p--) {
        int64_t other = ovlm_rng_below(&test_rng, p + 1);
        int64_t *column[] = {x->item, x->first, x->n_rows, x->rank};
        for (int c = 0; c < 4; c++) {
            int64_t swap = column[c][p];
            column[c][p] = column[c][other];
            column[c][other] = swap;
        }
    }
}

static void fill(const layout *x, rows *out)
{
    memset(out, 0, sizeof *out);
    for (int64_t p = 0; p < x->n; p++) {
        for (int64_t r = 0; r < x->n_rows[p]; r++) {
            int64_t rank = x->rank[p];
            out->id[rank][out->count[rank]++] = x->item[p] * MAX_ROWS + x->first[p] + r;
        }
    }
}

/* The route between two layouts, row by row. */
static void route_between(const rows *from, const rows *to, int64_t n_ranks, ovlm_route *route)
{
    ovlm_err err = {0};
    int64_t k = 0;
    for (int64_t rank = 0; rank < n_ranks; rank++) {
        k += to->count[rank];
    }
    CHECK(ovlm_route_init(route, k, n_ranks, &err) == OVLM_OK, "%s", err.message);
    k = 0;
    for (int64_t rank = 0; rank < n_ranks; rank++) {
        for (int64_t r = 0; r < to->count[rank]; r++, k++) {
            int64_t id = to->id[rank][r];
            route->item[k] = id / MAX_ROWS;
            route->first_row[k] = id % MAX_ROWS;
            route->n_rows[k] = 1;
            route->destination[k] = rank;
            route->receive_row[k] = r;
            for (int64_t s = 0; s < n_ranks; s++) {
                for (int64_t q = 0; q < from->count[s]; q++) {
                    if (from->id[s][q] == id) {
                        route->source[k] = s;
                        route->send_row[k] = q;
                    }
                }
            }
        }
    }
}

static void move(const ovlm_route *route, const rows *from, rows *to)
{
    memset(to, 0, sizeof *to);
    for (int64_t p = 0; p < route->k; p++) {
        for (int64_t r = 0; r < route->n_rows[p]; r++) {
            int64_t id = from->id[route->source[p]][route->send_row[p] + r];
            CHECK(id == route->item[p] * MAX_ROWS + route->first_row[p] + r, "piece %lld",
                  (long long)p);
            to->id[route->destination[p]][route->receive_row[p] + r] = id;
            to->count[route->destination[p]]++;
        }
    }
}

static void test_random(void)
{
    static rows a, b, c, there, back, twice;
    static layout x, y, z;
    for (int round = 0; round < 300; round++) {
        ovlm_err err = {0};
        int64_t n_ranks = 1 + ovlm_rng_below(&test_rng, MAX_N), length[MAX_ITEMS], total = 0;
        int64_t n_items = ovlm_rng_below(&test_rng, MAX_ITEMS);
        for (int64_t i = 0; i < n_items; i++) {
            length[i] = ovlm_rng_below(&test_rng, 12);
            length[i] = total + length[i] > MAX_ROWS ? 0 : length[i];
            total += length[i];
        }
        draw_layout(&x, n_items, length, n_ranks, round % 2);
        draw_layout(&y, n_items, length, n_ranks, round % 3 == 0);
        draw_layout(&z, n_items, length, n_ranks, false);
        fill(&x, &a);
        fill(&y, &b);
        fill(&z, &c);
        ovlm_route first, second, both, inverse, identity;
        route_between(&a, &b, n_ranks, &first);
        route_between(&b, &c, n_ranks, &second);
        CHECK(ovlm_route_check(&first, &err) == OVLM_OK, "%s", err.message);
        CHECK(ovlm_route_compose(&first, &second, &both, &err) == OVLM_OK, "%s", err.message);
        CHECK(ovlm_route_check(&both, &err) == OVLM_OK, "%s", err.message);
        move(&first, &a, &there);
        move(&second, &there, &twice);
        move(&both, &a, &there);
        CHECK(memcmp(&there, &twice, sizeof there) == 0, "composed = one after the other");
        CHECK(memcmp(&there, &c, sizeof there) == 0, "every row where it belongs");
        CHECK(ovlm_route_invert(&both, &inverse, &err) == OVLM_OK, "%s", err.message);
        CHECK(ovlm_route_check(&inverse, &err) == OVLM_OK, "%s", err.message);
        move(&inverse, &there, &back);
        CHECK(memcmp(&back, &a, sizeof back) == 0, "there and back");
        CHECK(ovlm_route_compose(&both, &inverse, &identity, &err) == OVLM_OK, "%s", err.message);
        for (int64_t p = 0; p < identity.k; p++) {
            CHECK(identity.source[p] == identity.destination[p] &&
                      identity.send_row[p] == identity.receive_row[p], "identity at %lld",
                  (long long)p);
        }
        ovlm_route *all[] = {&first, &second, &both, &inverse, &identity};
        for (int i = 0; i < 5; i++) {
            ovlm_route_free(all[i]);
        }
    }
}

/* Any change of one number of a valid route must be refused, or leave another valid route. */
static void test_damage(void)
{
    static rows a, b;
    static layout x, y;
    int64_t length[6] = {3, 5, 0, 7, 2, 4};
    for (int round = 0; round < 2000; round++) {
        ovlm_err err = {0};
        ovlm_route route, out = {0};
        draw_layout(&x, 6, length, 4, true);
        draw_layout(&y, 6, length, 4, false);
        fill(&x, &a);
        fill(&y, &b);
        route_between(&a, &b, 4, &route);
        int64_t *column[] = {route.item, route.first_row, route.n_rows, route.source,
                             route.destination, route.send_row, route.receive_row};
        int64_t c = ovlm_rng_below(&test_rng, 7), p = ovlm_rng_below(&test_rng, route.k);
        int64_t values[] = {-1, INT64_MIN, INT64_MAX, column[c][p] + 1, column[c][p] - 1, 4};
        column[c][p] = values[ovlm_rng_below(&test_rng, 6)];
        bool valid = ovlm_route_check(&route, &err) == OVLM_OK;
        CHECK(valid == (ovlm_route_invert(&route, &out, &err) == OVLM_OK), "invert agrees");
        ovlm_route_free(&out);
        if (!valid) {
            CHECK(ovlm_route_compose(&route, &route, &out, &err) == OVLM_E_ARG, "compose agrees");
            CHECK(err.message[0] != 0, "says why");
        } else if (ovlm_route_compose(&route, &route, &out, &err) == OVLM_OK) {
            ovlm_route_free(&out);
        }
        ovlm_route_free(&route);
    }
}

/* ------------------------------------------------------------------ bytes ----------------- */

enum { MAX_BYTES = 40 * MAX_ROWS };

typedef struct bytes {
    int64_t count[MAX_N];
    int64_t name[MAX_N][MAX_BYTES]; /* item and byte within it */
} bytes;

/* What ranks hold in bytes: rows of one size, or a whole item at its first row. */
static void fill_bytes(const rows *held, const int64_t *length, const int64_t *item_bytes,
                       bytes *out)
{
    memset(out, 0, sizeof *out);
    for (int64_t rank = 0; rank < MAX_N; rank++) {
        for (int64_t r = 0; r < held->count[rank]; r++) {
            int64_t item = held->id[rank][r] / MAX_ROWS, row = held->id[rank][r] % MAX_ROWS;
            bool even = item_bytes[item] % length[item] == 0;
            int64_t size = even ? item_bytes[item] / length[item] : row == 0 ? item_bytes[item] : 0;
            for (int64_t b = 0; b < size; b++) {
                out->name[rank][out->count[rank]++] = item * MAX_BYTES + row * size + b;
            }
        }
    }
}

static void move_bytes(const ovlm_route *route, const bytes *from, bytes *to)
{
    memset(to, 0, sizeof *to);
    for (int64_t p = 0; p < route->k; p++) {
        for (int64_t b = 0; b < route->n_rows[p]; b++) {
            int64_t rank = route->destination[p];
            int64_t name = from->name[route->source[p]][route->send_row[p] + b];
            CHECK(name == route->item[p] * MAX_BYTES + route->first_row[p] + b, "piece %lld",
                  (long long)p);
            to->name[rank][route->receive_row[p] + b] = name;
            to->count[rank]++;
        }
    }
}

/* Pieces of one row each become as few as may be. */
static void merge_pieces(ovlm_route *route)
{
    int64_t k = 0;
    for (int64_t p = 0; p < route->k; p++) {
        int64_t last = k - 1;
        bool more = k > 0 && route->item[last] == route->item[p] &&
                    route->source[last] == route->source[p] &&
                    route->destination[last] == route->destination[p] &&
                    route->first_row[last] + route->n_rows[last] == route->first_row[p] &&
                    route->send_row[last] + route->n_rows[last] == route->send_row[p];
        if (more) {
            route->n_rows[last] += route->n_rows[p];
            continue;
        }
        int64_t *column[] = {route->item, route->first_row, route->n_rows, route->source,
                             route->destination, route->send_row, route->receive_row};
        for (int c = 0; c < 7; c++) {
            column[c][k] = column[c][p];
        }
        k++;
    }
    route->k = k;
}

static void test_bytes(void)
{
    static rows a, b;
    static bytes x, y, moved;
    static layout from, to;
    for (int round = 0; round < 200; round++) {
        ovlm_err err = {0};
        int64_t n_ranks = 1 + ovlm_rng_below(&test_rng, MAX_N), length[20], item_bytes[20];
        bool whole = round % 2 != 0;
        for (int64_t i = 0; i < 20; i++) {
            length[i] = ovlm_rng_below(&test_rng, 8);
            item_bytes[i] = whole ? ovlm_rng_below(&test_rng, 200)
                                  : length[i] * ovlm_rng_below(&test_rng, 30);
        }
        draw_layout(&from, 20, length, n_ranks, whole);
        draw_layout(&to, 20, length, n_ranks, whole);
        fill(&from, &a);
        fill(&to, &b);
        ovlm_route route, out = {0};
        route_between(&a, &b, n_ranks, &route);
        merge_pieces(&route);
        CHECK(ovlm_route_bytes(&route, item_bytes, 20, &out, &err) == OVLM_OK, "%s", err.message);
        CHECK(ovlm_route_check(&out, &err) == OVLM_OK, "%s", err.message);
        fill_bytes(&a, length, item_bytes, &x);
        fill_bytes(&b, length, item_bytes, &y);
        move_bytes(&out, &x, &moved);
        CHECK(memcmp(&moved, &y, sizeof y) == 0, "every byte where it belongs");
        ovlm_route_free(&out);
        ovlm_route_free(&route);
    }
}

static void test_bytes_refused(void)
{
    int64_t item[] = {0, 1, 0}, first[] = {0, 0, 2}, n_rows[] = {2, 1, 1}, source[] = {0, 0, 0};
    int64_t destination[] = {0, 0, 1}, send_row[] = {0, 3, 2}, receive_row[] = {0, 2, 0};
    ovlm_route route = {3, 2, item, first, n_rows, source, destination, send_row, receive_row};
    ovlm_route out = {0};
    const struct {
        int64_t n, bytes[2];
        const char *message;
    } bad[] = {{1, {3, 3}, "carries item 1 of 1"},
               {2, {10, 3}, "item_bytes[0] is 10 for 3 rows that travel in pieces"},
               {2, {9, -1}, "item_bytes[1] is -1"},
               {2, {(int64_t)3 << 60, ((int64_t)1 << 62)}, "more than 2^62"}};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        ovlm_err err = {0};
        CHECK(ovlm_route_bytes(&route, bad[i].bytes, bad[i].n, &out, &err) == OVLM_E_ARG &&
                  out.item == NULL, "%s", bad[i].message);
        CHECK(strstr(err.message, bad[i].message) != NULL, "%s: %s", bad[i].message, err.message);
    }
    send_row[2] = 1; /* a row that leaves twice */
    int64_t fine[] = {9, 3};
    ovlm_err err = {0};
    CHECK(ovlm_route_check_arrivals(&route, &err) == OVLM_OK, "%s", err.message);
    CHECK(ovlm_route_check(&route, &err) == OVLM_E_ARG, "leaves twice");
    CHECK(ovlm_route_bytes(&route, fine, 2, &out, &err) == OVLM_E_ARG, "leaves twice");
    receive_row[2] = 1;
    CHECK(ovlm_route_check_arrivals(&route, &err) == OVLM_E_ARG, "arrives nowhere");
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    test_random();
    test_damage();
    test_bytes();
    test_bytes_refused();
    return test_end("route");
}
