/* sp_bound_cases.c - the worst case first: prices for it, or two cases of it. */
#include "plan/sp_bound_cases.h"

#include <math.h>
#include <string.h>

#include "plan/sp_bound_content.h"
#include "plan/sp_bound_simplex.h"

enum { SLOTS = 12, POOL = 256, CASES = 2048, FILLINGS = 2048, COLUMNS = 6144, ROUNDS = 10 };
enum { ROWS = 72, INTERVALS = SP_CONTENT_INTERVALS, VISITS_PER_STEP = 64 };
#define BOX 0.25       /* prices stay within this share around the best ones in one round */
#define GOAL 3e-3      /* of the bound: then another case may be worse                     */
#define STEP 0.5       /* from the best prices to the program's                            */
#define CONVERGED 2e-4 /* of the bound: no more is to be had from prices                  */

/* Prices at the nodes and what they prove. */
typedef struct entry {
    double total, phi[INTERVALS];
    double free_total, free_phi; /* total and least phi, scaled such that none is negative */
    double pi[ROWS];
} entry;

/* Makespan b lies in one of the intervals from[b]..to[b]; both fall with b. */
typedef struct kase {
    double bound;
    int64_t seen; /* pool entries tried                                         */
    int64_t best; /* the entry that proves the bound, or the one in its place   */
    int64_t count, slots;     /* micro-batches; those with intervals of their own */
    bool more;                /* or any number above, all free: one slot for all  */
    bool solved;              /* no better prices were found: cut it              */
    int64_t cut_slot, cut_at; /* there; slot -1: nowhere                          */
    uint8_t from[SLOTS], to[SLOTS];
} kase;

/* What some micro-batch holds at an end of an interval. */
typedef struct proposal {
    int64_t interval;
    double cost;
    sp_filling filling;
} proposal;

typedef struct cases {
    const sp_model *model;
    sp_contents contents;
    sp_simplex lp;
    double hint, low, longest_s;
    entry *pool; /* [POOL], the last ones */
    int64_t n_pool;
    kase *of; /* [CASES] */
    int64_t n;
    proposal *proposal; /* [FILLINGS], the last ones */
    int64_t n_proposals;
    int64_t *column_interval, *column_row; /* [COLUMNS] */
    double *work, *pi;                     /* [ROWS] first prices; the next ones */
} cases;

/* ------------------------------------------------------------------ prices --------------- */

static const entry *entry_at(const cases *c, int64_t p)
{
    return &c->pool[p % POOL];
}

/* Evaluates c->pi; a new entry of the pool. */
static void add_entry(cases *c)
{
    sp_contents *x = &c->contents;
    entry *e = &c->pool[c->n_pool++ % POOL];
    double least = HUGE_VAL, fixed = c->model->fixed;
    memcpy(e->pi, c->pi, (size_t)x->nodes.rows * sizeof *e->pi);
    e->total = sp_contents_evaluate(x, c->pi);
    for (int64_t i = 0; i < x->n_intervals; i++) {
        e->phi[i] = fmin(x->holder[2 * i].phi, x->holder[2 * i + 1].phi);
        least = fmin(least, e->phi[i]);
    }
    /* A micro-batch holds at most t + fixed - least: times that scale, at most t + fixed. */
    double scale = least < 0 ? fixed / (fixed - least) * (1 - 1e-12) : 1;
    e->free_total = scale * e->total;
    e->free_phi = fmax(least, 0);
}

/* What the prices prove in that case, rounded down. */
static double bound_by(const cases *c, const kase *k, const entry *e)
{
    double margin = 1e-9 + 0x1.0p-50 * (double)c->model->n;
    if (k->more) {
        double all = e->free_total + (double)k->count * e->free_phi;
        return all - margin * all;
    }
    double least = 0, makespans = 0, size = e->total;
    for (int64_t b = 0; b < k->slots; b++) {
        if (b == 0 || k->from[b] != k->from[b - 1] || k->to[b] != k->to[b - 1]) {
            least = HUGE_VAL;
            for (int64_t i = k->from[b]; i <= k->to[b]; i++) {
                least = fmin(least, e->phi[i]);
            }
        }
        makespans += least;
        size += fabs(least);
    }
    return e->total + makespans - margin * size;
}

