/* sp_bound_content.c - heads, and what fits beside them. */
#include "plan/sp_bound_content.h"

#include <math.h>

#define NEAR 0.99      /* heads taken together: so close in length */
#define ROUNDING 1e-11 /* of the terms of phi, which cancel */

/* A group of one degree within one interval. */
typedef struct group {
    int64_t i, j;
    double low, high, cap;
    double groups; /* N over the degree                            */
    int64_t theta; /* where the last search for the best one ended */
} group;

ovlm_status sp_contents_init(sp_contents *c, const sp_model *model, int64_t max_rows,
                             double first_s, double longest_s, ovlm_arena *arena, ovlm_err *err)
{
    int64_t n = model->n, cells = (max_rows + 1) * SP_CONTENT_THETAS;
    *c = (sp_contents){.model = model};
    OVLM_TRY(OVLM_ARENA_NEW(arena, &c->all, n, err));
    for (int64_t k = 0; k < n; k++) {
        c->all[k] = k;
    }
    OVLM_TRY(sp_nodes_init(&c->nodes, model, c->all, n, max_rows, arena, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &c->pi, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &c->suffix, cells, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &c->holder, 2 * SP_CONTENT_INTERVALS, err));
    /* The smallest ratio that covers the range: by trial, for want of a portable power. */
    double ratio = 1.01, end = 0;
    for (; ratio < 64 && end < longest_s; ratio *= 1.002) {
        end = first_s;
        for (int i = 1; i < SP_CONTENT_INTERVALS; i++) {
            end *= ratio;
        }
    }
    double low = 0;
    for (double high = first_s; high < longest_s && c->n_intervals < SP_CONTENT_INTERVALS - 1;
         high *= ratio) {
        c->low[c->n_intervals] = low;
        c->high[c->n_intervals++] = high;
        low = high;
    }
    c->low[c->n_intervals] = low;
    c->high[c->n_intervals++] = longest_s;
    return OVLM_OK;
}

/* First item of low.. that is no longer than that, in tokens and in seconds on degree j; `high`
 * when none before it is. */
static int64_t first_within(const sp_contents *c, int64_t j, double tokens, double seconds,
                            int64_t low, int64_t high)
{
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        bool fits = (double)c->model->s[middle] <= tokens &&
                    sp_item_time(c->model, middle, j) <= seconds;
        low = fits ? low : middle + 1;
        high = fits ? middle : high;
    }
    return low;
}

static double theta_of(int64_t theta)
{
    return (double)theta / (SP_CONTENT_THETAS - 1);
}

static double ratio_of(double price, double share)
{
    return share * 1e300 > price ? price / share : 1e300;
}

/* Between two nodes the price per token and the share per token are linear in the length, so that
 * their ratio is greatest at one of the two: nodes speak for all items after the first. */
static void set_suffix(sp_contents *c, const group *g, int64_t first)
{
    const sp_nodes *nodes = &c->nodes;
    double *after = c->suffix + nodes->rows * SP_CONTENT_THETAS;
    for (int64_t t = 0; t < SP_CONTENT_THETAS; t++) {
        after[t] = 0;
    }
    for (int64_t r = nodes->rows - 1; r >= 0 && nodes->node[r] >= first; r--) {
        int64_t k = nodes->node[r];
        double time = sp_item_time(c->model, k, g->j) / g->high, price = c->pi[k];
        double memory = (double)c->model->s[k] / g->cap, *here = after - SP_CONTENT_THETAS;
        for (int64_t t = 0; t < SP_CONTENT_THETAS; t++) {
            double ratio = ratio_of(price, theta_of(t) * time + (1 - theta_of(t)) * memory);
            here[t] = ratio > after[t] ? ratio : after[t];
        }
        after = here;
        c->visits += 2 * SP_CONTENT_THETAS;
    }
}

