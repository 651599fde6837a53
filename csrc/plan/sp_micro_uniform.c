/* sp_micro_uniform.c - all groups of one degree: longest item first onto the least loaded group
 * that has room for it; where memory is too tight for that, best fit decreasing on tokens. */
#include <math.h>

#include "plan/sp_micro.h"

typedef struct uniform {
    const sp_model *model;
    const int64_t *k;
    int64_t n, j, n_groups;
    double *sum_s, *sum_s2, *time; /* [n_groups]                                               */
    int64_t *heap;                 /* [n_groups] least time on top                             */
    int64_t *group;                /* [n] answer                                               */
} uniform;

/* How many groups of degree d can be placed, see sp_place. */
static int64_t placeable(const sp_model *model, int64_t d)
{
    int64_t node = model->gpus_per_node, gpus = model->n_gpus;
    if (d <= node) {
        return gpus / node * (node / d) + gpus % node / d;
    }
    int64_t nodes = (d - 1) / node + 1; /* each starts at a node; the last one may end early */
    return nodes > gpus / node ? 1 : (gpus - d) / (nodes * node) + 1;
}

/* Restores the heap below `at`, whose group has grown. */
static void sift_down(uniform *u, int64_t at)
{
    int64_t *heap = u->heap, grown = heap[at];
    for (;;) {
        int64_t child = 2 * at + 1;
        if (child >= u->n_groups) {
            break;
        }
        if (child + 1 < u->n_groups && u->time[heap[child + 1]] < u->time[heap[child]]) {
            child++;
        }
        if (u->time[heap[child]] >= u->time[grown]) {
            break;
        }
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = grown;
}

static void add(uniform *u, int64_t g, int64_t i)
{
    const sp_model *m = u->model;
    double s = (double)m->s[u->k[i]];
    u->sum_s[g] += s;
    u->sum_s2[g] += s * s;
    u->time[g] = m->quad[u->j] * u->sum_s2[g] + m->lin[u->j] * u->sum_s[g];
    u->group[i] = g;
}

static void reset(uniform *u)
{
    for (int64_t g = 0; g < u->n_groups; g++) {
        u->sum_s[g] = u->sum_s2[g] = u->time[g] = 0;
        u->heap[g] = g;
    }
}

/* Place in the heap of the group to use: its top while that has room; else the heap is looked
 * through.  `tightest` prefers the fullest group that has room to the least loaded one. */
static int64_t choose(const uniform *u, double s, bool tightest)
{
    double cap = (double)u->model->cap[u->j], best = HUGE_VAL;
    if (!tightest && u->sum_s[u->heap[0]] + s <= cap) {
        return 0;
    }
    int64_t found = -1;
    for (int64_t at = 0; at < u->n_groups; at++) {
        int64_t g = u->heap[at];
        double key = tightest ? -u->sum_s[g] : u->time[g];
        if (u->sum_s[g] + s <= cap && key < best) {
            best = key;
            found = at;
        }
    }
    return found;
}

static bool assign(uniform *u, bool tightest)
{
    reset(u);
    for (int64_t i = 0; i < u->n; i++) {
        int64_t at = choose(u, (double)u->model->s[u->k[i]], tightest);
        if (at < 0) {
            return false;
        }
        add(u, u->heap[at], i);
        sift_down(u, at);
    }
    return true;
}

/* Groups that stayed empty are left out. */
static void write_plan(const uniform *u, int64_t *slot, sp_micro *micro)
{
    int64_t groups = 0;
    micro->makespan = 0;
    for (int64_t g = 0; g < u->n_groups; g++) {
        slot[g] = groups;
        groups += u->sum_s[g] > 0;
        micro->makespan = u->time[g] > micro->makespan ? u->time[g] : micro->makespan;
    }
    micro->n_groups = groups;
    for (int64_t g = 0; g <= groups; g++) {
        micro->start[g] = 0;
    }
    for (int64_t i = 0; i < u->n; i++) {
        micro->start[slot[u->group[i]] + 1]++;
    }
    for (int64_t g = 0; g < groups; g++) {
        micro->j[g] = u->j;
        micro->start[g + 1] += micro->start[g];
    }
    for (int64_t i = u->n - 1; i >= 0; i--) {
        /* Fills each group from its end; start[g+1] comes to rest where the group begins. */
        micro->item[--micro->start[slot[u->group[i]] + 1]] = u->k[i];
    }
    for (int64_t g = 0; g < groups; g++) {
        micro->start[g] = micro->start[g + 1];
    }
    micro->start[groups] = u->n;
}

ovlm_status sp_micro_homogeneous(const sp_model *model, const int64_t *k, int64_t n_items,
                                 int64_t j, sp_micro *micro, ovlm_arena *arena, ovlm_err *err)
{
    ovlm_status status = OVLM_OK;
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    uniform u = {.model = model, .k = k, .n = n_items, .j = j};
    u.n_groups = placeable(model, model->degree[j]);
    u.n_groups = u.n_groups < n_items ? u.n_groups : n_items;
    micro->n_groups = 0;
    micro->makespan = n_items == 0 ? 0 : HUGE_VAL;
    double tokens = 0;
    for (int64_t i = 0; i < n_items; i++) {
        tokens += (double)model->s[k[i]];
    }
    if (n_items == 0 || model->s[k[0]] > model->cap[j] ||
        tokens > (double)model->cap[j] * (double)u.n_groups) {
        return OVLM_OK;
    }
    OVLM_GOTO(done, OVLM_ARENA_NEW(arena, &u.sum_s, 3 * u.n_groups, err));
    u.sum_s2 = u.sum_s + u.n_groups;
    u.time = u.sum_s2 + u.n_groups;
    OVLM_GOTO(done, OVLM_ARENA_NEW(arena, &u.heap, u.n_groups + n_items, err));
    u.group = u.heap + u.n_groups;
    if (assign(&u, false) || assign(&u, true)) {
        write_plan(&u, u.heap, micro);
    }
done:
    ovlm_arena_rewind(arena, mark);
    return status;
}
