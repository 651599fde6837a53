/* test_comm_processes.c - ranks that are processes: they meet at a file, and each hears when
 * another one is killed, stopped, or leaves. */
#define _GNU_SOURCE /* mkdtemp */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/arena.h"
#include "comm_rig.h"

#if defined(__SANITIZE_THREAD__)
#define WITH_THREAD_SANITIZER 1 /* it does not follow threads of forked children */
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define WITH_THREAD_SANITIZER 1
#endif
#endif

static char folder[64], path[128];

/* What a rank reports at its end: an exit status. */
enum { FINE = 0, WRONG = 1, FAILED_WELL = 2, REFUSED = 3, LATE = 4 };

typedef struct play {
    int64_t n;
    ovlm_comm_local_options options;
    int (*act)(ovlm_comm *comm, const struct play *play);
    const char *message; /* that a failure must hold */
    int64_t victim;
    uint64_t seed;
} play;

static int run_rank(const play *p, int64_t rank)
{
    ovlm_comm *comm = NULL;
    ovlm_err err = {0};
    if (ovlm_comm_open_local(path, rank, p->n, &p->options, &comm, &err) != OVLM_OK) {
        if (strstr(err.message, p->message) == NULL) {
            fprintf(stderr, "rank %lld: %s\n", (long long)rank, err.message);
        }
        return REFUSED;
    }
    int result = p->act(comm, p);
    ovlm_comm_close(comm);
    return result;
}

static void start_ranks(const play *p, pid_t *process)
{
    fflush(NULL);
    for (int64_t r = 0; r < p->n; r++) {
        process[r] = fork();
        if (process[r] == 0) {
            _exit(run_rank(p, r));
        }
    }
}

/* Exit status of each rank; -1 for one that was killed, -2 for one that had to be. */
static void end_ranks(const play *p, const pid_t *process, double limit_s, int *result)
{
    double start_s = ovlm_clock_s();
    for (int64_t r = 0; r < p->n; r++) {
        int status = 0;
        pid_t ended = 0;
        while ((ended = waitpid(process[r], &status, WNOHANG)) == 0 &&
               ovlm_clock_s() - start_s < limit_s) {
            const struct timespec nap = {.tv_nsec = 5000000};
            (void)nanosleep(&nap, NULL);
        }
        if (ended == 0) {
            (void)kill(process[r], SIGKILL);
            (void)waitpid(process[r], &status, 0);
            result[r] = -2;
        } else {
            result[r] = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
        }
    }
}

/* A failure with the message of the play, in time. */
static int judge(const play *p, ovlm_status status, const ovlm_err *err)
{
    if (status == OVLM_E_COMM && strstr(err->message, p->message) != NULL) {
        return FAILED_WELL;
    }
    fprintf(stderr, "%s, \"%s\" instead of \"%s\"\n", ovlm_status_name(status), err->message,
            p->message);
    return WRONG;
}

/* ---------------------------------------------------------------- plays */

/* Sums and exchanges over the ranks, a split and a twin. */
static int act_well(ovlm_comm *comm, const play *p)
{
    int64_t me = ovlm_comm_rank(comm), n = p->n, wrong = 0;
    int64_t sum = me + 1, count[RIG_RANKS_MOST], x[RIG_RANKS_MOST], y[RIG_RANKS_MOST];
    ovlm_comm *half = NULL, *twin = NULL;
    const ovlm_all_reduce add = {.send = &sum, .recv = &sum, .n = 1, .dtype = OVLM_I64};
    const ovlm_all_to_all swap = {.send = x, .send_bytes = count, .recv = y, .recv_bytes = count};
    wrong += ovlm_comm_split(comm, me % 2, -me, &half, NULL) != OVLM_OK;
    wrong += ovlm_comm_dup(comm, &twin, NULL) != OVLM_OK;
    for (int i = 0; i < 20 && wrong == 0; i++) {
        sum = me + 1;
        wrong += ovlm_comm_all_reduce(twin, &add, NULL) != OVLM_OK || sum != n * (n + 1) / 2;
        for (int64_t r = 0; r < n; r++) {
            count[r] = 8;
            x[r] = 100 * me + r + i;
        }
        wrong += ovlm_comm_all_to_all(comm, &swap, NULL) != OVLM_OK;
        for (int64_t r = 0; r < n; r++) {
            wrong += y[r] != 100 * r + me + i;
        }
    }
    sum = me + 1;
    wrong += ovlm_comm_all_reduce(half, &add, NULL) != OVLM_OK;
    for (int64_t r = me % 2; r < n; r += 2) {
        sum -= r + 1;
    }
    ovlm_comm_close(half);
    ovlm_comm_close(comm == NULL ? comm : twin);
    return wrong == 0 && sum == 0 ? FINE : WRONG;
}

