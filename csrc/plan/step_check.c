/* step_check.c - re-verifies a step plan from its problem, sharing nothing with what built it but
 * the order of rows that the header promises. */
#include <math.h>
#include <string.h>

#include "plan/route.h"
#include "plan/step.h"

static bool near(double a, double b)
{
    return fabs(a - b) <= 1e-9 * (fabs(a) + fabs(b));
}

/* Memory of every (micro-batch, rank), loads, and the phase's time. */
static ovlm_status check_share(const step_input *input, const ovlm_step_plan *plan, int64_t p,
                               ovlm_arena *arena, ovlm_err *err)
{
    const ovlm_step_share *share = &plan->share[p];
    int64_t n_ranks = plan->n_ranks, *length = NULL;
    step_work work;
    OVLM_TRY(step_work_init(&work, input, p, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &length, n_ranks * share->n_micro, err));
    for (int64_t i = 0; i < share->n; i++) {
        int64_t cell = share->micro[i] * n_ranks + share->rank[i];
        length[cell] += work.length[i];
        if (length[cell] > work.capacity) {
            return OVLM_FAIL(err, OVLM_E_ARG,
                             "plan: %s holds more than %lld at rank %lld in micro-batch %lld",
                             work.name, (long long)work.capacity, (long long)share->rank[i],
                             (long long)share->micro[i]);
        }
    }
    ovlm_step_share again = *share;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &again.loads, n_ranks, err));
    OVLM_TRY(step_share_measure(&work, n_ranks, &again, arena, err));
    for (int64_t r = 0; r < n_ranks; r++) {
        if (!near(again.loads[r], share->loads[r])) {
            return OVLM_FAIL(err, OVLM_E_ARG, "plan: %s loads[%lld] is %.17g; it says %.17g",
                             work.name, (long long)r, again.loads[r], share->loads[r]);
        }
    }
    if (!near(again.time, share->time) || !(share->bound >= 0) || share->bound > share->time) {
        return OVLM_FAIL(err, OVLM_E_ARG, "plan: %s takes %.17g s; it says %.17g, bound %.17g",
                         work.name, again.time, share->time, share->bound);
    }
    return OVLM_OK;
}

/* What a route must be: for each item, rows, and where they lie before and after. */
typedef struct expected {
    const char *name, *kind;
    int64_t n;
    const int64_t *rows, *source, *send_row;   /* [n]                                          */
    const int64_t *destination, *receive_row;  /* [n], or NULL: rows go to their token's cell  */
} expected;

static ovlm_status wrong_piece(const expected *want, int64_t piece, ovlm_err *err)
{
    return OVLM_FAIL(err, OVLM_E_ARG, "plan: piece %lld of the %s route of %s is not where its "
                     "rows are or belong", (long long)piece, want->kind, want->name);
}

static ovlm_status check_route(const ovlm_route *route, const expected *want, ovlm_arena *arena,
                               ovlm_err *err)
{
    int64_t *seen = NULL;
    OVLM_TRY(ovlm_route_check(route, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &seen, want->n, err));
    for (int64_t k = 0; k < route->k; k++) {
        int64_t i = route->item[k], first = route->first_row[k];
        bool fits = i < want->n && first + route->n_rows[k] <= want->rows[i] &&
                    route->source[k] == want->source[i] &&
                    route->send_row[k] == want->send_row[i] + first;
        if (fits && want->destination != NULL) {
            fits = route->destination[k] == want->destination[i] &&
                   route->receive_row[k] == want->receive_row[i] + first;
        }
        if (!fits) {
            return wrong_piece(want, k, err);
        }
        seen[i] += route->n_rows[k];
    }
    for (int64_t i = 0; i < want->n; i++) {
        if (seen[i] != want->rows[i]) {
            return OVLM_FAIL(err, OVLM_E_ARG, "plan: %lld of %lld rows of %s item %lld travel",
                             (long long)seen[i], (long long)want->rows[i], want->name,
                             (long long)i);
        }
    }
    return OVLM_OK;
}

/* Where samples stand: their group, and their first token on its packed axis. */
typedef struct token_map {
    const step_cells *cells;
    int64_t *group, *token; /* [n] by sample */
} token_map;

