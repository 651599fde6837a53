/* py_model.c - orchvlm._core.Model: life, weights and views of them. */
#include "py_model.h"

#include "cpu/cpu.h"

int ovlm_model_enter(model_object *self)
{
    if (self->busy) {
        PyErr_SetString(PyExc_RuntimeError,
                        "the model is busy with another call; use one model per thread");
        return -1;
    }
    self->busy = true;
    return 0;
}

int ovlm_model_movable(const model_object *self, bool weights)
{
    long long n = (long long)self->exports + (weights ? (long long)self->weights : 0);
    if (n > 0) {
        PyErr_Format(PyExc_RuntimeError,
                     "%lld arrays of %sgradients, moments or adapters are still in use; delete "
                     "them first, or take copies", n, weights ? "weights, " : "");
        return -1;
    }
    return 0;
}

PyObject *ovlm_model_leave(model_object *self, PyTypeObject *type, ovlm_status status,
                           const ovlm_err *err)
{
    self->busy = false;
    if (status != OVLM_OK) {
        PyObject *module = PyType_GetModule(type);
        return module == NULL ? NULL : ovlm_raise(module, err);
    }
    Py_RETURN_NONE;
}

PyObject *ovlm_instance_of(PyObject *module, const char *type, PyObject *object)
{
    PyObject *class = PyObject_GetAttrString(module, type);
    int is = class == NULL ? -1 : PyObject_IsInstance(object, class);
    Py_XDECREF(class);
    if (is == 0) {
        PyErr_Format(PyExc_TypeError, "expected a %s of the core; got %s", type,
                     Py_TYPE(object)->tp_name);
    }
    return is > 0 ? object : NULL;
}

int ovlm_arg_exact(PyObject *object, const char *name, int type, int64_t expected, bool optional,
                   const void **data, int64_t *n)
{
    *data = NULL;
    if (object == Py_None && optional) {
        return 0;
    }
    if (!PyArray_Check(object) || PyArray_TYPE((PyArrayObject *)object) != type ||
        !PyArray_IS_C_CONTIGUOUS((PyArrayObject *)object) ||
        !PyArray_ISALIGNED((PyArrayObject *)object) ||
        PyArray_ISBYTESWAPPED((PyArrayObject *)object)) {
        PyErr_Format(PyExc_TypeError, "%s must be a C-contiguous array of its exact type", name);
        return -1;
    }
    int64_t size = (int64_t)PyArray_SIZE((PyArrayObject *)object);
    if (expected >= 0 && size != expected) {
        PyErr_Format(PyExc_ValueError, "%s must have %lld elements; got %lld", name,
                     (long long)expected, (long long)size);
        return -1;
    }
    *data = PyArray_DATA((PyArrayObject *)object);
    if (n != NULL) {
        *n = size;
    }
    return 0;
}

/* ---------------------------------------------------------------- life */

static ovlm_model_config config_of(const int64_t *i, const double *f)
{
    ovlm_model_config c = {
        .vision = {.depth = i[0], .width = i[1], .heads = i[2], .hidden = i[3], .patch = i[4],
                   .temporal = i[5], .channels = i[6], .merge = i[7], .out_width = i[8],
                   .merger_hidden = i[9], .position_side = i[10], .patch_bias = i[11] != 0,
                   .final_norm = i[12] != 0, .merger = (ovlm_merger)i[13],
                   .act = (ovlm_act)i[14], .merger_act = (ovlm_act)i[15], .deepstack_n = i[16],
                   .eps = f[0], .theta = f[1]},
        .decoder = {.depth = i[25], .width = i[26], .heads = i[27], .kv_heads = i[28],
                    .head_dim = i[29], .vocab = i[30], .hidden = i[31], .experts = i[32],
                    .k = i[33], .expert_hidden = i[34], .shared_hidden = i[35],
                    .first_dense = i[36], .sparse_step = i[37], .teams = i[38], .limit = i[39],
                    .section = {i[40], i[41], i[42]}, .interleaved_sections = i[43] != 0,
                    .qkv_bias = i[44] != 0, .qk_norm = i[45] != 0, .tied = i[46] != 0,
                    .sigmoid_router = i[47] != 0, .normalise_router = i[48] != 0,
                    .expert_kn = i[49] != 0,
                    .out_bias = i[50] != 0, .rotary = i[51], .act = (ovlm_act)i[52],
                    .eps = f[2], .theta = f[3], .router_scale = f[4], .aux_coef = f[5]},
        .audio = {.depth = i[53], .width = i[54], .heads = i[55], .hidden = i[56], .bins = i[57],
                  .channels = i[58], .chunk = i[59], .window = i[60], .out_width = i[61],
                  .act = (ovlm_act)i[62], .eps = f[6]}};
    for (int k = 0; k < OVLM_DEEPSTACK_MOST; k++) {
        c.vision.deepstack[k] = i[17 + k];
    }
    return c;
}

