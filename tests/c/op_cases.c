/* op_cases.c - random arguments. */
#include "op_cases.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/ref.h"

/* ---- drawing ---- */

typedef struct draw {
    op_case *c;
    ovlm_rng *rng;
    int64_t size;
} draw;

static int64_t between(draw *d, int64_t low, int64_t high)
{
    return high <= low ? low : low + ovlm_rng_below(d->rng, high - low + 1);
}

static bool chance(draw *d, int64_t one_in)
{
    return ovlm_rng_below(d->rng, one_in) == 0;
}

/* A number of rows: none, one, or some. */
static int64_t rows_of(draw *d)
{
    return chance(d, 10) ? 0 : chance(d, 6) ? 1 : between(d, 2, d->size);
}

static int64_t cols_of(draw *d)
{
    return chance(d, 6) ? 1 : between(d, 2, d->size);
}

static void *room(draw *d, int64_t n, size_t each)
{
    void *out = NULL;
    if (ovlm_arena_alloc(&d->c->arena, &out, n, each, NULL) != OVLM_OK) {
        exit(2);
    }
    return out;
}

static double number(draw *d)
{
    double u = 2 * ovlm_rng_uniform(d->rng) - 1;
    return chance(d, 12) ? 0 : u * (chance(d, 8) ? 3 : 1);
}

static ovlm_tensor tensor(draw *d, int64_t rows, int64_t cols)
{
    double *data = room(d, rows * cols, sizeof *data);
    for (int64_t i = 0; i < rows * cols; i++) {
        data[i] = number(d);
    }
    return ovlm_tensor_of(data, rows, cols, OVLM_F64);
}

/* What an output holds before: nothing that may be used. */
static ovlm_tensor blank(draw *d, int64_t rows, int64_t cols)
{
    ovlm_tensor t = tensor(d, rows, cols);
    for (int64_t i = 0; i < rows * cols; i++) {
        ((double *)t.data)[i] = (double)NAN;
    }
    return t;
}

/* An output that is overwritten or added to. */
static ovlm_tensor sum_of(draw *d, int64_t rows, int64_t cols, float beta)
{
    return beta == 0 ? blank(d, rows, cols) : tensor(d, rows, cols);
}

static ovlm_tensor maybe(draw *d, ovlm_tensor t)
{
    return chance(d, 3) ? (ovlm_tensor){0} : t;
}

static int32_t *indices(draw *d, int64_t n, int64_t low, int64_t high)
{
    int32_t *out = room(d, n, sizeof *out);
    for (int64_t i = 0; i < n; i++) {
        out[i] = (int32_t)between(d, low, high);
    }
    return out;
}

static int32_t *slots(draw *d, int64_t n) /* an integer output */
{
    return indices(d, n, -7, -7);
}

static float beta_of(draw *d)
{
    return chance(d, 2) ? 1.0f : 0.0f;
}

static ovlm_act act_of(draw *d)
{
    return (ovlm_act)between(d, OVLM_ACT_NONE, OVLM_ACT_SILU);
}

/* ---- operations ---- */

static void draw_linear(draw *d, ovlm_linear *a)
{
    int64_t rows = rows_of(d), k = cols_of(d), n = cols_of(d);
    a->w_kn = chance(d, 2);
    a->act = act_of(d);
    a->dx_beta = beta_of(d);
    a->dw_beta = beta_of(d);
    a->x = tensor(d, rows, k);
    a->w = a->w_kn ? tensor(d, k, n) : tensor(d, n, k);
    a->bias = maybe(d, tensor(d, 1, n));
    a->pre = a->act != OVLM_ACT_NONE ? blank(d, rows, n) : maybe(d, blank(d, rows, n));
    a->add = maybe(d, tensor(d, rows, n));
    a->y = blank(d, rows, n);
    a->dy = tensor(d, rows, n);
    a->dx = maybe(d, sum_of(d, rows, k, a->dx_beta));
    a->dw = maybe(d, sum_of(d, a->w.rows, a->w.cols, a->dw_beta));
    a->dbias = maybe(d, sum_of(d, 1, n, a->dw_beta));
}

