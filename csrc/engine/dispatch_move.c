/* dispatch_move.c - rows through memory: packed, unpacked, kept and added, by several threads.
 *
 * On the wire a rank's block holds its rows of one load after those of the load before, so that a
 * run is one memcpy for each load.  Work is shared out by rows, not by runs: one item may be larger
 * than all others. */
#include <string.h>

#include "backend/comm_reduce.h"
#include "engine/dispatch_state.h"

/* Bytes that a thread moves at a time: enough that handing them out costs nothing. */
static const int64_t CHUNK_BYTES = (int64_t)1 << 18;

/* Rows first .. last-1, of one load whose part of a row begins `before` bytes into it. */
typedef struct slice {
    const ovlm_load *load;
    int64_t before, first, last, thread;
} slice;

typedef void (*slice_body)(const dispatch_move *move, const slice *part);

typedef struct job {
    const dispatch_move *move;
    slice_body body;
    int64_t rows;
} job;

static int64_t chunk_rows(const ovlm_load *load)
{
    return load->row_bytes < CHUNK_BYTES ? CHUNK_BYTES / (load->row_bytes + 1) + 1 : 1;
}

static int64_t chunks_of(const ovlm_load *load, int64_t rows)
{
    int64_t chunk = chunk_rows(load);
    return load->row_bytes > 0 ? rows / chunk + (rows % chunk != 0) : 0;
}

static void run_chunk(void *ctx, int64_t index, int64_t thread)
{
    const job *work = ctx;
    slice part = {.load = work->move->parcel->load, .thread = thread};
    int64_t chunks = chunks_of(part.load, work->rows);
    for (; index >= chunks; part.load++) {
        index -= chunks;
        part.before += part.load->row_bytes;
        chunks = chunks_of(part.load + 1, work->rows);
    }
    part.first = index * chunk_rows(part.load);
    part.last = part.first + chunk_rows(part.load);
    part.last = part.last < work->rows ? part.last : work->rows;
    work->body(work->move, &part);
}

static void share_out(const dispatch_move *move, int64_t rows, slice_body body)
{
    job work = {move, body, rows};
    const ovlm_parcel *parcel = move->parcel;
    int64_t n = 0;
    for (int64_t t = 0; t < parcel->n; t++) {
        n += chunks_of(&parcel->load[t], rows);
    }
    if (parcel->pool != NULL && n > 1) {
        ovlm_pool_run(parcel->pool, n, run_chunk, &work);
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        run_chunk(&work, i, 0);
    }
}

/* The i with before[i] <= row < before[i+1]. */
static int64_t holder(const int64_t *before, int64_t n, int64_t row)
{
    int64_t low = 0, high = n - 1;
    while (low < high) {
        int64_t middle = low + (high - low + 1) / 2;
        if (before[middle] <= row) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

/* Where row `row` of the wire has its part for a load. */
static char *wire_at(const dispatch_move *move, int64_t peer, int64_t row, const slice *part)
{
    const int64_t *start = move->runs->peer_wire;
    return move->wire + start[peer] * move->width + (start[peer + 1] - start[peer]) * part->before +
           (row - start[peer]) * part->load->row_bytes;
}

static void pack_slice(const dispatch_move *move, const slice *part)
{
    const dispatch_runs *runs = move->runs;
    int64_t bytes = part->load->row_bytes, i = holder(runs->wire, runs->n, part->first);
    for (int64_t row = part->first; row < part->last; i++) {
        int64_t end = runs->wire[i + 1] < part->last ? runs->wire[i + 1] : part->last;
        int64_t at = runs->row[i] + row - runs->wire[i];
        memcpy(wire_at(move, runs->peer[i], row, part),
               (const char *)part->load->from + at * bytes, (size_t)((end - row) * bytes));
        row = end;
    }
}

static void unpack_slice(const dispatch_move *move, const slice *part)
{
    const dispatch_runs *runs = move->runs;
    int64_t bytes = part->load->row_bytes, i = holder(runs->wire, runs->n, part->first);
    for (int64_t row = part->first; row < part->last; i++) {
        int64_t end = runs->wire[i + 1] < part->last ? runs->wire[i + 1] : part->last;
        int64_t at = runs->row[i] + row - runs->wire[i];
        memcpy((char *)part->load->to + at * bytes, wire_at(move, runs->peer[i], row, part),
               (size_t)((end - row) * bytes));
        row = end;
    }
}

static void keep_slice(const dispatch_move *move, const slice *part)
{
    const dispatch_stay *stay = &move->dispatch->stay;
    const int64_t *from = move->back ? stay->to : stay->from;
    const int64_t *to = move->back ? stay->from : stay->to;
    int64_t bytes = part->load->row_bytes, i = holder(stay->before, stay->n, part->first);
    for (int64_t row = part->first; row < part->last; i++) {
        int64_t end = stay->before[i + 1] < part->last ? stay->before[i + 1] : part->last;
        int64_t into = row - stay->before[i];
        memcpy((char *)part->load->to + (to[i] + into) * bytes,
               (const char *)part->load->from + (from[i] + into) * bytes,
               (size_t)((end - row) * bytes));
        row = end;
    }
}

/* Rows row .. end-1 of the source, which all have the copies first .. last-1. */
static void add_piece(const dispatch_move *move, const slice *part, int64_t s, int64_t row,
                      int64_t end)
{
    const ovlm_dispatch *d = move->dispatch;
    const dispatch_sums *sums = &d->sums;
    const ovlm_load *load = part->load;
    const void **parts = move->parts + part->thread * sums->most;
    char *to = (char *)load->to + row * load->row_bytes;
    int64_t bytes = (end - row) * load->row_bytes, n = sums->first[s + 1] - sums->first[s];
    for (int64_t i = 0; i < n; i++) {
        const dispatch_copy *copy = &sums->copy[sums->first[s] + i];
        int64_t at = copy->row + row - sums->row[s];
        parts[i] = copy->peer == d->rank ? (const char *)load->from + at * load->row_bytes
                                         : wire_at(move, copy->peer, at, part);
    }
    if (n == 0) {
        memset(to, 0, (size_t)bytes);
    } else if (n == 1) {
        memcpy(to, parts[0], (size_t)bytes);
    } else {
        ovlm_comm_reduce_parts(to, parts, n, bytes / ovlm_dtype_bytes(load->dtype), load->dtype,
                               OVLM_SUM);
    }
}

static void add_slice(const dispatch_move *move, const slice *part)
{
    const dispatch_sums *sums = &move->dispatch->sums;
    int64_t s = holder(sums->row, sums->n, part->first);
    for (int64_t row = part->first; row < part->last; s++) {
        int64_t end = sums->row[s + 1] < part->last ? sums->row[s + 1] : part->last;
        add_piece(move, part, s, row, end);
        row = end;
    }
}

void dispatch_pack(const dispatch_move *move)
{
    share_out(move, move->runs->wire[move->runs->n], pack_slice);
}

void dispatch_unpack(const dispatch_move *move)
{
    share_out(move, move->runs->wire[move->runs->n], unpack_slice);
}

void dispatch_keep(const dispatch_move *move)
{
    share_out(move, move->dispatch->rows.stay, keep_slice);
}

void dispatch_add(const dispatch_move *move)
{
    share_out(move, move->dispatch->rows.source, add_slice);
}
