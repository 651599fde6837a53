/* test_model.c - the model over the op table: gradients of the reference backend in double against
 * finite differences; `cpu` and `async` bit for bit alike; recomputation without a trace; what is
 * frozen neither kept nor felt; every operation prepared; every allocation that fails, and an
 * interruption after every layer, survived. */
#include <math.h>
#include <string.h>

#include "base/arena.h"
#include "cpu/cpu_device.h"
#include "model_rig.h"
#include "op_counter.h"

/* ---- a session: all calls of a model's life, one after the other ---- */

typedef struct session {
    const ovlm_ops *ops;
    ovlm_model_config config;
    ovlm_dtype dtype;
    const batch *batch;
    uint64_t seed;          /* of the weights                            */
    ovlm_pass_options pass;
    ovlm_model *model;
    ovlm_model_output out;
    ovlm_model_step step;
    float logp[TOKENS], logits[TOKENS * VOCAB], next[3][SEGMENTS * VOCAB];
    char *state;            /* all gradients, then all weights, as they lie on the host */
    int64_t state_bytes;
} session;

static ovlm_status read_state(session *s, ovlm_err *err)
{
    const ovlm_params *p = ovlm_model_params(s->model);
    for (int pass = 0; pass < 2; pass++) {
        int64_t at = 0;
        for (int64_t i = 0; i < 2 * p->n; i++) {
            const ovlm_param *one = &p->param[i % p->n];
            const ovlm_tensor *t = i < p->n ? &one->grad : &one->w;
            if (ovlm_tensor_given(t) && pass == 1) {
                OVLM_TRY(ovlm_model_read(s->model, t, s->state + at, err));
            }
            at += ovlm_tensor_given(t) ? t->rows * t->cols * ovlm_dtype_bytes(t->dtype) : 0;
        }
        if (pass == 0 && s->state == NULL) {
            s->state = rig_memory(at);
            s->state_bytes = at;
        }
    }
    return OVLM_OK;
}

/* The most likely token of every segment but the empty one goes on. */
static ovlm_status extend_by_one(session *s, int round, ovlm_err *err)
{
    batch b = {0};
    int32_t n = 0;
    for (int i = 0; i < SEGMENTS; i++) {
        b.start[i] = n;
        if (s->batch->start[i + 1] == s->batch->start[i]) {
            continue;
        }
        const float *row = s->next[round - 1] + i * VOCAB;
        for (int32_t v = 1; v < VOCAB; v++) {
            b.id[n] = row[v] > row[b.id[n]] ? v : b.id[n];
        }
        n++;
    }
    b.start[SEGMENTS] = n;
    for (int i = 0; i < 3 * n; i++) {
        b.position[i] = (float)(TOKENS + round);
    }
    ovlm_model_inputs in = {.tokens = {.T = n, .segments = SEGMENTS, .id = b.id, .start = b.start,
                                       .position = b.position},
                            .normalizer = -1};
    return ovlm_model_extend(s->model, &in, &s->pass, s->next[round], err);
}

static ovlm_status adamw(session *s, ovlm_err *err)
{
    double lr[128], decay[128];
    for (int i = 0; i < 128; i++) {
        lr[i] = 1e-2;
        decay[i] = 0.1;
    }
    CHECK(ovlm_model_params(s->model)->n <= 128, "more parameters than room");
    const ovlm_model_adamw options = {.lr = lr, .weight_decay = decay, .beta1 = 0.9,
                                      .beta2 = 0.95, .eps = 1e-8, .max_norm = 1, .step = 1};
    return ovlm_model_adamw_step(s->model, &options, &s->step, err);
}

enum { OPEN, WRITE, FORWARD, OUTPUT, BACKWARD, ADAMW, AGAIN, LOGITS, CACHE, PREFILL, NEXT, AFTER,
       READ, CALLS };

