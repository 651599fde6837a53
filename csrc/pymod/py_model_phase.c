/* py_model_phase.c - orchvlm._core.Model: the phases one by one, what lies between them, and the
 * backwards. */
#include "py_sequence_group.h"

static PyObject *new_rows(const model_object *self, int64_t rows, int64_t cols)
{
    npy_intp dims[] = {(npy_intp)rows, (npy_intp)cols};
    return PyArray_SimpleNew(2, dims, self->exact);
}

/* Features of a modality or their gradients, [rows,width]; None where rows < 0.  Of images, too,
 * extra [deepstack_n,rows,width]; None without DeepStack. */
static PyObject *new_features(const model_object *self, int64_t rows, void **data)
{
    if (rows < 0) {
        Py_RETURN_NONE;
    }
    PyObject *array = new_rows(self, rows, ovlm_model_params(self->model)->config.decoder.width);
    *data = array == NULL ? NULL : PyArray_DATA((PyArrayObject *)array);
    return array;
}

static PyObject *new_extra(const model_object *self, int64_t rows, void **data)
{
    const ovlm_model_config *c = &ovlm_model_params(self->model)->config;
    npy_intp dims[] = {(npy_intp)c->vision.deepstack_n, (npy_intp)rows,
                       (npy_intp)c->decoder.width};
    if (rows < 0 || dims[0] == 0) {
        Py_RETURN_NONE;
    }
    PyObject *array = PyArray_SimpleNew(3, dims, self->exact);
    *data = array == NULL ? NULL : PyArray_DATA((PyArrayObject *)array);
    return array;
}

/* `answer`, or NULL when leaving raised. */
static PyObject *leave_with(model_object *self, PyTypeObject *type, ovlm_status status,
                            const ovlm_err *err, PyObject *answer)
{
    PyObject *none = ovlm_model_leave(self, type, status, err);
    if (none == NULL) {
        Py_CLEAR(answer);
    }
    Py_XDECREF(none);
    return answer;
}

/* 0: vision, 1: audio. */
static int read_modality(PyObject *object, ovlm_modality *modality)
{
    int64_t number = 0;
    if (ovlm_arg_int(object, "modality", &number) < 0) {
        return -1;
    }
    if (number < 0 || number >= OVLM_MODALITIES) {
        PyErr_Format(PyExc_ValueError, "modality must be 0 or 1; got %lld", (long long)number);
        return -1;
    }
    *modality = (ovlm_modality)number;
    return 0;
}

/* Reads what the encode made, into new arrays: (features, extra or None). */
static PyObject *read_features(model_object *self, ovlm_modality modality, ovlm_status *status,
                               ovlm_err *err)
{
    const int64_t rows = ovlm_model_encoded_rows(self->model, modality);
    void *features = NULL, *extra = NULL;
    PyObject *first = new_features(self, rows, &features);
    PyObject *second = new_extra(self, modality == OVLM_VISION ? rows : -1, &extra);
    PyObject *pair = first == NULL || second == NULL ? NULL : PyTuple_Pack(2, first, second);
    Py_XDECREF(first);
    Py_XDECREF(second);
    if (pair != NULL) {
        Py_BEGIN_ALLOW_THREADS
        *status = ovlm_model_features_read(self->model, modality, features, extra, err);
        Py_END_ALLOW_THREADS
    }
    return pair;
}

/* encode(modality, grid or mel lengths, pixels or mel, training, checkpoint, vision taps)
 *     -> (features, extra or None) */
PyObject *ovlm_py_model_encode(PyObject *object, PyTypeObject *type, PyObject *const *args,
                               Py_ssize_t nargs, PyObject *kwnames)
{
    (void)kwnames;
    model_object *self = (model_object *)object;
    ovlm_model_inputs in = {0};
    ovlm_pass_options options = {.poll = ovlm_poll_signals};
    ovlm_modality modality = OVLM_VISION;
    int64_t checkpoint = 0;
    int training = 0;
    if (ovlm_arg_count("encode", nargs, 6) < 0 || read_modality(args[0], &modality) < 0 ||
        (modality == OVLM_VISION ? ovlm_arg_images : ovlm_arg_sounds)(self, args[1], args[2],
                                                                      &in) < 0 ||
        (training = PyObject_IsTrue(args[3])) < 0 ||
        ovlm_arg_int(args[4], "checkpoint", &checkpoint) < 0 ||
        ovlm_arg_taps(args[5], "taps", &options.vision_taps) < 0 || ovlm_model_enter(self) < 0) {
        return NULL;
    }
    options.training = training != 0;
    options.checkpoint = ovlm_checkpoint_of(checkpoint);
    PyObject *pair = NULL;
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_model_encode(self->model, modality, &in, &options, &err);
    Py_END_ALLOW_THREADS
    if (status == OVLM_OK && (pair = read_features(self, modality, &status, &err)) == NULL) {
        self->busy = false;
        return NULL;
    }
    return leave_with(self, type, status, &err, pair);
}

