/* shard.c - a shard's life: opened over a model that has weights, undone, closed. */
#include "engine/shard_state.h"

#include "model/hooks.h"

#include <stdlib.h>

ovlm_status ovlm_shard_block_new(ovlm_shard *shard, shard_block *block, int64_t bytes, bool zero,
                                 ovlm_err *err)
{
    ovlm_backend *backend = ovlm_model_backend(shard->model);
    if (bytes == 0 || block->data != NULL) {
        return OVLM_OK;
    }
    OVLM_TRY(backend->ops->alloc(backend, bytes, &block->data, err));
    block->bytes = bytes;
    return zero ? backend->ops->fill(ovlm_model_queue(shard->model), block->data, 0, bytes, err)
                : OVLM_OK;
}

static void block_free(ovlm_shard *shard, shard_block *block)
{
    ovlm_backend *backend = ovlm_model_backend(shard->model);
    if (block->data != NULL) {
        backend->ops->free(backend, block->data);
    }
    *block = (shard_block){0};
}

/* ---------------------------------------------------------------- ranks */

enum { FIXED_WORDS = 7 };

/* FNV-1a over what ranks must agree on; experts are still on all of them. */
static int64_t fingerprint(const ovlm_params *p, const ovlm_shard_spec *spec)
{
    uint64_t hash = 0xcbf29ce484222325u;
    const int64_t fixed[FIXED_WORDS] = {p->units, p->weight_elements, p->adapter_elements,
                                        p->grad_elements, (int64_t)p->dtype, spec->node_size,
                                        spec->experts > 1 ? spec->experts : 1};
    for (int64_t i = 0; i < FIXED_WORDS + p->units; i++) {
        int64_t at = i - FIXED_WORDS;
        int64_t word = at < 0 ? fixed[i] : p->unit[at].grad_elements * OVLM_SHARD_MODES +
                                               (int64_t)spec->mode[at];
        hash = (hash ^ (uint64_t)word) * 0x100000001b3u;
    }
    return (int64_t)(hash >> 1);
}

static ovlm_status check_agreement(ovlm_shard *shard, const ovlm_params *params,
                                   const ovlm_shard_spec *spec, ovlm_err *err)
{
    int64_t mine = fingerprint(params, spec), least = 0, most = 0;
    ovlm_all_reduce args = {.send = &mine, .recv = &least, .n = 1, .dtype = OVLM_I64,
                            .reduce = OVLM_MIN};
    OVLM_TRY(ovlm_comm_all_reduce(shard->world, &args, err));
    args.recv = &most;
    args.reduce = OVLM_MAX;
    OVLM_TRY(ovlm_comm_all_reduce(shard->world, &args, err));
    if (least != most) {
        return OVLM_FAIL(err, OVLM_E_ARG, "ranks disagree on the model, on what is trained or on "
                                          "how it is sharded; give all of them the same");
    }
    return OVLM_OK;
}

/* Communicators of the shard's own: what is prefetched does not wait for sums. */
static ovlm_status open_comms(ovlm_shard *shard, ovlm_comm *comm, ovlm_err *err)
{
    bool hybrid = false;
    for (int64_t i = 0; i < shard->params->units; i++) {
        hybrid = hybrid || shard->unit[i].mode == OVLM_SHARD_HYBRID;
    }
    if (shard->holds_state) {
        OVLM_TRY(ovlm_comm_dup(comm, &shard->gather, err));
    }
    if (hybrid) {
        int64_t node = shard->rank / shard->node_size, place = shard->rank % shard->node_size;
        OVLM_TRY(ovlm_comm_split(comm, node, place, &shard->node, err));
        OVLM_TRY(ovlm_comm_dup(shard->node, &shard->node_gather, err));
        OVLM_TRY(ovlm_comm_split(comm, place, node, &shard->across, err));
    }
    return OVLM_OK;
}

/* Experts to the ranks that are to hold them, for the model's passes too. */
static ovlm_status part_experts(ovlm_shard *shard, ovlm_model *model, ovlm_comm *comm,
                                int64_t experts, ovlm_err *err)
{
    int64_t rank = ovlm_comm_rank(comm), group = rank / experts, place = rank % experts;
    OVLM_TRY(ovlm_comm_split(comm, group, place, &shard->party, err));
    OVLM_TRY(ovlm_comm_split(comm, place, group, &shard->twins, err));
    OVLM_TRY(ovlm_comm_dup(shard->twins, &shard->twins_gather, err));
    OVLM_TRY(ovlm_expert_ranks_init(&shard->expert_ranks, shard->party, &shard->arena, err));
    return ovlm_model_spread_experts(model, &shard->expert_ranks.table, err);
}

