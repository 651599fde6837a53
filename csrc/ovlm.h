/* ovlm.h - the only public header of the orchvlm C core.
 *
 * Plans a training step of a multimodal model from lengths alone: who encodes which item, which
 * group of GPUs runs which sequences, and which bytes go where - with a proof of how far from
 * the best possible that is.  Plain C11, no Python, no CUDA.
 *
 *   1  status      how calls fail                 4  balance     items over ranks, one phase
 *   2  budget      how long a search may take     5  sequences   sequence-parallel groups
 *   3  cost        what work costs                6  step plan   phases, routes, relabelling
 *   7  simulate    tasks on resources over time   8  backend     compute backends, at run time
 *   9  tensors     views, and where results are rounded
 *
 * Shape letters, used in every comment and docstring of the project:
 *   n items or sequences   N ranks (GPUs)   M micro-batches   P groups   D degrees   k pieces
 *   Q buckets
 *   B batch   T packed tokens   S longest sequence   C channels   L layers   V vocabulary
 *   H query heads   G key/value heads   E experts   K experts per token   F hidden units
 *
 * Arrays are borrowed for the duration of the call unless a comment says "owned".  Every pure
 * function gives the same answer for the same input, seed and work limit on every machine. */
#ifndef OVLM_H
#define OVLM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define OVLM_NODISCARD __attribute__((warn_unused_result))
#define OVLM_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
#else
#define OVLM_NODISCARD
#define OVLM_PRINTF(fmt, args)
#endif

/* ------------------------------------------------------------------ 1  status ---------- */

typedef enum ovlm_status {
    OVLM_OK = 0,
    OVLM_E_ARG,         /* bad shape or value, or provably infeasible: the caller's input      */
    OVLM_E_NOMEM,       /* host or device allocation failed                                    */
    OVLM_E_BACKEND,     /* a backend is not built, not found, has no device, or failed         */
    OVLM_E_COMM,        /* a communicator failed or a peer died                                */
    OVLM_E_UNDECIDED,   /* the limit ended the search before a plan or a proof was found       */
    OVLM_E_INTERRUPTED, /* the caller's poll function asked to stop                            */
    OVLM_E_INTERNAL     /* a plan failed its own check: a bug of this library                  */
} ovlm_status;

/* What failed first: callers forward it untouched. */
typedef struct ovlm_err {
    ovlm_status code;
    int line;
    const char *file; /* static string                                                    */
    char message[400]; /* names the argument, the value, and what to do                   */
} ovlm_err;

/* Name of a status, e.g. "out of memory"; never NULL. */
const char *ovlm_status_name(ovlm_status status);

/* ------------------------------------------------------------------ 2  budget ---------- */

/* How long a search may take.  work_limit counts search steps and is reproducible on every
 * machine; time_limit_s only cuts a search short, and then the result says cut_short. */
typedef struct ovlm_budget {
    int64_t work_limit;  /* search steps; 0 = construct only; negative = the call's default   */
    double time_limit_s; /* wall seconds from the start of the call; <= 0 or inf: no limit    */
    int (*poll)(void *ctx); /* optional; called at least every ~20 ms; non-zero stops the call */
    void *poll_ctx;
} ovlm_budget;

/* ------------------------------------------------------------------ 3  cost ------------ */

/* Cost of a set of items with lengths l on one rank (OrchMLLM 1.3):
 *   f(S) = fixed + per_item*n + linear*sum(l) + quadratic*sum(q)
 *        + padded_linear*n*max(l) + padded_quadratic*n*max(l)^2,       f(empty) = 0.
 * q is l^2, or the item's sum of true segment lengths squared.  All terms >= 0 and finite. */
typedef struct ovlm_batch_cost {
    double linear, quadratic, padded_linear, padded_quadratic, per_item, fixed;
} ovlm_batch_cost;

