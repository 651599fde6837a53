/* test_shard.c - a model over ranks against the same model alone: gradients, AdamW, memory, for all
 * ways of keeping it; ranks without work; a hook that fails on one rank leaves no other waiting. */
#include "comm_rig.h"
#include "model_rig.h"

#include "engine/shard.h"

enum { RANKS_MOST = 4, PARAMS_MOST = 256, UNITS_MOST = 64, STEPS = 4, PACKS = 2 };

typedef struct drill {
    const char *name, *ops;
    const ovlm_model_config *config;
    ovlm_dtype dtype;
    ovlm_checkpoint checkpoint;
    int64_t n, node_size, experts, expert_rows;
    ovlm_shard_mode mode[UNITS_MOST];
    bool adapted, frozen, last;
    uint64_t seed;
    batch pack[RANKS_MOST][PACKS];
    bool idle[RANKS_MOST][PACKS];        /* nothing to do there */
    ovlm_model *model[RANKS_MOST], *alone;
    float *grads, *weights, *start;      /* of the model alone, parameter by parameter */
    double grad_norm;
    int64_t fail_rank, fail_after;
    int64_t failed[RANKS_MOST];          /* status of each rank */
} drill;

/* ---- models ---- */

static void settle(const drill *d, ovlm_model *model)
{
    const ovlm_params *p = ovlm_model_params(model);
    bool mask[PARAMS_MOST] = {0};
    ovlm_err err = {0};
    CHECK(p->n <= PARAMS_MOST && p->units <= UNITS_MOST, "more parameters than room");
    if (d->adapted) {
        for (int64_t i = 0; i < p->n; i++) {
            mask[i] = strstr(p->param[i].name, "q_proj.weight") != NULL ||
                      strstr(p->param[i].name, "o_proj.weight") != NULL;
        }
        CHECK(ovlm_model_lora_open(model, mask, 3, 0.5, &err) == OVLM_OK, "%s", err.message);
        p = ovlm_model_params(model);
    }
    if (d->frozen) { /* some units, and all but norms in others; products as a whole */
        for (int64_t i = 0; i < p->n; i++) {
            bool norm = p->param[i].kind == OVLM_PARAM_NORM;
            mask[i] = d->adapted ? p->param[i].kind == OVLM_PARAM_ADAPTER || norm
                                 : p->param[i].unit % 3 == 0 || (p->param[i].unit % 3 == 1 && norm);
        }
        CHECK(ovlm_model_train_only(model, mask, &err) == OVLM_OK, "%s", err.message);
    }
}

static ovlm_model *new_model(const drill *d)
{
    ovlm_model *model = NULL;
    ovlm_err err = {0};
    ovlm_status status = ovlm_model_open(d->config, ovlm_cpu_ops_find(d->ops),
                                         &(ovlm_backend_options){.threads = 1}, d->dtype, NULL,
                                         &model, &err);
    CHECK(status == OVLM_OK, "%s", err.message);
    if (status != OVLM_OK) {
        exit(1);
    }
    settle(d, model);
    CHECK(rig_write_weights(model, d->seed, &err) == OVLM_OK, "%s", err.message);
    ovlm_model_set_expert_rows(model, d->expert_rows);
    return model;
}

/* Forward and backward of a pack; with nothing to do, of nothing. */
static ovlm_status run_pack(const drill *d, ovlm_model *model, const batch *b, bool idle,
                            ovlm_err *err)
{
    static const int32_t none[SEGMENTS + 1] = {0};
    static const int64_t count[8] = {5, 9, 1, 4, 7, 2, 3, 3};
    ovlm_model_inputs in = rig_inputs(b);
    const ovlm_pass_options pass = {.training = true, .own_loss = true,
                                    .checkpoint = d->checkpoint};
    if (idle) {
        in.tokens = (ovlm_tokens){.segments = SEGMENTS, .start = none};
        in.images = in.sounds = 0;
        in.pixels = in.mel = NULL;
    }
    in.normalizer = 17; /* of the global batch: so are counts */
    in.router_count = count;
    in.router_rows = 34;
    OVLM_TRY(ovlm_model_forward(model, &in, &pass, err));
    return ovlm_model_backward(model, &(ovlm_model_slopes){0}, &(ovlm_feature_slopes){0}, &pass,
                               err);
}

