/* sp_frame.c - annealing over the groups of the large items. */
#include "plan/sp_frame.h"

#include <math.h>
#include <string.h>

#include "plan/sp_pack.h"

/* From this factor over the cheapest degree's linear cost on, a degree is dear. */
#define DEAR 1.2
/* Threshold at the start, over the least GPU-seconds of the longest item. */
#define HOT 0.2
/* Share of moves that may make a box longer. */
#define LIFTS 0.1
/* First makespan of a box, over the least that the item which opens it needs: at random, because
 * annealing keeps near it; and at least this share of the box before.  How often more is tried. */
#define LEAST_AMPLE 1.1
#define MOST_AMPLE 1.5
#define NEXT 0.65
enum { STARTS = 6 };

typedef struct annealing {
    sp_frame *f;
    double heat; /* GPU-seconds                                              */
    bool lifts;  /* a box that is too short for a move becomes longer for it */
    ovlm_rng *rng;
} annealing;

/* ------------------------------------------------------------------ set-up --------------- */

static double linear_of(const sp_model *model, int64_t j)
{
    return (double)model->degree[j] * model->lin[j];
}

static double least_linear(const sp_model *model, int64_t from)
{
    double least = HUGE_VAL;
    for (int64_t j = from; j < model->D; j++) {
        least = fmin(least, linear_of(model, j));
    }
    return least;
}

ovlm_status sp_frame_init(sp_frame *f, const sp_model *model, ovlm_arena *arena, ovlm_err *err)
{
    double least = least_linear(model, 0);
    *f = (sp_frame){.model = model, .cost = HUGE_VAL};
    while (f->n < model->n && f->n < SP_FRAME_ITEMS &&
           least_linear(model, model->min_j[f->n]) > DEAR * least) {
        f->n++;
    }
    for (int64_t j = 0; j < model->D; j++) {
        f->excess[j] = linear_of(model, j) - least;
    }
    f->fluid_s = f->n < model->n ? (double)model->s[f->n] : 0;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &f->group, f->n + 1, err));
    return OVLM_ARENA_NEW(arena, &f->where, f->n + 1, err);
}

/* ------------------------------------------------------------------ costs ---------------- */

/* What the fluid is worth in `time` and `tokens` left of a group: few long items where the degree
 * costs more than memory is worth, else as many tokens as there is memory for. */
static double fill_worth(const sp_frame *f, int64_t j, double time, double tokens)
{
    const sp_model *m = f->model;
    double d = (double)m->degree[j], quad = m->quad[j], lin = m->lin[j];
    double s = fmin(fmin(f->fluid_s, tokens), sp_pack_longest_within(quad, lin, time));
    if (s <= 0) {
        return 0;
    }
    double each = quad * s + lin, amount = each * tokens > time ? time / each : tokens;
    if (f->price_s > f->excess[j] && lin > 0 && quad > 0) {
        amount = fmin(tokens, time / lin);
        s = fmin(s, fmax((time / amount - lin) / quad, 0));
    }
    return amount * (d * (quad * s + lin) - f->excess[j] + f->price_s);
}

/* The fluid alone, per GPU. */
static double fluid_worth(const sp_frame *f, double tau)
{
    double most = 0;
    for (int64_t j = 0; j < f->model->D; j++) {
        double all = fill_worth(f, j, tau, (double)f->model->cap[j]);
        most = fmax(most, all / (double)f->model->degree[j]);
    }
    return most;
}

static double group_time(const sp_frame *f, const sp_frame_group *g)
{
    return f->model->quad[g->j] * g->sum_s2 + f->model->lin[g->j] * g->sum_s;
}

/* Worth of its GPUs less that of the fluid beside its items; HUGE_VAL when they do not fit. */
static double group_cost(const sp_frame *f, const sp_frame_group *g, double tau, double worth)
{
    const sp_model *m = f->model;
    double time = tau - group_time(f, g);
    double tokens = (double)m->cap[g->j] - g->sum_s;
    if (time < 0 || tokens < 0) {
        return HUGE_VAL;
    }
    return (double)m->degree[g->j] * worth - fill_worth(f, g->j, time, tokens);
}

