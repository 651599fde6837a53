/* sp_bound_colgen.c - prices by column generation, certificates by evaluation. */
#include "plan/sp_bound_colgen.h"

#include <math.h>
#include <string.h>

enum { ROWS = 96, COLUMNS = 4096, ROUNDS = 400, CELLS_PER_STEP = 2048, NODES = 200000 };
#define MARGIN 1e-9    /* relative; covers the rounding of all sums of at most 1e6 terms */
#define TOLERANCE 3e-4 /* bisection on T stops here                                      */
#define HOPELESS 1e-4  /* the program's optimum this close to N: T will not be disproved  */

ovlm_status sp_colgen_init(sp_colgen *g, const sp_model *model, const int64_t *k, int64_t n_items,
                           sp_exact *exact, ovlm_arena *arena, ovlm_err *err)
{
    *g = (sp_colgen){.model = model, .n = n_items, .exact = exact};
    OVLM_TRY(OVLM_ARENA_NEW(arena, &g->s, n_items, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &g->item_pi, n_items, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &g->pattern, model->D + 1, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &g->content, model->n_gpus + 1, err));
    for (int64_t i = 0; i < n_items; i++) {
        g->s[i] = (double)model->s[k[i]];
    }
    OVLM_TRY(sp_nodes_init(&g->nodes, model, k, n_items, ROWS, arena, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &g->pi, g->nodes.rows, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &g->best_pi, g->nodes.rows, err));
    OVLM_TRY(sp_simplex_init(&g->lp, g->nodes.rows, COLUMNS, arena, err));
    memcpy(g->lp.demand, g->nodes.demand, (size_t)g->nodes.rows * sizeof *g->lp.demand);
    sp_line_summarise(model, k, n_items, &g->line);
    for (int64_t j = 0; j < model->D; j++) {
        g->line_prices.theta[j] = 1;
    }
    return sp_pricer_init(&g->pricer, model, g->s, n_items, arena, err);
}

/* Multipliers to try at T: the line envelope's, time alone, memory alone. */
static void choose_thetas(sp_colgen *g, double makespan)
{
    (void)sp_line_gpus(g->model, &g->line, makespan, &g->line_prices, 2);
    for (int64_t j = 0; j < g->model->D; j++) {
        g->theta[j][0] = g->line_prices.theta[j];
        g->theta[j][1] = 1;
        g->theta[j][2] = 0;
    }
}

/* First prices: the line envelope's.  They also limit the program's: an item needs little more than
 * twice its share of a group. */
static void start_at(sp_colgen *g, double makespan)
{
    const sp_model *model = g->model;
    choose_thetas(g, makespan);
    for (int64_t r = 0; r < g->lp.rows; r++) {
        double s = g->s[g->nodes.node[r]], least = HUGE_VAL;
        for (int64_t j = 0; j < model->D; j++) {
            double time = s * (model->quad[j] * s + model->lin[j]), d = (double)model->degree[j];
            double theta = g->line_prices.theta[j];
            if (s <= (double)model->cap[j] && time <= makespan * (1 + 1e-12)) {
                double part = theta * time / makespan + (1 - theta) * s / (double)model->cap[j];
                least = fmin(least, d * part);
            }
        }
        g->best_pi[r] = least < HUGE_VAL ? least : (double)model->n_gpus;
        g->lp.limit[r] = 2.2 * g->best_pi[r];
    }
    sp_simplex_reset(&g->lp);
}

/* Greatest content of any mix of groups on N GPUs, given the groups' contents. */
static double mix_content(sp_colgen *g, const double *value)
{
    const sp_model *model = g->model;
    int64_t N = model->n_gpus;
    double ratio = 0;
    bool whole = true;
    for (int64_t j = 0; j < model->D; j++) {
        ratio = fmax(ratio, value[j] / (double)model->degree[j]);
        whole = whole && N % model->degree[j] == 0;
    }
    g->ratio = ratio;
    if (whole || N > 4096) {
        return ratio * (double)N; /* the best degree alone fills the cluster */
    }
    for (int64_t gpus = 1; gpus <= N; gpus++) {
        double best = g->content[gpus - 1];
        for (int64_t j = 0; j < model->D && model->degree[j] <= gpus; j++) {
            best = fmax(best, g->content[gpus - model->degree[j]] + value[j]);
        }
        g->content[gpus] = best;
    }
    return g->content[N];
}

static double price_group(sp_colgen *g, int64_t j, double makespan, double theta,
                          sp_pattern *pattern)
{
    sp_price price;
    sp_price_table(&g->pricer, g->item_pi, j, makespan, theta, &price);
    sp_price_trace(&g->pricer, &price, 1, 1, pattern);
    return sp_price_value(&price, g->pricer.value, g->pricer.cells, 1);
}