OVLM_NODISCARD ovlm_status ovlm_batch_cost_check(const ovlm_batch_cost *cost, ovlm_err *err);

/* f(S) of n items with the given sum and maximum of l and sum of q; 0 when n is 0. */
double ovlm_batch_cost_eval(const ovlm_batch_cost *cost, int64_t n, double sum, double sum_q,
                            double max);

/* Cost of a set of sequences on a sequence-parallel group of degree d (FlexSP 2.2), seconds:
 *   T(S, d) = fixed + sum_s( quadratic*s^2*share(d) + (linear + comm[d])*s/d )
 * share(d) = 1/d, or ceil(H/d)/H with heads = H.  Memory in bytes per GPU:
 *   memory_fixed + memory_per_token*sum(s)/d <= memory_limit.
 *
 * With rings, a degree d > H is c = d/h rows of h GPUs, h the largest divisor of d up to H, and
 *   share(d) = ceil(H/h)/H * (2c - 1)/c^2,  and ring*(c - 1) is added to comm[d]:
 * of a causal sequence that lies across all rows the last one has 2 - 1/c times the mean, and reads
 * the keys and values of c - 1 others.  (Where rows hold whole sequences both are less.) */
typedef struct ovlm_sequence_cost {
    double quadratic, linear, fixed;
    double memory_per_token, memory_fixed, memory_limit;
    int64_t heads;         /* 0: attention divides perfectly                                    */
    bool rings;            /* false: degrees above heads are refused                            */
    double ring;           /* GPU-seconds per token, for its keys and values to one more row    */
    int64_t degree_n;      /* D                                                                 */
    const int64_t *degree; /* [D] ascending, positive                                           */
    const double *comm;    /* [D] GPU-seconds per token at that degree                          */
} ovlm_sequence_cost;

OVLM_NODISCARD ovlm_status ovlm_sequence_cost_check(const ovlm_sequence_cost *cost,
                                                    ovlm_err *err);

/* What is the same for all sequences of a group of cost->degree[j]: share(d), and what stands
 * before s/d. */
typedef struct ovlm_sequence_rates {
    double share, per_token;
} ovlm_sequence_rates;
ovlm_sequence_rates ovlm_sequence_cost_rates(const ovlm_sequence_cost *cost, int64_t j);

/* f of the items with those lengths; squares (or NULL: l^2) as in ovlm_balance_problem. */
double ovlm_batch_cost_load(const ovlm_batch_cost *cost, int64_t n, const int64_t *lengths,
                            const double *squares);

/* T of the sequences on a group of cost->degree[j], without the memory limit; 0 for none. */
double ovlm_sequence_cost_time(const ovlm_sequence_cost *cost, int64_t n, const int64_t *lengths,
                               int64_t j);

/* Batches (or sequence-parallel groups) that were timed.  Row i had the lengths
 * length[start[i]] .. length[start[i+1]-1], at least one. */
typedef struct ovlm_measurements {
    int64_t rows;           /* >= 1                                                            */
    const int64_t *start;   /* [rows+1] ascending from 0                                       */
    const int64_t *length;  /* [start[rows]] >= 0                                              */
    const double *square;   /* [start[rows]] >= 0, for `quadratic` of a batch; or NULL: length^2 */
    const int64_t *degree;  /* [rows] >= 1; NULL for ovlm_batch_cost_fit                       */
    const double *seconds;  /* [rows] > 0                                                      */
    const double *bytes;    /* [rows] > 0, per GPU; or NULL                                    */
} ovlm_measurements;

/* Non-negative least squares on relative errors: min sum over rows of (f/seconds - 1)^2.
 * use[6]: which terms may be non-zero, in the order of ovlm_batch_cost.  error[rows] gets
 * f/seconds - 1. */
OVLM_NODISCARD ovlm_status ovlm_batch_cost_fit(const ovlm_measurements *rows, const bool *use,
                                               ovlm_batch_cost *cost, double *error,
                                               ovlm_err *err);

