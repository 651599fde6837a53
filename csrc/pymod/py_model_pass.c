/* py_model_pass.c - orchvlm._core.Model: passes, optimizer, generation. */
#include "py_sequence_group.h"

int ovlm_poll_signals(void *ctx)
{
    (void)ctx;
    PyGILState_STATE gil = PyGILState_Ensure();
    int stop = PyErr_CheckSignals();
    PyGILState_Release(gil);
    return stop;
}

/* The arguments of forward and extend, positions in their vector. */
enum {
    IDS, CU_SEQLENS, POSITION, FEATURE_ROW, LABELS, WEIGHTS, GRID, PIXELS, MEL_LENGTHS, MEL,
    N_TOKEN_ARGS,
    NORMALIZER = N_TOKEN_ARGS, ROUTER_COUNT, ROUTER_ROWS, TRAINING, ENTROPY, CHECKPOINT,
    FEATURES, EXTRA, SOUNDS, OWN_LOSS, TAPS, VISION_TAPS, SEQUENCE, N_FORWARD_ARGS
};

int ovlm_arg_images(const model_object *self, PyObject *grid_thw, PyObject *pixels,
                    ovlm_model_inputs *in)
{
    const ovlm_vision_config *c = &ovlm_model_params(self->model)->config.vision;
    const void *grid = NULL;
    int64_t n = 0, patches = 0;
    if (ovlm_arg_exact(grid_thw, "grid_thw", NPY_INT32, -1, true, &grid, &n) < 0) {
        return -1;
    }
    if (grid == NULL) {
        return 0;
    }
    if (n % 3 != 0) {
        PyErr_SetString(PyExc_ValueError, "grid_thw must have three numbers per image");
        return -1;
    }
    in->images = n / 3;
    in->grid_thw = grid;
    for (int64_t i = 0; i < in->images; i++) {
        const int32_t *g = in->grid_thw + 3 * i;
        if (g[0] < 1 || g[1] < 1 || g[2] < 1 ||
            (int64_t)g[1] * g[2] > (INT32_MAX - patches) / g[0]) {
            PyErr_Format(PyExc_ValueError, "grid_thw[%lld] = (%d, %d, %d) is no grid",
                         (long long)i, g[0], g[1], g[2]);
            return -1;
        }
        patches += (int64_t)g[0] * g[1] * g[2];
    }
    bool bytes = PyArray_Check(pixels) && PyArray_TYPE((PyArrayObject *)pixels) == NPY_UINT8;
    in->pixel_dtype = bytes ? OVLM_U8 : OVLM_F32;
    return ovlm_arg_exact(pixels, "pixels", bytes ? NPY_UINT8 : NPY_FLOAT32,
                          patches * c->channels * c->temporal * c->patch * c->patch, false,
                          &in->pixels, NULL);
}

int ovlm_arg_sounds(const model_object *self, PyObject *lengths, PyObject *mel,
                    ovlm_model_inputs *in)
{
    const ovlm_audio_config *c = &ovlm_model_params(self->model)->config.audio;
    const void *length = NULL, *frame = NULL;
    int64_t n = 0, frames = 0;
    if (ovlm_arg_exact(lengths, "mel_lengths", NPY_INT32, -1, true, &length, &n) < 0) {
        return -1;
    }
    if (length == NULL) {
        return 0;
    }
    in->sounds = n;
    in->mel_length = length;
    for (int64_t i = 0; i < n; i++) {
        if (in->mel_length[i] < 1) {
            PyErr_Format(PyExc_ValueError, "mel_lengths[%lld] must be >= 1; got %d", (long long)i,
                         in->mel_length[i]);
            return -1;
        }
        frames += in->mel_length[i];
    }
    /* Without a tower bins is 0: the model refuses sounds before it looks at them. */
    if (ovlm_arg_exact(mel, "mel", NPY_FLOAT32, c->depth > 0 ? frames * c->bins : -1, false,
                       &frame, NULL) < 0) {
        return -1;
    }
    in->mel = frame;
    return 0;
}

