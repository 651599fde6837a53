/* comm_self.c - the engine of one rank: what it sends it receives. */
#include "backend/comm_state.h"

#include <stdlib.h>
#include <string.h>

typedef struct self_engine {
    atomic_bool aborted;
} self_engine;

static ovlm_status check_alive(self_engine *self, ovlm_err *err)
{
    return atomic_load_explicit(&self->aborted, memory_order_acquire)
               ? OVLM_FAIL(err, OVLM_E_COMM, "rank 0 failed: the communicator was aborted")
               : OVLM_OK;
}

static void copy(void *to, const void *from, int64_t bytes)
{
    if (bytes > 0 && to != from) {
        memcpy(to, from, (size_t)bytes);
    }
}

static ovlm_status self_all_to_all(void *self, const ovlm_comm_label *label,
                                   const ovlm_all_to_all *args, ovlm_err *err)
{
    (void)label;
    OVLM_TRY(check_alive(self, err));
    copy((char *)args->recv + args->recv_at[0], (const char *)args->send + args->send_at[0],
         args->send_bytes[0]);
    return OVLM_OK;
}

static ovlm_status self_all_gather(void *self, const ovlm_comm_label *label,
                                   const ovlm_all_gather *args, ovlm_err *err)
{
    (void)label;
    OVLM_TRY(check_alive(self, err));
    copy((char *)args->recv + args->recv_at[0], args->send, args->recv_bytes[0]);
    return OVLM_OK;
}

static ovlm_status self_split(void *self, const ovlm_comm_label *label, int64_t color, int64_t key,
                              void **child, int64_t *rank, int64_t *size, ovlm_err *err)
{
    (void)label;
    (void)key;
    OVLM_TRY(check_alive(self, err));
    *rank = 0;
    *size = 1;
    *child = color < 0 ? NULL : calloc(1, sizeof(self_engine));
    if (color >= 0 && *child == NULL) {
        return OVLM_FAIL(err, OVLM_E_NOMEM, "out of memory for a communicator");
    }
    return OVLM_OK;
}

static void self_abort(void *self, const char *message)
{
    (void)message;
    atomic_store_explicit(&((self_engine *)self)->aborted, true, memory_order_release);
}

static const ovlm_comm_engine engine = {.name = "self", .compares = true, .any_thread = true,
                                        .host_memory = true, .all_to_all = self_all_to_all,
                                        .all_gather = self_all_gather, .split = self_split,
                                        .abort = self_abort, .close = free};

ovlm_status ovlm_comm_open_self(ovlm_comm **comm, ovlm_err *err)
{
    *comm = NULL;
    self_engine *self = calloc(1, sizeof *self);
    if (self == NULL) {
        return OVLM_FAIL(err, OVLM_E_NOMEM, "out of memory for a communicator");
    }
    return ovlm_comm_open(&engine, self, 0, 1, 1, comm, err);
}