enum { CONFIG_INTS = 63, CONFIG_FLOATS = 7 };

int ovlm_arg_config(PyObject *ints, PyObject *floats, ovlm_model_config *config)
{
    const void *i = NULL, *f = NULL;
    if (ovlm_arg_exact(ints, "ints", NPY_INT64, CONFIG_INTS, false, &i, NULL) < 0 ||
        ovlm_arg_exact(floats, "floats", NPY_FLOAT64, CONFIG_FLOATS, false, &f, NULL) < 0) {
        return -1;
    }
    *config = config_of(i, f);
    return 0;
}

static const struct {
    const char *name;
    ovlm_dtype dtype;
} dtypes[] = {{"float32", OVLM_F32}, {"bfloat16", OVLM_BF16}, {"float64", OVLM_F64}};

int ovlm_arg_dtype(const char *name, ovlm_dtype *dtype)
{
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++) {
        if (strcmp(name, dtypes[i].name) == 0) {
            *dtype = dtypes[i].dtype;
            return 0;
        }
    }
    PyErr_Format(PyExc_ValueError, "dtype must be 'float32' or 'bfloat16'; got '%s'", name);
    return -1;
}

/* Model(config ints, config floats, backend, device, threads, dtype) */
static PyObject *model_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *ints = NULL, *floats = NULL;
    const char *backend = NULL, *dtype_name = NULL;
    long long device = 0, threads = 0;
    ovlm_model_config config;
    ovlm_dtype dtype = OVLM_F32;
    if ((kwargs != NULL && PyDict_GET_SIZE(kwargs) > 0) ||
        !PyArg_ParseTuple(args, "OOsLLs:Model", &ints, &floats, &backend, &device, &threads,
                          &dtype_name) ||
        ovlm_arg_config(ints, floats, &config) < 0 || ovlm_arg_dtype(dtype_name, &dtype) < 0) {
        if (!PyErr_Occurred()) {
            PyErr_SetString(PyExc_TypeError, "Model takes no keywords");
        }
        return NULL;
    }
    model_object *self = (model_object *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    self->exact = dtype == OVLM_F64 ? NPY_FLOAT64 : NPY_FLOAT32;
    self->device = device;
    const ovlm_backend_options options = {.device = device, .threads = threads};
    const ovlm_ops *ops = NULL;
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    ops = ovlm_cpu_ops_find(backend); /* built in, or in a shared object */
    if (ops == NULL) {
        status = ovlm_backend_load(backend, &ops, &err);
    }
    if (status == OVLM_OK) {
        status = ovlm_model_open(&config, ops, &options, dtype, NULL, &self->model, &err);
    }
    Py_END_ALLOW_THREADS
    if (status != OVLM_OK) {
        PyObject *module = PyType_GetModule(type);
        Py_DECREF(self);
        return module == NULL ? NULL : ovlm_raise(module, &err);
    }
    return (PyObject *)self;
}

static void model_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    ovlm_model_close(((model_object *)object)->model);
    Py_XDECREF(((model_object *)object)->sequence);
    type->tp_free(object);
    Py_DECREF(type);
}

/* ---------------------------------------------------------------- weights */

