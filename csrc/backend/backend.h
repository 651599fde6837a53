/* backend.h - the op table: what a compute backend offers, in one struct of functions.
 *
 * Code above this floor holds an ovlm_backend and never asks which one it is.  The table begins
 * with what a loader needs to refuse a stranger politely; those three members never move.
 *
 * Also read by C++ (nvcc): no C-only construct here. */
#ifndef OVLM_BACKEND_BACKEND_H
#define OVLM_BACKEND_BACKEND_H

#include "backend/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever the table, an argument struct, ovlm_err or ovlm_status changes. */
#define OVLM_BACKEND_ABI 4u

/* An open device.  The first member of every backend's own struct. */
typedef struct ovlm_backend {
    const ovlm_ops *ops;
    bool host_memory; /* host code may read device memory (after waiting for the queue)        */
} ovlm_backend;

/* Work in order.  The first member of every backend's own struct. */
typedef struct ovlm_queue {
    ovlm_backend *backend;
} ovlm_queue;

/* A point in a queue; each backend has its own struct. */
typedef struct ovlm_event ovlm_event;

typedef struct ovlm_backend_options {
    int64_t device;
    int64_t threads; /* of CPU backends; 0: one per core */
} ovlm_backend_options;

typedef enum ovlm_copy_kind { OVLM_TO_DEVICE, OVLM_TO_HOST, OVLM_ON_DEVICE } ovlm_copy_kind;

struct ovlm_ops {
    uint32_t abi;        /* OVLM_BACKEND_ABI of the build                                       */
    uint32_t size_bytes; /* sizeof(ovlm_ops) of the build                                       */
    const char *name;    /* "cuda", ...; static                                                 */

    /* Number of devices, >= 1.  OVLM_E_BACKEND says in one line why there is none. */
    ovlm_status (*device_count)(int64_t *count, ovlm_err *err);
    /* One line on a device, e.g. "NVIDIA H200, compute capability 9.0, 139 GiB". */
    ovlm_status (*device_describe)(int64_t device, char *text, size_t text_bytes, ovlm_err *err);

    /* Makes a device ready to compute; the caller owns *backend and closes it, after everything
     * that it made from it. */
    ovlm_status (*open)(const ovlm_backend_options *options, ovlm_backend **backend,
                        ovlm_err *err);
    void (*close)(ovlm_backend *backend); /* NULL is fine */

    /* Device memory, 64-byte aligned, contents undefined; host memory that copies run fast from. */
    ovlm_status (*alloc)(ovlm_backend *backend, int64_t bytes, void **out, ovlm_err *err);
    void (*free)(ovlm_backend *backend, void *memory);
    ovlm_status (*host_alloc)(ovlm_backend *backend, int64_t bytes, void **out, ovlm_err *err);
    void (*host_free)(ovlm_backend *backend, void *memory);

    ovlm_status (*queue_open)(ovlm_backend *backend, ovlm_queue **queue, ovlm_err *err);
    void (*queue_close)(ovlm_queue *queue); /* waits for its work */
    /* Waits until everything on the queue is done.  The first late error since the last call, if
     * any; the message names the operation. */
    ovlm_status (*queue_wait)(ovlm_queue *queue, ovlm_err *err);

    ovlm_status (*event_open)(ovlm_backend *backend, ovlm_event **event, ovlm_err *err);
    void (*event_close)(ovlm_backend *backend, ovlm_event *event);
    ovlm_status (*event_record)(ovlm_event *event, ovlm_queue *queue, ovlm_err *err);
    /* What is put on the queue from now on starts after the recorded point. */
    ovlm_status (*queue_follow)(ovlm_queue *queue, ovlm_event *event, ovlm_err *err);
    ovlm_status (*event_wait)(ovlm_event *event, ovlm_err *err); /* the host waits */
    bool (*event_done)(ovlm_event *event);

    /* In the queue's order.  Host memory must stay until then. */
    ovlm_status (*copy)(ovlm_queue *queue, void *to, const void *from, int64_t bytes,
                        ovlm_copy_kind kind, ovlm_err *err);
    ovlm_status (*fill)(ovlm_queue *queue, void *to, uint8_t byte, int64_t bytes, ovlm_err *err);

    /* ops->linear.fwd(queue, &args, err) and so on.  bwd of a forward-only operation is NULL. */
#define OVLM_OP_MEMBERS(op, args)                                                          \
    struct {                                                                               \
        ovlm_status (*measure)(ovlm_backend *, const args *, ovlm_op_bytes *, ovlm_err *); \
        ovlm_status (*prepare)(ovlm_backend *, const args *, ovlm_err *);                  \
        ovlm_status (*fwd)(ovlm_queue *, const args *, ovlm_err *);                        \
        ovlm_status (*bwd)(ovlm_queue *, const args *, ovlm_err *);                        \
    } op;
    OVLM_OPS(OVLM_OP_MEMBERS)
#undef OVLM_OP_MEMBERS
};

/* The one symbol that a backend's shared object exports. */
typedef const ovlm_ops *(*ovlm_backend_entry_fn)(void);
#define OVLM_BACKEND_ENTRY "ovlm_backend_entry"

#ifdef __cplusplus
}
#endif
#endif
