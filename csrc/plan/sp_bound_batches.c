/* sp_bound_batches.c - pricing whole micro-batches: the evaluation that certifies. */
#include "plan/sp_bound_batches.h"

#include <math.h>
#include <string.h>
#ifdef DBG
#include <stdio.h>
extern int sp_debug;
#endif

enum { ROWS = 95, COLUMNS = 3000, STEPS = 36, INTERVALS = 96 };

/* How far rho may be lifted in a table. */
static const double lift_option[SP_LIFTS] = {1, 0, 0.5};

/* ------------------------------------------------------------------ set-up --------------- */

/* Giants: items that need at least an eighth of the cluster for their memory. */
static int64_t count_giants(const sp_model *model)
{
    int64_t giants = 0;
    while (giants < model->n - 1 && giants < SP_GIANTS &&
           8 * model->degree[model->min_j[giants]] >= model->n_gpus) {
        giants++;
    }
    return giants;
}

/* Seconds of a set of giants on degree j, HUGE_VAL when its memory does not hold them. */
static double time_of_set(const sp_batches *b, int64_t set, int64_t j)
{
    double time = 0, tokens = 0;
    for (int64_t g = 0; g < b->giants; g++) {
        if (set >> g & 1) {
            time += sp_item_time(b->model, g, j);
            tokens += b->s[g];
        }
    }
    return tokens <= (double)b->model->cap[j] ? time : HUGE_VAL;
}

/* Inserts a makespan at which to cut, unless one is near. */
static void cut_at(sp_batches *b, double makespan)
{
    int64_t at = b->n_intervals;
    for (int64_t i = 0; i < b->n_intervals; i++) {
        if (fabs(b->interval[i].high - makespan) < 2e-3 * makespan) {
            return;
        }
        at = b->interval[i].high > makespan && i < at ? i : at;
    }
    if (b->n_intervals == INTERVALS || at == b->n_intervals) {
        return;
    }
    memmove(b->interval + at + 1, b->interval + at,
            (size_t)(b->n_intervals - at) * sizeof *b->interval);
    b->interval[at].high = makespan;
    b->interval[at + 1].low = makespan;
    b->n_intervals++;
}

/* Geometric steps up to the longest makespan, the first from zero; then cuts where sets of giants
 * begin to fit, so that inside an interval the same ones do. */
static void set_intervals(sp_batches *b, double longest_s, double mean_s)
{
    double first = fmin(mean_s / 4, longest_s / 2), ratio = 1.02;
    /* The smallest ratio that covers the range: by trial, for want of a portable power. */
    for (; ratio < 64; ratio *= 1.01) {
        double end = first;
        for (int i = 1; i < STEPS && end < longest_s; i++) {
            end *= ratio;
        }
        if (end >= longest_s) {
            break;
        }
    }
    double low = 0, high = first;
    while (b->n_intervals < STEPS - 1 && high < longest_s) {
        b->interval[b->n_intervals++] = (sp_interval){low, high};
        low = high;
        high *= ratio;
    }
    b->interval[b->n_intervals++] = (sp_interval){low, longest_s};
    for (int64_t set = 1; set < (int64_t)1 << b->giants; set++) {
        for (int64_t j = 0; j < b->model->D; j++) {
            double time = time_of_set(b, set, j);
            if (time < longest_s) {
                cut_at(b, time);
            }
        }
    }
}

static ovlm_status init_tables(sp_batches *b, ovlm_arena *arena, ovlm_err *err)
{
    int64_t tables = INTERVALS * b->model->D, sets = (int64_t)1 << b->giants;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &b->interval, INTERVALS, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &b->price, tables, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &b->time_rho, tables, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &b->row, tables * (b->pricer.cells + 1), err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &b->interval_phi, 2 * INTERVALS * sets, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &b->gain, sets * (b->units + 1), err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &b->from, sets * (b->units + 1), err));
    return OVLM_ARENA_NEW(arena, &b->pattern, 2, err);
}

/* First prices: an item's least GPU-seconds over N.  With them a micro-batch without giants holds no
 * more than its makespan.  Giants have no price: they are counted, set by set. */
