/* test_model_hooks.c - weights and gradients that are elsewhere most of the time (hook_keeper.h)
 * change no bit of any pass; passes with nothing to do go the same way as others; a hook that
 * fails, or an interruption, leaves the model usable. */
#include "hook_keeper.h"

/* ---- a life: every call that reads weights, in steps that can be repeated ---- */

enum { NEXT_TOKENS = SEGMENTS - 1 };

typedef struct life {
    const batch *batch;
    bool empty;             /* nothing to do, in every call                                     */
    ovlm_pass_options pass;
    ovlm_model *model;
    keeper *keeper;         /* or NULL                                                          */
    ovlm_model_output out[3];
    float logp[TOKENS], entropy[TOKENS], hidden[TOKENS * WIDTH], logits[2 * VOCAB];
    float features[IMAGE_ROWS * WIDTH], extra[IMAGE_ROWS * WIDTH], sounds[SOUND_ROWS * WIDTH];
    float dfeatures[IMAGE_ROWS * WIDTH], dextra[IMAGE_ROWS * WIDTH], dsounds[SOUND_ROWS * WIDTH];
    float next[2][SEGMENTS * VOCAB];
    char *grads;            /* as they lie in the keeper                                        */
    int64_t grad_bytes;
} life;

static ovlm_model_inputs inputs_of(const life *l)
{
    static const int32_t none[SEGMENTS + 1] = {0};
    ovlm_model_inputs in = rig_inputs(l->batch);
    if (l->empty) { /* counts of 0, pointers to nothing: the same phases */
        in.tokens = (ovlm_tokens){.segments = SEGMENTS, .start = none};
        in.images = in.sounds = 0;
        in.pixels = in.mel = NULL;
    }
    return in;
}

/* A loss of its own: forward and backward. */
static ovlm_status own_loss(life *l, ovlm_err *err)
{
    ovlm_model_inputs in = inputs_of(l);
    ovlm_pass_options pass = l->pass;
    pass.own_loss = true;
    OVLM_TRY(ovlm_model_forward(l->model, &in, &pass, err));
    OVLM_TRY(ovlm_model_output_read(l->model, &l->out[0], NULL, NULL, err));
    return ovlm_model_backward(l->model, &(ovlm_model_slopes){0}, &(ovlm_feature_slopes){0}, &pass,
                               err);
}

/* A loss of the caller's, of all that a forward gives. */
static ovlm_status other_loss(life *l, ovlm_err *err)
{
    ovlm_model_inputs in = inputs_of(l);
    ovlm_pass_options pass = l->pass;
    const int32_t row[2] = {3, TOKENS - 1};
    const ovlm_model_slopes slopes = {.dlogp = l->batch->weight, .dentropy = l->batch->weight,
                                      .dhidden = l->hidden, .rows = l->empty ? 0 : 2, .row = row,
                                      .dlogits = l->logits};
    int64_t count[8] = {5, 9, 1, 0, 7, 2, 0, 0};
    in.router_count = count;
    in.router_rows = 50;
    pass.entropy = true;
    OVLM_TRY(ovlm_model_forward(l->model, &in, &pass, err));
    OVLM_TRY(ovlm_model_output_read(l->model, &l->out[1], l->logp, l->entropy, err));
    OVLM_TRY(ovlm_model_hidden_read(l->model, l->hidden, err));
    OVLM_TRY(ovlm_model_logits(l->model, row, slopes.rows, l->logits, err));
    return ovlm_model_backward(l->model, &slopes, &(ovlm_feature_slopes){0}, &pass, err);
}

static ovlm_status encode(life *l, const ovlm_model_inputs *in, ovlm_err *err)
{
    OVLM_TRY(ovlm_model_encode(l->model, OVLM_VISION, in, &l->pass, err));
    OVLM_TRY(ovlm_model_features_read(l->model, OVLM_VISION, l->features, l->extra, err));
    if (l->batch->hears) {
        OVLM_TRY(ovlm_model_encode(l->model, OVLM_AUDIO, in, &l->pass, err));
        OVLM_TRY(ovlm_model_features_read(l->model, OVLM_AUDIO, l->sounds, NULL, err));
    }
    return OVLM_OK;
}

