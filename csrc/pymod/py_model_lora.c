/* py_model_lora.c - orchvlm._core.Model: low-rank adapters. */
#include "py_model.h"

/* lora_open(adapted bool[n], rank, scale) */
PyObject *ovlm_py_model_lora_open(PyObject *object, PyTypeObject *type, PyObject *const *args,
                                  Py_ssize_t nargs, PyObject *kwnames)
{
    (void)kwnames;
    model_object *self = (model_object *)object;
    const void *adapted = NULL;
    int64_t rank = 0;
    double scale = 0;
    if (ovlm_arg_count("lora_open", nargs, 3) < 0 ||
        ovlm_arg_exact(args[0], "adapted", NPY_BOOL, ovlm_model_params(self->model)->n, false,
                       &adapted, NULL) < 0 ||
        ovlm_arg_int(args[1], "rank", &rank) < 0 ||
        ovlm_arg_double(args[2], "scale", &scale) < 0 || ovlm_model_movable(self, false) < 0 ||
        ovlm_model_enter(self) < 0) {
        return NULL;
    }
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_model_lora_open(self->model, adapted, rank, scale, &err);
    Py_END_ALLOW_THREADS
    return ovlm_model_leave(self, type, status, &err);
}

/* lora_close() */
PyObject *ovlm_py_model_lora_close(PyObject *object, PyTypeObject *type, PyObject *const *args,
                                   Py_ssize_t nargs, PyObject *kwnames)
{
    (void)kwnames;
    (void)args;
    model_object *self = (model_object *)object;
    if (ovlm_arg_count("lora_close", nargs, 0) < 0 || ovlm_model_movable(self, false) < 0 ||
        ovlm_model_enter(self) < 0) {
        return NULL;
    }
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_model_lora_close(self->model, &err);
    Py_END_ALLOW_THREADS
    return ovlm_model_leave(self, type, status, &err);
}

/* lora_merge(in) */
PyObject *ovlm_py_model_lora_merge(PyObject *object, PyTypeObject *type, PyObject *const *args,
                                   Py_ssize_t nargs, PyObject *kwnames)
{
    (void)kwnames;
    model_object *self = (model_object *)object;
    int in = 0;
    if (ovlm_arg_count("lora_merge", nargs, 1) < 0 || (in = PyObject_IsTrue(args[0])) < 0 ||
        ovlm_model_enter(self) < 0) {
        return NULL;
    }
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_model_lora_merge(self->model, in != 0, &err);
    Py_END_ALLOW_THREADS
    return ovlm_model_leave(self, type, status, &err);
}
