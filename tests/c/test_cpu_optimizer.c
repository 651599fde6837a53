/* test_cpu_optimizer.c - gradient norm and AdamW against plain loops in double. */
#include "cpu_rig.h"

enum { PARTS_MOST = 5 };

static void norm_case(rig *one, rig *many)
{
    ovlm_tensor grad[PARTS_MOST];
    int64_t n = rig_below(PARTS_MOST + 1), bad = 0;
    double square = 3;
    for (int64_t i = 0; i < n; i++) {
        int64_t cols = 1 + rig_below(rig_below(3) == 0 ? 70000 : 50);
        grad[i] = rig_random(rig_below(5), cols, OVLM_F32);
        for (int64_t at = 0; at < grad[i].rows * cols; at++) {
            square += pow(rig_get(&grad[i], at / cols, at % cols), 2);
        }
    }
    ovlm_grad_stats stats = {.norm_sq = 3}, other = {.norm_sq = 3};
    ovlm_grad_norm a = {.n = n, .grad = grad, .stats = &stats}, b = a;
    b.stats = &other;
    RIG_SCRATCH(one, grad_norm, &a);
    RIG_SCRATCH(many, grad_norm, &b);
    RIG_RUN(one, grad_norm, fwd, &a);
    RIG_RUN(many, grad_norm, fwd, &b);
    CHECK(fabs(stats.norm_sq - square) <= 1e-12 * square, "%g, not %g", stats.norm_sq, square);
    CHECK(stats.norm_sq == other.norm_sq, "another norm on more threads");
    CHECK(stats.non_finite == 0, "%lld", (long long)stats.non_finite);
    for (int64_t i = 0; i < n; i++) {
        for (int64_t k = 0; k < 3 && grad[i].rows > 0; k++) {
            int64_t row = rig_below(grad[i].rows), col = rig_below(grad[i].cols);
            bad += isfinite(rig_get(&grad[i], row, col)) != 0;
            static const float strange[3] = {NAN, INFINITY, -INFINITY};
            rig_set(&grad[i], row, col, (double)strange[k]);
        }
    }
    other.non_finite = 0;
    RIG_RUN(many, grad_norm, fwd, &b);
    CHECK(other.non_finite == bad, "%lld not finite, not %lld", (long long)other.non_finite,
          (long long)bad);
    RIG_SCRATCH_FREE(&a);
    RIG_SCRATCH_FREE(&b);
    for (int64_t i = 0; i < n; i++) {
        rig_free(&grad[i]);
    }
}

typedef struct shadow {
    double *w, *m, *v;
} shadow;

static void follow(const ovlm_adamw *a, const ovlm_adamw_part *p, shadow *s)
{
    double clip = fmin(1, a->max_norm / (sqrt(a->stats->norm_sq) + 1e-6));
    clip = a->max_norm > 0 ? clip : 1;
    for (int64_t i = 0; i < p->w.rows * p->w.cols; i++) {
        double g = clip * rig_get(&p->grad, i / p->w.cols, i % p->w.cols);
        s->m[i] = a->beta1 * s->m[i] + (1 - a->beta1) * g;
        s->v[i] = a->beta2 * s->v[i] + (1 - a->beta2) * g * g;
        double m = s->m[i] / (1 - pow(a->beta1, (double)a->step));
        double v = s->v[i] / (1 - pow(a->beta2, (double)a->step));
        s->w[i] -= p->lr * (m / (sqrt(v) + a->eps) + p->weight_decay * s->w[i]);
    }
}

/* A copy of the part with strides of its own. */
static ovlm_adamw_part copy_part(const ovlm_adamw_part *p)
{
    ovlm_adamw_part c = *p;
    c.w = rig_copy(&p->w);
    c.m = rig_copy(&p->m);
    c.v = rig_copy(&p->v);
    if (p->master.cols > 0) {
        c.master = rig_copy(&p->master);
    }
    return c;
}

