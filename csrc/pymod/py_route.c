/* py_route.c - Python side of routes. */
#include "py_route.h"

#include <stdlib.h>

/* ------------------------------------------------------------------ arrays --------------- */

static void free_owned(PyObject *capsule)
{
    free(PyCapsule_GetPointer(capsule, NULL));
}

PyObject *ovlm_adopt(void **data, int64_t n, int type)
{
    void *owned = *data;
    *data = NULL;
    npy_intp dim = (npy_intp)n;
    if (owned == NULL) { /* a route that the plan does without */
        return PyArray_ZEROS(1, &dim, type, 0);
    }
    PyObject *capsule = PyCapsule_New(owned, NULL, free_owned);
    if (capsule == NULL) {
        free(owned);
        return NULL;
    }
    PyObject *array = PyArray_SimpleNewFromData(1, &dim, type, owned);
    if (array == NULL) {
        Py_DECREF(capsule);
        return NULL;
    }
    PyArray_CLEARFLAGS((PyArrayObject *)array, NPY_ARRAY_WRITEABLE);
    if (PyArray_SetBaseObject((PyArrayObject *)array, capsule) < 0) {
        Py_CLEAR(array);
    }
    return array;
}

PyObject *ovlm_adopt_i64(int64_t **data, int64_t n)
{
    return ovlm_adopt((void **)(void *)data, n, NPY_INT64);
}

/* ------------------------------------------------------------------ routes --------------- */

void ovlm_route_release(ovlm_route_view *view)
{
    for (int c = 0; c < OVLM_ROUTE_COLUMNS; c++) {
        Py_CLEAR(view->column[c].owner);
    }
}

int ovlm_arg_route(PyObject *tuple, ovlm_route_view *view)
{
    static const char *name[OVLM_ROUTE_COLUMNS] = {
        "item", "first_row", "n_rows", "source", "destination", "send_row", "receive_row"};
    *view = (ovlm_route_view){.route = {0}};
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != OVLM_ROUTE_COLUMNS + 1) {
        PyErr_SetString(PyExc_TypeError, "a route is a tuple of 8 fields");
        return -1;
    }
    ovlm_route *route = &view->route;
    int64_t **column[OVLM_ROUTE_COLUMNS] = {
        &route->item,        &route->first_row, &route->n_rows,     &route->source,
        &route->destination, &route->send_row,  &route->receive_row};
    for (int c = 0; c < OVLM_ROUTE_COLUMNS; c++) {
        int64_t expected = c == 0 ? -1 : view->column[0].n;
        if (ovlm_arg_i64(PyTuple_GetItem(tuple, c), name[c], expected, false,
                         &view->column[c]) < 0) {
            return -1;
        }
        /* calls only read it; the struct owns its arrays elsewhere */
        *column[c] = (int64_t *)(uintptr_t)view->column[c].data;
    }
    route->k = view->column[0].n;
    return ovlm_arg_int(PyTuple_GetItem(tuple, OVLM_ROUTE_COLUMNS), "n_ranks", &route->n_ranks);
}

PyObject *ovlm_take_route(ovlm_route *route)
{
    int64_t k = route->k;
    PyObject *tuple = Py_BuildValue(
        "(NNNNNNNL)", ovlm_adopt_i64(&route->item, k), ovlm_adopt_i64(&route->first_row, k),
        ovlm_adopt_i64(&route->n_rows, k), ovlm_adopt_i64(&route->source, k),
        ovlm_adopt_i64(&route->destination, k), ovlm_adopt_i64(&route->send_row, k),
        ovlm_adopt_i64(&route->receive_row, k), (long long)route->n_ranks);
    ovlm_route_free(route);
    return tuple;
}

PyDoc_STRVAR(route_check_doc, "route_check(route, /)\n--\n\nRaises what is wrong with a route.");

static PyObject *route_check(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    ovlm_route_view view = {.route = {0}};
    PyObject *answer = NULL;
    if (ovlm_arg_count("route_check", nargs, 1) == 0 && ovlm_arg_route(args[0], &view) == 0) {
        ovlm_err err = {0};
        ovlm_status status;
        Py_BEGIN_ALLOW_THREADS
        status = ovlm_route_check(&view.route, &err);
        Py_END_ALLOW_THREADS
        answer = status == OVLM_OK ? Py_NewRef(Py_None) : ovlm_raise(module, &err);
    }
    ovlm_route_release(&view);
    return answer;
}

