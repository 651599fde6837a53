/* py_cost.c - Python side of the cost calls. */
#include "args.h"

#include <math.h>

int ovlm_arg_batch_cost(PyObject *object, ovlm_batch_cost *cost)
{
    if (!PyTuple_Check(object)) {
        PyErr_SetString(PyExc_TypeError, "cost must be a BatchCost");
        return -1;
    }
    return ovlm_arg_tuple(object, "dddddd;cost must be a BatchCost", &cost->linear,
                          &cost->quadratic, &cost->padded_linear, &cost->padded_quadratic,
                          &cost->per_item, &cost->fixed)
               ? 0
               : -1;
}

int ovlm_arg_sequence_cost(PyObject *object, ovlm_sequence_cost *cost, ovlm_i64_view *degree,
                           ovlm_f64_view *comm)
{
    PyObject *degrees = NULL, *values = NULL;
    long long heads = 0;
    int rings = 0;
    *degree = (ovlm_i64_view){NULL, NULL, 0};
    *comm = (ovlm_f64_view){NULL, NULL, 0};
    *cost = (ovlm_sequence_cost){0};
    if (!PyTuple_Check(object)) {
        PyErr_SetString(PyExc_TypeError, "cost must be a SequenceCost");
        return -1;
    }
    if (!ovlm_arg_tuple(object, "ddddddLpdOO;cost must be a SequenceCost", &cost->quadratic,
                        &cost->linear, &cost->fixed, &cost->memory_per_token,
                        &cost->memory_fixed, &cost->memory_limit, &heads, &rings, &cost->ring,
                        &degrees, &values) ||
        ovlm_arg_i64(degrees, "cost.comm", -1, false, degree) < 0 ||
        ovlm_arg_f64(values, "cost.comm", degree->n, false, false, comm) < 0) {
        Py_CLEAR(degree->owner);
        return -1;
    }
    cost->heads = heads;
    cost->rings = rings != 0;
    cost->degree_n = degree->n;
    cost->degree = degree->data;
    cost->comm = comm->data;
    return 0;
}

/* ValueError unless every length is >= 0. */
static int check_lengths(const ovlm_i64_view *lengths)
{
    for (int64_t i = 0; i < lengths->n; i++) {
        if (lengths->data[i] < 0) {
            PyErr_Format(PyExc_ValueError, "lengths[%lld] must be >= 0; got %lld", (long long)i,
                         (long long)lengths->data[i]);
            return -1;
        }
    }
    return 0;
}

PyDoc_STRVAR(batch_cost_load_doc, "batch_cost_load(cost, lengths, squares, /)\n--\n\n"
                                  "f of one set of items.");

static PyObject *batch_cost_load(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    ovlm_batch_cost cost;
    ovlm_i64_view lengths = {0};
    ovlm_f64_view squares = {0};
    ovlm_err err = {0};
    PyObject *result = NULL;
    if (ovlm_arg_count("batch_cost_load", nargs, 3) < 0 ||
        ovlm_arg_batch_cost(args[0], &cost) < 0 ||
        ovlm_arg_i64(args[1], "lengths", -1, false, &lengths) < 0 || check_lengths(&lengths) < 0 ||
        ovlm_arg_f64(args[2], "squares", lengths.n, true, false, &squares) < 0) {
        goto done;
    }
    for (int64_t i = 0; i < squares.n; i++) {
        if (squares.data[i] < 0) {
            PyErr_Format(PyExc_ValueError, "squares[%lld] must be >= 0", (long long)i);
            goto done;
        }
    }
    if (ovlm_batch_cost_check(&cost, &err) != OVLM_OK) {
        ovlm_raise(module, &err);
        goto done;
    }
    double load = 0;
    Py_BEGIN_ALLOW_THREADS
    load = ovlm_batch_cost_load(&cost, lengths.n, lengths.data, squares.data);
    Py_END_ALLOW_THREADS
    result = PyFloat_FromDouble(load);
done:
    Py_CLEAR(lengths.owner);
    Py_CLEAR(squares.owner);
    return result;
}

PyDoc_STRVAR(sequence_cost_time_doc, "sequence_cost_time(cost, lengths, degree, /)\n--\n\n"
                                     "T of one group.");

