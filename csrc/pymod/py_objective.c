/* py_objective.c - the pre-training losses of a vision encoder, on arrays. */
#include "py_model.h"

#include "cpu/cpu.h"
#include "model/objective.h"

/* Where products run: on a model's device, or on a CPU backend that lives for the call. */
typedef struct place {
    model_object *model;
    int64_t threads;
} place;

static int read_place(PyObject *module, PyObject *threads, PyObject *model, place *out)
{
    if (ovlm_arg_int(threads, "threads", &out->threads) < 0) {
        return -1;
    }
    if (model == Py_None) {
        return 0;
    }
    out->model = (model_object *)ovlm_instance_of(module, "Model", model);
    return out->model == NULL ? -1 : 0;
}

typedef ovlm_status (*run_fn)(ovlm_queue *queue, void *args, ovlm_err *err);

static ovlm_status run_on_cpu(ovlm_dtype dtype, int64_t threads, run_fn run, void *args,
                              ovlm_err *err)
{
    const ovlm_ops *ops = ovlm_cpu_ops_find(dtype == OVLM_F64 ? "ref" : "cpu");
    ovlm_backend *backend = NULL;
    ovlm_queue *queue = NULL;
    OVLM_TRY(ops->open(&(ovlm_backend_options){.threads = threads}, &backend, err));
    ovlm_status status = ops->queue_open(backend, &queue, err);
    if (status == OVLM_OK) {
        status = run(queue, args, err);
        ops->queue_close(queue);
    }
    ops->close(backend);
    return status;
}

/* Without the GIL; -1 with the exception. */
static int run_at(PyObject *module, const place *at, ovlm_dtype dtype, run_fn run, void *args)
{
    ovlm_err err = {0};
    ovlm_status status;
    if (at->model != NULL && ovlm_model_enter(at->model) < 0) {
        return -1;
    }
    Py_BEGIN_ALLOW_THREADS
    status = at->model != NULL ? run(ovlm_model_queue(at->model->model), args, &err)
                               : run_on_cpu(dtype, at->threads, run, args, &err);
    Py_END_ALLOW_THREADS
    if (at->model != NULL) {
        at->model->busy = false;
    }
    if (status != OVLM_OK) {
        ovlm_raise(module, &err);
        return -1;
    }
    return 0;
}

/* A matrix of float32 or float64; the first one's type is the call's. */
static int read_matrix(PyObject *object, const char *name, ovlm_dtype *dtype, ovlm_features *out)
{
    int type = PyArray_Check(object) ? PyArray_TYPE((PyArrayObject *)object) : -1;
    if (*dtype == OVLM_DTYPE_COUNT) {
        *dtype = type == NPY_FLOAT64 ? OVLM_F64 : OVLM_F32;
    }
    if (ovlm_arg_exact(object, name, *dtype == OVLM_F64 ? NPY_FLOAT64 : NPY_FLOAT32, -1, false,
                       &out->data, NULL) < 0) {
        return -1;
    }
    if (PyArray_NDIM((PyArrayObject *)object) != 2 ||
        PyArray_DIM((PyArrayObject *)object, 1) < 1) {
        PyErr_Format(PyExc_ValueError, "%s must be a matrix with columns", name);
        return -1;
    }
    out->rows = (int64_t)PyArray_DIM((PyArrayObject *)object, 0);
    out->cols = (int64_t)PyArray_DIM((PyArrayObject *)object, 1);
    return 0;
}

static int same_columns(const ovlm_features *a, const ovlm_features *b, const char *name)
{
    if (a->cols != b->cols) {
        PyErr_Format(PyExc_ValueError, "%s must have %lld columns; got %lld", name,
                     (long long)a->cols, (long long)b->cols);
        return -1;
    }
    return 0;
}

/* An array for the gradient, of the same shape. */
static PyObject *new_slope(ovlm_features *features, ovlm_dtype dtype)
{
    npy_intp dims[] = {(npy_intp)features->rows, (npy_intp)features->cols};
    PyObject *array = PyArray_SimpleNew(2, dims, dtype == OVLM_F64 ? NPY_FLOAT64 : NPY_FLOAT32);
    if (array != NULL) {
        features->slope = PyArray_DATA((PyArrayObject *)array);
    }
    return array;
}

/* A number above 0. */
static int read_positive(PyObject *object, const char *name, double *out)
{
    if (ovlm_arg_double(object, name, out) < 0) {
        return -1;
    }
    if (!(*out > 0)) {
        PyErr_Format(PyExc_ValueError, "%s must be positive; got %R", name, object);
        return -1;
    }
    return 0;
}

/* masked_cosine(student, teacher, masked uint8, total) -> (loss, dstudent) */
static PyObject *masked_cosine(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    ovlm_masked_cosine a = {.dtype = OVLM_DTYPE_COUNT};
    ovlm_features teacher = {0};
    const void *masked = NULL;
    if (ovlm_arg_count("masked_cosine", nargs, 4) < 0 ||
        read_matrix(args[0], "student", &a.dtype, &a.student) < 0 ||
        read_matrix(args[1], "teacher", &a.dtype, &teacher) < 0 ||
        same_columns(&a.student, &teacher, "teacher") < 0 ||
        ovlm_arg_exact(args[2], "masked", NPY_UINT8, a.student.rows, false, &masked, NULL) < 0 ||
        read_positive(args[3], "total", &a.total) < 0) {
        return NULL;
    }
    if (teacher.rows != a.student.rows) {
        PyErr_Format(PyExc_ValueError, "teacher must have %lld rows, as student; got %lld",
                     (long long)a.student.rows, (long long)teacher.rows);
        return NULL;
    }
    a.teacher = teacher.data;
    a.masked = masked;
    PyObject *slope = new_slope(&a.student, a.dtype);
    if (slope == NULL) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    ovlm_masked_cosine_run(&a);
    Py_END_ALLOW_THREADS
    return Py_BuildValue("(dN)", a.loss, slope);
}