static ovlm_status token_map_init(token_map *map, const step_input *input,
                                  const step_cells *cells, ovlm_arena *arena, ovlm_err *err)
{
    map->cells = cells;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &map->group, input->problem->n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &map->token, input->problem->n, err));
    for (int64_t g = 0; g < cells->n_groups; g++) {
        int64_t token = 0;
        for (int64_t p = cells->sample_start[g]; p < cells->sample_start[g + 1]; p++) {
            map->group[cells->sample[p]] = g;
            map->token[cells->sample[p]] = token;
            token += input->tokens[cells->sample[p]];
        }
    }
    return OVLM_OK;
}

/* Rows [token, token + n_rows) of a sample: all in one cell, at this rank and place? */
static bool stands_at(const token_map *map, int64_t sample, int64_t token, int64_t n_rows,
                      int64_t rank, int64_t place)
{
    const step_cells *cells = map->cells;
    int64_t g = map->group[sample], at = map->token[sample] + token, r = 0;
    int64_t degree = cells->cell_start[g + 1] - cells->cell_start[g];
    while (r + 1 < degree && step_cell_cut(cells, g, r + 1) <= at) {
        r++;
    }
    int64_t c = cells->cell_start[g] + r, offset = at - step_cell_cut(cells, g, r);
    return at + n_rows <= step_cell_cut(cells, g, r + 1) && cells->rank[c] == rank &&
           cells->base[c] + offset == place;
}

/* Token of a sample at which its text row stands: text rows fill the gaps between items. */
static int64_t token_of_text(const step_input *input, int64_t sample, int64_t row)
{
    int64_t token = row;
    for (int64_t e = input->item_start[sample]; e < input->item_start[sample + 1]; e++) {
        const ovlm_step_items *items = &input->problem->phase[input->item[e].phase];
        int64_t k = input->item[e].index;
        if (items->position[k] > token) {
            break;
        }
        token += items->out_tokens[k];
    }
    return token;
}

/* Places of a route to the cells: right, and ascending at each rank, which is the promised order.
 * Phase -1 is text. */
static ovlm_status check_places(const step_input *input, const token_map *map, int64_t phase,
                                const ovlm_step_route *route, const expected *want, ovlm_err *err)
{
    const ovlm_route *r = &route->route;
    for (int64_t k = 0; k < r->k; k++) {
        int64_t i = r->item[k], sample = i, token = 0;
        if (phase >= 0) {
            sample = input->problem->phase[phase].sample[i];
            token = input->problem->phase[phase].position[i] + r->first_row[k];
        } else {
            token = token_of_text(input, sample, r->first_row[k]);
            if (token_of_text(input, sample, r->first_row[k] + r->n_rows[k] - 1) !=
                token + r->n_rows[k] - 1) {
                return wrong_piece(want, k, err);
            }
        }
        bool ascends = k == 0 || r->destination[k] != r->destination[k - 1] ||
                       route->place[k] >= route->place[k - 1] + r->n_rows[k - 1];
        if (!ascends || !stands_at(map, sample, token, r->n_rows[k], r->destination[k],
                                   route->place[k])) {
            return wrong_piece(want, k, err);
        }
    }
    return OVLM_OK;
}

/* first_row of items at given ranks in the order given (NULL: ascending). */
static ovlm_status rows_before(int64_t n, int64_t n_ranks, const int64_t *rank,
                               const int64_t *order, const int64_t *rows, int64_t **first_row,
                               ovlm_arena *arena, ovlm_err *err)
{
    int64_t *filled = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, first_row, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &filled, n_ranks, err));
    for (int64_t e = 0; e < n; e++) {
        int64_t i = order != NULL ? order[e] : e;
        (*first_row)[i] = filled[rank[i]];
        filled[rank[i]] += rows[i];
    }
    return OVLM_OK;
}

