/* test_cpu_moe.c - router, combine and balance loss against plain loops in double. */
#include "cpu_rig.h"

typedef struct routing {
    int32_t *expert, *row, *token, *offsets;
    int64_t *count;
    double *score_sum;
} routing;

static routing routing_new(int64_t rows, int64_t k, int64_t experts)
{
    size_t slots = (size_t)(rows * k + 1), n = (size_t)experts;
    routing r = {calloc(slots, 4), calloc(slots, 4), calloc(slots, 4), calloc(n + 1, 4),
                 calloc(n, 8), calloc(n, 8)};
    return r;
}

static void routing_free(routing *r)
{
    free(r->expert);
    free(r->row);
    free(r->token);
    free(r->offsets);
    free(r->count);
    free(r->score_sum);
}

static void routing_give(ovlm_router *a, const routing *r)
{
    a->expert = r->expert;
    a->row = r->row;
    a->token = r->token;
    a->offsets = r->offsets;
    a->count = r->count;
    a->score_sum = r->score_sum;
}

static void scores(const ovlm_router *a, int64_t t, double *s)
{
    int64_t n = a->logits.cols;
    double sum = 0;
    for (int64_t e = 0; e < n; e++) {
        double x = rig_get(&a->logits, t, e);
        s[e] = a->sigmoid ? 1 / (1 + exp(-x)) : exp(x);
        sum += s[e];
    }
    for (int64_t e = 0; e < n && !a->sigmoid; e++) {
        s[e] /= sum;
    }
}

/* Rank of item i among n: how many come before it, the lower number first where equal. */
static int64_t rank_of(const double *value, int64_t n, int64_t i)
{
    int64_t before = 0;
    for (int64_t j = 0; j < n; j++) {
        before += value[j] > value[i] || (value[j] == value[i] && j < i);
    }
    return before;
}

static void wanted_experts(const ovlm_router *a, const double *score, int32_t *expert)
{
    int64_t n = a->logits.cols, size = n / a->teams;
    double value[64], team[64];
    for (int64_t e = 0; e < n; e++) {
        value[e] = score[e] + (a->bias.cols > 0 ? rig_get(&a->bias, 0, e) : 0);
    }
    for (int64_t g = 0; g < a->teams; g++) {
        team[g] = 0;
        for (int64_t e = 0; e < size; e++) {
            team[g] += rank_of(value + g * size, size, e) < 2 ? value[g * size + e] : 0;
        }
    }
    for (int64_t e = 0; e < n; e++) {
        bool out = a->teams > 1 && rank_of(team, a->teams, e / size) >= a->limit;
        value[e] = out ? -INFINITY : value[e];
    }
    for (int64_t e = 0, held = 0; e < n; e++) {
        if (rank_of(value, n, e) < a->k) {
            expert[held++] = (int32_t)e;
        }
    }
}

/* The order is by (expert, token), and each of row and token finds the other. */
static void check_order(const ovlm_router *a, int64_t rounds)
{
    int64_t rows = a->logits.rows, n = a->logits.cols;
    int64_t *seen = calloc((size_t)n, 8);
    for (int64_t slot = 0; slot < rows * a->k; slot++) {
        int32_t e = a->expert[slot], row = a->row[slot];
        seen[e]++;
        CHECK(row >= a->offsets[e] && row < a->offsets[e + 1], "slot %lld", (long long)slot);
        CHECK(a->token[row] == slot / a->k, "token of row %d", row);
    }
    for (int64_t e = 0; e < n; e++) {
        CHECK(a->offsets[e + 1] - a->offsets[e] == seen[e], "rows of expert %lld", (long long)e);
        CHECK(a->count[e] == rounds * seen[e], "count of expert %lld", (long long)e);
        for (int32_t row = a->offsets[e] + 1; row < a->offsets[e + 1]; row++) {
            CHECK(a->token[row - 1] < a->token[row], "rows %d and %d", row - 1, row);
        }
    }
    CHECK(a->offsets[0] == 0, "offsets begin at 0");
    free(seen);
}

