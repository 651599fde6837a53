/* test_cost.c - costs and their fit against plain loops in long double. */
#include "test.h"

#include <math.h>
#include <string.h>

#include "ovlm.h"
#include "plan/nnls.h"

enum { ROWS = 40, COLUMNS = 6, LONGEST = 30 };

static double uniform(double low, double high)
{
    return low + (high - low) * ovlm_rng_uniform(&test_rng);
}

static void draw_lengths(int64_t *lengths, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        lengths[i] = ovlm_rng_below(&test_rng, 50000);
    }
}

/* f(S) as ovlm.h states it, item by item. */
static long double reference_load(const ovlm_batch_cost *c, int64_t n, const int64_t *lengths,
                                  const double *squares)
{
    long double total = n > 0 ? (long double)c->fixed : 0, max = 0;
    for (int64_t i = 0; i < n; i++) {
        max = fmaxl(max, (long double)lengths[i]);
    }
    for (int64_t i = 0; i < n; i++) {
        long double l = (long double)lengths[i], q = squares ? (long double)squares[i] : l * l;
        total += c->per_item + c->linear * l + c->quadratic * q + c->padded_linear * max +
                 c->padded_quadratic * max * max;
    }
    return total;
}

static void test_batch_load(void)
{
    for (int round = 0; round < 500; round++) {
        int64_t lengths[LONGEST], n = ovlm_rng_below(&test_rng, LONGEST + 1);
        double squares[LONGEST];
        draw_lengths(lengths, n);
        for (int64_t i = 0; i < n; i++) {
            squares[i] = uniform(0, 1e6);
        }
        ovlm_batch_cost cost = {uniform(0, 1), uniform(0, 1), uniform(0, 1),
                                uniform(0, 1), uniform(0, 1), uniform(0, 1)};
        const double *q = round % 2 ? squares : NULL;
        long double want = reference_load(&cost, n, lengths, q);
        double got = ovlm_batch_cost_load(&cost, n, lengths, q);
        CHECK(fabsl((long double)got - want) <= 1e-12L * want, "%g for %Lg", got, want);
    }
}

static void test_sequence_time(void)
{
    int64_t degree[] = {1, 3, 8}, lengths[LONGEST];
    double comm[] = {0, 0.25, 0.5};
    for (int round = 0; round < 500; round++) {
        int64_t n = ovlm_rng_below(&test_rng, LONGEST + 1), j = ovlm_rng_below(&test_rng, 3);
        int64_t heads = ovlm_rng_below(&test_rng, 2) ? 1 + ovlm_rng_below(&test_rng, 16) : 0;
        ovlm_sequence_cost cost = {.quadratic = uniform(0, 1), .linear = uniform(0, 1),
                                   .fixed = uniform(0, 1), .memory_limit = HUGE_VAL,
                                   .heads = heads, .rings = true, .ring = uniform(0, 1),
                                   .degree_n = 3, .degree = degree, .comm = comm};
        long double d = (long double)degree[j], share = 1 / d, want = n > 0 ? cost.fixed : 0;
        long double rows = 1;
        for (int64_t c = degree[j]; c >= 1 && heads > 0; c--) {
            rows = degree[j] % c == 0 && degree[j] / c <= heads ? (long double)c : rows;
        }
        if (heads > 0) { /* the last row reads all c blocks but half of its own, of c^2 / 2 */
            share = ceill((long double)heads * rows / d) / (long double)heads;
            share *= (rows - 0.5L) / (rows * rows / 2);
        }
        draw_lengths(lengths, n);
        for (int64_t i = 0; i < n; i++) {
            long double s = (long double)lengths[i];
            want += cost.quadratic * s * s * share +
                    (cost.linear + comm[j] + cost.ring * (rows - 1)) * s / d;
        }
        double got = ovlm_sequence_cost_time(&cost, n, lengths, j);
        CHECK(fabsl((long double)got - want) <= 1e-12L * want, "%g for %Lg", got, want);
    }
}