/* Phase by phase, with features in the caller's hands. */
static ovlm_status phases(life *l, ovlm_err *err)
{
    ovlm_model_inputs in = inputs_of(l);
    const ovlm_feature_slopes d = {.dfeatures = {l->dfeatures, l->dsounds}, .dextra = l->dextra};
    OVLM_TRY(encode(l, &in, err));
    in.images = in.sounds = 0;
    in.grid_thw = in.mel_length = in.label = NULL;
    in.given[OVLM_VISION].features = l->features;
    in.given[OVLM_VISION].rows = l->empty ? 0 : IMAGE_ROWS;
    in.extra = l->extra;
    if (l->batch->hears) {
        in.given[OVLM_AUDIO].features = l->sounds;
        in.given[OVLM_AUDIO].rows = l->empty ? 0 : SOUND_ROWS;
    }
    OVLM_TRY(ovlm_model_forward(l->model, &in, &l->pass, err));
    OVLM_TRY(ovlm_model_hidden_read(l->model, l->hidden, err));
    OVLM_TRY(ovlm_model_backward(l->model, &(ovlm_model_slopes){.dhidden = l->hidden}, &d,
                                 &l->pass, err));
    OVLM_TRY(ovlm_model_encode_backward(l->model, OVLM_VISION, l->dfeatures, l->dextra, &l->pass,
                                        err));
    if (l->batch->hears) { /* zero: the way is the same */
        OVLM_TRY(ovlm_model_encode_backward(l->model, OVLM_AUDIO, NULL, NULL, &l->pass, err));
        OVLM_TRY(ovlm_model_encode(l->model, OVLM_AUDIO, &(ovlm_model_inputs){
            .sounds = l->empty ? 0 : SOUNDS, .mel_length = l->batch->mel_length,
            .mel = l->batch->mel}, &l->pass, err));
        OVLM_TRY(ovlm_model_encode_backward(l->model, OVLM_AUDIO, l->dsounds, NULL, &l->pass,
                                            err));
    }
    OVLM_TRY(ovlm_model_encode(l->model, OVLM_VISION, &(ovlm_model_inputs){
        .images = l->empty ? 0 : IMAGES, .grid_thw = l->batch->grid, .pixels = l->batch->pixel,
        .pixel_dtype = OVLM_F32}, &l->pass, err));
    return ovlm_model_encode_backward(l->model, OVLM_VISION, NULL, NULL, &l->pass, err);
}

static ovlm_status generate(life *l, ovlm_err *err)
{
    ovlm_model_inputs in = inputs_of(l);
    const int32_t start[SEGMENTS + 1] = {0, 1, 2, 2, NEXT_TOKENS}, none[SEGMENTS + 1] = {0};
    OVLM_TRY(ovlm_model_cache_open(l->model, SEGMENTS, TOKENS, err));
    OVLM_TRY(ovlm_model_extend(l->model, &in, &l->pass, l->next[0], err));
    in = (ovlm_model_inputs){.tokens = {.T = l->empty ? 0 : NEXT_TOKENS, .segments = SEGMENTS,
                                        .id = l->batch->id, .start = l->empty ? none : start,
                                        .position = l->batch->position}};
    OVLM_TRY(ovlm_model_extend(l->model, &in, &l->pass, l->next[1], err));
    ovlm_model_cache_close(l->model);
    return OVLM_OK;
}

typedef ovlm_status (*step_fn)(life *l, ovlm_err *err);
static const step_fn steps[] = {own_loss, other_loss, phases, generate};
enum { STEPS = 4 };

