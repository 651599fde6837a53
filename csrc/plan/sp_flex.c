/* sp_flex.c - walks in rounds: each round the better half goes on.
 *
 * Walks are independent within a round, so threads share them out; each has its own part of the
 * work, so the plan does not depend on how many threads there are. */
#include "plan/sp_flex.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "plan/sp_walk.h"

enum { STARTS = SP_FLEX_STARTS, STYLES = 2, WALKS = (STARTS + 1) * STYLES };

static const sp_style styles[STYLES] = {{0.6, 0.33}, {0.1, 0.8}};

typedef struct runner {
    sp_walk walk;
    ovlm_arena arena;
    ovlm_meter meter;
    ovlm_err err;
    ovlm_status status;
} runner;

struct sp_flex {
    const sp_model *model;
    int threads;
    runner runner[WALKS];
    int64_t n_runners;      /* started                                                    */
    int64_t alive[WALKS];   /* runners still walking, the best first                      */
    int64_t n_alive;
    double target;
    atomic_int next;        /* of alive[]: the one that the next thread takes             */
    atomic_bool stop;       /* the caller's poll said so                                  */
};

/* ------------------------------------------------------------------ set up --------------- */

/* Walks from one draft, one of each style. */
static ovlm_status add_walks(sp_flex *flex, const ovlm_sp_problem *problem, const sp_draft *start,
                             ovlm_err *err)
{
    /* One box to spare, so that a walk may open another micro-batch. */
    int64_t most = problem->micro_batches > 0 ? problem->micro_batches : flex->model->n;
    int64_t boxes = isfinite(start->time_s) || problem->micro_batches == 0 ? start->n_micro + 1
                                                                           : most;
    boxes = boxes < most ? boxes : most;
    boxes = boxes < flex->model->n ? boxes : flex->model->n;
    for (int i = 0; i < STYLES; i++) {
        runner *r = &flex->runner[flex->n_runners];
        uint64_t seed = problem->seed + (uint64_t)flex->n_runners;
        flex->alive[flex->n_alive++] = flex->n_runners++;
        OVLM_TRY(sp_walk_init(&r->walk, flex->model, boxes, start, styles[i], seed,
                              &r->arena, err));
    }
    return OVLM_OK;
}

ovlm_status sp_flex_open(sp_flex **out, const sp_model *model, const ovlm_sp_problem *problem,
                         sp_chunked *starts, const sp_draft *warm, ovlm_err *err)
{
    ovlm_status status = OVLM_OK;
    sp_flex *flex = NULL;
    sp_draft nothing = {.time_s = HUGE_VAL};
    int64_t order[SP_DRAFTS];
    OVLM_TRY(OVLM_HEAP_NEW(&flex, 1, err));
    flex->model = model;
    flex->threads = problem->threads;
    if (starts->n_drafts == 0) { /* sorted chunks do not fit: from nothing */
        OVLM_GOTO(fail, add_walks(flex, problem, &nothing, err));
    }
    sp_policy_order(starts, order);
    for (int64_t i = 0; i < STARTS && i < starts->n_drafts; i++) {
        OVLM_GOTO(fail, add_walks(flex, problem, &starts->draft[order[i]], err));
    }
    if (isfinite(warm->time_s)) {
        OVLM_GOTO(fail, add_walks(flex, problem, warm, err));
    }
    *out = flex;
    return OVLM_OK;
fail:
    sp_flex_close(flex);
    return status;
}

void sp_flex_close(sp_flex *flex)
{
    if (flex == NULL) {
        return;
    }
    for (int64_t i = 0; i < flex->n_runners; i++) {
        sp_walk_release(&flex->runner[i].walk);
        ovlm_arena_free(&flex->runner[i].arena);
    }
    free(flex);
}

/* ------------------------------------------------------------------ a round -------------- */

static int poll_stop(void *ctx)
{
    return atomic_load((atomic_bool *)ctx);
}

