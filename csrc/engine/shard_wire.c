/* shard_wire.c - units between ranks: gathered, summed, spread.
 *
 * What is started on memory of the model waits for its queue first; communicators of the host know
 * no queue.  Memory that they cannot reach is brought to the host and back, at once. */
#include "engine/shard_state.h"

#include "base/clock.h"
#include "model/hooks.h"

enum { SUMS_MOST = OVLM_COMM_PENDING_MOST / 4 }; /* of each communicator, two for a unit */

static const ovlm_ops *ops_of(const ovlm_shard *shard)
{
    return ovlm_model_backend(shard->model)->ops;
}

/* ---------------------------------------------------------------- places */

ovlm_comm *ovlm_shard_comm(const ovlm_shard *shard, const shard_unit *unit)
{
    return unit->mode == OVLM_SHARD_HYBRID ? shard->node
           : unit->parted                  ? shard->twins
                                           : shard->world;
}

static ovlm_comm *gather_comm(const ovlm_shard *shard, const shard_unit *u)
{
    return u->mode == OVLM_SHARD_HYBRID ? shard->node_gather
           : u->parted                  ? shard->twins_gather
                                        : shard->gather;
}

/* Where what was added up on a rank is summed. */
static ovlm_comm *sum_comm(const ovlm_shard *shard, const shard_unit *u)
{
    return u->mode == OVLM_SHARD_HYBRID ? shard->across : ovlm_shard_comm(shard, u);
}

char *ovlm_shard_weight_at(const ovlm_shard *shard, int64_t unit, const shard_piece *piece,
                           int64_t at)
{
    const ovlm_unit_memory *own = &shard_listed(shard, unit)->at;
    int64_t first = 0, count = 0;
    if (!shard->holds) {
        return (char *)(piece->adapters ? own->adapters : own->weights) +
               at * shard_element(shard);
    }
    ovlm_shard_kept(&shard->unit[unit], piece, &first, &count);
    return (char *)shard->weights.data + piece->kept_bytes + (at - first) * shard_element(shard);
}

char *ovlm_shard_grad_at(const ovlm_shard *shard, int64_t unit, const shard_piece *piece,
                         int64_t at)
{
    int64_t first = 0, count = 0;
    if (!shard->holds) {
        return (char *)shard_listed(shard, unit)->at.grads + at * shard_exact_element(shard);
    }
    ovlm_shard_kept_grads(&shard->unit[unit], piece, &first, &count);
    return (char *)shard->grads.data + (piece->kept_grads + at - first) *
                                           shard_exact_element(shard);
}

/* ---------------------------------------------------------------- time */

void ovlm_shard_note_wait(ovlm_shard *shard, double start_s)
{
    shard->waited_s += ovlm_clock_s() - start_s;
}

double ovlm_shard_waited_s(const ovlm_shard *shard)
{
    return shard->waited_s + shard->expert_ranks.on.waited_s;
}

/* ---------------------------------------------------------------- memory out of reach */

static ovlm_status wait_queue(const ovlm_shard *shard, ovlm_err *err)
{
    return ops_of(shard)->queue_wait(ovlm_model_queue(shard->model), err);
}

static ovlm_status copy(const ovlm_shard *shard, void *to, const void *from, int64_t bytes,
                        ovlm_copy_kind kind, ovlm_err *err)
{
    if (bytes > 0) {
        OVLM_TRY(ops_of(shard)->copy(ovlm_model_queue(shard->model), to, from, bytes, kind, err));
    }
    return wait_queue(shard, err);
}

