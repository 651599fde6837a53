/* py_comm_calls.c - the calls of orchvlm._core.Comm: arrays in, bytes out.
 *
 * A call with `start` returns a ticket, and the object keeps what the call reads and writes until
 * that ticket is waited for, so that dropped arrays never lie under a running transfer. */
#include "py_comm.h"

typedef struct bytes_view {
    char *data;
    int64_t bytes, n;
} bytes_view;

/* Any C-contiguous array of plain numbers. */
static int arg_bytes(PyObject *object, const char *name, bool written, bytes_view *view)
{
    PyArrayObject *array = (PyArrayObject *)object;
    if (!PyArray_Check(object) || !PyArray_IS_C_CONTIGUOUS(array) ||
        PyDataType_REFCHK(PyArray_DESCR(array)) || PyArray_ISBYTESWAPPED(array)) {
        PyErr_Format(PyExc_TypeError, "%s must be a C-contiguous array of numbers", name);
        return -1;
    }
    if (written && !PyArray_ISWRITEABLE(array)) {
        PyErr_Format(PyExc_ValueError, "%s is read-only", name);
        return -1;
    }
    *view = (bytes_view){PyArray_DATA(array), (int64_t)PyArray_NBYTES(array),
                         (int64_t)PyArray_SIZE(array)};
    return 0;
}

/* One count per rank, which together fit the array. */
static int arg_counts(const comm_object *self, PyObject *object, const char *name,
                      int64_t unit_bytes, const bytes_view *array, ovlm_i64_view *view)
{
    if (self->comm == NULL) {
        PyErr_SetString(PyExc_ValueError, "the communicator is closed");
        return -1;
    }
    if (ovlm_arg_i64(object, name, ovlm_comm_size(self->comm), false, view) < 0) {
        return -1;
    }
    int64_t left = array->bytes / unit_bytes;
    for (int64_t r = 0; r < view->n && left >= 0; r++) {
        left = view->data[r] < 0 || view->data[r] > left ? -1 : left - view->data[r];
    }
    if (left != 0 || array->bytes % unit_bytes != 0) {
        PyErr_Format(PyExc_ValueError, "%s must be >= 0 and add up to the array's size", name);
        Py_CLEAR(view->owner);
        return -1;
    }
    return 0;
}

static int arg_reduction(PyObject *dtype, PyObject *reduce, ovlm_dtype *type, ovlm_reduce *how)
{
    int64_t number = 0, op = 0;
    if (ovlm_arg_int(dtype, "dtype", &number) < 0 || ovlm_arg_int(reduce, "reduce", &op) < 0) {
        return -1;
    }
    if (number < 0 || number >= OVLM_DTYPE_COUNT) {
        PyErr_SetString(PyExc_ValueError, "no such dtype");
        return -1;
    }
    *type = (ovlm_dtype)number;
    *how = (ovlm_reduce)op;
    return 0;
}

/* The ticket as a number, or None; a started call's objects are kept. */
static PyObject *finish(comm_object *self, PyTypeObject *type, ovlm_status status,
                        const ovlm_err *err, int64_t ticket, PyObject *objects)
{
    PyObject *none = ovlm_comm_object_leave(self, type, status, err);
    if (none == NULL || ticket == 0) {
        return none;
    }
    Py_DECREF(none);
    PyObject *number = PyLong_FromLongLong((long long)ticket);
    if (number == NULL || PyDict_SetItem(self->kept, number, objects) < 0) {
        Py_CLEAR(number); /* what cannot be kept is left to live for ever */
        Py_INCREF(objects);
    }
    return number;
}

/* ---------------------------------------------------------------- blocking only */

OVLM_COMM_METHOD(ovlm_py_comm_barrier)
{
    (void)kwnames;
    (void)args;
    comm_object *self = (comm_object *)object;
    if (ovlm_arg_count("barrier", nargs, 0) < 0 || ovlm_comm_object_enter(self) < 0) {
        return NULL;
    }
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_comm_barrier(self->comm, &err);
    Py_END_ALLOW_THREADS
    return ovlm_comm_object_leave(self, type, status, &err);
}