/* encode_backward(modality, dfeatures or None, dextra or None) */
PyObject *ovlm_py_model_encode_backward(PyObject *object, PyTypeObject *type,
                                        PyObject *const *args, Py_ssize_t nargs,
                                        PyObject *kwnames)
{
    (void)kwnames;
    model_object *self = (model_object *)object;
    const ovlm_model_config *c = &ovlm_model_params(self->model)->config;
    const void *dfeatures = NULL, *dextra = NULL;
    ovlm_modality modality = OVLM_VISION;
    if (ovlm_arg_count("encode_backward", nargs, 3) < 0 ||
        read_modality(args[0], &modality) < 0) {
        return NULL;
    }
    int64_t rows = ovlm_model_encoded_rows(self->model, modality);
    int64_t numbers = rows < 0 ? -1 : rows * c->decoder.width;
    if (ovlm_arg_exact(args[1], "dfeatures", self->exact, numbers, true, &dfeatures, NULL) < 0 ||
        ovlm_arg_exact(args[2], "dextra", self->exact,
                       rows < 0 ? -1 : c->vision.deepstack_n * numbers, true, &dextra, NULL) < 0 ||
        ovlm_model_enter(self) < 0) {
        return NULL;
    }
    const ovlm_pass_options options = {.poll = ovlm_poll_signals};
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_model_encode_backward(self->model, modality, dfeatures, dextra, &options, &err);
    Py_END_ALLOW_THREADS
    return ovlm_model_leave(self, type, status, &err);
}

/* hidden() -> [T,width] after the last norm */
PyObject *ovlm_py_model_hidden(PyObject *object, PyTypeObject *type, PyObject *const *args,
                               Py_ssize_t nargs, PyObject *kwnames)
{
    (void)kwnames;
    (void)args;
    model_object *self = (model_object *)object;
    if (ovlm_arg_count("hidden", nargs, 0) < 0) {
        return NULL;
    }
    PyObject *hidden = new_rows(self, ovlm_model_token_count(self->model),
                                ovlm_model_params(self->model)->config.decoder.width);
    if (hidden == NULL || ovlm_model_enter(self) < 0) {
        Py_XDECREF(hidden);
        return NULL;
    }
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    void *data = PyArray_DATA((PyArrayObject *)hidden);
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_model_hidden_read(self->model, data, &err);
    Py_END_ALLOW_THREADS
    return leave_with(self, type, status, &err, hidden);
}

/* tap(vision, number) -> [T,width] of the decoder or [P,width] of the tower */
PyObject *ovlm_py_model_tap(PyObject *object, PyTypeObject *type, PyObject *const *args,
                            Py_ssize_t nargs, PyObject *kwnames)
{
    (void)kwnames;
    model_object *self = (model_object *)object;
    int64_t number = 0;
    int vision = 0;
    if (ovlm_arg_count("tap", nargs, 2) < 0 || (vision = PyObject_IsTrue(args[0])) < 0 ||
        ovlm_arg_int(args[1], "number", &number) < 0 || ovlm_model_enter(self) < 0) {
        return NULL;
    }
    const ovlm_tensor *tap = ovlm_model_tap(self->model, vision != 0, number);
    PyObject *state = tap == NULL ? new_rows(self, 0, 0) : new_rows(self, tap->rows, tap->cols);
    if (state == NULL) {
        self->busy = false;
        return NULL;
    }
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    void *data = PyArray_DATA((PyArrayObject *)state);
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_model_tap_read(self->model, vision != 0, number, data, &err);
    Py_END_ALLOW_THREADS
    return leave_with(self, type, status, &err, state);
}

/* dlogits [len(rows),V] and rows, both or neither. */
static int read_logit_slopes(const model_object *self, PyObject *const *args,
                             ovlm_model_slopes *slopes)
{
    const void *row = NULL, *dlogits = NULL;
    int64_t V = ovlm_model_params(self->model)->config.decoder.vocab;
    if (ovlm_arg_exact(args[0], "rows", NPY_INT32, -1, true, &row, &slopes->rows) < 0 ||
        ovlm_arg_exact(args[1], "dlogits", NPY_FLOAT32, slopes->rows * V, true, &dlogits, NULL) <
            0) {
        return -1;
    }
    if ((row == NULL) != (dlogits == NULL)) {
        PyErr_SetString(PyExc_ValueError, "dlogits and rows belong together; one is missing");
        return -1;
    }
    slopes->row = row;
    slopes->dlogits = dlogits;
    return 0;
}

/* (dfeatures or None, dextra or None) and, of a model that hears, dsounds or None; None when no
 * features were given. */