/* Calls without end, until somebody fails; the victim calls too, until it is killed. */
static int act_until_failure(ovlm_comm *comm, const play *p)
{
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    ovlm_comm *part = NULL;
    static char big[40000], all[RIG_RANKS_MOST * sizeof big];
    int64_t count[RIG_RANKS_MOST];
    for (int64_t r = 0; r < p->n; r++) {
        count[r] = (int64_t)sizeof big;
    }
    const ovlm_all_gather gather = {.send = big, .recv = all, .recv_bytes = count};
    while (status == OVLM_OK) {
        ovlm_comm_close(part);
        status = ovlm_comm_split(comm, ovlm_comm_rank(comm) % 2, 0, &part, &err);
        if (status == OVLM_OK) {
            status = ovlm_comm_barrier(part, &err);
        }
        if (status == OVLM_OK) {
            status = ovlm_comm_all_gather(comm, &gather, &err);
        }
    }
    ovlm_comm_close(part);
    return judge(p, status, &err);
}

static int act_abort(ovlm_comm *comm, const play *p)
{
    ovlm_err err = {0};
    if (ovlm_comm_rank(comm) == p->victim) {
        ovlm_comm_abort(comm, "KeyError: 'pixels'");
    }
    return judge(p, ovlm_comm_barrier(comm, &err), &err);
}

static int act_leave(ovlm_comm *comm, const play *p)
{
    ovlm_err err = {0};
    return ovlm_comm_rank(comm) == p->victim ? FAILED_WELL
                                             : judge(p, ovlm_comm_barrier(comm, &err), &err);
}

/* A rank that cannot make, or open, the file of a split. */
static int act_no_files(ovlm_comm *comm, const play *p)
{
    ovlm_comm *part = NULL;
    ovlm_err err = {0};
    struct rlimit limit = {0};
    if (ovlm_comm_rank(comm) == p->victim && getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = 3;
        (void)setrlimit(RLIMIT_NOFILE, &limit);
    }
    return judge(p, ovlm_comm_split(comm, 0, 0, &part, &err), &err);
}

/* A child of a rank inherits the memory, but it is no rank, and closing there harms nobody. */
static int act_fork(ovlm_comm *comm, const play *p)
{
    ovlm_err err = {0};
    int status = 0;
    int64_t x = 1, ticket = 0;
    const ovlm_all_reduce args = {.send = &x, .recv = &x, .n = 1, .dtype = OVLM_I64};
    (void)p;
    bool fine = ovlm_comm_all_reduce_start(comm, &args, &ticket, &err) == OVLM_OK &&
                ovlm_comm_wait(comm, ticket, &err) == OVLM_OK && x == 2;
    pid_t child = fork();
    if (child == 0) {
        bool refused = ovlm_comm_barrier(comm, &err) == OVLM_E_COMM &&
                       strstr(err.message, "forked") != NULL;
        ovlm_comm_abort(comm, "a child is no rank");
        ovlm_comm_close(comm);
        _exit(refused ? 0 : 1);
    }
    (void)waitpid(child, &status, 0);
    const struct timespec nap = {.tv_nsec = 300000000};
    (void)nanosleep(&nap, NULL); /* time to be taken for dead, if it were so */
    return fine && WIFEXITED(status) && WEXITSTATUS(status) == 0 &&
                   ovlm_comm_barrier(comm, &err) == OVLM_OK
               ? FINE
               : WRONG;
}

