/* sp_place.c - groups onto GPUs: aligned blocks, inside a node where they fit.
 *
 * Where degrees form a chain of divisors through the node size, laying the groups out by descending
 * degree aligns every block.  Else it is bin packing: a degree above a node takes whole nodes and a
 * part of one more; what a node then has left takes the largest degrees that fit (first fit
 * decreasing, node by node), and where that fails a small exact search decides. */
#include "plan/sp_model.h"

enum { SEARCH_GROUPS = 256, SEARCH_STEPS = 20000 };

/* GPUs are given out from left to right.  Groups of one degree are interchangeable: the next free
 * one of degree j is at or after cursor[j]. */
typedef struct packer {
    const sp_model *model;
    const int64_t *j;
    int64_t *first_gpu;
    int64_t left[SP_MAX_DEGREES]; /* groups of each degree not placed yet                  */
    int64_t cursor[SP_MAX_DEGREES];
    int64_t n_left;
    int64_t position; /* GPUs before this one are given out                                */
    int64_t idle;     /* GPUs that may still be passed over                                */
    int64_t steps;
} packer;

static void put(packer *p, int64_t j)
{
    while (p->j[p->cursor[j]] != j) {
        p->cursor[j]++;
    }
    p->first_gpu[p->cursor[j]++] = p->position;
    p->position += p->model->degree[j];
    p->left[j]--;
    p->n_left--;
}

static void take_back(packer *p, int64_t j)
{
    do {
        p->cursor[j]--;
    } while (p->j[p->cursor[j]] != j);
    p->position -= p->model->degree[j];
    p->left[j]++;
    p->n_left++;
}

static bool at_node_start(const packer *p)
{
    return p->position % p->model->gpus_per_node == 0;
}

/* GPUs until the node ends, or the cluster where its last node is a part of one. */
static int64_t node_room(const packer *p)
{
    int64_t node = p->model->gpus_per_node, cluster = p->model->n_gpus - p->position;
    int64_t room = node - p->position % node;
    return room < cluster ? room : cluster;
}

/* A group above a node starts where a node does; any other stays inside one. */
static bool can_put(const packer *p, int64_t j)
{
    int64_t d = p->model->degree[j];
    if (p->left[j] == 0) {
        return false;
    }
    if (d > p->model->gpus_per_node) {
        return at_node_start(p) && d <= p->model->n_gpus - p->position;
    }
    return d <= node_room(p);
}

static void place_chain(packer *p, int64_t n_groups)
{
    int64_t next[SP_MAX_DEGREES], position = 0;
    for (int64_t j = p->model->D - 1; j >= 0; j--) {
        next[j] = position;
        position += p->left[j] * p->model->degree[j];
    }
    for (int64_t g = 0; g < n_groups; g++) {
        p->first_gpu[g] = next[p->j[g]];
        next[p->j[g]] += p->model->degree[p->j[g]];
    }
}

static bool place_greedily(packer *p)
{
    while (p->n_left > 0 && p->idle >= 0) {
        int64_t j = p->model->D - 1;
        while (j >= 0 && !can_put(p, j)) {
            j--;
        }
        if (j >= 0) {
            put(p, j);
        } else {
            p->idle -= node_room(p);
            p->position += node_room(p);
        }
    }
    return p->n_left == 0;
}

/* Depth first; inside a node the degrees descend from index `most`.  A node that could take one
 * more group is never passed over: moving that group there leaves the rest as easy as before. */
static bool place_exactly(packer *p, int64_t most)
{
    if (p->n_left == 0) {
        return true;
    }
    if (--p->steps < 0) {
        return false;
    }
    int64_t top = at_node_start(p) ? p->model->D - 1 : most;
    bool full = true;
    for (int64_t j = p->model->D - 1; j >= 0; j--) {
        if (!can_put(p, j)) {
            continue;
        }
        full = false;
        if (j > top) {
            continue;
        }
        put(p, j);
        if (place_exactly(p, p->model->degree[j] > p->model->gpus_per_node ? p->model->D - 1 : j)) {
            return true;
        }
        take_back(p, j);
    }
    int64_t room = node_room(p);
    if (!full || room > p->idle) {
        return false;
    }
    p->idle -= room;
    p->position += room;
    bool found = place_exactly(p, p->model->D - 1);
    p->position -= found ? 0 : room;
    p->idle += found ? 0 : room;
    return found;
}

bool sp_place(const sp_model *model, const int64_t *j, int64_t n_groups, int64_t *first_gpu)
{
    packer p = {.model = model, .j = j, .first_gpu = first_gpu, .n_left = n_groups};
    int64_t room = model->n_gpus;
    for (int64_t g = 0; g < n_groups; g++) {
        if (model->degree[j[g]] > room) {
            return false;
        }
        room -= model->degree[j[g]];
        p.left[j[g]]++;
    }
    p.idle = room;
    if (model->buddy) {
        place_chain(&p, n_groups);
        return true;
    }
    packer fresh = p;
    if (place_greedily(&p)) {
        return true;
    }
    p = fresh;
    p.steps = SEARCH_STEPS;
    return n_groups <= SEARCH_GROUPS && place_exactly(&p, model->D - 1);
}
