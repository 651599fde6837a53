/* args.h - Python arguments into C views, and C errors into Python exceptions.
 *
 * Every converter returns 0, or -1 with an exception that names the argument. */
#ifndef OVLM_PYMOD_ARGS_H
#define OVLM_PYMOD_ARGS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#ifndef OVLM_PYMOD_IMPORT_ARRAY
#define NO_IMPORT_ARRAY
#endif
#define PY_ARRAY_UNIQUE_SYMBOL orchvlm_ARRAY_API
#define NPY_NO_DEPRECATED_API NPY_1_23_API_VERSION
#include <numpy/arrayobject.h>

#include "ovlm.h"

/* Per-module state: the exception classes. */
typedef struct ovlm_module_state {
    PyObject *error, *backend_error, *comm_error;
} ovlm_module_state;

/* The one place where a status becomes an exception, which is then set; returns NULL, always, for
 * callers that do: the others return -1 behind it. */
PyObject *ovlm_raise(PyObject *module, const ovlm_err *err);

/* An object of one of this module's types ("Model", "Comm"); borrowed, NULL with TypeError. */
PyObject *ovlm_instance_of(PyObject *module, const char *type, PyObject *object);

/* A one-dimensional C-contiguous array borrowed from a Python object.  `owner` holds the reference;
 * release with Py_CLEAR(view.owner).  With None and optional, data is NULL and n is 0. */
typedef struct ovlm_i64_view {
    PyObject *owner;
    const int64_t *data;
    int64_t n;
} ovlm_i64_view;

typedef struct ovlm_f64_view {
    PyObject *owner;
    const double *data;
    int64_t n;
} ovlm_f64_view;

/* Integers of any width; floats and bools are a TypeError, uint64 beyond 2^63-1 a ValueError.
 * expected_n < 0: any length. */
int ovlm_arg_i64(PyObject *object, const char *name, int64_t expected_n, bool optional,
                 ovlm_i64_view *view);
/* Real numbers of any width; NaN and infinities are a ValueError unless allow_inf. */
int ovlm_arg_f64(PyObject *object, const char *name, int64_t expected_n, bool optional,
                 bool allow_inf, ovlm_f64_view *view);
int ovlm_arg_int(PyObject *object, const char *name, int64_t *value);
/* Any integer; a seed of more than 64 bits or below 0 is a ValueError. */
int ovlm_arg_seed(PyObject *object, const char *name, uint64_t *value);
int ovlm_arg_double(PyObject *object, const char *name, double *value);
/* (work_limit, time_limit): None = default / none.  Polls for Ctrl-C during the call. */
int ovlm_arg_budget(PyObject *work_limit, PyObject *time_limit, ovlm_budget *budget);
/* PyArg_ParseTuple, answers as it does, but a number out of range is a ValueError. */
int ovlm_arg_tuple(PyObject *tuple, const char *format, ...);
/* TypeError unless nargs is `expected`. */
int ovlm_arg_count(const char *function, Py_ssize_t nargs, Py_ssize_t expected);

/* BatchCost._astuple(); checks the values. */
int ovlm_arg_batch_cost(PyObject *object, ovlm_batch_cost *cost);
/* SequenceCost._astuple(); checks the values.  cost borrows from the two views: release both. */
int ovlm_arg_sequence_cost(PyObject *object, ovlm_sequence_cost *cost, ovlm_i64_view *degree,
                           ovlm_f64_view *comm);

/* A sequence plan borrowed from Python's tuple of its fields: micro_start, degree, first_gpu,
 * group_start, item, group_time, time, bound, status, cut_short, work.  Only read `plan`; release
 * the view in any case. */
typedef struct ovlm_sp_plan_view {
    ovlm_i64_view micro_start, degree, first_gpu, group_start, item;
    ovlm_f64_view group_time;
    ovlm_sp_plan plan;
} ovlm_sp_plan_view;

int ovlm_arg_sp_plan(PyObject *tuple, ovlm_sp_plan_view *view);
void ovlm_sp_plan_release(ovlm_sp_plan_view *view);
PyObject *ovlm_new_sp_plan(const ovlm_sp_plan *plan);

/* New one-dimensional arrays; copies of C data. */
PyObject *ovlm_new_i64(const int64_t *data, int64_t n);
PyObject *ovlm_new_f64(const double *data, int64_t n);

/* Method tables of the py_*.c files, ended by a NULL entry. */
extern PyMethodDef ovlm_balance_methods[];
extern PyMethodDef ovlm_sequences_methods[];
extern PyMethodDef ovlm_step_methods[];
extern PyMethodDef ovlm_simulate_methods[];
extern PyMethodDef ovlm_cost_methods[];
extern PyMethodDef ovlm_backend_methods[];
extern PyMethodDef ovlm_model_functions[];
extern PyMethodDef ovlm_objective_methods[];
extern PyMethodDef ovlm_route_methods[];
extern PyMethodDef ovlm_comm_functions[];
extern PyMethodDef ovlm_dispatch_functions[];
extern PyMethodDef ovlm_shard_functions[];

/* Adds the types Model, Comm, Dispatcher with Dispatch, and Shard. */
int ovlm_add_model_type(PyObject *module);
int ovlm_add_comm_type(PyObject *module);
int ovlm_add_dispatch_types(PyObject *module);
int ovlm_add_shard_type(PyObject *module);
int ovlm_add_sequence_group_type(PyObject *module);

#endif
