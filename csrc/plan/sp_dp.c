/* sp_dp.c - FlexSP's micro-batch chunking and length bucketing, exactly, faster than as printed. */
#include "plan/sp_dp.h"

#include "base/sort.h"

/* prefix[i] = length[0] + .. + length[i-1]. */
static ovlm_status new_prefix(const int64_t *length, int64_t n, int64_t **prefix,
                              ovlm_arena *arena, ovlm_err *err)
{
    OVLM_TRY(OVLM_ARENA_NEW(arena, prefix, n + 1, err));
    for (int64_t i = 0; i < n; i++) {
        (*prefix)[i + 1] = (*prefix)[i] + length[i];
    }
    return OVLM_OK;
}

/* ------------------------------------------------------------------ chunks --------------- */

/* A cut into chunks of at most `most` tokens each is greedy from either end. */
typedef struct chunking {
    const int64_t *prefix;
    int64_t n, n_micro;
} chunking;

/* Where a chunk that begins at `from` must end; from itself when its first length is too much. */
static int64_t furthest(const chunking *c, int64_t from, int64_t most)
{
    int64_t step = 1, low = from;
    while (low + step <= c->n && c->prefix[low + step] - c->prefix[from] <= most) {
        low += step;
        step *= 2;
    }
    for (; step > 0; step /= 2) {
        if (low + step <= c->n && c->prefix[low + step] - c->prefix[from] <= most) {
            low += step;
        }
    }
    return low;
}

static bool enough(const chunking *c, int64_t most)
{
    int64_t at = 0;
    for (int64_t m = 0; m < c->n_micro && at < c->n; m++) {
        at = furthest(c, at, most);
    }
    return at == c->n;
}

/* The value of eq 24's program, by bisection: fewer chunks can always be split further. */
static int64_t least_largest(const chunking *c)
{
    int64_t high = c->prefix[c->n], low = high / c->n_micro - 1; /* not enough, or below zero */
    while (high - low > 1) {
        int64_t middle = low + (high - low) / 2;
        if (enough(c, middle)) {
            high = middle;
        } else {
            low = middle;
        }
    }
    return high;
}

/* begin[m] = the earliest cut from which the chunks m.. can still hold the rest. */
static void earliest_cuts(const chunking *c, int64_t most, int64_t *begin)
{
    begin[c->n_micro] = c->n;
    for (int64_t m = c->n_micro - 1, at = c->n; m >= 0; m--) {
        int64_t end = at;
        while (at > 0 && c->prefix[end] - c->prefix[at - 1] <= most) {
            at--;
        }
        at = at < m ? m : at; /* a length for each chunk before */
        begin[m] = at;
    }
}

/* Of all cuts with the least largest sum one near equal sums: no chunk is short without need. */
ovlm_status sp_blast(const int64_t *length, int64_t n, int64_t n_micro, int64_t *begin,
                     ovlm_arena *arena, ovlm_err *err)
{
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    int64_t *prefix;
    OVLM_TRY(new_prefix(length, n, &prefix, arena, err));
    chunking c = {prefix, n, n_micro};
    int64_t most = least_largest(&c), cut = 0;
    earliest_cuts(&c, most, begin);
    begin[0] = 0;
    for (int64_t m = 1; m < n_micro; m++) {
        int64_t last = furthest(&c, begin[m - 1], most), latest = n - (n_micro - m);
        double fair = (double)prefix[n] / (double)n_micro * (double)m;
        while (cut < n && (double)prefix[cut] < fair) {
            cut++;
        }
        int64_t first = begin[m] > begin[m - 1] ? begin[m] : begin[m - 1] + 1;
        last = last < latest ? last : latest;
        begin[m] = cut < first ? first : (cut < last ? cut : last);
    }
    ovlm_arena_rewind(arena, mark);
    return OVLM_OK;
}

/* ------------------------------------------------------------------ buckets -------------- */

typedef struct bucketing {
    const int64_t *length, *prefix;
    const int64_t *last; /* err[.][q-1]; INT64_MAX: impossible                       */
    int64_t *now;        /* err[.][q]                                                */
    int64_t *choice;     /* the j of each                                            */
} bucketing;

/* eq 16: err[j][q-1] + sum over i in j..k-1 of (length[k-1] - length[i]). */
static int64_t bucket_cost(const bucketing *b, int64_t j, int64_t k)
{
    return b->last[j] + b->length[k - 1] * (k - j) - (b->prefix[k] - b->prefix[j]);
}

/* Fills k in [k0, k1], knowing that the best j lies in [j0, j1].  length[k-1] grows with k, so a
 * larger j only gains: the best j never moves back, and halving k halves the work (q log n in all
 * for each length instead of q n). */
static void bucket_range(const bucketing *b, int64_t k0, int64_t k1, int64_t j0, int64_t j1)
{
    while (k0 <= k1) {
        int64_t k = k0 + (k1 - k0) / 2, best = INT64_MAX, at = j0;
        for (int64_t j = j0; j <= j1 && j < k; j++) {
            if (bucket_cost(b, j, k) < best) {
                best = bucket_cost(b, j, k);
                at = j;
            }
        }
        b->now[k] = best;
        b->choice[k] = at;
        bucket_range(b, k0, k - 1, j0, at);
        k0 = k + 1;
        j0 = at;
    }
}