/* Tries the entries that it has not seen. */
static void refresh(const cases *c, kase *k)
{
    int64_t p = k->seen > c->n_pool - POOL ? k->seen : c->n_pool - POOL;
    for (p = p > 0 ? p : 0; p < c->n_pool; p++) {
        double bound = bound_by(c, k, entry_at(c, p));
        if (bound > k->bound || k->best < 0) {
            k->bound = fmax(k->bound, bound);
            k->best = p;
        }
    }
    k->seen = c->n_pool;
}

/* ------------------------------------------------------------------ the program ---------- */

/* Row of each slot: slots of the same intervals share one. */
static void set_rows(const kase *k, int64_t *row)
{
    for (int64_t b = 0; b < k->slots; b++) {
        bool same = b > 0 && k->from[b] == k->from[b - 1] && k->to[b] == k->to[b - 1];
        row[b] = b == 0 ? 0 : row[b - 1] + !same;
    }
}

/* The proposal in every row whose intervals hold its own. */
static void add_columns(cases *c, const kase *k, const int64_t *row, const proposal *p)
{
    const sp_nodes *nodes = &c->contents.nodes;
    for (int64_t b = 0; b < k->slots; b++) {
        bool again = b > 0 && row[b] == row[b - 1];
        if (again || p->interval < k->from[b] || p->interval > k->to[b] ||
            c->lp.n_columns >= COLUMNS || !sp_simplex_begin(&c->lp, p->cost)) {
            continue;
        }
        for (int64_t x = 0; x < p->filling.n; x++) {
            sp_simplex_cover(&c->lp, nodes, p->filling.item[x], p->filling.amount[x]);
        }
        sp_simplex_entry(&c->lp, nodes->rows + row[b], 1);
        c->column_interval[c->lp.n_columns - 1] = p->interval;
        c->column_row[c->lp.n_columns - 1] = row[b];
    }
}

/* Contents of all intervals, by the prices that were evaluated last. */
static void propose(cases *c, const kase *k, const int64_t *row)
{
    const sp_contents *x = &c->contents;
    for (int64_t at = 0; at < 2 * x->n_intervals; at++) {
        if (at / 2 > k->to[0] || at / 2 < k->from[k->slots - 1]) {
            continue;
        }
        proposal *p = &c->proposal[c->n_proposals++ % FILLINGS];
        p->interval = at / 2;
        p->cost = x->holder[at].t + c->model->fixed;
        sp_contents_fill(x, at / 2, at % 2, &p->filling);
        if (p->filling.n > 0) {
            add_columns(c, k, row, p);
        }
    }
}

/* The program of one case: its rows, and all columns known. */
static void open_program(cases *c, const kase *k, const int64_t *row)
{
    sp_simplex *lp = &c->lp;
    int64_t rows = c->contents.nodes.rows;
    lp->n_columns = lp->n_entries = 0;
    memcpy(lp->demand, c->contents.nodes.demand, (size_t)rows * sizeof *lp->demand);
    for (int64_t r = 0; r < SLOTS; r++) {
        lp->demand[rows + r] = 0;
        lp->floor[rows + r] = k->more ? 0 : -HUGE_VAL;
        lp->limit[rows + r] = (double)(k->count + 1) * (c->longest_s + c->model->fixed);
    }
    for (int64_t b = 0; b < k->slots; b++) {
        lp->demand[rows + row[b]] += k->more ? (double)k->count : 1;
    }
    int64_t p = c->n_proposals > FILLINGS ? c->n_proposals - FILLINGS : 0;
    for (; p < c->n_proposals; p++) {
        add_columns(c, k, row, &c->proposal[p % FILLINGS]);
    }
    sp_simplex_reset(lp);
}

