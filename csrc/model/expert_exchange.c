/* expert_exchange.c - who sends which rows of a layer to whom, round by round. */
#include "model/expert_exchange.h"

#include <string.h>

/* Room beside a fair share of a group's rows, so that most layers take one round: 1/4. */
enum { SPARE_PARTS = 4 };

static int64_t least_of(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* ---------------------------------------------------------------- prepare */

static ovlm_status new_arrays(const ovlm_expert_terms *terms, ovlm_arena *arena,
                              ovlm_expert_pass *pass, ovlm_err *err)
{
    int64_t d = pass->group->degree;
    int64_t **const lists[] = {&pass->bound, &pass->sent_first, &pass->sent, &pass->send_bytes,
                               &pass->send_at, &pass->recv_bytes, &pass->recv_at, &pass->came};
    for (size_t i = 0; i < sizeof lists / sizeof *lists; i++) {
        OVLM_TRY(OVLM_ARENA_NEW(arena, lists[i], d, err));
    }
    OVLM_TRY(OVLM_ARENA_NEW(arena, &pass->own, terms->experts, err));
    return OVLM_ARENA_NEW(arena, &pass->count, terms->layers * d * terms->experts, err);
}

enum { TERM_ROWS, TERM_BOUND, TERM_KIND, TERMS };

static ovlm_status settle_bounds(const ovlm_expert_pass *pass, const int64_t *all, ovlm_err *err)
{
    int64_t d = pass->group->degree, total = 0;
    for (int64_t r = 0; r < d; r++) {
        const int64_t *of = all + r * TERMS;
        total += of[TERM_ROWS];
        if (of[TERM_KIND] != all[TERM_KIND]) {
            return OVLM_FAIL(err, OVLM_E_ARG, "ranks that share experts run passes of other kinds "
                             "(in training or checkpoint), ranks 0 and %lld of %lld among them",
                             (long long)r, (long long)d);
        }
    }
    int64_t fair = (total + d - 1) / d, most = least_of(total, INT32_MAX);
    for (int64_t r = 0; r < d; r++) {
        int64_t bound = all[r * TERMS + TERM_BOUND];
        pass->bound[r] = least_of(most, bound > 0 ? bound : fair + fair / SPARE_PARTS);
    }
    return OVLM_OK;
}

ovlm_status ovlm_expert_prepare(const ovlm_expert_group *group, const ovlm_expert_terms *terms,
                                ovlm_arena *arena, ovlm_expert_pass **pass, ovlm_err *err)
{
    const int64_t own[TERMS] = {terms->T * terms->k, terms->chunk_rows, terms->kind};
    int64_t *all = NULL;
    *pass = NULL;
    OVLM_TRY(OVLM_ARENA_NEW(arena, pass, 1, err));
    **pass = (ovlm_expert_pass){.group = group, .experts = terms->experts, .rows = own[TERM_ROWS]};
    OVLM_TRY(new_arrays(terms, arena, *pass, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, &all, TERMS * group->degree, err));
    OVLM_TRY(group->share(group->ctx, own, TERMS, all, err));
    return settle_bounds(*pass, all, err);
}

/* ---------------------------------------------------------------- counts */

/* Rows of all ranks for experts, of one layer: [degree,E]. */
static int64_t *counts_of(const ovlm_expert_pass *pass, int64_t layer)
{
    return pass->count + layer * pass->group->degree * pass->experts;
}

ovlm_status ovlm_expert_share(ovlm_run *run, const ovlm_expert_pass *pass, int64_t layer,
                              const int32_t *offsets)
{
    int64_t E = pass->experts, mark = run->stage->used_bytes;
    int64_t bytes = (E + 1) * (int64_t)sizeof(int32_t);
    int32_t *host = ovlm_stack_take(run->stage, bytes);
    run->stage->used_bytes = mark;
    if (run->measuring) {
        return OVLM_OK;
    }
    double start_s = ovlm_run_begin(run);
    OVLM_TRY(run->ops->copy(run->queue, host, offsets, bytes, OVLM_TO_HOST, run->err));
    OVLM_TRY(run->ops->queue_wait(run->queue, run->err));
    for (int64_t e = 0; e < E; e++) {
        pass->own[e] = host[e + 1] - host[e];
    }
    OVLM_TRY(pass->group->share(pass->group->ctx, pass->own, E, counts_of(pass, layer),
                                run->err));
    ovlm_run_end(run, "expert counts", -1, start_s);
    return OVLM_OK;
}

/* Rows that rank r of the group receives in all of a layer's rounds. */
static int64_t total_of(const ovlm_expert_pass *pass, int64_t layer, int64_t r)
{
    const int64_t *count = counts_of(pass, layer);
    int64_t d = pass->group->degree, total = 0;
    for (int64_t e = ovlm_expert_cut(pass->experts, d, r);
         e < ovlm_expert_cut(pass->experts, d, r + 1); e++) {
        for (int64_t from = 0; from < d; from++) {
            total += count[from * pass->experts + e];
        }
    }
    return total;
}

int64_t ovlm_expert_rounds(const ovlm_run *run, const ovlm_expert_pass *pass, int64_t layer)
{
    int64_t most = 0;
    for (int64_t r = 0; r < pass->group->degree && !run->measuring; r++) {
        int64_t total = total_of(pass, layer, r), bound = pass->bound[r];
        int64_t rounds = bound == 0 ? 0 : (total + bound - 1) / bound;
        most = rounds > most ? rounds : most;
    }
    return run->measuring ? 1 : most;
}

/* ---------------------------------------------------------------- a round */

/* Walks the rows of one rank in a round: expert by expert, and of each, source by source. */
typedef struct walk {
    const ovlm_expert_pass *pass;
    const int64_t *count;
    int64_t low, high;      /* the round's part of the order                                   */
    int64_t e, from, base;  /* of the next step                                                */
    int64_t end;            /* the first expert behind the rank's                              */
} walk;

/* A step's rows: of which expert, from whom, how many of them, behind how many others. */
typedef struct stride {
    int64_t e, from, skipped, rows;
} stride;

static walk walk_of(const ovlm_expert_pass *pass, int64_t layer, int64_t i, int64_t r)
{
    int64_t d = pass->group->degree;
    return (walk){.pass = pass, .count = counts_of(pass, layer), .low = i * pass->bound[r],
                  .high = (i + 1) * pass->bound[r],
                  .e = ovlm_expert_cut(pass->experts, d, r),
                  .end = ovlm_expert_cut(pass->experts, d, r + 1)};
}

static bool step(walk *w, stride *s)
{
    if (w->e == w->end) {
        return false;
    }
    int64_t rows = w->count[w->from * w->pass->experts + w->e];
    int64_t first = w->low > w->base ? w->low : w->base;
    int64_t end = least_of(w->high, w->base + rows);
    *s = (stride){.e = w->e, .from = w->from, .skipped = first - w->base,
                  .rows = end > first ? end - first : 0};
    w->base += rows;
    w->from = (w->from + 1) % w->pass->group->degree;
    w->e += w->from == 0;
    return true;
}

/* Which ranges of own rows go where. */
static int64_t find_sent(const ovlm_expert_pass *pass, int64_t layer, int64_t i)
{
    int64_t own = 0, all = 0;
    const int64_t *mine = counts_of(pass, layer) + pass->group->rank * pass->experts;
    for (int64_t r = 0; r < pass->group->degree; r++) {
        walk w = walk_of(pass, layer, i, r);
        stride s;
        pass->sent[r] = 0;
        while (step(&w, &s)) {
            if (s.from != pass->group->rank) {
                continue;
            }
            if (s.rows > 0 && pass->sent[r] == 0) {
                pass->sent_first[r] = own + s.skipped;
            }
            pass->sent[r] += s.rows;
            own += mine[s.e];
        }
        all += pass->sent[r];
    }
    return all;
}

/* How many rows come from whom, and where each expert's begin. */
static int64_t find_came(const ovlm_expert_pass *pass, int64_t layer, int64_t i, int32_t *offsets)
{
    walk w = walk_of(pass, layer, i, pass->group->rank);
    int64_t first = w.e, all = 0;
    stride s;
    memset(pass->came, 0, (size_t)pass->group->degree * sizeof *pass->came);
    offsets[0] = 0;
    while (step(&w, &s)) {
        pass->came[s.from] += s.rows;
        all += s.rows;
        offsets[s.e + 1 - first] = (int32_t)all;
    }
    return all;
}

/* Places of rows in the order of experts among those that came, and the way back. */
static void fill_places(const ovlm_expert_pass *pass, int64_t layer, int64_t i, int32_t *arrived,
                        int32_t *place)
{
    walk w = walk_of(pass, layer, i, pass->group->rank);
    int64_t *next = pass->recv_at, at = 0, row = 0; /* the next exchange sets it anew */
    stride s;
    for (int64_t r = 0; r < pass->group->degree; r++) {
        next[r] = at;
        at += pass->came[r];
    }
    while (step(&w, &s)) {
        for (int64_t k = 0; k < s.rows; k++) {
            arrived[row] = (int32_t)next[s.from];
            place[next[s.from]++] = (int32_t)row++;
        }
    }
}

/* The most rows that this rank can send in a round. */
static int64_t most_sent(const ovlm_expert_pass *pass)
{
    int64_t all = 0;
    for (int64_t r = 0; r < pass->group->degree; r++) {
        all += pass->bound[r];
    }
    return least_of(pass->rows, all);
}

ovlm_status ovlm_expert_round_begin(ovlm_run *run, const ovlm_expert_pass *pass, int64_t layer,
                                    int64_t i, ovlm_stack *stack, ovlm_expert_round *round)
{
    const ovlm_expert_group *group = pass->group;
    int64_t held = ovlm_expert_cut(pass->experts, group->degree, group->rank + 1) -
                   ovlm_expert_cut(pass->experts, group->degree, group->rank);
    int64_t most = pass->bound[group->rank], element = (int64_t)sizeof(int32_t);
    int64_t mark = run->stage->used_bytes;
    int32_t *offsets = ovlm_stack_take(run->stage, (held + 1) * element);
    int32_t *places = ovlm_stack_take(run->stage, 2 * most * element);
    run->stage->used_bytes = mark;
    *round = (ovlm_expert_round){.pass = pass, .rows = most, .sent = most_sent(pass),
                                 .held = held};
    if (!run->measuring) {
        round->sent = find_sent(pass, layer, i);
        round->rows = find_came(pass, layer, i, offsets);
        fill_places(pass, layer, i, places, places + round->rows);
    }
    round->offsets = ovlm_stack_take(stack, (held + 1) * element);
    round->arrived = ovlm_stack_take(stack, 2 * round->rows * element);
    if (run->measuring) {
        return OVLM_OK;
    }
    round->place = round->arrived + round->rows;
    OVLM_TRY(run->ops->copy(run->queue, round->offsets, offsets, (held + 1) * element,
                            OVLM_TO_DEVICE, run->err));
    if (round->rows > 0) {
        OVLM_TRY(run->ops->copy(run->queue, round->arrived, places, 2 * round->rows * element,
                                OVLM_TO_DEVICE, run->err));
    }
    return run->ops->queue_wait(run->queue, run->err); /* the stage is free again */
}

int64_t ovlm_expert_range(const ovlm_expert_round *round, int64_t at, int64_t *rows)
{
    const ovlm_expert_pass *pass = round->pass;
    int64_t before = 0, r = 0;
    while (before < at || pass->sent[r] == 0) {
        before += pass->sent[r++];
    }
    int64_t first = pass->sent_first[r], end = first + pass->sent[r];
    for (r++; r < pass->group->degree; r++) {
        if (pass->sent[r] > 0 && pass->sent_first[r] != end) {
            break;
        }
        end += pass->sent[r];
    }
    *rows = end - first;
    return first;
}

/* ---------------------------------------------------------------- exchanges */

static int64_t row_bytes(const ovlm_tensor *tensor)
{
    return tensor->cols * ovlm_dtype_bytes(tensor->dtype);
}

/* Bytes of the ranks' rows, one rank behind the other. */
static void lay_out(const int64_t *rows, int64_t degree, int64_t of_one, int64_t *bytes,
                    int64_t *at)
{
    int64_t next = 0;
    for (int64_t r = 0; r < degree; r++) {
        bytes[r] = rows[r] * of_one;
        at[r] = next;
        next += bytes[r];
    }
}

static ovlm_status exchange(ovlm_run *run, const ovlm_expert_pass *pass, const int64_t *from,
                            ovlm_tensor send, const int64_t *to, ovlm_tensor recv)
{
    int64_t one = row_bytes(&send), d = pass->group->degree;
    const ovlm_exchange args = {.send = send.data, .send_bytes = pass->send_bytes,
                                .send_at = pass->send_at, .recv = recv.data,
                                .recv_bytes = pass->recv_bytes, .recv_at = pass->recv_at};
    lay_out(from, d, one, pass->send_bytes, pass->send_at);
    lay_out(to, d, one, pass->recv_bytes, pass->recv_at);
    return ovlm_run_exchange(run, pass->group->exchange, pass->group->ctx, &args, send.rows * one,
                             recv.rows * one);
}

ovlm_status ovlm_expert_send(ovlm_run *run, const ovlm_expert_round *round, ovlm_tensor packed,
                             ovlm_tensor received)
{
    return exchange(run, round->pass, round->pass->sent, packed, round->pass->came, received);
}

ovlm_status ovlm_expert_return(ovlm_run *run, const ovlm_expert_round *round,
                               ovlm_tensor received, ovlm_tensor packed)
{
    return exchange(run, round->pass, round->pass->came, received, round->pass->sent, packed);
}
