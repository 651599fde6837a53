/* sp_bound_simplex.c - revised primal simplex with a dense inverse. */
#include "plan/sp_bound_simplex.h"

#include <string.h>

#define ENTER_TOLERANCE 1e-9
#define PIVOT_TOLERANCE 1e-9

ovlm_status sp_simplex_init(sp_simplex *lp, int64_t rows, int64_t max_columns, ovlm_arena *arena,
                            ovlm_err *err)
{
    *lp = (sp_simplex){.rows = rows, .max_columns = max_columns, .max_entries = 32 * max_columns};
    OVLM_TRY(OVLM_ARENA_NEW(arena, &lp->demand, rows, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &lp->inverse, rows * rows, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &lp->x, rows, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &lp->price, rows, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &lp->work, rows, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &lp->basis, rows, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &lp->limit, rows, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &lp->floor, rows, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &lp->cost, max_columns, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &lp->start, max_columns + 1, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &lp->entry_row, lp->max_entries, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &lp->entry_value, lp->max_entries, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &lp->saved_inverse, rows * rows, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &lp->saved_x, rows, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &lp->saved_basis, rows, err));
    return OVLM_ARENA_NEW(arena, &lp->is_basic, max_columns, err);
}

void sp_simplex_reset(sp_simplex *lp)
{
    int64_t m = lp->rows;
    memset(lp->inverse, 0, (size_t)(m * m) * sizeof *lp->inverse);
    memset(lp->is_basic, 0, (size_t)lp->max_columns);
    for (int64_t i = 0; i < m; i++) {
        lp->inverse[i * m + i] = 1;
        lp->x[i] = lp->demand[i];
        lp->basis[i] = -1 - i;
    }
}

void sp_simplex_save(sp_simplex *lp)
{
    size_t m = (size_t)lp->rows;
    memcpy(lp->saved_inverse, lp->inverse, m * m * sizeof *lp->inverse);
    memcpy(lp->saved_x, lp->x, m * sizeof *lp->x);
    memcpy(lp->saved_basis, lp->basis, m * sizeof *lp->basis);
    lp->saved_columns = lp->n_columns;
    lp->saved_entries = lp->n_entries;
}

void sp_simplex_restore(sp_simplex *lp)
{
    size_t m = (size_t)lp->rows;
    memcpy(lp->inverse, lp->saved_inverse, m * m * sizeof *lp->inverse);
    memcpy(lp->x, lp->saved_x, m * sizeof *lp->x);
    memcpy(lp->basis, lp->saved_basis, m * sizeof *lp->basis);
    lp->n_columns = lp->saved_columns;
    lp->n_entries = lp->saved_entries;
    memset(lp->is_basic, 0, (size_t)lp->max_columns);
    for (int64_t i = 0; i < lp->rows; i++) {
        if (lp->basis[i] >= 0) {
            lp->is_basic[lp->basis[i]] = 1;
        }
    }
}

bool sp_simplex_begin(sp_simplex *lp, double cost)
{
    if (lp->n_columns == lp->max_columns || lp->n_entries + lp->rows > lp->max_entries) {
        return false;
    }
    lp->cost[lp->n_columns] = cost;
    lp->start[++lp->n_columns] = lp->n_entries;
    return true;
}

void sp_simplex_entry(sp_simplex *lp, int64_t row, double value)
{
    for (int64_t e = lp->start[lp->n_columns - 1]; e < lp->n_entries; e++) {
        if (lp->entry_row[e] == row) {
            lp->entry_value[e] += value;
            return;
        }
    }
    lp->entry_row[lp->n_entries] = row;
    lp->entry_value[lp->n_entries++] = value;
    lp->start[lp->n_columns] = lp->n_entries;
}

void sp_simplex_cover(sp_simplex *lp, const sp_nodes *nodes, int64_t item, double amount)
{
    int64_t c = nodes->left[item];
    sp_simplex_entry(lp, c, amount * nodes->weight[item]);
    if (nodes->next[item] > 0) {
        sp_simplex_entry(lp, c + 1, amount * nodes->next[item]);
    }
}

/* Artificials cost the limit of their row's price; surpluses give its floor back. */
static double cost_of(const sp_simplex *lp, int64_t column)
{
    if (column >= 0) {
        return lp->cost[column];
    }
    return column >= -lp->rows ? lp->limit[-1 - column] : -lp->floor[-1 - lp->rows - column];
}