/* Ends what is started, so that memory may go. */
static void close_comms(ovlm_shard *shard)
{
    ovlm_comm **comms[] = {&shard->world, &shard->gather, &shard->node, &shard->node_gather,
                           &shard->across, &shard->party, &shard->twins, &shard->twins_gather};
    for (size_t i = 0; i < sizeof comms / sizeof *comms; i++) {
        ovlm_comm_close(*comms[i]);
        *comms[i] = NULL;
    }
}

/* ---------------------------------------------------------------- memory */

static ovlm_status open_pool(ovlm_shard *shard, shard_pool *pool, ovlm_err *err)
{
    ovlm_backend *backend = ovlm_model_backend(shard->model);
    for (int64_t i = 0; i < pool->n; i++) {
        shard_slot *slot = &pool->slot[i];
        OVLM_TRY(backend->ops->alloc(backend, slot->bytes, &slot->data, err));
    }
    return OVLM_OK;
}

static void close_pool(ovlm_shard *shard, shard_pool *pool)
{
    ovlm_backend *backend = ovlm_model_backend(shard->model);
    for (int64_t i = 0; i < pool->n; i++) {
        if (pool->slot[i].data != NULL) {
            backend->ops->free(backend, pool->slot[i].data);
        }
    }
    *pool = (shard_pool){0};
}

/* Host memory for the largest unit, where communicators cannot reach the device's. */
static ovlm_status open_stage(ovlm_shard *shard, ovlm_err *err)
{
    ovlm_backend *backend = ovlm_model_backend(shard->model);
    int64_t bytes = 1;
    shard->staged = !backend->host_memory;
    for (int64_t i = 0; i < shard->params->units && shard->staged; i++) {
        int64_t weights = ovlm_shard_unit_bytes(shard, i);
        int64_t grads = ovlm_shard_unit_grad_bytes(shard, i);
        bytes = weights > bytes ? weights : bytes;
        bytes = grads > bytes ? grads : bytes;
    }
    if (!shard->staged) {
        return OVLM_OK;
    }
    OVLM_TRY(backend->ops->host_alloc(backend, bytes, &shard->stage.data, err));
    shard->stage.bytes = bytes;
    return OVLM_OK;
}

/* Scratch for what hooks add up. */
static ovlm_status open_work(ovlm_shard *shard, ovlm_err *err)
{
    ovlm_backend *backend = ovlm_model_backend(shard->model);
    int64_t most = 0;
    for (int64_t i = 0; i < shard->params->units; i++) {
        for (int64_t k = 0; k < shard->unit[i].pieces; k++) {
            const shard_piece *piece = &shard->unit[i].piece[k];
            int64_t n = piece->reduce_count[piece->own];
            most = n > most ? n : most;
        }
    }
    ovlm_tensor row = ovlm_tensor_of(NULL, 1, most, shard->params->exact);
    const ovlm_scale add = {.alpha = 1, .beta = 1, .x = row, .y = row};
    ovlm_op_bytes need = {0};
    OVLM_TRY(backend->ops->scale.measure(backend, &add, &need, err));
    return ovlm_stack_fit(&shard->work, backend, OVLM_STACK_DEVICE, need.fwd_work, err);
}

/* What the shard holds of the model's weights. */
static ovlm_status take_weights(ovlm_shard *shard, int64_t unit, ovlm_err *err)
{
    const shard_unit *u = &shard->unit[unit];
    const ovlm_unit_memory *from = &shard_listed(shard, unit)->at;
    for (int64_t k = 0; k < u->pieces; k++) {
        const shard_piece *piece = &u->piece[k];
        int64_t first = 0, count = 0, element = shard_element(shard);
        ovlm_shard_kept(u, piece, &first, &count);
        const char *whole = piece->adapters ? from->adapters : from->weights;
        if (count > 0) {
            OVLM_TRY(ovlm_model_backend(shard->model)->ops->copy(
                ovlm_model_queue(shard->model), ovlm_shard_weight_at(shard, unit, piece, first),
                whole + first * element, count * element, OVLM_ON_DEVICE, err));
        }
    }
    return OVLM_OK;
}

