/* shard_plan.c - which rank holds what, and how much memory that is: from the list of parameters,
 * the modes and the rank alone. */
#include "engine/shard_state.h"

#include "model/hooks.h"

#include <string.h>

enum { CUT_ALIGN = 64, KEPT_ALIGN_BYTES = 64, STATE_ALIGN = 16 };

static int64_t round_up(int64_t value, int64_t unit)
{
    return (value + unit - 1) / unit * unit;
}

/* ---------------------------------------------------------------- ranges */

/* Whether a parameter is trained and in this piece; where it begins there, where its gradients
 * begin in the unit's. */
static bool trained_in(const ovlm_params *params, int64_t parameter, int64_t unit, bool adapters,
                       int64_t *first, int64_t *grad_first)
{
    const ovlm_param *p = &params->param[parameter];
    const ovlm_unit *u = &params->unit[unit];
    if (p->unit != unit || p->grad_offset < 0 || (p->kind == OVLM_PARAM_ADAPTER) != adapters) {
        return false;
    }
    *first = p->offset - (adapters ? u->adapter_offset : u->offset);
    *grad_first = p->grad_offset - u->grad_offset;
    return true;
}

/* Where gradients are cut when a piece is cut at element `cut`: before those of the first trained
 * element behind it. */
static int64_t grad_cut_of(const ovlm_params *params, int64_t unit, const shard_piece *piece,
                           int64_t cut)
{
    int64_t first = 0, grad_first = 0;
    for (int64_t i = 0; i < params->n; i++) {
        if (!trained_in(params, i, unit, piece->adapters, &first, &grad_first)) {
            continue;
        }
        const ovlm_param *p = &params->param[i];
        if (cut < first + p->rows * p->cols) {
            return grad_first + (cut > first ? cut - first : 0);
        }
    }
    return piece->grad_first + piece->grad_elements;
}