static ovlm_model_adamw adamw_of(int64_t step, double *lr, double *decay)
{
    for (int64_t i = 0; i < PARAMS_MOST; i++) {
        lr[i] = 1e-2 * (1 + (double)(i % 3));
        decay[i] = i % 2 == 0 ? 0.1 : 0;
    }
    return (ovlm_model_adamw){.lr = lr, .weight_decay = decay, .beta1 = 0.9, .beta2 = 0.95,
                              .eps = 1e-8, .max_norm = 0.7, .step = step};
}

/* ---- the model alone ---- */

static double value_of(const char *data, int64_t i, ovlm_dtype dtype)
{
    uint16_t narrow;
    float f;
    if (dtype == OVLM_BF16) {
        memcpy(&narrow, data + 2 * i, sizeof narrow);
        return (double)ovlm_math_from_bf16(narrow);
    }
    memcpy(&f, data + 4 * i, sizeof f);
    return (double)f;
}

/* Numbers of all parameters, one after the other. */
static float *numbers_of(ovlm_model *model, bool grads)
{
    const ovlm_params *p = ovlm_model_params(model);
    ovlm_err err = {0};
    int64_t total = 0, at = 0;
    for (int64_t i = 0; i < p->n; i++) {
        total += p->param[i].rows * p->param[i].cols;
    }
    float *all = rig_memory(total * 4);
    char *one = rig_memory(total * 4);
    for (int64_t i = 0; i < p->n; i++) {
        const ovlm_tensor *t = grads ? &p->param[i].grad : &p->param[i].w;
        int64_t size = p->param[i].rows * p->param[i].cols;
        if (t->cols > 0) {
            CHECK(ovlm_model_read(model, t, one, &err) == OVLM_OK, "%s", err.message);
        }
        for (int64_t j = 0; j < size; j++) {
            all[at++] = t->cols > 0 ? (float)value_of(one, j, t->dtype) : 0.0f;
        }
    }
    free(one);
    return all;
}

/* All packs of all ranks, then a step; STEPS times. */
static void live_alone(drill *d)
{
    double lr[PARAMS_MOST], decay[PARAMS_MOST];
    ovlm_err err = {0};
    d->start = numbers_of(d->alone, false);
    for (int64_t step = 1; step <= STEPS; step++) {
        ovlm_model_step done;
        CHECK(ovlm_model_zero_grad(d->alone, &err) == OVLM_OK, "%s", err.message);
        for (int64_t r = 0; r < d->n; r++) {
            for (int k = 0; k < PACKS; k++) {
                CHECK(run_pack(d, d->alone, &d->pack[r][k], d->idle[r][k], &err) == OVLM_OK, "%s",
                      err.message);
            }
        }
        if (step == 1) {
            d->grads = numbers_of(d->alone, true);
        }
        const ovlm_model_adamw options = adamw_of(step, lr, decay);
        CHECK(ovlm_model_adamw_step(d->alone, &options, &done, &err) == OVLM_OK, "%s",
              err.message);
        d->grad_norm = step == 1 ? done.grad_norm : d->grad_norm;
    }
    d->weights = numbers_of(d->alone, false);
}

/* ---- over ranks ---- */

/* Norm of the difference to what the model alone has, of the latter, and of all of it. */
typedef struct distance {
    double error, size, whole;
} distance;

static double square(double x)
{
    return x * x;
}

