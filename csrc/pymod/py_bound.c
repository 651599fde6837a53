/* py_bound.c - Python side of the bound calls. */
#include "args.h"

PyMethodDef ovlm_bound_methods[] = {
    {NULL, NULL, 0, NULL},
};