static ovlm_status call(session *s, int number, ovlm_err *err)
{
    ovlm_backend_options options = {.threads = 1};
    ovlm_model_inputs in = rig_inputs(s->batch);
    int32_t row[TOKENS];
    for (int t = 0; t < TOKENS; t++) {
        row[t] = t;
    }
    switch (number) {
    case OPEN: return ovlm_model_open(&s->config, s->ops, &options, s->dtype, NULL, &s->model,
                                       err);
    case WRITE: return rig_write_weights(s->model, s->seed, err);
    case FORWARD: return ovlm_model_forward(s->model, &in, &s->pass, err);
    case OUTPUT: return ovlm_model_output_read(s->model, &s->out, s->logp, NULL, err);
    case BACKWARD:
        return ovlm_model_backward(s->model, &(ovlm_model_slopes){0}, &(ovlm_feature_slopes){0},
                                   &s->pass, err);
    case ADAMW: return adamw(s, err);
    case AGAIN: in.label = NULL; return ovlm_model_forward(s->model, &in, &s->pass, err);
    case LOGITS: return ovlm_model_logits(s->model, row, TOKENS, s->logits, err);
    case CACHE: return ovlm_model_cache_open(s->model, SEGMENTS, TOKENS, err);
    case PREFILL: return ovlm_model_extend(s->model, &in, &s->pass, s->next[0], err);
    case NEXT: return extend_by_one(s, 1, err);
    case AFTER: return extend_by_one(s, 2, err);
    default: return read_state(s, err);
    }
}

static void close_session(session *s)
{
    ovlm_model_close(s->model);
    free(s->state);
    s->model = NULL;
    s->state = NULL;
}

static void run_until(session *s, int last)
{
    for (int i = OPEN; i <= last; i++) {
        ovlm_err err = {0};
        ovlm_status status = call(s, i, &err);
        CHECK(status == OVLM_OK, "call %d: %s", i, err.message);
        if (status != OVLM_OK) {
            exit(1);
        }
    }
}

static void same(const char *what, const session *a, const session *b)
{
    CHECK(a->out.loss == b->out.loss && a->step.grad_norm == b->step.grad_norm,
          "%s: loss %.17g and %.17g", what, a->out.loss, b->out.loss);
    CHECK(memcmp(a->logp, b->logp, sizeof a->logp) == 0, "%s: logp", what);
    CHECK(memcmp(a->logits, b->logits, sizeof a->logits) == 0, "%s: logits", what);
    CHECK(memcmp(a->next, b->next, sizeof a->next) == 0, "%s: generation", what);
    CHECK(a->state_bytes == b->state_bytes &&
              memcmp(a->state, b->state, (size_t)a->state_bytes) == 0,
          "%s: gradients or weights", what);
}

/* ---- tests ---- */

static session new_session(const char *ops, const ovlm_model_config *config, ovlm_dtype dtype,
                           const batch *b)
{
    return (session){.ops = ovlm_cpu_ops_find(ops), .config = *config, .dtype = dtype, .batch = b,
                     .seed = test_seed, .pass = {.training = true}};
}

static void test_backends(const ovlm_model_config *config, const batch *b)
{
    for (int i = 0; i < 2; i++) {
        session plain = new_session("cpu", config, i == 0 ? OVLM_F32 : OVLM_BF16, b);
        session late = plain, again = plain;
        late.ops = ovlm_cpu_ops_find("async");
        again.pass.checkpoint = i == 0 ? OVLM_CHECKPOINT_FULL : OVLM_CHECKPOINT_SELECTIVE;
        run_until(&plain, READ);
        run_until(&late, READ);
        run_until(&again, READ);
        CHECK(isfinite(plain.out.loss) && plain.out.loss > 1, "loss %g", plain.out.loss);
        same("async", &plain, &late);
        same("recomputed", &plain, &again);
        for (int segment = 0; segment < SEGMENTS; segment++) { /* a prefill is a forward */
            int64_t last = b->start[segment + 1] - 1;
            if (last >= b->start[segment]) {
                CHECK(memcmp(plain.logits + last * VOCAB, plain.next[0] + segment * VOCAB,
                             VOCAB * sizeof(float)) == 0, "prefill of segment %d", segment);
            }
        }
        close_session(&plain);
        close_session(&late);
        close_session(&again);
    }
}

static double loss_of(session *s)
{
    ovlm_err err = {0};
    CHECK(call(s, FORWARD, &err) == OVLM_OK && call(s, OUTPUT, &err) == OVLM_OK, "%s",
          err.message);
    return s->out.loss;
}

