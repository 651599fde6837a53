/* sp_model.c - checks a sequence-parallel problem and prepares what searches and bounds share. */
#include "plan/sp_model.h"

#include <math.h>

#include "base/sort.h"

/* Lengths sum to less than this, so every sum of lengths is exact in a double, and a group that may
 * hold this much has no limit. */
#define TOKENS_MAX ((int64_t)1 << 53)

static ovlm_status check_scalars(const ovlm_sp_problem *p, ovlm_err *err)
{
    struct {
        const char *name;
        int64_t value, least;
    } rule[] = {{"number of sequences", p->n, 0},    {"n_gpus", p->n_gpus, 1},
                {"gpus_per_node", p->gpus_per_node, 1}, {"pad_to", p->pad_to, 1},
                {"micro_batches", p->micro_batches, 0}, {"threads", p->threads, 1}};
    for (size_t i = 0; i < sizeof rule / sizeof rule[0]; i++) {
        if (rule[i].value < rule[i].least) {
            return OVLM_FAIL(err, OVLM_E_ARG, "%s must be >= %lld; got %lld", rule[i].name,
                             (long long)rule[i].least, (long long)rule[i].value);
        }
    }
    if (p->policy < OVLM_SP_STATIC || p->policy > OVLM_SP_FLEX) {
        return OVLM_FAIL(err, OVLM_E_ARG, "policy must be static, homogeneous, chunked or flex");
    }
    return ovlm_sequence_cost_check(&p->cost, err);
}

static ovlm_status check_lengths(const ovlm_sp_problem *p, ovlm_err *err)
{
    int64_t room = TOKENS_MAX - 1;
    for (int64_t i = 0; i < p->n; i++) {
        if (p->lengths[i] < 1) {
            return OVLM_FAIL(err, OVLM_E_ARG, "lengths must be >= 1; lengths[%lld] is %lld",
                             (long long)i, (long long)p->lengths[i]);
        }
        if (p->lengths[i] > room) {
            return OVLM_FAIL(err, OVLM_E_ARG,
                             "the sum of lengths must stay below 2^53; it passes it at "
                             "lengths[%lld] = %lld",
                             (long long)i, (long long)p->lengths[i]);
        }
        room -= p->lengths[i];
    }
    return OVLM_OK;
}

static bool memory_fits(const ovlm_sequence_cost *cost, int64_t tokens, int64_t degree)
{
    return cost->memory_fixed + cost->memory_per_token * (double)tokens / (double)degree <=
           cost->memory_limit;
}

/* Largest number of tokens, at most TOKENS_MAX, that a group of that degree holds; -1 when not even
 * an empty one fits.  Bisection on the very predicate that defines it: no rounding to argue. */
static int64_t memory_tokens(const ovlm_sequence_cost *cost, int64_t degree)
{
    if (!memory_fits(cost, 0, degree)) {
        return -1;
    }
    if (memory_fits(cost, TOKENS_MAX, degree)) {
        return TOKENS_MAX;
    }
    int64_t fits = 0, too_many = TOKENS_MAX;
    while (too_many - fits > 1) {
        int64_t middle = fits + (too_many - fits) / 2;
        if (memory_fits(cost, middle, degree)) {
            fits = middle;
        } else {
            too_many = middle;
        }
    }
    return fits;
}

/* With padding, each of the d shards holds a multiple of pad_to tokens. */
static int64_t group_tokens(const ovlm_sp_problem *p, int64_t degree)
{
    if (p->pad_to == 1) {
        return memory_tokens(&p->cost, degree);
    }
    int64_t shard = memory_tokens(&p->cost, 1);
    if (shard < 0 || shard == TOKENS_MAX) {
        return shard;
    }
    shard -= shard % p->pad_to;
    return shard > TOKENS_MAX / degree ? TOKENS_MAX : degree * shard;
}

/* Degrees form a chain of divisors that the node size continues: then blocks laid out by descending
 * degree are aligned, and never straddle a node that could hold them. */
static bool divisor_chain(const sp_model *model)
{
    for (int64_t j = 0; j < model->D; j++) {
        int64_t d = model->degree[j], node = model->gpus_per_node;
        if ((d <= node && node % d != 0) || (d > node && d % node != 0) ||
            (j > 0 && d % model->degree[j - 1] != 0)) {
            return false;
        }
    }
    return true;
}

static ovlm_status init_degrees(sp_model *model, const ovlm_sp_problem *p, ovlm_err *err)
{
    const ovlm_sequence_cost *cost = &p->cost;
    for (int64_t i = 0; i < cost->degree_n && cost->degree[i] <= p->n_gpus; i++) {
        if (model->D == SP_MAX_DEGREES) {
            return OVLM_FAIL(err, OVLM_E_ARG, "at most %d degrees are supported; leave some out",
                             SP_MAX_DEGREES);
        }
        int64_t j = model->D++, d = cost->degree[i];
        ovlm_sequence_rates rates = ovlm_sequence_cost_rates(cost, i);
        model->degree[j] = d;
        model->quad[j] = cost->quadratic * rates.share;
        model->lin[j] = rates.per_token / (double)d;
        model->cap[j] = group_tokens(p, d);
    }
    if (model->D == 0) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "the smallest permitted degree is %lld but n_gpus is %lld",
                         (long long)cost->degree[0], (long long)p->n_gpus);
    }
    model->buddy = divisor_chain(model);
    return OVLM_OK;
}

