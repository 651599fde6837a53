/* ops.h - the operations of a compute backend: one struct of arguments each, used by the forward
 * and by the backward.
 *
 * Rules that hold for every operation:
 *   - It is put on a queue and returns at once; its arguments are copied, so the struct may die.
 *     A bad argument is refused before anything runs, by one validator for all backends
 *     (op_check.h).  A late failure stays on the queue and names its operation.
 *   - Tensors and pointers are device memory.  Host code never reads them; sizes that only the
 *     device knows (experts' rows, segments) come as device arrays with bounds.
 *   - It never allocates.  `measure` tells from shapes alone (data pointers may be NULL; rows, n
 *     and max_len are then bounds) how many bytes `saved` (written by the forward, read by the
 *     backward) and `work` (scratch of one call) need; both are 64-byte aligned.  `prepare` builds
 *     plans and tunes outside the step.
 *   - Optional tensors are left out by cols = 0.  A tensor with rows = 0 is present and empty.
 *   - Gradients of activations (dx) have the dtype of x and are overwritten, or added to when
 *     dx_beta is 1.  Gradients of weights (dw) are float32 (float64 in `ref`), overwritten or added
 *     to by dw_beta.  A gradient that is left out is not computed.
 *   - A row of the result never depends on the other rows of the call, to the last bit: the order
 *     of sums over K, a head or a segment is fixed by the shape of that row alone.
 *   - Outputs do not overlap inputs unless the comment says "may be", and then they are the same
 *     view.  x and w have one dtype; results may have another.
 *   - A pass reads and writes the members that the tables of op_schema.h give it and no others:
 *     what only a gradient that is left out would need may be left out too.
 * Rounding points are in ovlm.h, section 9.  Also read by C++: no C-only construct here. */
#ifndef OVLM_BACKEND_OPS_H
#define OVLM_BACKEND_OPS_H

#include "ovlm.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Scratch of a call; see `measure`. */
typedef struct ovlm_scratch {
    void *saved, *work;
} ovlm_scratch;

typedef struct ovlm_op_bytes {
    int64_t saved, fwd_work, bwd_work;
} ovlm_op_bytes;

/* n runs of consecutive rows: run i is start[i] .. start[i] + length[i] - 1.  With length NULL,
 * start has n + 1 entries and length[i] = start[i+1] - start[i]. */
typedef struct ovlm_segments {
    int64_t n, max_len;          /* max_len bounds every length */
    const int32_t *start;        /* device */
    const int32_t *length;       /* device, or NULL */
    const int32_t *host_start;   /* the same on the host, for backends that plan there; or NULL */
    const int32_t *host_length;
} ovlm_segments;

typedef enum ovlm_act {
    OVLM_ACT_NONE = 0,
    OVLM_ACT_GELU_ERF,   /* x/2 (1 + erf(x/sqrt 2))                        */
    OVLM_ACT_GELU_TANH,  /* x/2 (1 + tanh(sqrt(2/pi)(x + 0.044715 x^3)))   */
    OVLM_ACT_QUICK_GELU, /* x sigmoid(1.702 x)                             */
    OVLM_ACT_SILU        /* x sigmoid(x)                                   */
} ovlm_act;

/* y = act(x w^T + bias) + add.  Backward: dpre = dy act'(pre); dx = dpre w, dw = dpre^T x,
 * dbias = sum of dpre over rows.  (The gradient of add is dy itself.) */
typedef struct ovlm_linear {
    ovlm_scratch scratch;
    ovlm_tensor x;    /* [T,K]                                                     */
    ovlm_tensor w;    /* [N,K], or [K,N] with w_kn                                 */
    bool w_kn;
    ovlm_tensor bias; /* [1,N] or left out                                         */
    ovlm_act act;
    ovlm_tensor pre;  /* [T,N] written by the forward: needed by the backward of an act */
    ovlm_tensor add;  /* [T,N] or left out; may be y                               */
    ovlm_tensor y;    /* [T,N]                                                     */
    ovlm_tensor dy;   /* [T,N]                                                     */
    ovlm_tensor dx, dw, dbias;
    float dx_beta, dw_beta; /* 0 or 1                                              */
} ovlm_linear;

