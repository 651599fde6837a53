/* sp_policy.c - static, homogeneous and chunked steps (FlexSP, Alg. 1). */
#include "plan/sp_policy.h"

#include <stdlib.h>

#include "plan/sp_bound.h"
#include "plan/sp_dp.h"

typedef struct chunker {
    const sp_model *model;
    ovlm_sp_policy policy;
    bool mixed;          /* a chunk needed it                                             */
    int64_t *all;        /* [n] 0..n-1                                                    */
    int64_t *begin;      /* [n+1]                                                         */
    sp_micro trial, best;
    sp_draft draft;      /* scratch: one number of micro-batches                          */
    ovlm_arena *arena;
    ovlm_err *err;
} chunker;

static ovlm_status chunker_init(chunker *c, int64_t n)
{
    OVLM_TRY(OVLM_ARENA_NEW(c->arena, &c->all, n, c->err));
    OVLM_TRY(OVLM_ARENA_NEW(c->arena, &c->begin, n + 1, c->err));
    OVLM_TRY(sp_micro_init(&c->trial, n, c->arena, c->err));
    OVLM_TRY(sp_micro_init(&c->best, n, c->arena, c->err));
    for (int64_t k = 0; k < n; k++) {
        c->all[k] = k;
    }
    return sp_draft_init(&c->draft, n, c->arena, c->err);
}

static void keep_better(chunker *c)
{
    if (c->trial.makespan < c->best.makespan) {
        sp_micro swap = c->trial;
        c->trial = c->best;
        c->best = swap;
    }
}

/* c->best = groups for the items begin..end-1; only degree index `only` when that is >= 0. */
static ovlm_status solve_chunk(chunker *c, int64_t begin, int64_t end, int64_t only)
{
    const sp_model *model = c->model;
    int64_t from = only >= 0 ? only : model->min_j[begin], to = only >= 0 ? only : model->D - 1;
    c->best.makespan = HUGE_VAL;
    for (int64_t j = from; j <= to; j++) {
        c->trial.makespan = HUGE_VAL;
        OVLM_TRY(sp_micro_homogeneous(model, c->all + begin, end - begin, j, &c->trial, c->arena,
                                      c->err));
        keep_better(c);
    }
    if (c->policy >= OVLM_SP_CHUNKED && !isfinite(c->best.makespan)) {
        c->trial.makespan = HUGE_VAL;
        c->mixed = true;
        OVLM_TRY(sp_micro_construct(model, c->all + begin, end - begin, &c->trial, c->arena,
                                    c->err));
        keep_better(c);
    }
    return OVLM_OK;
}

/* c->draft = all chunks of c->begin; time HUGE_VAL when one of them does not fit. */
static ovlm_status solve_chunks(chunker *c, int64_t n_micro, int64_t only)
{
    sp_draft_begin(&c->draft);
    for (int64_t m = 0; m < n_micro; m++) {
        OVLM_TRY(solve_chunk(c, c->begin[m], c->begin[m + 1], only));
        if (!isfinite(c->best.makespan)) {
            c->draft.time_s = HUGE_VAL;
            return OVLM_OK;
        }
        sp_draft_append(&c->draft, c->model, &c->best);
    }
    return OVLM_OK;
}

/* The best draft with n_micro chunks, into `to`: over all degrees when the policy is static. */
static ovlm_status try_micro(chunker *c, int64_t n_micro, sp_draft *to)
{
    const sp_model *model = c->model;
    OVLM_TRY(sp_blast(model->s, model->n, n_micro, c->begin, c->arena, c->err));
    bool fixed_degree = c->policy == OVLM_SP_STATIC;
    int64_t from = fixed_degree ? model->min_j[0] : -1, last = fixed_degree ? model->D - 1 : -1;
    for (int64_t only = from; only <= last; only++) {
        OVLM_TRY(solve_chunks(c, n_micro, only));
        if (c->draft.time_s < to->time_s) {
            sp_draft_copy(to, &c->draft);
        }
    }
    return OVLM_OK;
}

