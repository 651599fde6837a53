/* py_model.h - the inside of orchvlm._core.Model, for its files. */
#ifndef OVLM_PYMOD_PY_MODEL_H
#define OVLM_PYMOD_PY_MODEL_H

#include "args.h"

#include "model/model.h"

typedef struct model_object {
    PyObject_HEAD
    ovlm_model *model;
    bool busy;         /* a call is running without the GIL                                     */
    int64_t exports;   /* arrays that view gradients, moments or adapters: these must not move  */
} model_object;

/* Marks the model busy; RuntimeError when it is. */
int ovlm_model_enter(model_object *self);
/* RuntimeError while arrays view what is about to move. */
int ovlm_model_movable(const model_object *self);
/* Ends what enter began; raises what err holds.  Returns None, or NULL with the exception. */
PyObject *ovlm_model_leave(model_object *self, PyTypeObject *type, ovlm_status status,
                           const ovlm_err *err);

/* An array of exactly this NumPy type, C-contiguous; data stays borrowed from it.  None and
 * optional: NULL.  expected < 0: any number of elements. */
int ovlm_arg_exact(PyObject *object, const char *name, int type, int64_t expected, bool optional,
                   const void **data, int64_t *n);

/* METH_METHOD | METH_FASTCALL | METH_KEYWORDS methods of the other file, for the type's table. */
#define OVLM_MODEL_METHOD(name)                                                          \
    PyObject *name(PyObject *object, PyTypeObject *type, PyObject *const *args, Py_ssize_t nargs, \
                   PyObject *kwnames)

OVLM_MODEL_METHOD(ovlm_py_model_forward);
OVLM_MODEL_METHOD(ovlm_py_model_output);
OVLM_MODEL_METHOD(ovlm_py_model_router_counts);
OVLM_MODEL_METHOD(ovlm_py_model_router_layers);
OVLM_MODEL_METHOD(ovlm_py_model_router_correct);
OVLM_MODEL_METHOD(ovlm_py_model_backward);
OVLM_MODEL_METHOD(ovlm_py_model_logits);
OVLM_MODEL_METHOD(ovlm_py_model_adamw);
OVLM_MODEL_METHOD(ovlm_py_model_average);
OVLM_MODEL_METHOD(ovlm_py_model_average_update);
OVLM_MODEL_METHOD(ovlm_py_model_lora_open);
OVLM_MODEL_METHOD(ovlm_py_model_lora_close);
OVLM_MODEL_METHOD(ovlm_py_model_lora_merge);
OVLM_MODEL_METHOD(ovlm_py_model_cache_open);
OVLM_MODEL_METHOD(ovlm_py_model_extend);

#endif
