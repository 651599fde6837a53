/* Rows to the ranks of their experts and back, against a list of all rows of all ranks; and models
 * whose experts are on several ranks against the same model alone, to the last bit. */
#include "comm_rig.h"
#include "model_rig.h"

#include "engine/expert_parallel.h"

enum { EXPERTS_MOST = 12, SLOTS_MOST = 40, LAYERS = 2, HIDDEN_BYTES = TOKENS * WIDTH * 4 };

/* ---- rounds ---- */

typedef struct trip_case {
    const ovlm_ops *ops;
    int64_t degree, experts, k, bound;
    int64_t count[LAYERS][RIG_RANKS_MOST][EXPERTS_MOST]; /* rows of a rank for an expert */
    int64_t T[RIG_RANKS_MOST];
} trip_case;

/* A row's number says whose it is. */
static float number_of(int64_t rank, int64_t row)
{
    return (float)(rank * 1000 + row);
}

/* Slots of every rank, anyhow: the same number in each layer, most of them for few experts. */
static void draw_trip(trip_case *c)
{
    int64_t favourite = rig_below(c->experts);
    for (int64_t r = 0; r < c->degree; r++) {
        c->T[r] = rig_below(3) == 0 ? 0 : rig_below(SLOTS_MOST / c->k + 1);
        for (int64_t s = 0; s < LAYERS * c->T[r] * c->k; s++) {
            int64_t e = rig_below(2) == 0 ? favourite : rig_below(c->experts);
            c->count[s % LAYERS][r][e]++;
        }
    }
}

/* What a rank must hold of a layer, in the order of experts. */
static int64_t list_rows(const trip_case *c, int64_t layer, int64_t rank, float *row)
{
    int64_t n = 0, end = ovlm_expert_cut(c->experts, c->degree, rank + 1);
    for (int64_t e = ovlm_expert_cut(c->experts, c->degree, rank); e < end; e++) {
        for (int64_t r = 0; r < c->degree; r++) {
            int64_t before = 0;
            for (int64_t lower = 0; lower < e; lower++) {
                before += c->count[layer][r][lower];
            }
            for (int64_t i = 0; i < c->count[layer][r][e]; i++) {
                row[n++] = number_of(r, before + i);
            }
        }
    }
    return n;
}

typedef struct trip {
    const ovlm_expert_pass *pass;
    ovlm_queue *queue;
    int64_t layer;
    float held[RIG_RANKS_MOST * SLOTS_MOST]; /* in the order of experts */
    int64_t n;
} trip;

static ovlm_status fetch(ovlm_run *run, void *host, const void *device, int64_t bytes)
{
    if (bytes > 0) {
        OVLM_TRY(run->ops->copy(run->queue, host, device, bytes, OVLM_TO_HOST, run->err));
    }
    return run->ops->queue_wait(run->queue, run->err);
}

/* Notes what came, in the order of experts. */
static ovlm_status note(rig_rank *self, ovlm_run *run, const ovlm_expert_round *round,
                        ovlm_tensor came, trip *t)
{
    float *row = rig_bytes(4 * round->rows);
    int32_t *place = rig_bytes(4 * round->rows), offsets[EXPERTS_MOST + 1];
    OVLM_TRY(fetch(run, row, came.data, 4 * round->rows));
    OVLM_TRY(fetch(run, place, round->arrived, 4 * round->rows));
    OVLM_TRY(fetch(run, offsets, round->offsets, 4 * (round->held + 1)));
    for (int64_t i = 0; i < round->rows; i++) {
        t->held[t->n++] = row[place[i]];
    }
    RCHECK(self, offsets[0] == 0 && offsets[round->held] == round->rows, "offsets");
    free(row);
    free(place);
    return OVLM_OK;
}

/* A round there and back; what comes back is doubled on the way. */
static ovlm_status go_round(rig_rank *self, ovlm_run *run, int64_t i, ovlm_tensor own,
                            ovlm_tensor back, trip *t)
{
    ovlm_expert_round round;
    int64_t mark = run->work->used_bytes, rows = 0;
    OVLM_TRY(ovlm_expert_round_begin(run, t->pass, t->layer, i, run->work, &round));
    ovlm_tensor packed = ovlm_stack_tensor(run->work, round.sent, 1, OVLM_F32);
    ovlm_tensor came = ovlm_stack_tensor(run->work, round.rows, 1, OVLM_F32);
    RCHECK(self, round.rows <= t->pass->bound[self->rank], "more than the bound");
    for (int64_t at = 0; at < round.sent && !run->measuring; at += rows) {
        int64_t first = ovlm_expert_range(&round, at, &rows);
        OVLM_TRY(run->ops->copy(run->queue, (float *)packed.data + at, (float *)own.data + first,
                                4 * rows, OVLM_ON_DEVICE, run->err));
    }
    OVLM_TRY(ovlm_expert_send(run, &round, packed, came));
    if (!run->measuring) {
        OVLM_TRY(note(self, run, &round, came, t));
    }
    ovlm_scale twice = {.alpha = 2, .x = came, .y = came};
    RUN(run, scale, fwd, &twice);
    OVLM_TRY(ovlm_expert_return(run, &round, came, packed));
    for (int64_t at = 0; at < round.sent && !run->measuring; at += rows) {
        int64_t first = ovlm_expert_range(&round, at, &rows);
        OVLM_TRY(run->ops->copy(run->queue, (float *)back.data + first, (float *)packed.data + at,
                                4 * rows, OVLM_ON_DEVICE, run->err));
    }
    run->work->used_bytes = mark;
    return OVLM_OK;
}

