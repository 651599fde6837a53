/* sounds.c - chunks, tokens and windows from the sounds' lengths. */
#include "model/sounds.h"

#include <string.h>

int64_t ovlm_sound_side(int64_t side, int times)
{
    for (int i = 0; i < times; i++) {
        side = ovlm_audio_halved(side);
    }
    return side;
}

/* Tokens of n frames, at most a chunk; no frames leave no token (oracles B.5: with divisions that
 * round down; C's would make one). */
static int64_t chunk_tokens(int64_t n)
{
    return n > 0 ? ovlm_sound_side(n, OVLM_CONVOLUTIONS) : 0;
}

static int64_t sound_tokens(const ovlm_audio_config *config, int64_t length)
{
    return length / config->chunk * chunk_tokens(config->chunk) +
           chunk_tokens(length % config->chunk);
}

static int64_t chunks_of(const ovlm_audio_config *config, int64_t length)
{
    return (length + config->chunk - 1) / config->chunk;
}

/* Sums over all sounds, and the refusal of what is none. */
static ovlm_status count(ovlm_sounds *s, const ovlm_audio_config *config, ovlm_err *err)
{
    int64_t window = chunk_tokens(config->chunk) * config->window;
    for (int64_t i = 0; i < s->sounds; i++) {
        int64_t length = s->length[i], chunks = chunks_of(config, length);
        if (length < 1) {
            return OVLM_FAIL(err, OVLM_E_ARG, "mel_lengths[%lld] must be >= 1; got %lld",
                             (long long)i, (long long)length);
        }
        s->frames += length;
        if (s->frames > INT32_MAX - config->chunk) {
            return OVLM_FAIL(err, OVLM_E_ARG, "mel_lengths[%lld]: more than %lld frames in one "
                             "call", (long long)i, (long long)INT32_MAX - config->chunk);
        }
        int64_t width = length < config->chunk ? length : config->chunk;
        int64_t tokens = sound_tokens(config, length);
        for (int k = 0; k <= OVLM_CONVOLUTIONS; k++) {
            s->rows[k] += chunks * ovlm_sound_side(config->bins, k) * ovlm_sound_side(width, k);
        }
        s->columns += chunks * ovlm_sound_side(width, OVLM_CONVOLUTIONS);
        s->tokens += tokens;
        s->windows += (tokens + window - 1) / window;
        int64_t longest = tokens < window ? tokens : window;
        s->max_window = longest > s->max_window ? longest : s->max_window;
    }
    return OVLM_OK;
}

/* Appends a sound's chunks to the runs. */
static void put_run(ovlm_sounds *s, int64_t chunks, int64_t width)
{
    if (s->runs > 0 && s->run[s->runs - 1].width == width) {
        s->run[s->runs - 1].chunks += chunks;
    } else {
        s->run[s->runs++] = (ovlm_sound_run){chunks, width};
    }
}

static void place_tokens(ovlm_sounds *s, const ovlm_audio_config *config)
{
    int64_t token = 0, column = 0, start = 0;
    int64_t window = chunk_tokens(config->chunk) * config->window;
    for (int64_t i = 0; i < s->sounds; i++) {
        int64_t length = s->length[i], first = token;
        int64_t width = length < config->chunk ? length : config->chunk;
        put_run(s, chunks_of(config, length), width);
        for (int64_t left = length; left > 0; left -= config->chunk) {
            int64_t n = chunk_tokens(left < config->chunk ? left : config->chunk);
            for (int64_t k = 0; k < n; k++, token++) {
                s->column[token] = (int32_t)(column + k);
                s->place[token] = (int32_t)k; /* counted inside each chunk */
            }
            column += ovlm_sound_side(width, OVLM_CONVOLUTIONS);
        }
        for (int64_t at = first; at < token; at += window) {
            s->start[start++] = (int32_t)at;
        }
    }
    s->start[start] = (int32_t)token;
}

ovlm_status ovlm_sounds_init(ovlm_sounds *sounds, const ovlm_audio_config *config,
                             const int32_t *length, int64_t n, ovlm_arena *arena, ovlm_err *err)
{
    *sounds = (ovlm_sounds){.length = length, .sounds = n};
    OVLM_TRY(count(sounds, config, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &sounds->run, n, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &sounds->column, sounds->tokens, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &sounds->place, sounds->tokens, err));
    OVLM_TRY(OVLM_ARENA_RAW(arena, &sounds->start, sounds->windows + 1, err));
    place_tokens(sounds, config);
    return OVLM_OK;
}

void ovlm_sounds_spread(const ovlm_sounds *sounds, const ovlm_audio_config *config,
                        const float *mel, float *image)
{
    int64_t bins = config->bins;
    memset(image, 0, (size_t)sounds->rows[0] * sizeof *image);
    for (int64_t i = 0; i < sounds->sounds; i++) {
        int64_t length = sounds->length[i];
        int64_t width = length < config->chunk ? length : config->chunk;
        for (int64_t left = length; left > 0; left -= config->chunk) {
            int64_t frames = left < config->chunk ? left : config->chunk;
            for (int64_t t = 0; t < frames; t++) {
                for (int64_t f = 0; f < bins; f++) {
                    image[f * width + t] = mel[t * bins + f];
                }
            }
            mel += frames * bins;
            image += bins * width;
        }
    }
}
