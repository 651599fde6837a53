/* cpu_device.c - the fast backend's devices and memory. */
#define _DEFAULT_SOURCE /* madvise */
#include "cpu/cpu_device.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "cpu/cpu_gemm.h"

enum { ALIGN = 64, HUGE_PAGE = 2 << 20 };

static ovlm_status check_device(int64_t device, ovlm_err *err)
{
    if (device != 0) {
        return OVLM_FAIL(err, OVLM_E_ARG, "device must be 0 on the CPU; got %lld",
                         (long long)device);
    }
    return OVLM_OK;
}

ovlm_status ovlm_cpu_device_describe(int64_t device, char *text, size_t text_bytes, ovlm_err *err)
{
    OVLM_TRY(check_device(device, err));
    (void)snprintf(text, text_bytes, "CPU, instruction set %s", ovlm_gemm_code_get(0)->name);
    return OVLM_OK;
}

static ovlm_status get_memory(int64_t bytes, void **out, ovlm_err *err)
{
    *out = NULL;
    if (bytes < 0) {
        return OVLM_FAIL(err, OVLM_E_ARG, "bytes must be >= 0; got %lld", (long long)bytes);
    }
    /* Exactly `bytes`, so that AddressSanitizer sees the first one beyond. */
    bool huge = bytes >= HUGE_PAGE;
    if (posix_memalign(out, huge ? HUGE_PAGE : ALIGN, bytes > 0 ? (size_t)bytes : 1) != 0) {
        *out = NULL;
        return OVLM_FAIL(err, OVLM_E_NOMEM, "out of memory for %lld bytes", (long long)bytes);
    }
#if defined(MADV_HUGEPAGE)
    if (huge) { /* matrices walk over many rows at once, each a page of its own */
        (void)madvise(*out, (size_t)(bytes / HUGE_PAGE * HUGE_PAGE), MADV_HUGEPAGE);
    }
#endif
    return OVLM_OK;
}

ovlm_status ovlm_cpu_open_with(const ovlm_ops *ops, const ovlm_backend_options *options,
                               ovlm_backend **backend, ovlm_err *err)
{
    *backend = NULL;
    OVLM_TRY(check_device(options->device, err));
    ovlm_cpu *cpu = calloc(1, sizeof *cpu);
    if (cpu == NULL) {
        return OVLM_FAIL(err, OVLM_E_NOMEM, "out of memory for a backend");
    }
    cpu->base = (ovlm_backend){.ops = ops, .host_memory = true};
    cpu->gemm = ovlm_gemm_code_get(0);
    ovlm_status status;
    void *scratch = NULL;
    OVLM_GOTO(failed, ovlm_pool_open(options->threads, &cpu->pool, err));
    OVLM_GOTO(failed, get_memory(ovlm_pool_threads(cpu->pool) * OVLM_CPU_SCRATCH_BYTES, &scratch,
                                 err));
    cpu->thread_scratch = scratch;
    *backend = &cpu->base;
    return OVLM_OK;
failed:
    ovlm_cpu_close(&cpu->base);
    return status;
}

void ovlm_cpu_close(ovlm_backend *backend)
{
    if (backend == NULL) {
        return;
    }
    ovlm_cpu *cpu = (ovlm_cpu *)(void *)backend;
    ovlm_pool_close(cpu->pool);
    free(cpu->thread_scratch);
    free(cpu);
}

ovlm_status ovlm_cpu_alloc(ovlm_backend *backend, int64_t bytes, void **out, ovlm_err *err)
{
    (void)backend;
    return get_memory(bytes, out, err);
}

void ovlm_cpu_free(ovlm_backend *backend, void *memory)
{
    (void)backend;
    free(memory);
}
