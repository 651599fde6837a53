/* hook_keeper.h - hooks that hold a model's weights and gradients themselves: outside acquire ..
 * release a unit's weights are nowhere, at every acquire they are somewhere else, and what was
 * given back is full of NaN, then freed.  So are gradients between a backward's first acquire and
 * reduce.  Everything that happens is noted, compared with what hooks.h promises, and can be made
 * to fail. */
#ifndef OVLM_HOOK_KEEPER_H
#define OVLM_HOOK_KEEPER_H

#include "model_rig.h"

enum { KEEPER_UNITS = 64, KEEPER_EVENTS = 8192, KEEPER_BUFFERS = 512 };
enum { KEEPER_RELEASE = 3, KEEPER_REDUCE = 6, KEEPER_KINDS = 8 };

typedef struct keeper {
    ovlm_model *model;
    ovlm_model_hooks hooks;
    char *weights, *adapters, *grads; /* host: all of them, at the model's offsets               */
    bool late;                     /* frees when a pass ends, not at once                        */
    int64_t fail_after;            /* hooks that succeed before one fails; -1: none fails        */
    void *w[KEEPER_UNITS], *a[KEEPER_UNITS], *g[KEEPER_UNITS]; /* handed out                     */
    int64_t held, events, freed, order_n, order_at, order[2 * KEEPER_UNITS];
    int64_t event[KEEPER_EVENTS];
    void *free_later[KEEPER_BUFFERS];
} keeper;

static inline const ovlm_unit *keeper_unit(const keeper *k, int64_t unit)
{
    return &ovlm_model_params(k->model)->unit[unit];
}

/* Notes it; whether it is the one to fail. */
static inline ovlm_status keeper_note(keeper *k, int64_t event, ovlm_err *err)
{
    CHECK(k->events < KEEPER_EVENTS, "more events than room");
    if (k->events < KEEPER_EVENTS) {
        k->event[k->events++] = event;
    }
    if (k->fail_after == 0) {
        return OVLM_FAIL(err, OVLM_E_COMM, "hook %lld fails", (long long)event);
    }
    k->fail_after -= k->fail_after > 0;
    return OVLM_OK;
}

/* A fresh place with what lies on the host; NaN where nothing is copied. */
static inline void *keeper_hand_out(keeper *k, const char *host, int64_t elements, ovlm_dtype dtype)
{
    const ovlm_ops *ops = ovlm_model_backend(k->model)->ops;
    int64_t bytes = elements * ovlm_dtype_bytes(dtype);
    void *place = NULL;
    ovlm_err err = {0};
    if (bytes == 0) {
        return NULL;
    }
    ovlm_status status = ops->alloc(ovlm_model_backend(k->model), bytes, &place, &err);
    if (status == OVLM_OK) {
        status = ops->copy(ovlm_model_queue(k->model), place, host, bytes, OVLM_TO_DEVICE, &err);
    }
    CHECK(status == OVLM_OK, "%s", err.message);
    return place;
}

/* Poisons it in the queue's order; with `host`, after a copy of it. */
static inline void keeper_take_back(keeper *k, void **place, char *host, int64_t elements,
                                    ovlm_dtype dtype)
{
    ovlm_backend *backend = ovlm_model_backend(k->model);
    ovlm_queue *queue = ovlm_model_queue(k->model);
    int64_t bytes = elements * ovlm_dtype_bytes(dtype);
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    if (*place == NULL) {
        return;
    }
    if (host != NULL) {
        status = backend->ops->copy(queue, host, *place, bytes, OVLM_TO_HOST, &err);
    }
    if (status == OVLM_OK) {
        status = backend->ops->fill(queue, *place, 0xff, bytes, &err);
    }
    CHECK(status == OVLM_OK, "%s", err.message);
    if (k->late && k->freed < KEEPER_BUFFERS) {
        k->free_later[k->freed++] = *place;
    } else {
        CHECK(backend->ops->queue_wait(queue, &err) == OVLM_OK, "%s", err.message);
        backend->ops->free(backend, *place);
    }
    *place = NULL;
}

static inline void keeper_place(keeper *k, int64_t unit)
{
    const ovlm_unit_memory at = {k->w[unit], k->a[unit], k->g[unit]};
    ovlm_model_place(k->model, unit, &at);
}

static inline ovlm_status keeper_begin(void *ctx, const ovlm_pass_kind *kind, ovlm_err *err)
{
    keeper *k = ctx;
    int64_t what = kind->phases * 4 + (kind->backward ? 2u : 0u) + (kind->features ? 1u : 0u);
    OVLM_TRY(keeper_note(k, -1 - what, err));
    CHECK(k->held == 0, "a pass begins with %lld units held", (long long)k->held);
    k->order_n = ovlm_unit_order(ovlm_model_params(k->model), kind, NULL);
    CHECK(k->order_n <= 2 * KEEPER_UNITS, "order of %lld", (long long)k->order_n);
    CHECK(ovlm_unit_order(ovlm_model_params(k->model), kind, k->order) == k->order_n, "order");
    k->order_at = 0;
    return OVLM_OK;
}

