/* balance_exchange.c - few bytes moved: the last of the excess goes by exact exchanges.
 *
 * Shedding ends when every unit of a rank above the limit is larger than any room.  A parcel of up
 * to three units for another then carries exactly what is too much: two ranks of 16 units
 * have a million such pairs.  Nodes are brought below the sum of their ranks' limits first, so that
 * few parcels cross; then every rank above its limit gives its excess to the rank of its node with
 * the most room, which may hand it on.  What is handed on goes to a rank that is still open, so a
 * node of c ranks takes at most c exchanges.  Of the exchanges that fit, the one that moves the
 * fewest bytes is taken. */
#include <math.h>
#include <stdlib.h>

#include "plan/balance_home.h"

enum {
    LOOKED_AT = 96, /* smallest units of a rank that are looked at; of these ...                */
    SINGLES = 32,  /* ... so many go alone and in pairs, ...                                    */
    TRIPLED = 14,  /* ... and the smallest in triples; at the first try ...                     */
    FEW = 20,      /* ... only so many, alone and in pairs                                      */
    PAIRS = SINGLES * (SINGLES - 1) / 2,
    PARCELS = 1 + SINGLES + PAIRS + TRIPLED * (TRIPLED - 1) * (TRIPLED - 2) / 6,
    PARTNERS = 8,  /* ranks, or nodes, that are tried as partners                               */
    GIVERS = 3,    /* of the fullest ranks of a node                                            */
    HAND_OVERS = 32, /* of what stays in a node, in all                                         */
    PASSES = 4,    /* over the nodes, and over the ranks of each                                */
    LOOKS = 65536, /* pairs of parcels that one search looks at                                 */
    SORT_WORK = 8, /* search steps that a parcel is worth until it is in order                  */
};

typedef struct parcel {
    double sum, node_bytes, rank_bytes; /* cost, and the traffic that its move adds             */
    int64_t unit[3], n, size;
} parcel;

typedef struct exchange {
    homing *h;
    parcel *give, *take;  /* [PARCELS] */
    int64_t *rank, *node; /* [n_ranks], [nodes] scratch: partners in order                      */
    double *spare;        /* [nodes] room of its ranks together; negative: too full             */
    bool *closed_rank, *closed_node;
    double left;          /* of the room of all ranks, what may still be wasted                 */
} exchange;

/* Additive cost below the limit that rank r has room for; negative: its excess.  Whole grains: less
 * than one is room for nothing. */
static double spare_of(const exchange *x, int64_t r)
{
    const homing *h = x->h;
    const bal_model *model = h->search->model;
    double spare = bal_room(model, r, h->limit * (1 + BAL_TOLERANCE / 2)) - h->plan->add[r];
    /* 1e-6: sums of grains are whole numbers of them up to rounding */
    return model->grain > 0 ? floor(spare / model->grain + 1e-6) * model->grain : spare;
}

static int by_sum(const void *a, const void *b)
{
    const parcel *x = a, *y = b;
    if (x->sum < y->sum || x->sum > y->sum) {
        return x->sum < y->sum ? -1 : 1;
    }
    for (int i = 0; i < 3; i++) {
        if (x->unit[i] != y->unit[i]) {
            return x->unit[i] < y->unit[i] ? -1 : 1;
        }
    }
    return 0;
}

/* Parcel p with unit u as well, which goes from r to s. */
static parcel with_unit(const bal_model *model, parcel p, int64_t u, int64_t r, int64_t s)
{
    int64_t home = model->home[u], c = model->node_size;
    double bytes = (double)model->bytes[u];
    p.unit[p.n++] = u;
    p.sum += model->a[u];
    p.size += bal_size(model, u);
    p.rank_bytes += home == r ? bytes : home == s ? -bytes : 0;
    if (r / c != s / c) {
        p.node_bytes += home / c == r / c ? bytes : home / c == s / c ? -bytes : 0;
    }
    return p;
}

/* Units that r may give, ascending by cost, at most `most`: the smaller half of them as they are,
 * since they make the exact sums, then larger ones evenly, which carry much.  Returns how many. */
