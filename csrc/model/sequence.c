/* sequence.c - from shards of tokens to shards of heads and back, and around rings.
 *
 * The side of the heads is never packed: rank r's rows of [rows, own heads] lie together, so they
 * leave from where they are and arrive where they belong.  The side of the tokens is cut by
 * columns: a block [T_r, heads of p] for each rank p of the row. */
#include "model/sequence.h"

#include <string.h>

/* ---------------------------------------------------------------- who has what */

int64_t ovlm_sequence_row_ranks(int64_t degree, int64_t heads, int64_t head_ranks)
{
    int64_t most = head_ranks > 0 && head_ranks < heads ? head_ranks : heads;
    int64_t ranks = degree < most ? degree : most;
    while (degree % ranks != 0) {
        ranks--;
    }
    return ranks;
}

ovlm_sequence_part ovlm_sequence_part_of(int64_t T, int64_t heads, int64_t kv_heads,
                                         int64_t degree, int64_t row_ranks, int64_t rank)
{
    int64_t place = rank % row_ranks, share = heads / kv_heads;
    ovlm_sequence_part part = {.first = ovlm_sequence_cut(T, degree, rank),
                               .head = ovlm_sequence_cut(heads, row_ranks, place)};
    int64_t end = ovlm_sequence_cut(heads, row_ranks, place + 1);
    part.rows = ovlm_sequence_cut(T, degree, rank + 1) - part.first;
    part.heads = end - part.head;
    part.kv_head = part.head / share;
    part.kv_heads = (end + share - 1) / share - part.kv_head;
    return part;
}

int64_t ovlm_sequence_head_runs(const ovlm_sequence_part *part, int64_t heads, int64_t kv_heads,
                                ovlm_head_run run[OVLM_HEAD_RUNS_MOST])
{
    int64_t share = heads / kv_heads, end = part->head + part->heads, n = 0;
    for (int64_t head = part->head; head < end;) {
        /* Up to the end of a key/value head's queries; of many where this one begins them. */
        int64_t group = head / share, last = (group + 1) * share;
        if (head % share == 0 && end / share > group) {
            last = end / share * share;
        }
        last = last < end ? last : end;
        run[n++] = (ovlm_head_run){.head = head - part->head, .heads = last - head,
                                   .kv_head = group - part->kv_head,
                                   .kv_heads = (last - 1) / share - group + 1};
        head = last;
    }
    return n;
}

/* What is known of a group before the shares of its ranks are. */
typedef struct layout {
    const int32_t *start;
    int64_t segments, T, degree, row_ranks, rows; /* rows: how many, of ranks */
} layout;

/* Where row i begins; row `rows` is the end. */
static int64_t row_cut(const layout *l, int64_t i)
{
    return ovlm_sequence_cut(l->T, l->degree, i * l->row_ranks);
}

/* The segment across the beginning of row i, or one of no tokens there: from where it reaches, to
 * where it ends in the row. */
typedef struct crossing {
    int64_t from, end;
} crossing;

static crossing crossing_of(const layout *l, int64_t i)
{
    int64_t first = row_cut(l, i), end = row_cut(l, i + 1), low = 0, high = l->segments;
    if (first == end) {
        return (crossing){first, first};
    }
    while (high - low > 1) { /* the last segment that begins at `first` or before */
        int64_t middle = (low + high) / 2;
        if (l->start[middle] <= first) {
            low = middle;
        } else {
            high = middle;
        }
    }
    int64_t from = l->start[low], to = l->start[low + 1];
    return (crossing){from, from == first ? first : to < end ? to : end};
}

/* Keys that row i reads of the row `step` before it. */
static int64_t keys_taken(const layout *l, int64_t i, int64_t step)
{
    if (i < step || i >= l->rows) {
        return 0;
    }
    int64_t from = crossing_of(l, i).from, first = row_cut(l, i - step);
    int64_t keys = row_cut(l, i - step + 1) - (from > first ? from : first);
    return keys > 0 ? keys : 0;
}

