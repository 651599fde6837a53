/* args.c - converters. */
#include "args.h"

#include <math.h>

PyObject *ovlm_raise(PyObject *module, const ovlm_err *err)
{
    const ovlm_module_state *state = PyModule_GetState(module);
    PyObject *type = NULL;
    switch (err->code) {
    case OVLM_E_ARG: type = PyExc_ValueError; break;
    case OVLM_E_NOMEM: type = PyExc_MemoryError; break;
    case OVLM_E_BACKEND: type = state->backend_error; break;
    case OVLM_E_COMM: type = state->comm_error; break;
    case OVLM_E_INTERRUPTED:
        /* poll left the handler's exception (KeyboardInterrupt) in place */
        if (PyErr_Occurred()) {
            return NULL;
        }
        type = PyExc_KeyboardInterrupt;
        break;
    default: type = state->error;
    }
    if (err->code == OVLM_E_INTERNAL) {
        PyErr_Format(type, "%s [%s, line %d: please report this]", err->message, err->file,
                     err->line);
    } else {
        PyErr_SetString(type, err->message);
    }
    return NULL;
}

PyObject *ovlm_instance_of(PyObject *module, const char *type, PyObject *object)
{
    PyObject *class = PyObject_GetAttrString(module, type);
    if (class == NULL) {
        return NULL;
    }
    /* Its true type: what __class__ says is no memory layout. */
    bool is = PyType_IsSubtype(Py_TYPE(object), (PyTypeObject *)class) != 0;
    Py_DECREF(class);
    if (!is) {
        PyErr_Format(PyExc_TypeError, "expected a %s of the core; got %s", type,
                     Py_TYPE(object)->tp_name);
    }
    return is ? object : NULL;
}

/* Replaces a conversion error by one that names the argument; keeps the cause's text. */
static void name_error(const char *name, const char *wanted)
{
    PyObject *type = NULL, *value = NULL, *trace = NULL;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_Format(PyErr_GivenExceptionMatches(type, PyExc_MemoryError) ? PyExc_MemoryError
                                                                      : PyExc_TypeError,
                 "%s must be %s: %S", name, wanted, value ? value : Py_None);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
}

int ovlm_arg_tuple(PyObject *tuple, const char *format, ...)
{
    va_list targets;
    va_start(targets, format);
    int ok = PyArg_VaParse(tuple, format, targets);
    va_end(targets);
    if (!ok && PyErr_ExceptionMatches(PyExc_OverflowError)) {
        PyErr_Clear();
        PyErr_SetString(PyExc_ValueError, "a number is too large for a 64-bit integer or float");
    }
    return ok;
}

/* A mask would be ignored.  Of subclasses only, so that plain arrays cost nothing. */
static int refuse_masked(PyArrayObject *array, const char *name)
{
    if (PyArray_CheckExact((PyObject *)array)) {
        return 0;
    }
    PyObject *mask = PyObject_GetAttrString((PyObject *)array, "mask");
    if (mask == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) {
            return -1;
        }
        PyErr_Clear();
        return 0;
    }
    Py_DECREF(mask);
    PyErr_Format(PyExc_TypeError,
                 "%s is a masked array, whose mask would be ignored; pass its compressed() or "
                 "filled() values", name);
    return -1;
}

static int check_shape(PyArrayObject *array, const char *name, int64_t expected_n)
{
    if (PyArray_NDIM(array) != 1) {
        PyErr_Format(PyExc_ValueError, "%s must be one-dimensional; got %d dimensions", name,
                     PyArray_NDIM(array));
        return -1;
    }
    if (expected_n >= 0 && PyArray_DIM(array, 0) != expected_n) {
        PyErr_Format(PyExc_ValueError, "%s must have %lld elements; got %lld", name,
                     (long long)expected_n, (long long)PyArray_DIM(array, 0));
        return -1;
    }
    return 0;
}

/* uint64 values above 2^63-1 would wrap around in a cast. */
static int check_unsigned(PyArrayObject *array, const char *name)
{
    if (PyArray_TYPE(array) != NPY_UINT64 && PyArray_TYPE(array) != NPY_ULONGLONG) {
        return 0;
    }
    PyArrayObject *flat =
        (PyArrayObject *)PyArray_ContiguousFromAny((PyObject *)array, NPY_UINT64, 0, 0);
    if (flat == NULL) {
        return -1;
    }
    const uint64_t *data = PyArray_DATA(flat);
    npy_intp n = PyArray_SIZE(flat);
    int bad = 0;
    for (npy_intp i = 0; i < n && !bad; i++) {
        bad = data[i] > (uint64_t)INT64_MAX;
    }
    Py_DECREF(flat);
    if (bad) {
        PyErr_Format(PyExc_ValueError, "%s holds a value above 2^63-1", name);
    }
    return bad ? -1 : 0;
}