static ovlm_status run_siglip(ovlm_queue *queue, void *args, ovlm_err *err)
{
    return ovlm_siglip_run(queue, args, err);
}

/* siglip(image, text, offset, scale, bias, total, threads, Model or None)
 *     -> (loss, dimage, dtext, dscale, dbias) */
static PyObject *siglip(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    ovlm_siglip a = {.dtype = OVLM_DTYPE_COUNT};
    place at = {0};
    if (ovlm_arg_count("siglip", nargs, 8) < 0 ||
        read_matrix(args[0], "image", &a.dtype, &a.image) < 0 ||
        read_matrix(args[1], "text", &a.dtype, &a.text) < 0 ||
        same_columns(&a.image, &a.text, "text") < 0 ||
        ovlm_arg_int(args[2], "offset", &a.offset) < 0 ||
        ovlm_arg_double(args[3], "scale", &a.scale) < 0 ||
        ovlm_arg_double(args[4], "bias", &a.bias) < 0 ||
        read_positive(args[5], "total", &a.total) < 0 ||
        read_place(module, args[6], args[7], &at) < 0) {
        return NULL;
    }
    if (a.offset < 0 || a.offset > a.text.rows - a.image.rows) {
        PyErr_Format(PyExc_ValueError, "offset must be in 0 .. %lld, so that each of %lld images "
                     "has its text among %lld; got %lld",
                     (long long)(a.text.rows - a.image.rows), (long long)a.image.rows,
                     (long long)a.text.rows, (long long)a.offset);
        return NULL;
    }
    PyObject *dimage = new_slope(&a.image, a.dtype), *dtext = new_slope(&a.text, a.dtype);
    PyObject *answer = NULL;
    if (dimage != NULL && dtext != NULL && run_at(module, &at, a.dtype, run_siglip, &a) == 0) {
        answer = Py_BuildValue("(dOOdd)", a.loss, dimage, dtext, a.dscale, a.dbias);
    }
    Py_XDECREF(dimage);
    Py_XDECREF(dtext);
    return answer;
}

/* Segments of tokens, in the vocabulary. */
static int check_tokens(const ovlm_superclass *a, int64_t starts, int64_t tokens)
{
    bool fits = starts == a->feature.rows + 1 && a->start[0] == 0 &&
                a->start[a->feature.rows] == tokens;
    for (int64_t i = 0; fits && i < a->feature.rows; i++) {
        fits = a->start[i] <= a->start[i + 1];
    }
    for (int64_t i = 0; fits && i < tokens; i++) {
        fits = a->token[i] >= 0 && a->token[i] < a->weight.rows;
    }
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "start and token must be segments of classes, one per "
                                          "feature");
    }
    return fits ? 0 : -1;
}

static int read_superclass(PyObject *const *args, ovlm_superclass *a)
{
    const void *start = NULL, *token = NULL, *share = NULL;
    int64_t starts = 0, tokens = 0;
    if (read_matrix(args[0], "feature", &a->dtype, &a->feature) < 0 ||
        read_matrix(args[1], "weight", &a->dtype, &a->weight) < 0 ||
        same_columns(&a->feature, &a->weight, "weight") < 0 ||
        ovlm_arg_exact(args[2], "start", NPY_INT64, -1, false, &start, &starts) < 0 ||
        ovlm_arg_exact(args[3], "token", NPY_INT32, -1, false, &token, &tokens) < 0 ||
        ovlm_arg_exact(args[4], "share", NPY_FLOAT64, tokens, false, &share, NULL) < 0 ||
        read_positive(args[5], "total", &a->total) < 0) {
        return -1;
    }
    a->start = start;
    a->token = token;
    a->share = share;
    return check_tokens(a, starts, tokens);
}

static ovlm_status run_superclass(ovlm_queue *queue, void *args, ovlm_err *err)
{
    return ovlm_superclass_run(queue, args, err);
}

/* superclass(feature, weight, start int64, token int32, share float64, total, threads,
 *            Model or None)
 *     -> (loss, dfeature, dweight) */
static PyObject *superclass(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    ovlm_superclass a = {.dtype = OVLM_DTYPE_COUNT};
    place at = {0};
    if (ovlm_arg_count("superclass", nargs, 8) < 0 || read_superclass(args, &a) < 0 ||
        read_place(module, args[6], args[7], &at) < 0) {
        return NULL;
    }
    PyObject *dfeature = new_slope(&a.feature, a.dtype), *dweight = new_slope(&a.weight, a.dtype);
    PyObject *answer = NULL;
    if (dfeature != NULL && dweight != NULL &&
        run_at(module, &at, a.dtype, run_superclass, &a) == 0) {
        answer = Py_BuildValue("(dOO)", a.loss, dfeature, dweight);
    }
    Py_XDECREF(dfeature);
    Py_XDECREF(dweight);
    return answer;
}

#define FUNCTION(name) {#name, (PyCFunction)(void (*)(void))(name), METH_FASTCALL, NULL}

PyMethodDef ovlm_objective_methods[] = {
    FUNCTION(masked_cosine),
    FUNCTION(siglip),
    FUNCTION(superclass),
    {NULL, NULL, 0, NULL},
};