/* Rows of n groups that sum to `rows` at most; empty ones are frequent. */
static int32_t *offsets_of(draw *d, int64_t n, int64_t rows)
{
    int32_t *out = room(d, n + 1, sizeof *out);
    int64_t left = chance(d, 3) ? between(d, 0, rows) : rows;
    for (int64_t e = 0; e < n; e++) {
        int64_t take = chance(d, 3) ? 0 : e + 1 == n ? left : between(d, 0, left);
        out[e + 1] = out[e] + (int32_t)take;
        left -= take;
    }
    return out;
}

static void draw_grouped_linear(draw *d, ovlm_grouped_linear *a)
{
    int64_t rows = rows_of(d), k = cols_of(d), n = cols_of(d), sources = rows;
    int64_t all = chance(d, 2) ? rows : rows + between(d, 0, d->size);
    a->groups = between(d, 1, 6);
    a->first = between(d, 0, all - rows);
    a->offsets = offsets_of(d, a->groups, all);
    a->host_offsets = chance(d, 2) ? a->offsets : NULL;
    a->w_kn = chance(d, 2);
    a->dx_beta = beta_of(d);
    a->dw_beta = beta_of(d);
    if (chance(d, 2)) {
        sources = between(d, 1, d->size);
        a->index = indices(d, rows, 0, sources - 1);
    }
    a->x = tensor(d, sources, k);
    a->w = a->w_kn ? tensor(d, a->groups * k, n) : tensor(d, a->groups * n, k);
    a->y = blank(d, rows, n);
    a->dy = tensor(d, rows, n);
    a->dx = maybe(d, sum_of(d, rows, k, a->dx_beta));
    a->dw = maybe(d, sum_of(d, a->w.rows, a->w.cols, a->dw_beta));
}

static void draw_gated(draw *d, ovlm_gated *a)
{
    int64_t rows = rows_of(d), cols = cols_of(d);
    a->act = act_of(d);
    a->alone = chance(d, 3);
    int64_t wide = a->alone ? cols : 2 * cols;
    a->gate_up = tensor(d, rows, wide);
    a->y = blank(d, rows, cols);
    a->dy = tensor(d, rows, cols);
    a->dgate_up = blank(d, rows, wide);
}

static void draw_norm(draw *d, ovlm_norm *a)
{
    int64_t rows = rows_of(d), cols = cols_of(d);
    a->rms = chance(d, 2);
    a->eps = chance(d, 2) ? 1e-6 : 1e-5;
    a->groups = chance(d, 2) ? 1 : between(d, 1, 4);
    a->dx_beta = beta_of(d);
    a->dw_beta = beta_of(d);
    a->x = tensor(d, rows, cols * a->groups);
    a->w = tensor(d, 1, cols);
    a->bias = maybe(d, tensor(d, 1, cols));
    a->y = blank(d, rows, cols * a->groups);
    a->dy = tensor(d, rows, cols * a->groups);
    a->dx = maybe(d, sum_of(d, rows, cols * a->groups, a->dx_beta));
    a->dw = maybe(d, sum_of(d, 1, cols, a->dw_beta));
    a->dbias = maybe(d, sum_of(d, 1, cols, a->dw_beta));
}

static void draw_rope_table(draw *d, ovlm_rope_table *a)
{
    int64_t rows = rows_of(d), cols = cols_of(d), axes = between(d, 1, 3);
    a->position = tensor(d, axes, rows);
    a->frequency = tensor(d, 1, cols);
    a->axis = indices(d, cols, 0, axes - 1);
    a->cos = blank(d, rows, cols);
    a->sin = blank(d, rows, cols);
    for (int64_t i = 0; i < axes * rows; i++) {
        ((double *)a->position.data)[i] = (double)between(d, 0, 300);
    }
}

