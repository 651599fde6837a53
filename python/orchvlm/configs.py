"""Configurations of models: from and to Hugging Face's ``config.json``, and presets."""
import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import _core
from ._files import read_object, write_whole
from .config_keys import ACTS, FAMILIES, ConfigError, checked, expert_layers, rope
from .sounds import CHUNK
from .thinker import thinker_values

_MERGERS = {"norm_concat": 0, "pool": 2}
_DEEPSTACK_MOST = 8  # of the C core

# What a family has whatever its config.json says.  transformers' classes read neither
# mrope_interleaved nor, of Qwen3-VL, norm_topk_prob.
_QWEN = {"patch_bias": True, "final_norm": False, "merger": "norm_concat", "vision_eps": 1e-6,
         "out_bias": True, "interleaved": True}
_FAMILY = {
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": {**_QWEN, "norm_topk": True},
    "qwen3_omni_moe": _QWEN,
    # The report does not state these; they are read as in ERNIE-4.5-VL's tower, which has the
    # same shape (no bias of the patch embedding, a last LayerNorm), and Qwen3's decoder.
    "seed1_5_vl": {"patch_bias": False, "final_norm": True, "merger": "pool",
                   "vision_eps": 1e-6, "out_bias": True},
}
_SECTIONS = (24, 20, 20)  # of transformers' classes, whatever the head's size

_AUDIO_EPS = 1e-5  # of every norm, whatever the configuration says


def count_elements(shapes):
    """Elements of tensors of these shapes."""
    return sum(math.prod(shape) for shape in shapes)


def _interleaved(sections, half):
    """Sections that sum to half the head and turn it as transformers does: frequency i by rows
    where i % 3 == 1 and i < 3 sections[1], by columns where i % 3 == 2 and i < 3 sections[2], else
    by time; the first section is not read."""
    rows, columns = (len(range(k, min(half, 3 * sections[k]), 3)) for k in (1, 2))
    return [half - rows - columns, rows, columns]