static void first_prices(sp_batches *b)
{
    const sp_model *model = b->model;
    double gpus = (double)model->n_gpus;
    for (int64_t r = 0; r < b->nodes.rows; r++) {
        int64_t k = b->giants + b->nodes.node[r];
        b->best_pi[r] = HUGE_VAL;
        for (int64_t j = model->min_j[k]; j < model->D; j++) {
            b->best_pi[r] = fmin(b->best_pi[r], sp_item_work(model, k, j) / gpus);
        }
    }
}

ovlm_status sp_batches_init(sp_batches *b, const sp_model *model, double typical_s,
                            double longest_s, ovlm_arena *arena, ovlm_err *err)
{
    int64_t n = model->n;
    *b = (sp_batches){.model = model, .giants = count_giants(model)};
    b->n_rest = n - b->giants;
    b->unit = (model->n_gpus + SP_UNITS - 1) / SP_UNITS;
    b->units = model->n_gpus / b->unit;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &b->s, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &b->item_pi, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &b->k, n, err));
    for (int64_t k = 0; k < n; k++) {
        b->s[k] = (double)model->s[k];
        b->k[k] = k;
    }
    OVLM_TRY(sp_nodes_init(&b->nodes, model, b->k + b->giants, b->n_rest, ROWS, arena, err));
    int64_t rows = b->nodes.rows + ((int64_t)1 << b->giants) + 1;
    OVLM_TRY(sp_simplex_init(&b->lp, rows, COLUMNS, arena, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &b->pi, b->nodes.rows, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &b->best_pi, b->nodes.rows, err));
    OVLM_TRY(sp_pricer_init(&b->pricer, model, b->s + b->giants, b->n_rest, arena, err));
    OVLM_TRY(init_tables(b, arena, err));
    first_prices(b);
    set_intervals(b, longest_s, typical_s);
    return OVLM_OK;
}

/* ------------------------------------------------------------------ contents ------------- */

static double end_of(const sp_batches *b, int64_t i, bool at_high)
{
    return at_high ? b->interval[i].high : b->interval[i].low;
}

/* Share of a group that time does not give at the interval's lower end, per unit of theta. */
static double slack_of(const sp_batches *b, int64_t i, bool at_high)
{
    const sp_interval *x = &b->interval[i];
    return at_high ? 0 : (1 - x->low / x->high) * (1 - 1e-12);
}

/* Certified content of the share x of one group; linear in the makespan between the two ends. */
static double content(const sp_batches *b, int64_t i, int64_t j, bool at_high, double x)
{
    const sp_price *price = &b->price[i * b->model->D + j];
    const float *row = b->row + (i * b->model->D + j) * (b->pricer.cells + 1);
    double value = sp_price_value(price, row, b->pricer.cells, x);
    return fmax(value - price->rho * price->theta * slack_of(b, i, at_high), 0);
}

/* The same by time alone: no item is worth more per second than the best. */
static double timed_content(const sp_batches *b, int64_t i, int64_t j, bool at_high, double x)
{
    double rho = b->time_rho[i * b->model->D + j];
    return fmax(rho * (x - slack_of(b, i, at_high)), 0) * (1 + 1e-12);
}

/* How much a group's content exceeds its makespan, per cluster, at the worse end. */
static double excess(const sp_batches *b, int64_t i, int64_t j)
{
    double scale = (double)b->model->n_gpus / (double)b->model->degree[j];
    return fmax(scale * content(b, i, j, false, 1) - b->interval[i].low,
                scale * content(b, i, j, true, 1) - b->interval[i].high);
}

/* Best price per share of the group's time. */
static void find_time_rho(sp_batches *b, int64_t i, int64_t j)
{
    const sp_model *model = b->model;
    double best = 0, high = b->interval[i].high;
    for (int64_t k = b->giants; k < model->n; k++) {
        double time = sp_item_time(model, k, j);
        if (model->s[k] <= model->cap[j] && time <= high * (1 + 1e-12)) {
            best = fmax(best, time > 0 ? b->item_pi[k - b->giants] * (high / time) : HUGE_VAL);
        }
    }
    b->time_rho[i * model->D + j] = fmin(best, 1e300);
}

