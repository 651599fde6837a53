/* status.c - the error record. */
#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>

const char *ovlm_status_name(ovlm_status status)
{
    switch (status) {
    case OVLM_OK: return "ok";
    case OVLM_E_ARG: return "bad argument";
    case OVLM_E_NOMEM: return "out of memory";
    case OVLM_E_BACKEND: return "backend error";
    case OVLM_E_COMM: return "communication error";
    case OVLM_E_UNDECIDED: return "undecided";
    case OVLM_E_INTERRUPTED: return "interrupted";
    case OVLM_E_INTERNAL: return "internal error";
    }
    return "unknown status";
}

void ovlm_err_set(ovlm_err *err, ovlm_status code, const char *file, int line,
                  const char *format, ...)
{
    if (err != NULL) {
        va_list args;
        err->code = code;
        err->file = file;
        err->line = line;
        va_start(args, format);
        (void)vsnprintf(err->message, sizeof err->message, format, args);
        va_end(args);
    }
}