/* Fewest micro-batches whose memory could hold all tokens. */
static int64_t least_micro(const sp_model *model)
{
    double per_gpu = 0;
    for (int64_t j = 0; j < model->D; j++) {
        double tokens = (double)model->cap[j] / (double)model->degree[j];
        per_gpu = tokens > per_gpu ? tokens : per_gpu;
    }
    double least = model->sum_s[model->n] / (per_gpu * (double)model->n_gpus);
    int64_t whole = least < (double)model->n ? (int64_t)least : model->n;
    return whole < 1 ? 1 : whole;
}

ovlm_status sp_policy_start(const sp_model *model, ovlm_sp_policy policy, int64_t n_micro,
                            sp_chunked *chunked, sp_purse *purse, ovlm_arena *arena,
                            ovlm_err *err)
{
    chunker c = {.model = model, .policy = policy, .arena = arena, .err = err};
    OVLM_TRY(chunker_init(&c, model->n));
    *chunked = (sp_chunked){0};
    int64_t first = n_micro > 0 ? n_micro : least_micro(model);
    first = first < model->n ? first : model->n;
    /* n chunks of one sequence are feasible, so this ends; steps widen so that it ends soon. */
    for (int64_t m = first; m <= model->n && chunked->n_drafts < SP_TRIES;) {
        sp_draft *draft = &chunked->draft[chunked->n_drafts];
        if (draft->item == NULL) {
            OVLM_TRY(sp_draft_init(draft, model->n, arena, err));
        }
        OVLM_TRY(try_micro(&c, m, draft));
        chunked->n_drafts += isfinite(draft->time_s);
        bool over = sp_purse_expired(purse) && (chunked->n_drafts > 0 || purse->meter.interrupted);
        if (n_micro > 0 || over) {
            break;
        }
        bool wide = chunked->n_drafts == 0 && m < model->n && m >= first + 8;
        int64_t next = m + (wide ? 1 + m / 8 : 1);
        m = wide && next > model->n ? model->n : next;
    }
    int64_t order[SP_DRAFTS];
    sp_policy_order(chunked, order);
    chunked->mixed = c.mixed;
    return OVLM_OK;
}

void sp_policy_order(sp_chunked *chunked, int64_t *order)
{
    for (int64_t i = 0; i < chunked->n_drafts; i++) {
        int64_t at = i;
        double time = chunked->draft[i].time_s;
        for (; at > 0 && chunked->draft[order[at - 1]].time_s > time; at--) {
            order[at] = order[at - 1];
        }
        order[at] = i;
    }
    chunked->best = chunked->n_drafts > 0 ? order[0] : 0;
}

/* ------------------------------------------------------------------ improvement ---------- */

static int compare_i64(const void *left, const void *right)
{
    int64_t a = *(const int64_t *)left, b = *(const int64_t *)right;
    return (a > b) - (a < b);
}

/* Micro-batch m of a draft as an sp_micro, and its items ascending in k. */
static void load_micro(const sp_model *model, const sp_draft *draft, int64_t m, sp_micro *micro,
                       int64_t *k)
{
    int64_t g0 = draft->micro_start[m], g1 = draft->micro_start[m + 1], i0 = draft->start[g0];
    micro->n_groups = g1 - g0;
    micro->makespan = 0;
    for (int64_t g = g0; g < g1; g++) {
        double time = 0;
        micro->j[g - g0] = draft->j[g];
        micro->start[g - g0] = draft->start[g] - i0;
        for (int64_t i = draft->start[g]; i < draft->start[g + 1]; i++) {
            micro->item[i - i0] = k[i - i0] = draft->item[i];
            time += sp_item_time(model, draft->item[i], draft->j[g]);
        }
        micro->makespan = time > micro->makespan ? time : micro->makespan;
    }
    micro->start[g1 - g0] = draft->start[g1] - i0;
    qsort(k, (size_t)micro->start[g1 - g0], sizeof *k, compare_i64);
}

