/* sp_policy.c - static, homogeneous and chunked steps (FlexSP, Alg. 1). */
#include "plan/sp_policy.h"

#include <stdlib.h>

#include "base/sort.h"
#include "plan/sp_bound.h"
#include "plan/sp_dp.h"

/* Shares of the allowance for the group solver, where there are several micro-batches and where one
 * is all there is; steps per sequence that mixed groups take to build. */
#define SHARE 0.1
#define SHARE_ALONE 0.3
enum { MIX_STEPS = 16 };

typedef struct chunker {
    const sp_model *model;
    ovlm_sp_policy policy;
    bool mixed;          /* a chunk needed it                                             */
    bool found;          /* some draft                                                    */
    sp_purse *purse;
    int64_t *all;        /* [n] 0..n-1                                                    */
    int64_t *begin;      /* [n+1]                                                         */
    sp_micro trial, best;
    sp_draft draft;      /* scratch: one number of micro-batches                          */
    sp_draft own;        /* scratch: the best of one degree alone                         */
    int64_t most;        /* micro-batches                                                 */
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

static bool is_over(chunker *c)
{
    return sp_purse_expired(c->purse);
}

/* c->best = groups for the items begin..end-1; only degree index `only` when that is >= 0. */
static ovlm_status solve_chunk(chunker *c, int64_t begin, int64_t end, int64_t only)
{
    const sp_model *model = c->model;
    int64_t from = only >= 0 ? only : model->min_j[begin], to = only >= 0 ? only : model->D - 1;
    c->best.makespan = HUGE_VAL;
    for (int64_t j = from; j <= to && !(isfinite(c->best.makespan) && is_over(c)); j++) {
        c->trial.makespan = HUGE_VAL;
        OVLM_TRY(sp_micro_homogeneous(model, c->all + begin, end - begin, j, &c->trial, c->arena,
                                      c->err));
        keep_better(c);
    }
    if (c->policy >= OVLM_SP_CHUNKED && !isfinite(c->best.makespan)) {
        ovlm_meter part = sp_purse_steps(c->purse, INT64_MAX);
        c->trial.makespan = HUGE_VAL;
        c->mixed = true;
        OVLM_TRY(sp_micro_construct(model, c->all + begin, end - begin, &part, &c->trial,
                                    c->arena, c->err));
        part.work = 0; /* a construction */
        (void)sp_purse_absorb(c->purse, &part);
        keep_better(c);
    }
    return OVLM_OK;
}

/* c->draft = all chunks of c->begin; time HUGE_VAL when one of them does not fit, or another draft
 * is there and the clock is over. */
static ovlm_status solve_chunks(chunker *c, int64_t n_micro, int64_t only)
{
    sp_draft_begin(&c->draft);
    for (int64_t m = 0; m < n_micro; m++) {
        OVLM_TRY(solve_chunk(c, c->begin[m], c->begin[m + 1], only));
        bool stop = is_over(c) && (c->found || c->purse->meter.interrupted);
        if (!isfinite(c->best.makespan) || stop) {
            c->draft.time_s = HUGE_VAL;
            return OVLM_OK;
        }
        sp_draft_append(&c->draft, c->model, &c->best);
    }
    return OVLM_OK;
}

/* n_micro chunks, into `to` where they are better; only degree index `only` when that is >= 0.
 * False through *fits when some chunk has no plan. */
static ovlm_status try_micro(chunker *c, int64_t n_micro, int64_t only, sp_draft *to, bool *fits)
{
    const sp_model *model = c->model;
    OVLM_TRY(sp_blast(model->s, model->n, n_micro, c->begin, c->arena, c->err));
    OVLM_TRY(solve_chunks(c, n_micro, only));
    *fits = isfinite(c->draft.time_s);
    if (c->draft.time_s < to->time_s) {
        sp_draft_copy(to, &c->draft);
        c->found = true;
    }
    return OVLM_OK;
}

/* The clock is over and there is a draft, or the caller wants to stop. */
static bool must_stop(chunker *c)
{
    return is_over(c) && (c->found || c->purse->meter.interrupted);
}

/* *first = the least number of chunks from `least` to c->most that has a plan, which goes into
 * `to`; 0: none.  In steps that widen, so that it ends soon where short chunks alone fit, and then
 * by halves between the last one that failed and the first that did not. */
static ovlm_status find_first(chunker *c, int64_t least, int64_t only, sp_draft *to,
                              int64_t *first)
{
    enum { NARROW = 8 };
    int64_t failed = least - 1, m = least;
    bool fits = false;
    *first = 0;
    OVLM_TRY(try_micro(c, m, only, to, &fits));
    while (!fits && m < c->most && !must_stop(c)) {
        int64_t next = m + 1 + (m >= least + NARROW ? m / 8 : 0);
        failed = m;
        m = next < c->most ? next : c->most;
        OVLM_TRY(try_micro(c, m, only, to, &fits));
    }
    *first = fits ? m : 0;
    while (fits && *first - failed > 1 && !must_stop(c)) {
        bool fewer = false;
        m = failed + (*first - failed) / 2;
        OVLM_TRY(try_micro(c, m, only, to, &fewer));
        failed = fewer ? failed : m;
        *first = fewer ? m : *first;
    }
    return OVLM_OK;
}

/* Fewest micro-batches of that many tokens each; at most one per sequence. */
static int64_t least_micro(const sp_model *model, double tokens)
{
    double least = model->sum_s[model->n] / tokens;
    int64_t whole = least < (double)model->n ? (int64_t)least : model->n;
    return whole < 1 ? 1 : whole;
}

static ovlm_status chunker_open(chunker *c, const sp_model *model, ovlm_sp_policy policy,
                                int64_t n_micro, sp_purse *purse, ovlm_arena *arena, ovlm_err *err)
{
    *c = (chunker){
        .model = model, .policy = policy, .purse = purse, .arena = arena, .err = err};
    c->most = n_micro > 0 && n_micro < model->n ? n_micro : model->n;
    return chunker_init(c, model->n);
}

ovlm_status sp_policy_start(const sp_model *model, ovlm_sp_policy policy, int64_t n_micro,
                            sp_chunked *chunked, sp_purse *purse, ovlm_arena *arena,
                            ovlm_err *err)
{
    chunker c;
    OVLM_TRY(chunker_open(&c, model, policy, n_micro, purse, arena, err));
    *chunked = (sp_chunked){0};
    int64_t first = least_micro(model, sp_model_tokens(model));
    first = first < c.most ? first : c.most;
    for (int64_t m = 0; chunked->n_drafts < SP_TRIES && m <= c.most; m++) {
        sp_draft *draft = &chunked->draft[chunked->n_drafts];
        bool fits = false;
        OVLM_TRY(sp_draft_init(draft, model->n, arena, err));
        if (m == 0) {
            OVLM_TRY(find_first(&c, first, -1, draft, &m));
        } else {
            OVLM_TRY(try_micro(&c, m, -1, draft, &fits));
        }
        chunked->n_drafts += isfinite(draft->time_s);
        if (m == 0 || must_stop(&c)) {
            break;
        }
    }
    int64_t order[SP_DRAFTS];
    sp_policy_order(chunked, order);
    chunked->mixed = c.mixed;
    return OVLM_OK;
}

/* The best step of degree index j alone, into `to` where it is better; *best = its number of
 * micro-batches, 0: none. */
static ovlm_status try_degree(chunker *c, int64_t j, sp_draft *to, int64_t *best)
{
    const sp_model *model = c->model;
    double per_gpu = (double)model->cap[j] / (double)model->degree[j];
    int64_t least = least_micro(model, per_gpu * (double)model->n_gpus), first = 0;
    sp_draft *own = &c->own;
    bool fits;
    *best = 0;
    own->time_s = HUGE_VAL;
    if (least > c->most) {
        return OVLM_OK;
    }
    OVLM_TRY(find_first(c, least, j, own, &first));
    for (int64_t m = first + 1; first > 0 && m < first + SP_TRIES && m <= c->most; m++) {
        if (must_stop(c)) {
            break;
        }
        OVLM_TRY(try_micro(c, m, j, own, &fits));
    }
    if (isfinite(own->time_s)) {
        *best = own->n_micro;
    }
    if (own->time_s < to->time_s) {
        sp_draft_copy(to, own);
    }
    return OVLM_OK;
}

ovlm_status sp_policy_degrees(const sp_model *model, ovlm_sp_policy policy, int64_t n_micro,
                              sp_draft *draft, sp_purse *purse, ovlm_arena *arena, ovlm_err *err)
{
    chunker c;
    OVLM_TRY(chunker_open(&c, model, policy, n_micro, purse, arena, err));
    OVLM_TRY(sp_draft_init(&c.own, model->n, arena, err));
    int64_t tried[SP_MAX_DEGREES] = {0}, n_tried = 0;
    for (int64_t j = model->min_j[0]; j < model->D && !must_stop(&c); j++) {
        int64_t best = 0;
        bool fits = false, again = false;
        OVLM_TRY(try_degree(&c, j, draft, &best));
        for (int64_t i = 0; i < n_tried; i++) {
            again = again || tried[i] == best;
        }
        if (policy != OVLM_SP_STATIC && best > 0 && !again) {
            tried[n_tried++] = best;
            OVLM_TRY(try_micro(&c, best, -1, draft, &fits));
        }
    }
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
    qsort(k, (size_t)micro->start[g1 - g0], sizeof *k, ovlm_compare_i64);
}

/* What the chunks of one draft are improved with. */
typedef struct improver {
    const sp_model *model;
    sp_purse *purse;
    sp_micro micro, mixed;
    sp_draft better;
    int64_t *k; /* [n] */
    ovlm_arena *arena;
    ovlm_err *err;
} improver;

static ovlm_status improver_init(improver *im)
{
    int64_t n = im->model->n;
    OVLM_TRY(sp_micro_init(&im->micro, n, im->arena, im->err));
    OVLM_TRY(sp_micro_init(&im->mixed, n, im->arena, im->err));
    OVLM_TRY(sp_draft_init(&im->better, n, im->arena, im->err));
    return OVLM_ARENA_NEW(im->arena, &im->k, n, im->err);
}

/* Mixed groups for the chunk, kept where they are better. */
static ovlm_status mix(improver *im, int64_t count, ovlm_meter *meter)
{
    im->mixed.makespan = HUGE_VAL;
    OVLM_TRY(sp_micro_construct(im->model, im->k, count, meter, &im->mixed, im->arena, im->err));
    if (im->mixed.makespan < im->micro.makespan) {
        sp_micro swap = im->micro;
        im->micro = im->mixed;
        im->mixed = swap;
    }
    return OVLM_OK;
}

/* Mixed groups in every chunk of the draft, without search. */
static ovlm_status mix_draft(improver *im, sp_draft *draft)
{
    sp_draft_begin(&im->better);
    for (int64_t m = 0; m < draft->n_micro; m++) {
        load_micro(im->model, draft, m, &im->micro, im->k);
        ovlm_meter part = sp_purse_steps(im->purse, INT64_MAX);
        if (!sp_purse_expired(im->purse)) {
            OVLM_TRY(mix(im, im->micro.start[im->micro.n_groups], &part));
        }
        part.work = 0; /* a construction */
        (void)sp_purse_absorb(im->purse, &part);
        sp_draft_append(&im->better, im->model, &im->micro);
    }
    if (im->better.time_s < draft->time_s) {
        sp_draft_copy(draft, &im->better);
    }
    return OVLM_OK;
}

/* What a search leaves of its part.  Not what it takes beyond: then more work would not always mean
 * more for whoever comes next. */
static int64_t left_of(int64_t steps, const ovlm_meter *part)
{
    return steps - (part->work < part->work_limit ? part->work : part->work_limit);
}

/* Every chunk of the draft by itself, with an equal part of the steps left; returns them. */
static ovlm_status improve_draft(improver *im, sp_draft *draft, bool mixed, uint64_t seed,
                                 int64_t *steps)
{
    sp_draft_begin(&im->better);
    for (int64_t m = 0; m < draft->n_micro; m++) {
        ovlm_rng rng;
        ovlm_rng_init(&rng, seed + (uint64_t)m * SP_DRAFTS);
        load_micro(im->model, draft, m, &im->micro, im->k);
        int64_t count = im->micro.start[im->micro.n_groups];
        ovlm_meter part = sp_purse_steps(im->purse, *steps / (draft->n_micro - m));
        bool over = sp_purse_expired(im->purse) || part.work_limit == 0;
        if (!over && !mixed && part.work_limit > MIX_STEPS * count) {
            OVLM_TRY(mix(im, count, &part));
        }
        double target = over ? 0 : sp_bound_quick(im->model, im->k, count);
        if (!over) {
            OVLM_TRY(sp_micro_solve(im->model, im->k, count, target, &part, &rng, &im->micro,
                                    im->arena, im->err));
        }
        *steps = left_of(*steps, &part);
        (void)sp_purse_absorb(im->purse, &part);
        sp_draft_append(&im->better, im->model, &im->micro);
    }
    if (im->better.time_s < draft->time_s) {
        sp_draft_copy(draft, &im->better);
    }
    return OVLM_OK;
}

/* Half of what is left for each draft, the best one first; the last one has all of it. */
static ovlm_status improve_drafts(improver *im, sp_chunked *chunked, uint64_t seed)
{
    int64_t order[SP_DRAFTS] = {0};
    sp_policy_order(chunked, order);
    OVLM_TRY(mix_draft(im, &chunked->draft[order[0]]));
    /* Where one micro-batch is all there is, its groups are all that can be improved. */
    bool alone = chunked->draft[order[0]].n_micro == 1;
    double share = alone ? SHARE_ALONE : SHARE;
    int64_t steps = (int64_t)(share * (double)im->purse->allowance);
    for (int64_t round = 0; round < chunked->n_drafts && !sp_purse_expired(im->purse); round++) {
        int64_t now = round + 1 < chunked->n_drafts ? steps / 2 : steps, left = now;
        OVLM_TRY(improve_draft(im, &chunked->draft[order[round]], round == 0,
                               seed + (uint64_t)order[round], &left));
        steps -= now - left;
    }
    sp_policy_order(chunked, order);
    return OVLM_OK;
}

ovlm_status sp_policy_chunked(const sp_model *model, sp_chunked *chunked, uint64_t seed,
                              sp_purse *purse, ovlm_arena *arena, ovlm_err *err)
{
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    improver im = {.model = model, .purse = purse, .arena = arena, .err = err};
    ovlm_status status = OVLM_OK;
    if (chunked->n_drafts > 0 && !sp_purse_expired(purse)) {
        OVLM_GOTO(done, improver_init(&im));
        OVLM_GOTO(done, improve_drafts(&im, chunked, seed));
    }
done:
    ovlm_arena_rewind(arena, mark);
    return status;
}
