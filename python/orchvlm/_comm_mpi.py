"""Communicators over an MPI library that is installed, or that mpi4py brought along."""
import atexit
import os
import site
import sys
from pathlib import Path

from . import _core

#: Open MPI and MPICH, by the names of their binary interfaces.
_SONAMES = ("libmpi.so.40", "libmpi.so.12")


def library_names():
    """Where an MPI library may be: beside this Python, where wheels put it; then the system's."""
    folders = dict.fromkeys(str(Path(base, "lib")) for base in (sys.prefix, site.getuserbase()))
    found = [str(Path(folder, name)) for folder in folders for name in _SONAMES]
    return tuple([name for name in found if Path(name).exists()] + [*_SONAMES])


def _finalize(names, process):
    """At the end of the process that started MPI; a forked child of it only inherits this."""
    if os.getpid() == process:
        _core.comm_mpi_finalize(names)


def mpi_core(handle, tasks=0):
    """The core's communicator over a communicator of MPI; 0: the world, of which the launcher says
    that it has so many ``tasks``."""
    names = library_names()
    core, initialised = _core.comm_mpi(names, handle)
    if initialised:
        atexit.register(_finalize, names, os.getpid())
    size = core.describe()[1]
    if tasks > size == 1:  # each would train alone, into the same folder
        core.close()
        raise _core.CommError(
            f"the launcher started {tasks} processes, and MPI knows of this one alone: the two do "
            "not fit together; under Slurm use srun --mpi=pmix for Open MPI, --mpi=pmi2 for MPICH")
    # MPI itself may wait for ever for what a rank never sends.
    core.set_debug(True)
    return core


def from_mpi4py(comm):
    """Make a communicator of one of mpi4py.

    Its own duplicate, over the library that mpi4py has loaded; Python is not asked again.  Calls
    and counts are compared over the ranks; :meth:`Comm.set_debug` ends that.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        All of its ranks call this.

    Returns
    -------
    Comm
        The same ranks; `comm` stays yours.

    Raises
    ------
    TypeError
        `comm` is none of mpi4py's communicators.
    CommError
        The library is neither Open MPI nor of MPICH's family.

    Examples
    --------
    >>> import orchvlm
    >>> def work():  # started by mpirun
    ...     from mpi4py import MPI
    ...     return orchvlm.comm.from_mpi4py(MPI.COMM_WORLD)
    """
    from .comm import Comm

    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not isinstance(comm, mpi.Comm):
        raise TypeError(f"comm must be a communicator of mpi4py; got {type(comm).__name__}")
    return Comm(mpi_core(mpi._handleof(comm)))