/* While rank 0 waits with what it sends laid out, its child calls with something else; rank 1,
 * which comes last, must not see that. */
static int act_fork_beside(ovlm_comm *comm, const play *p)
{
    const int64_t me = ovlm_comm_rank(comm), count[2] = {8, 8};
    const struct timespec early = {.tv_nsec = 100000000}, late = {.tv_nsec = 400000000};
    int64_t mine = 100 + me, all[2] = {0};
    const ovlm_all_gather args = {.send = &mine, .recv = all, .recv_bytes = count};
    pid_t child = me == 0 ? fork() : -1;
    int status = 0;
    (void)p;
    if (child == 0) {
        mine = -1;
        (void)nanosleep(&early, NULL);
        _exit(ovlm_comm_all_gather(comm, &args, NULL) == OVLM_E_COMM ? 0 : 1);
    }
    (void)nanosleep(me == 1 ? &late : &(struct timespec){0}, NULL);
    bool fine = ovlm_comm_all_gather(comm, &args, NULL) == OVLM_OK && all[0] == 100 &&
                all[1] == 101;
    (void)(child > 0 && waitpid(child, &status, 0));
    return fine && status == 0 ? FINE : WRONG;
}

/* A child finds a started call's queue, but not the thread that would do the work. */
static int act_fork_pending(ovlm_comm *comm, const play *p)
{
    int64_t x = 1, ticket = 0;
    const ovlm_all_reduce args = {.send = &x, .recv = &x, .n = 1, .dtype = OVLM_I64};
    int status = 0;
    bool fine = ovlm_comm_all_reduce_start(comm, &args, &ticket, NULL) == OVLM_OK;
    pid_t child = fork();
    (void)p;
    if (child == 0) {
        ovlm_err err = {0};
        bool refused = ovlm_comm_all_reduce_start(comm, &args, &ticket, &err) == OVLM_E_COMM &&
                       strstr(err.message, "forked") != NULL;
        ovlm_comm_close(comm);
        _exit(refused ? 0 : 1);
    }
    fine = fine && ovlm_comm_wait(comm, ticket, NULL) == OVLM_OK && x == 2;
    (void)waitpid(child, &status, 0);
    return fine && status == 0 ? FINE : WRONG;
}

static atomic_int *joined; /* ranks of both jobs */

/* Splits, and calls on their groups, beside another job's; `victim` tells the two apart. */
static int act_split_often(ovlm_comm *comm, const play *p)
{
    const struct timespec nap = {.tv_nsec = 1000000};
    atomic_fetch_add(joined, 1);
    for (int look = 0; look < 20000 && atomic_load(joined) < 2 * p->n; look++) {
        (void)nanosleep(&nap, NULL);
    }
    for (int i = 0; i < 200; i++) {
        ovlm_comm *part = NULL;
        ovlm_err err = {0};
        int64_t x = 1000 * p->victim + i;
        const ovlm_all_reduce least = {.send = &x, .recv = &x, .n = 1, .dtype = OVLM_I64,
                                       .reduce = OVLM_MIN};
        ovlm_status status = ovlm_comm_split(comm, 0, 0, &part, &err);
        status = status == OVLM_OK ? ovlm_comm_all_reduce(part, &least, &err) : status;
        ovlm_comm_close(part);
        if (status != OVLM_OK || x != 1000 * p->victim + i) {
            fprintf(stderr, "split %d: %lld %s\n", i, (long long)x, err.message);
            return WRONG;
        }
    }
    return FINE;
}

/* ---------------------------------------------------------------- tests */

static void check_all(const char *what, const play *p, const int *result, int64_t except, int want)
{
    for (int64_t r = 0; r < p->n; r++) {
        CHECK(result[r] == want || r == except, "%s: rank %lld of %lld ended with %d", what,
              (long long)r, (long long)p->n, result[r]);
    }
    CHECK(access(path, F_OK) != 0, "%s: the meeting point is still there", what);
    (void)unlink(path);
}

static void play_through(const char *what, const play *p, int64_t except, int want)
{
    pid_t process[RIG_RANKS_MOST];
    int result[RIG_RANKS_MOST];
    start_ranks(p, process);
    end_ranks(p, process, 60, result);
    check_all(what, p, result, except, want);
}

