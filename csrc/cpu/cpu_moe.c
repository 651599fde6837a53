/* cpu_moe.c - what surrounds the experts of a mixture: router, combine, balance loss.
 *
 * Router: parallel over fixed chunks of tokens, which choose, weigh and count; one pass over the
 * counts places every chunk's tokens of every expert; then the chunks write the sorted order.  So
 * rows are sorted by (expert, token) whatever the number of threads. */
#include <math.h>

#include "cpu/cpu_load.h"
#include "cpu/cpu_math.h"

/* ---- scores ---- */

/* softmax(logits) or sigmoid(logits) of one token. */
OVLM_CPU_INLINE void scores_body(const float *restrict logits, float *restrict score, int64_t n,
                                 bool sigmoid)
{
    if (sigmoid) {
        for (int64_t e = 0; e < n; e++) {
            score[e] = ovlm_math_sigmoid(logits[e]);
        }
        return;
    }
    float most = logits[0], sum = 0;
    for (int64_t e = 1; e < n; e++) {
        most = logits[e] > most ? logits[e] : most;
    }
    for (int64_t e = 0; e < n; e++) {
        score[e] = ovlm_math_exp(logits[e] - most);
    }
    for (int64_t e = 0; e < n; e++) {
        sum += score[e];
    }
    float inverse = 1 / sum;
    for (int64_t e = 0; e < n; e++) {
        score[e] *= inverse;
    }
}
OVLM_CPU_KERNEL(scores, (const float *logits, float *score, int64_t n, bool sigmoid),
                (logits, score, n, sigmoid))

/* The k largest, largest first, ties to the lower number; skips what is not `allowed` (NULL: all
 * are).  A NaN counts as the least, so that there are always k. */
static void choose(const float *value, const bool *allowed, int64_t n, int64_t k, int32_t *chosen)
{
    int64_t held = 0;
    for (int64_t e = 0; e < n; e++) {
        if (allowed != NULL && !allowed[e]) {
            continue;
        }
        int64_t place = held;
        while (place > 0 && (value[e] > value[chosen[place - 1]] ||
                             (isnan(value[chosen[place - 1]]) && !isnan(value[e])))) {
            place--;
        }
        if (place >= k) {
            continue;
        }
        held = held < k ? held + 1 : k;
        memmove(chosen + place + 1, chosen + place, (size_t)(held - 1 - place) * sizeof *chosen);
        chosen[place] = (int32_t)e;
    }
}

/* Experts of the `limit` teams whose two best sum highest. */
static void allow_teams(const ovlm_router *a, const float *value, float *team_value,
                        int32_t *team_chosen, bool *allowed)
{
    int64_t size = a->logits.cols / a->teams;
    for (int64_t team = 0; team < a->teams; team++) {
        int32_t best[2] = {0, 0};
        choose(value + team * size, NULL, size, size < 2 ? 1 : 2, best);
        team_value[team] = value[team * size + best[0]];
        team_value[team] += size < 2 ? 0 : value[team * size + best[1]];
    }
    choose(team_value, NULL, a->teams, a->limit, team_chosen);
    memset(allowed, 0, (size_t)a->logits.cols * sizeof *allowed);
    for (int64_t i = 0; i < a->limit; i++) {
        memset(allowed + team_chosen[i] * size, 1, (size_t)size * sizeof *allowed);
    }
}

static void sort_ascending(int32_t *expert, int64_t k)
{
    for (int64_t i = 1; i < k; i++) {
        int32_t held = expert[i];
        int64_t place = i;
        for (; place > 0 && expert[place - 1] > held; place--) {
            expert[place] = expert[place - 1];
        }
        expert[place] = held;
    }
}

static float weight_sum(const ovlm_router *a, const float *score, const int32_t *expert)
{
    float sum = a->sigmoid ? 1e-20f : 0;
    for (int64_t j = 0; j < a->k; j++) {
        sum += score[expert[j]];
    }
    return sum;
}

/* ---- router, forward ---- */

/* `work`: per chunk, sums of scores [E] in double, then counts of tokens [E], which turn into the
 * place of the chunk's next token of that expert. */
typedef struct router_job {
    const ovlm_router *a;
    double *sum;
    int32_t *next;
} router_job;

static router_job router_job_of(const ovlm_router *a)
{
    int64_t cells = ovlm_cpu_chunks(a->logits.rows) * a->logits.cols;
    router_job job = {a, a->scratch.work, NULL};
    job.next = (int32_t *)(void *)(job.sum + cells);
    return job;
}

