/* ref_router.c - reference of router and balance_loss. */
#include "cpu/ref.h"

/* ---- router ---- */

/* Forward: scores and choice of one token.  Backward: scores and their slopes. */
ovlm_status ovlm_ref_router_measure(ovlm_backend *backend, const ovlm_router *a,
                                    ovlm_op_bytes *bytes, ovlm_err *err)
{
    (void)backend;
    *bytes = (ovlm_op_bytes){0};
    OVLM_TRY(ovlm_op_check_router(a, OVLM_PASS_MEASURE, err));
    bytes->fwd_work = bytes->bwd_work = 2 * a->logits.cols * (int64_t)sizeof(double);
    return OVLM_OK;
}

/* score[E] of token t. */
static void router_scores(const ovlm_router *a, int64_t t, double *score)
{
    int64_t experts = a->logits.cols;
    double most = -INFINITY, sum = 0;
    for (int64_t e = 0; e < experts; e++) {
        score[e] = ovlm_ref_at(&a->logits, t, e);
        most = fmax(most, score[e]);
    }
    for (int64_t e = 0; e < experts; e++) {
        score[e] = a->sigmoid ? 1 / (1 + exp(-score[e])) : exp(score[e] - most);
        sum += score[e];
    }
    for (int64_t e = 0; e < experts && !a->sigmoid; e++) {
        score[e] /= sum;
    }
}

/* Sum of the two best of choice[first .. first+n-1]. */
static double team_score(const double *choice, int64_t first, int64_t n)
{
    double best = -INFINITY, second = -INFINITY;
    for (int64_t e = first; e < first + n; e++) {
        if (choice[e] > best) {
            second = best;
            best = choice[e];
        } else if (choice[e] > second) {
            second = choice[e];
        }
    }
    return n > 1 ? best + second : best;
}

/* Shuts out the experts of all but the `limit` best teams: choice becomes -inf.  A team stays when
 * fewer than limit teams are better, equal ones before it counting as better. */
static void keep_teams(const ovlm_router *a, double *choice, double *scratch)
{
    int64_t size = a->logits.cols / a->teams;
    for (int64_t g = 0; g < a->teams; g++) {
        scratch[g] = team_score(choice, g * size, size);
    }
    for (int64_t g = 0; g < a->teams; g++) {
        int64_t better = 0;
        for (int64_t other = 0; other < a->teams; other++) {
            better += scratch[other] > scratch[g] || (other < g && scratch[other] == scratch[g]);
        }
        for (int64_t e = g * size; better >= a->limit && e < (g + 1) * size; e++) {
            choice[e] = -INFINITY;
        }
    }
}

/* expert[t][0..k-1], ascending. */
static void router_choose(const ovlm_router *a, int64_t t, double *choice, double *scratch)
{
    int64_t experts = a->logits.cols;
    router_scores(a, t, choice);
    for (int64_t e = 0; e < experts && ovlm_tensor_given(&a->bias); e++) {
        choice[e] += ovlm_ref_at(&a->bias, 0, e);
    }
    if (a->teams > 1) {
        keep_teams(a, choice, scratch);
    }
    for (int64_t j = 0; j < a->k; j++) {
        int64_t best = -1;
        for (int64_t e = 0; e < experts; e++) {
            if (!isnan(choice[e]) && (best < 0 || choice[e] > choice[best])) {
                best = e;
            }
        }
        best = best < 0 ? 0 : best; /* nothing but NaN */
        choice[best] = (double)NAN; /* taken */
        int64_t place = j;
        for (; place > 0 && a->expert[t * a->k + place - 1] > best; place--) {
            a->expert[t * a->k + place] = a->expert[t * a->k + place - 1];
        }
        a->expert[t * a->k + place] = (int32_t)best;
    }
}

/* Sum of the taken scores, or 1. */
static double router_total(const ovlm_router *a, int64_t t, const double *score)
{
    double sum = a->sigmoid ? 1e-20 : 0;
    for (int64_t j = 0; j < a->k; j++) {
        sum += score[a->expert[t * a->k + j]];
    }
    return a->normalise ? sum : 1;
}

/* Slots sorted by (expert, token). */
static void router_sort(const ovlm_router *a)
{
    int64_t slots = a->logits.rows * a->k;
    int32_t next = 0;
    for (int64_t e = 0; e < a->logits.cols; e++) {
        a->offsets[e] = next;
        for (int64_t i = 0; i < slots; i++) {
            if (a->expert[i] == e) {
                a->row[i] = next;
                a->token[next] = (int32_t)(i / a->k);
                next++;
            }
        }
        if (a->count != NULL) {
            a->count[e] += next - a->offsets[e];
        }
    }
    a->offsets[a->logits.cols] = next;
}

static int64_t router_fault(const ovlm_router *a)
{
    for (int64_t i = 0; i < a->logits.rows * a->k; i++) {
        if (a->expert[i] < 0 || a->expert[i] >= a->logits.cols) {
            return i;
        }
    }
    return -1;
}

