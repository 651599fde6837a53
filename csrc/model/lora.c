/* lora.c - passes of low-rank adapters, and where their parameters stand in the list. */
#include "model/lora.h"

#include <stdio.h>
#include <string.h>

enum { RANK_MOST = 65536 };

/* ---------------------------------------------------------------- passes */

static ovlm_status lora_fwd(ovlm_run *run, const ovlm_lora *lora, ovlm_stack *stack,
                            const ovlm_linear *base, ovlm_lora_saved *saved)
{
    saved->down = (ovlm_linear){
        .x = base->x, .w = lora->a.w,
        .y = ovlm_stack_tensor(stack, base->x.rows, lora->a.w.rows, run->dtype)};
    RUN_IN(run, linear, fwd, &saved->down, stack);
    /* The scale stands on the narrow side: that of B's gradient comes with it. */
    ovlm_scale scale = {.alpha = lora->scale, .x = saved->down.y, .y = saved->down.y};
    RUN(run, scale, fwd, &scale);
    for (int64_t i = 0; i < lora->n; i++) {
        ovlm_tensor y = ovlm_tensor_cols(base->y, lora->col[i], lora->b[i].w.rows);
        saved->up[i] = (ovlm_linear){
            .x = ovlm_tensor_cols(saved->down.y, i * lora->rank, lora->rank),
            .w = lora->b[i].w, .add = y, .y = y};
        RUN_IN(run, linear, fwd, &saved->up[i], stack);
    }
    return OVLM_OK;
}

ovlm_status ovlm_linear_fwd(ovlm_run *run, ovlm_linear *args, const ovlm_weight *w,
                            ovlm_stack *stack, ovlm_lora_saved *saved)
{
    RUN_IN(run, linear, fwd, args, stack);
    return w->lora == NULL || w->lora->merged ? OVLM_OK
                                              : lora_fwd(run, w->lora, stack, args, saved);
}

/* With t = scale A x: dB = dy^T t, dt = dy B, and of u = A x: du = scale dt, dA = du^T x,
 * dx += du A. */
static ovlm_status lora_bwd(ovlm_run *run, const ovlm_lora *lora, ovlm_tensor x, ovlm_tensor dy,
                            ovlm_tensor dx, ovlm_lora_saved *saved)
{
    int64_t mark = run->work->used_bytes;
    ovlm_tensor du = {0};
    if (ovlm_tensor_given(&dx) || ovlm_tensor_given(&lora->a.dw)) {
        du = ovlm_stack_tensor(run->work, x.rows, lora->a.w.rows, run->dtype);
    }
    for (int64_t i = 0; i < lora->n; i++) {
        ovlm_linear *up = &saved->up[i];
        up->dy = ovlm_tensor_cols(dy, lora->col[i], lora->b[i].w.rows);
        up->w = lora->b[i].w;
        up->dw = lora->b[i].dw;
        up->dw_beta = 1;
        up->dx = ovlm_tensor_given(&du) ? ovlm_tensor_cols(du, i * lora->rank, lora->rank) : du;
        if (ovlm_tensor_given(&up->dx) || ovlm_tensor_given(&up->dw)) {
            RUN(run, linear, bwd, up);
        }
    }
    if (ovlm_tensor_given(&du)) {
        ovlm_scale scale = {.alpha = lora->scale, .x = du, .y = du};
        RUN(run, scale, fwd, &scale);
        saved->down.x = x; /* it may have been computed again */
        saved->down.dy = du;
        saved->down.dx = dx;
        saved->down.w = lora->a.w;
        saved->down.dw = lora->a.dw;
        saved->down.dx_beta = saved->down.dw_beta = 1;
        RUN(run, linear, bwd, &saved->down);
    }
    run->work->used_bytes = mark;
    return OVLM_OK;
}

ovlm_status ovlm_linear_back(ovlm_run *run, ovlm_linear *args, ovlm_tensor dy,
                             const ovlm_weight *w, const ovlm_weight *bias, ovlm_tensor dx,
                             float dx_beta, ovlm_lora_saved *saved)
{
    args->dy = dy;
    args->dx = dx;
    args->dx_beta = dx_beta;
    args->w = w->w; /* it may be elsewhere than in the forward */
    args->dw = w->dw;
    args->dbias = bias != NULL ? bias->dw : (ovlm_tensor){0};
    args->dw_beta = 1;
    if (ovlm_tensor_given(&dx) || ovlm_tensor_given(&args->dw) ||
        ovlm_tensor_given(&args->dbias)) {
        RUN(run, linear, bwd, args);
    }
    return w->lora == NULL || w->lora->merged ? OVLM_OK
                                              : lora_bwd(run, w->lora, args->x, dy, dx, saved);
}