/* A box of fluid alone, over one that is as long as its memory's content takes. */
static double box_cost(const sp_frame *f, const sp_frame_box *box)
{
    double cap = (double)f->model->cap[0] / (double)f->model->degree[0];
    return (double)f->model->n_gpus * (box->tau - box->worth + f->price_s * cap);
}

static sp_frame_group with(const sp_frame *f, sp_frame_group g, int64_t k, int64_t sign)
{
    double s = (double)f->model->s[k];
    g.count += sign;
    g.sum_s += (double)sign * s;
    g.sum_s2 += (double)sign * s * s;
    const sp_frame_box *box = &f->box[g.box];
    g.cost = g.count > 0 ? group_cost(f, &g, box->tau, box->worth) : 0;
    return g;
}

/* ------------------------------------------------------------------ moves ---------------- */

static bool accept(annealing *a, double delta)
{
    if (delta <= 0) {
        return true;
    }
    double u = ovlm_rng_uniform(a->rng);
    return delta < a->heat * u * u;
}

/* Cost of a box with its groups. */
static double box_total(const sp_frame *f, int64_t b)
{
    double total = f->box[b].n_groups > 0 ? box_cost(f, &f->box[b]) : 0;
    for (int64_t g = 0; g < f->n_groups; g++) {
        total += f->group[g].box == b ? f->group[g].cost : 0;
    }
    return total;
}

/* A box as long as that; how much the cost changes. */
static double set_tau(sp_frame *f, int64_t b, double tau)
{
    double before = box_total(f, b);
    f->box[b].tau = tau;
    f->box[b].worth = fluid_worth(f, tau);
    for (int64_t g = 0; g < f->n_groups; g++) {
        if (f->group[g].box == b) {
            f->group[g].cost = group_cost(f, &f->group[g], tau, f->box[b].worth);
        }
    }
    return box_total(f, b) - before;
}

/* The same when the group needs it and the move may. */
static double lift(annealing *a, const sp_frame_group *g)
{
    double time = group_time(a->f, g);
    bool needed = time > a->f->box[g->box].tau && g->sum_s <= (double)a->f->model->cap[g->j];
    return needed && a->lifts ? set_tau(a->f, g->box, time) : 0;
}

/* A group on degree j in box `to` instead of nowhere (sign 1), or the other way round; the change
 * of the boxes' cost. */
static double occupy(sp_frame *f, int64_t b, int64_t j, int64_t sign)
{
    sp_frame_box *box = &f->box[b];
    bool was = box->n_groups > 0;
    box->used += sign * f->model->degree[j];
    box->n_groups += sign;
    bool is = box->n_groups > 0;
    return was == is ? 0 : (is ? 1 : -1) * box_cost(f, box);
}

static void drop_group(sp_frame *f, int64_t g)
{
    int64_t last = --f->n_groups;
    if (g == last) {
        return;
    }
    f->group[g] = f->group[last];
    for (int64_t k = 0; k < f->n; k++) {
        f->where[k] = f->where[k] == last ? g : f->where[k];
    }
}

/* Item k into group `to`, where f->n_groups is a new one: group[to] has its degree and box. */
static void try_move(annealing *a, int64_t k, int64_t to)
{
    sp_frame *f = a->f;
    int64_t from = f->where[k], b = f->group[to].box;
    if (to == from) {
        return;
    }
    bool opens = to == f->n_groups;
    double tau = f->box[b].tau;
    sp_frame_group joined = with(f, f->group[to], k, 1);
    double delta = lift(a, &joined);
    joined = with(f, f->group[to], k, 1);
    sp_frame_group left = with(f, f->group[from], k, -1);
    delta += left.cost + joined.cost - f->group[from].cost - (opens ? 0 : f->group[to].cost);
    delta += opens ? occupy(f, b, joined.j, 1) : 0;
    delta += left.count == 0 ? occupy(f, left.box, left.j, -1) : 0;
    if (f->box[b].used > f->model->n_gpus || !accept(a, delta)) {
        (void)(opens ? occupy(f, b, joined.j, -1) : 0);
        (void)(left.count == 0 ? occupy(f, left.box, left.j, 1) : 0);
        (void)(f->box[b].tau > tau ? set_tau(f, b, tau) : 0);
        return;
    }
    f->where[k] = to;
    f->n_groups += opens;
    f->group[to] = joined;
    f->group[from] = left;
    if (left.count == 0) {
        drop_group(f, from);
    }
}

