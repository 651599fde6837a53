/* shard.h - a model's weights, gradients and optimizer state over the ranks of a communicator.
 *
 *   ovlm_shard *shard;        ovlm_shard_open(model, comm, &spec, &shard, err)       all ranks
 *   loop: ovlm_shard_zero_grad; forwards and backwards; ovlm_shard_last before the last backward
 *         ovlm_shard_adamw
 *
 * It fills the model's hooks (model/hooks.h).  A unit is kept in one of four ways:
 *
 *               weights    gradients  state      between ranks
 *   ddp         all        all        all        gradients all-reduced
 *   zero1       all        all        1/N        gradients reduce-scattered; weights all-gathered
 *                                                after the step
 *   fsdp        1/N        1/N        1/N        weights all-gathered at acquire, the next unit's
 *                                                meanwhile; gradients reduce-scattered at reduce
 *   hybrid      1/n        1/n        1/n        as fsdp inside a node of n ranks; gradients
 *                                                all-reduced between nodes
 *
 * Experts may be over e ranks besides (model/expert_exchange.h): ranks 0 .. e-1 are a group whose
 * ranks hold E/e experts of each layer, and so on.  To a unit of experts the ranks with the same
 * ones, one of each group, are then what all ranks are to others.
 *
 * Shards are flat.  A unit's weights (and, apart, its adapters) lie end to end as ovlm_unit says;
 * each rank holds one of N nearly equal ranges, cut at multiples of 64 elements, so that a
 * parameter may lie on several ranks.  Gradients and state are cut at the same parameters'
 * elements.
 *
 * Sums over ranks are made in the order of the ranks: all copies of a weight have the same bits, on
 * every rank, for ever.  The modes differ in the order in which gradients of micro-batches are
 * added, and so in rounding alone.
 *
 * Collectives follow from the kinds of passes (ovlm_pass_kind), so that ranks match that run passes
 * of the same kinds in the same order, whether they have any work there or not.  A rank whose call
 * fails tells nobody: its caller aborts or closes the communicator, and the others fail.
 *
 * While any unit is fsdp or hybrid, the shard holds weights and gradients of all units; the model
 * has none (ovlm_model_place).  What is trained and adapted is settled before. */
#ifndef OVLM_ENGINE_SHARD_H
#define OVLM_ENGINE_SHARD_H

#include "backend/comm.h"
#include "model/model.h"

typedef struct ovlm_shard ovlm_shard;

typedef enum ovlm_shard_mode {
    OVLM_SHARD_DDP,
    OVLM_SHARD_ZERO1,
    OVLM_SHARD_FSDP,
    OVLM_SHARD_HYBRID,
    OVLM_SHARD_MODES
} ovlm_shard_mode;

/* The same on all ranks. */
typedef struct ovlm_shard_spec {
    const ovlm_shard_mode *mode; /* [units]                                                    */
    int64_t node_size;           /* of hybrid units: ranks 0 .. n-1 are a node, and so on; divides
                                    the number of ranks                                        */
    int64_t experts;             /* e: divides the number of ranks; 0 or 1: every rank has all */
} ovlm_shard_spec;

/* ------------------------------------------------------------ life */

/* All ranks.  The shard makes communicators of its own; `comm` may go.  The model outlives the
 * shard, and holds the same weights on all ranks; what the shard is to hold is copied, and the
 * model's memory for it given up, with any optimizer state.  OVLM_E_ARG: a spec that does not fit,
 * or ranks that disagree on it or on the model. */
OVLM_NODISCARD ovlm_status ovlm_shard_open(ovlm_model *model, ovlm_comm *comm,
                                           const ovlm_shard_spec *spec, ovlm_shard **shard,
                                           ovlm_err *err);

/* All ranks.  The model has all its weights again, and no hooks; of the shard nothing is left but
 * to close it. */
OVLM_NODISCARD ovlm_status ovlm_shard_undo(ovlm_shard *shard, ovlm_err *err);

/* Waits for nobody.  Without ovlm_shard_undo, a model whose weights were held has none from now on,
 * and fails.  NULL is fine. */
void ovlm_shard_close(ovlm_shard *shard);

/* Whether the shard holds weights and gradients; whether it holds the optimizer's state (if not,
 * it is the model's: every unit is ddp). */
bool ovlm_shard_holds(const ovlm_shard *shard);
bool ovlm_shard_holds_state(const ovlm_shard *shard);

/* ------------------------------------------------------------ a step */