ovlm_status ovlm_acted_fwd(ovlm_run *run, ovlm_linear *args, const ovlm_weight *w, ovlm_act act,
                           ovlm_stack *stack, ovlm_gated *gated, ovlm_lora_saved *saved,
                           ovlm_tensor *y)
{
    bool apart = w->lora != NULL && !w->lora->merged;
    ovlm_tensor pre = ovlm_stack_tensor(stack, args->x.rows, args->w.rows, run->dtype);
    *y = ovlm_stack_tensor(stack, args->x.rows, args->w.rows, run->dtype);
    if (!apart) {
        args->act = act;
        args->pre = pre;
        args->y = *y;
        RUN_IN(run, linear, fwd, args, stack);
        return OVLM_OK;
    }
    args->y = pre;
    OVLM_TRY(ovlm_linear_fwd(run, args, w, stack, saved));
    *gated = (ovlm_gated){.act = act, .alone = true, .gate_up = pre, .y = *y};
    RUN_IN(run, gated, fwd, gated, stack);
    return OVLM_OK;
}

ovlm_status ovlm_acted_back(ovlm_run *run, ovlm_linear *args, ovlm_tensor dy, const ovlm_weight *w,
                            const ovlm_weight *bias, ovlm_tensor dx, ovlm_gated *gated,
                            ovlm_lora_saved *saved)
{
    if (w->lora != NULL && !w->lora->merged) {
        gated->dy = dy;
        gated->dgate_up = ovlm_stack_tensor(run->work, dy.rows, dy.cols, run->dtype);
        RUN(run, gated, bwd, gated);
        dy = gated->dgate_up;
    }
    return ovlm_linear_back(run, args, dy, w, bias, dx, 0, saved);
}

/* ---------------------------------------------------------------- the list */

int64_t ovlm_params_adaptables(const ovlm_params *params)
{
    return ovlm_params_blocks(params) + 2 + params->config.vision.deepstack_n;
}

/* The merger, the audio projection, DeepStack's mergers. */
static ovlm_merge_weights *merge_of(ovlm_params *params, int64_t i)
{
    return i == 0 ? &params->merger : i == 1 ? &params->project : &params->deepstack[i - 2];
}

int64_t ovlm_params_adaptable(ovlm_params *params, int64_t i,
                              ovlm_weight *product[OVLM_ADAPTABLE])
{
    ovlm_weight *all[OVLM_ADAPTABLE] = {NULL};
    int64_t blocks = ovlm_params_blocks(params), n = 0;
    if (i < blocks) {
        ovlm_block *block = ovlm_params_block(params, i);
        ovlm_weight *const of_block[] = {&block->qkv, &block->out, &block->up,
                                         &block->down, &block->shared_up, &block->shared_down};
        memcpy(all, of_block, sizeof of_block);
    } else {
        ovlm_merge_weights *merge = merge_of(params, i - blocks);
        all[0] = &merge->fc1;
        all[1] = &merge->fc2;
    }
    for (int k = 0; k < OVLM_ADAPTABLE; k++) {
        if (all[k] != NULL && all[k]->count > 0) {
            product[n++] = all[k];
        }
    }
    return n;
}

typedef struct ovlm_listing {
    ovlm_params *params;
    const bool *adapted;
    int64_t rank, n, fused, offset, loras;
    double scale;
    ovlm_param *param;             /* NULL: only counts */
    ovlm_lora *lora;
} ovlm_listing;

static int64_t round_up(int64_t elements)
{
    return (elements + 63) / 64 * 64; /* 64 bytes in any dtype */
}

static void begin(ovlm_listing *list, int64_t unit, ovlm_weight *weight)
{
    list->fused++;
    list->offset = round_up(list->offset);
    *weight = (ovlm_weight){.first = list->n, .unit = unit};
}

static void add(ovlm_listing *list, ovlm_weight *weight, const ovlm_param *base, const char *kind,
                int64_t rows, int64_t cols)
{
    if (list->param != NULL) {
        ovlm_param *p = &list->param[list->n];
        *p = (ovlm_param){.kind = OVLM_PARAM_ADAPTER, .n_dims = 2, .dims = {rows, cols},
                          .rows = rows, .whole_rows = rows, .cols = cols, .fused = list->fused,
                          .unit = weight->unit, .trainable = true,
                          .offset = list->offset, .grad_offset = -1};
        int stem = (int)(strlen(base->name) - strlen(".weight"));
        (void)snprintf(p->name, sizeof p->name, "%.*s.%s.weight", stem, base->name, kind);
    }
    weight->count++;
    list->n++;
    list->offset += rows * cols;
}

