/* step_cells.c - where every token of the step lives, and in which pieces the rows get there.
 *
 * A group's samples stand one after the other on its packed axis, which is cut into `degree` cells
 * as ovlm_sequence_cut does: of T tokens cell r has those from r T / degree on, rounded down.  On
 * its rank each takes `rows`, the longest cell rounded up to a multiple of pad_to (FlexSP 2.7).
 * One image may straddle cells; then it travels in several pieces. */
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
    OVLM_TRY(OVLM_ARENA_NEW(arena, &cells->tokens, cells->n_groups, err));
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
        cells->tokens[g] = tokens;
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

static ovlm_status room_for(step_pieces *pieces, int64_t k, int64_t n_cells, ovlm_arena *arena,
                            ovlm_err *err)
{
    OVLM_TRY(OVLM_ARENA_RAW(arena, &pieces->piece, k, err));
    return OVLM_ARENA_RAW(arena, &pieces->cell_start, n_cells + 1, err);
}

/* Where the walk along a group's packed axis stands: divisions would cost more than all the rest.
 * */
typedef struct walk {
    step_pieces *pieces;
    const step_cells *cells;
    int64_t kinds, group, cell, offset, rows;
} walk;

/* What is added from now on lies in `cell`, of the walk's group or just behind it. */
static void enter(walk *at, int64_t cell)
{
    const int64_t *start = &at->cells->cell_start[at->group];
    at->cell = cell;
    at->offset = 0;
    if (at->group < at->cells->n_groups && cell < start[1]) { /* there may be none */
        at->rows = step_cell_cut(at->cells, at->group, cell + 1 - start[0]) -
                   step_cell_cut(at->cells, at->group, cell - start[0]);
    }
    for (int64_t t = 0; t < at->kinds; t++) {
        at->pieces[t].cell_start[cell] = at->pieces[t].k;
    }
}

/* The next n_rows tokens are rows of `item`: one piece for each cell that they reach into. */
static inline void add_run(walk *at, int64_t kind, int64_t item, int64_t n_rows, int64_t first_row)
{
    step_pieces *pieces = &at->pieces[kind];
    while (n_rows > 0) {
        while (at->offset == at->rows) { /* a cell may be without tokens */
            enter(at, at->cell + 1);
        }
        int64_t left = at->rows - at->offset, step = n_rows < left ? n_rows : left;
        pieces->piece[pieces->k++] = (step_piece){item, first_row, step, at->offset};
        first_row += step;
        n_rows -= step;
        at->offset += step;
    }
}

/* Samples come in no order of memory: what the walk reads of them is fetched ahead, the items once
 * it is known where they are. */
static inline void fetch_ahead(const step_input *input, const int64_t *sample, const int64_t *end)
{
    enum { FAR = 16, NEAR = 8 };
    if (end - sample > FAR) {
        __builtin_prefetch(&input->item_start[sample[FAR]]);
        __builtin_prefetch(&input->tokens[sample[FAR]]);
        __builtin_prefetch(&input->item[input->item_start[sample[NEAR]]]);
    }
}

/* A sample's text and items in order of position. */
static void add_sample(walk *at, const step_input *input, int64_t sample)
{
    int64_t token = 0, text_row = 0;
    const step_item *end = &input->item[input->item_start[sample + 1]];
    for (const step_item *x = &input->item[input->item_start[sample]]; x < end; x++) {
        int64_t gap = x->position - token;
        add_run(at, 0, sample, gap, text_row);
        add_run(at, 1 + x->phase, x->index, x->tokens, 0);
        text_row += gap;
        token += gap + x->tokens;
    }
    add_run(at, 0, sample, input->tokens[sample] - token, text_row);
}

ovlm_status step_pieces_init(step_pieces **out, const step_input *input, const step_cells *cells,
                             ovlm_arena *arena, ovlm_err *err)
{
    const ovlm_step_problem *problem = input->problem;
    step_pieces *pieces = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &pieces, problem->n_phases + 1, err));
    /* every end of a cell cuts at most one run */
    int64_t n_cells = cells->n_cells, runs = problem->n + input->n_items + n_cells;
    OVLM_TRY(room_for(&pieces[0], runs, n_cells, arena, err));
    for (int64_t p = 0; p < problem->n_phases; p++) {
        OVLM_TRY(room_for(&pieces[1 + p], problem->phase[p].n + n_cells, n_cells, arena, err));
    }
    walk at = {.pieces = pieces, .cells = cells, .kinds = problem->n_phases + 1};
    const int64_t *last = cells->sample + problem->n;
    for (int64_t g = 0; g < cells->n_groups; g++) {
        at.group = g;
        enter(&at, cells->cell_start[g]);
        for (int64_t i = cells->sample_start[g]; i < cells->sample_start[g + 1]; i++) {
            fetch_ahead(input, &cells->sample[i], last);
            add_sample(&at, input, cells->sample[i]);
        }
        while (at.cell < cells->cell_start[g + 1]) {
            enter(&at, at.cell + 1);
        }
    }
    enter(&at, n_cells);
    *out = pieces;
    return OVLM_OK;
}
