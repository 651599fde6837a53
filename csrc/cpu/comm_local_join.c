/* comm_local_join.c - jobs of ranks of one host: how they meet, what a process keeps, how it
 * ends. */
#include "cpu/comm_local_state.h"

#include "base/clock.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* ---------------------------------------------------------------- jobs */

static local_job *new_job(const ovlm_comm_local_options *options, int64_t size)
{
    local_job *job = calloc(1, sizeof *job);
    if (job != NULL) {
        job->options = options != NULL ? *options : (ovlm_comm_local_options){0};
        job->options.silent_s = job->options.silent_s > 0 ? job->options.silent_s : 60;
        job->options.join_s = job->options.join_s > 0 ? job->options.join_s : 300;
        job->options.slow_s = job->options.slow_s > 0 ? job->options.slow_s : 60;
        job->size = size;
        job->rank = -1;
        job->process = getpid();
        job->lock = -1;
        pthread_mutex_init(&job->mutex, NULL);
        pthread_condattr_t clock;
        pthread_condattr_init(&clock);
#if !defined(__APPLE__)
        (void)pthread_condattr_setclock(&clock, OVLM_LOCAL_CLOCK);
#endif
        pthread_cond_init(&job->wake, &clock);
        pthread_condattr_destroy(&clock);
    }
    return job;
}

/* The last communicator of this process is closed. */
static void end_job(local_job *job)
{
    bool owner = getpid() == job->process;
    if (owner) {
        ovlm_local_unwatch(job);
    }
    if (job->lock >= 0) {
        if (owner && job->rank >= 0) {
            atomic_store_explicit(&job->first->rank[job->rank].gone, 1, memory_order_release);
        }
        (void)close(job->lock); /* after `gone`: who finds no lock looks at that */
        if (job->first != NULL) {
            (void)munmap(job->first, (size_t)job->first->bytes);
        }
    }
    ovlm_local_memory_free(job);
    free(job->beat);
    free(job->looks);
    if (owner) { /* a child's copy may be locked for ever */
        pthread_cond_destroy(&job->wake);
        pthread_mutex_destroy(&job->mutex);
    }
    free(job);
}

ovlm_status ovlm_local_comm_new(local_job *job, local_block *block, int64_t rank, int64_t n,
                                local_comm **out, ovlm_err *err)
{
    local_comm *comm = calloc(1, sizeof *comm);
    int64_t *arrays = calloc((size_t)(3 * n), sizeof *arrays);
    if (comm == NULL || arrays == NULL) {
        free(comm);
        free(arrays);
        return OVLM_FAIL(err, OVLM_E_NOMEM, "out of memory for a communicator");
    }
    *comm = (local_comm){.job = job, .block = block, .rank = rank, .n = n, .world = arrays,
                         .from = arrays + n, .until = arrays + 2 * n};
    for (int64_t r = 0; r < n; r++) {
        comm->world[r] = r;
    }
    pthread_mutex_lock(&job->mutex);
    job->users++;
    pthread_mutex_unlock(&job->mutex);
    *out = comm;
    return OVLM_OK;
}

void ovlm_local_close(void *self)
{
    local_comm *comm = self;
    local_job *job = comm->job;
    bool owner = getpid() == job->process; /* a forked child only forgets */
    if (owner) {
        atomic_store_explicit(&comm->block->rank[comm->rank].left, 1, memory_order_release);
    }
    if (owner || job->lock >= 0) {
        ovlm_local_block_close(job, comm->block); /* needs the job: before its use ends */
    }
    if (owner) {
        pthread_mutex_lock(&job->mutex);
    }
    bool last = --job->users == 0;
    if (owner) {
        pthread_mutex_unlock(&job->mutex);
    }
    free(comm->world);
    free(comm);
    if (last) {
        end_job(job);
    }
}

/* ---------------------------------------------------------------- threads */

ovlm_status ovlm_comm_open_threads(int64_t n, const ovlm_comm_local_options *options,
                                   ovlm_comm **comms, ovlm_err *err)
{
    if (n < 1 || n > OVLM_COMM_LOCAL_RANKS_MOST) {
        return OVLM_FAIL(err, OVLM_E_ARG, "n must be in [1, %d] ranks; got %lld",
                         OVLM_COMM_LOCAL_RANKS_MOST, (long long)n);
    }
    local_job *job = new_job(options, n);
    if (job == NULL) {
        return OVLM_FAIL(err, OVLM_E_NOMEM, "out of memory for %lld ranks", (long long)n);
    }
    job->users = 1; /* of this function, until all are made */
    int64_t made = 0;
    ovlm_status status = OVLM_OK;
    OVLM_GOTO(done, ovlm_local_block_new(job, NULL, n, &job->first, err));
    for (; made < n; made++) {
        local_comm *self = NULL;
        OVLM_GOTO(done, ovlm_local_comm_new(job, job->first, made, n, &self, err));
        OVLM_GOTO(done, ovlm_comm_open(&ovlm_local_engine, self, made, n, 1, &comms[made], err));
    }
done:
    while (status != OVLM_OK && made > 0) {
        ovlm_comm_close(comms[--made]);
    }
    pthread_mutex_lock(&job->mutex);
    bool last = --job->users == 0;
    pthread_mutex_unlock(&job->mutex);
    if (last) {
        end_job(job);
    }
    return status;
}

/* ---------------------------------------------------------------- processes */

static void nap(void)
{
    const struct timespec pause = {.tv_nsec = 5000000};
    (void)nanosleep(&pause, NULL);
}