/* x is optimal exactly when x >= 0, the slope A^T(b - Ax) is <= 0, and 0 where x > 0. */
static void check_optimal(const double *a, const double *b, int64_t rows, int64_t columns,
                          const double *x)
{
    long double residual[ROWS];
    for (int64_t r = 0; r < rows; r++) {
        residual[r] = b[r];
        for (int64_t c = 0; c < columns; c++) {
            residual[r] -= (long double)a[c * rows + r] * x[c];
        }
    }
    for (int64_t c = 0; c < columns; c++) {
        long double slope = 0, norm = 0, b_norm = 0;
        for (int64_t r = 0; r < rows; r++) {
            slope += a[c * rows + r] * residual[r];
            norm += (long double)a[c * rows + r] * a[c * rows + r];
            b_norm += (long double)b[r] * b[r];
        }
        long double tolerance = 1e-9L * sqrtl(norm * b_norm);
        CHECK(x[c] >= 0, "x[%lld] = %g", (long long)c, x[c]);
        CHECK(slope <= tolerance, "slope %Lg at column %lld", slope, (long long)c);
        CHECK(x[c] <= 0 || slope >= -tolerance, "slope %Lg at x = %g", slope, x[c]);
    }
}

static void test_nnls(void)
{
    for (int round = 0; round < 2000; round++) {
        int64_t rows = 1 + ovlm_rng_below(&test_rng, ROWS);
        int64_t columns = 1 + ovlm_rng_below(&test_rng, COLUMNS);
        double a[ROWS * COLUMNS], b[ROWS], x[COLUMNS];
        for (int64_t c = 0; c < columns; c++) {
            double scale = pow(10, uniform(-6, 6));
            bool copy = c > 0 && ovlm_rng_below(&test_rng, 5) == 0; /* dependent columns */
            bool zero = ovlm_rng_below(&test_rng, 20) == 0;
            for (int64_t r = 0; r < rows; r++) {
                double fresh = copy ? 3 * a[(c - 1) * rows + r] : scale * uniform(-1, 1);
                a[c * rows + r] = zero ? 0 : fresh;
            }
        }
        for (int64_t r = 0; r < rows; r++) {
            b[r] = uniform(-1, 1);
        }
        ovlm_arena arena = {0};
        ovlm_err err = {0};
        CHECK(nnls_solve(a, b, rows, columns, x, &arena, &err) == OVLM_OK, "%s", err.message);
        check_optimal(a, b, rows, columns, x);
        ovlm_arena_free(&arena);
    }
}

/* Rows of 1..8 lengths each. */
typedef struct sample {
    int64_t start[ROWS + 1], length[ROWS * 8], degree[ROWS];
    double square[ROWS * 8], seconds[ROWS], bytes[ROWS];
    ovlm_measurements rows;
} sample;

static void draw_sample(sample *s, const int64_t *degrees, int64_t degree_n)
{
    s->start[0] = 0;
    for (int64_t r = 0; r < ROWS; r++) {
        int64_t n = 1 + ovlm_rng_below(&test_rng, 8);
        s->start[r + 1] = s->start[r] + n;
        draw_lengths(s->length + s->start[r], n);
        s->degree[r] = degrees[r % degree_n];
    }
    s->rows = (ovlm_measurements){.rows = ROWS, .start = s->start, .length = s->length,
                                  .degree = s->degree, .seconds = s->seconds};
}

static void test_batch_fit(void)
{
    for (int round = 0; round < 100; round++) {
        sample s;
        int64_t one = 1;
        double error[ROWS];
        bool use[COLUMNS];
        double truth[COLUMNS] = {1e-5, 1e-10, 2e-6, 3e-11, 1e-3, 1e-2}, *square = NULL;
        draw_sample(&s, &one, 1);
        if (round % 2) { /* items of several segments */
            square = s.square;
            for (int64_t i = 0; i < s.start[ROWS]; i++) {
                double length = (double)s.length[i];
                square[i] = length * length / (double)(1 + ovlm_rng_below(&test_rng, 4));
            }
            s.rows.square = square;
        }
        for (int c = 0; c < COLUMNS; c++) {
            use[c] = ovlm_rng_below(&test_rng, 2);
            truth[c] *= use[c] ? uniform(0.5, 2) : 0;
        }
        use[5] = true;
        truth[5] = truth[5] > 0 ? truth[5] : 1e-2;
        ovlm_batch_cost want = {truth[0], truth[1], truth[2], truth[3], truth[4], truth[5]}, got;
        for (int64_t r = 0; r < ROWS; r++) {
            s.seconds[r] = ovlm_batch_cost_load(&want, s.start[r + 1] - s.start[r],
                                                s.length + s.start[r],
                                                square == NULL ? NULL : square + s.start[r]);
        }
        ovlm_err err = {0};
        CHECK(ovlm_batch_cost_fit(&s.rows, use, &got, error, &err) == OVLM_OK, "%s", err.message);
        double fitted[COLUMNS] = {got.linear,           got.quadratic, got.padded_linear,
                                  got.padded_quadratic, got.per_item,  got.fixed};
        for (int c = 0; c < COLUMNS; c++) {
            CHECK(fabs(fitted[c] - truth[c]) <= 1e-5 * truth[c], "term %d: %g for %g", c,
                  fitted[c], truth[c]);
        }
        for (int64_t r = 0; r < ROWS; r++) {
            CHECK(fabs(error[r]) < 1e-8, "row %lld: error %g", (long long)r, error[r]);
        }
    }
}