/* shard: labels and weights have one entry more. */
static int read_tokens(const model_object *self, PyObject *const *args, bool shard,
                       ovlm_model_inputs *in)
{
    const void *ids = NULL, *start = NULL, *position = NULL, *feature = NULL, *label = NULL;
    const void *weight = NULL;
    int64_t T = 0, starts = 0;
    if (ovlm_arg_exact(args[IDS], "input_ids", NPY_INT32, -1, false, &ids, &T) < 0 ||
        ovlm_arg_exact(args[CU_SEQLENS], "cu_seqlens", NPY_INT32, -1, false, &start, &starts) < 0 ||
        ovlm_arg_exact(args[POSITION], "position_ids", NPY_FLOAT32, 3 * T, false, &position,
                       NULL) < 0 ||
        ovlm_arg_exact(args[FEATURE_ROW], "feature_row", NPY_INT32, T, true, &feature, NULL) < 0 ||
        ovlm_arg_exact(args[LABELS], "labels", NPY_INT32, T + shard, true, &label, NULL) < 0 ||
        ovlm_arg_exact(args[WEIGHTS], "weights", NPY_FLOAT32, T + shard, true, &weight, NULL) <
            0) {
        return -1;
    }
    if (starts < 1 || T > INT32_MAX) {
        PyErr_SetString(PyExc_ValueError, starts < 1 ? "cu_seqlens must have at least one entry"
                                                     : "more than 2^31 - 1 tokens in one call");
        return -1;
    }
    in->tokens = (ovlm_tokens){.T = T, .segments = starts - 1, .id = ids, .start = start,
                               .position = position, .feature_row = feature};
    in->label = label;
    in->weight = weight;
    in->normalizer = -1;
    return ovlm_arg_images(self, args[GRID], args[PIXELS], in) < 0
               ? -1
               : ovlm_arg_sounds(self, args[MEL_LENGTHS], args[MEL], in);
}

/* Features [rows,width], or None. */
static int read_given(const model_object *self, PyObject *object, const char *name,
                      ovlm_modality modality, ovlm_model_inputs *in)
{
    const int64_t width = ovlm_model_params(self->model)->config.decoder.width;
    int64_t n = 0;
    if (ovlm_arg_exact(object, name, self->exact, -1, true, &in->given[modality].features, &n) <
        0) {
        return -1;
    }
    if (n % width != 0) {
        PyErr_Format(PyExc_ValueError, "%s must have rows of %lld numbers", name,
                     (long long)width);
        return -1;
    }
    in->given[modality].rows = n / width;
    return 0;
}

/* Those of images and of sounds, and extra [deepstack_n,rows,width], or None. */
static int read_features(const model_object *self, PyObject *const *args, ovlm_model_inputs *in)
{
    const ovlm_model_config *c = &ovlm_model_params(self->model)->config;
    if (read_given(self, args[FEATURES], "features", OVLM_VISION, in) < 0 ||
        read_given(self, args[SOUNDS], "sounds", OVLM_AUDIO, in) < 0) {
        return -1;
    }
    return ovlm_arg_exact(args[EXTRA], "extra", self->exact,
                          c->vision.deepstack_n * in->given[OVLM_VISION].rows * c->decoder.width,
                          true, &in->extra, NULL);
}

ovlm_checkpoint ovlm_checkpoint_of(int64_t number)
{
    return number < 1   ? OVLM_CHECKPOINT_NONE
           : number > 1 ? OVLM_CHECKPOINT_FULL
                        : OVLM_CHECKPOINT_SELECTIVE;
}

int ovlm_arg_taps(PyObject *object, const char *name, ovlm_tap_list *list)
{
    const void *entry = NULL;
    if (ovlm_arg_exact(object, name, NPY_INT32, -1, true, &entry, &list->n) < 0) {
        return -1;
    }
    list->entry = entry;
    return 0;
}