/* Python integers beyond 64 bits make an array of objects: their kind is right, their value not. */
static bool holds_huge(PyArrayObject *array)
{
    bool huge = PyArray_TYPE(array) == NPY_OBJECT && PyArray_NDIM(array) == 1;
    npy_intp n = huge ? PyArray_DIM(array, 0) : 0;
    for (npy_intp i = 0; i < n && huge; i++) {
        PyObject *one = PyArray_GETITEM(array, (char *)PyArray_GETPTR1(array, i));
        huge = one != NULL && PyLong_CheckExact(one);
        Py_XDECREF(one);
    }
    return huge && n > 0;
}

int ovlm_arg_i64(PyObject *object, const char *name, int64_t expected_n, bool optional,
                 ovlm_i64_view *view)
{
    *view = (ovlm_i64_view){NULL, NULL, 0};
    if (object == Py_None && optional) {
        return 0;
    }
    PyArrayObject *array = (PyArrayObject *)PyArray_FROM_O(object);
    if (array == NULL) {
        name_error(name, "an array of integers");
        return -1;
    }
    if (refuse_masked(array, name) < 0) {
        Py_DECREF(array);
        return -1;
    }
    int empty = PyArray_SIZE(array) == 0 && PyArray_ISFLOAT(array); /* [] has dtype float64 */
    if (!empty && !PyArray_ISINTEGER(array)) {
        if (holds_huge(array)) {
            PyErr_Format(PyExc_ValueError, "%s holds a value that does not fit in 64 bits", name);
        } else {
            PyErr_Format(PyExc_TypeError, "%s must hold integers; got dtype %S", name,
                         (PyObject *)PyArray_DESCR(array));
        }
        Py_DECREF(array);
        return -1;
    }
    if (check_shape(array, name, expected_n) < 0 || check_unsigned(array, name) < 0) {
        Py_DECREF(array);
        return -1;
    }
    PyArrayObject *cast = (PyArrayObject *)PyArray_FROMANY(
        (PyObject *)array, NPY_INT64, 1, 1,
        NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED | NPY_ARRAY_NOTSWAPPED | NPY_ARRAY_FORCECAST);
    Py_DECREF(array);
    if (cast == NULL) {
        return -1;
    }
    *view = (ovlm_i64_view){(PyObject *)cast, PyArray_DATA(cast), PyArray_DIM(cast, 0)};
    return 0;
}

int ovlm_arg_f64(PyObject *object, const char *name, int64_t expected_n, bool optional,
                 bool allow_inf, ovlm_f64_view *view)
{
    *view = (ovlm_f64_view){NULL, NULL, 0};
    if (object == Py_None && optional) {
        return 0;
    }
    PyArrayObject *array = (PyArrayObject *)PyArray_FROM_O(object);
    if (array == NULL) {
        name_error(name, "an array of real numbers");
        return -1;
    }
    if (refuse_masked(array, name) < 0) {
        Py_DECREF(array);
        return -1;
    }
    if (!PyArray_ISINTEGER(array) && !PyArray_ISFLOAT(array) && !holds_huge(array)) {
        PyErr_Format(PyExc_TypeError, "%s must hold real numbers; got dtype %S", name,
                     (PyObject *)PyArray_DESCR(array));
        Py_DECREF(array);
        return -1;
    }
    if (check_shape(array, name, expected_n) < 0) {
        Py_DECREF(array);
        return -1;
    }
    PyArrayObject *cast = (PyArrayObject *)PyArray_FROMANY(
        (PyObject *)array, NPY_DOUBLE, 1, 1,
        NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED | NPY_ARRAY_NOTSWAPPED | NPY_ARRAY_FORCECAST);
    Py_DECREF(array);
    if (cast == NULL) {
        if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
            PyErr_Clear();
            PyErr_Format(PyExc_ValueError, "%s holds an integer above 1e308", name);
        }
        return -1;
    }
    const double *data = PyArray_DATA(cast);
    int64_t n = PyArray_DIM(cast, 0);
    for (int64_t i = 0; i < n; i++) {
        if (isnan(data[i]) || (!allow_inf && isinf(data[i]))) {
            PyErr_Format(PyExc_ValueError, "%s[%lld] is not finite", name, (long long)i);
            Py_DECREF(cast);
            return -1;
        }
    }
    *view = (ovlm_f64_view){(PyObject *)cast, data, n};
    return 0;
}