ovlm_status sp_bucket(const int64_t *length, int64_t n, int64_t n_buckets, int64_t *begin,
                      ovlm_arena *arena, ovlm_err *err)
{
    ovlm_arena_mark mark = ovlm_arena_save(arena);
    ovlm_status status = OVLM_OK;
    int64_t *prefix, *last, *now, *choice;
    OVLM_GOTO(done, new_prefix(length, n, &prefix, arena, err));
    OVLM_GOTO(done, OVLM_ARENA_NEW(arena, &last, n + 1, err));
    OVLM_GOTO(done, OVLM_ARENA_NEW(arena, &now, n + 1, err));
    if (n_buckets + 1 > INT64_MAX / (n + 1)) {
        OVLM_GOTO(done, OVLM_FAIL(err, OVLM_E_NOMEM, "too many buckets"));
    }
    OVLM_GOTO(done, OVLM_ARENA_NEW(arena, &choice, (n_buckets + 1) * (n + 1), err));
    for (int64_t k = 1; k <= n; k++) { /* q = 1: everything below k in one bucket */
        last[k] = length[k - 1] * k - prefix[k];
    }
    for (int64_t q = 2; q <= n_buckets; q++) {
        bucketing b = {length, prefix, last, now, choice + q * (n + 1)};
        bucket_range(&b, q, n, q - 1, n - 1);
        int64_t *swap = last;
        last = now;
        now = swap;
    }
    begin[n_buckets] = n;
    for (int64_t q = n_buckets; q > 0; q--) { /* the choices of the last row, back to the cuts */
        begin[q - 1] = choice[q * (n + 1) + begin[q]];
    }
done:
    ovlm_arena_rewind(arena, mark);
    return status;
}

/* ------------------------------------------------------------------ public calls --------- */

/* Checks, sorts into `sorted` (ascending) and says where each came from. */
static ovlm_status sort_lengths(const int64_t *lengths, int64_t n, int64_t **sorted,
                                int64_t **order, ovlm_arena *arena, ovlm_err *err)
{
    int64_t longest = 0;
    for (int64_t i = 0; i < n; i++) {
        if (lengths[i] < 0) {
            return OVLM_FAIL(err, OVLM_E_ARG, "lengths must be >= 0; lengths[%lld] is %lld",
                             (long long)i, (long long)lengths[i]);
        }
        longest = lengths[i] > longest ? lengths[i] : longest;
    }
    if (n > 0 && longest > ((int64_t)1 << 62) / (n + 1)) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "lengths are too large: %lld of up to %lld tokens pass 2^62",
                         (long long)n, (long long)longest);
    }
    OVLM_TRY(OVLM_ARENA_NEW(arena, sorted, n, err));
    OVLM_TRY(OVLM_ARENA_NEW(arena, order, n, err));
    OVLM_TRY(ovlm_sort_i64(lengths, n, *order, arena, err));
    for (int64_t i = 0; i < n / 2; i++) { /* descending to ascending */
        int64_t swap = (*order)[i];
        (*order)[i] = (*order)[n - 1 - i];
        (*order)[n - 1 - i] = swap;
    }
    for (int64_t i = 0; i < n; i++) {
        (*sorted)[i] = lengths[(*order)[i]];
    }
    return OVLM_OK;
}

typedef ovlm_status (*splitter)(const int64_t *, int64_t, int64_t, int64_t *, ovlm_arena *,
                                ovlm_err *);

/* Splits the sorted lengths into at most n_parts; part[i] and the number of parts. */
static ovlm_status split(splitter splits, const int64_t *lengths, int64_t n, int64_t n_parts,
                         int64_t *part, int64_t *largest, int64_t *parts, ovlm_err *err)
{
    ovlm_arena arena = {0};
    ovlm_status status = OVLM_OK;
    int64_t *sorted, *order, *begin;
    *parts = n_parts < n ? n_parts : n;
    if (n_parts < 1) {
        return OVLM_FAIL(err, OVLM_E_ARG, "the number of parts must be >= 1; got %lld",
                         (long long)n_parts);
    }
    if (n == 0) {
        return OVLM_OK;
    }
    OVLM_GOTO(done, sort_lengths(lengths, n, &sorted, &order, &arena, err));
    OVLM_GOTO(done, OVLM_ARENA_NEW(&arena, &begin, *parts + 1, err));
    OVLM_GOTO(done, splits(sorted, n, *parts, begin, &arena, err));
    for (int64_t q = 0; q < *parts; q++) {
        for (int64_t i = begin[q]; i < begin[q + 1]; i++) {
            part[order[i]] = q;
        }
        largest[q] = sorted[begin[q + 1] - 1];
    }
done:
    ovlm_arena_free(&arena);
    return status;
}

ovlm_status ovlm_sp_bucket(const int64_t *lengths, int64_t n, int64_t n_parts, int64_t *part,
                           int64_t *longest, int64_t *n_used, ovlm_err *err)
{
    return split(sp_bucket, lengths, n, n_parts, part, longest, n_used, err);
}

ovlm_status ovlm_sp_blast(const int64_t *lengths, int64_t n, int64_t n_parts, int64_t *part,
                          int64_t *longest, int64_t *n_used, ovlm_err *err)
{
    return split(sp_blast, lengths, n, n_parts, part, longest, n_used, err);
}
