/* step_routes.c - the routes of a step, and what they cost.
 *
 * Rows on each side (they are what the routes' send_row and receive_row count):
 *   at the source   a phase's items in the batch's order; text by sample
 *   at an encoder   (micro-batch, sample, position): `length` rows in, `out_tokens` rows out
 *   at the llm      (micro-batch, packed order, position) */
#include <math.h>
#include <stdlib.h>

#include "plan/route.h"
#include "plan/step.h"

/* first_row[i] = rows of the items before i on i's rank, in the order given (NULL: ascending). */
static void count_rows(const int64_t *rank, const int64_t *rows, const int64_t *order, int64_t n,
                       int64_t *filled, int64_t *first_row)
{
    for (int64_t e = 0; e < n; e++) {
        int64_t i = order ? order[e] : e;
        first_row[i] = filled[rank[i]];
        filled[rank[i]] += rows[i];
    }
}

ovlm_status step_encoder_rows(const step_input *input, const ovlm_step_plan *plan, int64_t p,
                              const int64_t *rows, int64_t *item_order, int64_t *first_row,
                              ovlm_arena *arena, ovlm_err *err)
{
    const ovlm_step_share *share = &plan->share[p];
    int64_t *by_micro = NULL, *start = NULL, *filled = NULL, *order = item_order;
    int64_t keys = share->n_micro > plan->n_ranks ? share->n_micro : plan->n_ranks;
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    OVLM_TRY(OVLM_ARENA_RAW(arena, &by_micro, share->n, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &start, keys + 1, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &filled, plan->n_ranks, err));
    if (order == NULL) {
        OVLM_TRY(OVLM_ARENA_RAW(arena, &order, share->n, err));
    }
    route_group(share->micro, share->n_micro, input->order[p], share->n, by_micro, start);
    route_group(share->rank, plan->n_ranks, by_micro, share->n, order, start);
    count_rows(share->rank, rows, order, share->n, filled, first_row);
    ovlm_arena_rewind(arena, mark);
    return OVLM_OK;
}

/* A route of whole items: from[i]:send_row[i] to to[i]:receive_row[i], in the order given, which is
 * by destination. */
static ovlm_status whole_items(const int64_t *order, int64_t n, int64_t n_ranks,
                               const int64_t *rows, const int64_t *from, const int64_t *send_row,
                               const int64_t *to, const int64_t *receive_row, ovlm_route *route,
                               ovlm_err *err)
{
    int64_t k = 0;
    for (int64_t i = 0; i < n; i++) {
        k += rows[i] > 0;
    }
    OVLM_TRY(ovlm_route_init(route, k, n_ranks, err));
    k = 0;
    for (int64_t e = 0; e < n; e++) {
        int64_t i = order[e];
        if (rows[i] > 0) {
            route->item[k] = i;
            route->first_row[k] = 0;
            route->n_rows[k] = rows[i];
            route->source[k] = from[i];
            route->destination[k] = to[i];
            route->send_row[k] = send_row[i];
            route->receive_row[k++] = receive_row[i];
        }
    }
    return OVLM_OK;
}

/* A route to the cells: item i's rows lie at from[i]:send_row[i]. */
static ovlm_status to_cells(const step_pieces *pieces, const step_cells *cells, int64_t n_ranks,
                            const int64_t *from, const int64_t *send_row, ovlm_step_route *out,
                            ovlm_arena *arena, ovlm_err *err)
{
    int64_t *rank = NULL, *order = NULL, *start = NULL, received = 0;
    OVLM_TRY(OVLM_ARENA_RAW(arena, &rank, pieces->k, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &order, pieces->k, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &start, n_ranks + 1, err));
    for (int64_t k = 0; k < pieces->k; k++) {
        rank[k] = cells->rank[pieces->cell[k]];
    }
    route_group(rank, n_ranks, NULL, pieces->k, order, start);
    ovlm_route *route = &out->route;
    OVLM_TRY(ovlm_route_init(route, pieces->k, n_ranks, err));
    OVLM_TRY(OVLM_HEAP_RAW(&out->place, pieces->k, err));
    for (int64_t e = 0; e < pieces->k; e++) {
        int64_t k = order[e], i = pieces->item[k];
        received = e > 0 && rank[k] == rank[order[e - 1]] ? received : 0;
        route->item[e] = i;
        route->first_row[e] = pieces->first_row[k];
        route->n_rows[e] = pieces->n_rows[k];
        route->source[e] = from[i];
        route->destination[e] = rank[k];
        route->send_row[e] = send_row[i] + pieces->first_row[k];
        route->receive_row[e] = received;
        out->place[e] = cells->base[pieces->cell[k]] + pieces->offset[k];
        received += pieces->n_rows[k];
    }
    return OVLM_OK;
}

