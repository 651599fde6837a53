/* py_backend.c - Python side of the backend calls. */
#include "args.h"

PyMethodDef ovlm_backend_methods[] = {
    {NULL, NULL, 0, NULL},
};
