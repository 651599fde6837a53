/* comm_reduce.c - reductions above the engine: ranks exchange pieces, each adds what it owns in the
 * order of the ranks, and the sums are gathered.
 *
 * Per element of an all-reduce a rank sends and receives 2 (N-1)/N elements.  A piece bounds the
 * scratch memory whatever the size of the call. */
#include "backend/comm_state.h"

#include "base/bf16.h"

enum {
    PIECE_BYTES = 4 << 20,
    GATHER_BYTES = 1 << 15, /* up to this much of all ranks together, one gathering is faster   */
    BLOCK = 256
};

/* ---------------------------------------------------------------- sums */

#define SAME(x) (x)
#define ADD(a, x) ((a) + (x))
/* The order of the comparisons lets a NaN on either side through. */
#define MORE(a, x) ((x) > (a) || (x) != (x) ? (x) : (a))
#define LESS(a, x) ((x) < (a) || (x) != (x) ? (x) : (a))
#define MORE_INT(a, x) ((x) > (a) ? (x) : (a))
#define LESS_INT(a, x) ((x) < (a) ? (x) : (a))

#define REDUCTION(name, type, wide, FROM, TO, COMBINE)                                      \
    static void name(void *out, const void *const *part, int64_t parts, int64_t n)          \
    {                                                                                       \
        for (int64_t first = 0; first < n; first += BLOCK) {                                \
            wide acc[BLOCK]; /* out may be one of the parts: written when all were read */  \
            int64_t count = n - first < BLOCK ? n - first : BLOCK;                          \
            const type *in = (const type *)part[0] + first;                                 \
            for (int64_t i = 0; i < count; i++) {                                           \
                acc[i] = FROM(in[i]);                                                       \
            }                                                                               \
            for (int64_t p = 1; p < parts; p++) {                                           \
                in = (const type *)part[p] + first;                                         \
                for (int64_t i = 0; i < count; i++) {                                       \
                    wide x = FROM(in[i]);                                                   \
                    acc[i] = COMBINE(acc[i], x);                                            \
                }                                                                           \
            }                                                                               \
            for (int64_t i = 0; i < count; i++) {                                           \
                ((type *)out)[first + i] = TO(acc[i]);                                      \
            }                                                                               \
        }                                                                                   \
    }

REDUCTION(f32_sum, float, float, SAME, SAME, ADD)
REDUCTION(f32_max, float, float, SAME, SAME, MORE)
REDUCTION(f32_min, float, float, SAME, SAME, LESS)
REDUCTION(f64_sum, double, double, SAME, SAME, ADD)
REDUCTION(f64_max, double, double, SAME, SAME, MORE)
REDUCTION(f64_min, double, double, SAME, SAME, LESS)
REDUCTION(bf16_sum, uint16_t, float, ovlm_math_from_bf16, ovlm_math_to_bf16, ADD)
REDUCTION(bf16_max, uint16_t, float, ovlm_math_from_bf16, ovlm_math_to_bf16, MORE)
REDUCTION(bf16_min, uint16_t, float, ovlm_math_from_bf16, ovlm_math_to_bf16, LESS)
REDUCTION(i64_sum, uint64_t, uint64_t, SAME, SAME, ADD)
REDUCTION(i64_max, int64_t, int64_t, SAME, SAME, MORE_INT)
REDUCTION(i64_min, int64_t, int64_t, SAME, SAME, LESS_INT)
REDUCTION(i32_sum, uint32_t, uint32_t, SAME, SAME, ADD)
REDUCTION(i32_max, int32_t, int32_t, SAME, SAME, MORE_INT)
REDUCTION(i32_min, int32_t, int32_t, SAME, SAME, LESS_INT)

