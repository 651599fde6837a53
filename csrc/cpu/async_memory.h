/* async_memory.h - device memory of the `async` backend: addresses that no one can touch, each with
 * storage elsewhere. */
#ifndef OVLM_CPU_ASYNC_MEMORY_H
#define OVLM_CPU_ASYNC_MEMORY_H

#include "base/status.h"

#include <pthread.h>

typedef struct ovlm_async_block {
    uintptr_t address;
    size_t reserved; /* bytes of address space, whole pages and one more */
    int64_t bytes;
    char *storage;   /* NULL once freed */
} ovlm_async_block;

/* Blocks sorted by address.  Freed ones stay, so that their addresses never come back and a late
 * use of them is recognised. */
typedef struct ovlm_async_memory {
    pthread_rwlock_t lock; /* readers: while an operation runs; writer: alloc and free */
    ovlm_async_block *block;
    int64_t n, room;
} ovlm_async_memory;

void ovlm_async_memory_init(ovlm_async_memory *memory);
void ovlm_async_memory_free(ovlm_async_memory *memory);
ovlm_status ovlm_async_memory_alloc(ovlm_async_memory *memory, int64_t bytes, void **out,
                                    ovlm_err *err);
void ovlm_async_memory_release(ovlm_async_memory *memory, const void *address);

/* Where `bytes` bytes at a device address really are.  Under the reader's lock.  NULL, and why. */
void *ovlm_async_memory_find(const ovlm_async_memory *memory, const void *address, int64_t bytes,
                             const char **why);

#endif
