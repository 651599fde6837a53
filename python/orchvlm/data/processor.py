"""Samples to :class:`orchvlm.Inputs`: text, pictures, videos and sounds of a model family."""
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .._files import write_whole
from ..inputs import IGNORED, Inputs
from .assets import Asset, DataError, as_asset, read_file
from .audio import audio_tokens, load_sound
from .chat import CHATML, Template, encode_bytes, encode_template, read_messages
from .encoded import encode
from .images import ImageRule, load_image
from .tokenizer import ByteTokenizer, HubTokenizer
from .video import VideoRule, open_video

FAMILIES = ("qwen3_vl", "qwen3_vl_moe", "seed1_5_vl", "qwen3_omni_moe")
_OF_VIDEOS = ("fps", "min_frames", "max_frames")
_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # as Pillow counts its filters
POSITIONS_PER_SECOND = 13  # of Qwen3-Omni's temporal axis, in its published files


@dataclass
class _Medium:
    """What a medium becomes: its rows, what marks it in the text, and its share of positions."""

    kind: str
    rows: np.ndarray
    size: object          # the grid of pictures, frames of a sound
    markup: list
    blocks: list          # (frames, rows, columns) in tokens of each run of placeholders
    seconds: float = 0.0  # of a group of frames
    encoded: bytes = None  # in place of rows


