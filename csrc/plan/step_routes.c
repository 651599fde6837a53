/* step_routes.c - the routes of a step, and what they cost.
 *
 * Rows on each side (they are what the routes' send_row and receive_row count):
 *   at the source   a phase's items in the batch's order; text by sample
 *   at an encoder   (micro-batch, sample, position): `length` rows in, `out_tokens` rows out
 *   at the llm      (micro-batch, packed order, position)
 *
 * Routes are written in their own order, by destination; what is gathered on the way there from
 * anywhere in memory is kept in one place per item. */
#include <math.h>
#include <stdlib.h>

#include "plan/route.h"
#include "plan/step.h"

enum { AHEAD = 16 }; /* items whose memory is fetched before their turn */

/* Where an item's rows lie before they travel. */
typedef struct origin {
    int64_t rank, row, n_rows;
} origin;

/* Items at given ranks, in ascending order there. */
static ovlm_status origins(int64_t n, int64_t n_ranks, const int64_t *rank, const int64_t *rows,
                           origin **out, ovlm_arena *arena, ovlm_err *err)
{
    int64_t *filled = NULL;
    OVLM_TRY(OVLM_ARENA_RAW(arena, out, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &filled, n_ranks, err));
    for (int64_t i = 0; i < n; i++) {
        (*out)[i] = (origin){rank[i], filled[rank[i]], rows[i]};
        filled[rank[i]] += rows[i];
    }
    return OVLM_OK;
}

ovlm_status step_encoder_order(const step_input *input, const ovlm_step_plan *plan, int64_t p,
                               int64_t *order, int64_t *start, ovlm_arena *arena, ovlm_err *err)
{
    const ovlm_step_share *share = &plan->share[p];
    const int64_t *before = input->order[p];
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    if (share->n_micro > 1) {
        int64_t *by_micro = NULL, *micro_start = NULL;
        OVLM_TRY(OVLM_ARENA_RAW(arena, &by_micro, share->n, err));
        OVLM_TRY(OVLM_ARENA_RAW(arena, &micro_start, share->n_micro + 1, err));
        route_group(share->micro, share->n_micro, before, share->n, by_micro, micro_start);
        before = by_micro;
    }
    route_group(share->rank, plan->n_ranks, before, share->n, order, start);
    ovlm_arena_rewind(arena, mark);
    return OVLM_OK;
}

/* Per rank: bytes out and in, inside the node and between nodes. */
typedef struct volume {
    double node_out, node_in, cross_out, cross_in;
} volume;

/* The traffic of one route, being summed. */
typedef struct tally {
    const step_input *input;
    volume *rank; /* [N] zero between routes */
    ovlm_traffic *traffic;
} tally;

static inline void add_volume(tally *sum, int64_t from, int64_t to, double bytes)
{
    const int32_t *node = sum->input->node;
    if (from == to) {
        sum->traffic->stay_bytes += bytes;
    } else if (node[from] == node[to]) {
        sum->traffic->node_bytes += bytes;
        sum->rank[from].node_out += bytes;
        sum->rank[to].node_in += bytes;
    } else {
        sum->traffic->cross_bytes += bytes;
        sum->rank[from].cross_out += bytes;
        sum->rank[to].cross_in += bytes;
    }
}

static double larger(double a, double b)
{
    return a > b ? a : b;
}

static void begin_tally(tally *sum, ovlm_traffic *traffic)
{
    *traffic = (ovlm_traffic){0};
    sum->traffic = traffic;
}

static void end_tally(tally *sum)
{
    const ovlm_step_problem *problem = sum->input->problem;
    ovlm_traffic *traffic = sum->traffic;
    for (int64_t r = 0; r < problem->n_ranks; r++) {
        volume *v = &sum->rank[r];
        double node = larger(v->node_out, v->node_in) / problem->intra_bandwidth;
        double crossing = larger(v->cross_out, v->cross_in);
        traffic->worst_bytes = larger(traffic->worst_bytes, crossing);
        traffic->seconds = larger(traffic->seconds,
                                  larger(node, crossing / problem->inter_bandwidth));
        *v = (volume){0};
    }
}

/* Whole items from one rank each to another. */
static void tally_items(tally *sum, int64_t n, const int64_t *from, const int64_t *to,
                        const int64_t *bytes, ovlm_traffic *traffic)
{
    begin_tally(sum, traffic);
    for (int64_t i = 0; i < n; i++) {
        add_volume(sum, from[i], to[i], (double)bytes[i]);
    }
    end_tally(sum);
}