OVLM_NODISCARD ovlm_status ovlm_shard_zero_grad(ovlm_shard *shard, ovlm_err *err);

/* Nothing is added any more to a unit that a backward has reduced from now on, until the gradients
 * are zeroed: its sum over the ranks may begin while the backward goes on.  Without this call it
 * begins in ovlm_shard_reduce; a second backward through such a unit is OVLM_E_ARG. */
void ovlm_shard_last(ovlm_shard *shard);

/* All ranks.  Gradients are summed over the ranks when it returns; once summed they stay. */
OVLM_NODISCARD ovlm_status ovlm_shard_reduce(ovlm_shard *shard, ovlm_err *err);

/* All ranks.  Reduces what is not reduced yet, then ovlm_model_adamw_step over the ranks: the same
 * norm, factor and decision to skip on all of them, each parameter counted once. */
OVLM_NODISCARD ovlm_status ovlm_shard_adamw(ovlm_shard *shard, const ovlm_model_adamw *options,
                                            ovlm_model_step *step, ovlm_err *err);

/* ------------------------------------------------------------ contents */

typedef enum ovlm_shard_which {
    OVLM_SHARD_WEIGHT,
    OVLM_SHARD_GRAD,
    OVLM_SHARD_MOMENT1,
    OVLM_SHARD_MOMENT2,
    OVLM_SHARD_MASTER,
    OVLM_SHARD_WHICH
} ovlm_shard_which;

/* What this rank holds of one of a parameter's tensors. */
typedef struct ovlm_shard_part {
    int64_t first;      /* element of the parameter as it is on the hub, dense                 */
    ovlm_tensor tensor; /* [1,n], for ovlm_model_read; left out: nothing of it                 */
    bool again;         /* a lower rank holds the same                                         */
} ovlm_shard_part;

/* State is made when missing.  Gradients: of what was reduced.  OVLM_E_ARG for state that the model
 * has (ovlm_model_moments). */
OVLM_NODISCARD ovlm_status ovlm_shard_part_of(ovlm_shard *shard, int64_t parameter,
                                              ovlm_shard_which which, ovlm_shard_part *part,
                                              ovlm_err *err);

/* Sets this rank's part, dense, in the dtype that it is stored in; of a weight its master follows.
 * Waits. */
OVLM_NODISCARD ovlm_status ovlm_shard_write(ovlm_shard *shard, int64_t parameter,
                                            ovlm_shard_which which, const void *host,
                                            ovlm_err *err);

/* All ranks: the whole tensor, dense, on each of them; gradients are reduced first.  *none: it is
 * left out everywhere.  Waits. */
OVLM_NODISCARD ovlm_status ovlm_shard_gather(ovlm_shard *shard, int64_t parameter,
                                             ovlm_shard_which which, void *host, bool *none,
                                             ovlm_err *err);

/* ------------------------------------------------------------ memory */

typedef struct ovlm_shard_bytes {
    int64_t weights_bytes;  /* with the routers' corrections; the model's and the shard's        */
    int64_t training_bytes; /* gradients and optimizer state                                     */
    int64_t buffers_bytes;  /* for units that are gathered or reduced: what does not fall with N */
} ovlm_shard_bytes;

/* What a rank will hold: pure.  Of the list, dtypes and what is trained are read; which experts it
 * has is the same to it. */
OVLM_NODISCARD ovlm_status ovlm_shard_memory(const ovlm_params *params,
                                             const ovlm_shard_spec *spec, int64_t ranks,
                                             int64_t rank, ovlm_shard_bytes *bytes, ovlm_err *err);

/* Seconds that callers have waited for calls of the communicators since it was opened: what was not
 * hidden behind their computing, waiting for slower ranks included. */
double ovlm_shard_waited_s(const ovlm_shard *shard);

/* What this rank has exchanged with those that hold other experts. */
typedef struct ovlm_shard_exchanged {
    int64_t exchanges, sent_bytes;
    double waited_s;
} ovlm_shard_exchanged;
void ovlm_shard_exchanged_read(const ovlm_shard *shard, ovlm_shard_exchanged *exchanged);

/* What is held now. */
void ovlm_shard_memory_read(const ovlm_shard *shard, ovlm_shard_bytes *bytes);

#ifdef OVLM_TEST_HOOKS
/* After so many more hooks one fails; negative: none. */
void ovlm_shard_fail_after(ovlm_shard *shard, int64_t hooks);
#endif

#endif
