/* sp_bound_nodes.c - which items are nodes, and what lies between them. */
#include "plan/sp_bound_nodes.h"

/* The longest half one by one and the others at equal steps of tokens. */
static void choose_nodes(sp_nodes *nodes, int64_t max_rows)
{
    int64_t m = nodes->n <= max_rows ? nodes->n : max_rows / 2;
    for (int64_t i = 0; i < m; i++) {
        nodes->node[i] = i;
    }
    if (nodes->n > max_rows) {
        double tokens = 0, seen = 0;
        for (int64_t i = m; i < nodes->n; i++) {
            tokens += nodes->s[i];
        }
        double step = tokens / (double)(max_rows - m - 1);
        for (int64_t i = m; i < nodes->n && m < max_rows - 1; i++) {
            if (seen >= step * (double)(m - max_rows / 2)) {
                nodes->node[m++] = i;
            }
            seen += nodes->s[i];
        }
        if (nodes->node[m - 1] < nodes->n - 1) {
            nodes->node[m++] = nodes->n - 1;
        }
    }
    nodes->rows = m;
}

ovlm_status sp_nodes_init(sp_nodes *nodes, const double *s, int64_t n, int64_t max_rows,
                          ovlm_arena *arena, ovlm_err *err)
{
    int64_t room = n < max_rows ? n : max_rows;
    *nodes = (sp_nodes){.n = n, .s = s};
    OVLM_TRY(OVLM_ARENA_NEW(arena, &nodes->node, room, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &nodes->demand, room, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &nodes->left, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &nodes->share, n, err));
    choose_nodes(nodes, max_rows);
    for (int64_t i = 0, c = 0; i < n; i++) {
        while (c + 1 < nodes->rows && nodes->node[c + 1] <= i) {
            c++;
        }
        double here = s[nodes->node[c]], next = c + 1 < nodes->rows ? s[nodes->node[c + 1]] : here;
        nodes->left[i] = c;
        nodes->share[i] = here > next ? (s[i] - next) / (here - next) : 1;
        nodes->demand[c] += nodes->share[i];
        if (nodes->share[i] < 1) {
            nodes->demand[c + 1] += 1 - nodes->share[i];
        }
    }
    return OVLM_OK;
}

double sp_nodes_spread(const sp_nodes *nodes, const double *pi, int64_t first, double *item_pi)
{
    double total = 0;
    for (int64_t i = 0; i < nodes->n; i++) {
        int64_t c = nodes->left[i];
        double share = nodes->share[i];
        double price = pi[c] * share + (share < 1 ? pi[c + 1] * (1 - share) : 0);
        item_pi[i] = price > 0 ? price : 0;
        total += i >= first ? item_pi[i] : 0;
    }
    return total;
}
