/* py_step.c - Python side of the step calls. */
#include "args.h"

PyMethodDef ovlm_step_methods[] = {
    {NULL, NULL, 0, NULL},
};
