/* op_check.h - one validator of arguments for all backends.
 *
 * ovlm_op_check_linear(&args, OVLM_PASS_FWD, err) and so on: shapes that do not go together, dtypes
 * that no backend takes, missing or misaligned pointers, overlaps that are not allowed.
 * OVLM_E_ARG names the operation, the member and the value.  Device memory is not read. */
#ifndef OVLM_BACKEND_OP_CHECK_H
#define OVLM_BACKEND_OP_CHECK_H

#include "backend/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum ovlm_pass {
    OVLM_PASS_MEASURE, /* shapes alone: pointers may be NULL */
    OVLM_PASS_FWD,
    OVLM_PASS_BWD
} ovlm_pass;

#define OVLM_OP_CHECK(op, args) \
    OVLM_NODISCARD ovlm_status ovlm_op_check_##op(const args *a, ovlm_pass pass, ovlm_err *err);
OVLM_OPS(OVLM_OP_CHECK)
#undef OVLM_OP_CHECK

#ifdef __cplusplus
}
#endif
#endif