/* d(sum dweight weight + aux sum scores)/dlogits by differences. */
static double objective(const ovlm_router *a, int64_t t)
{
    double s[64], sum = 0, total = 0;
    scores(a, t, s);
    for (int64_t j = 0; j < a->k; j++) {
        sum += s[a->expert[t * a->k + j]];
    }
    for (int64_t j = 0; j < a->k; j++) {
        double weight = a->scale * s[a->expert[t * a->k + j]];
        total += rig_get(&a->dweight, t, j) * (a->normalise ? weight / sum : weight);
    }
    for (int64_t e = 0; e < a->logits.cols && a->aux.cols > 0; e++) {
        total += rig_get(&a->aux, 0, e) * s[e];
    }
    return total;
}

static void check_gradient(const ovlm_router *a)
{
    int64_t rows = a->logits.rows, n = a->logits.cols;
    double *want = calloc((size_t)(rows * n + 1), 8), step = 1.0 / 1024;
    for (int64_t i = 0; i < rows * n; i++) {
        double x = rig_get(&a->logits, i / n, i % n), value[4];
        for (int k = 0; k < 4; k++) { /* fourth order; x is stored as float32 */
            static const double at[4] = {-2, -1, 1, 2};
            rig_set(&a->logits, i / n, i % n, (double)(float)(x + at[k] * step));
            value[k] = objective(a, i / n);
        }
        rig_set(&a->logits, i / n, i % n, x);
        want[i] = (value[0] - 8 * value[1] + 8 * value[2] - value[3]) / (12 * step);
    }
    rig_near_least("dlogits", &a->dlogits, want, 1e-3, 0.05);
    free(want);
}