void ovlm_comm_reduce_parts(void *out, const void *const *part, int64_t parts, int64_t n,
                            ovlm_dtype dtype, ovlm_reduce reduce)
{
    static void (*const table[OVLM_DTYPE_COUNT][3])(void *, const void *const *, int64_t,
                                                    int64_t) = {
        [OVLM_F32] = {f32_sum, f32_max, f32_min},    [OVLM_F64] = {f64_sum, f64_max, f64_min},
        [OVLM_BF16] = {bf16_sum, bf16_max, bf16_min}, [OVLM_I64] = {i64_sum, i64_max, i64_min},
        [OVLM_I32] = {i32_sum, i32_max, i32_min}};
    if (n > 0) {
        table[dtype][reduce](out, part, parts, n);
    }
}

/* ---------------------------------------------------------------- exchanges */

/* Arrays of one call: what goes where, and what comes. */
typedef struct piece {
    int64_t *send_bytes, *send_at, *recv_bytes, *recv_at;
    const void **part;
    char *scratch;
} piece;

static ovlm_status open_piece(ovlm_comm *comm, int64_t scratch_bytes, piece *p, ovlm_err *err)
{
    OVLM_TRY(OVLM_ARENA_NEW(&comm->arena, &p->send_bytes, comm->size, err));
    OVLM_TRY(OVLM_ARENA_NEW(&comm->arena, &p->send_at, comm->size, err));
    OVLM_TRY(OVLM_ARENA_NEW(&comm->arena, &p->recv_bytes, comm->size, err));
    OVLM_TRY(OVLM_ARENA_NEW(&comm->arena, &p->recv_at, comm->size, err));
    OVLM_TRY(OVLM_ARENA_NEW(&comm->arena, &p->part, comm->size, err));
    return OVLM_ARENA_RAW(&comm->arena, &p->scratch, scratch_bytes, err);
}

/* Every rank's `bytes` come to scratch, one after the other. */
static void lay_parts(const ovlm_comm *comm, int64_t bytes, piece *p)
{
    for (int64_t r = 0; r < comm->size; r++) {
        p->recv_bytes[r] = bytes;
        p->recv_at[r] = r * bytes;
        p->part[r] = p->scratch + r * bytes;
    }
}

/* This rank's own part is added from where it is. */
static void keep_own(const ovlm_comm *comm, const void *send, piece *p)
{
    p->part[comm->rank] = send;
    p->send_bytes[comm->rank] = 0;
    p->recv_bytes[comm->rank] = 0;
}

/* Few elements: everybody gets all of them and adds for itself, in the same order. */
static ovlm_status reduce_small(ovlm_comm *comm, const ovlm_comm_label *label,
                                const ovlm_all_reduce *args, ovlm_err *err)
{
    const int64_t bytes = args->n * ovlm_dtype_bytes(args->dtype);
    piece p = {0};
    OVLM_TRY(open_piece(comm, bytes * comm->size, &p, err));
    lay_parts(comm, bytes, &p);
    const ovlm_all_gather gather = {.send = args->send, .recv = p.scratch,
                                    .recv_bytes = p.recv_bytes, .recv_at = p.recv_at,
                                    .stream = args->stream};
    OVLM_TRY(comm->engine->all_gather(comm->self, label, &gather, err));
    ovlm_comm_reduce_parts(args->recv, p.part, comm->size, args->n, args->dtype, args->reduce);
    return OVLM_OK;
}

