/* cpu_math.h - exp, tanh, erf, sigmoid and the activations in float32, as straight-line code.
 *
 * No call, no branch, no table: a loop over these functions is vectorised by the compiler at
 * whatever width its target has.  Relative errors measured against double precision over all
 * finite floats: exp, erf 1e-7, sigmoid, tanh 1.5e-7; activations and slopes, absolute where they
 * are below 1: 1.3e-7.  NaN gives NaN; exp, tanh, erf and sigmoid take infinities to their limits.
 * The polynomials are minimax fits (Lawson's iteration, weighted for relative error) on
 * the intervals that the comments name. */
#ifndef OVLM_CPU_CPU_MATH_H
#define OVLM_CPU_CPU_MATH_H

#include <stdint.h>
#include <string.h>

#include "base/bf16.h"

static inline float ovlm_math_from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t ovlm_math_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float ovlm_math_clamp(float x, float low, float high)
{
    x = x < low ? low : x; /* this way round NaN stays NaN */
    return x > high ? high : x;
}

/* e^x = 2^n e^r with n = round(x / ln 2), |r| <= ln 2 / 2. */
static inline float ovlm_math_exp(float x)
{
    const float shift = 0x1.8p23f; /* adding it rounds to an integer, held in the low bits */
    x = ovlm_math_clamp(x, -105.0f, 89.0f);
    float shifted = x * 0x1.715476p+0f + shift;
    float n = shifted - shift;
    float r = x - n * 0x1.62e4p-1f; /* ln 2 in two parts; n times the first is exact */
    r = r - n * 0x1.7f7d1cp-20f;
    float p = 0x1.6a2318p-10f; /* (e^r - 1 - r) / r^2 on |r| < 0.347 */
    p = p * r + 0x1.123a8ep-7f;
    p = p * r + 0x1.5558f6p-5f;
    p = p * r + 0x1.555490p-3f;
    p = p * r + 0x1.fffffcp-2f;
    p = p * (r * r) + r + 1.0f;
    /* 2^n in two factors, so that subnormal results and infinity come out by themselves. */
    uint32_t whole = ovlm_math_bits(shifted) - 0x4b400000u + 256u; /* n + 256 > 0 */
    uint32_t half = whole >> 1;
    float scale = ovlm_math_from_bits((half - 1u) << 23);
    float rest = ovlm_math_from_bits((whole - half - 1u) << 23);
    return p * scale * rest;
}

static inline float ovlm_math_sigmoid(float x)
{
    return 1.0f / (1.0f + ovlm_math_exp(-x));
}

/* x + x^3 P(x^2) near 0, else 1 - 2 / (e^(2|x|) + 1). */
static inline float ovlm_math_tanh(float x)
{
    float a = x < 0.0f ? -x : x;
    float u = ovlm_math_clamp(x * x, 0.0f, 0.390625f);
    float p = -0x1.75e1e4p-8f; /* (tanh(x)/x - 1) / x^2 on |x| < 0.625 */
    p = p * u + 0x1.5226a0p-6f;
    p = p * u - 0x1.b83c5ap-5f;
    p = p * u + 0x1.110726p-3f;
    p = p * u - 0x1.555532p-2f;
    float near = x * (p * u) + x;
    float far = 1.0f - 2.0f / (ovlm_math_exp(2.0f * a) + 1.0f);
    far = x < 0.0f ? -far : far;
    return a < 0.625f ? near : far;
}

/* x + x Q(x^2) near 0, else 1 - e^-g(|x|): the logarithm of erfc is smooth. */
static inline float ovlm_math_erf(float x)
{
    float a = x < 0.0f ? -x : x;
    float u = ovlm_math_clamp(x * x, 0.0f, 1.0f);
    float q = 0x1.496a74p-14f; /* erf(x)/x - 1 on |x| < 1 */
    q = q * u - 0x1.a3f718p-11f;
    q = q * u + 0x1.5405b6p-8f;
    q = q * u - 0x1.b7f90ep-6f;
    q = q * u + 0x1.ce2cf8p-4f;
    q = q * u - 0x1.81273ep-2f;
    q = q * u + 0x1.06eba8p-3f;
    float near = x * q + x;
    float t = ovlm_math_clamp(a, 0.0f, 3.95f); /* beyond, erf rounds to 1 */
    float g = -0x1.86dd60p-13f;                /* -log erfc(t) on [1, 3.95] */
    g = g * t + 0x1.825ae0p-9f;
    g = g * t - 0x1.65cb6ap-6f;
    g = g * t + 0x1.a6533cp-4f;
    g = g * t + 0x1.46baecp-1f;
    g = g * t + 0x1.2088eap+0f;
    g = g * t + 0x1.661eaep-12f;
    float far = 1.0f - ovlm_math_exp(-g);
    far = x < 0.0f ? -far : far;
    return a < 1.0f ? near : far;
}

/* Activations, with the formulas of ovlm_act. */
static inline float ovlm_math_gelu_erf(float x)
{
    return 0.5f * x * (1.0f + ovlm_math_erf(x * 0x1.6a09e6p-1f));
}

/* (1 + tanh u)/2 = sigmoid(2u), here with 2u = 2 sqrt(2/pi) (x + 0.044715 x^3). */
static inline float ovlm_math_gelu_tanh(float x)
{
    return x * ovlm_math_sigmoid(0x1.988454p+0f * (x + 0.044715f * (x * x * x)));
}

static inline float ovlm_math_quick_gelu(float x)
{
    return x * ovlm_math_sigmoid(1.702f * x);
}

static inline float ovlm_math_silu(float x)
{
    return x * ovlm_math_sigmoid(x);
}

/* d(x s(z))/dx = s + x s (1-s) dz with 1-s = e^-z s, which does not cancel.  |z| <= 80: beyond,
 * the slope is 0 or 1 in float32, and e^-z stays finite. */
static inline float ovlm_math_sigmoid_slope(float x, float z, float dz)
{
    float e = ovlm_math_exp(-z);
    float s = 1.0f / (1.0f + e);
    return s + x * dz * (s * (e * s));
}

static inline float ovlm_math_gelu_erf_slope(float x)
{
    x = ovlm_math_clamp(x, -16.0f, 16.0f); /* no product of infinity and zero */
    float density = 0x1.988454p-2f * ovlm_math_exp(-0.5f * (x * x)); /* 1/sqrt(2 pi) e^(-x^2/2) */
    return 0.5f + 0.5f * ovlm_math_erf(x * 0x1.6a09e6p-1f) + x * density;
}

static inline float ovlm_math_gelu_tanh_slope(float x)
{
    x = ovlm_math_clamp(x, -9.0f, 9.0f);
    return ovlm_math_sigmoid_slope(x, 0x1.988454p+0f * (x + 0.044715f * (x * x * x)),
                                   0x1.988454p+0f * (1.0f + 0.134145f * (x * x)));
}

static inline float ovlm_math_quick_gelu_slope(float x)
{
    x = ovlm_math_clamp(x, -47.0f, 47.0f);
    return ovlm_math_sigmoid_slope(x, 1.702f * x, 1.702f);
}

static inline float ovlm_math_silu_slope(float x)
{
    x = ovlm_math_clamp(x, -80.0f, 80.0f);
    return ovlm_math_sigmoid_slope(x, x, 1.0f);
}

#endif
