/* params_bind.c - where weights and gradients lie, and the views that layers use. */
#include "model/params.h"

/* Weights of one product share one gradient: all of them are trained, or none. */
static ovlm_status check_products(const ovlm_params *params, const bool *trainable, ovlm_err *err)
{
    for (int64_t i = 1; i < params->n; i++) {
        const ovlm_param *p = &params->param[i];
        if (p->fused == (p - 1)->fused && trainable[i] != trainable[i - 1]) {
            return OVLM_FAIL(err, OVLM_E_ARG,
                             "%s and %s are computed by one product: freeze both or neither",
                             (p - 1)->name, p->name);
        }
    }
    return OVLM_OK;
}

void ovlm_params_place_grads(ovlm_params *params)
{
    int64_t offset = 0;
    for (int64_t i = 0; i < params->n; i++) {
        ovlm_param *p = &params->param[i];
        p->grad_offset = -1;
        if (p->trainable) {
            bool same = i > 0 && (p - 1)->fused == p->fused;
            offset = same ? offset : (offset + 15) / 16 * 16; /* float32: 64 bytes */
            p->grad_offset = offset;
            offset += p->rows * p->cols;
        }
    }
    params->grad_elements = (offset + 15) / 16 * 16;
}

ovlm_status ovlm_params_train_only(ovlm_params *params, const bool *trainable, ovlm_err *err)
{
    OVLM_TRY(check_products(params, trainable, err));
    for (int64_t i = 0; i < params->n; i++) {
        params->param[i].trainable = trainable[i] && params->param[i].kind != OVLM_PARAM_BUFFER;
    }
    ovlm_params_place_grads(params);
    return OVLM_OK;
}

static ovlm_tensor view(void *base, int64_t offset, int64_t rows, int64_t cols, ovlm_dtype dtype)
{
    char *data = base == NULL ? NULL : (char *)base + offset * ovlm_dtype_bytes(dtype);
    return (ovlm_tensor){data, rows, cols, cols, dtype};
}

static void bind_weight(const ovlm_params *params, ovlm_weight *weight)
{
    if (weight->count == 0) {
        return;
    }
    const ovlm_param *first = &params->param[weight->first];
    weight->w = first->w;
    weight->dw = first->grad;
    for (int64_t i = 1; i < weight->count; i++) {
        const ovlm_param *p = first + i;
        /* A fused bias is one longer row; a fused matrix has more rows. */
        *(p->n_dims == 1 ? &weight->w.cols : &weight->w.rows) += p->n_dims == 1 ? p->cols : p->rows;
    }
    weight->w.stride = weight->w.cols;
    if (weight->dw.cols > 0) {
        weight->dw.rows = weight->w.rows;
        weight->dw.cols = weight->dw.stride = weight->w.cols;
    }
}

/* The weights of a struct lie side by side, so that they can be walked. */
static void bind_block(const ovlm_params *params, ovlm_block *block)
{
    ovlm_weight *weights[] = {
        &block->norm1, &block->norm1_bias, &block->qkv, &block->qkv_bias, &block->q_norm,
        &block->k_norm, &block->out, &block->out_bias, &block->norm2, &block->norm2_bias,
        &block->up, &block->up_bias, &block->down, &block->down_bias, &block->router,
        &block->router_bias, &block->experts_up, &block->experts_down, &block->shared_up,
        &block->shared_down};
    for (size_t i = 0; i < sizeof weights / sizeof *weights; i++) {
        bind_weight(params, weights[i]);
    }
}

static void bind_merger(const ovlm_params *params, ovlm_merge_weights *merge)
{
    ovlm_weight *weights[] = {&merge->norm, &merge->norm_bias, &merge->fc1,
                              &merge->fc1_bias, &merge->fc2, &merge->fc2_bias};
    for (size_t i = 0; i < sizeof weights / sizeof *weights; i++) {
        bind_weight(params, weights[i]);
    }
}

void ovlm_params_bind(ovlm_params *params, const ovlm_params_memory *memory)
{
    for (int64_t i = 0; i < params->n; i++) {
        ovlm_param *p = &params->param[i];
        bool buffer = p->kind == OVLM_PARAM_BUFFER;
        p->w = view(buffer                          ? memory->buffers
                    : p->kind == OVLM_PARAM_ADAPTER ? memory->adapters
                                                    : memory->weights,
                    p->offset, p->rows, p->cols, buffer ? memory->exact : memory->dtype);
        p->grad = (ovlm_tensor){0};
        if (p->grad_offset >= 0) {
            p->grad = view(memory->grads, p->grad_offset, p->rows, p->cols, memory->exact);
        }
    }
    ovlm_weight *single[] = {&params->patch, &params->patch_bias, &params->position,
                             &params->final_norm, &params->final_norm_bias, &params->embed,
                             &params->norm, &params->head, &params->conv_out};
    for (size_t i = 0; i < sizeof single / sizeof *single; i++) {
        bind_weight(params, single[i]);
    }
    for (int64_t i = 0; i < ovlm_params_blocks(params); i++) {
        bind_block(params, ovlm_params_block(params, i));
    }
    bind_merger(params, &params->merger);
    for (int64_t i = 0; i < params->config.vision.deepstack_n; i++) {
        bind_merger(params, &params->deepstack[i]);
    }
    for (int i = 0; i < OVLM_CONVOLUTIONS; i++) {
        bind_weight(params, &params->conv[i]);
        bind_weight(params, &params->conv_bias[i]);
    }
    bind_merger(params, &params->project);
    for (int64_t i = 0; i < params->loras; i++) {
        ovlm_lora *lora = &params->lora[i];
        bind_weight(params, &lora->a);
        for (int64_t k = 0; k < lora->n; k++) {
            bind_weight(params, &lora->b[k]);
        }
    }
}

bool ovlm_weight_trained(const ovlm_params *params, const ovlm_weight *weight)
{
    return weight->count > 0 && params->param[weight->first].trainable;
}

/* A block's and a merger's parameters follow each other in the list. */
static bool any_trained(const ovlm_params *params, const ovlm_weight *first,
                        const ovlm_weight *last)
{
    for (int64_t i = first->first; i < last->first + last->count; i++) {
        if (params->param[i].trainable) {
            return true;
        }
    }
    return false;
}

int64_t ovlm_params_blocks(const ovlm_params *params)
{
    const ovlm_model_config *c = &params->config;
    return c->vision.depth + c->audio.depth + c->decoder.depth;
}

ovlm_block *ovlm_params_block(const ovlm_params *params, int64_t i)
{
    int64_t vision = params->config.vision.depth, heard = i - vision;
    int64_t said = heard - params->config.audio.depth;
    return heard < 0  ? &params->vision[i]
           : said < 0 ? &params->audio[heard]
                      : &params->decoder[said];
}

bool ovlm_block_trained(const ovlm_params *params, const ovlm_block *block)
{
    const ovlm_weight *last = block->moe == NULL            ? &block->down
                              : block->shared_down.count > 0 ? &block->shared_down
                                                             : &block->experts_down;
    last = block->down_bias.count > 0 ? &block->down_bias : last;
    const ovlm_weight adapters = {.first = block->adapter_first, .count = block->adapter_count};
    return any_trained(params, &block->norm1, last) || any_trained(params, &adapters, &adapters);
}

bool ovlm_merge_trained(const ovlm_params *params, const ovlm_merge_weights *merge)
{
    return any_trained(params, merge->norm.count > 0 ? &merge->norm : &merge->fc1,
                       &merge->fc2_bias);
}