static ovlm_status mix_draft(const sp_model *model, sp_draft *draft, sp_draft *better,
                             sp_micro *micro, sp_micro *mixed, int64_t *k, ovlm_arena *arena,
                             ovlm_err *err)
{
    sp_draft_begin(better);
    for (int64_t m = 0; m < draft->n_micro; m++) {
        load_micro(model, draft, m, micro, k);
        mixed->makespan = HUGE_VAL;
        OVLM_TRY(sp_micro_construct(model, k, micro->start[micro->n_groups], mixed, arena, err));
        sp_draft_append(better, model, mixed->makespan < micro->makespan ? mixed : micro);
    }
    if (better->time_s < draft->time_s) {
        sp_draft_copy(draft, better);
    }
    return OVLM_OK;
}

ovlm_status sp_policy_mix(const sp_model *model, sp_chunked *chunked, int64_t most,
                          sp_purse *purse, ovlm_arena *arena, ovlm_err *err)
{
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    ovlm_status status = OVLM_OK;
    sp_micro micro, mixed;
    sp_draft better;
    int64_t *k, order[SP_DRAFTS] = {0};
    OVLM_GOTO(done, sp_micro_init(&micro, model->n, arena, err));
    OVLM_GOTO(done, sp_micro_init(&mixed, model->n, arena, err));
    OVLM_GOTO(done, sp_draft_init(&better, model->n, arena, err));
    OVLM_GOTO(done, OVLM_ARENA_NEW(arena, &k, model->n, err));
    sp_policy_order(chunked, order);
    for (int64_t i = 0; i < chunked->n_drafts && i < most && !sp_purse_expired(purse); i++) {
        sp_draft *draft = &chunked->draft[order[i]];
        OVLM_GOTO(done, mix_draft(model, draft, &better, &micro, &mixed, k, arena, err));
    }
    sp_policy_order(chunked, order);
done:
    ovlm_arena_rewind(arena, mark);
    return status;
}

ovlm_status sp_policy_improve(const sp_model *model, sp_draft *draft, double share, uint64_t seed,
                              sp_purse *purse, ovlm_arena *arena, ovlm_err *err)
{
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    ovlm_status status = OVLM_OK;
    ovlm_rng rng;
    sp_micro micro;
    sp_draft better;
    int64_t *k;
    ovlm_rng_init(&rng, seed);
    OVLM_GOTO(done, sp_micro_init(&micro, model->n, arena, err));
    OVLM_GOTO(done, sp_draft_init(&better, model->n, arena, err));
    OVLM_GOTO(done, OVLM_ARENA_NEW(arena, &k, model->n, err));
    sp_draft_begin(&better);
    for (int64_t m = 0; m < draft->n_micro; m++) {
        load_micro(model, draft, m, &micro, k);
        int64_t count = micro.start[micro.n_groups];
        /* share/n_micro of the purse as it was, were everything before used up. */
        double used = (double)m * share, all = (double)draft->n_micro;
        ovlm_meter part = sp_purse_part(purse, share / (all - used));
        double target = sp_bound_quick(model, k, count);
        OVLM_GOTO(done, sp_micro_solve(model, k, count, target, &part, &rng, &micro, arena, err));
        (void)sp_purse_absorb(purse, &part);
        sp_draft_append(&better, model, &micro);
    }
    if (better.time_s < draft->time_s) {
        sp_draft_copy(draft, &better);
    }
done:
    ovlm_arena_rewind(arena, mark);
    return status;
}

ovlm_status sp_policy_chunked(const sp_model *model, sp_chunked *chunked, uint64_t seed,
                              sp_purse *purse, ovlm_arena *arena, ovlm_err *err)
{
    int64_t order[SP_DRAFTS];
    OVLM_TRY(sp_policy_mix(model, chunked, SP_TRIES, purse, arena, err));
    sp_policy_order(chunked, order);
    for (int64_t round = 0; round < chunked->n_drafts; round++) {
        int64_t next = order[round];
        double share = round + 1 < chunked->n_drafts ? 0.5 : 1.0;
        OVLM_TRY(sp_policy_improve(model, &chunked->draft[next], share, seed + (uint64_t)next,
                                   purse, arena, err));
    }
    sp_policy_order(chunked, order);
    return OVLM_OK;
}
