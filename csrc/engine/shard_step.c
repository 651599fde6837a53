/* shard_step.c - gradients summed, their norm, and AdamW on what this rank steps. */
#include "engine/shard_state.h"

#include "base/clock.h"
#include "model/hooks.h"

#include <math.h>
#include <stdlib.h>

static ovlm_run run_of(ovlm_shard *shard, ovlm_err *err)
{
    ovlm_queue *queue = ovlm_model_queue(shard->model);
    return (ovlm_run){.queue = queue, .ops = queue->backend->ops, .work = &shard->work,
                      .dtype = shard->params->dtype, .exact = shard->params->exact, .err = err};
}

ovlm_status ovlm_shard_blend(ovlm_shard *shard, const void *x, ovlm_dtype x_dtype, double beta,
                             void *y, int64_t n, ovlm_err *err)
{
    if (n == 0) {
        return OVLM_OK;
    }
    ovlm_run run = run_of(shard, err);
    ovlm_scale args = {.alpha = 1, .beta = beta,
                       .x = ovlm_tensor_of((void *)(uintptr_t)x, 1, n, x_dtype),
                       .y = ovlm_tensor_of(y, 1, n, shard->params->exact)};
    RUN(&run, scale, fwd, &args);
    return OVLM_OK;
}

/* ---------------------------------------------------------------- sums */

ovlm_status ovlm_shard_finish(ovlm_shard *shard, ovlm_err *err)
{
    OVLM_TRY(ovlm_shard_settle(shard, err));
    for (int64_t i = 0; i < shard->params->units; i++) {
        OVLM_TRY(ovlm_shard_sum_wait(shard, i, err));
    }
    return OVLM_OK;
}

void ovlm_shard_last(ovlm_shard *shard)
{
    shard->last = true;
}

ovlm_status ovlm_shard_reduce(ovlm_shard *shard, ovlm_err *err)
{
    if (shard->spoiled) {
        return OVLM_FAIL(err, OVLM_E_ARG, "a backward failed, so that gradients are void; set them "
                                          "to zero and compute them again");
    }
    OVLM_TRY(ovlm_model_need_grads(shard->model, err));
    OVLM_TRY(ovlm_shard_settle(shard, err));
    for (int64_t i = 0; i < shard->params->units; i++) {
        const shard_unit *u = &shard->unit[i];
        if (u->mode != OVLM_SHARD_FSDP && u->sum == SHARD_OPEN &&
            ovlm_unit_trained(shard->params, i)) {
            OVLM_TRY(ovlm_shard_sum_start(shard, i, err));
        }
    }
    return ovlm_shard_finish(shard, err);
}

ovlm_status ovlm_shard_zero_grad(ovlm_shard *shard, ovlm_err *err)
{
    OVLM_TRY(ovlm_shard_finish(shard, err));
    for (int64_t i = 0; i < shard->params->units; i++) {
        shard->unit[i].sum = SHARD_OPEN;
    }
    shard->last = shard->spoiled = false;
    if (!shard->holds) {
        return ovlm_model_zero_grad(shard->model, err);
    }
    return shard->grads.bytes == 0 ? OVLM_OK
                                   : ovlm_model_backend(shard->model)->ops->fill(
                                         ovlm_model_queue(shard->model), shard->grads.data, 0,
                                         shard->grads.bytes, err);
}

/* ---------------------------------------------------------------- state */

shard_range ovlm_shard_own_range(const ovlm_shard *shard, int64_t parameter)
{
    const ovlm_param *p = &shard->params->param[parameter];
    const ovlm_unit *listed = shard_listed(shard, p->unit);
    const shard_unit *u = &shard->unit[p->unit];
    bool adapter = p->kind == OVLM_PARAM_ADAPTER;
    shard_range range = {.unit = p->unit};
    for (int64_t k = 0; k < u->pieces && p->grad_offset >= 0; k++) {
        const shard_piece *piece = &u->piece[k];
        if (piece->adapters != adapter) {
            continue;
        }
        int64_t start = p->offset - (adapter ? listed->adapter_offset : listed->offset);
        int64_t low = piece->cut[piece->own], high = piece->cut[piece->own + 1];
        int64_t end = start + p->rows * p->cols;
        low = low > start ? low : start;
        high = high < end ? high : end;
        range.piece = piece;
        range.first = low;
        range.grad_first = p->grad_offset - listed->grad_offset + low - start;
        range.n = high > low ? high - low : 0;
    }
    return range;
}

