/* model_audio.c - sounds of a call: checked, cut, and heard. */
#include "model/model_state.h"

#include <string.h>

ovlm_status ovlm_model_audio_prepare(ovlm_model *model, const ovlm_model_inputs *inputs,
                                     const ovlm_pass_options *options, ovlm_err *err)
{
    const ovlm_params *p = &model->params;
    model->has_audio = inputs->sounds > 0;
    if (!model->has_audio) {
        return OVLM_OK;
    }
    if (p->config.audio.depth == 0) {
        return OVLM_FAIL(err, OVLM_E_ARG, "this model has no audio tower; got %lld sounds",
                         (long long)inputs->sounds);
    }
    ovlm_audio_pass *pass = &model->audio;
    *pass = (ovlm_audio_pass){.params = p, .mel = inputs->mel,
                              .training = options->training && ovlm_audio_trained(p),
                              .block = model->audio_block};
    pass->context.checkpoint = options->checkpoint;
    pass->context.params = p;
    return ovlm_sounds_init(&pass->sounds, &p->config.audio, inputs->mel_length, inputs->sounds,
                            &model->call, err);
}

ovlm_status ovlm_model_hear(ovlm_run *run, ovlm_model *model)
{
    if (!model->has_audio) {
        return OVLM_OK;
    }
    run->keep = &model->vision_keep;
    OVLM_TRY(ovlm_audio_fwd(run, &model->audio));
    model->decoder.sounds = model->audio.features;
    run->keep = &model->decoder_keep;
    return OVLM_OK;
}
