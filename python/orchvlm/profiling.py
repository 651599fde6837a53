"""A trace of what models do: every phase, layer and operation, with its time."""
import json
import threading
import time
import weakref
from pathlib import Path

from ._files import write_whole

# All that are alive.  References without callbacks: a WeakSet's would run in garbage collections,
# where a Ctrl-C that comes just then is lost.
_models = []
_lock = threading.Lock()
_current = []                # the profile that is on, if any


def watch(model):
    """Called by every new model: a profile that is on traces it, too."""
    with _lock:
        _models[:] = [one for one in _models if one() is not None]
        _models.append(weakref.ref(model))
        if _current:
            _current[0]._start(model)


class profile:
    """Writes a Chrome trace of all models' work while a ``with`` block runs.

    Open the file in chrome://tracing or Perfetto.  One row per model: phases (encode, decode, loss
    and their backwards, optimizer) hold their layers, and those their operations.

    Parameters
    ----------
    path : path-like
        The JSON file; written when the block ends, also by an exception.

    Attributes
    ----------
    path
        As given.

    Raises
    ------
    RuntimeError
        Another profile is on, or a model is busy.

    Notes
    -----
    Without a profile nothing is measured.  With one, every operation is waited for: times are
    those of the operations alone, also on devices where they would overlap.  A pass that was
    interrupted shows the parts of it that were done.

    Examples
    --------
    >>> import json, os, tempfile, orchvlm
    >>> model = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=0)
    >>> path = os.path.join(tempfile.mkdtemp(), "trace.json")
    >>> with orchvlm.profile(path):
    ...     out = model.forward(orchvlm.Inputs(input_ids=[72, 105], labels=[72, 105]))
    >>> with open(path) as file:
    ...     events = json.load(file)["traceEvents"]
    >>> [event["name"] for event in events if event.get("cat") == "phase"]
    ['decode', 'loss']
    """

    def __init__(self, path):
        self.path = Path(path)
        self._began, self._traced = 0.0, []

    def __enter__(self):
        with _lock:
            if _current:
                raise RuntimeError("another profile is on")
            made = not self.path.exists()
            open(self.path, "a").close()  # a path that cannot be written is known now
            self._began, self._traced = time.monotonic(), []
            try:
                for model in [one() for one in _models]:
                    if model is not None:
                        self._start(model)
            except BaseException:
                self._stop()
                if made:
                    self.path.unlink(missing_ok=True)
                raise
            _current.append(self)
        return self

    def _start(self, model):
        model._core.trace_start()
        self._traced.append((repr(model), model._core))

    def _stop(self):
        """[(model's name, its events)]; tracing is off for all."""
        found = []
        for name, core in self._traced:
            while True:
                try:
                    found.append((name, core.trace_stop()))
                    break
                except RuntimeError:  # another thread is in a pass; its end is near
                    time.sleep(0.001)
        self._traced = []
        return found

    def __exit__(self, *error):
        with _lock:
            _current.clear()
            found = self._stop()
        events = [event for number, (name, rows) in enumerate(found) if rows
                  for event in self._events(number, name, rows)]
        text = json.dumps({"displayTimeUnit": "ms", "traceEvents": events})
        write_whole(self.path, lambda stream: stream.write(text.encode()))

    def _events(self, number, model, rows):
        """The metadata that names a model's row, and its events by their start."""
        place = {"pid": 0, "tid": number}
        yield {"name": "thread_name", "ph": "M", **place, "args": {"name": model}}
        for name, index, start, end in sorted(rows, key=lambda row: (row[2], -row[3])):
            kind = "op" if name.endswith((" fwd", " bwd")) else "layer" if index >= 0 else "phase"
            yield {"name": name if index < 0 else f"{name} {index}", "cat": kind, "ph": "X",
                   "ts": (start - self._began) * 1e6, "dur": (end - start) * 1e6, **place}