static int64_t pick_units(const exchange *x, int64_t r, int64_t most, int64_t *unit)
{
    const homing *h = x->h;
    const bal_model *model = h->search->model;
    int64_t sorted[LOOKED_AT] = {0}, n = 0;
    for (int64_t u = h->head[r]; u >= 0; u = h->next[u]) {
        if (bal_is_pinned(model, u) || bal_count(model, u) != 1 ||
            (n == LOOKED_AT && model->a[u] >= model->a[sorted[n - 1]])) {
            continue;
        }
        int64_t at = n < LOOKED_AT ? n++ : n - 1;
        for (; at > 0 && model->a[sorted[at - 1]] > model->a[u]; at--) {
            sorted[at] = sorted[at - 1];
        }
        sorted[at] = u;
    }
    int64_t small = n <= most ? n : most / 2, large = n <= most ? 0 : most - small;
    for (int64_t i = 0; i < small; i++) {
        unit[i] = sorted[i];
    }
    for (int64_t i = 0; i < large; i++) {
        unit[small + i] = sorted[small + (i + 1) * (n - small) / large - 1];
    }
    return small + large;
}

/* All parcels that r may send to s, by cost; returns how many. */
static int64_t fill_parcels(const exchange *x, int64_t r, int64_t s, bool few, parcel *out)
{
    const homing *h = x->h;
    const bal_model *model = h->search->model;
    int64_t unit[SINGLES], k = 1, tripled = few ? 0 : TRIPLED;
    int64_t n = pick_units(x, r, few ? FEW : SINGLES, unit);
    out[0] = (parcel){.unit = {-1, -1, -1}};
    for (int64_t i = 0; i < n; i++) {
        parcel one = with_unit(model, out[0], unit[i], r, s);
        out[k++] = one;
        for (int64_t j = i + 1; j < n; j++) {
            parcel two = with_unit(model, one, unit[j], r, s);
            out[k++] = two;
            for (int64_t l = j + 1; l < tripled && l < n; l++) {
                out[k++] = with_unit(model, two, unit[l], r, s);
            }
        }
    }
    qsort(out, (size_t)k, sizeof *out, by_sum);
    h->search->meter->work += h->plan->count[r] + SORT_WORK * k;
    return k;
}

/* Are counts and sizes of r and s in order after r gave `out` for `in`? */
static bool is_allowed(const exchange *x, int64_t r, int64_t s, const parcel *out,
                       const parcel *in)
{
    const bal_model *model = x->h->search->model;
    const bal_plan *plan = x->h->plan;
    int64_t more = in->n - out->n, size = in->size - out->size;
    int64_t count_r = plan->count[r] + more, count_s = plan->count[s] - more;
    return count_r >= model->min_items && count_r <= model->max_items && count_r > 0 &&
           count_s >= model->min_items && count_s <= model->max_items && count_s > 0 &&
           plan->size[r] + size <= bal_capacity(model, r) &&
           plan->size[s] - size <= bal_capacity(model, s);
}

/* Of the exchanges by which r gives s between lo and hi more than it takes, makes the one with the
 * least traffic; false: there is none. */
static bool find_exchange(exchange *x, int64_t r, int64_t s, double lo, double hi, bool few)
{
    int64_t n_give = fill_parcels(x, r, s, few, x->give);
    int64_t n_take = fill_parcels(x, s, r, few, x->take);
    const parcel *out = NULL, *in = NULL;
    bal_traffic least = {0, 0};
    int64_t first = 0, looked = 0;
    for (int64_t j = 0; j < n_take && looked < LOOKS; j++) {
        const parcel *b = &x->take[j];
        while (first < n_give && x->give[first].sum < b->sum + lo) {
            first++;
        }
        for (int64_t i = first; i < n_give && x->give[i].sum <= b->sum + hi; i++, looked++) {
            const parcel *a = &x->give[i];
            bal_traffic t = {a->node_bytes + b->node_bytes, a->rank_bytes + b->rank_bytes};
            if ((out == NULL || bal_traffic_less(t, least)) && is_allowed(x, r, s, a, b)) {
                least = t;
                out = a;
                in = b;
            }
        }
    }
    x->h->search->meter->work += looked / 8;
    for (int64_t i = 0; out != NULL && i < out->n; i++) {
        homing_move(x->h, out->unit[i], s);
    }
    for (int64_t i = 0; out != NULL && i < in->n; i++) {
        homing_move(x->h, in->unit[i], r);
    }
    return out != NULL;
}

static bool make_exchange(exchange *x, int64_t r, int64_t s, double lo, double hi)
{
    return find_exchange(x, r, s, lo, hi, true) || find_exchange(x, r, s, lo, hi, false);
}