@dataclass(frozen=True, repr=False)
class ModelConfig:
    """What a model is made of.

    Parameters
    ----------
    values : dict
        The content of a ``config.json``: ``model_type`` one of ``qwen3_vl``, ``qwen3_vl_moe`` and
        ``seed1_5_vl``, with ``text_config`` and ``vision_config``; or
        ``qwen3_omni_moe_thinker``, with ``audio_config`` besides (of a whole ``qwen3_omni_moe``
        its ``thinker_config`` is taken).

    Raises
    ------
    ValueError
        A family, a switch or a size that is not computed here, dropout above 0, a missing key.

    Examples
    --------
    >>> import orchvlm
    >>> config = orchvlm.preset("tiny")
    >>> config.family, config.text["hidden_size"], config.vision["patch_size"]
    ('seed1_5_vl', 192, 14)
    >>> orchvlm.preset("seed1.5-vl").n_parameters // 10**9
    199
    """

    values: dict

    def __post_init__(self):
        if not isinstance(self.values, dict):
            raise TypeError(f"a configuration is a dict; got {type(self.values).__name__}")
        try:
            values = copy.deepcopy(self.values)
        except RecursionError:
            raise ConfigError("a configuration is not that deep") from None
        object.__setattr__(self, "values", thinker_values(values))
        if self.family not in FAMILIES:
            raise ConfigError(f"model_type must be one of {', '.join(FAMILIES)}; got "
                              f"{self.values.get('model_type')!r:.60}")
        text = self.values.get("text_config")
        if isinstance(text, dict) and "num_local_experts" in text:
            # transformers 5 writes it so, and reads either.
            text.setdefault("num_experts", text.pop("num_local_experts"))
        object.__setattr__(self, "values", checked(self.values, self.family))
        if self.audible:
            self._check_audio()
        self.numbers()  # refuses sizes that do not go together

    @property
    def family(self):
        """``model_type``, of a thinker that of the whole."""
        name = self.values.get("model_type")
        return name.removesuffix("_thinker") if isinstance(name, str) else name

    @property
    def text(self):
        """``text_config``."""
        return self.values["text_config"]

    @property
    def vision(self):
        """``vision_config``."""
        return self.values["vision_config"]

    @property
    def audible(self):
        """Whether it has an audio encoder."""
        return self.family == "qwen3_omni_moe"

    @property
    def audio(self):
        """``audio_config``."""
        return self.values["audio_config"]

    @property
    def sound_tokens(self):
        """Ids of the placeholders that features of sounds replace."""
        return (self.values["audio_token_id"],) if self.audible else ()

    @property
    def tied(self):
        """Whether the head is the embedding table."""
        return bool(self.values.get("tie_word_embeddings",
                                    self.text.get("tie_word_embeddings", False)))

    @property
    def qk_norm(self):
        """Whether the decoder's queries and keys are normalised, head by head."""
        return self.text.get("use_qk_norm", True)

    @property
    def rotary(self):
        """Elements of a head that positions turn, from the first on."""
        return int(self.text["head_dim"] * rope(self.text)[3])

    @property
    def sparse(self):
        """Whether the decoder has experts."""
        return bool(self.text.get("num_experts"))

    @property
    def sparse_layers(self):
        """list of bool : of each decoder layer, whether it has experts."""
        text = self.text
        held = expert_layers(text["num_hidden_layers"], text.get("decoder_sparse_step", 1),
                             self._dense_first())
        return [self.sparse and i in held for i in range(text["num_hidden_layers"])]

    @property
    def visual_tokens(self):
        """Ids of the placeholders that features replace."""
        keys = ("image_token_id", "video_token_id")
        return tuple(self.values[k] for k in keys if self.values.get(k) is not None)

    def _check_audio(self):
        audio = self.audio
        if self.values.get("audio_token_id") is None:
            raise ConfigError("config: audio_token_id missing")
        # Another name of encoder_layers in transformers' class.
        if audio.get("num_hidden_layers", audio["encoder_layers"]) != audio["encoder_layers"]:
            raise ConfigError("audio_config: num_hidden_layers must be encoder_layers, "
                              f"{audio['encoder_layers']}; got {audio['num_hidden_layers']}")
        # transformers counts 13 tokens a chunk whatever n_window is; both agree at 50.
        if 2 * audio["n_window"] != CHUNK:
            raise ConfigError(f"audio_config: n_window must be {CHUNK // 2}; got "
                              f"{audio['n_window']!r}")
        if audio["n_window_infer"] < CHUNK:
            raise ConfigError(f"audio_config: n_window_infer must be >= {CHUNK}; got "
                              f"{audio['n_window_infer']!r}")

    def _dense_first(self):
        """How many layers at the bottom have no experts."""
        text = self.text
        dense = sorted(set(text.get("mlp_only_layers", ())))
        if dense != list(range(len(dense))):
            raise ConfigError("text_config: mlp_only_layers must be the first layers; got "
                              f"{dense}")
        return max(len(dense), text.get("first_k_dense_replace", 0))

    def _vision_numbers(self):
        v, family = self.vision, _FAMILY[self.family]
        merge, side = v["spatial_merge_size"], 0
        if positions := v.get("num_position_embeddings"):
            side = int(round(positions ** 0.5))
            if side * side != positions:
                raise ConfigError("vision_config: num_position_embeddings must be a square; got "
                                  f"{positions}")
        deepstack = v.get("deepstack_visual_indexes", ())
        if len(deepstack) > _DEEPSTACK_MOST:
            raise ConfigError(f"vision_config: at most {_DEEPSTACK_MOST} DeepStack outputs; got "
                              f"{len(deepstack)}")
        merged = v["hidden_size"] * merge * merge
        ints = [v["depth"], v["hidden_size"], v["num_heads"], v["intermediate_size"],
                v["patch_size"], v.get("temporal_patch_size", 1), v.get("in_channels", 3), merge,
                v.get("out_hidden_size", self.text["hidden_size"]),
                v.get("adapter_hidden_size", merged), side, family["patch_bias"],
                family["final_norm"], _MERGERS[family["merger"]],
                ACTS[v.get("hidden_act", "gelu_pytorch_tanh")],
                ACTS[v.get("adapter_act", "gelu")],
                len(deepstack), *deepstack, *[0] * (_DEEPSTACK_MOST - len(deepstack))]
        return ints, [v.get("layer_norm_eps", family["vision_eps"]), v.get("rope_theta", 10000.0)]

    def _text_numbers(self):
        t, family = self.text, _FAMILY[self.family]
        theta, sections, interleaved, _ = rope(t)
        half = self.rotary // 2
        if family.get("interleaved"):
            interleaved = True
            sections = _interleaved(sections or _SECTIONS, half)
        experts = t.get("num_experts", 0)
        for key in ("num_experts_per_tok", "moe_intermediate_size"):
            if experts and key not in t:
                raise ConfigError(f"text_config: {key} missing")
        ints = [t["num_hidden_layers"], t["hidden_size"], t["num_attention_heads"],
                t["num_key_value_heads"], t["head_dim"], t["vocab_size"], t["intermediate_size"],
                experts, t.get("num_experts_per_tok", 1), t.get("moe_intermediate_size", 1),
                t.get("shared_expert_intermediate_size", 0), self._dense_first(),
                t.get("decoder_sparse_step", 1), t.get("n_group", 1), t.get("topk_group", 1),
                *(sections or (half, 0, 0)), interleaved,
                t.get("attention_bias", False), self.qk_norm, self.tied,
                t.get("scoring_func") == "sigmoid",
                family.get("norm_topk", t.get("norm_topk_prob", True)), True,
                t.get("attention_bias", False) and family["out_bias"], self.rotary,
                ACTS[t.get("hidden_act", "silu")]]
        return ints, [t["rms_norm_eps"], theta, t.get("routed_scaling_factor", 1.0),
                      t.get("router_aux_loss_coef", 0.001) if experts else 0.0]

    def _audio_numbers(self):
        if not self.audible:
            return [0] * 10, [0.0]
        a = self.audio
        return [a["encoder_layers"], a["d_model"], a["encoder_attention_heads"],
                a["encoder_ffn_dim"], a["num_mel_bins"], a["downsample_hidden_size"], CHUNK,
                a["n_window_infer"] // CHUNK, a["output_dim"],
                ACTS[a["activation_function"]]], [_AUDIO_EPS]

    def numbers(self):
        """The sizes and switches in the C core's order.

        Returns
        -------
        ints : int64[63]
        floats : float64[7]

        Raises
        ------
        ValueError
            Sizes that do not go together.
        """
        vision_ints, vision_floats = self._vision_numbers()
        text_ints, text_floats = self._text_numbers()
        audio_ints, audio_floats = self._audio_numbers()
        return (np.array(vision_ints + text_ints + audio_ints, dtype=np.int64),
                np.array(vision_floats + text_floats + audio_floats, dtype=np.float64))

    def parameters(self):
        """What a model of this configuration holds, without making it.

        Returns
        -------
        dict
            {name on the hub: shape}, in the order in which layers use them.

        Raises
        ------
        ValueError
            Sizes that make no model.
        """
        return {name: shape for name, _, shape, _ in _core.model_parameters(*self.numbers())}

    @property
    def n_parameters(self):
        """int : number of weights, and of the routers' corrections."""
        return count_elements(self.parameters().values())

    def __repr__(self):
        return f"<ModelConfig {self.family}: {self.n_parameters / 1e6:,.1f}M parameters>"

    def save(self, folder):
        """Writes ``config.json``, whole or not at all.

        Parameters
        ----------
        folder : path-like
            It must be there.
        """
        text = json.dumps(self.values, indent=2, sort_keys=True) + "\n"
        write_whole(Path(folder, "config.json"), lambda stream: stream.write(text.encode()))

    @classmethod
    def load(cls, folder):
        """Reads ``config.json``.

        Parameters
        ----------
        folder : path-like

        Returns
        -------
        ModelConfig

        Raises
        ------
        FileNotFoundError
            There is none.
        ValueError
            It is no JSON, or not understood.
        """
        return cls(read_object(Path(folder, "config.json"), ConfigError))


