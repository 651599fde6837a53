/* run.h - one pass of a model over the op table, written once and walked twice: measuring (no
 * memory yet, nothing runs, sizes are added up, plans are made) and for real.
 *
 *   RUN(run, linear, fwd, &args)     measures the call, takes its scratch, and prepares or runs it
 *
 * Activations that the backward reads come from run->keep, everything else from run->work, which is
 * rewound by mark.  Neither grows while a pass runs. */
#ifndef OVLM_MODEL_RUN_H
#define OVLM_MODEL_RUN_H

#include "backend/backend.h"
#include "backend/tensor.h"
#include "base/status.h"
#include "model/trace.h"

/* A stack of device memory: base NULL only counts. */
typedef struct ovlm_stack {
    char *base;
    int64_t used_bytes, peak_bytes, size_bytes;
} ovlm_stack;

typedef struct ovlm_run {
    ovlm_queue *queue;
    const ovlm_ops *ops;
    bool measuring;
    ovlm_stack *keep, *work;
    ovlm_stack *stage;         /* host memory that inputs are copied from */
    ovlm_dtype dtype, exact;   /* of activations; of gradients and statistics */
    int (*poll)(void *ctx);    /* between layers; non-zero stops the pass; or NULL */
    void *poll_ctx;
    ovlm_trace *trace;         /* NULL: not traced */
    struct ovlm_visit *visit;  /* hooks around units of weights (hooks.h); NULL: none */
    ovlm_err *err;
} ovlm_run;

/* bytes, 64-byte aligned; NULL while measuring.  The peak was measured, so it always fits. */
void *ovlm_stack_take(ovlm_stack *stack, int64_t bytes);

ovlm_tensor ovlm_stack_tensor(ovlm_stack *stack, int64_t rows, int64_t cols, ovlm_dtype dtype);

/* Where a stack's memory comes from. */
typedef enum ovlm_stack_place { OVLM_STACK_DEVICE, OVLM_STACK_HOST } ovlm_stack_place;

/* Allocates what was measured; keeps larger memory.  The stack is empty after. */
OVLM_NODISCARD ovlm_status ovlm_stack_fit(ovlm_stack *stack, ovlm_backend *backend,
                                          ovlm_stack_place place, int64_t peak_bytes,
                                          ovlm_err *err);
void ovlm_stack_free(ovlm_stack *stack, ovlm_backend *backend, ovlm_stack_place place);

/* OVLM_E_INTERRUPTED when the caller's poll says stop. */
OVLM_NODISCARD ovlm_status ovlm_run_poll(const ovlm_run *run);

/* Host data to new memory of `stack`, by way of run->stage, so that the caller's array may go. */
OVLM_NODISCARD ovlm_status ovlm_run_upload(ovlm_run *run, ovlm_stack *stack, const void *host,
                                           int64_t bytes, void **device);

/* to = from + beta to, of one shape, in any pair of dtypes. */
OVLM_NODISCARD ovlm_status ovlm_run_move(ovlm_run *run, ovlm_tensor from, ovlm_tensor to,
                                         double beta);

/* A row of `count` equal numbers. */
OVLM_NODISCARD ovlm_status ovlm_run_constant(ovlm_run *run, ovlm_stack *stack, float value,
                                             int64_t count, ovlm_tensor *row);

OVLM_NODISCARD ovlm_status ovlm_run_zero(ovlm_run *run, void *device, int64_t bytes);

/* Fills the tensor (dense) with zeros. */
OVLM_NODISCARD ovlm_status ovlm_run_zero_tensor(ovlm_run *run, const ovlm_tensor *tensor);

/* Host rows in run->exact, dense, become (beta 0) or are added to (beta 1) those of `to`. */
OVLM_NODISCARD ovlm_status ovlm_run_load(ovlm_run *run, const void *host, const ovlm_tensor *to,
                                         double beta);

/* Starts a span of the trace; ends it (index: of a layer, or -1). */
static inline double ovlm_run_begin(const ovlm_run *run)
{
    return run->measuring ? 0 : ovlm_trace_begin(run->trace);
}

static inline void ovlm_run_end(const ovlm_run *run, const char *name, int64_t index,
                                double start_s)
{
    if (!run->measuring) {
        ovlm_trace_end(run->trace, name, index, start_s);
    }
}

/* Waits for a traced operation and notes its time. */
OVLM_NODISCARD ovlm_status ovlm_run_end_op(const ovlm_run *run, const char *name, double start_s);

/* Runs a pass of an operation with scratch from run->work.  RUN_IN takes `saved` from `stack`, for
 * the forward; the backward finds it in the arguments. */
#define RUN_STEP(run, op, pass, args, take_saved)                                              \
    do {                                                                                       \
        ovlm_op_bytes run_need = {0};                                                          \
        OVLM_TRY((run)->ops->op.measure((run)->queue->backend, (args), &run_need, (run)->err)); \
        take_saved;                                                                            \
        int64_t run_mark = (run)->work->used_bytes;                                            \
        (args)->scratch.work = ovlm_stack_take((run)->work, run_need.pass##_work);             \
        if ((run)->measuring) {                                                                \
            OVLM_TRY((run)->ops->op.prepare((run)->queue->backend, (args), (run)->err));       \
        } else {                                                                               \
            double run_start_s = ovlm_trace_begin((run)->trace);                               \
            OVLM_TRY((run)->ops->op.pass((run)->queue, (args), (run)->err));                   \
            OVLM_TRY(ovlm_run_end_op((run), #op " " #pass, run_start_s));                      \
        }                                                                                      \
        (run)->work->used_bytes = run_mark;                                                    \
    } while (0)

#define RUN_IN(run, op, pass, args, stack) \
    RUN_STEP(run, op, pass, args, (args)->scratch.saved = ovlm_stack_take((stack), run_need.saved))

#define RUN(run, op, pass, args) RUN_STEP(run, op, pass, args, (void)0)

#endif