int ovlm_arg_int(PyObject *object, const char *name, int64_t *value)
{
    if (PyBool_Check(object) || !PyIndex_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s must be an integer; got %s", name,
                     Py_TYPE(object)->tp_name);
        return -1;
    }
    PyObject *index = PyNumber_Index(object);
    if (index == NULL) {
        return -1;
    }
    int overflow = 0;
    *value = PyLong_AsLongLongAndOverflow(index, &overflow);
    Py_DECREF(index);
    if (overflow != 0) {
        PyErr_Format(PyExc_ValueError, "%s does not fit in 64 bits", name);
        return -1;
    }
    return *value == -1 && PyErr_Occurred() ? -1 : 0;
}

int ovlm_arg_seed(PyObject *object, const char *name, uint64_t *value)
{
    if (PyBool_Check(object) || !PyIndex_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s must be an integer; got %s", name,
                     Py_TYPE(object)->tp_name);
        return -1;
    }
    PyObject *index = PyNumber_Index(object);
    if (index == NULL) {
        return -1;
    }
    *value = PyLong_AsUnsignedLongLong(index);
    Py_DECREF(index);
    if (PyErr_Occurred()) {
        PyErr_Clear();
        PyErr_Format(PyExc_ValueError, "%s must be in [0, 2^64); got %R", name, object);
        return -1;
    }
    return 0;
}

/* Its __float__ would drop the imaginary part, with no more than a warning. */
static bool is_complex(PyObject *object)
{
    return PyComplex_Check(object) || PyArray_IsScalar(object, ComplexFloating) ||
           (PyArray_Check(object) && PyArray_ISCOMPLEX((PyArrayObject *)object));
}

int ovlm_arg_double(PyObject *object, const char *name, double *value)
{
    if (is_complex(object)) {
        PyErr_Format(PyExc_TypeError, "%s must be a number; got %s", name,
                     Py_TYPE(object)->tp_name);
        return -1;
    }
    *value = PyFloat_AsDouble(object);
    if (*value == -1.0 && PyErr_Occurred()) {
        bool too_large = PyErr_ExceptionMatches(PyExc_OverflowError);
        PyErr_Clear();
        if (too_large) {
            PyErr_Format(PyExc_ValueError, "%s must be finite; got an integer above 1e308", name);
        } else {
            PyErr_Format(PyExc_TypeError, "%s must be a number; got %s", name,
                         Py_TYPE(object)->tp_name);
        }
        return -1;
    }
    return 0;
}

/* Lets Python's signal handlers run, so that Ctrl-C stops a search. */
static int poll_signals(void *ctx)
{
    (void)ctx;
    PyGILState_STATE gil = PyGILState_Ensure();
    int stop = PyErr_CheckSignals();
    PyGILState_Release(gil);
    return stop;
}

int ovlm_arg_budget(PyObject *work_limit, PyObject *time_limit, ovlm_budget *budget)
{
    *budget = (ovlm_budget){.work_limit = -1, .poll = poll_signals};
    if (work_limit != Py_None) {
        if (ovlm_arg_int(work_limit, "work_limit", &budget->work_limit) < 0) {
            return -1;
        }
        if (budget->work_limit < 0) {
            PyErr_Format(PyExc_ValueError, "work_limit must be >= 0 or None; got %R", work_limit);
            return -1;
        }
    }
    if (time_limit != Py_None) {
        if (ovlm_arg_double(time_limit, "time_limit", &budget->time_limit_s) < 0) {
            return -1;
        }
        if (!(budget->time_limit_s > 0)) {
            PyErr_Format(PyExc_ValueError,
                         "time_limit must be positive seconds or None; got %R", time_limit);
            return -1;
        }
    }
    return 0;
}

int ovlm_arg_count(const char *function, Py_ssize_t nargs, Py_ssize_t expected)
{
    if (nargs != expected) {
        PyErr_Format(PyExc_TypeError, "_core.%s takes %zd arguments; got %zd", function, expected,
                     nargs);
        return -1;
    }
    return 0;
}

PyObject *ovlm_new_i64(const int64_t *data, int64_t n)
{
    npy_intp dim = (npy_intp)n;
    PyObject *array = PyArray_SimpleNew(1, &dim, NPY_INT64);
    if (array != NULL && n > 0) {
        memcpy(PyArray_DATA((PyArrayObject *)array), data, (size_t)n * sizeof *data);
    }
    return array;
}

PyObject *ovlm_new_f64(const double *data, int64_t n)
{
    npy_intp dim = (npy_intp)n;
    PyObject *array = PyArray_SimpleNew(1, &dim, NPY_DOUBLE);
    if (array != NULL && n > 0) {
        memcpy(PyArray_DATA((PyArrayObject *)array), data, (size_t)n * sizeof *data);
    }
    return array;
}