static void try_swap(annealing *a, int64_t k, int64_t l)
{
    sp_frame *f = a->f;
    int64_t g = f->where[k], h = f->where[l];
    if (g == h) {
        return;
    }
    sp_frame_group first = f->group[g], second = f->group[h];
    first = with(f, with(f, first, k, -1), l, 1);
    second = with(f, with(f, second, l, -1), k, 1);
    double delta = first.cost + second.cost - f->group[g].cost - f->group[h].cost;
    if (accept(a, delta)) {
        f->group[g] = first;
        f->group[h] = second;
        f->where[k] = h;
        f->where[l] = g;
    }
}

/* A whole group on another degree or in another box. */
static void try_shift(annealing *a, int64_t g, int64_t j, int64_t b)
{
    sp_frame *f = a->f;
    sp_frame_group now = f->group[g], then = now;
    then.j = j;
    then.box = b;
    if ((b == now.box && j == now.j) || then.sum_s > (double)f->model->cap[j]) {
        return;
    }
    double tau = f->box[b].tau, delta = lift(a, &then);
    then.cost = group_cost(f, &then, f->box[b].tau, f->box[b].worth);
    delta += then.cost - f->group[g].cost;
    delta += occupy(f, b, j, 1);
    delta += occupy(f, now.box, now.j, -1);
    if (f->box[b].used > f->model->n_gpus || !accept(a, delta)) {
        (void)occupy(f, b, j, -1);
        (void)occupy(f, now.box, now.j, 1);
        (void)(f->box[b].tau > tau ? set_tau(f, b, tau) : 0);
        return;
    }
    f->group[g] = then;
}

static double longest_group(const sp_frame *f, int64_t b)
{
    double longest = 0;
    for (int64_t g = 0; g < f->n_groups; g++) {
        longest = f->group[g].box == b ? fmax(longest, group_time(f, &f->group[g])) : longest;
    }
    return longest;
}

static void try_tau(annealing *a, int64_t b, double tau)
{
    double before = a->f->box[b].tau, delta = set_tau(a->f, b, tau);
    if (!accept(a, delta)) {
        (void)set_tau(a->f, b, before);
    }
}

static void try_any(annealing *a)
{
    sp_frame *f = a->f;
    const sp_model *m = f->model;
    double kind = ovlm_rng_uniform(a->rng), spread = ovlm_rng_uniform(a->rng);
    int64_t k = ovlm_rng_below(a->rng, f->n), b = ovlm_rng_below(a->rng, f->n_boxes);
    int64_t j = m->min_j[k] + ovlm_rng_below(a->rng, m->D - m->min_j[k]);
    a->lifts = spread < LIFTS;
    if (kind < 0.35) {
        try_move(a, k, ovlm_rng_below(a->rng, f->n_groups));
    } else if (kind < 0.55) {
        f->group[f->n_groups] = (sp_frame_group){.j = j, .box = b};
        try_move(a, k, f->n_groups);
    } else if (kind < 0.85) {
        try_swap(a, k, ovlm_rng_below(a->rng, f->n));
    } else if (kind < 0.95) {
        try_shift(a, f->where[k], j, b);
    } else if (kind < 0.98) {
        try_tau(a, b, f->box[b].tau * (1 + 0.04 * (spread - 0.5)));
    } else if (f->box[b].n_groups > 0) {
        try_tau(a, b, longest_group(f, b));
    }
}

/* ------------------------------------------------------------------ arrange -------------- */

/* A box for item k. */
static void open_box(sp_frame *f, int64_t k, double ample)
{
    const sp_model *m = f->model;
    double least = HUGE_VAL;
    for (int64_t j = m->min_j[k]; j < m->D; j++) {
        least = fmin(least, sp_item_time(m, k, j));
    }
    double tau = ample * least;
    if (f->n_boxes > 0) {
        tau = fmax(tau, NEXT * f->box[f->n_boxes - 1].tau);
    }
    f->box[f->n_boxes++] = (sp_frame_box){.tau = tau, .worth = fluid_worth(f, tau)};
}