/* price = c_B * inverse. */
static void find_prices(sp_simplex *lp)
{
    int64_t m = lp->rows;
    memset(lp->price, 0, (size_t)m * sizeof *lp->price);
    for (int64_t i = 0; i < m; i++) {
        double cost = cost_of(lp, lp->basis[i]);
        const double *row = lp->inverse + i * m;
        if (cost != 0) {
            for (int64_t r = 0; r < m; r++) {
                lp->price[r] += cost * row[r];
            }
        }
    }
}

/* The column of least reduced cost.  -1-r stands for the artificial of row r (a price above its
 * limit), -1-rows-r for its surplus (a price below its floor). */
static bool choose(const sp_simplex *lp, int64_t *entering)
{
    double worst = -ENTER_TOLERANCE;
    bool found = false;
    for (int64_t c = 0; c < lp->n_columns; c++) {
        if (lp->is_basic[c]) {
            continue;
        }
        double reduced = lp->cost[c];
        for (int64_t e = lp->start[c]; e < lp->start[c + 1]; e++) {
            reduced -= lp->price[lp->entry_row[e]] * lp->entry_value[e];
        }
        if (reduced < worst) {
            worst = reduced;
            *entering = c;
            found = true;
        }
    }
    for (int64_t r = 0; r < lp->rows; r++) {
        if (lp->price[r] - lp->floor[r] < worst) {
            worst = lp->price[r] - lp->floor[r];
            *entering = -1 - lp->rows - r;
            found = true;
        }
        if (lp->limit[r] - lp->price[r] < worst) {
            worst = lp->limit[r] - lp->price[r];
            *entering = -1 - r;
            found = true;
        }
    }
    return found;
}

/* work = inverse * column. */
static void direct(sp_simplex *lp, int64_t column)
{
    int64_t m = lp->rows;
    for (int64_t i = 0; i < m; i++) {
        const double *row = lp->inverse + i * m;
        double sum = 0;
        if (column < 0) {
            sum = column >= -m ? row[-1 - column] : -row[-1 - m - column];
        } else {
            for (int64_t e = lp->start[column]; e < lp->start[column + 1]; e++) {
                sum += row[lp->entry_row[e]] * lp->entry_value[e];
            }
        }
        lp->work[i] = sum;
    }
}

static bool leave(const sp_simplex *lp, int64_t *leaving)
{
    double least = 0;
    bool found = false;
    for (int64_t i = 0; i < lp->rows; i++) {
        if (lp->work[i] > PIVOT_TOLERANCE) {
            double ratio = lp->x[i] / lp->work[i];
            if (!found || ratio < least || (ratio == least && lp->work[i] > lp->work[*leaving])) {
                least = ratio;
                *leaving = i;
                found = true;
            }
        }
    }
    return found;
}

static void pivot(sp_simplex *lp, int64_t leaving, int64_t entering)
{
    int64_t m = lp->rows;
    double *pivot_row = lp->inverse + leaving * m, scale = 1 / lp->work[leaving];
    for (int64_t r = 0; r < m; r++) {
        pivot_row[r] *= scale;
    }
    lp->x[leaving] *= scale;
    for (int64_t i = 0; i < m; i++) {
        double factor = lp->work[i];
        if (i == leaving || factor == 0) {
            continue;
        }
        double *row = lp->inverse + i * m;
        for (int64_t r = 0; r < m; r++) {
            row[r] -= factor * pivot_row[r];
        }
        lp->x[i] -= factor * lp->x[leaving];
        lp->x[i] = lp->x[i] > 0 ? lp->x[i] : 0;
    }
    if (lp->basis[leaving] >= 0) {
        lp->is_basic[lp->basis[leaving]] = 0;
    }
    lp->basis[leaving] = entering;
    if (entering >= 0) {
        lp->is_basic[entering] = 1;
    }
}

double sp_simplex_solve(sp_simplex *lp, int64_t max_pivots, int64_t *pivots)
{
    int64_t entering = 0, leaving = 0;
    find_prices(lp);
    for (*pivots = 0; *pivots < max_pivots && choose(lp, &entering); ++*pivots) {
        direct(lp, entering);
        if (!leave(lp, &leaving)) {
            break;
        }
        pivot(lp, leaving, entering);
        find_prices(lp);
    }
    double optimum = 0;
    for (int64_t r = 0; r < lp->rows; r++) {
        optimum += lp->price[r] * lp->demand[r];
    }
    return optimum;
}