static PyObject *new_dims(const ovlm_param *one)
{
    PyObject *dims = PyTuple_New((Py_ssize_t)one->n_dims);
    for (int64_t d = 0; dims != NULL && d < one->n_dims; d++) {
        PyObject *size = PyLong_FromLongLong((long long)one->dims[d]);
        if (size == NULL) {
            Py_CLEAR(dims);
            break;
        }
        PyTuple_SET_ITEM(dims, (Py_ssize_t)d, size);
    }
    return dims;
}

/* [(name, kind, dims, trainable), ...] */
static PyObject *new_list(const ovlm_params *p)
{
    PyObject *list = PyList_New(0);
    for (int64_t i = 0; list != NULL && i < p->n; i++) {
        const ovlm_param *one = &p->param[i];
        PyObject *dims = new_dims(one);
        PyObject *row = dims == NULL ? NULL
                                     : Py_BuildValue("(siNO)", one->name, (int)one->kind, dims,
                                                     one->trainable ? Py_True : Py_False);
        if (row == NULL || PyList_Append(list, row) < 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(row);
    }
    return list;
}

static PyObject *model_parameters(PyObject *object, PyObject *ignored)
{
    (void)ignored;
    return new_list(ovlm_model_params(((model_object *)object)->model));
}

/* [(name, (numbers of its parameters)), ...] */
static PyObject *model_units(PyObject *object, PyObject *ignored)
{
    (void)ignored;
    const ovlm_params *p = ovlm_model_params(((model_object *)object)->model);
    PyObject *list = PyList_New(0);
    for (int64_t u = 0; list != NULL && u < p->units; u++) {
        PyObject *members = PyList_New(0);
        for (int64_t i = 0; members != NULL && i < p->n; i++) {
            PyObject *number = p->param[i].unit == u ? PyLong_FromLongLong((long long)i) : NULL;
            if (p->param[i].unit == u &&
                (number == NULL || PyList_Append(members, number) < 0)) {
                Py_CLEAR(members);
            }
            Py_XDECREF(number);
        }
        PyObject *row = members == NULL ? NULL : Py_BuildValue("(sN)", p->unit[u].name, members);
        if (row == NULL || PyList_Append(list, row) < 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(row);
    }
    return list;
}

/* model_parameters(config ints, config floats): the list of a model that is not made. */
static PyObject *list_parameters(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    ovlm_model_config config;
    if (ovlm_arg_count("model_parameters", nargs, 2) < 0 ||
        ovlm_arg_config(args[0], args[1], &config) < 0) {
        return NULL;
    }
    ovlm_arena arena = {0};
    ovlm_params params = {0};
    ovlm_err err = {0};
    ovlm_status status = ovlm_params_init(&params, &config, &arena, &err);
    PyObject *list = status == OVLM_OK ? new_list(&params) : ovlm_raise(module, &err);
    ovlm_arena_free(&arena);
    return list;
}

PyMethodDef ovlm_model_functions[] = {
    {"model_parameters", (PyCFunction)(void (*)(void))list_parameters, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

enum { WEIGHT, GRAD, MOMENT1, MOMENT2, MASTER, AVERAGE };

ovlm_status ovlm_model_find_tensor(ovlm_model *model, int64_t parameter, int64_t which,
                                   ovlm_tensor *tensor, ovlm_err *err)
{
    ovlm_tensor m = {0}, v = {0}, master = {0};
    if (which == GRAD) {
        OVLM_TRY(ovlm_model_need_grads(model, err));
    } else if (which > GRAD && which < AVERAGE) {
        OVLM_TRY(ovlm_model_moments(model, parameter, &m, &v, &master, err));
    }
    const ovlm_param *p = &ovlm_model_params(model)->param[parameter];
    if (which == GRAD || (which == WEIGHT && p->kind != OVLM_PARAM_BUFFER)) {
        OVLM_TRY(ovlm_model_need_own(model, p->name, err)); /* views would outlive the hooks */
    }
    const ovlm_tensor average = ovlm_model_average(model, parameter);
    const ovlm_tensor *all[] = {&p->w, &p->grad, &m, &v, &master, &average};
    *tensor = *all[which];
    return ovlm_model_reach(tensor, err);
}

int ovlm_arg_tensor(model_object *self, PyObject *const *args, int64_t *parameter,
                    int64_t *which)
{
    if (ovlm_arg_int(args[0], "parameter", parameter) < 0 ||
        ovlm_arg_int(args[1], "which", which) < 0) {
        return -1;
    }
    if (*parameter < 0 || *parameter >= ovlm_model_params(self->model)->n || *which < WEIGHT ||
        *which > AVERAGE) {
        PyErr_Format(PyExc_ValueError, "no tensor %lld of parameter %lld", (long long)*which,
                     (long long)*parameter);
        return -1;
    }
    return 0;
}

int ovlm_numpy_type(ovlm_dtype dtype)
{
    return dtype == OVLM_F32 ? NPY_FLOAT32 : dtype == OVLM_F64 ? NPY_FLOAT64 : NPY_UINT16;
}

static const char *const owner_names[] = {"orchvlm.export", "orchvlm.weight"};

static void drop_view(PyObject *capsule)
{
    bool weight = PyCapsule_IsValid(capsule, owner_names[1]);
    model_object *self = PyCapsule_GetPointer(capsule, owner_names[weight]);
    if (self != NULL) {
        *(weight ? &self->weights : &self->exports) -= 1;
        Py_DECREF(self);
    }
}

PyObject *ovlm_view_owner(model_object *self, int64_t parameter, int64_t which)
{
    const ovlm_param *p = &ovlm_model_params(self->model)->param[parameter];
    bool weight = which == WEIGHT && p->kind != OVLM_PARAM_ADAPTER;
    PyObject *capsule = PyCapsule_New(self, owner_names[weight], drop_view);
    if (capsule != NULL) {
        Py_INCREF(self);
        *(weight ? &self->weights : &self->exports) += 1;
    }
    return capsule;
}

static PyObject *new_view(model_object *self, int64_t parameter, int64_t which,
                          const ovlm_tensor *tensor)
{
    const ovlm_param *p = &ovlm_model_params(self->model)->param[parameter];
    npy_intp dims[OVLM_DIMS_MOST];
    for (int64_t d = 0; d < p->n_dims; d++) {
        dims[d] = (npy_intp)p->dims[d];
    }
    PyObject *array = PyArray_SimpleNewFromData((int)p->n_dims, dims,
                                                ovlm_numpy_type(tensor->dtype), tensor->data);
    PyObject *owner = array == NULL ? NULL : ovlm_view_owner(self, parameter, which);
    if (owner == NULL || PyArray_SetBaseObject((PyArrayObject *)array, owner) < 0) {
        Py_XDECREF(array);
        return NULL;
    }
    return array;
}

static PyObject *new_copy(model_object *self, int64_t parameter, PyTypeObject *type,
                          const ovlm_tensor *tensor)
{
    const ovlm_param *p = &ovlm_model_params(self->model)->param[parameter];
    npy_intp dims[OVLM_DIMS_MOST];
    for (int64_t d = 0; d < p->n_dims; d++) {
        dims[d] = (npy_intp)p->dims[d];
    }
    PyObject *array = PyArray_SimpleNew((int)p->n_dims, dims, ovlm_numpy_type(tensor->dtype));
    if (array == NULL || ovlm_model_enter(self) < 0) {
        Py_XDECREF(array);
        return NULL;
    }
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    void *data = PyArray_DATA((PyArrayObject *)array);
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_model_read(self->model, tensor, data, &err);
    Py_END_ALLOW_THREADS
    PyObject *done = ovlm_model_leave(self, type, status, &err);
    if (done == NULL) {
        Py_DECREF(array);
        return NULL;
    }
    Py_DECREF(done);
    return array;
}

/* array(parameter, which, view) -> ndarray, or None where there is no such tensor.  bfloat16 comes
 * as uint16.  view: without a copy where the memory is the host's. */
static OVLM_MODEL_METHOD(model_array)
{
    (void)kwnames;
    model_object *self = (model_object *)object;
    int64_t parameter = 0, which = 0;
    if (ovlm_arg_count("array", nargs, 3) < 0 ||
        ovlm_arg_tensor(self, args, &parameter, &which) < 0) {
        return NULL;
    }
    int view = PyObject_IsTrue(args[2]);
    if (view < 0 || ovlm_model_enter(self) < 0) {
        return NULL;
    }
    ovlm_tensor tensor = {0};
    ovlm_err err = {0};
    PyObject *done = ovlm_model_leave(
        self, type, ovlm_model_find_tensor(self->model, parameter, which, &tensor, &err), &err);
    if (done == NULL || tensor.cols == 0) {
        return done;
    }
    Py_DECREF(done);
    if (view && ovlm_model_backend(self->model)->host_memory) {
        return new_view(self, parameter, which, &tensor);
    }
    return new_copy(self, parameter, type, &tensor);
}

/* write(parameter, which, array) */
static OVLM_MODEL_METHOD(model_write)
{
    (void)kwnames;
    model_object *self = (model_object *)object;
    int64_t parameter = 0, which = 0;
    const void *data = NULL;
    if (ovlm_arg_count("write", nargs, 3) < 0 ||
        ovlm_arg_tensor(self, args, &parameter, &which) < 0 ||
        ovlm_model_enter(self) < 0) {
        return NULL;
    }
    ovlm_tensor tensor = {0};
    ovlm_err err = {0};
    ovlm_status status = ovlm_model_find_tensor(self->model, parameter, which, &tensor, &err);
    if (status == OVLM_OK &&
        ovlm_arg_exact(args[2], "array", ovlm_numpy_type(tensor.dtype),
                       tensor.rows * tensor.cols, false, &data, NULL) < 0) {
        self->busy = false;
        return NULL;
    }
    if (status == OVLM_OK) {
        Py_BEGIN_ALLOW_THREADS
        status = ovlm_model_write(self->model, &tensor, data, &err);
        if (status == OVLM_OK && which == WEIGHT) {
            status = ovlm_model_renew_master(self->model, parameter, &err);
        }
        Py_END_ALLOW_THREADS
    }
    return ovlm_model_leave(self, type, status, &err);
}

/* train_only(bool array): which parameters are trained. */
static OVLM_MODEL_METHOD(model_train_only)
{
    (void)kwnames;
    model_object *self = (model_object *)object;
    const void *mask = NULL;
    if (ovlm_arg_count("train_only", nargs, 1) < 0 ||
        ovlm_arg_exact(args[0], "mask", NPY_BOOL, ovlm_model_params(self->model)->n, false, &mask,
                       NULL) < 0) {
        return NULL;
    }
    if (ovlm_model_movable(self, false) < 0 || ovlm_model_enter(self) < 0) {
        return NULL;
    }
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_model_train_only(self->model, mask, &err);
    Py_END_ALLOW_THREADS
    return ovlm_model_leave(self, type, status, &err);
}

static OVLM_MODEL_METHOD(model_zero_grad)
{
    (void)kwnames;
    (void)args;
    model_object *self = (model_object *)object;
    if (ovlm_arg_count("zero_grad", nargs, 0) < 0 || ovlm_model_enter(self) < 0) {
        return NULL;
    }
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_model_zero_grad(self->model, &err);
    Py_END_ALLOW_THREADS
    return ovlm_model_leave(self, type, status, &err);
}

/* (weights, training, activations, workspace, cache) bytes */
static PyObject *model_memory(PyObject *object, PyObject *ignored)
{
    (void)ignored;
    ovlm_model_memory m = {0};
    ovlm_model_memory_read(((model_object *)object)->model, &m);
    return Py_BuildValue("(LLLLL)", (long long)m.weights_bytes, (long long)m.training_bytes,
                         (long long)m.activations_bytes, (long long)m.workspace_bytes,
                         (long long)m.cache_bytes);
}

/* held() -> (gradients, optimizer state): whether there are any */
static PyObject *model_held(PyObject *object, PyObject *ignored)
{
    (void)ignored;
    const ovlm_model *model = ((model_object *)object)->model;
    return Py_BuildValue("(OO)", ovlm_model_has_grads(model) ? Py_True : Py_False,
                         ovlm_model_has_moments(model) ? Py_True : Py_False);
}

/* expert_rows(rows): 0 for all */
static PyObject *model_expert_rows(PyObject *object, PyObject *number)
{
    model_object *self = (model_object *)object;
    int64_t rows = 0;
    if (ovlm_arg_int(number, "rows", &rows) < 0 || ovlm_model_enter(self) < 0) {
        return NULL;
    }
    ovlm_model_set_expert_rows(self->model, rows);
    self->busy = false;
    Py_RETURN_NONE;
}

static PyObject *model_cache_close(PyObject *object, PyObject *ignored)
{
    (void)ignored;
    model_object *self = (model_object *)object;
    if (ovlm_model_enter(self) < 0) {
        return NULL;
    }
    ovlm_model_cache_close(self->model);
    self->busy = false;
    Py_RETURN_NONE;
}

#define METHOD(name, function)                                        \
    {name, (PyCFunction)(void (*)(void))(function),                   \
     METH_METHOD | METH_FASTCALL | METH_KEYWORDS, NULL}

static PyMethodDef model_methods[] = {
    {"parameters", model_parameters, METH_NOARGS, NULL},
    {"units", model_units, METH_NOARGS, NULL},
    METHOD("array", model_array),
    METHOD("write", model_write),
    METHOD("train_only", model_train_only),
    METHOD("zero_grad", model_zero_grad),
    {"memory", model_memory, METH_NOARGS, NULL},
    {"held", model_held, METH_NOARGS, NULL},
    {"expert_rows", model_expert_rows, METH_O, NULL},
    METHOD("forward", ovlm_py_model_forward),
    METHOD("output", ovlm_py_model_output),
    METHOD("router_counts", ovlm_py_model_router_counts),
    METHOD("router_layers", ovlm_py_model_router_layers),
    METHOD("router_correct", ovlm_py_model_router_correct),
    METHOD("encode", ovlm_py_model_encode),
    METHOD("encode_backward", ovlm_py_model_encode_backward),
    METHOD("hidden", ovlm_py_model_hidden),
    METHOD("tap", ovlm_py_model_tap),
    METHOD("backward", ovlm_py_model_backward),
    METHOD("logits", ovlm_py_model_logits),
    METHOD("adamw", ovlm_py_model_adamw),
    METHOD("average", ovlm_py_model_average),
    METHOD("average_update", ovlm_py_model_average_update),
    METHOD("lora_open", ovlm_py_model_lora_open),
    METHOD("lora_close", ovlm_py_model_lora_close),
    METHOD("lora_merge", ovlm_py_model_lora_merge),
    METHOD("cache_open", ovlm_py_model_cache_open),
    {"cache_close", model_cache_close, METH_NOARGS, NULL},
    METHOD("extend", ovlm_py_model_extend),
    METHOD("trace_start", ovlm_py_model_trace_start),
    METHOD("trace_stop", ovlm_py_model_trace_stop),
    METHOD("dlpack", ovlm_py_model_dlpack),
    METHOD("dlpack_device", ovlm_py_model_dlpack_device),
    {NULL, NULL, 0, NULL},
};

static PyType_Slot model_slots[] = {
    {Py_tp_doc, "C side of orchvlm.Model."},
    {Py_tp_new, model_new},
    {Py_tp_dealloc, model_dealloc},
    {Py_tp_methods, model_methods},
    {0, NULL},
};

static PyType_Spec model_spec = {
    .name = "orchvlm._core.Model",
    .basicsize = sizeof(model_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = model_slots,
};

int ovlm_add_model_type(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &model_spec, NULL);
    if (type == NULL) {
        return -1;
    }
    int failed = PyModule_AddObjectRef(module, "Model", type);
    Py_DECREF(type);
    return failed;
}