/* Greatest ratio of the items from `first` on. */
static double best_ratio(const sp_contents *c, const group *g, int64_t first, int64_t t)
{
    const sp_nodes *nodes = &c->nodes;
    int64_t r = nodes->left[first];
    r += nodes->node[r] < first;
    double time = sp_item_time(c->model, first, g->j) / g->high;
    double memory = (double)c->model->s[first] / g->cap;
    double own = ratio_of(c->pi[first], theta_of(t) * time + (1 - theta_of(t)) * memory);
    return fmax(own, c->suffix[r * SP_CONTENT_THETAS + t]);
}

/* Shares of time and memory that a head leaves. */
typedef struct rest {
    double time, memory;
} rest;

static rest rest_beside(const sp_contents *c, const group *g, int64_t head)
{
    if (head < 0) {
        return (rest){1, 1};
    }
    return (rest){1 - sp_item_time(c->model, head, g->j) / g->high,
                  1 - (double)c->model->s[head] / g->cap};
}

static double room_of(const rest *left, int64_t t)
{
    return fmax(theta_of(t) * left->time + (1 - theta_of(t)) * left->memory, 0) + 1e-14;
}

/* How much more than it costs a group holds beside its head, at the worse end, with rho. */
static double excess(const sp_contents *c, const group *g, int64_t first, const rest *left,
                     int64_t t, double *rho)
{
    double room = room_of(left, t), shorter = fmin(left->time, 1 - g->low / g->high);
    *rho = best_ratio(c, g, first, t);
    double low = g->groups * *rho * (room - theta_of(t) * shorter) + shorter * g->high;
    return fmax(g->groups * *rho * room, low);
}

/* The theta of least excess, from the last one on; returns its rho. */
static double search_theta(const sp_contents *c, group *g, int64_t first, const rest *left)
{
    double rho, best = excess(c, g, first, left, g->theta, &rho);
    int64_t start = g->theta;
    for (int step = -1; step <= 1 && g->theta == start; step += 2) {
        for (int64_t t = start + step; t >= 0 && t < SP_CONTENT_THETAS; t += step) {
            double trial_rho, trial = excess(c, g, first, left, t, &trial_rho);
            if (trial >= best) {
                break;
            }
            best = trial;
            rho = trial_rho;
            g->theta = t;
        }
    }
    return rho;
}

/* ------------------------------------------------------------------ heads ---------------- */

static void keep(sp_contents *c, const group *g, int end, sp_holder found, double size)
{
    sp_holder *holder = &c->holder[2 * g->i + end];
    found.phi += c->model->fixed - ROUNDING * size;
    if (found.phi < holder->phi) {
        *holder = found;
    }
}

/* c[0] + c[1]*s + c[2]*s^2 from `low` to `high`: the least, and whether it is nearer to high. */
static double least_between(const double *c, double low, double high, bool *at_high)
{
    double a = c[0] + low * (c[1] + low * c[2]), b = c[0] + high * (c[1] + high * c[2]);
    double vertex = c[2] > 0 ? -c[1] / (2 * c[2]) : low;
    *at_high = b < a;
    if (vertex > low && vertex < high) {
        return fmin(c[0] + vertex * (c[1] + vertex * c[2]), fmin(a, b));
    }
    return fmin(a, b);
}

