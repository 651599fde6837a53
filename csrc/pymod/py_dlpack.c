/* py_dlpack.c - weights and gradients as DLPack capsules, without a copy.
 *
 * The structs are the DLPack ABI's, versions 0 and 1.0, written down here because that is all of
 * it that is needed. */
#include "py_model.h"

enum { DL_CPU = 1, DL_CUDA = 2 };
enum { DL_FLOAT = 2, DL_BFLOAT = 4 };

typedef struct dl_tensor {
    void *data;
    struct {
        int32_t type, id;
    } device;
    int32_t n_dims;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} dl_tensor;

typedef struct dl_managed {
    dl_tensor tensor;
    void *ctx;
    void (*deleter)(struct dl_managed *self);
} dl_managed;

typedef struct dl_versioned {
    struct {
        uint32_t major, minor;
    } version;
    void *ctx;
    void (*deleter)(struct dl_versioned *self);
    uint64_t flags; /* 1: read only, 2: a copy */
    dl_tensor tensor;
} dl_versioned;

/* One export: whichever of the two structs was asked for, and what both point to. */
typedef struct export {
    dl_managed plain;
    dl_versioned versioned;
    int64_t shape[OVLM_DIMS_MOST], strides[OVLM_DIMS_MOST];
    PyObject *owner;
} export;

/* Called by whoever took the capsule, from any thread, maybe after the interpreter's end. */
static void drop(export *self)
{
    if (Py_IsInitialized()) {
        PyGILState_STATE gil = PyGILState_Ensure();
        Py_DECREF(self->owner);
        PyMem_RawFree(self);
        PyGILState_Release(gil);
    }
}

static void drop_plain(dl_managed *self)
{
    drop(self->ctx);
}

static void drop_versioned(dl_versioned *self)
{
    drop(self->ctx);
}

/* A capsule that nobody took still has its first name. */
static void drop_capsule(PyObject *capsule)
{
    const char *const names[] = {"dltensor", "dltensor_versioned"};
    for (int i = 0; i < 2; i++) {
        if (PyCapsule_IsValid(capsule, names[i])) {
            void *managed = PyCapsule_GetPointer(capsule, names[i]);
            drop(i == 0 ? ((dl_managed *)managed)->ctx : ((dl_versioned *)managed)->ctx);
        }
    }
}

/* What DLPack calls the model's memory; BufferError where it has no word for it. */
static int device_of(const model_object *self, int32_t *type, int32_t *id)
{
    const ovlm_backend *backend = ovlm_model_backend(self->model);
    *type = backend->host_memory ? DL_CPU : DL_CUDA;
    *id = backend->host_memory ? 0 : (int32_t)self->device;
    if (!backend->host_memory && strcmp(backend->ops->name, "cuda") != 0) {
        PyErr_Format(PyExc_BufferError, "DLPack has no device for the memory of backend '%s'",
                     backend->ops->name);
        return -1;
    }
    return 0;
}

static int fill_export(export *one, const model_object *self, const ovlm_param *parameter,
                       const ovlm_tensor *tensor)
{
    dl_tensor view = {.data = tensor->data, .n_dims = (int32_t)parameter->n_dims,
                      .shape = one->shape, .strides = one->strides};
    if (device_of(self, &view.device.type, &view.device.id) < 0) {
        return -1;
    }
    view.dtype.code = tensor->dtype == OVLM_BF16 ? DL_BFLOAT : DL_FLOAT;
    view.dtype.bits = (uint8_t)(8 * ovlm_dtype_bytes(tensor->dtype));
    view.dtype.lanes = 1;
    int64_t stride = 1;
    for (int64_t d = parameter->n_dims - 1; d >= 0; d--) {
        one->shape[d] = parameter->dims[d];
        one->strides[d] = stride;
        stride *= parameter->dims[d];
    }
    one->plain = (dl_managed){.tensor = view, .ctx = one, .deleter = drop_plain};
    one->versioned = (dl_versioned){.version = {1, 0}, .tensor = view, .ctx = one,
                                    .deleter = drop_versioned};
    return 0;
}

static PyObject *new_capsule(model_object *self, int64_t parameter, int64_t which,
                             const ovlm_tensor *tensor, bool versioned)
{
    export *one = PyMem_RawCalloc(1, sizeof *one);
    if (one == NULL) {
        return PyErr_NoMemory();
    }
    if (fill_export(one, self, &ovlm_model_params(self->model)->param[parameter], tensor) < 0 ||
        (one->owner = ovlm_view_owner(self, parameter, which)) == NULL) {
        PyMem_RawFree(one);
        return NULL;
    }
    PyObject *capsule = versioned
                            ? PyCapsule_New(&one->versioned, "dltensor_versioned", drop_capsule)
                            : PyCapsule_New(&one->plain, "dltensor", drop_capsule);
    if (capsule == NULL) {
        drop(one);
    }
    return capsule;
}

/* dlpack(parameter, which, versioned) -> capsule, or None where there is no such tensor */
PyObject *ovlm_py_model_dlpack(PyObject *object, PyTypeObject *type, PyObject *const *args,
                               Py_ssize_t nargs, PyObject *kwnames)
{
    (void)kwnames;
    model_object *self = (model_object *)object;
    int64_t parameter = 0, which = 0;
    int versioned = 0;
    if (ovlm_arg_count("dlpack", nargs, 3) < 0 ||
        ovlm_arg_tensor(self, args, &parameter, &which) < 0 ||
        (versioned = PyObject_IsTrue(args[2])) < 0 || ovlm_model_enter(self) < 0) {
        return NULL;
    }
    ovlm_tensor tensor = {0};
    ovlm_err err = {0};
    ovlm_status status = ovlm_model_find_tensor(self->model, parameter, which, &tensor, &err);
    if (status == OVLM_OK) {
        Py_BEGIN_ALLOW_THREADS
        status = ovlm_model_wait(self->model, &err); /* whatever stream reads it may start now */
        Py_END_ALLOW_THREADS
    }
    PyObject *done = ovlm_model_leave(self, type, status, &err);
    if (done == NULL || tensor.cols == 0) {
        return done;
    }
    Py_DECREF(done);
    return new_capsule(self, parameter, which, &tensor, versioned != 0);
}

/* dlpack_device() -> (device type, number) */
PyObject *ovlm_py_model_dlpack_device(PyObject *object, PyTypeObject *type, PyObject *const *args,
                                      Py_ssize_t nargs, PyObject *kwnames)
{
    (void)kwnames;
    (void)args;
    (void)type;
    int32_t device_type = 0, id = 0;
    if (ovlm_arg_count("dlpack_device", nargs, 0) < 0 ||
        device_of((const model_object *)object, &device_type, &id) < 0) {
        return NULL;
    }
    return Py_BuildValue("(ii)", (int)device_type, (int)id);
}
