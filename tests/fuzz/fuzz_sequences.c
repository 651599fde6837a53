/* fuzz_sequences.c - ovlm_sp_solve and ovlm_sp_bound: any arguments survive; every plan passes its
 * check; the bound of any policy lies below the plan of every policy. */
#include "fuzz.h"

enum { SEQUENCES = 24, DEGREES = 5, POLICIES = 4 };

typedef struct instance {
    ovlm_sp_problem p;
    int64_t lengths[SEQUENCES], degree[DEGREES];
    double comm[DEGREES];
    bool wild;
} instance;

static double draw_real(instance *x, fuzz_input *in)
{
    return x->wild ? fuzz_wild_double(in) : fuzz_coefficient(in);
}

static void draw_cost(instance *x, fuzz_input *in)
{
    ovlm_sequence_cost *cost = &x->p.cost;
    cost->quadratic = draw_real(x, in) * 1e-4;
    cost->linear = draw_real(x, in);
    cost->fixed = draw_real(x, in);
    cost->memory_per_token = fuzz_bytes(in, 1) % 3 ? 1 : draw_real(x, in);
    cost->memory_fixed = fuzz_bytes(in, 1) % 3 ? 0 : draw_real(x, in);
    cost->memory_limit = fuzz_bytes(in, 1) % 8 ? (double)fuzz_range(in, 1, 5000) : HUGE_VAL;
    cost->heads = x->wild ? fuzz_wild(in) : fuzz_range(in, 0, 3) * 12;
    cost->degree_n = fuzz_range(in, x->wild ? 0 : 1, DEGREES);
    cost->degree = x->degree;
    cost->comm = x->comm;
    int64_t degree = fuzz_range(in, 1, 2);
    bool doubling = fuzz_bytes(in, 1) % 2;
    for (int64_t j = 0; j < cost->degree_n; j++) {
        x->degree[j] = x->wild ? fuzz_wild(in) : degree;
        x->comm[j] = draw_real(x, in);
        degree = doubling ? 2 * degree : degree + fuzz_range(in, 1, 3);
    }
}

static void draw(instance *x, fuzz_input *in)
{
    memset(x, 0, sizeof *x);
    x->wild = fuzz_bytes(in, 1) % 8 == 7;
    x->p.n = fuzz_range(in, x->wild ? -1 : 0, SEQUENCES);
    x->p.n_gpus = x->wild ? fuzz_wild(in) : fuzz_range(in, 1, 20);
    x->p.gpus_per_node = x->wild ? fuzz_wild(in) : fuzz_range(in, 1, 8);
    x->p.lengths = x->lengths;
    int64_t longest = fuzz_range(in, 1, 9000);
    for (int64_t i = 0; i < x->p.n; i++) {
        x->lengths[i] = x->wild ? fuzz_wild(in) : fuzz_range(in, 1, longest);
    }
    draw_cost(x, in);
    x->p.pad_to = x->wild ? fuzz_wild(in) : fuzz_bytes(in, 1) % 4 ? 1 : fuzz_range(in, 1, 64);
    x->p.micro_batches = x->wild ? fuzz_wild(in) : fuzz_bytes(in, 1) % 2 ? 0 : fuzz_range(in, 1, 5);
    x->p.threads = x->wild ? (int)fuzz_range(in, -1, 2) : 1;
    x->p.seed = fuzz_bytes(in, 1);
}

/* Wild sizes may ask for more memory or work than a fuzzer has; what is checked is the refusal of
 * the invalid, so the valid but enormous are left out. */
static bool affordable(const instance *x)
{
    return !x->wild || ((x->p.n_gpus <= 4096 || x->p.n_gpus < 0) && x->p.micro_batches <= 64);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input in = {data, size};
    static instance x;
    draw(&x, &in);
    if (!affordable(&x)) {
        return 0;
    }
    ovlm_budget budget = {.work_limit = fuzz_range(&in, 0, 3) * 500};
    double least_time = HUGE_VAL, greatest_bound = 0, alone = 0;
    ovlm_err err = {0};
    ovlm_status status = ovlm_sp_bound(&x.p, &budget, &alone, &err);
    fuzz_check_status(status, &err);
    if (status == OVLM_OK) {
        greatest_bound = alone;
    }
    for (int policy = 0; policy < POLICIES; policy++) {
        ovlm_sp_plan *plan = NULL;
        x.p.policy = (ovlm_sp_policy)policy;
        status = ovlm_sp_solve(&x.p, &budget, &plan, &err);
        fuzz_check_status(status, &err);
        if (status != OVLM_OK) {
            MUST(plan == NULL, "a failed call left a plan");
            continue;
        }
        MUST(!x.wild || x.p.n >= 0, "n = %lld was accepted", (long long)x.p.n);
        status = ovlm_sp_plan_check(&x.p, plan, &err);
        MUST(status == OVLM_OK, "policy %d: %s", policy, err.message);
        MUST(plan->n == x.p.n && !plan->cut_short, "n %lld", (long long)plan->n);
        MUST(x.p.micro_batches == 0 || plan->n_micro == x.p.micro_batches || plan->n == 0,
             "%lld micro-batches of %lld", (long long)plan->n_micro, (long long)x.p.micro_batches);
        least_time = plan->time < least_time ? plan->time : least_time;
        greatest_bound = plan->bound > greatest_bound ? plan->bound : greatest_bound;
        ovlm_sp_plan_free(plan);
    }
    MUST(greatest_bound <= least_time, "bound %.17g above a plan of %.17g", greatest_bound,
         least_time);
    return 0;
}