static void draw_rope(draw *d, ovlm_rope *a)
{
    int64_t rows = rows_of(d), half = between(d, 1, 1 + d->size / 2);
    a->heads = chance(d, 3) ? 1 : between(d, 2, 5);
    a->interleaved = chance(d, 2);
    a->eps = 1e-6;
    a->dw_beta = beta_of(d);
    int64_t dim = 2 * half + (chance(d, 2) ? between(d, 0, 5) : 0), cols = a->heads * dim;
    a->x = tensor(d, rows, cols);
    a->w = maybe(d, tensor(d, 1, dim));
    a->cos = tensor(d, rows, half);
    a->sin = tensor(d, rows, half);
    for (int64_t i = 0; i < rows * half; i++) {
        double angle = 6 * ovlm_rng_uniform(d->rng);
        ((double *)a->cos.data)[i] = cos(angle);
        ((double *)a->sin.data)[i] = sin(angle);
    }
    a->y = blank(d, rows, cols);
    a->dy = tensor(d, rows, cols);
    a->dx = maybe(d, blank(d, rows, cols));
    a->dw = ovlm_tensor_given(&a->w) ? maybe(d, sum_of(d, 1, dim, a->dw_beta)) : (ovlm_tensor){0};
}

/* Segments with gaps between them when they have lengths of their own. */
static ovlm_segments segments_of(draw *d, int64_t n, bool lengths, int64_t *rows)
{
    int32_t *start = room(d, n + 1, sizeof *start), *length = room(d, n, sizeof *length);
    ovlm_segments s = {.n = n};
    int64_t at = lengths ? between(d, 0, 2) : 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t take = chance(d, 4) ? 0 : chance(d, 4) ? 1 : between(d, 1, d->size);
        start[i] = (int32_t)at;
        length[i] = (int32_t)take;
        at += take + (lengths ? between(d, 0, 2) : 0);
        s.max_len = take > s.max_len ? take : s.max_len;
    }
    start[n] = (int32_t)at;
    s.max_len += chance(d, 2) ? 3 : 0; /* a bound need not be tight */
    s.start = start;
    s.length = lengths ? length : NULL;
    if (chance(d, 2)) {
        s.host_start = start;
        s.host_length = s.length;
    }
    *rows = at + (chance(d, 3) ? 2 : 0);
    return s;
}

static void draw_attention(draw *d, ovlm_attention *a)
{
    int64_t tq, tk, n = chance(d, 8) ? 0 : between(d, 1, 4), head_dim = cols_of(d);
    int64_t value_dim = chance(d, 2) ? head_dim : cols_of(d);
    a->kv_heads = chance(d, 2) ? 1 : between(d, 1, 3);
    a->heads = a->kv_heads * between(d, 1, 3);
    a->causal = chance(d, 2);
    a->scale = 1 / sqrt((double)head_dim);
    a->query = segments_of(d, n, chance(d, 2), &tq);
    a->key = a->query;
    tk = tq;
    if (chance(d, 2)) {
        a->key = segments_of(d, n, chance(d, 2), &tk);
    }
    a->q = tensor(d, tq, a->heads * head_dim);
    a->k = tensor(d, tk, a->kv_heads * head_dim);
    a->v = tensor(d, tk, a->kv_heads * value_dim);
    a->o = blank(d, tq, a->heads * value_dim);
    a->lse = maybe(d, blank(d, tq, a->heads));
    a->dout = tensor(d, tq, a->heads * value_dim);
    a->dq = maybe(d, blank(d, tq, a->heads * head_dim));
    a->dk = maybe(d, blank(d, tk, a->kv_heads * head_dim));
    a->dv = maybe(d, blank(d, tk, a->kv_heads * value_dim));
}

/* Rows that saw no key, in one part or in both, and rows that one part decides. */
static void draw_merge(draw *d, ovlm_merge *a)
{
    int64_t rows = rows_of(d), dim = cols_of(d);
    a->heads = between(d, 1, 4);
    a->o = tensor(d, rows, a->heads * dim);
    a->lse = tensor(d, rows, a->heads);
    a->part = tensor(d, rows, a->heads * dim);
    a->part_lse = tensor(d, rows, a->heads);
    for (int64_t i = 0; i < rows * a->heads; i++) {
        double *lse = (double *)a->lse.data + i, *part = (double *)a->part_lse.data + i;
        *part = chance(d, 4) ? 30 * *part : *part;
        *lse = chance(d, 6) ? (double)-INFINITY : *lse;
        *part = chance(d, 6) ? (double)-INFINITY : *part;
    }
}

