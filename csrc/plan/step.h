/* step.h - what the parts of the step planner share. */
#ifndef OVLM_PLAN_STEP_H
#define OVLM_PLAN_STEP_H

#include "base/arena.h"
#include "base/clock.h"

/* An item as its sample sees it.  Together in one place, because samples are visited in the order
 * of their ranks, which is none in memory. */
typedef struct step_item {
    int64_t phase, index, position, tokens;
} step_item;

/* The problem, checked, with what is derived from it. */
typedef struct step_input {
    const ovlm_step_problem *problem;
    int64_t *tokens;      /* [n] text tokens + out_tokens of the sample's items                */
    int64_t n_items;      /* of all phases                                                     */
    int64_t *item_start;  /* [n+1] into the next                                               */
    step_item *item;      /* [n_items] by (sample, position)                                   */
    int32_t *node;        /* [N] of each rank: divisions add up                                */
    int64_t **order;      /* [n_phases][items] a phase's items by (sample, position)           */
    int64_t **home;       /* [n_phases][items] source rank of the item's sample                */
    int64_t **out_bytes;  /* [n_phases][items] bytes of encoder output, rounded                */
    int64_t *text_bytes;  /* [n]                                                               */
    int64_t *llm_bytes;   /* [n] text and encoder outputs                                      */
} step_input;

/* Checks every argument and fills `input`; everything lives in the arena. */
OVLM_NODISCARD ovlm_status step_input_init(step_input *input, const ovlm_step_problem *problem,
                                           ovlm_arena *arena, ovlm_err *err);

/* One phase to balance: an encoder's items, or whole samples for the language phase. */
typedef struct step_work {
    const char *name;
    int64_t n, capacity;   /* length units per rank and micro-batch; INT64_MAX: no limit       */
    const int64_t *length, *bytes, *home;
    const double *squares;
    ovlm_batch_cost cost;
} step_work;

/* Phase p of the problem; p = n_phases is the language phase. */
OVLM_NODISCARD ovlm_status step_work_init(step_work *work, const step_input *input, int64_t p,
                                          ovlm_err *err);

/* Ranks and micro-batches of a phase; share's arrays exist. */
OVLM_NODISCARD ovlm_status step_share_solve(const step_input *input, const step_work *work,
                                            const ovlm_budget *budget, ovlm_step_share *share,
                                            bool *cut_short, ovlm_arena *arena, ovlm_err *err);

/* Fewest micro-batches that search finds for given ranks, at most `limit`; false when it needs
 * more. */
OVLM_NODISCARD ovlm_status step_micro_pack(const step_work *work, int64_t n_ranks,
                                           const int64_t *rank, int64_t at_least, int64_t limit,
                                           int64_t *micro, int64_t *n_micro, bool *fits,
                                           ovlm_arena *arena, ovlm_err *err);

/* share->loads and share->time from rank and micro. */
OVLM_NODISCARD ovlm_status step_share_measure(const step_work *work, int64_t n_ranks,
                                              ovlm_step_share *share, ovlm_arena *arena,
                                              ovlm_err *err);

/* share->sampled_time and sampled_imbalance: every item at its home, one micro-batch. */
OVLM_NODISCARD ovlm_status step_share_sampled(const step_work *work, int64_t n_ranks,
                                              ovlm_step_share *share, ovlm_arena *arena,
                                              ovlm_err *err);

/* Where tokens live: groups of GPUs in order of their micro-batch, each with its samples in packed
 * order, cut into `degree` cells, which take `rows` each.  A balanced rank is a group of one. */
typedef struct step_cells {
    int64_t n_groups, n_cells;
    int64_t *first_gpu, *tokens, *rows; /* [groups]                                            */
    int64_t *cell_start, *sample_start; /* [groups + 1]                                        */
    int64_t *sample;                   /* packed order                                         */
    int64_t *rank, *base;              /* [cells] where it is, and its first row there         */
    int64_t *filled;                   /* [N] scratch                                          */
} step_cells;

/* Where cell r of a group begins on its packed axis; cell `degree` would at its end. */
static inline int64_t step_cell_cut(const step_cells *cells, int64_t group, int64_t r)
{
    int64_t tokens = cells->tokens[group];
    int64_t degree = cells->cell_start[group + 1] - cells->cell_start[group];
    return tokens / degree * r + tokens % degree * r / degree;
}

OVLM_NODISCARD ovlm_status step_cells_init(step_cells *cells, const step_input *input,
                                           const ovlm_step_plan *plan, ovlm_arena *arena,
                                           ovlm_err *err);

/* Ranks and bases again, after relabelling; groups, and so the pieces, keep their numbers. */
void step_cells_place(step_cells *cells, const step_input *input, const ovlm_step_plan *plan);

/* Rows of an item (of a sample, for text) that lie in one cell, from row `offset` of it. */
typedef struct step_piece {
    int64_t item, first_row, n_rows, offset;
} step_piece;

/* What `rows` rows take, in whole bytes: one rule wherever bytes are counted. */
static inline int64_t step_bytes(int64_t rows, double bytes_per_row)
{
    return (int64_t)((double)rows * bytes_per_row + 0.5);
}

/* Rows of one kind (text, or one encoder's outputs), cell after cell, each in packed order. */
typedef struct step_pieces {
    int64_t k;
    step_piece *piece;   /* [k]                                                                */
    int64_t *cell_start; /* [cells + 1]                                                        */
} step_pieces;

/* pieces[0] = text, pieces[1 + p] = outputs of phase p. */
OVLM_NODISCARD ovlm_status step_pieces_init(step_pieces **pieces, const step_input *input,
                                            const step_cells *cells, ovlm_arena *arena,
                                            ovlm_err *err);

/* Gives mini-batches and groups their ranks: changes share->rank, sequences->first_gpu and the
 * cells' places. */
OVLM_NODISCARD ovlm_status step_relabel(const step_input *input, step_cells *cells,
                                        const step_pieces *pieces, const ovlm_meter *clock,
                                        const ovlm_budget *budget, ovlm_step_plan *plan,
                                        ovlm_arena *arena, ovlm_err *err);

/* Traffic of all routes as the plan stands: text, raw[p], back[p], to_llm[p] in traffic[1 + 3*p
 * ..]. */
OVLM_NODISCARD ovlm_status step_traffic(const step_input *input, const ovlm_step_plan *plan,
                                        const step_cells *cells, const step_pieces *pieces,
                                        ovlm_traffic *traffic, ovlm_arena *arena, ovlm_err *err);

/* The items of encoder p by (rank, micro-batch, sample, position), those of rank r from start[r];
 * order[items], start[N + 1]. */
OVLM_NODISCARD ovlm_status step_encoder_order(const step_input *input, const ovlm_step_plan *plan,
                                              int64_t p, int64_t *order, int64_t *start,
                                              ovlm_arena *arena, ovlm_err *err);

/* All routes of the plan, and their traffic as above. */
OVLM_NODISCARD ovlm_status step_routes(const step_input *input, const step_cells *cells,
                                       const step_pieces *pieces, ovlm_step_plan *plan,
                                       ovlm_traffic *traffic, ovlm_arena *arena, ovlm_err *err);

/* The language phase as ovlm_sp_solve and ovlm_sp_plan_check see it. */
ovlm_sp_problem step_sequence_problem(const step_input *input);

/* The budget of the next search: an equal part of the time that is left for `searches` of them. */
ovlm_budget step_budget(const ovlm_meter *clock, const ovlm_budget *budget, int64_t searches);

#endif
