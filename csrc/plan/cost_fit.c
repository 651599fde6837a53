/* cost_fit.c - cost models from measurements.
 *
 * Both models are linear in their coefficients and these cannot be negative, so fitting is
 * non-negative least squares.  Every row is divided by what was measured: a short batch counts as
 * much as a long one, and the error that is minimised is the relative one that is reported. */
#include "base/arena.h"
#include "plan/nnls.h"

#include <string.h>

enum { BATCH_TERMS = 6, LINEAR = 0, QUADRATIC = 1, FIXED = 2, FIRST_COMM = 3 };

/* What the columns of a row are made of. */
typedef struct row_sums {
    double n, sum, sum_2, max;
} row_sums;

static row_sums sum_row(const ovlm_measurements *rows, int64_t row)
{
    row_sums s = {.n = (double)(rows->start[row + 1] - rows->start[row])};
    for (int64_t i = rows->start[row]; i < rows->start[row + 1]; i++) {
        double length = (double)rows->length[i];
        s.sum += length;
        s.sum_2 += rows->square == NULL ? length * length : rows->square[i];
        s.max = length > s.max ? length : s.max;
    }
    return s;
}

static ovlm_status check_row(const ovlm_measurements *rows, int64_t row, ovlm_err *err)
{
    if (rows->start[row + 1] <= rows->start[row]) {
        return OVLM_FAIL(err, OVLM_E_ARG, "measurements[%lld] has no lengths; leave it out",
                         (long long)row);
    }
    for (int64_t i = rows->start[row]; i < rows->start[row + 1]; i++) {
        if (rows->length[i] < 0) {
            return OVLM_FAIL(err, OVLM_E_ARG, "measurements[%lld] has a length below 0: %lld",
                             (long long)row, (long long)rows->length[i]);
        }
        if (rows->square != NULL && !(rows->square[i] >= 0 && rows->square[i] <= 1e38)) {
            return OVLM_FAIL(err, OVLM_E_ARG,
                             "measurements[%lld]: squares must be in [0, 1e38]; got %g",
                             (long long)row, rows->square[i]);
        }
    }
    /* Written so that NaN fails too; the limits keep every quotient below finite. */
    if (!(rows->seconds[row] >= 1e-12 && rows->seconds[row] <= 1e12)) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "measurements[%lld]: seconds must be in [1e-12, 1e12]; got %g",
                         (long long)row, rows->seconds[row]);
    }
    if (rows->bytes != NULL && !(rows->bytes[row] >= 1 && rows->bytes[row] <= 1e18)) {
        return OVLM_FAIL(err, OVLM_E_ARG, "measurements[%lld]: bytes must be in [1, 1e18]; got %g",
                         (long long)row, rows->bytes[row]);
    }
    return OVLM_OK;
}

static ovlm_status check_rows(const ovlm_measurements *rows, ovlm_err *err)
{
    if (rows->rows < 1) {
        return OVLM_FAIL(err, OVLM_E_ARG, "measurements must hold at least one row");
    }
    for (int64_t row = 0; row < rows->rows; row++) {
        OVLM_TRY(check_row(rows, row, err));
    }
    return OVLM_OK;
}

/* x[columns] for the column-major a[columns][rows] whose rows still have to be divided by
 * `measured`; error[rows] = A x / measured - 1. */
static ovlm_status fit_relative(double *a, const double *measured, int64_t rows, int64_t columns,
                                double *x, double *error, ovlm_arena *arena, ovlm_err *err)
{
    double *ones = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &ones, rows, err));
    for (int64_t r = 0; r < rows; r++) {
        ones[r] = 1;
        error[r] = -1;
        for (int64_t c = 0; c < columns; c++) {
            a[c * rows + r] /= measured[r];
        }
    }
    OVLM_TRY(nnls_solve(a, ones, rows, columns, x, arena, err));
    for (int64_t c = 0; c < columns; c++) {
        for (int64_t r = 0; r < rows; r++) {
            error[r] += x[c] * a[c * rows + r];
        }
    }
    return OVLM_OK;
}

ovlm_status ovlm_batch_cost_fit(const ovlm_measurements *rows, const bool *use,
                                ovlm_batch_cost *cost, double *error, ovlm_err *err)
{
    ovlm_arena arena = {0};
    ovlm_status status = OVLM_OK;
    double *a = NULL, x[BATCH_TERMS] = {0};
    OVLM_GOTO(done, check_rows(rows, err));
    OVLM_GOTO(done, OVLM_ARENA_NEW(&arena, &a, BATCH_TERMS * rows->rows, err));
    for (int64_t r = 0; r < rows->rows; r++) {
        row_sums s = sum_row(rows, r);
        /* OrchMLLM 1.3, in the order of ovlm_batch_cost */
        double term[BATCH_TERMS] = {s.sum, s.sum_2, s.n * s.max, s.n * s.max * s.max, s.n, 1};
        for (int c = 0; c < BATCH_TERMS; c++) {
            a[c * rows->rows + r] = use[c] ? term[c] : 0;
        }
    }
    OVLM_GOTO(done, fit_relative(a, rows->seconds, rows->rows, BATCH_TERMS, x, error, &arena, err));
    *cost = (ovlm_batch_cost){x[0], x[1], x[2], x[3], x[4], x[5]};
done:
    ovlm_arena_free(&arena);
    return status;
}