ovlm_status ovlm_cpu_router_measure(ovlm_backend *backend, const ovlm_router *a,
                                    ovlm_op_bytes *bytes, ovlm_err *err)
{
    (void)backend;
    OVLM_CPU_CHECK(router, a, MEASURE, err);
    int64_t cells = ovlm_cpu_chunks(a->logits.rows) * a->logits.cols;
    *bytes = (ovlm_op_bytes){.fwd_work = cells * (int64_t)(sizeof(double) + sizeof(int32_t))};
    return OVLM_OK;
}

/* Given choices must be experts. */
static ovlm_status check_experts(const ovlm_router *a, ovlm_err *err)
{
    for (int64_t i = 0; i < a->logits.rows * a->k; i++) {
        if (a->expert[i] < 0 || a->expert[i] >= a->logits.cols) {
            return OVLM_FAIL(err, OVLM_E_ARG,
                             "router: expert[%lld] is %d; it must be in [0, %lld)", (long long)i,
                             (int)a->expert[i], (long long)a->logits.cols);
        }
    }
    return OVLM_OK;
}

static void route_chunk(const void *context, int64_t chunk, int64_t first, int64_t count,
                        float *scratch)
{
    const router_job *job = context;
    const ovlm_router *a = job->a;
    int64_t n = a->logits.cols;
    float *score = scratch, *value = scratch + OVLM_CPU_ROW, *team = scratch + 2 * OVLM_CPU_ROW;
    int32_t *team_chosen = (int32_t *)(void *)(scratch + 3 * OVLM_CPU_ROW);
    bool *allowed = (bool *)(void *)(scratch + 4 * OVLM_CPU_ROW);
    const float *bias = ovlm_tensor_given(&a->bias) ? a->bias.data : NULL;
    double *sum = job->sum + chunk * n;
    int32_t *counted = job->next + chunk * n;
    memset(sum, 0, (size_t)n * sizeof *sum);
    memset(counted, 0, (size_t)n * sizeof *counted);
    for (int64_t t = first; t < first + count; t++) {
        int32_t *expert = a->expert + t * a->k;
        float *weight = ovlm_cpu_at(&a->weight, t, 0);
        scores(ovlm_cpu_at(&a->logits, t, 0), score, n, a->sigmoid);
        if (!a->replay) {
            const float *by = score;
            for (int64_t e = 0; bias != NULL && e < n; e++) {
                value[e] = score[e] + bias[e];
                by = value;
            }
            if (a->teams > 1) {
                allow_teams(a, by, team, team_chosen, allowed);
            }
            choose(by, a->teams > 1 ? allowed : NULL, n, a->k, expert);
            sort_ascending(expert, a->k);
        }
        float factor = (float)a->scale;
        factor = a->normalise ? factor / weight_sum(a, score, expert) : factor;
        for (int64_t j = 0; j < a->k; j++) {
            weight[j] = factor * score[expert[j]];
            counted[expert[j]]++;
        }
        for (int64_t e = 0; a->score_sum != NULL && e < n; e++) {
            sum[e] += (double)score[e];
        }
    }
}

/* Counts to places: expert by expert, and chunk by chunk inside an expert. */
static void place_chunks(const router_job *job, int64_t chunks)
{
    const ovlm_router *a = job->a;
    int64_t n = a->logits.cols;
    int32_t place = 0;
    for (int64_t e = 0; e < n; e++) {
        a->offsets[e] = place;
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            int32_t counted = job->next[chunk * n + e];
            job->next[chunk * n + e] = place;
            place += counted;
            if (a->score_sum != NULL) {
                a->score_sum[e] += job->sum[chunk * n + e];
            }
        }
        if (a->count != NULL) {
            a->count[e] += place - a->offsets[e];
        }
    }
    a->offsets[n] = place;
}

static void sort_chunk(const void *context, int64_t chunk, int64_t first, int64_t count,
                       float *scratch)
{
    (void)scratch;
    const router_job *job = context;
    const ovlm_router *a = job->a;
    int32_t *next = job->next + chunk * a->logits.cols;
    for (int64_t slot = first * a->k; slot < (first + count) * a->k; slot++) {
        int32_t row = next[a->expert[slot]]++;
        a->row[slot] = row;
        a->token[row] = (int32_t)(slot / a->k);
    }
}

ovlm_status ovlm_cpu_router_fwd(ovlm_queue *queue, const ovlm_router *a, ovlm_err *err)
{
    OVLM_CPU_CHECK(router, a, FWD, err);
    OVLM_TRY(ovlm_cpu_fits("router: experts", a->logits.cols, err));
    if (a->replay) {
        OVLM_TRY(check_experts(a, err));
    }
    ovlm_cpu *cpu = ovlm_cpu_of(queue);
    router_job job = router_job_of(a);
    ovlm_cpu_chunks_run(cpu, a->logits.rows, route_chunk, &job);
    place_chunks(&job, ovlm_cpu_chunks(a->logits.rows));
    ovlm_cpu_chunks_run(cpu, a->logits.rows, sort_chunk, &job);
    return OVLM_OK;
}

