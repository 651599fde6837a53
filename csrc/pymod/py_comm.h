/* py_comm.h - the inside of orchvlm._core.Comm, for its files. */
#ifndef OVLM_PYMOD_PY_COMM_H
#define OVLM_PYMOD_PY_COMM_H

#include "args.h"

#include "backend/comm.h"
#include "base/status.h"

typedef struct comm_object {
    PyObject_HEAD
    ovlm_comm *comm; /* NULL when closed                                                        */
    bool busy;       /* a call is running without the GIL                                       */
    int aborting;    /* threads that are in abort, which may give up the GIL                    */
    ovlm_comm *left; /* what was closed meanwhile; the last of them frees it                    */
    PyObject *kept;  /* ticket -> what a started call reads and writes, until it was waited for */
} comm_object;

#define OVLM_COMM_METHOD(name)                                                                    \
    PyObject *name(PyObject *object, PyTypeObject *type, PyObject *const *args, Py_ssize_t nargs, \
                   PyObject *kwnames)

/* Marks the communicator busy; ValueError when it is closed, RuntimeError when it is busy. */
int ovlm_comm_object_enter(comm_object *self);
/* Ends what enter began; raises what err holds.  Returns None, or NULL with the exception. */
PyObject *ovlm_comm_object_leave(comm_object *self, PyTypeObject *type, ovlm_status status,
                                 const ovlm_err *err);
/* A Python object of the communicator, which it owns from here on, also on failure. */
PyObject *ovlm_comm_object_new(PyObject *module, ovlm_comm *comm);

/* An engine that calls methods of a Python object; takes its own reference. */
OVLM_NODISCARD ovlm_status ovlm_comm_open_python(PyObject *engine, int64_t rank, int64_t size,
                                                 ovlm_comm **comm, ovlm_err *err);

OVLM_COMM_METHOD(ovlm_py_comm_barrier);
OVLM_COMM_METHOD(ovlm_py_comm_broadcast);
OVLM_COMM_METHOD(ovlm_py_comm_all_gather);
OVLM_COMM_METHOD(ovlm_py_comm_all_to_all);
OVLM_COMM_METHOD(ovlm_py_comm_all_reduce);
OVLM_COMM_METHOD(ovlm_py_comm_reduce_scatter);
OVLM_COMM_METHOD(ovlm_py_comm_wait);

#endif
