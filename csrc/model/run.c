/* run.c - stacks of device memory, and small steps of a pass. */
#include "model/run.h"

#include <string.h>

enum { ALIGN_BYTES = 64 };

void *ovlm_stack_take(ovlm_stack *stack, int64_t bytes)
{
    void *taken = stack->base == NULL ? NULL : stack->base + stack->used_bytes;
    stack->used_bytes += (bytes + ALIGN_BYTES - 1) / ALIGN_BYTES * ALIGN_BYTES;
    if (stack->used_bytes > stack->peak_bytes) {
        stack->peak_bytes = stack->used_bytes;
    }
    return taken;
}

ovlm_tensor ovlm_stack_tensor(ovlm_stack *stack, int64_t rows, int64_t cols, ovlm_dtype dtype)
{
    return ovlm_tensor_of(ovlm_stack_take(stack, rows * cols * ovlm_dtype_bytes(dtype)), rows,
                          cols, dtype);
}

ovlm_status ovlm_stack_fit(ovlm_stack *stack, ovlm_backend *backend, ovlm_stack_place place,
                           int64_t peak_bytes, ovlm_err *err)
{
    stack->used_bytes = stack->peak_bytes = 0;
    if (peak_bytes <= stack->size_bytes && stack->base != NULL) {
        return OVLM_OK;
    }
    ovlm_stack_free(stack, backend, place);
    void *memory = NULL;
    int64_t bytes = peak_bytes > ALIGN_BYTES ? peak_bytes : ALIGN_BYTES;
    OVLM_TRY((place == OVLM_STACK_HOST ? backend->ops->host_alloc
                                       : backend->ops->alloc)(backend, bytes, &memory, err));
    stack->base = memory;
    stack->size_bytes = bytes;
    return OVLM_OK;
}

void ovlm_stack_free(ovlm_stack *stack, ovlm_backend *backend, ovlm_stack_place place)
{
    if (stack->base != NULL) {
        (place == OVLM_STACK_HOST ? backend->ops->host_free : backend->ops->free)(backend,
                                                                                  stack->base);
    }
    *stack = (ovlm_stack){0};
}

ovlm_status ovlm_run_poll(const ovlm_run *run)
{
    if (!run->measuring && run->poll != NULL && run->poll(run->poll_ctx) != 0) {
        return OVLM_FAIL(run->err, OVLM_E_INTERRUPTED, "interrupted");
    }
    return OVLM_OK;
}

ovlm_status ovlm_run_upload(ovlm_run *run, ovlm_stack *stack, const void *host, int64_t bytes,
                            void **device)
{
    *device = ovlm_stack_take(stack, bytes);
    void *staged = ovlm_stack_take(run->stage, bytes);
    if (run->measuring || bytes == 0) {
        return OVLM_OK;
    }
    memcpy(staged, host, (size_t)bytes);
    return run->ops->copy(run->queue, *device, staged, bytes, OVLM_TO_DEVICE, run->err);
}

ovlm_status ovlm_run_move(ovlm_run *run, ovlm_tensor from, ovlm_tensor to, double beta)
{
    ovlm_scale copy = {.alpha = 1, .beta = beta, .x = from, .y = to};
    RUN(run, scale, fwd, &copy);
    return OVLM_OK;
}

ovlm_status ovlm_run_constant(ovlm_run *run, ovlm_stack *stack, float value, int64_t count,
                              ovlm_tensor *row)
{
    int64_t bytes = count * (int64_t)sizeof(float);
    float *staged = ovlm_stack_take(run->stage, bytes);
    *row = ovlm_stack_tensor(stack, 1, count, OVLM_F32);
    if (run->measuring || count == 0) {
        return OVLM_OK;
    }
    for (int64_t i = 0; i < count; i++) {
        staged[i] = value;
    }
    return run->ops->copy(run->queue, row->data, staged, bytes, OVLM_TO_DEVICE, run->err);
}

ovlm_status ovlm_run_zero(ovlm_run *run, void *device, int64_t bytes)
{
    if (run->measuring || bytes == 0) {
        return OVLM_OK;
    }
    return run->ops->fill(run->queue, device, 0, bytes, run->err);
}

ovlm_status ovlm_run_zero_tensor(ovlm_run *run, const ovlm_tensor *tensor)
{
    return ovlm_run_zero(run, tensor->data,
                         tensor->rows * tensor->cols * ovlm_dtype_bytes(tensor->dtype));
}

ovlm_status ovlm_run_load(ovlm_run *run, const void *host, const ovlm_tensor *to, double beta)
{
    int64_t mark = run->work->used_bytes;
    void *loaded = NULL;
    OVLM_TRY(ovlm_run_upload(run, run->work, host,
                             to->rows * to->cols * ovlm_dtype_bytes(run->exact), &loaded));
    ovlm_scale cast = {.alpha = 1, .beta = beta, .y = *to,
                       .x = ovlm_tensor_of(loaded, to->rows, to->cols, run->exact)};
    RUN(run, scale, fwd, &cast);
    run->work->used_bytes = mark;
    return OVLM_OK;
}

ovlm_status ovlm_run_end_op(const ovlm_run *run, const char *name, double start_s)
{
    if (run->trace == NULL) {
        return OVLM_OK;
    }
    OVLM_TRY(run->ops->queue_wait(run->queue, run->err));
    ovlm_trace_end(run->trace, name, -1, start_s);
    return OVLM_OK;
}
