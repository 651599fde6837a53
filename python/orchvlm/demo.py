"""Embedded lengths: seeded generators whose quantiles follow public datasets.

Numbers only: a handful of quantiles per dataset stand in for the data, so that the demo, the
notebook and the tests run anywhere.  Between two quantiles, lengths are spread evenly in their
logarithm.

Examples
--------
>>> import orchvlm
>>> batch = orchvlm.demo.batch(n_ranks=8, samples_per_rank=4, seed=0)
>>> len(batch.text_tokens), sorted(batch.phases)
(32, ['audio', 'vision'])
>>> lengths = orchvlm.demo.wikipedia_lengths(512, seed=0)
>>> int(lengths.max()) <= 192 * 1024
True
"""
import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from .cost import BatchCost, _count
from .model_cost import ModelCosts, _Fields
from .tables import format_bytes, format_count

#: Quantiles of public datasets, as (share, value) pairs.
QUANTILES = {
    # FlexSP's published Wikipedia list (Hetu-Galvatron, branch flexsp): tokens per article
    "wikipedia_tokens": ((0, 1), (.01, 39), (.1, 87), (.25, 145), (.5, 347), (.75, 862),
                         (.9, 2112), (.95, 3721), (.96, 4392), (.99, 10921), (.999, 37367),
                         (.9999, 102060), (1, 1823777)),
    # COCO val2017: pixels of an image; characters of all its captions
    "photo_pixels": ((0, 29000), (.01, 136954), (.1, 187500), (.25, 271360), (.5, 273280),
                     (.75, 307200), (.99, 409600), (1, 409600)),
    "caption_chars": ((0, 184), (.01, 204), (.1, 225), (.5, 258), (.9, 302), (.99, 362),
                      (1, 484)),
    # Microsoft documentation (CC BY): pixels of a screenshot; characters of a page
    "screenshot_pixels": ((0, 324), (.25, 450), (.5, 113492), (.75, 467343), (.9, 1183351),
                          (.95, 1859740), (.99, 5757667), (1, 8620800)),
    "page_chars": ((0, 85), (.01, 319), (.1, 518), (.25, 835), (.5, 1860), (.75, 4391),
                   (.9, 9495), (.95, 15541), (.99, 46877), (.999, 140192), (1, 557012)),
    # LibriSpeech utterances and VoxConverse speaker turns: seconds
    "read_speech_seconds": ((0, 1.06), (.01, 2.14), (.1, 3.65), (.25, 6.75), (.5, 12.89),
                            (.75, 14.86), (.9, 15.73), (.99, 17.66), (1, 35.16)),
    "conversation_seconds": ((0, .04), (.01, .32), (.1, .58), (.25, 1.12), (.5, 3.16),
                             (.75, 8.73), (.9, 20.27), (.95, 31.12), (.99, 59.72), (1, 314.44)),
    # ActivityNet Captions: seconds of a video; characters of its description
    "video_seconds": ((0, 1.58), (.01, 7.59), (.1, 29.4), (.25, 60.9), (.5, 115.1),
                      (.75, 174), (.9, 211.5), (.99, 236.9), (1, 755.1)),
    "video_chars": ((0, 45), (.01, 93), (.1, 128), (.25, 156), (.5, 212), (.75, 294),
                    (.9, 415), (.99, 774), (1, 2664)),
    # source files of 30 public repositories: bytes
    "code_bytes": ((0, 1), (.01, 64), (.1, 475), (.25, 1314), (.5, 3226), (.75, 8606),
                   (.9, 22025), (.95, 38497), (.99, 102139), (.999, 352360), (1, 3764336)),
}

#: Usual conversions to tokens, and raw bytes.
CHARS_PER_TOKEN = 4
PATCH_PIXELS = 14 * 14          # a vision encoder's patch; four become one language token
PATCHES_PER_TOKEN = 4
AUDIO_FRAMES_PER_SECOND = 100   # mel frames into the audio encoder
AUDIO_FRAMES_PER_TOKEN = 4      # 25 tokens per second come out
AUDIO_WINDOW_FRAMES = 3000      # sound attends inside windows of 30 seconds
FRAMES_PER_CLIP = 16            # one video item: so many frames, taken at 1 per second
FRAME_TOKENS = 160              # language tokens of a video frame, about 350 x 350 pixels
VIDEO_FRAMES = 64               # of longer videos, so many frames are taken
IMAGE_TOKENS = 2048             # larger images are scaled down to this
SOUND_SECONDS = 300             # longer recordings are cut
PAGE_IMAGES = 4                 # at most so many on a page
LONGEST_TEXT = 8192             # longer documents are cut

