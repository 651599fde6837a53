/* test_cpu_matmul.c - linear layers of the CPU backend against double loops, on random shapes,
 * strides, dtypes and options; a row's bits under every batching; bits under every thread count;
 * every instruction set that this processor runs. */
#include "test.h"

#include <math.h>
#include <string.h>

#include "cpu/cpu_device.h"
#include "cpu/cpu_gemm.h"
#include "cpu/cpu_math.h"

enum { CODES = 3, GUARD = 7 };

static ovlm_cpu *cpus[CODES][2]; /* by instruction set; one thread and three */
static int64_t n_codes;

static int64_t pick(int64_t low, int64_t high)
{
    return low + ovlm_rng_below(&test_rng, high - low + 1);
}

static bool coin(void)
{
    return pick(0, 1) != 0;
}

static double get(const ovlm_tensor *t, int64_t row, int64_t col)
{
    int64_t at = row * t->stride + col;
    return t->dtype == OVLM_F32 ? (double)((const float *)t->data)[at]
                                : (double)ovlm_math_from_bf16(((const uint16_t *)t->data)[at]);
}

static void put(const ovlm_tensor *t, int64_t row, int64_t col, double value)
{
    int64_t at = row * t->stride + col;
    if (t->dtype == OVLM_F32) {
        ((float *)t->data)[at] = (float)value;
    } else {
        ((uint16_t *)t->data)[at] = ovlm_math_to_bf16((float)value);
    }
}

/* Random values, in memory that ends with the last element, so that AddressSanitizer sees any
 * access beyond; between rows lie numbers that would spoil a sum. */
static ovlm_tensor draw(int64_t rows, int64_t cols, ovlm_dtype dtype)
{
    int64_t stride = cols + (coin() ? pick(0, GUARD) : 0);
    int64_t n = rows > 0 ? (rows - 1) * stride + cols : 0;
    ovlm_tensor t = {malloc((size_t)(n * ovlm_dtype_bytes(dtype) + 1)), rows, cols, stride, dtype};
    ovlm_tensor flat = {t.data, 1, n, n, dtype};
    for (int64_t i = 0; i < n; i++) {
        put(&flat, 0, i, i % stride < cols ? 2 * ovlm_rng_uniform(&test_rng) - 1 : 1e30);
    }
    return t;
}

static ovlm_tensor copy_of(const ovlm_tensor *t)
{
    ovlm_tensor c = *t;
    int64_t n = t->rows > 0 ? (t->rows - 1) * t->stride + t->cols : 0;
    size_t bytes = (size_t)(n * ovlm_dtype_bytes(t->dtype));
    c.data = malloc(bytes + 1);
    if (bytes > 0) {
        memcpy(c.data, t->data, bytes);
    }
    return c;
}

static bool same_bits(const ovlm_tensor *a, const ovlm_tensor *b)
{
    size_t bytes = (size_t)(a->cols * ovlm_dtype_bytes(a->dtype));
    for (int64_t i = 0; i < a->rows; i++) {
        ovlm_tensor x = ovlm_tensor_rows(*a, i, 1), y = ovlm_tensor_rows(*b, i, 1);
        if (memcmp(x.data, y.data, bytes) != 0) {
            return false;
        }
    }
    return true;
}

/* |got - want| <= tolerance times the size of the terms that were added. */
static void check_near(const ovlm_tensor *t, int64_t row, int64_t col, double want, double size,
                       const char *what)
{
    double got = get(t, row, col);
    double rounding = t->dtype == OVLM_BF16 ? 0x1.01p-8 * fabs(want) : 0;
    double error = fabs(got - want), most = 1e-6 * (1 + size) + rounding;
    CHECK(error <= most, "%s[%lld,%lld] = %.9g, want %.9g", what, (long long)row, (long long)col,
          got, want);
}

static double act_of(ovlm_act act, double x)
{
    switch (act) {
    case OVLM_ACT_NONE: return x;
    case OVLM_ACT_GELU_ERF: return 0.5 * x * erfc(-x / sqrt(2));
    case OVLM_ACT_GELU_TANH: return 0.5 * x * (1 + tanh(0.7978845608028654 *
                                                        (x + 0.044715 * x * x * x)));
    case OVLM_ACT_QUICK_GELU: return x / (1 + exp(-1.702 * x));
    case OVLM_ACT_SILU: return x / (1 + exp(-x));
    }
    return NAN;
}