static void router_case(rig *one, rig *many)
{
    int64_t teams = 1 + rig_below(4), size = 1 + rig_below(8), n = teams * size;
    int64_t rows = rig_below(200);
    ovlm_router a = {.teams = teams, .limit = 1 + rig_below(teams), .sigmoid = rig_below(2),
                     .normalise = rig_below(2), .scale = 0.5 + ovlm_rng_uniform(&test_rng),
                     .logits = rig_random(rows, n, OVLM_F32)};
    a.k = 1 + rig_below(teams > 1 ? a.limit * size : n);
    for (int64_t i = 0; i < rows * n && rig_below(2) == 0; i++) { /* ties */
        rig_set(&a.logits, i / n, i % n, (double)rig_below(3));
    }
    if (rig_below(2)) {
        a.bias = rig_random(1, n, OVLM_F32);
    }
    if (rig_below(2)) {
        a.aux = rig_random(1, n, OVLM_F32);
    }
    a.weight = rig_empty(rows, a.k, OVLM_F32);
    a.dweight = rig_random(rows, a.k, OVLM_F32);
    a.dlogits = rig_empty(rows, n, OVLM_F32);
    routing r = routing_new(rows, a.k, n), twin = routing_new(rows, a.k, n);
    ovlm_router b = a;
    b.weight = rig_empty(rows, a.k, OVLM_F32);
    b.dlogits = rig_empty(rows, n, OVLM_F32);
    routing_give(&a, &r);
    routing_give(&b, &twin);
    RIG_SCRATCH(one, router, &a);
    RIG_SCRATCH(many, router, &b);
    RIG_RUN(one, router, fwd, &a);
    RIG_RUN(many, router, fwd, &b);
    RIG_RUN(one, router, bwd, &a);
    RIG_RUN(many, router, bwd, &b);
    rig_same("weight", &a.weight, 0, &b.weight);
    rig_same("dlogits", &a.dlogits, 0, &b.dlogits);
    CHECK(memcmp(r.row, twin.row, (size_t)(rows * a.k) * 4) == 0, "another order");
    CHECK(memcmp(r.score_sum, twin.score_sum, (size_t)n * 8) == 0, "other sums of scores");
    check_order(&a, 1);
    double *want = calloc((size_t)(rows * a.k + 1), 8), sums[64] = {0};
    int64_t other = 0;
    for (int64_t t = 0; t < rows; t++) {
        double s[64], sum = 0;
        int32_t expert[64];
        scores(&a, t, s);
        wanted_experts(&a, s, expert);
        for (int64_t j = 0; j < a.k; j++) {
            other += r.expert[t * a.k + j] != expert[j];
        }
        for (int64_t e = 0; e < n; e++) {
            sums[e] += s[e];
        }
        for (int64_t j = 0; j < a.k; j++) {
            sum += s[r.expert[t * a.k + j]];
        }
        for (int64_t j = 0; j < a.k; j++) {
            want[t * a.k + j] = a.scale * s[r.expert[t * a.k + j]] / (a.normalise ? sum : 1);
        }
    }
    /* Two scores, or two teams, that differ by rounding alone change places once in a blue moon. */
    CHECK(other <= a.k, "%lld of %lld choices differ", (long long)other,
          (long long)(rows * a.k));
    for (int64_t e = 0; e < n; e++) {
        CHECK(fabs(sums[e] - r.score_sum[e]) < 1e-5 * (1 + sums[e]), "sum of scores");
    }
    rig_near("weight", &a.weight, want, 1e-6);
    check_gradient(&a);
    /* Given choices are kept, here worse ones. */
    a.replay = true;
    for (int64_t t = 0; t < rows; t++) {
        for (int64_t j = 0; j < a.k; j++) {
            r.expert[t * a.k + j] = (int32_t)(n - 1 - r.expert[t * a.k + j]);
        }
    }
    memset(r.count, 0, (size_t)n * 8);
    RIG_RUN(many, router, fwd, &a);
    RIG_RUN(many, router, fwd, &a);
    check_order(&a, 2);
    if (rows > 0) {
        r.expert[0] = (int32_t)n;
        CHECK(ovlm_cpu_router_fwd(&one->queue, &a, NULL) != OVLM_OK, "no such expert");
        CHECK(ovlm_cpu_router_bwd(&one->queue, &a, NULL) != OVLM_OK, "no such expert");
    }
    RIG_SCRATCH_FREE(&a);
    RIG_SCRATCH_FREE(&b);
    ovlm_tensor *all[] = {&a.logits, &a.weight, &a.dweight, &a.dlogits, &b.weight, &b.dlogits};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        rig_free(all[i]);
    }
    free(a.bias.data);
    free(a.aux.data);
    routing_free(&r);
    routing_free(&twin);
    free(want);
}

/* Ties, exactly: equal logits everywhere, or in pairs. */
static void tie_case(rig *r)
{
    ovlm_router a = {.k = 3, .teams = 1, .scale = 1, .logits = rig_empty(2, 6, OVLM_F32),
                     .weight = rig_empty(2, 3, OVLM_F32)};
    static const double value[2][6] = {{1, 1, 1, 1, 1, 1}, {0, 2, 1, 2, 1, 1}};
    static const int32_t want[6] = {0, 1, 2, 1, 2, 3};
    routing order = routing_new(2, 3, 6);
    routing_give(&a, &order);
    for (int64_t i = 0; i < 12; i++) {
        rig_set(&a.logits, i / 6, i % 6, value[i / 6][i % 6]);
    }
    RIG_SCRATCH(r, router, &a);
    RIG_RUN(r, router, fwd, &a);
    CHECK(memcmp(order.expert, want, sizeof want) == 0, "ties go to the lower number");
    for (int64_t e = 0; e < 6; e++) { /* nothing but NaN: some k experts, each once */
        rig_set(&a.logits, 0, e, (double)NAN);
    }
    RIG_RUN(r, router, fwd, &a);
    for (int64_t j = 0; j < 3; j++) {
        CHECK(order.expert[j] >= 0 && order.expert[j] < 6, "expert %d", order.expert[j]);
    }
    CHECK(order.expert[0] != order.expert[1] && order.expert[1] != order.expert[2], "each once");
    RIG_SCRATCH_FREE(&a);
    rig_free(&a.logits);
    rig_free(&a.weight);
    routing_free(&order);
}