/* Gradients, as the keeper has them or would have them. */
static void read_grads(life *l)
{
    const ovlm_params *p = ovlm_model_params(l->model);
    int64_t element = ovlm_dtype_bytes(p->exact);
    ovlm_err err = {0};
    free(l->grads);
    l->grad_bytes = p->grad_elements * element;
    l->grads = rig_memory(l->grad_bytes);
    memset(l->grads, 0, (size_t)l->grad_bytes);
    for (int64_t i = 0; i < p->n; i++) {
        const ovlm_param *one = &p->param[i];
        if (one->grad_offset < 0) {
            continue;
        }
        char *to = l->grads + one->grad_offset * element;
        if (l->keeper != NULL && l->keeper->hooks.grads) {
            memcpy(to, l->keeper->grads + one->grad_offset * element,
                   (size_t)(one->rows * one->cols * element));
        } else {
            CHECK(ovlm_model_read(l->model, &one->grad, to, &err) == OVLM_OK, "%s", err.message);
        }
    }
}

static void live(life *l)
{
    for (int i = 0; i < STEPS; i++) {
        ovlm_err err = {0};
        ovlm_status status = steps[i](l, &err);
        CHECK(status == OVLM_OK, "step %d: %s", i, err.message);
    }
    read_grads(l);
}

