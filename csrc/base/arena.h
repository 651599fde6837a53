/* arena.h - a growing arena: many allocations, one release.
 *
 *   ovlm_arena arena = {0};
 *   OVLM_GOTO(done, OVLM_ARENA_NEW(&arena, &p, n, err));     p: pointer to any type, n elements
 *   done: ovlm_arena_free(&arena);
 *
 * Pieces are 64-byte aligned, and zeroed unless asked for raw.  Under AddressSanitizer a red zone
 * follows each piece, so that an overrun inside the arena is found.  Not thread-safe: one arena per
 * thread. */
#ifndef OVLM_BASE_ARENA_H
#define OVLM_BASE_ARENA_H

#include "base/status.h"

typedef struct ovlm_arena {
    struct ovlm_arena_chunk *chunk; /* newest first                                    */
    size_t allocated_bytes;         /* what the chunks hold                            */
} ovlm_arena;

typedef struct ovlm_arena_mark {
    struct ovlm_arena_chunk *chunk;
    size_t used_bytes;
} ovlm_arena_mark;

/* count*size zeroed bytes, or OVLM_E_NOMEM (also when the product overflows).  A count of zero
 * gives a valid pointer to nothing; a negative one is OVLM_E_NOMEM. */
OVLM_NODISCARD ovlm_status ovlm_arena_alloc(ovlm_arena *arena, void **out, int64_t count,
                                            size_t size, ovlm_err *err);

/* The same, with contents undefined: for large arrays that the caller fills before reading, where
 * zeroing would be a pass over memory more. */
OVLM_NODISCARD ovlm_status ovlm_arena_alloc_raw(ovlm_arena *arena, void **out, int64_t count,
                                                size_t size, ovlm_err *err);

/* Makes room for `bytes` at once, so that what follows comes from one block, which malloc can hand
 * out again to the next call without new pages.  Nothing is zeroed or touched. */
OVLM_NODISCARD ovlm_status ovlm_arena_reserve(ovlm_arena *arena, int64_t bytes, ovlm_err *err);

/* Everything allocated after the mark is released by rewind. */
ovlm_arena_mark ovlm_arena_save(const ovlm_arena *arena);
void ovlm_arena_rewind(ovlm_arena *arena, ovlm_arena_mark mark);
void ovlm_arena_free(ovlm_arena *arena);

#define OVLM_ARENA_NEW(arena, pointer, count, err) \
    ovlm_arena_alloc((arena), (void **)(void *)(pointer), (count), sizeof **(pointer), (err))

#define OVLM_ARENA_RAW(arena, pointer, count, err) \
    ovlm_arena_alloc_raw((arena), (void **)(void *)(pointer), (count), sizeof **(pointer), (err))

/* Heap twin for results that outlive the call: zeroed, freed with free(). */
OVLM_NODISCARD ovlm_status ovlm_heap_alloc(void **out, int64_t count, size_t size, ovlm_err *err);

#define OVLM_HEAP_NEW(pointer, count, err) \
    ovlm_heap_alloc((void **)(void *)(pointer), (count), sizeof **(pointer), (err))

/* The same, with contents undefined. */
OVLM_NODISCARD ovlm_status ovlm_heap_alloc_raw(void **out, int64_t count, size_t size,
                                               ovlm_err *err);

#define OVLM_HEAP_RAW(pointer, count, err) \
    ovlm_heap_alloc_raw((void **)(void *)(pointer), (count), sizeof **(pointer), (err))

#ifdef OVLM_TEST_HOOKS
/* After `allocations` more successes every allocation fails; negative = never. */
void ovlm_arena_fail_after(int64_t allocations);
#endif

#endif