/* Every tensor whole, against numbers of the model alone; bits of all of them become one. */
static void compare(rig_rank *self, ovlm_shard *shard, ovlm_shard_which which, const float *wanted,
                    const float *from, double near, double floor)
{
    const drill *d = self->ctx;
    const ovlm_params *p = ovlm_model_params(d->model[self->rank]);
    uint64_t hash = 0xcbf29ce484222325u;
    distance all = {0};
    int64_t at = 0;
    for (int pass = 0; pass < 2; pass++) { /* first the whole's norm */
        at = 0;
        for (int64_t i = 0; i < p->n; i++) {
            const ovlm_param *one = &p->param[i];
            int64_t size = one->whole_rows * one->cols;
            bool exact = which == OVLM_SHARD_GRAD || one->kind == OVLM_PARAM_BUFFER;
            ovlm_dtype dtype = exact ? p->exact : p->dtype;
            distance dist = {0};
            bool none = false;
            char *host = rig_bytes(size * 4);
            RTRY(self, ovlm_shard_gather(shard, i, which, host, &none, &self->err));
            for (int64_t j = 0; j < size && !none; j++) {
                double base = from == NULL ? 0 : (double)from[at + j];
                dist.size += square((double)wanted[at + j] - base);
                dist.error += square(value_of(host, j, dtype) - (double)wanted[at + j]);
                uint64_t bits = 0;
                memcpy(&bits, host + j * ovlm_dtype_bytes(dtype),
                       (size_t)ovlm_dtype_bytes(dtype));
                hash = (hash ^ bits) * 0x100000001b3u;
            }
            all.whole += pass == 0 ? dist.size : 0;
            double most = near * sqrt(dist.size) + floor * sqrt(all.whole);
            RCHECK(self, pass == 0 || sqrt(dist.error) <= most, "%s %s: %g off, at most %g",
                   d->name, one->name, sqrt(dist.error), most);
            free(host);
            at += size;
        }
    }
    int64_t mine = (int64_t)(hash >> 1), least = 0, most = 0;
    ovlm_all_reduce args = {.send = &mine, .recv = &least, .n = 1, .dtype = OVLM_I64,
                            .reduce = OVLM_MIN};
    RTRY(self, ovlm_comm_all_reduce(self->comm, &args, &self->err));
    args.recv = &most;
    args.reduce = OVLM_MAX;
    RTRY(self, ovlm_comm_all_reduce(self->comm, &args, &self->err));
    RCHECK(self, least == most, "%s: ranks have other bits", d->name);
}

static ovlm_status backwards(rig_rank *self, ovlm_shard *shard, ovlm_err *err)
{
    const drill *d = self->ctx;
    OVLM_TRY(ovlm_shard_zero_grad(shard, err));
    for (int k = 0; k < PACKS; k++) {
        if (d->last && k == PACKS - 1) {
            ovlm_shard_last(shard);
        }
        OVLM_TRY(run_pack(d, d->model[self->rank], &d->pack[self->rank][k],
                          d->idle[self->rank][k], err));
    }
    return OVLM_OK;
}

static void check_memory(rig_rank *self, const ovlm_shard *shard, const ovlm_shard_spec *spec)
{
    const drill *d = self->ctx;
    ovlm_shard_bytes predicted, held;
    const ovlm_params *p = ovlm_model_params(d->model[self->rank]);
    RTRY(self, ovlm_shard_memory(p, spec, self->n, self->rank, &predicted, &self->err));
    ovlm_shard_memory_read(shard, &held);
    RCHECK(self, held.weights_bytes == predicted.weights_bytes &&
                     held.training_bytes == predicted.training_bytes &&
                     held.buffers_bytes == predicted.buffers_bytes,
           "%s: %lld %lld %lld bytes held, %lld %lld %lld predicted", d->name,
           (long long)held.weights_bytes, (long long)held.training_bytes,
           (long long)held.buffers_bytes, (long long)predicted.weights_bytes,
           (long long)predicted.training_bytes, (long long)predicted.buffers_bytes);
}

