/* nnls.c - Lawson and Hanson, "Solving Least Squares Problems" (1974), algorithm 23.10.
 *
 * Columns are first scaled to unit length (a squared token count is 1e10, a constant is 1) and the
 * system is compressed to a square triangle, which keeps every |A x - b| up to a constant.  Each
 * least-squares problem on a set of columns is then solved anew by Householder reflections: a
 * hundred columns at most, so updating a factorisation would save microseconds. */
#include "plan/nnls.h"

#include <math.h>
#include <string.h>

/* Below this a unit column's part outside the span of the others is rounding. */
static const double DEPENDENT = 1e-10;

typedef struct system {
    int64_t rows, columns;
    const double *a; /* [columns][rows] unit columns, or zero ones                          */
    const double *b; /* [rows]                                                              */
    double *scratch; /* [(columns + 1)*rows]                                                */
    double *slope;   /* [columns] A^T (b - A x)                                             */
    double *trial;   /* [columns] unconstrained solution on the passive set                 */
    int64_t *passive;/* [columns] the columns in use, in the order they came                */
    int64_t passive_n;
    bool *refused;   /* [columns] may not enter before x changes                            */
} system;

static double dot(const double *u, const double *v, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        sum += u[i] * v[i];
    }
    return sum;
}

/* Reduces the first `columns` of total column-major columns to an upper triangle by Householder
 * reflections, and applies them to the rest. */
static void triangularise(double *a, int64_t rows, int64_t columns, int64_t total)
{
    for (int64_t c = 0; c < columns && c < rows; c++) {
        double *v = a + c * rows + c;
        int64_t length = rows - c;
        double norm = sqrt(dot(v, v, length));
        if (norm == 0) {
            continue;
        }
        double diagonal = v[0] > 0 ? -norm : norm; /* the sign that does not cancel */
        v[0] -= diagonal;
        double half_square = -diagonal * v[0]; /* v.v/2 */
        for (int64_t j = c + 1; j < total; j++) {
            double *u = a + j * rows + c;
            double factor = dot(v, u, length) / half_square;
            for (int64_t i = 0; i < length; i++) {
                u[i] -= factor * v[i];
            }
        }
        v[0] = diagonal;
        memset(v + 1, 0, (size_t)(length - 1) * sizeof *v);
    }
}

/* trial = least squares on the passive columns; false when they depend on each other. */
static bool solve_passive(system *s)
{
    int64_t rows = s->rows, n = s->passive_n;
    if (n > rows) {
        return false;
    }
    for (int64_t c = 0; c < n; c++) {
        memcpy(s->scratch + c * rows, s->a + s->passive[c] * rows, (size_t)rows * sizeof(double));
    }
    double *rhs = s->scratch + n * rows;
    memcpy(rhs, s->b, (size_t)rows * sizeof(double));
    triangularise(s->scratch, rows, n, n + 1);
    for (int64_t c = n - 1; c >= 0; c--) {
        double sum = rhs[c], diagonal = s->scratch[c * rows + c];
        if (fabs(diagonal) < DEPENDENT) {
            return false;
        }
        for (int64_t j = c + 1; j < n; j++) {
            sum -= s->scratch[j * rows + c] * s->trial[s->passive[j]];
        }
        s->trial[s->passive[c]] = sum / diagonal;
    }
    return true;
}

/* The column along which the error falls fastest; -1 when none does. */
static int64_t steepest(system *s, const double *x, double tolerance)
{
    double *residual = s->scratch;
    memcpy(residual, s->b, (size_t)s->rows * sizeof(double));
    for (int64_t c = 0; c < s->columns; c++) {
        for (int64_t r = 0; x[c] > 0 && r < s->rows; r++) {
            residual[r] -= x[c] * s->a[c * s->rows + r];
        }
    }
    int64_t best = -1;
    for (int64_t c = 0; c < s->columns; c++) {
        s->slope[c] = dot(s->a + c * s->rows, residual, s->rows);
        if (x[c] <= 0 && !s->refused[c] && s->slope[c] > tolerance &&
            (best < 0 || s->slope[c] > s->slope[best])) {
            best = c;
        }
    }
    return best;
}

