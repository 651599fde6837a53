/* arena.c - chunks from calloc, pieces by bumping a cursor. */
#include "base/arena.h"

#ifdef OVLM_TEST_HOOKS
#include <stdatomic.h>
#endif
#include <stdlib.h>
#include <string.h>

#if defined(__SANITIZE_ADDRESS__)
#define OVLM_HAS_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define OVLM_HAS_ASAN 1
#endif
#endif
#ifdef OVLM_HAS_ASAN
#include <sanitizer/asan_interface.h>
#define POISON(p, n) ASAN_POISON_MEMORY_REGION(p, n)
#define UNPOISON(p, n) ASAN_UNPOISON_MEMORY_REGION(p, n)
enum { RED_ZONE_BYTES = 64 };
#else
#define POISON(p, n) ((void)(p), (void)(n))
#define UNPOISON(p, n) ((void)(p), (void)(n))
enum { RED_ZONE_BYTES = 0 };
#endif

enum { ALIGN_BYTES = 64, CHUNK_BYTES = 1 << 18 };

struct ovlm_arena_chunk {
    struct ovlm_arena_chunk *next;
    unsigned char *base;
    size_t size_bytes, used_bytes;
};

#ifdef OVLM_TEST_HOOKS
static _Atomic int64_t fail_after = -1;

void ovlm_arena_fail_after(int64_t allocations)
{
    atomic_store(&fail_after, allocations);
}

static bool must_fail(void)
{
    int64_t left = atomic_load_explicit(&fail_after, memory_order_relaxed);
    if (left < 0) {
        return false;
    }
    if (left == 0) {
        return true;
    }
    atomic_store(&fail_after, left - 1);
    return false;
}
#else
static bool must_fail(void)
{
    return false;
}
#endif

/* Product of count and size, or OVLM_E_NOMEM when it cannot be an object's size. */
static ovlm_status bytes_of(int64_t count, size_t size, size_t *bytes, ovlm_err *err)
{
    if (count < 0 || (uint64_t)count > (SIZE_MAX / 4) / (size ? size : 1)) {
        return OVLM_FAIL(err, OVLM_E_NOMEM, "cannot allocate %lld elements of %zu bytes",
                         (long long)count, size);
    }
    *bytes = (size_t)count * size;
    return OVLM_OK;
}

static size_t round_up(size_t bytes)
{
    return (bytes + ALIGN_BYTES - 1) / ALIGN_BYTES * ALIGN_BYTES;
}

static ovlm_status chunk_add(ovlm_arena *arena, size_t need, ovlm_err *err)
{
    size_t grow = arena->allocated_bytes < CHUNK_BYTES ? CHUNK_BYTES : arena->allocated_bytes;
    size_t body = need > grow ? need : grow;
    struct ovlm_arena_chunk *chunk = malloc(sizeof *chunk + body + ALIGN_BYTES);
    if (chunk == NULL) {
        return OVLM_FAIL(err, OVLM_E_NOMEM, "out of memory: %zu bytes were asked for", body);
    }
    unsigned char *start = (unsigned char *)(chunk + 1);
    chunk->base = start + (ALIGN_BYTES - (uintptr_t)start % ALIGN_BYTES) % ALIGN_BYTES;
    chunk->size_bytes = body;
    chunk->used_bytes = 0;
    chunk->next = arena->chunk;
    arena->chunk = chunk;
    arena->allocated_bytes += body;
    POISON(chunk->base, body);
    return OVLM_OK;
}

ovlm_status ovlm_arena_alloc_raw(ovlm_arena *arena, void **out, int64_t count, size_t size,
                                 ovlm_err *err)
{
    size_t bytes = 0;
    OVLM_TRY(bytes_of(count, size, &bytes, err));
    if (must_fail()) {
        return OVLM_FAIL(err, OVLM_E_NOMEM, "out of memory: %zu bytes were asked for", bytes);
    }
    size_t need = round_up(bytes ? bytes : 1) + RED_ZONE_BYTES;
    struct ovlm_arena_chunk *chunk = arena->chunk;
    if (chunk == NULL || chunk->size_bytes - chunk->used_bytes < need) {
        OVLM_TRY(chunk_add(arena, need, err));
        chunk = arena->chunk;
    }
    unsigned char *piece = chunk->base + chunk->used_bytes;
    chunk->used_bytes += need;
    UNPOISON(piece, bytes);
    *out = piece;
    return OVLM_OK;
}

ovlm_status ovlm_arena_alloc(ovlm_arena *arena, void **out, int64_t count, size_t size,
                             ovlm_err *err)
{
    OVLM_TRY(ovlm_arena_alloc_raw(arena, out, count, size, err));
    memset(*out, 0, (size_t)count * size);
    return OVLM_OK;
}

ovlm_status ovlm_arena_reserve(ovlm_arena *arena, int64_t bytes, ovlm_err *err)
{
    size_t need = 0;
    OVLM_TRY(bytes_of(bytes, 1, &need, err));
    if (must_fail()) {
        return OVLM_FAIL(err, OVLM_E_NOMEM, "out of memory: %zu bytes were asked for", need);
    }
    return chunk_add(arena, need, err);
}

ovlm_arena_mark ovlm_arena_save(const ovlm_arena *arena)
{
    return (ovlm_arena_mark){arena->chunk, arena->chunk ? arena->chunk->used_bytes : 0};
}

void ovlm_arena_rewind(ovlm_arena *arena, ovlm_arena_mark mark)
{
    while (arena->chunk != mark.chunk) {
        struct ovlm_arena_chunk *chunk = arena->chunk;
        arena->chunk = chunk->next;
        arena->allocated_bytes -= chunk->size_bytes;
        UNPOISON(chunk->base, chunk->size_bytes);
        free(chunk);
    }
    if (arena->chunk != NULL) {
        struct ovlm_arena_chunk *chunk = arena->chunk;
        POISON(chunk->base + mark.used_bytes, chunk->size_bytes - mark.used_bytes);
        chunk->used_bytes = mark.used_bytes;
    }
}

void ovlm_arena_free(ovlm_arena *arena)
{
    ovlm_arena_rewind(arena, (ovlm_arena_mark){NULL, 0});
}

static ovlm_status heap_take(void **out, int64_t count, size_t size, bool zeroed, ovlm_err *err)
{
    size_t bytes = 0;
    OVLM_TRY(bytes_of(count, size, &bytes, err));
    size_t most = bytes ? bytes : 1;
    *out = must_fail() ? NULL : zeroed ? calloc(most, 1) : malloc(most);
    if (*out == NULL) {
        return OVLM_FAIL(err, OVLM_E_NOMEM, "out of memory: %zu bytes were asked for", bytes);
    }
    return OVLM_OK;
}

ovlm_status ovlm_heap_alloc(void **out, int64_t count, size_t size, ovlm_err *err)
{
    return heap_take(out, count, size, true, err);
}

ovlm_status ovlm_heap_alloc_raw(void **out, int64_t count, size_t size, ovlm_err *err)
{
    return heap_take(out, count, size, false, err);
}
