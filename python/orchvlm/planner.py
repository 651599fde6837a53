"""Plans coming batches while the current one trains: :class:`Planner`."""
import queue
import threading

from .cost import Cluster
from .sequences import _integer
from .step import check_choices, plan_step

_OPTIONS = sorted(set(plan_step.__kwdefaults__) - {"warm_start"})
_POLL_S = 0.05


class _End:
    """What the worker leaves behind last: the end of the batches, or what went wrong."""

    def __init__(self, error=None):
        self.error = error


def _offer(plans, stop, item):
    """Puts item where there is room; False once the planner is closed."""
    while not stop.is_set():
        try:
            plans.put(item, timeout=_POLL_S)
            return True
        except queue.Full:
            continue
    return False


def _work(batches, plans, stop, cluster, costs, options, warm):
    """The background thread; it holds no reference to the planner, which may be dropped."""
    last, end = None, _End()
    try:
        for batch in batches:
            if stop.is_set():
                return
            last = plan_step(batch, cluster, costs, warm_start=last if warm else None, **options)
            if not _offer(plans, stop, (batch, last)):
                return
    except BaseException as error:  # whatever it is, the consumer must hear of it
        end = _End(error)
    _offer(plans, stop, end)


class Planner:
    """Iterates over batches with their plans, made ahead of time in a background thread.

    The planning itself runs outside Python's global lock, so the training loop is not held up.

    Parameters
    ----------
    batches : iterable of Batch
        Read by the background thread, at most ``lookahead`` + 1 ahead of the consumer.
    cluster : Cluster
        As for :func:`plan_step`.
    costs : dict of str to BatchCost or SequenceCost
        As for :func:`plan_step`.
    lookahead : int
        Finished plans that may wait, >= 1.
    warm_start : bool
        Start each search from the last plan too. Reuses its degrees and times, never its validity.
    **options : keyword arguments
        Further arguments of :func:`plan_step`.

    Raises
    ------
    TypeError, ValueError
        ``lookahead`` is no integer >= 1, ``batches`` no iterable, ``cluster`` no Cluster, ``costs``
        no dict, or :func:`plan_step` has no such option. What goes wrong
        while planning a batch, or while fetching one, is raised where that batch was to be
        returned.

    Notes
    -----
    Every rank may run its own planner only while all plans say ``cut_short`` False; then they are
    equal everywhere. Otherwise one rank plans and sends ``plan.to_bytes()``.

    Examples
    --------
    >>> import orchvlm
    >>> cluster = orchvlm.Cluster(1, 2, 80e9, 1e15, 300e9, 25e9)
    >>> costs = {"llm": orchvlm.BatchCost(linear=1e-3)}
    >>> batches = [orchvlm.Batch([20, 30, k], [20, 30, k], [0, 0, 0]) for k in (5, 50)]
    >>> with orchvlm.Planner(batches, cluster, costs, lookahead=2) as planner:
    ...     for batch, step in planner:
    ...         print(len(batch), step.llm.loads.tolist())
    3 [0.03, 0.025]
    3 [0.05, 0.05]
    """

    def __init__(self, batches, cluster, costs, *, lookahead=2, warm_start=True, **options):
        for option in options:
            if option not in _OPTIONS:
                raise TypeError(f"plan_step has no option {option!r}; there are "
                                f"{', '.join(_OPTIONS)}")
        check_choices(**{key: options[key] for key in ("llm", "relabel") if key in options})
        if not hasattr(batches, "__iter__"):
            raise TypeError(f"batches must be an iterable of Batch; got {type(batches).__name__}")
        for value, kind, name in ((cluster, Cluster, "cluster"), (costs, dict, "costs")):
            if not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__}; got {type(value).__name__}")
        self._plans = queue.Queue(maxsize=_integer(lookahead, "lookahead"))
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=_work, daemon=True, name="orchvlm-planner",
            args=(iter(batches), self._plans, self._stop, cluster, costs, options,
                  bool(warm_start)))
        self._thread.start()

    def __iter__(self):
        return self

    def __next__(self):
        while not self._stop.is_set():
            try:
                item = self._plans.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if not isinstance(item, _End):
                return item
            self.close()
            if item.error is not None:
                raise item.error
        raise StopIteration

    def close(self):
        """Stops planning; iteration ends. A plan in the works is finished and dropped."""
        self._stop.set()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()
        self._thread.join()

    def __del__(self):
        stop = getattr(self, "_stop", None)
        if stop is not None:
            stop.set()