/* Pieces from their item's rank to their cell's. */
static void tally_pieces(tally *sum, const step_pieces *pieces, const step_cells *cells,
                         const int64_t *from, double bytes_per_row, ovlm_traffic *traffic)
{
    begin_tally(sum, traffic);
    for (int64_t c = 0; c < cells->n_cells; c++) {
        for (int64_t k = pieces->cell_start[c]; k < pieces->cell_start[c + 1]; k++) {
            const step_piece *x = &pieces->piece[k];
            add_volume(sum, from[x->item], cells->rank[c], (double)x->n_rows * bytes_per_row);
        }
    }
    end_tally(sum);
}

/* raw and back of encoder p: the routes of whole items. */
static void tally_encoder(tally *sum, const ovlm_step_plan *plan, int64_t p,
                          ovlm_traffic *traffic)
{
    const step_input *input = sum->input;
    const ovlm_step_items *items = &input->problem->phase[p];
    const int64_t *encoder = plan->share[p].rank, *home = input->home[p];
    tally_items(sum, items->n, home, encoder, items->bytes, &traffic[1 + 3 * p]);
    tally_items(sum, input->problem->compose ? 0 : items->n, encoder, home, input->out_bytes[p],
                &traffic[2 + 3 * p]);
}

ovlm_status step_traffic(const step_input *input, const ovlm_step_plan *plan,
                         const step_cells *cells, const step_pieces *pieces,
                         ovlm_traffic *traffic, ovlm_arena *arena, ovlm_err *err)
{
    const ovlm_step_problem *problem = input->problem;
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    tally sum = {.input = input};
    OVLM_TRY(OVLM_ARENA_NEW(arena, &sum.rank, problem->n_ranks, err));
    tally_pieces(&sum, &pieces[0], cells, problem->source_rank, problem->text_bytes_per_token,
                 &traffic[0]);
    for (int64_t p = 0; p < problem->n_phases; p++) {
        tally_encoder(&sum, plan, p, traffic);
        tally_pieces(&sum, &pieces[1 + p], cells,
                     problem->compose ? plan->share[p].rank : input->home[p],
                     problem->phase[p].out_bytes_per_token, &traffic[3 + 3 * p]);
    }
    ovlm_arena_rewind(arena, mark);
    return OVLM_OK;
}

/* A route of whole items in `order`, of which those from start[r] on go to rank r. */
static ovlm_status whole_items(const int64_t *order, const int64_t *start, int64_t n,
                               int64_t n_ranks, const origin *from, ovlm_route *route,
                               ovlm_err *err)
{
    int64_t k = 0;
    for (int64_t i = 0; i < n; i++) {
        k += from[i].n_rows > 0;
    }
    OVLM_TRY(ovlm_route_init(route, k, n_ranks, err));
    k = 0;
    for (int64_t r = 0; r < n_ranks; r++) {
        int64_t received = 0;
        for (int64_t e = start[r]; e < start[r + 1]; e++) {
            const origin *x = &from[order[e]];
            if (n - e > AHEAD) {
                __builtin_prefetch(&from[order[e + AHEAD]]);
            }
            if (x->n_rows > 0) {
                route->item[k] = order[e];
                route->first_row[k] = 0;
                route->n_rows[k] = x->n_rows;
                route->source[k] = x->rank;
                route->destination[k] = r;
                route->send_row[k] = x->row;
                route->receive_row[k++] = received;
                received += x->n_rows;
            }
        }
    }
    return OVLM_OK;
}

