/* model_encode.c - images and sounds to features, alone or in a forward. */
#include "model/model_state.h"

#include <string.h>

/* ---------------------------------------------------------------- inputs */

static ovlm_status prepare_vision(ovlm_model *model, const ovlm_model_inputs *inputs,
                                  const ovlm_pass_options *options, ovlm_err *err)
{
    const ovlm_params *p = &model->params;
    const ovlm_vision_config *c = &p->config.vision;
    ovlm_arena *arena = &model->encoder[OVLM_VISION].call;
    if (c->depth == 0) {
        return OVLM_FAIL(err, OVLM_E_ARG, "this model has no vision tower; got %lld images",
                         (long long)inputs->images);
    }
    if (inputs->pixel_dtype != OVLM_F32 && inputs->pixel_dtype != OVLM_U8) {
        return OVLM_FAIL(err, OVLM_E_ARG, "pixels must be float32 or uint8; got %s",
                         ovlm_dtype_name(inputs->pixel_dtype));
    }
    ovlm_vision_pass *pass = &model->vision;
    *pass = (ovlm_vision_pass){.params = p, .pixels = inputs->pixels,
                               .pixel_dtype = inputs->pixel_dtype,
                               .training = options->training && ovlm_vision_trained(p),
                               .block = model->vision_block};
    pass->lowest = ovlm_blocks_lowest(p, p->vision, c->depth, ovlm_unit_trained(p, p->patch.unit));
    pass->context.checkpoint = options->checkpoint;
    pass->context.params = p;
    OVLM_TRY(ovlm_taps_init(&pass->taps, options->vision_taps.entry, options->vision_taps.n,
                            c->depth, arena, err));
    OVLM_TRY(ovlm_grid_init(&pass->grid, c, inputs->grid_thw, inputs->images, arena, err));
    pass->tokens = pass->grid.patches / (c->merge * c->merge);
    return OVLM_OK;
}

static ovlm_status prepare_audio(ovlm_model *model, const ovlm_model_inputs *inputs,
                                 const ovlm_pass_options *options, ovlm_err *err)
{
    const ovlm_params *p = &model->params;
    if (p->config.audio.depth == 0) {
        return OVLM_FAIL(err, OVLM_E_ARG, "this model has no audio tower; got %lld sounds",
                         (long long)inputs->sounds);
    }
    ovlm_audio_pass *pass = &model->audio;
    *pass = (ovlm_audio_pass){.params = p, .mel = inputs->mel,
                              .training = options->training && ovlm_audio_trained(p),
                              .block = model->audio_block};
    pass->lowest = ovlm_blocks_lowest(p, p->audio, p->config.audio.depth,
                                      ovlm_unit_trained(p, p->conv_out.unit));
    pass->context.checkpoint = options->checkpoint;
    pass->context.params = p;
    return ovlm_sounds_init(&pass->sounds, &p->config.audio, inputs->mel_length, inputs->sounds,
                            &model->encoder[OVLM_AUDIO].call, err);
}

ovlm_status ovlm_model_encode_prepare(ovlm_model *model, ovlm_modality modality,
                                      const ovlm_model_inputs *inputs,
                                      const ovlm_pass_options *options, ovlm_err *err)
{
    ovlm_encoder *encoder = &model->encoder[modality];
    encoder->has_features = encoder->can_backward = false;
    if (encoder->in_forward) { /* what the last forward encoded goes */
        model->can_backward = false;
    }
    ovlm_arena_free(&encoder->call);
    return modality == OVLM_VISION ? prepare_vision(model, inputs, options, err)
                                   : prepare_audio(model, inputs, options, err);
}

/* ---------------------------------------------------------------- walk */

ovlm_status ovlm_model_walk_encode(ovlm_run *run, ovlm_model *model, unsigned phases)
{
    if (phases & 1u << OVLM_VISION) {
        double start_s = ovlm_run_begin(run);
        run->keep = &model->encoder[OVLM_VISION].keep;
        OVLM_TRY(ovlm_vision_fwd(run, &model->vision));
        ovlm_run_end(run, "encode vision", -1, start_s);
    }
    if (phases & 1u << OVLM_AUDIO) {
        double start_s = ovlm_run_begin(run);
        run->keep = &model->encoder[OVLM_AUDIO].keep;
        OVLM_TRY(ovlm_audio_fwd(run, &model->audio));
        ovlm_run_end(run, "encode audio", -1, start_s);
    }
    return OVLM_OK;
}

int64_t ovlm_model_feature_rows(const ovlm_model *model, ovlm_modality modality)
{
    return modality == OVLM_VISION ? model->vision.tokens : model->audio.sounds.tokens;
}

bool ovlm_model_trains(const ovlm_model *model, ovlm_modality modality)
{
    return modality == OVLM_VISION ? model->vision.training : model->audio.training;
}

void ovlm_model_take_features(ovlm_model *model)
{
    ovlm_decoder_features *features = &model->decoder.features;
    if (model->encoder[OVLM_VISION].in_forward) {
        features->image = model->vision.features;
        memcpy(features->extra, model->vision.extra, sizeof features->extra);
    }
    if (model->encoder[OVLM_AUDIO].in_forward) {
        features->sound = model->audio.features;
    }
}

/* ---------------------------------------------------------------- features */

int64_t ovlm_model_given_rows(const ovlm_model *model, ovlm_modality modality)
{
    const ovlm_decoder_features *f = &model->decoder.features;
    const ovlm_tensor *features = modality == OVLM_VISION ? &f->image : &f->sound;
    bool given = model->has_hidden && !model->encoder[modality].in_forward &&
                 ovlm_tensor_given(features);
    return given ? features->rows : -1;
}

int64_t ovlm_model_encoded_rows(const ovlm_model *model, ovlm_modality modality)
{
    return model->encoder[modality].has_features ? ovlm_model_feature_rows(model, modality) : -1;
}

ovlm_status ovlm_model_features_read(ovlm_model *model, ovlm_modality modality, void *features,
                                     void *extra, ovlm_err *err)
{
    bool vision = modality == OVLM_VISION;
    const ovlm_tensor *own = vision ? &model->vision.features : &model->audio.features;
    if (!model->encoder[modality].has_features) {
        return OVLM_FAIL(err, OVLM_E_ARG, "there are no features: no encode has run");
    }
    int64_t bytes = own->rows * own->cols * ovlm_dtype_bytes(model->exact);
    if (features != NULL) {
        OVLM_TRY(ovlm_model_rows_read(model, own, features, err));
    }
    int64_t extras = vision && extra != NULL ? model->params.config.vision.deepstack_n : 0;
    for (int64_t k = 0; k < extras; k++) {
        OVLM_TRY(ovlm_model_rows_read(model, &model->vision.extra[k], (char *)extra + k * bytes,
                                      err));
    }
    return OVLM_OK;
}
