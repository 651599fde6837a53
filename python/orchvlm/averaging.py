"""A moving average of the weights, and the model with it for a while."""
from contextlib import contextmanager, nullcontext
from pathlib import Path

from ._numbers import finite_number
from .checkpoint import CheckpointError, SafeTensors
from .weights import _WEIGHT, Weights, fitting

AVERAGES = "ema.safetensors"  # of a checkpoint
_AVERAGE = 5


class EMA:
    """An exponential moving average of what is trained.

    Begins with the present weights; :meth:`update` after every optimizer step moves it by
    ``average = decay * average + (1 - decay) * weight``, in float32 (of bfloat16 models: over the
    optimizer's float32 masters).

    Parameters
    ----------
    model : Model
        One average per model, until :meth:`close`.  What is trained cannot change meanwhile.
    decay : float
        In [0, 1).

    Raises
    ------
    TypeError
        ``model`` is none.
    ValueError
        A decay out of range, a model that has an average already or trains nothing, or whose
        weights lie on several ranks.

    Examples
    --------
    >>> import orchvlm
    >>> model = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=0)
    >>> ema = orchvlm.EMA(model, decay=0.5)
    >>> model.parameters["model.language_model.norm.weight"][:] = 3.0
    >>> ema.update()
    >>> with ema.swap():  # evaluate, save_pretrained, ...
    ...     print(model.parameters["model.language_model.norm.weight"][0])
    2.0
    >>> print(model.parameters["model.language_model.norm.weight"][0])
    3.0
    """

    def __init__(self, model, decay=0.999):
        if not isinstance(model, Weights):
            raise TypeError(f"model must be an orchvlm.Model; got {type(model).__name__}")
        self.decay = finite_number(decay, "decay", 0, 1 - 1e-12)
        self.model = model
        shard = model.shard
        if shard is not None and (shard.holds or shard.holds_state and model.dtype == "bfloat16"):
            raise ValueError("an average needs all weights, in bfloat16 all masters, on every "
                             "rank: shard by 'ddp', or in float32 by 'zero1', all experts on every "
                             "rank")
        model._core.average("open")

    def update(self):
        """Follows the weights by one step.

        Raises
        ------
        ValueError
            Inside :meth:`swap`, or after :meth:`close`.
        """
        self.model._core.average_update(self.decay)

    @contextmanager
    def swap(self):
        """The model with the average for weights, until the block ends; then its own, to the bit.

        Within, there is no optimizer step, and what is written to the weights is lost.

        Yields
        ------
        Model

        Raises
        ------
        ValueError
            Within another such block, or after :meth:`close`.
        """
        self.model._core.average("in")
        try:
            yield self.model
        finally:
            self.model._core.average("out")

    def state_dict(self):
        """The averages.

        Returns
        -------
        dict
            A float32 copy for each trained parameter, as ``NAME/average``.
        """
        state = {}
        for name, i in self.model._index.items():
            array = self.model._core.array(i, _AVERAGE, False)
            if array is not None:
                state[f"{name}/average"] = array
        return state

    def load_state_dict(self, state):
        """Sets what :meth:`state_dict` gave; all of it or, when it does not fit, nothing.

        Parameters
        ----------
        state : mapping

        Raises
        ------
        ValueError
            What is missing, surplus or mis-shaped, by name.
        """
        arrays = fitting(self.state_dict(), state, "average")
        for name, i in self.model._index.items():
            if f"{name}/average" in arrays:
                self.model._core.write(i, _AVERAGE, arrays[f"{name}/average"])

    def close(self):
        """Gives the memory back; the weights are the model's own."""
        self.model._core.average("close")

    def __repr__(self):
        return f"<EMA: decay {self.decay:g} of {self.model!r}>"


def has_average(folder):
    """Whether a checkpoint holds an average.

    Parameters
    ----------
    folder : path-like

    Returns
    -------
    bool
    """
    return (Path(folder) / AVERAGES).exists()


def take_average(model, folder):
    """Gives a model the average that a checkpoint holds for weights.  What was not trained stays.

    Parameters
    ----------
    model : Model
        With the checkpoint's weights and adapters.
    folder : path-like
        Of the checkpoint.

    Raises
    ------
    CheckpointError
        An average of another model: what is unknown or mis-shaped, by name.
    """
    file, places = SafeTensors(Path(folder) / AVERAGES), model._index
    unknown = sorted(set(file.tensors) - set(places))
    if unknown:
        raise CheckpointError(f"{AVERAGES}: this model has no {unknown[0]}")
    for name in file.tensors:
        array = file.read(name)
        model._check_values(places[name], array, AVERAGES)
        model._write(places[name], _WEIGHT, array)


def averaged(ema):
    """A block in which the model has its average for weights; nothing where none is kept.

    Parameters
    ----------
    ema : EMA or None

    Returns
    -------
    context manager
    """
    return nullcontext() if ema is None else ema.swap()
