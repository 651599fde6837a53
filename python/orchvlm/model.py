"""The vision-language model's passes: loss, gradients and generation, computed in C."""
from dataclasses import dataclass

import numpy as np

from .batch import integers
from .inputs import Inputs, floats
from .optim import finite_number
from .sounds import sound_tokens
from .weights import Weights

_CHECKPOINTS = {"none": 0, "selective": 1, "full": 2}


@dataclass(frozen=True)
class Output:
    """What a forward found.

    Parameters
    ----------
    loss : float
        Weighted sum of the tokens' cross-entropy over the normalizer, with the routers' balance
        loss times its coefficient.
    n_target_tokens : int
        Labels that count.
    aux_loss : float
        The balance loss without its coefficient; the number of experts per token when balanced.
    router_counts : int64[E] or None
        Routed slots per expert, over all layers and tokens.
    weight_sum : float
        Sum of this call's label weights.

    Attributes
    ----------
    loss, n_target_tokens, aux_loss, router_counts, weight_sum
        As above.

    Examples
    --------
    >>> import orchvlm
    >>> model = orchvlm.Model.from_config(orchvlm.preset("tiny-moe"), seed=0)
    >>> inputs = orchvlm.Inputs(input_ids=[72, 105, 33], labels=[72, 105, 33])
    >>> out = model.forward(inputs)
    >>> out.n_target_tokens, out.weight_sum, int(out.router_counts.sum())
    (2, 2.0, 24)
    """

    loss: float
    n_target_tokens: int
    aux_loss: float
    router_counts: np.ndarray
    weight_sum: float


