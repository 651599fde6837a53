/* test_sp_frame.c - the large items' groups keep every limit, and a dive over them packs each item
 * at most once. */
#include <math.h>
#include <string.h>

#include "plan/sp_dive.h"
#include "test.h"

enum { MOST_N = 200, BOXES = 6 };

static const int64_t degrees[] = {1, 2, 4, 8, 16};

typedef struct random_step {
    int64_t lengths[MOST_N];
    double comm[5];
    ovlm_sp_problem problem;
} random_step;

/* Communication is dear from a random degree on. */
static void draw(random_step *r)
{
    int64_t n = 1 + ovlm_rng_below(&test_rng, MOST_N), dear = ovlm_rng_below(&test_rng, 6);
    for (int64_t i = 0; i < n; i++) {
        double u = ovlm_rng_uniform(&test_rng);
        r->lengths[i] = 1 + (int64_t)(15000 * u * u * u * u);
    }
    for (int64_t j = 0; j < 5; j++) {
        r->comm[j] = j < dear ? 1e-5 : 1e-3 * (double)(1 + j - dear);
    }
    r->problem = (ovlm_sp_problem){
        .n = n, .n_gpus = 16 << ovlm_rng_below(&test_rng, 3), .gpus_per_node = 8,
        .lengths = r->lengths, .pad_to = 1, .policy = OVLM_SP_FLEX, .threads = 1,
        .cost = {.quadratic = ovlm_rng_below(&test_rng, 4) > 0 ? 1e-7 : 0, .linear = 1e-3,
                 .fixed = 0.2, .memory_per_token = 1, .memory_limit = 1000, .degree_n = 5,
                 .degree = degrees, .comm = r->comm}};
}

static void check_frame(const sp_frame *f)
{
    const sp_model *m = f->model;
    double sum[MOST_N] = {0}, time[MOST_N] = {0};
    int64_t used[SP_FRAME_BOXES] = {0}, count[MOST_N] = {0};
    for (int64_t k = 0; k < f->n; k++) {
        int64_t g = f->where[k];
        CHECK(g >= 0 && g < f->n_groups, "item %lld is in no group", (long long)k);
        sum[g] += (double)m->s[k];
        time[g] += sp_item_time(m, k, f->group[g].j);
        count[g]++;
    }
    for (int64_t g = 0; g < f->n_groups; g++) {
        const sp_frame_group *group = &f->group[g];
        CHECK(group->box >= 0 && group->box < f->n_boxes, "box of a group");
        CHECK(count[g] > 0 && count[g] == group->count, "items of a group");
        CHECK(sum[g] == group->sum_s && sum[g] <= (double)m->cap[group->j], "memory");
        CHECK(time[g] <= f->box[group->box].tau * (1 + 1e-12), "time %g of %g", time[g],
              f->box[group->box].tau);
        used[group->box] += m->degree[group->j];
    }
    for (int64_t b = 0; b < f->n_boxes; b++) {
        CHECK(used[b] == f->box[b].used && used[b] > 0 && used[b] <= m->n_gpus, "GPUs of a box");
        CHECK(b == 0 || f->box[b - 1].tau >= f->box[b].tau, "order of boxes");
    }
}

static void check_draft(const sp_model *m, const sp_draft *draft, const double *level)
{
    bool seen[MOST_N] = {0};
    for (int64_t b = 0; b < draft->n_micro; b++) {
        int64_t used = 0;
        for (int64_t g = draft->micro_start[b]; g < draft->micro_start[b + 1]; g++) {
            double sum = 0, time = 0;
            CHECK(draft->start[g + 1] > draft->start[g], "an empty group");
            for (int64_t a = draft->start[g]; a < draft->start[g + 1]; a++) {
                int64_t k = draft->item[a];
                CHECK(!seen[k], "item %lld twice", (long long)k);
                seen[k] = true;
                sum += (double)m->s[k];
                time += sp_item_time(m, k, draft->j[g]);
            }
            CHECK(sum <= (double)m->cap[draft->j[g]], "memory of a group");
            CHECK(time <= level[b] * (1 + 1e-12), "time of a group: %g of %g", time, level[b]);
            used += m->degree[draft->j[g]];
        }
        CHECK(used <= m->n_gpus, "GPUs of a micro-batch");
    }
}

static void test_frames_and_dives(void)
{
    int found = 0;
    for (int round = 0; round < 300; round++) {
        random_step r;
        ovlm_arena arena = {0};
        ovlm_err err = {0};
        ovlm_meter meter;
        ovlm_budget budget = {.work_limit = 1 + ovlm_rng_below(&test_rng, 4000)};
        sp_model model;
        sp_frame frame;
        sp_dive dive;
        sp_draft draft;
        draw(&r);
        ovlm_meter_start(&meter, &budget, 0, 16);
        CHECK(sp_model_init(&model, &r.problem, &arena, &err) == OVLM_OK, "%s", err.message);
        CHECK(sp_frame_init(&frame, &model, &arena, &err) == OVLM_OK, "frame");
        CHECK(sp_dive_init(&dive, &model, BOXES, &arena, &err) == OVLM_OK, "dive");
        CHECK(sp_draft_init(&draft, model.n, &arena, &err) == OVLM_OK, "draft");
        double price = 2e-3 * ovlm_rng_uniform(&test_rng);
        sp_frame_arrange(&frame, BOXES, price, 3000, &meter, &test_rng);
        if (frame.cost < HUGE_VAL) {
            double stretch[BOXES], fill[BOXES];
            found++;
            check_frame(&frame);
            for (int b = 0; b < BOXES; b++) {
                stretch[b] = 1 + 0.2 * ovlm_rng_uniform(&test_rng);
                fill[b] = 0.9 + 0.2 * ovlm_rng_uniform(&test_rng);
            }
            sp_aim aim = {.n_boxes = BOXES, .frame = &frame, .slack = 1.02, .stretch = stretch,
                          .fill = fill, .theta = ovlm_rng_uniform(&test_rng)};
            (void)sp_dive_build(&dive, &aim, &draft);
            check_draft(&model, &draft, dive.level);
        }
        ovlm_arena_free(&arena);
    }
    CHECK(found > 100, "only %d frames", found);
}

int main(int argc, char **argv)
{
    test_start(argc, argv);
    test_frames_and_dives();
    return test_end("sp_frame");
}