/* The same for T and, where rows->bytes is given, for memory.  On entry cost->heads, rings,
 * degree_n and degree (every measured one) are set; ring becomes 0, comm[D] is filled, cost->comm
 * points to it and memory_limit is left alone.  comm of the smallest degree is 0: the rest of its
 * cost per token is in `linear`.  bytes_error[rows] is needed with bytes only. */
OVLM_NODISCARD ovlm_status ovlm_sequence_cost_fit(const ovlm_measurements *rows,
                                                  ovlm_sequence_cost *cost, double *comm,
                                                  double *error, double *bytes_error,
                                                  ovlm_err *err);

/* ------------------------------------------------------------------ 4  balance --------- */

typedef enum ovlm_plan_status {
    OVLM_PLAN_FEASIBLE = 0, /* a plan, and a bound below it                                     */
    OVLM_PLAN_OPTIMAL = 1   /* the plan meets the bound (to 1e-9 relative)                      */
} ovlm_plan_status;

/* n items onto N ranks so that the largest load is least.  Optional arrays may be NULL.
 *   load[r] = base_load[r] + f(items of r)/speed[r]
 * With home, among the plans whose largest load is at most (1 + slack) times the best one found:
 * least bytes that change their node, then least bytes that change their rank. */
typedef struct ovlm_balance_problem {
    int64_t n, n_ranks;
    const int64_t *lengths;   /* [n] >= 0                                                       */
    const double *squares;    /* [n] >= 0: sum of segment lengths squared; NULL: l^2            */
    const double *item_cost;  /* [n] >= 0: replaces f by the sum of these; NULL: use cost       */
    ovlm_batch_cost cost;
    const int64_t *size;      /* [n] >= 0: second resource, and the bytes that a move costs     */
    const int64_t *capacity;  /* [N] >= 0: limit on the sum of size per rank; needs size        */
    int64_t min_items;        /* per rank, >= 0                                                 */
    int64_t max_items;        /* per rank; negative = no limit                                  */
    const int64_t *together;  /* [n] labels: items of one label share a rank                    */
    const int64_t *pinned;    /* [n] rank, or -1 = free                                         */
    const double *base_load;  /* [N] >= 0                                                       */
    const double *speed;      /* [N] > 0                                                        */
    int64_t group_size;       /* > 0: an item stays among the group of consecutive ranks that
                                 holds its home; needs home and divides N; 0 = anywhere         */
    const int64_t *home;      /* [n] rank where the item is now: move few bytes, in-node first  */
    int64_t node_size;        /* ranks per node, for home; > 0                                  */
    double slack;             /* with home: loads up to (1 + slack)*best are as good            */
    uint64_t seed;
} ovlm_balance_problem;

typedef struct ovlm_balance_result {
    double bound;            /* certified lower bound on the largest load                       */
    ovlm_plan_status status;
    bool cut_short;          /* the clock ended the search: not reproducible                    */
    int64_t work;            /* search steps taken                                              */
} ovlm_balance_result;

/* Fills rank[n] and loads[N] (both the caller's memory).  OVLM_E_ARG names the bad argument, or
 * why no assignment can exist; OVLM_E_UNDECIDED when none was found and none was disproved.
 * O(n log N) at work_limit = 0. */
OVLM_NODISCARD ovlm_status ovlm_balance_solve(const ovlm_balance_problem *problem,
                                              const ovlm_budget *budget, int64_t *rank,
                                              double *loads, ovlm_balance_result *result,
                                              ovlm_err *err);

/* ------------------------------------------------------------------ 5  sequences ------- */

typedef enum ovlm_sp_policy {
    OVLM_SP_STATIC = 0,      /* one degree for the whole step, the best one                     */
    OVLM_SP_HOMOGENEOUS = 1, /* the best degree per micro-batch                                 */
    OVLM_SP_CHUNKED = 2,     /* FlexSP: sorted chunks, then mixed groups in each                */
    OVLM_SP_FLEX = 3         /* micro-batches and groups chosen together                        */
} ovlm_sp_policy;

