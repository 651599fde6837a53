/* loader.c - finds a backend's table in a shared object. */
#include "backend/backend.h"
#include "base/status.h"

#include <dlfcn.h>
#include <string.h>

static ovlm_status check_table(const char *path, const ovlm_ops *ops, ovlm_err *err)
{
    if (ops == NULL) {
        return OVLM_FAIL(err, OVLM_E_BACKEND, "%s offers no operations; rebuild it", path);
    }
    if (ops->abi != OVLM_BACKEND_ABI) {
        return OVLM_FAIL(err, OVLM_E_BACKEND,
                         "%s speaks ABI %u, this build needs ABI %u; reinstall orchvlm", path,
                         ops->abi, OVLM_BACKEND_ABI);
    }
    if (ops->size_bytes != sizeof *ops) {
        return OVLM_FAIL(err, OVLM_E_BACKEND,
                         "%s has a table of %u bytes, this build needs %zu; reinstall orchvlm",
                         path, ops->size_bytes, sizeof *ops);
    }
    return OVLM_OK;
}

ovlm_status ovlm_backend_load(const char *path, const ovlm_ops **ops, ovlm_err *err)
{
    *ops = NULL;
    /* RTLD_LOCAL: the runtime linked into a backend must not meet another copy of itself, such as
     * the one that a deep-learning framework brought into the process. */
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        return OVLM_FAIL(err, OVLM_E_BACKEND, "cannot load the backend: %s", dlerror());
    }
    ovlm_backend_entry_fn entry = NULL;
    void *symbol = dlsym(library, OVLM_BACKEND_ENTRY);
    memcpy(&entry, &symbol, sizeof entry); /* ISO C has no cast from object to function pointer */
    if (entry == NULL) {
        (void)dlclose(library);
        return OVLM_FAIL(err, OVLM_E_BACKEND, "%s is no backend of orchvlm: it has no symbol %s",
                         path, OVLM_BACKEND_ENTRY);
    }
    const ovlm_ops *table = entry();
    ovlm_status status = check_table(path, table, err);
    if (status != OVLM_OK) {
        (void)dlclose(library);
        return status;
    }
    /* The handle is dropped on purpose: device runtimes keep threads and exit hooks, so a backend
     * that was accepted is never unloaded.  Loading it again finds the same copy. */
    *ops = table;
    return OVLM_OK;
}