static int read_options(PyObject *const *args, ovlm_pass_options *options)
{
    int64_t checkpoint = 0;
    int training = PyObject_IsTrue(args[TRAINING]), entropy = PyObject_IsTrue(args[ENTROPY]);
    int own_loss = PyObject_IsTrue(args[OWN_LOSS]);
    if (training < 0 || entropy < 0 || own_loss < 0 ||
        ovlm_arg_int(args[CHECKPOINT], "checkpoint", &checkpoint) < 0 ||
        ovlm_arg_taps(args[TAPS], "taps", &options->taps) < 0 ||
        ovlm_arg_taps(args[VISION_TAPS], "vision_taps", &options->vision_taps) < 0) {
        return -1;
    }
    options->training = training != 0;
    options->entropy = entropy != 0;
    options->own_loss = own_loss != 0;
    options->checkpoint = ovlm_checkpoint_of(checkpoint);
    return 0;
}

/* forward(ids, cu_seqlens, position, feature_row, labels, weights, grid, pixels, mel_lengths, mel,
 *         normalizer or -1, router_count, router_rows, training, entropy, checkpoint, features,
 *         extra, sounds, own loss, taps, vision taps, sequence group or None) */
PyObject *ovlm_py_model_forward(PyObject *object, PyTypeObject *type, PyObject *const *args,
                                Py_ssize_t nargs, PyObject *kwnames)
{
    (void)kwnames;
    model_object *self = (model_object *)object;
    ovlm_model_inputs in = {0};
    ovlm_pass_options options = {.poll = ovlm_poll_signals};
    const void *count = NULL;
    sequence_group_object *group = NULL;
    PyObject *module = PyType_GetModule(type);
    if (module == NULL || ovlm_arg_count("forward", nargs, N_FORWARD_ARGS) < 0 ||
        ovlm_arg_sequence_group(module, args[SEQUENCE], &group) < 0 ||
        read_tokens(self, args, group != NULL, &in) < 0 ||
        ovlm_arg_double(args[NORMALIZER], "normalizer", &in.normalizer) < 0 ||
        ovlm_arg_exact(args[ROUTER_COUNT], "router_counts", NPY_INT64,
                       ovlm_model_params(self->model)->config.decoder.experts, true, &count,
                       NULL) < 0 ||
        ovlm_arg_double(args[ROUTER_ROWS], "router_rows", &in.router_rows) < 0 ||
        read_features(self, args, &in) < 0 || read_options(args, &options) < 0 ||
        ovlm_model_enter_with(self, group) < 0) {
        return NULL;
    }
    in.router_count = count;
    in.sequence = group != NULL ? &group->group.table : NULL;
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_model_forward(self->model, &in, &options, &err);
    Py_END_ALLOW_THREADS
    ovlm_sequence_group_leave(group);
    Py_XSETREF(self->sequence, Py_XNewRef((PyObject *)group));
    if (status != OVLM_OK) {
        ovlm_model_forget(self->model); /* the group of the forward before is gone */
    }
    return ovlm_model_leave(self, type, status, &err);
}

static PyObject *new_rows(npy_intp n)
{
    return PyArray_ZEROS(1, &n, NPY_FLOAT32, 0);
}

