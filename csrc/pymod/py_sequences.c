/* py_sequences.c - Python side of the sequences calls. */
#include "args.h"

PyMethodDef ovlm_sequences_methods[] = {
    {NULL, NULL, 0, NULL},
};