/* Item k alone in the first box that holds it, on the least degree there, or in a new box. */
static bool place_alone(sp_frame *f, int64_t k, int64_t most, double ample)
{
    const sp_model *m = f->model;
    for (int64_t b = 0; b < most; b++) {
        if (b == f->n_boxes) {
            open_box(f, k, ample);
        }
        for (int64_t j = m->min_j[k]; j < m->D; j++) {
            sp_frame_group g = with(f, (sp_frame_group){.j = j, .box = b}, k, 1);
            if (g.cost < HUGE_VAL && f->box[b].used + m->degree[j] <= m->n_gpus) {
                (void)occupy(f, b, j, 1);
                f->where[k] = f->n_groups;
                f->group[f->n_groups++] = g;
                return true;
            }
        }
    }
    return false;
}

/* Longest first, without those that have no groups. */
static void sort_boxes(sp_frame *f)
{
    int64_t rank[SP_FRAME_BOXES] = {0}, count = 0;
    sp_frame_box sorted[SP_FRAME_BOXES] = {{0}};
    for (int64_t b = 0; b < f->n_boxes; b++) {
        for (int64_t c = 0; c < f->n_boxes; c++) {
            double tau = f->box[c].tau;
            bool before = tau > f->box[b].tau || (tau == f->box[b].tau && c < b);
            rank[b] += f->box[c].n_groups > 0 && before;
        }
        if (f->box[b].n_groups > 0) {
            sorted[rank[b]] = f->box[b];
            count++;
        }
    }
    for (int64_t g = 0; g < f->n_groups; g++) {
        f->group[g].box = rank[f->group[g].box];
    }
    memcpy(f->box, sorted, (size_t)count * sizeof *sorted);
    f->n_boxes = count;
}

/* Alone, longest first. */
static bool start(sp_frame *f, int64_t most, ovlm_rng *rng)
{
    double ample = LEAST_AMPLE + (MOST_AMPLE - LEAST_AMPLE) * ovlm_rng_uniform(rng);
    for (int i = 0; i < STARTS; i++, ample *= 1.5) {
        bool placed = true;
        f->n_boxes = f->n_groups = 0;
        for (int64_t k = 0; k < f->n && placed; k++) {
            placed = place_alone(f, k, most, ample);
        }
        if (placed) {
            return true;
        }
    }
    return false;
}

/* Threshold at the start, GPU-seconds. */
static double hottest(const sp_frame *f)
{
    double least = HUGE_VAL;
    for (int64_t j = f->model->min_j[0]; j < f->model->D; j++) {
        least = fmin(least, sp_item_work(f->model, 0, j));
    }
    return HOT * least;
}

static void run_annealing(sp_frame *f, int64_t steps, ovlm_meter *meter, ovlm_rng *rng)
{
    annealing a = {.f = f, .rng = rng};
    double hot = hottest(f);
    for (int64_t i = 0; i < steps && !ovlm_meter_spend(meter, 1); i++) {
        double left = 1 - (double)i / (double)steps;
        a.heat = hot * left * left * left;
        try_any(&a);
    }
}

void sp_frame_arrange(sp_frame *f, int64_t most, double price_s, int64_t steps, ovlm_meter *meter,
                      ovlm_rng *rng)
{
    most = most < SP_FRAME_BOXES ? most : SP_FRAME_BOXES;
    f->price_s = price_s;
    f->cost = HUGE_VAL;
    if (!start(f, most, rng)) {
        return;
    }
    if (f->n_boxes > 0 && f->n_boxes < most) { /* one to spare */
        sp_frame_box spare = f->box[f->n_boxes - 1];
        spare.used = spare.n_groups = 0;
        f->box[f->n_boxes++] = spare;
    }
    if (f->n > 0) {
        run_annealing(f, steps, meter, rng);
    }
    sort_boxes(f);
    f->cost = 0;
    for (int64_t b = 0; b < f->n_boxes; b++) {
        f->cost += box_total(f, b);
    }
}