/* broadcast(array, root) */
OVLM_COMM_METHOD(ovlm_py_comm_broadcast)
{
    (void)kwnames;
    comm_object *self = (comm_object *)object;
    bytes_view data = {0};
    int64_t root = 0;
    if (ovlm_arg_count("broadcast", nargs, 2) < 0 ||
        arg_bytes(args[0], "array", true, &data) < 0 || ovlm_arg_int(args[1], "root", &root) < 0 ||
        ovlm_comm_object_enter(self) < 0) {
        return NULL;
    }
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_comm_broadcast(self->comm, data.data, data.bytes, root, NULL, &err);
    Py_END_ALLOW_THREADS
    return ovlm_comm_object_leave(self, type, status, &err);
}

/* wait(ticket) */
OVLM_COMM_METHOD(ovlm_py_comm_wait)
{
    (void)kwnames;
    comm_object *self = (comm_object *)object;
    int64_t ticket = 0;
    if (ovlm_arg_count("wait", nargs, 1) < 0 || ovlm_arg_int(args[0], "ticket", &ticket) < 0 ||
        ovlm_comm_object_enter(self) < 0) {
        return NULL;
    }
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_comm_wait(self->comm, ticket, &err);
    Py_END_ALLOW_THREADS
    if (status == OVLM_OK && PyDict_Contains(self->kept, args[0]) == 1 &&
        PyDict_DelItem(self->kept, args[0]) < 0) {
        PyErr_Clear(); /* kept until the end, then */
    }
    return ovlm_comm_object_leave(self, type, status, &err);
}

/* ---------------------------------------------------------------- blocking or started */

/* all_gather(send, recv, recv_bytes, start) */
OVLM_COMM_METHOD(ovlm_py_comm_all_gather)
{
    (void)kwnames;
    comm_object *self = (comm_object *)object;
    bytes_view send = {0}, recv = {0};
    ovlm_i64_view count = {0};
    int start = nargs == 4 ? PyObject_IsTrue(args[3]) : 0;
    if (start < 0 || ovlm_arg_count("all_gather", nargs, 4) < 0 ||
        arg_bytes(args[0], "send", false, &send) < 0 ||
        arg_bytes(args[1], "recv", true, &recv) < 0 ||
        arg_counts(self, args[2], "recv_bytes", 1, &recv, &count) < 0) {
        return NULL;
    }
    if (count.data[ovlm_comm_rank(self->comm)] != send.bytes) {
        PyErr_Format(PyExc_ValueError, "this rank has %lld bytes, and its count says %lld",
                     (long long)send.bytes, (long long)count.data[ovlm_comm_rank(self->comm)]);
        Py_CLEAR(count.owner);
        return NULL;
    }
    PyObject *objects = PyTuple_Pack(3, args[0], args[1], count.owner);
    Py_CLEAR(count.owner);
    if (objects == NULL || ovlm_comm_object_enter(self) < 0) {
        Py_XDECREF(objects);
        return NULL;
    }
    const ovlm_all_gather call = {.send = send.data, .recv = recv.data, .recv_bytes = count.data};
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    int64_t ticket = 0;
    Py_BEGIN_ALLOW_THREADS
    status = start ? ovlm_comm_all_gather_start(self->comm, &call, &ticket, &err)
                   : ovlm_comm_all_gather(self->comm, &call, &err);
    Py_END_ALLOW_THREADS
    PyObject *result = finish(self, type, status, &err, ticket, objects);
    Py_DECREF(objects);
    return result;
}

/* all_to_all(send, send_bytes, recv, recv_bytes, start) */
OVLM_COMM_METHOD(ovlm_py_comm_all_to_all)
{
    (void)kwnames;
    comm_object *self = (comm_object *)object;
    bytes_view send = {0}, recv = {0};
    ovlm_i64_view send_n = {0}, recv_n = {0};
    PyObject *objects = NULL;
    int start = nargs == 5 ? PyObject_IsTrue(args[4]) : 0;
    if (start < 0 || ovlm_arg_count("all_to_all", nargs, 5) < 0 ||
        arg_bytes(args[0], "send", false, &send) < 0 ||
        arg_bytes(args[2], "recv", true, &recv) < 0 ||
        arg_counts(self, args[1], "send_bytes", 1, &send, &send_n) < 0) {
        return NULL;
    }
    if (!(arg_counts(self, args[3], "recv_bytes", 1, &recv, &recv_n) < 0)) {
        objects = PyTuple_Pack(4, args[0], send_n.owner, args[2], recv_n.owner);
        Py_CLEAR(recv_n.owner);
    }
    Py_CLEAR(send_n.owner);
    if (objects == NULL || ovlm_comm_object_enter(self) < 0) {
        Py_XDECREF(objects);
        return NULL;
    }
    const ovlm_all_to_all call = {.send = send.data, .send_bytes = send_n.data,
                                  .recv = recv.data, .recv_bytes = recv_n.data};
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    int64_t ticket = 0;
    Py_BEGIN_ALLOW_THREADS
    status = start ? ovlm_comm_all_to_all_start(self->comm, &call, &ticket, &err)
                   : ovlm_comm_all_to_all(self->comm, &call, &err);
    Py_END_ALLOW_THREADS
    PyObject *result = finish(self, type, status, &err, ticket, objects);
    Py_DECREF(objects);
    return result;
}

