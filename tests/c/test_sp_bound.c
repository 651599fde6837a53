/* test_sp_bound.c - certificates against exact optima of small instances, by the thousand. */
#include <math.h>

#include "plan/sp_bound.h"
#include "plan/sp_bound_lift.h"
#include "sp_draw.h"

typedef struct tally {
    long cases, lift_better, micro_tight, step_tight, micro_caught, step_caught;
    double micro_gap, step_gap;
} tally;

static bool sound(double bound, double optimum)
{
    return bound <= optimum || (isinf(optimum) && isinf(bound));
}

/* Prices raised one after the other, alone: the exact search must not hide a false one. */
static void test_lift(const sp_model *model, const int64_t *k, double optimum, double quick,
                      ovlm_arena *arena, tally *tally_)
{
    sp_lift lift;
    double low = quick;
    if (quick <= 0 || !isfinite(optimum)) {
        return;
    }
    CHECK(sp_lift_init(&lift, model, k, model->n, arena, NULL) == OVLM_OK, "failed");
    for (double hint = HUGE_VAL; hint > 0; hint = hint < HUGE_VAL ? 0 : optimum * 1.05) {
        ovlm_meter meter = meter_of(300);
        sp_lift_raise(&lift, hint, &meter, &low);
        CHECK(sound(low, optimum), "lifted %.17g above optimum %.17g", low, optimum);
    }
    tally_->lift_better += low > quick * 1.01;
}

static void test_against_brute(const instance *x, const sp_brute *brute, const sp_model *model,
                               ovlm_arena *arena, tally *tally_)
{
    const ovlm_sp_problem *p = &x->problem;
    int64_t k[BRUTE_N];
    double optimum = brute->makespan[(1u << p->n) - 1], bound = 0, before = 0;
    for (int64_t i = 0; i < p->n; i++) {
        k[i] = i;
    }
    double quick = sp_bound_quick(model, k, p->n);
    CHECK(sound(quick, optimum), "quick %.17g above optimum %.17g", quick, optimum);
    test_lift(model, k, optimum, quick, arena, tally_);
    for (int64_t work = 0; work < 20000; work = work * 8 + 1) {
        ovlm_meter meter;
        ovlm_meter_start(&meter, &(ovlm_budget){.work_limit = work}, 0, 100);
        CHECK(sp_bound_micro(model, k, p->n, HUGE_VAL, &meter, &bound, arena, NULL) == OVLM_OK,
              "failed");
        CHECK(sound(bound, optimum), "micro %.17g above %.17g, work %lld", bound, optimum,
              (long long)work);
        CHECK(bound >= before, "weaker with more work: %.17g < %.17g", bound, before);
        before = bound;
    }
    if (!isinf(optimum)) {
        tally_->micro_tight += bound >= optimum * (1 - 1e-6);
        tally_->micro_caught += bound * 1.01 > optimum;
        tally_->micro_gap += optimum > 0 ? 1 - bound / optimum : 0;
    }
    double best = HUGE_VAL, any = 0;
    for (int64_t m = 1; m <= p->n; m++) {
        best = fmin(best, (double)m * p->cost.fixed + brute->step[m]);
        ovlm_meter meter;
        ovlm_meter_start(&meter, &(ovlm_budget){.work_limit = 300}, 0, 100);
        CHECK(sp_bound_step(model, m, HUGE_VAL, &meter, &bound, arena, NULL) == OVLM_OK, "failed");
        CHECK(sound(bound, best), "step %.17g above %.17g with m = %lld", bound, best,
              (long long)m);
    }
    ovlm_meter free_meter = meter_of(300);
    CHECK(sp_bound_step(model, 0, HUGE_VAL, &free_meter, &any, arena, NULL) == OVLM_OK, "failed");
    CHECK(sound(any, best), "step %.17g above %.17g", any, best);
    before = 0;
    for (int64_t work = 0; work < 2000; work = work * 16 + 1) {
        ovlm_meter meter;
        ovlm_meter_start(&meter, &(ovlm_budget){.work_limit = work}, 0, 100);
        CHECK(sp_bound_step(model, 0, HUGE_VAL, &meter, &bound, arena, NULL) == OVLM_OK, "failed");
        CHECK(sound(bound, best), "step %.17g above %.17g, work %lld", bound, best,
              (long long)work);
        CHECK(bound >= before, "step weaker with more work: %.17g < %.17g", bound, before);
        before = bound;
    }
    /* With hints: the optimum itself, and a plan a little worse. */
    for (int h = 0; h < 2 && best < HUGE_VAL; h++) {
        double hint = best * (h == 0 ? 1 : 1.05), hinted = 0;
        ovlm_meter meter = meter_of(300);
        CHECK(sp_bound_step(model, 0, hint, &meter, &hinted, arena, NULL) == OVLM_OK, "failed");
        CHECK(hinted <= best, "hinted step %.17g above %.17g", hinted, best);
        meter = meter_of(300);
        CHECK(sp_bound_micro(model, k, p->n, optimum * (h == 0 ? 1 : 1.05), &meter, &hinted, arena,
                             NULL) == OVLM_OK,
              "failed");
        CHECK(sound(hinted, optimum), "hinted micro %.17g above %.17g", hinted, optimum);
    }
    tally_->step_tight += any >= best * (1 - 1e-6);
    tally_->step_caught += any * 1.01 > best;
    tally_->step_gap += best > 0 ? 1 - any / best : 0;
    tally_->cases++;
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    ovlm_arena arena = {0};
    static instance x;
    static sp_brute brute;
    tally tally_ = {0};
    for (int round = 0; round < 1000; round++) {
        ovlm_arena_mark mark = ovlm_arena_save(&arena);
        sp_model model;
        draw(&x);
        ovlm_err err = {0};
        if (sp_model_init(&model, &x.problem, &arena, &err) == OVLM_OK) {
            brute_solve(&x.problem, &brute);
            test_against_brute(&x, &brute, &model, &arena, &tally_);
        }
        ovlm_arena_rewind(&arena, mark);
    }
    ovlm_arena_free(&arena);
    /* A bound one per cent too high would be found often: the test can fail. */
    CHECK(tally_.cases > 900, "%ld", tally_.cases);
    CHECK(tally_.micro_caught * 10 > tally_.cases, "%ld of %ld", tally_.micro_caught, tally_.cases);
    CHECK(tally_.lift_better * 40 > tally_.cases, "%ld of %ld", tally_.lift_better, tally_.cases);
    CHECK(tally_.step_caught * 10 > tally_.cases, "%ld of %ld", tally_.step_caught, tally_.cases);
    printf("sp_bound: %ld cases; mean gap %.4f micro, %.4f step; tight %ld, %ld\n", tally_.cases,
           tally_.micro_gap / (double)tally_.cases, tally_.step_gap / (double)tally_.cases,
           tally_.micro_tight, tally_.step_tight);
    return test_end("sp_bound");
}