/* The longest sequence fits no degree: which, how long, what would fit it. */
static ovlm_status fail_too_long(const sp_model *model, const ovlm_sp_problem *p, ovlm_err *err)
{
    const ovlm_sequence_cost *cost = &p->cost;
    int64_t last = model->D - 1, d = model->degree[last], s = model->s[0];
    int64_t shard = (s - 1) / d + 1; /* per GPU, padded below */
    int64_t padded = (shard - 1) / p->pad_to * p->pad_to;
    padded = padded > TOKENS_MAX - p->pad_to ? TOKENS_MAX : padded + p->pad_to;
    double tokens = p->pad_to == 1 ? (double)s / (double)d : (double)padded;
    double bytes = ceil(cost->memory_fixed + cost->memory_per_token * tokens);
    int64_t per_gpu = memory_tokens(cost, 1);
    per_gpu -= per_gpu > 0 ? per_gpu % p->pad_to : 0;
    if (per_gpu <= 0) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "lengths[%lld] = %lld fits no degree: memory_fixed %g leaves no room for "
                         "a token of %g bytes in memory_limit %g; the largest degree here, %lld, "
                         "would need memory_limit >= %.17g bytes",
                         (long long)model->order[0], (long long)s, cost->memory_fixed,
                         cost->memory_per_token, cost->memory_limit, (long long)d, bytes);
    }
    return OVLM_FAIL(err, OVLM_E_ARG,
                     "lengths[%lld] = %lld fits no degree: the largest here, %lld of %lld GPUs, "
                     "holds %lld tokens; it needs a degree of at least %lld, or memory_limit >= "
                     "%.17g bytes",
                     (long long)model->order[0], (long long)s, (long long)d, (long long)p->n_gpus,
                     (long long)model->cap[last], (long long)((s - 1) / per_gpu + 1), bytes);
}

static ovlm_status init_items(sp_model *model, const ovlm_sp_problem *p, ovlm_arena *arena,
                              ovlm_err *err)
{
    int64_t n = p->n;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &model->order, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &model->s, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &model->min_j, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &model->sum_s, n + 1, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &model->sum_s2, n + 1, err));
    OVLM_TRY(ovlm_sort_i64(p->lengths, n, model->order, arena, err));
    int64_t j = model->D - 1;
    for (int64_t k = 0; k < n; k++) {
        int64_t length = p->lengths[model->order[k]];
        double s = (double)length;
        model->s[k] = length;
        model->sum_s[k + 1] = model->sum_s[k] + s;
        model->sum_s2[k + 1] = model->sum_s2[k] + s * s;
        if (length > model->cap[j]) {
            return fail_too_long(model, p, err);
        }
        /* Descending lengths: the first degree that fits only moves down. */
        while (j > 0 && model->cap[j - 1] >= length) {
            j--;
        }
        model->min_j[k] = j;
    }
    return OVLM_OK;
}

/* Every sum of times that anyone may form must be finite. */
static ovlm_status check_times(const sp_model *model, ovlm_err *err)
{
    for (int64_t j = 0; j < model->D; j++) {
        double group = model->quad[j] * model->sum_s2[model->n] + model->lin[j] *
                       model->sum_s[model->n] + model->fixed;
        if (!isfinite(group * (double)model->n_gpus * (double)(model->n + 1))) {
            return OVLM_FAIL(err, OVLM_E_ARG,
                             "the times overflow at degree %lld: the cost's coefficients are too "
                             "large for these lengths",
                             (long long)model->degree[j]);
        }
    }
    return OVLM_OK;
}

double sp_model_tokens(const sp_model *model)
{
    double per_gpu = 0;
    for (int64_t j = 0; j < model->D; j++) {
        double tokens = (double)model->cap[j] / (double)model->degree[j];
        per_gpu = tokens > per_gpu ? tokens : per_gpu;
    }
    return per_gpu * (double)model->n_gpus;
}

ovlm_status sp_model_init(sp_model *model, const ovlm_sp_problem *problem, ovlm_arena *arena,
                          ovlm_err *err)
{
    *model = (sp_model){.n = problem->n,
                        .n_gpus = problem->n_gpus,
                        .gpus_per_node = problem->gpus_per_node,
                        .fixed = problem->cost.fixed};
    OVLM_TRY(check_scalars(problem, err));
    OVLM_TRY(check_lengths(problem, err));
    OVLM_TRY(init_degrees(model, problem, err));
    OVLM_TRY(init_items(model, problem, arena, err));
    return check_times(model, err);
}