/* A linear layer per expert: of all rows, offsets[e] .. offsets[e+1]-1 belong to expert e, whose
 * weight is w's rows e*N .. (or e*K .. with w_kn).  A call does R of them, from `first` on, which
 * are rows 0 .. R-1 of its tensors: a chunk, with the offsets clipped to it.  x's row of row r is
 * index[r], or r without index; dx always has a row per r.  Experts without rows in the call get
 * dw = 0 (or keep it, with dw_beta). */
typedef struct ovlm_grouped_linear {
    ovlm_scratch scratch;
    int64_t groups;              /* E                                              */
    int64_t first;               /* >= 0                                           */
    const int32_t *offsets;      /* [E+1] device                                   */
    const int32_t *host_offsets; /* [E+1], or NULL                                 */
    const int32_t *index;        /* [R] device, or NULL                            */
    ovlm_tensor x;               /* [T,K]                                          */
    ovlm_tensor w;               /* [E*N,K], or [E*K,N] with w_kn                  */
    bool w_kn;
    ovlm_tensor y;               /* [R,N]; rows of no expert are not written    */
    ovlm_tensor dy;              /* [R,N]                                          */
    ovlm_tensor dx;              /* [R,K]                                          */
    ovlm_tensor dw;
    float dx_beta, dw_beta;
} ovlm_grouped_linear;

/* y = act(gate) * up, gate_up [T,2F] with the gate's columns first; alone: y = act(gate_up), for a
 * layer to whose product something is added before its activation. */
typedef struct ovlm_gated {
    ovlm_scratch scratch;
    ovlm_act act;
    bool alone;
    ovlm_tensor gate_up; /* [T,2F], or [T,F] alone */
    ovlm_tensor y;       /* [T,F]  */
    ovlm_tensor dy, dgate_up; /* dgate_up may be gate_up */
} ovlm_gated;

/* LayerNorm, or RMSNorm with rms, over each of `groups` equal parts of a row. */
typedef struct ovlm_norm {
    ovlm_scratch scratch;
    bool rms;
    double eps;
    int64_t groups;       /* >= 1, divides C                                        */
    ovlm_tensor x;        /* [T,C]                                                  */
    ovlm_tensor w, bias;  /* [1,C/groups]; bias may be left out                     */
    ovlm_tensor y;        /* [T,C]                                                  */
    ovlm_tensor dy, dx, dw, dbias;
    float dx_beta, dw_beta;
} ovlm_norm;

/* cos and sin of position[axis[r]][t] * frequency[r].  Forward only. */
typedef struct ovlm_rope_table {
    ovlm_scratch scratch;
    ovlm_tensor position;  /* [A,T] float32          */
    ovlm_tensor frequency; /* [1,R] float32          */
    const int32_t *axis;   /* [R] device             */
    ovlm_tensor cos, sin;  /* [T,R] float32          */
} ovlm_rope_table;

/* Per head of D: optional RMSNorm with weight w, then the first 2R elements are turned by the
 * table: element i with i+R (rotate_half), or 2i with 2i+1 when interleaved. */
typedef struct ovlm_rope {
    ovlm_scratch scratch;
    int64_t heads;
    bool interleaved;
    double eps;
    ovlm_tensor x;        /* [T,heads*D]                                            */
    ovlm_tensor w;        /* [1,D], or left out: no norm                            */
    ovlm_tensor cos, sin; /* [T,R] float32                                          */
    ovlm_tensor y;        /* [T,heads*D]; may be x when there is no norm            */
    ovlm_tensor dy, dx;   /* dx may be dy                                           */
    ovlm_tensor dw;
    float dw_beta;
} ovlm_rope;

