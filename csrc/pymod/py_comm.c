/* py_comm.c - orchvlm._core.Comm: how communicators are opened, split and closed. */
#include "py_comm.h"

#include "cpu/comm_local.h"
#include "cpu/comm_mpi.h"

int ovlm_comm_object_enter(comm_object *self)
{
    if (self->comm == NULL) {
        PyErr_SetString(PyExc_ValueError, "the communicator is closed");
        return -1;
    }
    if (self->busy) {
        PyErr_SetString(PyExc_RuntimeError, "the communicator is busy with another call; give "
                                            "each thread a dup()");
        return -1;
    }
    self->busy = true;
    return 0;
}

PyObject *ovlm_comm_object_leave(comm_object *self, PyTypeObject *type, ovlm_status status,
                                 const ovlm_err *err)
{
    self->busy = false;
    if (status != OVLM_OK) {
        PyObject *module = PyType_GetModule(type);
        return module == NULL ? NULL : ovlm_raise(module, err);
    }
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------- life */

/* Without the GIL: the helper thread may be on its way to ask for it. */
static void free_comm(comm_object *self, ovlm_comm *comm)
{
    Py_BEGIN_ALLOW_THREADS
    ovlm_comm_close(comm);
    Py_END_ALLOW_THREADS
    Py_CLEAR(self->kept);
}

static void close_comm(comm_object *self)
{
    ovlm_comm *comm = self->comm;
    self->comm = NULL;
    if (self->aborting > 0) {
        self->left = comm;
    } else {
        free_comm(self, comm);
    }
}

static PyObject *new_object(PyTypeObject *type, ovlm_comm *comm)
{
    comm_object *self = (comm_object *)type->tp_alloc(type, 0);
    if (self != NULL) {
        self->comm = comm;
        self->kept = PyDict_New();
        if (self->kept == NULL) {
            Py_CLEAR(self);
        }
        return (PyObject *)self;
    }
    Py_BEGIN_ALLOW_THREADS
    ovlm_comm_close(comm);
    Py_END_ALLOW_THREADS
    return NULL;
}

PyObject *ovlm_comm_object_new(PyObject *module, ovlm_comm *comm)
{
    PyObject *type = PyObject_GetAttrString(module, "Comm");
    PyObject *made = NULL;
    if (type != NULL) {
        made = new_object((PyTypeObject *)type, comm);
        Py_DECREF(type);
    }
    return made;
}

static void comm_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    close_comm((comm_object *)object);
    type->tp_free(object);
    Py_DECREF(type);
}

static OVLM_COMM_METHOD(comm_close)
{
    (void)kwnames;
    (void)args;
    (void)type;
    comm_object *self = (comm_object *)object;
    if (ovlm_arg_count("close", nargs, 0) < 0) {
        return NULL;
    }
    if (self->comm != NULL) {
        if (ovlm_comm_object_enter(self) < 0) {
            return NULL;
        }
        close_comm(self);
        self->busy = false;
    }
    Py_RETURN_NONE;
}

/* abort(message): also while another thread is in a call. */
static OVLM_COMM_METHOD(comm_abort)
{
    (void)kwnames;
    (void)type;
    comm_object *self = (comm_object *)object;
    if (ovlm_arg_count("abort", nargs, 1) < 0) {
        return NULL;
    }
    const char *message = PyUnicode_AsUTF8(args[0]);
    if (message != NULL && self->comm == NULL) {
        PyErr_SetString(PyExc_ValueError, "the communicator is closed");
    }
    if (message == NULL || self->comm == NULL) {
        return NULL;
    }
    self->aborting++;
    ovlm_comm_abort(self->comm, message); /* short; an engine in Python has the GIL already */
    self->aborting--;
    if (self->aborting == 0 && self->left != NULL) {
        ovlm_comm *left = self->left;
        self->left = NULL;
        free_comm(self, left);
    }
    Py_RETURN_NONE;
}

