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

static int64_t round_up(int64_t value, int64_t unit)
{
    return (value + unit - 1) / unit * unit;
}

enum { GRAD_ALIGN = 16 }; /* elements: 64 bytes in float32 */

/* Counted from the start of each unit's. */
static void place_grads_in_units(ovlm_params *params)
{
    for (int64_t i = 0; i < params->n; i++) {
        ovlm_param *p = &params->param[i];
        ovlm_unit *unit = &params->unit[p->unit];
        p->grad_offset = -1;
        if (p->trainable) {
            bool same = i > 0 && (p - 1)->fused == p->fused;
            p->grad_offset = same ? unit->grad_elements : round_up(unit->grad_elements, GRAD_ALIGN);
            unit->grad_elements = p->grad_offset + p->rows * p->cols;
        }
    }
}

void ovlm_params_place_grads(ovlm_params *params)
{
    for (int64_t i = 0; i < params->units; i++) {
        params->unit[i].grad_elements = 0;
    }
    place_grads_in_units(params);
    int64_t offset = 0;
    for (int64_t i = 0; i < params->units; i++) {
        ovlm_unit *unit = &params->unit[i];
        unit->grad_elements = round_up(unit->grad_elements, GRAD_ALIGN);
        unit->grad_offset = offset;
        offset += unit->grad_elements;
    }
    params->grad_elements = offset;
    for (int64_t i = 0; i < params->n; i++) {
        ovlm_param *p = &params->param[i];
        p->grad_offset += p->trainable ? params->unit[p->unit].grad_offset : 0;
    }
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

/* ---------------------------------------------------------------- places */

static ovlm_tensor view(void *base, int64_t offset, const ovlm_param *p, ovlm_dtype dtype)
{
    char *data = base == NULL ? NULL : (char *)base + offset * ovlm_dtype_bytes(dtype);
    return (ovlm_tensor){data, p->rows, p->cols, p->cols, dtype};
}

static void bind_param(const ovlm_params *params, ovlm_param *p)
{
    const ovlm_unit *unit = &params->unit[p->unit];
    switch (p->kind) {
    case OVLM_PARAM_BUFFER: p->w = view(params->buffers, p->offset, p, params->exact); break;
    case OVLM_PARAM_ADAPTER:
        p->w = view(unit->at.adapters, p->offset - unit->adapter_offset, p, params->dtype);
        break;
    default: p->w = view(unit->at.weights, p->offset - unit->offset, p, params->dtype); break;
    }
    p->grad = (ovlm_tensor){0};
    if (p->grad_offset >= 0) {
        p->grad = view(unit->at.grads, p->grad_offset - unit->grad_offset, p, params->exact);
    }
}

/* The weight's parameters and its own views, where it belongs to the unit. */
static void bind_weight(ovlm_params *params, int64_t unit, ovlm_weight *weight)
{
    if (weight->count == 0 || weight->unit != unit) {
        return;
    }
    ovlm_param *first = &params->param[weight->first];
    bind_param(params, first);
    weight->w = first->w;
    weight->dw = first->grad;
    for (int64_t i = 1; i < weight->count; i++) {
        ovlm_param *p = first + i;
        bind_param(params, p);
        /* A fused bias is one longer row; a fused matrix has more rows. */
        *(p->n_dims == 1 ? &weight->w.cols : &weight->w.rows) += p->n_dims == 1 ? p->cols : p->rows;
    }
    weight->w.stride = weight->w.cols;
    if (weight->dw.cols > 0) {
        weight->dw.rows = weight->w.rows;
        weight->dw.cols = weight->dw.stride = weight->w.cols;
    }
}

static void bind_weights(ovlm_params *params, int64_t unit, ovlm_weight *const *weight, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        bind_weight(params, unit, weight[i]);
        ovlm_lora *lora = weight[i]->lora;
        if (lora != NULL) {
            bind_weight(params, unit, &lora->a);
            for (int64_t k = 0; k < lora->n; k++) {
                bind_weight(params, unit, &lora->b[k]);
            }
        }
    }
}