/* Excess of the fluid bound at a theta, by the nodes alone: a guide, no certificate. */
static double fluid_excess(const sp_batches *b, int64_t i, int64_t j, double theta)
{
    const sp_model *model = b->model;
    double low = b->interval[i].low, high = b->interval[i].high, rho = 0;
    double cap = (double)model->cap[j];
    for (int64_t r = 0; r < b->nodes.rows; r++) {
        int64_t k = b->giants + b->nodes.node[r];
        double time = sp_item_time(model, k, j);
        if (b->s[k] <= cap && time <= high) {
            double weight = theta * time / high + (1 - theta) * b->s[k] / cap;
            rho = fmax(rho, weight > 0 ? b->item_pi[k - b->giants] / weight : 0);
        }
    }
    double scale = rho * (double)model->n_gpus / (double)model->degree[j];
    return fmax(scale * (1 - theta * (1 - low / high)) - low, scale - high);
}

/* The theta of least fluid excess, to about a hundredth. */
static double choose_theta(const sp_batches *b, int64_t i, int64_t j)
{
    double low = 0, high = 1;
    for (int step = 0; step < 11; step++) {
        double first = low + (high - low) / 3, second = high - (high - low) / 3;
        if (fluid_excess(b, i, j, first) <= fluid_excess(b, i, j, second)) {
            high = second;
        } else {
            low = first;
        }
    }
    double best = (low + high) / 2;
    for (int end = 0; end < 2; end++) {
        best = fluid_excess(b, i, j, end) <= fluid_excess(b, i, j, best) ? end : best;
    }
    return best;
}

static void fill_table(sp_batches *b, int64_t i, int64_t j, double theta, double lift)
{
    int64_t at = i * b->model->D + j, cells = b->pricer.cells + 1;
    sp_price_table(&b->pricer, b->item_pi, j, b->interval[i].high, theta, lift, &b->price[at]);
    memcpy(b->row + at * cells, sp_price_row(&b->pricer), (size_t)cells * sizeof *b->row);
}

/* Fills the table of (i, j) with the lift of least excess. */
static void choose_table(sp_batches *b, int64_t i, int64_t j)
{
    double theta = choose_theta(b, i, j), least = HUGE_VAL;
    int64_t best = 0, shown = 0;
    for (int64_t o = 0; o < SP_LIFTS; o++) {
        fill_table(b, i, j, theta, lift_option[o]);
        shown = o;
        if (excess(b, i, j) < least) {
            least = excess(b, i, j);
            best = o;
        }
        /* Far from binding: the fluid bound will do. */
        if (o == 0 && least < -0.3 * (b->model->fixed + b->interval[i].low)) {
            break;
        }
    }
    if (shown != best) {
        fill_table(b, i, j, theta, lift_option[best]);
    }
}

/* ------------------------------------------------------------------ giants --------------- */

/* Share of a group of degree j that the giants of a set take, or a negative value when they do not
 * fit together at any makespan below the interval's end (the end itself begins the next one). */
static double share_of_set(const sp_batches *b, int64_t set, int64_t i, int64_t j, double theta)
{
    double high = b->interval[i].high, time = time_of_set(b, set, j), tokens = 0;
    bool fits = time < high || (time <= high * (1 + 1e-12) && i == b->n_intervals - 1);
    for (int64_t g = 0; g < b->giants; g++) {
        tokens += set >> g & 1 ? b->s[g] : 0;
    }
    if (b->model->cap[j] <= 0 || !fits) {
        return -1;
    }
    double share = theta * time / high + (1 - theta) * tokens / (double)b->model->cap[j];
    return fmin(share * (1 - 1e-12), 1);
}

/* Content of a group with a set of giants, beside their own prices: by the table or by time alone,
 * whichever is less at the worse end - the same one for both ends, so that it stays linear. */
static double content_beside(const sp_batches *b, int64_t set, int64_t i, int64_t j, bool at_high)
{
    double theta = b->price[i * b->model->D + j].theta;
    double share = share_of_set(b, set, i, j, theta), timed = share_of_set(b, set, i, j, 1);
    if (share < 0) {
        return -HUGE_VAL;
    }
    double per_s = (double)b->model->degree[j] / (double)b->model->n_gpus;
    double at_low_end = b->interval[i].low * per_s, at_high_end = b->interval[i].high * per_s;
    double table = fmax(content(b, i, j, false, 1 - share) - at_low_end,
                        content(b, i, j, true, 1 - share) - at_high_end);
    double time = fmax(timed_content(b, i, j, false, 1 - timed) - at_low_end,
                       timed_content(b, i, j, true, 1 - timed) - at_high_end);
    return time < table ? timed_content(b, i, j, at_high, 1 - timed)
                        : content(b, i, j, at_high, 1 - share);
}