static void live(rig_rank *self)
{
    const drill *d = self->ctx;
    const ovlm_shard_spec spec = {.mode = d->mode, .node_size = d->node_size,
                                  .experts = d->experts};
    ovlm_model *model = d->model[self->rank];
    double lr[PARAMS_MOST], decay[PARAMS_MOST], wide = d->dtype == OVLM_BF16 ? 2e-2 : 1e-5;
    ovlm_shard *shard = NULL;
    RTRY(self, ovlm_shard_open(model, self->comm, &spec, &shard, &self->err));
    if (shard == NULL) {
        return;
    }
    for (int64_t step = 1; step <= STEPS; step++) {
        ovlm_model_step done = {0};
        RTRY(self, backwards(self, shard, &self->err));
        RTRY(self, ovlm_shard_reduce(shard, &self->err));
        if (step == 1) {
            compare(self, shard, OVLM_SHARD_GRAD, d->grads, NULL, wide, 0.01 * wide);
        }
        const ovlm_model_adamw options = adamw_of(step, lr, decay);
        RTRY(self, ovlm_shard_adamw(shard, &options, &done, &self->err));
        RCHECK(self, step > 1 || fabs(done.grad_norm - d->grad_norm) <= wide * d->grad_norm,
               "%s: norm %g, alone %g", d->name, done.grad_norm, d->grad_norm);
    }
    /* Signs of near-zero gradients decide steps of a whole lr: all of the update is what counts. */
    compare(self, shard, OVLM_SHARD_WEIGHT, d->weights, d->start, 0,
            d->dtype == OVLM_BF16 ? 0.3 : 1e-3);
    check_memory(self, shard, &spec);
    RTRY(self, ovlm_shard_undo(shard, &self->err));
    ovlm_shard_close(shard);
    RTRY(self, run_pack(d, model, &d->pack[self->rank][0], false, &self->err));
}

/* ---- drills ---- */

static void open_drill(drill *d)
{
    d->seed = ovlm_rng_next(&test_rng);
    d->fail_rank = -1;
    d->alone = new_model(d);
    for (int64_t r = 0; r < d->n; r++) {
        d->model[r] = new_model(d);
        for (int k = 0; k < PACKS; k++) {
            rig_draw_batch(&d->pack[r][k], d->config->audio.depth > 0);
            d->idle[r][k] = rig_below(4) == 0;
        }
    }
}

static void close_drill(drill *d)
{
    ovlm_model_close(d->alone);
    for (int64_t r = 0; r < d->n; r++) {
        ovlm_model_close(d->model[r]);
    }
    free(d->grads);
    free(d->weights);
    free(d->start);
}

/* Of one that is open; closes it. */
static void live_drill(drill *d)
{
    rig_rank ranks[RIG_RANKS_MOST];
    const ovlm_comm_local_options options = {.silent_s = 20};
    live_alone(d);
    rig_run(d->name, d->n, &options, live, d, ranks);
    close_drill(d);
}

static void set_modes(drill *d, ovlm_shard_mode mode)
{
    static const char *const names[] = {"ddp", "zero1", "fsdp", "hybrid"};
    for (int i = 0; i < UNITS_MOST; i++) {
        d->mode[i] = mode;
    }
    d->name = names[mode];
    d->node_size = d->n % 2 == 0 ? 2 : 1;
}

static void run_drill(drill *d)
{
    open_drill(d);
    live_drill(d);
}

/* Each unit its own way. */
static void mix_modes(drill *d)
{
    set_modes(d, OVLM_SHARD_DDP);
    d->name = "mixed";
    for (int i = 0; i < UNITS_MOST; i++) {
        d->mode[i] = (ovlm_shard_mode)rig_below(OVLM_SHARD_MODES);
    }
}

static void test_modes(const ovlm_model_config *config)
{
    for (int mode = 0; mode <= OVLM_SHARD_MODES; mode++) {
        for (int64_t n = 1; n <= RANKS_MOST; n++) {
            drill d = {.ops = rig_below(4) == 0 ? "async" : "cpu", .config = config, .n = n,
                       .dtype = rig_below(4) == 0 ? OVLM_BF16 : OVLM_F32,
                       .checkpoint = (ovlm_checkpoint)rig_below(3), .adapted = rig_below(3) == 0,
                       .frozen = rig_below(3) == 0, .last = rig_below(3) > 0};
            if (mode == OVLM_SHARD_MODES) {
                mix_modes(&d);
            } else {
                set_modes(&d, (ovlm_shard_mode)mode);
            }
            run_drill(&d);
        }
    }
}

