/* py_sequences.c - Python side of plan_sequences, its plans, bounds and FlexSP's two DPs. */
#include "args.h"

#include <limits.h>
#include <stddef.h>

/* The problem's arguments, the same for every call: lengths, n_gpus, gpus_per_node, cost, pad_to,
 * micro_batches. */
enum { PROBLEM_ARGS = 6, PLAN_ARGS = 11 };

typedef struct problem_views {
    ovlm_i64_view lengths, degrees;
    ovlm_f64_view comm;
} problem_views;

static void release_problem(problem_views *views)
{
    Py_CLEAR(views->lengths.owner);
    Py_CLEAR(views->degrees.owner);
    Py_CLEAR(views->comm.owner);
}

static int parse_problem(PyObject *const *args, problem_views *views, ovlm_sp_problem *problem)
{
    *problem = (ovlm_sp_problem){.policy = OVLM_SP_FLEX, .threads = 1};
    if (ovlm_arg_i64(args[0], "lengths", -1, false, &views->lengths) < 0 ||
        ovlm_arg_int(args[1], "n_gpus", &problem->n_gpus) < 0 ||
        ovlm_arg_int(args[2], "gpus_per_node", &problem->gpus_per_node) < 0 ||
        ovlm_arg_sequence_cost(args[3], &problem->cost, &views->degrees, &views->comm) < 0 ||
        ovlm_arg_int(args[4], "pad_to", &problem->pad_to) < 0 ||
        ovlm_arg_int(args[5], "micro_batches", &problem->micro_batches) < 0) {
        return -1;
    }
    problem->n = views->lengths.n;
    problem->lengths = views->lengths.data;
    return 0;
}

/* ------------------------------------------------------------------ plans ---------------- */

/* The integer arrays of a plan in the order of its tuple; group_time and the rest follow. */
enum { ARRAYS = 5, AT_TIME = 5 };
typedef enum length_rule { ANY, GROUPS, GROUPS_AND_END } length_rule;

static const struct {
    const char *name;
    length_rule length;
    size_t view, array; /* offsets in ovlm_sp_plan_view and in ovlm_sp_plan */
} plan_array[ARRAYS] = {
#define ARRAY(name, length) \
    {#name, length, offsetof(ovlm_sp_plan_view, name), offsetof(ovlm_sp_plan, name)}
    ARRAY(micro_start, ANY),
    ARRAY(degree, ANY),
    ARRAY(first_gpu, GROUPS),
    ARRAY(group_start, GROUPS_AND_END),
    ARRAY(item, ANY),
#undef ARRAY
};

static ovlm_i64_view *view_of(ovlm_sp_plan_view *views, int i)
{
    return (ovlm_i64_view *)(void *)((char *)views + plan_array[i].view);
}

void ovlm_sp_plan_release(ovlm_sp_plan_view *views)
{
    for (int i = 0; i < ARRAYS; i++) {
        Py_CLEAR(view_of(views, i)->owner);
    }
    Py_CLEAR(views->group_time.owner);
}

/* The check only reads; the struct owns its arrays elsewhere. */
static int parse_arrays(PyObject *tuple, ovlm_sp_plan_view *views)
{
    for (int i = 0; i < ARRAYS; i++) {
        length_rule rule = plan_array[i].length;
        int64_t length = rule == ANY ? -1 : views->degree.n + (rule == GROUPS_AND_END);
        ovlm_i64_view *view = view_of(views, i);
        if (ovlm_arg_i64(PyTuple_GET_ITEM(tuple, i), plan_array[i].name, length, false, view) < 0) {
            return -1;
        }
        int64_t **array = (int64_t **)(void *)((char *)&views->plan + plan_array[i].array);
        *array = (int64_t *)(uintptr_t)view->data;
    }
    if (views->micro_start.n < 1) {
        PyErr_SetString(PyExc_ValueError, "micro_start must have at least one element");
        return -1;
    }
    if (ovlm_arg_f64(PyTuple_GET_ITEM(tuple, AT_TIME), "group_time", views->degree.n, false, true,
                     &views->group_time) < 0) {
        return -1;
    }
    views->plan.group_time = (double *)(uintptr_t)views->group_time.data;
    return 0;
}

int ovlm_arg_sp_plan(PyObject *tuple, ovlm_sp_plan_view *views)
{
    int64_t status = 0;
    ovlm_sp_plan *plan = &views->plan;
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != PLAN_ARGS) {
        PyErr_SetString(PyExc_TypeError, "a plan is a tuple of 11 fields");
        return -1;
    }
    if (parse_arrays(tuple, views) < 0 ||
        ovlm_arg_double(PyTuple_GET_ITEM(tuple, 6), "time", &plan->time) < 0 ||
        ovlm_arg_double(PyTuple_GET_ITEM(tuple, 7), "bound", &plan->bound) < 0 ||
        ovlm_arg_int(PyTuple_GET_ITEM(tuple, 8), "status", &status) < 0) {
        return -1;
    }
    if (status != OVLM_PLAN_FEASIBLE && status != OVLM_PLAN_OPTIMAL) {
        PyErr_Format(PyExc_ValueError, "status must be 0 or 1; got %lld", (long long)status);
        return -1;
    }
    plan->status = (ovlm_plan_status)status;
    plan->n = views->item.n;
    plan->n_micro = views->micro_start.n - 1;
    plan->n_groups = views->degree.n;
    return 0;
}

