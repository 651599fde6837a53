/* test_dispatch.c - the routes of random step plans on rows that carry (rank, item, row), compared
 * byte for byte: over 1 to 16 ranks, composed against two steps, there and back, several loads at a
 * time, several transfers at a time, one item larger than all others. */
#include "dispatch_rig.h"
#include "step_draw.h"

enum { LEGS_MOST = 3 + 4 * PHASES };

typedef struct legs {
    int64_t n;
    rig_leg leg[LEGS_MOST];
    const char *name[LEGS_MOST];
} legs;

static void add_leg(legs *all, const char *name, const ovlm_route *route, const int64_t *place)
{
    all->name[all->n] = name;
    all->leg[all->n++] = rig_leg_of(route, place, 0);
}

static void draw_widths(rig_rank *self, int64_t *n, int64_t *row_bytes)
{
    *n = 1 + ovlm_rng_below(&self->shared, RIG_LOADS_MOST);
    for (int64_t t = 0; t < *n; t++) {
        row_bytes[t] = ovlm_rng_below(&self->shared, 4) ? 1 + ovlm_rng_below(&self->shared, 90) : 0;
    }
}

/* ------------------------------------------------------------------ there and back -------- */

/* Every leg by itself, both ways; ranks have no threads, or some, as each likes. */
static void one_by_one(rig_rank *self)
{
    const legs *all = self->ctx;
    ovlm_pool *pool = NULL;
    if (ovlm_rng_below(&self->own, 3) == 0) {
        RTRY(self, ovlm_pool_open(2, &pool, &self->err));
    }
    for (int64_t i = 0; i < all->n; i++) {
        int64_t n = 0, row_bytes[RIG_LOADS_MOST];
        rig_transfer x;
        draw_widths(self, &n, row_bytes);
        rig_open(self, &x, &all->leg[i], n, row_bytes, pool);
        rig_fill(self, &x, false);
        RTRY(self, ovlm_dispatch_apply(x.dispatch, &x.parcel, self->comm, &self->err));
        rig_compare(self, &x, false, all->name[i]);
        rig_empty(&x);
        rig_fill(self, &x, true);
        RTRY(self, ovlm_dispatch_reverse(x.dispatch, &x.parcel, self->comm, &self->err));
        rig_compare(self, &x, true, all->name[i]);
        rig_close(&x);
    }
    ovlm_pool_close(pool);
}

/* All legs under way at once, in either direction, awaited in another order on each rank. */
static void all_at_once(rig_rank *self)
{
    const legs *all = self->ctx;
    rig_transfer x[LEGS_MOST];
    bool back[LEGS_MOST];
    int64_t order[LEGS_MOST];
    for (int64_t i = 0; i < all->n; i++) {
        int64_t n = 0, row_bytes[RIG_LOADS_MOST];
        draw_widths(self, &n, row_bytes);
        back[i] = ovlm_rng_below(&self->shared, 2) != 0;
        rig_open(self, &x[i], &all->leg[i], n, row_bytes, NULL);
        rig_fill(self, &x[i], back[i]);
        RTRY(self, back[i] ? ovlm_dispatch_start_reverse(x[i].dispatch, &x[i].parcel, self->comm,
                                                         &x[i].trip, &self->err)
                           : ovlm_dispatch_start(x[i].dispatch, &x[i].parcel, self->comm,
                                                 &x[i].trip, &self->err));
        int64_t at = ovlm_rng_below(&self->own, i + 1);
        order[i] = order[at];
        order[at] = i;
    }
    for (int64_t o = 0; o < all->n; o++) {
        int64_t i = order[o];
        RTRY(self, ovlm_dispatch_wait(&x[i].trip, &self->err));
        rig_compare(self, &x[i], back[i], all->name[i]);
        rig_close(&x[i]);
    }
}

/* ------------------------------------------------------------------ composed -------------- */

