/* comm_state.h - the inside of a communicator, for its files. */
#ifndef OVLM_BACKEND_COMM_STATE_H
#define OVLM_BACKEND_COMM_STATE_H

#include <stdatomic.h>
#include <sys/types.h>

#include "backend/comm.h"
#include "backend/comm_reduce.h"
#include "base/arena.h"

struct ovlm_comm {
    const ovlm_comm_engine *engine;
    void *self; /* owned: the engine's */
    int64_t rank, size;
    pid_t process;  /* that opened it                                                         */
    int64_t *world; /* [size] owned: the ranks' numbers in the first communicator; NULL there  */
    uint64_t id;
    int64_t order; /* calls so far */
    bool debug;
    atomic_bool busy;     /* a caller is inside                                               */
    atomic_bool poisoned; /* failure is being written, or was: a caller and the helper may fail
                             at the same time                                                 */
    atomic_bool failed;   /* failure holds why, and never changes again                       */
    ovlm_err failure;
    int (*poll)(void *ctx);
    void *poll_ctx;
    ovlm_arena arena; /* scratch of the call that runs; one runs at a time                    */
    struct ovlm_comm_queue *queue; /* NULL until the first start                              */
};

/* Marks the communicator as in use; fails when it is, when it is poisoned, and in a forked
 * child. */
OVLM_NODISCARD ovlm_status ovlm_comm_enter(ovlm_comm *comm, ovlm_err *err);
void ovlm_comm_leave(ovlm_comm *comm);

/* Work with the next order; its arguments are still to come.  Whether it is compared is settled
 * here, where all ranks are at the same call, and not where a helper comes to it. */
ovlm_comm_work ovlm_comm_work_next(ovlm_comm *comm, ovlm_comm_kind kind, int64_t detail,
                                   int64_t amount);

int64_t ovlm_comm_world_rank(const int64_t *world, int64_t rank);

/* Does checked work on this thread; a failure poisons the communicator.  Kinds: all but the
 * split. */
OVLM_NODISCARD ovlm_status ovlm_comm_run(ovlm_comm *comm, const ovlm_comm_work *work,
                                         ovlm_err *err);
/* Where the work asks for it: labels, and then the counts of calls that have some. */
OVLM_NODISCARD ovlm_status ovlm_comm_compare(ovlm_comm *comm, const ovlm_comm_work *work,
                                             ovlm_err *err);
/* Keeps what failed; other ranks hear of a failure that is this rank's own. */
void ovlm_comm_poison(ovlm_comm *comm, ovlm_status status, const ovlm_err *err);

/* Reductions above the engine (comm_reduce.c). */
OVLM_NODISCARD ovlm_status ovlm_comm_run_all_reduce(ovlm_comm *comm, const ovlm_comm_label *label,
                                                    const ovlm_all_reduce *args, ovlm_err *err);
OVLM_NODISCARD ovlm_status ovlm_comm_run_reduce_scatter(ovlm_comm *comm,
                                                        const ovlm_comm_label *label,
                                                        const ovlm_reduce_scatter *args,
                                                        ovlm_err *err);

/* The queue of starts (comm_queue.c). */
OVLM_NODISCARD ovlm_status ovlm_comm_queue_start(ovlm_comm *comm, const ovlm_comm_work *work,
                                                 int64_t *ticket, ovlm_err *err);
OVLM_NODISCARD ovlm_status ovlm_comm_queue_wait(ovlm_comm *comm, int64_t ticket, ovlm_err *err);
/* Waits for all that was started. */
OVLM_NODISCARD ovlm_status ovlm_comm_queue_drain(ovlm_comm *comm, ovlm_err *err);
/* Ends the helper thread, after an abort where something is pending. */
void ovlm_comm_queue_close(ovlm_comm *comm);

#endif