/* The last step that some row needs: the steps before it reach less far. */
static int64_t last_step(const layout *l)
{
    int64_t last = 0;
    for (int64_t i = 1; i < l->rows; i++) {
        for (int64_t step = last + 1; step <= i; step++) {
            last = keys_taken(l, i, step) > 0 ? step : last;
        }
    }
    return last;
}

static ovlm_status prepare_ring(const layout *l, ovlm_sequence_pass *s, ovlm_arena *arena,
                                ovlm_err *err)
{
    ovlm_ring *ring = &s->ring;
    ring->steps = last_step(l);
    ring->bounds_n = l->segments + 1 + 2 * (ring->steps + 1);
    ring->queries = crossing_of(l, s->row).end - s->first;
    OVLM_TRY(OVLM_ARENA_NEW(arena, &ring->take, ring->steps + 1, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &ring->give, ring->steps + 1, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &ring->bounds, ring->bounds_n, err));
    for (int64_t i = 0; i <= l->segments; i++) {
        int64_t at = l->start[i] - s->first;
        ring->bounds[i] = (int32_t)(at < 0 ? 0 : at < s->rows ? at : s->rows);
        int64_t length = i == 0 ? 0 : ring->bounds[i] - ring->bounds[i - 1];
        s->longest = length > s->longest ? length : s->longest;
    }
    int32_t *ends = ring->bounds + l->segments + 2;
    ends[0] = (int32_t)ring->queries;
    for (int64_t step = 1; step <= ring->steps; step++) {
        ring->take[step] = keys_taken(l, s->row, step);
        ring->give[step] = keys_taken(l, s->row + step, step);
        ring->most_give = ring->give[step] > ring->most_give ? ring->give[step] : ring->most_give;
        ends[2 * step] = (int32_t)ring->take[step];
    }
    return OVLM_OK;
}

ovlm_status ovlm_sequence_prepare(const ovlm_sequence *group, const int32_t *start,
                                  int64_t segments, int64_t heads, int64_t kv_heads,
                                  ovlm_arena *arena, ovlm_sequence_pass **pass, ovlm_err *err)
{
    const int64_t degree = group->degree;
    layout l = {.start = start, .segments = segments, .T = start[segments], .degree = degree,
                .row_ranks = ovlm_sequence_row_ranks(degree, heads, group->head_ranks)};
    ovlm_sequence_part *part = NULL;
    l.rows = degree / l.row_ranks;
    OVLM_TRY(OVLM_ARENA_NEW(arena, pass, 1, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &part, degree, err));
    ovlm_sequence_pass *s = *pass;
    *s = (ovlm_sequence_pass){.group = group, .heads = heads, .kv_heads = kv_heads,
                              .row_ranks = l.row_ranks, .row = group->rank / l.row_ranks,
                              .segments = segments, .part = part};
    s->first = row_cut(&l, s->row);
    s->rows = row_cut(&l, s->row + 1) - s->first;
    for (int64_t r = 0; r < degree; r++) {
        part[r] = ovlm_sequence_part_of(l.T, heads, kv_heads, degree, l.row_ranks, r);
    }
    s->runs = ovlm_sequence_head_runs(ovlm_sequence_own(s), heads, kv_heads, s->run);
    OVLM_TRY(prepare_ring(&l, s, arena, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &s->send_bytes, degree, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &s->send_at, degree, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &s->recv_bytes, degree, err));
    return OVLM_ARENA_NEW(arena, &s->recv_at, degree, err);
}

/* ---------------------------------------------------------------- places */

/* Columns of a lane that rank p's heads take. */
typedef struct span {
    int64_t first, cols;
} span;

static span span_of(const ovlm_sequence_pass *s, const ovlm_lane *lane, int64_t p)
{
    int64_t D = lane->rows.cols / (lane->kv ? s->kv_heads : s->heads);
    const ovlm_sequence_part *part = &s->part[p];
    return lane->kv ? (span){part->kv_head * D, part->kv_heads * D}
                    : (span){part->head * D, part->heads * D};
}

/* The ranks of the own row: first .. end - 1. */
static int64_t row_first(const ovlm_sequence_pass *s)
{
    return s->row * s->row_ranks;
}

static int64_t row_end(const ovlm_sequence_pass *s)
{
    return row_first(s) + s->row_ranks;
}