/* The ranks of [from, to) but r into x->rank, by room: most first.  Returns how many. */
static int64_t order_ranks(exchange *x, int64_t from, int64_t to, int64_t r, bool open_only)
{
    int64_t n = 0;
    for (int64_t s = from; s < to; s++) {
        if (s == r || (open_only && x->closed_rank[s])) {
            continue;
        }
        int64_t at = n++;
        for (; at > 0 && spare_of(x, x->rank[at - 1]) < spare_of(x, s); at--) {
            x->rank[at] = x->rank[at - 1];
        }
        x->rank[at] = s;
    }
    return n;
}

/* The most that may be given to end an excess: what is given beyond it is room that nobody else can
 * use.  At the first try a fair share of what is left of all room; then all of that, or of the
 * partner's. */
static double most_given(const exchange *x, double excess, double room, int64_t shares)
{
    double waste = x->left > 0 ? x->left / (double)shares : 0;
    if (room < excess) {
        return excess + waste;
    }
    return shares == 1 || excess + waste > room ? room : excess + waste;
}

/* Ends the excess of rank r of [from, to); false: it stays. */
static bool close_rank(exchange *x, int64_t r, int64_t from, int64_t to)
{
    double excess = -spare_of(x, r);
    int64_t n = order_ranks(x, from, to, r, true);
    for (int64_t i = 0; i < 2 * n && i < 2 * PARTNERS; i++) {
        double room = spare_of(x, x->rank[i / 2]);
        if (ovlm_meter_spend(x->h->search->meter, 1)) {
            return false;
        }
        double most = most_given(x, excess, room, i % 2 == 0 ? n : 1);
        if (make_exchange(x, r, x->rank[i / 2], excess, most)) {
            double rest = spare_of(x, r);
            x->closed_rank[r] = true;
            x->left -= rest > 0 ? rest : 0;
            return true;
        }
    }
    return false;
}

/* Ends what excess it can among ranks [from, to); false: some is left. */
static bool close_ranks(exchange *x, int64_t from, int64_t to)
{
    bool all = true;
    x->left = 0;
    for (int64_t r = from; r < to; r++) {
        x->closed_rank[r] = false;
        x->left += spare_of(x, r);
    }
    for (;;) {
        int64_t worst = -1;
        for (int64_t r = from; r < to; r++) {
            bool is_over = !x->closed_rank[r] && !bal_meets(x->h->plan->load[r], x->h->limit);
            if (is_over && (worst < 0 || spare_of(x, r) < spare_of(x, worst))) {
                worst = r;
            }
        }
        if (worst < 0) {
            return all;
        }
        if (!close_rank(x, worst, from, to)) {
            all = false;
            x->closed_rank[worst] = true;
        }
    }
}

/* Ends the excess of node k by an exchange of one of its fullest ranks with one of node q. */
static bool pass_on(exchange *x, int64_t k, int64_t q, int64_t shares)
{
    int64_t c = x->h->search->model->node_size, N = x->h->search->model->n_ranks;
    double excess = -x->spare[k], most = most_given(x, excess, x->spare[q], shares);
    int64_t full[GIVERS] = {0};
    int64_t n_full = order_ranks(x, k * c, (k + 1) * c < N ? (k + 1) * c : N, -1,
                                               false);
    int64_t skip = n_full > GIVERS ? n_full - GIVERS : 0;
    for (int64_t i = 0; i < n_full - skip; i++) {
        full[i] = x->rank[n_full - 1 - i];
    }
    n_full -= skip;
    int64_t n = order_ranks(x, q * c, (q + 1) * c < N ? (q + 1) * c : N, -1, false);
    for (int64_t i = 0; i < n_full * n; i++) {
        int64_t r = full[i / n], s = x->rank[i % n];
        double before = x->h->plan->add[r];
        if (i % n >= PARTNERS) {
            continue;
        }
        if (ovlm_meter_spend(x->h->search->meter, 1)) {
            return false;
        }
        if (make_exchange(x, r, s, excess, most)) {
            double given = before - x->h->plan->add[r];
            x->spare[k] += given;
            x->spare[q] -= given;
            return true;
        }
    }
    return false;
}