/* split(color, key) -> Comm or None */
static OVLM_COMM_METHOD(comm_split)
{
    (void)kwnames;
    comm_object *self = (comm_object *)object;
    int64_t color = 0, key = 0;
    if (ovlm_arg_count("split", nargs, 2) < 0 || ovlm_arg_int(args[0], "color", &color) < 0 ||
        ovlm_arg_int(args[1], "key", &key) < 0 || ovlm_comm_object_enter(self) < 0) {
        return NULL;
    }
    ovlm_err err = {0};
    ovlm_comm *child = NULL;
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_comm_split(self->comm, color, key, &child, &err);
    Py_END_ALLOW_THREADS
    PyObject *none = ovlm_comm_object_leave(self, type, status, &err);
    if (none == NULL || child == NULL) {
        return none;
    }
    Py_DECREF(none);
    return new_object(type, child);
}

/* set_debug(bool) */
static OVLM_COMM_METHOD(comm_set_debug)
{
    (void)kwnames;
    comm_object *self = (comm_object *)object;
    int debug = nargs == 1 ? PyObject_IsTrue(args[0]) : 0;
    if (debug < 0 || ovlm_arg_count("set_debug", nargs, 1) < 0 ||
        ovlm_comm_object_enter(self) < 0) {
        return NULL;
    }
    ovlm_comm_set_debug(self->comm, debug);
    return ovlm_comm_object_leave(self, type, OVLM_OK, NULL);
}

/* (rank, size, engine, whether any thread may call it) */
static PyObject *comm_describe(PyObject *object, PyObject *ignored)
{
    (void)ignored;
    const ovlm_comm *comm = ((comm_object *)object)->comm;
    if (comm == NULL) {
        PyErr_SetString(PyExc_ValueError, "the communicator is closed");
        return NULL;
    }
    return Py_BuildValue("(LLsN)", (long long)ovlm_comm_rank(comm),
                         (long long)ovlm_comm_size(comm), ovlm_comm_engine_name(comm),
                         PyBool_FromLong(ovlm_comm_any_thread(comm)));
}

/* ---------------------------------------------------------------- how they are opened */

/* Ctrl-C; on a thread that is not Python's there is nothing to ask. */
static int poll_signals(void *ctx)
{
    (void)ctx;
    if (PyGILState_GetThisThreadState() == NULL) {
        return 0;
    }
    PyGILState_STATE gil = PyGILState_Ensure();
    int stop = PyErr_CheckSignals();
    PyGILState_Release(gil);
    return stop;
}

/* orchvlm.comm decides what a warning is. */
static void warn_slow(void *ctx, const char *message)
{
    PyObject *type = NULL, *value = NULL, *trace = NULL;
    (void)ctx;
    PyGILState_STATE gil = PyGILState_Ensure();
    PyErr_Fetch(&type, &value, &trace); /* that of an interrupted call is on its way */
    PyObject *module = PyImport_ImportModule("orchvlm.comm");
    PyObject *done = module == NULL ? NULL
                                    : PyObject_CallMethod(module, "_warn_slow", "s", message);
    if (done == NULL) { /* a warning that cannot be given stops nobody, but Ctrl-C does */
        if (PyErr_ExceptionMatches(PyExc_KeyboardInterrupt)) {
            PyErr_SetInterrupt(); /* once more, for the next poll */
        }
        PyErr_Clear();
    }
    Py_XDECREF(done);
    Py_XDECREF(module);
    PyErr_Restore(type, value, trace);
    PyGILState_Release(gil);
}

/* (silent_s, join_s, slow_s, window_bytes) */
static int read_options(PyObject *tuple, ovlm_comm_local_options *options)
{
    long long window = 0;
    *options = (ovlm_comm_local_options){.poll = poll_signals, .warn = warn_slow};
    if (!PyTuple_Check(tuple)) {
        PyErr_SetString(PyExc_TypeError, "options must be a tuple");
        return -1;
    }
    if (!ovlm_arg_tuple(tuple, "dddL", &options->silent_s, &options->join_s, &options->slow_s,
                        &window)) {
        return -1;
    }
    options->window_bytes = window;
    return 0;
}

