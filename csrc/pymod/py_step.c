/* py_step.c - Python side of relabelling and step plans.
 *
 * Arrays that a call allocates for its result are handed to NumPy, not copied: a step of 160,000
 * samples has 50 MB of them. */
#include "py_route.h"

#include <stdlib.h>

/* ------------------------------------------------------------------ relabelling ---------- */

static PyObject *relabel_tuple(const ovlm_relabel_result *result)
{
    return Py_BuildValue("(dddiOL)", result->before, result->value, result->bound,
                         (int)result->status, result->cut_short ? Py_True : Py_False,
                         (long long)result->work);
}

PyDoc_STRVAR(relabel_solve_doc,
             "relabel_solve(n_ranks, node_size, label, rank, bytes, tie_label, tie_rank, "
             "tie_bytes, mode, work_limit, time_limit, /)\n--\n\n(rank_of, result).");

/* The problem in relabel_solve's arguments; it borrows from view[6]. */
static int parse_relabel(PyObject *const *args, ovlm_i64_view *view, ovlm_relabel_problem *problem)
{
    static const char *name[6] = {"label", "rank", "size", "tie_label", "tie_rank", "tie_size"};
    int64_t mode = 0;
    if (ovlm_arg_int(args[0], "n_ranks", &problem->n_ranks) < 0 ||
        ovlm_arg_int(args[1], "node_size", &problem->node_size) < 0 ||
        ovlm_arg_int(args[8], "mode", &mode) < 0) {
        return -1;
    }
    if (problem->n_ranks < 1 || problem->n_ranks > PY_SSIZE_T_MAX / 8) {
        PyErr_Format(PyExc_ValueError, "n_ranks must be >= 1; got %R", args[0]);
        return -1;
    }
    for (int v = 0; v < 6; v++) {
        if (ovlm_arg_i64(args[2 + v], name[v], v % 3 ? view[v - v % 3].n : -1, false,
                         &view[v]) < 0) {
            return -1;
        }
    }
    problem->n = view[0].n;
    problem->label = view[0].data;
    problem->rank = view[1].data;
    problem->bytes = view[2].data;
    problem->n_ties = view[3].n;
    problem->tie_label = view[3].data;
    problem->tie_rank = view[4].data;
    problem->tie_bytes = view[5].data;
    problem->mode = (ovlm_relabel_mode)mode;
    return 0;
}