/* Content per GPU of the best group without giants. */
static double best_ratio(const sp_batches *b, int64_t i, bool at_high, int64_t *best_j)
{
    double best = 0;
    *best_j = -1;
    for (int64_t j = 0; j < b->model->D; j++) {
        double ratio = content(b, i, j, at_high, 1) / (double)b->model->degree[j];
        if (ratio > best) {
            best = ratio;
            *best_j = j;
        }
    }
    return best;
}

/* gain[set][u]: the most that groups holding exactly that set of giants, on u units of GPUs, add over
 * the same GPUs without giants; from[] = group's set * D + degree index. */
static void arrange_giants(sp_batches *b, int64_t i, bool at_high, double ratio)
{
    int64_t sets = (int64_t)1 << b->giants, width = b->units + 1, D = b->model->D;
    for (int64_t at = 0; at < sets * width; at++) {
        b->gain[at] = at < width ? 0 : -HUGE_VAL;
        b->from[at] = -1;
    }
    for (int64_t group = 1; group < sets; group++) {
        for (int64_t j = 0; j < D; j++) {
            double beside = content_beside(b, group, i, j, at_high);
            int64_t units = b->model->degree[j] / b->unit;
            if (beside < 0) {
                continue;
            }
            double gain = beside - (double)b->model->degree[j] * ratio;
            /* Groups join in ascending order of their sets' numbers: each union once. */
            for (int64_t others = 0; others < sets; others++) {
                if ((others & group) != 0 || others > group) {
                    continue;
                }
                const double *from = b->gain + others * width;
                double *to = b->gain + (others | group) * width;
                for (int64_t u = units; u < width; u++) {
                    if (from[u - units] + gain > to[u]) {
                        to[u] = from[u - units] + gain;
                        b->from[(others | group) * width + u] = group * D + j;
                    }
                }
            }
        }
    }
}

/* ------------------------------------------------------------------ certificate ---------- */

/* phi of both ends of every interval and every set. */
static void price_batches(sp_batches *b)
{
    int64_t sets = (int64_t)1 << b->giants, width = b->units + 1, best_j = 0;
    for (int64_t set = 0; set < sets; set++) {
        b->best[set].phi = HUGE_VAL;
    }
    for (int64_t at = 0; at < 2 * b->n_intervals; at++) {
        int64_t i = at / 2;
        bool at_high = at % 2 != 0;
        double ratio = best_ratio(b, i, at_high, &best_j);
        arrange_giants(b, i, at_high, ratio);
        for (int64_t set = 0; set < sets; set++) {
            double all = (ratio * (double)b->model->n_gpus + b->gain[set * width + b->units]);
            double phi = end_of(b, i, at_high) + b->model->fixed - all;
            b->interval_phi[at * sets + set] = phi;
            if (phi < b->best[set].phi) {
                b->best[set] = (sp_batch_best){phi, i, at_high};
            }
        }
    }
}

/* Least total of phi over splits of the giants into sets and at least `least`, at most `most`
 * micro-batches in all. */
static double split_giants(const double *phi, int64_t giants, int64_t least, int64_t most)
{
    int64_t sets = (int64_t)1 << giants, full = sets - 1;
    double sum[SP_GIANTS + 1][SP_GIANT_SETS], empty = phi[0], total = HUGE_VAL;
    for (int64_t count = 0; count <= giants; count++) {
        for (int64_t set = 0; set < sets; set++) {
            sum[count][set] = count == 0 && set == 0 ? 0 : HUGE_VAL;
            int64_t lowest = set & -set;
            for (int64_t part = set; count > 0 && part > 0; part = (part - 1) & set) {
                if (part & lowest) {
                    sum[count][set] = fmin(sum[count][set], phi[part] + sum[count - 1][set & ~part]);
                }
            }
        }
        if (count > most || sum[count][full] >= HUGE_VAL) {
            continue;
        }
        int64_t others = empty < 0 ? most - count : (least > count ? least - count : 0);
        total = fmin(total, sum[count][full] + (double)others * empty);
    }
    return total;
}

