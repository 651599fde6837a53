"""Ranks of this host without a launcher: as threads, or as processes that this one watches over."""
import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
import traceback
from multiprocessing import connection

from . import _core
from ._numbers import finite_number

#: After a failure, how long ranks have to end by themselves before they are killed.
_KILL_S = 10.0
#: The same after a signal: a rank that trains ends its step and writes a checkpoint first.
_END_S = 600.0
#: The same where a rank failed before all had met.
_JOIN_S = 1.0
#: How long processes have until all have met: imports may come from a slow file system, and a fork
#: imports nothing.
_BEGIN_S = {"fork": 60.0, "spawn": 600.0}
_PASSED_ON = (signal.SIGINT, signal.SIGTERM)


def shared_folder():
    """Where files of this host's memory live; else where temporary files do."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else tempfile.gettempdir()


def local_options(silent_s, join_s=0.0):
    """The core's options of local communicators."""
    silent_s = finite_number(silent_s, "silent_s", 0, 1e9)
    if silent_s == 0:
        raise ValueError("silent_s must be above 0; got 0")
    return (silent_s, join_s, 0.0, 0)


def _checked_n(n):
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise TypeError(f"n must be an integer; got {type(n).__name__}")
    if not 1 <= n <= 1024:
        raise ValueError(f"n must be in [1, 1024] ranks; got {n}")
    return n.__index__()


def _first(errors):
    """(rank, error) of what failed first: not what others only heard of."""
    return min(errors.items(), key=lambda item: (isinstance(item[1], _core.CommError), item[0]))


# ---------------------------------------------------------------- threads

def run_threads(n, fn, *args, silent_s=60.0):
    """Run a function on n ranks that are threads of this process.

    For tests and notebooks: ranks share the interpreter, so that only one runs Python code at a
    time, while the core computes and communicates side by side.

    Parameters
    ----------
    n : int
        Ranks.
    fn : callable
        Called as ``fn(comm, *args)`` with each rank's :class:`Comm`, which is closed after it.
    *args : object
        More arguments of `fn`, the same for all ranks.
    silent_s : float
        As for :func:`init`.

    Returns
    -------
    list
        What `fn` returned, by rank.

    Raises
    ------
    CommError
        A rank failed; its number, exception and message, and the exception as the cause.

    Examples
    --------
    >>> import orchvlm
    >>> orchvlm.comm.run_threads(3, lambda comm, word: f"{word} {comm.rank}", "rank")
    ['rank 0', 'rank 1', 'rank 2']
    """
    from .comm import Comm

    cores = _core.comm_threads(_checked_n(n), local_options(silent_s))
    comms = [Comm(core) for core in cores]
    results, errors = [None] * n, {}

    def work(rank):
        try:
            with comms[rank] as comm:
                results[rank] = fn(comm, *args)
        except BaseException as error:
            errors[rank] = error

    threads = [threading.Thread(target=work, args=(r,), name=f"rank {r}") for r in range(n)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as error:  # Ctrl-C reaches the main thread alone
        for comm in comms:
            with contextlib.suppress(ValueError):
                comm.abort(f"{type(error).__name__}: {error}")
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        raise
    if errors:
        rank, error = _first(errors)
        if isinstance(error, _core.CommError):
            raise error
        raise _core.CommError(f"rank {rank} failed: {type(error).__name__}: {error}") from error
    return results


# ---------------------------------------------------------------- processes

class RankTraceback(Exception):
    """The traceback of a rank's own process, as the cause of what is raised here."""

    def __str__(self):
        return "\n" + self.args[0]


def _end_with_parent(folder):
    """Ranks whose launcher was killed do not live on, and leave nothing behind."""
    def watch():
        connection.wait([multiprocessing.parent_process().sentinel])
        shutil.rmtree(folder, ignore_errors=True)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def _rank_main(pipe, path, rank, n, options, fn, args):
    """What a rank's process does."""
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)  # the terminal's Ctrl-C goes to the launcher, which passes it on
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        _end_with_parent(os.path.dirname(path))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
        from .comm import Comm

        with Comm(_core.comm_local(path, rank, n, options)) as comm:
            pipe.send(("joined",))
            result = fn(comm, *args)
        pipe.send(("done", result))
    except BaseException as error:
        pipe.send(("failed", isinstance(error, _core.CommError), type(error).__name__, str(error),
                   traceback.format_exc()))
        raise SystemExit(1) from None


