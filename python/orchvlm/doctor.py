"""What was built, what was found and what is missing on this machine."""
import importlib
import importlib.metadata
import platform
import shutil
import subprocess
import sys
from pathlib import Path

# Module: (package, what for).
_OPTIONAL = {"matplotlib": ("matplotlib", "plots: pip install matplotlib"),
             "PIL": ("pillow", "pictures, and orchvlm train: pip install 'orchvlm[data]'"),
             "tokenizers": ("tokenizers", "models' tokenizers: pip install 'orchvlm[data]'"),
             "jinja2": ("jinja2", "models' chat templates: pip install 'orchvlm[data]'"),
             "av": ("av", "videos: pip install 'orchvlm[video]'"),
             "scipy": ("scipy", "plan_sequences_milp: pip install scipy"),
             "IPython": ("ipython", "notebooks: pip install notebook")}


def _first_line(command):
    """First line that a command prints, or None."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return lines[-1 if "nvcc" in command[0] else 0] if done.returncode == 0 and lines else None


def _core_facts():
    try:
        from . import _core
    except ImportError as error:
        return [("core", "missing", f"{error}; build it: pip install .")]
    return [("core", "ok", f"orchvlm._core, {Path(_core.__file__).name}")]


def _numpy_facts():
    import numpy
    return [("numpy", "ok", numpy.__version__)]


def _optional_facts():
    facts = []
    for module, (name, remedy) in _OPTIONAL.items():
        try:
            importlib.import_module(module)
            facts.append((name, "ok", importlib.metadata.version(name)))
        except ImportError:
            facts.append((name, "missing", f"optional, for {remedy}"))
    return facts


def _backend_facts():
    library = Path(__file__).with_name("_cuda.so")
    if not library.exists():
        return [("cuda backend", "missing", "not built (optional): needs nvcc, then "
                 "ORCHVLM_CUDA=1 pip install .")]
    try:
        from . import _core
        info = _core.backend_info(str(library))
    except Exception as error:  # whatever a foreign driver does is a finding here, not a failure
        return [("cuda backend", "broken", str(error).partition("\n")[0])]
    if info["problem"] or not info["devices"]:
        return [("cuda backend", "no device", info["problem"] or "built; no GPU was found")]
    return [("cuda backend", "ok", f"{len(info['devices'])} x {info['devices'][0]}")]


def _tool_facts():
    facts = []
    nvcc = shutil.which("nvcc")
    line = _first_line([nvcc, "--version"]) if nvcc else None
    facts.append(("nvcc", "ok" if line else "missing",
                  f"{nvcc}, {line}" if line else "optional: builds the CUDA backend"))
    line = _first_line(["nvidia-smi", "--query-gpu=name,memory.total,driver_version",
                        "--format=csv,noheader"])
    facts.append(("gpu", "ok" if line else "missing", line or "nvidia-smi found none; plans and "
                  "simulations need none"))
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    line = _first_line([compiler, "--version"]) if compiler else None
    facts.append(("C compiler", "ok" if line else "missing",
                  line or "needed to build from source"))
    return facts


def examine():
    """Facts about the installation.

    Returns
    -------
    list of (str, str, str)
        (part, "ok" | "missing" | "broken" | "no device", detail).

    Notes
    -----
    Loads the CUDA backend where it was built, asks ``nvcc``, ``nvidia-smi`` and the C compiler for
    their versions, and changes nothing.

    Examples
    --------
    >>> from orchvlm import doctor
    >>> [fact[1] for fact in doctor.examine() if fact[0] == "core"]
    ['ok']
    """
    from . import __version__
    return [("orchvlm", "ok", f"{__version__} in {Path(__file__).parent}"),
            ("python", "ok", f"{platform.python_version()} ({sys.executable})"),
            ("machine", "ok", f"{platform.machine()}, {platform.system()} {platform.release()}"),
            *_core_facts(), *_numpy_facts(), *_optional_facts(), *_backend_facts(),
            *_tool_facts()]
