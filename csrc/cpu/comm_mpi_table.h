/* comm_mpi_table.h - what is used of an MPI library. */
#ifndef OVLM_CPU_COMM_MPI_TABLE_H
#define OVLM_CPU_COMM_MPI_TABLE_H

#include "cpu/comm_mpi.h"

/* A handle as an argument.  Where it is an int (MPICH), it is passed in a register's lower half, on
 * every machine with a 64-bit calling convention. */
typedef intptr_t mpi_handle;

/* Room for an MPI_Status of either library. */
typedef struct mpi_status {
    int64_t words[8];
} mpi_status;

/* The same in both libraries. */
enum { MPI_MANY_THREADS = 3, MPI_NO_COLOR = -32766, MPI_TEXT_BYTES = 512,
       MPI_VERSION_BYTES = 8192 };

#define MPI_FUNCTIONS(X)                                                                         \
    X(Initialized, (int *))                                                                      \
    X(Finalized, (int *))                                                                        \
    X(Init_thread, (int *, char ***, int, int *))                                                \
    X(Query_thread, (int *))                                                                     \
    X(Finalize, (void))                                                                          \
    X(Abort, (mpi_handle, int))                                                                  \
    X(Error_string, (int, char *, int *))                                                        \
    X(Comm_rank, (mpi_handle, int *))                                                            \
    X(Comm_size, (mpi_handle, int *))                                                            \
    X(Comm_split, (mpi_handle, int, int, mpi_handle *))                                          \
    X(Comm_dup, (mpi_handle, mpi_handle *))                                                      \
    X(Comm_free, (mpi_handle *))                                                                 \
    X(Comm_set_errhandler, (mpi_handle, mpi_handle))                                             \
    X(Isend, (const void *, int, mpi_handle, int, int, mpi_handle, mpi_handle *))                \
    X(Irecv, (void *, int, mpi_handle, int, int, mpi_handle, mpi_handle *))                      \
    X(Ibarrier, (mpi_handle, mpi_handle *))                                                      \
    X(Iallgatherv, (const void *, int, mpi_handle, void *, const int *, const int *, mpi_handle, \
                    mpi_handle, mpi_handle *))                                                   \
    X(Test, (mpi_handle *, int *, mpi_status *))                                                 \
    X(Get_count, (const mpi_status *, mpi_handle, int *))                                        \
    X(Get_library_version, (char *, int *))

typedef struct mpi_table {
#define MPI_MEMBER(name, parameters) int(*name) parameters;
    MPI_FUNCTIONS(MPI_MEMBER)
#undef MPI_MEMBER
    mpi_handle world, byte, errors_return;
} mpi_table;

/* Fills the table from the first library that loads, or that is loaded. */
OVLM_NODISCARD ovlm_status ovlm_mpi_load(const char *const *library, int64_t n, mpi_table *table,
                                         ovlm_err *err);

#endif
