/* comm_local_block.c - shared memory of communicators of one host. */
#if defined(__linux__)
#define _GNU_SOURCE /* MAP_ANONYMOUS */
#endif
#include "cpu/comm_local_state.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    BLOCK_BYTES = 4 << 20,
    WINDOW_BYTES_MOST = 1 << 20,
    WINDOW_BYTES_LEAST = 64 << 10,
    WINDOW_BYTES_SHORT = 4 << 10 /* where memory is short */
};

static const char block_magic[8] = "ovlmcom";

/* ---------------------------------------------------------------- layout */

static int64_t round_up(int64_t bytes)
{
    return (bytes + OVLM_LOCAL_LINE_BYTES - 1) / OVLM_LOCAL_LINE_BYTES * OVLM_LOCAL_LINE_BYTES;
}

static int64_t head_bytes(int64_t n)
{
    return round_up((int64_t)sizeof(local_head) + 2 * n * (int64_t)sizeof(int64_t));
}

static int64_t windows_at(int64_t n)
{
    return round_up((int64_t)sizeof(local_block) + n * (int64_t)sizeof(local_rank));
}

/* Larger windows need fewer meetings; more ranks share the same memory. */
static int64_t window_bytes_of(const local_job *job, int64_t n)
{
    int64_t window = BLOCK_BYTES / (2 * n);
    if (job->options.window_bytes > 0) {
        return round_up(job->options.window_bytes);
    }
    window = window > WINDOW_BYTES_LEAST ? window : WINDOW_BYTES_LEAST;
    return round_up(window < WINDOW_BYTES_MOST ? window : WINDOW_BYTES_MOST);
}

static int64_t block_bytes(int64_t n, int64_t window_bytes)
{
    return windows_at(n) + 2 * n * (head_bytes(n) + window_bytes);
}

/* All windows of a round lie side by side, so that heads have one stride. */
local_head *ovlm_local_window(const local_block *block, int64_t rank, unsigned round)
{
    int64_t place = (int64_t)(round & 1u) * block->n + rank;
    return (local_head *)(void *)((char *)(uintptr_t)block + windows_at(block->n) +
                                  place * (head_bytes(block->n) + block->window_bytes));
}

char *ovlm_local_window_data(const local_block *block, int64_t rank, unsigned round)
{
    return (char *)ovlm_local_window(block, rank, round) + head_bytes(block->n);
}

static void fill_block(local_block *block, int64_t n, int64_t window_bytes)
{
    memcpy(block->magic, block_magic, sizeof block_magic);
    block->n = n;
    block->window_bytes = window_bytes;
    block->bytes = block_bytes(n, window_bytes);
}

/* ---------------------------------------------------------------- blocks */

/* Of threads: kept in a list, so that what a failure leaves behind goes with the job. */
static ovlm_status new_memory(local_job *job, int64_t n, local_block **block, ovlm_err *err)
{
    int64_t window = window_bytes_of(job, n), bytes = block_bytes(n, window);
    local_memory *memory = calloc(1, sizeof *memory);
    void *place = NULL;
    if (memory == NULL || posix_memalign(&place, OVLM_LOCAL_LINE_BYTES, (size_t)bytes) != 0) {
        free(memory);
        return OVLM_FAIL(err, OVLM_E_NOMEM, "out of memory for a communicator: %lld bytes",
                         (long long)bytes);
    }
    memset(place, 0, (size_t)bytes);
    *block = place;
    fill_block(*block, n, window);
    *memory = (local_memory){.block = *block, .users = n};
    pthread_mutex_lock(&job->mutex);
    memory->next = job->memory;
    job->memory = memory;
    pthread_mutex_unlock(&job->mutex);
    return OVLM_OK;
}

static void drop_memory(local_job *job, local_block *block)
{
    pthread_mutex_lock(&job->mutex);
    local_memory **link = &job->memory, *found = NULL;
    while (*link != NULL && (*link)->block != block) {
        link = &(*link)->next;
    }
    if (*link != NULL && --(*link)->users == 0 && block != job->first) {
        found = *link;
        *link = found->next;
    }
    pthread_mutex_unlock(&job->mutex);
    if (found != NULL) {
        free(found->block);
        free(found);
    }
}