/* ---- router, backward ---- */

/* dscore from dweight; with w_j = scale s_j / S:  ds_j = scale (dw_j - sum_i dw_i s_i / S) / S.
 * Then through the sigmoid, s (1 - s) ds, or the softmax, s (ds - sum s ds). */
static void router_back_rows(const void *context, int64_t first, int64_t count, float *scratch)
{
    const ovlm_router *a = context;
    int64_t n = a->logits.cols;
    float *score = scratch, *dscore = scratch + OVLM_CPU_ROW, factor = (float)a->scale;
    const float *aux = ovlm_tensor_given(&a->aux) ? a->aux.data : NULL;
    for (int64_t t = first; t < first + count; t++) {
        const int32_t *expert = a->expert + t * a->k;
        const float *dweight = ovlm_cpu_at(&a->dweight, t, 0);
        float *dlogits = ovlm_cpu_at(&a->dlogits, t, 0);
        scores(ovlm_cpu_at(&a->logits, t, 0), score, n, a->sigmoid);
        for (int64_t e = 0; e < n; e++) {
            dscore[e] = aux != NULL ? aux[e] : 0;
        }
        float inverse = 1, mean = 0;
        if (a->normalise) {
            inverse = 1 / weight_sum(a, score, expert);
            for (int64_t j = 0; j < a->k; j++) {
                mean += dweight[j] * (score[expert[j]] * inverse);
            }
        }
        for (int64_t j = 0; j < a->k; j++) {
            dscore[expert[j]] += factor * (dweight[j] - mean) * inverse;
        }
        float through = 0;
        for (int64_t e = 0; !a->sigmoid && e < n; e++) {
            through += score[e] * dscore[e];
        }
        for (int64_t e = 0; e < n; e++) {
            dlogits[e] = a->sigmoid ? dscore[e] * (score[e] * (1 - score[e]))
                                    : score[e] * (dscore[e] - through);
        }
    }
}

ovlm_status ovlm_cpu_router_bwd(ovlm_queue *queue, const ovlm_router *a, ovlm_err *err)
{
    OVLM_CPU_CHECK(router, a, BWD, err);
    OVLM_TRY(ovlm_cpu_fits("router: experts", a->logits.cols, err));
    OVLM_TRY(check_experts(a, err));
    ovlm_cpu_rows(ovlm_cpu_of(queue), a->logits.rows, 8 * a->logits.cols, router_back_rows, a);
    return OVLM_OK;
}

/* ---- combine ---- */

enum { COMBINE_COLUMNS = 2048 };

OVLM_CPU_INLINE void set_scaled_body(float *restrict to, const float *restrict from, float factor,
                                     int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        to[i] = factor * from[i];
    }
}
OVLM_CPU_KERNEL(set_scaled, (float *to, const float *from, float factor, int64_t n),
                (to, from, factor, n))

ovlm_status ovlm_cpu_combine_measure(ovlm_backend *backend, const ovlm_combine *a,
                                     ovlm_op_bytes *bytes, ovlm_err *err)
{
    (void)backend;
    OVLM_CPU_CHECK(combine, a, MEASURE, err);
    *bytes = (ovlm_op_bytes){0};
    return OVLM_OK;
}

/* A slot's row among the `rows` of the call, or -1. */
static int64_t row_of(const ovlm_combine *a, int64_t rows, int64_t t, int64_t j)
{
    int64_t row = a->row[t * a->k + j];
    return row < a->first || row >= a->first + rows ? -1 : row - a->first;
}

static float weight_of(const ovlm_combine *a, int64_t t, int64_t j)
{
    return ovlm_tensor_given(&a->weight) ? *(const float *)ovlm_cpu_at(&a->weight, t, j) : 1;
}

static int64_t columns_left(int64_t columns, int64_t from)
{
    return columns - from < COMBINE_COLUMNS ? columns - from : COMBINE_COLUMNS;
}

static void combine_rows(const void *context, int64_t first, int64_t count, float *scratch)
{
    const ovlm_combine *a = context;
    float *h = scratch, *y = scratch + COMBINE_COLUMNS;
    for (int64_t t = first; t < first + count; t++) {
        for (int64_t c = 0; c < a->y.cols; c += COMBINE_COLUMNS) {
            int64_t n = columns_left(a->y.cols, c);
            if (ovlm_tensor_given(&a->add)) {
                ovlm_cpu_load(y, ovlm_cpu_at(&a->add, t, c), n, a->add.dtype);
            } else {
                memset(y, 0, (size_t)n * sizeof *y);
            }
            for (int64_t j = 0; j < a->k; j++) {
                int64_t row = row_of(a, a->h.rows, t, j);
                if (row >= 0) {
                    ovlm_cpu_add_scaled(y, ovlm_cpu_row(&a->h, row, c, n, h), weight_of(a, t, j),
                                        n);
                }
            }
            ovlm_cpu_store(ovlm_cpu_at(&a->y, t, c), y, n, a->y.dtype);
        }
    }
}