static ovlm_status open_memory(ovlm_shard *shard, ovlm_err *err)
{
    OVLM_TRY(open_stage(shard, err));
    OVLM_TRY(open_work(shard, err));
    OVLM_TRY(ovlm_shard_block_new(shard, &shard->stats, (int64_t)sizeof(ovlm_grad_stats), true,
                                  err));
    if (!shard->holds) {
        return OVLM_OK;
    }
    OVLM_TRY(open_pool(shard, &shard->weight_pool, err));
    OVLM_TRY(open_pool(shard, &shard->grad_pool, err));
    OVLM_TRY(ovlm_shard_block_new(shard, &shard->weights, shard->kept_bytes, true, err));
    OVLM_TRY(ovlm_shard_block_new(shard, &shard->grads,
                                  shard->kept_grads * shard_exact_element(shard), true, err));
    for (int64_t i = 0; i < shard->params->units; i++) {
        OVLM_TRY(take_weights(shard, i, err));
    }
    return OVLM_OK;
}

static void close_memory(ovlm_shard *shard)
{
    ovlm_backend *backend = ovlm_model_backend(shard->model);
    shard_block *blocks[] = {&shard->weights, &shard->grads, &shard->state, &shard->stats};
    (void)!ovlm_model_wait(shard->model, NULL); /* the queue may still use it */
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) {
        block_free(shard, blocks[i]);
    }
    close_pool(shard, &shard->weight_pool);
    close_pool(shard, &shard->grad_pool);
    ovlm_stack_free(&shard->work, backend, OVLM_STACK_DEVICE);
    if (shard->stage.data != NULL) {
        backend->ops->host_free(backend, shard->stage.data);
    }
    shard->stage = (shard_block){0};
}

/* ---------------------------------------------------------------- life */

static void release(ovlm_shard *shard)
{
    close_comms(shard);
    if (shard->model != NULL) {
        close_memory(shard);
    }
    ovlm_arena_free(&shard->arena);
    free(shard);
}

static ovlm_status open_shard(ovlm_shard *shard, ovlm_model *model, ovlm_comm *comm,
                              const ovlm_shard_spec *spec, ovlm_err *err)
{
    const ovlm_params *params = ovlm_model_params(model);
    for (int64_t i = 0; i < params->units; i++) {
        if (params->unit[i].at.weights == NULL) {
            return OVLM_FAIL(err, OVLM_E_ARG, "the model has no weights of its own: it is sharded "
                                              "already");
        }
    }
    OVLM_TRY(ovlm_shard_spec_check(params, spec, ovlm_comm_size(comm), err));
    OVLM_TRY(ovlm_comm_dup(comm, &shard->world, err));
    OVLM_TRY(check_agreement(shard, params, spec, err));
    if (spec->experts > 1) {
        OVLM_TRY(part_experts(shard, model, comm, spec->experts, err));
    }
    OVLM_TRY(ovlm_shard_plan(shard, params, spec, ovlm_comm_size(comm), ovlm_comm_rank(comm),
                             err));
    shard->model = model;
    OVLM_TRY(open_comms(shard, comm, err));
    OVLM_TRY(open_memory(shard, err));
    const ovlm_model_hooks hooks = ovlm_shard_hooks(shard);
    OVLM_TRY(ovlm_model_set_hooks(model, &hooks, err));
    for (int64_t i = 0; i < shard->params->units; i++) {
        ovlm_shard_place(shard, i);
    }
    return OVLM_OK;
}

/* Hooks of a model whose weights are gone. */
static ovlm_status gone(void *ctx, const ovlm_pass_kind *kind, ovlm_err *err)
{
    (void)ctx;
    (void)kind;
    return OVLM_FAIL(err, OVLM_E_ARG, "the shard that held this model's weights was closed; undo "
                                      "it first where they are still needed");
}

/* Takes its hooks, or what it has left of its weights, from a model.  Neither allocates, nor waits
 * after a failure was told. */
