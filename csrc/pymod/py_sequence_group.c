/* py_sequence_group.c - orchvlm._core.SequenceGroup: ranks that share the tokens of a pass. */
#include "py_sequence_group.h"

int ovlm_arg_sequence_group(PyObject *module, PyObject *object, sequence_group_object **group)
{
    *group = NULL;
    if (object == Py_None) {
        return 0;
    }
    *group = (sequence_group_object *)ovlm_instance_of(module, "SequenceGroup", object);
    return *group == NULL ? -1 : 0;
}

int ovlm_model_enter_with(model_object *model, sequence_group_object *group)
{
    if (ovlm_model_enter(model) < 0) {
        return -1;
    }
    if (group != NULL && ovlm_comm_object_enter(group->comm) < 0) {
        model->busy = false;
        return -1;
    }
    return 0;
}

void ovlm_sequence_group_leave(sequence_group_object *group)
{
    if (group != NULL) {
        group->comm->busy = false;
    }
}

/* SequenceGroup(core comm, head_ranks) */
static PyObject *group_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *comm = NULL, *module = PyType_GetModule(type);
    long long head_ranks = 0;
    if (module == NULL) {
        return NULL;
    }
    if (kwargs != NULL && PyDict_GET_SIZE(kwargs) > 0) {
        PyErr_SetString(PyExc_TypeError, "SequenceGroup takes no keywords");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "OL:SequenceGroup", &comm, &head_ranks) ||
        ovlm_instance_of(module, "Comm", comm) == NULL) {
        return NULL;
    }
    if (head_ranks < 0) {
        PyErr_Format(PyExc_ValueError, "head_ranks must be >= 0; got %lld", head_ranks);
        return NULL;
    }
    comm_object *over = (comm_object *)comm;
    if (ovlm_comm_object_enter(over) < 0) {
        return NULL;
    }
    over->busy = false;
    sequence_group_object *self = (sequence_group_object *)type->tp_alloc(type, 0);
    if (self != NULL) {
        self->comm = (comm_object *)Py_NewRef(comm);
        ovlm_sequence_group_init(&self->group, over->comm, head_ranks);
    }
    return (PyObject *)self;
}

static void group_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    Py_XDECREF((PyObject *)((sequence_group_object *)object)->comm);
    type->tp_free(object);
    Py_DECREF(type);
}

/* counts() -> (exchanges, bytes sent to other ranks, seconds waited), since it was made */
static PyObject *group_counts(PyObject *object, PyObject *ignored)
{
    (void)ignored;
    const ovlm_exchanges *on = &((sequence_group_object *)object)->group.on;
    return Py_BuildValue("(LLd)", (long long)on->count, (long long)on->sent_bytes, on->waited_s);
}

static PyMethodDef group_methods[] = {
    {"counts", group_counts, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot group_slots[] = {
    {Py_tp_doc, "C side of orchvlm.sequence_parallel."},
    {Py_tp_new, group_new},
    {Py_tp_dealloc, group_dealloc},
    {Py_tp_methods, group_methods},
    {0, NULL},
};

static PyType_Spec group_spec = {
    .name = "orchvlm._core.SequenceGroup",
    .basicsize = sizeof(sequence_group_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = group_slots,
};

int ovlm_add_sequence_group_type(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &group_spec, NULL);
    if (type == NULL) {
        return -1;
    }
    int failed = PyModule_AddObjectRef(module, "SequenceGroup", type);
    Py_DECREF(type);
    return failed;
}
