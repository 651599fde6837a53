/* sequence.c - from shards of tokens to shards of heads and back.
 *
 * The side of the heads is never packed: rank r's rows of [T, own heads] lie together, so they
 * leave from where they are and arrive where they belong.  The side of the tokens is cut by
 * columns: a block [T_r, heads of p] for each rank p. */
#include "model/sequence.h"

/* ---------------------------------------------------------------- who has what */

ovlm_sequence_part ovlm_sequence_part_of(int64_t T, int64_t heads, int64_t kv_heads,
                                         int64_t degree, int64_t rank)
{
    ovlm_sequence_part part = {.first = ovlm_sequence_cut(T, degree, rank),
                               .head = ovlm_sequence_cut(heads, degree, rank)};
    int64_t end = ovlm_sequence_cut(heads, degree, rank + 1), share = heads / kv_heads;
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

ovlm_status ovlm_sequence_prepare(const ovlm_sequence *group, int64_t T, int64_t heads,
                                  int64_t kv_heads, ovlm_arena *arena, ovlm_sequence_pass **pass,
                                  ovlm_err *err)
{
    const int64_t degree = group->degree;
    ovlm_sequence_part *part = NULL;
    if (degree > heads) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "a group of %lld ranks cannot share %lld query heads; use a degree of at "
                         "most %lld", (long long)degree, (long long)heads, (long long)heads);
    }
    OVLM_TRY(OVLM_ARENA_NEW(arena, pass, 1, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &part, degree, err));
    ovlm_sequence_pass *s = *pass;
    *s = (ovlm_sequence_pass){.group = group, .T = T, .heads = heads, .kv_heads = kv_heads,
                              .part = part};
    for (int64_t r = 0; r < degree; r++) {
        part[r] = ovlm_sequence_part_of(T, heads, kv_heads, degree, r);
    }
    s->runs = ovlm_sequence_head_runs(ovlm_sequence_own(s), heads, kv_heads, s->run);
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
    for (int64_t p = 0; p < s->group->degree; p++) {
        token_at[p] = at;
        token_bytes[p] = ovlm_sequence_own(s)->rows * width_of(s, lane, lanes, p) * element;
        at += token_bytes[p];
        head_at[p] = s->part[p].first * own->cols * element;
        head_bytes[p] = s->part[p].rows * own->cols * element;
    }
}

/* Memory for the blocks of all ranks. */
static char *take_blocks(ovlm_run *run, const ovlm_sequence_pass *s, const ovlm_lane *lane,
                         int64_t lanes, int64_t *bytes)
{
    int64_t width = 0;
    for (int64_t p = 0; p < s->group->degree; p++) {
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
    for (int64_t q = 0; q < p; q++) {
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

static ovlm_status move(ovlm_run *run, ovlm_tensor from, ovlm_tensor to, double beta)
{
    ovlm_scale copy = {.alpha = 1, .beta = beta, .x = from, .y = to};
    RUN(run, scale, fwd, &copy);
    return OVLM_OK;
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
    for (int64_t p = 0; p < pass->group->degree; p++) {
        for (int64_t i = 0; i < lanes; i++) {
            span at = span_of(pass, &lane[i], p);
            OVLM_TRY(move(run, ovlm_tensor_cols(lane[i].rows, at.first, at.cols),
                          block_of(run, pass, lane, lanes, blocks, p, i), 0));
        }
    }
    fill_counts(pass, lane, lanes, true, &own);
    OVLM_TRY(exchange(run, pass, blocks, bytes, own.data, bytes_of(&own)));
    run->work->used_bytes = mark;
    return OVLM_OK;
}

/* Lane i of all ranks' blocks to `to`.  Columns below *covered hold what lower ranks sent. */
static ovlm_status unpack(ovlm_run *run, const ovlm_sequence_pass *s, const ovlm_lane *lane,
                          int64_t lanes, char *blocks, int64_t i, ovlm_tensor to)
{
    int64_t covered = 0;
    for (int64_t p = 0; p < s->group->degree; p++) {
        span at = span_of(s, &lane[i], p);
        ovlm_tensor block = block_of(run, s, lane, lanes, blocks, p, i);
        int64_t end = at.first + at.cols, again = covered - at.first;
        again = again < at.cols ? again : at.cols;
        if (again > 0) {
            OVLM_TRY(move(run, ovlm_tensor_cols(block, 0, again),
                          ovlm_tensor_cols(to, at.first, again), 1));
        }
        if (again < at.cols) {
            OVLM_TRY(move(run, ovlm_tensor_cols(block, again, at.cols - again),
                          ovlm_tensor_cols(to, at.first + again, at.cols - again), 0));
        }
        covered = end;
    }
    return OVLM_OK;
}

/* Whether two ranks hold a key/value head. */
static bool replicated(const ovlm_sequence_pass *s)
{
    int64_t held = 0;
    for (int64_t p = 0; p < s->group->degree; p++) {
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
            OVLM_TRY(move(run, sum, to, 0));
        }
        run->work->used_bytes = place;
    }
    run->work->used_bytes = mark;
    return OVLM_OK;
}
