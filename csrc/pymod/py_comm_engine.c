/* py_comm_engine.c - an engine that calls methods of a Python object, so that what Python programs
 * use to communicate can carry a communicator.
 *
 *   all_to_all(send, recv)   lists of memoryviews, one per rank
 *   all_gather(send, recv)   a memoryview, and a list of them
 *   split(color, key)        (engine, rank, size), or None where color < 0
 *   abort(message), close()
 *
 * No lock of C is held while the GIL is taken: a communicator is guarded by flags alone. */
#include "py_comm.h"

#include <sys/types.h>
#include <unistd.h>

typedef struct python_engine {
    PyObject *object;
    int64_t rank, size;
    pid_t process; /* in a forked child nothing is closed: the engine's threads are not there */
} python_engine;

/* The current exception into err.  KeyboardInterrupt stays set: it is the caller's. */
static ovlm_status keep_exception(ovlm_err *err)
{
    PyObject *type = NULL, *value = NULL, *trace = NULL, *text = NULL;
    if (PyErr_ExceptionMatches(PyExc_KeyboardInterrupt)) {
        return OVLM_FAIL(err, OVLM_E_INTERRUPTED, "interrupted");
    }
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    text = value == NULL ? NULL : PyObject_Str(value);
    const char *words = text == NULL ? NULL : PyUnicode_AsUTF8(text);
    ovlm_status status = OVLM_FAIL(
        err, OVLM_E_COMM, "%s: %s",
        type != NULL && PyType_Check(type) ? ((PyTypeObject *)type)->tp_name : "error",
        words == NULL ? "without a message" : words);
    PyErr_Clear();
    Py_XDECREF(text);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    return status;
}

static PyObject *new_view(const void *data, int64_t bytes, int flags)
{
    static const char nothing[1] = {0}; /* an address for views of nothing */
    return PyMemoryView_FromMemory((char *)(uintptr_t)(bytes > 0 ? data : nothing),
                                   (Py_ssize_t)bytes, flags);
}

/* Views of data + at[r], count[r] bytes long. */
static PyObject *new_views(const void *data, const int64_t *at, const int64_t *count, int64_t n,
                           int flags)
{
    PyObject *list = PyList_New((Py_ssize_t)n);
    for (int64_t r = 0; r < n && list != NULL; r++) {
        PyObject *view = new_view((const char *)data + at[r], count[r], flags);
        if (view == NULL) {
            Py_CLEAR(list);
        } else {
            PyList_SET_ITEM(list, (Py_ssize_t)r, view);
        }
    }
    return list;
}

/* Calls object.method(a, b), and takes both references; answers how it went. */
static ovlm_status call(python_engine *self, const char *method, PyObject *a, PyObject *b,
                        ovlm_err *err)
{
    PyObject *done = a == NULL || b == NULL
                         ? NULL
                         : PyObject_CallMethod(self->object, method, "OO", a, b);
    ovlm_status status = done == NULL ? keep_exception(err) : OVLM_OK;
    Py_XDECREF(done);
    Py_XDECREF(a);
    Py_XDECREF(b);
    return status;
}

static ovlm_status python_all_to_all(void *engine, const ovlm_comm_label *label,
                                     const ovlm_all_to_all *args, ovlm_err *err)
{
    python_engine *self = engine;
    (void)label;
    PyGILState_STATE gil = PyGILState_Ensure();
    PyObject *send = new_views(args->send, args->send_at, args->send_bytes, self->size,
                               PyBUF_READ);
    PyObject *recv = send == NULL ? NULL
                                  : new_views(args->recv, args->recv_at, args->recv_bytes,
                                              self->size, PyBUF_WRITE);
    ovlm_status status = call(self, "all_to_all", send, recv, err);
    PyGILState_Release(gil);
    return status;
}

static ovlm_status python_all_gather(void *engine, const ovlm_comm_label *label,
                                     const ovlm_all_gather *args, ovlm_err *err)
{
    python_engine *self = engine;
    (void)label;
    PyGILState_STATE gil = PyGILState_Ensure();
    PyObject *send = new_view(args->send, args->recv_bytes[self->rank], PyBUF_READ);
    PyObject *recv = send == NULL ? NULL
                                  : new_views(args->recv, args->recv_at, args->recv_bytes,
                                              self->size, PyBUF_WRITE);
    ovlm_status status = call(self, "all_gather", send, recv, err);
    PyGILState_Release(gil);
    return status;
}