ovlm_status ovlm_ref_router_fwd(ovlm_queue *queue, const ovlm_router *a, ovlm_err *err)
{
    OVLM_TRY(ovlm_op_check_router(a, OVLM_PASS_FWD, err));
    double *score = a->scratch.work, *spare = score + a->logits.cols;
    for (int64_t t = 0; t < a->logits.rows && !a->replay; t++) {
        router_choose(a, t, score, spare);
    }
    int64_t fault = router_fault(a);
    if (fault >= 0) {
        OVLM_REF_LATE(queue, "router forward: expert[%lld] is %d; there are %lld experts",
                      (long long)fault, (int)a->expert[fault], (long long)a->logits.cols);
    }
    for (int64_t t = 0; t < a->logits.rows; t++) {
        router_scores(a, t, score);
        double total = router_total(a, t, score);
        for (int64_t j = 0; j < a->k; j++) {
            ovlm_ref_put(&a->weight, t, j, a->scale * score[a->expert[t * a->k + j]] / total);
        }
        for (int64_t e = 0; e < a->logits.cols && a->score_sum != NULL; e++) {
            a->score_sum[e] += score[e];
        }
    }
    router_sort(a);
    return OVLM_OK;
}

/* slope[e] = d loss / d score[e]: through the weights of the taken ones, and aux. */
static void router_slopes(const ovlm_router *a, int64_t t, const double *score, double *slope)
{
    double total = router_total(a, t, score), through_total = 0;
    for (int64_t e = 0; e < a->logits.cols; e++) {
        slope[e] = ovlm_tensor_given(&a->aux) ? ovlm_ref_at(&a->aux, 0, e) : 0;
    }
    for (int64_t j = 0; j < a->k; j++) {
        int64_t e = a->expert[t * a->k + j];
        through_total += ovlm_ref_at(&a->dweight, t, j) * a->scale * score[e] / (total * total);
    }
    for (int64_t j = 0; j < a->k; j++) {
        int64_t e = a->expert[t * a->k + j];
        slope[e] += ovlm_ref_at(&a->dweight, t, j) * a->scale / total;
        slope[e] -= a->normalise ? through_total : 0;
    }
}

ovlm_status ovlm_ref_router_bwd(ovlm_queue *queue, const ovlm_router *a, ovlm_err *err)
{
    OVLM_TRY(ovlm_op_check_router(a, OVLM_PASS_BWD, err));
    int64_t fault = router_fault(a);
    if (fault >= 0) {
        OVLM_REF_LATE(queue, "router backward: expert[%lld] is %d; there are %lld experts",
                      (long long)fault, (int)a->expert[fault], (long long)a->logits.cols);
    }
    double *score = a->scratch.work, *slope = score + a->logits.cols;
    for (int64_t t = 0; t < a->logits.rows; t++) {
        router_scores(a, t, score);
        router_slopes(a, t, score, slope);
        double mean = 0; /* softmax: dlogit_e = s_e (slope_e - sum s slope) */
        for (int64_t e = 0; e < a->logits.cols; e++) {
            mean += score[e] * slope[e];
        }
        for (int64_t e = 0; e < a->logits.cols; e++) {
            double dlogit = a->sigmoid ? slope[e] * score[e] * (1 - score[e])
                                       : score[e] * (slope[e] - mean);
            ovlm_ref_put(&a->dlogits, t, e, dlogit);
        }
    }
    return OVLM_OK;
}

/* ---- balance_loss ---- */

ovlm_status ovlm_ref_balance_loss_measure(ovlm_backend *backend, const ovlm_balance_loss *a,
                                          ovlm_op_bytes *bytes, ovlm_err *err)
{
    (void)backend;
    *bytes = (ovlm_op_bytes){0};
    return ovlm_op_check_balance_loss(a, OVLM_PASS_MEASURE, err);
}

ovlm_status ovlm_ref_balance_loss_fwd(ovlm_queue *queue, const ovlm_balance_loss *a, ovlm_err *err)
{
    (void)queue;
    OVLM_TRY(ovlm_op_check_balance_loss(a, OVLM_PASS_FWD, err));
    double experts = (double)a->experts, sum = 0;
    for (int64_t e = 0; e < a->experts; e++) {
        sum += (double)a->count[e];
    }
    for (int64_t e = 0; e < a->experts; e++) {
        double count = (double)a->count[e];
        /* coef E f_e / rows; no rows, no loss. */
        double slope = a->rows > 0 ? a->coef * experts * count / a->rows / a->rows : 0;
        if (a->slope != NULL) {
            a->slope[e] = (float)slope;
        }
        if (a->loss != NULL && a->score_sum != NULL) {
            *a->loss += slope * a->score_sum[e];
        }
        if (ovlm_tensor_given(&a->bias)) {
            /* Whole numbers, so that a count that is the mean is found to be. */
            double sign = sum > count * experts ? 1 : sum < count * experts ? -1 : 0;
            ovlm_ref_add(&a->bias, 0, e, a->speed * sign, 1);
        }
    }
    return OVLM_OK;
}
