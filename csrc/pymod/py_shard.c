/* py_shard.c - orchvlm._core.Shard: a model's weights, gradients and optimizer state over ranks. */
#include "py_comm.h"
#include "py_model.h"

#include "engine/shard.h"

typedef struct shard_object {
    PyObject_HEAD
    ovlm_shard *shard;   /* NULL when closed           */
    model_object *model; /* owned; its busy guard is ours */
} shard_object;

/* ---------------------------------------------------------------- arguments */

/* Modes of units, as numbers; free with PyMem_Free. */
static ovlm_shard_mode *read_modes(PyObject *array, int64_t units)
{
    const void *data = NULL;
    if (ovlm_arg_exact(array, "modes", NPY_INT64, units, false, &data, NULL) < 0) {
        return NULL;
    }
    ovlm_shard_mode *mode = PyMem_Calloc((size_t)units + 1, sizeof *mode);
    if (mode == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    for (int64_t i = 0; i < units; i++) {
        int64_t number = ((const int64_t *)data)[i];
        if (number < 0 || number >= OVLM_SHARD_MODES) {
            PyErr_Format(PyExc_ValueError, "modes[%lld] must be a mode; got %lld", (long long)i,
                         (long long)number);
            PyMem_Free(mode);
            return NULL;
        }
        mode[i] = (ovlm_shard_mode)number;
    }
    return mode;
}

/* The list of parameters of (config ints, config floats, dtype), which lives in the arena. */
static const ovlm_params *make_list(PyObject *module, PyObject *source, ovlm_params *made,
                                    ovlm_arena *arena)
{
    PyObject *ints = NULL, *floats = NULL;
    const char *dtype = NULL;
    ovlm_model_config config;
    ovlm_err err = {0};
    ovlm_dtype number = OVLM_F32;
    if (!ovlm_arg_tuple(source, "OOs", &ints, &floats, &dtype) ||
        ovlm_arg_config(ints, floats, &config) < 0 || ovlm_arg_dtype(dtype, &number) < 0) {
        return NULL;
    }
    if (ovlm_params_init(made, &config, arena, &err) != OVLM_OK) {
        ovlm_raise(module, &err);
        return NULL;
    }
    made->dtype = number;
    made->exact = number == OVLM_F64 ? OVLM_F64 : OVLM_F32;
    return made;
}

/* The same of a core model, too. */
static const ovlm_params *read_list(PyObject *module, PyObject *source, ovlm_params *made,
                                    ovlm_arena *arena)
{
    if (PyTuple_Check(source)) {
        return make_list(module, source, made, arena);
    }
    PyObject *model = ovlm_instance_of(module, "Model", source);
    return model == NULL ? NULL : ovlm_model_params(((model_object *)model)->model);
}

/* shard_units(source) -> names of the units, in their order */
static PyObject *list_units(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    ovlm_arena arena = {0};
    ovlm_params made = {0};
    if (ovlm_arg_count("shard_units", nargs, 1) < 0) {
        return NULL;
    }
    const ovlm_params *params = read_list(module, args[0], &made, &arena);
    PyObject *list = params == NULL ? NULL : PyList_New(0);
    for (int64_t i = 0; list != NULL && i < params->units; i++) {
        PyObject *name = PyUnicode_FromString(params->unit[i].name);
        if (name == NULL || PyList_Append(list, name) < 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(name);
    }
    ovlm_arena_free(&arena);
    return list;
}

static PyObject *new_bytes(const ovlm_shard_bytes *bytes)
{
    return Py_BuildValue("(LLL)", (long long)bytes->weights_bytes,
                         (long long)bytes->training_bytes, (long long)bytes->buffers_bytes);
}

/* shard_memory(source, modes, node_size, experts, ranks, rank)
 * -> (weights, training, buffers) bytes */
static PyObject *predict_memory(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    ovlm_arena arena = {0};
    ovlm_params made = {0};
    ovlm_shard_mode *mode = NULL;
    ovlm_shard_spec spec = {0};
    int64_t ranks = 0, rank = 0;
    PyObject *result = NULL;
    if (ovlm_arg_count("shard_memory", nargs, 6) < 0 ||
        ovlm_arg_int(args[2], "node_size", &spec.node_size) < 0 ||
        ovlm_arg_int(args[3], "experts", &spec.experts) < 0 ||
        ovlm_arg_int(args[4], "ranks", &ranks) < 0 || ovlm_arg_int(args[5], "rank", &rank) < 0) {
        return NULL;
    }
    if (ranks < 1 || ranks > INT32_MAX || rank < 0 || rank >= ranks) {
        PyErr_Format(PyExc_ValueError, "rank must be in [0, ranks); got rank %lld of %lld",
                     (long long)rank, (long long)ranks);
        return NULL;
    }
    const ovlm_params *params = read_list(module, args[0], &made, &arena);
    spec.mode = mode = params == NULL ? NULL : read_modes(args[1], params->units);
    if (mode != NULL) {
        ovlm_shard_bytes bytes = {0};
        ovlm_err err = {0};
        result = ovlm_shard_memory(params, &spec, ranks, rank, &bytes, &err) == OVLM_OK
                     ? new_bytes(&bytes)
                     : ovlm_raise(module, &err);
    }
    PyMem_Free(mode);
    ovlm_arena_free(&arena);
    return result;
}

PyMethodDef ovlm_shard_functions[] = {
    {"shard_units", (PyCFunction)(void (*)(void))list_units, METH_FASTCALL, NULL},
    {"shard_memory", (PyCFunction)(void (*)(void))predict_memory, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

/* ---------------------------------------------------------------- life */

static PyObject *open_shard(PyTypeObject *type, model_object *model, comm_object *comm,
                            const ovlm_shard_spec *spec)
{
    ovlm_shard *shard = NULL;
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    if (ovlm_model_movable(model, true) < 0 || ovlm_model_enter(model) < 0) {
        return NULL;
    }
    if (ovlm_comm_object_enter(comm) < 0) {
        model->busy = false;
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_shard_open(model->model, comm->comm, spec, &shard, &err);
    Py_END_ALLOW_THREADS
    comm->busy = false;
    PyObject *none = ovlm_model_leave(model, type, status, &err);
    Py_XDECREF(none);
    shard_object *self = none == NULL ? NULL : (shard_object *)type->tp_alloc(type, 0);
    if (self == NULL) {
        ovlm_shard_close(shard);
        return NULL;
    }
    self->shard = shard;
    self->model = (model_object *)Py_NewRef((PyObject *)model);
    return (PyObject *)self;
}

/* Shard(core model, core comm, modes, node_size, experts) */
static PyObject *shard_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *model = NULL, *comm = NULL, *modes = NULL;
    long long node_size = 0, experts = 0;
    PyObject *module = PyType_GetModule(type);
    if (module == NULL) {
        return NULL;
    }
    if (kwargs != NULL && PyDict_GET_SIZE(kwargs) > 0) {
        PyErr_SetString(PyExc_TypeError, "Shard takes no keywords");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "OOOLL:Shard", &model, &comm, &modes, &node_size, &experts) ||
        ovlm_instance_of(module, "Model", model) == NULL ||
        ovlm_instance_of(module, "Comm", comm) == NULL) {
        return NULL;
    }
    model_object *over = (model_object *)model;
    ovlm_shard_mode *mode = read_modes(modes, ovlm_model_params(over->model)->units);
    PyObject *self = NULL;
    if (mode != NULL) {
        const ovlm_shard_spec spec = {.mode = mode, .node_size = node_size, .experts = experts};
        self = open_shard(type, over, (comm_object *)comm, &spec);
    }
    PyMem_Free(mode);
    return self;
}

/* Without the GIL: the communicators' helper threads may be on their way to ask for it. */
static void close_shard(shard_object *self)
{
    ovlm_shard *shard = self->shard;
    self->shard = NULL;
    Py_BEGIN_ALLOW_THREADS
    ovlm_shard_close(shard);
    Py_END_ALLOW_THREADS
}

static void shard_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    shard_object *self = (shard_object *)object;
    close_shard(self);
    Py_CLEAR(self->model);
    type->tp_free(object);
    Py_DECREF(type);
}

static int enter(shard_object *self)
{
    if (self->shard == NULL) {
        PyErr_SetString(PyExc_ValueError, "the shard is closed");
        return -1;
    }
    return ovlm_model_enter(self->model);
}

/* ---------------------------------------------------------------- calls */

#define SHARD_METHOD(name)                                                                        \
    static PyObject *name(PyObject *object, PyTypeObject *type, PyObject *const *args,            \
                          Py_ssize_t nargs, PyObject *kwnames)

/* A call of a shard alone. */
static PyObject *call(PyObject *object, PyTypeObject *type, const char *name, Py_ssize_t nargs,
                      ovlm_status (*function)(ovlm_shard *, ovlm_err *))
{
    shard_object *self = (shard_object *)object;
    if (ovlm_arg_count(name, nargs, 0) < 0 || enter(self) < 0) {
        return NULL;
    }
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    status = function(self->shard, &err);
    Py_END_ALLOW_THREADS
    return ovlm_model_leave(self->model, type, status, &err);
}

SHARD_METHOD(shard_zero_grad)
{
    (void)args;
    (void)kwnames;
    return call(object, type, "zero_grad", nargs, ovlm_shard_zero_grad);
}

SHARD_METHOD(shard_reduce)
{
    (void)args;
    (void)kwnames;
    return call(object, type, "reduce", nargs, ovlm_shard_reduce);
}

SHARD_METHOD(shard_undo)
{
    (void)args;
    (void)kwnames;
    return call(object, type, "undo", nargs, ovlm_shard_undo);
}

static ovlm_status last(ovlm_shard *shard, ovlm_err *err)
{
    (void)err;
    ovlm_shard_last(shard);
    return OVLM_OK;
}

SHARD_METHOD(shard_last)
{
    (void)args;
    (void)kwnames;
    return call(object, type, "last", nargs, last);
}

SHARD_METHOD(shard_close)
{
    (void)args;
    (void)kwnames;
    shard_object *self = (shard_object *)object;
    if (ovlm_arg_count("close", nargs, 0) < 0) {
        return NULL;
    }
    if (self->shard != NULL) {
        if (ovlm_model_enter(self->model) < 0) {
            return NULL;
        }
        close_shard(self);
        return ovlm_model_leave(self->model, type, OVLM_OK, NULL);
    }
    Py_RETURN_NONE;
}

/* adamw(...), as a model's */
SHARD_METHOD(shard_adamw)
{
    (void)kwnames;
    shard_object *self = (shard_object *)object;
    ovlm_model_adamw options = {0};
    if (ovlm_arg_adamw(args, nargs, ovlm_model_params(self->model->model)->n, &options) < 0 ||
        enter(self) < 0) {
        return NULL;
    }
    ovlm_model_step step = {0};
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_shard_adamw(self->shard, &options, &step, &err);
    Py_END_ALLOW_THREADS
    PyObject *none = ovlm_model_leave(self->model, type, status, &err);
    if (none == NULL) {
        return NULL;
    }
    Py_DECREF(none);
    return Py_BuildValue("(ddL)", step.grad_norm, step.clip, (long long)step.non_finite);
}

/* ---------------------------------------------------------------- contents */

static ovlm_dtype dtype_of(const shard_object *self, int64_t parameter, int64_t which)
{
    const ovlm_params *p = ovlm_model_params(self->model->model);
    bool narrow = which == OVLM_SHARD_WEIGHT && p->param[parameter].kind != OVLM_PARAM_BUFFER;
    return narrow ? p->dtype : p->exact;
}

/* (parameter, which) in front of other arguments. */
static int read_place(shard_object *self, PyObject *const *args, int64_t *parameter,
                      int64_t *which)
{
    if (ovlm_arg_int(args[0], "parameter", parameter) < 0 ||
        ovlm_arg_int(args[1], "which", which) < 0) {
        return -1;
    }
    if (*parameter < 0 || *parameter >= ovlm_model_params(self->model->model)->n || *which < 0 ||
        *which >= OVLM_SHARD_WHICH) {
        PyErr_Format(PyExc_ValueError, "no tensor %lld of parameter %lld", (long long)*which,
                     (long long)*parameter);
        return -1;
    }
    return 0;
}

/* part(parameter, which) -> (first, n, whether a lower rank has the same) */
SHARD_METHOD(shard_part)
{
    (void)kwnames;
    shard_object *self = (shard_object *)object;
    int64_t parameter = 0, which = 0;
    ovlm_shard_part part = {0};
    ovlm_err err = {0};
    if (ovlm_arg_count("part", nargs, 2) < 0 || read_place(self, args, &parameter, &which) < 0 ||
        enter(self) < 0) {
        return NULL;
    }
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_shard_part_of(self->shard, parameter, (ovlm_shard_which)which, &part, &err);
    Py_END_ALLOW_THREADS
    PyObject *none = ovlm_model_leave(self->model, type, status, &err);
    if (none == NULL) {
        return NULL;
    }
    Py_DECREF(none);
    return Py_BuildValue("(LLO)", (long long)part.first, (long long)part.tensor.cols,
                         part.again ? Py_True : Py_False);
}

/* This rank's part to or from `data`, of n elements. */
static ovlm_status move_part(shard_object *self, int64_t parameter, ovlm_shard_which which,
                             int64_t n, void *data, bool write, ovlm_err *err)
{
    ovlm_shard_part part = {0};
    ovlm_status status = ovlm_shard_part_of(self->shard, parameter, which, &part, err);
    if (status != OVLM_OK) {
        return status;
    }
    if (n != part.tensor.cols) {
        return OVLM_FAIL(err, OVLM_E_ARG, "array must have %lld elements; got %lld",
                         (long long)part.tensor.cols, (long long)n);
    }
    if (write) {
        return ovlm_shard_write(self->shard, parameter, which, data, err);
    }
    return n == 0 ? OVLM_OK : ovlm_model_read(self->model->model, &part.tensor, data, err);
}

static PyObject *move(PyObject *object, PyTypeObject *type, PyObject *const *args,
                      Py_ssize_t nargs, bool write)
{
    shard_object *self = (shard_object *)object;
    int64_t parameter = 0, which = 0, n = 0;
    const void *unused = NULL;
    if (ovlm_arg_count(write ? "write" : "read", nargs, 3) < 0 ||
        read_place(self, args, &parameter, &which) < 0 ||
        ovlm_arg_exact(args[2], "array", ovlm_numpy_type(dtype_of(self, parameter, which)), -1,
                       false, &unused, &n) < 0) {
        return NULL;
    }
    if (!write && PyArray_FailUnlessWriteable((PyArrayObject *)args[2], "array") < 0) {
        return NULL;
    }
    if (enter(self) < 0) {
        return NULL;
    }
    void *data = PyArray_DATA((PyArrayObject *)args[2]);
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    status = move_part(self, parameter, (ovlm_shard_which)which, n, data, write, &err);
    Py_END_ALLOW_THREADS
    return ovlm_model_leave(self->model, type, status, &err);
}

/* read(parameter, which, array): this rank's part into an array of its size */
SHARD_METHOD(shard_read)
{
    (void)kwnames;
    return move(object, type, args, nargs, false);
}

/* write(parameter, which, array): this rank's part from there */
SHARD_METHOD(shard_write)
{
    (void)kwnames;
    return move(object, type, args, nargs, true);
}

/* gather(parameter, which) -> the whole array, or None where there is none; all ranks */
SHARD_METHOD(shard_gather)
{
    (void)kwnames;
    shard_object *self = (shard_object *)object;
    int64_t parameter = 0, which = 0;
    if (ovlm_arg_count("gather", nargs, 2) < 0 || read_place(self, args, &parameter, &which) < 0) {
        return NULL;
    }
    const ovlm_param *p = &ovlm_model_params(self->model->model)->param[parameter];
    npy_intp dims[OVLM_DIMS_MOST];
    for (int64_t d = 0; d < p->n_dims; d++) {
        dims[d] = (npy_intp)p->dims[d];
    }
    PyObject *array = PyArray_SimpleNew((int)p->n_dims, dims,
                                        ovlm_numpy_type(dtype_of(self, parameter, which)));
    if (array == NULL || enter(self) < 0) {
        Py_XDECREF(array);
        return NULL;
    }
    void *data = PyArray_DATA((PyArrayObject *)array);
    bool none = false;
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_shard_gather(self->shard, parameter, (ovlm_shard_which)which, data, &none, &err);
    Py_END_ALLOW_THREADS
    PyObject *done = ovlm_model_leave(self->model, type, status, &err);
    if (done == NULL || none) {
        Py_DECREF(array);
        return done;
    }
    Py_DECREF(done);
    return array;
}

/* (weights, training, buffers) bytes */
static PyObject *shard_memory_read(PyObject *object, PyObject *ignored)
{
    (void)ignored;
    shard_object *self = (shard_object *)object;
    ovlm_shard_bytes bytes = {0};
    if (enter(self) < 0) {
        return NULL;
    }
    ovlm_shard_memory_read(self->shard, &bytes);
    self->model->busy = false;
    return new_bytes(&bytes);
}

/* (whether weights and gradients are held, whether the optimizer's state is) */
static PyObject *shard_holds(PyObject *object, PyObject *ignored)
{
    (void)ignored;
    const ovlm_shard *shard = ((shard_object *)object)->shard;
    if (shard == NULL) {
        PyErr_SetString(PyExc_ValueError, "the shard is closed");
        return NULL;
    }
    return Py_BuildValue("(OO)", ovlm_shard_holds(shard) ? Py_True : Py_False,
                         ovlm_shard_holds_state(shard) ? Py_True : Py_False);
}

/* Seconds waited for other ranks since the shard was opened. */
static PyObject *shard_waited_s(PyObject *object, PyObject *ignored)
{
    (void)ignored;
    shard_object *self = (shard_object *)object;
    if (enter(self) < 0) {
        return NULL;
    }
    double waited_s = ovlm_shard_waited_s(self->shard);
    self->model->busy = false;
    return PyFloat_FromDouble(waited_s);
}

/* (exchanges, bytes sent, seconds waited) between ranks that hold different experts */
static PyObject *shard_exchanged(PyObject *object, PyObject *ignored)
{
    (void)ignored;
    shard_object *self = (shard_object *)object;
    ovlm_shard_exchanged seen = {0};
    if (enter(self) < 0) {
        return NULL;
    }
    ovlm_shard_exchanged_read(self->shard, &seen);
    self->model->busy = false;
    return Py_BuildValue("(LLd)", (long long)seen.exchanges, (long long)seen.sent_bytes,
                         seen.waited_s);
}

/* ---------------------------------------------------------------- type */

#define METHOD(name)                                              \
    {#name, (PyCFunction)(void (*)(void))(shard_##name),          \
     METH_METHOD | METH_FASTCALL | METH_KEYWORDS, NULL}

static PyMethodDef shard_methods[] = {
    METHOD(zero_grad),
    METHOD(last),
    METHOD(reduce),
    METHOD(adamw),
    METHOD(part),
    METHOD(read),
    METHOD(write),
    METHOD(gather),
    METHOD(undo),
    METHOD(close),
    {"memory", shard_memory_read, METH_NOARGS, NULL},
    {"holds", shard_holds, METH_NOARGS, NULL},
    {"waited_s", shard_waited_s, METH_NOARGS, NULL},
    {"exchanged", shard_exchanged, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot shard_slots[] = {
    {Py_tp_doc, "C side of orchvlm.Shard."},
    {Py_tp_new, shard_new},
    {Py_tp_dealloc, shard_dealloc},
    {Py_tp_methods, shard_methods},
    {0, NULL},
};

static PyType_Spec shard_spec = {
    .name = "orchvlm._core.Shard",
    .basicsize = sizeof(shard_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = shard_slots,
};

int ovlm_add_shard_type(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &shard_spec, NULL);
    if (type == NULL) {
        return -1;
    }
    int failed = PyModule_AddObjectRef(module, "Shard", type);
    Py_DECREF(type);
    return failed;
}
