/* threads.c - the pool: workers sleep on a condition until there is a job, then draw pieces from
 * one counter until it runs out.
 *
 * The caller waits for pieces that were begun, never for a worker to wake up: where cores are
 * shared, a worker that is not scheduled costs nothing, since the caller does its pieces.  Nobody
 * spins. */
#if defined(__linux__)
#define _GNU_SOURCE /* sched_getaffinity */
#endif
#include "base/threads.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

enum { THREADS_MOST = 1024 };

typedef struct worker {
    ovlm_pool *pool;
    int64_t number;
    pthread_t thread;
} worker;

struct ovlm_pool {
    int64_t threads;       /* with the caller */
    int64_t started;       /* workers that run */
    worker *workers;
    pthread_mutex_t mutex;
    pthread_cond_t work, done;
    bool open;             /* there is a job, and it may still be joined   */
    int64_t busy;          /* workers that joined it and are not done      */
    bool closing;
    int64_t n;
    atomic_int_fast64_t next;
    ovlm_pool_body body;
    void *ctx;
};

static void draw_pieces(ovlm_pool *pool, int64_t thread)
{
    for (;;) {
        int64_t index = atomic_fetch_add_explicit(&pool->next, 1, memory_order_relaxed);
        if (index >= pool->n) {
            return;
        }
        pool->body(pool->ctx, index, thread);
    }
}

static void *work(void *argument)
{
    worker *self = argument;
    ovlm_pool *pool = self->pool;
    pthread_mutex_lock(&pool->mutex);
    for (;;) {
        while (!pool->closing && !pool->open) {
            pthread_cond_wait(&pool->work, &pool->mutex);
        }
        if (pool->closing) {
            break;
        }
        pool->busy++;
        pthread_mutex_unlock(&pool->mutex);
        draw_pieces(pool, self->number);
        pthread_mutex_lock(&pool->mutex);
        pool->open = false; /* no piece is left to draw */
        if (--pool->busy == 0) {
            pthread_cond_signal(&pool->done);
        }
    }
    pthread_mutex_unlock(&pool->mutex);
    return NULL;
}

/* Cores that this process may use. */
static int64_t default_threads(void)
{
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        cores = CPU_COUNT(&set);
    }
#endif
    return cores < 1 ? 1 : cores < THREADS_MOST ? cores : THREADS_MOST;
}

ovlm_status ovlm_pool_open(int64_t threads, ovlm_pool **pool, ovlm_err *err)
{
    *pool = NULL;
    if (threads < 0 || threads > THREADS_MOST) {
        return OVLM_FAIL(err, OVLM_E_ARG, "threads must be in [0, %d]; got %lld", THREADS_MOST,
                         (long long)threads);
    }
    int64_t count = threads > 0 ? threads : default_threads();
    ovlm_pool *self = calloc(1, sizeof *self);
    worker *workers = calloc((size_t)count, sizeof *workers);
    if (self == NULL || workers == NULL) {
        free(self);
        free(workers);
        return OVLM_FAIL(err, OVLM_E_NOMEM, "out of memory for %lld threads", (long long)count);
    }
    self->threads = count;
    self->workers = workers;
    pthread_mutex_init(&self->mutex, NULL);
    pthread_cond_init(&self->work, NULL);
    pthread_cond_init(&self->done, NULL);
    for (int64_t i = 1; i < count; i++) {
        workers[i] = (worker){.pool = self, .number = i};
        if (pthread_create(&workers[i].thread, NULL, work, &workers[i]) != 0) {
            ovlm_pool_close(self);
            return OVLM_FAIL(err, OVLM_E_NOMEM, "the system refused thread %lld of %lld",
                             (long long)i, (long long)count);
        }
        self->started = i;
    }
    *pool = self;
    return OVLM_OK;
}

void ovlm_pool_close(ovlm_pool *pool)
{
    if (pool == NULL) {
        return;
    }
    pthread_mutex_lock(&pool->mutex);
    pool->closing = true;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->mutex);
    for (int64_t i = 1; i <= pool->started; i++) {
        pthread_join(pool->workers[i].thread, NULL);
    }
    pthread_cond_destroy(&pool->work);
    pthread_cond_destroy(&pool->done);
    pthread_mutex_destroy(&pool->mutex);
    free(pool->workers);
    free(pool);
}

int64_t ovlm_pool_threads(const ovlm_pool *pool)
{
    return pool->threads;
}

void ovlm_pool_run(ovlm_pool *pool, int64_t n, ovlm_pool_body body, void *ctx)
{
    if (pool->threads == 1 || n <= 1) {
        for (int64_t i = 0; i < n; i++) {
            body(ctx, i, 0);
        }
        return;
    }
    pthread_mutex_lock(&pool->mutex);
    pool->n = n;
    pool->body = body;
    pool->ctx = ctx;
    atomic_store_explicit(&pool->next, 0, memory_order_relaxed);
    pool->open = true;
    if (n >= pool->threads) {
        pthread_cond_broadcast(&pool->work);
    }
    for (int64_t i = 1; i < n && n < pool->threads; i++) {
        pthread_cond_signal(&pool->work);
    }
    pthread_mutex_unlock(&pool->mutex);
    draw_pieces(pool, 0);
    pthread_mutex_lock(&pool->mutex);
    pool->open = false;
    while (pool->busy > 0) {
        pthread_cond_wait(&pool->done, &pool->mutex);
    }
    pthread_mutex_unlock(&pool->mutex);
}