char *ovlm_shard_state_at(const ovlm_shard *shard, const shard_piece *piece, int64_t plane,
                          int64_t grad_at)
{
    int64_t at = plane * shard->state_elements + piece->state + grad_at -
                 piece->grad_cut[piece->own];
    return (char *)shard->state.data + at * shard_exact_element(shard);
}

enum { MASTER_PLANE = 2 };

ovlm_status ovlm_shard_renew_master(ovlm_shard *shard, int64_t parameter, ovlm_err *err)
{
    const shard_range own = ovlm_shard_own_range(shard, parameter);
    if (own.n == 0 || shard->state.data == NULL || shard_planes(shard) <= MASTER_PLANE) {
        return OVLM_OK;
    }
    return ovlm_shard_blend(shard, ovlm_shard_weight_at(shard, own.unit, own.piece, own.first),
                            shard->params->dtype, 0,
                            ovlm_shard_state_at(shard, own.piece, MASTER_PLANE, own.grad_first),
                            own.n, err);
}

ovlm_status ovlm_shard_need_state(ovlm_shard *shard, ovlm_err *err)
{
    if (shard->state.data != NULL || shard->state_elements == 0) {
        return OVLM_OK;
    }
    OVLM_TRY(ovlm_shard_block_new(shard, &shard->state, shard_planes(shard) *
                                                            shard->state_elements *
                                                            shard_exact_element(shard), true, err));
    for (int64_t i = 0; i < shard->params->n; i++) {
        OVLM_TRY(ovlm_shard_renew_master(shard, i, err));
    }
    return OVLM_OK;
}

/* ---------------------------------------------------------------- norm */

/* Whether this rank counts a piece of a unit, which others may hold as well. */
static bool counts(const ovlm_shard *shard, const shard_unit *u)
{
    bool alike = u->mode == OVLM_SHARD_DDP || u->mode == OVLM_SHARD_HYBRID;
    return !alike || ovlm_shard_first(shard, u);
}

/* Gradients that this rank counts, each number on one rank only. */
static void list_grads(const ovlm_shard *shard, ovlm_tensor *grad, int64_t *n)
{
    *n = 0;
    for (int64_t i = 0; i < shard->params->units; i++) {
        const shard_unit *u = &shard->unit[i];
        for (int64_t k = 0; k < u->pieces && counts(shard, u); k++) {
            const shard_piece *piece = &u->piece[k];
            int64_t first = piece->grad_cut[piece->own], count = piece->reduce_count[piece->own];
            if (count > 0) {
                grad[(*n)++] = ovlm_tensor_of(ovlm_shard_grad_at(shard, i, piece, first), 1, count,
                                              shard->params->exact);
            }
        }
    }
}

/* This rank's numbers become those of all of them. */
static ovlm_status share_stats(ovlm_shard *shard, ovlm_grad_stats *seen, ovlm_err *err)
{
    const ovlm_ops *ops = ovlm_model_backend(shard->model)->ops;
    ovlm_queue *queue = ovlm_model_queue(shard->model);
    int64_t bytes = (int64_t)sizeof *seen;
    OVLM_TRY(ops->copy(queue, seen, shard->stats.data, bytes, OVLM_TO_HOST, err));
    OVLM_TRY(ops->queue_wait(queue, err));
    double part[2] = {seen->norm_sq, (double)seen->non_finite};
    const ovlm_all_reduce args = {.send = part, .recv = part, .n = 2, .dtype = OVLM_F64,
                                  .reduce = OVLM_SUM};
    double start_s = ovlm_clock_s();
    OVLM_TRY(ovlm_comm_all_reduce(shard->world, &args, err));
    ovlm_shard_note_wait(shard, start_s);
    seen->norm_sq = part[0];
    seen->non_finite = (int64_t)part[1];
    return ops->copy(queue, shard->stats.data, seen, bytes, OVLM_TO_DEVICE, err);
}

/* ---------------------------------------------------------------- adamw */

static ovlm_tensor row_of(char *data, int64_t n, ovlm_dtype dtype)
{
    return ovlm_tensor_of(data, 1, n, dtype);
}

