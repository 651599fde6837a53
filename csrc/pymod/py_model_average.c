/* py_model_average.c - orchvlm._core.Model: the moving average of its weights. */
#include "py_model.h"

static const struct {
    const char *name;
    bool moves; /* memory that arrays may view */
} actions[] = {{"open", false}, {"close", true}, {"in", false}, {"out", false}};
enum { OPEN, CLOSE, IN, OUT, N_ACTIONS };

/* average("open" | "close" | "in" | "out") */
PyObject *ovlm_py_model_average(PyObject *object, PyTypeObject *type, PyObject *const *args,
                                Py_ssize_t nargs, PyObject *kwnames)
{
    (void)kwnames;
    model_object *self = (model_object *)object;
    if (ovlm_arg_count("average", nargs, 1) < 0) {
        return NULL;
    }
    int action = 0;
    while (action < N_ACTIONS && !(PyUnicode_Check(args[0]) &&
                                   PyUnicode_CompareWithASCIIString(args[0],
                                                                    actions[action].name) == 0)) {
        action++;
    }
    if (action == N_ACTIONS) {
        PyErr_SetString(PyExc_ValueError, "average takes 'open', 'close', 'in' or 'out'");
        return NULL;
    }
    if ((actions[action].moves && ovlm_model_movable(self, false) < 0) ||
        ovlm_model_enter(self) < 0) {
        return NULL;
    }
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    status = action == OPEN    ? ovlm_model_average_open(self->model, &err)
             : action == CLOSE ? ovlm_model_average_close(self->model, &err)
                               : ovlm_model_average_swap(self->model, action == IN, &err);
    Py_END_ALLOW_THREADS
    return ovlm_model_leave(self, type, status, &err);
}

/* average_update(decay) */
PyObject *ovlm_py_model_average_update(PyObject *object, PyTypeObject *type,
                                       PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    (void)kwnames;
    model_object *self = (model_object *)object;
    double decay = 0;
    if (ovlm_arg_count("average_update", nargs, 1) < 0 ||
        ovlm_arg_double(args[0], "decay", &decay) < 0 || ovlm_model_enter(self) < 0) {
        return NULL;
    }
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_model_average_update(self->model, decay, &err);
    Py_END_ALLOW_THREADS
    return ovlm_model_leave(self, type, status, &err);
}
