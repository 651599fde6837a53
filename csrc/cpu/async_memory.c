/* async_memory.c - device memory that the host cannot touch. */
#define _DEFAULT_SOURCE /* MAP_ANONYMOUS */
#include "cpu/async_memory.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { POISON = 0xff, STORAGE_ALIGN = 64 }; /* a NaN in every floating dtype, -1 as an index */

void ovlm_async_memory_init(ovlm_async_memory *memory)
{
    *memory = (ovlm_async_memory){0};
    pthread_rwlock_init(&memory->lock, NULL);
}

void ovlm_async_memory_free(ovlm_async_memory *memory)
{
    for (int64_t i = 0; i < memory->n; i++) {
        free(memory->block[i].storage);
        (void)munmap((void *)memory->block[i].address, memory->block[i].reserved);
    }
    free(memory->block);
    pthread_rwlock_destroy(&memory->lock);
}

/* Index of the first block that begins after the address. */
static int64_t block_after(const ovlm_async_memory *memory, uintptr_t address)
{
    int64_t low = 0, high = memory->n;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (memory->block[middle].address <= address) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

static ovlm_status grow(ovlm_async_memory *memory, ovlm_err *err)
{
    if (memory->n < memory->room) {
        return OVLM_OK;
    }
    int64_t room = memory->room > 0 ? 2 * memory->room : 16;
    ovlm_async_block *block = realloc(memory->block, (size_t)room * sizeof *block);
    if (block == NULL) {
        return OVLM_FAIL(err, OVLM_E_NOMEM, "out of memory for %lld device allocations",
                         (long long)room);
    }
    memory->block = block;
    memory->room = room;
    return OVLM_OK;
}

static ovlm_status add_block(ovlm_async_memory *memory, int64_t bytes, void **out, ovlm_err *err)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    OVLM_TRY(grow(memory, err));
    ovlm_async_block block = {.bytes = bytes, .reserved = ((size_t)bytes / page + 2) * page};
    void *storage = NULL;
    if (posix_memalign(&storage, STORAGE_ALIGN, bytes > 0 ? (size_t)bytes : 1) != 0) {
        return OVLM_FAIL(err, OVLM_E_NOMEM, "out of device memory: %lld bytes; use a smaller batch",
                         (long long)bytes);
    }
    /* The page beyond keeps allocations apart, so that no address is valid in two of them. */
    void *address = mmap(NULL, block.reserved, PROT_NONE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (address == MAP_FAILED) {
        free(storage);
        return OVLM_FAIL(err, OVLM_E_NOMEM, "out of address space for %lld bytes; close other "
                         "backends", (long long)bytes);
    }
    memset(storage, POISON, (size_t)bytes);
    block.storage = storage;
    block.address = (uintptr_t)address;
    int64_t at = block_after(memory, block.address);
    memmove(memory->block + at + 1, memory->block + at,
            (size_t)(memory->n - at) * sizeof *memory->block);
    memory->block[at] = block;
    memory->n++;
    *out = address;
    return OVLM_OK;
}

ovlm_status ovlm_async_memory_alloc(ovlm_async_memory *memory, int64_t bytes, void **out,
                                    ovlm_err *err)
{
    *out = NULL;
    if (bytes < 0) {
        return OVLM_FAIL(err, OVLM_E_ARG, "bytes must be >= 0; got %lld", (long long)bytes);
    }
    pthread_rwlock_wrlock(&memory->lock);
    ovlm_status status = add_block(memory, bytes, out, err);
    pthread_rwlock_unlock(&memory->lock);
    return status;
}

void ovlm_async_memory_release(ovlm_async_memory *memory, const void *address)
{
    /* Waits for running operations; those that have not begun will find the block gone. */
    pthread_rwlock_wrlock(&memory->lock);
    int64_t at = block_after(memory, (uintptr_t)address) - 1;
    if (at >= 0 && memory->block[at].address == (uintptr_t)address &&
        memory->block[at].storage != NULL) {
        memset(memory->block[at].storage, POISON, (size_t)memory->block[at].bytes);
        free(memory->block[at].storage);
        memory->block[at].storage = NULL;
    }
    pthread_rwlock_unlock(&memory->lock);
}

void *ovlm_async_memory_find(const ovlm_async_memory *memory, const void *address, int64_t bytes,
                             const char **why)
{
    int64_t at = block_after(memory, (uintptr_t)address) - 1;
    const ovlm_async_block *block = at < 0 ? NULL : &memory->block[at];
    if (block == NULL || (uintptr_t)address - block->address > (uintptr_t)block->bytes) {
        *why = "is not device memory";
        return NULL;
    }
    int64_t offset = (int64_t)((uintptr_t)address - block->address);
    if (bytes > block->bytes - offset) {
        *why = "reaches beyond its allocation";
        return NULL;
    }
    if (block->storage == NULL) {
        *why = "was freed before the queue came to it";
        return NULL;
    }
    return block->storage + offset;
}
