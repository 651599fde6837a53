/* py_model.h - the inside of orchvlm._core.Model, for its files. */
#ifndef OVLM_PYMOD_PY_MODEL_H
#define OVLM_PYMOD_PY_MODEL_H

#include "args.h"

#include "model/model.h"

typedef struct model_object {
    PyObject_HEAD
    ovlm_model *model;
    int exact;         /* NumPy's type of hidden states and gradients                           */
    int64_t device;    /* number                                                                */
    bool busy;         /* a call is running without the GIL                                     */
    int64_t exports;   /* arrays that view gradients, moments or adapters: these must not move  */
    int64_t weights;   /* arrays that view weights, which move only when they are sharded       */
    PyObject *sequence; /* owned: the group of the last forward, for its backward; or NULL      */
} model_object;

/* Marks the model busy; RuntimeError when it is. */
int ovlm_model_enter(model_object *self);
/* RuntimeError while arrays view what is about to move; weights: them, too. */
int ovlm_model_movable(const model_object *self, bool weights);

/* The numbers of a configuration, in the order in which python/orchvlm/configs.py lists them. */
int ovlm_arg_config(PyObject *ints, PyObject *floats, ovlm_model_config *config);
int ovlm_arg_dtype(const char *name, ovlm_dtype *dtype);
int ovlm_numpy_type(ovlm_dtype dtype);
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

/* Polled between layers: Ctrl-C. */
int ovlm_poll_signals(void *ctx);

/* grid_thw and pixels (a grid of None: no images) into the inputs. */
int ovlm_arg_images(const model_object *self, PyObject *grid, PyObject *pixels,
                    ovlm_model_inputs *in);

/* The same for mel_lengths and mel. */
int ovlm_arg_sounds(const model_object *self, PyObject *lengths, PyObject *mel,
                    ovlm_model_inputs *in);

/* An int32 array, or None, of entries of hidden states. */
int ovlm_arg_taps(PyObject *object, const char *name, ovlm_tap_list *list);

ovlm_checkpoint ovlm_checkpoint_of(int64_t number);

/* (lr[n], weight_decay[n], beta1, beta2, eps, max_norm, step); the arrays stay borrowed. */
int ovlm_arg_adamw(PyObject *const *args, Py_ssize_t nargs, int64_t n, ovlm_model_adamw *options);

/* The tensor of (parameter, which); left out where there is none. */
OVLM_NODISCARD ovlm_status ovlm_model_find_tensor(ovlm_model *model, int64_t parameter,
                                                  int64_t which, ovlm_tensor *tensor,
                                                  ovlm_err *err);

/* Reads the numbers of a tensor: parameter, and which of its tensors. */
int ovlm_arg_tensor(model_object *self, PyObject *const *args, int64_t *parameter,
                    int64_t *which);

/* A reference to what keeps a view alive: the model, with a note that what it views must not move.
 */
PyObject *ovlm_view_owner(model_object *self, int64_t parameter, int64_t which);

OVLM_MODEL_METHOD(ovlm_py_model_forward);
OVLM_MODEL_METHOD(ovlm_py_model_output);
OVLM_MODEL_METHOD(ovlm_py_model_router_counts);
OVLM_MODEL_METHOD(ovlm_py_model_router_layers);
OVLM_MODEL_METHOD(ovlm_py_model_router_correct);
OVLM_MODEL_METHOD(ovlm_py_model_encode);
OVLM_MODEL_METHOD(ovlm_py_model_encode_backward);
OVLM_MODEL_METHOD(ovlm_py_model_hidden);
OVLM_MODEL_METHOD(ovlm_py_model_tap);
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
OVLM_MODEL_METHOD(ovlm_py_model_trace_start);
OVLM_MODEL_METHOD(ovlm_py_model_trace_stop);
OVLM_MODEL_METHOD(ovlm_py_model_dlpack);
OVLM_MODEL_METHOD(ovlm_py_model_dlpack_device);

#endif
