/* comm_local.c - all-to-all and all-gather through windows of shared memory.
 *
 * What a rank sends is one stream, ordered by receiver, without what it sends to itself.  In round
 * k it puts bytes kW .. (k+1)W of its stream into its window of W bytes, and after the meeting each
 * receiver takes its part.  A rank with much to send fills its whole window for whomever it is, so
 * one giant among small ones passes at full speed.  All ranks see all counts in the first round and
 * know how many follow: as many as the longest stream needs. */
#include "cpu/comm_local_state.h"

#include <math.h>
#include <string.h>

/* A call, in the terms of streams. */
typedef struct traffic {
    const char *send;
    const int64_t *send_bytes, *send_at;
    char *recv;
    const int64_t *recv_bytes, *recv_at;
    bool gather; /* one stream for all receivers                                            */
    int64_t part, done; /* the writer's place: bytes of that part that are written           */
} traffic;

/* A stream is made of one part per receiver; that of an all-gather of one for all. */
static int64_t part_bytes(const local_comm *comm, const traffic *t, int64_t part)
{
    if (t->gather) {
        return part == 0 ? t->recv_bytes[comm->rank] : 0;
    }
    return part == comm->rank ? 0 : t->send_bytes[part];
}

/* The next bytes of this rank's stream into its window. */
static void write_window(const local_comm *comm, traffic *t)
{
    char *to = ovlm_local_window_data(comm->block, comm->rank, comm->round);
    int64_t room = comm->block->window_bytes;
    while (t->part < comm->n && room > 0) {
        int64_t left = part_bytes(comm, t, t->part) - t->done;
        int64_t bytes = left < room ? left : room;
        if (bytes > 0) {
            int64_t at = t->gather ? 0 : t->send_at[t->part];
            memcpy(to, t->send + at + t->done, (size_t)bytes);
        }
        to += bytes;
        room -= bytes;
        t->done += bytes;
        if (bytes == left) {
            t->part++;
            t->done = 0;
        }
    }
}

/* What this rank is to take from round k of all others' windows. */
static void read_windows(const local_comm *comm, const traffic *t, int64_t k)
{
    const int64_t window = comm->block->window_bytes, low = k * window, high = low + window;
    for (int64_t step = 1; step < comm->n; step++) { /* not all from the same one at once */
        int64_t r = (comm->rank + step) % comm->n;
        int64_t first = comm->from[r] > low ? comm->from[r] : low;
        int64_t end = comm->until[r] < high ? comm->until[r] : high;
        if (first < end) {
            memcpy(t->recv + t->recv_at[r] + (first - comm->from[r]),
                   ovlm_local_window_data(comm->block, r, comm->round) + (first - low),
                   (size_t)(end - first));
        }
    }
}

/* ---------------------------------------------------------------- the first round */

static void write_head(const local_comm *comm, const ovlm_comm_label *label, const traffic *t)
{
    local_head *head = ovlm_local_window(comm->block, comm->rank, comm->round);
    head->label = *label;
    memcpy(head->count, t->send_bytes, (size_t)comm->n * sizeof *head->count);
    memcpy(head->count + comm->n, t->recv_bytes, (size_t)comm->n * sizeof *head->count);
}

/* All ranks look at the same heads, so that all find the same fault. */
static ovlm_status compare_heads(local_comm *comm, const ovlm_comm_label *label, bool gather,
                                 ovlm_err *err)
{
    const int64_t n = comm->n;
    const local_head *head = ovlm_local_window(comm->block, 0, comm->round);
    const int64_t stride = n > 1 ? (const char *)ovlm_local_window(comm->block, 1, comm->round) -
                                       (const char *)head
                                 : 0;
    const int64_t words = stride / (int64_t)sizeof(int64_t);
    OVLM_TRY(ovlm_comm_labels_compare(&head->label, n, stride, comm->world, err));
    return gather ? ovlm_comm_rows_compare(label, head->count, n, words, comm->world, err)
                  : ovlm_comm_counts_compare(label, head->count, head->count + n, n, words,
                                             comm->world, err);
}