typedef struct composition {
    rig_leg first, second, both;
} composition;

/* Encoder outputs by way of the source, and at once: the same bytes, and the right ones. */
static void in_two_steps(rig_rank *self)
{
    const composition *way = self->ctx;
    int64_t n = 0, row_bytes[RIG_LOADS_MOST];
    rig_transfer one, two, both;
    draw_widths(self, &n, row_bytes);
    rig_open(self, &one, &way->first, n, row_bytes, NULL);
    rig_open(self, &two, &way->second, n, row_bytes, NULL);
    rig_open(self, &both, &way->both, n, row_bytes, NULL);
    rig_fill(self, &one, false);
    rig_fill(self, &two, false);
    rig_fill(self, &both, false);
    RTRY(self, ovlm_dispatch_apply(one.dispatch, &one.parcel, self->comm, &self->err));
    for (int64_t t = 0; t < n; t++) {
        memcpy((void *)(uintptr_t)two.load[t].from, one.load[t].to,
               (size_t)(two.from_rows * row_bytes[t]));
    }
    RTRY(self, ovlm_dispatch_apply(two.dispatch, &two.parcel, self->comm, &self->err));
    RTRY(self, ovlm_dispatch_apply(both.dispatch, &both.parcel, self->comm, &self->err));
    RCHECK(self, one.to_rows == two.from_rows && two.to_rows == both.to_rows, "rows");
    for (int64_t t = 0; t < n; t++) {
        RCHECK(self, memcmp(two.load[t].to, both.load[t].to,
                            (size_t)(both.to_rows * row_bytes[t])) == 0,
               "composed and in two steps: load %lld", (long long)t);
    }
    rig_compare(self, &both, false, "composed");
    rig_close(&one);
    rig_close(&two);
    rig_close(&both);
}

static void test_composed(const ovlm_step_plan *plan, rig_rank *ranks)
{
    for (int64_t p = 0; p < plan->n_phases; p++) {
        const ovlm_route *first = &plan->back[p].route, *second = &plan->to_llm[p].route;
        ovlm_route both = {0};
        ovlm_err err = {0};
        CHECK(ovlm_route_compose(first, second, &both, &err) == OVLM_OK, "%s", err.message);
        const int64_t *place = plan->to_llm[p].place;
        composition way = {rig_leg_of(first, NULL, 0), rig_leg_of(second, place, 0), {0}};
        /* pieces of the composed route follow the second's, so its places are theirs */
        int64_t *places = rig_bytes(both.k * (int64_t)sizeof *places);
        for (int64_t k = 0, q = 0; k < both.k; k++) {
            while (second->destination[q] != both.destination[k] ||
                   second->receive_row[q] + second->n_rows[q] <= both.receive_row[k]) {
                q++;
            }
            places[k] = place[q] + both.receive_row[k] - second->receive_row[q];
        }
        way.both = rig_leg_of(&both, places, 0);
        rig_run("two steps", plan->n_ranks, NULL, in_two_steps, &way, ranks);
        free(places);
        ovlm_route_free(&both);
    }
}

/* ------------------------------------------------------------------ plans ----------------- */

static void test_plan(const instance *x, const ovlm_step_plan *plan, rig_rank *ranks)
{
    legs all = {0};
    ovlm_route bytes[PHASES] = {{0}};
    ovlm_err err = {0};
    add_leg(&all, "text", &plan->text.route, plan->text.place);
    for (int64_t p = 0; p < plan->n_phases; p++) {
        const ovlm_step_items *items = &x->problem.phase[p];
        add_leg(&all, "raw", &plan->raw[p].route, NULL);
        add_leg(&all, "to_llm", &plan->to_llm[p].route, plan->to_llm[p].place);
        if (!x->problem.compose) {
            add_leg(&all, "back", &plan->back[p].route, NULL);
        }
        CHECK(ovlm_route_bytes(&plan->raw[p].route, items->bytes, items->n, &bytes[p], &err) ==
                  OVLM_OK, "%s", err.message);
        CHECK(ovlm_route_check(&bytes[p], &err) == OVLM_OK, "%s", err.message);
        add_leg(&all, "bytes", &bytes[p], NULL);
    }
    rig_run("one by one", plan->n_ranks, NULL, one_by_one, &all, ranks);
    rig_run("all at once", plan->n_ranks, NULL, all_at_once, &all, ranks);
    if (!x->problem.compose) {
        test_composed(plan, ranks);
    }
    for (int64_t p = 0; p < plan->n_phases; p++) {
        ovlm_route_free(&bytes[p]);
    }
}