/* Bound with all prices times `scale`: contents scale with them. */
static double scaled_bound(const sp_batches *b, double total, double scale, int64_t least,
                           int64_t most)
{
    double phi[SP_GIANT_SETS];
    int64_t sets = (int64_t)1 << b->giants;
    for (int64_t set = 0; set < sets; set++) {
        phi[set] = HUGE_VAL;
        for (int64_t at = 0; at < 2 * b->n_intervals; at++) {
            double cost = end_of(b, at / 2, at % 2 != 0) + b->model->fixed;
            double all = cost - b->interval_phi[at * sets + set];
            phi[set] = fmin(phi[set], cost - scale * all);
        }
    }
    double split = split_giants(phi, b->giants, least, most);
    /* Relative rounding errors are those of sums of at most 1e6 terms. */
    return split >= HUGE_VAL ? -HUGE_VAL : scale * total + split - 1e-9 * (total + fabs(split));
}

/* Lower bound that these prices prove, scaled so that a micro-batch without giants holds no more than
 * it costs, or not. */
static double certify(sp_batches *b, const double *pi, int64_t least, int64_t most)
{
    double total = sp_nodes_spread(&b->nodes, pi, b->item_pi), scale = 1;
    int64_t D = b->model->D, sets = (int64_t)1 << b->giants;
    for (int64_t i = 0; i < b->n_intervals; i++) {
        for (int64_t j = 0; j < D; j++) {
            choose_table(b, i, j);
            find_time_rho(b, i, j);
        }
    }
    price_batches(b);
    for (int64_t at = 0; at < 2 * b->n_intervals; at++) {
        double cost = end_of(b, at / 2, at % 2 != 0) + b->model->fixed;
        double all = cost - b->interval_phi[at * sets];
        scale = all > cost ? fmin(scale, cost / all) : scale;
    }
    return fmax(scaled_bound(b, total, 1, least, most), scaled_bound(b, total, scale, least, most));
}

/* ------------------------------------------------------------------ columns -------------- */

/* Drops from a pattern what does not fit the true time and memory left, then fills up with the item
 * that is worth most there.  Returns the value. */
static double repair_pattern(const sp_batches *b, int64_t j, double time, double tokens,
                             sp_pattern *pattern)
{
    const sp_model *model = b->model;
    int64_t kept = 0;
    double value = 0;
    for (int64_t e = 0; e < pattern->n; e++) {
        int64_t k = b->giants + pattern->item[e];
        double item_time = sp_item_time(model, k, j), amount = pattern->amount[e];
        amount = fmin(amount, item_time > 0 ? time / item_time : amount);
        amount = fmin(amount, tokens / b->s[k]);
        if (amount > 0 && (amount >= 1 || pattern->amount[e] != 1) && kept < SP_PATTERN_ITEMS - 4) {
            pattern->item[kept] = pattern->item[e];
            pattern->amount[kept++] = amount;
            time -= amount * item_time;
            tokens -= amount * b->s[k];
            value += amount * b->item_pi[pattern->item[e]];
        }
    }
    for (int64_t fill = 0; fill < 4; fill++) {
        double best = 0, best_amount = 0;
        int64_t best_k = -1;
        for (int64_t r = 0; r < b->nodes.rows; r++) {
            int64_t k = b->giants + b->nodes.node[r];
            double item_time = sp_item_time(model, k, j);
            double amount = fmin(tokens / b->s[k], item_time > 0 ? time / item_time : HUGE_VAL);
            bool small = b->s[k] * 16 < (double)model->cap[j];
            if (small && amount * b->item_pi[b->nodes.node[r]] > best) {
                best = amount * b->item_pi[b->nodes.node[r]];
                best_amount = amount;
                best_k = k;
            }
        }
        if (best_k >= 0) {
            pattern->item[kept] = best_k - b->giants;
            pattern->amount[kept++] = best_amount;
            time -= best_amount * sp_item_time(model, best_k, j);
            tokens -= best_amount * b->s[best_k];
            value += best;
        }
    }
    pattern->n = kept;
    return value;
}

