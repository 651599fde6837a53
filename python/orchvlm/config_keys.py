"""What a ``config.json`` need not say: the values that transformers' classes then take."""

_VISION = {"hidden_act": "gelu_pytorch_tanh", "in_channels": 3, "patch_size": 16,
           "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 3584,
           "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24]}
_TEXT = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "attention_bias": False}
_SPARSE = {**_TEXT, "decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.001}

#: By family and part.  Not here: sizes without which nothing is known, and ``rope_theta``, which
#: one version takes for 5e6 where another takes 5e5.
_DEFAULTS = {
    "qwen3_vl": {"vision_config": _VISION, "text_config": {**_TEXT, "head_dim": 128}},
    "qwen3_vl_moe": {"vision_config": _VISION, "text_config": {
        **_SPARSE, "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408}},
    "qwen3_omni_moe": {
        "vision_config": _VISION,
        "text_config": {**_SPARSE, "num_experts": 128, "num_experts_per_tok": 8,
                        "moe_intermediate_size": 768, "norm_topk_prob": True},
        "audio_config": {"num_mel_bins": 128, "n_window": 50, "n_window_infer": 800,
                         "downsample_hidden_size": 480, "activation_function": "gelu"}},
    "seed1_5_vl": {},
}


def with_defaults(values, family):
    """The configuration with all that it leaves out; what is null counts as left out."""
    values = dict(values)
    for part, defaults in _DEFAULTS[family].items():
        if not isinstance(values.get(part), dict):
            continue
        said = {key: value for key, value in values[part].items()
                if value is not None or key not in defaults}
        values[part] = {**defaults, **said}
    if family != "seed1_5_vl" and isinstance(text := values.get("text_config"), dict):
        # Of the top alone; what the decoder's part says of it is read by nobody.
        values.setdefault("tie_word_embeddings", False)
        width, heads = text.get("hidden_size"), text.get("num_attention_heads")
        if text.get("num_key_value_heads", 0) is None:
            text["num_key_value_heads"] = heads
        if text.get("head_dim") is None and isinstance(width, int) and isinstance(heads, int):
            text["head_dim"] = width // max(1, heads)
    return values