static PyObject *sequence_cost_time(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    ovlm_sequence_cost cost;
    ovlm_i64_view lengths = {0}, degrees = {0};
    ovlm_f64_view comm = {0};
    ovlm_err err = {0};
    int64_t degree = 0, j = 0;
    PyObject *result = NULL;
    if (ovlm_arg_count("sequence_cost_time", nargs, 3) < 0 ||
        ovlm_arg_sequence_cost(args[0], &cost, &degrees, &comm) < 0 ||
        ovlm_arg_i64(args[1], "lengths", -1, false, &lengths) < 0 || check_lengths(&lengths) < 0 ||
        ovlm_arg_int(args[2], "degree", &degree) < 0) {
        goto done;
    }
    if (ovlm_sequence_cost_check(&cost, &err) != OVLM_OK) {
        ovlm_raise(module, &err);
        goto done;
    }
    while (j < cost.degree_n && cost.degree[j] != degree) {
        j++;
    }
    if (j == cost.degree_n) {
        PyErr_Format(PyExc_ValueError, "degree %lld has no entry in cost.comm", (long long)degree);
        goto done;
    }
    double seconds = 0;
    Py_BEGIN_ALLOW_THREADS
    seconds = ovlm_sequence_cost_time(&cost, lengths.n, lengths.data, j);
    Py_END_ALLOW_THREADS
    result = PyFloat_FromDouble(seconds);
done:
    Py_CLEAR(lengths.owner);
    Py_CLEAR(degrees.owner);
    Py_CLEAR(comm.owner);
    return result;
}

/* The rows of fit() as flat arrays: start[rows+1], length, seconds, degree or None, bytes or
 * None. */
typedef struct row_views {
    ovlm_i64_view start, length, degree;
    ovlm_f64_view seconds, bytes, square;
    ovlm_measurements rows;
} row_views;

static void row_views_release(row_views *views)
{
    Py_CLEAR(views->start.owner);
    Py_CLEAR(views->length.owner);
    Py_CLEAR(views->degree.owner);
    Py_CLEAR(views->seconds.owner);
    Py_CLEAR(views->bytes.owner);
    Py_CLEAR(views->square.owner);
}

/* args: start, length, seconds, degree, bytes */
static int row_views_init(row_views *views, PyObject *const *args)
{
    *views = (row_views){0};
    if (ovlm_arg_i64(args[0], "start", -1, false, &views->start) < 0 ||
        ovlm_arg_i64(args[1], "lengths", -1, false, &views->length) < 0) {
        return -1;
    }
    int64_t rows = views->start.n - 1;
    if (rows < 0 || views->start.data[0] != 0 || views->start.data[rows] != views->length.n) {
        PyErr_SetString(PyExc_ValueError, "start must go from 0 to the number of lengths");
        return -1;
    }
    for (int64_t i = 0; i < rows; i++) {
        if (views->start.data[i] > views->start.data[i + 1]) {
            PyErr_SetString(PyExc_ValueError, "start must be ascending");
            return -1;
        }
    }
    if (ovlm_arg_f64(args[2], "seconds", rows, false, true, &views->seconds) < 0 ||
        ovlm_arg_i64(args[3], "degree", rows, true, &views->degree) < 0 ||
        ovlm_arg_f64(args[4], "bytes", rows, true, true, &views->bytes) < 0) {
        return -1;
    }
    views->rows = (ovlm_measurements){
        .rows = rows, .start = views->start.data, .length = views->length.data,
        .degree = views->degree.data, .seconds = views->seconds.data, .bytes = views->bytes.data};
    return 0;
}

static PyObject *new_f64_empty(int64_t n)
{
    npy_intp dim = (npy_intp)n;
    return PyArray_SimpleNew(1, &dim, NPY_DOUBLE);
}

static double *f64_data(PyObject *array)
{
    return PyArray_DATA((PyArrayObject *)array);
}

PyDoc_STRVAR(batch_cost_fit_doc,
             "batch_cost_fit(start, lengths, seconds, squares, terms, /)\n--\n\n"
             "(coefficients, relative error); squares may be None, terms is a bit mask in the\n"
             "order of BatchCost.");