static double slope_of(ovlm_act act, double x)
{
    return (act_of(act, x + 1e-5) - act_of(act, x - 1e-5)) / 2e-5;
}

static void with_work(const ovlm_cpu *cpu, ovlm_linear *a, bool backward)
{
    ovlm_queue queue = {(ovlm_backend *)(uintptr_t)&cpu->base};
    ovlm_op_bytes bytes;
    void *work;
    CHECK(ovlm_cpu_linear_measure(queue.backend, a, &bytes, NULL) == OVLM_OK, "measure");
    int64_t most = backward ? bytes.bwd_work : bytes.fwd_work;
    CHECK(ovlm_cpu_alloc(queue.backend, most, &work, NULL) == OVLM_OK, "alloc");
    a->scratch.work = work;
    ovlm_status status = backward ? ovlm_cpu_linear_bwd(&queue, a, NULL)
                                  : ovlm_cpu_linear_fwd(&queue, a, NULL);
    CHECK(status == OVLM_OK, "status %d", (int)status);
    ovlm_cpu_free(queue.backend, work);
}

typedef struct shape {
    int64_t t, n, k;
} shape;

static shape draw_shape(void)
{
    shape s = {pick(0, 40), pick(1, 40), pick(1, 40)};
    switch (pick(0, 7)) {
    case 0: s.t = pick(0, 1); break;
    case 1: s.t = pick(60, 300); break;
    case 2: s.n = pick(100, 1100); s.t = pick(1, 20); break;
    case 3: s.k = pick(300, 1000); break;
    case 4: s = (shape){pick(50, 130), pick(50, 130), pick(50, 130)}; break;
    case 5: s = (shape){pick(250, 530), pick(1, 20), pick(1, 20)}; break;
    default: break;
    }
    return s;
}

static ovlm_linear draw_linear(shape s, ovlm_dtype dtype)
{
    ovlm_linear a = {.w_kn = coin(), .act = (ovlm_act)pick(0, OVLM_ACT_SILU)};
    a.x = draw(s.t, s.k, dtype);
    a.w = a.w_kn ? draw(s.k, s.n, dtype) : draw(s.n, s.k, dtype);
    a.y = draw(s.t, s.n, dtype);
    if (coin()) {
        a.bias = draw(1, s.n, dtype);
    }
    if (coin() || a.act != OVLM_ACT_NONE) {
        a.pre = draw(s.t, s.n, dtype);
    }
    if (coin()) {
        a.add = coin() ? a.y : draw(s.t, s.n, dtype);
    }
    return a;
}

static double weight_at(const ovlm_linear *a, int64_t n, int64_t k)
{
    return a->w_kn ? get(&a->w, k, n) : get(&a->w, n, k);
}

static void check_forward(const ovlm_linear *a, const ovlm_tensor *add)
{
    for (int64_t i = 0; i < a->y.rows; i++) {
        for (int64_t j = 0; j < a->y.cols; j++) {
            double sum = 0, size = 0;
            for (int64_t k = 0; k < a->x.cols; k++) {
                double term = get(&a->x, i, k) * weight_at(a, j, k);
                sum += term;
                size += fabs(term);
            }
            sum += ovlm_tensor_given(&a->bias) ? get(&a->bias, 0, j) : 0;
            if (ovlm_tensor_given(&a->pre)) {
                check_near(&a->pre, i, j, sum, size, "pre");
            }
            double more = ovlm_tensor_given(&a->add) ? get(add, i, j) : 0;
            check_near(&a->y, i, j, act_of(a->act, sum) + more, size, "y");
        }
    }
}

/* Any rows alone give the bits that they have in the whole. */
static void check_batching(const ovlm_cpu *cpu, const ovlm_linear *a, const ovlm_tensor *add)
{
    if (a->x.rows == 0) {
        return;
    }
    int64_t first = pick(0, a->x.rows - 1), rows = pick(1, a->x.rows - first);
    ovlm_linear part = *a;
    part.x = ovlm_tensor_rows(a->x, first, rows);
    part.y = draw(rows, a->y.cols, a->y.dtype);
    if (ovlm_tensor_given(&a->pre)) {
        part.pre = draw(rows, a->pre.cols, a->pre.dtype);
    }
    if (ovlm_tensor_given(&a->add)) {
        part.add = ovlm_tensor_rows(*add, first, rows);
    }
    with_work(cpu, &part, false);
    ovlm_tensor want = ovlm_tensor_rows(a->y, first, rows);
    CHECK(same_bits(&part.y, &want), "rows %lld+%lld of %lld, n %lld, k %lld", (long long)first,
          (long long)rows, (long long)a->x.rows, (long long)a->y.cols, (long long)a->x.cols);
    free(part.y.data);
    if (ovlm_tensor_given(&a->pre)) {
        free(part.pre.data);
    }
}