/* Along a random direction in each parameter: the loss's difference and the gradient's product. */
static void test_gradients(const ovlm_model_config *config, const batch *b)
{
    const double h = 1e-5;
    session s = new_session("ref", config, OVLM_F64, b);
    run_until(&s, BACKWARD);
    const ovlm_params *p = ovlm_model_params(s.model);
    double *grad = rig_memory(p->grad_elements * (int64_t)sizeof(double)), *at = grad, all = 0;
    ovlm_err err = {0};
    for (int64_t i = 0; i < p->n; i++) {
        const ovlm_tensor *g = &p->param[i].grad;
        if (ovlm_tensor_given(g)) {
            CHECK(ovlm_model_read(s.model, g, at, &err) == OVLM_OK, "%s", err.message);
            for (int64_t j = 0; j < g->rows * g->cols; j++) {
                all += at[j] * at[j];
            }
            at += g->rows * g->cols;
        }
    }
    at = grad;
    for (int64_t i = 0; i < p->n; i++) {
        const ovlm_tensor *w = &p->param[i].w;
        int64_t n = w->rows * w->cols;
        double *held = rig_memory(n * (int64_t)sizeof(double)), *moved, *way, loss[2], product = 0;
        moved = rig_memory(n * (int64_t)sizeof(double));
        way = rig_memory(n * (int64_t)sizeof(double));
        CHECK(ovlm_model_read(s.model, w, held, &err) == OVLM_OK, "%s", err.message);
        for (int64_t j = 0; j < n; j++) {
            way[j] = rig_normal() / sqrt((double)n);
            product += ovlm_tensor_given(&p->param[i].grad) ? at[j] * way[j] : 0;
        }
        for (int side = 0; side < 2; side++) {
            for (int64_t j = 0; j < n; j++) {
                moved[j] = held[j] + (side == 0 ? h : -h) * way[j];
            }
            CHECK(ovlm_model_write(s.model, w, moved, &err) == OVLM_OK, "%s", err.message);
            loss[side] = loss_of(&s);
        }
        CHECK(ovlm_model_write(s.model, w, held, &err) == OVLM_OK, "%s", err.message);
        double slope = (loss[0] - loss[1]) / (2 * h);
        CHECK(fabs(slope - product) <= 1e-6 * sqrt(all), "%s: slope %.9g, gradient %.9g",
              p->param[i].name, slope, product);
        at += ovlm_tensor_given(&p->param[i].grad) ? n : 0;
        free(held);
        free(moved);
        free(way);
    }
    free(grad);
    close_session(&s);
}

/* ---- frozen parts ---- */

enum { PARAMS_MOST = 128 };

/* What is kept by a training step, or an inference, of a new model of which `mask` (NULL: all) is
 * trained; its gradients stay in the session. */
static int64_t kept_bytes(session *s, const bool *mask)
{
    ovlm_err err = {0};
    ovlm_model_memory memory;
    run_until(s, WRITE);
    ovlm_status status = mask == NULL ? OVLM_OK : ovlm_model_train_only(s->model, mask, &err);
    for (int i = FORWARD; i <= BACKWARD && status == OVLM_OK; i++) {
        status = i == BACKWARD && !s->pass.training ? OVLM_OK : call(s, i, &err);
    }
    CHECK(status == OVLM_OK, "%s", err.message);
    ovlm_model_memory_read(s->model, &memory);
    return memory.activations_bytes;
}

/* The gradients that a model has are those of another, which has more of them. */
static void same_gradients(const session *some, const session *all)
{
    const ovlm_params *p = ovlm_model_params(some->model), *q = ovlm_model_params(all->model);
    ovlm_err err = {0};
    for (int64_t i = 0; i < p->n; i++) {
        const ovlm_tensor *g = &p->param[i].grad, *h = &q->param[i].grad;
        if (!ovlm_tensor_given(g)) {
            continue;
        }
        int64_t bytes = g->rows * g->cols * ovlm_dtype_bytes(g->dtype);
        char *a = rig_memory(bytes), *b = rig_memory(bytes);
        CHECK(ovlm_model_read(some->model, g, a, &err) == OVLM_OK &&
                  ovlm_model_read(all->model, h, b, &err) == OVLM_OK, "%s", err.message);
        CHECK(memcmp(a, b, (size_t)bytes) == 0, "gradient of %s", p->param[i].name);
        free(a);
        free(b);
    }
}

/* Random products, or those of a unit or two. */
static void draw_mask(const ovlm_params *p, bool *mask)
{
    int64_t way = rig_below(3), one = rig_below(p->units), other = rig_below(p->units);
    for (int64_t i = 0; i < p->n; i++) {
        const ovlm_param *param = &p->param[i];
        bool again = i > 0 && param->fused == p->param[i - 1].fused;
        mask[i] = again      ? mask[i - 1]
                  : way == 0 ? rig_below(4) == 0
                             : param->unit == one || (way == 1 && param->unit == other);
    }
}