# ---------------------------------------------------------------- presets

_BYTE_VOCAB = 512  # bytes, special tokens and words, of the built-in tokenizer


def _seed(vision, text, **top):
    """A Seed1.5-VL: patch 14, 2D RoPE, 2x2 average pooling, two-layer adapter (report, 2.1)."""
    vision = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 1,
              "in_channels": 3, "hidden_act": "gelu_pytorch_tanh", **vision,
              "out_hidden_size": text["hidden_size"]}
    vision.setdefault("adapter_hidden_size", text["hidden_size"])
    text = {"hidden_act": "silu", "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, **text}
    return {"model_type": "seed1_5_vl", "tie_word_embeddings": False, "image_token_id": 262,
            "video_token_id": 263, "vision_config": vision, "text_config": text, **top}


def _text(hidden, layers, heads, kv_heads, head_dim, intermediate, vocab, **more):
    return {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "head_dim": head_dim,
            "intermediate_size": intermediate, "vocab_size": vocab, **more}


def _omni(vision, audio, text, **top):
    """A thinker of Qwen3-Omni; without ``top``, over the built-in tokenizer's tokens."""
    vision = {"patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
              "in_channels": 3, "hidden_act": "gelu_pytorch_tanh", **vision,
              "out_hidden_size": text["hidden_size"]}
    audio = {"n_window": CHUNK // 2, "n_window_infer": 8 * CHUNK, "activation_function": "gelu",
             **audio, "output_dim": text["hidden_size"]}
    text = {"hidden_act": "silu", "rms_norm_eps": 1e-6, **text}
    return {"model_type": "qwen3_omni_moe_thinker", "image_token_id": 262, "video_token_id": 263,
            "vision_start_token_id": 260, "vision_end_token_id": 261, "audio_start_token_id": 264,
            "audio_end_token_id": 265, "audio_token_id": 266, "position_id_per_seconds": 13,
            "vision_config": vision, "audio_config": audio, "text_config": text, **top}


_PRESETS = {
    "tiny": _seed({"depth": 4, "hidden_size": 192, "num_heads": 3, "intermediate_size": 768},
                  _text(192, 6, 6, 2, 32, 512, _BYTE_VOCAB), tie_word_embeddings=True),
    "long": _seed({"depth": 2, "hidden_size": 128, "num_heads": 2, "intermediate_size": 512},
                  _text(128, 4, 8, 4, 16, 384, _BYTE_VOCAB), tie_word_embeddings=True),
    "tiny-moe": _seed({"depth": 4, "hidden_size": 192, "num_heads": 3, "intermediate_size": 768},
                      _text(192, 4, 6, 2, 32, 512, _BYTE_VOCAB, num_experts=16,
                            num_experts_per_tok=2, moe_intermediate_size=64,
                            router_aux_loss_coef=0.001), tie_word_embeddings=True),
    "tiny-omni": _omni(
        {"depth": 3, "hidden_size": 192, "num_heads": 3, "intermediate_size": 768,
         "num_position_embeddings": 256, "deepstack_visual_indexes": [1]},
        {"encoder_layers": 3, "d_model": 192, "encoder_attention_heads": 3,
         "encoder_ffn_dim": 768, "num_mel_bins": 80, "downsample_hidden_size": 32},
        _text(192, 3, 6, 2, 32, 512, _BYTE_VOCAB, num_experts=8, num_experts_per_tok=2,
              moe_intermediate_size=128, router_aux_loss_coef=0.001,
              rope_parameters={"rope_type": "default", "rope_theta": 10000.0,
                               "mrope_section": [6, 5, 5], "mrope_interleaved": True}),
        tie_word_embeddings=True),
    "small": _seed({"depth": 8, "hidden_size": 512, "num_heads": 8, "intermediate_size": 2048},
                   _text(640, 16, 10, 2, 64, 1792, 16384), tie_word_embeddings=True),
    # As published: 30B of parameters, of which a token meets 3B.
    "qwen3-omni-thinker": _omni(
        {"depth": 27, "hidden_size": 1152, "num_heads": 16, "intermediate_size": 4304,
         "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24]},
        {"encoder_layers": 32, "d_model": 1280, "encoder_attention_heads": 20,
         "encoder_ffn_dim": 5120, "num_mel_bins": 128, "downsample_hidden_size": 480},
        _text(2048, 48, 32, 4, 128, 768, 152064, num_experts=128, num_experts_per_tok=8,
              moe_intermediate_size=768, router_aux_loss_coef=0.001, norm_topk_prob=True,
              rope_parameters={"rope_type": "default", "rope_theta": 1e6,
                               "mrope_section": [24, 20, 20], "mrope_interleaved": True}),
        image_token_id=151655, video_token_id=151656, vision_start_token_id=151652,
        vision_end_token_id=151653, audio_start_token_id=151669, audio_end_token_id=151670,
        audio_token_id=151675, tie_word_embeddings=False),
    # The report gives the tower and 20B active parameters; the decoder's shape is our choice, of
    # the size that its sister report names (about 200B in all).
    "seed1.5-vl": _seed({"depth": 27, "hidden_size": 1280, "num_heads": 20,
                         "intermediate_size": 5120, "adapter_hidden_size": 4096},
                        _text(4096, 64, 64, 8, 128, 12288, 155136, num_experts=128,
                              num_experts_per_tok=8, moe_intermediate_size=1920,
                              router_aux_loss_coef=0.001)),
}


#: Names that :func:`preset` knows.
PRESETS = tuple(sorted(_PRESETS))


def preset(name):
    """A configuration by name.

    ``tiny`` and ``tiny-moe`` (4M and 5M parameters) train on a laptop in minutes, and so does
    ``tiny-omni`` (7M), which also hears, and ``long`` (1M, with eight heads), for samples of very
    different lengths over ranks; ``small`` (108M) on a workstation; ``seed1.5-vl`` is the
    published tower (532M) with a decoder of about 20B active and 200B total parameters, whose shape
    the report does not state and which is a choice; ``qwen3-omni-thinker`` is the published one
    (32B with its encoders).

    Parameters
    ----------
    name : str

    Returns
    -------
    ModelConfig

    Raises
    ------
    ValueError
        No such preset.

    References
    ----------
    Seed1.5-VL Technical Report, section 2.

    Examples
    --------
    >>> import orchvlm
    >>> orchvlm.preset("seed1.5-vl").vision["depth"]
    27
    """
    if name not in _PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {name!r}")
    return ModelConfig(_PRESETS[name])
