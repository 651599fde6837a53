/* py_bound.c - Python side of the bound calls. */
#include "args.h"

/* sequence_bound(lengths, n_gpus, gpus_per_node, quadratic, linear, fixed, memory_per_token,
 * memory_fixed, memory_limit, heads, degrees, comm, pad_to, micro_batches, work_limit, time_limit)
 */
enum { ARGUMENTS = 16 };

typedef struct bound_views {
    ovlm_i64_view lengths, degrees;
    ovlm_f64_view comm;
} bound_views;

static int parse_cost(PyObject *const *args, bound_views *views, ovlm_sequence_cost *cost)
{
    if (ovlm_arg_double(args[0], "cost.quadratic", &cost->quadratic) < 0 ||
        ovlm_arg_double(args[1], "cost.linear", &cost->linear) < 0 ||
        ovlm_arg_double(args[2], "cost.fixed", &cost->fixed) < 0 ||
        ovlm_arg_double(args[3], "cost.memory_per_token", &cost->memory_per_token) < 0 ||
        ovlm_arg_double(args[4], "cost.memory_fixed", &cost->memory_fixed) < 0 ||
        ovlm_arg_double(args[5], "cost.memory_limit", &cost->memory_limit) < 0 ||
        ovlm_arg_int(args[6], "cost.heads", &cost->heads) < 0 ||
        ovlm_arg_i64(args[7], "degrees", -1, false, &views->degrees) < 0 ||
        ovlm_arg_f64(args[8], "cost.comm", views->degrees.n, false, false, &views->comm) < 0) {
        return -1;
    }
    cost->degree_n = views->degrees.n;
    cost->degree = views->degrees.data;
    cost->comm = views->comm.data;
    return 0;
}

static int parse_bound(PyObject *const *args, bound_views *views, ovlm_sp_problem *problem,
                       ovlm_budget *budget)
{
    if (ovlm_arg_i64(args[0], "lengths", -1, false, &views->lengths) < 0 ||
        ovlm_arg_int(args[1], "n_gpus", &problem->n_gpus) < 0 ||
        ovlm_arg_int(args[2], "gpus_per_node", &problem->gpus_per_node) < 0 ||
        parse_cost(args + 3, views, &problem->cost) < 0 ||
        ovlm_arg_int(args[12], "pad_to", &problem->pad_to) < 0 ||
        ovlm_arg_int(args[13], "micro_batches", &problem->micro_batches) < 0 ||
        ovlm_arg_budget(args[14], args[15], budget) < 0) {
        return -1;
    }
    problem->n = views->lengths.n;
    problem->lengths = views->lengths.data;
    return 0;
}

static PyObject *sequence_bound(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    if (ovlm_arg_count("sequence_bound", nargs, ARGUMENTS) < 0) {
        return NULL;
    }
    bound_views views = {0};
    ovlm_sp_problem problem = {.policy = OVLM_SP_FLEX, .threads = 1};
    ovlm_budget budget;
    PyObject *answer = NULL;
    if (parse_bound(args, &views, &problem, &budget) == 0) {
        ovlm_err err = {0};
        ovlm_status status;
        double bound_s = 0;
        Py_BEGIN_ALLOW_THREADS status = ovlm_sp_bound(&problem, &budget, &bound_s, &err);
        Py_END_ALLOW_THREADS answer =
            status == OVLM_OK ? PyFloat_FromDouble(bound_s) : ovlm_raise(module, &err);
    }
    Py_CLEAR(views.lengths.owner);
    Py_CLEAR(views.degrees.owner);
    Py_CLEAR(views.comm.owner);
    return answer;
}

PyMethodDef ovlm_bound_methods[] = {
    {"sequence_bound", (PyCFunction)(void (*)(void))sequence_bound, METH_FASTCALL,
     "Lower bound on the step time; see orchvlm.sequence_bound."},
    {NULL, NULL, 0, NULL},
};
