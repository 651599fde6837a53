/* relabel_minmax.c - least largest traffic of any rank between nodes, by swaps.
 *
 * With labels on nodes, rank i exchanges sum_j V_ij over the labels outside its node, and label j
 * (wherever it goes inside its node) sum_i V_ij over the ranks outside: 2N loads.  The search takes
 * the largest, and swaps two labels so that all loads touched end below it.  Each step lowers the
 * number of loads at the top, so it ends. */
#include "plan/relabel.h"

#include <math.h>
#include <string.h>

typedef struct swaps {
    const relabel_model *model;
    const relabel_flows *flows;
    int64_t *node_of, *member, *slot; /* member[node*node_size + s], slot[label] its index      */
    int64_t leaves;
    double *load;   /* winner tree: [leaves + e], e < N: rank e; N + j: label j                 */
    double *delta;  /* [2*node_size] change of the two nodes' ranks, zero between calls         */
} swaps;

typedef struct swap_choice {
    int64_t a, b;
    double worst; /* largest load touched, after */
} swap_choice;

static void tree_set(swaps *s, int64_t element, double value)
{
    int64_t at = s->leaves + element;
    s->load[at] = value;
    for (at /= 2; at >= 1; at /= 2) {
        double left = s->load[2 * at], right = s->load[2 * at + 1];
        s->load[at] = left > right ? left : right;
    }
}

static int64_t tree_top(const swaps *s)
{
    int64_t at = 1;
    while (at < s->leaves) {
        at = 2 * at + (s->load[2 * at] < s->load[at]);
    }
    return at - s->leaves;
}

/* First entry of the label whose rank is in `node` or beyond. */
static int64_t entry_of(const swaps *s, int64_t label, int64_t node)
{
    int64_t low = s->flows->start[label], high = s->flows->start[label + 1];
    int64_t rank = node * s->model->node_size;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (s->flows->rank[middle] < rank) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

/* Adds sign*V_i,label to delta for the ranks i of the node; returns A = what they share. */
static double spread(const swaps *s, int64_t label, int64_t node, double sign, double *delta)
{
    int64_t first = node * s->model->node_size, end = first + s->model->node_size;
    double shared = 0;
    for (int64_t e = entry_of(s, label, node);
         e < s->flows->start[label + 1] && s->flows->rank[e] < end; e++) {
        double bytes = (double)s->flows->bytes[e];
        delta[s->flows->rank[e] - first] += sign * bytes;
        shared += bytes;
    }
    return shared;
}

/* The largest load touched once a and b have changed places. */
static double evaluate(swaps *s, int64_t a, int64_t b, double limit)
{
    int64_t c = s->model->node_size, node_a = s->node_of[a], node_b = s->node_of[b];
    double *at_a = s->delta, *at_b = s->delta + c;
    (void)spread(s, a, node_a, 1.0, at_a);
    double b_keeps = spread(s, b, node_a, -1.0, at_a);
    (void)spread(s, b, node_b, 1.0, at_b);
    double a_keeps = spread(s, a, node_b, -1.0, at_b);
    double worst = s->flows->label_total[a] - a_keeps;
    double other = s->flows->label_total[b] - b_keeps;
    worst = other > worst ? other : worst;
    const double *load_a = s->load + s->leaves + node_a * c;
    const double *load_b = s->load + s->leaves + node_b * c;
    int64_t room_a = relabel_node_room(s->model, node_a);
    int64_t room_b = relabel_node_room(s->model, node_b);
    for (int64_t r = 0; r < room_a && worst < limit; r++) {
        double after = load_a[r] + at_a[r];
        worst = at_a[r] != 0 && after > worst ? after : worst;
    }
    for (int64_t r = 0; r < room_b && worst < limit; r++) {
        double after = load_b[r] + at_b[r];
        worst = at_b[r] != 0 && after > worst ? after : worst;
    }
    memset(s->delta, 0, (size_t)(2 * c) * sizeof *s->delta);
    return worst;
}

static bool consider(swaps *s, int64_t a, int64_t b, swap_choice *best, ovlm_meter *meter)
{
    if (ovlm_meter_spend(meter, 1)) {
        return true;
    }
    double worst = evaluate(s, a, b, best->worst);
    if (worst < best->worst) {
        *best = (swap_choice){a, b, worst};
    }
    return false;
}

/* A label that receives too much: to a node that shares more with it. */
static bool help_label(swaps *s, int64_t label, swap_choice *best, ovlm_meter *meter)
{
    const relabel_flows *flows = s->flows;
    int64_t c = s->model->node_size;
    for (int64_t e = flows->start[label]; e < flows->start[label + 1];) {
        int64_t node = flows->rank[e] / c;
        double shared = 0;
        for (; e < flows->start[label + 1] && flows->rank[e] / c == node; e++) {
            shared += (double)flows->bytes[e];
        }
        if (node == s->node_of[label] || flows->label_total[label] - shared >= best->worst) {
            continue;
        }
        int64_t room = relabel_node_room(s->model, node);
        for (int64_t m = 0; m < room; m++) {
            if (consider(s, label, s->member[node * c + m], best, meter)) {
                return true;
            }
        }
    }
    return false;
}

/* A rank that sends too much: a label it sends much to comes in for one it sends less to. */
static bool help_rank(swaps *s, int64_t rank, swap_choice *best, ovlm_meter *meter)
{
    const relabel_flows *flows = s->flows;
    int64_t c = s->model->node_size, node = rank / c, room = relabel_node_room(s->model, node);
    for (int64_t e = flows->rank_start[rank]; e < flows->rank_start[rank + 1]; e++) {
        int64_t label = flows->rank_label[e];
        if (s->node_of[label] == node) {
            continue;
        }
        for (int64_t m = 0; m < room; m++) {
            if (consider(s, s->member[node * c + m], label, best, meter)) {
                return true;
            }
        }
    }
    return false;
}

static void apply(swaps *s, int64_t a, int64_t b)
{
    int64_t c = s->model->node_size, N = s->model->N;
    int64_t node_a = s->node_of[a], node_b = s->node_of[b], slot_a = s->slot[a];
    double *at_a = s->delta, *at_b = s->delta + c;
    (void)spread(s, a, node_a, 1.0, at_a);
    double b_keeps = spread(s, b, node_a, -1.0, at_a);
    (void)spread(s, b, node_b, 1.0, at_b);
    double a_keeps = spread(s, a, node_b, -1.0, at_b);
    for (int64_t r = 0; r < c; r++) {
        if (at_a[r] != 0) {
            tree_set(s, node_a * c + r, s->load[s->leaves + node_a * c + r] + at_a[r]);
        }
        if (at_b[r] != 0) {
            tree_set(s, node_b * c + r, s->load[s->leaves + node_b * c + r] + at_b[r]);
        }
    }
    tree_set(s, N + a, s->flows->label_total[a] - a_keeps);
    tree_set(s, N + b, s->flows->label_total[b] - b_keeps);
    memset(s->delta, 0, (size_t)(2 * c) * sizeof *s->delta);
    s->slot[a] = s->slot[b];
    s->slot[b] = slot_a;
    s->member[s->slot[a]] = a;
    s->member[s->slot[b]] = b;
    s->node_of[a] = node_b;
    s->node_of[b] = node_a;
}

/* Loads of ranks [0, N) and labels [N, 2N). */
static void loads_of(const relabel_model *model, const relabel_flows *flows,
                     const int64_t *node_of, double *load)
{
    memcpy(load, flows->rank_total, (size_t)model->N * sizeof *load);
    memcpy(load + model->N, flows->label_total, (size_t)model->N * sizeof *load);
    for (int64_t j = 0; j < model->N; j++) {
        for (int64_t e = flows->start[j]; e < flows->start[j + 1]; e++) {
            if (flows->rank[e] / model->node_size == node_of[j]) {
                load[flows->rank[e]] -= (double)flows->bytes[e];
                load[model->N + j] -= (double)flows->bytes[e];
            }
        }
    }
}

ovlm_status relabel_measure(const relabel_model *model, const relabel_flows *flows,
                            const int64_t *node_of, double *sum, double *worst, ovlm_arena *arena,
                            ovlm_err *err)
{
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    double *load = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &load, 2 * model->N, err));
    loads_of(model, flows, node_of, load);
    *sum = *worst = 0;
    for (int64_t e = 0; e < 2 * model->N; e++) {
        *sum += e < model->N ? load[e] : 0;
        *worst = load[e] > *worst ? load[e] : *worst;
    }
    ovlm_arena_rewind(arena, mark);
    return OVLM_OK;
}

