/* shard_hooks.c - what happens around a unit in a pass.
 *
 *   forward    acquire(u): wait for u's weights; start the next unit's      release(u): forget them
 *   backward   the same, and acquire gives gradients of zero to add to
 *              reduce(u): add what came of the unit before; start to sum u's
 *
 * So at most one unit is gathered ahead, and one is summed behind.  The same functions rehearse
 * passes without a model, to find how much memory that takes. */
#include "engine/shard_state.h"

#include "model/hooks.h"

void ovlm_shard_place(ovlm_shard *shard, int64_t unit)
{
    const shard_unit *u = &shard->unit[unit];
    ovlm_unit_memory at = {0};
    int64_t first = 0, count = 0;
    if (shard->model == NULL || !shard->holds) {
        return;
    }
    for (int64_t k = 0; k < u->pieces; k++) {
        const shard_piece *piece = &u->piece[k];
        void **to = piece->adapters ? &at.adapters : &at.weights;
        if (!u->sharded) {
            *to = ovlm_shard_weight_at(shard, unit, piece, 0);
        } else if (u->weights != NULL) {
            *to = (char *)u->weights->data + (k == 0 ? 0 : u->piece[0].elements) *
                                                 shard_element(shard);
        }
    }
    if (u->sharded) {
        at.grads = u->grads == NULL ? NULL : u->grads->data;
    } else if (u->pieces > 0) {
        ovlm_shard_kept_grads(u, &u->piece[0], &first, &count);
        at.grads = ovlm_shard_grad_at(shard, unit, &u->piece[0], first);
    }
    ovlm_model_place(shard->model, unit, &at);
}

/* ---------------------------------------------------------------- trouble */

/* A hook that a test wants to fail. */
static ovlm_status note(ovlm_shard *shard, ovlm_err *err)
{
    if (shard->fail_after == 0) {
        return OVLM_FAIL(err, OVLM_E_INTERNAL, "a hook fails because a test says so");
    }
    shard->fail_after -= shard->fail_after > 0;
    return OVLM_OK;
}

static ovlm_status check_list(const ovlm_shard *shard, ovlm_err *err)
{
    const ovlm_params *p = shard->params;
    if (p->grad_elements != shard->grad_elements || p->weight_elements != shard->weight_elements ||
        p->adapter_elements != shard->adapter_elements) {
        return OVLM_FAIL(err, OVLM_E_ARG, "what is trained or adapted has changed since the model "
                                          "was sharded; settle it before");
    }
    return OVLM_OK;
}

/* ---------------------------------------------------------------- acquire */

/* Whether the unit at this place of the order is acquired for its weights.  In a backward the
 * embedding and the patches only take gradients; a tied head comes first. */
static bool reads_weights(const ovlm_shard *shard, int64_t place)
{
    ovlm_unit_kind kind = shard_listed(shard, shard->order[place])->kind;
    return !shard->backward || place == 0 ||
           (kind != OVLM_UNIT_EMBED && kind != OVLM_UNIT_PATCHES);
}

/* Starts to gather the next sharded unit from a place of the order on. */
static ovlm_status prefetch(ovlm_shard *shard, int64_t place, ovlm_err *err)
{
    while (place < shard->order_n && !(shard->unit[shard->order[place]].sharded &&
                                       reads_weights(shard, place))) {
        place++;
    }
    if (place == shard->order_n || shard->unit[shard->order[place]].weights != NULL) {
        return OVLM_OK;
    }
    return ovlm_shard_gather_start(shard, shard->order[place], err);
}

static ovlm_status hook_begin(void *ctx, const ovlm_pass_kind *kind, ovlm_err *err)
{
    ovlm_shard *shard = ctx;
    OVLM_TRY(note(shard, err));
    OVLM_TRY(check_list(shard, err));
    if (kind->backward && shard->spoiled) {
        return OVLM_FAIL(err, OVLM_E_ARG, "a backward failed, so that gradients are void; set them "
                                          "to zero before the next one");
    }
    shard->order_n = ovlm_unit_order(shard->params, kind, shard->order);
    shard->at = 0;
    shard->backward = kind->backward;
    OVLM_TRY(ovlm_shard_settle(shard, err));
    /* In a backward the first unit may be a head whose weights were read in the forward. */
    return kind->backward ? OVLM_OK : prefetch(shard, 0, err);
}