static void same(const char *what, const life *a, const life *b)
{
#define SAME(member) \
    CHECK(memcmp(a->member, b->member, sizeof a->member) == 0, "%s: %s", what, #member)
    SAME(out);
    SAME(logp);
    SAME(entropy);
    SAME(hidden);
    SAME(logits);
    SAME(features);
    SAME(extra);
    SAME(sounds);
    SAME(dfeatures);
    SAME(dextra);
    SAME(dsounds);
    SAME(next);
#undef SAME
    CHECK(a->grad_bytes == b->grad_bytes &&
              memcmp(a->grads, b->grads, (size_t)a->grad_bytes) == 0, "%s: gradients", what);
}

/* ---- models ---- */

typedef struct variant {
    const ovlm_model_config *config;
    const char *ops;
    ovlm_dtype dtype;
    ovlm_checkpoint checkpoint;
    bool adapted;
    uint64_t seed;          /* of weights, and of what is trained                               */
} variant;

/* Everything, or units here and there (never half of a product). */
static ovlm_status freeze(ovlm_model *model, ovlm_err *err)
{
    const ovlm_params *p = ovlm_model_params(model);
    bool mask[256] = {0}, trained[KEEPER_UNITS] = {0};
    int64_t way = rig_below(4);
    CHECK(p->n <= 256 && p->units <= KEEPER_UNITS, "more parameters than room");
    for (int64_t i = 0; i < p->units; i++) {
        ovlm_unit_kind kind = p->unit[i].kind;
        bool tower = kind < OVLM_UNIT_EMBED, some = rig_below(2) == 0;
        trained[i] = way == 0 ? true : way == 1 ? tower && some : way == 2 ? !tower : some;
    }
    for (int64_t i = 0; i < p->n; i++) {
        mask[i] = trained[p->param[i].unit];
    }
    mask[0] = mask[0] || way == 3; /* something is */
    return ovlm_model_train_only(model, mask, err);
}

static ovlm_status adapt(ovlm_model *model, ovlm_err *err)
{
    const ovlm_params *p = ovlm_model_params(model);
    bool mask[256] = {0};
    for (int64_t i = 0; i < p->n; i++) {
        const char *name = p->param[i].name;
        mask[i] = (strstr(name, "q_proj.weight") != NULL || strstr(name, "attn.proj.weight") ||
                   strstr(name, "o_proj.weight") || strstr(name, "shared_experts.up")) &&
                  rig_below(4) > 0;
        mask[i] = mask[i] || strcmp(name, "model.visual.blocks.0.attn.qkv.weight") == 0;
    }
    return ovlm_model_lora_open(model, mask, 3, 0.5, err);
}

/* The same for the same variant. */
static ovlm_model *open_model(const variant *v, const ovlm_model_hooks *hooks)
{
    ovlm_model *model = NULL;
    ovlm_err err = {0};
    ovlm_rng held = test_rng;
    ovlm_rng_init(&test_rng, v->seed);
    ovlm_status status = ovlm_model_open(v->config, ovlm_cpu_ops_find(v->ops),
                                         &(ovlm_backend_options){.threads = 1}, v->dtype, hooks,
                                         &model, &err);
    if (status == OVLM_OK && v->adapted) {
        status = adapt(model, &err);
    }
    if (status == OVLM_OK && (!v->adapted || rig_below(2) == 0)) {
        status = freeze(model, &err);
    }
    if (status == OVLM_OK && hooks == NULL) {
        status = rig_write_weights(model, v->seed, &err);
    }
    CHECK(status == OVLM_OK, "%s", err.message);
    if (status != OVLM_OK) {
        exit(1);
    }
    test_rng = held;
    return model;
}

static life new_life(const variant *v, ovlm_model *model, keeper *k, const batch *b)
{
    return (life){.batch = b, .model = model, .keeper = k,
                  .pass = {.training = true, .checkpoint = v->checkpoint}};
}

static void end_life(life *l)
{
    ovlm_model_close(l->model);
    free(l->grads);
}

/* ---- tests ---- */

/* Hooks of any kind against none. */
static void test_same(const variant *v, const batch *b)
{
    life plain = new_life(v, open_model(v, NULL), NULL, b);
    live(&plain);
    CHECK(isfinite(plain.out[0].loss) && plain.out[0].loss > 1, "loss %g", plain.out[0].loss);
    for (int holds = 0; holds < 4; holds++) {
        keeper k;
        life hooked = new_life(v, open_model(v, NULL), &k, b);
        keeper_open(&k, hooked.model, holds & 1, holds & 2);
        k.late = rig_below(2) == 0;
        live(&hooked);
        same(holds == 3 ? "all held" : "hooked", &plain, &hooked);
        end_life(&hooked);
        keeper_close(&k);
    }
    end_life(&plain);
}

/* The way of an empty batch is that of a full one, and adds nothing to gradients. */
static void test_empty(const variant *v, const batch *b)
{
    keeper full, none;
    life with = new_life(v, open_model(v, NULL), &full, b);
    life without = new_life(v, open_model(v, NULL), &none, b);
    keeper_open(&full, with.model, true, true);
    keeper_open(&none, without.model, true, true);
    live(&with);
    int64_t grad_bytes = with.grad_bytes;
    memcpy(none.grads, full.grads, (size_t)grad_bytes);
    without.empty = true;
    live(&without);
    CHECK(full.events == none.events &&
              memcmp(full.event, none.event, (size_t)full.events * sizeof *full.event) == 0,
          "another way with nothing to do: %lld and %lld hooks", (long long)full.events,
          (long long)none.events);
    CHECK(memcmp(none.grads, full.grads, (size_t)grad_bytes) == 0, "gradients of nothing");
    for (int i = 0; i < 2; i++) {
        const ovlm_model_output *out = &without.out[i];
        CHECK(out->loss == 0 && out->aux_loss == 0 && out->weight_sum == 0 &&
                  out->target_tokens == 0, "loss %g of nothing", out->loss);
    }
    end_life(&with);
    end_life(&without);
    keeper_close(&full);
    keeper_close(&none);
}

/* ---- trouble ---- */

static int64_t polls_left = -1;

static int poll(void *ctx)
{
    (void)ctx;
    polls_left -= polls_left > 0;
    return polls_left == 0;
}

/* Tries a step until the trouble comes too late for it; each failure leaves gradients void. */
static int64_t try_step(life *l, int step, bool stop)
{
    const ovlm_params *p = ovlm_model_params(l->model);
    int64_t bytes = p->grad_elements * ovlm_dtype_bytes(p->exact);
    char *before = rig_memory(bytes);
    memcpy(before, l->keeper->grads, (size_t)bytes);
    for (int64_t after = 0;; after++) {
        ovlm_err err = {0};
        l->keeper->events = 0;
        polls_left = stop ? after + 1 : -1;
        l->keeper->fail_after = stop ? -1 : after;
        ovlm_status status = steps[step](l, &err);
        polls_left = l->keeper->fail_after = -1;
        bool meant = status == (stop ? OVLM_E_INTERRUPTED : OVLM_E_COMM);
        CHECK(meant || status == OVLM_OK, "%s", err.message);
        if (!meant) {
            free(before);
            return after;
        }
        CHECK(l->keeper->held == 0, "%lld units held", (long long)l->keeper->held);
        memcpy(l->keeper->grads, before, (size_t)bytes);
    }
}

static void test_trouble(const variant *v, const batch *b)
{
    life plain = new_life(v, open_model(v, NULL), NULL, b);
    live(&plain);
    for (int stop = 0; stop < 2; stop++) {
        keeper k;
        life l = new_life(v, open_model(v, NULL), &k, b);
        l.pass.poll = poll;
        keeper_open(&k, l.model, true, true);
        for (int step = 0; step < STEPS; step++) {
            int64_t failures = try_step(&l, step, stop == 1);
            CHECK(failures >= 4, "%lld failures", (long long)failures);
        }
        read_grads(&l);
        same("after trouble", &plain, &l);
        end_life(&l);
        keeper_close(&k);
    }
    end_life(&plain);
}

/* What hooks hold is not the model's, and comes back as zeros. */
static void test_held(const variant *v)
{
    const double none[256] = {0};
    const ovlm_model_adamw adamw = {.lr = none, .weight_decay = none, .step = 1};
    const bool mask[256] = {true};
    ovlm_model_step step;
    ovlm_tensor m, w, master;
    ovlm_model_memory memory;
    ovlm_err err = {0};
    keeper k = {.fail_after = -1};
    k.hooks = (ovlm_model_hooks){.ctx = &k, .weights = true, .grads = true, .begin = keeper_begin,
                                 .acquire = keeper_acquire, .release = keeper_release,
                                 .reduce = keeper_reduce, .end = keeper_end};
    ovlm_model *model = open_model(v, &k.hooks);
    const ovlm_params *p = ovlm_model_params(model);
    float row[VOCAB * WIDTH];
    k.model = model;
    ovlm_model_memory_read(model, &memory);
    CHECK(memory.weights_bytes == p->buffer_elements * ovlm_dtype_bytes(p->exact) &&
              memory.training_bytes == 0, "%lld bytes of weights", (long long)memory.weights_bytes);
    CHECK(ovlm_model_read(model, &p->embed.w, row, &err) == OVLM_E_ARG, "read");
    CHECK(ovlm_model_adamw_step(model, &adamw, &step, &err) == OVLM_E_ARG, "step");
    CHECK(ovlm_model_moments(model, 0, &m, &w, &master, &err) == OVLM_E_ARG, "moments");
    CHECK(ovlm_model_average_open(model, &err) == OVLM_E_ARG, "average");
    CHECK(ovlm_model_lora_open(model, mask, 1, 1, &err) == OVLM_E_ARG, "adapters");
    CHECK(ovlm_model_zero_grad(model, &err) == OVLM_OK, "%s", err.message);
    CHECK(ovlm_model_set_hooks(model, NULL, &err) == OVLM_OK, "%s", err.message);
    CHECK(ovlm_model_read(model, &p->embed.w, row, &err) == OVLM_OK && row[0] == 0, "read");
    ovlm_model_memory_read(model, &memory);
    CHECK(memory.weights_bytes > p->weight_elements, "%lld", (long long)memory.weights_bytes);
    ovlm_model_close(model);
}

/* What is placed for good is the model's to read, until what is trained changes. */
static void test_placed(const variant *v)
{
    const ovlm_model_hooks hooks = {.weights = true, .grads = true};
    ovlm_model *model = open_model(v, &hooks);
    const ovlm_params *p = ovlm_model_params(model);
    const ovlm_unit *unit = &p->unit[p->embed.unit];
    ovlm_unit_memory at = {0};
    bool mask[256] = {0};
    float row[VOCAB * WIDTH];
    ovlm_err err = {0};
    mask[p->embed.first] = true;
    CHECK(ovlm_model_train_only(model, mask, &err) == OVLM_OK, "%s", err.message);
    at.weights = rig_memory(unit->elements * (int64_t)sizeof(float));
    at.grads = rig_memory(unit->grad_elements * (int64_t)sizeof(float));
    ((float *)at.weights)[VOCAB * WIDTH - 1] = 7;
    ovlm_model_place(model, p->embed.unit, &at);
    CHECK(ovlm_model_read(model, &p->embed.w, row, &err) == OVLM_OK &&
              row[VOCAB * WIDTH - 1] == 7, "%s", err.message);
    CHECK(ovlm_model_read(model, &p->embed.dw, row, &err) == OVLM_OK, "%s", err.message);
    CHECK(ovlm_model_train_only(model, mask, &err) == OVLM_OK, "%s", err.message);
    CHECK(ovlm_model_read(model, &p->embed.w, row, &err) == OVLM_OK, "%s", err.message);
    CHECK(ovlm_model_read(model, &p->embed.dw, row, &err) == OVLM_E_ARG, "a place of before");
    ovlm_model_close(model);
    free(at.weights);
    free(at.grads);
}

/* Every parameter is in one unit, at its place, and units do not overlap. */
static void test_units(const ovlm_model_config *config)
{
    ovlm_arena arena = {0};
    ovlm_params p = {0};
    ovlm_err err = {0};
    CHECK(ovlm_params_init(&p, config, &arena, &err) == OVLM_OK, "%s", err.message);
    int64_t end = 0, grads = 0;
    for (int64_t u = 0; u < p.units; u++) {
        CHECK(p.unit[u].offset == end && p.unit[u].grad_offset == grads, "%s", p.unit[u].name);
        end += p.unit[u].elements;
        grads += p.unit[u].grad_elements;
        for (int64_t other = 0; other < u; other++) {
            CHECK(strcmp(p.unit[u].name, p.unit[other].name) != 0, "%s twice", p.unit[u].name);
        }
    }
    CHECK(end == p.weight_elements && grads == p.grad_elements, "%lld", (long long)end);
    for (int64_t i = 0; i < p.n; i++) {
        const ovlm_param *one = &p.param[i];
        const ovlm_unit *unit = &p.unit[one->unit];
        int64_t size = one->rows * one->cols, from = one->offset - unit->offset;
        CHECK(one->kind == OVLM_PARAM_BUFFER || (from >= 0 && from + size <= unit->elements),
              "%s is outside of %s", one->name, unit->name);
        CHECK((strstr(one->name, ".experts.") != NULL) == (unit->kind == OVLM_UNIT_EXPERTS),
              "%s in %s", one->name, unit->name);
    }
    ovlm_arena_free(&arena);
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    ovlm_model_config configs[] = {rig_qwen(false), rig_qwen(true), rig_seed(), rig_omni()};
    for (int i = 0; i < 4; i++) {
        batch b = {0};
        rig_draw_batch(&b, configs[i].audio.depth > 0);
        configs[i].decoder.tied = i == 0 || rig_below(2) == 0;
        test_units(&configs[i]);
        for (int checkpoint = 0; checkpoint < 3; checkpoint++) {
            variant v = {.config = &configs[i], .ops = "cpu", .seed = ovlm_rng_next(&test_rng),
                         .dtype = OVLM_F32, .checkpoint = (ovlm_checkpoint)checkpoint};
            test_same(&v, &b);
            test_empty(&v, &b);
            test_trouble(&v, &b);
            test_held(&v);
            test_placed(&v);
            v.adapted = true;
            v.seed = ovlm_rng_next(&test_rng);
            test_same(&v, &b);
            test_empty(&v, &b);
            v.ops = "async";
            test_same(&v, &b);
            v.dtype = OVLM_BF16;
            v.adapted = false;
            test_same(&v, &b);
            test_empty(&v, &b);
        }
    }
    return test_end("model_hooks");
}