#define BIND(...)                                                                            \
    bind_weights(params, unit, (ovlm_weight *const[]){__VA_ARGS__},                          \
                 sizeof((ovlm_weight *const[]){__VA_ARGS__}) / sizeof(ovlm_weight *))

/* What belongs to the unit: a layer, or its experts. */
static void bind_block(ovlm_params *params, int64_t unit, ovlm_block *block)
{
    BIND(&block->norm1, &block->norm1_bias, &block->qkv, &block->qkv_bias, &block->q_norm,
         &block->k_norm, &block->out, &block->out_bias, &block->norm2, &block->norm2_bias,
         &block->up, &block->up_bias, &block->down, &block->down_bias, &block->router,
         &block->router_bias, &block->experts_up, &block->experts_down, &block->shared_up,
         &block->shared_down);
}

static void bind_merger(ovlm_params *params, int64_t unit, ovlm_merge_weights *merge)
{
    BIND(&merge->norm, &merge->norm_bias, &merge->fc1, &merge->fc1_bias, &merge->fc2,
         &merge->fc2_bias);
}

static void bind_front(ovlm_params *params, int64_t unit)
{
    for (int i = 0; i < OVLM_CONVOLUTIONS; i++) {
        BIND(&params->conv[i], &params->conv_bias[i]);
    }
    BIND(&params->conv_out);
}

void ovlm_params_place(ovlm_params *params, int64_t unit, const ovlm_unit_memory *memory)
{
    ovlm_unit *u = &params->unit[unit];
    u->at = *memory;
    switch (u->kind) {
    case OVLM_UNIT_PATCHES: BIND(&params->patch, &params->patch_bias, &params->position); break;
    case OVLM_UNIT_VISION_BLOCK: bind_block(params, unit, &params->vision[u->index]); break;
    case OVLM_UNIT_MERGER:
        BIND(&params->final_norm, &params->final_norm_bias);
        bind_merger(params, unit, &params->merger);
        break;
    case OVLM_UNIT_DEEPSTACK: bind_merger(params, unit, &params->deepstack[u->index]); break;
    case OVLM_UNIT_FRONT: bind_front(params, unit); break;
    case OVLM_UNIT_AUDIO_LAYER: bind_block(params, unit, &params->audio[u->index]); break;
    case OVLM_UNIT_PROJECT: bind_merger(params, unit, &params->project); break;
    case OVLM_UNIT_LAYER:
    case OVLM_UNIT_EXPERTS: bind_block(params, unit, &params->decoder[u->index]); break;
    case OVLM_UNIT_NORM: BIND(&params->norm); break;
    case OVLM_UNIT_EMBED: /* a tied head is the embedding a second time */
    case OVLM_UNIT_HEAD: BIND(&params->embed, &params->head); break;
    }
}

/* ---------------------------------------------------------------- what is trained */

bool ovlm_weight_trained(const ovlm_params *params, const ovlm_weight *weight)
{
    return weight->count > 0 && params->param[weight->first].trainable;
}

bool ovlm_unit_trained(const ovlm_params *params, int64_t unit)
{
    return params->unit[unit].grad_elements > 0;
}

bool ovlm_units_trained(const ovlm_params *params, ovlm_unit_kind first, ovlm_unit_kind last)
{
    for (int64_t i = 0; i < params->units; i++) {
        ovlm_unit_kind kind = params->unit[i].kind;
        if (kind >= first && kind <= last && ovlm_unit_trained(params, i)) {
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
    return ovlm_unit_trained(params, block->norm1.unit) ||
           (block->moe != NULL && ovlm_unit_trained(params, block->experts_up.unit));
}

int64_t ovlm_blocks_lowest(const ovlm_params *params, const ovlm_block *block, int64_t depth,
                           bool fed)
{
    if (fed) {
        return -1;
    }
    int64_t i = 0;
    while (i < depth && !ovlm_block_trained(params, &block[i])) {
        i++;
    }
    return i;
}