static void test_sequence_fit(void)
{
    for (int round = 0; round < 100; round++) {
        sample s;
        int64_t degree[] = {1, 2, 8};
        double comm[] = {0, uniform(1e-6, 1e-5), uniform(1e-5, 1e-4)}, fitted[3];
        double error[ROWS], bytes_error[ROWS];
        ovlm_sequence_cost want = {.quadratic = uniform(1e-10, 1e-9), .linear = uniform(1e-5, 1e-4),
                                   .fixed = uniform(0, 1), .memory_per_token = uniform(1e5, 1e6),
                                   .memory_fixed = uniform(1e8, 1e9), .memory_limit = HUGE_VAL,
                                   .heads = round % 3 * 6, .rings = round % 2, .degree_n = 3,
                                   .degree = degree, .comm = comm};
        want.heads = want.rings ? want.heads / 3 : want.heads == 6 ? 0 : want.heads;
        draw_sample(&s, degree, 3);
        s.rows.bytes = s.bytes;
        for (int64_t r = 0; r < ROWS; r++) {
            int64_t n = s.start[r + 1] - s.start[r];
            double tokens = 0;
            for (int64_t i = s.start[r]; i < s.start[r + 1]; i++) {
                tokens += (double)s.length[i];
            }
            s.seconds[r] = ovlm_sequence_cost_time(&want, n, s.length + s.start[r], r % 3);
            s.bytes[r] = want.memory_fixed + want.memory_per_token * tokens /
                                                 (double)s.degree[r];
        }
        ovlm_err err = {0};
        ovlm_sequence_cost got = {.memory_limit = HUGE_VAL, .heads = want.heads,
                                  .rings = want.rings, .degree_n = 3, .degree = degree};
        CHECK(ovlm_sequence_cost_fit(&s.rows, &got, fitted, error, bytes_error, &err) == OVLM_OK,
              "%s", err.message);
        for (int64_t r = 0; r < ROWS; r++) {
            CHECK(fabs(error[r]) < 1e-8 && fabs(bytes_error[r]) < 1e-8, "row %lld: %g, %g",
                  (long long)r, error[r], bytes_error[r]);
        }
        CHECK(fabs(fitted[2] - comm[2]) < 1e-5 * comm[2], "%g for %g", fitted[2], comm[2]);
    }
}

static void test_refusals(void)
{
    int64_t one = 1;
    sample s;
    double error[ROWS];
    bool use[COLUMNS] = {true};
    ovlm_batch_cost cost;
    ovlm_err err = {0};
    draw_sample(&s, &one, 1);
    double bad[] = {0, -1, NAN, INFINITY, 1e-300};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        for (int64_t r = 0; r < ROWS; r++) {
            s.seconds[r] = r == 7 ? bad[i] : 1;
        }
        CHECK(ovlm_batch_cost_fit(&s.rows, use, &cost, error, &err) == OVLM_E_ARG &&
                  strstr(err.message, "measurements[7]") != NULL, "%s", err.message);
        ovlm_batch_cost coefficient = {.padded_linear = bad[i]};
        bool valid = isfinite(bad[i]) && bad[i] >= 0;
        CHECK((ovlm_batch_cost_check(&coefficient, &err) == OVLM_OK) == valid, "%g", bad[i]);
    }
    s.seconds[7] = 1;
    ovlm_arena_fail_after(0);
    CHECK(ovlm_batch_cost_fit(&s.rows, use, &cost, error, &err) == OVLM_E_NOMEM, "no memory");
    ovlm_arena_fail_after(-1);
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    test_batch_load();
    test_sequence_time();
    test_nnls();
    test_batch_fit();
    test_sequence_fit();
    test_refusals();
    return test_end("cost");
}
