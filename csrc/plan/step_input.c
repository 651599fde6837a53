/* step_input.c - checks a step problem, and puts every sample's items in order. */
#include "plan/step.h"

#include <math.h>

#include "plan/route.h"

/* Sums of tokens, rows and bytes stay below this, so that nothing here can overflow. */
static const int64_t MAX_SUM = (int64_t)1 << 61;

static ovlm_status check_not_negative(const char *name, const char *what, const int64_t *value,
                                      int64_t n, ovlm_err *err)
{
    int64_t total = 0;
    for (int64_t i = 0; i < n; i++) {
        if (value[i] < 0) {
            return OVLM_FAIL(err, OVLM_E_ARG, "%s.%s[%lld] must be >= 0; got %lld", name, what,
                             (long long)i, (long long)value[i]);
        }
        if (value[i] > MAX_SUM - total) {
            return OVLM_FAIL(err, OVLM_E_ARG, "%s.%s sums to more than 2^61", name, what);
        }
        total += value[i];
    }
    return OVLM_OK;
}

static ovlm_status check_range(const char *name, const char *what, const int64_t *value, int64_t n,
                               int64_t end, ovlm_err *err)
{
    for (int64_t i = 0; i < n; i++) {
        if (value[i] < 0 || value[i] >= end) {
            return OVLM_FAIL(err, OVLM_E_ARG, "%s.%s[%lld] must be in [0, %lld); got %lld", name,
                             what, (long long)i, (long long)end, (long long)value[i]);
        }
    }
    return OVLM_OK;
}

static ovlm_status check_positive(const char *name, double value, ovlm_err *err)
{
    if (!(value > 0)) {
        return OVLM_FAIL(err, OVLM_E_ARG, "%s must be > 0; got %g", name, value);
    }
    return OVLM_OK;
}

static ovlm_status check_amount(const char *owner, const char *name, double value, ovlm_err *err)
{
    if (!isfinite(value) || value < 0) {
        return OVLM_FAIL(err, OVLM_E_ARG, "%s.%s must be finite and >= 0; got %g", owner, name,
                         value);
    }
    return OVLM_OK;
}

static ovlm_status check_cluster(const ovlm_step_problem *problem, ovlm_err *err)
{
    static const int64_t max_ranks = (int64_t)1 << 31, max_pad = (int64_t)1 << 30;
    if (problem->n_ranks < 1 || problem->n_ranks > max_ranks || problem->gpus_per_node < 1) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "cluster must have 1 to 2^31 GPUs, and at least one per node; got %lld "
                         "and %lld", (long long)problem->n_ranks,
                         (long long)problem->gpus_per_node);
    }
    if (isnan(problem->slack) || isinf(problem->slack)) {
        return OVLM_FAIL(err, OVLM_E_ARG, "slack must be finite; got %g", problem->slack);
    }
    if (problem->pad_to < 1 || problem->pad_to > max_pad) {
        return OVLM_FAIL(err, OVLM_E_ARG, "pad_to must be in [1, 2^30]; got %lld",
                         (long long)problem->pad_to);
    }
    OVLM_TRY(check_positive("cluster.memory_bytes", problem->memory_bytes, err));
    OVLM_TRY(check_positive("cluster.intra_bandwidth", problem->intra_bandwidth, err));
    return check_positive("cluster.inter_bandwidth", problem->inter_bandwidth, err);
}

static ovlm_status check_items(const step_input *input, const ovlm_step_items *items,
                               ovlm_err *err)
{
    const char *name = items->name;
    OVLM_TRY(check_range(name, "sample", items->sample, items->n, input->problem->n, err));
    OVLM_TRY(check_not_negative(name, "length", items->length, items->n, err));
    OVLM_TRY(check_not_negative(name, "out_tokens", items->out_tokens, items->n, err));
    OVLM_TRY(check_not_negative(name, "bytes", items->bytes, items->n, err));
    OVLM_TRY(check_range(name, "position", items->position, items->n, MAX_SUM / 2, err));
    for (int64_t i = 0; items->squares != NULL && i < items->n; i++) {
        if (!isfinite(items->squares[i]) || items->squares[i] < 0) {
            return OVLM_FAIL(err, OVLM_E_ARG, "%s.squares[%lld] must be finite and >= 0; got %g",
                             name, (long long)i, items->squares[i]);
        }
    }
    OVLM_TRY(check_amount(name, "out_bytes_per_token", items->out_bytes_per_token, err));
    OVLM_TRY(check_amount(name, "memory bytes_per_token", items->memory_per_token, err));
    OVLM_TRY(check_amount(name, "memory fixed_bytes", items->memory_fixed, err));
    return ovlm_batch_cost_check(&items->cost, err);
}