static ovlm_status cut_piece(ovlm_shard *shard, int64_t unit, shard_piece *piece, ovlm_err *err)
{
    int64_t n = piece->ways, blocks = round_up(piece->elements, CUT_ALIGN) / CUT_ALIGN;
    OVLM_TRY(OVLM_ARENA_NEW(&shard->arena, &piece->cut, n + 1, err));
    OVLM_TRY(OVLM_ARENA_NEW(&shard->arena, &piece->grad_cut, n + 1, err));
    OVLM_TRY(OVLM_ARENA_NEW(&shard->arena, &piece->gather_bytes, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(&shard->arena, &piece->gather_at, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(&shard->arena, &piece->reduce_count, n, err));
    for (int64_t r = 0; r <= n; r++) {
        int64_t cut = blocks * r / n * CUT_ALIGN;
        piece->cut[r] = r == n ? piece->elements : cut;
        piece->grad_cut[r] = grad_cut_of(shard->params, unit, piece, piece->cut[r]);
    }
    for (int64_t r = 0; r < n; r++) {
        piece->gather_at[r] = piece->cut[r] * shard_element(shard);
        piece->gather_bytes[r] = (piece->cut[r + 1] - piece->cut[r]) * shard_element(shard);
        piece->reduce_count[r] = piece->grad_cut[r + 1] - piece->grad_cut[r];
    }
    return OVLM_OK;
}

/* The unit's gradients lie as its parameters are listed: those of adapters behind the others. */
static int64_t adapters_grads_first(const ovlm_params *params, int64_t unit)
{
    int64_t first = 0, grad_first = 0;
    for (int64_t i = 0; i < params->n; i++) {
        if (trained_in(params, i, unit, true, &first, &grad_first)) {
            return grad_first;
        }
    }
    return params->unit[unit].grad_elements;
}

static ovlm_status add_piece(ovlm_shard *shard, int64_t unit, bool adapters, ovlm_err *err)
{
    const ovlm_unit *listed = shard_listed(shard, unit);
    shard_unit *u = &shard->unit[unit];
    int64_t elements = adapters ? listed->adapter_elements : listed->elements;
    if (elements == 0) {
        return OVLM_OK;
    }
    int64_t behind = adapters_grads_first(shard->params, unit);
    shard_piece *piece = &u->piece[u->pieces++];
    *piece = (shard_piece){.adapters = adapters, .elements = elements, .ways = 1,
                           .grad_first = adapters ? behind : 0,
                           .grad_elements = adapters ? listed->grad_elements - behind : behind};
    if (u->mode != OVLM_SHARD_DDP) {
        piece->ways = u->mode == OVLM_SHARD_HYBRID ? shard->node_size
                      : u->parted                  ? shard->ranks / shard->experts
                                                   : shard->ranks;
        piece->own = u->parted ? shard->rank / shard->experts : shard->rank % piece->ways;
    }
    return cut_piece(shard, unit, piece, err);
}

bool ovlm_shard_first(const ovlm_shard *shard, const shard_unit *unit)
{
    int64_t others = unit->mode == OVLM_SHARD_HYBRID ? shard->node_size
                     : unit->parted                  ? shard->experts
                                                     : 1;
    return shard->rank < others;
}

void ovlm_shard_kept(const shard_unit *unit, const shard_piece *piece, int64_t *first,
                     int64_t *count)
{
    *first = unit->sharded ? piece->cut[piece->own] : 0;
    *count = (unit->sharded ? piece->cut[piece->own + 1] : piece->elements) - *first;
}

void ovlm_shard_kept_grads(const shard_unit *unit, const shard_piece *piece, int64_t *first,
                           int64_t *count)
{
    *first = unit->sharded ? piece->grad_cut[piece->own] : piece->grad_first;
    *count = unit->sharded ? piece->reduce_count[piece->own] : piece->grad_elements;
}

/* Where the shard holds what.  Pieces of a replicated unit's gradients stay together. */
static void place_kept(ovlm_shard *shard, shard_unit *u)
{
    int64_t first = 0, count = 0;
    for (int64_t k = 0; k < u->pieces; k++) {
        shard_piece *piece = &u->piece[k];
        ovlm_shard_kept(u, piece, &first, &count);
        piece->kept_bytes = shard->kept_bytes;
        shard->kept_bytes += round_up(count * shard_element(shard), KEPT_ALIGN_BYTES);
        ovlm_shard_kept_grads(u, piece, &first, &count);
        piece->kept_grads = shard->kept_grads;
        shard->kept_grads += round_up(count, STATE_ALIGN);
        piece->state = shard->state_elements;
        shard->state_elements += round_up(piece->reduce_count[piece->own], STATE_ALIGN);
    }
}

/* ---------------------------------------------------------------- pools */

/* Dry: a free slot of about that size, one that is grown a little, or a new one. */
static shard_slot *slot_plan(shard_pool *pool, shard_slot *fit, shard_slot *largest, int64_t bytes)
{
    if (fit != NULL && (fit->bytes <= 2 * bytes || pool->n == SHARD_SLOTS_MOST)) {
        return fit;
    }
    if (largest != NULL && largest->bytes < bytes &&
        (bytes <= 2 * largest->bytes || pool->n == SHARD_SLOTS_MOST)) {
        largest->bytes = bytes;
        return largest;
    }
    shard_slot *made = &pool->slot[pool->n++];
    *made = (shard_slot){.bytes = bytes};
    return made;
}

shard_slot *ovlm_shard_slot_take(const ovlm_shard *shard, shard_pool *pool, int64_t bytes)
{
    shard_slot *fit = NULL, *largest = NULL;
    for (int64_t i = 0; i < pool->n; i++) {
        shard_slot *slot = &pool->slot[i];
        if (slot->used) {
            continue;
        }
        if (slot->bytes >= bytes && (fit == NULL || slot->bytes < fit->bytes)) {
            fit = slot;
        }
        if (largest == NULL || slot->bytes > largest->bytes) {
            largest = slot;
        }
    }
    if (shard->model == NULL) {
        fit = slot_plan(pool, fit, largest, bytes);
    }
    if (fit != NULL) {
        fit->used = true;
    }
    return fit;
}

int64_t ovlm_shard_pool_bytes(const shard_pool *pool)
{
    int64_t bytes = 0;
    for (int64_t i = 0; i < pool->n; i++) {
        bytes += pool->slot[i].bytes;
    }
    return bytes;
}

int64_t ovlm_shard_unit_bytes(const ovlm_shard *shard, int64_t unit)
{
    const ovlm_unit *u = shard_listed(shard, unit);
    return (u->elements + u->adapter_elements) * shard_element(shard);
}

int64_t ovlm_shard_unit_grad_bytes(const ovlm_shard *shard, int64_t unit)
{
    return shard_listed(shard, unit)->grad_elements * shard_exact_element(shard);
}

/* Passes of these phases, forward and backward. */
static void rehearse_phases(ovlm_shard *shard, unsigned phases)
{
    ovlm_pass_kind kind = {.phases = phases};
    ovlm_shard_rehearse(shard, &kind);
    kind.backward = true;
    if ((phases & OVLM_PHASE_HEAD) && !(phases & OVLM_PHASE_DECODE)) {
        return; /* logits: their backward is a decode's */
    }
    ovlm_shard_rehearse(shard, &kind);
    kind.features = true;
    ovlm_shard_rehearse(shard, &kind);
}

/* Slots for every kind of pass: rehearsed until none of them needs more. */
static void size_pools(ovlm_shard *shard)
{
    const ovlm_model_config *c = &shard->params->config;
    unsigned present = OVLM_PHASE_DECODE | OVLM_PHASE_HEAD;
    present |= c->vision.depth > 0 ? 1u << OVLM_VISION : 0u;
    present |= c->audio.depth > 0 ? 1u << OVLM_AUDIO : 0u;
    int64_t before = -1, bytes = 0;
    while (bytes != before) {
        before = bytes;
        for (unsigned phases = 1; phases < 2 * OVLM_PHASE_HEAD; phases++) {
            if ((phases & present) == phases) {
                rehearse_phases(shard, phases);
            }
        }
        bytes = ovlm_shard_pool_bytes(&shard->weight_pool) +
                ovlm_shard_pool_bytes(&shard->grad_pool);
    }
    (void)!ovlm_shard_settle(shard, NULL); /* of the last rehearsal */
}

/* ---------------------------------------------------------------- plan */

static ovlm_status check_experts(const ovlm_params *params, const ovlm_shard_spec *spec,
                                 int64_t ranks, ovlm_err *err)
{
    int64_t experts = params->config.decoder.experts;
    if (spec->experts < 0 || (spec->experts > 1 && ranks % spec->experts != 0)) {
        return OVLM_FAIL(err, OVLM_E_ARG, "experts must divide the %lld ranks; got %lld",
                         (long long)ranks, (long long)spec->experts);
    }
    if (spec->experts > 1 && spec->experts > experts) {
        return OVLM_FAIL(err, OVLM_E_ARG, "experts: %lld ranks cannot share the model's %lld "
                         "experts; use at most as many", (long long)spec->experts,
                         (long long)experts);
    }
    if (spec->experts > 1 && params->loras > 0) {
        return OVLM_FAIL(err, OVLM_E_ARG, "experts: a model with adapters trains no experts; use 1 "
                                          "with it");
    }
    return OVLM_OK;
}

ovlm_status ovlm_shard_spec_check(const ovlm_params *params, const ovlm_shard_spec *spec,
                                  int64_t ranks, ovlm_err *err)
{
    OVLM_TRY(check_experts(params, spec, ranks, err));
    for (int64_t i = 0; i < params->units; i++) {
        if ((int)spec->mode[i] < 0 || spec->mode[i] >= OVLM_SHARD_MODES) {
            return OVLM_FAIL(err, OVLM_E_ARG, "mode[%lld], of %s, must be ddp, zero1, fsdp or "
                             "hybrid; got number %d", (long long)i, params->unit[i].name,
                             (int)spec->mode[i]);
        }
        if (spec->mode[i] == OVLM_SHARD_HYBRID && spec->experts > 1 &&
            params->unit[i].kind == OVLM_UNIT_EXPERTS) {
            return OVLM_FAIL(err, OVLM_E_ARG, "%s is hybrid: experts over %lld ranks are ddp, "
                             "zero1 or fsdp over those that hold the same", params->unit[i].name,
                             (long long)spec->experts);
        }
        if (spec->mode[i] == OVLM_SHARD_HYBRID &&
            (spec->node_size < 1 || ranks % spec->node_size != 0)) {
            return OVLM_FAIL(err, OVLM_E_ARG, "node_size must divide the %lld ranks, for %s is "
                             "hybrid; got %lld", (long long)ranks, params->unit[i].name,
                             (long long)spec->node_size);
        }
    }
    return OVLM_OK;
}

ovlm_status ovlm_shard_plan(ovlm_shard *shard, const ovlm_params *params,
                            const ovlm_shard_spec *spec, int64_t ranks, int64_t rank,
                            ovlm_err *err)
{
    shard->params = params;
    shard->ranks = ranks;
    shard->rank = rank;
    shard->scattering = shard->fail_after = -1;
    shard->node_size = spec->node_size;
    shard->experts = spec->experts > 1 ? spec->experts : 1;
    shard->grad_elements = params->grad_elements;
    shard->weight_elements = params->weight_elements;
    shard->adapter_elements = params->adapter_elements;
    shard->holds_state = shard->experts > 1; /* norms are of more than one rank has */
    OVLM_TRY(OVLM_ARENA_NEW(&shard->arena, &shard->unit, params->units, err));
    OVLM_TRY(OVLM_ARENA_NEW(&shard->arena, &shard->order, 2 * params->units, err));
    for (int64_t i = 0; i < params->units; i++) {
        shard->unit[i].mode = spec->mode[i];
        shard->unit[i].sharded = spec->mode[i] >= OVLM_SHARD_FSDP;
        shard->unit[i].parted = shard->experts > 1 && params->unit[i].kind == OVLM_UNIT_EXPERTS;
        shard->holds = shard->holds || shard->unit[i].sharded;
        shard->holds_state = shard->holds_state || spec->mode[i] != OVLM_SHARD_DDP;
        OVLM_TRY(add_piece(shard, i, false, err));
        OVLM_TRY(add_piece(shard, i, true, err));
        place_kept(shard, &shard->unit[i]);
    }
    if (shard->holds) {
        size_pools(shard);
    }
    return OVLM_OK;
}

static void predict(const ovlm_shard *shard, ovlm_shard_bytes *bytes)
{
    const ovlm_params *p = shard->params;
    int64_t exact = shard_exact_element(shard);
    int64_t own = (p->weight_elements + p->adapter_elements) * shard_element(shard);
    int64_t grads = shard->holds ? shard->kept_grads : p->grad_elements;
    int64_t state = shard->holds_state ? shard->state_elements : p->grad_elements;
    *bytes = (ovlm_shard_bytes){
        .weights_bytes = p->buffer_elements * exact + (shard->holds ? shard->kept_bytes : own),
        .training_bytes = (grads + shard_planes(shard) * state) * exact,
        .buffers_bytes = ovlm_shard_pool_bytes(&shard->weight_pool) +
                         ovlm_shard_pool_bytes(&shard->grad_pool)};
}

/* The list as the rank has it, whichever experts those of `params` are. */
static ovlm_status held_list(const ovlm_params *params, int64_t experts, int64_t rank,
                             ovlm_arena *arena, ovlm_params *held, ovlm_err *err)
{
    int64_t E = params->config.decoder.experts;
    *held = *params;
    if (experts <= 1) {
        return OVLM_OK;
    }
    OVLM_TRY(OVLM_ARENA_NEW(arena, &held->param, params->n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &held->unit, params->units, err));
    memcpy(held->param, params->param, (size_t)params->n * sizeof *held->param);
    memcpy(held->unit, params->unit, (size_t)params->units * sizeof *held->unit);
    int64_t first = ovlm_expert_cut(E, experts, rank % experts);
    ovlm_params_hold_experts(held, first, ovlm_expert_cut(E, experts, rank % experts + 1) - first);
    return OVLM_OK;
}

ovlm_status ovlm_shard_memory(const ovlm_params *params, const ovlm_shard_spec *spec,
                              int64_t ranks, int64_t rank, ovlm_shard_bytes *bytes, ovlm_err *err)
{
    ovlm_shard shard = {0};
    ovlm_params held;
    ovlm_status status = OVLM_OK;
    OVLM_GOTO(done, ovlm_shard_spec_check(params, spec, ranks, err));
    OVLM_GOTO(done, held_list(params, spec->experts, rank, &shard.arena, &held, err));
    OVLM_GOTO(done, ovlm_shard_plan(&shard, &held, spec, ranks, rank, err));
    predict(&shard, bytes);
done:
    ovlm_arena_free(&shard.arena);
    return status;
}