PyObject *ovlm_new_sp_plan(const ovlm_sp_plan *plan)
{
    return Py_BuildValue("(NNNNNNddiOL)", ovlm_new_i64(plan->micro_start, plan->n_micro + 1),
                         ovlm_new_i64(plan->degree, plan->n_groups),
                         ovlm_new_i64(plan->first_gpu, plan->n_groups),
                         ovlm_new_i64(plan->group_start, plan->n_groups + 1),
                         ovlm_new_i64(plan->item, plan->n),
                         ovlm_new_f64(plan->group_time, plan->n_groups), plan->time, plan->bound,
                         (int)plan->status, plan->cut_short ? Py_True : Py_False,
                         (long long)plan->work);
}

/* ------------------------------------------------------------------ solve and check ------ */

/* The search's own arguments: policy, threads, seed, work_limit, time_limit, warm_start. */
static int parse_search(PyObject *const *args, ovlm_sp_problem *problem, ovlm_budget *budget,
                        ovlm_sp_plan_view *warm)
{
    int64_t policy = 0, threads = 0;
    if (ovlm_arg_int(args[0], "policy", &policy) < 0 ||
        ovlm_arg_int(args[1], "threads", &threads) < 0 ||
        ovlm_arg_seed(args[2], "seed", &problem->seed) < 0 ||
        ovlm_arg_budget(args[3], args[4], budget) < 0) {
        return -1;
    }
    if (threads < 1 || threads > INT_MAX) {
        PyErr_Format(PyExc_ValueError, "threads must be >= 1; got %R", args[1]);
        return -1;
    }
    problem->policy = (ovlm_sp_policy)policy;
    problem->threads = (int)threads;
    if (args[5] != Py_None) {
        if (ovlm_arg_sp_plan(args[5], warm) < 0) {
            return -1;
        }
        problem->warm_start = &warm->plan;
    }
    return 0;
}

PyDoc_STRVAR(sp_solve_doc,
             "sp_solve(lengths, n_gpus, gpus_per_node, cost, pad_to, micro_batches, policy, "
             "threads, seed, work_limit, time_limit, warm_start, /)\n--\n\nA plan as a tuple.");

static PyObject *sp_solve(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    if (ovlm_arg_count("sp_solve", nargs, PROBLEM_ARGS + 6) < 0) {
        return NULL;
    }
    problem_views views = {0};
    ovlm_sp_plan_view warm = {0};
    ovlm_sp_problem problem;
    ovlm_budget budget;
    PyObject *answer = NULL;
    if (parse_problem(args, &views, &problem) == 0 &&
        parse_search(args + PROBLEM_ARGS, &problem, &budget, &warm) == 0) {
        ovlm_sp_plan *plan = NULL;
        ovlm_err err = {0};
        ovlm_status status;
        Py_BEGIN_ALLOW_THREADS
        status = ovlm_sp_solve(&problem, &budget, &plan, &err);
        Py_END_ALLOW_THREADS
        answer = status == OVLM_OK ? ovlm_new_sp_plan(plan) : ovlm_raise(module, &err);
        ovlm_sp_plan_free(plan);
    }
    ovlm_sp_plan_release(&warm);
    release_problem(&views);
    return answer;
}

PyDoc_STRVAR(sp_check_doc, "sp_check(lengths, n_gpus, gpus_per_node, cost, pad_to, micro_batches, "
                           "plan, /)\n--\n\nRaises what is wrong with a plan.");