#: A model of about 84 billion parameters and three modalities.  OrchMLLM does not publish its
#: dimensions: the language model is Qwen2-72B, the encoders are ours.
MODEL_84B = {
    "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "intermediate_size": 29568, "vocab_size": 152064,
    "vision_config": {"hidden_size": 4096, "num_hidden_layers": 48, "patch_size": 14,
                      "spatial_merge_size": 2, "mlp_ratio": 4},
    "audio_config": {"d_model": 1280, "encoder_layers": 32, "encoder_ffn_dim": 5120,
                     "num_mel_bins": 128},
}

#: About 9 billion: Qwen2-7B with a vision encoder of Seed1.5-VL's shape and a Whisper-like one.
MODEL_9B = {
    "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
    "vision_config": {"hidden_size": 1280, "num_hidden_layers": 27, "patch_size": 14,
                      "spatial_merge_size": 2, "mlp_ratio": 4},
    "audio_config": {"d_model": 1280, "encoder_layers": 32, "encoder_ffn_dim": 5120,
                     "num_mel_bins": 128},
}

#: More than these would fill the memory of a laptop.
_MOST_VALUES, _MOST_SAMPLES = 1 << 26, 1 << 22

#: Kinds of samples and their shares in :func:`batch`.
MIXTURE = {"caption": .40, "document": .15, "speech": .20, "video": .10, "text": .15}


def draw(name, n, rng):
    """Draws n values whose quantiles follow a public dataset.

    Parameters
    ----------
    name : str
        A key of ``QUANTILES``.
    n : int
        How many.
    rng : numpy.random.Generator
        Source of randomness.

    Returns
    -------
    float64[n]
        In the dataset's unit, which the name says.

    Raises
    ------
    TypeError
        ``n`` that is no integer, ``rng`` that is no generator.
    ValueError
        An unknown name, or ``n`` outside of [0, 2^26].

    Notes
    -----
    Inverse of the distribution function, linear in the logarithm between known quantiles.  O(n).

    Examples
    --------
    >>> import numpy as np
    >>> from orchvlm import demo
    >>> v = demo.draw("video_seconds", 10_000, np.random.default_rng(0))
    >>> bool(105 < np.median(v) < 125)
    True
    """
    if name not in QUANTILES:
        raise ValueError(f"unknown distribution {name!r}; known: {', '.join(sorted(QUANTILES))}")
    n = _count("draw", "n", n, least=0, most=_MOST_VALUES)
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng must be a numpy.random.Generator; got {type(rng).__name__}")
    share, value = np.array(QUANTILES[name], dtype=float).T
    return np.exp(np.interp(rng.random(n), share, np.log(value)))


def wikipedia_lengths(n, seed=0, longest=192 * 1024):
    """Sequence lengths like those of FlexSP's Wikipedia experiments.

    Parameters
    ----------
    n : int
        How many sequences.
    seed : int
        Same seed, same lengths.
    longest : int
        Context length in tokens; longer articles are dropped and redrawn, as FlexSP drops them.

    Returns
    -------
    int64[n]
        Tokens per sequence, >= 1.

    Raises
    ------
    TypeError
        An argument that is no integer.
    ValueError
        ``longest`` below 39 tokens, the first percentile: hardly anything would be left; ``n``
        outside of [0, 2^26]; a negative ``seed``.

    References
    ----------
    FlexSP (arXiv 2412.01523), section 2.9 of the evaluation: the list published with its code.

    Examples
    --------
    >>> import numpy as np, orchvlm
    >>> s = orchvlm.demo.wikipedia_lengths(20_000, seed=1)
    >>> bool(320 < np.median(s) < 375), bool((s <= 8192).mean() > .96)
    (True, True)
    """
    n = _count("wikipedia_lengths", "n", n, least=0, most=_MOST_VALUES)
    longest = _count("wikipedia_lengths", "longest", longest, least=39)
    rng = np.random.default_rng(_count("wikipedia_lengths", "seed", seed, least=0, most=2**64 - 1))
    kept = np.zeros(0, np.int64)
    while len(kept) < n:
        drawn = draw("wikipedia_tokens", n, rng).astype(np.int64)
        kept = np.concatenate([kept, drawn[drawn <= longest]])
    return kept[:n]


class _Collector:
    """Items of one encoder phase while a batch is being drawn."""

    COLUMNS = ("sample", "position", "length", "out_tokens", "bytes", "squares")

    def __init__(self):
        self.rows = []

    def add(self, *row):
        self.rows.append(row)

    def items(self, out_bytes_per_token):
        from .batch import Items
        table = np.array(self.rows, float).reshape(len(self.rows), len(self.COLUMNS))
        whole = table[:, :-1].astype(np.int64)  # all far below 2^53, so exact
        return Items(**dict(zip(self.COLUMNS, whole.T)), squares=table[:, -1],
                     out_bytes_per_token=out_bytes_per_token)