/* The ranges of a piece from their ranks to `to`; `from` is this rank's, and may be its place. */
static ovlm_status gather_piece(ovlm_shard *shard, ovlm_comm *comm, const shard_piece *piece,
                                const char *from, char *to, int64_t *ticket, ovlm_err *err)
{
    int64_t bytes = piece->elements * shard_element(shard), own = piece->gather_bytes[piece->own];
    char *stage = (char *)shard->stage.data;
    ovlm_all_gather args = {.send = from, .recv = to, .recv_bytes = piece->gather_bytes,
                            .recv_at = piece->gather_at};
    if (!shard->staged) {
        return ovlm_comm_all_gather_start(comm, &args, ticket, err);
    }
    args.recv = stage;
    args.send = stage + piece->gather_at[piece->own];
    OVLM_TRY(copy(shard, stage + piece->gather_at[piece->own], from, own, OVLM_TO_HOST, err));
    double start_s = ovlm_clock_s();
    OVLM_TRY(ovlm_comm_all_gather(comm, &args, err));
    ovlm_shard_note_wait(shard, start_s);
    return copy(shard, to, stage, bytes, OVLM_TO_DEVICE, err);
}

/* This rank's range of the sum, in place; `grads` are the piece's. */
static ovlm_status scatter_piece(ovlm_shard *shard, ovlm_comm *comm, const shard_piece *piece,
                                 char *grads, int64_t *ticket, ovlm_err *err)
{
    int64_t element = shard_exact_element(shard);
    int64_t bytes = piece->grad_elements * element;
    int64_t at = (piece->grad_cut[piece->own] - piece->grad_first) * element;
    char *stage = (char *)shard->stage.data;
    ovlm_reduce_scatter args = {.send = grads, .recv = grads + at, .counts = piece->reduce_count,
                                .dtype = shard->params->exact, .reduce = OVLM_SUM};
    if (!shard->staged) {
        return ovlm_comm_reduce_scatter_start(comm, &args, ticket, err);
    }
    args.send = stage;
    args.recv = stage + at;
    OVLM_TRY(copy(shard, stage, grads, bytes, OVLM_TO_HOST, err));
    double start_s = ovlm_clock_s();
    OVLM_TRY(ovlm_comm_reduce_scatter(comm, &args, err));
    ovlm_shard_note_wait(shard, start_s);
    return copy(shard, grads + at, stage + at, piece->reduce_count[piece->own] * element,
                OVLM_TO_DEVICE, err);
}

/* The sum of n elements, in place. */
static ovlm_status sum_all(ovlm_shard *shard, ovlm_comm *comm, char *grads, int64_t n,
                           int64_t *ticket, ovlm_err *err)
{
    int64_t bytes = n * shard_exact_element(shard);
    ovlm_all_reduce args = {.send = grads, .recv = grads, .n = n, .dtype = shard->params->exact,
                            .reduce = OVLM_SUM};
    if (!shard->staged) {
        return ovlm_comm_all_reduce_start(comm, &args, ticket, err);
    }
    args.send = args.recv = shard->stage.data;
    OVLM_TRY(copy(shard, shard->stage.data, grads, bytes, OVLM_TO_HOST, err));
    double start_s = ovlm_clock_s();
    OVLM_TRY(ovlm_comm_all_reduce(comm, &args, err));
    ovlm_shard_note_wait(shard, start_s);
    return copy(shard, grads, shard->stage.data, bytes, OVLM_TO_DEVICE, err);
}

/* A ticket of what was done at once is 0. */
static ovlm_status wait_for(ovlm_shard *shard, ovlm_comm *comm, int64_t ticket, ovlm_err *err)
{
    if (ticket == 0) {
        return OVLM_OK;
    }
    double start_s = ovlm_clock_s();
    ovlm_status status = ovlm_comm_wait(comm, ticket, err);
    ovlm_shard_note_wait(shard, start_s);
    return status;
}

/* ---------------------------------------------------------------- weights of a pass */