/* The box around the best prices. */
static void set_box(cases *c, const entry *e)
{
    for (int64_t r = 0; r < c->contents.nodes.rows; r++) {
        c->lp.limit[r] = e->pi[r] * (1 + BOX) + 1e-3 * c->work[r];
        c->lp.floor[r] = e->pi[r] * (1 - BOX);
    }
}

/* How much of each interval the program has in the slots of a row. */
static void weigh_intervals(const cases *c, int64_t row, double *mass)
{
    for (int64_t i = 0; i < INTERVALS; i++) {
        mass[i] = 0;
    }
    for (int64_t r = 0; r < c->lp.rows; r++) {
        int64_t column = c->lp.basis[r];
        if (column >= 0 && c->column_row[column] == row) {
            mass[c->column_interval[column]] += c->lp.x[r];
        }
    }
}

/* Takes one micro-batch from the mass, longest first; mean and variance of its interval. */
static double take_slot(const kase *k, int64_t b, double *mass, double *mean)
{
    double want = 1, sum = 0, square = 0;
    for (int64_t i = k->to[b]; i >= k->from[b] && want > 1e-9; i--) {
        double part = fmin(mass[i], want);
        sum += part * (double)i;
        square += part * (double)(i * i);
        want -= part;
        mass[i] -= part;
    }
    double got = fmax(1 - want, 1e-9);
    *mean = sum / got;
    return square / got - *mean * *mean;
}

/* Makespans are whole, but the program mixes several for one slot: where they are the furthest
 * apart, the case is to be cut at their mean. */
static void choose_cut(const cases *c, kase *k, const int64_t *row)
{
    double worst = 1e-6, mass[INTERVALS];
    k->cut_slot = -1;
    for (int64_t b = 0; b < k->slots; b++) {
        if (b == 0 || row[b] != row[b - 1]) {
            weigh_intervals(c, row[b], mass);
        }
        double mean, spread = take_slot(k, b, mass, &mean);
        int64_t at = (int64_t)mean;
        at = at < k->to[b] ? at : k->to[b] - 1;
        at = at > k->from[b] ? at : k->from[b];
        spread *= c->contents.high[at];
        if (spread > worst && k->to[b] > k->from[b]) {
            worst = spread;
            k->cut_slot = b;
            k->cut_at = at;
        }
    }
}

/* Better prices for the case, until it is at `goal` or no better ones are found. */
static void improve(cases *c, kase *k, double goal, ovlm_meter *meter)
{
    int64_t row[SLOTS] = {0}, pivots = 0, rows = c->contents.nodes.rows;
    set_rows(k, row);
    open_program(c, k, row);
    if (c->n_proposals == 0) {
        propose(c, k, row);
    }
    for (int64_t round = 0; k->bound < goal || round == 0; round++) {
        int64_t before = c->contents.visits;
        set_box(c, entry_at(c, k->best));
        double optimum = sp_simplex_solve(&c->lp, 100 + 2 * rows, &pivots);
        k->solved = round == ROUNDS || (round > 0 && pivots == 0) ||
                    optimum < k->bound * (1 + CONVERGED);
        for (int64_t r = 0; r < rows; r++) {
            double price = fmin(fmax(c->lp.price[r], c->lp.floor[r]), c->lp.limit[r]);
            c->pi[r] = entry_at(c, k->best)->pi[r] * (1 - STEP) + price * STEP;
        }
        add_entry(c);
        refresh(c, k);
        propose(c, k, row);
        int64_t visits = c->contents.visits - before +
                         pivots * (c->lp.rows * c->lp.rows + 2 * c->lp.n_entries);
        if (ovlm_meter_spend(meter, 1 + visits / VISITS_PER_STEP) || k->solved) {
            break;
        }
    }
    choose_cut(c, k, row);
}

/* ------------------------------------------------------------------ cases ---------------- */