static ovlm_status check_problem(const step_input *input, ovlm_err *err)
{
    const ovlm_step_problem *problem = input->problem;
    OVLM_TRY(check_cluster(problem, err));
    OVLM_TRY(check_not_negative("batch", "text_tokens", problem->text_tokens, problem->n, err));
    OVLM_TRY(check_range("batch", "source_rank", problem->source_rank, problem->n,
                         problem->n_ranks, err));
    OVLM_TRY(check_amount("batch", "text_bytes_per_token", problem->text_bytes_per_token, err));
    for (int64_t p = 0; p < problem->n_phases; p++) {
        OVLM_TRY(check_items(input, &problem->phase[p], err));
    }
    if (problem->sequence_parallel) {
        return ovlm_sequence_cost_check(&problem->sequence_cost, err);
    }
    OVLM_TRY(check_amount("llm", "memory bytes_per_token", problem->llm_memory_per_token, err));
    OVLM_TRY(check_amount("llm", "memory fixed_bytes", problem->llm_memory_fixed, err));
    return ovlm_batch_cost_check(&problem->llm_cost, err);
}

/* rows * bytes_per_row as whole bytes; the total over the problem stays below MAX_SUM. */
static ovlm_status bytes_of(const char *name, int64_t rows, double bytes_per_row, int64_t *bytes,
                            int64_t *total, ovlm_err *err)
{
    double exact = (double)rows * bytes_per_row;
    if (exact >= (double)(MAX_SUM - *total)) {
        return OVLM_FAIL(err, OVLM_E_ARG, "%s: the bytes to move sum to more than 2^61", name);
    }
    *bytes = step_bytes(rows, bytes_per_row);
    *total += *bytes;
    return OVLM_OK;
}

/* Stable insertion sort of one sample's items by key: few, and mostly in order. */
static void sort_short(const int64_t *key, int64_t *item, int64_t n)
{
    for (int64_t i = 1; i < n; i++) {
        int64_t moving = item[i], j = i;
        for (; j > 0 && key[item[j - 1]] > key[moving]; j--) {
            item[j] = item[j - 1];
        }
        item[j] = moving;
    }
}

/* All items, numbered through the phases, by (sample, position). */
static ovlm_status order_items(const step_input *input, const int64_t *sample,
                               const int64_t *key, int64_t *order, ovlm_arena *arena,
                               ovlm_err *err)
{
    enum { SHORT = 24 };
    int64_t n = input->problem->n, *start = input->item_start;
    route_group(sample, n, NULL, input->n_items, order, start);
    bool is_short = true;
    for (int64_t i = 0; i < n; i++) {
        bool sorted = true;
        for (int64_t e = start[i] + 1; e < start[i + 1] && sorted; e++) {
            sorted = key[order[e - 1]] <= key[order[e]];
        }
        is_short = is_short && (sorted || start[i + 1] - start[i] <= SHORT);
        if (!sorted && is_short) {
            sort_short(key, order + start[i], start[i + 1] - start[i]);
        }
    }
    if (!is_short) {
        int64_t *by_key = NULL;
        OVLM_TRY(OVLM_ARENA_RAW(arena, &by_key, input->n_items, err));
        OVLM_TRY(route_sort_up(key, input->n_items, by_key, arena, err));
        route_group(sample, n, by_key, input->n_items, order, start);
    }
    return OVLM_OK;
}

/* Items of a sample may touch but not overlap, and must end inside it. */
static ovlm_status check_layout(const step_input *input, ovlm_err *err)
{
    const ovlm_step_problem *problem = input->problem;
    for (int64_t i = 0; i < problem->n; i++) {
        int64_t end = 0;
        for (int64_t e = input->item_start[i]; e < input->item_start[i + 1]; e++) {
            const step_item *item = &input->item[e];
            const ovlm_step_items *items = &problem->phase[item->phase];
            int64_t index = item->index, position = item->position;
            if (position < end) {
                return OVLM_FAIL(err, OVLM_E_ARG,
                                 "%s.position[%lld] = %lld overlaps another item of sample %lld, "
                                 "which ends at %lld", items->name, (long long)index,
                                 (long long)position, (long long)i, (long long)end);
            }
            end = position + item->tokens;
            if (end > input->tokens[i]) {
                return OVLM_FAIL(err, OVLM_E_ARG,
                                 "%s item %lld ends at token %lld of sample %lld, which has %lld "
                                 "(text and items together)", items->name, (long long)index,
                                 (long long)end, (long long)i, (long long)input->tokens[i]);
            }
        }
    }
    return OVLM_OK;
}