/* Bytes when only the block at `index` is trained (of a model of one kind of blocks). */
static int64_t kept_by_unit(const session *base, ovlm_unit_kind kind, int64_t index)
{
    session s = *base;
    ovlm_arena arena = {0};
    ovlm_params p = {0};
    ovlm_err err = {0};
    bool mask[PARAMS_MOST] = {0};
    CHECK(ovlm_params_init(&p, &s.config, &arena, &err) == OVLM_OK, "%s", err.message);
    for (int64_t i = 0; i < p.n; i++) {
        const ovlm_unit *unit = &p.unit[p.param[i].unit];
        mask[i] = unit->kind == kind && unit->index == index;
    }
    int64_t bytes = kept_bytes(&s, mask);
    close_session(&s);
    ovlm_arena_free(&arena);
    return bytes;
}

/* From the lowest trained block up, and nothing where nothing is trained. */
static void test_kept(const session *base)
{
    const bool none[PARAMS_MOST] = {0};
    session all = *base, frozen = *base, inference = *base;
    inference.pass.training = false;
    int64_t most = kept_bytes(&all, NULL), least = kept_bytes(&inference, NULL);
    int64_t with_none = kept_bytes(&frozen, none);
    CHECK(with_none == least, "all frozen keeps %lld bytes, inference %lld",
          (long long)with_none, (long long)least);
    for (int way = 0; way < 2; way++) {
        ovlm_unit_kind kind = way == 0 ? OVLM_UNIT_VISION_BLOCK : OVLM_UNIT_LAYER;
        int64_t low = kept_by_unit(base, kind, 0), high = kept_by_unit(base, kind, 1);
        int64_t end = kept_by_unit(base, way == 0 ? OVLM_UNIT_MERGER : OVLM_UNIT_NORM, 0);
        CHECK(least < end && end < high && high < low && low < most,
              "kept: %lld < %lld < %lld < %lld < %lld", (long long)least, (long long)end,
              (long long)high, (long long)low, (long long)most);
    }
    /* The end alone: what the norm reads and a number or two of each row. */
    int64_t norm = kept_by_unit(base, OVLM_UNIT_NORM, 0);
    int64_t slope = base->pass.own_loss ? TOKENS * WIDTH : 0;
    CHECK(norm - least <= (TOKENS * (WIDTH + 8) + slope + 64) * (int64_t)sizeof(float),
          "the last norm keeps %lld bytes", (long long)(norm - least));
    close_session(&all);
    close_session(&frozen);
    close_session(&inference);
}

static void test_frozen(const ovlm_model_config *config, const batch *b)
{
    bool mask[PARAMS_MOST] = {0};
    for (int draw = 0; draw < 12; draw++) {
        session all = new_session("cpu", config, OVLM_F32, b);
        all.pass.checkpoint = (ovlm_checkpoint)(draw % 3);
        all.pass.own_loss = rig_below(2) == 0;
        session some = all;
        int64_t most = kept_bytes(&all, NULL);
        CHECK(ovlm_model_params(all.model)->n <= PARAMS_MOST, "more parameters than room");
        draw_mask(ovlm_model_params(all.model), mask);
        int64_t bytes = kept_bytes(&some, mask);
        CHECK(bytes <= most, "%lld bytes of %lld", (long long)bytes, (long long)most);
        same_gradients(&some, &all);
        if (draw < 2) {
            session base = all;
            base.model = NULL;
            base.pass.checkpoint = OVLM_CHECKPOINT_NONE;
            base.pass.own_loss = draw == 1;
            test_kept(&base);
        }
        close_session(&all);
        close_session(&some);
    }
}

/* ---- plans ---- */

/* Every operation of every call was prepared, outside of what runs. */
static void test_prepared(const ovlm_model_config *config, const batch *b)
{
    for (int i = 0; i < 6; i++) {
        session s = new_session("cpu", config, i % 2 == 0 ? OVLM_F32 : OVLM_BF16, b);
        s.ops = op_counter_ops();
        s.pass.checkpoint = (ovlm_checkpoint)(i % 3);
        s.pass.own_loss = i >= 3;
        run_until(&s, READ);
        op_count count = op_counter_read();
        CHECK(count.run > 100 && count.unprepared == 0, "%lld of %lld calls, first of %s",
              (long long)count.unprepared, (long long)count.run,
              count.first == NULL ? "none" : count.first);
        close_session(&s);
    }
}