/* Index of the row's degree in cost->degree. */
static ovlm_status find_degree(const ovlm_measurements *rows, const ovlm_sequence_cost *cost,
                               int64_t row, int64_t *j, ovlm_err *err)
{
    for (*j = 0; *j < cost->degree_n; ++*j) {
        if (cost->degree[*j] == rows->degree[row]) {
            return OVLM_OK;
        }
    }
    return OVLM_FAIL(err, OVLM_E_ARG, "measurements[%lld] has degree %lld, which is not among the "
                     "degrees to fit", (long long)row, (long long)rows->degree[row]);
}

/* Columns: linear, quadratic, fixed, then comm of each degree but the smallest, which `linear`
 * already is (both would be the same column). */
static ovlm_status fit_time(const ovlm_measurements *rows, ovlm_sequence_cost *cost, double *comm,
                            double *error, ovlm_arena *arena, ovlm_err *err)
{
    int64_t n = rows->rows, columns = FIRST_COMM + cost->degree_n - 1;
    double *a = NULL, *x = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &a, columns * n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &x, columns, err));
    for (int64_t r = 0; r < n; r++) {
        row_sums s = sum_row(rows, r);
        int64_t j = 0;
        OVLM_TRY(find_degree(rows, cost, r, &j, err));
        ovlm_sequence_cost unit = *cost;
        unit.fixed = unit.linear = 0;
        unit.quadratic = 1;
        unit.comm = comm; /* still zero */
        int64_t first = rows->start[r];
        a[LINEAR * n + r] = s.sum / (double)cost->degree[j];
        a[QUADRATIC * n + r] = ovlm_sequence_cost_time(&unit, rows->start[r + 1] - first,
                                                       rows->length + first, j);
        a[FIXED * n + r] = 1;
        if (j > 0) {
            a[(FIRST_COMM + j - 1) * n + r] = a[LINEAR * n + r];
        }
    }
    OVLM_TRY(fit_relative(a, rows->seconds, n, columns, x, error, arena, err));
    cost->linear = x[LINEAR];
    cost->quadratic = x[QUADRATIC];
    cost->fixed = x[FIXED];
    memcpy(comm + 1, x + FIRST_COMM, (size_t)(cost->degree_n - 1) * sizeof *comm);
    return OVLM_OK;
}

/* bytes = memory_fixed + memory_per_token*sum(s)/d */
static ovlm_status fit_memory(const ovlm_measurements *rows, ovlm_sequence_cost *cost,
                              double *error, ovlm_arena *arena, ovlm_err *err)
{
    int64_t n = rows->rows;
    double *a = NULL, x[2] = {0};
    OVLM_TRY(OVLM_ARENA_NEW(arena, &a, 2 * n, err));
    for (int64_t r = 0; r < n; r++) {
        a[r] = sum_row(rows, r).sum / (double)rows->degree[r];
        a[n + r] = 1;
    }
    OVLM_TRY(fit_relative(a, rows->bytes, n, 2, x, error, arena, err));
    cost->memory_per_token = x[0];
    cost->memory_fixed = x[1];
    return OVLM_OK;
}

ovlm_status ovlm_sequence_cost_fit(const ovlm_measurements *rows, ovlm_sequence_cost *cost,
                                   double *comm, double *error, double *bytes_error,
                                   ovlm_err *err)
{
    ovlm_arena arena = {0};
    ovlm_status status = OVLM_OK;
    cost->linear = cost->quadratic = cost->fixed = 0;
    cost->memory_per_token = cost->memory_fixed = cost->ring = 0;
    cost->comm = comm;
    OVLM_GOTO(done, check_rows(rows, err));
    memset(comm, 0, (size_t)cost->degree_n * sizeof *comm);
    OVLM_GOTO(done, ovlm_sequence_cost_check(cost, err));
    OVLM_GOTO(done, fit_time(rows, cost, comm, error, &arena, err));
    if (rows->bytes != NULL) {
        OVLM_GOTO(done, fit_memory(rows, cost, bytes_error, &arena, err));
    }
done:
    ovlm_arena_free(&arena);
    return status;
}