/* n sequences onto n_gpus over M micro-batches.  Within a micro-batch, groups are aligned blocks
 * of GPUs (inside a node where they fit) and run at the same time; micro-batches follow each
 * other.  Step time = sum over micro-batches of the largest T(S, d) of its groups. */
typedef struct ovlm_sp_problem {
    int64_t n, n_gpus, gpus_per_node;
    const int64_t *lengths;   /* [n] >= 1                                                       */
    ovlm_sequence_cost cost;  /* its degrees are the permitted ones                             */
    int64_t pad_to;           /* shards hold a multiple of this many tokens; >= 1               */
    int64_t micro_batches;    /* at most this many, the rest of them empty; 0 = any             */
    ovlm_sp_policy policy;
    int threads;              /* >= 1; does not change the result under a work limit            */
    uint64_t seed;
    const struct ovlm_sp_plan *warm_start; /* a plan of another batch, for degrees; or NULL     */
} ovlm_sp_problem;

/* A plan as flat arrays; micro-batch m has groups micro_start[m] .. micro_start[m+1]-1, group g
 * has items item[group_start[g]] .. in packed order.  Empty micro-batches have no group.  Groups
 * never have no items. */
typedef struct ovlm_sp_plan {
    int64_t n, n_micro, n_groups; /* n, M, P                                                    */
    int64_t *micro_start;         /* [M+1] owned                                                */
    int64_t *degree, *first_gpu;  /* [P] owned                                                  */
    int64_t *group_start;         /* [P+1] owned                                                */
    int64_t *item;                /* [n] owned, a permutation of 0..n-1                         */
    double *group_time;           /* [P] owned, seconds, T(S, d)                                */
    double time, bound;           /* seconds; bound <= time of any plan, any policy             */
    ovlm_plan_status status;
    bool cut_short;
    int64_t work;
} ovlm_sp_plan;

/* Solves and certifies.  On OVLM_OK the caller owns *plan and frees it with ovlm_sp_plan_free.
 * OVLM_E_ARG: a sequence that fits no degree (message: which, how long, what would fit it), or a
 * proof that micro_batches is too few; OVLM_E_UNDECIDED: no plan found and none disproved. */
OVLM_NODISCARD ovlm_status ovlm_sp_solve(const ovlm_sp_problem *problem,
                                         const ovlm_budget *budget, ovlm_sp_plan **plan,
                                         ovlm_err *err);
void ovlm_sp_plan_free(ovlm_sp_plan *plan); /* NULL is fine */

/* Re-verifies a plan from scratch: every sequence once, memory, GPUs, alignment, times, the sum,
 * bound <= time.  OVLM_E_ARG with the first violation. */
OVLM_NODISCARD ovlm_status ovlm_sp_plan_check(const ovlm_sp_problem *problem,
                                              const ovlm_sp_plan *plan, ovlm_err *err);

/* Certified lower bound alone, rounded down, over all permitted degrees: for at most
 * problem->micro_batches micro-batches, or for any number when that is 0. */
OVLM_NODISCARD ovlm_status ovlm_sp_bound(const ovlm_sp_problem *problem,
                                         const ovlm_budget *budget, double *bound_s,
                                         ovlm_err *err);

/* FlexSP's bucketing (eqs 15-16) and blaster (eqs 23-24): n lengths >= 0, sorted ascending, are cut
 * into min(n_parts, n) consecutive parts so that rounding up to each part's longest adds the fewest
 * tokens, or so that the largest sum of a part is least.  Part of each length in part[n], the
 * longest of each part in longest[n_parts], and how many parts there are. */
