/* test_threads.c - the library has no global state: callers in many threads get what one gets.
 *
 * Meant for ThreadSanitizer; elsewhere it checks that the answers agree. */
#include "test.h"

#include <math.h>
#include <pthread.h>
#include <string.h>

#include "ovlm.h"

enum { THREADS = 4, ITEMS = 60, RANKS = 5, ROUNDS = 3 };

typedef struct answers {
    int64_t rank[ITEMS];
    double loads[RANKS], balance_bound, plan_time, plan_bound, fitted;
} answers;

typedef struct job {
    const int64_t *lengths;
    answers got[ROUNDS];
    int failures;
} job;

static void run_balance(const int64_t *lengths, answers *got, int *failures)
{
    ovlm_balance_problem problem = {.n = ITEMS, .n_ranks = RANKS, .lengths = lengths,
                                    .cost = {.linear = 1, .quadratic = 1e-3}, .max_items = -1,
                                    .node_size = 1, .seed = 7};
    ovlm_budget budget = {.work_limit = 2000};
    ovlm_balance_result result = {0};
    *failures += ovlm_balance_solve(&problem, &budget, got->rank, got->loads, &result, NULL) !=
                 OVLM_OK;
    got->balance_bound = result.bound;
}

static void run_sequences(const int64_t *lengths, int threads, answers *got, int *failures)
{
    int64_t degree[] = {1, 2, 4, 8};
    double comm[] = {0, 1e-6, 2e-6, 4e-6};
    ovlm_sp_problem problem = {
        .n = ITEMS, .n_gpus = 8, .gpus_per_node = 4, .lengths = lengths,
        .cost = {.quadratic = 1e-9, .linear = 1e-5, .fixed = 0.01, .memory_per_token = 1,
                 .memory_limit = 20000, .degree_n = 4, .degree = degree, .comm = comm},
        .pad_to = 1, .policy = OVLM_SP_FLEX, .threads = threads, .seed = 7};
    ovlm_budget budget = {.work_limit = 300};
    ovlm_sp_plan *plan = NULL;
    *failures += ovlm_sp_solve(&problem, &budget, &plan, NULL) != OVLM_OK;
    got->plan_time = plan != NULL ? plan->time : NAN;
    got->plan_bound = plan != NULL ? plan->bound : NAN;
    ovlm_sp_plan_free(plan);
}

static void run_fit(const int64_t *lengths, answers *got, int *failures)
{
    int64_t start[] = {0, ITEMS / 4, ITEMS / 2, ITEMS};
    double seconds[] = {1, 2, 5}, error[3];
    ovlm_measurements rows = {.rows = 3, .start = start, .length = lengths, .seconds = seconds};
    bool use[6] = {true, true, false, false, false, true};
    ovlm_batch_cost cost = {0};
    *failures += ovlm_batch_cost_fit(&rows, use, &cost, error, NULL) != OVLM_OK;
    got->fitted = cost.linear + cost.fixed;
}

static void *run(void *context)
{
    job *j = context;
    for (int round = 0; round < ROUNDS; round++) {
        run_balance(j->lengths, &j->got[round], &j->failures);
        run_sequences(j->lengths, 1 + round % 2, &j->got[round], &j->failures);
        run_fit(j->lengths, &j->got[round], &j->failures);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    static job jobs[THREADS + 1];
    pthread_t thread[THREADS];
    int64_t lengths[ITEMS];
    for (int i = 0; i < ITEMS; i++) {
        lengths[i] = 1 + ovlm_rng_below(&test_rng, 9000);
    }
    for (int t = 0; t <= THREADS; t++) {
        jobs[t].lengths = lengths;
    }
    for (int t = 0; t < THREADS; t++) {
        CHECK(pthread_create(&thread[t], NULL, run, &jobs[t]) == 0, "thread %d", t);
    }
    run(&jobs[THREADS]);
    for (int t = 0; t < THREADS; t++) {
        (void)pthread_join(thread[t], NULL);
    }
    const answers *want = &jobs[THREADS].got[0];
    for (int t = 0; t <= THREADS; t++) {
        CHECK(jobs[t].failures == 0, "thread %d: %d calls failed", t, jobs[t].failures);
        for (int round = 0; round < ROUNDS; round++) {
            CHECK(memcmp(&jobs[t].got[round], want, sizeof *want) == 0,
                  "thread %d, round %d: another answer", t, round);
        }
    }
    return test_end("threads");
}
