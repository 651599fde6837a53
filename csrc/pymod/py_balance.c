/* py_balance.c - Python side of the balance calls. */
#include "args.h"

PyMethodDef ovlm_balance_methods[] = {
    {NULL, NULL, 0, NULL},
};
