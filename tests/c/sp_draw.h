/* sp_draw.h - tiny sequence-parallel instances of all kinds, for tests against brute force. */
#ifndef OVLM_TEST_SP_DRAW_H
#define OVLM_TEST_SP_DRAW_H

#include "base/clock.h"
#include "sp_brute.h"
#include "test.h"

typedef struct instance {
    ovlm_sp_problem problem;
    int64_t lengths[BRUTE_N], degrees[16];
    double comm[16];
} instance;

/* Degrees: powers of two, or any set; memory from tight to none; one or several long items; now and
 * then lengths that differ only in their last digits, whose differences cancel, and many GPUs of
 * which one holds any item, where no item is a giant. */
static inline void draw(instance *x)
{
    static const double memory[] = {1.02, 1.2, 1.6, 2.5, 6, 1e9};
    static const double fixed[] = {0, 0, .01, .3, 5, 100};
    int64_t most_n = ovlm_rng_below(&test_rng, 8) ? 6 : BRUTE_N;
    *x = (instance){.problem = {.n = 1 + ovlm_rng_below(&test_rng, most_n),
                                .n_gpus = 1 + ovlm_rng_below(&test_rng, 8),
                                .gpus_per_node = 8,
                                .pad_to = ovlm_rng_below(&test_rng, 4) ? 1 : 8,
                                .threads = 1,
                                .policy = OVLM_SP_FLEX}};
    ovlm_sp_problem *p = &x->problem;
    bool odd = ovlm_rng_below(&test_rng, 3) == 0, wide = ovlm_rng_below(&test_rng, 4) == 0;
    p->n_gpus += wide ? 8 : 0;
    int64_t degree_n = 0;
    for (int64_t d = 1; d <= p->n_gpus; d = odd ? d + 1 + ovlm_rng_below(&test_rng, 2) : 2 * d) {
        x->degrees[degree_n] = d;
        x->comm[degree_n++] = 1e-4 * ovlm_rng_uniform(&test_rng) * (double)d;
    }
    int64_t longest = 0, total = 0, spread = 2 + ovlm_rng_below(&test_rng, 1000);
    int64_t base = 1 + ovlm_rng_below(&test_rng, 1000);
    if (ovlm_rng_below(&test_rng, 8) == 0) {
        spread = 2 + ovlm_rng_below(&test_rng, 4);
        for (int64_t digits = ovlm_rng_below(&test_rng, 12); digits > 0; digits--) {
            base *= 10;
        }
    }
    for (int64_t k = 0; k < p->n; k++) {
        x->lengths[k] = base + ovlm_rng_below(&test_rng, spread);
        x->lengths[k] *= ovlm_rng_below(&test_rng, 3) == 0 ? 4 : 1;
        longest = x->lengths[k] > longest ? x->lengths[k] : longest;
        total += x->lengths[k];
    }
    double largest = (double)x->degrees[degree_n - 1];
    double least = (double)longest / (wide ? 1 : largest);
    double most = (double)total / (double)p->n_gpus;
    double limit = (ovlm_rng_below(&test_rng, 2) ? least : fmax(least, most / 2)) *
                   memory[ovlm_rng_below(&test_rng, 6)];
    p->lengths = x->lengths;
    p->cost = (ovlm_sequence_cost){
        .quadratic = 1e-6 * (double)ovlm_rng_below(&test_rng, 3) * ovlm_rng_uniform(&test_rng),
        .linear = 1e-4 * ovlm_rng_uniform(&test_rng) * (double)ovlm_rng_below(&test_rng, 8),
        .fixed = fixed[ovlm_rng_below(&test_rng, 6)],
        .memory_per_token = 1,
        .memory_limit = ceil(limit) + (p->pad_to > 1 ? 8 : 0),
        .heads = ovlm_rng_below(&test_rng, 3) ? 0 : wide ? 24 : 8,
        .ring = 1e-5 * ovlm_rng_uniform(&test_rng),
        .degree_n = degree_n,
        .degree = x->degrees,
        .comm = x->comm};
    if (ovlm_rng_below(&test_rng, 3) == 0) { /* fewer heads than the degrees have GPUs */
        p->cost.heads = 1 + ovlm_rng_below(&test_rng, 5);
        p->cost.rings = true;
    }
}

/* A meter for that much work, without a deadline. */
static inline ovlm_meter meter_of(int64_t work)
{
    ovlm_meter meter;
    ovlm_meter_start(&meter, &(ovlm_budget){.work_limit = work}, 0, 100);
    return meter;
}

#endif
