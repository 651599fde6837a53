/* py_dispatch.c - orchvlm._core.Dispatcher and Dispatch: routes on arrays.
 *
 * A Dispatcher has what outlives a step: threads, and scratch memory that the next transfer finds
 * warm.  A Dispatch is one route.  A transfer that was started is a capsule, which keeps arrays and
 * scratch; the communicator keeps the capsule until it was waited for, so that a dropped one never
 * lies under a running transfer. */
#include "py_comm.h"
#include "py_route.h"

#include <stdlib.h>

#include "engine/dispatch.h"

typedef struct dispatcher_object {
    PyObject_HEAD
    ovlm_pool *pool; /* NULL: the caller's thread alone                                         */
    bool busy;       /* a transfer is being packed or unpacked without the GIL                  */
    void *spare;     /* scratch that nobody uses                                                */
    int64_t spare_bytes;
} dispatcher_object;

typedef struct dispatch_object {
    PyObject_HEAD
    ovlm_dispatch *dispatch;
    dispatcher_object *owner; /* a reference */
} dispatch_object;

/* A transfer: everything that it reads and writes. */
typedef struct flight {
    ovlm_trip trip;
    ovlm_parcel parcel;
    ovlm_load *load;
    PyObject *keeps; /* (Dispatch, sources, targets)                                            */
    bool done;
} flight;

#define CORE_METHOD(name)                                                                         \
    PyObject *name(PyObject *object, PyTypeObject *type, PyObject *const *args, Py_ssize_t nargs, \
                   PyObject *kwnames)

static const char FLIGHT[] = "orchvlm._core.flight";

/* ------------------------------------------------------------------ scratch -------------- */

static int take_scratch(dispatcher_object *owner, ovlm_parcel *parcel)
{
    if (owner->spare != NULL && owner->spare_bytes >= parcel->scratch_bytes) {
        parcel->scratch = owner->spare;
        parcel->scratch_bytes = owner->spare_bytes;
        owner->spare = NULL;
        return 0;
    }
    if (parcel->scratch_bytes <= PY_SSIZE_T_MAX - 128) {
        parcel->scratch = aligned_alloc(64, (size_t)((parcel->scratch_bytes + 64) / 64 * 64));
    }
    if (parcel->scratch == NULL) {
        PyErr_Format(PyExc_MemoryError, "out of memory for %lld bytes of scratch",
                     (long long)parcel->scratch_bytes);
        return -1;
    }
    return 0;
}

/* The larger of two is kept. */
static void give_scratch(dispatcher_object *owner, ovlm_parcel *parcel)
{
    if (owner->spare == NULL || owner->spare_bytes < parcel->scratch_bytes) {
        void *smaller = owner->spare;
        owner->spare = parcel->scratch;
        owner->spare_bytes = parcel->scratch_bytes;
        parcel->scratch = smaller;
    }
    free(parcel->scratch);
    parcel->scratch = NULL;
}

static void free_flight(flight *f)
{
    if (f != NULL) {
        free(f->parcel.scratch);
        free(f->load);
        Py_XDECREF(f->keeps);
        free(f);
    }
}

static void free_capsule(PyObject *capsule)
{
    free_flight(PyCapsule_GetPointer(capsule, FLIGHT));
}

/* ------------------------------------------------------------------ arguments ------------ */

/* Rows of plain numbers.  Their dtype matters where they are summed: `given` is bfloat16's for
 * arrays of uint16 that hold such numbers. */
static int arg_rows(PyObject *object, const char *name, bool written, int64_t rows, int64_t given,
                    ovlm_load *load)
{
    PyArrayObject *array = (PyArrayObject *)object;
    if (!PyArray_Check(object) || !PyArray_IS_C_CONTIGUOUS(array) || PyArray_NDIM(array) < 1 ||
        PyDataType_REFCHK(PyArray_DESCR(array)) || PyArray_ISBYTESWAPPED(array) ||
        !PyArray_ISALIGNED(array)) {
        PyErr_Format(PyExc_TypeError, "%s must be C-contiguous arrays of numbers, with rows", name);
        return -1;
    }
    if (written && !PyArray_ISWRITEABLE(array)) {
        PyErr_Format(PyExc_ValueError, "%s: an array is read-only", name);
        return -1;
    }
    int64_t size = (int64_t)PyArray_ITEMSIZE(array), row_bytes = size;
    for (int d = 1; d < PyArray_NDIM(array); d++) {
        row_bytes *= (int64_t)PyArray_DIM(array, d); /* <= what it holds, unless it has no rows */
    }
    if ((int64_t)PyArray_DIM(array, 0) != rows || (written && row_bytes != load->row_bytes)) {
        PyErr_Format(PyExc_ValueError, "%s must have %lld rows of as many bytes before as after",
                     name, (long long)rows);
        return -1;
    }
    int type = PyArray_TYPE(array);
    load->row_bytes = row_bytes;
    bool half = given == (int64_t)OVLM_BF16 && type == NPY_UINT16;
    load->dtype = type == NPY_FLOAT32   ? OVLM_F32
                  : type == NPY_FLOAT64 ? OVLM_F64
                  : half                ? OVLM_BF16
                                        : OVLM_U8;
    if (written) {
        load->to = PyArray_DATA(array);
    } else {
        load->from = PyArray_DATA(array);
    }
    return 0;
}

