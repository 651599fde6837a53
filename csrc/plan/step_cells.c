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
    OVLM_TRY(OVLM_ARENA_RAW(arena, &key, n, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &cells->sample, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &cells->first_gpu, cells->n_groups, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &cells->cell_start, cells->n_groups + 1, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &cells->sample_start, cells->n_groups + 1, err));
    for (int64_t i = 0; i < n; i++) {
        key[i] = share->micro[i] * n_ranks + share->rank[i];
    }
    route_group(key, cells->n_groups, NULL, n, cells->sample, cells->sample_start);
    for (int64_t g = 0; g < cells->n_groups; g++) {
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
    OVLM_TRY(OVLM_ARENA_NEW(arena, &cells->rows, cells->n_groups, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &cells->rank, cells->n_cells, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &cells->base, cells->n_cells, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &cells->filled, problem->n_ranks, err));
    for (int64_t g = 0; g < cells->n_groups; g++) {
        int64_t tokens = 0, degree = cells->cell_start[g + 1] - cells->cell_start[g];
        for (int64_t p = cells->sample_start[g]; p < cells->sample_start[g + 1]; p++) {
            tokens += input->tokens[cells->sample[p]];
        }
        int64_t unit = degree * problem->pad_to;
        cells->rows[g] = (tokens / unit + (tokens % unit != 0)) * problem->pad_to;
    }
    step_cells_place(cells, input, plan);
    return OVLM_OK;
}

void step_cells_place(step_cells *cells, const step_input *input, const ovlm_step_plan *plan)
{
    memset(cells->filled, 0, (size_t)plan->n_ranks * sizeof *cells->filled);
    for (int64_t g = 0; g < cells->n_groups; g++) {
        if (!input->problem->sequence_parallel && cells->rows[g] > 0) {
            int64_t sample = cells->sample[cells->sample_start[g]];
            cells->first_gpu[g] = plan->share[plan->n_phases].rank[sample];
        }
        for (int64_t c = cells->cell_start[g]; c < cells->cell_start[g + 1]; c++) {
            cells->rank[c] = cells->first_gpu[g] + c - cells->cell_start[g];
            cells->base[c] = cells->filled[cells->rank[c]];
            cells->filled[cells->rank[c]] += cells->rows[g];
        }
    }
}

static ovlm_status room_for(step_pieces *pieces, int64_t k, ovlm_arena *arena, ovlm_err *err)
{
    OVLM_TRY(OVLM_ARENA_RAW(arena, &pieces->item, k, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &pieces->first_row, k, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &pieces->n_rows, k, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &pieces->cell, k, err));
    return OVLM_ARENA_RAW(arena, &pieces->offset, k, err);
}

/* Where the walk along a group's packed axis stands: divisions would cost more than all the rest.
 * */
typedef struct walk {
    int64_t cell, offset, rows;
} walk;

/* The next n_rows tokens are rows of `item`: one piece for each cell that they reach into. */
static void add_run(step_pieces *pieces, walk *at, int64_t item, int64_t first_row, int64_t n_rows)
{
    while (n_rows > 0) {
        int64_t left = at->rows - at->offset, step = n_rows < left ? n_rows : left;
        int64_t k = pieces->k++;
        pieces->item[k] = item;
        pieces->first_row[k] = first_row;
        pieces->n_rows[k] = step;
        pieces->cell[k] = at->cell;
        pieces->offset[k] = at->offset;
        first_row += step;
        n_rows -= step;
        at->offset += step;
        if (step == left) {
            at->offset = 0;
            at->cell++;
        }
    }
}

/* A sample's text and items in order of position. */
static void add_sample(step_pieces *pieces, const step_input *input, int64_t sample, walk *at)
{
    int64_t token = 0, text_row = 0;
    for (int64_t e = input->item_start[sample]; e < input->item_start[sample + 1]; e++) {
        int64_t gap = input->item_position[e] - token, out = input->item_tokens[e];
        add_run(&pieces[0], at, sample, text_row, gap);
        add_run(&pieces[1 + input->item_phase[e]], at, input->item_index[e], 0, out);
        text_row += gap;
        token += gap + out;
    }
    add_run(&pieces[0], at, sample, text_row, input->tokens[sample] - token);
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
        walk at = {cells->cell_start[g], 0, cells->rows[g]};
        for (int64_t i = cells->sample_start[g]; i < cells->sample_start[g + 1]; i++) {
            add_sample(pieces, input, cells->sample[i], &at);
        }
    }
    *out = pieces;
    return OVLM_OK;
}