class _Ranks:
    """The processes of one run, and what they said."""

    def __init__(self):
        self.results, self.errors, self.processes, self.pipes = {}, {}, [], {}
        self.signals, self.deadline, self.joined, self.killed = [], None, 0, False
        self._begin_s = 0.0

    def begin(self, n, start, path, options, fn, args):
        """Starts them; what signals come meanwhile all of them get."""
        context = multiprocessing.get_context(start)
        for rank in range(n):
            pipe, end = context.Pipe(duplex=False)
            process = context.Process(target=_rank_main, name=f"rank {rank}",
                                      args=(end, path, rank, n, options, fn, args))
            # In a fork they would be this process's, until it has handlers of its own.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
            try:
                process.start()
                self.processes.append(process)
                self.pipes[pipe] = rank
                for number in self.signals:
                    os.kill(process.pid, number)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            end.close()
        self._begin_s = _BEGIN_S[start]
        self._limit(self._begin_s)

    def send(self, number):
        """A signal for every rank that still runs."""
        self.killed |= number == signal.SIGKILL
        for process in self.processes:
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(process.pid, number)

    def on_signal(self, number, frame):
        """Pass it on; the second one kills."""
        self.signals.append(number)
        self.send(number if len(self.signals) == 1 else signal.SIGKILL)
        self._limit(_END_S)

    def _limit(self, seconds):
        """The ranks have so much time from now on, or less where that was said before."""
        at = time.monotonic() + seconds
        self.deadline = at if self.deadline is None else min(at, self.deadline)

    def hear(self, pipe):
        """What a rank says, or that it died."""
        rank = self.pipes[pipe]
        process = self.processes[rank]
        try:
            message = pipe.recv()
            if message[0] == "joined":
                self.joined += 1
                if self.joined == len(self.processes) and not (self.errors or self.signals):
                    self.deadline = None
                return
        except EOFError:
            process.join()
            if self.killed and process.exitcode == -signal.SIGKILL:  # for what failed before
                message = ("killed",)
            else:
                message = ("failed", False, "", self._death(process.exitcode), None)
        except Exception as error:  # a result that cannot be unpickled here
            message = ("failed", False, type(error).__name__, str(error), None)
        del self.pipes[pipe]
        pipe.close()
        if message[0] == "done":
            self.results[rank] = message[1]
            return
        if message[0] == "killed":
            return
        _, heard, kind, text, trace = message
        if not heard:
            text = f"rank {rank} failed: {kind}{': ' if kind else ''}{text}"
        error = _core.CommError(text)
        error.__cause__ = RankTraceback(trace) if trace else None
        self.errors[rank] = (not heard, error)

    def _death(self, code):
        """How a process ended that said nothing."""
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        if code == 1 and not self.joined:
            how += "; can it import the function?"
        return f"its process died ({how})"

    def wait(self, silent_s):
        """Until all have ended; after the first failure the others have silent_s."""
        while self.pipes:
            left = None if self.deadline is None else self.deadline - time.monotonic()
            if left is not None and left <= 0:
                if not (self.errors or self.signals):
                    self.errors[-1] = (True, _core.CommError(
                        f"the ranks' processes have not met in {self._begin_s:g} s; where a thread "
                        "held a lock when they were forked, take start=\"spawn\""))
                self.send(signal.SIGKILL)
                left = None
            for pipe in connection.wait(list(self.pipes), left):
                self.hear(pipe)
            if self.errors:  # who has not joined waits for all; who has, hears of it in time
                self._limit(silent_s + _KILL_S if self.joined == len(self.processes) else _JOIN_S)

    def end(self):
        """Nothing is left behind."""
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.join()
            process.close()
        for pipe in self.pipes:
            pipe.close()


@contextlib.contextmanager
def _signals_to(handler):
    """Ctrl-C and SIGTERM go to the handler; only the main thread can say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in _PASSED_ON}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


def run_processes(n, fn, *args, start="spawn", silent_s=60.0):
    """Run a function on n ranks that are processes of this host.

    This process computes nothing: it starts the ranks, passes Ctrl-C and SIGTERM on to them (the
    second one kills), and waits.  A rank that raises, dies or is stopped makes all others raise.

    Parameters
    ----------
    n : int
        Ranks.
    fn : callable
        Called as ``fn(comm, *args)`` in each process; its result is pickled.
    *args : object
        More arguments of `fn`, the same for all ranks.
    start : {"spawn", "fork"}
        How processes are started.  "spawn" needs an `fn` that can be imported; "fork" takes any
        function, but only where no thread of this process holds a lock.
    silent_s : float
        As for :func:`init`.

    Returns
    -------
    list
        What `fn` returned, by rank.

    Raises
    ------
    CommError
        A rank failed or died; its number, exception and message, with its traceback as the cause.
    KeyboardInterrupt
        After Ctrl-C, when the ranks have ended; after SIGTERM it is SystemExit.

    Examples
    --------
    >>> import orchvlm
    >>> orchvlm.comm.run_processes(2, orchvlm.comm.Comm.barrier)
    [None, None]
    """
    if start not in ("spawn", "fork"):
        raise ValueError(f"start must be 'spawn' or 'fork'; got {start!r}")
    n, options = _checked_n(n), local_options(silent_s)
    folder = tempfile.mkdtemp(prefix=f"orchvlm-{os.getpid()}-", dir=shared_folder())
    ranks = _Ranks()
    try:
        with _signals_to(ranks.on_signal):
            ranks.begin(n, start, os.path.join(folder, "meet"), options, fn, args)
            ranks.wait(options[0])
    finally:
        ranks.end()
        shutil.rmtree(folder, ignore_errors=True)
    if len(ranks.results) == n:
        return [ranks.results[rank] for rank in range(n)]
    if ranks.signals:
        raise KeyboardInterrupt if ranks.signals[0] == signal.SIGINT else SystemExit(143)
    own, error = min(ranks.errors.items(), key=lambda item: (not item[1][0], item[0]))[1]
    raise error