static void draw_gather(draw *d, ovlm_gather *a)
{
    int64_t rows = rows_of(d), sources = between(d, 1, d->size + 3), cols = cols_of(d);
    a->taps = chance(d, 2) ? 1 : between(d, 2, 4);
    a->unique = chance(d, 3);
    int32_t *index = indices(d, rows * a->taps, -1, sources - 1);
    if (a->unique) { /* slot i reads row i of those that there are, backwards */
        for (int64_t i = 0; i < rows * a->taps; i++) {
            index[i] = i < sources ? (int32_t)(sources - 1 - i) : -1;
        }
    }
    a->index = index;
    a->weight = maybe(d, tensor(d, rows, a->taps));
    a->x = tensor(d, sources, cols);
    a->y_beta = beta_of(d);
    a->y = sum_of(d, rows, cols, a->y_beta);
    a->dy = tensor(d, rows, cols);
    a->dx_beta = beta_of(d);
    a->dx = sum_of(d, sources, cols, a->dx_beta);
}

static void draw_scale(draw *d, ovlm_scale *a)
{
    int64_t rows = rows_of(d), cols = cols_of(d);
    d->c->pixels = chance(d, 4);
    a->alpha = number(d);
    a->beta = chance(d, 2) ? 0 : number(d);
    a->scale = maybe(d, tensor(d, 1, cols));
    a->shift = maybe(d, tensor(d, 1, cols));
    a->x = tensor(d, rows, cols);
    for (int64_t i = 0; d->c->pixels && i < rows * cols; i++) {
        ((double *)a->x.data)[i] = (double)between(d, 0, 255);
    }
    a->y = a->beta == 0 ? blank(d, rows, cols) : tensor(d, rows, cols);
    a->dy = tensor(d, rows, cols);
    a->dx_beta = beta_of(d);
    a->dx = sum_of(d, rows, cols, a->dx_beta);
}

static void draw_unfold(draw *d, ovlm_unfold *a)
{
    int64_t cols = between(d, 1, 4);
    a->images = chance(d, 8) ? 0 : between(d, 1, 3);
    a->height = between(d, 1, 9);
    a->width = between(d, 1, 9);
    a->padding = between(d, 0, 2);
    int64_t high = a->height + 2 * a->padding, wide = a->width + 2 * a->padding;
    a->kernel_height = chance(d, 4) ? high : between(d, 1, high < 4 ? high : 4);
    a->kernel_width = between(d, 1, wide < 4 ? wide : 4);
    a->stride = between(d, 1, 3);
    int64_t out_h = (high - a->kernel_height) / a->stride + 1;
    int64_t out_w = (wide - a->kernel_width) / a->stride + 1;
    int64_t pixels = a->images * a->height * a->width, patches = a->images * out_h * out_w;
    a->x = tensor(d, pixels, cols);
    a->y = blank(d, patches, cols * a->kernel_height * a->kernel_width);
    a->dy = tensor(d, patches, cols * a->kernel_height * a->kernel_width);
    a->dx = blank(d, pixels, cols);
}

static void draw_router(draw *d, ovlm_router *a)
{
    int64_t rows = rows_of(d);
    a->teams = chance(d, 2) ? 1 : between(d, 2, 4);
    int64_t each = between(d, 1, 5), experts = a->teams * each;
    a->limit = a->teams == 1 ? 0 : between(d, 1, a->teams);
    int64_t most = a->teams == 1 ? experts : a->limit * each;
    a->k = between(d, 1, most < 4 ? most : 4);
    a->sigmoid = chance(d, 2);
    a->normalise = chance(d, 2);
    a->scale = chance(d, 2) ? 1 : 2.5;
    a->logits = tensor(d, rows, experts);
    a->bias = maybe(d, tensor(d, 1, experts));
    a->expert = slots(d, rows * a->k);
    a->weight = blank(d, rows, a->k);
    a->row = slots(d, rows * a->k);
    a->token = slots(d, rows * a->k);
    a->offsets = slots(d, experts + 1);
    a->count = chance(d, 4) ? NULL : room(d, experts, sizeof *a->count);
    a->score_sum = chance(d, 4) ? NULL : room(d, experts, sizeof *a->score_sum);
    a->dweight = tensor(d, rows, a->k);
    a->aux = maybe(d, tensor(d, 1, experts));
    a->dlogits = blank(d, rows, experts);
}

