"""What a ``config.json`` may say, key by key, and what transformers' classes take where it says
nothing.

A key that is not listed is refused whatever its value: a switch that is off may be one that the
model has on.
"""
import sys
from typing import NamedTuple

import numpy as np

ACTS = {"gelu": 1, "gelu_pytorch_tanh": 2, "quick_gelu": 3, "silu": 4}  # the core's numbers


class ConfigError(ValueError):
    """A configuration that this library cannot compute exactly."""


class _Rule(NamedTuple):
    words: str
    holds: object  # of a value that is not None


def _whole(least, most):
    return _Rule(f"a whole number in [{least}, {most:,}]", lambda value: isinstance(
        value, (int, np.integer)) and not isinstance(value, bool) and least <= value <= most)


def _real(words, least):
    return _Rule(words, lambda value: isinstance(value, (int, float, np.number)) and not isinstance(
        value, (bool, np.complexfloating)) and least <= value <= sys.float_info.max)


def _only(*values):
    """Neutral values: with another, something else would have to be computed."""
    words = " or ".join(repr(value) for value in values) + ", which alone is computed here"
    return _Rule(words, lambda value: any(isinstance(value, bool) == isinstance(one, bool)
                                          and _plain(value) and value == one for one in values))


def _plain(value):
    return isinstance(value, (bool, int, float, str, list, dict))


def _list(words, holds):
    return _Rule(words, lambda value: isinstance(value, (list, tuple)) and holds(value))


_COUNT, _SIZE, _LAYERS = _whole(0, 2**31 - 1), _whole(1, 2**31 - 1), _whole(1, 65536)
_ABOVE_0 = _real("a finite number above 0", 5e-324)
_FLAG = _Rule("true or false", lambda value: isinstance(value, (bool, np.bool_)))
_ACT = _Rule("one of " + ", ".join(ACTS), lambda value: isinstance(value, str) and value in ACTS)
_PART = _Rule("an object", lambda value: isinstance(value, dict))
_COUNTS = _list("a list of whole numbers >= 0", lambda value: all(map(_COUNT.holds, value)))
_ANY = _Rule("anything", lambda value: True)

# Of every part: what is not read, or only by those who generate.
_NOT_READ = dict.fromkeys((
    "_attn_implementation_autoset", "_experts_implementation", "_name_or_path", "architectures",
    "attn_implementation", "bad_words_ids", "base_config_key", "begin_suppress_tokens",
    "bos_token_id", "chunk_size_feed_forward", "decoder_start_token_id", "diversity_penalty",
    "do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id",
    "experts_implementation", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "id2label", "initializer_range", "is_decoder",
    "label2id", "length_penalty", "max_length", "min_length", "model_type", "name_or_path",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
    "output_attentions", "output_hidden_states", "output_router_logits", "output_scores",
    "pad_token_id", "prefix", "problem_type", "remove_invalid_values", "repetition_penalty",
    "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tokenizer_class", "top_k", "top_p",
    "torch_dtype", "torchscript", "transformers_version", "typical_p", "use_bfloat16",
    "use_cache"), _ANY)
_EVERYWHERE = {
    **_NOT_READ, "tie_word_embeddings": _FLAG, "is_encoder_decoder": _only(False),
    "add_cross_attention": _only(False), "cross_attention_hidden_size": _only(None),
    "tie_encoder_decoder": _only(False), "pruned_heads": _only({}),
    **dict.fromkeys(("attention_dropout", "dropout", "hidden_dropout", "activation_dropout"),
                    _only(0))}

_TOP = {**_EVERYWHERE, "text_config": _PART, "vision_config": _PART,
        "image_token_id": _COUNT, "video_token_id": _COUNT, "vision_start_token_id": _COUNT,
        "vision_end_token_id": _COUNT}
_TOP_OMNI = {**_TOP, "audio_config": _PART, "audio_token_id": _COUNT,
             "audio_start_token_id": _COUNT, "audio_end_token_id": _COUNT, "user_token_id": _ANY,
             "position_id_per_seconds": _COUNT, "seconds_per_chunk": _ANY}

_ROPE_TYPE = _only("default", "mrope")
_ROPE = {"rope_type": _ROPE_TYPE, "type": _ROPE_TYPE, "rope_theta": _ABOVE_0,
         "partial_rotary_factor": _only(1), "mrope_interleaved": _FLAG, "interleaved": _ANY,
         "mrope_section": _list("a list of three whole numbers >= 0", lambda value: len(
             value) == 3 and _COUNTS.holds(value))}