/* ---- slopes ---- */

/* A forward with its own loss at hand takes the caller's slopes as any other does. */
static void test_other_slopes(const ovlm_model_config *config, const batch *b)
{
    static const char *const names[] = {"cpu", "async"};
    const ovlm_model_slopes slopes = {.dlogp = b->weight};
    for (int i = 0; i < 4; i++) {
        session s[2];
        for (int own = 0; own < 2; own++) {
            ovlm_err err = {0};
            s[own] = new_session(names[i / 2], config, i % 2 == 0 ? OVLM_F32 : OVLM_BF16, b);
            s[own].pass.own_loss = own == 1;
            run_until(&s[own], FORWARD);
            CHECK(ovlm_model_backward(s[own].model, &slopes, &(ovlm_feature_slopes){0},
                                      &s[own].pass, &err) == OVLM_OK, "%s", err.message);
        }
        same_gradients(&s[1], &s[0]);
        close_session(&s[0]);
        close_session(&s[1]);
    }
}

/* ---- trouble ---- */

static int64_t device_left = -1; /* allocations on the device before they fail; -1: never */
static int64_t polls_left = -1;
static ovlm_ops failing;

static ovlm_status failing_alloc(ovlm_backend *backend, int64_t bytes, void **out, ovlm_err *err)
{
    if (device_left == 0) {
        *out = NULL;
        return OVLM_FAIL(err, OVLM_E_NOMEM, "no device memory for %lld bytes", (long long)bytes);
    }
    device_left -= device_left > 0;
    return ovlm_cpu_alloc(backend, bytes, out, err);
}

static ovlm_status failing_open(const ovlm_backend_options *options, ovlm_backend **backend,
                                ovlm_err *err)
{
    return ovlm_cpu_open_with(&failing, options, backend, err);
}

static int poll(void *ctx)
{
    (void)ctx;
    polls_left -= polls_left > 0;
    return polls_left == 0;
}

typedef enum trouble { NO_HOST, NO_DEVICE, STOPPED, TROUBLES } trouble;

static void arm(trouble what, int64_t after)
{
    ovlm_arena_fail_after(what == NO_HOST ? after : -1);
    device_left = what == NO_DEVICE ? after : -1;
    polls_left = what == STOPPED && after >= 0 ? after + 1 : -1;
}

/* Each call is tried until the trouble comes too late for it; the end is as without. */
static void test_trouble(const ovlm_model_config *config, const batch *b)
{
    failing = *ovlm_cpu_ops_find("cpu");
    failing.open = failing_open;
    failing.alloc = failing.host_alloc = failing_alloc;
    session want = new_session("cpu", config, OVLM_BF16, b);
    run_until(&want, READ);
    for (trouble what = 0; what < TROUBLES; what++) {
        const ovlm_status expected = what == STOPPED ? OVLM_E_INTERRUPTED : OVLM_E_NOMEM;
        session s = want;
        s.model = NULL;
        s.state = NULL;
        s.ops = &failing;
        s.pass.poll = poll;
        int64_t failures = 0;
        for (int i = 0; i < CALLS; i++) {
            ovlm_status status = OVLM_OK;
            for (int64_t after = 0; after < 200; after++) {
                ovlm_err err = {0};
                /* A backward that was stopped is not repeated: its forward is gone. */
                arm(what, i == BACKWARD && what == STOPPED ? -1 : after);
                status = call(&s, i, &err);
                arm(what, -1);
                if (status == OVLM_OK) {
                    break;
                }
                failures++;
                CHECK(status == expected, "call %d: %s", i, err.message);
            }
            CHECK(status == OVLM_OK, "call %d never succeeds", i);
            if (s.model == NULL) {
                exit(1);
            }
        }
        CHECK(failures > 3, "%lld failures", (long long)failures);
        same("after trouble", &want, &s);
        close_session(&s);
    }
    close_session(&want);
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    const ovlm_model_config configs[] = {rig_qwen(false), rig_qwen(true), rig_seed(), rig_omni()};
    for (int i = 0; i < 4; i++) {
        batch b = {0};
        rig_draw_batch(&b, configs[i].audio.depth > 0);
        test_backends(&configs[i], &b);
        test_gradients(&configs[i], &b);
        test_frozen(&configs[i], &b);
        test_prepared(&configs[i], &b);
        test_other_slopes(&configs[i], &b);
        test_trouble(&configs[i], &b);
    }
    return test_end("model");
}
