/* fuzz_step.c - ovlm_step_solve: any arguments survive; every plan passes its check, and its routes
 * composed with their way back move nothing. */
#include "fuzz.h"

enum { SAMPLES = 16, ITEMS = 16, PHASES = 2, DEGREES = 3 };

typedef struct instance {
    ovlm_step_problem p;
    ovlm_step_items phase[PHASES];
    int64_t text[SAMPLES], source[SAMPLES], next[SAMPLES];
    int64_t sample[PHASES][ITEMS], position[PHASES][ITEMS], length[PHASES][ITEMS];
    int64_t out[PHASES][ITEMS], bytes[PHASES][ITEMS], degree[DEGREES];
    double squares[PHASES][ITEMS], comm[DEGREES];
    bool wild;
} instance;

static int64_t draw_int(instance *x, fuzz_input *in, int64_t low, int64_t high)
{
    return x->wild && fuzz_bytes(in, 1) % 8 == 0 ? fuzz_wild(in) : fuzz_range(in, low, high);
}

static double draw_real(instance *x, fuzz_input *in)
{
    return x->wild ? fuzz_wild_double(in) : fuzz_coefficient(in);
}

static ovlm_batch_cost draw_cost(instance *x, fuzz_input *in)
{
    return (ovlm_batch_cost){draw_real(x, in), draw_real(x, in), draw_real(x, in),
                             draw_real(x, in), draw_real(x, in), draw_real(x, in)};
}

/* Items in the order of samples, one behind the other in each, so that most batches are valid. */
static void draw_phase(instance *x, fuzz_input *in, int p)
{
    ovlm_step_items *items = &x->phase[p];
    items->name = p == 0 ? "vision" : "audio";
    items->n = x->p.n > 0 ? fuzz_range(in, 0, ITEMS) : 0;
    for (int64_t i = 0; i < items->n; i++) {
        int64_t sample = fuzz_range(in, 0, x->p.n - 1);
        x->out[p][i] = draw_int(x, in, 0, 50);
        x->sample[p][i] = draw_int(x, in, sample, sample);
        x->position[p][i] = draw_int(x, in, x->next[sample], x->next[sample]);
        x->next[sample] += x->out[p][i] >= 0 && x->out[p][i] <= 50 ? x->out[p][i] : 0;
        x->length[p][i] = draw_int(x, in, 0, 200);
        x->bytes[p][i] = draw_int(x, in, 0, 5000);
        x->squares[p][i] = draw_real(x, in);
    }
    items->sample = x->sample[p];
    items->position = x->position[p];
    items->length = x->length[p];
    items->out_tokens = x->out[p];
    items->bytes = x->bytes[p];
    items->squares = fuzz_bytes(in, 1) % 2 ? x->squares[p] : NULL;
    items->out_bytes_per_token = draw_real(x, in);
    items->cost = draw_cost(x, in);
    items->memory_per_token = fuzz_bytes(in, 1) % 2 ? 0 : draw_real(x, in);
    items->memory_fixed = fuzz_bytes(in, 1) % 2 ? 0 : draw_real(x, in);
}

static void draw(instance *x, fuzz_input *in)
{
    memset(x, 0, sizeof *x);
    x->wild = fuzz_bytes(in, 1) % 8 == 7;
    x->p.n = fuzz_range(in, 0, SAMPLES);
    x->p.n_ranks = fuzz_range(in, x->wild ? -1 : 1, 9);
    x->p.gpus_per_node = draw_int(x, in, 1, 4);
    x->p.memory_bytes = x->wild ? fuzz_wild_double(in) : (double)fuzz_range(in, 1, 9000);
    x->p.intra_bandwidth = x->wild ? fuzz_wild_double(in) : (double)fuzz_range(in, 1, 900);
    x->p.inter_bandwidth = x->wild ? fuzz_wild_double(in) : (double)fuzz_range(in, 1, 90);
    for (int64_t s = 0; s < x->p.n; s++) {
        x->text[s] = draw_int(x, in, 0, 300);
        x->source[s] = draw_int(x, in, 0, x->p.n_ranks - 1);
    }
    x->p.text_tokens = x->text;
    x->p.source_rank = x->source;
    x->p.text_bytes_per_token = draw_real(x, in);
    x->p.n_phases = fuzz_range(in, 0, PHASES);
    for (int p = 0; p < x->p.n_phases; p++) {
        draw_phase(x, in, p);
    }
    x->p.phase = x->phase;
    x->p.sequence_parallel = fuzz_bytes(in, 1) % 3 == 0;
    x->p.llm_cost = draw_cost(x, in);
    x->p.llm_memory_per_token = fuzz_bytes(in, 1) % 2 ? 0 : draw_real(x, in);
    for (int64_t j = 0; j < DEGREES; j++) {
        x->degree[j] = draw_int(x, in, (int64_t)1 << j, (int64_t)1 << j);
        x->comm[j] = draw_real(x, in);
    }
    x->p.sequence_cost = (ovlm_sequence_cost){
        .quadratic = draw_real(x, in), .linear = draw_real(x, in), .fixed = draw_real(x, in),
        .memory_per_token = 1, .memory_limit = (double)fuzz_range(in, 100, 4000),
        .degree_n = fuzz_range(in, 1, DEGREES), .degree = x->degree, .comm = x->comm};
    x->p.pad_to = draw_int(x, in, 1, 8);
    x->p.relabel = (ovlm_relabel_mode)fuzz_range(in, 0, 2);
    x->p.slack = x->wild ? fuzz_wild_double(in) : 0.01 * (double)fuzz_range(in, -1, 10);
    x->p.compose = fuzz_bytes(in, 1) % 2;
    x->p.seed = fuzz_bytes(in, 1);
}

static void check_route(const ovlm_route *route)
{
    ovlm_err err = {0};
    ovlm_route back = {0}, both = {0};
    if (route->k == 0) {
        return;
    }
    MUST(ovlm_route_check(route, &err) == OVLM_OK, "%s", err.message);
    MUST(ovlm_route_invert(route, &back, &err) == OVLM_OK, "%s", err.message);
    MUST(ovlm_route_compose(route, &back, &both, &err) == OVLM_OK, "%s", err.message);
    for (int64_t p = 0; p < both.k; p++) {
        MUST(both.source[p] == both.destination[p] && both.send_row[p] == both.receive_row[p],
             "piece %lld moved", (long long)p);
    }
    ovlm_route_free(&back);
    ovlm_route_free(&both);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input in = {data, size};
    static instance x;
    draw(&x, &in);
    ovlm_budget budget = {.work_limit = fuzz_range(&in, 0, 3) * 300};
    ovlm_step_plan *plan = NULL;
    ovlm_err err = {0};
    ovlm_status status = ovlm_step_solve(&x.p, &budget, &plan, &err);
    fuzz_check_status(status, &err);
    if (status != OVLM_OK) {
        MUST(plan == NULL, "a failed call left a plan");
        return 0;
    }
    status = ovlm_step_plan_check(&x.p, plan, &err);
    MUST(status == OVLM_OK, "%s", err.message);
    MUST(plan->bound <= plan->time && !plan->cut_short, "bound %.17g, time %.17g", plan->bound,
         plan->time);
    check_route(&plan->text.route);
    for (int64_t p = 0; p < plan->n_phases; p++) {
        check_route(&plan->raw[p].route);
        check_route(&plan->to_llm[p].route);
    }
    ovlm_step_plan_free(plan);
    return 0;
}
