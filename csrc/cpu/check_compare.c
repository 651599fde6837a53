/* check_compare.c - when two results of an operation are the same.
 *
 *   |tested - reference| <= eps(stored) |reference| + (4 + 2 sqrt(n)) eps(inside) (S + |reference|)
 *
 * S is the sum of the magnitudes of the n terms that the element is made of, including how much the
 * operation amplifies errors of its inputs (check_scale.c); what it is added to (beta) is at most
 * S + |reference|.  A sum of n terms in float32 errs by at
 * most n eps S; summed in a few interleaved parts, as all do, by about sqrt(n) eps S. */
#include "cpu/check.h"

#include "cpu/ref.h"

#include <stdio.h>

/* Element of a dense row of any element type. */
static double element_at(const void *data, int type, int64_t at)
{
    if (type == OVLM_ELEMENT_STATS) {
        return ((const ovlm_grad_stats *)data)[at].norm_sq;
    }
    ovlm_tensor t = ovlm_tensor_of((void *)(uintptr_t)data, 1, at + 1, (ovlm_dtype)type);
    return ovlm_ref_at(&t, 0, at);
}

static double stored_eps(int type)
{
    return type == OVLM_BF16  ? 0x1p-8
           : type == OVLM_F32 ? 0x1p-24
           : type == OVLM_F64 || type == OVLM_ELEMENT_STATS ? 0x1p-50
                              : 0;
}

static bool is_integer(int type)
{
    return type == OVLM_I32 || type == OVLM_I64 || type == OVLM_U8;
}

/* Both infinite alike, or both NaN, is the same: memory that nobody wrote is NaN. */
static bool same_value(double tested, double reference, double tolerance)
{
    if (isnan(reference) || isnan(tested)) {
        return isnan(reference) && isnan(tested);
    }
    return tested == reference || fabs(tested - reference) <= tolerance;
}

static ovlm_status compare_stats(const char *op, const ovlm_check_slot *slot, double tolerance,
                                 ovlm_err *err)
{
    const ovlm_grad_stats *tested = slot->raw, *reference = slot->reference.data;
    if (!same_value(tested->norm_sq, reference->norm_sq, tolerance * fabs(reference->norm_sq)) ||
        !same_value(tested->clip, reference->clip, tolerance * fabs(reference->clip)) ||
        tested->non_finite != reference->non_finite) {
        return OVLM_FAIL(err, OVLM_E_BACKEND,
                         "%s forward: stats are {%.17g, %.17g, %lld}, the reference has {%.17g, "
                         "%.17g, %lld}", op, tested->norm_sq, tested->clip,
                         (long long)tested->non_finite, reference->norm_sq, reference->clip,
                         (long long)reference->non_finite);
    }
    return OVLM_OK;
}

ovlm_status ovlm_check_compare(const char *op, ovlm_pass pass, const ovlm_check_slot *slot,
                               int64_t terms, double inner_eps, ovlm_err *err)
{
    double factor = is_integer(slot->type) ? 0 : (4 + 2 * sqrt((double)terms)) * inner_eps;
    if (slot->type == OVLM_ELEMENT_STATS) {
        return compare_stats(op, slot, factor, err);
    }
    char part[32] = "";
    if (slot->part >= 0) {
        (void)snprintf(part, sizeof part, " of part %lld", (long long)slot->part);
    }
    for (int64_t i = 0; i < slot->rows * slot->cols; i++) {
        int64_t row = i / slot->cols, col = i % slot->cols;
        double tested = element_at(slot->raw, slot->type, row * slot->stride + col);
        double reference = element_at(slot->reference.data, (int)slot->reference.dtype, i);
        double scale = element_at(slot->scale.data, (int)slot->scale.dtype, i);
        double tolerance = stored_eps(slot->type) * fabs(reference) +
                           factor * (fabs(scale) + fabs(reference)) +
                           (is_integer(slot->type) ? 0 : 0x1p-126); /* underflow */
        if (!same_value(tested, reference, tolerance)) {
            return OVLM_FAIL(err, OVLM_E_BACKEND,
                             "%s %s: %s%s[%lld, %lld] is %.9g, the reference has %.9g (tolerance "
                             "%.3g)", op, pass == OVLM_PASS_BWD ? "backward" : "forward",
                             slot->member->name, part, (long long)row, (long long)col, tested,
                             reference, tolerance);
        }
    }
    return OVLM_OK;
}
