/* comm_mpi.h - communicators over an MPI library that is installed, loaded at run time.
 *
 * One build serves Open MPI and MPICH (and what shares MPICH's binary interface): handles travel as
 * intptr_t, which is a pointer in the one and an int in the other. */
#ifndef OVLM_CPU_COMM_MPI_H
#define OVLM_CPU_COMM_MPI_H

#include "backend/comm.h"

typedef struct ovlm_comm_mpi_options {
    const char *const *library; /* [n] names or paths, the first that loads is taken; one that the
                                   process has loaded already goes before all others            */
    int64_t n;
    intptr_t handle; /* an MPI_Comm of that library, of which a duplicate is made; 0: the world  */
    double slow_s;   /* as in ovlm_comm_local_options, like what follows                         */
    int (*poll)(void *ctx);
    void (*warn)(void *ctx, const char *message); /* also says why, before an abort             */
    void *ctx;
} ovlm_comm_mpi_options;

/* All ranks of the handle call it.  MPI is initialised if it is not; *initialised says so, and then
 * this process must end with ovlm_comm_mpi_finalize.  OVLM_E_COMM: no library or a strange one. */
OVLM_NODISCARD ovlm_status ovlm_comm_open_mpi(const ovlm_comm_mpi_options *options,
                                              bool *initialised, ovlm_comm **comm, ovlm_err *err);

/* MPI_Finalize, unless it was called; after it nothing works any more.  All ranks call it. */
void ovlm_comm_mpi_finalize(const char *const *library, int64_t n);

#endif
