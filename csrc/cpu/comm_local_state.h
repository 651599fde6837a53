/* comm_local_state.h - the inside of communicators of one host, for their files.
 *
 * A block of shared memory per communicator holds a meeting point (who has arrived), and two
 * windows per rank.  Data passes in rounds: every rank fills its window of the round, all meet, all
 * read what is theirs from the others' windows.  The next round uses the other windows; when all
 * have met there, nobody reads the former ones any more.
 *
 * A job is all communicators that came from one opening.  Its first block also records who is
 * there, who is alive, and which rank failed first, with what message. */
#ifndef OVLM_CPU_COMM_LOCAL_STATE_H
#define OVLM_CPU_COMM_LOCAL_STATE_H

#include <pthread.h>
#include <stdatomic.h>
#include <sys/types.h>
#include <time.h>

#include "base/arena.h"
#include "cpu/comm_local.h"

enum { OVLM_LOCAL_PATH_BYTES = 256, OVLM_LOCAL_LINE_BYTES = 64 };

/* Of timed waits: one that nobody sets back, where conditions can use it. */
#if defined(__APPLE__)
#define OVLM_LOCAL_CLOCK CLOCK_REALTIME
#else
#define OVLM_LOCAL_CLOCK CLOCK_MONOTONIC
#endif

/* What a rank says about itself, in a cache line of its own. */
typedef struct local_rank {
    atomic_uint met;   /* meetings in which it has arrived                                      */
    atomic_uint left;  /* it closed this communicator                                           */
    /* In the first block of a job only: */
    atomic_uint here;  /* it has joined the job; its process holds the lock of byte `rank`      */
    atomic_uint gone;  /* it has closed everything, in good order                               */
    atomic_uint beat;  /* counts while its process runs                                         */
    int32_t unused;
    int64_t process;   /* for messages                                                          */
    char pad[OVLM_LOCAL_LINE_BYTES - 6 * 4 - 8];
} local_rank;

typedef struct local_block {
    char magic[8];
    int64_t n, window_bytes, bytes;
    uint64_t job; /* first block of processes: no other job has this number                     */
    char pad0[OVLM_LOCAL_LINE_BYTES - 40];
    atomic_uint arrived; /* ranks in the current meeting                                        */
    char pad1[OVLM_LOCAL_LINE_BYTES - 4];
    atomic_uint meetings; /* that are over: ranks sleep on it                                   */
    char pad2[OVLM_LOCAL_LINE_BYTES - 4];
    /* In the first block of a job only. */
    atomic_uint failed; /* 0: no; 1: the message is being written; 2: it is there               */
    char message[380];
    local_rank rank[]; /* [n], then the windows                                                 */
} local_block;

/* Before the data of a window. */
typedef struct local_head {
    ovlm_comm_label label;
    int64_t count[]; /* [2n]: bytes to each rank, bytes from each rank                          */
} local_head;

/* Blocks of threads: kept in a list, so that what a failure leaves behind goes with the job. */
typedef struct local_memory {
    struct local_memory *next;
    local_block *block;
    int64_t users;
} local_memory;

/* One per process, shared by its communicators of one opening. */
typedef struct local_job {
    ovlm_comm_local_options options;
    local_block *first;
    int64_t size, rank; /* rank: of this process; -1 where the ranks are threads                */
    pid_t process;      /* a forked child has the memory, but is no rank                        */
    int lock;           /* the file whose locks say who lives; -1 for threads                   */
    char path[OVLM_LOCAL_PATH_BYTES];
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    int64_t users; /* communicators                                                             */
    local_memory *memory; /* of threads                                                         */
    pthread_t watcher;
    bool watching, closing;
    unsigned *beat; /* [size] owned: the watcher's: what it saw last, and how often in a row    */
    int64_t *looks;
} local_job;

/* The engine's own. */
typedef struct local_comm {
    local_job *job;
    local_block *block;
    int64_t rank, n;
    int64_t *world; /* [n] owned: the members' ranks in the job                                 */
    int64_t *from, *until; /* [n] owned: scratch of a call: this rank's part of each stream     */
    unsigned round; /* so far: says which window comes next                                     */
} local_comm;

/* ---------------------------------------------------------------- memory (comm_local_block.c) */

local_head *ovlm_local_window(const local_block *block, int64_t rank, unsigned round);
char *ovlm_local_window_data(const local_block *block, int64_t rank, unsigned round);

/* A block of a job: of threads at an address, of processes in a new file at `path`. */
OVLM_NODISCARD ovlm_status ovlm_local_block_new(local_job *job, const char *path, int64_t n,
                                                local_block **block, ovlm_err *err);
OVLM_NODISCARD ovlm_status ovlm_local_block_open(const char *path, local_block **block,
                                                 ovlm_err *err);
void ovlm_local_block_close(local_job *job, local_block *block);
void ovlm_local_memory_free(local_job *job);
/* A new file with a block in it, open and mapped. */
OVLM_NODISCARD ovlm_status ovlm_local_file_new(const local_job *job, const char *path, int64_t n,
                                               int *file, local_block **block, ovlm_err *err);
OVLM_NODISCARD ovlm_status ovlm_local_file_map(int file, const char *path, local_block **block,
                                               ovlm_err *err);

/* ---------------------------------------------------------------- jobs (comm_local_join.c) */

/* A communicator's own memory; takes a reference of the job. */
OVLM_NODISCARD ovlm_status ovlm_local_comm_new(local_job *job, local_block *block, int64_t rank,
                                               int64_t n, local_comm **comm, ovlm_err *err);
void ovlm_local_close(void *self);

/* ---------------------------------------------------------------- failure (comm_local_watch.c) */

/* Makes everybody fail; the first message stays. */
void ovlm_local_fail(local_job *job, const char *format, ...) OVLM_PRINTF(2, 3);
/* OVLM_E_COMM with the message, if somebody failed. */
OVLM_NODISCARD ovlm_status ovlm_local_check(local_job *job, ovlm_err *err);
/* Arrives and waits for all; fails when somebody failed, left or died. */
OVLM_NODISCARD ovlm_status ovlm_local_meet(local_comm *comm, const ovlm_comm_label *label,
                                           double limit_s, ovlm_err *err);
/* The thread that shows that this process lives, and looks after the others. */
OVLM_NODISCARD ovlm_status ovlm_local_watch(local_job *job, ovlm_err *err);
void ovlm_local_unwatch(local_job *job);
/* Takes the lock of a rank's byte; false where another process has it. */
bool ovlm_local_lock(int file, int64_t rank);
/* Whether a process other than this one has it. */
bool ovlm_local_locked(int file, int64_t rank);

/* ---------------------------------------------------------------- engine */

extern const ovlm_comm_engine ovlm_local_engine;

ovlm_status ovlm_local_all_gather(void *self, const ovlm_comm_label *label,
                                  const ovlm_all_gather *args, ovlm_err *err);
ovlm_status ovlm_local_split(void *self, const ovlm_comm_label *label, int64_t color, int64_t key,
                             void **child, int64_t *rank, int64_t *size, ovlm_err *err);

#endif
