/* py_simulate.c - Python side of the event engine. */
#include "args.h"

typedef struct simulate_args {
    ovlm_f64_view duration;
    ovlm_i64_view before_start, before, use_start, use;
    int64_t n_resources;
} simulate_args;

static void args_release(simulate_args *a)
{
    Py_CLEAR(a->duration.owner);
    Py_CLEAR(a->before_start.owner);
    Py_CLEAR(a->before.owner);
    Py_CLEAR(a->use_start.owner);
    Py_CLEAR(a->use.owner);
}

/* The list must be exactly as long as its starts say. */
static int list_fits(const char *name, const ovlm_i64_view *start, const ovlm_i64_view *list)
{
    if (start->data[start->n - 1] == list->n) {
        return 0;
    }
    PyErr_Format(PyExc_ValueError, "%s_start must end at len(%s) = %lld; got %lld", name, name,
                 (long long)list->n, (long long)start->data[start->n - 1]);
    return -1;
}

static int args_read(simulate_args *a, PyObject *const *args)
{
    if (ovlm_arg_f64(args[0], "duration", -1, false, false, &a->duration) < 0 ||
        ovlm_arg_i64(args[1], "before_start", a->duration.n + 1, false, &a->before_start) < 0 ||
        ovlm_arg_i64(args[2], "before", -1, false, &a->before) < 0 ||
        ovlm_arg_i64(args[3], "use_start", a->duration.n + 1, false, &a->use_start) < 0 ||
        ovlm_arg_i64(args[4], "use", -1, false, &a->use) < 0 ||
        ovlm_arg_int(args[5], "n_resources", &a->n_resources) < 0) {
        return -1;
    }
    return list_fits("before", &a->before_start, &a->before) < 0
               ? -1
               : list_fits("use", &a->use_start, &a->use);
}

/* simulate(duration, before_start, before, use_start, use, n_resources)
 *     -> (start, end, cause, busy, time) */
static PyObject *simulate(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    simulate_args a = {0};
    PyObject *start = NULL, *end = NULL, *cause = NULL, *busy = NULL, *answer = NULL;
    if (ovlm_arg_count("simulate", nargs, 6) < 0 || args_read(&a, args) < 0) {
        goto done;
    }
    npy_intp n = (npy_intp)a.duration.n;
    npy_intp resources = (npy_intp)(a.n_resources < 0 ? 0 : a.n_resources);
    ovlm_budget budget;
    if (ovlm_arg_budget(Py_None, Py_None, &budget) < 0 ||
        (start = PyArray_SimpleNew(1, &n, NPY_DOUBLE)) == NULL ||
        (end = PyArray_SimpleNew(1, &n, NPY_DOUBLE)) == NULL ||
        (cause = PyArray_SimpleNew(1, &n, NPY_INT64)) == NULL ||
        (busy = PyArray_SimpleNew(1, &resources, NPY_DOUBLE)) == NULL) {
        goto done;
    }
    ovlm_simulate_problem problem = {a.duration.n,         a.n_resources,
                                     a.duration.data,      a.before_start.data,
                                     a.before.data,        a.use_start.data,
                                     a.use.data};
    double time_s = 0.0;
    ovlm_err err = {0};
    ovlm_status status;
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_simulate_run(&problem, &budget, PyArray_DATA((PyArrayObject *)start),
                               PyArray_DATA((PyArrayObject *)end),
                               PyArray_DATA((PyArrayObject *)cause),
                               PyArray_DATA((PyArrayObject *)busy), &time_s, &err);
    Py_END_ALLOW_THREADS
    if (status != OVLM_OK) {
        ovlm_raise(module, &err);
        goto done;
    }
    answer = Py_BuildValue("(OOOOd)", start, end, cause, busy, time_s);
done:
    args_release(&a);
    Py_XDECREF(start);
    Py_XDECREF(end);
    Py_XDECREF(cause);
    Py_XDECREF(busy);
    return answer;
}

PyMethodDef ovlm_simulate_methods[] = {
    {"simulate", (PyCFunction)(void (*)(void))simulate, METH_FASTCALL,
     "Tasks with dependencies on resources with first-come queues; see ovlm.h, section 7."},
    {NULL, NULL, 0, NULL},
};