/* The adapters of one product, if any of its modules has one. */
static void add_product(ovlm_listing *list, ovlm_weight *product)
{
    const ovlm_param *base = &list->params->param[product->first];
    ovlm_lora lora = {.scale = list->scale, .rank = list->rank};
    int64_t col = 0;
    begin(list, product->unit, &lora.a);
    for (int64_t i = 0; i < product->count; i++) {
        if (list->adapted[product->first + i]) {
            add(list, &lora.a, &base[i], "lora_A", list->rank, base[i].cols);
        }
    }
    for (int64_t i = 0; i < product->count; i++) {
        if (list->adapted[product->first + i]) {
            lora.col[lora.n] = col;
            begin(list, product->unit, &lora.b[lora.n]);
            add(list, &lora.b[lora.n++], &base[i], "lora_B", base[i].rows, list->rank);
        }
        col += base[i].rows;
    }
    if (lora.n > 0 && list->param != NULL) {
        list->lora[list->loras] = lora;
        product->lora = &list->lora[list->loras];
    }
    list->loras += lora.n > 0 ? 1 : 0;
}

static void add_unit(ovlm_listing *list, int64_t i)
{
    ovlm_weight *product[OVLM_ADAPTABLE];
    int64_t n = ovlm_params_adaptable(list->params, i, product);
    list->offset = round_up(list->offset);
    int64_t offset = list->offset;
    for (int64_t k = 0; k < n; k++) {
        add_product(list, product[k]);
    }
    if (n > 0 && list->param != NULL) { /* those of a block are beside layers, none in experts */
        ovlm_unit *adapted = &list->params->unit[product[0]->unit];
        adapted->adapter_offset = offset;
        adapted->adapter_elements = round_up(list->offset) - offset;
    }
}

static void add_all(ovlm_listing *list)
{
    ovlm_params *p = list->params;
    list->n = p->n;
    list->fused = p->param[p->n - 1].fused;
    for (int64_t i = 0; i < ovlm_params_adaptables(p); i++) {
        add_unit(list, i);
    }
}

static bool can_adapt(ovlm_params *params, int64_t i, int64_t parameter)
{
    ovlm_weight *product[OVLM_ADAPTABLE];
    int64_t n = ovlm_params_adaptable(params, i, product);
    for (int64_t k = 0; k < n; k++) {
        if (parameter >= product[k]->first &&
            parameter < product[k]->first + product[k]->count) {
            return true;
        }
    }
    return false;
}

static ovlm_status check_adapted(ovlm_params *params, const bool *adapted, int64_t rank,
                                 ovlm_err *err)
{
    bool any = false;
    for (int64_t i = 0; i < params->n; i++) {
        bool can = !adapted[i];
        for (int64_t k = 0; k < ovlm_params_adaptables(params) && !can; k++) {
            can = can_adapt(params, k, i);
        }
        const ovlm_param *p = &params->param[i];
        if (!can) {
            return OVLM_FAIL(err, OVLM_E_ARG,
                             "%s cannot have an adapter: only linear layers of attention, of MLPs "
                             "(also shared experts) and of mergers can", p->name);
        }
        any = any || adapted[i];
    }
    if (!any || rank < 1 || rank > RANK_MOST) {
        return OVLM_FAIL(err, OVLM_E_ARG, "adapters need a module and a rank in [1, %d]; got %lld",
                         RANK_MOST, (long long)rank);
    }
    return OVLM_OK;
}

ovlm_status ovlm_params_adapt(ovlm_params *params, const bool *adapted, int64_t rank, double scale,
                              ovlm_arena *arena, ovlm_err *err)
{
    OVLM_TRY(check_adapted(params, adapted, rank, err));
    ovlm_listing count = {.params = params, .adapted = adapted, .rank = rank, .scale = scale};
    add_all(&count);
    ovlm_listing fill = count;
    fill.offset = fill.loras = 0;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &fill.param, count.n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &fill.lora, count.loras, err));
    memcpy(fill.param, params->param, (size_t)params->n * sizeof *fill.param);
    add_all(&fill);
    params->n = fill.n;
    params->param = fill.param;
    params->lora = fill.lora;
    params->loras = fill.loras;
    params->adapter_elements = round_up(fill.offset);
    return OVLM_OK;
}

static void forget(ovlm_params *params, int64_t i)
{
    ovlm_weight *product[OVLM_ADAPTABLE];
    int64_t n = ovlm_params_adaptable(params, i, product);
    for (int64_t k = 0; k < n; k++) {
        product[k]->lora = NULL;
    }
}

void ovlm_params_unadapt(ovlm_params *params)
{
    if (params->lora == NULL) {
        return;
    }
    for (int64_t i = 0; i < ovlm_params_adaptables(params); i++) {
        forget(params, i);
    }
    for (int64_t i = 0; i < params->units; i++) {
        params->unit[i].adapter_offset = params->unit[i].adapter_elements = 0;
    }
    params->n = params->base_n;
    params->param = params->base_param;
    params->lora = NULL;
    params->loras = params->adapter_elements = 0;
}
