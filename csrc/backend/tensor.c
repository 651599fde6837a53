/* tensor.c - what a dtype is. */
#include "backend/tensor.h"

static const struct {
    int64_t bytes;
    const char *name;
} dtypes[OVLM_DTYPE_COUNT] = {
    [OVLM_F32] = {4, "float32"}, [OVLM_BF16] = {2, "bfloat16"}, [OVLM_F16] = {2, "float16"},
    [OVLM_F64] = {8, "float64"}, [OVLM_I32] = {4, "int32"},     [OVLM_I64] = {8, "int64"},
    [OVLM_U8] = {1, "uint8"},
};

int64_t ovlm_dtype_bytes(ovlm_dtype dtype)
{
    return dtypes[dtype].bytes;
}

const char *ovlm_dtype_name(ovlm_dtype dtype)
{
    return dtypes[dtype].name;
}