static inline ovlm_status keeper_acquire(void *ctx, int64_t unit, ovlm_unit_use use, ovlm_err *err)
{
    keeper *k = ctx;
    const ovlm_params *p = ovlm_model_params(k->model);
    const ovlm_unit *u = keeper_unit(k, unit);
    OVLM_TRY(keeper_note(k, unit * KEEPER_KINDS + (int64_t)use, err));
    CHECK(k->order_at < k->order_n && k->order[k->order_at] == unit,
          "acquire number %lld is %s", (long long)k->order_at, u->name);
    CHECK(k->w[unit] == NULL, "%s is acquired twice", u->name);
    CHECK(use != OVLM_USE_GRADIENTS || u->grad_elements > 0, "%s has no gradients", u->name);
    k->order_at++;
    k->held++;
    if (use != OVLM_USE_GRADIENTS && k->hooks.weights) {
        int64_t bytes = ovlm_dtype_bytes(p->dtype);
        k->w[unit] = keeper_hand_out(k, k->weights + u->offset * bytes, u->elements, p->dtype);
        k->a[unit] = keeper_hand_out(k, k->adapters + u->adapter_offset * bytes,
                                     u->adapter_elements, p->dtype);
    }
    if (use != OVLM_USE_FORWARD && k->hooks.grads && k->g[unit] == NULL) {
        k->g[unit] = keeper_hand_out(k, k->grads + u->grad_offset * ovlm_dtype_bytes(p->exact),
                                     u->grad_elements, p->exact);
    }
    keeper_place(k, unit);
    return OVLM_OK;
}

static inline ovlm_status keeper_release(void *ctx, int64_t unit, ovlm_unit_use use, ovlm_err *err)
{
    keeper *k = ctx;
    const ovlm_params *p = ovlm_model_params(k->model);
    const ovlm_unit *u = keeper_unit(k, unit);
    k->held--;
    keeper_take_back(k, &k->w[unit], NULL, u->elements, p->dtype);
    keeper_take_back(k, &k->a[unit], NULL, u->adapter_elements, p->dtype);
    keeper_place(k, unit);
    return keeper_note(k, unit * KEEPER_KINDS + KEEPER_RELEASE + (int64_t)use, err);
}

static inline ovlm_status keeper_reduce(void *ctx, int64_t unit, ovlm_err *err)
{
    keeper *k = ctx;
    const ovlm_params *p = ovlm_model_params(k->model);
    const ovlm_unit *u = keeper_unit(k, unit);
    CHECK(u->grad_elements > 0 && (k->g[unit] != NULL || !k->hooks.grads),
          "%s has nothing to reduce", u->name);
    OVLM_TRY(keeper_note(k, unit * KEEPER_KINDS + KEEPER_REDUCE, err));
    keeper_take_back(k, &k->g[unit], k->grads + u->grad_offset * ovlm_dtype_bytes(p->exact),
                     u->grad_elements, p->exact);
    keeper_place(k, unit);
    return OVLM_OK;
}

static inline void keeper_end(void *ctx, bool failed)
{
    keeper *k = ctx;
    ovlm_backend *backend = ovlm_model_backend(k->model);
    const ovlm_params *p = ovlm_model_params(k->model);
    CHECK(k->held == 0, "a pass ends with %lld units held", (long long)k->held);
    CHECK(failed || k->order_at == k->order_n, "a pass ends after %lld of %lld units",
          (long long)k->order_at, (long long)k->order_n);
    for (int64_t i = 0; i < p->units; i++) {
        CHECK(failed || k->g[i] == NULL, "%s was not reduced", p->unit[i].name);
        keeper_take_back(k, &k->g[i], NULL, p->unit[i].grad_elements, p->exact);
        keeper_place(k, i);
    }
    CHECK(backend->ops->queue_wait(ovlm_model_queue(k->model), NULL) == OVLM_OK, "late failure");
    while (k->freed > 0) {
        backend->ops->free(backend, k->free_later[--k->freed]);
    }
}

/* Copies what the model holds, whose weights are its own so far, to be held from now on. */
static inline void keeper_open(keeper *k, ovlm_model *model, bool weights, bool grads)
{
    const ovlm_params *p = ovlm_model_params(model);
    ovlm_err err = {0};
    *k = (keeper){.model = model, .fail_after = -1};
    k->hooks = (ovlm_model_hooks){.ctx = k, .weights = weights, .grads = grads,
                                  .begin = keeper_begin, .acquire = keeper_acquire,
                                  .release = keeper_release, .reduce = keeper_reduce,
                                  .end = keeper_end};
    CHECK(p->units <= KEEPER_UNITS, "more units than room");
    k->weights = rig_memory(p->weight_elements * ovlm_dtype_bytes(p->dtype));
    k->adapters = rig_memory(p->adapter_elements * ovlm_dtype_bytes(p->dtype));
    k->grads = rig_memory(p->grad_elements * ovlm_dtype_bytes(p->exact));
    memset(k->grads, 0, (size_t)(p->grad_elements * ovlm_dtype_bytes(p->exact)));
    for (int64_t i = 0; i < p->n; i++) {
        const ovlm_param *one = &p->param[i];
        char *to = one->kind == OVLM_PARAM_ADAPTER ? k->adapters : k->weights;
        if (one->kind != OVLM_PARAM_BUFFER) {
            CHECK(ovlm_model_read(model, &one->w, to + one->offset * ovlm_dtype_bytes(p->dtype),
                                  &err) == OVLM_OK, "%s", err.message);
        }
    }
    CHECK(ovlm_model_set_hooks(model, &k->hooks, &err) == OVLM_OK, "%s", err.message);
}

static inline void keeper_close(keeper *k)
{
    free(k->weights);
    free(k->adapters);
    free(k->grads);
}

#endif
