/* relabel_bound.c - no names of mini-batches bring the largest of any rank's bytes below this. */
#include "plan/relabel.h"

/* Sum of the `room` largest of n values; top[room] is scratch. */
static double sum_of_largest(const int64_t *value, int64_t n, int64_t room, int64_t *top)
{
    int64_t kept = 0;
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        if (kept == room && value[i] <= top[kept - 1]) {
            continue;
        }
        int64_t at = kept < room ? kept++ : kept - 1;
        for (; at > 0 && top[at - 1] < value[i]; at--) {
            top[at] = top[at - 1];
        }
        top[at] = value[i];
    }
    for (int64_t i = 0; i < kept; i++) {
        sum += (double)top[i];
    }
    return sum;
}

/* The most that label j shares with any node. */
static double best_share(const relabel_model *model, int64_t j)
{
    const relabel_flows *flows = &model->flows;
    double most = 0;
    for (int64_t e = flows->start[j]; e < flows->start[j + 1];) {
        int64_t node = flows->rank[e] / model->node_size;
        double shared = 0;
        for (; e < flows->start[j + 1] && flows->rank[e] / model->node_size == node; e++) {
            shared += (double)flows->bytes[e];
        }
        most = shared > most ? shared : most;
    }
    return most;
}

/* One node of the bound below: the labels that its ranks send to, and the ranks' weights. */
typedef struct weighing {
    const relabel_model *model;
    double *weight, *sent;  /* [node_size] of its ranks; what each sends away by the last pick  */
    double *score;          /* [N] zero between calls: weighted bytes of a label                */
    int64_t *touched, *top; /* [N]; [node_size] labels of the largest scores                    */
} weighing;

/* With weights w >= 0 of the node's ranks that sum to 1, whoever its labels are,
 *   largest load >= sum_i w_i (total_i - sum_{its labels} V_ij)
 *                >= sum_i w_i total_i - the `room` largest of sum_i w_i V_ij over labels j.
 * Returns the last, rounded down, and sets `sent` to the loads of that choice. */
static double weigh(weighing *x, int64_t node)
{
    const relabel_flows *flows = &x->model->flows;
    int64_t first = node * x->model->node_size, room = relabel_node_room(x->model, node);
    int64_t n = 0, kept = 0;
    double all = 0, taken = 0;
    for (int64_t r = 0; r < room; r++) {
        x->sent[r] = flows->rank_total[first + r];
        all += x->weight[r] * x->sent[r];
        for (int64_t e = flows->rank_start[first + r]; e < flows->rank_start[first + r + 1]; e++) {
            int64_t j = flows->rank_label[e];
            if (flows->rank_bytes[e] == 0) {
                continue; /* the score would stay zero, and the label be listed again */
            }
            if (x->score[j] <= 0) {
                x->touched[n++] = j;
            }
            x->score[j] += x->weight[r] * (double)flows->rank_bytes[e];
        }
    }
    for (int64_t t = 0; t < n; t++) {
        int64_t j = x->touched[t];
        if (kept == room && x->score[j] <= x->score[x->top[kept - 1]]) {
            continue;
        }
        int64_t at = kept < room ? kept++ : kept - 1;
        for (; at > 0 && x->score[x->top[at - 1]] < x->score[j]; at--) {
            x->top[at] = x->top[at - 1];
        }
        x->top[at] = j;
    }
    for (int64_t t = 0; t < kept; t++) {
        taken += x->score[x->top[t]];
        for (int64_t e = flows->start[x->top[t]]; e < flows->start[x->top[t] + 1]; e++) {
            int64_t r = flows->rank[e] - first;
            if (r >= 0 && r < room) {
                x->sent[r] -= (double)flows->bytes[e];
            }
        }
    }
    for (int64_t t = 0; t < n; t++) {
        x->score[x->touched[t]] = 0;
    }
    /* the rounding of sums of that many terms, and of weights that sum to a little more than 1 */
    int64_t terms = flows->rank_start[first + room] - flows->rank_start[first] + room;
    return all - taken - (1e-9 + (double)terms * 0x1p-51) * all;
}

/* The best of a few weights: who would send more than the others at the last ones weighs more. */
static double bound_of_node(weighing *x, int64_t node)
{
    enum { ROUNDS = 8 };
    int64_t room = relabel_node_room(x->model, node);
    double best = 0;
    for (int64_t r = 0; r < room; r++) {
        x->weight[r] = 1 / (double)room;
    }
    for (int round = 0; round < ROUNDS; round++) {
        double bound = weigh(x, node), most = 0, sum = 0;
        best = bound > best ? bound : best;
        for (int64_t r = 0; r < room; r++) {
            most = x->sent[r] > most ? x->sent[r] : most;
        }
        for (int64_t r = 0; r < room && most > 0; r++) {
            x->weight[r] *= 0.25 + x->sent[r] / most;
            sum += x->weight[r];
        }
        if (!(sum > 0)) {
            break;
        }
        for (int64_t r = 0; r < room; r++) {
            x->weight[r] /= sum;
        }
    }
    return best;
}

/* Whatever the labels' nodes, label j keeps at most its best node's share, and rank i at most its
 * largest flows to as many labels as its node has room for; ranks of one node share those labels;
 * and nobody is below the average. */
ovlm_status relabel_minmax_bound(const relabel_model *model, double sum_bound, double *bound,
                                 ovlm_arena *arena, ovlm_err *err)
{
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    const relabel_flows *flows = &model->flows;
    int64_t *top = NULL;
    weighing x = {.model = model};
    OVLM_TRY(OVLM_ARENA_NEW(arena, &top, model->node_size, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &x.weight, model->node_size, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &x.sent, model->node_size, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &x.score, model->N, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &x.touched, model->N, err));
    x.top = top;
    *bound = sum_bound / (double)model->N * (1 - 1e-12);
    for (int64_t j = 0; j < model->N; j++) {
        double least = flows->label_total[j] - best_share(model, j);
        *bound = least > *bound ? least : *bound;
    }
    for (int64_t i = 0; i < model->N; i++) {
        int64_t first = flows->rank_start[i], n = flows->rank_start[i + 1] - first;
        double least = flows->rank_total[i] -
                       sum_of_largest(flows->rank_bytes + first, n,
                                      relabel_node_room(model, i / model->node_size), top);
        *bound = least > *bound ? least : *bound;
    }
    for (int64_t k = 0; k < model->K; k++) {
        double least = bound_of_node(&x, k);
        *bound = least > *bound ? least : *bound;
    }
    ovlm_arena_rewind(arena, mark);
    return OVLM_OK;
}
