/* test_sp_model.c - the prepared instance against its definition, and every refusal. */
#include "test.h"

#include <math.h>
#include <string.h>

#include "plan/sp_model.h"

static const int64_t degrees[] = {1, 2, 3, 4, 6, 8};
static const double comm[] = {0, 1e-3, 1e-3, 2e-3, 3e-3, 5e-3};

static ovlm_sp_problem base_problem(const int64_t *lengths, int64_t n)
{
    return (ovlm_sp_problem){.n = n,
                             .n_gpus = 8,
                             .gpus_per_node = 4,
                             .lengths = lengths,
                             .cost = {.quadratic = 1e-6,
                                      .linear = 1e-2,
                                      .fixed = 0.1,
                                      .memory_per_token = 2,
                                      .memory_fixed = 10,
                                      .memory_limit = 1000,
                                      .degree_n = 6,
                                      .degree = degrees,
                                      .comm = comm},
                             .pad_to = 1,
                             .policy = OVLM_SP_FLEX,
                             .threads = 1};
}

/* Bytes per GPU of `tokens` on a group of degree d, straight from the statement. */
static bool holds(const ovlm_sp_problem *p, int64_t tokens, int64_t d)
{
    const ovlm_sequence_cost *c = &p->cost;
    if (p->pad_to == 1) {
        return c->memory_fixed + c->memory_per_token * (double)tokens / (double)d <= c->memory_limit;
    }
    int64_t shard = (tokens + d - 1) / d;
    shard = (shard + p->pad_to - 1) / p->pad_to * p->pad_to;
    return c->memory_fixed + c->memory_per_token * (double)shard <= c->memory_limit;
}

static void check_model(const sp_model *m, const ovlm_sp_problem *p)
{
    for (int64_t j = 0; j < m->D; j++) {
        double d = (double)m->degree[j], heads = (double)p->cost.heads;
        double share = p->cost.heads > 0 ? ceil(heads / d) / heads : 1 / d;
        CHECK(m->degree[j] <= p->n_gpus, "degree %lld", (long long)m->degree[j]);
        CHECK(fabs(m->quad[j] - p->cost.quadratic * share) <= 1e-18, "share of degree %g", d);
        CHECK(fabs(m->lin[j] * d - p->cost.linear - p->cost.comm[j]) <= 1e-15, "comm of %g", d);
        CHECK(holds(p, m->cap[j], m->degree[j]), "cap %lld of %g is too large",
              (long long)m->cap[j], d);
        CHECK(!holds(p, m->cap[j] + 1, m->degree[j]), "cap %lld of %g is too small",
              (long long)m->cap[j], d);
    }
    double sum = 0, sum2 = 0;
    for (int64_t k = 0; k < m->n; k++) {
        double s = (double)m->s[k];
        sum += s;
        sum2 += s * s;
        CHECK(m->s[k] == p->lengths[m->order[k]], "item %lld", (long long)k);
        CHECK(k == 0 || m->s[k] <= m->s[k - 1], "descending at %lld", (long long)k);
        CHECK(fabs(m->sum_s[k + 1] - sum) <= 0 && fabs(m->sum_s2[k + 1] - sum2) <= 0, "sums");
        int64_t j = m->min_j[k];
        CHECK(m->cap[j] >= m->s[k] && (j == 0 || m->cap[j - 1] < m->s[k]), "min_j %lld",
              (long long)j);
    }
}

static void test_random(void)
{
    for (int round = 0; round < 300; round++) {
        ovlm_arena arena = {0};
        ovlm_err err = {0};
        int64_t lengths[40], n = ovlm_rng_below(&test_rng, 40);
        ovlm_sp_problem p = base_problem(lengths, n);
        p.n_gpus = 1 + ovlm_rng_below(&test_rng, 12);
        p.pad_to = 1 + ovlm_rng_below(&test_rng, 20) * (ovlm_rng_below(&test_rng, 2));
        p.cost.heads = ovlm_rng_below(&test_rng, 2) * 12;
        p.cost.memory_per_token = 0.1 + 10 * ovlm_rng_uniform(&test_rng);
        for (int64_t i = 0; i < n; i++) {
            lengths[i] = 1 + ovlm_rng_below(&test_rng, 60);
        }
        sp_model m;
        ovlm_status status = sp_model_init(&m, &p, &arena, &err);
        CHECK(status == OVLM_OK, "%s", err.message);
        if (status == OVLM_OK) {
            check_model(&m, &p);
        }
        ovlm_arena_free(&arena);
    }
}

