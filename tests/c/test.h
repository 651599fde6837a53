/* test.h - the C tests' harness: CHECK counts, a failed one prints where and fails the program.
 *
 *   int main(int argc, char **argv) { test_start(argc, argv); test_x(); return test_end("x"); }
 *
 * The seed comes from argv[1] or the clock and is printed, so that a failure can be repeated. */
#ifndef OVLM_TEST_H
#define OVLM_TEST_H

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "base/rng.h"

static long test_checks, test_failures;
static ovlm_rng test_rng;
static unsigned long long test_seed;

#define CHECK(condition, ...)                                                    \
    do {                                                                         \
        test_checks++;                                                           \
        if (!(condition)) {                                                      \
            if (test_failures++ < 20) {                                          \
                fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition);  \
                fprintf(stderr, __VA_ARGS__);                                    \
                fprintf(stderr, "\n");                                           \
            }                                                                    \
        }                                                                        \
    } while (0)

static inline void test_start(int argc, char **argv)
{
    test_seed = argc > 1 ? strtoull(argv[1], NULL, 10) : (unsigned long long)time(NULL);
    ovlm_rng_init(&test_rng, test_seed);
}

static inline int test_end(const char *name)
{
    printf("%s: %ld checks, %ld failed (seed %llu)\n", name, test_checks, test_failures,
           test_seed);
    return test_failures ? 1 : 0;
}

#endif
