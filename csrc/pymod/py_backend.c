/* py_backend.c - Python side of the backend calls. */
#include "args.h"

#include "backend/backend.h"

enum { DESCRIPTION_BYTES = 256 };

/* [description of each device], with the GIL released around each question. */
static PyObject *describe_devices(PyObject *module, const ovlm_ops *ops, int64_t count)
{
    PyObject *devices = PyList_New(0);
    for (int64_t i = 0; devices != NULL && i < count; i++) {
        char text[DESCRIPTION_BYTES] = "";
        ovlm_err err = {0};
        ovlm_status status = OVLM_OK;
        Py_BEGIN_ALLOW_THREADS
        status = ops->device_describe(i, text, sizeof text, &err);
        Py_END_ALLOW_THREADS
        PyObject *line = status == OVLM_OK ? PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text),
                                                                  "replace")
                                           : ovlm_raise(module, &err);
        if (line == NULL || PyList_Append(devices, line) < 0) {
            Py_CLEAR(devices);
        }
        Py_XDECREF(line);
    }
    return devices;
}

/* Loads the table at args[0], a str or os.PathLike. */
static int load_table(PyObject *module, PyObject *arg, const ovlm_ops **ops)
{
    PyObject *path = NULL;
    if (!PyUnicode_FSConverter(arg, &path)) {
        return -1;
    }
    const char *text = PyBytes_AsString(path); /* without NULs: the converter refuses them */
    if (text == NULL) {
        Py_DECREF(path);
        return -1;
    }
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_backend_load(text, ops, &err);
    Py_END_ALLOW_THREADS
    Py_DECREF(path);
    if (status != OVLM_OK) {
        ovlm_raise(module, &err);
        return -1;
    }
    return 0;
}

PyDoc_STRVAR(backend_info_doc,
             "backend_info(path, /)\n--\n\n"
             "{'name', 'abi', 'devices', 'problem'} of the backend in a shared object.\n\n"
             "devices is a list of one-line descriptions; problem says why it is empty, or is\n"
             "None.  BackendError when the file cannot be loaded or is of another version.");

static PyObject *backend_info(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    const ovlm_ops *ops = NULL;
    if (ovlm_arg_count("backend_info", nargs, 1) < 0 || load_table(module, args[0], &ops) < 0) {
        return NULL;
    }
    int64_t count = 0;
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    status = ops->device_count(&count, &err);
    Py_END_ALLOW_THREADS
    if (status != OVLM_OK && status != OVLM_E_BACKEND) {
        return ovlm_raise(module, &err);
    }
    PyObject *devices = describe_devices(module, ops, count);
    if (devices == NULL) {
        return NULL;
    }
    return Py_BuildValue("{s:s,s:I,s:N,s:z}", "name", ops->name, "abi", ops->abi, "devices",
                         devices, "problem", status == OVLM_OK ? NULL : err.message);
}

PyDoc_STRVAR(backend_probe_doc,
             "backend_probe(path, device, /)\n--\n\n"
             "Opens and closes a device of the backend in a shared object; its description.\n\n"
             "BackendError when there is no such backend, no device, or it does not open.");

static PyObject *backend_probe(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    const ovlm_ops *ops = NULL;
    int64_t device = 0;
    if (ovlm_arg_count("backend_probe", nargs, 2) < 0 ||
        ovlm_arg_int(args[1], "device", &device) < 0 || load_table(module, args[0], &ops) < 0) {
        return NULL;
    }
    char text[DESCRIPTION_BYTES] = "";
    ovlm_backend *backend = NULL;
    ovlm_backend_options options = {.device = device};
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    status = ops->open(&options, &backend, &err);
    if (status == OVLM_OK) {
        status = ops->device_describe(device, text, sizeof text, &err);
        ops->close(backend);
    }
    Py_END_ALLOW_THREADS
    if (status != OVLM_OK) {
        return ovlm_raise(module, &err);
    }
    return PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "replace");
}

PyMethodDef ovlm_backend_methods[] = {
    {"backend_info", (PyCFunction)(void (*)(void))backend_info, METH_FASTCALL, backend_info_doc},
    {"backend_probe", (PyCFunction)(void (*)(void))backend_probe, METH_FASTCALL,
     backend_probe_doc},
    {NULL, NULL, 0, NULL},
};
