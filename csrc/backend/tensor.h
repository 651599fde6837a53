/* tensor.h - small helpers on views. */
#ifndef OVLM_BACKEND_TENSOR_H
#define OVLM_BACKEND_TENSOR_H

#include "ovlm.h"

/* Whether an optional tensor is there. */
static inline bool ovlm_tensor_given(const ovlm_tensor *tensor)
{
    return tensor->cols > 0;
}

/* A dense view. */
static inline ovlm_tensor ovlm_tensor_of(void *data, int64_t rows, int64_t cols, ovlm_dtype dtype)
{
    ovlm_tensor tensor = {data, rows, cols, cols, dtype};
    return tensor;
}

/* count rows from `first` on. */
static inline ovlm_tensor ovlm_tensor_rows(ovlm_tensor tensor, int64_t first, int64_t count)
{
    if (tensor.data != NULL) {
        tensor.data = (char *)tensor.data + first * tensor.stride * ovlm_dtype_bytes(tensor.dtype);
    }
    tensor.rows = count;
    return tensor;
}

/* count columns from `first` on. */
static inline ovlm_tensor ovlm_tensor_cols(ovlm_tensor tensor, int64_t first, int64_t count)
{
    if (tensor.data != NULL) {
        tensor.data = (char *)tensor.data + first * ovlm_dtype_bytes(tensor.dtype);
    }
    tensor.cols = count;
    return tensor;
}

#endif