static void draw_combine(draw *d, ovlm_combine *a)
{
    int64_t rows = rows_of(d), cols = cols_of(d);
    a->k = between(d, 1, 4);
    int64_t sources = rows * a->k + between(d, 0, 3);
    if (chance(d, 2)) {
        a->first = between(d, 0, sources);
        sources = between(d, 0, sources - a->first);
    }
    int32_t *row = room(d, rows * a->k, sizeof *row);
    for (int64_t i = 0; i < rows * a->k; i++) { /* each row once, shuffled */
        int64_t j = between(d, 0, i);
        row[i] = row[j];
        row[j] = (int32_t)i;
    }
    for (int64_t i = 0; i < rows * a->k; i++) {
        row[i] = chance(d, 8) ? -1 : row[i];
    }
    a->row = row;
    a->weight = maybe(d, tensor(d, rows, a->k));
    a->h = tensor(d, sources, cols);
    a->add = maybe(d, tensor(d, rows, cols));
    a->y = blank(d, rows, cols);
    a->dy = tensor(d, rows, cols);
    a->dh = maybe(d, blank(d, sources, cols));
    a->dweight = maybe(d, blank(d, rows, a->k));
}

static double *doubles(draw *d, int64_t n)
{
    return tensor(d, 1, n).data;
}

static float *floats(draw *d, int64_t n)
{
    float *out = room(d, n, sizeof *out);
    for (int64_t i = 0; i < n; i++) {
        out[i] = (float)number(d);
    }
    return out;
}

static void draw_balance_loss(draw *d, ovlm_balance_loss *a)
{
    a->experts = between(d, 1, 9);
    int64_t *count = room(d, a->experts, sizeof *count), sum = 0;
    for (int64_t e = 0; e < a->experts; e++) {
        count[e] = between(d, 0, 20);
        sum += count[e];
    }
    a->rows = (double)sum;
    a->coef = 0.01;
    a->speed = 0.001;
    a->count = count;
    a->score_sum = chance(d, 3) ? NULL : doubles(d, a->experts);
    a->loss = chance(d, 3) ? NULL : doubles(d, 1);
    a->slope = chance(d, 3) ? NULL : floats(d, a->experts);
    a->bias = maybe(d, tensor(d, 1, a->experts));
}

static int32_t *labels_of(draw *d, int64_t n, int64_t classes)
{
    int32_t *label = indices(d, n, 0, classes - 1);
    for (int64_t i = 0; i < n; i++) {
        label[i] = chance(d, 3) ? -100 : label[i];
    }
    return label;
}

static void draw_targets(draw *d, ovlm_targets *a)
{
    a->n = rows_of(d);
    a->label = labels_of(d, a->n, 10);
    float *weight = floats(d, a->n);
    for (int64_t t = 0; t < a->n; t++) {
        weight[t] = fabsf(weight[t]);
    }
    a->weight = chance(d, 2) ? weight : NULL;
    a->own_total = chance(d, 2);
    a->total = doubles(d, 1);
    *a->total = chance(d, 6) ? 0 : 3;
    a->count = room(d, 1, sizeof *a->count);
    a->dlogp = floats(d, a->n);
}

static void draw_head(draw *d, ovlm_head *a)
{
    int64_t rows = rows_of(d), cols = cols_of(d), classes = cols_of(d);
    a->x = tensor(d, rows, cols);
    a->w = tensor(d, classes, cols);
    a->label = labels_of(d, rows, classes);
    a->logp = floats(d, rows);
    a->entropy = chance(d, 2) ? floats(d, rows) : NULL;
    a->fused = chance(d, 3);
    a->dlogp = floats(d, rows);
    a->dentropy = chance(d, 2) ? floats(d, rows) : NULL;
    a->loss = chance(d, 3) ? NULL : doubles(d, 1);
    a->dx_beta = beta_of(d);
    a->dw_beta = beta_of(d);
    a->dx = maybe(d, sum_of(d, rows, cols, a->dx_beta));
    a->dw = maybe(d, sum_of(d, classes, cols, a->dw_beta));
}

