/* status.h - how C calls of this library fail.
 *
 * A fallible call returns ovlm_status and takes ovlm_err *err last (NULL allowed).  The first
 * failure writes code, message, file and line with OVLM_FAIL; callers forward with OVLM_TRY or,
 * where there is something to release, OVLM_GOTO(done, ...) to one clean-up label. */
#ifndef OVLM_BASE_STATUS_H
#define OVLM_BASE_STATUS_H

#include "ovlm.h"

void ovlm_err_set(ovlm_err *err, ovlm_status code, const char *file, int line,
                  const char *format, ...) OVLM_PRINTF(5, 6);

/* Its value is `code`, where compilers and analysers can see it. */
#define OVLM_FAIL(err, code, ...) \
    (ovlm_err_set((err), (code), __FILE__, __LINE__, __VA_ARGS__), (code))

#define OVLM_TRY(call)                       \
    do {                                     \
        ovlm_status try_status = (call);     \
        if (try_status != OVLM_OK) {         \
            return try_status;               \
        }                                    \
    } while (0)

/* Needs a local variable `status`. */
#define OVLM_GOTO(label, call)     \
    do {                           \
        status = (call);           \
        if (status != OVLM_OK) {   \
            goto label;            \
        }                          \
    } while (0)

#endif
