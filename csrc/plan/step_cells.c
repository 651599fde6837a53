/* step_cells.c - where every token of the step lives, and in which pieces the rows get there.
 *
 * A group's samples stand one after the other on its packed axis, which is cut into `degree` equal
 * cells of `rows` tokens: rows = the packed length over degree, rounded up to a multiple of pad_to
 * (FlexSP 2.7).  One image may straddle cells; then it travels in several pieces. */
#include <string.h>

#include "plan/route.h"
#include "plan/step.h"

/* Groups of one: (micro-batch, rank), the samples of each in ascending order. */
static ovlm_status balanced_groups(step_cells *cells, const step_input *input,
                                   const ovlm_step_share *share, ovlm_arena *arena, ovlm_err *err)
{
    int64_t n = input->problem->n, n_ranks = input->problem->n_ranks, *key = NULL;
    cells->n_groups = cells->n_cells = share->n_micro * n_ranks;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &key, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &cells->sample, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &cells->first_gpu, cells->n_groups, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &cells->cell_start, cells->n_groups + 1, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &cells->sample_start, cells->n_groups + 1, err));
    for (int64_t i = 0; i < n; i++) {
        key[i] = share->micro[i] * n_ranks + share->rank[i];
    }
    route_group(key, cells->n_groups, NULL, n, cells->sample, cells->sample_start);
    for (int64_t g = 0; g < cells->n_groups; g++) {
        cells->first_gpu[g] = g % n_ranks;
        cells->cell_start[g + 1] = g + 1;
    }
    return OVLM_OK;
}

static ovlm_status sequence_groups(step_cells *cells, const ovlm_sp_plan *plan, ovlm_arena *arena,
                                   ovlm_err *err)
{
    cells->n_groups = plan->n_groups;
    cells->sample = plan->item;
    cells->first_gpu = plan->first_gpu;
    cells->sample_start = plan->group_start;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &cells->cell_start, plan->n_groups + 1, err));
    for (int64_t g = 0; g < plan->n_groups; g++) {
        cells->cell_start[g + 1] = cells->cell_start[g] + plan->degree[g];
    }
    cells->n_cells = cells->cell_start[plan->n_groups];
    return OVLM_OK;
}

ovlm_status step_cells_init(step_cells *cells, const step_input *input, const ovlm_step_plan *plan,
                            ovlm_arena *arena, ovlm_err *err)
{
    const ovlm_step_problem *problem = input->problem;
    *cells = (step_cells){0};
    if (problem->sequence_parallel) {
        OVLM_TRY(sequence_groups(cells, plan->sequences, arena, err));
    } else {
        OVLM_TRY(balanced_groups(cells, input, &plan->share[plan->n_phases], arena, err));
    }
    int64_t *filled = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &cells->rows, cells->n_groups, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &cells->rank, cells->n_cells, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &cells->base, cells->n_cells, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &filled, problem->n_ranks, err));
    for (int64_t g = 0; g < cells->n_groups; g++) {
        int64_t tokens = 0, degree = cells->cell_start[g + 1] - cells->cell_start[g];
        for (int64_t p = cells->sample_start[g]; p < cells->sample_start[g + 1]; p++) {
            tokens += input->tokens[cells->sample[p]];
        }
        int64_t unit = degree * problem->pad_to;
        cells->rows[g] = (tokens / unit + (tokens % unit != 0)) * problem->pad_to;
        for (int64_t q = 0; q < degree; q++) {
            int64_t c = cells->cell_start[g] + q;
            cells->rank[c] = cells->first_gpu[g] + q;
            cells->base[c] = filled[cells->rank[c]];
            filled[cells->rank[c]] += cells->rows[g];
        }
    }
    return OVLM_OK;
}

static ovlm_status room_for(step_pieces *pieces, int64_t k, ovlm_arena *arena, ovlm_err *err)
{
    OVLM_TRY(OVLM_ARENA_NEW(arena, &pieces->item, k, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &pieces->first_row, k, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &pieces->n_rows, k, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &pieces->cell, k, err));
    return OVLM_ARENA_NEW(arena, &pieces->offset, k, err);
}

/* A run of n_rows rows of `item` at `token` of group g's packed axis, cut at the cells' ends. */
static void add_run(step_pieces *pieces, const step_cells *cells, int64_t g, int64_t item,
                    int64_t first_row, int64_t n_rows, int64_t token)
{
    int64_t rows = cells->rows[g];
    while (n_rows > 0) {
        int64_t shard = token / rows, offset = token % rows, left = rows - offset;
        int64_t step = n_rows < left ? n_rows : left, k = pieces->k++;
        pieces->item[k] = item;
        pieces->first_row[k] = first_row;
        pieces->n_rows[k] = step;
        pieces->cell[k] = cells->cell_start[g] + shard;
        pieces->offset[k] = offset;
        first_row += step;
        token += step;
        n_rows -= step;
    }
}

/* A sample's text and items in order of position; its first token is at `token`. */
static void add_sample(step_pieces *pieces, const step_input *input, const step_cells *cells,
                       int64_t g, int64_t sample, int64_t token)
{
    int64_t at = 0, text_row = 0;
    for (int64_t e = input->item_start[sample]; e < input->item_start[sample + 1]; e++) {
        int64_t p = input->item_phase[e], k = input->item_index[e];
        const ovlm_step_items *items = &input->problem->phase[p];
        int64_t gap = items->position[k] - at;
        add_run(&pieces[0], cells, g, sample, text_row, gap, token + at);
        text_row += gap;
        at += gap;
        add_run(&pieces[1 + p], cells, g, k, 0, items->out_tokens[k], token + at);
        at += items->out_tokens[k];
    }
    add_run(&pieces[0], cells, g, sample, text_row, input->tokens[sample] - at, token + at);
}

ovlm_status step_pieces_init(step_pieces **out, const step_input *input, const step_cells *cells,
                             ovlm_arena *arena, ovlm_err *err)
{
    const ovlm_step_problem *problem = input->problem;
    step_pieces *pieces = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &pieces, problem->n_phases + 1, err));
    /* every end of a cell cuts at most one run */
    int64_t runs = problem->n + input->n_items + cells->n_cells;
    OVLM_TRY(room_for(&pieces[0], runs, arena, err));
    for (int64_t p = 0; p < problem->n_phases; p++) {
        OVLM_TRY(room_for(&pieces[1 + p], problem->phase[p].n + cells->n_cells, arena, err));
    }
    for (int64_t g = 0; g < cells->n_groups; g++) {
        int64_t token = 0;
        for (int64_t i = cells->sample_start[g]; i < cells->sample_start[g + 1]; i++) {
            add_sample(pieces, input, cells, g, cells->sample[i], token);
            token += input->tokens[cells->sample[i]];
        }
    }
    *out = pieces;
    return OVLM_OK;
}
