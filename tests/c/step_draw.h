/* step_draw.h - random step problems: encoders with and without items, samples with and without
 * text, balanced ranks or sequence-parallel groups. */
#ifndef OVLM_STEP_DRAW_H
#define OVLM_STEP_DRAW_H

#include <string.h>

#include "ovlm.h"
#include "test.h"

enum { MAX_N = 60, MAX_ITEMS = 80, PHASES = 2, MAX_DEGREES = 4 };

typedef struct instance {
    ovlm_step_problem problem;
    ovlm_step_items phase[PHASES];
    int64_t text[MAX_N], source[MAX_N], degree[MAX_DEGREES];
    int64_t sample[PHASES][MAX_ITEMS], position[PHASES][MAX_ITEMS], length[PHASES][MAX_ITEMS];
    int64_t out[PHASES][MAX_ITEMS], bytes[PHASES][MAX_ITEMS];
    double comm[MAX_DEGREES];
} instance;

static inline int64_t below(int64_t n)
{
    return ovlm_rng_below(&test_rng, n);
}

static inline double coefficient(void)
{
    return below(2) ? ovlm_rng_uniform(&test_rng) : 0;
}

static inline ovlm_batch_cost draw_cost(void)
{
    return (ovlm_batch_cost){coefficient(), coefficient(), coefficient(),
                             coefficient(), coefficient(), coefficient()};
}

static inline void draw_phase(instance *x, int p, int64_t *taken)
{
    static const char *name[PHASES] = {"vision", "audio"};
    int64_t n = x->problem.n, k = n ? below(MAX_ITEMS) : 0;
    for (int64_t i = 0; i < k; i++) {
        int64_t s = below(n);
        x->sample[p][i] = s;
        x->position[p][i] = taken[s] + below(3);
        x->out[p][i] = below(9);
        x->length[p][i] = below(20);
        x->bytes[p][i] = below(5000);
        /* the gap is text */
        x->text[s] += x->position[p][i] - taken[s];
        taken[s] = x->position[p][i] + x->out[p][i];
    }
    x->phase[p] = (ovlm_step_items){
        .name = name[p], .n = k, .sample = x->sample[p], .position = x->position[p],
        .length = x->length[p], .out_tokens = x->out[p], .bytes = x->bytes[p],
        .out_bytes_per_token = (double)below(100), .cost = draw_cost(),
        .memory_per_token = below(2) ? 1000.0 / (double)(20 + below(30)) : 0};
}

static inline void draw_groups(instance *x, int64_t longest)
{
    ovlm_step_problem *problem = &x->problem;
    int64_t n_degrees = 0;
    for (int64_t d = 1; d <= problem->n_ranks && n_degrees < MAX_DEGREES; d *= 2) {
        x->degree[n_degrees] = d;
        x->comm[n_degrees++] = d > 1 ? 1e-3 : 0;
    }
    problem->sequence_parallel = true;
    problem->pad_to = 1 + below(4);
    problem->sequence_cost = (ovlm_sequence_cost){
        .quadratic = 1e-3, .linear = 1e-2, .fixed = 0.05, .memory_per_token = 1,
        .memory_limit = (double)(longest + 64), .degree_n = n_degrees, .degree = x->degree,
        .comm = x->comm};
}

static inline void draw(instance *x, bool groups)
{
    int64_t taken[MAX_N] = {0}, longest = 0;
    memset(x, 0, sizeof *x);
    ovlm_step_problem *problem = &x->problem;
    problem->gpus_per_node = (int64_t)1 << below(4);
    problem->n_ranks = problem->gpus_per_node * (1 + below(4));
    problem->n = below(MAX_N);
    problem->memory_bytes = 1000;
    problem->intra_bandwidth = 1e6;
    problem->inter_bandwidth = 1e5;
    problem->text_bytes_per_token = 8;
    problem->n_phases = below(PHASES + 1);
    problem->phase = x->phase;
    problem->text_tokens = x->text;
    problem->source_rank = x->source;
    for (int p = 0; p < problem->n_phases; p++) {
        draw_phase(x, p, taken);
    }
    for (int64_t i = 0; i < problem->n; i++) {
        int64_t tail = groups + below(20);
        x->text[i] += tail;
        x->source[i] = below(problem->n_ranks);
        longest = taken[i] + tail > longest ? taken[i] + tail : longest;
    }
    problem->llm_cost = draw_cost();
    problem->llm_memory_per_token = below(2) ? 1000.0 / (double)(longest + 1) : 0;
    problem->pad_to = 1;
    problem->relabel = (ovlm_relabel_mode)below(3);
    problem->slack = (double[]){-1, 0, 0.1}[below(3)];
    problem->compose = below(2) != 0;
    if (groups) {
        draw_groups(x, longest);
    }
}

#endif