static void test_forward(int64_t code)
{
    ovlm_linear a = draw_linear(draw_shape(), coin() ? OVLM_F32 : OVLM_BF16);
    bool in_place = a.add.data == a.y.data;
    ovlm_tensor add = copy_of(ovlm_tensor_given(&a.add) ? &a.add : &a.y);
    ovlm_linear other = a;
    other.y = copy_of(&a.y);
    other.add = in_place ? other.y : a.add;
    with_work(cpus[code][0], &a, false);
    check_forward(&a, &add);
    with_work(cpus[code][1], &other, false);
    CHECK(same_bits(&a.y, &other.y), "y changes with the number of threads");
    check_batching(cpus[code][coin()], &a, &add);
    free(add.data);
    free(other.y.data);
    free(a.x.data);
    free(a.w.data);
    free(a.y.data);
    free(a.bias.data);
    free(a.pre.data);
    if (!in_place) {
        free(a.add.data);
    }
}

/* The gradients of `a`, whose old values are in `old`, against loops. */
static void check_backward(const ovlm_linear *a, const ovlm_linear *old)
{
    int64_t rows = a->dy.rows, n = a->dy.cols, k = a->x.cols;
    double *dpre = malloc(((size_t)(rows * n) + 1) * sizeof *dpre);
    for (int64_t i = 0; i < rows * n; i++) {
        dpre[i] = get(&a->dy, i / n, i % n);
        dpre[i] *= a->act == OVLM_ACT_NONE ? 1 : slope_of(a->act, get(&a->pre, i / n, i % n));
    }
    for (int64_t i = 0; i < a->dx.rows; i++) {
        for (int64_t c = 0; c < a->dx.cols; c++) {
            double sum = a->dx_beta != 0 ? get(&old->dx, i, c) : 0;
            for (int64_t j = 0; j < n; j++) {
                sum += dpre[i * n + j] * weight_at(a, j, c);
            }
            check_near(&a->dx, i, c, sum, (double)n, "dx");
        }
    }
    for (int64_t j = 0; j < n; j++) {
        double bias = a->dw_beta != 0 && a->dbias.cols ? get(&old->dbias, 0, j) : 0;
        for (int64_t i = 0; i < rows; i++) {
            bias += dpre[i * n + j];
        }
        if (ovlm_tensor_given(&a->dbias)) {
            check_near(&a->dbias, 0, j, bias, (double)rows, "dbias");
        }
        for (int64_t c = 0; ovlm_tensor_given(&a->dw) && c < k; c++) {
            int64_t row = a->w_kn ? c : j, col = a->w_kn ? j : c;
            double sum = a->dw_beta != 0 ? get(&old->dw, row, col) : 0;
            for (int64_t i = 0; i < rows; i++) {
                sum += dpre[i * n + j] * get(&a->x, i, c);
            }
            check_near(&a->dw, row, col, sum, (double)rows, "dw");
        }
    }
    free(dpre);
}

static ovlm_linear draw_backward(void)
{
    shape s = draw_shape();
    ovlm_dtype dtype = coin() ? OVLM_F32 : OVLM_BF16;
    ovlm_linear a = draw_linear(s, dtype);
    if (ovlm_tensor_given(&a.add) && a.add.data != a.y.data) {
        free(a.add.data);
    }
    free(a.y.data);
    a.y.data = NULL;
    a.add = (ovlm_tensor){0};
    a.dy = draw(s.t, s.n, dtype);
    a.dx_beta = coin();
    a.dw_beta = coin();
    if (pick(0, 3) > 0) {
        a.dx = draw(s.t, s.k, dtype);
    }
    if (pick(0, 3) > 0) {
        a.dw = draw(a.w.rows, a.w.cols, OVLM_F32);
    }
    if (coin()) {
        a.dbias = draw(1, s.n, OVLM_F32);
    }
    return a;
}