static PyObject *batch_cost_fit(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    row_views views = {0};
    int64_t terms = 0;
    if (ovlm_arg_count("batch_cost_fit", nargs, 5) < 0 ||
        ovlm_arg_int(args[4], "terms", &terms) < 0) {
        return NULL;
    }
    PyObject *const rows[] = {args[0], args[1], args[2], Py_None, Py_None};
    PyObject *error = NULL, *result = NULL;
    if (row_views_init(&views, rows) < 0 ||
        ovlm_arg_f64(args[3], "squares", views.length.n, true, true, &views.square) < 0 ||
        (error = new_f64_empty(views.rows.rows)) == NULL) {
        goto done;
    }
    views.rows.square = views.square.data;
    bool use[6];
    for (int i = 0; i < 6; i++) {
        use[i] = (terms >> i) & 1;
    }
    double *error_data = f64_data(error);
    ovlm_batch_cost cost = {0};
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_batch_cost_fit(&views.rows, use, &cost, error_data, &err);
    Py_END_ALLOW_THREADS
    result = status != OVLM_OK
                 ? ovlm_raise(module, &err)
                 : Py_BuildValue("(dddddd)O", cost.linear, cost.quadratic, cost.padded_linear,
                                 cost.padded_quadratic, cost.per_item, cost.fixed, error);
done:
    Py_XDECREF(error);
    row_views_release(&views);
    return result;
}

PyDoc_STRVAR(sequence_cost_fit_doc,
             "sequence_cost_fit(start, lengths, seconds, degree, bytes, heads, degrees, rings, /)\n"
             "--\n\n"
             "((quadratic, linear, fixed, memory_per_token, memory_fixed), comm, relative error\n"
             "of seconds, of bytes or None).");

static PyObject *sequence_cost_fit(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    row_views views = {0};
    ovlm_i64_view degrees = {0};
    ovlm_sequence_cost cost = {.memory_limit = INFINITY};
    PyObject *comm = NULL, *error = NULL, *bytes_error = NULL, *result = NULL;
    if (ovlm_arg_count("sequence_cost_fit", nargs, 8) < 0 ||
        ovlm_arg_int(args[5], "heads", &cost.heads) < 0 || row_views_init(&views, args) < 0 ||
        ovlm_arg_i64(args[6], "degrees", -1, false, &degrees) < 0 ||
        (comm = new_f64_empty(degrees.n)) == NULL ||
        (error = new_f64_empty(views.rows.rows)) == NULL ||
        (bytes_error = new_f64_empty(views.rows.rows)) == NULL) {
        goto done;
    }
    if (views.degree.data == NULL) {
        PyErr_SetString(PyExc_TypeError, "degree must not be None");
        goto done;
    }
    cost.rings = args[7] == Py_True;
    cost.degree_n = degrees.n;
    cost.degree = degrees.data;
    double *comm_data = f64_data(comm), *error_data = f64_data(error);
    double *bytes_error_data = f64_data(bytes_error);
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_sequence_cost_fit(&views.rows, &cost, comm_data, error_data, bytes_error_data,
                                    &err);
    Py_END_ALLOW_THREADS
    result = status != OVLM_OK
                 ? ovlm_raise(module, &err)
                 : Py_BuildValue("(ddddd)OOO", cost.quadratic, cost.linear, cost.fixed,
                                 cost.memory_per_token, cost.memory_fixed, comm, error,
                                 views.bytes.data == NULL ? Py_None : bytes_error);
done:
    Py_XDECREF(comm);
    Py_XDECREF(error);
    Py_XDECREF(bytes_error);
    Py_CLEAR(degrees.owner);
    row_views_release(&views);
    return result;
}

#define METHOD(name) {#name, (PyCFunction)(void (*)(void))(name), METH_FASTCALL, name##_doc}

PyMethodDef ovlm_cost_methods[] = {
    METHOD(batch_cost_load),
    METHOD(sequence_cost_time),
    METHOD(batch_cost_fit),
    METHOD(sequence_cost_fit),
    {NULL, NULL, 0, NULL},
};