def _add_picture(vision, sample, position, frames, tokens):
    """A picture or a clip: attention stays inside each frame, so squares add up per frame."""
    patches = tokens * PATCHES_PER_TOKEN
    vision.add(sample, position, frames * patches, frames * tokens,
               frames * patches * PATCH_PIXELS * 3, frames * float(patches)**2)
    return position + frames * tokens


def _add_sound(audio, sample, position, seconds):
    frames = min(seconds, SOUND_SECONDS) * AUDIO_FRAMES_PER_SECOND
    tokens = max(1, int(frames / AUDIO_FRAMES_PER_TOKEN))
    frames = tokens * AUDIO_FRAMES_PER_TOKEN
    whole, rest = divmod(frames, AUDIO_WINDOW_FRAMES)
    audio.add(sample, position, frames, tokens, frames * 128 * 2,
              whole * float(AUDIO_WINDOW_FRAMES)**2 + float(rest)**2)
    return position + tokens


def _between(value, low, high):
    return int(min(max(value, low), high))


def _image_tokens(pixels):
    return _between(math.ceil(pixels / (PATCH_PIXELS * PATCHES_PER_TOKEN)), 1, IMAGE_TOKENS)


def _text_tokens(chars):
    return _between(chars / CHARS_PER_TOKEN, 1, LONGEST_TEXT)