_SHARE = _Rule("a number above 0, at most 1", lambda value: _ABOVE_0.holds(value) and value <= 1)
_ROPE_SEED = {**_ROPE, "partial_rotary_factor": _SHARE}
_TEXT = {
    **_EVERYWHERE, "vocab_size": _SIZE, "hidden_size": _SIZE, "intermediate_size": _SIZE,
    "num_hidden_layers": _LAYERS, "num_attention_heads": _SIZE, "num_key_value_heads": _SIZE,
    "head_dim": _SIZE, "rms_norm_eps": _ABOVE_0, "hidden_act": _ACT,
    "attention_bias": _FLAG, "rope_theta": _ABOVE_0, "rope_scaling": _PART,
    "rope_parameters": _PART, "max_position_embeddings": _ANY,
    "use_qk_norm": _only(True), "is_causal": _only(True), "sliding_window": _only(None),
    "use_sliding_window": _only(False), "max_window_layers": _ANY, "layer_types": _list(
        "a list of 'full_attention', which alone is computed here",
        lambda value: all(isinstance(one, str) and one == "full_attention" for one in value))}
_SPARSE = {
    **_TEXT, "num_experts": _COUNT, "num_experts_per_tok": _SIZE, "moe_intermediate_size": _SIZE,
    "decoder_sparse_step": _SIZE, "mlp_only_layers": _COUNTS, "norm_topk_prob": _FLAG,
    "router_aux_loss_coef": _real("a finite number >= 0", 0),
    "shared_expert_intermediate_size": _only(0)}
_SEED = {
    **_SPARSE, "scoring_func": _Rule("'softmax' or 'sigmoid'", lambda value: isinstance(
        value, str) and value in ("softmax", "sigmoid")), "n_group": _SIZE, "topk_group": _SIZE,
    "routed_scaling_factor": _ABOVE_0, "shared_expert_intermediate_size": _COUNT,
    "first_k_dense_replace": _COUNT, "use_qk_norm": _FLAG}
_VISION = {
    **_EVERYWHERE, "depth": _LAYERS, "hidden_size": _SIZE, "intermediate_size": _SIZE,
    "num_heads": _SIZE, "patch_size": _SIZE, "spatial_merge_size": _SIZE, "in_channels": _SIZE,
    "temporal_patch_size": _SIZE, "out_hidden_size": _SIZE, "num_position_embeddings": _COUNT,
    "deepstack_visual_indexes": _COUNTS, "hidden_act": _ACT, "qkv_bias": _only(True),
    "apply_vit_abs_pos_embed": _only(True),
    **dict.fromkeys(("image_size", "in_chans", "spatial_patch_size", "tokens_per_second"), _ANY)}
_VISION_SEED = {**_VISION, "adapter_hidden_size": _SIZE, "adapter_act": _ACT,
                "layer_norm_eps": _ABOVE_0, "rope_theta": _ABOVE_0}
_AUDIO = {
    **_EVERYWHERE, "d_model": _SIZE, "encoder_layers": _LAYERS, "encoder_attention_heads": _SIZE,
    "encoder_ffn_dim": _SIZE, "num_mel_bins": _SIZE, "downsample_hidden_size": _SIZE,
    "output_dim": _SIZE, "n_window": _SIZE, "n_window_infer": _SIZE, "activation_function": _ACT,
    "num_hidden_layers": _LAYERS, "scale_embedding": _only(False), "conv_chunksize": _ANY,
    "max_source_positions": _ANY}

_KEYS = {
    "qwen3_vl": {"": _TOP, "text_config": _TEXT, "vision_config": _VISION},
    "qwen3_vl_moe": {"": _TOP, "text_config": _SPARSE, "vision_config": _VISION},
    "qwen3_omni_moe": {"": _TOP_OMNI, "text_config": _SPARSE, "vision_config": _VISION,
                       "audio_config": _AUDIO},
    "seed1_5_vl": {"": _TOP, "text_config": _SEED, "vision_config": _VISION_SEED}}
_NEEDED = {
    "": (),
    "text_config": ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                    "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"),
    "vision_config": ("depth", "hidden_size", "intermediate_size", "num_heads", "patch_size",
                      "spatial_merge_size"),
    "audio_config": ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim",
                     "output_dim")}