OVLM_NODISCARD ovlm_status ovlm_sp_bucket(const int64_t *lengths, int64_t n, int64_t n_parts,
                                          int64_t *part, int64_t *longest, int64_t *n_used,
                                          ovlm_err *err);
OVLM_NODISCARD ovlm_status ovlm_sp_blast(const int64_t *lengths, int64_t n, int64_t n_parts,
                                         int64_t *part, int64_t *longest, int64_t *n_used,
                                         ovlm_err *err);

/* ------------------------------------------------------------------ 6  step plan ------- */

/* Rows on their way between ranks.  Piece p takes rows first_row[p] .. first_row[p]+n_rows[p]-1 of
 * item[p] from row send_row[p] of the source's array to row receive_row[p] of the destination's.
 * Pieces are ordered by (destination, receive_row) and have n_rows > 0.  A valid route moves every
 * row that any rank holds exactly once, so per rank both kinds of rows are 0, 1, 2, ... */
typedef struct ovlm_route {
    int64_t k, n_ranks;
    int64_t *item, *first_row, *n_rows;     /* [k] owned */
    int64_t *source, *destination;          /* [k] owned */
    int64_t *send_row, *receive_row;        /* [k] owned */
} ovlm_route;

/* Room for k pieces, not filled in; released (and zeroed) by ovlm_route_free, which takes a zeroed
 * route too. */
OVLM_NODISCARD ovlm_status ovlm_route_init(ovlm_route *route, int64_t k, int64_t n_ranks,
                                           ovlm_err *err);
void ovlm_route_free(ovlm_route *route);

/* Ranges, order, and that every row leaves once and arrives once.  OVLM_E_ARG: first violation. */
OVLM_NODISCARD ovlm_status ovlm_route_check(const ovlm_route *route, ovlm_err *err);

/* The same, but rows may leave several times, or never: features that two samples share, rows that
 * nobody needs.  Such a route has no inverse and does not compose; the dispatcher takes it. */
OVLM_NODISCARD ovlm_status ovlm_route_check_arrivals(const ovlm_route *route, ovlm_err *err);

/* The way back.  O(k + N). */
OVLM_NODISCARD ovlm_status ovlm_route_invert(const ovlm_route *route, ovlm_route *out,
                                             ovlm_err *err);

/* One route that does what `first` then `second` do (OrchMLLM 1.5: second after first).  What
 * `second` sends must be what `first` delivers, rank by rank.  O(k1 + k2 + N). */
OVLM_NODISCARD ovlm_status ovlm_route_compose(const ovlm_route *first, const ovlm_route *second,
                                              ovlm_route *out, ovlm_err *err);

/* The same way for items whose rows differ in width: a route whose rows are bytes, of a valid one.
 * item_bytes[i] >= 0 is the size of item i in all, laid out where its rows were, in their order.
 * Rows of one item are of one size; an item whose bytes do not divide by its rows travels whole, or
 * OVLM_E_ARG names it.  n_items is above every item of the route.  O(k + n_items). */
OVLM_NODISCARD ovlm_status ovlm_route_bytes(const ovlm_route *route, const int64_t *item_bytes,
                                            int64_t n_items, ovlm_route *out, ovlm_err *err);

/* What a route costs.  seconds is the all-to-all's: over ranks, the largest of what the rank sends
 * or receives inside its node at intra bandwidth and between nodes at inter bandwidth, the two
 * networks working at the same time. */
typedef struct ovlm_traffic {
    double stay_bytes, node_bytes, cross_bytes; /* same rank, same node, between nodes         */
    double worst_bytes; /* max over ranks of max(sent, received) between nodes                */
    double seconds;
} ovlm_traffic;

typedef enum ovlm_relabel_mode {
    OVLM_RELABEL_NONE = 0,
    OVLM_RELABEL_SUM = 1,   /* least bytes between nodes in all                                 */
    OVLM_RELABEL_MINMAX = 2 /* least max over ranks of max(sent, received) between nodes        */
} ovlm_relabel_mode;