static PyObject *relabel_solve(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    ovlm_i64_view view[6] = {{0}};
    ovlm_relabel_problem problem = {0};
    ovlm_budget budget;
    int64_t *rank_of = NULL;
    PyObject *answer = NULL;
    if (ovlm_arg_count("relabel_solve", nargs, 11) < 0 ||
        ovlm_arg_budget(args[9], args[10], &budget) < 0 ||
        parse_relabel(args, view, &problem) < 0) {
        goto done;
    }
    rank_of = calloc((size_t)problem.n_ranks, sizeof *rank_of);
    if (rank_of == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    ovlm_err err = {0};
    ovlm_relabel_result result;
    ovlm_status status;
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_relabel_solve(&problem, &budget, rank_of, &result, &err);
    Py_END_ALLOW_THREADS
    answer = status == OVLM_OK ? Py_BuildValue("(NN)",
                                               ovlm_adopt_i64(&rank_of, problem.n_ranks),
                                               relabel_tuple(&result))
                               : ovlm_raise(module, &err);
done:
    free(rank_of);
    for (int v = 0; v < 6; v++) {
        Py_CLEAR(view[v].owner);
    }
    return answer;
}

/* ------------------------------------------------------------------ step problems -------- */

/* What one encoder's items borrow. */
typedef struct items_view {
    ovlm_i64_view sample, position, length, out_tokens, bytes;
    ovlm_f64_view squares;
} items_view;

typedef struct step_view {
    ovlm_i64_view text_tokens, source_rank, degrees;
    ovlm_f64_view comm;
    ovlm_sp_plan_view warm;
    items_view *items; /* [n_phases] */
    ovlm_step_items *phase;
    ovlm_step_problem problem;
} step_view;

static void release_step(step_view *view)
{
    for (int64_t p = 0; view->items != NULL && p < view->problem.n_phases; p++) {
        items_view *items = &view->items[p];
        Py_CLEAR(items->sample.owner);
        Py_CLEAR(items->position.owner);
        Py_CLEAR(items->length.owner);
        Py_CLEAR(items->out_tokens.owner);
        Py_CLEAR(items->bytes.owner);
        Py_CLEAR(items->squares.owner);
    }
    Py_CLEAR(view->text_tokens.owner);
    Py_CLEAR(view->source_rank.owner);
    Py_CLEAR(view->degrees.owner);
    Py_CLEAR(view->comm.owner);
    ovlm_sp_plan_release(&view->warm);
    PyMem_RawFree(view->items);
    PyMem_RawFree(view->phase);
}

/* (name, sample, position, length, out_tokens, bytes, squares, out_bytes_per_token, cost,
 *  (bytes_per_token, fixed_bytes)) */
static int parse_items(PyObject *tuple, items_view *view, ovlm_step_items *items)
{
    PyObject *sample, *position, *length, *out_tokens, *bytes, *squares, *cost;
    if (!PyTuple_Check(tuple)) {
        PyErr_SetString(PyExc_TypeError, "a phase is a tuple");
        return -1;
    }
    if (!ovlm_arg_tuple(tuple, "sOOOOOOdO(dd)", &items->name, &sample, &position, &length,
                        &out_tokens, &bytes, &squares, &items->out_bytes_per_token, &cost,
                        &items->memory_per_token, &items->memory_fixed) ||
        ovlm_arg_batch_cost(cost, &items->cost) < 0 ||
        ovlm_arg_i64(sample, "sample", -1, false, &view->sample) < 0) {
        return -1;
    }
    items->n = view->sample.n;
    if (ovlm_arg_i64(position, "position", items->n, false, &view->position) < 0 ||
        ovlm_arg_i64(length, "length", items->n, false, &view->length) < 0 ||
        ovlm_arg_i64(out_tokens, "out_tokens", items->n, false, &view->out_tokens) < 0 ||
        ovlm_arg_i64(bytes, "bytes", items->n, false, &view->bytes) < 0 ||
        ovlm_arg_f64(squares, "squares", items->n, true, false, &view->squares) < 0) {
        return -1;
    }
    items->sample = view->sample.data;
    items->position = view->position.data;
    items->length = view->length.data;
    items->out_tokens = view->out_tokens.data;
    items->bytes = view->bytes.data;
    items->squares = view->squares.data;
    return 0;
}

static int parse_phases(PyObject *tuple, step_view *view)
{
    if (!PyTuple_Check(tuple)) {
        PyErr_SetString(PyExc_TypeError, "phases is a tuple");
        return -1;
    }
    Py_ssize_t n = PyTuple_GET_SIZE(tuple);
    view->items = PyMem_RawCalloc((size_t)n + 1, sizeof *view->items);
    view->phase = PyMem_RawCalloc((size_t)n + 1, sizeof *view->phase);
    if (view->items == NULL || view->phase == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    view->problem.n_phases = n;
    view->problem.phase = view->phase;
    for (Py_ssize_t p = 0; p < n; p++) {
        if (parse_items(PyTuple_GetItem(tuple, p), &view->items[p], &view->phase[p]) < 0) {
            return -1;
        }
    }
    return 0;
}

/* (batch cost, (bytes_per_token, fixed_bytes)), or (sequence cost, pad_to, warm start or None) */
static int parse_llm(PyObject *tuple, step_view *view)
{
    ovlm_step_problem *problem = &view->problem;
    PyObject *cost, *pad_to, *warm;
    if (!PyTuple_Check(tuple)) {
        PyErr_SetString(PyExc_TypeError, "llm is a tuple");
        return -1;
    }
    problem->sequence_parallel = PyTuple_GET_SIZE(tuple) == 3;
    problem->pad_to = 1;
    if (!problem->sequence_parallel) {
        return ovlm_arg_tuple(tuple, "O(dd)", &cost, &problem->llm_memory_per_token,
                              &problem->llm_memory_fixed)
                   ? ovlm_arg_batch_cost(cost, &problem->llm_cost) : -1;
    }
    if (!ovlm_arg_tuple(tuple, "OOO", &cost, &pad_to, &warm) ||
        ovlm_arg_sequence_cost(cost, &problem->sequence_cost, &view->degrees, &view->comm) < 0 ||
        ovlm_arg_int(pad_to, "pad_to", &problem->pad_to) < 0) {
        return -1;
    }
    if (warm != Py_None) {
        problem->warm_start = &view->warm.plan;
        return ovlm_arg_sp_plan(warm, &view->warm);
    }
    return 0;
}

/* (n_ranks, gpus_per_node, memory_bytes, intra_bandwidth, inter_bandwidth, text_tokens,
 * source_rank,
 *  text_bytes_per_token, phases, llm, relabel, slack, compose, seed) */
static int parse_step(PyObject *tuple, step_view *view)
{
    ovlm_step_problem *problem = &view->problem;
    PyObject *n_ranks, *per_node, *text, *source, *phases, *llm, *seed;
    int relabel = 0, compose = 0;
    *view = (step_view){.problem = {0}};
    if (!PyTuple_Check(tuple)) {
        PyErr_SetString(PyExc_TypeError, "problem must be a tuple");
        return -1;
    }
    if (!ovlm_arg_tuple(tuple, "OOdddOOdOOidpO", &n_ranks, &per_node, &problem->memory_bytes,
                        &problem->intra_bandwidth, &problem->inter_bandwidth, &text, &source,
                        &problem->text_bytes_per_token, &phases, &llm, &relabel,
                        &problem->slack, &compose, &seed) ||
        ovlm_arg_int(n_ranks, "cluster.n_gpus", &problem->n_ranks) < 0 ||
        ovlm_arg_int(per_node, "cluster.gpus_per_node", &problem->gpus_per_node) < 0 ||
        ovlm_arg_seed(seed, "seed", &problem->seed) < 0 ||
        ovlm_arg_i64(text, "text_tokens", -1, false, &view->text_tokens) < 0 ||
        ovlm_arg_i64(source, "source_rank", view->text_tokens.n, false, &view->source_rank) < 0) {
        return -1;
    }
    problem->n = view->text_tokens.n;
    problem->text_tokens = view->text_tokens.data;
    problem->source_rank = view->source_rank.data;
    problem->relabel = (ovlm_relabel_mode)relabel;
    problem->compose = compose != 0;
    return parse_phases(phases, view) < 0 ? -1 : parse_llm(llm, view);
}

/* ------------------------------------------------------------------ step plans ----------- */

static PyObject *take_share(ovlm_step_share *share, int64_t n_ranks)
{
    return Py_BuildValue("(NNLNddddi)", ovlm_adopt_i64(&share->rank, share->n),
                         ovlm_adopt_i64(&share->micro, share->n), (long long)share->n_micro,
                         ovlm_adopt((void **)(void *)&share->loads, n_ranks, NPY_DOUBLE),
                         share->time, share->bound, share->sampled_time,
                         share->sampled_imbalance, (int)share->status);
}

static PyObject *traffic_tuple(const ovlm_traffic *traffic)
{
    return Py_BuildValue("(ddddd)", traffic->stay_bytes, traffic->node_bytes,
                         traffic->cross_bytes, traffic->worst_bytes, traffic->seconds);
}

/* (route, place or None, traffic before, traffic after) */
static PyObject *take_step_route(ovlm_step_route *route)
{
    int64_t k = route->route.k;
    PyObject *place = route->place ? ovlm_adopt_i64(&route->place, k) : Py_NewRef(Py_None);
    return Py_BuildValue("(NNNN)", ovlm_take_route(&route->route), place,
                         traffic_tuple(&route->before), traffic_tuple(&route->after));
}

/* A tuple of n results of make(index); NULL when one of them fails. */
typedef PyObject *(*plan_part)(ovlm_step_plan *plan, int64_t index);

static PyObject *collect(ovlm_step_plan *plan, int64_t n, plan_part make)
{
    PyObject *tuple = PyTuple_New((Py_ssize_t)n);
    for (int64_t i = 0; tuple != NULL && i < n; i++) {
        PyObject *part = make(plan, i);
        if (part == NULL) {
            Py_CLEAR(tuple);
        } else {
            PyTuple_SET_ITEM(tuple, (Py_ssize_t)i, part);
        }
    }
    return tuple;
}

static PyObject *share_part(ovlm_step_plan *plan, int64_t index)
{
    return take_share(&plan->share[index], plan->n_ranks);
}

static PyObject *relabel_part(ovlm_step_plan *plan, int64_t index)
{
    return relabel_tuple(&plan->relabel[index]);
}

/* text, then raw, back and to_llm of every phase */
static PyObject *route_part(ovlm_step_plan *plan, int64_t index)
{
    if (index == 0) {
        return take_step_route(&plan->text);
    }
    ovlm_step_route *kind[3] = {plan->raw, plan->back, plan->to_llm};
    return take_step_route(&kind[(index - 1) % 3][(index - 1) / 3]);
}

static PyObject *take_plan(ovlm_step_plan *plan)
{
    PyObject *sequences = plan->sequences ? ovlm_new_sp_plan(plan->sequences) : Py_NewRef(Py_None);
    return Py_BuildValue("(NNNNdddO)", collect(plan, plan->n_phases + 1, share_part), sequences,
                         collect(plan, 1 + 3 * plan->n_phases, route_part),
                         collect(plan, plan->n_phases + 1, relabel_part), plan->exposed_s,
                         plan->time, plan->bound, plan->cut_short ? Py_True : Py_False);
}

PyDoc_STRVAR(step_solve_doc,
             "step_solve(problem, work_limit, time_limit, /)\n--\n\nA step plan as a tuple.");

static PyObject *step_solve(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    step_view view = {.problem = {0}};
    ovlm_budget budget;
    PyObject *answer = NULL;
    if (ovlm_arg_count("step_solve", nargs, 3) < 0 ||
        ovlm_arg_budget(args[1], args[2], &budget) < 0) {
        return NULL;
    }
    if (parse_step(args[0], &view) == 0) {
        ovlm_step_plan *plan = NULL;
        ovlm_err err = {0};
        ovlm_status status;
        Py_BEGIN_ALLOW_THREADS
        status = ovlm_step_solve(&view.problem, &budget, &plan, &err);
        Py_END_ALLOW_THREADS
        answer = status == OVLM_OK ? take_plan(plan) : ovlm_raise(module, &err);
        ovlm_step_plan_free(plan);
    }
    release_step(&view);
    return answer;
}

/* Copies one phase's decisions: (rank, micro, n_micro, bound). */
static int parse_decision(PyObject *tuple, ovlm_step_share *share)
{
    PyObject *rank, *micro;
    ovlm_i64_view ranks = {0}, micros = {0};
    long long n_micro = 0;
    int bad = -1;
    if (PyTuple_Check(tuple) &&
        ovlm_arg_tuple(tuple, "OOLd", &rank, &micro, &n_micro, &share->bound) &&
        ovlm_arg_i64(rank, "rank", share->n, false, &ranks) == 0 &&
        ovlm_arg_i64(micro, "micro_batch", share->n, false, &micros) == 0) {
        memcpy(share->rank, ranks.data, (size_t)share->n * sizeof *share->rank);
        memcpy(share->micro, micros.data, (size_t)share->n * sizeof *share->micro);
        share->n_micro = n_micro;
        bad = 0;
    }
    if (bad && !PyErr_Occurred()) {
        PyErr_SetString(PyExc_TypeError, "decisions are tuples of 4 fields");
    }
    Py_CLEAR(ranks.owner);
    Py_CLEAR(micros.owner);
    return bad;
}

PyDoc_STRVAR(step_rebuild_doc,
             "step_rebuild(problem, decisions, sequences, /)\n--\n\n"
             "The plan that follows from decisions, checked, as step_solve's tuple.");

static PyObject *step_rebuild(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    step_view view = {.problem = {0}};
    ovlm_sp_plan_view sequences = {0};
    ovlm_step_plan *plan = NULL;
    ovlm_err err = {0};
    PyObject *answer = NULL;
    if (ovlm_arg_count("step_rebuild", nargs, 3) < 0 || parse_step(args[0], &view) < 0) {
        goto done;
    }
    ovlm_status status;
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_step_plan_init(&view.problem, &plan, &err);
    Py_END_ALLOW_THREADS
    if (status != OVLM_OK) {
        ovlm_raise(module, &err);
        goto done;
    }
    if (!PyTuple_Check(args[1]) || PyTuple_GET_SIZE(args[1]) != plan->n_phases + 1) {
        PyErr_SetString(PyExc_TypeError, "one decision per phase");
        goto done;
    }
    for (int64_t p = 0; p <= plan->n_phases; p++) {
        if (parse_decision(PyTuple_GetItem(args[1], (Py_ssize_t)p), &plan->share[p]) < 0) {
            goto done;
        }
    }
    if (args[2] != Py_None) {
        if (ovlm_arg_sp_plan(args[2], &sequences) < 0) {
            goto done;
        }
        plan->sequences = &sequences.plan;
    }
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_step_plan_rebuild(&view.problem, plan, &err);
    if (status == OVLM_OK) {
        status = ovlm_step_plan_check(&view.problem, plan, &err);
    }
    Py_END_ALLOW_THREADS
    answer = status == OVLM_OK ? take_plan(plan) : ovlm_raise(module, &err);
done:
    if (plan != NULL) {
        plan->sequences = NULL; /* borrowed from the view */
    }
    ovlm_step_plan_free(plan);
    ovlm_sp_plan_release(&sequences);
    release_step(&view);
    return answer;
}

#define METHOD(name) \
    {#name, (PyCFunction)(void (*)(void))(name), METH_FASTCALL, name##_doc}

PyMethodDef ovlm_step_methods[] = {
    METHOD(relabel_solve),
    METHOD(step_solve),
    METHOD(step_rebuild),
    {NULL, NULL, 0, NULL},
};