# What transformers' classes take for what is left out.  Not here: sizes without which nothing is
# known, and rope_theta, which one version takes for 5e6 where another takes 5e5.
_VISION_LEFT = {
    "hidden_act": "gelu_pytorch_tanh", "in_channels": 3, "patch_size": 16, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "out_hidden_size": 3584, "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24]}
_TEXT_LEFT = {"rms_norm_eps": 1e-6, "attention_bias": False}
_SPARSE_LEFT = {**_TEXT_LEFT, "decoder_sparse_step": 1, "mlp_only_layers": [],
                "router_aux_loss_coef": 0.001}
_LEFT_OUT = {
    "qwen3_vl": {"vision_config": _VISION_LEFT, "text_config": {**_TEXT_LEFT, "head_dim": 128}},
    "qwen3_vl_moe": {"vision_config": _VISION_LEFT, "text_config": {
        **_SPARSE_LEFT, "num_experts": 60, "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408}},
    "qwen3_omni_moe": {
        "vision_config": _VISION_LEFT,
        "text_config": {**_SPARSE_LEFT, "num_experts": 128, "num_experts_per_tok": 8,
                        "moe_intermediate_size": 768, "norm_topk_prob": True},
        "audio_config": {"num_mel_bins": 128, "n_window": 50, "n_window_infer": 800,
                         "downsample_hidden_size": 480, "activation_function": "gelu"}},
    "seed1_5_vl": {}}
FAMILIES = tuple(_KEYS)


def _check(part, rules, where):
    for key, value in part.items():
        rule = rules.get(key)
        if rule is None:
            raise ConfigError(f"{where}: unknown key {key!r:.60}, got {value!r:.60}; it might be a "
                              "switch that is not computed here: take it out if it changes nothing")
        if value is not None and not rule.holds(value):
            raise ConfigError(f"{where}: {key} must be {rule.words}; got {value!r:.60}")


def checked(values, family):
    """The configuration with all that it leaves out.

    Raises ConfigError for what no model of the family can be made of, naming key and value.
    """
    for name, rules in _KEYS[family].items():
        part = values.get(name) if name else values
        if not isinstance(part, dict):
            raise ConfigError(f"config: {name} missing" if part is None else
                              f"config: {name} must be an object; got {part!r:.60}")
        _check(part, rules, name or "config")
    # Qwen's classes do not read the part of a head that turns.
    rules = _ROPE_SEED if family == "seed1_5_vl" else _ROPE
    for key in ("rope_scaling", "rope_parameters"):
        _check(values["text_config"].get(key) or {}, rules, f"text_config: {key}")
    values = _filled(values, family)
    for name, keys in _NEEDED.items():
        missing = [key for key in keys if values.get(name, {}).get(key) is None]
        if missing and name in values:
            raise ConfigError(f"{name}: {', '.join(missing)} missing")
    return values


def _filled(values, family):
    """What is null counts as left out."""
    filled = dict(values)
    for name, rules in _KEYS[family].items():
        if name:
            said = {key: value for key, value in values[name].items()
                    if value is not None or rules[key] is _ANY}
            filled[name] = {**_LEFT_OUT[family].get(name, {}), **said}
    if family == "seed1_5_vl":
        return filled
    # Of the top alone; what the decoder's part says of it is read by nobody.
    if filled.get("tie_word_embeddings") is None:
        filled["tie_word_embeddings"] = False
    text, heads = filled["text_config"], filled["text_config"].get("num_attention_heads")
    if heads is not None and family != "qwen3_omni_moe" and "num_key_value_heads" in values[
            "text_config"]:
        text.setdefault("num_key_value_heads", heads)  # null; left out it is another number
    if heads is not None and "hidden_size" in text:
        text.setdefault("head_dim", text["hidden_size"] // heads)
    return filled


def expert_layers(layers, step, dense_first):
    """range of the decoder layers with experts: each ``step``-th, from ``dense_first`` on."""
    return range(-(-(dense_first + 1) // step) * step - 1, layers, step)


def rope(text):
    """(theta, M-RoPE sections or None, interleaved, part of a head that turns) from any version's
    spelling."""
    found = text.get("rope_scaling") or text.get("rope_parameters") or {}
    theta = found.get("rope_theta") or text.get("rope_theta")
    if theta is None:
        raise ConfigError("text_config: rope_theta missing")
    part = found.get("partial_rotary_factor")
    return (float(theta), found.get("mrope_section"), bool(found.get("mrope_interleaved")),
            1.0 if part is None else float(part))
