"""A model's weights, gradients and optimizer state over the ranks of a communicator."""
from collections.abc import Mapping
from fnmatch import fnmatchcase

import numpy as np

from . import _core
from ._numbers import whole_number
from .configs import ModelConfig
from .weights import Weights

MODES = ("ddp", "zero1", "fsdp", "hybrid")
_WEIGHT, _GRAD = 0, 1


class Shard:
    """Keeps a model's weights, gradients and optimizer state over ranks.

    ==========  ===========  =============  =============  ======================================
    mode        weights      gradients      state          between ranks
    ==========  ===========  =============  =============  ======================================
    ``ddp``     all          all            all            gradients are summed
    ``zero1``   all          all            1/N            gradients are summed in shards; weights
                                                           are gathered after the step
    ``fsdp``    1/N          1/N            1/N            weights are gathered layer by layer, the
                                                           next one meanwhile; gradients are summed
                                                           in shards
    ``hybrid``  1/n          1/n            1/n            as ``fsdp`` inside a node of n ranks;
                                                           gradients are summed between nodes
    ==========  ===========  =============  =============  ======================================

    From then on the model's passes, :class:`AdamW`, :meth:`Model.zero_grad`,
    :meth:`Model.state_dict`, :meth:`Model.load_state_dict` and :meth:`Model.save_pretrained` work
    over the ranks: every rank calls them, in the same order.  The result does not depend on the
    mode but for rounding, and all ranks have the same bits.

    Parameters
    ----------
    model : Model
        With the same weights on all ranks.  Adapters and what is frozen are settled before.
    comm : Comm
    mode : str or dict of str to str
        One mode, or ``{"model.visual.*": "fsdp", "*": "ddp"}``: patterns over the names of the
        model's units (layers, their experts, embeddings, ...), of which the first match counts.
    node_size : int, optional
        Of ``hybrid``: ranks 0 to n - 1 are a node, and so on.
    experts : int
        Ranks that share the experts of a mixture: ranks 0 to e - 1 are a group in which each holds
        E/e experts of every layer (nearly, where e does not divide E), and so on.  Rows of tokens
        go to the ranks that hold their experts, and come back; so all ranks run the same passes in
        the same order, with nothing in them if need be.  Gradients and state of experts are over
        the ranks that hold the same ones, N/e of them, where others are over N.

    Attributes
    ----------
    model, comm, node_size, experts
        As above.
    modes : dict of str to str
        Of each unit.
    holds : bool
        Weights and gradients are held here: a unit is sharded or experts are on several ranks, and
        ``model.parameters`` and ``model.grads`` are not to be had.
    holds_state : bool
        The optimizer's state is in shards.

    Raises
    ------
    TypeError
        No model, no communicator.
    ValueError
        An unknown mode, a pattern that matches no unit, a unit that no pattern matches, a node_size
        or experts that do not divide the ranks, more ranks for experts than there are experts,
        experts over ranks that are ``hybrid`` or in a model with adapters, a model that is sharded
        already, ranks that disagree.
    RuntimeError
        Arrays of weights or gradients are still in use.

    Notes
    -----
    A unit's weights lie end to end and are cut into N nearly equal ranges, so that a parameter may
    be on several ranks.

    With experts on several ranks, a layer first tells how many rows go to which expert, then moves
    them in as many rounds as the fullest rank needs: it takes at most ``moe_chunk_rows`` of the
    model at a time, by default 5/4 of the mean over its group.  Nothing is dropped, and the outputs
    are those of one rank to the last bit.

    References
    ----------
    Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
    2020.  Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", 2023.
    Lepikhin et al., "GShard: Scaling Giant Models with Conditional Computation and Automatic
    Sharding", 2020: experts over ranks.

    Examples
    --------
    >>> import orchvlm
    >>> def train(comm):
    ...     model = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=0, threads=1)
    ...     shard = orchvlm.Shard(model, comm, "fsdp")
    ...     optimizer = orchvlm.AdamW(model, lr=1e-3)
    ...     words = [[72, 105, 33], [66, 121, 101, 33]][comm.rank]  # each rank its own sample
    ...     model.zero_grad()
    ...     model.forward(orchvlm.Inputs(input_ids=words, labels=words), normalizer=5)
    ...     model.backward()
    ...     optimizer.step()  # of the gradient of both
    ...     return model.state_dict()["model.language_model.norm.weight"].tobytes()
    >>> len(set(orchvlm.comm.run_threads(2, train)))
    1
    """

    def __init__(self, model, comm, mode="ddp", node_size=None, experts=1):
        from .comm import Comm
        if not isinstance(model, Weights) or not isinstance(comm, Comm):
            raise TypeError("Shard takes a Model and a Comm; got "
                            f"{type(model).__name__} and {type(comm).__name__}")
        if model.shard is not None:
            raise ValueError("this model is sharded already; undo that first")
        experts = whole_number(experts, "experts", 1, comm.size)
        numbers, self.modes = _resolved(model._core, mode)
        self._core = _core.Shard(model._core, comm._core, numbers, _node_size(node_size), experts)
        self.node_size, self.experts = node_size, experts
        self.model, self.comm = model, comm
        self.holds, self.holds_state = self._core.holds()
        self.holds = self.holds or experts > 1
        model._shard = self

    def __repr__(self):
        used = [mode for mode in MODES if mode in self.modes.values()]
        return f"<Shard ({', '.join(used)}) on {self.comm!r} of {self.model!r}>"

    # ------------------------------------------------------------ a step

    def last_backward(self):
        """Says that the next backward is the step's last one, for every part of the model that it
        goes through: sums over the ranks may begin while it computes.

        Without this call they begin in :meth:`reduce_gradients`.
        """
        self._core.last()

    def reduce_gradients(self):
        """Sums the gradients over the ranks; those that are summed already stay.

        :meth:`AdamW.step` does it where it was not done.

        Raises
        ------
        CommError
            A rank failed.
        ValueError
            A backward failed, so that there is nothing to sum.
        """
        self._core.reduce()

    def gradients(self):
        """Gradients of the whole model, summed over the ranks.

        Returns
        -------
        dict
            A float32 copy for each trained parameter by name, on every rank.
        """
        whole = {name: self._core.gather(i, _GRAD) for name, i in self.model._index.items()}
        return {name: array for name, array in whole.items() if array is not None}

    def waited_s(self):
        """Seconds that this rank has waited for others in sums and gathers since the shard was
        made: what did not pass beside its own computing, waiting for slower ranks included.

        Returns
        -------
        float
        """
        return self._core.waited_s()

    def expert_exchanges(self):
        """What this rank has exchanged with those that hold other experts, since the shard was
        made.

        Returns
        -------
        dict
            ``exchanges``, ``sent_bytes`` (to other ranks) and ``waited_s`` (seconds in exchanges,
            waiting for slower ranks included).
        """
        return dict(zip(("exchanges", "sent_bytes", "waited_s"), self._core.exchanged()))

    # ------------------------------------------------------------ memory

    def memory(self):
        """Bytes that this rank holds now.

        Returns
        -------
        dict
            ``weights``, ``training`` (gradients and optimizer state), and ``buffers``: for layers
            that are gathered and summed, the part that does not fall with the number of ranks.
        """
        return _named(self._core.memory())

    @staticmethod
    def predict(model, ranks, mode="ddp", node_size=None, *, experts=1, rank=0,
                dtype="float32"):
        """Bytes that a rank will hold, once the optimizer has taken a step.

        Parameters
        ----------
        model : Model, ModelConfig or dict
            Of a configuration everything is trained.
        ranks : int
        mode : str or dict
            As in :class:`Shard`.
        node_size : int, optional
            As in :class:`Shard`.
        experts : int
            As in :class:`Shard`.
        rank : int
            Which one.
        dtype : {"float32", "bfloat16"}
            Of a configuration's weights.

        Returns
        -------
        dict
            As :meth:`memory`.

        Raises
        ------
        TypeError
            Neither a model nor a configuration.
        ValueError
            As in :class:`Shard`; a rank that does not exist.

        Examples
        --------
        >>> import orchvlm
        >>> config = orchvlm.preset("tiny")
        >>> one, four = (orchvlm.Shard.predict(config, n, "fsdp")["training"] for n in (1, 4))
        >>> round(one / four, 1)
        4.0
        """
        if isinstance(model, dict):
            model = ModelConfig(model)
        if isinstance(model, ModelConfig):
            source = (*model.numbers(), dtype)
        elif isinstance(model, Weights):
            source = model._core
        else:
            raise TypeError(f"model must be a Model or a ModelConfig; got {type(model).__name__}")
        numbers, _ = _resolved(source, mode)
        experts = whole_number(experts, "experts", 1, 2**31 - 1)
        return _named(_core.shard_memory(source, numbers, _node_size(node_size), experts, ranks,
                                         rank))

    # ------------------------------------------------------------ end

    def undo(self):
        """Gives the model all its weights back, on every rank; gradients and optimizer state are
        gone.  All ranks call it."""
        self._core.undo()
        self._core.close()
        self.model._shard = None

    # ------------------------------------------------------------ for the model and its optimizer

    def _whole(self, i):
        """A weight, gathered on all ranks, as it is stored."""
        return self._core.gather(i, _WEIGHT)

    def _write(self, i, which, values):
        """This rank's part of a whole array."""
        first, n, _ = self._core.part(i, which)
        flat = np.ascontiguousarray(values).reshape(-1)[first:first + n]
        self._core.write(i, which, np.ascontiguousarray(flat))

    def _read(self, i, which):
        """(first element, flat array, whether a lower rank has the same) of this rank's part."""
        first, n, again = self._core.part(i, which)
        array = np.empty(n, np.float64 if self.model.dtype == "float64" else np.float32)
        self._core.read(i, which, array)
        return first, array, again


def _named(numbers):
    return dict(zip(("weights", "training", "buffers"), numbers))


def _node_size(value):
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"node_size must be a whole number >= 1; got {value!r}")
    return int(value)


def _resolved(source, mode):
    """(numbers of modes, {unit: mode}) for the units of what the core lists."""
    patterns = {"*": mode} if isinstance(mode, str) else mode
    if not isinstance(patterns, Mapping) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(f"mode must be one of {', '.join(MODES)}, or a dict of patterns to them; "
                        f"got {mode!r}")
    for value in patterns.values():
        if value not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}; got {value!r}")
    units, modes = _core.shard_units(source), {}
    for pattern in patterns:
        if not any(fnmatchcase(unit, pattern) for unit in units):
            raise ValueError(f"mode: {pattern!r} matches no unit; there are {', '.join(units)}")
    for unit in units:
        hits = [value for pattern, value in patterns.items() if fnmatchcase(unit, pattern)]
        if not hits:
            raise ValueError(f"mode: no pattern matches {unit}; add '*'")
        modes[unit] = hits[0]
    return np.array([MODES.index(value) for value in modes.values()], np.int64), modes
