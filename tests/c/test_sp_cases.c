/* test_sp_cases.c - cases of makespans and what micro-batches hold, against exact optima of small
 * instances, by the thousand. */
#include <math.h>

#include "plan/sp_bound_cases.h"
#include "plan/sp_bound_content.h"
#include "sp_draw.h"

typedef struct tally {
    long steps, better, tight, sets, sets_tight;
    double gap;
} tally;

/* Least GPU-seconds of all items over N. */
static double work_of(const sp_model *model)
{
    double work = 0;
    for (int64_t k = 0; k < model->n; k++) {
        double item = HUGE_VAL;
        for (int64_t j = model->min_j[k]; j < model->D; j++) {
            item = fmin(item, sp_item_work(model, k, j));
        }
        work += item / (double)model->n_gpus;
    }
    return work;
}

/* For at least and at most so many micro-batches, a plan known that is far or near. */
static void test_steps(const sp_model *model, const sp_brute *brute, ovlm_arena *arena, tally *t)
{
    int64_t least = 1 + ovlm_rng_below(&test_rng, model->n);
    int64_t most = least + ovlm_rng_below(&test_rng, model->n - least + 1);
    double best = HUGE_VAL, work = work_of(model);
    for (int64_t m = least; m <= most; m++) {
        best = fmin(best, (double)m * model->fixed + brute->step[m]);
    }
    double slack = 1 + 0.2 * (double)ovlm_rng_below(&test_rng, 6), low = 0;
    double longest = best * slack - (double)least * model->fixed;
    if (!isfinite(best) || longest <= 0 || work <= 0) {
        return;
    }
    ovlm_meter meter = meter_of(1 + ovlm_rng_below(&test_rng, 8000));
    CHECK(sp_cases_raise(model, least, most, work / (double)least, longest, best * slack, &meter,
                         &low, arena, NULL) == OVLM_OK,
          "failed");
    CHECK(low <= best, "%.17g above %.17g, m = %lld..%lld", low, best, (long long)least,
          (long long)most);
    t->better += low > 1.01 * ((double)least * model->fixed + work);
    t->tight += low * 1.01 > best;
    t->gap += 1 - low / best;
    t->steps++;
}

/* Every set of items that one micro-batch can hold, at random prices: it is worth no more than its
 * makespan beyond phi of the interval that its makespan is in. */
static void test_sets(const sp_model *model, const sp_brute *brute, ovlm_arena *arena, tally *t)
{
    sp_contents contents;
    double pi[BRUTE_N], longest = 0, scale = 2 * ovlm_rng_uniform(&test_rng);
    for (int64_t set = 1; set < (int64_t)1 << model->n; set++) {
        double makespan = brute->makespan[set];
        longest = isfinite(makespan) ? fmax(longest, makespan) : longest;
    }
    if (longest <= 0) {
        return;
    }
    /* Fewer nodes than items: prices between them are interpolated. */
    int64_t rows = 2 + ovlm_rng_below(&test_rng, BRUTE_N);
    double first = longest * (0.01 + 0.5 * ovlm_rng_uniform(&test_rng));
    CHECK(sp_contents_init(&contents, model, rows, first, longest, arena, NULL) == OVLM_OK,
          "failed");
    for (int64_t r = 0; r < contents.nodes.rows; r++) {
        pi[r] = scale * ovlm_rng_uniform(&test_rng) * longest;
    }
    (void)sp_contents_evaluate(&contents, pi);
    for (int64_t set = 1; set < (int64_t)1 << model->n; set++) {
        double makespan = brute->makespan[set], worth = 0, phi = HUGE_VAL;
        for (int64_t k = 0; k < model->n; k++) {
            worth += set >> model->order[k] & 1 ? contents.pi[k] : 0;
        }
        for (int64_t i = 0; i < contents.n_intervals && isfinite(makespan); i++) {
            if (contents.low[i] <= makespan && makespan <= contents.high[i]) {
                phi = fmin(phi, fmin(contents.holder[2 * i].phi, contents.holder[2 * i + 1].phi));
            }
        }
        double real = makespan + model->fixed - worth;
        CHECK(!isfinite(makespan) || phi <= real + 1e-12 * (makespan + worth),
              "phi %.17g, but a set of makespan %.17g is worth %.17g more than %.17g", phi,
              makespan, worth, makespan + model->fixed);
        t->sets += isfinite(makespan);
        t->sets_tight += phi >= real - 0.01 * (makespan + worth);
    }
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    ovlm_arena arena = {0};
    static instance x;
    static sp_brute brute;
    tally t = {0};
    for (int round = 0; round < 2000; round++) {
        ovlm_arena_mark mark = ovlm_arena_save(&arena);
        sp_model model;
        draw(&x);
        ovlm_err err = {0};
        if (sp_model_init(&model, &x.problem, &arena, &err) == OVLM_OK) {
            brute_solve(&x.problem, &brute);
            test_sets(&model, &brute, &arena, &t);
            test_steps(&model, &brute, &arena, &t);
        }
        ovlm_arena_rewind(&arena, mark);
    }
    ovlm_arena_free(&arena);
    /* A bound one per cent too high would be found often: the test can fail. */
    CHECK(t.steps > 1500 && t.tight * 20 > t.steps, "%ld tight of %ld", t.tight, t.steps);
    CHECK(t.better * 20 > t.steps, "%ld better than the work, of %ld", t.better, t.steps);
    CHECK(t.sets_tight * 1000 > t.sets, "%ld tight of %ld sets", t.sets_tight, t.sets);
    printf("sp_cases: %ld steps, %ld better than the work, %ld tight, mean gap %.4f; %ld sets, "
           "%ld tight\n",
           t.steps, t.better, t.tight, t.gap / (double)t.steps, t.sets, t.sets_tight);
    return test_end("sp_cases");
}