/* Evaluates prices at T: sum of prices over the greatest content; above one, T is impossible. */
static double evaluate(sp_colgen *g, const double *pi, double makespan)
{
    const sp_model *model = g->model;
    int64_t D = model->D, tried[SP_MAX_DEGREES] = {0};
    double value[SP_MAX_DEGREES] = {0}, total = sp_nodes_spread(&g->nodes, pi, g->item_pi);
    for (int64_t j = 0; j < D; j++) {
        value[j] = price_group(g, j, makespan, g->theta[j][g->favourite[j]], &g->pattern[j]);
        tried[j] = 1;
    }
    /* Only the degree that binds is worth a second look: other multipliers may certify less. */
    for (int64_t look = 0; look < D * SP_THETAS; look++) {
        int64_t worst = 0;
        for (int64_t j = 1; j < D; j++) {
            if (value[j] * (double)model->degree[worst] > value[worst] * (double)model->degree[j]) {
                worst = j;
            }
        }
        if (tried[worst] == SP_THETAS || value[worst] <= (double)model->degree[worst]) {
            break;
        }
        int64_t option = (g->favourite[worst] + 1) % SP_THETAS;
        for (int64_t t = 1; t < tried[worst]; t++) {
            option = (option + 1) % SP_THETAS;
        }
        tried[worst]++;
        double other = price_group(g, worst, makespan, g->theta[worst][option], &g->pattern[D]);
        if (other < value[worst]) {
            value[worst] = other;
            g->pattern[worst] = g->pattern[D];
        }
    }
    double content = mix_content(g, value);
    return content > 0 ? total * (1 - MARGIN) / content : (total > 0 ? HUGE_VAL : 0);
}

/* The patterns of the last evaluation become columns. */
static bool add_columns(sp_colgen *g)
{
    for (int64_t j = 0; j < g->model->D; j++) {
        const sp_pattern *pattern = &g->pattern[j];
        if (pattern->n == 0) {
            continue;
        }
        if (!sp_simplex_begin(&g->lp, (double)g->model->degree[j])) {
            return false;
        }
        for (int64_t e = 0; e < pattern->n; e++) {
            sp_simplex_cover(&g->lp, &g->nodes, pattern->item[e], pattern->amount[e]);
        }
    }
    return true;
}

/* True when T is proved impossible.  Starts from best_pi, the prices that proved most so far. */
static bool prove(sp_colgen *g, double makespan, ovlm_meter *meter)
{
    double best = 0, smooth = 0.5, gpus = (double)g->model->n_gpus;
    int64_t rows = g->lp.rows, pivots = 0;
    choose_thetas(g, makespan);
    memcpy(g->pi, g->best_pi, (size_t)rows * sizeof *g->pi);
    for (int64_t round = 0; round < ROUNDS; round++) {
        int64_t before = g->pricer.spent;
        double ratio = evaluate(g, g->pi, makespan);
        if (ratio > best) {
            best = ratio;
            memcpy(g->best_pi, g->pi, (size_t)rows * sizeof *g->pi);
        }
        if (ratio > 1) {
            return true;
        }
        if (!add_columns(g)) {
            return false;
        }
        double optimum = sp_simplex_solve(&g->lp, 40 + rows / 2, &pivots);
        int64_t cells = g->pricer.spent - before + 2 * pivots * rows * rows;
        if (ovlm_meter_spend(meter, 1 + cells / CELLS_PER_STEP)) {
            return false;
        }
        /* The program's optimum is what prices could reach at most over these columns. */
        if (optimum <= gpus * (1 + HOPELESS) || (pivots == 0 && smooth <= 0)) {
            return false;
        }
        smooth = pivots == 0 ? 0 : 0.5;
        for (int64_t r = 0; r < rows; r++) {
            g->pi[r] = smooth * g->best_pi[r] + (1 - smooth) * g->lp.price[r];
        }
    }
    return false;
}

/* Where prices do not disprove T: they make the exact search short.  Prices over the greatest
 * content per GPU are worth at most d in every group of degree d. */
static bool refute(sp_colgen *g, double makespan, int64_t nodes, ovlm_meter *meter)
{
    if (g->exact == NULL || ovlm_meter_look(meter)) {
        return false;
    }
    (void)evaluate(g, g->best_pi, makespan);
    double scale = g->ratio > 0 ? (1 - MARGIN) / g->ratio : 0;
    for (int64_t i = 0; i < g->n; i++) {
        g->item_pi[i] *= scale;
    }
    return sp_exact_decide(g->exact, makespan, g->item_pi, g->line_prices.theta, nodes, meter) ==
           SP_IMPOSSIBLE;
}

void sp_colgen_raise(sp_colgen *g, double hint, ovlm_meter *meter, double *low)
{
    double high = hint, step = 0.01;
    start_at(g, *low);
    sp_simplex_save(&g->lp);
    while (*low > 0 && high > *low * (1 + TOLERANCE)) {
        double makespan = fmin(*low * (1 + step), (*low + high) / 2);
        if (prove(g, makespan, meter) || refute(g, makespan, NODES, meter)) {
            *low = makespan;
            step *= 2;
            sp_simplex_save(&g->lp);
        } else {
            high = makespan;
            /* Groups generated for a longer makespan may not be groups of a shorter one. */
            sp_simplex_restore(&g->lp);
        }
        if (ovlm_meter_look(meter)) {
            return;
        }
    }
}
