/* backend.h - the op table: what a compute backend offers, in one struct of functions.
 *
 * Code above this floor holds an ovlm_backend and never asks which one it is.  The table begins
 * with what a loader needs to refuse a stranger politely; those three members never move.
 *
 * Also read by C++ (nvcc): no C-only construct here. */
#ifndef OVLM_BACKEND_BACKEND_H
#define OVLM_BACKEND_BACKEND_H

#include "ovlm.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever the table, ovlm_err or ovlm_status changes. */
#define OVLM_BACKEND_ABI 1u

/* An open device.  The first member of every backend's own struct. */
typedef struct ovlm_backend {
    const ovlm_ops *ops;
} ovlm_backend;

struct ovlm_ops {
    uint32_t abi;        /* OVLM_BACKEND_ABI of the build                                       */
    uint32_t size_bytes; /* sizeof(ovlm_ops) of the build                                       */
    const char *name;    /* "cuda", ...; static                                                 */

    /* Number of devices, >= 1.  OVLM_E_BACKEND says in one line why there is none. */
    ovlm_status (*device_count)(int64_t *count, ovlm_err *err);
    /* One line on a device, e.g. "NVIDIA H200, compute capability 9.0, 139 GiB". */
    ovlm_status (*device_describe)(int64_t device, char *text, size_t text_bytes, ovlm_err *err);

    /* Makes a device ready to compute; the caller owns *backend and closes it. */
    ovlm_status (*open)(int64_t device, ovlm_backend **backend, ovlm_err *err);
    void (*close)(ovlm_backend *backend); /* NULL is fine */
};

/* The one symbol that a backend's shared object exports. */
typedef const ovlm_ops *(*ovlm_backend_entry_fn)(void);
#define OVLM_BACKEND_ENTRY "ovlm_backend_entry"

#ifdef __cplusplus
}
#endif
#endif
