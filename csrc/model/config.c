/* config.c - refuses a configuration that makes no model. */
#include "model/config.h"

typedef struct range {
    const char *name;
    int64_t value, least, most;
} range;

enum { SIZE_MOST = 1 << 24, LAYERS_MOST = 4096 };

static ovlm_status check_ranges(const char *part, const range *ranges, int64_t n, ovlm_err *err)
{
    for (int64_t i = 0; i < n; i++) {
        if (ranges[i].value < ranges[i].least || ranges[i].value > ranges[i].most) {
            return OVLM_FAIL(err, OVLM_E_ARG, "%s: %s must be in [%lld, %lld]; got %lld", part,
                             ranges[i].name, (long long)ranges[i].least,
                             (long long)ranges[i].most, (long long)ranges[i].value);
        }
    }
    return OVLM_OK;
}

static ovlm_status check_deepstack(const ovlm_vision_config *c, ovlm_err *err)
{
    for (int64_t i = 0; i < c->deepstack_n; i++) {
        if (c->deepstack[i] < (i > 0 ? c->deepstack[i - 1] + 1 : 0) ||
            c->deepstack[i] >= c->depth) {
            return OVLM_FAIL(err, OVLM_E_ARG,
                             "vision: deepstack must name ascending blocks below %lld; got %lld",
                             (long long)c->depth, (long long)c->deepstack[i]);
        }
    }
    return OVLM_OK;
}

static ovlm_status check_vision(const ovlm_vision_config *c, ovlm_err *err)
{
    const range ranges[] = {
        {"depth", c->depth, 1, LAYERS_MOST},
        {"width", c->width, 4, SIZE_MOST},
        {"heads", c->heads, 1, SIZE_MOST},
        {"hidden", c->hidden, 1, SIZE_MOST},
        {"patch", c->patch, 1, 1024},
        {"temporal", c->temporal, 1, 64},
        {"channels", c->channels, 1, 64},
        {"merge", c->merge, 1, 16},
        {"out_width", c->out_width, 1, SIZE_MOST},
        {"merger_hidden", c->merger_hidden, 1, SIZE_MOST},
        {"position_side", c->position_side, 0, 1 << 14},
        {"deepstack_n", c->deepstack_n, 0, OVLM_DEEPSTACK_MOST},
    };
    OVLM_TRY(check_ranges("vision", ranges, (int64_t)(sizeof ranges / sizeof *ranges), err));
    OVLM_TRY(check_deepstack(c, err));
    if (c->width % c->heads != 0 || c->width / c->heads % 4 != 0) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "vision: width/heads must be a whole multiple of 4 for 2D RoPE; got "
                         "%lld/%lld", (long long)c->width, (long long)c->heads);
    }
    if (c->width / c->heads > OVLM_ROPE_MOST) {
        return OVLM_FAIL(err, OVLM_E_ARG, "vision: width/heads must be at most %d; got %lld",
                         OVLM_ROPE_MOST, (long long)(c->width / c->heads));
    }
    if (!(c->eps > 0) || !(c->theta > 1)) {
        return OVLM_FAIL(err, OVLM_E_ARG, "vision: eps must be > 0 and theta > 1; got %g and %g",
                         c->eps, c->theta);
    }
    return OVLM_OK;
}

static ovlm_status check_audio(const ovlm_audio_config *c, int64_t width, ovlm_err *err)
{
    const range ranges[] = {
        {"depth", c->depth, 1, LAYERS_MOST},
        {"width", c->width, 4, SIZE_MOST},
        {"heads", c->heads, 1, SIZE_MOST},
        {"hidden", c->hidden, 1, SIZE_MOST},
        {"bins", c->bins, 1, 1 << 14},
        {"channels", c->channels, 1, 1 << 16},
        {"chunk", c->chunk, 1, 1 << 16},
        {"window", c->window, 1, 1 << 16},
        {"out_width", c->out_width, 1, SIZE_MOST},
    };
    OVLM_TRY(check_ranges("audio", ranges, (int64_t)(sizeof ranges / sizeof *ranges), err));
    if (c->width % c->heads != 0 || c->width % 2 != 0) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "audio: width must be even and a multiple of heads; got %lld and %lld",
                         (long long)c->width, (long long)c->heads);
    }
    if (!(c->eps > 0)) {
        return OVLM_FAIL(err, OVLM_E_ARG, "audio: eps must be > 0; got %g", c->eps);
    }
    if (c->out_width != width) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "audio: out_width must be the decoder's width %lld; got %lld",
                         (long long)width, (long long)c->out_width);
    }
    return OVLM_OK;
}

