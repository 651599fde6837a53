/* bf16.h - bfloat16: the upper half of a float32. */
#ifndef OVLM_BASE_BF16_H
#define OVLM_BASE_BF16_H

#include <stdint.h>
#include <string.h>

static inline float ovlm_math_from_bf16(uint16_t value)
{
    uint32_t bits = (uint32_t)value << 16;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}

/* To nearest even; NaN stays NaN. */
static inline uint16_t ovlm_math_to_bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t even = bits + 0x7fffu + ((bits >> 16) & 1u);
    uint32_t quiet = bits | 0x400000u;
    uint32_t chosen = (bits & 0x7fffffffu) > 0x7f800000u ? quiet : even;
    return (uint16_t)(chosen >> 16);
}

#endif