/* m elements from `first` on: rank r adds those from m*r/N to m*(r+1)/N. */
static ovlm_status reduce_piece(ovlm_comm *comm, ovlm_comm_label *label,
                                const ovlm_all_reduce *args, int64_t first, int64_t m, piece *p,
                                ovlm_err *err)
{
    const int64_t n = comm->size, size = ovlm_dtype_bytes(args->dtype);
    const int64_t low = m * comm->rank / n, share = m * (comm->rank + 1) / n - low;
    char *mine = (char *)args->recv + (first + low) * size;
    for (int64_t r = 0; r < n; r++) {
        p->send_at[r] = (first + m * r / n) * size;
        p->send_bytes[r] = (first + m * (r + 1) / n) * size - p->send_at[r];
    }
    lay_parts(comm, share * size, p);
    keep_own(comm, (const char *)args->send + (first + low) * size, p);
    const ovlm_all_to_all exchange = {.send = args->send, .send_bytes = p->send_bytes,
                                      .send_at = p->send_at, .recv = p->scratch,
                                      .recv_bytes = p->recv_bytes, .recv_at = p->recv_at,
                                      .stream = args->stream};
    OVLM_TRY(comm->engine->all_to_all(comm->self, label, &exchange, err));
    label->piece++;
    ovlm_comm_reduce_parts(mine, p->part, n, share, args->dtype, args->reduce);
    p->send_bytes[comm->rank] = share * size;
    const ovlm_all_gather gather = {.send = mine, .recv = args->recv,
                                    .recv_bytes = p->send_bytes, .recv_at = p->send_at,
                                    .stream = args->stream};
    OVLM_TRY(comm->engine->all_gather(comm->self, label, &gather, err));
    label->piece++;
    return OVLM_OK;
}

ovlm_status ovlm_comm_run_all_reduce(ovlm_comm *comm, const ovlm_comm_label *label,
                                     const ovlm_all_reduce *args, ovlm_err *err)
{
    const int64_t size = ovlm_dtype_bytes(args->dtype), most = PIECE_BYTES / size;
    ovlm_comm_label now = *label;
    piece p = {0};
    if (args->n <= GATHER_BYTES / size / comm->size) {
        return reduce_small(comm, label, args, err);
    }
    OVLM_TRY(open_piece(comm, PIECE_BYTES + comm->size * size, &p, err));
    for (int64_t first = 0; first < args->n; first += most) {
        int64_t m = args->n - first < most ? args->n - first : most;
        OVLM_TRY(reduce_piece(comm, &now, args, first, m, &p, err));
    }
    return OVLM_OK;
}

ovlm_status ovlm_comm_run_reduce_scatter(ovlm_comm *comm, const ovlm_comm_label *label,
                                         const ovlm_reduce_scatter *args, ovlm_err *err)
{
    const int64_t n = comm->size, size = ovlm_dtype_bytes(args->dtype);
    const int64_t most = PIECE_BYTES / size / n > 0 ? PIECE_BYTES / size / n : 1;
    ovlm_comm_label now = *label;
    int64_t longest = 0;
    piece p = {0};
    OVLM_TRY(open_piece(comm, n * most * size, &p, err));
    for (int64_t r = 0; r < n; r++) {
        longest = args->counts[r] > longest ? args->counts[r] : longest;
    }
    /* Also for nothing at all there is one exchange: the other ranks may see it otherwise. */
    for (int64_t first = 0; first == 0 || first < longest; first += most) {
        int64_t at = 0, mine = 0;
        for (int64_t r = 0; r < n; r++) {
            int64_t left = args->counts[r] - first, m = left < 0 ? 0 : left < most ? left : most;
            p.send_bytes[r] = m * size;
            p.send_at[r] = (at + (m > 0 ? first : 0)) * size;
            mine = r == comm->rank ? m : mine;
            at += args->counts[r];
        }
        lay_parts(comm, mine * size, &p);
        keep_own(comm, (const char *)args->send + p.send_at[comm->rank], &p);
        const ovlm_all_to_all exchange = {.send = args->send, .send_bytes = p.send_bytes,
                                          .send_at = p.send_at, .recv = p.scratch,
                                          .recv_bytes = p.recv_bytes, .recv_at = p.recv_at,
                                          .stream = args->stream};
        OVLM_TRY(comm->engine->all_to_all(comm->self, &now, &exchange, err));
        now.piece++;
        if (mine > 0) {
            ovlm_comm_reduce_parts((char *)args->recv + first * size, p.part, n, mine,
                                   args->dtype, args->reduce);
        }
    }
    return OVLM_OK;
}