static PyObject *sp_check(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    if (ovlm_arg_count("sp_check", nargs, PROBLEM_ARGS + 1) < 0) {
        return NULL;
    }
    problem_views views = {0};
    ovlm_sp_plan_view plan = {0};
    ovlm_sp_problem problem;
    PyObject *answer = NULL;
    if (parse_problem(args, &views, &problem) == 0 &&
        ovlm_arg_sp_plan(args[PROBLEM_ARGS], &plan) == 0) {
        ovlm_err err = {0};
        ovlm_status status;
        Py_BEGIN_ALLOW_THREADS
        status = ovlm_sp_plan_check(&problem, &plan.plan, &err);
        Py_END_ALLOW_THREADS
        answer = status == OVLM_OK ? Py_NewRef(Py_None) : ovlm_raise(module, &err);
    }
    ovlm_sp_plan_release(&plan);
    release_problem(&views);
    return answer;
}

PyDoc_STRVAR(sp_bound_doc, "sp_bound(lengths, n_gpus, gpus_per_node, cost, pad_to, micro_batches, "
                           "work_limit, time_limit, /)\n--\n\nA lower bound on any plan's time.");

static PyObject *sp_bound(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    if (ovlm_arg_count("sp_bound", nargs, PROBLEM_ARGS + 2) < 0) {
        return NULL;
    }
    problem_views views = {0};
    ovlm_sp_problem problem;
    ovlm_budget budget;
    PyObject *answer = NULL;
    if (parse_problem(args, &views, &problem) == 0 &&
        ovlm_arg_budget(args[PROBLEM_ARGS], args[PROBLEM_ARGS + 1], &budget) == 0) {
        double bound_s = 0;
        ovlm_err err = {0};
        ovlm_status status;
        Py_BEGIN_ALLOW_THREADS
        status = ovlm_sp_bound(&problem, &budget, &bound_s, &err);
        Py_END_ALLOW_THREADS
        answer = status == OVLM_OK ? PyFloat_FromDouble(bound_s) : ovlm_raise(module, &err);
    }
    release_problem(&views);
    return answer;
}

/* ------------------------------------------------------------------ the DPs -------------- */

typedef ovlm_status (*splitter)(const int64_t *, int64_t, int64_t, int64_t *, int64_t *, int64_t *,
                                ovlm_err *);

/* (part int64[n], longest int64[parts]) of lengths cut into n_parts. */
static PyObject *split(PyObject *module, splitter splits, PyObject *const *args)
{
    ovlm_i64_view lengths = {0};
    int64_t n_parts = 0, n_used = 0, *part = NULL, *longest = NULL;
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    PyObject *answer = NULL;
    if (ovlm_arg_i64(args[0], "lengths", -1, false, &lengths) < 0 ||
        ovlm_arg_int(args[1], "parts", &n_parts) < 0) {
        return NULL;
    }
    size_t room = (size_t)lengths.n + 1;
    part = PyMem_RawCalloc(room, sizeof *part);
    longest = PyMem_RawCalloc(room, sizeof *longest);
    if (part == NULL || longest == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    status = splits(lengths.data, lengths.n, n_parts, part, longest, &n_used, &err);
    Py_END_ALLOW_THREADS
    answer = status == OVLM_OK ? Py_BuildValue("(NN)", ovlm_new_i64(part, lengths.n),
                                               ovlm_new_i64(longest, n_used))
                               : ovlm_raise(module, &err);
done:
    PyMem_RawFree(part);
    PyMem_RawFree(longest);
    Py_CLEAR(lengths.owner);
    return answer;
}

PyDoc_STRVAR(sp_bucket_doc, "sp_bucket(lengths, parts, /)\n--\n\nFlexSP's bucketing DP.");

static PyObject *sp_bucket(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    return ovlm_arg_count("sp_bucket", nargs, 2) < 0 ? NULL : split(module, ovlm_sp_bucket, args);
}

PyDoc_STRVAR(sp_blast_doc, "sp_blast(lengths, parts, /)\n--\n\nFlexSP's blaster DP.");

static PyObject *sp_blast(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    return ovlm_arg_count("sp_blast", nargs, 2) < 0 ? NULL : split(module, ovlm_sp_blast, args);
}

#define METHOD(name) \
    {#name, (PyCFunction)(void (*)(void))(name), METH_FASTCALL, name##_doc}

PyMethodDef ovlm_sequences_methods[] = {
    METHOD(sp_solve),
    METHOD(sp_check),
    METHOD(sp_bound),
    METHOD(sp_bucket),
    METHOD(sp_blast),
    {NULL, NULL, 0, NULL},
};