/* n flows between mini-batches that look for a rank and ranks that are given.  Mini-batch j is at
 * rank j now, and any two may change places: N names for N ranks (OrchMLLM 1.4).  Direction does
 * not matter, as both objectives treat sending and receiving alike. */
typedef struct ovlm_relabel_problem {
    int64_t n, n_ranks, node_size;
    const int64_t *label;  /* [n] mini-batch, 0..N-1                                            */
    const int64_t *rank;   /* [n] the given end, 0..N-1                                         */
    const int64_t *bytes;  /* [n] >= 0                                                          */
    int64_t n_ties;        /* more flows, which only decide between equals (fewest bytes)       */
    const int64_t *tie_label, *tie_rank, *tie_bytes;
    ovlm_relabel_mode mode;
} ovlm_relabel_problem;

typedef struct ovlm_relabel_result {
    double before, value, bound; /* the objective in bytes: all staying, as found, certified   */
    ovlm_plan_status status;
    bool cut_short;
    int64_t work;
} ovlm_relabel_result;

/* Fills rank_of[N], a permutation.  Never worse than leaving all where they are.  The sum is exact
 * unless the budget ends it; minmax is a search below which `bound` is certified. */
OVLM_NODISCARD ovlm_status ovlm_relabel_solve(const ovlm_relabel_problem *problem,
                                              const ovlm_budget *budget, int64_t *rank_of,
                                              ovlm_relabel_result *result, ovlm_err *err);

/* The items of one encoder: an image, a clip's frame group, a sound. */
typedef struct ovlm_step_items {
    const char *name;           /* for messages */
    int64_t n;
    const int64_t *sample;      /* [n] its sample                                               */
    const int64_t *position;    /* [n] its first token in that sample                           */
    const int64_t *length;      /* [n] >= 0: rows of raw data (patches, frames)                 */
    const int64_t *out_tokens;  /* [n] >= 0: rows of encoder output = tokens in the sample      */
    const int64_t *bytes;       /* [n] >= 0: raw data                                           */
    const double *squares;      /* [n] or NULL: l^2                                             */
    double out_bytes_per_token; /* of encoder output                                            */
    ovlm_batch_cost cost;       /* seconds, forward and backward                                */
    double memory_per_token, memory_fixed; /* bytes per rank; both 0: not limited               */
} ovlm_step_items;

typedef struct ovlm_step_problem {
    int64_t n, n_ranks, gpus_per_node;
    double memory_bytes, intra_bandwidth, inter_bandwidth; /* per GPU; bytes, bytes per second */
    const int64_t *text_tokens;  /* [n] >= 0                                                   */
    const int64_t *source_rank;  /* [n] where the sampler put the sample                       */
    double text_bytes_per_token;
    int64_t n_phases;
    const ovlm_step_items *phase; /* [n_phases] encoders                                       */
    bool sequence_parallel;       /* the language phase: groups, or balanced ranks             */
    ovlm_batch_cost llm_cost;     /* balanced                                                  */
    double llm_memory_per_token, llm_memory_fixed;
    ovlm_sequence_cost sequence_cost; /* groups                                                */
    int64_t pad_to;
    const ovlm_sp_plan *warm_start; /* groups of an earlier step, or NULL                      */
    ovlm_relabel_mode relabel;
    double slack;                 /* loads may grow by this for fewer bytes; < 0: homes ignored */
    bool compose;                 /* encoder outputs in one all-to-all, not by way of the source */
    uint64_t seed;
} ovlm_step_problem;

/* One balanced phase. */
typedef struct ovlm_step_share {
    int64_t n, n_micro;
    int64_t *rank, *micro;    /* [n] owned: item -> rank, micro-batch                          */
    double *loads;            /* [N] owned: seconds, summed over micro-batches                 */
    double time, bound;       /* time = sum over micro-batches of the largest load in it       */
    double sampled_time, sampled_imbalance; /* every item at its source, one micro-batch       */
    ovlm_plan_status status;
} ovlm_step_share;