static ovlm_grad_stats *stats_of(draw *d)
{
    ovlm_grad_stats *stats = room(d, 1, sizeof *stats);
    *stats = (ovlm_grad_stats){.norm_sq = (double)between(d, 0, 4), .clip = 1};
    return stats;
}

static void draw_grad_norm(draw *d, ovlm_grad_norm *a)
{
    a->n = between(d, 0, 4);
    ovlm_tensor *grad = room(d, a->n, sizeof *grad);
    for (int64_t i = 0; i < a->n; i++) {
        grad[i] = tensor(d, rows_of(d), cols_of(d));
        if (chance(d, 6) && grad[i].rows > 0) {
            ((double *)grad[i].data)[0] = (double)(chance(d, 2) ? INFINITY : NAN);
        }
    }
    a->grad = grad;
    a->stats = stats_of(d);
}

static void draw_adamw(draw *d, ovlm_adamw *a)
{
    a->n = between(d, 0, 4);
    a->step = between(d, 1, 5);
    a->beta1 = 0.9;
    a->beta2 = 0.95;
    a->eps = 1e-8;
    a->max_norm = chance(d, 3) ? 0 : 1;
    a->stats = stats_of(d);
    a->stats->non_finite = chance(d, 8);
    ovlm_adamw_part *part = room(d, a->n, sizeof *part);
    for (int64_t i = 0; i < a->n; i++) {
        int64_t rows = rows_of(d), cols = cols_of(d);
        ovlm_adamw_part *p = &part[i];
        bool master = d->c->storage == OVLM_BF16 || chance(d, 2);
        p->w = tensor(d, rows, cols);
        p->master = master ? tensor(d, rows, cols) : (ovlm_tensor){0};
        p->m = tensor(d, rows, cols);
        p->v = tensor(d, rows, cols);
        for (int64_t j = 0; j < rows * cols; j++) {
            ((double *)p->v.data)[j] = fabs(((double *)p->v.data)[j]);
        }
        p->grad = tensor(d, rows, cols);
        p->lr = 0.01;
        p->weight_decay = chance(d, 2) ? 0.1 : 0;
    }
    a->part = part;
}

/* ---- rounding ---- */

static void round_tensor(const op_case *c, const ovlm_member *m, const ovlm_tensor *t)
{
    double *data = t->data;
    bool pixels = c->pixels && m->type == OVLM_TYPES_PIXEL;
    for (int64_t i = 0; !pixels && i < t->rows * t->cols; i++) {
        bool narrow = c->storage == OVLM_BF16 && m->type != OVLM_TYPES_WIDE;
        data[i] = narrow ? (double)ovlm_ref_of_bf16(ovlm_ref_to_bf16(data[i]))
                         : (double)(float)data[i];
    }
}

static void round_members(const op_case *c, const ovlm_member *members, int n, void *args)
{
    for (int i = 0; i < n; i++) {
        if (members[i].kind == OVLM_MEMBER_TENSOR) {
            round_tensor(c, &members[i], ovlm_member_at(&members[i], args));
        }
    }
}

void op_case_draw(op_case *c, ovlm_op op, ovlm_dtype storage, int64_t size, ovlm_rng *rng)
{
    *c = (op_case){.op = op, .storage = storage};
    draw d = {c, rng, size};
    c->in_place = chance(&d, 3);
    switch (op) {
#define DRAW_CASE(name, type) \
    case OVLM_OP_##name: draw_##name(&d, &c->args.name); break;
        OVLM_OPS(DRAW_CASE)
#undef DRAW_CASE
    case OVLM_OP_COUNT: break;
    }
    const ovlm_op_schema *schema = ovlm_op_schemas[op];
    round_members(c, schema->member, schema->member_n, &c->args);
    for (int64_t i = 0; op == OVLM_OP_grad_norm && i < c->args.grad_norm.n; i++) {
        round_members(c, schema->list_member, 1, (void *)(uintptr_t)&c->args.grad_norm.grad[i]);
    }
    for (int64_t i = 0; op == OVLM_OP_adamw && i < c->args.adamw.n; i++) {
        round_members(c, schema->list_member, schema->list_member_n,
                      (void *)(uintptr_t)&c->args.adamw.part[i]);
    }
}

void op_case_free(op_case *c)
{
    ovlm_arena_free(&c->arena);
}
