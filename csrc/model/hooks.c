/* hooks.c - a pass goes from unit to unit. */
#include "model/hooks.h"

ovlm_status ovlm_visit_begin(const ovlm_run *run, const ovlm_pass_kind *kind)
{
    ovlm_visit *visit = run->visit;
    visit->held = 0;
    return visit->hooks.begin(visit->hooks.ctx, kind, run->err);
}

ovlm_status ovlm_visit_enter(const ovlm_run *run, int64_t unit, ovlm_unit_use use)
{
    ovlm_visit *visit = run->visit;
    OVLM_TRY(visit->hooks.acquire(visit->hooks.ctx, unit, use, run->err));
    visit->unit[visit->held] = unit;
    visit->use[visit->held++] = use;
    return OVLM_OK;
}

ovlm_status ovlm_visit_leave(const ovlm_run *run, bool reduce)
{
    ovlm_visit *visit = run->visit;
    int64_t unit = visit->unit[--visit->held];
    ovlm_unit_use use = visit->use[visit->held];
    OVLM_TRY(visit->hooks.release(visit->hooks.ctx, unit, use, run->err));
    if (reduce && use != OVLM_USE_FORWARD && ovlm_unit_trained(visit->params, unit)) {
        OVLM_TRY(visit->hooks.reduce(visit->hooks.ctx, unit, run->err));
    }
    return OVLM_OK;
}

ovlm_status ovlm_visit_end(const ovlm_run *run, ovlm_status status)
{
    ovlm_visit *visit = run->visit;
    while (visit->held > 0) { /* the pass failed: what it says is the first error */
        int64_t i = --visit->held;
        (void)visit->hooks.release(visit->hooks.ctx, visit->unit[i], visit->use[i], NULL);
    }
    visit->hooks.end(visit->hooks.ctx, status != OVLM_OK);
    return status;
}

/* ---------------------------------------------------------------- order */

typedef struct listing {
    const ovlm_params *params;
    int64_t n, *order;
} listing;

static void list(listing *l, int64_t unit)
{
    if (l->order != NULL) {
        l->order[l->n] = unit;
    }
    l->n++;
}

/* A block, unless a backward has nothing to do there. */
static void list_block(listing *l, const ovlm_block *block, bool below)
{
    if (below || ovlm_block_trained(l->params, block)) {
        list(l, block->norm1.unit);
        if (block->moe != NULL) {
            list(l, block->experts_up.unit);
        }
    }
}

/* A unit of one of these, unless a backward has nothing to do there. */
static void list_unit(listing *l, int64_t unit, bool below)
{
    if (below || ovlm_unit_trained(l->params, unit)) {
        list(l, unit);
    }
}

/* The DeepStack output that is taken after vision block i, if any. */
static void list_deepstack(listing *l, int64_t i, bool below)
{
    const ovlm_vision_config *c = &l->params->config.vision;
    for (int64_t k = 0; k < c->deepstack_n; k++) {
        if (c->deepstack[k] == i) {
            list_unit(l, l->params->deepstack[k].fc1.unit, below);
        }
    }
}

static void list_forward(listing *l, unsigned phases)
{
    const ovlm_params *p = l->params;
    if (phases & 1u << OVLM_VISION) {
        list(l, p->patch.unit);
        for (int64_t i = 0; i < p->config.vision.depth; i++) {
            list_block(l, &p->vision[i], true);
            list_deepstack(l, i, true);
        }
        list(l, p->merger.fc1.unit);
    }
    if (phases & 1u << OVLM_AUDIO) {
        list(l, p->conv_out.unit);
        for (int64_t i = 0; i < p->config.audio.depth; i++) {
            list_block(l, &p->audio[i], true);
        }
        list(l, p->project.fc1.unit);
    }
    if (phases & OVLM_PHASE_DECODE) {
        list(l, p->embed.unit);
        for (int64_t i = 0; i < p->config.decoder.depth; i++) {
            list_block(l, &p->decoder[i], true);
        }
        list(l, p->norm.unit);
    }
    if (phases & OVLM_PHASE_HEAD) {
        list(l, p->head.unit);
    }
}

/* A tower, or the decoder: its end, its blocks from the last one down, and what they read. */
typedef struct tower {
    const ovlm_block *block;
    int64_t depth, end, feeding; /* the last two are units                                      */
    bool features, deepstack;    /* of what is fed to it; to list with the blocks               */
} tower;

static void list_down(listing *l, const tower *t)
{
    int64_t lowest = ovlm_blocks_lowest(l->params, t->block, t->depth,
                                        t->features || ovlm_unit_trained(l->params, t->feeding));
    list_unit(l, t->end, lowest < t->depth);
    for (int64_t i = t->depth - 1; i >= 0; i--) {
        if (t->deepstack) {
            list_deepstack(l, i, lowest <= i);
        }
        list_block(l, &t->block[i], lowest < i);
    }
    list_unit(l, t->feeding, false);
}

static void list_backward(listing *l, const ovlm_pass_kind *kind)
{
    const ovlm_params *p = l->params;
    const ovlm_model_config *c = &p->config;
    if (kind->phases & OVLM_PHASE_HEAD) {
        list(l, p->head.unit);
    }
    if (kind->phases & OVLM_PHASE_DECODE) {
        list_down(l, &(tower){.block = p->decoder, .depth = c->decoder.depth, .end = p->norm.unit,
                              .feeding = p->embed.unit, .features = kind->features});
    }
    if (kind->phases & 1u << OVLM_AUDIO) {
        list_down(l, &(tower){.block = p->audio, .depth = c->audio.depth,
                              .end = p->project.fc1.unit, .feeding = p->conv_out.unit});
    }
    if (kind->phases & 1u << OVLM_VISION) {
        list_down(l, &(tower){.block = p->vision, .depth = c->vision.depth,
                              .end = p->merger.fc1.unit, .feeding = p->patch.unit,
                              .deepstack = true});
    }
}

int64_t ovlm_unit_order(const ovlm_params *params, const ovlm_pass_kind *kind, int64_t *order)
{
    listing l = {.params = params, .order = order};
    if (kind->backward) {
        list_backward(&l, kind);
    } else {
        list_forward(&l, kind->phases);
    }
    return l.n;
}