/* Heads longest..shortest, all in one run between nodes; the items from `first` on beside them. */
static void try_heads(sp_contents *c, group *g, int64_t longest, int64_t shortest, int64_t first)
{
    const sp_model *m = c->model;
    double quad = m->quad[g->j], lin = m->lin[g->j], rho = 0;
    double s_high = (double)m->s[longest], s_low = (double)m->s[shortest];
    rest left = rest_beside(c, g, shortest);
    if (first < m->n) {
        rho = search_theta(c, g, first, &left);
    }
    double theta = theta_of(g->theta), per_s = theta / g->high, per_token = (1 - theta) / g->cap;
    /* price = s*(base + slope*s); nodes of one length may have two prices */
    double per_high = c->pi[longest] / s_high, per_low = c->pi[shortest] / s_low;
    double slope = s_high > s_low ? (per_high - per_low) / (s_high - s_low) : 0;
    double base = s_high > s_low ? per_low - slope * s_low : fmax(per_high, per_low);
    /* t - groups*(price + rho*(per_s*(t - time) + per_token*(cap - s))) at t = high, low, time. */
    double linear = -g->groups * (base - rho * per_token);
    double square = -g->groups * slope, by_time = g->groups * rho * per_s;
    double memory = g->groups * rho * (1 - theta);
    double at[3][3] = {
        {g->high - by_time * g->high - memory, linear + by_time * lin, square + by_time * quad},
        {g->low - by_time * g->low - memory, linear + by_time * lin, square + by_time * quad},
        {-memory, linear + lin, square + quad}};
    double size = g->high + g->groups * (fmax(c->pi[longest], c->pi[shortest]) + rho);
    for (int e = 0; e < 3; e++) {
        int64_t far = e == 1 ? shortest : longest;
        double time = sp_item_time(m, far, g->j);
        if ((e == 1 && time > g->low) || (e == 2 && time < g->low)) {
            continue; /* all take longer than low; none does */
        }
        bool at_high;
        double phi = least_between(at[e], s_low, s_high, &at_high);
        int64_t head = at_high ? longest : shortest;
        double t = e == 0 ? g->high : fmax(g->low, sp_item_time(m, head, g->j));
        keep(c, g, e == 0, (sp_holder){phi, t, g->j, head, first, g->theta}, size);
    }
    c->visits += 60;
}

/* Groups without a head. */
static void try_fluid(sp_contents *c, group *g, int64_t first)
{
    rest left = {1, 1};
    double all = g->groups * search_theta(c, g, first, &left), theta = theta_of(g->theta);
    double at_low = all * (theta * g->low / g->high + 1 - theta);
    sp_holder low = {g->low - at_low, g->low, g->j, -1, first, g->theta};
    sp_holder high = {g->high - all, g->high, g->j, -1, first, g->theta};
    keep(c, g, 0, low, g->high + all);
    keep(c, g, 1, high, g->high + all);
    c->visits += 60;
}

/* Last item of those up to `end` that lie in one run with `head`, and are nearly as long. */
static int64_t run_end(const sp_contents *c, int64_t head, int64_t end)
{
    const sp_nodes *nodes = &c->nodes;
    int64_t r = nodes->left[head] + 1, low = head;
    int64_t high = r < nodes->rows ? nodes->node[r] : c->model->n - 1;
    high = high < end ? high : end;
    while (low < high) { /* the last item that is long enough is in low..high */
        int64_t middle = low + (high - low + 1) / 2;
        bool near = (double)c->model->s[middle] >= NEAR * (double)c->model->s[head];
        low = near ? middle : low;
        high = near ? high : middle - 1;
    }
    return low;
}

static void evaluate_group(sp_contents *c, int64_t i, int64_t j)
{
    const sp_model *m = c->model;
    double high = c->high[i] * (1 + 1e-12);
    group g = {.i = i, .j = j, .low = c->low[i], .high = c->high[i], .cap = (double)m->cap[j]};
    g.groups = (double)m->n_gpus / (double)m->degree[j];
    g.theta = SP_CONTENT_THETAS / 2;
    int64_t allowed = m->cap[j] > 0 ? first_within(c, j, g.cap, high, 0, m->n) : m->n;
    if (allowed == m->n) {
        return;
    }
    int64_t small = first_within(c, j, g.cap / 2, high / 2, allowed, m->n);
    set_suffix(c, &g, allowed);
    if (small < m->n) {
        try_fluid(c, &g, small);
    }
    int64_t first = m->n; /* shorter heads leave more room */
    for (int64_t head = allowed; head < small;) {
        int64_t last = run_end(c, head, small - 1);
        double tokens = g.cap - (double)m->s[last], seconds = high - sp_item_time(m, last, j);
        first = first_within(c, j, tokens, seconds, small, first);
        try_heads(c, &g, head, last, first);
        head = last + 1;
    }
}

