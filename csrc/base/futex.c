/* futex.c - on Linux the kernel's futex, which holds no lock that a dying process could keep;
 * elsewhere short sleeps. */
#if defined(__linux__)
#define _GNU_SOURCE /* syscall */
#endif
#include "base/futex.h"

#include <stddef.h>
#include <time.h>

#if defined(__linux__)
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

void ovlm_futex_wait(const atomic_uint *word, unsigned seen, double seconds)
{
    struct timespec limit = {.tv_sec = (time_t)seconds};
    limit.tv_nsec = (long)((seconds - (double)limit.tv_sec) * 1e9);
    (void)syscall(SYS_futex, word, FUTEX_WAIT, seen, &limit, NULL, 0);
}

void ovlm_futex_wake(atomic_uint *word)
{
    (void)syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}
#else
void ovlm_futex_wait(const atomic_uint *word, unsigned seen, double seconds)
{
    long sleep_ns = 20000;
    for (double left = seconds; left > 0 && atomic_load(word) == seen;) {
        const struct timespec nap = {.tv_nsec = sleep_ns};
        (void)nanosleep(&nap, NULL);
        left -= 1e-9 * (double)sleep_ns;
        sleep_ns = sleep_ns < 1000000 ? 2 * sleep_ns : sleep_ns;
    }
}

void ovlm_futex_wake(atomic_uint *word)
{
    (void)word;
}
#endif
