/* py_model_routing.c - orchvlm._core.Model: the routers' counts by layer, and their corrections. */
#include "py_model.h"

static int64_t layers_of(const model_object *self)
{
    return ovlm_decoder_sparse_layers(&ovlm_model_params(self->model)->config.decoder);
}

/* router_layers() -> int64[layers with experts, E] */
PyObject *ovlm_py_model_router_layers(PyObject *object, PyTypeObject *type, PyObject *const *args,
                                      Py_ssize_t nargs, PyObject *kwnames)
{
    (void)kwnames;
    (void)args;
    model_object *self = (model_object *)object;
    npy_intp dims[] = {(npy_intp)layers_of(self),
                       (npy_intp)ovlm_model_params(self->model)->config.decoder.experts};
    PyObject *counts = NULL;
    if (ovlm_arg_count("router_layers", nargs, 0) < 0 ||
        (counts = PyArray_ZEROS(2, dims, NPY_INT64, 0)) == NULL || ovlm_model_enter(self) < 0) {
        Py_XDECREF(counts);
        return NULL;
    }
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    int64_t *data = PyArray_DATA((PyArrayObject *)counts);
    Py_BEGIN_ALLOW_THREADS
    status = dims[0] == 0 ? OVLM_OK : ovlm_model_router_layers(self->model, data, &err);
    Py_END_ALLOW_THREADS
    PyObject *none = ovlm_model_leave(self, type, status, &err);
    if (none == NULL) {
        Py_CLEAR(counts);
    }
    Py_XDECREF(none);
    return counts;
}

/* router_correct(counts int64[layers, E], speed) */
PyObject *ovlm_py_model_router_correct(PyObject *object, PyTypeObject *type,
                                       PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    (void)kwnames;
    model_object *self = (model_object *)object;
    const void *count = NULL;
    double speed = 0;
    if (ovlm_arg_count("router_correct", nargs, 2) < 0 ||
        ovlm_arg_exact(args[0], "counts", NPY_INT64,
                       layers_of(self) * ovlm_model_params(self->model)->config.decoder.experts,
                       false, &count, NULL) < 0 ||
        ovlm_arg_double(args[1], "speed", &speed) < 0 || ovlm_model_enter(self) < 0) {
        return NULL;
    }
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_model_router_correct(self->model, count, speed, &err);
    Py_END_ALLOW_THREADS
    return ovlm_model_leave(self, type, status, &err);
}