/* Experts on several ranks, the rest in any way. */
static void test_experts(const ovlm_model_config *config)
{
    for (int i = 0; i < 12; i++) {
        int64_t n = 2 + i % (RANKS_MOST - 1), e = n == 4 && rig_below(2) == 0 ? 2 : n;
        drill d = {.ops = rig_below(4) == 0 ? "async" : "cpu", .config = config, .n = n,
                   .experts = e, .expert_rows = rig_below(2) == 0 ? 1 + rig_below(30) : 0,
                   .dtype = rig_below(4) == 0 ? OVLM_BF16 : OVLM_F32,
                   .checkpoint = (ovlm_checkpoint)rig_below(3), .frozen = rig_below(3) == 0,
                   .last = rig_below(3) > 0};
        if (rig_below(2) == 0) {
            mix_modes(&d);
        } else {
            set_modes(&d, (ovlm_shard_mode)rig_below(OVLM_SHARD_HYBRID));
        }
        const ovlm_params *p = NULL;
        open_drill(&d);
        p = ovlm_model_params(d.alone);
        for (int64_t u = 0; u < p->units; u++) {
            if (p->unit[u].kind == OVLM_UNIT_EXPERTS && d.mode[u] == OVLM_SHARD_HYBRID) {
                d.mode[u] = OVLM_SHARD_FSDP;
            }
        }
        live_drill(&d);
    }
}

/* ---- trouble ---- */

/* A step in which a hook of one rank fails; the others hear of it by its closed communicator. */
static void fail(rig_rank *self)
{
    drill *d = (drill *)(uintptr_t)self->ctx;
    const ovlm_shard_spec spec = {.mode = d->mode, .node_size = d->node_size};
    double lr[PARAMS_MOST], decay[PARAMS_MOST];
    const ovlm_model_adamw options = adamw_of(1, lr, decay);
    ovlm_model_step done;
    ovlm_shard *shard = NULL;
    RTRY(self, ovlm_shard_open(d->model[self->rank], self->comm, &spec, &shard, &self->err));
    if (shard == NULL) {
        return;
    }
    if (self->rank == d->fail_rank) {
        ovlm_shard_fail_after(shard, d->fail_after);
    }
    self->status = backwards(self, shard, &self->err);
    if (self->status == OVLM_OK) {
        self->status = ovlm_shard_adamw(shard, &options, &done, &self->err);
    }
    if (self->status == OVLM_OK) {
        self->status = ovlm_comm_barrier(self->comm, &self->err);
    }
    d->failed[self->rank] = self->status;
    ovlm_shard_close(shard);
}

static void test_trouble(const ovlm_model_config *config, ovlm_shard_mode mode, int64_t n)
{
    const ovlm_comm_local_options options = {.silent_s = 20};
    rig_rank ranks[RIG_RANKS_MOST];
    int64_t failures = 0;
    for (bool over = false; !over; failures += 1 + rig_below(5)) {
        drill d = {.ops = "cpu", .config = config, .n = n, .dtype = OVLM_F32, .last = true};
        set_modes(&d, mode);
        open_drill(&d);
        d.fail_rank = rig_below(n);
        d.fail_after = failures;
        rig_run("trouble", n, &options, fail, &d, ranks);
        over = d.failed[d.fail_rank] == OVLM_OK;
        for (int64_t r = 0; r < n && !over; r++) {
            ovlm_status wanted = r == d.fail_rank ? OVLM_E_INTERNAL : OVLM_E_COMM;
            CHECK(d.failed[r] == (int64_t)wanted, "%s, hook %lld of rank %lld: rank %lld: %s",
                  d.name, (long long)failures, (long long)d.fail_rank, (long long)r,
                  ranks[r].err.message);
            CHECK(ranks[r].took_s < 15, "rank %lld waited for %g s", (long long)r,
                  ranks[r].took_s);
        }
        close_drill(&d);
    }
    CHECK(failures > 20, "%lld hooks", (long long)failures);
}

