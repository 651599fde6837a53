/* py_balance.c - Python side of the balance calls. */
#include "args.h"

/* balance(lengths, n_ranks, cost tuple, item_cost, squares, size, capacity, min_items, max_items,
 * together, pinned, base_load, speed, group_size, home, node_size, slack, work_limit, time_limit,
 * seed) */
enum {
    LENGTHS, N_RANKS, COST, ITEM_COST, SQUARES, SIZE, CAPACITY, MIN_ITEMS, MAX_ITEMS, TOGETHER,
    PINNED, BASE_LOAD, SPEED, GROUP_SIZE, HOME, NODE_SIZE, SLACK, WORK_LIMIT, TIME_LIMIT, SEED,
    N_ARGS
};

typedef struct balance_views {
    ovlm_i64_view lengths, size, capacity, together, pinned, home;
    ovlm_f64_view squares, item_cost, base_load, speed;
} balance_views;

static void views_release(balance_views *v)
{
    Py_CLEAR(v->lengths.owner);
    Py_CLEAR(v->size.owner);
    Py_CLEAR(v->capacity.owner);
    Py_CLEAR(v->together.owner);
    Py_CLEAR(v->pinned.owner);
    Py_CLEAR(v->home.owner);
    Py_CLEAR(v->squares.owner);
    Py_CLEAR(v->item_cost.owner);
    Py_CLEAR(v->base_load.owner);
    Py_CLEAR(v->speed.owner);
}

/* An optional integer: None leaves the value alone. */
static int optional_int(PyObject *object, const char *name, int64_t *value)
{
    return object == Py_None ? 0 : ovlm_arg_int(object, name, value);
}

static int read_arrays(PyObject *const *a, ovlm_balance_problem *p, balance_views *v)
{
    int64_t n, N = p->n_ranks;
    if (ovlm_arg_i64(a[LENGTHS], "lengths", -1, false, &v->lengths) < 0) {
        return -1;
    }
    n = p->n = v->lengths.n;
    if (ovlm_arg_f64(a[ITEM_COST], "cost", n, true, false, &v->item_cost) < 0 ||
        ovlm_arg_f64(a[SQUARES], "squares", n, true, false, &v->squares) < 0 ||
        ovlm_arg_i64(a[SIZE], "size", n, true, &v->size) < 0 ||
        ovlm_arg_i64(a[CAPACITY], "capacity", N, true, &v->capacity) < 0 ||
        ovlm_arg_i64(a[TOGETHER], "keep_together", n, true, &v->together) < 0 ||
        ovlm_arg_i64(a[PINNED], "pinned", n, true, &v->pinned) < 0 ||
        ovlm_arg_f64(a[BASE_LOAD], "base_load", N, true, false, &v->base_load) < 0 ||
        ovlm_arg_f64(a[SPEED], "speed", N, true, false, &v->speed) < 0 ||
        ovlm_arg_i64(a[HOME], "home", n, true, &v->home) < 0) {
        return -1;
    }
    p->lengths = v->lengths.data;
    p->item_cost = v->item_cost.data;
    p->squares = v->squares.data;
    p->size = v->size.data;
    p->capacity = v->capacity.data;
    p->together = v->together.data;
    p->pinned = v->pinned.data;
    p->base_load = v->base_load.data;
    p->speed = v->speed.data;
    p->home = v->home.data;
    return 0;
}

static int read_problem(PyObject *const *a, ovlm_balance_problem *p, balance_views *v)
{
    *p = (ovlm_balance_problem){.max_items = -1};
    if (ovlm_arg_int(a[N_RANKS], "n_ranks", &p->n_ranks) < 0 ||
        ovlm_arg_batch_cost(a[COST], &p->cost) < 0 ||
        ovlm_arg_int(a[MIN_ITEMS], "min_items", &p->min_items) < 0 ||
        optional_int(a[MAX_ITEMS], "max_items", &p->max_items) < 0 ||
        optional_int(a[GROUP_SIZE], "group_size", &p->group_size) < 0 ||
        ovlm_arg_int(a[NODE_SIZE], "node_size", &p->node_size) < 0 ||
        ovlm_arg_double(a[SLACK], "slack", &p->slack) < 0 ||
        ovlm_arg_seed(a[SEED], "seed", &p->seed) < 0) {
        return -1;
    }
    if (p->n_ranks < 1) {
        PyErr_Format(PyExc_ValueError, "n_ranks must be >= 1; got %lld", (long long)p->n_ranks);
        return -1;
    }
    if (a[MAX_ITEMS] != Py_None && p->max_items < 0) {
        PyErr_Format(PyExc_ValueError, "max_items must be >= 0; got %lld",
                     (long long)p->max_items);
        return -1;
    }
    if (a[GROUP_SIZE] != Py_None && p->group_size < 1) {
        PyErr_Format(PyExc_ValueError, "group_size must be >= 1; got %lld",
                     (long long)p->group_size);
        return -1;
    }
    return read_arrays(a, p, v);
}

static PyObject *balance(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    ovlm_balance_problem problem;
    balance_views views = {0};
    ovlm_budget budget;
    ovlm_balance_result result;
    ovlm_err err = {0};
    ovlm_status status;
    PyObject *rank = NULL, *loads = NULL, *answer = NULL;
    if (ovlm_arg_count("balance", nargs, N_ARGS) < 0 ||
        read_problem(args, &problem, &views) < 0 ||
        ovlm_arg_budget(args[WORK_LIMIT], args[TIME_LIMIT], &budget) < 0) {
        goto done;
    }
    npy_intp n = (npy_intp)problem.n, n_ranks = (npy_intp)problem.n_ranks;
    rank = PyArray_SimpleNew(1, &n, NPY_INT64);
    loads = PyArray_SimpleNew(1, &n_ranks, NPY_DOUBLE);
    if (rank == NULL || loads == NULL) {
        goto done;
    }
    int64_t *rank_data = PyArray_DATA((PyArrayObject *)rank);
    double *loads_data = PyArray_DATA((PyArrayObject *)loads);
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_balance_solve(&problem, &budget, rank_data, loads_data, &result, &err);
    Py_END_ALLOW_THREADS
    if (status != OVLM_OK) {
        ovlm_raise(module, &err);
        goto done;
    }
    answer = Py_BuildValue("OOdiOL", rank, loads, result.bound, (int)result.status,
                           result.cut_short ? Py_True : Py_False, (long long)result.work);
done:
    views_release(&views);
    Py_XDECREF(rank);
    Py_XDECREF(loads);
    return answer;
}

PyMethodDef ovlm_balance_methods[] = {
    {"balance", (PyCFunction)(void (*)(void))balance, METH_FASTCALL,
     "Items onto ranks: (rank, loads, bound, status, cut_short, work)."},
    {NULL, NULL, 0, NULL},
};
