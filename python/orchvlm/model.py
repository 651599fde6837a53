"""The vision-language model's passes: loss, gradients and generation, computed in C."""
from dataclasses import dataclass, field

import numpy as np

from . import arenas
from ._numbers import finite_number, whole_number
from .batch import integers
from .flops import flops_of
from .inputs import floats
from .phases import Phases, checkpoint_number, rows32
from .sequence_parallel import TokenShard


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
    hidden_states : dict of int to float32[T, C]
        The decoder's, for each entry of ``taps``.
    vision_states : dict of int to float32[patches, C]
        The vision tower's, for each entry of ``vision_taps``.

    Attributes
    ----------
    loss, n_target_tokens, aux_loss, router_counts, weight_sum, hidden_states, vision_states
        As above.

    Notes
    -----
    :meth:`Model.forward` waits for its pass and reads all of this: fields are plain numbers that no
    later call changes.  On the CPU, where an operation is done when it was called, nothing is lost
    by that.  In the core a forward ends when its work is on the queue, behind the pass before, the
    figures stay on the device, and reading them waits.

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
    hidden_states: dict = field(default_factory=dict)
    vision_states: dict = field(default_factory=dict)


class Model(Phases):
    """A native-resolution vision encoder, where the family has one an audio encoder, and a
    (mixture-of-experts) decoder.

    Made by :meth:`from_config` or :meth:`from_pretrained`.

    Attributes
    ----------
    config : ModelConfig
    parameters, grads : mapping
        Arrays by their names on the hub.  On the CPU in float32 they are views: writing into them
        changes the model.  bfloat16 comes as a float32 copy that cannot be written; :meth:`tensor`
        gives it as it is.
    device, dtype : str
    threads : int

    Notes
    -----
    A forward is two phases, :meth:`encode` and :meth:`decode`, which can be run one by one: each
    keeps what its backward needs until it is run again, whatever the other does meanwhile.

    Nothing to do is work like any other: inputs without tokens, with arrays of no images or of no
    sounds, give a loss of 0 and empty rows and add nothing to gradients.

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
    <Inputs: 1 sample, 19 tokens, 3 targets, 1 sound of 50 frames>
    >>> hears.forward(inputs).n_target_tokens
    3
    """

    def forward(self, inputs, normalizer=None, router_counts=None, *, training=True,
                checkpoint="none", taps=(), vision_taps=(), features=None, extra=None,
                sounds=None):
        """Loss of a packed batch.

        The loss is sum(weight * cross-entropy) / normalizer, so that the gradients of several
        calls with one normalizer add up to those of the whole batch, however it was cut.

        Parameters
        ----------
        inputs : Inputs or TokenShard
            A shard: this rank's part of the tokens of a group of ranks, all of which call it; the
            loss is that of the labels which the part predicts, and those of all ranks add up.
        normalizer : float, optional
            What the sum is divided by: the weight sum of the global batch.  By default this
            call's own, which a shard does not have.
        router_counts : (int64[E], float), optional
            Routed slots of the whole global batch and the rows (layers x tokens) they were
            counted over, for a balance loss that does not depend on how the batch was cut;
            :meth:`route` finds them.
        training : bool
            Whether a backward may follow.
        checkpoint : {"none", "selective", "full"}
            What is computed again in the backward to save memory; gradients are the same.
        taps : iterable of int
            Hidden states to return, numbered as ``output_hidden_states`` of ``transformers`` does:
            0 is what the first layer reads, i what layer i - 1 gives (before DeepStack adds to
            it), and the last, the number of layers, the hidden states after the last norm.
        vision_taps : iterable of int
            The same of the vision tower, whose last entry is what its last block gives.
        features : float32[rows, C], optional
            In the stead of the inputs' images, which are then not encoded; from :meth:`encode`,
            here or elsewhere.  :meth:`backward` returns their gradients.
        extra : float32[layers, rows, C], optional
            DeepStack's part of them.
        sounds : float32[rows, C], optional
            As features, in the stead of the inputs' sounds.

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
        taps = {"hidden_states": np.unique(rows32(taps, "taps")),
                "vision_states": np.unique(rows32(vision_taps, "vision_taps"))}
        self._run(inputs, features, extra, sounds, normalizer=normalizer,
                  router_counts=router_counts, training=training, checkpoint=checkpoint,
                  own_loss=True, taps=list(taps.values()))
        loss, aux, weight_sum, targets = self._core.output(False, False)[:4]
        counts = self._core.router_counts() if self.config.sparse else None
        states = {name: {int(entry): self._core.tap(name == "vision_states", i)
                         for i, entry in enumerate(entries)} for name, entries in taps.items()}
        return Output(loss, targets, aux, counts, weight_sum, **states)

    def route(self, inputs, *, features=None, extra=None, sounds=None):
        """Where the routers send a packed batch: a forward without a head, nothing kept.

        Parameters
        ----------
        inputs : Inputs or TokenShard
            Labels are not used.
        features, extra, sounds : float32[rows, C], optional
            As in :meth:`forward`.

        Returns
        -------
        counts : int64[E]
            Routed slots per expert, over all layers and tokens; those of several calls add up.
        rows : int
            Layers x tokens: with the counts what :meth:`forward` takes as ``router_counts``.

        Raises
        ------
        ValueError
            The model has no experts, or as in :meth:`forward`.

        Examples
        --------
        >>> import orchvlm
        >>> model = orchvlm.Model.from_config(orchvlm.preset("tiny-moe"), seed=0)
        >>> counts, rows = model.route(orchvlm.Inputs(input_ids=[72, 105, 33]))
        >>> int(counts.sum()), rows  # two experts for each of 3 tokens in 4 layers
        (24, 12)
        """
        if not self.config.sparse:
            raise ValueError("route: this model has no experts")
        self._run(inputs, features, extra, sounds, labels=False, training=False)
        counts = self._core.router_counts()
        return counts, int(counts.sum()) // self.config.text["num_experts_per_tok"]

    def layer_counts(self):
        """Routed slots of the last forward by layer.

        Returns
        -------
        int64[n, E]
            Of the n layers with experts, the lowest first; what :meth:`correct_routers` takes.

        Raises
        ------
        ValueError
            The model has no experts.
        """
        if not self.config.sparse:
            raise ValueError("layer_counts: this model has no experts")
        return self._core.router_layers()

    def correct_routers(self, counts, rate):
        """Balances sigmoid routers without a loss: corrections move against the counts.

        Adds ``rate`` to ``e_score_correction_bias`` of an expert that got fewer slots than the mean
        of its layer, and takes it away where the expert got more.

        Parameters
        ----------
        counts : int64[n, E]
            Of a whole global batch: the sum of :meth:`layer_counts`.
        rate : float

        Raises
        ------
        ValueError
            Routers without corrections, wrong shape, negative counts.

        References
        ----------
        Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", 2024,
        algorithm 1.
        """
        if self.config.text.get("scoring_func") != "sigmoid" or not self.config.sparse:
            raise ValueError("correct_routers: no corrections; only sigmoid routers have them")
        rate = finite_number(rate, "rate", 0)
        shape = self._core.router_layers().shape
        if np.shape(counts) != shape:
            raise ValueError(f"counts must have the shape {shape}; got {np.shape(counts)}")
        counts = integers(np.reshape(counts, -1), "counts").reshape(shape)
        if counts.size and not 0 <= counts.min() <= counts.max() < 2**40:
            raise ValueError("counts must be in [0, 2^40)")
        self._core.router_correct(np.ascontiguousarray(counts, np.int64), rate)

    def backward(self, dlogprobs=None, dentropy=None, *, dhidden=None, dlogits=None, rows=None):
        """Adds the gradients of the last forward's loss, or of a loss of your own.

        A loss of your own may read all of these; its slopes add up.  Without any, it is the
        forward's.  The routers' balance loss, times its coefficient, is part of either.

        Parameters
        ----------
        dlogprobs, dentropy : float32[T], optional
            Slopes of any loss of what :meth:`logprobs` returned.
        dhidden : float32[T, C], optional
            Slopes of a loss of the hidden states after the last norm: what :meth:`decode` returns
            and the last of :meth:`forward`'s ``taps``.
        dlogits : float32[n, V], optional
            Slopes of a loss of what :meth:`logits` returned for these rows.
        rows : int[n], optional
            Of ``dlogits``; a row that is named twice counts twice.

        Returns
        -------
        None, or (float32[rows, C], float32[layers, rows, C] or None)
            Where features were given, in :meth:`decode` or :meth:`forward`: their gradients and
            those of DeepStack's part, for :meth:`encode_backward`.  Of a model that hears, those of
            given sounds are third; None stands for what was not given.

        Raises
        ------
        ValueError
            No forward in training mode came before, wrong shapes, slopes of what the last call
            did not compute.
        """
        slopes = []
        for name, value in (("dlogprobs", dlogprobs), ("dentropy", dentropy)):
            if value is not None:
                value = floats(value, name, (None,))
            slopes.append(value)
        slopes.append(self._exact(dhidden, "dhidden", (None, self._width())))
        if (rows is None) != (dlogits is None):
            raise ValueError("dlogits and rows belong together; one is missing")
        if rows is not None:
            rows = rows32(rows, "rows")
            dlogits = floats(dlogits, "dlogits", (len(rows), self.config.text["vocab_size"]))
        return self._core.backward(*slopes, rows, dlogits)

    def logprobs(self, inputs, entropy=False, *, training=True, checkpoint="none"):
        """Log-probability of every label, and the entropy of its prediction.

        Parameters
        ----------
        inputs : Inputs or TokenShard
        entropy : bool
        training : bool
            As in :meth:`forward`.
        checkpoint : {"none", "selective", "full"}

        Returns
        -------
        logp : float32[T]
            0 where the label is -100 or the first of a sample.  Of a shard float32[T + 1], as its
            labels are: the last is of the token behind it, the first is 0.
        entropy : float32[T] or None
            In nats, of the prediction of the token; 0 where ``logp`` is 0 for want of a label.
        """
        self._run(inputs, normalizer=1.0 if isinstance(inputs, TokenShard) else None,
                  training=training, checkpoint=checkpoint, entropy=entropy)
        return self._core.output(True, entropy)[4:]

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
        return self._core.logits(rows32(rows, "rows"))

    def zero_grad(self):
        """Sets all gradients to 0; those that a :class:`Shard` keeps, too."""
        (self._core if self.shard is None else self.shard._core).zero_grad()

    def flops(self, inputs, training=True):
        """FLOPs of a call, of what is trained now.

        Parameters
        ----------
        inputs : Inputs
        training : bool
            Forward and backward: of a product three times the forward where its weights are
            trained, twice where something below them is, once where nothing is; adapters on top.

        Returns
        -------
        float
            Additions and multiplications count one each; see :func:`model_flops`.

        Raises
        ------
        TypeError
            No inputs.

        Examples
        --------
        >>> import orchvlm
        >>> model = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=0)
        >>> inputs = orchvlm.Inputs(input_ids=[72, 105, 33], labels=[72, 105, 33])
        >>> whole, forward = model.flops(inputs), model.flops(inputs, training=False)
        >>> whole / forward
        3.0
        >>> model.freeze("model.language_model.*")  # text alone: nothing is trained below it
        >>> model.flops(inputs) / forward
        1.0
        """
        inputs = self._inputs(inputs)
        return flops_of(self.config, inputs, training, self._core.parameters())

    @property
    def moe_chunk_rows(self):
        """Rows of routed experts that run at a time; None: all, T times k.

        Beyond the bound the sorted rows go through their experts in chunks of so many, in forwards
        and in backwards, where what a chunk kept is computed again: activations and workspace are
        bounded by the chunk, at the cost of one more forward of the experts.  Outputs and the
        gradients of activations are the same to the last bit; gradients of the experts' weights
        are sums over chunks, equal up to rounding.

        Where ranks share experts (:class:`Shard`), it bounds the rows that come to this rank at a
        time; None: 5/4 of the mean over these ranks.

        Raises
        ------
        ValueError
            It is set to what is no whole number of at least 1.

        Examples
        --------
        >>> import orchvlm
        >>> model = orchvlm.Model.from_config(orchvlm.preset("tiny-moe"), seed=0)
        >>> inputs = orchvlm.Inputs(input_ids=[72] * 500, labels=[72] * 500)
        >>> whole = model.memory(inputs)
        >>> model.moe_chunk_rows = 128
        >>> model.memory(inputs)["activations"] < whole["activations"]
        True
        >>> loss = model.forward(inputs).loss
        >>> model.moe_chunk_rows = None
        >>> model.forward(inputs).loss == loss
        True
        """
        return self._moe_chunk_rows

    @moe_chunk_rows.setter
    def moe_chunk_rows(self, rows):
        if rows is not None:
            rows = whole_number(rows, "moe_chunk_rows", 1)
        self._core.expert_rows(rows or 0)
        self._moe_chunk_rows = rows

    def memory(self, inputs=None, *, training=True, checkpoint="none", max_new_tokens=0):
        """Bytes held by arena, now or after a batch that is yet to run.

        Parameters
        ----------
        inputs : Inputs, optional
            Whose forward, backward and optimizer step are to be foretold.  Nothing runs.
        training : bool
            Whether there are a backward and a step.
        checkpoint : {"none", "selective", "full"}
            As in :meth:`forward`.
        max_new_tokens : int
            Those of :meth:`generate` with these inputs; 0: it is not called.

        Returns
        -------
        dict
            ``weights``, ``training`` (gradients and moments), ``activations``, ``workspace`` and
            ``cache`` (keys and values).  Arenas grow when they must and never shrink.

        Raises
        ------
        TypeError
            No inputs.
        ValueError
            Another checkpoint, a negative number of tokens.

        Notes
        -----
        What is foretold is of the CPU, of a forward with labels and its own loss, and within a few
        per cent of what is then held; where ranks share experts, with as many tokens on each.

        Examples
        --------
        >>> import orchvlm
        >>> model = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=0)
        >>> inputs = orchvlm.Inputs(input_ids=[72] * 500, labels=[72] * 500)
        >>> before = model.memory(inputs, checkpoint="full")
        >>> _ = model.forward(inputs, checkpoint="full")
        >>> abs(before["activations"] / model.memory()["activations"] - 1) < 0.03
        True
        """
        names = ("weights", "training", "activations", "workspace", "cache")
        held = dict(zip(names, self._core.memory()))
        if inputs is None:
            return held
        inputs, rows = self._inputs(inputs), self._core.parameters()
        checkpoint_number(checkpoint)
        max_new_tokens = whole_number(max_new_tokens, "max_new_tokens", 0)
        coming = arenas.of_model(self.config, inputs, rows, self.dtype, training, checkpoint,
                                 self.moe_chunk_rows,
                                 1 if self.shard is None else self.shard.experts)
        if max_new_tokens and len(inputs):
            longest = int(inputs.lengths.max()) + max_new_tokens
            coming["cache"] = arenas.cache_bytes(self.config, len(inputs), longest, self.dtype)
        return {name: max(bytes_, coming.get(name, 0)) for name, bytes_ in held.items()}

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
        RuntimeError
            The model is busy, or generates already: in another thread, or what called ``callback``.
        """
        from .generation import generate
        return generate(self, inputs, max_new_tokens, temperature=temperature, top_k=top_k,
                        top_p=top_p, seed=seed, stop=stop, callback=callback)

    def __repr__(self):
        return (f"<Model {self.config.family}: {self.n_parameters / 1e6:,.1f}M parameters, "
                f"{self.dtype} on {self.device}>")

