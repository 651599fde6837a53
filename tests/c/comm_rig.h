/* comm_rig.h - ranks as threads, each with its own random numbers and its own list of failures. */
#ifndef OVLM_COMM_RIG_H
#define OVLM_COMM_RIG_H

#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>

#include "base/bf16.h"
#include "base/clock.h"
#include "cpu/comm_local.h"
#include "test.h"

enum { RIG_RANKS_MOST = 16 };

typedef struct rig_rank {
    ovlm_comm *comm;
    int64_t rank, n;
    ovlm_rng shared; /* the same numbers on all ranks */
    ovlm_rng own;
    void (*body)(struct rig_rank *self);
    const void *ctx;
    ovlm_status status; /* of the body's last call */
    ovlm_err err;
    double took_s;
    long checks, failures;
    char first[300];
} rig_rank;

/* CHECK for a rank: counted where no other thread writes. */
#define RCHECK(self, condition, ...)                                                     \
    do {                                                                                 \
        (self)->checks++;                                                                \
        if (!(condition) && (self)->failures++ == 0) {                                   \
            int rig_used = snprintf((self)->first, sizeof(self)->first, "line %d: %s: ", \
                                    __LINE__, #condition);                               \
            rig_note((self)->first + rig_used, sizeof(self)->first - (size_t)rig_used,   \
                     __VA_ARGS__);                                                       \
        }                                                                                \
    } while (0)

OVLM_PRINTF(3, 4)
static inline void rig_note(char *to, size_t bytes, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    (void)vsnprintf(to, bytes, format, args);
    va_end(args);
}

/* A call that must succeed. */
#define RTRY(self, call) \
    RCHECK(self, ((self)->status = (call)) == OVLM_OK, "%s", (self)->err.message)

static inline void *rig_bytes(int64_t bytes)
{
    void *memory = malloc((size_t)(bytes > 0 ? bytes : 1));
    if (memory == NULL) {
        fprintf(stderr, "out of memory\n");
        exit(1);
    }
    memset(memory, 0xee, (size_t)bytes);
    return memory;
}

static inline void *rig_thread(void *argument)
{
    rig_rank *self = argument;
    double start_s = ovlm_clock_s();
    self->body(self);
    self->took_s = ovlm_clock_s() - start_s;
    ovlm_comm_close(self->comm);
    return NULL;
}

/* Runs the body on n ranks; `ranks` keeps what they say.  Communicators are closed after it. */
static inline void rig_run(const char *what, int64_t n, const ovlm_comm_local_options *options,
                           void (*body)(rig_rank *), const void *ctx, rig_rank *ranks)
{
    ovlm_comm *comms[RIG_RANKS_MOST] = {NULL};
    pthread_t threads[RIG_RANKS_MOST];
    ovlm_err err = {0};
    uint64_t seed = ovlm_rng_next(&test_rng);
    CHECK(ovlm_comm_open_threads(n, options, comms, &err) == OVLM_OK, "%s", err.message);
    for (int64_t r = 0; r < n; r++) {
        memset(&ranks[r], 0, sizeof ranks[r]);
        ranks[r].comm = comms[r];
        ranks[r].rank = r;
        ranks[r].n = n;
        ranks[r].body = body;
        ranks[r].ctx = ctx;
        ovlm_rng_init(&ranks[r].shared, seed);
        ovlm_rng_init(&ranks[r].own, seed + 1 + (uint64_t)r);
        if (pthread_create(&threads[r], NULL, rig_thread, &ranks[r]) != 0) {
            fprintf(stderr, "no thread\n");
            exit(1);
        }
    }
    for (int64_t r = 0; r < n; r++) {
        (void)pthread_join(threads[r], NULL);
        test_checks += ranks[r].checks;
        CHECK(ranks[r].failures == 0, "%s: rank %lld of %lld: %ld failures, first: %s", what,
              (long long)r, (long long)n, ranks[r].failures, ranks[r].first);
    }
}

/* Byte i of what `from` sends to `to`, in exchange number `salt`. */
static inline unsigned char rig_byte(int64_t salt, int64_t from, int64_t to, int64_t i)
{
    uint64_t x = (uint64_t)salt * 0x9e3779b97f4a7c15u + (uint64_t)from * 1000003u +
                 (uint64_t)to * 10007u + (uint64_t)i;
    x ^= x >> 29;
    x *= 0xbf58476d1ce4e5b9u;
    return (unsigned char)(x >> 56);
}

/* A size: often nothing, mostly little, sometimes much. */
static inline int64_t rig_size(ovlm_rng *rng, int64_t most)
{
    switch (ovlm_rng_below(rng, 6)) {
    case 0: return 0;
    case 1: return ovlm_rng_below(rng, most + 1);
    default: return ovlm_rng_below(rng, most / 32 + 2);
    }
}

#endif