/* Own rows, and where those of each expert begin, on the device. */
static ovlm_status lay_out(rig_rank *self, ovlm_run *run, int64_t layer, ovlm_tensor own,
                           void **offsets)
{
    const trip_case *c = self->ctx;
    int32_t at[EXPERTS_MOST + 1] = {0};
    float *numbers = rig_bytes(4 * own.rows);
    for (int64_t e = 0; e < c->experts; e++) {
        at[e + 1] = at[e] + (int32_t)c->count[layer][self->rank][e];
    }
    for (int64_t i = 0; i < own.rows; i++) {
        numbers[i] = number_of(self->rank, i);
    }
    ovlm_status status = ovlm_run_upload(run, run->keep, at, 4 * (c->experts + 1), offsets);
    if (status == OVLM_OK) {
        status = ovlm_run_load(run, numbers, &own, 0);
    }
    free(numbers);
    return status;
}

static ovlm_status walk_layer(rig_rank *self, ovlm_run *run, trip *t)
{
    const trip_case *c = self->ctx;
    void *offsets = NULL;
    ovlm_tensor own = ovlm_stack_tensor(run->keep, t->pass->rows, 1, OVLM_F32);
    ovlm_tensor back = ovlm_stack_tensor(run->keep, t->pass->rows, 1, OVLM_F32);
    t->n = 0;
    OVLM_TRY(lay_out(self, run, t->layer, own, &offsets));
    OVLM_TRY(ovlm_expert_share(run, t->pass, t->layer, offsets));
    int64_t rounds = ovlm_expert_rounds(run, t->pass, t->layer);
    for (int64_t i = 0; i < rounds; i++) {
        OVLM_TRY(go_round(self, run, i, own, back, t));
    }
    if (run->measuring) {
        return OVLM_OK;
    }
    float wanted[RIG_RANKS_MOST * SLOTS_MOST], is[SLOTS_MOST];
    int64_t n = list_rows(c, t->layer, self->rank, wanted);
    RCHECK(self, n == t->n && memcmp(wanted, t->held, (size_t)n * 4) == 0,
           "%lld rows, not the %lld in their order", (long long)t->n, (long long)n);
    OVLM_TRY(fetch(run, is, back.data, 4 * back.rows));
    for (int64_t i = 0; i < back.rows; i++) {
        RCHECK(self, is[i] == 2 * number_of(self->rank, i), "row %lld came back as %g",
               (long long)i, (double)is[i]);
    }
    return OVLM_OK;
}

static void trip_rank(rig_rank *self)
{
    const trip_case *c = self->ctx;
    const ovlm_backend_options options = {.threads = 1};
    ovlm_backend *backend = NULL;
    ovlm_arena arena = {0};
    ovlm_expert_ranks ranks;
    ovlm_expert_pass *pass = NULL;
    ovlm_stack keep = {0}, work = {0}, stage = {0};
    const ovlm_expert_terms terms = {.T = c->T[self->rank], .k = c->k, .layers = LAYERS,
                                     .experts = c->experts, .chunk_rows = c->bound};
    trip t = {0};
    RTRY(self, ovlm_expert_ranks_init(&ranks, self->comm, &arena, &self->err));
    RTRY(self, ovlm_expert_prepare(&ranks.table, &terms, &arena, &pass, &self->err));
    RTRY(self, c->ops->open(&options, &backend, &self->err));
    RTRY(self, c->ops->queue_open(backend, &t.queue, &self->err));
    t.pass = pass;
    ovlm_run run = {.queue = t.queue, .ops = c->ops, .measuring = true, .keep = &keep,
                    .work = &work, .stage = &stage, .dtype = OVLM_F32, .exact = OVLM_F32,
                    .err = &self->err};
    for (t.layer = 0; t.layer < LAYERS; t.layer++) {
        RTRY(self, walk_layer(self, &run, &t));
    }
    RTRY(self, ovlm_stack_fit(&keep, backend, OVLM_STACK_DEVICE, keep.peak_bytes, &self->err));
    RTRY(self, ovlm_stack_fit(&work, backend, OVLM_STACK_DEVICE, work.peak_bytes, &self->err));
    RTRY(self, ovlm_stack_fit(&stage, backend, OVLM_STACK_HOST, stage.peak_bytes, &self->err));
    run.measuring = false;
    for (t.layer = 0; t.layer < LAYERS; t.layer++) {
        RTRY(self, walk_layer(self, &run, &t));
    }
    RCHECK(self, keep.used_bytes <= keep.size_bytes && work.peak_bytes <= work.size_bytes &&
                     stage.peak_bytes <= stage.size_bytes, "more memory than was measured");
    ovlm_stack_free(&keep, backend, OVLM_STACK_DEVICE);
    ovlm_stack_free(&work, backend, OVLM_STACK_DEVICE);
    ovlm_stack_free(&stage, backend, OVLM_STACK_HOST);
    c->ops->queue_close(t.queue);
    c->ops->close(backend);
    ovlm_arena_free(&arena);
}

