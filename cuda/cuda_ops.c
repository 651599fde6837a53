/* cuda_ops.c - the CUDA backend's table and its life cycle.
 *
 * Plain C11: only kernels need nvcc's C++.  The CUDA runtime is linked statically, so that this
 * library loads on a machine without a driver and can say so. */
#include "backend/backend.h"
#include "base/status.h"

#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct cuda_backend {
    ovlm_backend base;
    int device;
    cudaStream_t stream; /* the queue of all operations; owned */
} cuda_backend;

static const ovlm_ops cuda_ops;

/* Turns a failed CUDA call into an error and clears CUDA's sticky copy of it. */
static ovlm_status cuda_fail(cudaError_t code, const char *call, ovlm_err *err)
{
    (void)cudaGetLastError();
    return OVLM_FAIL(err, code == cudaErrorMemoryAllocation ? OVLM_E_NOMEM : OVLM_E_BACKEND,
                     "%s: %s (CUDA error %d)", call, cudaGetErrorString(code), (int)code);
}

#define CUDA_TRY(call, err)                              \
    do {                                                 \
        cudaError_t cuda_code = (call);                  \
        if (cuda_code != cudaSuccess) {                  \
            return cuda_fail(cuda_code, #call, (err));   \
        }                                                \
    } while (0)

static ovlm_status cuda_device_count(int64_t *count, ovlm_err *err)
{
    int driver = 0, n = 0;
    *count = 0;
    /* Asked first: without a driver cudaGetDeviceCount would blame its version. */
    cudaError_t code = cudaDriverGetVersion(&driver);
    if (code != cudaSuccess || driver == 0) {
        (void)cudaGetLastError();
        return OVLM_FAIL(err, OVLM_E_BACKEND,
                         "no CUDA device: this machine has no NVIDIA driver (libcuda.so.1 was not "
                         "found)");
    }
    code = cudaGetDeviceCount(&n);
    if (code == cudaErrorInsufficientDriver) {
        (void)cudaGetLastError();
        return OVLM_FAIL(err, OVLM_E_BACKEND,
                         "the NVIDIA driver supports CUDA %d.%d, this build needs %d.%d; update "
                         "the driver",
                         driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000,
                         CUDART_VERSION % 1000 / 10);
    }
    if (code == cudaErrorNoDevice || (code == cudaSuccess && n == 0)) {
        (void)cudaGetLastError();
        return OVLM_FAIL(err, OVLM_E_BACKEND,
                         "no CUDA device is visible; is CUDA_VISIBLE_DEVICES set?");
    }
    CUDA_TRY(code, err);
    *count = n;
    return OVLM_OK;
}

static ovlm_status check_device(int64_t device, ovlm_err *err)
{
    int64_t count = 0;
    OVLM_TRY(cuda_device_count(&count, err));
    if (device < 0 || device >= count) {
        return OVLM_FAIL(err, OVLM_E_ARG, "device must be in [0, %lld); got %lld",
                         (long long)count, (long long)device);
    }
    return OVLM_OK;
}

static ovlm_status cuda_device_describe(int64_t device, char *text, size_t text_bytes,
                                        ovlm_err *err)
{
    struct cudaDeviceProp properties;
    OVLM_TRY(check_device(device, err));
    CUDA_TRY(cudaGetDeviceProperties(&properties, (int)device), err);
    (void)snprintf(text, text_bytes, "%s, compute capability %d.%d, %d multiprocessors, %.0f GiB",
                   properties.name, properties.major, properties.minor,
                   properties.multiProcessorCount,
                   (double)properties.totalGlobalMem / (1024.0 * 1024.0 * 1024.0));
    return OVLM_OK;
}

static void cuda_close(ovlm_backend *backend)
{
    cuda_backend *self = (cuda_backend *)(void *)backend;
    if (self == NULL) {
        return;
    }
    (void)cudaStreamDestroy(self->stream);
    free(self);
}

static ovlm_status cuda_open(const ovlm_backend_options *options, ovlm_backend **backend,
                             ovlm_err *err)
{
    int64_t device = options->device;
    *backend = NULL;
    OVLM_TRY(check_device(device, err));
    CUDA_TRY(cudaSetDevice((int)device), err);
    cuda_backend *self = calloc(1, sizeof *self);
    if (self == NULL) {
        return OVLM_FAIL(err, OVLM_E_NOMEM, "out of memory: %zu bytes were asked for",
                         sizeof *self);
    }
    self->base.ops = &cuda_ops;
    self->device = (int)device;
    cudaError_t code = cudaStreamCreateWithFlags(&self->stream, cudaStreamNonBlocking);
    if (code != cudaSuccess) {
        free(self);
        return cuda_fail(code, "cudaStreamCreateWithFlags", err);
    }
    *backend = &self->base;
    return OVLM_OK;
}

static const ovlm_ops cuda_ops = {
    .abi = OVLM_BACKEND_ABI,
    .size_bytes = sizeof(ovlm_ops),
    .name = "cuda",
    .device_count = cuda_device_count,
    .device_describe = cuda_device_describe,
    .open = cuda_open,
    .close = cuda_close,
};

const ovlm_ops *ovlm_backend_entry(void);
__attribute__((visibility("default"))) const ovlm_ops *ovlm_backend_entry(void)
{
    return &cuda_ops;
}
