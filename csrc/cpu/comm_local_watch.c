/* comm_local_watch.c - failure: who failed first, who is alive, and waiting that never lasts for
 * ever.
 *
 * A process holds a POSIX lock on its byte of the job's file.  The kernel drops it when the process
 * ends, however it ends, and children do not inherit it; so a missing lock means dead, at once, and
 * without trusting process numbers.  A process that is stopped keeps the lock: its clock stands
 * still, and after silent_s it counts as dead too. */
#include "cpu/comm_local_state.h"

#include "base/clock.h"
#include "base/futex.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define SLICE_S 0.05 /* a waiting rank looks at failures so often                               */
#define BEAT_S 0.1

/* ---------------------------------------------------------------- the first failure */

void ovlm_local_fail(local_job *job, const char *format, ...)
{
    local_block *first = job->first;
    unsigned none = 0;
    if (atomic_compare_exchange_strong(&first->failed, &none, 1)) {
        va_list args;
        va_start(args, format);
        (void)vsnprintf(first->message, sizeof first->message, format, args);
        va_end(args);
        atomic_store_explicit(&first->failed, 2, memory_order_release);
    }
}

ovlm_status ovlm_local_check(local_job *job, ovlm_err *err)
{
    unsigned failed = atomic_load_explicit(&job->first->failed, memory_order_acquire);
    for (int look = 0; failed == 1 && look < 1000; look++) { /* it is being written */
        const struct timespec nap = {.tv_nsec = 100000};
        (void)nanosleep(&nap, NULL);
        failed = atomic_load_explicit(&job->first->failed, memory_order_acquire);
    }
    if (failed == 0) {
        return OVLM_OK;
    }
    return OVLM_FAIL(err, OVLM_E_COMM, "%s",
                     failed == 2 ? job->first->message : "a rank failed and died over it");
}

/* ---------------------------------------------------------------- who lives */

static struct flock lock_of(int64_t rank)
{
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = (off_t)rank,
                         .l_len = 1};
    return lock;
}

bool ovlm_local_lock(int file, int64_t rank)
{
    struct flock lock = lock_of(rank);
    return fcntl(file, F_SETLK, &lock) == 0;
}