/* A signal for one of the ranks, at some moment. */
static void play_signal(const char *what, const play *p, int number)
{
    pid_t process[RIG_RANKS_MOST];
    int result[RIG_RANKS_MOST];
    start_ranks(p, process);
    const struct timespec nap = {.tv_nsec = 150000000 + (long)ovlm_rng_below(&test_rng, 100000000)};
    (void)nanosleep(&nap, NULL);
    (void)kill(process[p->victim], number);
    double start_s = ovlm_clock_s();
    for (int64_t r = 0; r < p->n; r++) {
        if (r != p->victim) {
            int status = 0;
            (void)waitpid(process[r], &status, 0);
            result[r] = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
        }
    }
    CHECK(ovlm_clock_s() - start_s < 30, "%s: took %g s", what, ovlm_clock_s() - start_s);
    (void)kill(process[p->victim], SIGKILL);
    (void)waitpid(process[p->victim], NULL, 0);
    check_all(what, p, result, p->victim, FAILED_WELL);
}

/* A file that a killed job left behind is no obstacle; someone's own file is not touched. */
static void test_left_behind(void)
{
    play p = {.n = 3, .options = {.silent_s = 5, .join_s = 5}, .act = act_well, .message = ""};
    pid_t alone = fork();
    if (alone == 0) {
        ovlm_comm *comm = NULL;
        _exit(ovlm_comm_open_local(path, 0, 3, &p.options, &comm, NULL) == OVLM_OK);
    }
    /* Two links: named, and the name that it was made under is not yet gone; that would stay. */
    struct stat found = {0};
    while (stat(path, &found) != 0 || found.st_nlink != 1) {
        const struct timespec nap = {.tv_nsec = 1000000};
        (void)nanosleep(&nap, NULL);
    }
    (void)kill(alone, SIGKILL);
    (void)waitpid(alone, NULL, 0);
    play_through("an old meeting point", &p, -1, FINE);
    FILE *own = fopen(path, "w");
    CHECK(own != NULL && fputs("dear diary", own) >= 0 && fclose(own) == 0, "file");
    p.options.join_s = 0.5;
    p.message = "rank 0 did not join";
    ovlm_comm *comm = NULL;
    ovlm_err err = {0};
    CHECK(ovlm_comm_open_local(path, 1, 2, &p.options, &comm, &err) == OVLM_E_COMM, "%s",
          err.message);
    (void)unlink(path);
}

/* A second job meets where a first one met that still runs; both split, and stay apart. */
static void test_same_place(void)
{
    play p[2];
    pid_t process[2][RIG_RANKS_MOST];
    int result[2][RIG_RANKS_MOST];
    void *place = mmap(NULL, sizeof *joined, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
                       -1, 0);
    CHECK(place != MAP_FAILED, "no memory");
    joined = place;
    for (int job = 0; job < 2; job++) {
        p[job] = (play){.n = 3, .options = {.silent_s = 5, .join_s = 20, .window_bytes = 512},
                        .act = act_split_often, .message = "", .victim = job};
        start_ranks(&p[job], process[job]);
        while (job == 0 && atomic_load(joined) < 3) {
            const struct timespec nap = {.tv_nsec = 1000000};
            (void)nanosleep(&nap, NULL);
        }
    }
    for (int job = 0; job < 2; job++) {
        end_ranks(&p[job], process[job], 60, result[job]);
        check_all("two jobs in one place", &p[job], result[job], -1, FINE);
    }
    (void)munmap(place, sizeof *joined);
}