static ovlm_status swaps_init(swaps *s, ovlm_arena *arena, ovlm_err *err)
{
    const relabel_model *model = s->model;
    int64_t c = model->node_size;
    s->leaves = 1;
    while (s->leaves < 2 * model->N) {
        s->leaves *= 2;
    }
    OVLM_TRY(OVLM_ARENA_NEW(arena, &s->load, 2 * s->leaves, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &s->delta, 2 * c, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &s->member, model->K * c, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &s->slot, model->N, err));
    int64_t *filled = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &filled, model->K, err));
    for (int64_t j = 0; j < model->N; j++) {
        int64_t node = s->node_of[j];
        s->slot[j] = node * c + filled[node]++;
        s->member[s->slot[j]] = j;
    }
    loads_of(model, s->flows, s->node_of, s->load + s->leaves);
    for (int64_t at = s->leaves - 1; at >= 1; at--) {
        double left = s->load[2 * at], right = s->load[2 * at + 1];
        s->load[at] = left > right ? left : right;
    }
    return OVLM_OK;
}

ovlm_status relabel_minmax(const relabel_model *model, ovlm_meter *meter, int64_t *node_of,
                           double *value, ovlm_arena *arena, ovlm_err *err)
{
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    swaps s = {.model = model, .flows = &model->flows, .node_of = node_of};
    OVLM_TRY(swaps_init(&s, arena, err));
    for (bool stop = false; !stop && s.load[1] > 0;) {
        int64_t top = tree_top(&s);
        swap_choice best = {-1, -1, s.load[1]};
        stop = top < model->N ? help_rank(&s, top, &best, meter)
                              : help_label(&s, top - model->N, &best, meter);
        if (best.a < 0) {
            break;
        }
        apply(&s, best.a, best.b);
    }
    *value = s.load[1];
    ovlm_arena_rewind(arena, mark);
    return OVLM_OK;
}