static int fill_loads(flight *f, const ovlm_dispatch *dispatch, PyObject *sources,
                      PyObject *targets, int64_t dtype, bool back)
{
    if (!PyTuple_Check(sources) || !PyTuple_Check(targets) ||
        PyTuple_GET_SIZE(sources) != PyTuple_GET_SIZE(targets)) {
        PyErr_SetString(PyExc_TypeError, "sources and targets must be tuples of one length");
        return -1;
    }
    ovlm_dispatch_rows rows = ovlm_dispatch_count(dispatch);
    Py_ssize_t n = PyTuple_GET_SIZE(sources);
    f->load = calloc((size_t)n + 1, sizeof *f->load);
    if (f->load == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t t = 0; t < n; t++) {
        if (arg_rows(PyTuple_GET_ITEM(sources, t), "sources", false,
                     back ? rows.destination : rows.source, dtype, &f->load[t]) < 0 ||
            arg_rows(PyTuple_GET_ITEM(targets, t), "targets", true,
                     back ? rows.source : rows.destination, dtype, &f->load[t]) < 0) {
            return -1;
        }
    }
    f->parcel.n = (int64_t)n;
    f->parcel.load = f->load;
    return 0;
}

/* Marks the communicator and the dispatcher as in use. */
static int enter(dispatch_object *self, comm_object *comm)
{
    if (self->owner->busy) {
        PyErr_SetString(PyExc_RuntimeError, "the dispatcher is busy with another transfer; give "
                                            "each thread its own");
        return -1;
    }
    if (ovlm_comm_object_enter(comm) < 0) {
        return -1;
    }
    self->owner->busy = true;
    return 0;
}

static PyObject *leave(dispatch_object *self, comm_object *comm, PyTypeObject *type,
                       ovlm_status status, const ovlm_err *err)
{
    self->owner->busy = false;
    return ovlm_comm_object_leave(comm, type, status, err);
}

/* ------------------------------------------------------------------ transfers ------------ */

