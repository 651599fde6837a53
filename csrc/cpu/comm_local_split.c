/* comm_local_split.c - new communicators from parts of one.
 *
 * The ranks tell each other color and key; the first of each color makes the new block, tells the
 * others that it is there, and when all have it, nobody needs its name any more. */
#include "cpu/comm_local_state.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The same number of bytes of every rank, at all ranks. */
static ovlm_status gather_equal(local_comm *comm, ovlm_comm_label *label, const void *mine,
                                int64_t bytes, void *all, ovlm_arena *arena, ovlm_err *err)
{
    int64_t *count = NULL, *at = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &count, comm->n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &at, comm->n, err));
    for (int64_t r = 0; r < comm->n; r++) {
        count[r] = bytes;
        at[r] = r * bytes;
    }
    const ovlm_all_gather args = {.send = mine, .recv = all, .recv_bytes = count, .recv_at = at};
    OVLM_TRY(ovlm_local_all_gather(comm, label, &args, err));
    label->piece++;
    return OVLM_OK;
}

typedef struct wish {
    int64_t color, key, rank;
} wish;

static int compare_wishes(const void *left, const void *right)
{
    const wish *a = left, *b = right;
    if (a->color != b->color) {
        return a->color < b->color ? -1 : 1;
    }
    if (a->key != b->key) {
        return a->key < b->key ? -1 : 1;
    }
    return a->rank < b->rank ? -1 : a->rank > b->rank;
}

/* The block of a color whose first rank is `leader`, on each of its ranks. */
static ovlm_status share_block(local_comm *comm, ovlm_comm_label *label, int64_t leader, int64_t n,
                               const char *path, local_block **block, ovlm_arena *arena,
                               ovlm_err *err)
{
    local_block **all = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &all, comm->n, err));
    if (leader == comm->rank) {
        OVLM_TRY(ovlm_local_block_new(comm->job, path, n, block, err));
    }
    OVLM_TRY(gather_equal(comm, label, block, (int64_t)sizeof *block, all, arena, err));
    if (leader >= 0 && leader != comm->rank) {
        if (comm->job->lock < 0) {
            *block = all[leader]; /* threads see the same addresses */
        } else {
            OVLM_TRY(ovlm_local_block_open(path, block, err));
        }
    }
    return gather_equal(comm, label, "", 0, NULL, arena, err); /* all have it */
}

static ovlm_status split(local_comm *comm, ovlm_comm_label *label, const wish *mine,
                         local_comm **child, ovlm_arena *arena, ovlm_err *err)
{
    wish *all = NULL;
    local_block *block = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &all, comm->n, err));
    OVLM_TRY(gather_equal(comm, label, mine, (int64_t)sizeof *mine, all, arena, err));
    qsort(all, (size_t)comm->n, sizeof *all, compare_wishes);
    int64_t first = 0, n = 0, rank = 0;
    while (all[first].color != mine->color) {
        first++;
    }
    for (; first + n < comm->n && all[first + n].color == mine->color; n++) {
        rank = all[first + n].rank == comm->rank ? n : rank;
    }
    int64_t leader = mine->color < 0 ? -1 : all[first].rank;
    char path[OVLM_LOCAL_PATH_BYTES + 64];
    (void)snprintf(path, sizeof path, "%s.%llx.%llx.%lld.%lld", comm->job->path,
                   (unsigned long long)comm->job->first->job, (unsigned long long)label->comm,
                   (long long)label->order, (long long)(leader < 0 ? -1 : comm->world[leader]));
    ovlm_status status = share_block(comm, label, leader, n, path, &block, arena, err);
    if (comm->job->lock >= 0 && n > 1 && (leader == comm->rank || status != OVLM_OK)) {
        (void)unlink(path); /* after a failure whoever is left does it */
    }
    if (status == OVLM_OK && leader >= 0) {
        status = ovlm_local_comm_new(comm->job, block, rank, n, child, err);
    }
    if (status != OVLM_OK && block != NULL && comm->job->lock >= 0) {
        ovlm_local_block_close(comm->job, block); /* blocks of threads go with the job */
    }
    if (status != OVLM_OK || leader < 0) {
        return status;
    }
    for (int64_t r = 0; r < n; r++) {
        (*child)->world[r] = comm->world[all[first + r].rank];
    }
    return OVLM_OK;
}

ovlm_status ovlm_local_split(void *self, const ovlm_comm_label *label, int64_t color, int64_t key,
                             void **child, int64_t *rank, int64_t *size, ovlm_err *err)
{
    local_comm *comm = self, *made = NULL;
    ovlm_comm_label now = *label;
    ovlm_arena arena = {0};
    ovlm_err local = {0};
    const wish mine = {.color = color < 0 ? -1 : color, .key = key, .rank = comm->rank};
    ovlm_status status = split(comm, &now, &mine, &made, &arena, &local);
    ovlm_arena_free(&arena);
    if (status != OVLM_OK) { /* may be this rank's own failure: the others wait for it */
        ovlm_local_engine.abort(comm, local.message);
        return OVLM_FAIL(err, status, "%s", local.message);
    }
    *child = made;
    if (made != NULL) {
        *rank = made->rank;
        *size = made->n;
    }
    return status;
}