ovlm_status ovlm_shard_gather_start(ovlm_shard *shard, int64_t unit, ovlm_err *err)
{
    shard_unit *u = &shard->unit[unit];
    u->weights = ovlm_shard_slot_take(shard, &shard->weight_pool,
                                      ovlm_shard_unit_bytes(shard, unit));
    if (u->weights == NULL) {
        return OVLM_FAIL(err, OVLM_E_INTERNAL, "no buffer for the weights of %s",
                         shard_listed(shard, unit)->name);
    }
    if (shard->model == NULL) {
        return OVLM_OK;
    }
    OVLM_TRY(wait_queue(shard, err)); /* it may still be read as another unit's */
    char *to = u->weights->data;
    for (int64_t k = 0; k < u->pieces; k++) {
        const shard_piece *piece = &u->piece[k];
        const char *from = ovlm_shard_weight_at(shard, unit, piece, piece->cut[piece->own]);
        OVLM_TRY(gather_piece(shard, gather_comm(shard, u), piece, from, to, &u->gather_ticket,
                              err));
        u->gathering = true;
        to += piece->elements * shard_element(shard);
    }
    return OVLM_OK;
}

ovlm_status ovlm_shard_gather_wait(ovlm_shard *shard, int64_t unit, ovlm_err *err)
{
    shard_unit *u = &shard->unit[unit];
    if (!u->gathering) {
        return OVLM_OK;
    }
    u->gathering = false;
    return wait_for(shard, gather_comm(shard, u), u->gather_ticket, err);
}

/* ---------------------------------------------------------------- gradients of a pass */

ovlm_status ovlm_shard_scatter_start(ovlm_shard *shard, int64_t unit, ovlm_err *err)
{
    shard_unit *u = &shard->unit[unit];
    shard->scattering = unit;
    shard->scatter_ticket = 0;
    shard->scatter_last = shard->last;
    if (shard->model == NULL) {
        return OVLM_OK;
    }
    OVLM_TRY(wait_queue(shard, err));
    for (int64_t k = 0; k < u->pieces; k++) {
        const shard_piece *piece = &u->piece[k];
        char *grads = (char *)u->grads->data + piece->grad_first * shard_exact_element(shard);
        if (piece->grad_elements > 0) {
            OVLM_TRY(scatter_piece(shard, ovlm_shard_comm(shard, u), piece, grads,
                                   &shard->scatter_ticket, err));
        }
    }
    return OVLM_OK;
}

/* Adds this rank's range of what was summed to what it holds. */
static ovlm_status add_up(ovlm_shard *shard, int64_t unit, ovlm_err *err)
{
    const shard_unit *u = &shard->unit[unit];
    for (int64_t k = 0; k < u->pieces; k++) {
        const shard_piece *piece = &u->piece[k];
        int64_t first = piece->grad_cut[piece->own];
        const char *from = (char *)u->grads->data + first * shard_exact_element(shard);
        OVLM_TRY(ovlm_shard_blend(shard, from, shard->params->exact, 1,
                                  ovlm_shard_grad_at(shard, unit, piece, first),
                                  piece->reduce_count[piece->own], err));
    }
    return OVLM_OK;
}

ovlm_status ovlm_shard_settle(ovlm_shard *shard, ovlm_err *err)
{
    int64_t unit = shard->scattering;
    if (unit < 0) {
        return OVLM_OK;
    }
    shard_unit *u = &shard->unit[unit];
    shard->scattering = -1;
    if (shard->model != NULL) {
        OVLM_TRY(wait_for(shard, ovlm_shard_comm(shard, u), shard->scatter_ticket, err));
        OVLM_TRY(add_up(shard, unit, err));
    }
    u->grads->used = false;
    u->grads = NULL;
    if (u->mode == OVLM_SHARD_HYBRID && shard->scatter_last && shard->model != NULL) {
        return ovlm_shard_sum_start(shard, unit, err);
    }
    return OVLM_OK;
}

/* ---------------------------------------------------------------- sums over ranks */

/* Started calls are few enough; the oldest are done first. */
static ovlm_status make_room(ovlm_shard *shard, ovlm_err *err)
{
    for (int64_t i = 0; i < shard->params->units && shard->sums >= SUMS_MOST; i++) {
        OVLM_TRY(ovlm_shard_sum_wait(shard, i, err));
    }
    return OVLM_OK;
}