/* A checked transfer with its scratch, or NULL with an exception. */
static flight *new_flight(dispatch_object *self, PyObject *module, PyObject *const *args,
                          int64_t dtype, bool back)
{
    flight *f = calloc(1, sizeof *f);
    if (f == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    f->keeps = PyTuple_Pack(3, (PyObject *)self, args[1], args[2]);
    f->parcel.pool = self->owner->pool;
    if (f->keeps == NULL ||
        fill_loads(f, self->dispatch, args[1], args[2], dtype, back) < 0) {
        free_flight(f);
        return NULL;
    }
    ovlm_err err = {0};
    if (ovlm_dispatch_measure(self->dispatch, &f->parcel, &f->parcel.scratch_bytes, &err) !=
        OVLM_OK) {
        ovlm_raise(module, &err);
        free_flight(f);
        return NULL;
    }
    if (take_scratch(self->owner, &f->parcel) < 0) {
        free_flight(f);
        return NULL;
    }
    return f;
}

static PyObject *move_now(dispatch_object *self, comm_object *comm, PyTypeObject *type, flight *f,
                          bool back)
{
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    status = back ? ovlm_dispatch_reverse(self->dispatch, &f->parcel, comm->comm, &err)
                  : ovlm_dispatch_apply(self->dispatch, &f->parcel, comm->comm, &err);
    Py_END_ALLOW_THREADS
    give_scratch(self->owner, &f->parcel);
    free_flight(f);
    return leave(self, comm, type, status, &err);
}

/* The capsule, which the communicator keeps under its ticket. */
static PyObject *move_later(dispatch_object *self, comm_object *comm, PyTypeObject *type, flight *f,
                            bool back)
{
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    status = back ? ovlm_dispatch_start_reverse(self->dispatch, &f->parcel, comm->comm, &f->trip,
                                                &err)
                  : ovlm_dispatch_start(self->dispatch, &f->parcel, comm->comm, &f->trip, &err);
    Py_END_ALLOW_THREADS
    PyObject *none = leave(self, comm, type, status, &err);
    if (none == NULL) {
        free_flight(f);
        return NULL;
    }
    Py_DECREF(none);
    PyObject *number = PyLong_FromLongLong((long long)f->trip.ticket);
    PyObject *capsule = PyCapsule_New(f, FLIGHT, free_capsule);
    if (number == NULL || capsule == NULL || PyDict_SetItem(comm->kept, number, capsule) < 0) {
        Py_XDECREF(number); /* what cannot be kept is left to live for ever */
        return NULL;
    }
    Py_DECREF(number);
    return capsule;
}

/* move(comm, sources, targets, dtype, back, start) -> None or a capsule for wait */
static CORE_METHOD(dispatch_move_rows)
{
    (void)kwnames;
    dispatch_object *self = (dispatch_object *)object;
    int64_t dtype = 0;
    if (ovlm_arg_count("move", nargs, 6) < 0 || ovlm_arg_int(args[3], "dtype", &dtype) < 0) {
        return NULL;
    }
    int back = PyObject_IsTrue(args[4]), start = back < 0 ? -1 : PyObject_IsTrue(args[5]);
    PyObject *module = start < 0 ? NULL : PyType_GetModule(type);
    comm_object *comm = module == NULL ? NULL
                                       : (comm_object *)ovlm_instance_of(module, "Comm", args[0]);
    flight *f = comm == NULL ? NULL : new_flight(self, module, args, dtype, back);
    if (f == NULL) {
        return NULL;
    }
    if (enter(self, comm) < 0) {
        give_scratch(self->owner, &f->parcel);
        free_flight(f);
        return NULL;
    }
    return start ? move_later(self, comm, type, f, back) : move_now(self, comm, type, f, back);
}

/* wait(comm, capsule): once more is fine */
static CORE_METHOD(dispatch_wait)
{
    (void)kwnames;
    dispatch_object *self = (dispatch_object *)object;
    if (ovlm_arg_count("wait", nargs, 2) < 0) {
        return NULL;
    }
    PyObject *module = PyType_GetModule(type);
    comm_object *comm = module == NULL ? NULL
                                       : (comm_object *)ovlm_instance_of(module, "Comm", args[0]);
    flight *f = comm == NULL ? NULL : PyCapsule_GetPointer(args[1], FLIGHT);
    if (f == NULL) {
        return NULL;
    }
    if (f->done) {
        Py_RETURN_NONE;
    }
    if (f->trip.dispatch != self->dispatch || (comm->comm != NULL && f->trip.comm != comm->comm)) {
        PyErr_SetString(PyExc_ValueError, "the transfer was started elsewhere");
        return NULL;
    }
    if (enter(self, comm) < 0) {
        return NULL;
    }
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_dispatch_wait(&f->trip, &err);
    Py_END_ALLOW_THREADS
    if (status == OVLM_OK) {
        f->done = true;
        give_scratch(self->owner, &f->parcel);
        PyObject *number = PyLong_FromLongLong((long long)f->trip.ticket);
        if (number == NULL || PyDict_DelItem(comm->kept, number) < 0) {
            PyErr_Clear(); /* kept until the communicator closes, then */
        }
        Py_XDECREF(number);
    }
    return leave(self, comm, type, status, &err);
}

/* rows() -> (source, destination, sent, received, stay, sums) */
static PyObject *dispatch_rows(PyObject *object, PyObject *ignored)
{
    (void)ignored;
    ovlm_dispatch_rows rows = ovlm_dispatch_count(((dispatch_object *)object)->dispatch);
    return Py_BuildValue("(LLLLLO)", (long long)rows.source, (long long)rows.destination,
                         (long long)rows.sent, (long long)rows.received, (long long)rows.stay,
                         rows.sums ? Py_True : Py_False);
}

/* ------------------------------------------------------------------ life ----------------- */

static void dispatch_dealloc(PyObject *object)
{
    dispatch_object *self = (dispatch_object *)object;
    PyTypeObject *type = Py_TYPE(object);
    ovlm_dispatch_free(self->dispatch);
    Py_XDECREF((PyObject *)self->owner);
    type->tp_free(object);
    Py_DECREF(type);
}

static void dispatcher_dealloc(PyObject *object)
{
    dispatcher_object *self = (dispatcher_object *)object;
    PyTypeObject *type = Py_TYPE(object);
    ovlm_pool_close(self->pool);
    free(self->spare);
    type->tp_free(object);
    Py_DECREF(type);
}

static PyObject *new_dispatch(PyObject *module, PyObject *owner, ovlm_dispatch *dispatch)
{
    PyObject *type = PyObject_GetAttrString(module, "Dispatch");
    dispatch_object *made = NULL;
    if (type != NULL) {
        made = (dispatch_object *)((PyTypeObject *)type)->tp_alloc((PyTypeObject *)type, 0);
        Py_DECREF(type);
    }
    if (made == NULL) {
        ovlm_dispatch_free(dispatch);
        return NULL;
    }
    made->dispatch = dispatch;
    made->owner = (dispatcher_object *)Py_NewRef(owner);
    return (PyObject *)made;
}

/* prepare(route, rank, places, source_rows, destination_rows) -> Dispatch */
static CORE_METHOD(dispatcher_prepare)
{
    (void)kwnames;
    ovlm_route_view route = {.route = {0}};
    ovlm_i64_view place = {0};
    ovlm_dispatch_spec spec = {.route = &route.route};
    PyObject *module = PyType_GetModule(type), *answer = NULL;
    if (module != NULL && ovlm_arg_count("prepare", nargs, 5) == 0 &&
        ovlm_arg_route(args[0], &route) == 0 && ovlm_arg_int(args[1], "rank", &spec.rank) == 0 &&
        ovlm_arg_i64(args[2], "places", route.route.k, true, &place) == 0 &&
        ovlm_arg_int(args[3], "source_rows", &spec.source_rows) == 0 &&
        ovlm_arg_int(args[4], "destination_rows", &spec.destination_rows) == 0) {
        ovlm_err err = {0};
        ovlm_dispatch *dispatch = NULL;
        ovlm_status status = OVLM_OK;
        spec.place = place.data;
        Py_BEGIN_ALLOW_THREADS
        status = ovlm_dispatch_prepare(&spec, &dispatch, &err);
        Py_END_ALLOW_THREADS
        answer = status == OVLM_OK ? new_dispatch(module, object, dispatch)
                                   : ovlm_raise(module, &err);
    }
    ovlm_route_release(&route);
    Py_CLEAR(place.owner);
    return answer;
}

/* dispatcher(threads) */
static PyObject *open_dispatcher(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    int64_t threads = 0;
    ovlm_pool *pool = NULL;
    ovlm_err err = {0};
    if (ovlm_arg_count("dispatcher", nargs, 1) < 0 ||
        ovlm_arg_int(args[0], "threads", &threads) < 0) {
        return NULL;
    }
    if (threads != 1 && ovlm_pool_open(threads, &pool, &err) != OVLM_OK) {
        return ovlm_raise(module, &err);
    }
    PyObject *type = PyObject_GetAttrString(module, "Dispatcher");
    dispatcher_object *made = NULL;
    if (type != NULL) {
        made = (dispatcher_object *)((PyTypeObject *)type)->tp_alloc((PyTypeObject *)type, 0);
        Py_DECREF(type);
    }
    if (made == NULL) {
        ovlm_pool_close(pool);
        return NULL;
    }
    made->pool = pool;
    return (PyObject *)made;
}

PyMethodDef ovlm_dispatch_functions[] = {
    {"dispatcher", (PyCFunction)(void (*)(void))open_dispatcher, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

/* ------------------------------------------------------------------ types ---------------- */

#define METHOD(name, function)                      \
    {name, (PyCFunction)(void (*)(void))(function), \
     METH_METHOD | METH_FASTCALL | METH_KEYWORDS, NULL}

static PyMethodDef dispatcher_methods[] = {
    METHOD("prepare", dispatcher_prepare),
    {NULL, NULL, 0, NULL},
};

static PyMethodDef dispatch_methods[] = {
    {"rows", dispatch_rows, METH_NOARGS, NULL},
    METHOD("move", dispatch_move_rows),
    METHOD("wait", dispatch_wait),
    {NULL, NULL, 0, NULL},
};

static PyType_Slot dispatcher_slots[] = {
    {Py_tp_doc, "C side of orchvlm.Dispatcher."},
    {Py_tp_dealloc, dispatcher_dealloc},
    {Py_tp_methods, dispatcher_methods},
    {0, NULL},
};

static PyType_Slot dispatch_slots[] = {
    {Py_tp_doc, "C side of orchvlm.Dispatch."},
    {Py_tp_dealloc, dispatch_dealloc},
    {Py_tp_methods, dispatch_methods},
    {0, NULL},
};

static PyType_Spec dispatcher_spec = {
    .name = "orchvlm._core.Dispatcher",
    .basicsize = sizeof(dispatcher_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = dispatcher_slots,
};

static PyType_Spec dispatch_spec = {
    .name = "orchvlm._core.Dispatch",
    .basicsize = sizeof(dispatch_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = dispatch_slots,
};

static int add_type(PyObject *module, const char *name, PyType_Spec *spec)
{
    PyObject *type = PyType_FromModuleAndSpec(module, spec, NULL);
    if (type == NULL) {
        return -1;
    }
    int failed = PyModule_AddObjectRef(module, name, type);
    Py_DECREF(type);
    return failed;
}

int ovlm_add_dispatch_types(PyObject *module)
{
    return add_type(module, "Dispatcher", &dispatcher_spec) < 0
               ? -1
               : add_type(module, "Dispatch", &dispatch_spec);
}
