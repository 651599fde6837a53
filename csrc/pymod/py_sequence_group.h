/* py_sequence_group.h - orchvlm._core.SequenceGroup, for the model's passes. */
#ifndef OVLM_PYMOD_PY_SEQUENCE_GROUP_H
#define OVLM_PYMOD_PY_SEQUENCE_GROUP_H

#include "py_comm.h"
#include "py_model.h"

#include "engine/sequence_parallel.h"

typedef struct sequence_group_object {
    PyObject_HEAD
    ovlm_sequence_group group;
    comm_object *comm; /* owned */
} sequence_group_object;

/* A group, or None: NULL in *group (borrowed); TypeError otherwise. */
int ovlm_arg_sequence_group(PyObject *module, PyObject *object, sequence_group_object **group);

/* Marks the model and the group's communicator busy for a pass, or neither: RuntimeError, or
 * ValueError for a communicator that is closed.  And the communicator no longer.  group may be
 * NULL. */
int ovlm_model_enter_with(model_object *model, sequence_group_object *group);
void ovlm_sequence_group_leave(sequence_group_object *group);

#endif