static void test_joining(void)
{
    ovlm_err err = {0};
    ovlm_comm *comm = NULL;
    const ovlm_comm_local_options hasty = {.join_s = 0.3};
    CHECK(ovlm_comm_open_local(path, 1, 2, &hasty, &comm, &err) == OVLM_E_COMM &&
              strstr(err.message, "rank 0 did not join within 0.3 s"), "%s", err.message);
    CHECK(ovlm_comm_open_local(path, 0, 2, &hasty, &comm, &err) == OVLM_E_COMM &&
              strstr(err.message, "rank 1 did not join within 0.3 s"), "%s", err.message);
    CHECK(ovlm_comm_open_local(path, 2, 2, NULL, &comm, &err) == OVLM_E_ARG &&
              ovlm_comm_open_local(path, 0, 0, NULL, &comm, &err) == OVLM_E_ARG, "%s",
          err.message);
    CHECK(ovlm_comm_open_local("/no/such/folder/x", 0, 2, NULL, &comm, &err) == OVLM_E_COMM, "%s",
          err.message);
    for (int64_t some = 0; some < 2; some++) { /* rank 0 fails when the meeting point is there */
        ovlm_arena_fail_after(some);
        CHECK(ovlm_comm_open_local(path, 0, 2, &hasty, &comm, &err) == OVLM_E_NOMEM, "%s",
              err.message);
        ovlm_arena_fail_after(-1);
        CHECK(access(path, F_OK) != 0, "the meeting point of a rank 0 that failed is there");
    }
    CHECK(ovlm_comm_open_local(path, 0, 1, NULL, &comm, &err) == OVLM_OK, "%s", err.message);
    CHECK(ovlm_comm_barrier(comm, &err) == OVLM_OK, "%s", err.message);
    ovlm_comm_close(comm);
}

/* A rank that is killed in a split, before the others came to it, leaves that split's file. */
static void sweep(void)
{
    DIR *files = opendir(folder);
    for (const struct dirent *file; files != NULL && (file = readdir(files)) != NULL;) {
        char left[600];
        (void)snprintf(left, sizeof left, "%s/%s", folder, file->d_name);
        (void)unlink(left);
    }
    (void)closedir(files);
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
#if defined(WITH_THREAD_SANITIZER)
    return test_end("comm_processes");
#endif
    (void)snprintf(folder, sizeof folder, "%s/ovlm_comm_XXXXXX",
                   access("/dev/shm", W_OK) == 0 ? "/dev/shm" : ".");
    CHECK(mkdtemp(folder) != NULL, "%s", folder);
    (void)snprintf(path, sizeof path, "%s/meet", folder);
    const ovlm_comm_local_options options = {.silent_s = 5, .join_s = 20, .window_bytes = 512};
    for (int64_t n = 1; n <= 8; n += 1 + n / 3) {
        play_through("calls", &(play){.n = n, .options = options, .act = act_well, .message = ""},
                     -1, FINE);
    }
    play_through("fork", &(play){.n = 2, .options = options, .act = act_fork, .message = ""}, -1,
                 FINE);
    play_through("a call of a fork",
                 &(play){.n = 2, .options = options, .act = act_fork_beside, .message = ""}, -1,
                 FINE);
    play_through("a start of a fork",
                 &(play){.n = 2, .options = options, .act = act_fork_pending, .message = ""}, -1,
                 FINE);
    play_through("abort", &(play){.n = 4, .options = options, .act = act_abort, .victim = 2,
                                  .message = "rank 2 failed: KeyError: 'pixels'"}, -1,
                 FAILED_WELL);
    play_through("leave", &(play){.n = 4, .options = options, .act = act_leave, .victim = 1,
                                  .message = "rank 1 closed"}, -1, FAILED_WELL);
    for (int64_t victim = 0; victim < 2; victim++) {
        play_through("no files",
                     &(play){.n = 3, .options = options, .act = act_no_files, .victim = victim,
                             .message = victim == 0 ? "cannot create" : "cannot open"}, -1,
                     FAILED_WELL);
    }
    for (int64_t victim = 0; victim < 4; victim++) {
        char message[40];
        (void)snprintf(message, sizeof message, "rank %lld (process ", (long long)victim);
        play p = {.n = 4, .options = options, .act = act_until_failure, .victim = victim,
                  .message = message};
        play_signal("kill", &p, SIGKILL);
        sweep();
        p.options.silent_s = 1;
        if (victim == 1) {
            play_signal("stop", &p, SIGSTOP);
        }
    }
    test_joining();
    test_left_behind();
    test_same_place();
    CHECK(rmdir(folder) == 0, "files are left in %s", folder);
    return test_end("comm_processes");
}