static PyObject *new_slopes(const model_object *self, ovlm_feature_slopes *d)
{
    const int64_t images = ovlm_model_given_rows(self->model, OVLM_VISION);
    const int64_t sounds = ovlm_model_given_rows(self->model, OVLM_AUDIO);
    if (images < 0 && sounds < 0) {
        Py_RETURN_NONE;
    }
    PyObject *one = new_features(self, images, &d->dfeatures[OVLM_VISION]);
    PyObject *two = new_extra(self, images, &d->dextra);
    PyObject *three = new_features(self, sounds, &d->dfeatures[OVLM_AUDIO]), *answer = NULL;
    if (one != NULL && two != NULL && three != NULL) {
        bool hears = ovlm_model_params(self->model)->config.audio.depth > 0;
        answer = hears ? PyTuple_Pack(3, one, two, three) : PyTuple_Pack(2, one, two);
    }
    Py_XDECREF(one);
    Py_XDECREF(two);
    Py_XDECREF(three);
    return answer;
}

/* backward(dlogp, dentropy, dhidden, rows, dlogits), each or None -> as new_slopes */
PyObject *ovlm_py_model_backward(PyObject *object, PyTypeObject *type, PyObject *const *args,
                                 Py_ssize_t nargs, PyObject *kwnames)
{
    (void)kwnames;
    model_object *self = (model_object *)object;
    const void *dlogp = NULL, *dentropy = NULL;
    ovlm_model_slopes slopes = {0};
    const int64_t T = ovlm_model_token_count(self->model);
    const int64_t labels = ovlm_model_label_count(self->model);
    const int64_t width = ovlm_model_params(self->model)->config.decoder.width;
    if (ovlm_arg_count("backward", nargs, 5) < 0 ||
        ovlm_arg_exact(args[0], "dlogprobs", NPY_FLOAT32, labels, true, &dlogp, NULL) < 0 ||
        ovlm_arg_exact(args[1], "dentropy", NPY_FLOAT32, labels, true, &dentropy, NULL) < 0 ||
        ovlm_arg_exact(args[2], "dhidden", self->exact, T * width, true, &slopes.dhidden, NULL) <
            0 ||
        read_logit_slopes(self, args + 3, &slopes) < 0) {
        return NULL;
    }
    slopes.dlogp = dlogp;
    slopes.dentropy = dentropy;
    ovlm_feature_slopes dfeatures = {0};
    PyObject *answer = new_slopes(self, &dfeatures);
    sequence_group_object *group = (sequence_group_object *)self->sequence;
    if (answer == NULL || ovlm_model_enter_with(self, group) < 0) {
        Py_XDECREF(answer);
        return NULL;
    }
    const ovlm_pass_options options = {.poll = ovlm_poll_signals};
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_model_backward(self->model, &slopes, &dfeatures, &options, &err);
    Py_END_ALLOW_THREADS
    ovlm_sequence_group_leave(group);
    return leave_with(self, type, status, &err, answer);
}

/* ---------------------------------------------------------------- trace */

PyObject *ovlm_py_model_trace_start(PyObject *object, PyTypeObject *type, PyObject *const *args,
                                    Py_ssize_t nargs, PyObject *kwnames)
{
    (void)kwnames;
    (void)args;
    (void)type;
    model_object *self = (model_object *)object;
    if (ovlm_arg_count("trace_start", nargs, 0) < 0 || ovlm_model_enter(self) < 0) {
        return NULL;
    }
    ovlm_model_trace_start(self->model);
    self->busy = false;
    Py_RETURN_NONE;
}

/* trace_stop() -> [(name, index, start_s, end_s), ...], in the order in which they ended */
PyObject *ovlm_py_model_trace_stop(PyObject *object, PyTypeObject *type, PyObject *const *args,
                                   Py_ssize_t nargs, PyObject *kwnames)
{
    (void)kwnames;
    (void)args;
    (void)type;
    model_object *self = (model_object *)object;
    if (ovlm_arg_count("trace_stop", nargs, 0) < 0 || ovlm_model_enter(self) < 0) {
        return NULL;
    }
    ovlm_trace trace = {0};
    ovlm_model_trace_stop(self->model, &trace);
    self->busy = false;
    PyObject *list = PyList_New((Py_ssize_t)trace.n);
    for (int64_t i = 0; list != NULL && i < trace.n; i++) {
        const ovlm_trace_event *event = &trace.event[i];
        PyObject *row = Py_BuildValue("(sLdd)", event->name, (long long)event->index,
                                      event->start_s, event->end_s);
        if (row == NULL) {
            Py_CLEAR(list);
            break;
        }
        PyList_SET_ITEM(list, (Py_ssize_t)i, row);
    }
    ovlm_trace_free(&trace);
    return list;
}
