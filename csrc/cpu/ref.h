/* ref.h - elements of any dtype as doubles: what the reference's loops are made of.
 *
 * The reference is the specification in code: one loop per index of the equation, everything in
 * double, rounding when an element is stored.  It keeps nothing between the passes and has no
 * threads.  It checks what only the device knows (indices, segments, offsets), which the others
 * may trust, and reports it late as they would. */
#ifndef OVLM_CPU_REF_H
#define OVLM_CPU_REF_H

#include "cpu/cpu.h"
#include "cpu/host_life.h"

#include <math.h>
#include <string.h>

static inline float ovlm_ref_of_bf16(uint16_t bits)
{
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

/* To nearest, ties to even; a NaN stays one. */
static inline uint16_t ovlm_ref_to_bf16(double value)
{
    float narrow = (float)value;
    uint32_t bits;
    memcpy(&bits, &narrow, sizeof bits);
    if (narrow != narrow) {
        return (uint16_t)(bits >> 16 | 0x40u);
    }
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static inline double ovlm_ref_at(const ovlm_tensor *t, int64_t row, int64_t col)
{
    int64_t i = row * t->stride + col;
    switch (t->dtype) {
    case OVLM_F32: return (double)((const float *)t->data)[i];
    case OVLM_BF16: return (double)ovlm_ref_of_bf16(((const uint16_t *)t->data)[i]);
    case OVLM_F64: return ((const double *)t->data)[i];
    case OVLM_U8: return (double)((const uint8_t *)t->data)[i];
    case OVLM_I32: return (double)((const int32_t *)t->data)[i];
    case OVLM_I64: return (double)((const int64_t *)t->data)[i];
    case OVLM_F16:
    case OVLM_DTYPE_COUNT: break;
    }
    return (double)NAN;
}

/* The validator lets no other dtype through as a result. */
static inline void ovlm_ref_put(const ovlm_tensor *t, int64_t row, int64_t col, double value)
{
    int64_t i = row * t->stride + col;
    if (t->dtype == OVLM_F32) {
        ((float *)t->data)[i] = (float)value;
    } else if (t->dtype == OVLM_BF16) {
        ((uint16_t *)t->data)[i] = ovlm_ref_to_bf16(value);
    } else if (t->dtype == OVLM_F64) {
        ((double *)t->data)[i] = value;
    }
}

/* Overwrites, or adds where beta is 1.  What is overwritten may be anything, NaN too. */
static inline void ovlm_ref_add(const ovlm_tensor *t, int64_t row, int64_t col, double value,
                                double beta)
{
    ovlm_ref_put(t, row, col, beta == 0 ? value : value + beta * ovlm_ref_at(t, row, col));
}

extern const ovlm_ops ovlm_ref_ops;

/* act(x) and its slope. */
double ovlm_ref_act(ovlm_act act, double x);
double ovlm_ref_act_slope(ovlm_act act, double x);

/* A late error of the operation: its arguments are on the device and wrong. */
#define OVLM_REF_LATE(queue, ...)                                     \
    do {                                                              \
        ovlm_err ref_late;                                            \
        ovlm_err_set(&ref_late, OVLM_E_BACKEND, __FILE__, __LINE__, __VA_ARGS__); \
        ovlm_host_fail_late((queue), &ref_late);                      \
        return OVLM_OK;                                               \
    } while (0)

#endif