static void clear_counts(const ovlm_sequence_pass *s)
{
    size_t bytes = (size_t)s->group->degree * sizeof *s->send_bytes;
    memset(s->send_bytes, 0, bytes);
    memset(s->send_at, 0, bytes);
    memset(s->recv_bytes, 0, bytes);
    memset(s->recv_at, 0, bytes);
}

/* Columns of rank p's block: all lanes. */
static int64_t width_of(const ovlm_sequence_pass *s, const ovlm_lane *lane, int64_t lanes,
                        int64_t p)
{
    int64_t width = 0;
    for (int64_t i = 0; i < lanes; i++) {
        width += span_of(s, &lane[i], p).cols;
    }
    return width;
}

/* Counts of an exchange; the side of the tokens sends, or receives. */
static void fill_counts(const ovlm_sequence_pass *s, const ovlm_lane *lane, int64_t lanes,
                        bool to_heads, const ovlm_tensor *own)
{
    int64_t element = ovlm_dtype_bytes(own->dtype), at = 0;
    int64_t *token_bytes = to_heads ? s->send_bytes : s->recv_bytes;
    int64_t *token_at = to_heads ? s->send_at : s->recv_at;
    int64_t *head_bytes = to_heads ? s->recv_bytes : s->send_bytes;
    int64_t *head_at = to_heads ? s->recv_at : s->send_at;
    clear_counts(s);
    for (int64_t p = row_first(s); p < row_end(s); p++) {
        token_at[p] = at;
        token_bytes[p] = ovlm_sequence_own(s)->rows * width_of(s, lane, lanes, p) * element;
        at += token_bytes[p];
        head_at[p] = (s->part[p].first - s->first) * own->cols * element;
        head_bytes[p] = s->part[p].rows * own->cols * element;
    }
}

/* Memory for the blocks of all ranks of the row. */
static char *take_blocks(ovlm_run *run, const ovlm_sequence_pass *s, const ovlm_lane *lane,
                         int64_t lanes, int64_t *bytes)
{
    int64_t width = 0;
    for (int64_t p = row_first(s); p < row_end(s); p++) {
        width += width_of(s, lane, lanes, p);
    }
    *bytes = ovlm_sequence_own(s)->rows * width * ovlm_dtype_bytes(run->dtype);
    return ovlm_stack_take(run->work, *bytes);
}

/* Rank p's block of lane i in them. */
static ovlm_tensor block_of(const ovlm_run *run, const ovlm_sequence_pass *s,
                            const ovlm_lane *lane, int64_t lanes, char *blocks, int64_t p,
                            int64_t i)
{
    int64_t before = 0, rows = ovlm_sequence_own(s)->rows;
    for (int64_t q = row_first(s); q < p; q++) {
        before += rows * width_of(s, lane, lanes, q);
    }
    char *at = blocks == NULL ? NULL : blocks + before * ovlm_dtype_bytes(run->dtype);
    ovlm_tensor block = ovlm_tensor_of(at, rows, width_of(s, lane, lanes, p), run->dtype);
    return ovlm_tensor_cols(block, width_of(s, lane, i, p), span_of(s, &lane[i], p).cols);
}

/* ---------------------------------------------------------------- the exchange */

static ovlm_status exchange(ovlm_run *run, const ovlm_sequence_pass *s, const void *send,
                            int64_t send_bytes, void *recv, int64_t recv_bytes)
{
    const ovlm_exchange args = {.send = send, .send_bytes = s->send_bytes, .send_at = s->send_at,
                                .recv = recv, .recv_bytes = s->recv_bytes, .recv_at = s->recv_at};
    return ovlm_run_exchange(run, s->group->exchange, s->group->ctx, &args, send_bytes,
                             recv_bytes);
}

static int64_t bytes_of(const ovlm_tensor *tensor)
{
    return tensor->rows * tensor->cols * ovlm_dtype_bytes(tensor->dtype);
}