/* Zeros to add gradients to. */
static ovlm_status open_grads(ovlm_shard *shard, int64_t unit, ovlm_err *err)
{
    shard_unit *u = &shard->unit[unit];
    int64_t bytes = ovlm_shard_unit_grad_bytes(shard, unit);
    u->grads = ovlm_shard_slot_take(shard, &shard->grad_pool, bytes);
    if (u->grads == NULL) {
        return OVLM_FAIL(err, OVLM_E_INTERNAL, "no buffer for the gradients of %s",
                         shard_listed(shard, unit)->name);
    }
    if (shard->model == NULL) {
        return OVLM_OK;
    }
    return ovlm_model_backend(shard->model)->ops->fill(ovlm_model_queue(shard->model),
                                                       u->grads->data, 0, bytes, err);
}

static ovlm_status hook_acquire(void *ctx, int64_t unit, ovlm_unit_use use, ovlm_err *err)
{
    ovlm_shard *shard = ctx;
    shard_unit *u = &shard->unit[unit];
    bool adds = use != OVLM_USE_FORWARD && ovlm_unit_trained(shard->params, unit);
    OVLM_TRY(note(shard, err));
    if (adds && u->sum != SHARD_OPEN) {
        return OVLM_FAIL(err, OVLM_E_ARG, "gradients of %s are summed over the ranks already: say "
                         "which backward is the last one before that one alone, and set gradients "
                         "to zero after the step", shard_listed(shard, unit)->name);
    }
    if (u->sharded && use != OVLM_USE_GRADIENTS) {
        if (u->weights == NULL) {
            OVLM_TRY(ovlm_shard_gather_start(shard, unit, err));
        }
        OVLM_TRY(ovlm_shard_gather_wait(shard, unit, err));
    }
    OVLM_TRY(prefetch(shard, ++shard->at, err));
    if (adds && u->sharded && u->grads == NULL) {
        OVLM_TRY(open_grads(shard, unit, err));
    }
    if (u->sharded) {
        ovlm_shard_place(shard, unit);
    }
    return OVLM_OK;
}

/* ---------------------------------------------------------------- release */

/* In tests what was given back cannot be taken for weights. */
static ovlm_status poison(ovlm_shard *shard, const shard_slot *slot, ovlm_err *err)
{
#ifdef OVLM_TEST_HOOKS
    if (shard->model != NULL) {
        return ovlm_model_backend(shard->model)->ops->fill(ovlm_model_queue(shard->model),
                                                           slot->data, 0xff, slot->bytes, err);
    }
#endif
    (void)shard;
    (void)slot;
    (void)err;
    return OVLM_OK;
}

static ovlm_status hook_release(void *ctx, int64_t unit, ovlm_unit_use use, ovlm_err *err)
{
    ovlm_shard *shard = ctx;
    shard_unit *u = &shard->unit[unit];
    ovlm_status status = OVLM_OK;
    if (u->weights != NULL && use != OVLM_USE_GRADIENTS) {
        status = poison(shard, u->weights, err);
        u->weights->used = false;
        u->weights = NULL;
        ovlm_shard_place(shard, unit);
    }
    return status == OVLM_OK ? note(shard, err) : status;
}

static ovlm_status hook_reduce(void *ctx, int64_t unit, ovlm_err *err)
{
    ovlm_shard *shard = ctx;
    OVLM_TRY(note(shard, err));
    if (!shard->unit[unit].sharded) {
        return shard->last ? ovlm_shard_sum_start(shard, unit, err) : OVLM_OK;
    }
    OVLM_TRY(ovlm_shard_settle(shard, err));
    OVLM_TRY(ovlm_shard_scatter_start(shard, unit, err));
    const ovlm_unit_memory nowhere = {0};
    if (shard->model != NULL) { /* weights were released before */
        ovlm_model_place(shard->model, unit, &nowhere);
    }
    return OVLM_OK;
}