static void abandon(ovlm_model *model, bool whole)
{
    /* The hooks below are never reached: a pass whose begin fails has no others. */
    const ovlm_model_hooks nothing = {.weights = true, .grads = true, .begin = gone};
    (void)!ovlm_model_wait(model, NULL);
    (void)!ovlm_model_set_hooks(model, whole ? NULL : &nothing, NULL);
    ovlm_model_lose_experts(model);
}

ovlm_status ovlm_shard_open(ovlm_model *model, ovlm_comm *comm, const ovlm_shard_spec *spec,
                            ovlm_shard **shard, ovlm_err *err)
{
    ovlm_shard *self = NULL;
    *shard = NULL;
    OVLM_TRY(OVLM_HEAP_NEW(&self, 1, err));
    ovlm_status status = open_shard(self, model, comm, spec, err);
    if (status != OVLM_OK) {
        if (ovlm_model_spreads_experts(model)) { /* nobody else may be there to give them back */
            abandon(model, false);
        }
        release(self);
        return status;
    }
    *shard = self;
    return OVLM_OK;
}

/* One parameter of experts, of which the model has this rank's. */
static ovlm_status collect(ovlm_shard *shard, int64_t parameter, ovlm_err *err)
{
    const ovlm_param *p = &shard->params->param[parameter];
    int64_t bytes = p->rows * p->cols * shard_element(shard);
    char *host = NULL;
    OVLM_TRY(OVLM_HEAP_NEW(&host, bytes, err));
    ovlm_status status = ovlm_model_read(shard->model, &p->w, host, err);
    if (status == OVLM_OK) {
        status = ovlm_shard_gather_parts(shard, parameter, shard_dtype(shard), host, err);
    }
    if (status == OVLM_OK) {
        status = ovlm_model_write(shard->model, &p->w, host, err);
    }
    free(host);
    return status;
}

/* The model has all experts again. */
static ovlm_status collect_experts(ovlm_shard *shard, ovlm_err *err)
{
    OVLM_TRY(ovlm_model_spread_experts(shard->model, NULL, err));
    for (int64_t i = 0; i < shard->params->n; i++) {
        if (shard_listed(shard, shard->params->param[i].unit)->kind == OVLM_UNIT_EXPERTS) {
            OVLM_TRY(collect(shard, i, err));
        }
    }
    return OVLM_OK;
}

ovlm_status ovlm_shard_undo(ovlm_shard *shard, ovlm_err *err)
{
    OVLM_TRY(ovlm_shard_finish(shard, err));
    OVLM_TRY(ovlm_model_set_hooks(shard->model, NULL, err));
    for (int64_t i = 0; i < shard->params->units && shard->holds; i++) {
        OVLM_TRY(ovlm_shard_restore(shard, i, err));
    }
    if (shard->experts > 1) {
        OVLM_TRY(collect_experts(shard, err));
    }
    shard->undone = true;
    return OVLM_OK;
}

void ovlm_shard_close(ovlm_shard *shard)
{
    if (shard == NULL) {
        return;
    }
    close_comms(shard);
    if (!shard->undone) {
        abandon(shard->model, !shard->holds && shard->experts == 1);
    }
    release(shard);
}

bool ovlm_shard_holds(const ovlm_shard *shard)
{
    return shard->holds;
}

bool ovlm_shard_holds_state(const ovlm_shard *shard)
{
    return shard->holds_state;
}

void ovlm_shard_exchanged_read(const ovlm_shard *shard, ovlm_shard_exchanged *exchanged)
{
    const ovlm_exchanges *on = &shard->expert_ranks.on;
    *exchanged = (ovlm_shard_exchanged){.exchanges = on->count, .sent_bytes = on->sent_bytes,
                                        .waited_s = on->waited_s};
}

void ovlm_shard_memory_read(const ovlm_shard *shard, ovlm_shard_bytes *bytes)
{
    ovlm_model_memory own = {0};
    ovlm_model_memory_read(shard->model, &own);
    *bytes = (ovlm_shard_bytes){
        .weights_bytes = own.weights_bytes + shard->weights.bytes,
        .training_bytes = own.training_bytes + shard->grads.bytes + shard->state.bytes,
        .buffers_bytes = ovlm_shard_pool_bytes(&shard->weight_pool) +
                         ovlm_shard_pool_bytes(&shard->grad_pool)};
}