/* Ends the excess of node k by one exchange with another node. */
static bool close_node(exchange *x, int64_t k, int64_t nodes)
{
    int64_t n = 0;
    for (int64_t q = 0; q < nodes; q++) {
        if (q != k && !x->closed_node[q]) {
            int64_t at = n++;
            for (; at > 0 && x->spare[x->node[at - 1]] < x->spare[q]; at--) {
                x->node[at] = x->node[at - 1];
            }
            x->node[at] = q;
        }
    }
    for (int64_t i = 0; i < 2 * n && i < 2 * PARTNERS; i++) {
        if (pass_on(x, k, x->node[i / 2], i % 2 == 0 ? n : 1)) {
            x->closed_node[k] = true;
            x->left -= x->spare[k] > 0 ? x->spare[k] : 0;
            return true;
        }
    }
    return false;
}

/* Ends what excess it can of whole nodes; false: some is left. */
static bool close_nodes(exchange *x, int64_t nodes)
{
    bool all = true;
    x->left = 0;
    for (int64_t k = 0; k < nodes; k++) {
        x->closed_node[k] = false;
        x->left += x->spare[k];
    }
    for (;;) {
        int64_t worst = -1;
        for (int64_t k = 0; k < nodes; k++) {
            /* what a node's ranks may be above their limits without being told so */
            double much = BAL_TOLERANCE / 4 * x->h->limit;
            if (!x->closed_node[k] && x->spare[k] < -much &&
                (worst < 0 || x->spare[k] < x->spare[worst])) {
                worst = k;
            }
        }
        if (worst < 0) {
            return all;
        }
        if (!close_node(x, worst, nodes)) {
            all = false;
            x->closed_node[worst] = true;
        }
    }
}

static void close_inside(exchange *x, int64_t k)
{
    int64_t c = x->h->search->model->node_size, N = x->h->search->model->n_ranks;
    int64_t end = (k + 1) * c < N ? (k + 1) * c : N;
    for (int pass = 0; pass < PASSES && !close_ranks(x, k * c, end); pass++) {
    }
}

/* What stays in a node goes to another one, where it meets other units; and so on, from node to
 * node. */
static void hand_over(exchange *x, int64_t nodes)
{
    const bal_model *model = x->h->search->model;
    int64_t c = model->node_size;
    for (int64_t t = 0, last = 0; t < HAND_OVERS && nodes > 1; t++) {
        int64_t worst = 0;
        for (int64_t r = 1; r < model->n_ranks; r++) {
            worst = spare_of(x, r) < spare_of(x, worst) ? r : worst;
        }
        if (bal_meets(x->h->plan->load[worst], x->h->limit)) {
            return;
        }
        int64_t k = worst / c, q = (last + 1) % nodes == k ? (k + 1) % nodes : (last + 1) % nodes;
        x->left = 0;
        for (int64_t r = 0; r < model->n_ranks; r++) {
            x->left += spare_of(x, r);
        }
        x->spare[k] = spare_of(x, worst);
        x->spare[q] = 0;
        (void)pass_on(x, k, q, nodes);
        close_inside(x, q);
        close_inside(x, k);
        last = q;
    }
}

/* Room for the arrays. */
static ovlm_status exchange_init(exchange *x, homing *h, ovlm_err *err)
{
    ovlm_arena *arena = h->search->arena;
    int64_t N = h->search->model->n_ranks, nodes = (N - 1) / h->search->model->node_size + 1;
    *x = (exchange){.h = h};
    OVLM_TRY(OVLM_ARENA_RAW(arena, &x->give, PARCELS, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &x->take, PARCELS, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &x->rank, N, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &x->node, nodes, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &x->spare, nodes, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &x->closed_rank, N, err));
    return OVLM_ARENA_NEW(arena, &x->closed_node, nodes, err);
}

ovlm_status homing_exchange(homing *h, ovlm_err *err)
{
    const bal_model *model = h->search->model;
    ovlm_arena_mark mark = ovlm_arena_save(h->search->arena);
    int64_t c = model->node_size, N = model->n_ranks, nodes = (N - 1) / c + 1;
    exchange x;
    OVLM_TRY(exchange_init(&x, h, err));
    for (int64_t r = 0; r < N; r++) {
        x.spare[r / c] += spare_of(&x, r);
    }
    for (int pass = 0; pass < PASSES && nodes > 1 && !close_nodes(&x, nodes); pass++) {
    }
    for (int64_t k = 0; k < nodes; k++) {
        close_inside(&x, k);
    }
    hand_over(&x, nodes);
    ovlm_arena_rewind(h->search->arena, mark);
    return OVLM_OK;
}