/* Adds `times` real groups of degree j with that set of giants: the best of a few tables, repaired.
 * Columns that are real keep the program an upper estimate of what prices can prove. */
static void cover_group(sp_batches *b, int64_t i, int64_t j, bool at_high, int64_t set, double times)
{
    static const double thetas[] = {1, 0.5, 0};
    double time = end_of(b, i, at_high) - (set ? time_of_set(b, set, j) : 0), most = -1;
    double tokens = (double)b->model->cap[j];
    for (int64_t g = 0; g < b->giants; g++) {
        tokens -= set >> g & 1 ? b->s[g] : 0;
    }
    for (size_t t = 0; t < sizeof thetas / sizeof thetas[0] && time > 0; t++) {
        sp_price price;
        double x = 1 - share_of_set(b, set, i, j, thetas[t]);
        sp_price_table(&b->pricer, b->item_pi, j, end_of(b, i, true), thetas[t], 0, &price);
        sp_price_trace(&b->pricer, &price, x, 0, &b->pattern[0]);
        double value = repair_pattern(b, j, time, tokens, &b->pattern[0]);
        if (value > most) {
            most = value;
            b->pattern[1] = b->pattern[0];
        }
    }
    for (int64_t e = 0; most > 0 && e < b->pattern[1].n; e++) {
        sp_simplex_cover(&b->lp, &b->nodes, b->pattern[1].item[e], times * b->pattern[1].amount[e]);
    }
}

static int64_t set_row(const sp_batches *b, int64_t set)
{
    return b->nodes.rows + set;
}

/* The micro-batch behind phi of one end and one set, as a column of the program. */
static bool add_column(sp_batches *b, int64_t i, bool at_high, int64_t set)
{
    const sp_model *model = b->model;
    int64_t best_j = -1, width = b->units + 1, u = b->units;
    double ratio = best_ratio(b, i, at_high, &best_j), left = (double)model->n_gpus;
    arrange_giants(b, i, at_high, ratio);
    if (!sp_simplex_begin(&b->lp, end_of(b, i, at_high) + model->fixed)) {
        return false;
    }
    sp_simplex_entry(&b->lp, set_row(b, set), 1);
    for (int64_t rest = set; rest != 0;) {
        int64_t from = b->from[rest * width + u], group = from / model->D, j = from % model->D;
        cover_group(b, i, j, at_high, group, 1);
        left -= (double)model->degree[j];
        rest &= ~group;
        u -= model->degree[j] / b->unit;
    }
    if (best_j >= 0 && left > 0) {
        cover_group(b, i, best_j, at_high, 0, left / (double)model->degree[best_j]);
    }
    return true;
}

/* For every interval end, the sets' micro-batches that are cheaper than the program thinks. */
static bool add_columns(sp_batches *b)
{
    int64_t sets = (int64_t)1 << b->giants;
    for (int64_t set = 0; set < sets; set++) {
        double known = b->lp.price[set_row(b, set)];
        for (int64_t at = 0; at < 2 * b->n_intervals; at++) {
            double phi = b->interval_phi[at * sets + set];
            bool local = set == 0 || phi <= b->best[set].phi;
            if (phi < HUGE_VAL && phi < known - 1e-9 && local &&
                !add_column(b, at / 2, at % 2 != 0, set)) {
                return false;
            }
        }
    }
    return true;
}

/* A way to split the giants into sets, as a column: it asks for one micro-batch of each, and for
 * micro-batches without giants up to `least`. */
static bool add_splits(sp_batches *b, int64_t left, int64_t *part, int64_t count, int64_t least)
{
    if (left == 0) {
        bool room = sp_simplex_begin(&b->lp, 0);
        for (int64_t c = 0; room && c < count; c++) {
            sp_simplex_entry(&b->lp, set_row(b, part[c]), -1);
        }
        if (room) {
            sp_simplex_entry(&b->lp, set_row(b, 0), count < least ? (double)(count - least) : 0);
            sp_simplex_entry(&b->lp, b->lp.rows - 1, 1);
        }
        return room;
    }
    int64_t lowest = left & -left;
    for (int64_t set = left; set > 0; set = (set - 1) & left) {
        part[count] = set;
        if ((set & lowest) != 0 && b->best[set].phi < HUGE_VAL &&
            !add_splits(b, left & ~set, part, count + 1, least)) {
            return false;
        }
    }
    return true;
}