/* `poll` is the caller's on the thread that it called from, and a look at the flag elsewhere. */
static void run_walks(sp_flex *flex, int (*poll)(void *ctx), void *poll_ctx)
{
    for (int i = atomic_fetch_add(&flex->next, 1); i < flex->n_alive;
         i = atomic_fetch_add(&flex->next, 1)) {
        runner *r = &flex->runner[flex->alive[i]];
        r->meter.poll = poll;
        r->meter.poll_ctx = poll_ctx;
        r->status = atomic_load(&flex->stop) ? OVLM_OK : sp_walk_run(
            &r->walk, flex->target, &r->meter, &r->err);
        if (r->meter.interrupted) {
            atomic_store(&flex->stop, true);
        }
    }
}

static void *thread_main(void *ctx)
{
    sp_flex *flex = ctx;
    run_walks(flex, poll_stop, &flex->stop);
    return NULL;
}

/* Each walk gets 1/n_alive of the work, and as much of the time as the threads allow. */
static void meter_walks(sp_flex *flex, double share, const sp_purse *purse, int threads)
{
    double lanes = ceil((double)flex->n_alive / (double)threads);
    double now = ovlm_clock_s(), left_s = ovlm_meter_left_s(&purse->meter);
    for (int64_t i = 0; i < flex->n_alive; i++) {
        ovlm_meter *meter = &flex->runner[flex->alive[i]].meter;
        *meter = sp_purse_part(purse, share / (double)flex->n_alive);
        /* Walks of later lanes start when those before them are done. */
        double lane = floor((double)i / (double)threads) + 1;
        meter->deadline_s = left_s < HUGE_VAL ? now + share * left_s * lane / lanes : HUGE_VAL;
    }
}

static void run_round(sp_flex *flex, double share, sp_purse *purse)
{
    int threads = flex->threads < flex->n_alive ? flex->threads : (int)flex->n_alive;
    pthread_t id[WALKS];
    int started = 0;
    meter_walks(flex, share, purse, threads);
    atomic_store(&flex->next, 0);
    while (started < threads - 1 && pthread_create(&id[started], NULL, thread_main, flex) == 0) {
        started++; /* with fewer threads than asked for, the others take over their walks */
    }
    run_walks(flex, purse->meter.poll, purse->meter.poll_ctx);
    for (int i = 0; i < started; i++) {
        (void)pthread_join(id[i], NULL);
    }
}

/* Sorts the walks by their best, earlier ones first among equals, and drops the worse half. */
static void halve(sp_flex *flex)
{
    for (int64_t i = 1; i < flex->n_alive; i++) {
        int64_t moving = flex->alive[i], at = i;
        double cost = flex->runner[moving].walk.best_cost;
        for (; at > 0 && flex->runner[flex->alive[at - 1]].walk.best_cost > cost; at--) {
            flex->alive[at] = flex->alive[at - 1];
        }
        flex->alive[at] = moving;
    }
    flex->n_alive = (flex->n_alive + 1) / 2;
}

ovlm_status sp_flex_run(sp_flex *flex, double target, double share, sp_purse *purse,
                        sp_draft *best, ovlm_err *err)
{
    flex->target = target;
    bool over = false;
    for (double done = 0; done < 1 && !over;) {
        /* Early rounds are short: the number of micro-batches shows soon which is the best. */
        double step = flex->n_alive > 1 && done < 0.5 ? 0.25 : 1 - done;
        run_round(flex, step * share / (1 - done * share), purse);
        done += step;
        for (int64_t i = 0; i < flex->n_alive; i++) {
            runner *r = &flex->runner[flex->alive[i]];
            if (r->status != OVLM_OK) {
                if (err != NULL) {
                    *err = r->err;
                }
                return r->status;
            }
            over = sp_purse_absorb(purse, &r->meter) || r->walk.best_cost <= target || over;
            if (r->walk.best.time_s < best->time_s) {
                sp_draft_copy(best, &r->walk.best);
            }
        }
        halve(flex);
    }
    return OVLM_OK;
}
