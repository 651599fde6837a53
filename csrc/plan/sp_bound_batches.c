/* sp_bound_batches.c - the content of micro-batches, and the least cost of holding all giants. */
#include "plan/sp_bound_batches.h"

#include <math.h>
#include <string.h>

enum { STEPS = 48 };

/* ------------------------------------------------------------------ set-up --------------- */

int64_t sp_batches_giants(const sp_model *model)
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
            tokens += (double)b->model->s[g];
        }
    }
    return tokens <= (double)b->model->cap[j] ? time : HUGE_VAL;
}

/* Inserts a makespan at which to cut.  A cut that is near serves, from below as it is: where a set
 * fits only at the end of an interval, all of that would count as one where it does. */
static void cut_at(sp_batches *b, double makespan)
{
    int64_t at = b->n_intervals, last = b->n_intervals - 1;
    for (int64_t i = 0; i < b->n_intervals; i++) {
        double high = b->interval[i].high;
        if (fabs(high - makespan) < 2e-3 * makespan && (high <= makespan || i < last)) {
            if (high > makespan) {
                b->interval[i].high = b->interval[i + 1].low = makespan;
            }
            return;
        }
        if (i < at && b->interval[i].high > makespan) {
            at = i;
        }
    }
    if (b->n_intervals == SP_INTERVALS || at == b->n_intervals) {
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

/* Least GPU-seconds over N of every item, and runs of neighbours whose least is on one degree. */
static void weigh_items(sp_batches *b)
{
    const sp_model *model = b->model;
    int64_t before = -1;
    for (int64_t k = 0; k < model->n; k++) {
        double least = HUGE_VAL;
        int64_t least_j = model->min_j[k];
        for (int64_t j = least_j; j < model->D; j++) {
            double work = sp_item_work(model, k, j);
            if (work < least) {
                least = work;
                least_j = j;
            }
        }
        b->work[k] = least / (double)model->n_gpus;
        if (k >= b->giants && least_j != before) {
            b->run[b->n_runs++] = k;
            before = least_j;
        }
    }
    b->run[b->n_runs] = model->n;
}

ovlm_status sp_batches_init(sp_batches *b, const sp_model *model, int64_t giants, double typical_s,
                            double longest_s, ovlm_arena *arena, ovlm_err *err)
{
    int64_t tables = SP_INTERVALS * model->D, sets = (int64_t)1 << giants;
    *b = (sp_batches){.model = model, .giants = giants};
    /* A unit no larger than any giant's group keeps powers of two exact; else it rounds down. */
    b->unit = giants > 0 ? model->degree[model->min_j[giants - 1]] : model->n_gpus;
    b->units = model->n_gpus / b->unit;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &b->work, model->n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &b->price, model->n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &b->run, model->n + 1, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &b->interval, SP_INTERVALS, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &b->fluid, tables, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &b->timed, tables, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &b->phi, sets * SP_INTERVALS * 2, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &b->gain, sets * (b->units + 1), err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &b->sum, (giants + 1) * sets, err));
    weigh_items(b);
    set_intervals(b, longest_s, typical_s);
    return OVLM_OK;
}

int64_t sp_batches_steps(const sp_batches *b)
{
    int64_t sets = (int64_t)1 << b->giants, D = b->model->D;
    int64_t tables = b->n_intervals * D * b->n_runs * 50 + b->model->n;
    return 1 + (tables + b->n_intervals * sets * sets * b->units / 4) / 512;
}

/* ------------------------------------------------------------------ contents ------------- */

/* Share of a group that time does not give at the interval's lower end, per unit of theta. */
static double slack_of(const sp_batches *b, int64_t i, bool at_high)
{
    const sp_interval *x = &b->interval[i];
    return at_high ? 0 : (1 - x->low / x->high) * (1 - 1e-12);
}

/* Certified content of the share x of one group; linear in the makespan between the two ends. */
static double content(const sp_batches *b, const sp_fluid *fluid, int64_t i, bool at_high, double x)
{
    return fmax(fluid->rho * (x - fluid->theta * slack_of(b, i, at_high)), 0) * (1 + 1e-12);
}

