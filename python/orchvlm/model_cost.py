"""Cost models from a model's configuration and a cluster's datasheet, by counting."""
from collections.abc import Mapping
from typing import NamedTuple

from ._numbers import whole_number
from .config_keys import expert_layers
from .cost import BatchCost, Cluster, SequenceCost, _coefficient
from .sounds import CHUNK, CHUNK_TOKENS, halved

#: Bytes per parameter of weights, gradients and AdamW states in mixed precision (ZeRO, section 3).
_STATE_BYTES = 16
#: Part of a GPU's memory that a plan may fill; the rest is for workspaces and fragmentation.
_USABLE = 0.9
_BF16 = 2


class ModelCosts(NamedTuple):
    """What :func:`from_model` returns.

    Attributes
    ----------
    costs : dict of str to BatchCost or SequenceCost
        Seconds, per phase: ``"llm"`` and, where the model has them, ``"vision"`` and ``"audio"``.
    flops : dict of str to BatchCost
        Useful FLOPs of forward plus backward, per phase.
    memory : dict of str to (float, float)
        (bytes per token or patch, fixed bytes) per phase and GPU.
    parameters : dict of str to int
        Weights per phase, without biases and norms.
    """

    costs: dict
    flops: dict
    memory: dict
    parameters: dict


class _Count(NamedTuple):
    """One phase, forward only, summed over its layers."""

    parameters: int          # all weights
    layers: int
    linear: float            # FLOPs per token
    quadratic: float         # FLOPs per squared token
    conv: float              # FLOPs per padded input frame
    activation_bytes: float  # saved for backward, per token
    routed: float = 0.0      # values that a token sends to experts
    shared_parameters: int = 0  # of the weights, those of routed experts