static ovlm_linear with_own_gradients(const ovlm_linear *a)
{
    ovlm_linear own = *a;
    own.dx = copy_of(&a->dx);
    own.dw = copy_of(&a->dw);
    own.dbias = copy_of(&a->dbias);
    return own;
}

static void free_gradients(ovlm_linear *a)
{
    free(a->dx.data);
    free(a->dw.data);
    free(a->dbias.data);
}

static void test_backward(int64_t code)
{
    ovlm_linear old = draw_backward();
    ovlm_linear a = with_own_gradients(&old), b = with_own_gradients(&old);
    with_work(cpus[code][0], &a, true);
    check_backward(&a, &old);
    with_work(cpus[code][1], &b, true);
    CHECK(same_bits(&a.dx, &b.dx) && same_bits(&a.dw, &b.dw) && same_bits(&a.dbias, &b.dbias),
          "gradients change with the number of threads");
    free_gradients(&a);
    free_gradients(&b);
    free_gradients(&old);
    free(old.x.data);
    free(old.w.data);
    free(old.bias.data);
    free(old.pre.data);
    free(old.dy.data);
}

/* ---- grouped */

typedef struct grouped {
    ovlm_grouped_linear a;
    int32_t *offsets, *index;
} grouped;

static grouped draw_grouped(void)
{
    static const int64_t most_rows[] = {0, 1, 9, 70};
    ovlm_dtype dtype = coin() ? OVLM_F32 : OVLM_BF16;
    int64_t e = pick(1, 9), n = pick(1, 60), k = pick(0, 9) == 0 ? pick(380, 800) : pick(1, 60);
    grouped g = {.a = {.groups = e, .w_kn = coin(), .dx_beta = coin(), .dw_beta = coin()}};
    g.offsets = malloc((size_t)(e + 1) * sizeof *g.offsets);
    g.offsets[0] = 0;
    for (int64_t i = 0; i < e; i++) {
        g.offsets[i + 1] = g.offsets[i] + (int32_t)pick(0, most_rows[pick(0, 3)]);
    }
    g.a.first = coin() ? 0 : pick(0, g.offsets[e]);
    int64_t rows = g.offsets[e] - g.a.first + pick(0, 3), tokens;
    rows = coin() ? rows : pick(0, rows);
    tokens = rows;
    if (coin()) {
        tokens = pick(1, 50);
        g.index = malloc((size_t)(rows + 1) * sizeof *g.index);
        for (int64_t i = 0; i < rows; i++) {
            g.index[i] = (int32_t)pick(0, tokens - 1);
        }
    }
    g.a.offsets = g.offsets;
    g.a.index = g.index;
    g.a.x = draw(tokens, k, dtype);
    g.a.w = g.a.w_kn ? draw(e * k, n, dtype) : draw(e * n, k, dtype);
    g.a.y = draw(rows, n, dtype);
    g.a.dy = draw(rows, n, dtype);
    g.a.dx = draw(rows, k, dtype);
    g.a.dw = draw(g.a.w.rows, g.a.w.cols, OVLM_F32);
    return g;
}

static void run_grouped(const ovlm_cpu *cpu, ovlm_grouped_linear *a)
{
    ovlm_queue queue = {(ovlm_backend *)(uintptr_t)&cpu->base};
    ovlm_op_bytes bytes;
    void *work;
    CHECK(ovlm_cpu_grouped_linear_measure(queue.backend, a, &bytes, NULL) == OVLM_OK, "measure");
    CHECK(ovlm_cpu_alloc(queue.backend, bytes.fwd_work, &work, NULL) == OVLM_OK, "alloc");
    a->scratch.work = work;
    CHECK(ovlm_cpu_grouped_linear_fwd(&queue, a, NULL) == OVLM_OK, "forward");
    CHECK(ovlm_cpu_grouped_linear_bwd(&queue, a, NULL) == OVLM_OK, "backward");
    ovlm_cpu_free(queue.backend, work);
}

static int64_t expert_of(const grouped *g, int64_t row)
{
    for (int64_t e = 0; e < g->a.groups; e++) {
        if (g->a.first + row >= g->offsets[e] && g->a.first + row < g->offsets[e + 1]) {
            return e;
        }
    }
    return -1;
}