/* First item after the giants that a group of degree j may hold within the interval. */
static int64_t first_allowed(const sp_batches *b, int64_t i, int64_t j)
{
    const sp_model *model = b->model;
    double limit = b->interval[i].high * (1 + 1e-12);
    int64_t low = b->giants, high = model->n;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (model->s[middle] <= model->cap[j] && sp_item_time(model, middle, j) <= limit) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

/* Greatest price per share over all items from `first` on.  Within a run both the price and the
 * share per token are linear in the length, so their ratio is greatest at an end of the run. */
static double best_ratio(const sp_batches *b, int64_t i, int64_t j, double theta, int64_t first)
{
    const sp_model *model = b->model;
    double per_s = theta / b->interval[i].high, best = 0;
    double per_token = (1 - theta) / fmax((double)model->cap[j], 1);
    for (int64_t r = 0; r < b->n_runs; r++) {
        int64_t from = b->run[r] > first ? b->run[r] : first, to = b->run[r + 1];
        for (int64_t end = 0; end < 2 && from < to; end++) {
            int64_t k = end == 0 ? from : to - 1;
            double s = (double)model->s[k];
            double share = per_s * s * (model->quad[j] * s + model->lin[j]) + per_token * s;
            best = fmax(best, share * 1e300 > b->price[k] ? b->price[k] / share : 1e300);
        }
    }
    return best;
}

/* How much groups of degree j hold above the makespan, over the whole cluster, at the worse end. */
static double excess(const sp_batches *b, int64_t i, int64_t j, const sp_fluid *fluid)
{
    double scale = (double)b->model->n_gpus / (double)b->model->degree[j];
    return fmax(scale * content(b, fluid, i, false, 1) - b->interval[i].low,
                scale * content(b, fluid, i, true, 1) - b->interval[i].high);
}

static double excess_at(const sp_batches *b, int64_t i, int64_t j, double theta, int64_t first)
{
    sp_fluid fluid = {best_ratio(b, i, j, theta, first), theta};
    return excess(b, i, j, &fluid);
}

/* The theta of least excess, to about a hundredth. */
static void choose_fluid(sp_batches *b, int64_t i, int64_t j)
{
    int64_t k = first_allowed(b, i, j), at = i * b->model->D + j;
    double low = 0, high = 1;
    for (int step = 0; step < 10; step++) {
        double first = low + (high - low) / 3, second = high - (high - low) / 3;
        if (excess_at(b, i, j, first, k) <= excess_at(b, i, j, second, k)) {
            high = second;
        } else {
            low = first;
        }
    }
    double best = (low + high) / 2;
    for (int end = 0; end < 2; end++) {
        best = excess_at(b, i, j, end, k) <= excess_at(b, i, j, best, k) ? end : best;
    }
    b->fluid[at] = (sp_fluid){best_ratio(b, i, j, best, k), best};
    b->timed[at] = (sp_fluid){best_ratio(b, i, j, 1, k), 1};
}

/* ------------------------------------------------------------------ giants --------------- */

/* Share of a group of degree j that the giants of a set take, or a negative value when they do not
 * fit together at any makespan below the interval's end (the end itself begins the next one). */
static double share_of_set(const sp_batches *b, int64_t set, int64_t i, int64_t j, double theta)
{
    double high = b->interval[i].high, time = time_of_set(b, set, j), tokens = 0;
    bool fits = time < high || (time <= high * (1 + 1e-12) && i == b->n_intervals - 1);
    if (b->model->cap[j] <= 0 || !fits) {
        return -1;
    }
    for (int64_t g = 0; g < b->giants; g++) {
        tokens += set >> g & 1 ? (double)b->model->s[g] : 0;
    }
    double share = theta * time / high + (1 - theta) * tokens / (double)b->model->cap[j];
    return fmin(share * (1 - 1e-12), 1);
}

/* Content of a group beside a set of giants: by either fluid, whichever is less at the worse end -
 * the same one for both ends, so that it stays linear.  Negative: they do not fit. */
static double content_beside(const sp_batches *b, int64_t set, int64_t i, int64_t j, bool at_high)
{
    const sp_fluid *option[2] = {&b->fluid[i * b->model->D + j], &b->timed[i * b->model->D + j]};
    double per_s = (double)b->model->degree[j] / (double)b->model->n_gpus;
    double least = HUGE_VAL, answer = -1;
    for (int o = 0; o < 2; o++) {
        double share = share_of_set(b, set, i, j, option[o]->theta);
        if (share < 0) {
            return -1;
        }
        double worse =
            fmax(content(b, option[o], i, false, 1 - share) - b->interval[i].low * per_s,
                 content(b, option[o], i, true, 1 - share) - b->interval[i].high * per_s);
        if (worse < least) {
            least = worse;
            answer = content(b, option[o], i, at_high, 1 - share);
        }
    }
    return answer;
}

/* Adds groups of degree j with exactly the giants of `group` to all arrangements of others.  Groups
 * come in ascending order of their sets' numbers, so that each arrangement is met once. */
static void add_group(sp_batches *b, int64_t group, int64_t units, double gain)
{
    int64_t width = b->units + 1;
    for (int64_t others = 0; others < group; others++) {
        if ((others & group) != 0) {
            continue;
        }
        const double *from = b->gain + others * width;
        double *to = b->gain + (others | group) * width;
        for (int64_t u = units; u < width; u++) {
            to[u] = fmax(to[u], from[u - units] + gain);
        }
    }
}

/* gain[set][u]: the most that groups holding exactly that set of giants, on u units of GPUs, hold
 * beside them above what the same GPUs hold without giants. */
static void arrange_giants(sp_batches *b, int64_t i, bool at_high, double per_gpu)
{
    int64_t sets = (int64_t)1 << b->giants, width = b->units + 1, D = b->model->D;
    for (int64_t at = 0; at < sets * width; at++) {
        b->gain[at] = at < width ? 0 : -HUGE_VAL;
    }
    for (int64_t group = 1; group < sets; group++) {
        for (int64_t j = 0; j < D; j++) {
            double beside = content_beside(b, group, i, j, at_high);
            if (beside >= 0) {
                double degree = (double)b->model->degree[j];
                add_group(b, group, b->model->degree[j] / b->unit, beside - degree * per_gpu);
            }
        }
    }
}

/* ------------------------------------------------------------------ certificate ---------- */

/* phi of both ends of every interval and every set.  GPUs without giants hold at most the best
 * content per GPU of any degree. */
static void price_batches(sp_batches *b)
{
    int64_t sets = (int64_t)1 << b->giants, width = b->units + 1, D = b->model->D;
    for (int64_t at = 0; at < 2 * b->n_intervals; at++) {
        int64_t i = at / 2;
        bool at_high = at % 2 != 0;
        double per_gpu = 0, end = at_high ? b->interval[i].high : b->interval[i].low;
        for (int64_t j = 0; j < D; j++) {
            double all = content(b, &b->fluid[i * D + j], i, at_high, 1);
            per_gpu = fmax(per_gpu, all / (double)b->model->degree[j]);
        }
        arrange_giants(b, i, at_high, per_gpu);
        for (int64_t set = 0; set < sets; set++) {
            double all = per_gpu * (double)b->model->n_gpus + b->gain[set * width + b->units];
            b->phi[at * sets + set] = end + b->model->fixed - all;
        }
    }
}

/* Least total of phi over splits of the giants into sets, and micro-batches without giants so that
 * there are at least `least` and at most `most` in all. */
static double split_giants(const sp_batches *b, const double *phi)
{
    int64_t sets = (int64_t)1 << b->giants, full = sets - 1;
    double empty = phi[0], total = HUGE_VAL;
    for (int64_t count = 0; count <= b->giants; count++) {
        const double *fewer = b->sum + (count > 0 ? count - 1 : 0) * sets;
        double *sum = b->sum + count * sets;
        for (int64_t set = 0; set < sets; set++) {
            sum[set] = count == 0 && set == 0 ? 0 : HUGE_VAL;
            int64_t lowest = set & -set;
            for (int64_t part = set; count > 0 && part > 0; part = (part - 1) & set) {
                if (part & lowest) {
                    sum[set] = fmin(sum[set], phi[part] + fewer[set & ~part]);
                }
            }
        }
        if (count <= b->most && sum[full] < HUGE_VAL) {
            int64_t others = b->least > count ? b->least - count : 0;
            others = empty < 0 ? b->most - count : others;
            total = fmin(total, sum[full] + (double)others * empty);
        }
    }
    return total;
}

/* Bound with all prices times `scale`: contents scale with them. */
static double scaled_bound(const sp_batches *b, double total, double scale)
{
    double least[SP_GIANT_SETS] = {0};
    int64_t sets = (int64_t)1 << b->giants;
    for (int64_t set = 0; set < sets; set++) {
        least[set] = HUGE_VAL;
        for (int64_t at = 0; at < 2 * b->n_intervals; at++) {
            const sp_interval *x = &b->interval[at / 2];
            double cost = (at % 2 != 0 ? x->high : x->low) + b->model->fixed;
            double all = cost - b->phi[at * sets + set];
            least[set] = fmin(least[set], cost - scale * all);
        }
    }
    double split = split_giants(b, least);
    /* Sums of n terms in total, of at most a hundred in split. */
    double margin = 1e-9 + 0x1.0p-50 * (double)b->model->n;
    return split < HUGE_VAL ? scale * total + split - margin * (total + fabs(split)) : 0;
}

double sp_batches_bound(sp_batches *b, double memory_price, int64_t least, int64_t most)
{
    int64_t sets = (int64_t)1 << b->giants;
    double total = 0, scale = 1;
    b->least = least;
    b->most = most;
    for (int64_t k = b->giants; k < b->model->n; k++) {
        b->price[k] = b->work[k] + memory_price * (double)b->model->s[k];
        total += b->price[k];
    }
    for (int64_t i = 0; i < b->n_intervals; i++) {
        for (int64_t j = 0; j < b->model->D; j++) {
            choose_fluid(b, i, j);
        }
    }
    price_batches(b);
    /* Scaled so that no micro-batch without giants holds more than it costs: then more of them
     * never make the bound smaller. */
    for (int64_t at = 0; at < 2 * b->n_intervals; at++) {
        const sp_interval *x = &b->interval[at / 2];
        double cost = (at % 2 != 0 ? x->high : x->low) + b->model->fixed;
        double all = cost - b->phi[at * sets];
        scale = all > cost ? fmin(scale, cost / all) : scale;
    }
    return fmax(scaled_bound(b, total, 1), scaled_bound(b, total, scale));
}