/* In chunks, of ascending rows and with float32 sums, to the same last bit. */
static void combine_chunks(rig *r, const ovlm_combine *whole)
{
    int64_t rows = whole->y.rows, k = whole->k, held = whole->h.rows, most = 1 + rig_below(held);
    int32_t *row = malloc((size_t)(rows * k + 1) * sizeof *row);
    for (int64_t i = 0; i < rows * k; i++) {
        row[i] = (int32_t)(i % k * rows + i / k); /* as if slot j went to expert j */
    }
    ovlm_combine a = *whole;
    a.row = row;
    a.add = rig_random(rows, a.y.cols, OVLM_F32);
    a.y = rig_empty(rows, a.y.cols, OVLM_F32);
    RIG_RUN(r, combine, fwd, &a);
    RIG_RUN(r, combine, bwd, &a);
    ovlm_combine part = a;
    part.y = rig_empty(rows, a.y.cols, OVLM_F32);
    part.dweight = rig_empty(rows, k, OVLM_F32);
    part.dh = rig_copy(&a.dh);
    for (part.first = 0; part.first < held; part.first += most) {
        int64_t n = held - part.first < most ? held - part.first : most;
        part.h = ovlm_tensor_rows(a.h, part.first, n);
        ovlm_tensor dh = part.dh;
        part.dh = ovlm_tensor_rows(dh, part.first, n);
        part.add = part.first == 0 ? a.add : part.y;
        RIG_RUN(r, combine, fwd, &part);
        RIG_RUN(r, combine, bwd, &part);
        part.dh = dh;
    }
    if (held > 0) {
        rig_same("combine in chunks: y", &a.y, 0, &part.y);
        rig_same("combine in chunks: dh", &a.dh, 0, &part.dh);
        rig_same("combine in chunks: dweight", &a.dweight, 0, &part.dweight);
    }
    ovlm_tensor *all[] = {&a.add, &a.y, &part.y, &part.dh, &part.dweight};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        rig_free(all[i]);
    }
    free(row);
}