/* output(logp wanted, entropy wanted) -> (loss, aux, weight sum, targets, logp, entropy) */
PyObject *ovlm_py_model_output(PyObject *object, PyTypeObject *type, PyObject *const *args,
                               Py_ssize_t nargs, PyObject *kwnames)
{
    (void)kwnames;
    model_object *self = (model_object *)object;
    int want[2] = {0, 0};
    if (ovlm_arg_count("output", nargs, 2) < 0 || (want[0] = PyObject_IsTrue(args[0])) < 0 ||
        (want[1] = PyObject_IsTrue(args[1])) < 0) {
        return NULL;
    }
    const int64_t n = ovlm_model_label_count(self->model);
    PyObject *rows[2] = {Py_NewRef(Py_None), Py_NewRef(Py_None)}, *answer = NULL;
    float *data[2] = {NULL, NULL};
    for (int i = 0; i < 2; i++) {
        if (want[i]) {
            Py_SETREF(rows[i], new_rows((npy_intp)n));
            if (rows[i] == NULL) {
                goto done;
            }
            data[i] = PyArray_DATA((PyArrayObject *)rows[i]);
        }
    }
    if (ovlm_model_enter(self) < 0) {
        goto done;
    }
    ovlm_model_output out = {0};
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_model_output_read(self->model, &out, data[0], data[1], &err);
    Py_END_ALLOW_THREADS
    PyObject *none = ovlm_model_leave(self, type, status, &err);
    if (none != NULL) {
        Py_DECREF(none);
        answer = Py_BuildValue("(dddLOO)", out.loss, out.aux_loss, out.weight_sum,
                               (long long)out.target_tokens, rows[0], rows[1]);
    }
done:
    Py_XDECREF(rows[0]);
    Py_XDECREF(rows[1]);
    return answer;
}

/* router_counts() -> int64[E] */
PyObject *ovlm_py_model_router_counts(PyObject *object, PyTypeObject *type, PyObject *const *args,
                                      Py_ssize_t nargs, PyObject *kwnames)
{
    (void)kwnames;
    (void)args;
    model_object *self = (model_object *)object;
    npy_intp n = (npy_intp)ovlm_model_params(self->model)->config.decoder.experts;
    PyObject *counts = NULL;
    if (ovlm_arg_count("router_counts", nargs, 0) < 0 ||
        (counts = PyArray_ZEROS(1, &n, NPY_INT64, 0)) == NULL) {
        return NULL;
    }
    if (ovlm_model_enter(self) < 0) {
        Py_DECREF(counts);
        return NULL;
    }
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    int64_t *data = PyArray_DATA((PyArrayObject *)counts);
    Py_BEGIN_ALLOW_THREADS
    status = n == 0 ? OVLM_OK : ovlm_model_router_read(self->model, data, &err);
    Py_END_ALLOW_THREADS
    PyObject *none = ovlm_model_leave(self, type, status, &err);
    if (none == NULL) {
        Py_CLEAR(counts);
    }
    Py_XDECREF(none);
    return counts;
}

/* logits(rows int32) -> float32[len(rows), V] */
PyObject *ovlm_py_model_logits(PyObject *object, PyTypeObject *type, PyObject *const *args,
                               Py_ssize_t nargs, PyObject *kwnames)
{
    (void)kwnames;
    model_object *self = (model_object *)object;
    const void *rows = NULL;
    int64_t n = 0;
    if (ovlm_arg_count("logits", nargs, 1) < 0 ||
        ovlm_arg_exact(args[0], "rows", NPY_INT32, -1, false, &rows, &n) < 0) {
        return NULL;
    }
    npy_intp dims[] = {(npy_intp)n,
                       (npy_intp)ovlm_model_params(self->model)->config.decoder.vocab};
    PyObject *logits = PyArray_SimpleNew(2, dims, NPY_FLOAT32);
    if (logits == NULL || ovlm_model_enter(self) < 0) {
        Py_XDECREF(logits);
        return NULL;
    }
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    float *data = PyArray_DATA((PyArrayObject *)logits);
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_model_logits(self->model, rows, n, data, &err);
    Py_END_ALLOW_THREADS
    PyObject *none = ovlm_model_leave(self, type, status, &err);
    if (none == NULL) {
        Py_CLEAR(logits);
    }
    Py_XDECREF(none);
    return logits;
}