/* all_reduce(send, recv, dtype, reduce, start) */
OVLM_COMM_METHOD(ovlm_py_comm_all_reduce)
{
    (void)kwnames;
    comm_object *self = (comm_object *)object;
    bytes_view send = {0}, recv = {0};
    ovlm_all_reduce call = {0};
    int start = nargs == 5 ? PyObject_IsTrue(args[4]) : 0;
    if (start < 0 || ovlm_arg_count("all_reduce", nargs, 5) < 0 ||
        arg_bytes(args[0], "send", false, &send) < 0 ||
        arg_bytes(args[1], "recv", true, &recv) < 0 ||
        arg_reduction(args[2], args[3], &call.dtype, &call.reduce) < 0) {
        return NULL;
    }
    if (send.bytes != recv.bytes || send.bytes != send.n * ovlm_dtype_bytes(call.dtype)) {
        PyErr_SetString(PyExc_ValueError, "send and recv must be equally long, of that dtype");
        return NULL;
    }
    PyObject *objects = PyTuple_Pack(2, args[0], args[1]);
    if (objects == NULL || ovlm_comm_object_enter(self) < 0) {
        Py_XDECREF(objects);
        return NULL;
    }
    call.send = send.data;
    call.recv = recv.data;
    call.n = send.n;
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    int64_t ticket = 0;
    Py_BEGIN_ALLOW_THREADS
    status = start ? ovlm_comm_all_reduce_start(self->comm, &call, &ticket, &err)
                   : ovlm_comm_all_reduce(self->comm, &call, &err);
    Py_END_ALLOW_THREADS
    PyObject *result = finish(self, type, status, &err, ticket, objects);
    Py_DECREF(objects);
    return result;
}

/* reduce_scatter(send, recv, counts, dtype, reduce, start) */
OVLM_COMM_METHOD(ovlm_py_comm_reduce_scatter)
{
    (void)kwnames;
    comm_object *self = (comm_object *)object;
    bytes_view send = {0}, recv = {0};
    ovlm_i64_view count = {0};
    ovlm_reduce_scatter call = {0};
    int start = nargs == 6 ? PyObject_IsTrue(args[5]) : 0;
    if (start < 0 || ovlm_arg_count("reduce_scatter", nargs, 6) < 0 ||
        arg_bytes(args[0], "send", false, &send) < 0 ||
        arg_bytes(args[1], "recv", true, &recv) < 0 ||
        arg_reduction(args[3], args[4], &call.dtype, &call.reduce) < 0 ||
        arg_counts(self, args[2], "counts", ovlm_dtype_bytes(call.dtype), &send, &count) < 0) {
        return NULL;
    }
    int64_t mine = count.data[ovlm_comm_rank(self->comm)] * ovlm_dtype_bytes(call.dtype);
    PyObject *objects = PyTuple_Pack(3, args[0], args[1], count.owner);
    Py_CLEAR(count.owner);
    if (objects != NULL && recv.bytes != mine) {
        PyErr_Format(PyExc_ValueError, "recv has %lld bytes, and the count says %lld",
                     (long long)recv.bytes, (long long)mine);
        Py_CLEAR(objects);
    }
    if (objects == NULL || ovlm_comm_object_enter(self) < 0) {
        Py_XDECREF(objects);
        return NULL;
    }
    call.send = send.data;
    call.recv = recv.data;
    call.counts = count.data;
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    int64_t ticket = 0;
    Py_BEGIN_ALLOW_THREADS
    status = start ? ovlm_comm_reduce_scatter_start(self->comm, &call, &ticket, &err)
                   : ovlm_comm_reduce_scatter(self->comm, &call, &err);
    Py_END_ALLOW_THREADS
    PyObject *result = finish(self, type, status, &err, ticket, objects);
    Py_DECREF(objects);
    return result;
}
