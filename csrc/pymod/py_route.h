/* py_route.h - routes as Python holds them, for the files that take or give one. */
#ifndef OVLM_PYMOD_PY_ROUTE_H
#define OVLM_PYMOD_PY_ROUTE_H

#include "args.h"

enum { OVLM_ROUTE_COLUMNS = 7 };

/* A route borrowed from Python's tuple of its fields: item, first_row, n_rows, source, destination,
 * send_row, receive_row, n_ranks.  Only read `route`; release the view in any case. */
typedef struct ovlm_route_view {
    ovlm_i64_view column[OVLM_ROUTE_COLUMNS];
    ovlm_route route;
} ovlm_route_view;

int ovlm_arg_route(PyObject *tuple, ovlm_route_view *view);
void ovlm_route_release(ovlm_route_view *view);

/* The same tuple from a route, whose arrays are taken. */
PyObject *ovlm_take_route(ovlm_route *route);

/* A read-only array over *data, which it frees; *data becomes NULL, also on failure. */
PyObject *ovlm_adopt(void **data, int64_t n, int type);
PyObject *ovlm_adopt_i64(int64_t **data, int64_t n);

#endif
