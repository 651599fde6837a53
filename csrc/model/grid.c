/* grid.c - coordinates in merge-block order, and bilinear taps of the position table. */
#include "model/grid.h"

typedef struct axis_tap {
    int64_t low, high;
    float low_weight, high_weight;
} axis_tap;

/* Bilinear with align_corners: index i of n reads the table at i*(side-1)/max(n-1, 1). */
static axis_tap tap_at(int64_t i, int64_t n, int64_t side)
{
    float at = n > 1 ? (float)i * ((float)(side - 1) / (float)(n - 1)) : 0.0f;
    int64_t low = (int64_t)at;
    low = low < side - 1 ? low : side - 1;
    float part = at - (float)low;
    return (axis_tap){low, low + 1 < side ? low + 1 : side - 1, 1.0f - part, part};
}

static void put_taps(ovlm_grid *grid, int64_t patch, axis_tap row, axis_tap col, int64_t side)
{
    int64_t rows[2] = {row.low, row.high}, cols[2] = {col.low, col.high};
    float row_weights[2] = {row.low_weight, row.high_weight};
    float col_weights[2] = {col.low_weight, col.high_weight};
    for (int i = 0; i < 2; i++) {
        for (int j = 0; j < 2; j++) {
            grid->tap[patch * 4 + i * 2 + j] = (int32_t)(rows[i] * side + cols[j]);
            grid->tap_weight[patch * 4 + i * 2 + j] = row_weights[i] * col_weights[j];
        }
    }
}

/* One frame of h x w patches from `patch` on. */
static void put_frame(ovlm_grid *grid, const ovlm_vision_config *config, int64_t patch, int64_t h,
                      int64_t w)
{
    int64_t m = config->merge, side = config->position_side;
    for (int64_t i = 0; i < h * w; i++) {
        int64_t inside = i % (m * m), block = i / (m * m);
        int64_t row = block / (w / m) * m + inside / m, col = block % (w / m) * m + inside % m;
        grid->position[patch + i] = (float)row;
        grid->position[grid->patches + patch + i] = (float)col;
        if (side > 0) {
            put_taps(grid, patch + i, tap_at(row, h, side), tap_at(col, w, side), side);
        }
    }
}

/* Counts frames and patches, and refuses what is no grid. */
static ovlm_status count(ovlm_grid *grid, const ovlm_vision_config *config,
                         const int32_t *grid_thw, int64_t images, ovlm_err *err)
{
    for (int64_t i = 0; i < images; i++) {
        const int32_t *g = grid_thw + 3 * i;
        if (g[0] < 1 || g[1] < 1 || g[2] < 1 || g[1] % config->merge != 0 ||
            g[2] % config->merge != 0) {
            return OVLM_FAIL(err, OVLM_E_ARG,
                             "grid_thw[%lld] = (%d, %d, %d): sizes must be positive, and height "
                             "and width multiples of %lld", (long long)i, g[0], g[1], g[2],
                             (long long)config->merge);
        }
        int64_t frame = (int64_t)g[1] * g[2];
        if (frame > INT32_MAX || frame * g[0] > INT32_MAX - grid->patches) {
            return OVLM_FAIL(err, OVLM_E_ARG, "grid_thw[%lld]: more than %d patches in one call",
                             (long long)i, INT32_MAX);
        }
        grid->patches += frame * g[0];
        grid->frames += g[0];
        grid->max_frame = frame > grid->max_frame ? frame : grid->max_frame;
    }
    return OVLM_OK;
}

ovlm_status ovlm_grid_init(ovlm_grid *grid, const ovlm_vision_config *config,
                           const int32_t *grid_thw, int64_t images, ovlm_arena *arena,
                           ovlm_err *err)
{
    *grid = (ovlm_grid){0};
    OVLM_TRY(count(grid, config, grid_thw, images, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &grid->position, 2 * grid->patches, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &grid->start, grid->frames + 1, err));
    if (config->position_side > 0) {
        OVLM_TRY(OVLM_ARENA_RAW(arena, &grid->tap, 4 * grid->patches, err));
        OVLM_TRY(OVLM_ARENA_RAW(arena, &grid->tap_weight, 4 * grid->patches, err));
    }
    int64_t patch = 0, frame = 0;
    for (int64_t i = 0; i < images; i++) {
        const int32_t *g = grid_thw + 3 * i;
        for (int32_t t = 0; t < g[0]; t++) {
            grid->start[frame++] = (int32_t)patch;
            put_frame(grid, config, patch, g[1], g[2]);
            patch += (int64_t)g[1] * g[2];
        }
    }
    grid->start[frame] = (int32_t)patch;
    return OVLM_OK;
}