class Model(Weights):
    """A native-resolution vision encoder, where the family has one an audio encoder, and a
    (mixture-of-experts) decoder.

    Made by :meth:`from_config` or :meth:`from_pretrained`.

    Attributes
    ----------
    config : ModelConfig
    parameters, grads : mapping
        Arrays by their names on the hub.  On the CPU in float32 they are views: writing into them
        changes the model.  bfloat16 comes as a float32 copy.
    device, dtype : str

    Notes
    -----
    One call at a time: a second thread gets RuntimeError.  Ctrl-C stops between layers; weights
    and optimizer stay as they were, what the forward kept is gone.

    Examples
    --------
    >>> import orchvlm
    >>> model = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=0)
    >>> inputs = orchvlm.Inputs(input_ids=[72, 105, 33], labels=[72, 105, 33])
    >>> out = model.forward(inputs)
    >>> out.n_target_tokens
    2
    >>> model.backward()
    >>> model.grads["model.language_model.norm.weight"].shape
    (192,)

    A family with an audio encoder takes sounds as others take pictures:

    >>> import numpy as np
    >>> hears = orchvlm.Model.from_config(orchvlm.preset("tiny-omni"), seed=0)
    >>> processor = orchvlm.data.Processor.from_config(hears.config.values)
    >>> tone = (np.sin(np.arange(8000) * 0.2), 16000)
    >>> inputs = processor({"messages": [
    ...     {"role": "user", "content": [{"type": "audio", "audio": tone},
    ...                                  {"type": "text", "text": "What is it?"}]},
    ...     {"role": "assistant", "content": "A tone"}]})
    >>> inputs
    <Inputs: 1 sample, 47 tokens, 7 targets, 1 sound of 50 frames>
    >>> hears.forward(inputs).n_target_tokens
    7
    """

    def _arguments(self, inputs):
        if not isinstance(inputs, Inputs):
            raise TypeError(f"inputs must be orchvlm.Inputs; got {type(inputs).__name__}")
        return [inputs.input_ids, inputs.cu_seqlens, inputs.position_ids,
                self._feature_rows(inputs), inputs.labels, inputs.weights, inputs.grid_thw,
                inputs.pixels, inputs.mel_lengths, inputs.mel]

    def _feature_rows(self, inputs):
        """int32[T]: the feature that stands at each token, or -1; those of sounds follow those of
        images.  None without any."""
        seen = heard = 0
        if inputs.grid_thw is not None:
            merge = self.config.vision["spatial_merge_size"]
            seen = int(np.prod(inputs.grid_thw, axis=1, dtype=np.int64).sum()) // merge ** 2
        if inputs.mel is not None and len(inputs.mel):
            self._check_sounds(inputs)
            heard = int(sound_tokens(inputs.mel_lengths).sum())
        rows = np.full(inputs.n_tokens, -1, np.int32)
        for word, keys, tokens, first, count in (
                ("image", "image_token_id, video_token_id", self.config.visual_tokens, 0, seen),
                ("sound", "audio_token_id", self.config.sound_tokens, seen, heard)):
            spots = np.isin(inputs.input_ids, tokens)
            if count == 0 and spots.any():
                raise ValueError(f"there are {word} tokens but no {word}s")
            if spots.sum() != count:
                raise ValueError(f"the {word}s give {count} features, but {spots.sum()} tokens "
                                 f"wait for one ({keys})")
            rows[spots] = np.arange(first, first + count)
        return rows if seen + heard else None

    def _check_sounds(self, inputs):
        if not self.config.audible:
            raise ValueError(f"{self.config.family} has no audio encoder; got sounds")
        bins = self.config.audio["num_mel_bins"]
        if inputs.mel.shape[1] != bins:
            raise ValueError(f"mel has {inputs.mel.shape[1]} bins; the model's num_mel_bins is "
                             f"{bins}")

    def forward(self, inputs, normalizer=None, router_counts=None, *, training=True,
                checkpoint="none"):
        """Loss of a packed batch.

        The loss is sum(weight * cross-entropy) / normalizer, so that the gradients of several
        calls with one normalizer add up to those of the whole batch, however it was cut.

        Parameters
        ----------
        inputs : Inputs
        normalizer : float, optional
            What the sum is divided by: the weight sum of the global batch.  By default this
            call's own.
        router_counts : (int64[E], int), optional
            Routed slots of the whole global batch and the rows (layers x tokens) they were
            counted over, for a balance loss that does not depend on how the batch was cut.
        training : bool
            Whether a backward may follow.
        checkpoint : {"none", "selective", "full"}
            What is computed again in the backward to save memory; gradients are the same.

        Returns
        -------
        Output

        Raises
        ------
        ValueError
            Tokens outside the vocabulary, images or sounds that do not fit their tokens, ...
        RuntimeError
            The model is busy.
        """
        logp = self._forward(inputs, normalizer, router_counts, training, checkpoint, False)
        return self._output(inputs, *logp[:4])

    def _forward(self, inputs, normalizer, router_counts, training, checkpoint, entropy,
                 per_token=False):
        if not isinstance(checkpoint, str) or checkpoint not in _CHECKPOINTS:
            raise ValueError(f"checkpoint must be one of {', '.join(_CHECKPOINTS)}; got "
                             f"{checkpoint!r}")
        if normalizer is not None:
            normalizer = finite_number(normalizer, "normalizer", 0)
        counts, rows = self._router_counts(router_counts)
        self._core.forward(*self._arguments(inputs), -1.0 if normalizer is None else
                           normalizer, counts, rows, training, entropy, _CHECKPOINTS[checkpoint])
        return self._core.output(per_token, entropy)

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

    def _output(self, inputs, loss, aux, weight_sum, targets):
        counts = self._core.router_counts() if self.config.sparse else None
        return Output(loss, targets, aux, counts, weight_sum)

    def backward(self, dlogprobs=None, dentropy=None):
        """Adds the gradients of the last forward's loss, or of a loss of your own.

        Parameters
        ----------
        dlogprobs, dentropy : float32[T], optional
            Slopes of any loss of what :meth:`logprobs` returned.

        Raises
        ------
        ValueError
            No forward in training mode came before, or wrong lengths.
        """
        slopes = []
        for name, value in (("dlogprobs", dlogprobs), ("dentropy", dentropy)):
            if value is not None:
                value = floats(value, name, (None,))
            slopes.append(value)
        self._core.backward(*slopes)

    def logprobs(self, inputs, entropy=False, *, training=True, checkpoint="none"):
        """Log-probability of every label, and the entropy where it was predicted.

        Parameters
        ----------
        inputs : Inputs
        entropy : bool
        training : bool
            As in :meth:`forward`.
        checkpoint : {"none", "selective", "full"}

        Returns
        -------
        logp : float32[T]
            0 where the label is -100 or the first of a sample.
        entropy : float32[T] or None
            In nats, of the prediction of every token but the first of a sample.
        """
        out = self._forward(inputs, None, None, training, checkpoint, entropy, per_token=True)
        return out[4], out[5]

    def logits(self, rows):
        """Logits of some rows of the last forward.

        Parameters
        ----------
        rows : int[n]
            Tokens; row t predicts token t + 1.

        Returns
        -------
        float32[n, V]

        Raises
        ------
        ValueError
            A row that is no token, or no forward came before.
        """
        return self._core.logits(integers(rows, "rows").clip(-1, 2**31 - 1).astype(np.int32))

    def zero_grad(self):
        """Sets all gradients to 0."""
        self._core.zero_grad()

    def memory(self):
        """Bytes held now.

        Returns
        -------
        dict
            ``weights``, ``training`` (gradients and moments), ``activations``, ``workspace`` and
            ``cache`` (keys and values).
        """
        names = ("weights", "training", "activations", "workspace", "cache")
        return dict(zip(names, self._core.memory()))

    def generate(self, inputs, max_new_tokens=64, *, temperature=0.0, top_k=None, top_p=None,
                 seed=0, stop=(), callback=None):
        """Continues every sample of a packed batch.

        Parameters
        ----------
        inputs : Inputs
            Prompts; labels are not used.
        max_new_tokens : int
        temperature : float
            0 takes the likeliest token.
        top_k : int, optional
            Draws among the k likeliest only.
        top_p : float, optional
            Draws among the fewest that together have this probability.
        seed : int
            Sample b draws from a stream of its own, (seed, b), whatever else is in the batch.
        stop : iterable of int
            Tokens that end a sample; they are not returned.
        callback : callable, optional
            ``callback(sample, token)`` for every new token.

        Returns
        -------
        list of list of int
            New tokens of each sample.

        Raises
        ------
        ValueError
            A setting out of range, an empty prompt.
        """
        from .generation import generate
        return generate(self, inputs, max_new_tokens, temperature=temperature, top_k=top_k,
                        top_p=top_p, seed=seed, stop=stop, callback=callback)

    def __repr__(self):
        return (f"<Model {self.config.family}: {self.n_parameters / 1e6:,.1f}M parameters, "
                f"{self.dtype} on {self.device}>")
