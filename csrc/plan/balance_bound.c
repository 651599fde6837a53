/* balance_bound.c - certified lower bounds on the largest load.
 *
 * All are taken of a relaxation: unit u costs e[u], what a rank pays that holds it alone, less
 * `fixed`.  Padding only adds to the sum of e, so the relaxation is below the true cost.  Bounds
 * are first taken in units of e ("work" of the fullest rank), then turned into a load. */
#include "plan/balance_parts.h"

#include <math.h>

typedef struct relaxed {
    const bal_model *model;
    double *e;       /* [n_units] descending; both NULL where nothing needs them all           */
    double *prefix;  /* [n_units+1]                                                            */
    double total;    /* sum of e                                                               */
    double margin;   /* relative rounding error of a sum of e, generously                      */
    double best_speed, least_base;
} relaxed;

/* Naive sums of n non-negative doubles are wrong by at most n * 2^-53 of the sum. */
static double sum_margin(int64_t n)
{
    return (double)(n + 64) * 0x1p-52;
}

/* e of the i-th largest unit. */
static double unit_work(const bal_model *model, int64_t i)
{
    int64_t u = model->order[i];
    double h = (double)bal_len(model, u);
    double pad = h * (model->padded_linear + model->padded_quadratic * h);
    return model->a[u] + (double)bal_count(model, u) * pad;
}

static void relax(const bal_model *model, relaxed *x)
{
    *x = (relaxed){.model = model, .margin = sum_margin(model->n_units), .least_base = HUGE_VAL,
                   .total = model->total};
    for (int64_t r = 0; r < model->n_ranks; r++) {
        double speed = bal_speed(model, r), base = bal_base(model, r);
        x->best_speed = speed > x->best_speed ? speed : x->best_speed;
        x->least_base = base < x->least_base ? base : x->least_base;
    }
}

/* e and prefix: a gather over all units, which the plain case does without. */
static ovlm_status fill_prefix(relaxed *x, ovlm_arena *arena, ovlm_err *err)
{
    int64_t n = x->model->n_units;
    OVLM_TRY(OVLM_ARENA_RAW(arena, &x->e, n, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &x->prefix, n + 1, err));
    x->prefix[0] = 0;
    for (int64_t i = 0; i < n; i++) {
        x->e[i] = unit_work(x->model, i);
        x->prefix[i + 1] = x->prefix[i] + x->e[i];
    }
    x->total = x->prefix[n];
    return OVLM_OK;
}

/* Work of some rank is at least the returned value: largest unit, and, of the k*N + 1 largest, some
 * rank holds k + 1, so at least the k + 1 smallest of those (pigeonhole). */
static double work_by_pigeons(const relaxed *x)
{
    enum { MOST = 64 }; /* beyond that the mean is as good */
    int64_t n = x->model->n_units, N = x->model->n_ranks;
    double best = n > 0 ? unit_work(x->model, 0) : 0;
    for (int64_t k = 1; k < MOST && k <= (n - 1) / N; k++) {
        double sum = 0;
        for (int64_t i = k * N - k; i <= k * N; i++) {
            sum += unit_work(x->model, i);
        }
        best = sum > best ? sum : best;
    }
    return best;
}

/* Mean work of `ranks` ranks that hold the j largest units and at least min_items units each. */
static double work_of_top(const relaxed *x, int64_t j, int64_t ranks)
{
    int64_t n = x->model->n_units, held = ranks * x->model->min_items;
    int64_t others = held > j ? held - j : 0;
    return (x->prefix[j] + x->prefix[n] - x->prefix[n - others]) / (double)ranks;
}

/* Wherever the j largest units are, on however many ranks, these hold the smallest others at
 * least; the work is quasi-convex in the number of ranks. */
static double work_by_counts(const relaxed *x)
{
    const bal_model *model = x->model;
    double best = 0;
    for (int64_t j = 1; j <= model->n_ranks; j++) {
        int64_t lo = 1, hi = j;
        while (lo < hi) {
            int64_t mid = lo + (hi - lo) / 2;
            if (work_of_top(x, j, mid) <= work_of_top(x, j, mid + 1)) {
                hi = mid;
            } else {
                lo = mid + 1;
            }
        }
        double least = work_of_top(x, j, lo) * (1 - 4 * x->margin);
        best = least > best ? least : best;
    }
    return best;
}

/* Work of the fullest of N like ranks is at least the mean over the ranks that can be in use. */
static double work_by_mean(const relaxed *x)
{
    int64_t used = x->model->n_units < x->model->n_ranks ? x->model->n_units : x->model->n_ranks;
    return used > 0 ? x->total / (double)used : 0;
}

/* First position whose e is at most `value`; e descends. */
static int64_t first_at_most(const relaxed *x, double value)
{
    int64_t lo = 0, hi = x->model->n_units;
    while (lo < hi) {
        int64_t mid = lo + (hi - lo) / 2;
        if (x->e[mid] <= value) {
            hi = mid;
        } else {
            lo = mid + 1;
        }
    }
    return lo;
}

/* Martello and Toth's L2: more than N bins of size `room` are needed.  For every threshold, units
 * above room - e[i] admit nothing of size e[i]; the others above room/2 need a bin each. */
static bool needs_more_bins(const relaxed *x, double room)
{
    int64_t n = x->model->n_units, N = x->model->n_ranks;
    int64_t half = first_at_most(x, room / 2);
    if (half > N) {
        return true;
    }
    /* As the threshold e[i] falls, fewer of the large units are closed to it. */
    int64_t closed = half;
    for (int64_t i = half; i < n; i++) {
        while (closed > 0 && x->e[closed - 1] <= room - x->e[i]) {
            closed--;
        }
        double open_sum = x->prefix[half] - x->prefix[closed];
        double small = x->prefix[i + 1] - x->prefix[half];
        double left = small - ((double)(half - closed) * room - open_sum);
        if (left > (double)(N - half) * room) {
            return true;
        }
    }
    return false;
}