static void combine_case(rig *one, rig *many, ovlm_dtype dtype)
{
    int64_t rows = rig_below(80), k = 1 + rig_below(4), n = 1 + rig_below(rig_below(8) ? 60 : 5000);
    int64_t held = rows * k + rig_below(5), next = 0;
    int32_t *row = malloc((size_t)(rows * k + 1) * sizeof *row);
    for (int64_t i = 0; i < rows * k; i++) {
        row[i] = rig_below(5) == 0 ? -1 : (int32_t)next++;
    }
    for (int64_t i = rows * k - 1; i > 0; i--) {
        int64_t j = rig_below(i + 1);
        int32_t swap = row[i];
        row[i] = row[j];
        row[j] = swap;
    }
    ovlm_combine a = {.k = k, .row = row, .weight = rig_random(rows, k, OVLM_F32),
                      .h = rig_random(held, n, dtype), .y = rig_random(rows, n, dtype),
                      .dy = rig_random(rows, n, dtype), .dh = rig_empty(held, n, dtype),
                      .dweight = rig_empty(rows, k, OVLM_F32)};
    bool add = rig_below(2);
    double *y = calloc((size_t)(rows * n + 1), 8), *dw = calloc((size_t)(rows * k + 1), 8);
    double *dh = calloc((size_t)(held * n + 1), 8);
    for (int64_t i = 0; i < rows * n && add; i++) {
        y[i] = rig_get(&a.y, i / n, i % n);
    }
    for (int64_t slot = 0; slot < rows * k; slot++) {
        for (int64_t c = 0; c < n && row[slot] >= 0; c++) {
            double w = rig_get(&a.weight, slot / k, slot % k);
            y[slot / k * n + c] += w * rig_get(&a.h, row[slot], c);
            dw[slot] += rig_get(&a.dy, slot / k, c) * rig_get(&a.h, row[slot], c);
            dh[row[slot] * n + c] = w * rig_get(&a.dy, slot / k, c);
        }
    }
    ovlm_combine b = a;
    b.y = rig_copy(&a.y);
    b.dh = rig_empty(held, n, dtype);
    b.dweight = rig_empty(rows, k, OVLM_F32);
    a.add = add ? a.y : a.add;
    b.add = add ? b.y : b.add;
    RIG_RUN(one, combine, fwd, &a);
    RIG_RUN(one, combine, bwd, &a);
    RIG_RUN(many, combine, fwd, &b);
    RIG_RUN(many, combine, bwd, &b);
    rig_same("combine y", &a.y, 0, &b.y);
    rig_same("combine dh", &a.dh, 0, &b.dh);
    rig_same("combine dweight", &a.dweight, 0, &b.dweight);
    for (int64_t i = next; i < held; i++) { /* rows that nobody reads stay as they were */
        for (int64_t c = 0; c < n; c++) {
            rig_set(&a.dh, i, c, 0);
        }
    }
    rig_near("combine y", &a.y, y, 1e-6);
    rig_near("combine dh", &a.dh, dh, 1e-6);
    rig_near_least("combine dweight", &a.dweight, dw, 1e-5, 1);
    combine_chunks(many, &a);
    ovlm_tensor *all[] = {&a.weight, &a.h, &a.y, &a.dy, &a.dh, &a.dweight, &b.y, &b.dh, &b.dweight};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        rig_free(all[i]);
    }
    free(row);
    free(y);
    free(dh);
    free(dw);
}

static void balance_case(rig *r, bool empty)
{
    int64_t count[9], n = 1 + rig_below(9), total = 0;
    double sum[9], loss = 2, want = 2, rows = empty ? 0 : 100;
    float slope[9];
    ovlm_balance_loss a = {.experts = n, .rows = rows, .coef = 0.01, .speed = 0.125,
                           .count = count, .score_sum = sum, .loss = &loss, .slope = slope,
                           .bias = rig_random(1, n, OVLM_F32)};
    ovlm_tensor before = rig_copy(&a.bias);
    for (int64_t e = 0; e < n; e++) {
        count[e] = rig_below(50);
        sum[e] = ovlm_rng_uniform(&test_rng) * rows;
        total += count[e];
        want += empty ? 0 : 0.01 * (double)n * (double)count[e] / rows * sum[e] / rows;
    }
    RIG_RUN(r, balance_loss, fwd, &a);
    CHECK(fabs(loss - want) <= 1e-12, "loss %g, not %g", loss, want);
    for (int64_t e = 0; e < n; e++) {
        double s = empty ? 0 : 0.01 * (double)n * (double)count[e] / rows / rows;
        double gap = (double)total - (double)(count[e] * n);
        double step = gap > 0 ? 0.125 : gap < 0 ? -0.125 : 0;
        CHECK(fabs((double)slope[e] - s) <= 1e-7 * s, "slope");
        CHECK(fabs(rig_get(&a.bias, 0, e) - rig_get(&before, 0, e) - step) < 1e-6, "bias");
    }
    rig_free(&a.bias);
    rig_free(&before);
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    rig one, many;
    rig_open(&one, 1);
    rig_open(&many, 3);
    tie_case(&one);
    for (int i = 0; i < 60; i++) {
        router_case(&one, &many);
        combine_case(&one, &many, i % 3 == 2 ? OVLM_BF16 : OVLM_F32);
        balance_case(&one, i % 8 == 0);
    }
    rig_close(&one);
    rig_close(&many);
    return test_end("cpu_moe");
}