static ovlm_status check_experts(const ovlm_decoder_config *c, ovlm_err *err)
{
    const range ranges[] = {
        {"experts", c->experts, 1, 1 << 16},
        {"k", c->k, 1, c->experts < 64 ? c->experts : 64},
        {"expert_hidden", c->expert_hidden, 1, SIZE_MOST},
        {"shared_hidden", c->shared_hidden, 0, SIZE_MOST},
        {"first_dense", c->first_dense, 0, LAYERS_MOST},
        {"sparse_step", c->sparse_step, 1, LAYERS_MOST},
        {"teams", c->teams, 1, c->experts},
        {"limit", c->limit, 1, c->teams},
    };
    OVLM_TRY(check_ranges("decoder", ranges, (int64_t)(sizeof ranges / sizeof *ranges), err));
    if (c->experts % c->teams != 0 || (c->teams > 1 && c->experts / c->teams < 2) ||
        c->k > c->experts / c->teams * c->limit) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "decoder: %lld experts do not divide into %lld groups of at least two, "
                         "%lld of which hold %lld", (long long)c->experts, (long long)c->teams,
                         (long long)c->limit, (long long)c->k);
    }
    return OVLM_OK;
}

static ovlm_status check_decoder(const ovlm_decoder_config *c, ovlm_err *err)
{
    const range ranges[] = {
        {"depth", c->depth, 1, LAYERS_MOST},
        {"width", c->width, 1, SIZE_MOST},
        {"heads", c->heads, 1, SIZE_MOST},
        {"kv_heads", c->kv_heads, 1, c->heads},
        {"head_dim", c->head_dim, 2, OVLM_ROPE_MOST},
        {"vocab", c->vocab, 1, INT32_MAX},
        {"hidden", c->hidden, 1, SIZE_MOST},
        {"experts", c->experts, 0, 1 << 16},
    };
    OVLM_TRY(check_ranges("decoder", ranges, (int64_t)(sizeof ranges / sizeof *ranges), err));
    if (c->experts > 0) {
        OVLM_TRY(check_experts(c, err));
    }
    if (c->heads % c->kv_heads != 0 || c->head_dim % 2 != 0) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "decoder: heads must be a multiple of kv_heads and head_dim even; got "
                         "%lld, %lld and %lld", (long long)c->heads, (long long)c->kv_heads,
                         (long long)c->head_dim);
    }
    if (c->rotary < 2 || c->rotary > c->head_dim || c->rotary % 2 != 0) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "decoder: the elements of a head that turn must be even and in [2, %lld]; "
                         "got %lld", (long long)c->head_dim, (long long)c->rotary);
    }
    if (c->act <= OVLM_ACT_NONE || c->act > OVLM_ACT_SILU) {
        return OVLM_FAIL(err, OVLM_E_ARG, "decoder: act must be one of ovlm_act, not none; got %d",
                         (int)c->act);
    }
    int64_t sections = 0;
    for (int i = 0; i < OVLM_AXES; i++) {
        sections += c->section[i] < 0 ? -SIZE_MOST : c->section[i];
    }
    if (sections != c->rotary / 2) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "decoder: the M-RoPE sections must sum to half of the elements that turn, "
                         "%lld; got %lld", (long long)(c->rotary / 2), (long long)sections);
    }
    if (!(c->eps > 0) || !(c->theta > 1)) {
        return OVLM_FAIL(err, OVLM_E_ARG, "decoder: eps must be > 0 and theta > 1; got %g and %g",
                         c->eps, c->theta);
    }
    return OVLM_OK;
}

ovlm_status ovlm_model_config_check(const ovlm_model_config *config, ovlm_err *err)
{
    OVLM_TRY(check_decoder(&config->decoder, err));
    if (config->audio.depth != 0) {
        OVLM_TRY(check_audio(&config->audio, config->decoder.width, err));
    }
    if (config->vision.depth == 0) {
        return OVLM_OK;
    }
    OVLM_TRY(check_vision(&config->vision, err));
    if (config->vision.out_width != config->decoder.width) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "vision: out_width must be the decoder's width %lld; got %lld",
                         (long long)config->decoder.width, (long long)config->vision.out_width);
    }
    if (config->vision.deepstack_n > config->decoder.depth) {
        return OVLM_FAIL(err, OVLM_E_ARG,
                         "vision: %lld DeepStack outputs need as many decoder layers; there are "
                         "%lld", (long long)config->vision.deepstack_n,
                         (long long)config->decoder.depth);
    }
    return OVLM_OK;
}

int64_t ovlm_decoder_sparse_layers(const ovlm_decoder_config *config)
{
    int64_t n = 0;
    for (int64_t i = 0; i < config->depth; i++) {
        n += ovlm_decoder_layer_sparse(config, i) ? 1 : 0;
    }
    return n;
}
