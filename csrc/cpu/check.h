/* check.h - a backend that runs every operation twice: on the backend under test, whose results
 * count, and on the reference in float64, on copies of the same arguments.  Where an output differs
 * by more than the operation may round, the queue gets a late error that names the operation, the
 * output and its first wrong element.
 *
 * Slow by design: every call waits.  The backend under test may be any, of the host or not. */
#ifndef OVLM_CPU_CHECK_H
#define OVLM_CPU_CHECK_H

#include "backend/op_schema.h"

OVLM_NODISCARD ovlm_status ovlm_check_open(const ovlm_ops *tested,
                                           const ovlm_backend_options *options,
                                           ovlm_backend **backend, ovlm_err *err);

extern const ovlm_ops ovlm_check_ops;

/* Runs and compares one call.  OVLM_E_ARG and OVLM_E_NOMEM: refused; OVLM_E_BACKEND: a late error
 * of either side, or a difference. */
OVLM_NODISCARD ovlm_status ovlm_check_run(const ovlm_ops *ops, ovlm_queue *tested,
                                          ovlm_queue *reference, ovlm_op op, ovlm_pass pass,
                                          const void *args, ovlm_err *err);

/* How large the terms are that each output element is made of: what rounding errors are relative
 * to.  `args` are the reference's, after it ran, all tensors float64 and the inputs as they were.
 * In `scale`, of the same form, inputs are the magnitudes of those of args, and outputs, zero
 * before, receive the terms.
 * `queue` is the reference's. */
OVLM_NODISCARD ovlm_status ovlm_check_scale(ovlm_op op, ovlm_pass pass, ovlm_queue *queue,
                                            const void *args, void *scale, ovlm_err *err);

/* One member of one call, on both sides. */
typedef struct ovlm_check_slot {
    const ovlm_member *member;
    ovlm_role role;
    int64_t part;          /* of a list; -1: none                           */
    void *tested;          /* first byte, device memory of the tested       */
    int64_t rows, cols, stride;
    int type;              /* of the tested: dtype or element               */
    int64_t bytes;         /* from the first element to the last            */
    void *raw;             /* the tested's bytes on the host                */
    ovlm_tensor reference; /* float64, or an array as one row of its type   */
    ovlm_tensor scale;
} ovlm_check_slot;

/* OVLM_E_BACKEND with the first element that differs.  terms: how many an element may sum. */
OVLM_NODISCARD ovlm_status ovlm_check_compare(const char *op, ovlm_pass pass,
                                              const ovlm_check_slot *slot, int64_t terms,
                                              double inner_eps, ovlm_err *err);

#endif