static ovlm_status map(int file, const char *path, int64_t bytes, local_block **block,
                       ovlm_err *err)
{
    int shared = file < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
    void *place = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, shared, file, 0);
    if (place == MAP_FAILED) {
        return OVLM_FAIL(err, OVLM_E_NOMEM, "cannot map %lld bytes of %s: %s", (long long)bytes,
                         path, strerror(errno));
    }
    *block = place;
    return OVLM_OK;
}

/* Memory is reserved at once: a write into a hole of a full file system would kill the process.
 * Where there is little, smaller windows do. */
static int reserve(int file, int64_t n, int64_t *window)
{
    int refused = posix_fallocate(file, 0, (off_t)block_bytes(n, *window));
    while (refused == EINTR || (refused == ENOSPC && *window / 2 >= WINDOW_BYTES_SHORT)) {
        *window = refused == EINTR ? *window : round_up(*window / 2);
        off_t bytes = (off_t)block_bytes(n, *window);
        refused = ftruncate(file, 0) != 0 ? errno : posix_fallocate(file, 0, bytes);
    }
    return refused;
}

ovlm_status ovlm_local_file_new(const local_job *job, const char *path, int64_t n, int *file,
                                local_block **block, ovlm_err *err)
{
    int64_t window = window_bytes_of(job, n);
    *file = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (*file < 0) {
        return OVLM_FAIL(err, OVLM_E_COMM, "cannot create %s: %s", path, strerror(errno));
    }
    int refused = reserve(*file, n, &window);
    int64_t bytes = block_bytes(n, window);
    ovlm_status status = OVLM_OK;
    if (refused != 0) {
        status = OVLM_FAIL(err, OVLM_E_NOMEM, "%s has no room for %lld bytes of shared memory "
                           "(%s); in a container, give it more with --shm-size", path,
                           (long long)bytes, strerror(refused));
    } else {
        status = map(*file, path, bytes, block, err);
    }
    if (status == OVLM_OK) {
        fill_block(*block, n, window);
    } else {
        (void)close(*file);
        *file = -1;
        (void)unlink(path);
    }
    return status;
}

ovlm_status ovlm_local_block_new(local_job *job, const char *path, int64_t n, local_block **block,
                                 ovlm_err *err)
{
    int file = -1;
    if (job->lock < 0) {
        return new_memory(job, n, block, err);
    }
    if (n == 1) { /* nobody else needs to find it */
        int64_t window = window_bytes_of(job, 1);
        OVLM_TRY(map(-1, "memory", block_bytes(1, window), block, err));
        fill_block(*block, 1, window);
        return OVLM_OK;
    }
    OVLM_TRY(ovlm_local_file_new(job, path, n, &file, block, err));
    (void)close(file);
    return OVLM_OK;
}

/* A file that is not ours, or that no rank 0 wrote, is not touched. */
ovlm_status ovlm_local_file_map(int file, const char *path, local_block **block, ovlm_err *err)
{
    struct stat info;
    local_block head;
    if (fstat(file, &info) != 0 || info.st_uid != geteuid() || !S_ISREG(info.st_mode) ||
        pread(file, &head, sizeof head, 0) != (ssize_t)sizeof head ||
        memcmp(head.magic, block_magic, sizeof block_magic) != 0 ||
        head.bytes != (int64_t)info.st_size) {
        return OVLM_FAIL(err, OVLM_E_COMM, "%s is no meeting point of this user's ranks", path);
    }
    return map(file, path, head.bytes, block, err);
}

ovlm_status ovlm_local_block_open(const char *path, local_block **block, ovlm_err *err)
{
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0) {
        return OVLM_FAIL(err, OVLM_E_COMM, "cannot open %s: %s", path, strerror(errno));
    }
    ovlm_status status = ovlm_local_file_map(file, path, block, err);
    (void)close(file);
    return status;
}

void ovlm_local_block_close(local_job *job, local_block *block)
{
    if (job->lock < 0) {
        drop_memory(job, block);
    } else if (block != job->first) {
        (void)munmap(block, (size_t)block->bytes);
    }
}

void ovlm_local_memory_free(local_job *job)
{
    while (job->memory != NULL) {
        local_memory *memory = job->memory;
        job->memory = memory->next;
        free(memory->block);
        free(memory);
    }
}