static void list_parts(const ovlm_shard *shard, const ovlm_model_adamw *options,
                       ovlm_adamw_part *part, int64_t *n)
{
    ovlm_dtype exact = shard->params->exact;
    *n = 0;
    for (int64_t i = 0; i < shard->params->n; i++) {
        const shard_range own = ovlm_shard_own_range(shard, i);
        if (own.n == 0) {
            continue;
        }
        ovlm_adamw_part *one = &part[(*n)++];
        char *w = ovlm_shard_weight_at(shard, own.unit, own.piece, own.first);
        char *grad = ovlm_shard_grad_at(shard, own.unit, own.piece, own.grad_first);
        char *state[] = {ovlm_shard_state_at(shard, own.piece, 0, own.grad_first),
                         ovlm_shard_state_at(shard, own.piece, 1, own.grad_first),
                         ovlm_shard_state_at(shard, own.piece, MASTER_PLANE, own.grad_first)};
        *one = (ovlm_adamw_part){.w = row_of(w, own.n, shard->params->dtype),
                                 .grad = row_of(grad, own.n, exact),
                                 .m = row_of(state[0], own.n, exact),
                                 .v = row_of(state[1], own.n, exact), .lr = options->lr[i],
                                 .weight_decay = options->weight_decay[i]};
        if (shard_planes(shard) > MASTER_PLANE) {
            one->master = row_of(state[MASTER_PLANE], own.n, exact);
        }
    }
}

static ovlm_status run_step(ovlm_shard *shard, ovlm_grad_norm *norm, ovlm_adamw *adamw,
                            ovlm_grad_stats *seen, ovlm_err *err)
{
    ovlm_run run = run_of(shard, err);
    ovlm_op_bytes need = {0}, more = {0};
    OVLM_TRY(run.ops->grad_norm.measure(run.queue->backend, norm, &need, err));
    OVLM_TRY(run.ops->adamw.measure(run.queue->backend, adamw, &more, err));
    int64_t bytes = need.fwd_work > more.fwd_work ? need.fwd_work : more.fwd_work;
    OVLM_TRY(ovlm_model_wait(shard->model, err)); /* scratch may move */
    OVLM_TRY(ovlm_stack_fit(&shard->work, run.queue->backend, OVLM_STACK_DEVICE, bytes, err));
    OVLM_TRY(ovlm_run_zero(&run, shard->stats.data, shard->stats.bytes));
    RUN(&run, grad_norm, fwd, norm);
    OVLM_TRY(share_stats(shard, seen, err));
    RUN(&run, adamw, fwd, adamw);
    OVLM_TRY(run.ops->copy(run.queue, seen, shard->stats.data, shard->stats.bytes, OVLM_TO_HOST,
                           err));
    OVLM_TRY(run.ops->queue_wait(run.queue, err));
    return seen->non_finite > 0 ? OVLM_OK : ovlm_shard_spread(shard, err);
}

static ovlm_status step_parts(ovlm_shard *shard, const ovlm_model_adamw *options,
                              ovlm_model_step *step, ovlm_err *err)
{
    ovlm_arena arena = {0};
    ovlm_tensor *grad = NULL;
    ovlm_adamw_part *part = NULL;
    ovlm_grad_stats seen = {0};
    ovlm_status status = OVLM_OK;
    OVLM_GOTO(done, ovlm_shard_need_state(shard, err));
    OVLM_GOTO(done, OVLM_ARENA_NEW(&arena, &grad, SHARD_PIECES_MOST * shard->params->units, err));
    OVLM_GOTO(done, OVLM_ARENA_NEW(&arena, &part, shard->params->n, err));
    ovlm_grad_norm norm = {.grad = grad, .stats = shard->stats.data};
    ovlm_adamw adamw = {.part = part, .step = options->step, .beta1 = options->beta1,
                        .beta2 = options->beta2, .eps = options->eps,
                        .max_norm = options->max_norm, .stats = shard->stats.data};
    list_grads(shard, grad, &norm.n);
    list_parts(shard, options, part, &adamw.n);
    OVLM_GOTO(done, run_step(shard, &norm, &adamw, &seen, err));
    *step = (ovlm_model_step){.grad_norm = sqrt(seen.norm_sq), .clip = seen.clip,
                              .non_finite = seen.non_finite};
done:
    ovlm_arena_free(&arena);
    return status;
}

ovlm_status ovlm_shard_adamw(ovlm_shard *shard, const ovlm_model_adamw *options,
                             ovlm_model_step *step, ovlm_err *err)
{
    *step = (ovlm_model_step){.clip = 1};
    if (options->step < 1) {
        return OVLM_FAIL(err, OVLM_E_ARG, "step must be at least 1; got %lld",
                         (long long)options->step);
    }
    if (ovlm_model_average_in(shard->model)) {
        return OVLM_FAIL(err, OVLM_E_ARG, "the weights are those of the average; a step is of the "
                                          "model's own");
    }
    OVLM_TRY(ovlm_shard_reduce(shard, err));
    if (!shard->holds_state) {
        return ovlm_model_adamw_step(shard->model, options, step, err);
    }
    if (shard->grad_elements == 0) {
        return OVLM_OK;
    }
    ovlm_status status = step_parts(shard, options, step, err);
    ovlm_model_forget(shard->model);
    return status;
}
