/* module.c - orchvlm._core: multi-phase initialisation, exception classes, method tables. */
#define OVLM_PYMOD_IMPORT_ARRAY
#include "args.h"

static int add_exception(PyObject *module, const char *name, const char *doc, PyObject *base,
                         PyObject **slot)
{
    char full[64];
    PyOS_snprintf(full, sizeof full, "orchvlm.%s", name);
    *slot = PyErr_NewExceptionWithDoc(full, doc, base, NULL);
    return *slot == NULL ? -1 : PyModule_AddObjectRef(module, name, *slot);
}

static int module_exec(PyObject *module)
{
    if (PyArray_ImportNumPyAPI() < 0) {
        return -1;
    }
    ovlm_module_state *state = PyModule_GetState(module);
    if (add_exception(module, "Error", "Base class of orchvlm's own errors.", NULL,
                      &state->error) < 0 ||
        add_exception(module, "BackendError", "A compute backend is missing or failed.",
                      state->error, &state->backend_error) < 0 ||
        add_exception(module, "CommError", "A communicator failed, or a peer died.",
                      state->error, &state->comm_error) < 0) {
        return -1;
    }
    PyMethodDef *tables[] = {ovlm_cost_methods, ovlm_balance_methods,  ovlm_sequences_methods,
                             ovlm_step_methods, ovlm_simulate_methods, ovlm_backend_methods,
                             ovlm_model_functions, ovlm_objective_methods, ovlm_route_methods,
                             ovlm_comm_functions, ovlm_dispatch_functions, ovlm_shard_functions};
    for (size_t i = 0; i < sizeof tables / sizeof tables[0]; i++) {
        if (PyModule_AddFunctions(module, tables[i]) < 0) {
            return -1;
        }
    }
    if (ovlm_add_model_type(module) < 0 || ovlm_add_comm_type(module) < 0 ||
        ovlm_add_dispatch_types(module) < 0) {
        return -1;
    }
    return ovlm_add_shard_type(module) < 0 ? -1 : ovlm_add_sequence_group_type(module);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    ovlm_module_state *state = PyModule_GetState(module);
    Py_VISIT(state->error);
    Py_VISIT(state->backend_error);
    Py_VISIT(state->comm_error);
    return 0;
}

static int module_clear(PyObject *module)
{
    ovlm_module_state *state = PyModule_GetState(module);
    Py_CLEAR(state->error);
    Py_CLEAR(state->backend_error);
    Py_CLEAR(state->comm_error);
    return 0;
}

static void module_free(void *module)
{
    (void)module_clear((PyObject *)module);
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, (void *)module_exec},
#if PY_VERSION_HEX >= 0x030d0000
    {Py_mod_gil, Py_MOD_GIL_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "orchvlm._core",
    .m_doc = "C core of orchvlm; use the orchvlm package.",
    .m_size = sizeof(ovlm_module_state),
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC PyInit__core(void);
PyMODINIT_FUNC PyInit__core(void)
{
    return PyModuleDef_Init(&module_def);
}
