/* sp_brute.h - independent brute force for tiny sequence-parallel instances, straight from the
 * problem statement: it shares no code with the library. */
#ifndef OVLM_TEST_SP_BRUTE_H
#define OVLM_TEST_SP_BRUTE_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "ovlm.h"

enum { BRUTE_N = 7, BRUTE_SETS = 1 << BRUTE_N };

/* Makespan of every subset of items on at most N GPUs (placement relaxed), then the least total
 * over partitions into micro-batches, for every number of non-empty ones. */
typedef struct sp_brute {
    double makespan[BRUTE_SETS]; /* without fixed; HUGE_VAL: does not fit                  */
    double step[BRUTE_N + 1];    /* [m] least sum of makespans over m non-empty ones       */
} sp_brute;

/* Seconds of the set on that degree, HUGE_VAL when its memory does not fit. */
static inline double brute_group(const ovlm_sp_problem *p, unsigned set, int64_t degree_i)
{
    double d = (double)p->cost.degree[degree_i], tokens = 0, time = 0;
    for (int64_t k = 0; k < p->n; k++) {
        if (set >> k & 1) {
            double s = (double)p->lengths[k];
            double heads = (double)p->cost.heads;
            double share = 1 / d, rows = 1;
            while (heads > 0 && (fmod(d, rows) != 0 || d / rows > heads)) {
                rows++;
            }
            if (heads > 0) {
                share = ceil(heads * rows / d) / heads * (2 * rows - 1) / (rows * rows);
            }
            tokens += s;
            time += p->cost.quadratic * s * s * share +
                    (p->cost.linear + p->cost.comm[degree_i] + p->cost.ring * (rows - 1)) * s / d;
        }
    }
    double shard = p->pad_to == 1 ? tokens / d
                                  : ceil(ceil(tokens / d) / (double)p->pad_to) * (double)p->pad_to;
    bool fits = p->cost.memory_fixed + p->cost.memory_per_token * shard <= p->cost.memory_limit;
    return fits ? time : HUGE_VAL;
}

/* least[set][g]: best makespan of the set on at most g GPUs. */
static inline void brute_solve(const ovlm_sp_problem *p, sp_brute *out)
{
    static double least[BRUTE_SETS][64];
    unsigned all = (1u << p->n) - 1;
    for (unsigned set = 0; set <= all; set++) {
        for (int64_t g = 0; g <= p->n_gpus; g++) {
            least[set][g] = set == 0 ? 0 : HUGE_VAL;
        }
        unsigned first = set & (~set + 1u);
        for (unsigned group = set; set != 0 && group != 0; group = (group - 1) & set) {
            if ((group & first) == 0) {
                continue;
            }
            for (int64_t i = 0; i < p->cost.degree_n; i++) {
                double time = brute_group(p, group, i);
                for (int64_t g = p->cost.degree[i]; g <= p->n_gpus; g++) {
                    double both = fmax(time, least[set & ~group][g - p->cost.degree[i]]);
                    least[set][g] = fmin(least[set][g], both);
                }
            }
        }
        out->makespan[set] = least[set][p->n_gpus];
    }
    static double sum[BRUTE_SETS][BRUTE_N + 1];
    for (unsigned set = 0; set <= all; set++) {
        for (int m = 0; m <= BRUTE_N; m++) {
            sum[set][m] = set == 0 && m == 0 ? 0 : HUGE_VAL;
        }
        unsigned first = set & (~set + 1u);
        for (unsigned batch = set; set != 0 && batch != 0; batch = (batch - 1) & set) {
            for (int m = 1; m <= p->n && (batch & first) != 0; m++) {
                sum[set][m] = fmin(sum[set][m], out->makespan[batch] + sum[set & ~batch][m - 1]);
            }
        }
    }
    memcpy(out->step, sum[all], sizeof out->step);
}

#endif
