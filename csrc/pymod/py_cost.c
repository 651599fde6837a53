/* py_cost.c - Python side of the cost calls. */
#include "args.h"

PyMethodDef ovlm_cost_methods[] = {
    {NULL, NULL, 0, NULL},
};