/* Walks from x towards trial until a column reaches zero, and drops the columns that did. */
static void step_to_boundary(system *s, double *x)
{
    double alpha = 1;
    int64_t first = -1;
    for (int64_t i = 0; i < s->passive_n; i++) {
        int64_t c = s->passive[i];
        if (s->trial[c] <= 0) {
            double reach = x[c] / (x[c] - s->trial[c]);
            if (first < 0 || reach < alpha) {
                alpha = reach;
                first = c;
            }
        }
    }
    int64_t kept = 0;
    for (int64_t i = 0; i < s->passive_n; i++) {
        int64_t c = s->passive[i];
        x[c] += alpha * (s->trial[c] - x[c]);
        if (c == first || x[c] <= 0) {
            x[c] = 0;
        } else {
            s->passive[kept++] = c;
        }
    }
    s->passive_n = kept;
}

static bool all_positive(const system *s)
{
    for (int64_t i = 0; i < s->passive_n; i++) {
        if (s->trial[s->passive[i]] <= 0) {
            return false;
        }
    }
    return true;
}

/* Lets column c enter; false when it cannot (dependent, or rounding turns it negative). */
static bool enter(system *s, double *x, int64_t c)
{
    s->passive[s->passive_n++] = c;
    if (!solve_passive(s) || s->trial[c] <= 0) {
        s->passive_n--;
        s->refused[c] = true;
        return false;
    }
    while (!all_positive(s)) {
        step_to_boundary(s, x);
        (void)solve_passive(s); /* a subset of independent columns is independent */
    }
    memset(x, 0, (size_t)s->columns * sizeof *x);
    for (int64_t i = 0; i < s->passive_n; i++) {
        x[s->passive[i]] = s->trial[s->passive[i]];
    }
    memset(s->refused, 0, (size_t)s->columns * sizeof *s->refused);
    return true;
}

static void lawson_hanson(system *s, double *x)
{
    double tolerance = 1e-12 * sqrt(dot(s->b, s->b, s->rows));
    /* Each entry lowers the error, so no set of columns comes twice; the cap guards against
     * rounding and x is feasible whenever it strikes. */
    int64_t entries = 0, cap = 20 * s->columns + 20;
    for (int64_t c = steepest(s, x, tolerance); c >= 0 && entries < cap;
         c = steepest(s, x, tolerance)) {
        entries += enter(s, x, c);
    }
}

/* Unit columns; scale[c] = 1/norm, or 0 for a zero column. */
static void scale_columns(double *a, int64_t rows, int64_t columns, double *scale)
{
    for (int64_t c = 0; c < columns; c++) {
        double norm = sqrt(dot(a + c * rows, a + c * rows, rows));
        scale[c] = norm > 0 ? 1 / norm : 0;
        for (int64_t r = 0; r < rows; r++) {
            a[c * rows + r] *= scale[c];
        }
    }
}

/* Keeps the first `keep` rows of each of the columns, in place. */
static void drop_rows(double *a, int64_t rows, int64_t columns, int64_t keep)
{
    for (int64_t c = 1; c < columns; c++) {
        memmove(a + c * keep, a + c * rows, (size_t)keep * sizeof *a);
    }
}

ovlm_status nnls_solve(const double *a, const double *b, int64_t rows, int64_t columns, double *x,
                       ovlm_arena *arena, ovlm_err *err)
{
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    system s = {.columns = columns};
    double *all = NULL, *scale = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &all, (columns + 1) * rows, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &scale, columns, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &s.scratch, (columns + 1) * rows, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &s.slope, columns, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &s.trial, columns, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &s.passive, columns, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &s.refused, columns, err));
    memcpy(all, a, (size_t)(columns * rows) * sizeof *all);
    scale_columns(all, rows, columns, scale);
    memcpy(all + columns * rows, b, (size_t)rows * sizeof *all);
    triangularise(all, rows, columns, columns + 1);
    s.rows = rows < columns ? rows : columns;
    drop_rows(all, rows, columns + 1, s.rows);
    s.a = all;
    s.b = all + columns * s.rows;
    memset(x, 0, (size_t)columns * sizeof *x);
    lawson_hanson(&s, x);
    for (int64_t c = 0; c < columns; c++) {
        x[c] *= scale[c];
    }
    ovlm_arena_rewind(arena, mark);
    return OVLM_OK;
}
