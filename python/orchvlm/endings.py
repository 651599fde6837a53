"""Signals that end a run: never in the middle of a step, and on all ranks behind the same one."""
import logging
import signal
import threading
import time
from contextlib import contextmanager

import numpy as np

from ._core import CommError

_SAME_S = 2.0  # launchers send on what the terminal has sent already: that is one signal


@contextmanager
def held_back():
    """Ctrl-C waits until the block is done: a step is taken and written down, or it is not."""
    here = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if here else None
    if before is None:  # only the main thread is interrupted
        yield
        return
    seen = []
    signal.signal(signal.SIGINT, lambda *_: seen.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if seen:
            signal.raise_signal(signal.SIGINT)


class Endings:
    """Notes signals that ask a run to end; what they would do comes later.

    SIGTERM is noted; with several ranks Ctrl-C, too, for ranks that are interrupted in different
    places cannot write together.  The second signal does what it did before.

    Parameters
    ----------
    ranks : int

    Attributes
    ----------
    obeyed : bool
        The run ends for a signal, on all ranks.
    apart : bool
        The run ends because some ranks left it, of which all ranks know.
    """

    def __init__(self, ranks):
        self._numbers = [signal.SIGTERM] + ([signal.SIGINT] if ranks > 1 else [])
        self._seen, self._before, self._first_s = [], {}, 0.0
        self.obeyed = self.apart = False

    def begin(self):
        """Listens from now on; only in the main thread, and to what is not ignored."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in self._numbers:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._before[number] = signal.signal(number, self._note)

    def _note(self, number, frame):
        now = time.monotonic()
        if self._seen and now - self._first_s > _SAME_S:
            self.end()
            signal.raise_signal(number)
        self._first_s = self._first_s or now
        self._seen.append(number)

    def end(self):
        """Listens no more."""
        if self._before and threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before = {}

    def signs(self):
        """(1 after Ctrl-C, 1 after SIGTERM) on this rank."""
        return float(signal.SIGINT in self._seen), float(signal.SIGTERM in self._seen)

    def obey(self, interrupted, terminated):
        """Ends the run where any rank was asked to.

        Parameters
        ----------
        interrupted, terminated : float
            Sums over the ranks of what :meth:`signs` gave.

        Raises
        ------
        SystemExit
            With status 143, as of a process that SIGTERM ended.
        KeyboardInterrupt
            After Ctrl-C.
        """
        self.obeyed = bool(interrupted or terminated)
        if self.obeyed:
            error = SystemExit(143) if terminated else KeyboardInterrupt()
            error.of_all_ranks = True
            raise error

    @contextmanager
    def agreed(self, passes, step):
        """Around what a loop over the steps does behind one: all ranks go on, or all leave.

        A rank that left by itself would write the last checkpoint, with others that gather weights
        for the next step: each would wait for the other.

        Parameters
        ----------
        passes : OneRank or Orchestrator
        step : int
            The last one that was taken.

        Raises
        ------
        CommError
            Other ranks leave, and this one does not.
        """
        try:
            yield
        except GeneratorExit:
            try:
                self._compare(passes, step, 1.0)
            except ValueError:  # the communicator is closed: there is nobody to ask
                self.apart = True
            except CommError as error:  # the loop has an error of its own, or wants none
                self.apart = True
                logging.getLogger("orchvlm.training").warning("%s", error)
            raise
        self._compare(passes, step, 0.0)

    def _compare(self, passes, step, leaves):
        leaving = int(passes.total(np.array([leaves]))[0])
        self.apart = 0 < leaving < passes.size
        if self.apart:
            raise CommError(f"{leaving} of {passes.size} ranks left their loops over the steps "
                            f"behind step {step}, and the others did not: all leave behind the "
                            "same step, or none")


def of_all_ranks(error):
    """Whether all ranks end with this, behind the same step: there is nobody to tell of it.

    Parameters
    ----------
    error : BaseException

    Returns
    -------
    bool
    """
    return getattr(error, "of_all_ranks", False) is True
