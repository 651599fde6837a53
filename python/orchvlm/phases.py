"""A model's phases one by one: images to features, features and tokens to hidden states, and the
backwards, with what lies between in the caller's hands."""
import numpy as np

from ._numbers import finite_number
from .batch import integers
from .inputs import Inputs, floats
from .weights import Weights

_CHECKPOINTS = {"none": 0, "selective": 1, "full": 2}


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
        """Hidden states, features or their gradients as the core takes them."""
        dtype = np.float64 if self.dtype == "float64" else np.float32
        return None if value is None else floats(value, name, shape, dtype)

    def _width(self):
        return self.config.text["hidden_size"]

    def _deepstack(self):
        return len(self.config.vision.get("deepstack_visual_indexes") or ())

    # ------------------------------------------------------------ arguments

    def _check(self, inputs):
        if not isinstance(inputs, Inputs):
            raise TypeError(f"inputs must be orchvlm.Inputs; got {type(inputs).__name__}")
        if inputs.mel is not None and len(inputs.mel):
            raise ValueError(f"{self.config.family} has no audio encoder; got sounds")

    def _places(self, inputs, rows, what):
        """Feature row of each token, or -1; None without any feature."""
        spots = np.isin(inputs.input_ids, self.config.visual_tokens)
        if rows is None:
            if spots.any():
                raise ValueError(f"there are image tokens but no {what}")
            return None
        if spots.sum() != rows:
            raise ValueError(f"the {what} give {rows} features, but {spots.sum()} tokens wait for "
                             "one (image_token_id, video_token_id)")
        return np.where(spots, np.cumsum(spots) - 1, -1).astype(np.int32)

    def _arguments(self, inputs):
        """The core's first arguments: tokens, and images that it is to encode."""
        self._check(inputs)
        rows = None
        if inputs.grid_thw is not None and len(inputs.grid_thw):
            merge = self.config.vision["spatial_merge_size"]
            rows = int(np.prod(inputs.grid_thw, axis=1, dtype=np.int64).sum()) // merge ** 2
        return [inputs.input_ids, inputs.cu_seqlens, inputs.position_ids,
                self._places(inputs, rows, "images"), inputs.labels, inputs.weights,
                inputs.grid_thw, inputs.pixels]

    def _given(self, inputs, features, extra):
        """The same with features in the images' stead, and those."""
        self._check(inputs)
        features = self._exact(features, "features", (None, self._width()))
        rows = None if features is None else len(features)
        places = self._places(inputs, rows, "features")
        if extra is not None and (rows is None or not self._deepstack()):
            raise ValueError("extra belongs to the features of a model with DeepStack; give None")
        if extra is None and rows is not None and self._deepstack():
            raise ValueError("extra is missing: this model adds DeepStack's features, too")
        shape = (self._deepstack(), rows, self._width())
        extra = self._exact(_stacked(extra), "extra", shape)
        return [inputs.input_ids, inputs.cu_seqlens, inputs.position_ids, places, inputs.labels,
                inputs.weights, None, None], features, extra

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

    def encode(self, modality, inputs, grid_thw=None, *, training=True, checkpoint="none"):
        """The first phase alone: images and videos to features.

        Parameters
        ----------
        modality : {"vision"}
        inputs : Inputs, or uint8[patches, values] or float32[patches, values]
            Whose images are encoded; or their pixels, as ``Inputs.pixels``.
        grid_thw : int32[n, 3], optional
            With pixels: frames, rows and columns of each image, in patches.
        training : bool
            Whether :meth:`encode_backward` may follow.
        checkpoint : {"none", "selective", "full"}
            As in :meth:`Model.forward`.

        Returns
        -------
        features : float32[rows, C]
            One row per image token, image after image.
        extra : float32[layers, rows, C] or None
            What DeepStack adds after the decoder's first layers; None in models without it.

        Raises
        ------
        ValueError
            Another modality, no images, images that the model cannot take.
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
        if not isinstance(modality, str) or modality != "vision":
            raise ValueError(f"modality must be 'vision'; got {modality!r}")
        if not isinstance(inputs, Inputs):
            if grid_thw is None:
                raise TypeError("inputs must be orchvlm.Inputs, or pixels with grid_thw; got "
                                f"{type(inputs).__name__}")
            inputs = Inputs(input_ids=np.zeros(0, np.int32), pixels=inputs, grid_thw=grid_thw)
        elif grid_thw is not None:
            raise ValueError("grid_thw belongs to pixels; Inputs have their own")
        if inputs.grid_thw is None or not len(inputs.grid_thw):
            raise ValueError("there are no images to encode")
        return self._core.encode(inputs.grid_thw, inputs.pixels, training,
                                 checkpoint_number(checkpoint), None)

    def encode_backward(self, dfeatures=None, dextra=None):
        """Adds the encoder's gradients, from those of what the last :meth:`encode` returned.

        Parameters
        ----------
        dfeatures : float32[rows, C], optional
        dextra : float32[layers, rows, C], optional
            As :meth:`Model.backward` returned them after :meth:`decode`; left out: zero.

        Raises
        ------
        ValueError
            No encode in training mode came before, or wrong shapes.
        """
        dfeatures = self._exact(dfeatures, "dfeatures", (None, self._width()))
        if dextra is not None and not self._deepstack():
            raise ValueError("dextra: this model has no DeepStack; give None")
        shape = (self._deepstack(), None, self._width())
        self._core.encode_backward(dfeatures, self._exact(_stacked(dextra), "dextra", shape))

    def decode(self, inputs, features=None, extra=None, *, router_counts=None, training=True,
               checkpoint="none"):
        """The second phase alone: tokens and features to hidden states.

        Parameters
        ----------
        inputs : Inputs
            Tokens and positions; images and labels are not used.
        features : float32[rows, C], optional
            One row for each image token, in their order; from :meth:`encode`, here or elsewhere.
        extra : float32[layers, rows, C], optional
            DeepStack's part, for models that have it.
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
        arguments, features, extra = self._given(inputs, features, extra)
        arguments[4] = arguments[5] = None
        counts, rows = self._router_counts(router_counts)
        self._core.forward(*arguments, -1.0, counts, rows, training, False,
                           checkpoint_number(checkpoint), features, extra, False, None, None)
        return self._core.hidden()


def _stacked(extra):
    """One array of what may be a list of one array per layer."""
    if isinstance(extra, (list, tuple)):
        arrays = [np.asarray(one) for one in extra]
        if len({one.shape for one in arrays}) > 1:
            raise ValueError("extra must hold arrays of one shape, one per layer")
        return np.stack(arrays) if arrays else np.zeros(0, np.float32)
    return extra
