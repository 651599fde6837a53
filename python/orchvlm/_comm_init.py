"""The communicator of this process, from what its launcher left in the environment."""
import atexit
import hashlib
import os
import sys
import weakref

from . import _core
from ._comm_run import local_options, shared_folder
from .endings import of_all_ranks

#: Set by mpirun and srun for the processes that they start; the first ones say how many these are.
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_MPI = (*_SIZES, "PMIX_RANK", "MPI_LOCALNRANKS")


def _number(name):
    try:
        return int(os.environ[name])
    except ValueError:
        raise ValueError(f"the environment variable {name} must be an integer; got "
                         f"{os.environ[name]!r}") from None


def _torchrun(silent_s):
    """torchrun's ranks: on one host by themselves, else over torch's gloo."""
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    if size == 1:
        return _core.comm_self()
    if "LOCAL_WORLD_SIZE" in os.environ and _number("LOCAL_WORLD_SIZE") == size:
        names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
                 "TORCHELASTIC_RESTART_COUNT")
        job = repr([os.getuid(), *(os.environ.get(name) for name in names)])
        name = "orchvlm-" + hashlib.sha256(job.encode()).hexdigest()[:24]
        return _core.comm_local(os.path.join(shared_folder(), name), rank, size,
                                local_options(silent_s))
    try:
        import torch.distributed as dist
    except ImportError:
        raise _core.CommError("torchrun's ranks on several hosts communicate over torch, which is "
                              "not installed; install it, or start them with mpirun") from None

    from ._comm_torch import torch_core

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return torch_core(None, True)


def _from_environment(silent_s):
    environment = os.environ
    if all(name in environment for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")):
        return _torchrun(silent_s)
    sizes = [name for name in _SIZES if name in environment]
    if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        sizes += [name for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if name in environment]
    tasks = _number(sizes[0]) if sizes else 0
    if tasks > 1 or any(name in environment for name in _MPI):
        from ._comm_mpi import mpi_core

        return mpi_core(0, tasks)
    return _core.comm_self()


def _tell_others(comm):
    """An uncaught exception of this rank reaches the others; a normal end closes in good order."""
    known, before = weakref.ref(comm), sys.excepthook

    def hook(kind, error, trace):
        before(kind, error, trace)
        alive = known()
        if alive is not None and not of_all_ranks(error):
            try:
                alive.abort(f"{kind.__name__}: {error}")
            except ValueError:  # closed
                pass

    def close():
        alive = known()
        if alive is not None:
            try:
                alive.close()
            except RuntimeError:  # a thread is still in a call
                pass

    sys.excepthook = hook
    atexit.register(close)


def init(silent_s=60.0):
    """Find the communicator of this process.

    ======================  =======================================================================
    environment             communicator
    ======================  =======================================================================
    torchrun                local where all ranks are on one host, else over torch's gloo
    mpirun, mpiexec         MPI, loaded at run time
    srun                    MPI, with ``--mpi=pmix`` for Open MPI or ``--mpi=pmi2`` for MPICH
    otherwise               one rank
    ======================  =======================================================================

    An exception that ends this process is told to the other ranks.

    Parameters
    ----------
    silent_s : float
        Seconds after which a rank is given up whose process is stopped: alive, but not running.
        (One that ended is noticed at once; one that is slow is waited for, with a warning.)

    Returns
    -------
    Comm
        All ranks of the job.

    Raises
    ------
    CommError
        The ranks do not find each other, or there is no MPI library.
    ValueError
        A variable of the launcher makes no sense.

    Examples
    --------
    >>> import orchvlm
    >>> comm = orchvlm.comm.init()
    >>> comm.rank, comm.size
    (0, 1)
    """
    from .comm import Comm

    local_options(silent_s)
    comm = Comm(_from_environment(silent_s))
    if comm.size > 1:
        _tell_others(comm)
    return comm