static PyObject *finish_open(PyObject *module, ovlm_comm *comm, ovlm_status status,
                             const ovlm_err *err)
{
    if (status != OVLM_OK) {
        return ovlm_raise(module, err);
    }
    ovlm_comm_set_poll(comm, poll_signals, NULL);
    return ovlm_comm_object_new(module, comm);
}

/* comm_self() */
static PyObject *open_self(PyObject *module, PyObject *ignored)
{
    (void)ignored;
    ovlm_err err = {0};
    ovlm_comm *comm = NULL;
    ovlm_status status = ovlm_comm_open_self(&comm, &err);
    return finish_open(module, comm, status, &err);
}

/* comm_threads(n, options) -> list */
static PyObject *open_threads(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    int64_t n = 0;
    ovlm_comm_local_options options;
    ovlm_comm *comms[OVLM_COMM_LOCAL_RANKS_MOST];
    if (ovlm_arg_count("comm_threads", nargs, 2) < 0 || ovlm_arg_int(args[0], "n", &n) < 0 ||
        read_options(args[1], &options) < 0) {
        return NULL;
    }
    ovlm_err err = {0};
    ovlm_status status = ovlm_comm_open_threads(n, &options, comms, &err);
    if (status != OVLM_OK) {
        return ovlm_raise(module, &err);
    }
    PyObject *list = PyList_New((Py_ssize_t)n);
    for (int64_t r = 0; r < n; r++) {
        PyObject *one = list == NULL ? NULL : finish_open(module, comms[r], OVLM_OK, NULL);
        if (list == NULL) {
            ovlm_comm_close(comms[r]); /* of which nobody has heard */
        } else if (one == NULL) {
            Py_CLEAR(list);
        } else {
            PyList_SET_ITEM(list, (Py_ssize_t)r, one);
        }
    }
    return list;
}

/* comm_local(path, rank, size, options) */
static PyObject *open_local(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    int64_t rank = 0, size = 0;
    ovlm_comm_local_options options;
    PyObject *path = NULL;
    if (ovlm_arg_count("comm_local", nargs, 4) < 0 || ovlm_arg_int(args[1], "rank", &rank) < 0 ||
        ovlm_arg_int(args[2], "size", &size) < 0 || read_options(args[3], &options) < 0 ||
        !PyUnicode_FSConverter(args[0], &path)) {
        return NULL;
    }
    ovlm_err err = {0};
    ovlm_comm *comm = NULL;
    ovlm_status status = OVLM_OK;
    const char *name = PyBytes_AS_STRING(path);
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_comm_open_local(name, rank, size, &options, &comm, &err);
    Py_END_ALLOW_THREADS
    Py_DECREF(path);
    return finish_open(module, comm, status, &err);
}

/* comm_python(engine, rank, size): see comm_python.c */
static PyObject *open_python(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    int64_t rank = 0, size = 0;
    if (ovlm_arg_count("comm_python", nargs, 3) < 0 || ovlm_arg_int(args[1], "rank", &rank) < 0 ||
        ovlm_arg_int(args[2], "size", &size) < 0) {
        return NULL;
    }
    if (size < 1 || rank < 0 || rank >= size) {
        PyErr_Format(PyExc_ValueError, "rank must be in [0, size); got rank %lld of %lld",
                     (long long)rank, (long long)size);
        return NULL;
    }
    ovlm_err err = {0};
    ovlm_comm *comm = NULL;
    ovlm_status status = ovlm_comm_open_python(args[0], rank, size, &comm, &err);
    return finish_open(module, comm, status, &err);
}

enum { LIBRARIES_MOST = 16 };

/* Names of MPI libraries, borrowed from a tuple of strings. */
static int read_names(PyObject *tuple, const char **names, int64_t *n)
{
    *n = PyTuple_Check(tuple) ? (int64_t)PyTuple_GET_SIZE(tuple) : 0;
    if (*n < 1 || *n > LIBRARIES_MOST) {
        PyErr_Format(PyExc_TypeError, "names must be a tuple of 1 to %d strings", LIBRARIES_MOST);
        return -1;
    }
    for (int64_t i = 0; i < *n; i++) {
        names[i] = PyUnicode_AsUTF8(PyTuple_GET_ITEM(tuple, (Py_ssize_t)i));
        if (names[i] == NULL) {
            return -1;
        }
    }
    return 0;
}

