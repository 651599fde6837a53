/* hooks.h - where weights are while a model computes, and where gradients go: one unit of
 * parameters (params.h) at a time.
 *
 *   begin   acquire  operations that read a unit's weights or add to its gradients
 *           release  reduce, when nothing more is added          ...   end
 *
 * Without hooks all of it is one comparison.  With them a model needs no memory for all weights or
 * all gradients: whoever fills the hooks gathers a unit's weights at acquire, gives the model their
 * place (ovlm_model_place), and takes them back at release.
 *
 * Promises, for every pass:
 *   - Weights are read between acquire and release only, gradients written from the first acquire
 *     of a backward to reduce; nowhere else.  A layer's experts are acquired and released inside
 *     the layer; nothing else is nested.
 *   - The order of units follows from the configuration, from what is trained and adapted, and from
 *     the kind of pass (ovlm_unit_order), never from how much there is to do: T = 0 tokens, no
 *     images, no sounds, segments without tokens run the same hooks as any others.
 *   - Recomputation by checkpointing is part of the backward: its units are acquired once.
 *   - What a backward acquires is reduced once in it, if anything of it is trained; a tied
 *     embedding, which the head acquires as well, behind both.
 *   - Whatever ends a pass, all that was acquired is released (in reverse), and `end` follows.
 *
 * Hooks run on the caller's thread while work is put on the model's queue, not when it is done:
 * what a hook does to memory must be in that queue's order, or wait for it. */
#ifndef OVLM_MODEL_HOOKS_H
#define OVLM_MODEL_HOOKS_H

#include "model/params.h"
#include "model/run.h"

typedef enum ovlm_modality { OVLM_VISION, OVLM_AUDIO, OVLM_MODALITIES } ovlm_modality;

/* Phases of a pass: 1 << OVLM_VISION, 1 << OVLM_AUDIO, and these. */
enum {
    OVLM_PHASE_DECODE = 1 << OVLM_MODALITIES,
    OVLM_PHASE_HEAD = 2 << OVLM_MODALITIES /* logits, or the loss */
};

/* What a pass does.  Ranks that match run passes of the same kinds in the same order. */
typedef struct ovlm_pass_kind {
    unsigned phases;  /* backward: only where something is done: not in a tower that is frozen,
                         nor in a frozen head under which nothing is trained or whose loss came
                         with its slope in the forward                                        */
    bool backward;
    bool features;    /* backward of a decode: gradients of features are wanted               */
} ovlm_pass_kind;

typedef enum ovlm_unit_use {
    OVLM_USE_FORWARD,   /* weights are read                                                   */
    OVLM_USE_BACKWARD,  /* weights are read, gradients of what is trained added to            */
    OVLM_USE_GRADIENTS  /* gradients are added to, weights not read                           */
} ovlm_unit_use;

typedef struct ovlm_model_hooks {
    void *ctx;
    /* Weights with adapters, and gradients, are held by the hooks: the model has no memory for
     * them, and units are where ovlm_model_place says. */
    bool weights, grads;
    ovlm_status (*begin)(void *ctx, const ovlm_pass_kind *kind, ovlm_err *err);
    ovlm_status (*acquire)(void *ctx, int64_t unit, ovlm_unit_use use, ovlm_err *err);
    ovlm_status (*release)(void *ctx, int64_t unit, ovlm_unit_use use, ovlm_err *err);
    ovlm_status (*reduce)(void *ctx, int64_t unit, ovlm_err *err);
    /* After every begin that succeeded.  failed: gradients of a backward are void until zeroed,
     * those of units that were not reduced too. */
    void (*end)(void *ctx, bool failed);
} ovlm_model_hooks;

/* Units in the order in which a pass of this kind acquires them, some of them twice, into
 * order[2 * params->units] (or NULL); how many. */
int64_t ovlm_unit_order(const ovlm_params *params, const ovlm_pass_kind *kind, int64_t *order);

/* ------------------------------------------------------------ for the passes */

enum { OVLM_HELD_MOST = 2 }; /* a layer and its experts */

/* A pass among hooks: run->visit. */
typedef struct ovlm_visit {
    ovlm_model_hooks hooks;
    const ovlm_params *params;
    int64_t held;
    int64_t unit[OVLM_HELD_MOST];
    ovlm_unit_use use[OVLM_HELD_MOST];
} ovlm_visit;

OVLM_NODISCARD ovlm_status ovlm_visit_begin(const ovlm_run *run, const ovlm_pass_kind *kind);
OVLM_NODISCARD ovlm_status ovlm_visit_enter(const ovlm_run *run, int64_t unit, ovlm_unit_use use);
OVLM_NODISCARD ovlm_status ovlm_visit_leave(const ovlm_run *run, bool reduce);
OVLM_NODISCARD ovlm_status ovlm_visit_end(const ovlm_run *run, ovlm_status status);

static inline bool ovlm_run_visits(const ovlm_run *run)
{
    return run->visit != NULL && !run->measuring;
}

static inline ovlm_status ovlm_pass_begin(const ovlm_run *run, const ovlm_pass_kind *kind)
{
    return ovlm_run_visits(run) ? ovlm_visit_begin(run, kind) : OVLM_OK;
}

/* Before the first operation that uses the unit. */
static inline ovlm_status ovlm_unit_enter(const ovlm_run *run, int64_t unit, ovlm_unit_use use)
{
    return ovlm_run_visits(run) ? ovlm_visit_enter(run, unit, use) : OVLM_OK;
}

/* After the last one: of the unit that was entered last. */
static inline ovlm_status ovlm_unit_leave(const ovlm_run *run)
{
    return ovlm_run_visits(run) ? ovlm_visit_leave(run, true) : OVLM_OK;
}

/* The same where the pass comes back to the unit and adds to its gradients again. */
static inline ovlm_status ovlm_unit_leave_open(const ovlm_run *run)
{
    return ovlm_run_visits(run) ? ovlm_visit_leave(run, false) : OVLM_OK;
}

/* Ends a pass that gave `status`; returns it. */
static inline ovlm_status ovlm_pass_end(const ovlm_run *run, ovlm_status status)
{
    return ovlm_run_visits(run) ? ovlm_visit_end(run, status) : status;
}

#endif