static void refused(const ovlm_sp_problem *p, const char *mention)
{
    ovlm_arena arena = {0};
    ovlm_err err = {0};
    sp_model m;
    CHECK(sp_model_init(&m, p, &arena, &err) == OVLM_E_ARG, "%s was accepted", mention);
    CHECK(strstr(err.message, mention) != NULL, "'%s' lacks '%s'", err.message, mention);
    ovlm_arena_free(&arena);
}

#define REFUSED(mention, change)                          \
    do {                                                  \
        int64_t lengths[] = {5, 900, 7};                  \
        ovlm_sp_problem p = base_problem(lengths, 3);     \
        change;                                           \
        refused(&p, mention);                             \
    } while (0)

static void test_refusals(void)
{
    REFUSED("n_gpus must be", p.n_gpus = 0);
    REFUSED("gpus_per_node", p.gpus_per_node = 0);
    REFUSED("pad_to", p.pad_to = 0);
    REFUSED("micro_batches", p.micro_batches = -1);
    REFUSED("threads", p.threads = 0);
    REFUSED("number of sequences", p.n = -1);
    REFUSED("lengths[2] is 0", lengths[2] = 0);
    REFUSED("lengths[0] is -4", lengths[0] = -4);
    REFUSED("2^53", lengths[1] = INT64_MAX);
    REFUSED("2^53", lengths[0] = lengths[1] = (int64_t)1 << 52);
    REFUSED("cost.linear", p.cost.linear = NAN);
    REFUSED("cost.quadratic", p.cost.quadratic = -1);
    REFUSED("memory_limit", p.cost.memory_limit = NAN);
    REFUSED("above heads", p.cost.heads = 4);
    REFUSED("overflow", p.cost.linear = 1e308);
    REFUSED("smallest permitted degree is 4", (p.n_gpus = 3, p.cost.degree += 3,
                                               p.cost.comm += 3, p.cost.degree_n = 3));
    /* Eight GPUs hold 8*495 tokens: what does not fit says which, how long and what would. */
    REFUSED("lengths[1] = 3961", lengths[1] = 3961);
    REFUSED("degree of at least 9", lengths[1] = 3961);
    REFUSED("holds 3960 tokens", lengths[1] = 3961);
    REFUSED("memory_fixed 2000", p.cost.memory_fixed = 2000);
    REFUSED("lengths[1] = 900", (p.pad_to = 496));
}

static void test_no_limit(void)
{
    ovlm_arena arena = {0};
    ovlm_err err = {0};
    int64_t lengths[] = {1, ((int64_t)1 << 53) - 2};
    ovlm_sp_problem p = base_problem(lengths, 2);
    p.cost.memory_limit = HUGE_VAL;
    sp_model m;
    CHECK(sp_model_init(&m, &p, &arena, &err) == OVLM_OK, "%s", err.message);
    CHECK(m.cap[0] >= lengths[1] && m.min_j[0] == 0, "cap %lld", (long long)m.cap[0]);
    p.pad_to = INT64_MAX;
    CHECK(sp_model_init(&m, &p, &arena, &err) == OVLM_OK, "%s", err.message);
    p.n = 0;
    p.lengths = NULL;
    CHECK(sp_model_init(&m, &p, &arena, &err) == OVLM_OK && m.n == 0, "%s", err.message);
    ovlm_arena_free(&arena);
}

static void test_allocation_failures(void)
{
    int64_t lengths[] = {5, 900, 7};
    ovlm_sp_problem p = base_problem(lengths, 3);
    ovlm_status status = OVLM_E_NOMEM;
    for (int64_t after = 0; status != OVLM_OK && after < 100; after++) {
        ovlm_arena arena = {0};
        ovlm_err err = {0};
        sp_model m;
        ovlm_arena_fail_after(after);
        status = sp_model_init(&m, &p, &arena, &err);
        ovlm_arena_fail_after(-1);
        CHECK(status == OVLM_OK || status == OVLM_E_NOMEM, "after %lld", (long long)after);
        ovlm_arena_free(&arena);
    }
    CHECK(status == OVLM_OK, "with enough memory");
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    test_random();
    test_refusals();
    test_no_limit();
    test_allocation_failures();
    return test_end("sp_model");
}