def from_model(config, cluster, *, llm="balance", efficiency=0.5, experts=1):
    """Costs of a model's phases by counting FLOPs and bytes.

    ::

        seconds = FLOPs / (efficiency * peak_flops),        FLOPs = 3 * forward FLOPs

    Vision is counted per patch, language per token, audio per input (mel) frame; attention by the
    true lengths of what attends: an image or a frame (``squares``) in vision, half of the square in
    causal language layers, a window where the configuration names one.

    Parameters
    ----------
    config : dict
        In the style of Hugging Face (``config.to_dict()``): ``hidden_size``,
        ``num_hidden_layers``, ``num_attention_heads``, ``num_key_value_heads``, ``head_dim``,
        ``intermediate_size``, ``vocab_size``, for experts ``num_experts`` (or
        ``num_local_experts``, ``n_routed_experts``), ``num_experts_per_tok``,
        ``moe_intermediate_size``, at the top or under ``text_config``; optionally
        ``vision_config`` and ``audio_config``.
    cluster : Cluster
        Peak, memory and bandwidths.
    llm : {"balance", "sequence_parallel"}
        Kind of the language phase's cost, as in :func:`plan_step`.
    efficiency : float
        Part of the peak that matrix products and attention reach, in (0, 1].
    experts : int
        GPUs that share the experts of a mixture, as in :class:`Shard`; divides the cluster's.

    Returns
    -------
    ModelCosts
        ``costs`` in seconds, ``flops``, ``memory`` in bytes and ``parameters``, each by phase.

    Raises
    ------
    TypeError
        ``config`` that is no mapping, ``cluster`` that is no Cluster, a field of a wrong type.
    ValueError
        A missing or non-positive field, an attention that is not counted here (latent, sliding,
        linear), an ``efficiency`` outside (0, 1], an unknown ``llm``, ``experts`` that do not
        divide the GPUs or are more than the model's.

    Notes
    -----
    Assumptions, each of which a measurement and :func:`fit` would replace:

    - Backward costs twice the forward; recomputation is not counted as useful work.
    - Language MLPs are gated (three matrices); encoder MLPs are when ``hidden_act`` is silu.
    - ``fixed``: weights are sharded over all GPUs; gathering one layer's weights twice and reducing
      its gradients is exposed, the rest hides behind computation.
    - With ``experts``, each of a token's experts gets and gives a row in the forward and in the
      backward, in bf16, over links that work at the same time, exposed; experts are evenly used;
      a layer's experts are gathered from the GPUs that hold the same ones.
    - ``comm``: eight all-to-alls per layer (q, k, v, output; forward and backward) in bf16, links
      inside and between nodes working at the same time; degrees are powers of two up to the heads.
    - Memory: residuals, queries, keys, values, attention output and the MLP's first products are
      saved in bf16, the rest is recomputed; 16 bytes of state per parameter over all GPUs; 90 % of
      the memory is usable.

    References
    ----------
    Seed1.5-VL, arXiv 2505.07062, section 5.1: vision workload in FLOPs.
    DeepSpeed Ulysses, arXiv 2309.14509: the all-to-alls.  ZeRO, arXiv 1910.02054, section 3: bytes
    per parameter.

    Examples
    --------
    >>> import orchvlm
    >>> config = dict(hidden_size=2048, num_hidden_layers=36, num_attention_heads=16,
    ...               num_key_value_heads=2, intermediate_size=11008, vocab_size=151936)
    >>> model = orchvlm.from_model(config, orchvlm.Cluster.preset("h200"))
    >>> round(model.parameters["llm"] / 1e9, 2)
    3.4
    >>> round(model.flops["llm"]([4096] * 8) / 1e12)
    666
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"config must be a mapping; got {type(config).__name__} "
                        "(an object of transformers: pass config.to_dict())")
    if not isinstance(cluster, Cluster):
        raise TypeError(f"cluster must be a Cluster; got {type(cluster).__name__}")
    if llm not in ("balance", "sequence_parallel"):
        raise ValueError(f'llm must be "balance" or "sequence_parallel"; got {llm!r}')
    efficiency = _coefficient("from_model", "efficiency", efficiency)
    if not 0 < efficiency <= 1:
        raise ValueError(f"efficiency must be in (0, 1]; got {efficiency}")
    experts = whole_number(experts, "experts", 1)
    if cluster.n_gpus % experts:
        raise ValueError(f"experts must divide the cluster's {cluster.n_gpus} GPUs; got {experts}")
    config = _Fields(config.get("thinker_config", config), "thinker_config").values
    text = _Fields(_first(config, ("text_config", "llm_config"), config), "config")
    counts = {"llm": _count_language(text)}
    if config.get("vision_config") is not None:
        counts["vision"] = _count_vision(_Fields(config["vision_config"], "vision_config"), text)
    if config.get("audio_config") is not None:
        counts["audio"] = _count_audio(_Fields(config["audio_config"], "audio_config"), text)

    rate = efficiency * cluster.peak_flops
    if rate == 0:
        raise ValueError(f"efficiency {efficiency} times peak_flops {cluster.peak_flops} is 0")
    fixed_bytes = _STATE_BYTES * sum(c.parameters for c in counts.values()) / cluster.n_gpus
    if experts > 1 and experts > _stored(text):
        raise ValueError(f"experts = {experts} GPUs, but the model has {_stored(text)} experts to "
                         "share")
    flops = {phase: BatchCost(linear=3 * (c.linear + c.conv), quadratic=3 * c.quadratic)
             for phase, c in counts.items()}
    costs = {phase: BatchCost(
        linear=3 * c.linear / rate + 4 * _BF16 * c.routed * _byte_s(experts, cluster),
        quadratic=3 * c.quadratic / rate, padded_linear=3 * c.conv / rate,
        fixed=_exposed_s(c, cluster, experts)) for phase, c in counts.items()}
    if llm == "sequence_parallel":
        costs["llm"] = _sequence_cost(text, counts["llm"], costs["llm"], fixed_bytes, cluster)
    return ModelCosts(costs, flops,
                      {phase: (c.activation_bytes, fixed_bytes) for phase, c in counts.items()},
                      {phase: c.parameters for phase, c in counts.items()})


class _Fields:
    """A configuration whose fields have several names and must be positive numbers."""

    def __init__(self, values, where):
        if not isinstance(values, Mapping):
            raise TypeError(f"{where} must be a mapping; got {type(values).__name__}")
        self.values, self.where = values, where

    def __call__(self, *names, default=None, least=1):
        value = _first(self.values, names, default)
        if value is None:
            raise ValueError(f"{self.where} lacks {' (or '.join(names)}{')' * (len(names) - 1)}")
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{self.where}.{names[0]} must be an integer; "
                            f"got {type(value).__name__}")
        if not least <= value < 2**31:
            raise ValueError(f"{self.where}.{names[0]} must be in [{least}, 2^31); got {value}")
        return value

    def list(self, name):
        value = self.values.get(name)
        if value is None:
            return []
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{self.where}.{name} must be a list; got {type(value).__name__}")
        return list(value)


def _first(values, names, default):
    return next((values[name] for name in names if values.get(name) is not None), default)


def _heads(text):
    """(hidden size, query heads, key-value heads, head dimension)"""
    hidden, heads = text("hidden_size"), text("num_attention_heads")
    return (hidden, heads, text("num_key_value_heads", default=heads),
            text("head_dim", default=max(1, hidden // heads)))


def _count_language(text):
    if text.values.get("kv_lora_rank"):
        raise ValueError("latent attention (kv_lora_rank) is not counted here; measure and fit")
    others = sorted({str(kind) for kind in text.list("layer_types")} - {"full_attention"})
    if others:
        raise ValueError(f"layers of type {', '.join(others)} are not counted here; "
                         "measure and fit")
    hidden, heads, kv_heads, head_dim = _heads(text)
    layers, vocabulary = text("num_hidden_layers"), text("vocab_size")
    width = heads * head_dim
    attention = hidden * (2 * width + 2 * kv_heads * head_dim)
    sparse = _sparse_layers(text, layers)
    dense_inner = text("intermediate_size") if sparse < layers else 0
    stored, used, inner, routed = _experts(text, hidden) if sparse else (0, 0, 0, 0)
    head = 0 if text.values.get("tie_word_embeddings") else hidden * vocabulary
    saved = layers * (2 * hidden + 2 * width + 2 * kv_heads * head_dim)
    saved += (layers - sparse) * 2 * dense_inner + sparse * (2 * inner + routed * hidden)
    dense = (layers - sparse) * 3 * hidden * dense_inner
    return _Count(
        parameters=layers * attention + dense + sparse * stored + hidden * vocabulary + head,
        layers=layers,
        # two FLOPs per weight that a token meets; the output head too, the embedding not
        linear=2.0 * (layers * attention + dense + sparse * used + hidden * vocabulary),
        # QK^T and PV are 2*width FLOPs each per pair of tokens; causal: half of the pairs
        quadratic=2.0 * width * layers,
        conv=0.0, activation_bytes=float(_BF16 * saved), routed=float(sparse * routed * hidden),
        shared_parameters=sparse * 3 * hidden * _stored(text) * (
            text("moe_intermediate_size", "intermediate_size") if sparse else 0))


def _stored(text):
    """Experts of a layer."""
    return _first(text.values, ("num_experts", "num_local_experts", "n_routed_experts"), 0)


def _sparse_layers(text, layers):
    """Number of layers with experts."""
    if _stored(text) == 0:
        return 0
    held = expert_layers(layers, text("decoder_sparse_step", "moe_layer_freq", default=1),
                         text("first_k_dense_replace", default=0, least=0))
    dense = {i for i in text.list("mlp_only_layers") if isinstance(i, int)}
    return len(held) - sum(i in held for i in dense)


def _experts(text, hidden):
    """Of one layer with experts: weights stored, weights a token meets, inner width it meets, and
    copies of it."""
    experts = text("num_experts", "num_local_experts", "n_routed_experts")
    chosen = text("num_experts_per_tok", "moe_topk")
    if chosen > experts:
        raise ValueError(f"num_experts_per_tok = {chosen} of {experts} experts")
    inner = text("moe_intermediate_size", "intermediate_size")
    shared = text("shared_expert_intermediate_size", default=0, least=0)
    shared += inner * text("n_shared_experts", default=0, least=0)
    router = hidden * experts
    return (3 * hidden * (experts * inner + shared) + router,
            3 * hidden * (chosen * inner + shared) + router, chosen * inner + shared, chosen)


def _encoder_layer(fields, hidden):
    """(weights, bytes saved per position) of one encoder layer."""
    ratio = _coefficient(fields.where, "mlp_ratio", fields.values.get("mlp_ratio", 4))
    inner = fields("intermediate_size", "encoder_ffn_dim", default=int(hidden * ratio))
    gated = fields.values.get("hidden_act") == "silu"
    weights = 4 * hidden * hidden + (3 if gated else 2) * hidden * inner
    return weights, _BF16 * (6 * hidden + (2 if gated else 1) * inner)


def _count_vision(vision, text):
    """Per patch.  embed_dim comes first: where it is given, hidden_size is the output's width."""
    hidden = vision("embed_dim", "hidden_size")
    layers = vision("depth", "num_hidden_layers")
    patch = vision("patch_size")
    weights, saved = _encoder_layer(vision, hidden)
    pixels = patch * patch * vision("in_channels", "num_channels", "in_chans", default=3)
    embed = hidden * pixels * vision("temporal_patch_size", default=1)
    merge = vision("spatial_merge_size", default=1)
    output = vision("out_hidden_size", default=text("hidden_size"))
    merged = hidden * merge * merge
    middle = merged if merge > 1 else output
    adapter = merged * middle + middle * output
    window = vision("window_size", default=0, least=0)
    whole = layers
    if window:
        whole = len(vision.list("fullatt_block_indexes"))
    seen = max(1, window // patch) ** 2  # patches in a window
    return _Count(
        parameters=layers * weights + embed + adapter, layers=layers,
        linear=(2.0 * (layers * weights + embed) + 2.0 * adapter / merge**2
                + 4.0 * hidden * seen * (layers - whole)),
        quadratic=4.0 * hidden * whole,  # every patch of an image attends to every other
        conv=0.0, activation_bytes=float(layers * saved))


def _count_audio(audio, text):
    """Per input (mel) frame: two convolutions of width 3, the second of stride 2, on frames padded
    to the longest; then a transformer on half as many positions.  Where downsample_hidden_size is
    given, Qwen3-Omni's encoder instead."""
    hidden = audio("d_model", "hidden_size")
    layers = audio("encoder_layers", "num_hidden_layers")
    weights, saved = _encoder_layer(audio, hidden)
    bins = audio("num_mel_bins", default=80)
    output = audio("output_dim", default=text("hidden_size"))
    if audio.values.get("downsample_hidden_size") is not None:
        return _count_chunked_audio(audio, hidden, layers, weights, saved, bins, output)
    ratio = 0.5
    return _Count(
        parameters=layers * weights + 3 * hidden * (bins + hidden) + hidden * output,
        layers=layers,
        linear=ratio * 2.0 * (layers * weights + hidden * output),
        quadratic=ratio**2 * 4.0 * hidden * layers,
        conv=2.0 * 3 * hidden * (bins + ratio * hidden),
        activation_bytes=ratio * layers * saved)


def _count_chunked_audio(audio, hidden, layers, weights, saved, bins, output):
    """Three convolutions of 3 x 3 and stride 2 on full chunks, 13 positions of 100 frames, and
    attention inside windows of n_window_infer frames."""
    channels, ratio = audio("downsample_hidden_size"), CHUNK_TOKENS / CHUNK
    cells = [halved(bins, k) * halved(CHUNK, k) / CHUNK for k in (1, 2, 3)]
    window = audio("n_window_infer", default=800) * ratio
    join = channels * halved(bins) * hidden
    project = hidden * hidden + hidden * output
    return _Count(
        parameters=layers * weights + 9 * channels * (1 + 2 * channels) + join + project,
        layers=layers,
        linear=2.0 * (9 * channels * (cells[0] + channels * (cells[1] + cells[2]))
                      + ratio * (join + layers * weights + project))
        + ratio * 4.0 * hidden * window * layers,
        quadratic=0.0, conv=0.0, activation_bytes=ratio * layers * saved)


def _gather_bandwidth(cluster):
    """Bytes/s at which a GPU can receive what all others hold."""
    if cluster.nodes == 1:
        return cluster.intra_bandwidth
    return min(cluster.intra_bandwidth, cluster.gpus_per_node * cluster.inter_bandwidth)


def _exposed_s(count, cluster, experts):
    """Two gathers and one reduction of a layer's weights."""
    if cluster.n_gpus == 1:
        return 0.0
    held = count.parameters - count.shared_parameters * (1 - 1 / experts)
    return 3 * _BF16 * held / count.layers / _gather_bandwidth(cluster)


def _byte_s(degree, cluster):
    """Seconds of a byte that each GPU of a group sends to all in equal parts: of a GPU's."""
    inside = min(degree, cluster.gpus_per_node)
    return max((inside - 1) / degree / cluster.intra_bandwidth,
               (degree - inside) / degree / cluster.inter_bandwidth)


def _sequence_cost(text, count, cost, fixed_bytes, cluster):
    _, heads, kv_heads, head_dim = _heads(text)
    comm = {}
    degree = 1
    while degree <= min(heads, cluster.n_gpus):
        # A GPU needs a whole key-value head, so these are repeated when there are too few.
        rows = 2 * heads + 2 * max(kv_heads, degree)
        token_bytes = 2 * _BF16 * rows * head_dim * count.layers  # forward and backward
        comm[degree] = token_bytes * _byte_s(degree, cluster)
        degree *= 2
    return SequenceCost(cost.quadratic, cost.linear, cost.fixed, comm,
                        memory_per_token=count.activation_bytes, memory_fixed=fixed_bytes,
                        memory_limit=_USABLE * cluster.memory_bytes, heads=heads)
