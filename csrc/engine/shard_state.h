/* shard_state.h - the inside of ovlm_shard, for its files. */
#ifndef OVLM_ENGINE_SHARD_STATE_H
#define OVLM_ENGINE_SHARD_STATE_H

#include "base/arena.h"
#include "engine/expert_parallel.h"
#include "engine/shard.h"

enum { SHARD_SLOTS_MOST = 8, SHARD_PIECES_MOST = 2 };

/* Memory that one unit after the other uses. */
typedef struct shard_slot {
    int64_t bytes;
    void *data;   /* device; NULL while planning */
    bool used;
} shard_slot;

typedef struct shard_pool {
    int64_t n;
    shard_slot slot[SHARD_SLOTS_MOST];
} shard_pool;

/* A unit's weights, or its adapters: elements from 0 on, cut into `ways` ranges.  Its gradients are
 * part of the unit's, and are counted from their start. */
typedef struct shard_piece {
    bool adapters;
    int64_t elements;
    int64_t grad_first, grad_elements;
    int64_t ways, own;
    int64_t *cut, *grad_cut;         /* [ways+1]                                               */
    int64_t *gather_bytes;           /* [ways] of the weights' ranges                          */
    int64_t *gather_at;              /* [ways]                                                 */
    int64_t *reduce_count;           /* [ways] elements of the gradients' ranges               */
    int64_t kept_bytes;              /* where what is held begins: in shard->weights,          */
    int64_t kept_grads;              /* and, in elements, in shard->grads                      */
    int64_t state;                   /* and in each plane of shard->state                      */
} shard_piece;

/* How far the sum of a unit's gradients over the ranks is.  Those of fsdp are always summed. */
typedef enum shard_sum { SHARD_OPEN, SHARD_STARTED, SHARD_DONE } shard_sum;

typedef struct shard_unit {
    ovlm_shard_mode mode;
    bool sharded;                    /* fsdp, hybrid                                           */
    bool parted;                     /* experts, of which other ranks have others              */
    int64_t pieces;
    shard_piece piece[SHARD_PIECES_MOST];
    shard_slot *weights, *grads;     /* gathered; being added to or reduced                    */
    bool gathering;
    shard_sum sum;
    int64_t gather_ticket, sum_ticket;
} shard_unit;

typedef struct shard_block {
    void *data;
    int64_t bytes;
} shard_block;

struct ovlm_shard {
    ovlm_arena arena;                /* host: what lives as long as the shard                  */
    ovlm_model *model;               /* NULL while planning                                    */
    const ovlm_params *params;
    int64_t rank, ranks, node_size, experts;
    bool holds, holds_state;
    bool staged;                     /* device memory that communicators cannot reach          */
    shard_unit *unit;                /* [units]                                                */
    int64_t grad_elements, weight_elements, adapter_elements; /* of the list when opened       */

    ovlm_comm *world, *gather;       /* all ranks: sums; weights, meanwhile                    */
    ovlm_comm *node, *node_gather, *across; /* of hybrid; else NULL                            */
    ovlm_comm *party;                /* ranks that hold a layer's experts between them, and    */
    ovlm_comm *twins, *twins_gather; /* those that hold the same ones; NULL: all have all      */
    ovlm_expert_ranks expert_ranks;

    int64_t kept_bytes, kept_grads, state_elements;
    shard_block weights, grads, state, stats;
    shard_pool weight_pool, grad_pool;
    ovlm_stack work;                 /* scratch of operations                                  */
    shard_block stage;               /* host                                                   */

    int64_t *order, order_n, at;     /* of the pass that runs                                  */
    bool backward;
    int64_t scattering;              /* unit whose reduce-scatter is under way, or -1          */
    int64_t scatter_ticket;
    bool scatter_last;               /* it was started after ovlm_shard_last                   */
    int64_t sums;                    /* started, not waited for                                */
    bool last;                       /* ovlm_shard_last                                        */
    bool spoiled;                    /* a backward failed: gradients are void                  */
    bool undone;                     /* the model has all its weights again                    */
    double waited_s;                 /* of the caller's time, for other ranks                  */
    int64_t fail_after;              /* tests                                                  */
};

static inline ovlm_dtype shard_dtype(const ovlm_shard *shard)
{
    return shard->params->dtype;
}

static inline int64_t shard_element(const ovlm_shard *shard)
{
    return ovlm_dtype_bytes(shard->params->dtype);
}

static inline int64_t shard_exact_element(const ovlm_shard *shard)
{
    return ovlm_dtype_bytes(shard->params->exact);
}

static inline const ovlm_unit *shard_listed(const ovlm_shard *shard, int64_t unit)
{
    return &shard->params->unit[unit];
}

/* m, v and, where weights are narrower, their masters. */
static inline int64_t shard_planes(const ovlm_shard *shard)
{
    return shard->params->dtype == shard->params->exact ? 2 : 3;
}

/* ------------------------------------------------------------ plan (shard_plan.c) */

/* Whether a spec is one for the list and so many ranks. */
OVLM_NODISCARD ovlm_status ovlm_shard_spec_check(const ovlm_params *params,
                                                 const ovlm_shard_spec *spec, int64_t ranks,
                                                 ovlm_err *err);

/* Units, pieces and sizes, without memory: all that follows from the list of what this rank holds,
 * a spec that is one, and the rank; into a shard that is zero but for its communicators. */
OVLM_NODISCARD ovlm_status ovlm_shard_plan(ovlm_shard *shard, const ovlm_params *params,
                                           const ovlm_shard_spec *spec, int64_t ranks,
                                           int64_t rank, ovlm_err *err);