static void test_plans(bool groups, int rounds)
{
    static instance x;
    static rig_rank ranks[RIG_RANKS_MOST];
    for (int round = 0; round < rounds; round++) {
        do {
            draw(&x, groups);
        } while (x.problem.n_ranks > RIG_RANKS_MOST);
        ovlm_budget budget = {.work_limit = below(2) * 100};
        ovlm_step_plan *plan = NULL;
        ovlm_err err = {0};
        ovlm_status status = ovlm_step_solve(&x.problem, &budget, &plan, &err);
        CHECK(status == OVLM_OK || status == OVLM_E_UNDECIDED, "%s", err.message);
        if (status == OVLM_OK) {
            test_plan(&x, plan, ranks);
            ovlm_step_plan_free(plan);
        }
    }
}

/* ------------------------------------------------------------------ sizes ----------------- */

/* Items of given rows in order at random ranks, to random ranks in random order. */
static void draw_route(int64_t n_ranks, int64_t n, const int64_t *rows, ovlm_route *route)
{
    int64_t filled[RIG_RANKS_MOST] = {0}, k = 0;
    int64_t *source = rig_bytes(n * 8), *at = rig_bytes(n * 8), *to = rig_bytes(n * 8);
    ovlm_err err = {0};
    for (int64_t i = 0; i < n; i++) {
        source[i] = below(n_ranks);
        to[i] = below(n_ranks);
        at[i] = filled[source[i]];
        filled[source[i]] += rows[i];
    }
    CHECK(ovlm_route_init(route, n, n_ranks, &err) == OVLM_OK, "%s", err.message);
    for (int64_t r = 0; r < n_ranks; r++) {
        int64_t received = 0, first = below(n > 0 ? n : 1);
        for (int64_t step = 0; step < n; step++) {
            int64_t i = (first + step) % n;
            if (to[i] != r || rows[i] == 0) {
                continue;
            }
            route->item[k] = i;
            route->first_row[k] = 0;
            route->n_rows[k] = rows[i];
            route->source[k] = source[i];
            route->destination[k] = r;
            route->send_row[k] = at[i];
            route->receive_row[k++] = received;
            received += rows[i];
        }
    }
    route->k = k;
    free(source);
    free(at);
    free(to);
}

/* One item of half a megabyte or more among small ones, or alone: runs are cut between threads. */
static void test_large_items(void)
{
    static rig_rank ranks[RIG_RANKS_MOST];
    for (int round = 0; round < 8; round++) {
        int64_t n = 1 + below(12), rows[12], n_ranks = 1 + below(6);
        for (int64_t i = 0; i < n; i++) {
            rows[i] = below(4);
        }
        rows[below(n)] = 8000 + below(8000);
        ovlm_route route = {0};
        draw_route(n_ranks, n, rows, &route);
        legs all = {0};
        add_leg(&all, "large", &route, NULL);
        rig_run("large", n_ranks, NULL, one_by_one, &all, ranks);
        rig_run("large, started", n_ranks, NULL, all_at_once, &all, ranks);
        ovlm_route_free(&route);
    }
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    test_plans(false, 12);
    test_plans(true, 8);
    test_large_items();
    return test_end("dispatch");
}