/* What is refused, and what a closed shard leaves. */
static void refuse(rig_rank *self)
{
    drill *d = (drill *)(uintptr_t)self->ctx;
    ovlm_shard_spec spec = {.mode = d->mode, .node_size = 3};
    ovlm_model *model = d->model[self->rank];
    ovlm_shard *shard = NULL;
    ovlm_err err = {0};
    ovlm_shard_mode other[UNITS_MOST] = {OVLM_SHARD_ZERO1};
    RCHECK(self, ovlm_shard_open(model, self->comm, &spec, &shard, &err) == OVLM_E_ARG && !shard,
           "node_size 3 of 2 ranks");
    spec.node_size = 2;
    const ovlm_shard_spec mine = {.mode = self->rank == 0 ? other : d->mode, .node_size = 2};
    RCHECK(self, ovlm_shard_open(model, self->comm, &mine, &shard, &err) == OVLM_E_ARG && !shard,
           "other modes on rank 0");
    RTRY(self, ovlm_shard_open(model, self->comm, &spec, &shard, &self->err));
    ovlm_shard *again = NULL;
    RCHECK(self, ovlm_shard_open(model, self->comm, &spec, &again, &err) == OVLM_E_ARG, "twice");
    ovlm_shard_last(shard);
    RTRY(self, run_pack(d, model, &d->pack[self->rank][0], false, &self->err));
    RCHECK(self, run_pack(d, model, &d->pack[self->rank][0], false, &err) == OVLM_E_ARG,
           "a second last backward");
    RCHECK(self, ovlm_shard_reduce(shard, &err) == OVLM_E_ARG, "void gradients");
    RTRY(self, ovlm_shard_zero_grad(shard, &self->err));
    RTRY(self, run_pack(d, model, &d->pack[self->rank][0], false, &self->err));
    ovlm_shard_close(shard);
    RCHECK(self, run_pack(d, model, &d->pack[self->rank][0], false, &err) == OVLM_E_ARG,
           "weights that are gone");
}

static void test_refusals(const ovlm_model_config *config)
{
    rig_rank ranks[RIG_RANKS_MOST];
    const ovlm_comm_local_options options = {.silent_s = 20};
    drill d = {.ops = "cpu", .config = config, .n = 2, .dtype = OVLM_F32};
    set_modes(&d, OVLM_SHARD_HYBRID);
    open_drill(&d);
    rig_run("refusals", d.n, &options, refuse, &d, ranks);
    close_drill(&d);
}

/* What is kept in shards falls as 1/N, up to the cuts' alignment. */
static void test_falls(const ovlm_model_config *config)
{
    ovlm_arena arena = {0};
    ovlm_params p = {0};
    ovlm_err err = {0};
    ovlm_shard_mode mode[UNITS_MOST];
    CHECK(ovlm_params_init(&p, config, &arena, &err) == OVLM_OK, "%s", err.message);
    p.dtype = p.exact = OVLM_F32;
    for (int i = 0; i < UNITS_MOST; i++) {
        mode[i] = OVLM_SHARD_FSDP;
    }
    const ovlm_shard_spec spec = {.mode = mode};
    ovlm_shard_bytes one;
    CHECK(ovlm_shard_memory(&p, &spec, 1, 0, &one, &err) == OVLM_OK, "%s", err.message);
    for (int64_t n = 2; n <= 16; n++) {
        int64_t total = 0;
        for (int64_t r = 0; r < n; r++) {
            ovlm_shard_bytes part;
            CHECK(ovlm_shard_memory(&p, &spec, n, r, &part, &err) == OVLM_OK, "%s", err.message);
            total += part.training_bytes;
            CHECK(part.training_bytes <= one.training_bytes / n + p.units * 3 * 256,
                  "rank %lld of %lld: %lld of %lld bytes", (long long)r, (long long)n,
                  (long long)part.training_bytes, (long long)one.training_bytes);
            CHECK(part.buffers_bytes == one.buffers_bytes, "buffers");
        }
        CHECK(total >= one.training_bytes && total <= one.training_bytes + n * p.units * 3 * 64,
              "%lld ranks hold %lld of %lld bytes", (long long)n, (long long)total,
              (long long)one.training_bytes);
    }
    ovlm_arena_free(&arena);
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    ovlm_model_config configs[] = {rig_qwen(false), rig_qwen(true), rig_seed(), rig_omni()};
    for (int i = 0; i < 4; i++) {
        test_falls(&configs[i]);
        test_modes(&configs[i]);
    }
    for (int i = 1; i < 4; i++) {
        test_experts(&configs[i]);
    }
    test_refusals(&configs[1]);
    test_trouble(&configs[0], OVLM_SHARD_DDP, 2);
    test_trouble(&configs[1], OVLM_SHARD_FSDP, 3);
    test_trouble(&configs[0], OVLM_SHARD_HYBRID, 4);
    return test_end("shard");
}
