/* fuzz.h - what the fuzz targets share: arguments out of bytes, and invariants that trap.
 *
 * A target reads its arguments from the front of the input; an input that is too short goes on with
 * zeros, so every input is complete and mutations stay local. */
#ifndef OVLM_FUZZ_H
#define OVLM_FUZZ_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ovlm.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define MUST(condition, ...)                                                   \
    do {                                                                       \
        if (!(condition)) {                                                    \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition);    \
            fprintf(stderr, __VA_ARGS__);                                      \
            fprintf(stderr, "\n");                                             \
            abort();                                                           \
        }                                                                      \
    } while (0)

typedef struct fuzz_input {
    const uint8_t *data;
    size_t left;
} fuzz_input;

static inline uint64_t fuzz_bytes(fuzz_input *in, size_t n)
{
    uint64_t value = 0;
    for (size_t i = 0; i < n; i++) {
        uint8_t byte = 0;
        if (in->left > 0) {
            byte = *in->data++;
            in->left--;
        }
        value |= (uint64_t)byte << (8 * i);
    }
    return value;
}

/* Uniform enough in [low, high]; low when that is empty. */
static inline int64_t fuzz_range(fuzz_input *in, int64_t low, int64_t high)
{
    uint64_t drawn = fuzz_bytes(in, 2);
    return high < low ? low : low + (int64_t)(drawn % (uint64_t)(high - low + 1));
}

/* Any integer: small, a corner, or raw bits. */
static inline int64_t fuzz_wild(fuzz_input *in)
{
    static const int64_t corner[] = {0, 1, -1, INT64_MAX, INT64_MIN, INT64_MAX / 2,
                                     (int64_t)1 << 53, (int64_t)1 << 32, 4096};
    switch (fuzz_bytes(in, 1) % 3) {
    case 0: return (int64_t)fuzz_bytes(in, 2);
    case 1: return corner[fuzz_bytes(in, 1) % (sizeof corner / sizeof corner[0])];
    default: return (int64_t)fuzz_bytes(in, 8);
    }
}

/* A modest coefficient >= 0, often exactly 0 or a small integer so that ties occur. */
static inline double fuzz_coefficient(fuzz_input *in)
{
    switch (fuzz_bytes(in, 1) % 4) {
    case 0: return 0;
    case 1: return (double)fuzz_bytes(in, 1);
    case 2: return (double)fuzz_bytes(in, 2) * 0x1p-16;
    default: return (double)fuzz_bytes(in, 2) * 1e-9;
    }
}

/* Any double, NaN and infinities included. */
static inline double fuzz_wild_double(fuzz_input *in)
{
    if (fuzz_bytes(in, 1) % 2 == 0) {
        return fuzz_coefficient(in);
    }
    uint64_t bits = fuzz_bytes(in, 8);
    double value = 0;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Calls that fail must say how: a known status with the same code and a message in the record. */
static inline void fuzz_check_status(ovlm_status status, const ovlm_err *err)
{
    MUST(status >= OVLM_OK && status < OVLM_E_INTERNAL, "%s: %s", ovlm_status_name(status),
         err->message);
    MUST(status == OVLM_OK || (err->code == status && err->message[0] != '\0'),
         "status %d, code %d", (int)status, (int)err->code);
}

#endif
