/* sp_bound_nodes.c - which items are nodes, and what lies between them. */
#include "plan/sp_bound_nodes.h"

/* The longest third one by one, both sides of every change of the least degree, and about half of
 * the rows at equal steps of tokens. */
static void choose_nodes(const sp_model *model, sp_nodes *nodes, int64_t max_rows)
{
    int64_t m = 0, n = nodes->n, steps = 0, most_steps = max_rows / 2;
    const int64_t *k = nodes->k;
    double tokens = 0, seen = 0;
    for (int64_t i = 0; i < n; i++) {
        tokens += i < max_rows / 3 ? 0 : (double)model->s[k[i]];
    }
    for (int64_t i = 0; i < n && m < max_rows - 1; i++) {
        bool change = (i > 0 && model->min_j[k[i]] != model->min_j[k[i - 1]]) ||
                      (i + 1 < n && model->min_j[k[i]] != model->min_j[k[i + 1]]);
        bool step = i >= max_rows / 3 && seen >= tokens * (double)steps / (double)most_steps;
        seen += i < max_rows / 3 ? 0 : (double)model->s[k[i]];
        steps += step;
        if (n <= max_rows || i < max_rows / 3 || change || step) {
            nodes->node[m++] = i;
        }
    }
    if (n > 0 && (m == 0 || nodes->node[m - 1] < n - 1)) {
        nodes->node[m++] = n - 1;
    }
    nodes->rows = m;
}

ovlm_status sp_nodes_init(sp_nodes *nodes, const sp_model *model, const int64_t *k, int64_t n,
                          int64_t max_rows, ovlm_arena *arena, ovlm_err *err)
{
    int64_t room = n < max_rows ? n : max_rows;
    *nodes = (sp_nodes){.n = n, .k = k};
    OVLM_TRY(OVLM_ARENA_NEW(arena, &nodes->node, room, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &nodes->demand, room, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &nodes->left, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &nodes->weight, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &nodes->next, n, err));
    choose_nodes(model, nodes, max_rows);
    for (int64_t i = 0, c = 0; i < n; i++) {
        while (c + 1 < nodes->rows && nodes->node[c + 1] <= i) {
            c++;
        }
        double s = (double)model->s[k[i]], here = (double)model->s[k[nodes->node[c]]];
        nodes->left[i] = c;
        nodes->weight[i] = s / here;
        if (c + 1 < nodes->rows && s < here) {
            double after = (double)model->s[k[nodes->node[c + 1]]];
            double share = (s - after) / (here - after);
            nodes->weight[i] = share * (s / here);
            nodes->next[i] = (1 - share) * (s / after);
            nodes->demand[c + 1] += nodes->next[i];
        }
        nodes->demand[c] += nodes->weight[i];
    }
    return OVLM_OK;
}

double sp_nodes_spread(const sp_nodes *nodes, const double *pi, double *item_pi)
{
    double total = 0;
    for (int64_t i = 0; i < nodes->n; i++) {
        int64_t c = nodes->left[i];
        double price = pi[c] * nodes->weight[i];
        price += nodes->next[i] > 0 ? pi[c + 1] * nodes->next[i] : 0;
        item_pi[i] = price > 0 ? price : 0;
        total += item_pi[i];
    }
    return total;
}