typedef struct ovlm_step_route {
    ovlm_route route;
    int64_t *place;             /* [k] owned: first row on the destination's packed token axis, all
                                   micro-batches one after the other, padding included; or NULL */
    ovlm_traffic before, after; /* before and after relabelling                                */
} ovlm_step_route;

typedef struct ovlm_step_plan {
    int64_t n, n_ranks, n_phases;
    ovlm_step_share *share;   /* [n_phases + 1] owned; the last is the language phase, empty
                                 when it runs in groups                                         */
    ovlm_sp_plan *sequences;  /* owned, NULL unless it runs in groups                           */
    ovlm_step_route text;     /* text tokens, source -> where they are used                     */
    ovlm_step_route *raw;     /* [n_phases] owned: rows of length, source -> encoder            */
    ovlm_step_route *back;    /* [n_phases] owned: outputs to the source; empty when composed   */
    ovlm_step_route *to_llm;  /* [n_phases] owned: outputs to their token's rank                */
    ovlm_relabel_result *relabel; /* [n_phases + 1] owned, as share                             */
    double exposed_s;         /* transfers that nothing hides, forward and backward             */
    double time, bound;       /* time = phases + exposed_s; bound = of the phases               */
    bool cut_short;
} ovlm_step_plan;

/* Plans a step.  On OVLM_OK the caller owns *plan.  OVLM_E_ARG names the argument, or the item that
 * fits no micro-batch. */
OVLM_NODISCARD ovlm_status ovlm_step_solve(const ovlm_step_problem *problem,
                                           const ovlm_budget *budget, ovlm_step_plan **plan,
                                           ovlm_err *err);
void ovlm_step_plan_free(ovlm_step_plan *plan); /* NULL is fine */

/* An empty plan with room for a problem's decisions, for ovlm_step_plan_rebuild. */
OVLM_NODISCARD ovlm_status ovlm_step_plan_init(const ovlm_step_problem *problem,
                                               ovlm_step_plan **plan, ovlm_err *err);

/* Builds routes, places, traffic and times again from the decisions of a plan: the shares' rank and
 * micro (n_micro of them), sequences, and the bounds.  Of a plan that came from elsewhere. */
OVLM_NODISCARD ovlm_status ovlm_step_plan_rebuild(const ovlm_step_problem *problem,
                                                  ovlm_step_plan *plan, ovlm_err *err);

/* Re-verifies a plan from scratch: shares, memory, routes, places, times, bound <= time. */
OVLM_NODISCARD ovlm_status ovlm_step_plan_check(const ovlm_step_problem *problem,
                                                const ovlm_step_plan *plan, ovlm_err *err);

/* ------------------------------------------------------------------ 7  simulate -------- */

/* A graph of tasks on resources, e.g. one training step: a rank's compute and its link are two
 * resources, a barrier is a task without duration that follows a task of every rank.
 *   - A task may start when all tasks before it have ended; it then queues at all of its resources
 *     at once and starts when it is first in every queue.  It holds them until it ends.
 *   - Tasks join the queues in the order of the times at which they became ready; equal times in
 *     the order of their numbers, after everything that ends at that time.
 * So the result is unique, and no task waits for ever unless the dependencies form a cycle. */
typedef struct ovlm_simulate_problem {
    int64_t n_tasks, n_resources;
    const double *duration_s;    /* [n_tasks] >= 0                                              */
    const int64_t *before_start; /* [n_tasks+1]: task t follows before[before_start[t]] ..      */
    const int64_t *before;
    const int64_t *use_start;    /* [n_tasks+1]: task t holds use[use_start[t]] .., each once   */
    const int64_t *use;
} ovlm_simulate_problem;