static ovlm_status check_encoder(const step_input *input, const ovlm_step_plan *plan,
                                 const token_map *map, int64_t p, ovlm_arena *arena, ovlm_err *err)
{
    const ovlm_step_items *items = &input->problem->phase[p];
    const int64_t *home = input->home[p], *encoder = plan->share[p].rank;
    int64_t n_ranks = plan->n_ranks, *raw = NULL, *in = NULL, *out = NULL, *back = NULL;
    int64_t *order = NULL, *start = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &order, items->n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &start, n_ranks + 1, err));
    OVLM_TRY(step_encoder_order(input, plan, p, order, start, arena, err));
    OVLM_TRY(rows_before(items->n, n_ranks, home, NULL, items->length, &raw, arena, err));
    OVLM_TRY(rows_before(items->n, n_ranks, encoder, order, items->length, &in, arena, err));
    OVLM_TRY(rows_before(items->n, n_ranks, encoder, order, items->out_tokens, &out, arena, err));
    expected want = {items->name, "raw", items->n, items->length, home, raw, encoder, in};
    OVLM_TRY(check_route(&plan->raw[p].route, &want, arena, err));
    want = (expected){items->name, "llm", items->n, items->out_tokens, encoder, out, NULL, NULL};
    if (!input->problem->compose) {
        OVLM_TRY(rows_before(items->n, n_ranks, home, NULL, items->out_tokens, &back, arena, err));
        want = (expected){items->name, "back", items->n, items->out_tokens, encoder, out, home,
                          back};
        OVLM_TRY(check_route(&plan->back[p].route, &want, arena, err));
        want = (expected){items->name, "llm", items->n, items->out_tokens, home, back, NULL, NULL};
    }
    OVLM_TRY(check_route(&plan->to_llm[p].route, &want, arena, err));
    return check_places(input, map, p, &plan->to_llm[p], &want, err);
}

static ovlm_status check_routes(const step_input *input, const ovlm_step_plan *plan,
                                ovlm_arena *arena, ovlm_err *err)
{
    const ovlm_step_problem *problem = input->problem;
    step_cells cells;
    token_map map;
    int64_t *send = NULL;
    OVLM_TRY(step_cells_init(&cells, input, plan, arena, err));
    OVLM_TRY(token_map_init(&map, input, &cells, arena, err));
    OVLM_TRY(rows_before(problem->n, plan->n_ranks, problem->source_rank, NULL,
                         problem->text_tokens, &send, arena, err));
    expected text = {"text", "llm", problem->n, problem->text_tokens, problem->source_rank, send,
                     NULL, NULL};
    OVLM_TRY(check_route(&plan->text.route, &text, arena, err));
    OVLM_TRY(check_places(input, &map, -1, &plan->text, &text, err));
    for (int64_t p = 0; p < plan->n_phases; p++) {
        OVLM_TRY(check_encoder(input, plan, &map, p, arena, err));
    }
    return OVLM_OK;
}

static ovlm_status check_sums(const ovlm_step_plan *plan, ovlm_err *err)
{
    double exposed_s = 0, time = 0, bound = 0;
    for (int64_t p = 0; p < plan->n_phases; p++) {
        exposed_s += 2 * (plan->back[p].after.seconds + plan->to_llm[p].after.seconds);
    }
    for (int64_t p = 0; p <= plan->n_phases; p++) {
        time += plan->share[p].time;
        bound += plan->share[p].bound;
    }
    time += exposed_s + (plan->sequences ? plan->sequences->time : 0);
    bound += plan->sequences ? plan->sequences->bound : 0;
    if (!near(time, plan->time) || !near(bound, plan->bound) ||
        !near(exposed_s, plan->exposed_s) || plan->bound > plan->time * (1 + 1e-9)) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "plan: time %.17g, bound %.17g, exposed %.17g; it says %.17g, %.17g, "
                         "%.17g", time, bound, exposed_s, plan->time, plan->bound,
                         plan->exposed_s);
    }
    return OVLM_OK;
}

ovlm_status ovlm_step_plan_check(const ovlm_step_problem *problem, const ovlm_step_plan *plan,
                                 ovlm_err *err)
{
    ovlm_arena arena = {0};
    step_input input;
    ovlm_status status = OVLM_OK;
    OVLM_GOTO(done, step_input_init(&input, problem, &arena, err));
    for (int64_t p = 0; p < problem->n_phases + !problem->sequence_parallel; p++) {
        OVLM_GOTO(done, check_share(&input, plan, p, &arena, err));
    }
    if (problem->sequence_parallel) {
        ovlm_sp_problem sequences = step_sequence_problem(&input);
        OVLM_GOTO(done, ovlm_sp_plan_check(&sequences, plan->sequences, err));
    }
    OVLM_GOTO(done, check_routes(&input, plan, &arena, err));
    OVLM_GOTO(done, check_sums(plan, err));
done:
    ovlm_arena_free(&arena);
    return status;
}