class Processor:
    """Turns samples into the inputs of a model.

    Parameters
    ----------
    tokenizer : ByteTokenizer or HubTokenizer, optional
        Bytes by default.
    family : str
        ``qwen3_vl``, ``qwen3_vl_moe``, ``seed1_5_vl`` or ``qwen3_omni_moe``.
    images : ImageRule, optional
        By default the family's.
    videos : VideoRule, optional
        By default the family's.
    mel_bins : int
        Mel filters of sounds.
    max_tokens : int, optional
        A sample with more is refused.

    Raises
    ------
    TypeError
        Rules of another kind.
    ValueError
        An unknown family.

    Notes
    -----
    Positions: text counts up on all three axes.  ``qwen3_vl``: every picture, and every group of
    frames of a video, starts at the next position s, has time s, height s + row and width s +
    column, and what follows starts at s + max(rows, columns).  ``qwen3_omni_moe``: the frames of a
    video share one start, time grows by 13 per second (``position_id_per_seconds``), and what
    follows starts at the greatest position plus one; sounds count as text does.  ``seed1_5_vl``:
    0, 1, 2, ... for all tokens, a choice, for the report does not state its scheme.

    Labels are the assistant's words and the token that ends its turn.

    Examples
    --------
    >>> import numpy as np, orchvlm
    >>> processor = orchvlm.data.Processor(family="seed1_5_vl")
    >>> picture = np.zeros((56, 84, 3), np.uint8)
    >>> sample = {"messages": [
    ...     {"role": "user", "content": [{"type": "image", "image": picture},
    ...                                  {"type": "text", "text": "What?"}]},
    ...     {"role": "assistant", "content": "Black"}]}
    >>> processor([sample])
    <Inputs: 1 sample, 22 tokens, 6 targets, 1 image of 24 patches>
    """

    def __init__(self, tokenizer=None, family="qwen3_vl", images=None, videos=None, mel_bins=128,
                 max_tokens=None):
        if not isinstance(family, str) or family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}; got {family!r:.40}")
        seed = family == "seed1_5_vl"
        self.tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
        self.family = family
        self.images = (ImageRule.seed() if seed else ImageRule()) if images is None else images
        self.videos = VideoRule("seed" if seed else "qwen") if videos is None else videos
        for name, kind in (("images", ImageRule), ("videos", VideoRule)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind.__name__}; got "
                                f"{type(getattr(self, name)).__name__}")
        if not hasattr(self.tokenizer, "encode") or not hasattr(self.tokenizer, "special"):
            raise TypeError("tokenizer must be a ByteTokenizer or HubTokenizer; got "
                            f"{type(tokenizer).__name__}")
        self.mel_bins, self.max_tokens = mel_bins, max_tokens
        self.positions_per_second = POSITIONS_PER_SECOND
        self._template = None
        if isinstance(self.tokenizer, HubTokenizer):
            self._template = Template(self.tokenizer.template or CHATML, self.tokenizer.variables)

    @classmethod
    def from_config(cls, config, tokenizer=None, **changes):
        """The processor that fits a model's configuration.

        Parameters
        ----------
        config : dict
            As ``config.json`` has it: ``model_type``, ``vision_config`` with ``patch_size``,
            ``spatial_merge_size`` and ``temporal_patch_size``, the ids of placeholder tokens.
        tokenizer : ByteTokenizer or HubTokenizer, optional
            By default bytes, and words where ``text_config`` has a ``vocab_size`` for them.
        **changes : int, str or object
            Fields of :class:`ImageRule`, such as ``min_pixels``, and parameters of
            :class:`Processor`.

        Returns
        -------
        Processor

        Raises
        ------
        TypeError
            A configuration that is no dict.
        ValueError
            A placeholder's id that is not the tokenizer's.
        """
        if not isinstance(config, dict):
            raise TypeError(f"config must be a dict; got {type(config).__name__}")
        own = {key: changes.pop(key) for key in ("images", "videos", "mel_bins", "max_tokens")
               if key in changes}
        config = {**config, **config.get("thinker_config", {})}
        vision = config.get("vision_config") or {}
        keys = {"patch_size": "patch_size", "spatial_merge_size": "merge_size",
                "temporal_patch_size": "temporal_size"}
        sizes = {name: vision[key] for key, name in keys.items() if key in vision}
        if bins := (config.get("audio_config") or {}).get("num_mel_bins"):
            own.setdefault("mel_bins", bins)
        family = str(config.get("model_type")).removesuffix("_thinker")
        if tokenizer is None:
            tokenizer = _built_in(config.get("text_config") or {})
        processor = cls(tokenizer, family, **own)
        if "images" not in own:
            processor.images = replace(processor.images, **sizes, **changes)
        elif changes:
            raise TypeError(f"{', '.join(changes)} come beside images; put them into it")
        processor.positions_per_second = config.get("position_id_per_seconds",
                                                    POSITIONS_PER_SECOND)
        processor.check_ids(config)
        return processor

    @classmethod
    def from_pretrained(cls, folder, **changes):
        """The processor of a Hugging Face folder.

        Parameters
        ----------
        folder : path
            Holds ``config.json``, and may hold ``preprocessor_config.json``,
            ``video_preprocessor_config.json`` and ``tokenizer.json``; without the last, tokens are
            bytes and words, as in :meth:`from_config`.
        **changes : int, str or object
            As for :meth:`from_config`.

        Returns
        -------
        Processor

        Raises
        ------
        DataError
            A file that is missing or broken.
        """
        folder = Path(folder)
        config = _read_json(folder / "config.json")
        rules = folder / "preprocessor_config.json"
        if rules.exists() and "images" not in changes:
            changes = {**_image_settings(_read_json(rules)), **changes}
        rules = folder / "video_preprocessor_config.json"
        if rules.exists() and config.get("model_type") != "seed1_5_vl":
            changes.setdefault("videos", _video_settings(_read_json(rules), rules))
        tokenizer = HubTokenizer(folder) if (folder / "tokenizer.json").exists() else None
        return cls.from_config(config, tokenizer, **changes)

    def files(self):
        """What :meth:`save_pretrained` writes.

        Returns
        -------
        dict of str to bytes
            Contents by name: ``preprocessor_config.json`` and, of Qwen's families,
            ``video_preprocessor_config.json`` as :meth:`from_pretrained` and ``transformers`` read
            them, and the tokenizer's, of one that came from files.
        """
        rule, video = self.images, self.videos
        stated = {"preprocessor_config.json": {
            "patch_size": rule.patch_size, "merge_size": rule.merge_size,
            "temporal_patch_size": rule.temporal_size, **_bounds(rule),
            "image_mean": list(rule.mean), "image_std": list(rule.std),
            "resample": _RESAMPLE[rule.resample]}}
        if video.style == "qwen":
            stated["video_preprocessor_config.json"] = {
                **_bounds(video), **{name: getattr(video, name) for name in _OF_VIDEOS}}
        return {**{name: (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
                   for name, values in stated.items()},
                **getattr(self.tokenizer, "files", {})}

    def save_pretrained(self, folder):
        """Writes what makes this processor, beside a model's ``config.json``.

        Parameters
        ----------
        folder : path
            Is made where it is missing.

        Raises
        ------
        OSError
            It cannot be written; no file is left half written.

        Examples
        --------
        >>> import tempfile, orchvlm
        >>> config = orchvlm.preset("tiny")
        >>> processor = orchvlm.data.Processor.from_config(config.values, max_pixels=56 * 56)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     orchvlm.Model.from_config(config, seed=0).save_pretrained(folder)
        ...     processor.save_pretrained(folder)
        ...     orchvlm.data.Processor.from_pretrained(folder).images == processor.images
        True
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            write_whole(folder / name, lambda stream, content=content: stream.write(content))

    def check_ids(self, config):
        """Raises where a model's placeholders are not the tokenizer's.

        Parameters
        ----------
        config : dict
            With ``image_token_id`` and so on; what is absent is not looked at.

        Raises
        ------
        ValueError
            One is another's.
        """
        for key, name in (("image_token_id", "<|image_pad|>"), ("video_token_id", "<|video_pad|>"),
                          ("audio_token_id", "<|audio_pad|>"),
                          ("vision_start_token_id", "<|vision_start|>"),
                          ("vision_end_token_id", "<|vision_end|>")):
            have, want = self.tokenizer.special.get(name), config.get(key)
            if have is not None and want is not None and have != want:
                raise ValueError(f"{key} is {want} in the configuration, and {name} is {have} in "
                                 "the tokenizer; they belong to different models")

    def __call__(self, samples, prompt=False):
        """Packs samples.

        Parameters
        ----------
        samples : sequence of dict, or dict
            See :func:`read_messages`.  ``weight`` scales the labels of a sample.
        prompt : bool
            For generation: a last turn of the assistant is left out and its opening is written.

        Returns
        -------
        Inputs

        Raises
        ------
        DataError
            A sample that cannot be used.
        """
        if isinstance(samples, dict):
            samples = [samples]
        return Inputs.concatenate([self.one(sample, prompt) for sample in samples])

    def one(self, sample, prompt=False, encoded=False):
        """One sample.

        Parameters
        ----------
        sample : dict
            See :func:`read_messages`.
        prompt : bool
            See :meth:`__call__`.
        encoded : bool
            Leaves JPEG, PNG and WebP files as they are, in ``Inputs.encoded``, where their headers
            tell how many patches they give.

        Returns
        -------
        Inputs

        Raises
        ------
        DataError
            A sample that cannot be used.
        """
        messages = read_messages(sample)
        if prompt and messages[-1].role == "assistant":
            messages.pop()
        media = [self._medium(*part, encoded) for message in messages for part in message.parts
                 if part[0] != "text"]
        markups = [medium.markup for medium in media]
        if self._template is None:
            ids, weights = encode_bytes(messages, self.tokenizer, markups, prompt)
        else:
            ids, weights = encode_template(messages, self.tokenizer, self._template, markups,
                                           prompt)
        if self.max_tokens is not None and len(ids) > self.max_tokens:
            raise DataError(f"sample {sample.get('id', '')!r:.60}: {len(ids)} tokens are more than "
                            f"max_tokens, {self.max_tokens}")
        return self._packed(np.array(ids, np.int32), np.array(weights, np.float32), media,
                            sample.get("weight"))

    def _packed(self, ids, weights, media, scale):
        if scale is not None:
            if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not (
                    0 <= scale < 1e9):
                raise DataError(f"sample: 'weight' must be a number >= 0; got {scale!r:.40}")
            weights = weights * np.float32(scale)
        fields = {"input_ids": ids, "labels": np.where(weights > 0, ids, IGNORED)}
        if (weights[weights > 0] != 1).any():
            fields["weights"] = weights
        fields["position_ids"] = self._positions(ids, media)
        seen = [medium for medium in media if medium.kind != "audio"]
        heard = [medium for medium in media if medium.kind == "audio"]
        if seen:
            fields["pixels"] = np.concatenate([medium.rows for medium in seen])
            fields["grid_thw"] = [medium.size for medium in seen]
            fields["encoded"] = [medium.encoded for medium in seen]
        if heard:
            fields["mel"] = np.concatenate([medium.rows for medium in heard])
            fields["mel_lengths"] = [medium.size for medium in heard]
        return Inputs(**fields)

    def _medium(self, kind, source, options, encoded):
        source = as_asset(source, kind) or source
        try:
            if kind == "image":
                return self._image(source, encoded)
            return getattr(self, f"_{kind}")(source, options)
        except KeyError as error:
            raise DataError(f"the tokenizer has no token {error}, so {kind}s cannot be marked"
                            ) from None

    def _name(self, name):
        if name not in self.tokenizer.special:
            raise KeyError(name)
        return name

    def _image(self, source, encoded):
        name, item = getattr(source, "name", "image"), None
        if encoded and isinstance(source, Asset):
            source = source.read()
            item, grid = encode(source, name, self.images)
        if item is None:
            rows, grid = self.images(_loaded(load_image, source, name), name)
        else:
            rows = self.images.none()
        markup = [(self._name("<|vision_start|>"), 1),
                  (self._name("<|image_pad|>"), self.images.tokens(grid)),
                  (self._name("<|vision_end|>"), 1)]
        return _Medium("image", rows, grid, markup, [self._block(grid)], encoded=item)

    def _block(self, grid):
        merge = self.images.merge_size
        return grid[0], grid[1] // merge, grid[2] // merge

    def _video(self, source, options):
        # Frames without a rate are taken to have been sampled as they should be: all are used.
        fps = options.get("fps", self.videos.fps)
        video = open_video(source, options.get("sample_fps", fps))
        rows, grid, times = self.videos(video, self.images, fps)
        start, end = self._name("<|vision_start|>"), self._name("<|vision_end|>")
        pad = self._name("<|video_pad|>")
        if self.family == "qwen3_omni_moe":
            step = float(np.diff(times).mean()) if len(times) > 1 else 0.0
            return _Medium("video", rows, grid,
                           [(start, 1), (pad, self.images.tokens(grid)), (end, 1)],
                           [self._block(grid)], step)
        frame = (1, *grid[1:])
        markup = []
        for time in times:
            markup += [self.videos.stamp(time), (start, 1), (pad, self.images.tokens(frame)),
                       (end, 1)]
        return _Medium("video", rows, grid, markup, [self._block(frame)] * grid[0])

    def _audio(self, source, options):
        if self.family != "qwen3_omni_moe":
            raise DataError(f"{getattr(source, 'name', 'sound')}: {self.family} has no audio "
                            "encoder")
        mel = _loaded(load_sound, source, self.mel_bins)
        markup = [(self._name("<|audio_start|>"), 1),
                  (self._name("<|audio_pad|>"), audio_tokens(len(mel))),
                  (self._name("<|audio_end|>"), 1)]
        return _Medium("audio", mel, len(mel), markup, [])

    def _positions(self, ids, media):
        """float32[3, T] by the family's rule; see the class."""
        n = len(ids)
        seen = [medium for medium in media if medium.kind != "audio"]
        if self.family == "seed1_5_vl" or not seen:
            return np.broadcast_to(np.arange(n, dtype=np.float32), (3, n))
        omni = self.family == "qwen3_omni_moe"
        visual = np.isin(ids, [self.tokenizer.special[f"<|{kind}_pad|>"]
                               for kind in ("image", "video")])
        out = np.empty((3, n))
        place, start = 0, 0.0
        for medium in seen:
            for block in medium.blocks:
                first = place + int(visual[place:].argmax())
                out[:, place:first] = start + np.arange(first - place)
                start += first - place
                size = block[0] * block[1] * block[2]
                t, h, w = np.indices(block).reshape(3, -1)
                step = medium.seconds * self.positions_per_second if omni else 1.0
                out[:, first:first + size] = start + np.stack([t * step, h, w])
                start = (out[:, first:first + size].max() + 1 if omni
                         else start + max(block[1:]))
                place = first + size
        out[:, place:] = start + np.arange(n - place)
        return out.astype(np.float32)

    def __repr__(self):
        return (f"<Processor: {self.family}, patches of {self.images.patch_size}, "
                f"{self.tokenizer!r}>")


def _loaded(load, source, *options):
    """A medium; one of a kind that ``load`` does not take is the sample's fault."""
    try:
        return load(source, *options)
    except TypeError as error:
        raise DataError(str(error)) from None


def _built_in(text_config):
    """The tokenizer of a model that comes without one."""
    size = text_config.get("vocab_size")
    known = isinstance(size, int) and not isinstance(size, bool) and size >= 272
    return ByteTokenizer(size) if known else ByteTokenizer()


def _read_json(path):
    try:
        value = json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not JSON ({str(error)[:60]})") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: must hold an object; got {type(value).__name__}")
    return value


def _bounds(rule):
    return {"size": {"shortest_edge": rule.min_pixels, "longest_edge": rule.max_pixels}}


def _image_settings(rules):
    """Fields of :class:`ImageRule` from a ``preprocessor_config.json``."""
    size = rules.get("size") or {}
    found = {"min_pixels": size.get("shortest_edge", rules.get("min_pixels")),
             "max_pixels": size.get("longest_edge", rules.get("max_pixels")),
             "mean": rules.get("image_mean"), "std": rules.get("image_std"),
             "resample": {code: name for name, code in _RESAMPLE.items()}.get(
                 rules.get("resample"))}
    return {name: value for name, value in found.items() if value is not None}


def _video_settings(rules, path):
    """The :class:`VideoRule` of a ``video_preprocessor_config.json``."""
    size = rules.get("size") or {}
    found = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge"),
             **{name: rules.get(name) for name in _OF_VIDEOS}}
    try:
        return VideoRule("qwen", **{name: value for name, value in found.items()
                                    if value is not None})
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
