/* rng.h - small deterministic random numbers: splitmix64 seeding, xoshiro256** stream.
 * Same seed, same numbers, on every machine.  (Blackman and Vigna, "Scrambled linear
 * pseudorandom number generators", 2018; Lemire's multiply-shift for ranges.) */
#ifndef OVLM_BASE_RNG_H
#define OVLM_BASE_RNG_H

#include <stdint.h>

typedef struct ovlm_rng {
    uint64_t s[4];
} ovlm_rng;

static inline uint64_t ovlm_rng_rotl(uint64_t x, int k)
{
    return (x << k) | (x >> (64 - k));
}

static inline void ovlm_rng_init(ovlm_rng *rng, uint64_t seed)
{
    for (int i = 0; i < 4; i++) {
        seed += 0x9e3779b97f4a7c15u;
        uint64_t z = seed;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        rng->s[i] = z ^ (z >> 31);
    }
}

static inline uint64_t ovlm_rng_next(ovlm_rng *rng)
{
    uint64_t *s = rng->s;
    uint64_t result = ovlm_rng_rotl(s[1] * 5, 7) * 9;
    uint64_t t = s[1] << 17;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = ovlm_rng_rotl(s[3], 45);
    return result;
}

/* Uniform in [0, n), n in [1, 2^32]; bias below 2^-32. */
static inline int64_t ovlm_rng_below(ovlm_rng *rng, int64_t n)
{
    return (int64_t)(((ovlm_rng_next(rng) >> 32) * (uint64_t)n) >> 32);
}

/* Uniform in [0, 1). */
static inline double ovlm_rng_uniform(ovlm_rng *rng)
{
    return (double)(ovlm_rng_next(rng) >> 11) * 0x1.0p-53;
}

#endif