/* The smallest free slot that holds so much; NULL without any.  While planning one is made. */
shard_slot *ovlm_shard_slot_take(const ovlm_shard *shard, shard_pool *pool, int64_t bytes);
int64_t ovlm_shard_pool_bytes(const shard_pool *pool);

/* Bytes of a unit when gathered, with adapters, and of its gradients. */
int64_t ovlm_shard_unit_bytes(const ovlm_shard *shard, int64_t unit);
int64_t ovlm_shard_unit_grad_bytes(const ovlm_shard *shard, int64_t unit);

/* Whether this rank is the first of those that hold the same of a unit, where others do. */
bool ovlm_shard_first(const ovlm_shard *shard, const shard_unit *unit);

/* Elements of a piece, and of its gradients, that this rank holds for good, if the shard holds any.
 */
void ovlm_shard_kept(const shard_unit *unit, const shard_piece *piece, int64_t *first,
                     int64_t *count);
void ovlm_shard_kept_grads(const shard_unit *unit, const shard_piece *piece, int64_t *first,
                           int64_t *count);

/* ------------------------------------------------------------ hooks (shard_hooks.c) */

ovlm_model_hooks ovlm_shard_hooks(ovlm_shard *shard);

/* One pass of this kind as the hooks see it, for the sizes of the pools. */
void ovlm_shard_rehearse(ovlm_shard *shard, const ovlm_pass_kind *kind);

/* Tells the model where a unit is. */
void ovlm_shard_place(ovlm_shard *shard, int64_t unit);

/* ------------------------------------------------------------ transfers (shard_wire.c) */

/* Ranks between which a unit's ranges lie, or that hold the same. */
ovlm_comm *ovlm_shard_comm(const ovlm_shard *shard, const shard_unit *unit);

/* The caller has waited for other ranks since start_s, of ovlm_clock_s. */
void ovlm_shard_note_wait(ovlm_shard *shard, double start_s);

/* Where element `at` of a piece, or of its unit's gradients, is held for good. */
char *ovlm_shard_weight_at(const ovlm_shard *shard, int64_t unit, const shard_piece *piece,
                           int64_t at);
char *ovlm_shard_grad_at(const ovlm_shard *shard, int64_t unit, const shard_piece *piece,
                         int64_t at);

/* A unit's weights into its slot. */
OVLM_NODISCARD ovlm_status ovlm_shard_gather_start(ovlm_shard *shard, int64_t unit, ovlm_err *err);
OVLM_NODISCARD ovlm_status ovlm_shard_gather_wait(ovlm_shard *shard, int64_t unit, ovlm_err *err);

/* Gradients in a unit's slot, summed over the ranks that share it; settle adds what came to what is
 * held, and frees the slot. */
OVLM_NODISCARD ovlm_status ovlm_shard_scatter_start(ovlm_shard *shard, int64_t unit,
                                                    ovlm_err *err);
OVLM_NODISCARD ovlm_status ovlm_shard_settle(ovlm_shard *shard, ovlm_err *err);

/* Gradients that were added up on this rank, summed over the ranks. */
OVLM_NODISCARD ovlm_status ovlm_shard_sum_start(ovlm_shard *shard, int64_t unit, ovlm_err *err);
OVLM_NODISCARD ovlm_status ovlm_shard_sum_wait(ovlm_shard *shard, int64_t unit, ovlm_err *err);

/* Weights of zero1 from the ranks that stepped them to all. */
OVLM_NODISCARD ovlm_status ovlm_shard_spread(ovlm_shard *shard, ovlm_err *err);

/* Waits for all that is under way. */
OVLM_NODISCARD ovlm_status ovlm_shard_finish(ovlm_shard *shard, ovlm_err *err);

/* A unit's weights into the model's own memory, which it has again. */
OVLM_NODISCARD ovlm_status ovlm_shard_restore(ovlm_shard *shard, int64_t unit, ovlm_err *err);

/* ------------------------------------------------------------ state (shard_step.c) */

/* y = x + beta y of n elements; y is exact. */
OVLM_NODISCARD ovlm_status ovlm_shard_blend(ovlm_shard *shard, const void *x, ovlm_dtype x_dtype,
                                            double beta, void *y, int64_t n, ovlm_err *err);

/* Makes the optimizer's state, zero, where there is none. */
OVLM_NODISCARD ovlm_status ovlm_shard_need_state(ovlm_shard *shard, ovlm_err *err);
/* Own ranges of a parameter: of its weights, and of its gradients as they are cut by the same
 * elements; counted from the starts of its unit's.  n is 0 where this rank steps nothing of it. */
typedef struct shard_range {
    int64_t unit, first, grad_first, n;
    const shard_piece *piece;
} shard_range;
shard_range ovlm_shard_own_range(const ovlm_shard *shard, int64_t parameter);

/* A place in one of the planes of state. */
char *ovlm_shard_state_at(const ovlm_shard *shard, const shard_piece *piece, int64_t plane,
                          int64_t grad_at);

/* The master of what this rank steps of a parameter takes the value of its weights. */
OVLM_NODISCARD ovlm_status ovlm_shard_renew_master(ovlm_shard *shard, int64_t parameter,
                                                   ovlm_err *err);

/* A parameter of experts from the ranks that hold them: this rank's are in their place in host,
 * which is as on the hub. */
OVLM_NODISCARD ovlm_status ovlm_shard_gather_parts(ovlm_shard *shard, int64_t parameter,
                                                   ovlm_dtype dtype, void *host, ovlm_err *err);

/* Unless it is there, or of nothing. */
OVLM_NODISCARD ovlm_status ovlm_shard_block_new(ovlm_shard *shard, shard_block *block,
                                                int64_t bytes, bool zero, ovlm_err *err);

#endif
