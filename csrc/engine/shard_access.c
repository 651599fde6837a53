/* shard_access.c - a parameter's tensors as this rank holds them, and whole. */
#include "engine/shard_state.h"

#include "model/hooks.h"

static ovlm_status check_which(const ovlm_shard *shard, int64_t parameter, ovlm_shard_which which,
                               ovlm_err *err)
{
    if (parameter < 0 || parameter >= shard->params->n || (int)which < 0 ||
        which >= OVLM_SHARD_WHICH) {
        return OVLM_FAIL(err, OVLM_E_ARG, "no tensor %d of parameter %lld", (int)which,
                         (long long)parameter);
    }
    if (which > OVLM_SHARD_GRAD && !shard->holds_state) {
        return OVLM_FAIL(err, OVLM_E_ARG, "the optimizer's state is the model's: all is ddp");
    }
    return OVLM_OK;
}

/* A parameter's place in its unit, its piece, and the elements of it that this rank has. */
static shard_range weight_range(const ovlm_shard *shard, int64_t parameter)
{
    const ovlm_param *p = &shard->params->param[parameter];
    const ovlm_unit *listed = shard_listed(shard, p->unit);
    const shard_unit *u = &shard->unit[p->unit];
    bool adapter = p->kind == OVLM_PARAM_ADAPTER;
    int64_t start = p->offset - (adapter ? listed->adapter_offset : listed->offset);
    const shard_piece *piece = &u->piece[adapter ? u->pieces - 1 : 0];
    int64_t low = 0, count = 0;
    ovlm_shard_kept(u, piece, &low, &count);
    int64_t high = low + count, end = start + p->rows * p->cols;
    low = low > start ? low : start;
    high = high < end ? high : end;
    return (shard_range){.unit = p->unit, .piece = piece, .first = low,
                         .n = high > low ? high - low : 0};
}

/* Whether ranks lower than this one hold the same. */
static bool held_again(const ovlm_shard *shard, const shard_unit *u, ovlm_shard_which which)
{
    bool alike = u->mode == OVLM_SHARD_DDP || u->mode == OVLM_SHARD_HYBRID ||
                 (u->mode == OVLM_SHARD_ZERO1 && which == OVLM_SHARD_WEIGHT);
    return alike && !ovlm_shard_first(shard, u);
}

/* Where what this rank holds of a parameter begins in all of it. */
static int64_t first_of(const ovlm_param *p)
{
    return p->first_row * p->cols;
}

static void part_of_weight(ovlm_shard *shard, int64_t parameter, ovlm_shard_part *part)
{
    const ovlm_param *p = &shard->params->param[parameter];
    const ovlm_unit *listed = shard_listed(shard, p->unit);
    if (p->kind == OVLM_PARAM_BUFFER) { /* in no unit: the model has it, on all ranks */
        part->tensor = ovlm_tensor_of(p->w.data, 1, p->rows * p->cols, p->w.dtype);
        part->again = shard->rank > 0;
        return;
    }
    const shard_range own = weight_range(shard, parameter);
    if (own.n > 0) {
        part->first = first_of(p) + own.first - p->offset +
                      (own.piece->adapters ? listed->adapter_offset : listed->offset);
        part->tensor = ovlm_tensor_of(ovlm_shard_weight_at(shard, own.unit, own.piece, own.first),
                                      1, own.n, shard->params->dtype);
    }
}

ovlm_status ovlm_shard_part_of(ovlm_shard *shard, int64_t parameter, ovlm_shard_which which,
                               ovlm_shard_part *part, ovlm_err *err)
{
    *part = (ovlm_shard_part){0};
    OVLM_TRY(check_which(shard, parameter, which, err));
    const ovlm_param *p = &shard->params->param[parameter];
    part->again = held_again(shard, &shard->unit[p->unit], which);
    if (which == OVLM_SHARD_WEIGHT) {
        part_of_weight(shard, parameter, part);
        return OVLM_OK;
    }
    int64_t plane = (int64_t)which - OVLM_SHARD_MOMENT1;
    const shard_range own = ovlm_shard_own_range(shard, parameter);
    if (own.n == 0 || plane >= shard_planes(shard)) {
        return OVLM_OK;
    }
    char *data = NULL;
    if (which == OVLM_SHARD_GRAD) {
        OVLM_TRY(ovlm_model_need_grads(shard->model, err));
        data = ovlm_shard_grad_at(shard, own.unit, own.piece, own.grad_first);
    } else {
        OVLM_TRY(ovlm_shard_need_state(shard, err));
        data = ovlm_shard_state_at(shard, own.piece, plane, own.grad_first);
    }
    part->first = first_of(p) + own.grad_first - p->grad_offset +
                  shard_listed(shard, p->unit)->grad_offset;
    part->tensor = ovlm_tensor_of(data, 1, own.n, shard->params->exact);
    return OVLM_OK;
}

ovlm_status ovlm_shard_write(ovlm_shard *shard, int64_t parameter, ovlm_shard_which which,
                             const void *host, ovlm_err *err)
{
    ovlm_shard_part part;
    OVLM_TRY(ovlm_shard_part_of(shard, parameter, which, &part, err));
    if (ovlm_tensor_given(&part.tensor)) {
        OVLM_TRY(ovlm_model_write(shard->model, &part.tensor, host, err));
    }
    if (which != OVLM_SHARD_WEIGHT) {
        return OVLM_OK;
    }
    if (!shard->holds_state) {
        return ovlm_model_renew_master(shard->model, parameter, err);
    }
    OVLM_TRY(ovlm_shard_renew_master(shard, parameter, err));
    return ovlm_model_wait(shard->model, err);
}