def _add_sample(kind, sample, vision, audio, pools):
    """Lays one sample out, media first; returns its text tokens."""
    def take(name):
        return next(pools[name])

    if kind == "caption":
        _add_picture(vision, sample, 0, 1, _image_tokens(take("photo_pixels")))
        return _text_tokens(take("caption_chars"))
    if kind == "document":
        position, text = 0, _text_tokens(take("page_chars"))
        for _ in range(min(1 + text // 500, PAGE_IMAGES)):
            position = _add_picture(vision, sample, position, 1,
                                    _image_tokens(take("screenshot_pixels")))
        return text
    if kind == "speech":
        name = "read_speech_seconds" if take("coin") < .5 else "conversation_seconds"
        seconds = take(name)
        _add_sound(audio, sample, 0, seconds)
        return _text_tokens(15 * seconds)  # about 15 characters are spoken per second
    if kind == "video":
        seconds = take("video_seconds")
        position, frames = 0, _between(seconds, 1, VIDEO_FRAMES)
        while frames > 0:
            clip = min(frames, FRAMES_PER_CLIP)
            position = _add_picture(vision, sample, position, clip, FRAME_TOKENS)
            frames -= clip
        _add_sound(audio, sample, position, seconds)
        return _text_tokens(take("video_chars"))
    return _text_tokens(take("code_bytes"))


def _pool(name, rng):
    """An endless stream of values, drawn a thousand at a time."""
    while True:
        yield from (rng.random(1000) if name == "coin" else draw(name, 1000, rng)).tolist()


def _input_bytes(phase, config):
    """What one token leaves behind when only the inputs of the layers are kept."""
    if phase == "vision":
        vision = _Fields(config.get("vision_config"), "vision_config")
        return 2.0 * vision("hidden_size") * vision("num_hidden_layers")
    if phase == "audio":  # two frames become one position
        audio = _Fields(config.get("audio_config"), "audio_config")
        return 2.0 * audio("d_model") * audio("encoder_layers") / 2
    text = _Fields(config, "config")
    return 2.0 * text("hidden_size") * text("num_hidden_layers")


def recomputed(model, config):
    """A model that keeps only each layer's input and computes forward twice.

    Parameters
    ----------
    model : ModelCosts
        Of :func:`orchvlm.from_model`, with ``BatchCost`` throughout.
    config : dict
        The configuration it was made from.

    Returns
    -------
    ModelCosts
        Seconds of four passes in place of three, memory of one input per layer; useful FLOPs as
        before.

    Raises
    ------
    TypeError
        Arguments that are not a ``ModelCosts`` and a mapping, a cost of another kind, or a part
        or field of ``config`` that is missing or of another type.
    ValueError
        ``config`` lacks a field, or it is not positive.

    Examples
    --------
    >>> import orchvlm
    >>> from orchvlm import demo
    >>> model = orchvlm.from_model(demo.MODEL_84B, orchvlm.Cluster.preset("h100", nodes=320))
    >>> slow = demo.recomputed(model, demo.MODEL_84B)
    >>> round(slow.costs["llm"].linear / model.costs["llm"].linear, 3)
    1.333
    """
    if not isinstance(model, ModelCosts) or not isinstance(config, Mapping):
        raise TypeError("model must be what from_model returns, and config its mapping; got "
                        f"{type(model).__name__} and {type(config).__name__}")
    if not all(isinstance(cost, BatchCost) for cost in model.costs.values()):
        raise TypeError("model must have a BatchCost for every phase")
    costs = {phase: dataclasses.replace(
        cost, **{name: getattr(cost, name) * 4 / 3
                 for name in ("linear", "quadratic", "padded_linear", "padded_quadratic")})
        for phase, cost in model.costs.items()}
    memory = {phase: (_input_bytes(phase, config), fixed)
              for phase, (_, fixed) in model.memory.items()}
    return model._replace(costs=costs, memory=memory)


def model_for(cluster, efficiency=0.5):
    """The larger of the two demo models that a cluster can hold, fully recomputed.

    Parameters
    ----------
    cluster : Cluster
        The machine.
    efficiency : float
        As for :func:`orchvlm.from_model`.

    Returns
    -------
    (str, dict, ModelCosts)
        Name, configuration, and what it costs.

    Raises
    ------
    ValueError
        Weights, gradients and optimizer states of neither fit into 80 % of the memory.

    Examples
    --------
    >>> import orchvlm
    >>> orchvlm.demo.model_for(orchvlm.Cluster.preset("h100", nodes=8))[0]
    '84B'
    """
    from .model_cost import from_model
    for name, config in (("84B", MODEL_84B), ("9B", MODEL_9B)):
        model = recomputed(from_model(config, cluster, efficiency=efficiency), config)
        if model.memory["llm"][1] <= 0.8 * cluster.memory_bytes:
            return name, config, model
    raise ValueError(f"the demo's models do not fit on {format_count(cluster.n_gpus, 'GPU')} of "
                     f"{format_bytes(cluster.memory_bytes)}; give more nodes")


def batch(n_ranks=64, samples_per_rank=8, seed=0, hidden=8192):
    """A global batch of three modalities, sampled at random: nobody has balanced it.

    Captions of photographs, pages with screenshots, speech, video with sound, and long text, in
    the shares of ``MIXTURE``.  Vision lengths are in patches of 14 x 14 pixels, audio lengths in
    frames of 10 ms, text in tokens.

    Parameters
    ----------
    n_ranks : int
        N, ranks that sample.
    samples_per_rank : int
        Samples that each rank draws.
    seed : int
        Same seed, same batch.
    hidden : int
        Width of the language model: encoder outputs are ``2 * hidden`` bytes per token (bf16).

    Returns
    -------
    Batch
        With phases "vision" and "audio".

    Raises
    ------
    TypeError
        An argument that is no integer.
    ValueError
        A count below 1, a negative seed, or more than 2^22 samples in all.

    Notes
    -----
    Images are scaled down to 2,048 language tokens and text is cut at 8,192 tokens, as trainers
    do.  A video gives one frame per second, at most 64, in items of 16 frames that attend within
    each frame, and up to five minutes of sound, which attends inside windows of 30 seconds.

    Examples
    --------
    >>> import orchvlm
    >>> b = orchvlm.demo.batch(n_ranks=4, samples_per_rank=2, seed=3)
    >>> [int(r) for r in b.source_rank]
    [0, 0, 1, 1, 2, 2, 3, 3]
    """
    from .batch import Batch
    n_ranks = _count("batch", "n_ranks", n_ranks)
    samples_per_rank = _count("batch", "samples_per_rank", samples_per_rank)
    hidden = _count("batch", "hidden", hidden)
    n = n_ranks * samples_per_rank
    if n > _MOST_SAMPLES:
        raise ValueError(f"n_ranks = {n_ranks} times samples_per_rank = {samples_per_rank} are "
                         f"more than {_MOST_SAMPLES} samples; draw several batches")
    rng = np.random.default_rng(_count("batch", "seed", seed, least=0, most=2**64 - 1))
    # As a list: making a NumPy string out of an array's element can swallow a Ctrl-C.
    kinds = rng.choice(list(MIXTURE), size=n, p=list(MIXTURE.values())).tolist()
    pools = {name: _pool(name, rng) for name in ("coin", *QUANTILES)}
    vision, audio = _Collector(), _Collector()
    text = np.array([_add_sample(kind, i, vision, audio, pools)
                     for i, kind in enumerate(kinds)], np.int64)
    return Batch(text_tokens=text, target_tokens=text,
                 source_rank=np.repeat(np.arange(n_ranks), samples_per_rank),
                 phases={"vision": vision.items(2 * hidden), "audio": audio.items(2 * hidden)})