/* Names of later files hold it: a job may meet where another one met that still runs. */
static uint64_t job_number(const local_job *job)
{
    struct timespec now = {0};
    (void)clock_gettime(CLOCK_REALTIME, &now);
    return ((uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec) ^
           (uint64_t)job->process << 40;
}

/* Rank 0: writes the file elsewhere and gives it its name when it is complete and locked. */
static ovlm_status create_meeting(local_job *job, const char *path, ovlm_err *err)
{
    char fresh[OVLM_LOCAL_PATH_BYTES + 32];
    (void)snprintf(fresh, sizeof fresh, "%s.%lld", path, (long long)job->process);
    (void)unlink(fresh); /* of an earlier process with this number: O_EXCL would find it */
    OVLM_TRY(ovlm_local_file_new(job, fresh, job->size, &job->lock, &job->first, err));
    job->first->job = job_number(job);
    bool locked = ovlm_local_lock(job->lock, 0);
    int named = locked ? link(fresh, path) : -1;
    if (locked && named != 0 && errno == EEXIST) {
        /* Left by a job that ended before all had met - or in use. */
        int other = open(path, O_RDWR | O_CLOEXEC);
        bool alive = other >= 0 && ovlm_local_locked(other, 0);
        if (other >= 0) {
            (void)close(other);
        }
        if (!alive && unlink(path) == 0) {
            named = link(fresh, path);
        }
    }
    int why = errno;
    (void)unlink(fresh);
    return named == 0 ? OVLM_OK
                      : OVLM_FAIL(err, OVLM_E_COMM, "cannot create the meeting point %s: %s", path,
                                  locked ? strerror(why) : "its file system has no locks");
}

/* Another rank: waits for the file; one whose rank 0 does not live is an old one. */
static ovlm_status find_meeting(local_job *job, const char *path, ovlm_err *err)
{
    double start_s = ovlm_clock_s();
    while (ovlm_clock_s() - start_s < job->options.join_s) {
        int file = open(path, O_RDWR | O_CLOEXEC);
        if (file >= 0 && ovlm_local_locked(file, 0)) {
            job->lock = file;
            return ovlm_local_file_map(file, path, &job->first, err);
        }
        if (file >= 0) {
            (void)close(file);
        }
        if (job->options.poll != NULL && job->options.poll(job->options.ctx) != 0) {
            return OVLM_FAIL(err, OVLM_E_INTERRUPTED, "interrupted while waiting for rank 0");
        }
        nap();
    }
    return OVLM_FAIL(err, OVLM_E_COMM, "rank 0 did not join within %.3g s (no %s)",
                     job->options.join_s, path);
}

/* Takes the name of this job's meeting point away, but not a newer one's. */
static void forget_meeting(const local_job *job, const char *path)
{
    struct stat ours, there;
    if (job->lock >= 0 && fstat(job->lock, &ours) == 0 && stat(path, &there) == 0 &&
        ours.st_ino == there.st_ino && ours.st_dev == there.st_dev) {
        (void)unlink(path);
    }
}

static ovlm_status join(local_job *job, const char *path, int64_t rank, ovlm_err *err)
{
    OVLM_TRY(rank == 0 ? create_meeting(job, path, err) : find_meeting(job, path, err));
    if (job->first->n != job->size) {
        ovlm_local_fail(job, "rank 0 counts %lld ranks, rank %lld counts %lld",
                        (long long)job->first->n, (long long)rank, (long long)job->size);
        return ovlm_local_check(job, err);
    }
    if (!ovlm_local_lock(job->lock, rank)) {
        return OVLM_FAIL(err, OVLM_E_COMM, "two processes say they are rank %lld at %s",
                         (long long)rank, path);
    }
    job->rank = rank;
    job->first->rank[rank].process = (int64_t)job->process;
    atomic_store_explicit(&job->first->rank[rank].here, 1, memory_order_release);
    return ovlm_local_watch(job, err);
}

ovlm_status ovlm_comm_open_local(const char *path, int64_t rank, int64_t size,
                                 const ovlm_comm_local_options *options, ovlm_comm **comm,
                                 ovlm_err *err)
{
    const ovlm_comm_label label = {.comm = 1, .kind = OVLM_COMM_BARRIER, .amount = -1};
    *comm = NULL;
    if (size < 1 || size > OVLM_COMM_LOCAL_RANKS_MOST || rank < 0 || rank >= size) {
        return OVLM_FAIL(err, OVLM_E_ARG, "rank must be in [0, size) and size in [1, %d]; got rank "
                         "%lld of %lld", OVLM_COMM_LOCAL_RANKS_MOST, (long long)rank,
                         (long long)size);
    }
    if (strlen(path) + 64 > OVLM_LOCAL_PATH_BYTES) {
        return OVLM_FAIL(err, OVLM_E_ARG, "path is too long: %s", path);
    }
    local_job *job = new_job(options, size);
    if (job == NULL) {
        return OVLM_FAIL(err, OVLM_E_NOMEM, "out of memory for a communicator");
    }
    memcpy(job->path, path, strlen(path) + 1);
    local_comm *self = NULL;
    ovlm_status status = OVLM_OK;
    OVLM_GOTO(failed, join(job, path, rank, err));
    OVLM_GOTO(failed, ovlm_local_comm_new(job, job->first, rank, size, &self, err));
    status = ovlm_local_meet(self, &label, job->options.join_s, err);
    if (rank == 0 || status != OVLM_OK) {
        forget_meeting(job, path);
    }
    if (status != OVLM_OK) {
        ovlm_local_close(self); /* and the job */
        return status;
    }
    return ovlm_comm_open(&ovlm_local_engine, self, rank, size, 1, comm, err);
failed:
    if (rank == 0) {
        forget_meeting(job, path);
    }
    end_job(job);
    return status;
}