/* o = softmax(scale q k^T + mask) v per segment and head; query head h reads key/value head
 * h*kv_heads/heads.  Query segment i meets key segment i.  causal is bottom-right: query row j of
 * nq sees keys 0 .. nk - nq + j.  A row that sees no key gives 0.
 * lse is log sum_j exp(scale q_i k_j) over the keys that a row sees, -infinity where it sees none.
 * With it the forward keeps nothing for the backward, which reads o and lse: where these are of
 * more keys than k holds (merge), the gradients are the part that these keys have in them. */
typedef struct ovlm_attention {
    ovlm_scratch scratch;
    int64_t heads, kv_heads;
    bool causal;
    double scale;
    ovlm_segments query, key;
    ovlm_tensor q; /* [Tq,heads*D]         */
    ovlm_tensor k; /* [Tk,kv_heads*D]      */
    ovlm_tensor v; /* [Tk,kv_heads*Dv]     */
    ovlm_tensor o; /* [Tq,heads*Dv], rows outside every segment are not written */
    ovlm_tensor lse; /* [Tq,heads] float32, or left out; as o */
    ovlm_tensor dout; /* [Tq,heads*Dv] */
    ovlm_tensor dq, dk, dv; /* overwritten; rows outside every segment are not written */
} ovlm_attention;

/* Attention over two sets of keys, from what it gives on each: with m = log(e^lse + e^part_lse) per
 * row and head, o = e^(lse - m) o + e^(part_lse - m) part and lse = m; where both are -infinity,
 * nothing changes.  Forward only. */
typedef struct ovlm_merge {
    ovlm_scratch scratch;
    int64_t heads;
    ovlm_tensor o;        /* [T,heads*Dv] float32 */
    ovlm_tensor lse;      /* [T,heads] float32    */
    ovlm_tensor part;     /* [T,heads*Dv]         */
    ovlm_tensor part_lse; /* [T,heads] float32    */
} ovlm_merge;

/* y[t] = sum_j weight[t][j] x[index[t][j]] (+ y); an index < 0 adds nothing; weight left out: 1.
 * Backward: dx[index[t][j]] += weight[t][j] dy[t], in an order that is fixed.  unique promises that
 * no row of x is read twice, so that no sorting is needed. */
typedef struct ovlm_gather {
    ovlm_scratch scratch;
    int64_t taps;
    bool unique;
    const int32_t *index; /* [T*taps] device, in [-1, x.rows)             */
    ovlm_tensor weight;   /* [T,taps] float32, or left out                */
    ovlm_tensor x;        /* [S,C]                                        */
    ovlm_tensor y;        /* [T,C]                                        */
    float y_beta;         /* 0: rows without a tap become 0; 1: add to y  */
    ovlm_tensor dy, dx;   /* dx [S,C]: x's dtype or float32               */
    float dx_beta;
} ovlm_gather;

/* y = alpha * scale * x + shift + beta * y, in any pair of dtypes.  Backward: dx = alpha * scale *
 * dy + dx_beta * dx.  Casts, sums, pixel normalisation, moving averages. */
typedef struct ovlm_scale {
    ovlm_scratch scratch;
    double alpha, beta;
    ovlm_tensor scale, shift; /* [1,C] float32, or left out: 1 and 0 */
    ovlm_tensor x, y;         /* [T,C]; y may be x                   */
    ovlm_tensor dy, dx;
    float dx_beta;
} ovlm_scale;

/* Patches of an image-like tensor for a convolution as a linear layer: y's columns are (channel,
 * row, column) of the kernel, zero outside.  Rows of x are (image, row, column).  A kernel as high
 * as the image and one wide turns (row, column) rows of channels into one row per column. */
typedef struct ovlm_unfold {
    ovlm_scratch scratch;
    int64_t images, height, width, kernel_height, kernel_width, stride, padding;
    ovlm_tensor x;      /* [images*height*width, C]                            */
    ovlm_tensor y;      /* [images*out_h*out_w, C*kernel_height*kernel_width]  */
    ovlm_tensor dy, dx; /* dx is overwritten                                   */
} ovlm_unfold;