static ovlm_status sum_piece(ovlm_shard *shard, int64_t unit, const shard_piece *piece,
                             ovlm_err *err)
{
    shard_unit *u = &shard->unit[unit];
    int64_t first = 0, count = 0;
    ovlm_shard_kept_grads(u, piece, &first, &count);
    char *grads = ovlm_shard_grad_at(shard, unit, piece, first);
    if (u->mode == OVLM_SHARD_ZERO1) {
        return scatter_piece(shard, sum_comm(shard, u), piece, grads, &u->sum_ticket, err);
    }
    return sum_all(shard, sum_comm(shard, u), grads, count, &u->sum_ticket, err);
}

ovlm_status ovlm_shard_sum_start(ovlm_shard *shard, int64_t unit, ovlm_err *err)
{
    shard_unit *u = &shard->unit[unit];
    OVLM_TRY(make_room(shard, err));
    OVLM_TRY(wait_queue(shard, err));
    u->sum = SHARD_STARTED;
    u->sum_ticket = 0;
    shard->sums++;
    for (int64_t k = 0; k < u->pieces; k++) {
        if (u->piece[k].grad_elements > 0) {
            OVLM_TRY(sum_piece(shard, unit, &u->piece[k], err));
        }
    }
    return OVLM_OK;
}

ovlm_status ovlm_shard_sum_wait(ovlm_shard *shard, int64_t unit, ovlm_err *err)
{
    shard_unit *u = &shard->unit[unit];
    if (u->sum != SHARD_STARTED) {
        return OVLM_OK;
    }
    u->sum = SHARD_DONE;
    shard->sums--;
    return wait_for(shard, sum_comm(shard, u), u->sum_ticket, err);
}

/* ---------------------------------------------------------------- weights after a step */

static ovlm_status spread_unit(ovlm_shard *shard, int64_t unit, ovlm_err *err)
{
    shard_unit *u = &shard->unit[unit];
    for (int64_t k = 0; k < u->pieces; k++) {
        const shard_piece *piece = &u->piece[k];
        char *to = ovlm_shard_weight_at(shard, unit, piece, 0);
        const char *from = to + piece->gather_at[piece->own];
        if (piece->grad_elements > 0) { /* else nobody has changed it */
            OVLM_TRY(gather_piece(shard, gather_comm(shard, u), piece, from, to,
                                  &u->gather_ticket, err));
            u->gathering = true;
        }
    }
    return OVLM_OK;
}

ovlm_status ovlm_shard_spread(ovlm_shard *shard, ovlm_err *err)
{
    int64_t units = shard->params->units, started = 0;
    OVLM_TRY(wait_queue(shard, err));
    for (int64_t i = 0; i < units; i++) {
        if (shard->unit[i].mode != OVLM_SHARD_ZERO1) {
            continue;
        }
        OVLM_TRY(spread_unit(shard, i, err));
        if (++started % SUMS_MOST == 0) {
            OVLM_TRY(ovlm_shard_gather_wait(shard, i, err));
        }
    }
    for (int64_t i = 0; i < units; i++) {
        OVLM_TRY(ovlm_shard_gather_wait(shard, i, err));
    }
    return OVLM_OK;
}

ovlm_status ovlm_shard_restore(ovlm_shard *shard, int64_t unit, ovlm_err *err)
{
    shard_unit *u = &shard->unit[unit];
    const ovlm_unit_memory *own = &shard_listed(shard, unit)->at;
    for (int64_t k = 0; k < u->pieces; k++) {
        const shard_piece *piece = &u->piece[k];
        char *to = piece->adapters ? own->adapters : own->weights;
        int64_t first = 0, count = 0;
        ovlm_shard_kept(u, piece, &first, &count);
        const char *from = ovlm_shard_weight_at(shard, unit, piece, first);
        if (u->sharded) {
            OVLM_TRY(gather_piece(shard, gather_comm(shard, u), piece, from, to,
                                  &u->gather_ticket, err));
            OVLM_TRY(wait_for(shard, gather_comm(shard, u), u->gather_ticket, err));
        } else {
            OVLM_TRY(copy(shard, to, from, count * shard_element(shard), OVLM_ON_DEVICE, err));
        }
    }
    return OVLM_OK;
}