/* Fills start_s, end_s and cause [n_tasks], busy_s [n_resources] (the caller's memory) and *time_s,
 * the end of the last task.  cause[t] is the task whose end let t start, -1 at time 0: followed
 * back from the last task it is a critical path.  Every result is checked against the rules above
 * before it is returned.  OVLM_E_ARG names a bad array or a task on a cycle.
 * O((n_tasks + edges + uses) log n_tasks).  `budget` serves its poll and limits; when a limit ends
 * the run, OVLM_E_UNDECIDED. */
OVLM_NODISCARD ovlm_status ovlm_simulate_run(const ovlm_simulate_problem *problem,
                                             const ovlm_budget *budget, double *start_s,
                                             double *end_s, int64_t *cause, double *busy_s,
                                             double *time_s, ovlm_err *err);

/* ------------------------------------------------------------------ 8  backend --------- */

/* A compute backend is a table of functions; csrc/backend/backend.h says which. */
typedef struct ovlm_ops ovlm_ops;

/* Finds the table in the shared object at `path`, which stays loaded for the life of the process.
 * OVLM_E_BACKEND: no such file, not a backend, or built for another version of this library.
 * Touches no device. */
OVLM_NODISCARD ovlm_status ovlm_backend_load(const char *path, const ovlm_ops **ops,
                                             ovlm_err *err);

/* ------------------------------------------------------------------ 9  tensors --------- */

typedef enum ovlm_dtype {
    OVLM_F32 = 0,
    OVLM_BF16,
    OVLM_F16, /* files only */
    OVLM_F64, /* the reference backend, and sums */
    OVLM_I32,
    OVLM_I64,
    OVLM_U8,
    OVLM_DTYPE_COUNT
} ovlm_dtype;

/* Bytes of an element, and the name as NumPy spells it ("bfloat16" for OVLM_BF16). */
int64_t ovlm_dtype_bytes(ovlm_dtype dtype);
const char *ovlm_dtype_name(ovlm_dtype dtype);

/* rows x cols elements at data, `stride` elements from a row to the next.  A borrowed view; a
 * vector has one row; a stack of matrices has their rows one after the other. */
typedef struct ovlm_tensor {
    void *data;
    int64_t rows, cols, stride;
    ovlm_dtype dtype;
} ovlm_tensor;

/* Where every backend rounds.  "storage" is the model's dtype (float32 or bfloat16); everything
 * inside an operation is float32 unless said otherwise, and each output is rounded once, to nearest
 * even.  (The reference computes in float64 and rounds at the same points.)
 *
 *   operation       inputs           inside                                  outputs
 *   linear          storage          products exact, sums float32 over K     y, pre: storage; the
 *                                    in one order for all rows; act and add  pre-activation is
 *                                    on the float32 sum                      rounded for itself
 *   linear dw       storage          sums float32 over T                     float32
 *   residual        storage          add of the float32 result (linear.add)  storage, rounded once
 *   gated           storage          float32                                 storage
 *   norm            storage          mean, variance, 1/sqrt float32          storage, rounded once,
 *                                                                            after the weight
 *   rope            storage          angles, cos, sin, rotation float32;     storage
 *                                    the head norm before it is not rounded
 *   attention       storage          scores and log-sum-exp float32; P       storage
 *                                    float32 on the CPU, storage (bfloat16)
 *                                    before P v on tensor cores
 *   merge           storage; o and   float32                                 o, lse: float32
 *                   lse float32
 *   router          float32 logits   float32                                 float32 weights
 *   combine         storage          float32                                 storage
 *   head            storage          logits and log-sum-exp float32,         logp float32,
 *                                    never stored whole                      loss float64
 *   grad_norm       float32          float64                                 float64
 *   adamw           float32          float32; coefficients float64           w: storage, from the
 *                                                                            float32 master
 * Gradients of activations are stored as the activation is, gradients of weights as float32. */

#ifdef __cplusplus
}
#endif
#endif