/* ------------------------------------------------------------------ search --------------- */

/* Prices stay within a box around the best ones. */
static void set_box(sp_batches *b, double width)
{
    const sp_model *model = b->model;
    double tokens = model->sum_s[model->n];
    for (int64_t r = 0; r < b->nodes.rows; r++) {
        double s = (double)model->s[b->giants + b->nodes.node[r]];
        double step = width * (b->best_pi[r] + model->fixed * s * (double)b->least / tokens);
        b->lp.limit[r] = b->best_pi[r] + step;
        b->lp.floor[r] = fmax(b->best_pi[r] - step, 0);
    }
}

static void start_program(sp_batches *b)
{
    int64_t part[SP_GIANTS + 1], rows = b->lp.rows, sets = (int64_t)1 << b->giants;
    memcpy(b->lp.demand, b->nodes.demand, (size_t)b->nodes.rows * sizeof *b->lp.demand);
    for (int64_t set = 0; set < sets; set++) {
        b->lp.limit[set_row(b, set)] = 1e3 * (b->interval[b->n_intervals - 1].high + 1);
        b->lp.price[set_row(b, set)] = HUGE_VAL;
    }
    b->lp.limit[rows - 1] = 1e4 * (b->interval[b->n_intervals - 1].high + 1);
    b->lp.demand[rows - 1] = 1;
    sp_simplex_reset(&b->lp);
    (void)add_splits(b, sets - 1, part, 0, b->least);
}

void sp_batches_raise(sp_batches *b, int64_t least, int64_t most, double hint, ovlm_meter *meter,
                      double *low)
{
    int64_t rows = b->nodes.rows, pivots = 0, idle = 0;
    double best = -HUGE_VAL, width = 0.3, smooth = 0.4;
    b->least = least;
    memcpy(b->pi, b->best_pi, (size_t)rows * sizeof *b->pi);
    while (*low < hint && idle < 40) {
        int64_t before = b->pricer.spent;
        double proved = certify(b, b->pi, least, most);
#ifdef DBG
        if (sp_debug && b->rounds == 0) { double tot = 0; for (int64_t k = 0; k < b->n_rest; k++) tot += b->item_pi[k]; fprintf(stderr, "total %.4f giants %ld\n", tot, (long)b->giants);
    for (int64_t set = 0; set < 1 << b->giants; set++) { int64_t i = b->best[set].interval; fprintf(stderr, "set %ld phi %.4f int [%.4f %.4f] at %d\n", (long)set, b->best[set].phi, b->interval[i].low, b->interval[i].high, b->best[set].at_high); } }
#endif
        if (b->rounds++ == 0) {
            start_program(b);
        }
        idle++;
        if (proved > best) {
            idle = proved > best + 1e-5 * fabs(best) ? 0 : idle;
            best = proved;
            memcpy(b->best_pi, b->pi, (size_t)rows * sizeof *b->pi);
            *low = fmax(*low, proved);
        }
        set_box(b, width);
        bool room = add_columns(b);
        double optimum = sp_simplex_solve(&b->lp, 4 * rows, &pivots);
#ifdef DBG
        if (sp_debug) fprintf(stderr, " round %ld proved %.4f best %.4f lp %.4f pivots %ld cols %ld phi0 %.4f eta %.4f\n", (long)b->rounds, proved, best, optimum, (long)pivots, (long)b->lp.n_columns, b->best[0].phi, b->lp.price[b->lp.rows-1]);
#endif
        int64_t cells = b->pricer.spent - before + 2 * pivots * b->lp.rows * b->lp.rows;
        if (!room || ovlm_meter_spend(meter, 1 + cells / 2048)) {
            return;
        }
        for (int64_t r = 0; r < rows; r++) {
            b->pi[r] = smooth * b->best_pi[r] + (1 - smooth) * b->lp.price[r];
        }
    }
}
