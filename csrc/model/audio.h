/* audio.h - the audio tower: log-mel frames to one feature per language token (oracles B.5). */
#ifndef OVLM_MODEL_AUDIO_H
#define OVLM_MODEL_AUDIO_H

#include "model/sounds.h"
#include "model/vision.h"

/* One pass of the tower, from its forward to its backward. */
typedef struct ovlm_audio_pass {
    const ovlm_params *params;
    ovlm_sounds sounds;
    const float *mel;             /* [frames, bins] host                                      */
    bool training;
    int64_t lowest;               /* as the vision pass's; -1: the convolutions too           */
    ovlm_block_context context;
    ovlm_tensor image[OVLM_CONVOLUTIONS + 1]; /* [rows, channels] into and out of convolutions */
    ovlm_linear conv[OVLM_CONVOLUTIONS], conv_out;
    ovlm_gather place;            /* columns that are tokens                                  */
    ovlm_block_saved *block;      /* [depth] host                                             */
    ovlm_merge_saved project;
    ovlm_tensor features;         /* [tokens, out_width]                                      */
} ovlm_audio_pass;

/* Features, on run->keep. */
OVLM_NODISCARD ovlm_status ovlm_audio_fwd(ovlm_run *run, ovlm_audio_pass *pass);

/* From the gradient of the features (left out: zero) to those of the weights. */
OVLM_NODISCARD ovlm_status ovlm_audio_bwd(ovlm_run *run, ovlm_audio_pass *pass,
                                          ovlm_tensor dfeatures);

/* Whether any weight of the tower is trained. */
bool ovlm_audio_trained(const ovlm_params *params);

#endif