static void test_rounds(void)
{
    rig_rank ranks[RIG_RANKS_MOST];
    for (int i = 0; i < 40; i++) {
        trip_case c = {.ops = ovlm_cpu_ops_find(i % 2 == 0 ? "cpu" : "async"),
                       .degree = 1 + rig_below(6), .k = 1 + rig_below(3)};
        c.experts = c.degree + rig_below(EXPERTS_MOST - c.degree + 1);
        c.bound = rig_below(3) == 0 ? 0 : 1 + rig_below(SLOTS_MOST);
        draw_trip(&c);
        rig_run("rounds", c.degree, NULL, trip_rank, &c, ranks);
    }
}

/* ---- models ---- */

typedef struct duel {
    const char *ops;
    const ovlm_model_config *config;
    ovlm_dtype dtype;
    ovlm_checkpoint checkpoint;
    int64_t degree, expert_rows;
    bool training, one_sided;      /* one_sided: all tokens choose the same experts */
    uint64_t seed;
    ovlm_model *alone, *model[RIG_RANKS_MOST];
    batch pack[RIG_RANKS_MOST];
    bool idle[RIG_RANKS_MOST];
    char hidden[RIG_RANKS_MOST][HIDDEN_BYTES];
    double loss[RIG_RANKS_MOST];
} duel;

static ovlm_model *open_model(const duel *d, ovlm_err *err)
{
    ovlm_model *model = NULL;
    const ovlm_backend_options options = {.threads = 1};
    if (ovlm_model_open(d->config, ovlm_cpu_ops_find(d->ops), &options, d->dtype, NULL, &model,
                        err) != OVLM_OK ||
        rig_write_weights(model, d->seed, err) != OVLM_OK) {
        fprintf(stderr, "%s\n", err->message);
        exit(1);
    }
    const ovlm_params *p = ovlm_model_params(model);
    for (int64_t i = 0; i < p->n && d->one_sided; i++) { /* ties go to the lower number */
        const ovlm_param *one = &p->param[i];
        if (strstr(one->name, "mlp.gate.") != NULL) {
            char *zeros = calloc((size_t)(one->rows * one->cols), 4);
            if (zeros == NULL || ovlm_model_write(model, &one->w, zeros, err) != OVLM_OK) {
                exit(1);
            }
            free(zeros);
        }
    }
    ovlm_model_set_expert_rows(model, d->expert_rows);
    return model;
}

static ovlm_status answer(const duel *d, ovlm_model *model, int64_t rank, char *hidden,
                          double *loss, ovlm_err *err)
{
    static const int32_t none[SEGMENTS + 1] = {0};
    ovlm_model_inputs in = rig_inputs(&d->pack[rank]);
    const ovlm_pass_options pass = {.training = d->training, .checkpoint = d->checkpoint};
    ovlm_model_output out;
    if (d->idle[rank]) {
        in.tokens = (ovlm_tokens){.segments = SEGMENTS, .start = none};
        in.images = in.sounds = 0;
        in.pixels = in.mel = NULL;
    }
    in.normalizer = 11;
    OVLM_TRY(ovlm_model_forward(model, &in, &pass, err));
    OVLM_TRY(ovlm_model_hidden_read(model, hidden, err));
    OVLM_TRY(ovlm_model_output_read(model, &out, NULL, NULL, err));
    *loss = out.loss;
    return OVLM_OK;
}