static double expert_weight(const ovlm_grouped_linear *a, const ovlm_tensor *w, int64_t e,
                            int64_t n, int64_t k)
{
    return a->w_kn ? get(w, e * a->x.cols + k, n) : get(w, e * a->y.cols + n, k);
}

static void check_grouped(const grouped *g, const ovlm_grouped_linear *old)
{
    const ovlm_grouped_linear *a = &g->a;
    int64_t n = a->y.cols, k = a->x.cols;
    for (int64_t r = 0; r < a->y.rows; r++) {
        int64_t e = expert_of(g, r), from = g->index != NULL ? g->index[r] : r;
        for (int64_t j = 0; j < n; j++) {
            double sum = 0;
            for (int64_t c = 0; e >= 0 && c < k; c++) {
                sum += get(&a->x, from, c) * expert_weight(a, &a->w, e, j, c);
            }
            check_near(&a->y, r, j, e >= 0 ? sum : get(&old->y, r, j), (double)k, "y");
        }
        for (int64_t c = 0; c < k; c++) {
            double sum = e < 0 || a->dx_beta != 0 ? get(&old->dx, r, c) : 0;
            for (int64_t j = 0; e >= 0 && j < n; j++) {
                sum += get(&a->dy, r, j) * expert_weight(a, &a->w, e, j, c);
            }
            check_near(&a->dx, r, c, sum, (double)n, "dx");
        }
    }
    for (int64_t e = 0; e < a->groups; e++) {
        for (int64_t at = 0; at < n * k; at++) {
            int64_t j = at / k, c = at % k;
            double sum = a->dw_beta != 0 ? expert_weight(a, &old->dw, e, j, c) : 0;
            for (int64_t r = 0; r < a->dy.rows; r++) {
                int64_t from = g->index != NULL ? g->index[r] : r;
                sum += expert_of(g, r) == e ? get(&a->dy, r, j) * get(&a->x, from, c) : 0;
            }
            int64_t row = a->w_kn ? e * k + c : e * n + j;
            check_near(&a->dw, row, a->w_kn ? j : c, sum, 70, "expert's dw");
        }
    }
}

static void test_grouped(int64_t code)
{
    grouped g = draw_grouped();
    ovlm_grouped_linear old = g.a;
    g.a.y = copy_of(&old.y);
    g.a.dx = copy_of(&old.dx);
    g.a.dw = copy_of(&old.dw);
    ovlm_grouped_linear other = g.a;
    other.y = copy_of(&old.y);
    other.dx = copy_of(&old.dx);
    other.dw = copy_of(&old.dw);
    run_grouped(cpus[code][0], &g.a);
    check_grouped(&g, &old);
    run_grouped(cpus[code][1], &other);
    CHECK(same_bits(&g.a.y, &other.y) && same_bits(&g.a.dx, &other.dx) &&
              same_bits(&g.a.dw, &other.dw),
          "experts' results change with the number of threads");
    void *all[] = {g.offsets, g.index, old.x.data, old.w.data, old.dy.data, old.y.data,
                   old.dx.data, old.dw.data, g.a.y.data, g.a.dx.data, g.a.dw.data, other.y.data,
                   other.dx.data, other.dw.data};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        free(all[i]);
    }
}

/* Two codes may differ in the last bits, not more; each is tested for itself. */
static void open_all(void)
{
    for (const ovlm_gemm_code *code; (code = ovlm_gemm_code_get(n_codes)) != NULL; n_codes++) {
        for (int i = 0; i < 2; i++) {
            ovlm_backend_options options = {.threads = i == 0 ? 1 : 3};
            ovlm_backend *backend;
            CHECK(ovlm_cpu_open_with(NULL, &options, &backend, NULL) == OVLM_OK, "open");
            cpus[n_codes][i] = (ovlm_cpu *)(void *)backend;
            cpus[n_codes][i]->gemm = code;
        }
    }
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    open_all();
    for (int round = 0; round < 120; round++) {
        for (int64_t code = 0; code < n_codes; code++) {
            test_forward(code);
            test_backward(code);
            test_grouped(code);
        }
    }
    for (int64_t code = 0; code < n_codes; code++) {
        ovlm_cpu_close(&cpus[code][0]->base);
        ovlm_cpu_close(&cpus[code][1]->base);
    }
    return test_end("cpu_matmul");
}