ovlm_status ovlm_cpu_combine_fwd(ovlm_queue *queue, const ovlm_combine *a, ovlm_err *err)
{
    OVLM_CPU_CHECK(combine, a, FWD, err);
    ovlm_cpu_rows(ovlm_cpu_of(queue), a->y.rows, (a->k + 1) * a->y.cols, combine_rows, a);
    return OVLM_OK;
}

static void combine_back_rows(const void *context, int64_t first, int64_t count, float *scratch)
{
    const ovlm_combine *a = context;
    float *h = scratch, *dh = scratch + COMBINE_COLUMNS, *dy = scratch + 2 * COMBINE_COLUMNS;
    bool with_dh = ovlm_tensor_given(&a->dh), with_dweight = ovlm_tensor_given(&a->dweight);
    int64_t rows = with_dweight ? a->h.rows : a->dh.rows;
    for (int64_t t = first; t < first + count; t++) {
        float *dweight = with_dweight ? ovlm_cpu_at(&a->dweight, t, 0) : NULL;
        for (int64_t j = 0; with_dweight && j < a->k; j++) {
            if (a->row[t * a->k + j] < 0 || row_of(a, rows, t, j) >= 0) {
                dweight[j] = 0;
            }
        }
        for (int64_t c = 0; c < a->dy.cols; c += COMBINE_COLUMNS) {
            int64_t n = columns_left(a->dy.cols, c);
            const float *from = ovlm_cpu_row(&a->dy, t, c, n, dy);
            for (int64_t j = 0; j < a->k; j++) {
                int64_t row = row_of(a, rows, t, j);
                if (row >= 0 && with_dweight) {
                    float part;
                    ovlm_cpu_dot(from, ovlm_cpu_row(&a->h, row, c, n, h), n, &part);
                    dweight[j] += part;
                }
                if (row >= 0 && with_dh) {
                    set_scaled(ovlm_cpu_row_out(&a->dh, row, c, dh), from, weight_of(a, t, j),
                               n);
                    ovlm_cpu_row_done(&a->dh, row, c, n, dh);
                }
            }
        }
    }
}

ovlm_status ovlm_cpu_combine_bwd(ovlm_queue *queue, const ovlm_combine *a, ovlm_err *err)
{
    OVLM_CPU_CHECK(combine, a, BWD, err);
    if (!ovlm_tensor_given(&a->dh) && !ovlm_tensor_given(&a->dweight)) {
        return OVLM_OK;
    }
    ovlm_cpu_rows(ovlm_cpu_of(queue), a->dy.rows, 2 * a->k * a->dy.cols, combine_back_rows, a);
    return OVLM_OK;
}

/* ---- balance loss (Fedus, Zoph, Shazeer 2021, eq. 4 to 6) ---- */

ovlm_status ovlm_cpu_balance_loss_measure(ovlm_backend *backend, const ovlm_balance_loss *a,
                                          ovlm_op_bytes *bytes, ovlm_err *err)
{
    (void)backend;
    OVLM_CPU_CHECK(balance_loss, a, MEASURE, err);
    *bytes = (ovlm_op_bytes){0};
    return OVLM_OK;
}

ovlm_status ovlm_cpu_balance_loss_fwd(ovlm_queue *queue, const ovlm_balance_loss *a, ovlm_err *err)
{
    (void)queue;
    OVLM_CPU_CHECK(balance_loss, a, FWD, err);
    double experts = (double)a->experts, loss = 0;
    int64_t total = 0;
    double inverse = a->rows > 0 ? 1 / a->rows : 0; /* no rows: no loss, no slope */
    for (int64_t e = 0; e < a->experts; e++) {
        double share = (double)a->count[e] * inverse;
        loss += a->score_sum != NULL ? share * (a->score_sum[e] * inverse) : 0;
        total += a->count[e];
        if (a->slope != NULL) {
            a->slope[e] = (float)(a->coef * experts * share * inverse);
        }
    }
    if (a->loss != NULL) {
        *a->loss += a->coef * experts * loss;
    }
    float *bias = ovlm_tensor_given(&a->bias) ? a->bias.data : NULL;
    for (int64_t e = 0; bias != NULL && e < a->experts; e++) {
        int64_t gap = total - a->count[e] * a->experts; /* of the mean, without rounding */
        bias[e] += (float)(gap > 0 ? a->speed : gap < 0 ? -a->speed : 0);
    }
    return OVLM_OK;
}