/* comm_mpi(names, handle) -> (Comm, whether MPI was initialised) */
static PyObject *open_mpi(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    const char *names[LIBRARIES_MOST];
    ovlm_comm_mpi_options options = {.library = names, .poll = poll_signals, .warn = warn_slow};
    if (ovlm_arg_count("comm_mpi", nargs, 2) < 0 || read_names(args[0], names, &options.n) < 0) {
        return NULL;
    }
    options.handle = (intptr_t)PyLong_AsVoidPtr(args[1]);
    if (PyErr_Occurred()) {
        return NULL;
    }
    ovlm_err err = {0};
    ovlm_comm *comm = NULL;
    ovlm_status status = OVLM_OK;
    bool initialised = false;
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_comm_open_mpi(&options, &initialised, &comm, &err);
    Py_END_ALLOW_THREADS
    PyObject *made = finish_open(module, comm, status, &err);
    return made == NULL ? NULL : Py_BuildValue("(NO)", made, initialised ? Py_True : Py_False);
}

/* comm_mpi_finalize(names) */
static PyObject *finalize_mpi(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    const char *names[LIBRARIES_MOST];
    int64_t n = 0;
    (void)module;
    if (ovlm_arg_count("comm_mpi_finalize", nargs, 1) < 0 || read_names(args[0], names, &n) < 0) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    ovlm_comm_mpi_finalize(names, n);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyMethodDef ovlm_comm_functions[] = {
    {"comm_self", open_self, METH_NOARGS, NULL},
    {"comm_threads", (PyCFunction)(void (*)(void))open_threads, METH_FASTCALL, NULL},
    {"comm_local", (PyCFunction)(void (*)(void))open_local, METH_FASTCALL, NULL},
    {"comm_python", (PyCFunction)(void (*)(void))open_python, METH_FASTCALL, NULL},
    {"comm_mpi", (PyCFunction)(void (*)(void))open_mpi, METH_FASTCALL, NULL},
    {"comm_mpi_finalize", (PyCFunction)(void (*)(void))finalize_mpi, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

/* ---------------------------------------------------------------- type */

#define METHOD(name, function)                                        \
    {name, (PyCFunction)(void (*)(void))(function),                   \
     METH_METHOD | METH_FASTCALL | METH_KEYWORDS, NULL}

static PyMethodDef comm_methods[] = {
    {"describe", comm_describe, METH_NOARGS, NULL},
    METHOD("close", comm_close),
    METHOD("abort", comm_abort),
    METHOD("split", comm_split),
    METHOD("set_debug", comm_set_debug),
    METHOD("barrier", ovlm_py_comm_barrier),
    METHOD("broadcast", ovlm_py_comm_broadcast),
    METHOD("all_gather", ovlm_py_comm_all_gather),
    METHOD("all_to_all", ovlm_py_comm_all_to_all),
    METHOD("all_reduce", ovlm_py_comm_all_reduce),
    METHOD("reduce_scatter", ovlm_py_comm_reduce_scatter),
    METHOD("wait", ovlm_py_comm_wait),
    {NULL, NULL, 0, NULL},
};

static PyType_Slot comm_slots[] = {
    {Py_tp_doc, "C side of orchvlm.comm.Comm."},
    {Py_tp_dealloc, comm_dealloc},
    {Py_tp_methods, comm_methods},
    {0, NULL},
};

static PyType_Spec comm_spec = {
    .name = "orchvlm._core.Comm",
    .basicsize = sizeof(comm_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = comm_slots,
};

int ovlm_add_comm_type(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &comm_spec, NULL);
    if (type == NULL) {
        return -1;
    }
    int failed = PyModule_AddObjectRef(module, "Comm", type);
    Py_DECREF(type);
    return failed;
}