/* The case becomes its lower half, its upper half a new one. */
static void cut(cases *c, kase *k)
{
    kase *upper = &c->of[c->n++];
    k->solved = false;
    *upper = *k;
    for (int64_t b = 0; b < k->slots; b++) {
        uint8_t at = (uint8_t)k->cut_at;
        if (b >= k->cut_slot) {
            k->to[b] = k->to[b] < at ? k->to[b] : at;
        }
        if (b <= k->cut_slot) {
            upper->from[b] = upper->from[b] > at + 1 ? upper->from[b] : (uint8_t)(at + 1);
        }
    }
    k->seen = upper->seen = 0;
}

static kase *worst_case(cases *c)
{
    kase *worst = &c->of[0];
    for (int64_t i = 1; i < c->n; i++) {
        worst = c->of[i].bound < worst->bound ? &c->of[i] : worst;
    }
    return worst;
}

static void add_case(cases *c, int64_t count, bool more)
{
    kase *k = &c->of[c->n++];
    *k = (kase){.best = -1, .count = count, .slots = more ? 1 : count, .more = more};
    for (int64_t b = 0; b < k->slots; b++) {
        k->to[b] = (uint8_t)(c->contents.n_intervals - 1);
    }
}

/* The worst case alone limits the bound: prices first, then a cut. */
static void run(cases *c, ovlm_meter *meter)
{
    while (!ovlm_meter_look(meter)) {
        kase *k = worst_case(c);
        c->low = fmax(c->low, k->bound);
        double before = k->bound;
        refresh(c, k);
        if (k->bound > before) {
            continue;
        }
        if (c->low >= c->hint) {
            break;
        }
        if (!k->solved) {
            improve(c, k, k->bound + GOAL * fmax(fabs(k->bound), c->low), meter);
        } else if (k->more || k->cut_slot < 0 || c->n == CASES) {
            break;
        } else {
            cut(c, k);
        }
    }
    c->low = fmax(c->low, worst_case(c)->bound);
}

static ovlm_status init(cases *c, const sp_model *model, double mean_s, ovlm_arena *arena,
                        ovlm_err *err)
{
    OVLM_TRY(sp_contents_init(&c->contents, model, ROWS, fmin(mean_s / 3, c->longest_s / 2),
                              c->longest_s, arena, err));
    int64_t rows = c->contents.nodes.rows;
    OVLM_TRY(sp_simplex_init(&c->lp, rows + SLOTS, COLUMNS, arena, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &c->pool, POOL, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &c->of, CASES, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &c->proposal, FILLINGS, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &c->column_interval, COLUMNS, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &c->column_row, COLUMNS, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &c->work, rows, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &c->pi, rows, err));
    for (int64_t r = 0; r < rows; r++) {
        int64_t k = c->contents.nodes.node[r];
        c->work[r] = HUGE_VAL;
        for (int64_t j = model->min_j[k]; j < model->D; j++) {
            c->work[r] = fmin(c->work[r], sp_item_work(model, k, j) / (double)model->n_gpus);
        }
        c->pi[r] = c->work[r];
    }
    return OVLM_OK;
}

ovlm_status sp_cases_raise(const sp_model *model, int64_t least, int64_t most, double mean_s,
                           double longest_s, double hint, ovlm_meter *meter, double *low,
                           ovlm_arena *arena, ovlm_err *err)
{
    ovlm_status status = OVLM_OK;
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    cases c = {.model = model, .hint = hint, .low = *low, .longest_s = longest_s};
    if (mean_s <= 0 || longest_s <= 0) {
        return OVLM_OK;
    }
    OVLM_GOTO(done, init(&c, model, mean_s, arena, err));
    add_entry(&c);
    /* Beyond that many, makespans are too alike to tell apart. */
    bool few = least <= SLOTS;
    if (few) {
        add_case(&c, least, false);
    }
    if (!few || most > least) {
        add_case(&c, few ? least + 1 : least, true);
    }
    run(&c, meter);
    *low = fmin(fmax(*low, c.low), hint);
done:
    ovlm_arena_rewind(arena, mark);
    return status;
}
