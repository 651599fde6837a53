/* model_routing.c - the routers' statistics, and the balance without a loss. */
#include "model/model_state.h"

#include <stdlib.h>

/* One after the other: counts, those behind each layer, those of the host, score sums, slopes. */
ovlm_status ovlm_model_routing_open(ovlm_model *model, ovlm_err *err)
{
    int64_t E = model->params.config.decoder.experts, depth = model->params.config.decoder.depth;
    int64_t count_bytes = (2 + depth) * E * (int64_t)sizeof(int64_t);
    int64_t sum_bytes = E * (int64_t)sizeof(double), slope_bytes = E * (int64_t)sizeof(float);
    OVLM_TRY(ovlm_device_block_need(model, &model->routing,
                                    count_bytes + sum_bytes + slope_bytes, true, err));
    if (E > 0) {
        char *base = model->routing.data;
        model->count = model->routing.data;
        model->count_given = model->count + E;
        model->count_after = model->count_given + E;
        model->score_sum = (double *)(void *)(base + count_bytes);
        model->slope = (float *)(void *)(base + count_bytes + sum_bytes);
    }
    return OVLM_OK;
}

ovlm_status ovlm_model_router_read(ovlm_model *model, int64_t *count, ovlm_err *err)
{
    return ovlm_model_fetch(model, count, model->count,
                            model->params.config.decoder.experts * (int64_t)sizeof *count, err);
}

ovlm_status ovlm_model_router_layers(ovlm_model *model, int64_t *count, ovlm_err *err)
{
    const ovlm_decoder_config *c = &model->params.config.decoder;
    int64_t E = c->experts, row = 0, *after = NULL;
    OVLM_TRY(OVLM_HEAP_NEW(&after, c->depth * E, err));
    ovlm_status status = ovlm_model_fetch(model, after, model->count_after,
                                          c->depth * E * (int64_t)sizeof *after, err);
    for (int64_t i = 0; i < c->depth && status == OVLM_OK; i++) {
        if (!ovlm_decoder_layer_sparse(c, i)) {
            continue;
        }
        for (int64_t e = 0; e < E; e++) {
            count[row * E + e] = after[i * E + e] - (i > 0 ? after[(i - 1) * E + e] : 0);
        }
        row++;
    }
    free(after);
    return status;
}

static ovlm_status walk_correct(ovlm_run *run, void *args)
{
    ovlm_balance_loss *balance = args;
    RUN(run, balance_loss, fwd, balance);
    return OVLM_OK;
}

ovlm_status ovlm_model_router_correct(ovlm_model *model, const int64_t *count, double speed,
                                      ovlm_err *err)
{
    const ovlm_decoder_config *c = &model->params.config.decoder;
    int64_t E = c->experts, row = 0;
    if (E == 0 || !c->sigmoid_router) {
        return OVLM_FAIL(err, OVLM_E_ARG, "this model has no routers with a correction: that needs "
                                          "experts and scoring_func \"sigmoid\"");
    }
    const ovlm_ops *ops = model->backend->ops;
    ovlm_balance_loss args = {.experts = E, .rows = 1, .speed = speed,
                              .count = model->count_given};
    model->can_backward = false; /* routers are not what the forward saw */
    for (int64_t i = 0; i < c->depth; i++) {
        if (!ovlm_decoder_layer_sparse(c, i)) {
            continue;
        }
        args.bias = model->params.decoder[i].router_bias.w;
        OVLM_TRY(ops->copy(model->queue, model->count_given, count + row++ * E,
                           E * (int64_t)sizeof *count, OVLM_TO_DEVICE, err));
        OVLM_TRY(ovlm_model_walk_alone(model, walk_correct, &args, err));
    }
    return ops->queue_wait(model->queue, err);
}