PyDoc_STRVAR(route_invert_doc, "route_invert(route, /)\n--\n\nThe way back.");

static PyObject *route_invert(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    ovlm_route_view view = {.route = {0}};
    PyObject *answer = NULL;
    if (ovlm_arg_count("route_invert", nargs, 1) == 0 && ovlm_arg_route(args[0], &view) == 0) {
        ovlm_err err = {0};
        ovlm_route out = {0};
        ovlm_status status;
        Py_BEGIN_ALLOW_THREADS
        status = ovlm_route_invert(&view.route, &out, &err);
        Py_END_ALLOW_THREADS
        answer = status == OVLM_OK ? ovlm_take_route(&out) : ovlm_raise(module, &err);
    }
    ovlm_route_release(&view);
    return answer;
}

PyDoc_STRVAR(route_compose_doc,
             "route_compose(first, second, /)\n--\n\nOne route for two in a row.");

static PyObject *route_compose(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    ovlm_route_view first = {.route = {0}}, second = {.route = {0}};
    PyObject *answer = NULL;
    if (ovlm_arg_count("route_compose", nargs, 2) == 0 && ovlm_arg_route(args[0], &first) == 0 &&
        ovlm_arg_route(args[1], &second) == 0) {
        ovlm_err err = {0};
        ovlm_route out = {0};
        ovlm_status status;
        Py_BEGIN_ALLOW_THREADS
        status = ovlm_route_compose(&first.route, &second.route, &out, &err);
        Py_END_ALLOW_THREADS
        answer = status == OVLM_OK ? ovlm_take_route(&out) : ovlm_raise(module, &err);
    }
    ovlm_route_release(&first);
    ovlm_route_release(&second);
    return answer;
}

PyDoc_STRVAR(route_check_arrivals_doc,
             "route_check_arrivals(route, /)\n--\n\nThe same; rows may leave several times or "
             "never.");

static PyObject *route_check_arrivals(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    ovlm_route_view view = {.route = {0}};
    PyObject *answer = NULL;
    if (ovlm_arg_count("route_check_arrivals", nargs, 1) == 0 &&
        ovlm_arg_route(args[0], &view) == 0) {
        ovlm_err err = {0};
        ovlm_status status;
        Py_BEGIN_ALLOW_THREADS
        status = ovlm_route_check_arrivals(&view.route, &err);
        Py_END_ALLOW_THREADS
        answer = status == OVLM_OK ? Py_NewRef(Py_None) : ovlm_raise(module, &err);
    }
    ovlm_route_release(&view);
    return answer;
}

PyDoc_STRVAR(route_bytes_doc,
             "route_bytes(route, item_bytes, /)\n--\n\nThe same way with bytes as rows.");

static PyObject *route_bytes(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    ovlm_route_view view = {.route = {0}};
    ovlm_i64_view bytes = {0};
    PyObject *answer = NULL;
    if (ovlm_arg_count("route_bytes", nargs, 2) == 0 && ovlm_arg_route(args[0], &view) == 0 &&
        ovlm_arg_i64(args[1], "item_bytes", -1, false, &bytes) == 0) {
        ovlm_err err = {0};
        ovlm_route out = {0};
        ovlm_status status;
        Py_BEGIN_ALLOW_THREADS
        status = ovlm_route_bytes(&view.route, bytes.data, bytes.n, &out, &err);
        Py_END_ALLOW_THREADS
        answer = status == OVLM_OK ? ovlm_take_route(&out) : ovlm_raise(module, &err);
    }
    ovlm_route_release(&view);
    Py_CLEAR(bytes.owner);
    return answer;
}

#define METHOD(name) \
    {#name, (PyCFunction)(void (*)(void))(name), METH_FASTCALL, name##_doc}

PyMethodDef ovlm_route_methods[] = {
    METHOD(route_check),
    METHOD(route_check_arrivals),
    METHOD(route_invert),
    METHOD(route_compose),
    METHOD(route_bytes),
    {NULL, NULL, 0, NULL},
};
