/* sp_model.h - one sequence-parallel instance, prepared: what the searches and the bounds share.
 *
 * Sequences are renamed by descending length: k = 0 is the longest; model->order[k] is the
 * caller's index.  For degree index j (degree d = degree[j]), a group's time and room are
 *   T = fixed + sum_k( quad[j]*s_k^2 + lin[j]*s_k ),       sum_k s_k <= cap[j],
 * quad = quadratic*share(d), lin = (linear + comm[d] + ring)/d, so both are already per group.
 * "Makespan" below means time without `fixed`, which is paid once per non-empty micro-batch. */
#ifndef OVLM_PLAN_SP_MODEL_H
#define OVLM_PLAN_SP_MODEL_H

#include "base/arena.h"
#include "base/clock.h"

enum { SP_MAX_DEGREES = 64 };

typedef struct sp_model {
    int64_t n, n_gpus, gpus_per_node;
    int64_t D;                       /* permitted degrees, those <= n_gpus                     */
    int64_t degree[SP_MAX_DEGREES];  /* ascending                                              */
    double quad[SP_MAX_DEGREES];     /* seconds per token^2 on a group of that degree          */
    double lin[SP_MAX_DEGREES];      /* seconds per token on a group of that degree            */
    int64_t cap[SP_MAX_DEGREES];     /* tokens that a group of that degree may hold            */
    double fixed;                    /* seconds per non-empty micro-batch                      */
    int64_t *order;                  /* [n] caller's index of the k-th longest                 */
    int64_t *s;                      /* [n] lengths, descending                                */
    double *sum_s, *sum_s2;          /* [n+1] prefix sums over k of s and s^2                  */
    int64_t *min_j;                  /* [n] first degree index whose cap holds s_k             */
    bool buddy;                      /* degrees and node are a chain of divisors, like powers of
                                        two: any multiset with sum <= n_gpus can be placed      */
} sp_model;

/* Checks the whole problem (every argument, sums below 2^62, every sequence fits some degree) and
 * prepares it.  Everything lives in the arena. */
OVLM_NODISCARD ovlm_status sp_model_init(sp_model *model, const ovlm_sp_problem *problem,
                                         ovlm_arena *arena, ovlm_err *err);

/* Tokens that the memory of all GPUs holds, in groups of the degree that holds most per GPU. */
double sp_model_tokens(const sp_model *model);

/* Seconds that item k takes on a group of degree index j (without fixed). */
static inline double sp_item_time(const sp_model *model, int64_t k, int64_t j)
{
    double s = (double)model->s[k];
    return s * (model->quad[j] * s + model->lin[j]);
}

/* GPU-seconds of item k on degree index j. */
static inline double sp_item_work(const sp_model *model, int64_t k, int64_t j)
{
    return (double)model->degree[j] * sp_item_time(model, k, j);
}

/* Places groups (degree indices j[0..n_groups-1]) as blocks: a degree up to gpus_per_node inside
 * one node, a larger one from the start of a node; with model->buddy also first_gpu % degree == 0.
 * first_gpu[g] answers, false when they cannot all be placed (or, beyond 256 groups or 20,000 steps
 * of search, when first fit decreasing does not).  O(n_groups) with buddy; deterministic. */
bool sp_place(const sp_model *model, const int64_t *j, int64_t n_groups, int64_t *first_gpu);

#endif
