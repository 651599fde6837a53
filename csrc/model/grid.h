/* grid.h - where the patches of images stand: coordinates, segments and table taps from grids. */
#ifndef OVLM_MODEL_GRID_H
#define OVLM_MODEL_GRID_H

#include "base/arena.h"
#include "model/config.h"

/* Host arrays, in the arena that they were made in.  P patches in the order (image, frame,
 * row block, column block, row in block, column in block). */
typedef struct ovlm_grid {
    int64_t patches, frames, max_frame; /* segments are frames                             */
    float *position;   /* [2,P]: rows, then columns                                        */
    int32_t *start;    /* [frames+1]                                                       */
    int32_t *tap;      /* [P,4] rows of the position table, or NULL without one            */
    float *tap_weight; /* [P,4]                                                            */
} ovlm_grid;

/* grid_thw: [images,3], in patches.  OVLM_E_ARG names an image whose sides are no multiple of
 * config->merge, or whose sizes are not positive, or when there are more than 2^31 - 1 patches. */
OVLM_NODISCARD ovlm_status ovlm_grid_init(ovlm_grid *grid, const ovlm_vision_config *config,
                                          const int32_t *grid_thw, int64_t images,
                                          ovlm_arena *arena, ovlm_err *err);

#endif