/* tokens, out_bytes, text_bytes, llm_bytes and home; each item's sample, and its key within it. */
static ovlm_status derive_sizes(step_input *input, int64_t *sample, int64_t *key,
                                ovlm_arena *arena, ovlm_err *err)
{
    const ovlm_step_problem *problem = input->problem;
    int64_t total_bytes = 0, total_tokens = 0, at = 0;
    for (int64_t i = 0; i < problem->n; i++) {
        input->tokens[i] = problem->text_tokens[i];
        total_tokens += problem->text_tokens[i];
        OVLM_TRY(bytes_of("batch", problem->text_tokens[i], problem->text_bytes_per_token,
                          &input->text_bytes[i], &total_bytes, err));
        input->llm_bytes[i] = input->text_bytes[i];
    }
    for (int64_t p = 0; p < problem->n_phases; p++) {
        const ovlm_step_items *items = &problem->phase[p];
        OVLM_TRY(OVLM_ARENA_RAW(arena, &input->home[p], items->n, err));
        OVLM_TRY(OVLM_ARENA_RAW(arena, &input->out_bytes[p], items->n, err));
        OVLM_TRY(OVLM_ARENA_RAW(arena, &input->order[p], items->n, err));
        for (int64_t k = 0; k < items->n; k++, at++) {
            int64_t i = items->sample[k];
            OVLM_TRY(bytes_of(items->name, items->out_tokens[k], items->out_bytes_per_token,
                              &input->out_bytes[p][k], &total_bytes, err));
            if (items->out_tokens[k] > MAX_SUM - total_tokens) {
                return OVLM_FAIL(err, OVLM_E_ARG, "tokens sum to more than 2^61");
            }
            total_tokens += items->out_tokens[k];
            input->tokens[i] += items->out_tokens[k];
            input->llm_bytes[i] += input->out_bytes[p][k];
            input->home[p][k] = problem->source_rank[i];
            sample[at] = i;
            /* at one position, items without tokens come first: they cannot overlap */
            key[at] = 2 * items->position[k] + (items->out_tokens[k] > 0);
        }
    }
    return OVLM_OK;
}

/* Room for everything that lives as long as the input. */
static ovlm_status reserve(step_input *input, ovlm_arena *arena, ovlm_err *err)
{
    int64_t n = input->problem->n, n_phases = input->problem->n_phases;
    for (int64_t p = 0; p < n_phases; p++) {
        input->n_items += input->problem->phase[p].n;
    }
    OVLM_TRY(OVLM_ARENA_RAW(arena, &input->tokens, n, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &input->text_bytes, n, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &input->llm_bytes, n, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &input->item_start, n + 1, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &input->item, input->n_items, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &input->node, input->problem->n_ranks, err));
    for (int64_t r = 0; r < input->problem->n_ranks; r++) {
        input->node[r] = (int32_t)(r / input->problem->gpus_per_node);
    }
    OVLM_TRY(OVLM_ARENA_NEW(arena, &input->order, n_phases, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &input->home, n_phases, err));
    return OVLM_ARENA_NEW(arena, &input->out_bytes, n_phases, err);
}

/* item and order, from the items' common order. */
static ovlm_status list_items(step_input *input, const int64_t *item, ovlm_arena *arena,
                              ovlm_err *err)
{
    const ovlm_step_problem *problem = input->problem;
    int64_t *first = NULL, *filled = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &first, problem->n_phases + 1, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &filled, problem->n_phases, err));
    for (int64_t p = 0; p < problem->n_phases; p++) {
        first[p + 1] = first[p] + problem->phase[p].n;
    }
    for (int64_t e = 0; e < input->n_items; e++) {
        int64_t p = 0;
        while (item[e] >= first[p + 1]) {
            p++;
        }
        int64_t index = item[e] - first[p];
        input->item[e] = (step_item){p, index, problem->phase[p].position[index],
                                     problem->phase[p].out_tokens[index]};
        input->order[p][filled[p]++] = index;
    }
    return OVLM_OK;
}

ovlm_status step_input_init(step_input *input, const ovlm_step_problem *problem, ovlm_arena *arena,
                            ovlm_err *err)
{
    *input = (step_input){.problem = problem};
    OVLM_TRY(check_problem(input, err));
    OVLM_TRY(reserve(input, arena, err));
    int64_t *sample = NULL, *key = NULL, *item = NULL;
    OVLM_TRY(OVLM_ARENA_RAW(arena, &sample, input->n_items, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &key, input->n_items, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &item, input->n_items, err));
    OVLM_TRY(derive_sizes(input, sample, key, arena, err));
    OVLM_TRY(order_items(input, sample, key, item, arena, err));
    OVLM_TRY(list_items(input, item, arena, err));
    return check_layout(input, err);
}