/* Router of a mixture of experts.  score = softmax(logits), or sigmoid(logits); the k experts with
 * the largest score (+ bias; among the `limit` of `teams` equal teams whose two best sum highest)
 * are taken, ties to the lower number, and listed in ascending order, so that a token's rows ascend
 * and are summed alike whatever chunks they come in; weight = scale * score / (normalise: sum of
 * the taken scores (+ 1e-20 for sigmoid)).  replay: expert[] is given, so that recomputation cannot
 * choose anew.
 * Rows sorted by (expert, token): row[t][j] is slot (t, j)'s, token[row] and offsets[E+1] the way
 * back.  count and score_sum are added to.
 * Backward, from logits and expert: dlogits from dweight, plus aux[e] * dscore[e]: the slope of a
 * loss on mean scores. */
typedef struct ovlm_router {
    ovlm_scratch scratch;
    int64_t k, teams, limit;   /* teams = 1: no teams */
    bool sigmoid, normalise, replay;
    double scale;
    ovlm_tensor logits;        /* [T,E] float32                       */
    ovlm_tensor bias;          /* [1,E] float32, or left out          */
    int32_t *expert;           /* [T*k] device                        */
    ovlm_tensor weight;        /* [T,k] float32                       */
    int32_t *row, *token, *offsets; /* [T*k], [T*k], [E+1] device     */
    int64_t *count;            /* [E] device, or NULL                 */
    double *score_sum;         /* [E] device, or NULL                 */
    ovlm_tensor dweight;       /* [T,k] float32                       */
    ovlm_tensor aux;           /* [1,E] float32, or left out          */
    ovlm_tensor dlogits;       /* [T,E] float32, overwritten          */
} ovlm_router;

/* y[t] = (add[t] + weight[t][0] h[row[t][0]]) + weight[t][1] ..., of the slots whose row is one of
 * the R from `first` on, which are rows 0 .. R-1 of h and dh: a chunk.  Backward, of those slots:
 * dh[row] = weight dy[t], dweight[t][j] = <dy[t], h[row]>; the dweight of others stays, but is 0
 * where row < 0.  No row is named twice; rows of dh that nobody names are not written. */
typedef struct ovlm_combine {
    ovlm_scratch scratch;
    int64_t k;
    int64_t first;       /* >= 0                                */
    const int32_t *row;  /* [T*k] device                        */
    ovlm_tensor weight;  /* [T,k] float32, or left out: 1       */
    ovlm_tensor h;       /* [R,C]                               */
    ovlm_tensor add;     /* [T,C] or left out; may be y         */
    ovlm_tensor y;       /* [T,C]                               */
    ovlm_tensor dy, dh, dweight;
} ovlm_combine;

/* Balance loss of Switch routers: f_e = count/rows, loss += coef*E*sum f_e score_sum/rows, and
 * slope[e] = coef*E*f_e/rows for the router's backward.  bias (sigmoid routers without a loss):
 * bias_e += speed*sign(mean count - count).  Forward only. */
typedef struct ovlm_balance_loss {
    ovlm_scratch scratch;
    int64_t experts;
    double rows, coef, speed;
    const int64_t *count;    /* [E] device                     */
    const double *score_sum; /* [E] device, or NULL: no loss   */
    double *loss;            /* device, added to; or NULL      */
    float *slope;            /* [E] device, or NULL            */
    ovlm_tensor bias;        /* [1,E] float32, or left out     */
} ovlm_balance_loss;

/* What each token weighs: label -100 is ignored.  total is what to divide by; with own_total it is
 * this call's sum of weights, written by the call.  dlogp = -weight/total (0 where ignored, and
 * everywhere when total is 0).  Forward only. */
typedef struct ovlm_targets {
    ovlm_scratch scratch;
    int64_t n;
    const int32_t *label; /* [T] device                       */
    const float *weight;  /* [T] device, or NULL: 1           */
    bool own_total;
    double *total;        /* device                           */
    int64_t *count;       /* device, added to: tokens with a label */
    float *dlogp;         /* [T] device                       */
} ovlm_targets;

