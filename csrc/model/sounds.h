/* sounds.h - how sounds are cut: chunks that are convolved together, tokens, attention windows.
 *
 * A sound's chunks are padded to its own longest one, never to another sound's: what comes of a
 * sound does not depend on its neighbours, and is what `transformers` makes of it alone. */
#ifndef OVLM_MODEL_SOUNDS_H
#define OVLM_MODEL_SOUNDS_H

#include "base/arena.h"
#include "model/config.h"
#include "model/params.h"

/* Chunks that follow each other and are equally wide. */
typedef struct ovlm_sound_run {
    int64_t chunks, width; /* width: frames, with the padding */
} ovlm_sound_run;

/* Host arrays, in the arena that they were made in.  Frames lie as images of bins x width. */
typedef struct ovlm_sounds {
    int64_t frames, runs, tokens, windows, max_window;
    int64_t rows[OVLM_CONVOLUTIONS + 1]; /* (chunk, bin, frame) around each convolution       */
    int64_t columns;       /* (chunk, frame) behind the last one, padding included            */
    ovlm_sound_run *run;   /* [runs]                                                          */
    int64_t sounds;
    const int32_t *length; /* [sounds] frames                                                 */
    int32_t *column;       /* [tokens] which column a token is                                */
    int32_t *place;        /* [tokens] in its chunk                                           */
    int32_t *start;        /* [windows+1] tokens that attend to each other                    */
} ovlm_sounds;

/* Size of an image's side behind `times` convolutions. */
int64_t ovlm_sound_side(int64_t side, int times);

/* length [sounds] is borrowed.  OVLM_E_ARG names a sound without frames, or when there are more
 * than 2^31 - 1 frames. */
OVLM_NODISCARD ovlm_status ovlm_sounds_init(ovlm_sounds *sounds, const ovlm_audio_config *config,
                                            const int32_t *length, int64_t count,
                                            ovlm_arena *arena, ovlm_err *err);

/* mel [frames, bins] as images [rows[0]]: each chunk turned to (bin, frame), zeros behind. */
void ovlm_sounds_spread(const ovlm_sounds *sounds, const ovlm_audio_config *config,
                        const float *mel, float *image);

#endif
