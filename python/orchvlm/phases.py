"""A model's phases one by one: images and sounds to features, features and tokens to hidden states,
and the backwards, with what lies between in the caller's hands."""
import numpy as np

from ._numbers import finite_number
from .batch import integers
from .inputs import Inputs, floats
from .sequence_parallel import TokenShard
from .sounds import sound_tokens
from .weights import Weights

_CHECKPOINTS = {"none": 0, "selective": 1, "full": 2}
_MODALITIES = {"vision": 0, "audio": 1}


def checkpoint_number(name):
    """The core's number of a checkpoint mode, or ValueError."""
    if not isinstance(name, str) or name not in _CHECKPOINTS:
        raise ValueError(f"checkpoint must be one of {', '.join(_CHECKPOINTS)}; got {name!r}")
    return _CHECKPOINTS[name]


def rows32(value, name):
    """Whole numbers as int32; what does not fit becomes one that the core refuses."""
    return integers(value, name).clip(-1, 2**31 - 1).astype(np.int32)


class Phases(Weights):
    """What :class:`orchvlm.Model` runs: its phases."""

    def _exact(self, value, name, shape):
        """Hidden states, features or their gradients as the core takes them; a step in which they
        overflow is one that the optimizer skips."""
        dtype = np.float64 if self.dtype == "float64" else np.float32
        return None if value is None else floats(value, name, shape, dtype, finite=False)

    def _width(self):
        return self.config.text["hidden_size"]

    def _deepstack(self):
        return len(self.config.vision.get("deepstack_visual_indexes") or ())

    # ------------------------------------------------------------ arguments

    def _places(self, inputs, images, sounds):
        """Feature row of each token, or -1; those of sounds follow those of images.  None without
        any feature.  ``images``, ``sounds``: (where they come from, rows or None)."""
        places, first = np.full(inputs.n_tokens, -1, np.int32), 0
        for word, keys, tokens, (source, rows) in (
                ("image", "image_token_id, video_token_id", self.config.visual_tokens, images),
                ("sound", "audio_token_id", self.config.sound_tokens, sounds)):
            spots = np.isin(inputs.input_ids, tokens)
            if rows is None and spots.any():
                raise ValueError(f"there are {word} tokens but no {source}")
            rows = rows or 0
            if spots.sum() != rows:
                raise ValueError(f"the {source} give {rows} features, but {spots.sum()} tokens "
                                 f"wait for one ({keys})")
            places[spots] = np.arange(first, first + rows)
            first += rows
        return None if images[1] is None and sounds[1] is None else places

    def _check_mel(self, inputs):
        bins = self.config.audio["num_mel_bins"]
        if inputs.mel.shape[1] != bins:
            raise ValueError(f"mel has {inputs.mel.shape[1]} bins; the model's num_mel_bins is "
                             f"{bins}")

    @staticmethod
    def _inputs(inputs):
        if not isinstance(inputs, Inputs):
            raise TypeError(f"inputs must be orchvlm.Inputs; got {type(inputs).__name__}")
        return inputs

    def _arguments(self, inputs, features=None, sounds=None, encode=True):
        """The core's first arguments: tokens, and the images and sounds that it is to encode: those
        for which no features are given.  An array of none is still something to encode."""
        if isinstance(inputs, TokenShard):
            return self._shard_arguments(inputs, features, sounds)
        inputs = self._inputs(inputs)
        heard = inputs.mel is not None and self.config.audible
        if inputs.mel is not None and len(inputs.mel) and not heard:
            raise ValueError(f"{self.config.family} has no audio encoder; got sounds")
        grid = pixels = lengths = mel = None
        images, voices = ("images" if encode else "features", None), ("sounds", None)
        if features is not None:
            images = "features", len(features)
        elif encode and inputs.grid_thw is not None:
            merge = self.config.vision["spatial_merge_size"]
            grid, pixels = inputs.grid_thw, _cut(inputs).pixels
            images = "images", int(np.prod(grid, axis=1, dtype=np.int64).sum()) // merge ** 2
        if sounds is not None:
            voices = "sounds", len(sounds)
        elif encode and heard:
            self._check_mel(inputs)
            lengths, mel = inputs.mel_lengths, inputs.mel
            voices = "sounds", int(sound_tokens(lengths).sum())
        return [inputs.input_ids, inputs.cu_seqlens, inputs.position_ids,
                self._places(inputs, images, voices), inputs.labels, inputs.weights,
                grid, pixels, lengths, mel]

    def _shard_arguments(self, shard, features, sounds):
        """The same of a shard, whose images and sounds come as features."""
        rows = [None if given is None else len(given) for given in (features, sounds)]
        places = self._places(shard, ("features", rows[0]), ("sounds", rows[1]))
        return [shard.input_ids, shard.cu_seqlens, shard.position_ids, places, shard.labels,
                shard.weights, *[None] * 4]

    def _given(self, features, extra, sounds):
        """Features as the core takes them."""
        features = self._exact(features, "features", (None, self._width()))
        if extra is not None and (features is None or not self._deepstack()):
            raise ValueError("extra belongs to the features of a model with DeepStack; give None")
        if extra is None and features is not None and self._deepstack():
            raise ValueError("extra is missing: this model adds DeepStack's features, too")
        if sounds is not None and not self.config.audible:
            raise ValueError(f"sounds: {self.config.family} has no audio encoder")
        rows = None if features is None else len(features)
        extra = self._exact(_stacked(extra), "extra", (self._deepstack(), rows, self._width()))
        return features, extra, self._exact(sounds, "sounds", (None, self._width()))

    def _run(self, inputs, features=None, extra=None, sounds=None, *, encode=True, labels=True,
             normalizer=None, router_counts=None, training=True, entropy=False,
             checkpoint="none", own_loss=False, taps=((), ())):
        """The core's forward."""
        checkpoint = checkpoint_number(checkpoint)
        if normalizer is not None:
            normalizer = finite_number(normalizer, "normalizer", 0)
        counts, rows = self._router_counts(router_counts)
        features, extra, sounds = self._given(features, extra, sounds)
        arguments = self._arguments(inputs, features, sounds, encode)
        if not labels:
            arguments[4] = arguments[5] = None
        group = inputs.group._core if isinstance(inputs, TokenShard) else None
        if group is not None and labels and normalizer is None:
            raise ValueError("normalizer is missing: of a shard the weights alone are not the "
                             "batch's")
        if len(taps[1]) and arguments[6] is None:
            raise ValueError("vision_taps: no images are encoded here")
        self._core.forward(*arguments, -1.0 if normalizer is None else normalizer, counts, rows,
                           training, entropy, checkpoint, features, extra, sounds, own_loss,
                           *(entries if len(entries) else None for entries in taps), group)

    def _router_counts(self, given):
        """(counts or None, rows) of the argument of forward."""
        if given is None:
            return None, 0.0
        if not self.config.sparse:
            raise ValueError("router_counts: this model has no experts")
        if not isinstance(given, tuple) or len(given) != 2:
            raise TypeError("router_counts must be a pair (counts per expert, rows); got "
                            f"{type(given).__name__}")
        counts = integers(given[0], "router_counts", self.config.text["num_experts"])
        rows = finite_number(given[1], "router_counts' rows", 1)
        return np.ascontiguousarray(counts, np.int64), rows

    # ------------------------------------------------------------ phases

    def encode(self, modality, inputs, sizes=None, *, training=True, checkpoint="none"):
        """The first phase alone: images and videos, or sounds, to features.

        Parameters
        ----------
        modality : {"vision", "audio"}
        inputs : Inputs, or uint8[patches, values] or float32[patches, values]
            Whose images or sounds are encoded; or their pixels, as ``Inputs.pixels``; of sounds
            their log-mel frames, as ``Inputs.mel``.  Arrays of none give features of no rows.
        sizes : int32[n, 3] or int32[n], optional
            With pixels ``grid_thw``: frames, rows and columns of each image, in patches.  With
            log-mel frames ``mel_lengths``: frames of each sound.
        training : bool
            Whether :meth:`encode_backward` may follow.
        checkpoint : {"none", "selective", "full"}
            As in :meth:`Model.forward`.

        Returns
        -------
        features : float32[rows, C]
            One row per image or audio token, one image or sound after the other.
        extra : float32[layers, rows, C] or None
            What DeepStack adds after the decoder's first layers; None in models without it, and of
            sounds.

        Raises
        ------
        ValueError
            Another modality, inputs without images or sounds, or with some that the model cannot
            take.
        RuntimeError
            The model is busy.

        Examples
        --------
        >>> import numpy as np, orchvlm
        >>> model = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=0)
        >>> pixels = np.zeros((16, 588), np.uint8)  # one image of 4 x 4 patches
        >>> features, extra = model.encode("vision", pixels, [[1, 4, 4]])
        >>> features.shape, extra is None
        ((4, 192), True)
        >>> image = model.config.visual_tokens[0]
        >>> hidden = model.decode(orchvlm.Inputs(input_ids=[72] + [image] * 4), features)
        >>> dfeatures, dextra = model.backward(dhidden=2 * hidden)  # of a loss, sum(hidden ** 2)
        >>> model.encode_backward(dfeatures, dextra)
        >>> bool(model.grads["model.visual.patch_embed.proj.weight"].any())
        True
        """
        number = self._modality(modality)
        inputs = _whole(modality, inputs, sizes)
        sizes, rows = (inputs.mel_lengths, inputs.mel) if modality == "audio" else (
            inputs.grid_thw, _cut(inputs).pixels)
        if sizes is None:
            raise ValueError(f"there are no {'sounds' if number else 'images'} to encode")
        if modality == "audio":
            self._check_mel(inputs)
        return self._core.encode(number, sizes, rows, training, checkpoint_number(checkpoint),
                                 None)

    def _modality(self, name):
        if not isinstance(name, str) or name not in _MODALITIES:
            raise ValueError(f"modality must be 'vision' or 'audio'; got {name!r}")
        if name == "audio" and not self.config.audible:
            raise ValueError(f"modality: {self.config.family} has no audio encoder")
        return _MODALITIES[name]

    def encode_backward(self, dfeatures=None, dextra=None, *, modality="vision"):
        """Adds the encoder's gradients, from those of what the last :meth:`encode` returned.

        Parameters
        ----------
        dfeatures : float32[rows, C], optional
        dextra : float32[layers, rows, C], optional
            As :meth:`Model.backward` returned them after :meth:`decode`; left out: zero.
        modality : {"vision", "audio"}
            Which encoder's.

        Raises
        ------
        ValueError
            No encode in training mode came before, or wrong shapes.
        """
        number = self._modality(modality)
        dfeatures = self._exact(dfeatures, "dfeatures", (None, self._width()))
        if dextra is not None and (modality == "audio" or not self._deepstack()):
            raise ValueError("dextra: there is no DeepStack here; give None")
        shape = (self._deepstack(), None, self._width())
        self._core.encode_backward(number, dfeatures,
                                   self._exact(_stacked(dextra), "dextra", shape))

    def decode(self, inputs, features=None, extra=None, sounds=None, *, router_counts=None,
               training=True, checkpoint="none"):
        """The second phase alone: tokens and features to hidden states.

        Parameters
        ----------
        inputs : Inputs
            Tokens and positions; images, sounds and labels are not used.
        features : float32[rows, C], optional
            One row for each image token, in their order; from :meth:`encode`, here or elsewhere.
        extra : float32[layers, rows, C], optional
            DeepStack's part, for models that have it.
        sounds : float32[rows, C], optional
            One row for each audio token, as features.
        router_counts : (int64[E], int), optional
            As in :meth:`Model.forward`.
        training : bool
            Whether :meth:`Model.backward` may follow, with ``dhidden`` or ``dlogits``.
        checkpoint : {"none", "selective", "full"}

        Returns
        -------
        float32[T, C]
            Hidden states after the last norm, what ``transformers`` calls last_hidden_state: the
            head's input.

        Raises
        ------
        ValueError
            More or fewer features than tokens that wait for one, wrong shapes, bad tokens.
        RuntimeError
            The model is busy.
        """
        self._run(inputs, features, extra, sounds, encode=False, labels=False,
                  router_counts=router_counts, training=training, checkpoint=checkpoint)
        return self._core.hidden()


def _cut(inputs):
    """The inputs, whose pictures must be patches by now."""
    if inputs.encoded is not None:
        raise ValueError("some pictures are still encoded; give inputs.decoded()")
    return inputs


def _whole(modality, inputs, sizes):
    """Inputs of what encode takes."""
    rows, names = ("mel", "mel_lengths") if modality == "audio" else ("pixels", "grid_thw")
    if isinstance(inputs, Inputs):
        if sizes is not None:
            raise ValueError(f"sizes belong to {rows}; Inputs have their own {names}")
        return inputs
    if sizes is None:
        raise TypeError(f"inputs must be orchvlm.Inputs, or {rows} with their {names}; got "
                        f"{type(inputs).__name__}")
    return Inputs(input_ids=np.zeros(0, np.int32), **{rows: inputs, names: sizes})


def _stacked(extra):
    """One array of what may be a list of one array per layer."""
    if isinstance(extra, (list, tuple)):
        arrays = [np.asarray(one) for one in extra]
        if len({one.shape for one in arrays}) > 1:
            raise ValueError("extra must hold arrays of one shape, one per layer")
        return np.stack(arrays) if arrays else np.zeros(0, np.float32)
    return extra