/* ---------------------------------------------------------------- whole */

/* Bytes of each of the ranks' ranges in a parameter that begins at `start` of the piece's elements,
 * or of its unit's gradients. */
static void range_bytes(const shard_piece *piece, const int64_t *cut, int64_t start, int64_t n,
                        int64_t element, int64_t *bytes)
{
    for (int64_t r = 0; r < piece->ways; r++) {
        int64_t low = cut[r] > start ? cut[r] : start;
        int64_t high = cut[r + 1] < start + n ? cut[r + 1] : start + n;
        bytes[r] = high > low ? (high - low) * element : 0;
    }
}

/* Ranges of ranks that share the unit; this rank's is in its place already. */
static ovlm_status gather_ranges(ovlm_shard *shard, int64_t parameter, ovlm_shard_which which,
                                 void *host, ovlm_err *err)
{
    const ovlm_param *p = &shard->params->param[parameter];
    const ovlm_unit *listed = shard_listed(shard, p->unit);
    const shard_unit *u = &shard->unit[p->unit];
    bool adapter = p->kind == OVLM_PARAM_ADAPTER, weight = which == OVLM_SHARD_WEIGHT;
    const shard_piece *piece = &u->piece[adapter ? u->pieces - 1 : 0];
    int64_t start = weight ? p->offset - (adapter ? listed->adapter_offset : listed->offset)
                           : p->grad_offset - listed->grad_offset;
    ovlm_arena arena = {0};
    int64_t *bytes = NULL, *at = NULL;
    ovlm_status status = OVLM_OK;
    OVLM_GOTO(done, OVLM_ARENA_NEW(&arena, &bytes, piece->ways, err));
    OVLM_GOTO(done, OVLM_ARENA_NEW(&arena, &at, piece->ways, err));
    range_bytes(piece, weight ? piece->cut : piece->grad_cut, start, p->rows * p->cols,
                ovlm_dtype_bytes(weight ? shard->params->dtype : shard->params->exact), bytes);
    for (int64_t r = 1; r < piece->ways; r++) {
        at[r] = at[r - 1] + bytes[r - 1];
    }
    const ovlm_all_gather args = {.send = (char *)host + at[piece->own], .recv = host,
                                  .recv_bytes = bytes, .recv_at = at};
    OVLM_GOTO(done, ovlm_comm_all_gather(ovlm_shard_comm(shard, u), &args, err));
done:
    ovlm_arena_free(&arena);
    return status;
}

ovlm_status ovlm_shard_gather_parts(ovlm_shard *shard, int64_t parameter, ovlm_dtype dtype,
                                    void *host, ovlm_err *err)
{
    const ovlm_param *p = &shard->params->param[parameter];
    int64_t E = shard->params->config.decoder.experts, e = shard->experts;
    int64_t one = p->whole_rows / E * p->cols * ovlm_dtype_bytes(dtype);
    ovlm_arena arena = {0};
    int64_t *bytes = NULL;
    ovlm_status status = OVLM_OK;
    OVLM_GOTO(done, OVLM_ARENA_NEW(&arena, &bytes, e, err));
    for (int64_t r = 0; r < e; r++) {
        bytes[r] = (ovlm_expert_cut(E, e, r + 1) - ovlm_expert_cut(E, e, r)) * one;
    }
    int64_t at = ovlm_expert_cut(E, e, shard->rank % e) * one;
    const ovlm_all_gather args = {.send = (char *)host + at, .recv = host, .recv_bytes = bytes};
    OVLM_GOTO(done, ovlm_comm_all_gather(shard->party, &args, err));
done:
    ovlm_arena_free(&arena);
    return status;
}

ovlm_status ovlm_shard_gather(ovlm_shard *shard, int64_t parameter, ovlm_shard_which which,
                              void *host, bool *none, ovlm_err *err)
{
    ovlm_shard_part part;
    OVLM_TRY(check_which(shard, parameter, which, err));
    const ovlm_param *p = &shard->params->param[parameter];
    const shard_unit *u = &shard->unit[p->unit];
    *none = which != OVLM_SHARD_WEIGHT &&
            (p->grad_offset < 0 ||
             (int64_t)which - OVLM_SHARD_MOMENT1 >= shard_planes(shard));
    if (*none) {
        return OVLM_OK;
    }
    if (which == OVLM_SHARD_GRAD) {
        OVLM_TRY(ovlm_shard_reduce(shard, err));
    }
    OVLM_TRY(ovlm_shard_part_of(shard, parameter, which, &part, err));
    if (ovlm_tensor_given(&part.tensor)) {
        char *to = (char *)host + part.first * ovlm_dtype_bytes(part.tensor.dtype);
        OVLM_TRY(ovlm_model_read(shard->model, &part.tensor, to, err));
    }
    bool whole = p->kind == OVLM_PARAM_BUFFER || u->mode == OVLM_SHARD_DDP ||
                 (u->mode == OVLM_SHARD_ZERO1 && which == OVLM_SHARD_WEIGHT);
    ovlm_dtype dtype = which == OVLM_SHARD_WEIGHT && p->kind != OVLM_PARAM_BUFFER
                           ? shard->params->dtype
                           : shard->params->exact;
    if (!whole) {
        char *own = (char *)host + first_of(p) * ovlm_dtype_bytes(dtype);
        OVLM_TRY(gather_ranges(shard, parameter, which, own, err));
    }
    return u->parted ? ovlm_shard_gather_parts(shard, parameter, dtype, host, err) : OVLM_OK;
}