static void free_part(ovlm_adamw_part *p)
{
    rig_free(&p->w);
    rig_free(&p->m);
    rig_free(&p->v);
    if (p->master.cols > 0) {
        rig_free(&p->master);
    }
}

static ovlm_adamw_part draw_part(shadow *s)
{
    int64_t rows = rig_below(5), cols = 1 + rig_below(rig_below(3) == 0 ? 70000 : 50);
    ovlm_dtype dtype = rig_below(2) ? OVLM_BF16 : OVLM_F32;
    ovlm_adamw_part p = {.w = rig_random(rows, cols, dtype), .m = rig_empty(rows, cols, OVLM_F32),
                         .v = rig_empty(rows, cols, OVLM_F32), .lr = 1e-2,
                         .weight_decay = 0.1 * (double)rig_below(2)};
    if (dtype == OVLM_BF16) {
        p.master = rig_empty(rows, cols, OVLM_F32);
    }
    s->w = calloc((size_t)(rows * cols + 1), 8);
    s->m = calloc((size_t)(rows * cols + 1), 8);
    s->v = calloc((size_t)(rows * cols + 1), 8);
    for (int64_t i = 0; i < rows * cols; i++) {
        s->w[i] = rig_get(&p.w, i / cols, i % cols);
        rig_set(&p.m, i / cols, i % cols, 0);
        rig_set(&p.v, i / cols, i % cols, 0);
        if (dtype == OVLM_BF16) {
            rig_set(&p.master, i / cols, i % cols, s->w[i]);
        }
    }
    return p;
}

static void adamw_case(rig *one, rig *many)
{
    ovlm_adamw_part part[PARTS_MOST], twin[PARTS_MOST];
    shadow s[PARTS_MOST];
    int64_t n = 1 + rig_below(PARTS_MOST);
    ovlm_grad_stats stats = {.norm_sq = 100 * ovlm_rng_uniform(&test_rng)}, stats_twin = stats;
    ovlm_adamw a = {.n = n, .part = part, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8,
                    .max_norm = (double)rig_below(3) - 1, .stats = &stats, .step = 1}, b = a;
    b.part = twin;
    b.stats = &stats_twin;
    for (int64_t i = 0; i < n; i++) {
        part[i] = draw_part(&s[i]);
        twin[i] = copy_part(&part[i]);
        part[i].grad = twin[i].grad = rig_random(part[i].w.rows, part[i].w.cols, OVLM_F32);
    }
    RIG_SCRATCH(one, adamw, &a);
    RIG_SCRATCH(many, adamw, &b);
    for (a.step = b.step = 1; a.step <= 10; a.step = ++b.step) {
        stats.non_finite = stats_twin.non_finite = a.step == 4; /* that step does nothing */
        RIG_RUN(one, adamw, fwd, &a);
        RIG_RUN(many, adamw, fwd, &b);
        for (int64_t i = 0; i < n && a.step != 4; i++) {
            follow(&a, &part[i], &s[i]);
        }
    }
    for (int64_t i = 0; i < n; i++) {
        bool master = part[i].master.cols > 0;
        rig_near("w", &part[i].w, s[i].w, 1e-6);
        rig_near("master", master ? &part[i].master : &part[i].w, s[i].w, 1e-6);
        rig_near("m", &part[i].m, s[i].m, 1e-6);
        rig_near("v", &part[i].v, s[i].v, 1e-6);
        rig_same("w", &part[i].w, 0, &twin[i].w);
        rig_same("v", &part[i].v, 0, &twin[i].v);
        free_part(&part[i]);
        free_part(&twin[i]);
        rig_free(&part[i].grad);
        free(s[i].w);
        free(s[i].m);
        free(s[i].v);
    }
    RIG_SCRATCH_FREE(&a);
    RIG_SCRATCH_FREE(&b);
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    rig one, many;
    rig_open(&one, 1);
    rig_open(&many, 3);
    for (int i = 0; i < 30; i++) {
        norm_case(&one, &many);
        adamw_case(&one, &many);
    }
    rig_close(&one);
    rig_close(&many);
    return test_end("cpu_optimizer");
}