bool ovlm_local_locked(int file, int64_t rank)
{
    struct flock lock = lock_of(rank);
    return fcntl(file, F_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
}

/* One look at the others.  Silence is counted in looks, not by the clock, so that time in which
 * this process stood still too counts for nobody. */
static void look_after(local_job *job)
{
    int64_t *looks = job->looks;
    for (int64_t r = 0; r < job->size; r++) {
        local_rank *other = &job->first->rank[r];
        if (r == job->rank || atomic_load_explicit(&other->here, memory_order_acquire) == 0) {
            continue;
        }
        bool locked = ovlm_local_locked(job->lock, r);
        if (atomic_load_explicit(&other->gone, memory_order_acquire) != 0) {
            continue; /* looked at after the lock: it leaves in this order */
        }
        unsigned now = atomic_load_explicit(&other->beat, memory_order_relaxed);
        looks[r] = now == job->beat[r] ? looks[r] + 1 : 0;
        job->beat[r] = now;
        if (!locked) {
            ovlm_local_fail(job, "rank %lld (process %lld) died", (long long)r,
                            (long long)other->process);
        } else if ((double)looks[r] * BEAT_S > job->options.silent_s) {
            ovlm_local_fail(job, "rank %lld (process %lld) has been silent for %.3g s: its process "
                            "is stopped", (long long)r, (long long)other->process,
                            job->options.silent_s);
        }
    }
}

static void wait_beat(local_job *job)
{
    struct timespec until;
    (void)clock_gettime(OVLM_LOCAL_CLOCK, &until);
    until.tv_nsec += (long)(BEAT_S * 1e9);
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    (void)pthread_cond_timedwait(&job->wake, &job->mutex, &until);
}

static void *watch(void *argument)
{
    local_job *job = argument;
    pthread_mutex_lock(&job->mutex);
    while (!job->closing) {
        pthread_mutex_unlock(&job->mutex);
        atomic_fetch_add_explicit(&job->first->rank[job->rank].beat, 1, memory_order_relaxed);
        look_after(job);
        pthread_mutex_lock(&job->mutex);
        if (!job->closing) {
            wait_beat(job);
        }
    }
    pthread_mutex_unlock(&job->mutex);
    return NULL;
}

ovlm_status ovlm_local_watch(local_job *job, ovlm_err *err)
{
    OVLM_TRY(OVLM_HEAP_NEW(&job->beat, job->size, err));
    OVLM_TRY(OVLM_HEAP_NEW(&job->looks, job->size, err));
    if (pthread_create(&job->watcher, NULL, watch, job) != 0) {
        return OVLM_FAIL(err, OVLM_E_NOMEM, "the system refused a thread to watch over the ranks");
    }
    job->watching = true;
    return OVLM_OK;
}

void ovlm_local_unwatch(local_job *job)
{
    if (job->watching) {
        pthread_mutex_lock(&job->mutex);
        job->closing = true;
        pthread_cond_signal(&job->wake);
        pthread_mutex_unlock(&job->mutex);
        pthread_join(job->watcher, NULL);
        job->watching = false;
    }
}

/* ---------------------------------------------------------------- meeting */

static bool arrived(const local_comm *comm, int64_t rank, unsigned meeting)
{
    unsigned met = atomic_load_explicit(&comm->block->rank[rank].met, memory_order_acquire);
    return (int)(met - meeting) > 0;
}

/* "ranks 2, 5 and 3 more" */
static void list_missing(const local_comm *comm, unsigned meeting, char *text, size_t bytes)
{
    int64_t missing = 0;
    size_t used = 0;
    text[0] = '\0';
    for (int64_t r = 0; r < comm->n; r++) {
        if (!arrived(comm, r, meeting) && ++missing <= 8) {
            int wrote = snprintf(text + used, bytes - used, "%s%lld", missing > 1 ? ", " : "rank ",
                                 (long long)comm->world[r]);
            used += wrote > 0 && (size_t)wrote < bytes - used ? (size_t)wrote : 0;
        }
    }
    if (missing > 8) {
        (void)snprintf(text + used, bytes - used, " and %lld more", (long long)missing - 8);
    }
}

/* A member that is not here and will not come. */
static void find_left(local_comm *comm, const ovlm_comm_label *label, unsigned meeting)
{
    for (int64_t r = 0; r < comm->n; r++) {
        const local_rank *member = &comm->block->rank[r];
        const local_rank *process = &comm->job->first->rank[comm->world[r]];
        bool left = atomic_load_explicit(&member->left, memory_order_acquire) != 0 ||
                    atomic_load_explicit(&process->gone, memory_order_acquire) != 0;
        if (left && !arrived(comm, r, meeting)) {
            char text[OVLM_COMM_TEXT_BYTES];
            ovlm_comm_label_describe(label, text);
            ovlm_local_fail(comm->job, "rank %lld closed its communicator, while rank %lld waits "
                            "for it in %s", (long long)comm->world[r],
                            (long long)comm->world[comm->rank], text);
            return;
        }
    }
}

static void warn_slow(const local_comm *comm, const ovlm_comm_label *label, unsigned meeting,
                      double waited_s)
{
    char text[OVLM_COMM_TEXT_BYTES], missing[160], message[400];
    ovlm_comm_label_describe(label, text);
    list_missing(comm, meeting, missing, sizeof missing);
    (void)snprintf(message, sizeof message, "rank %lld has waited %.3g s for %s in %s",
                   (long long)comm->world[comm->rank], waited_s, missing, text);
    comm->job->options.warn(comm->job->options.ctx, message);
}

/* Sleeps until the meeting is over, looking up now and then. */
static ovlm_status wait_for_all(local_comm *comm, const ovlm_comm_label *label, unsigned meeting,
                                double limit_s, ovlm_err *err)
{
    const ovlm_comm_local_options *options = &comm->job->options;
    atomic_uint *meetings = &comm->block->meetings;
    double start_s = ovlm_clock_s(), warn_s = options->slow_s;
    while (atomic_load_explicit(meetings, memory_order_acquire) == meeting) {
        ovlm_futex_wait(meetings, meeting, SLICE_S);
        double waited_s = ovlm_clock_s() - start_s;
        if (atomic_load_explicit(meetings, memory_order_acquire) != meeting) {
            break; /* all were here, whatever happened to them since */
        }
        OVLM_TRY(ovlm_local_check(comm->job, err));
        find_left(comm, label, meeting);
        if (options->poll != NULL && options->poll(options->ctx) != 0) {
            ovlm_local_fail(comm->job, "rank %lld was interrupted",
                            (long long)comm->world[comm->rank]);
            return OVLM_FAIL(err, OVLM_E_INTERRUPTED, "interrupted while waiting for other ranks");
        }
        if (waited_s > limit_s) {
            char missing[160];
            list_missing(comm, meeting, missing, sizeof missing);
            ovlm_local_fail(comm->job, "%s did not join within %.3g s", missing, limit_s);
        } else if (waited_s > warn_s && options->warn != NULL) {
            warn_slow(comm, label, meeting, waited_s);
            warn_s *= 2;
        }
    }
    return OVLM_OK;
}

ovlm_status ovlm_local_meet(local_comm *comm, const ovlm_comm_label *label, double limit_s,
                            ovlm_err *err)
{
    local_block *block = comm->block;
    OVLM_TRY(ovlm_local_check(comm->job, err));
    unsigned meeting = atomic_load_explicit(&block->meetings, memory_order_relaxed);
    atomic_store_explicit(&block->rank[comm->rank].met, meeting + 1, memory_order_release);
    if (atomic_fetch_add_explicit(&block->arrived, 1, memory_order_acq_rel) + 1 ==
        (unsigned)comm->n) {
        /* Nobody arrives at the next meeting before this one is over: no order needed here. */
        atomic_store_explicit(&block->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&block->meetings, meeting + 1, memory_order_release);
        ovlm_futex_wake(&block->meetings);
        return OVLM_OK;
    }
    return wait_for_all(comm, label, meeting, limit_s, err);
}