/* What was gathered for nothing, or is still being summed, of a pass that failed.  Other ranks take
 * part in all that this one started, or fail. */
static void drop(ovlm_shard *shard)
{
    for (int64_t i = 0; i < shard->params->units; i++) {
        shard_unit *u = &shard->unit[i];
        if (u->gathering) {
            (void)!ovlm_shard_gather_wait(shard, i, NULL);
        }
        if (u->weights != NULL) {
            u->weights->used = false;
        }
        u->weights = NULL;
    }
    (void)!ovlm_shard_settle(shard, NULL);
    for (int64_t i = 0; i < shard->params->units; i++) {
        shard_unit *u = &shard->unit[i];
        if (u->grads != NULL) {
            u->grads->used = false;
        }
        u->grads = NULL;
        ovlm_shard_place(shard, i);
    }
    shard->scattering = -1;
}

static void hook_end(void *ctx, bool failed)
{
    ovlm_shard *shard = ctx;
    if (failed) {
        shard->spoiled = shard->spoiled || shard->backward;
        drop(shard);
    }
}

ovlm_model_hooks ovlm_shard_hooks(ovlm_shard *shard)
{
    return (ovlm_model_hooks){.ctx = shard, .weights = shard->holds, .grads = shard->holds,
                              .begin = hook_begin, .acquire = hook_acquire,
                              .release = hook_release, .reduce = hook_reduce, .end = hook_end};
}

/* ---------------------------------------------------------------- rehearsal */

/* The use of the unit at a place of the order; a fused head left its weights' gradients behind. */
static ovlm_unit_use use_at(const ovlm_shard *shard, const ovlm_pass_kind *kind, int64_t place,
                            bool fused)
{
    if (!kind->backward) {
        return OVLM_USE_FORWARD;
    }
    bool head = place == 0 && (kind->phases & OVLM_PHASE_HEAD);
    return (head && fused) || !reads_weights(shard, place) ? OVLM_USE_GRADIENTS
                                                           : OVLM_USE_BACKWARD;
}

static void leave(ovlm_shard *shard, int64_t unit, ovlm_unit_use use, bool open)
{
    (void)hook_release(shard, unit, use, NULL);
    if (use != OVLM_USE_FORWARD && !open && ovlm_unit_trained(shard->params, unit)) {
        (void)hook_reduce(shard, unit, NULL);
    }
}

static void rehearse(ovlm_shard *shard, const ovlm_pass_kind *kind, bool fused)
{
    const ovlm_params *p = shard->params;
    (void)hook_begin(shard, kind, NULL);
    for (int64_t i = 0; i < shard->order_n; i++) {
        int64_t unit = shard->order[i];
        ovlm_unit_use use = use_at(shard, kind, i, fused);
        bool open = i == 0 && (kind->phases & OVLM_PHASE_HEAD) && p->config.decoder.tied;
        (void)hook_acquire(shard, unit, use, NULL);
        if (i + 1 < shard->order_n && p->unit[shard->order[i + 1]].kind == OVLM_UNIT_EXPERTS) {
            int64_t experts = shard->order[++i];
            (void)hook_acquire(shard, experts, use, NULL);
            leave(shard, experts, use, false);
        }
        leave(shard, unit, use, open);
    }
    hook_end(shard, false);
}

void ovlm_shard_rehearse(ovlm_shard *shard, const ovlm_pass_kind *kind)
{
    rehearse(shard, kind, false);
    if (kind->backward && (kind->phases & OVLM_PHASE_HEAD)) {
        rehearse(shard, kind, true);
    }
}

#ifdef OVLM_TEST_HOOKS
void ovlm_shard_fail_after(ovlm_shard *shard, int64_t hooks)
{
    shard->fail_after = hooks;
}
#endif