ovlm_status ovlm_sequence_to_heads(ovlm_run *run, const ovlm_sequence_pass *pass,
                                   const ovlm_lane *lane, int64_t lanes, ovlm_tensor own)
{
    int64_t mark = run->work->used_bytes, bytes = 0;
    char *blocks = take_blocks(run, pass, lane, lanes, &bytes);
    for (int64_t p = row_first(pass); p < row_end(pass); p++) {
        for (int64_t i = 0; i < lanes; i++) {
            span at = span_of(pass, &lane[i], p);
            OVLM_TRY(ovlm_run_move(run, ovlm_tensor_cols(lane[i].rows, at.first, at.cols),
                          block_of(run, pass, lane, lanes, blocks, p, i), 0));
        }
    }
    fill_counts(pass, lane, lanes, true, &own);
    OVLM_TRY(exchange(run, pass, blocks, bytes, own.data, bytes_of(&own)));
    run->work->used_bytes = mark;
    return OVLM_OK;
}

/* Lane i of the row's blocks to `to`.  Columns below *covered hold what lower ranks sent. */
static ovlm_status unpack(ovlm_run *run, const ovlm_sequence_pass *s, const ovlm_lane *lane,
                          int64_t lanes, char *blocks, int64_t i, ovlm_tensor to)
{
    int64_t covered = 0;
    for (int64_t p = row_first(s); p < row_end(s); p++) {
        span at = span_of(s, &lane[i], p);
        ovlm_tensor block = block_of(run, s, lane, lanes, blocks, p, i);
        int64_t end = at.first + at.cols, again = covered - at.first;
        again = again < at.cols ? again : at.cols;
        if (again > 0) {
            OVLM_TRY(ovlm_run_move(run, ovlm_tensor_cols(block, 0, again),
                          ovlm_tensor_cols(to, at.first, again), 1));
        }
        if (again < at.cols) {
            OVLM_TRY(ovlm_run_move(run, ovlm_tensor_cols(block, again, at.cols - again),
                          ovlm_tensor_cols(to, at.first + again, at.cols - again), 0));
        }
        covered = end;
    }
    return OVLM_OK;
}

/* Whether two ranks of the row hold a key/value head. */
static bool replicated(const ovlm_sequence_pass *s)
{
    int64_t held = 0;
    for (int64_t p = row_first(s); p < row_end(s); p++) {
        held += s->part[p].kv_heads;
    }
    return held > s->kv_heads;
}

ovlm_status ovlm_sequence_to_tokens(ovlm_run *run, const ovlm_sequence_pass *pass,
                                    const ovlm_lane *lane, int64_t lanes, ovlm_tensor own)
{
    int64_t mark = run->work->used_bytes, bytes = 0;
    char *blocks = take_blocks(run, pass, lane, lanes, &bytes);
    fill_counts(pass, lane, lanes, false, &own);
    OVLM_TRY(exchange(run, pass, own.data, bytes_of(&own), blocks, bytes));
    for (int64_t i = 0; i < lanes; i++) {
        ovlm_tensor to = lane[i].rows, sum = to;
        int64_t place = run->work->used_bytes;
        bool wide = lane[i].kv && run->dtype != run->exact && replicated(pass);
        if (wide) {
            sum = ovlm_stack_tensor(run->work, to.rows, to.cols, run->exact);
        }
        OVLM_TRY(unpack(run, pass, lane, lanes, blocks, i, sum));
        if (wide) {
            OVLM_TRY(ovlm_run_move(run, sum, to, 0));
        }
        run->work->used_bytes = place;
    }
    run->work->used_bytes = mark;
    return OVLM_OK;
}

ovlm_status ovlm_sequence_pass_on(ovlm_run *run, const ovlm_sequence_pass *pass, int64_t step,
                                  bool back, ovlm_tensor send, ovlm_tensor recv)
{
    int64_t rank = pass->group->rank, far = (back ? -step : step) * pass->row_ranks;
    int64_t send_bytes = bytes_of(&send), recv_bytes = bytes_of(&recv);
    clear_counts(pass);
    if (send_bytes > 0) {
        pass->send_bytes[rank + far] = send_bytes;
    }
    if (recv_bytes > 0) {
        pass->recv_bytes[rank - far] = recv_bytes;
    }
    return exchange(run, pass, send.data, send_bytes, recv.data, recv_bytes);
}