static void duel_rank(rig_rank *self)
{
    const duel *d = self->ctx;
    char hidden[HIDDEN_BYTES] = {0};
    double loss = 0;
    ovlm_arena arena = {0};
    ovlm_expert_ranks ranks;
    ovlm_model *model = d->model[self->rank];
    RTRY(self, ovlm_expert_ranks_init(&ranks, self->comm, &arena, &self->err));
    RTRY(self, ovlm_model_spread_experts(model, &ranks.table, &self->err));
    for (int again = 0; again < 2; again++) {
        RTRY(self, answer(d, model, self->rank, hidden, &loss, &self->err));
        RCHECK(self, memcmp(hidden, d->hidden[self->rank], sizeof hidden) == 0,
               "%s: other hidden states", d->ops);
        RCHECK(self, loss == d->loss[self->rank], "loss %g, alone %g", loss, d->loss[self->rank]);
    }
    int64_t most = 0, own = ranks.on.count;
    const ovlm_all_reduce args = {.send = &own, .recv = &most, .n = 1, .dtype = OVLM_I64,
                                  .reduce = OVLM_MAX};
    RTRY(self, ovlm_comm_all_reduce(self->comm, &args, &self->err));
    RCHECK(self, own == most && own > 0, "%lld exchanges, %lld elsewhere", (long long)own,
           (long long)most);
    ovlm_arena_free(&arena);
}

/* Models that are alike, in one thread: their numbers come from one stream. */
static void open_models(duel *d, int64_t n)
{
    ovlm_err err = {0};
    d->seed = ovlm_rng_next(&test_rng);
    d->alone = open_model(d, &err);
    for (int64_t r = 0; r < n; r++) {
        d->model[r] = open_model(d, &err);
        rig_draw_batch(&d->pack[r], d->config->audio.depth > 0);
    }
}

static void close_models(duel *d, int64_t n)
{
    ovlm_model_close(d->alone);
    for (int64_t r = 0; r < n; r++) {
        ovlm_model_close(d->model[r]);
    }
}

static void test_models(const ovlm_model_config *config)
{
    rig_rank ranks[RIG_RANKS_MOST];
    for (int i = 0; i < 12; i++) {
        static duel d; /* too large for some stacks */
        d = (duel){.ops = rig_below(3) == 0 ? "async" : "cpu", .config = config,
                   .dtype = rig_below(3) == 0 ? OVLM_BF16 : OVLM_F32,
                   .checkpoint = (ovlm_checkpoint)rig_below(3), .training = rig_below(4) > 0,
                   .degree = 1 + rig_below(5), .one_sided = rig_below(3) == 0,
                   .expert_rows = rig_below(2) == 0 ? 0 : 1 + rig_below(2 * TOKENS)};
        ovlm_err err = {0};
        open_models(&d, d.degree);
        for (int64_t r = 0; r < d.degree; r++) {
            d.idle[r] = rig_below(4) == 0;
            CHECK(answer(&d, d.alone, r, d.hidden[r], &d.loss[r], &err) == OVLM_OK, "%s",
                  err.message);
        }
        rig_run("models", d.degree, NULL, duel_rank, &d, ranks);
        close_models(&d, d.degree);
    }
}

/* ---- what is refused ---- */

static void refuse(rig_rank *self)
{
    duel d = *(const duel *)self->ctx;
    char hidden[HIDDEN_BYTES];
    double loss = 0;
    ovlm_arena arena = {0};
    ovlm_expert_ranks ranks;
    ovlm_err err = {0};
    ovlm_model *model = d.model[self->rank];
    RTRY(self, ovlm_expert_ranks_init(&ranks, self->comm, &arena, &self->err));
    ovlm_expert_group many = ranks.table;
    many.degree = 6;
    RCHECK(self, ovlm_model_spread_experts(model, &many, &err) == OVLM_E_ARG, "6 of 5 experts");
    RTRY(self, ovlm_model_spread_experts(model, &ranks.table, &self->err));
    d.checkpoint = self->rank == 0 ? OVLM_CHECKPOINT_FULL : OVLM_CHECKPOINT_NONE;
    RCHECK(self, answer(&d, model, self->rank, hidden, &loss, &err) == OVLM_E_ARG &&
                     strstr(err.message, "other kinds") != NULL, "%s", err.message);
    d.checkpoint = OVLM_CHECKPOINT_NONE;
    RTRY(self, answer(&d, model, self->rank, hidden, &loss, &self->err));
    ovlm_arena_free(&arena);
}

static void test_refusals(const ovlm_model_config *config)
{
    rig_rank ranks[RIG_RANKS_MOST];
    static duel d;
    d = (duel){.ops = "cpu", .config = config, .dtype = OVLM_F32, .training = true};
    open_models(&d, 2);
    rig_run("refusals", 2, NULL, refuse, &d, ranks);
    close_models(&d, 2);
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    ovlm_model_config configs[] = {rig_qwen(true), rig_seed(), rig_omni()};
    test_rounds();
    for (int i = 0; i < 3; i++) {
        test_models(&configs[i]);
    }
    test_refusals(&configs[0]);
    return test_end("expert_parallel");
}