/* A route to the cells, and its traffic. */
static ovlm_status to_cells(const step_pieces *pieces, const step_cells *cells, tally *sum,
                            const origin *from, double bytes_per_row, ovlm_step_route *out,
                            ovlm_traffic *traffic, ovlm_arena *arena, ovlm_err *err)
{
    int64_t n_ranks = sum->input->problem->n_ranks, *order = NULL, *start = NULL, e = 0;
    OVLM_TRY(OVLM_ARENA_RAW(arena, &order, cells->n_cells, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &start, n_ranks + 1, err));
    /* pieces stand cell after cell, so it is the cells that are put in order */
    route_group(cells->rank, n_ranks, NULL, cells->n_cells, order, start);
    ovlm_route *route = &out->route;
    OVLM_TRY(ovlm_route_init(route, pieces->k, n_ranks, err));
    OVLM_TRY(OVLM_HEAP_RAW(&out->place, pieces->k, err));
    begin_tally(sum, traffic);
    for (int64_t r = 0; r < n_ranks; r++) {
        int64_t received = 0;
        for (int64_t at = start[r]; at < start[r + 1]; at++) {
            int64_t c = order[at], base = cells->base[c], end = pieces->cell_start[c + 1];
            for (int64_t k = pieces->cell_start[c]; k < end; k++, e++) {
                const step_piece *x = &pieces->piece[k];
                const origin *o = &from[x->item];
                if (pieces->k - k > AHEAD) {
                    __builtin_prefetch(&from[x[AHEAD].item]);
                }
                route->item[e] = x->item;
                route->first_row[e] = x->first_row;
                route->n_rows[e] = x->n_rows;
                route->source[e] = o->rank;
                route->destination[e] = r;
                route->send_row[e] = o->row + x->first_row;
                route->receive_row[e] = received;
                out->place[e] = base + x->offset;
                received += x->n_rows;
                add_volume(sum, o->rank, r, (double)x->n_rows * bytes_per_row);
            }
        }
    }
    end_tally(sum);
    return OVLM_OK;
}

/* raw, back and to_llm of one encoder. */
static ovlm_status encoder_routes(const step_cells *cells, const step_pieces *pieces, int64_t p,
                                  ovlm_step_plan *plan, tally *sum, ovlm_traffic *traffic,
                                  ovlm_arena *arena, ovlm_err *err)
{
    const step_input *input = sum->input;
    const ovlm_step_items *items = &input->problem->phase[p];
    int64_t n_ranks = plan->n_ranks, *order = NULL, *start = NULL;
    origin *raw = NULL, *out = NULL;
    OVLM_TRY(OVLM_ARENA_RAW(arena, &order, items->n, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &start, n_ranks + 1, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &out, items->n, err));
    tally_encoder(sum, plan, p, traffic);
    OVLM_TRY(step_encoder_order(input, plan, p, order, start, arena, err));
    OVLM_TRY(origins(items->n, n_ranks, input->home[p], items->length, &raw, arena, err));
    OVLM_TRY(whole_items(order, start, items->n, n_ranks, raw, &plan->raw[p].route, err));
    for (int64_t r = 0; r < n_ranks; r++) {
        int64_t row = 0;
        for (int64_t e = start[r]; e < start[r + 1]; e++) {
            int64_t i = order[e];
            out[i] = (origin){r, row, items->out_tokens[i]};
            row += items->out_tokens[i];
        }
    }
    if (!input->problem->compose) {
        route_group(input->home[p], n_ranks, NULL, items->n, order, start);
        OVLM_TRY(whole_items(order, start, items->n, n_ranks, out, &plan->back[p].route, err));
        OVLM_TRY(origins(items->n, n_ranks, input->home[p], items->out_tokens, &out, arena, err));
    }
    return to_cells(pieces, cells, sum, out, items->out_bytes_per_token, &plan->to_llm[p],
                    &traffic[3 + 3 * p], arena, err);
}

ovlm_status step_routes(const step_input *input, const step_cells *cells,
                        const step_pieces *pieces, ovlm_step_plan *plan, ovlm_traffic *traffic,
                        ovlm_arena *arena, ovlm_err *err)
{
    const ovlm_step_problem *problem = input->problem;
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    origin *text = NULL;
    tally sum = {.input = input};
    OVLM_TRY(OVLM_ARENA_NEW(arena, &sum.rank, plan->n_ranks, err));
    ovlm_arena_mark each = ovlm_arena_save(arena);
    OVLM_TRY(origins(problem->n, plan->n_ranks, problem->source_rank, problem->text_tokens, &text,
                     arena, err));
    OVLM_TRY(to_cells(&pieces[0], cells, &sum, text, problem->text_bytes_per_token, &plan->text,
                      &traffic[0], arena, err));
    for (int64_t p = 0; p < plan->n_phases; p++) {
        ovlm_arena_rewind(arena, each);
        OVLM_TRY(encoder_routes(cells, &pieces[1 + p], p, plan, &sum, traffic, arena, err));
    }
    ovlm_arena_rewind(arena, mark);
    return OVLM_OK;
}