/* Largest room that L2 refutes, by bisection from `known` (already refuted or met). */
static double work_by_bins(const relaxed *x, double known)
{
    double lo = known, hi = 2 * known;
    for (int step = 0; step < 48; step++) {
        double mid = lo + (hi - lo) / 2;
        /* bins a little larger than stated: rounding must not refute what is possible */
        if (needs_more_bins(x, mid * (1 + 4 * x->margin))) {
            lo = mid;
        } else {
            hi = mid;
        }
    }
    return lo;
}

/* Least load at which the ranks together can hold `work`: base loads are filled up like water. */
static double load_by_water(const relaxed *x, double work)
{
    const bal_model *model = x->model;
    double lo = x->least_base, hi = lo;
    for (int64_t r = 0; r < model->n_ranks; r++) {
        double full = bal_base(model, r) + (work + model->fixed) / bal_speed(model, r);
        hi = full > hi ? full : hi;
    }
    for (int step = 0; step < 100 && hi - lo > 1e-13 * hi; step++) {
        double mid = lo + (hi - lo) / 2, held = 0;
        for (int64_t r = 0; r < model->n_ranks; r++) {
            double room = bal_room(model, r, mid);
            held += room > 0 ? room : 0;
        }
        if (held < work) {
            lo = mid;
        } else {
            hi = mid;
        }
    }
    return lo * (1 - sum_margin(model->n_ranks));
}

/* A unit alone on the best rank that admits it; and the pinned units, each on its own. */
static ovlm_status load_by_units(const relaxed *x, double *bound, ovlm_arena *arena, ovlm_err *err)
{
    const bal_model *model = x->model;
    enum { LOOK_AT = 64 }; /* the largest decide; the rest is not worth n_units * n_ranks */
    for (int64_t i = 0; i < model->n_units && i < LOOK_AT; i++) {
        int64_t u = model->order[i];
        double least = HUGE_VAL, work = unit_work(model, i);
        for (int64_t r = 0; r < model->n_ranks; r++) {
            bool admits = bal_size(model, u) <= bal_capacity(model, r) &&
                          (!bal_is_pinned(model, u) || model->pin[u] == r);
            double load = bal_base(model, r) + (model->fixed + work) / bal_speed(model, r);
            least = admits && load < least ? load : least;
        }
        if (least < HUGE_VAL && least > *bound) {
            *bound = least;
        }
    }
    if (model->pin == NULL) {
        return OVLM_OK;
    }
    bal_plan plan = {0};
    OVLM_TRY(bal_plan_init(&plan, model, arena, err));
    for (int64_t u = 0; u < model->n_units; u++) {
        if (model->pin[u] >= 0) {
            bal_plan_put(model, &plan, u, model->pin[u]);
        }
    }
    for (int64_t r = 0; r < model->n_ranks; r++) {
        double load = plan.load[r] * (1 - x->margin);
        *bound = load > *bound ? load : *bound;
    }
    return OVLM_OK;
}

/* Work comes in multiples of the grain, when that is known: round up, then allow for rounding. */
static double round_to_grain(const bal_model *model, double work, double margin)
{
    work *= 1 - margin;
    if (!(model->grain > 0) || model->padded || model->unit_of != NULL) {
        return work;
    }
    double grains = ceil(work / model->grain * (1 - 1e-12));
    double up = grains * model->grain * (1 - 0x1p-51);
    /* whole numbers are exact */
    if (grains * model->grain < 0x1p53 && model->grain == floor(model->grain)) {
        up = grains * model->grain;
    }
    return up > work ? up : work;
}

ovlm_status bal_bound(const bal_model *model, double *bound, ovlm_arena *arena, ovlm_err *err)
{
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    relaxed x;
    relax(model, &x);
    *bound = 0;
    for (int64_t r = 0; r < model->n_ranks; r++) {
        *bound = bal_base(model, r) > *bound ? bal_base(model, r) : *bound;
    }
    if (model->n_units > 0) {
        bool like = model->base_load == NULL && model->speed == NULL;
        bool counts = model->count == NULL && model->min_items >= 2;
        double work = work_by_pigeons(&x);
        if (model->padded || counts) {
            OVLM_TRY(fill_prefix(&x, arena, err));
        }
        if (counts) {
            double by_counts = work_by_counts(&x);
            work = by_counts > work ? by_counts : work;
        }
        if (like) {
            double mean = work_by_mean(&x);
            work = mean > work ? mean : work;
            /* with no unit above half of that, bins add nothing */
            if (model->n_units > model->n_ranks && unit_work(model, 0) > work / 2) {
                if (x.e == NULL) {
                    OVLM_TRY(fill_prefix(&x, arena, err));
                }
                work = work_by_bins(&x, work);
            }
        }
        work = round_to_grain(model, work, x.margin);
        double load = x.least_base + (model->fixed + work) / x.best_speed;
        load = like ? load : load * (1 - 0x1p-50);
        *bound = load > *bound ? load : *bound;
        if (!like) {
            load = load_by_water(&x, x.total * (1 - x.margin));
            *bound = load > *bound ? load : *bound;
        }
        OVLM_TRY(load_by_units(&x, bound, arena, err));
    }
    *bound *= model->down;
    if (model->padded) {
        double padded = 0;
        OVLM_TRY(bal_bound_padded(model, &padded, arena, err));
        *bound = padded > *bound ? padded : *bound;
    }
    ovlm_arena_rewind(arena, mark);
    return OVLM_OK;
}