int ovlm_arg_adamw(PyObject *const *args, Py_ssize_t nargs, int64_t n, ovlm_model_adamw *options)
{
    const void *lr = NULL, *decay = NULL;
    if (ovlm_arg_count("adamw", nargs, 7) < 0 ||
        ovlm_arg_exact(args[0], "lr", NPY_FLOAT64, n, false, &lr, NULL) < 0 ||
        ovlm_arg_exact(args[1], "weight_decay", NPY_FLOAT64, n, false, &decay, NULL) < 0 ||
        ovlm_arg_double(args[2], "beta1", &options->beta1) < 0 ||
        ovlm_arg_double(args[3], "beta2", &options->beta2) < 0 ||
        ovlm_arg_double(args[4], "eps", &options->eps) < 0 ||
        ovlm_arg_double(args[5], "max_grad_norm", &options->max_norm) < 0 ||
        ovlm_arg_int(args[6], "step", &options->step) < 0) {
        return -1;
    }
    options->lr = lr;
    options->weight_decay = decay;
    return 0;
}

/* adamw(lr[n], weight_decay[n], beta1, beta2, eps, max_norm, step) -> (norm, clip, non_finite) */
PyObject *ovlm_py_model_adamw(PyObject *object, PyTypeObject *type, PyObject *const *args,
                              Py_ssize_t nargs, PyObject *kwnames)
{
    (void)kwnames;
    model_object *self = (model_object *)object;
    ovlm_model_adamw options = {0};
    if (ovlm_arg_adamw(args, nargs, ovlm_model_params(self->model)->n, &options) < 0 ||
        ovlm_model_enter(self) < 0) {
        return NULL;
    }
    ovlm_model_step step = {0};
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_model_adamw_step(self->model, &options, &step, &err);
    Py_END_ALLOW_THREADS
    PyObject *none = ovlm_model_leave(self, type, status, &err);
    if (none == NULL) {
        return NULL;
    }
    Py_DECREF(none);
    return Py_BuildValue("(ddL)", step.grad_norm, step.clip, (long long)step.non_finite);
}

/* cache_open(sequences, length) */
PyObject *ovlm_py_model_cache_open(PyObject *object, PyTypeObject *type, PyObject *const *args,
                                   Py_ssize_t nargs, PyObject *kwnames)
{
    (void)kwnames;
    model_object *self = (model_object *)object;
    int64_t sequences = 0, length = 0;
    if (ovlm_arg_count("cache_open", nargs, 2) < 0 ||
        ovlm_arg_int(args[0], "sequences", &sequences) < 0 ||
        ovlm_arg_int(args[1], "length", &length) < 0 || ovlm_model_enter(self) < 0) {
        return NULL;
    }
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_model_cache_open(self->model, sequences, length, &err);
    Py_END_ALLOW_THREADS
    return ovlm_model_leave(self, type, status, &err);
}

/* extend(ids, cu_seqlens, position, feature_row, None, None, grid, pixels, mel_lengths, mel)
 *     -> float32[sequences, V] */
PyObject *ovlm_py_model_extend(PyObject *object, PyTypeObject *type, PyObject *const *args,
                               Py_ssize_t nargs, PyObject *kwnames)
{
    (void)kwnames;
    model_object *self = (model_object *)object;
    ovlm_model_inputs in = {0};
    const ovlm_pass_options options = {.poll = ovlm_poll_signals};
    if (ovlm_arg_count("extend", nargs, N_TOKEN_ARGS) < 0 ||
        read_tokens(self, args, false, &in) < 0) {
        return NULL;
    }
    in.label = NULL;
    npy_intp dims[] = {(npy_intp)in.tokens.segments,
                       (npy_intp)ovlm_model_params(self->model)->config.decoder.vocab};
    PyObject *logits = PyArray_SimpleNew(2, dims, NPY_FLOAT32);
    if (logits == NULL || ovlm_model_enter(self) < 0) {
        Py_XDECREF(logits);
        return NULL;
    }
    ovlm_err err = {0};
    ovlm_status status = OVLM_OK;
    float *data = PyArray_DATA((PyArrayObject *)logits);
    Py_BEGIN_ALLOW_THREADS
    status = ovlm_model_extend(self->model, &in, &options, data, &err);
    Py_END_ALLOW_THREADS
    PyObject *none = ovlm_model_leave(self, type, status, &err);
    if (none == NULL) {
        Py_CLEAR(logits);
    }
    Py_XDECREF(none);
    return logits;
}