double sp_contents_evaluate(sp_contents *c, const double *node_pi)
{
    double total = sp_nodes_spread(&c->nodes, node_pi, c->pi);
    c->visits += 4 * c->model->n;
    for (int64_t i = 0; i < c->n_intervals; i++) {
        for (int end = 0; end < 2; end++) { /* an empty micro-batch, not worth a proposal */
            double t = end ? c->high[i] : c->low[i];
            c->holder[2 * i + end] = (sp_holder){c->model->fixed + t, t, -1, -1, 0, 0};
        }
        for (int64_t j = 0; j < c->model->D; j++) {
            evaluate_group(c, i, j);
        }
    }
    return total;
}

/* ------------------------------------------------------------------ proposals ------------ */

/* The item of greatest ratio, a node or the first one. */
static int64_t item_of(const sp_contents *c, const group *g, int64_t first, int64_t t)
{
    double best = -1;
    int64_t item = first;
    for (int64_t r = c->nodes.rows; r >= 0; r--) {
        int64_t k = r < c->nodes.rows ? c->nodes.node[r] : first;
        if (k < first) {
            break;
        }
        double time = sp_item_time(c->model, k, g->j) / g->high;
        double memory = (double)c->model->s[k] / g->cap;
        double ratio = ratio_of(c->pi[k], theta_of(t) * time + (1 - theta_of(t)) * memory);
        if (ratio > best) {
            best = ratio;
            item = k;
        }
    }
    return item;
}

/* As much as fits of `a`, or of both such that time and memory are used up. */
static void mix(const sp_contents *c, const group *g, const rest *left, int64_t a, int64_t b,
                double *best, double *amount_a, double *amount_b)
{
    double time_a = sp_item_time(c->model, a, g->j) / g->high, x = 0, y = 0;
    double time_b = sp_item_time(c->model, b, g->j) / g->high;
    double memory_a = (double)c->model->s[a] / g->cap, memory_b = (double)c->model->s[b] / g->cap;
    double det = time_a * memory_b - time_b * memory_a;
    if (a == b) {
        x = fmin(left->memory / memory_a, time_a > 0 ? left->time / time_a : HUGE_VAL);
    } else if (fabs(det) > 1e-12 * time_a * memory_b) {
        x = (left->time * memory_b - time_b * left->memory) / det;
        y = (time_a * left->memory - memory_a * left->time) / det;
    }
    double value = x * c->pi[a] + y * c->pi[b];
    if (x >= 0 && y >= 0 && value > *best) {
        *best = value;
        *amount_a = x;
        *amount_b = y;
    }
}

void sp_contents_fill(const sp_contents *c, int64_t i, bool at_high, sp_filling *filling)
{
    const sp_holder *holder = &c->holder[2 * i + at_high];
    *filling = (sp_filling){0};
    if (holder->j < 0) {
        return;
    }
    group g = {.i = i, .j = holder->j, .high = c->high[i], .cap = (double)c->model->cap[holder->j]};
    double groups = (double)c->model->n_gpus / (double)c->model->degree[g.j];
    rest left = rest_beside(c, &g, holder->head);
    left.time = fmax(left.time - (1 - holder->t / g.high), 0);
    if (holder->head >= 0) {
        filling->item[0] = holder->head;
        filling->amount[filling->n++] = groups;
    }
    if (holder->first == c->model->n) {
        return;
    }
    int64_t item[3], pair[2] = {0, 0};
    for (int64_t x = 0; x < 3; x++) {
        int64_t t = holder->theta + x - 1;
        t = t < 0 ? 0 : t < SP_CONTENT_THETAS ? t : SP_CONTENT_THETAS - 1;
        item[x] = item_of(c, &g, holder->first, t);
    }
    double best = 0, amount[2] = {0, 0};
    for (int x = 0; x < 3; x++) {
        for (int y = x; y < 3; y++) {
            double before = best;
            mix(c, &g, &left, item[x], item[x == y ? x : y], &best, &amount[0], &amount[1]);
            pair[0] = best > before ? item[x] : pair[0];
            pair[1] = best > before ? item[y] : pair[1];
        }
    }
    for (int x = 0; x < 2; x++) {
        if (amount[x] > 0) {
            filling->item[filling->n] = pair[x];
            filling->amount[filling->n++] = groups * amount[x];
        }
    }
}