/* Head of a language model without its T x V logits: logp[t] = log softmax(x w^T)[label[t]],
 * entropy[t] of that distribution, loss += sum dlogp * logp.  Where the label is ignored both are
 * 0 and nothing flows back.  Backward: dx, dw from dlogp and dentropy.  fused: the forward computes
 * dx and dw in the same pass.  A backward, without fused, may still follow: of other slopes. */
typedef struct ovlm_head {
    ovlm_scratch scratch;
    ovlm_tensor x;        /* [T,C]                            */
    ovlm_tensor w;        /* [V,C]                            */
    const int32_t *label; /* [T] device; -100 = ignored       */
    float *logp;          /* [T] device                       */
    float *entropy;       /* [T] device, or NULL              */
    bool fused;
    const float *dlogp;    /* [T] device                      */
    const float *dentropy; /* [T] device, or NULL             */
    double *loss;          /* device, or NULL                 */
    ovlm_tensor dx, dw;
    float dx_beta, dw_beta;
} ovlm_head;

/* What the optimizer needs to know of all gradients; on the device. */
typedef struct ovlm_grad_stats {
    double norm_sq;      /* sum of squares over all parts so far                      */
    double clip;         /* factor that adamw applied, written by it                  */
    int64_t non_finite;  /* elements that are infinite or not a number                */
} ovlm_grad_stats;

/* Adds the squares of n gradients to stats.  Forward only. */
typedef struct ovlm_grad_norm {
    ovlm_scratch scratch;
    int64_t n;
    const ovlm_tensor *grad; /* [n] on the host, copied by the call */
    ovlm_grad_stats *stats;  /* device */
} ovlm_grad_norm;

typedef struct ovlm_adamw_part {
    ovlm_tensor w;      /* as the model reads it                            */
    ovlm_tensor master; /* float32, or left out when w is float32           */
    ovlm_tensor m, v, grad; /* float32                                      */
    double lr, weight_decay;
} ovlm_adamw_part;

/* AdamW (Loshchilov and Hutter 2019, algorithm 2), decoupled decay, bias correction by `step` >= 1:
 * g = clip * grad, clip = min(1, max_norm/(norm + 1e-6)), max_norm <= 0: 1.  Nothing changes while
 * stats->non_finite > 0.  Forward only. */
typedef struct ovlm_adamw {
    ovlm_scratch scratch;
    int64_t n, step;
    const ovlm_adamw_part *part; /* [n] on the host, copied by the call */
    double beta1, beta2, eps, max_norm;
    ovlm_grad_stats *stats;      /* device */
} ovlm_adamw;

/* X(operation, its argument struct). */
#define OVLM_OPS(X)                       \
    X(linear, ovlm_linear)                \
    X(grouped_linear, ovlm_grouped_linear)\
    X(gated, ovlm_gated)                  \
    X(norm, ovlm_norm)                    \
    X(rope_table, ovlm_rope_table)        \
    X(rope, ovlm_rope)                    \
    X(attention, ovlm_attention)          \
    X(merge, ovlm_merge)                  \
    X(gather, ovlm_gather)                \
    X(scale, ovlm_scale)                  \
    X(unfold, ovlm_unfold)                \
    X(router, ovlm_router)                \
    X(combine, ovlm_combine)              \
    X(balance_loss, ovlm_balance_loss)    \
    X(targets, ovlm_targets)              \
    X(head, ovlm_head)                    \
    X(grad_norm, ovlm_grad_norm)          \
    X(adamw, ovlm_adamw)

/* Number of an operation: OVLM_OP_linear, ..., OVLM_OP_COUNT. */
typedef enum ovlm_op {
#define OVLM_OP_NUMBER(op, args) OVLM_OP_##op,
    OVLM_OPS(OVLM_OP_NUMBER)
#undef OVLM_OP_NUMBER
    OVLM_OP_COUNT
} ovlm_op;

#ifdef __cplusplus
}
#endif
#endif