/* raw, back and to_llm of one encoder. */
static ovlm_status encoder_routes(const step_input *input, const step_cells *cells,
                                  const step_pieces *pieces, int64_t p, ovlm_step_plan *plan,
                                  ovlm_arena *arena, ovlm_err *err)
{
    const ovlm_step_items *items = &input->problem->phase[p];
    const int64_t *encoder = plan->share[p].rank, *home = input->home[p];
    int64_t *order = NULL, *in = NULL, *out = NULL, *raw = NULL, *output = NULL, *filled = NULL;
    OVLM_TRY(OVLM_ARENA_RAW(arena, &order, items->n, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &in, items->n, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &out, items->n, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &raw, items->n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &filled, plan->n_ranks, err));
    OVLM_TRY(step_encoder_rows(input, plan, p, items->length, order, in, arena, err));
    OVLM_TRY(step_encoder_rows(input, plan, p, items->out_tokens, NULL, out, arena, err));
    count_rows(home, items->length, NULL, items->n, filled, raw);
    OVLM_TRY(whole_items(order, items->n, plan->n_ranks, items->length, home, raw, encoder, in,
                         &plan->raw[p].route, err));
    if (input->problem->compose) {
        return to_cells(pieces, cells, plan->n_ranks, encoder, out, &plan->to_llm[p], arena, err);
    }
    int64_t *start = NULL;
    OVLM_TRY(OVLM_ARENA_RAW(arena, &output, items->n, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &start, plan->n_ranks + 1, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &filled, plan->n_ranks, err));
    count_rows(home, items->out_tokens, NULL, items->n, filled, output);
    route_group(home, plan->n_ranks, NULL, items->n, order, start);
    OVLM_TRY(whole_items(order, items->n, plan->n_ranks, items->out_tokens, encoder, out, home,
                         output, &plan->back[p].route, err));
    return to_cells(pieces, cells, plan->n_ranks, home, output, &plan->to_llm[p], arena, err);
}

ovlm_status step_routes(const step_input *input, const step_cells *cells,
                        const step_pieces *pieces, ovlm_step_plan *plan, ovlm_arena *arena,
                        ovlm_err *err)
{
    const ovlm_step_problem *problem = input->problem;
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    int64_t *text = NULL, *filled = NULL;
    OVLM_TRY(OVLM_ARENA_RAW(arena, &text, problem->n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &filled, plan->n_ranks, err));
    count_rows(problem->source_rank, problem->text_tokens, NULL, problem->n, filled, text);
    OVLM_TRY(to_cells(&pieces[0], cells, plan->n_ranks, problem->source_rank, text, &plan->text,
                      arena, err));
    for (int64_t p = 0; p < plan->n_phases; p++) {
        OVLM_TRY(encoder_routes(input, cells, &pieces[1 + p], p, plan, arena, err));
    }
    ovlm_arena_rewind(arena, mark);
    return OVLM_OK;
}

/* Per rank: bytes out and in, inside the node and between nodes. */
typedef struct volume {
    double node_out, node_in, cross_out, cross_in;
} volume;

static double larger(double a, double b)
{
    return a > b ? a : b;
}

static void add_volume(volume *v, ovlm_traffic *traffic, int64_t node_size, int64_t from,
                       int64_t to, double bytes)
{
    if (from == to) {
        traffic->stay_bytes += bytes;
    } else if (from / node_size == to / node_size) {
        traffic->node_bytes += bytes;
        v[from].node_out += bytes;
        v[to].node_in += bytes;
    } else {
        traffic->cross_bytes += bytes;
        v[from].cross_out += bytes;
        v[to].cross_in += bytes;
    }
}

static void sum_up(const step_input *input, volume *v, ovlm_traffic *traffic)
{
    const ovlm_step_problem *problem = input->problem;
    for (int64_t r = 0; r < problem->n_ranks; r++) {
        double node = larger(v[r].node_out, v[r].node_in) / problem->intra_bandwidth;
        double crossing = larger(v[r].cross_out, v[r].cross_in);
        traffic->worst_bytes = larger(traffic->worst_bytes, crossing);
        traffic->seconds = larger(traffic->seconds,
                                  larger(node, crossing / problem->inter_bandwidth));
        v[r] = (volume){0};
    }
}

ovlm_status step_traffic(const step_input *input, const ovlm_step_plan *plan,
                         const step_cells *cells, const step_pieces *pieces,
                         ovlm_traffic *traffic, ovlm_arena *arena, ovlm_err *err)
{
    const ovlm_step_problem *problem = input->problem;
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    int64_t c = problem->gpus_per_node;
    volume *v = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &v, problem->n_ranks, err));
    for (int64_t t = 0; t < 1 + 3 * problem->n_phases; t++) {
        traffic[t] = (ovlm_traffic){0};
    }
    for (int64_t k = 0; k < pieces[0].k; k++) {
        add_volume(v, &traffic[0], c, problem->source_rank[pieces[0].item[k]],
                   cells->rank[pieces[0].cell[k]],
                   (double)pieces[0].n_rows[k] * problem->text_bytes_per_token);
    }
    sum_up(input, v, &traffic[0]);
    for (int64_t p = 0; p < problem->n_phases; p++) {
        const ovlm_step_items *items = &problem->phase[p];
        const int64_t *encoder = plan->share[p].rank, *home = input->home[p];
        ovlm_traffic *raw = &traffic[1 + 3 * p], *back = raw + 1, *to_llm = raw + 2;
        for (int64_t i = 0; i < items->n; i++) {
            add_volume(v, raw, c, home[i], encoder[i], (double)items->bytes[i]);
        }
        sum_up(input, v, raw);
        for (int64_t i = 0; i < items->n && !problem->compose; i++) {
            add_volume(v, back, c, encoder[i], home[i], (double)input->out_bytes[p][i]);
        }
        sum_up(input, v, back);
        for (int64_t k = 0; k < pieces[1 + p].k; k++) {
            int64_t i = pieces[1 + p].item[k];
            add_volume(v, to_llm, c, problem->compose ? encoder[i] : home[i],
                       cells->rank[pieces[1 + p].cell[k]],
                       (double)pieces[1 + p].n_rows[k] * items->out_bytes_per_token);
        }
        sum_up(input, v, to_llm);
    }
    ovlm_arena_rewind(arena, mark);
    return OVLM_OK;
}