/* Where this rank's part lies in each stream; the length of the longest stream. */
static int64_t find_parts(local_comm *comm, bool gather)
{
    int64_t longest = 0;
    for (int64_t r = 0; r < comm->n; r++) {
        const int64_t *count = ovlm_local_window(comm->block, r, comm->round)->count;
        int64_t before = 0, after = 0, mine = r == comm->rank ? 0 : count[gather ? r : comm->rank];
        for (int64_t s = 0; s < comm->n && !gather; s++) {
            before += s < comm->rank && s != r ? count[s] : 0;
            after += s > comm->rank && s != r ? count[s] : 0;
        }
        comm->from[r] = before;
        comm->until[r] = before + mine;
        int64_t length = gather ? count[r] : before + mine + after;
        longest = length > longest ? length : longest;
    }
    return longest;
}

static ovlm_status run(local_comm *comm, const ovlm_comm_label *label, traffic *t, ovlm_err *err)
{
    write_head(comm, label, t);
    write_window(comm, t);
    OVLM_TRY(ovlm_local_meet(comm, label, HUGE_VAL, err));
    ovlm_err local = {0};
    ovlm_status status = compare_heads(comm, label, t->gather, &local);
    if (status != OVLM_OK) {
        ovlm_local_fail(comm->job, "%s", local.message);
        return OVLM_FAIL(err, status, "%s", local.message);
    }
    const int64_t longest = find_parts(comm, t->gather), window = comm->block->window_bytes;
    for (int64_t k = 0; k * window < longest; k++) {
        if (k > 0) {
            comm->round++;
            write_window(comm, t);
            OVLM_TRY(ovlm_local_meet(comm, label, HUGE_VAL, err));
        }
        read_windows(comm, t, k);
    }
    comm->round++;
    return OVLM_OK;
}

/* ---------------------------------------------------------------- the table */

static ovlm_status all_to_all(void *self, const ovlm_comm_label *label,
                              const ovlm_all_to_all *args, ovlm_err *err)
{
    local_comm *comm = self;
    const int64_t own = comm->rank;
    traffic t = {.send = args->send, .send_bytes = args->send_bytes, .send_at = args->send_at,
                 .recv = args->recv, .recv_bytes = args->recv_bytes, .recv_at = args->recv_at};
    OVLM_TRY(run(comm, label, &t, err));
    if (t.send_bytes[own] > 0) {
        memcpy(t.recv + t.recv_at[own], t.send + t.send_at[own], (size_t)t.send_bytes[own]);
    }
    return OVLM_OK;
}

ovlm_status ovlm_local_all_gather(void *self, const ovlm_comm_label *label,
                                  const ovlm_all_gather *args, ovlm_err *err)
{
    local_comm *comm = self;
    const int64_t own = comm->rank;
    traffic t = {.send = args->send, .send_bytes = args->recv_bytes, .recv = args->recv,
                 .recv_bytes = args->recv_bytes, .recv_at = args->recv_at, .gather = true};
    OVLM_TRY(run(comm, label, &t, err));
    if (t.recv_bytes[own] > 0 && t.recv + t.recv_at[own] != t.send) {
        memcpy(t.recv + t.recv_at[own], t.send, (size_t)t.recv_bytes[own]);
    }
    return OVLM_OK;
}

static void local_abort(void *self, const char *message)
{
    local_comm *comm = self;
    ovlm_local_fail(comm->job, "rank %lld failed: %s", (long long)comm->world[comm->rank],
                    message);
}

const ovlm_comm_engine ovlm_local_engine = {
    .name = "local", .compares = true, .any_thread = true, .host_memory = true,
    .all_to_all = all_to_all, .all_gather = ovlm_local_all_gather, .split = ovlm_local_split,
    .abort = local_abort, .close = ovlm_local_close};
