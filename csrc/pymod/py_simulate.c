/* py_simulate.c - Python side of the simulate calls. */
#include "args.h"

PyMethodDef ovlm_simulate_methods[] = {
    {NULL, NULL, 0, NULL},
};