static python_engine *new_engine(PyObject *object, int64_t rank, int64_t size)
{
    python_engine *engine = PyMem_RawCalloc(1, sizeof *engine);
    if (engine != NULL) {
        Py_INCREF(object);
        engine->object = object;
        engine->rank = rank;
        engine->size = size;
        engine->process = getpid();
    }
    return engine;
}

/* None where this rank is in no part, else (engine, rank, size) of a part of `most` ranks. */
static ovlm_status read_child(PyObject *answer, bool none, int64_t most, void **child,
                              int64_t *rank, int64_t *size, ovlm_err *err)
{
    PyObject *object = NULL;
    long long r = 0, n = 0;
    if (answer == NULL) {
        return keep_exception(err);
    }
    if (none && answer == Py_None) {
        return OVLM_OK;
    }
    if (none || !PyTuple_Check(answer)) {
        PyErr_Format(PyExc_TypeError, "split of an engine must return %s here",
                     none ? "None" : "(engine, rank, size)");
        return keep_exception(err);
    }
    if (!PyArg_ParseTuple(answer, "OLL", &object, &r, &n)) {
        return keep_exception(err);
    }
    if (n < 1 || n > most || r < 0 || r >= n) {
        return OVLM_FAIL(err, OVLM_E_COMM, "split of an engine gave rank %lld of %lld, and there "
                         "are %lld ranks", r, n, (long long)most);
    }
    *child = new_engine(object, r, n);
    *rank = r;
    *size = n;
    if (*child == NULL) {
        return OVLM_FAIL(err, OVLM_E_NOMEM, "out of memory for a communicator");
    }
    return OVLM_OK;
}

static ovlm_status python_split(void *engine, const ovlm_comm_label *label, int64_t color,
                                int64_t key, void **child, int64_t *rank, int64_t *size,
                                ovlm_err *err)
{
    python_engine *self = engine;
    (void)label;
    *child = NULL;
    PyGILState_STATE gil = PyGILState_Ensure();
    PyObject *answer = PyObject_CallMethod(self->object, "split", "LL", (long long)color,
                                           (long long)key);
    ovlm_status status = read_child(answer, color < 0, self->size, child, rank, size, err);
    Py_XDECREF(answer);
    PyGILState_Release(gil);
    return status;
}

static void python_abort(void *self, const char *message)
{
    PyObject *type = NULL, *value = NULL, *trace = NULL;
    PyGILState_STATE gil = PyGILState_Ensure();
    PyErr_Fetch(&type, &value, &trace); /* there may be one on its way to the caller */
    PyObject *done = PyObject_CallMethod(((python_engine *)self)->object, "abort", "s", message);
    if (done == NULL) {
        PyErr_WriteUnraisable(((python_engine *)self)->object);
    }
    Py_XDECREF(done);
    PyErr_Restore(type, value, trace);
    PyGILState_Release(gil);
}

static void python_close(void *engine)
{
    PyObject *type = NULL, *value = NULL, *trace = NULL;
    python_engine *self = engine;
    PyGILState_STATE gil = PyGILState_Ensure();
    PyErr_Fetch(&type, &value, &trace);
    if (self->process == getpid()) {
        PyObject *done = PyObject_CallMethod(self->object, "close", NULL);
        if (done == NULL) {
            PyErr_WriteUnraisable(self->object);
        }
        Py_XDECREF(done);
    }
    Py_DECREF(self->object);
    PyErr_Restore(type, value, trace);
    PyGILState_Release(gil);
    PyMem_RawFree(self);
}

/* Calls stay on the thread that makes them: what is below may not like another one. */
static const ovlm_comm_engine python_table = {
    .name = "python", .host_memory = true, .all_to_all = python_all_to_all,
    .all_gather = python_all_gather, .split = python_split, .abort = python_abort,
    .close = python_close};

ovlm_status ovlm_comm_open_python(PyObject *object, int64_t rank, int64_t size, ovlm_comm **comm,
                                  ovlm_err *err)
{
    python_engine *self = new_engine(object, rank, size);
    *comm = NULL;
    if (self == NULL) {
        return OVLM_FAIL(err, OVLM_E_NOMEM, "out of memory for a communicator");
    }
    return ovlm_comm_open(&python_table, self, rank, size, 1, comm, err);
}
