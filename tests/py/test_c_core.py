"""Builds the C core alone, without Python, and runs its tests."""
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1] / "c"
BUILD = HERE / "build" / "plain"
TESTS = sorted(path.stem for path in HERE.glob("test_*.c"))
SEED = os.environ.get("ORCHVLM_TEST_SEED", str(time.time_ns() % 2**32))

#: Writable data that the library is allowed: a hook that only tests set.
WRITABLE = {"fail_after"}


def compiler():
    found = (shutil.which(name) for name in ("cc", "gcc", "clang"))
    return os.environ.get("CC") or next(filter(None, found), None)


@pytest.fixture(scope="session")
def built():
    if not TESTS:
        pytest.skip("the C tests are not here")
    if compiler() is None or shutil.which("make") is None:
        pytest.skip("needs make and a C compiler")
    out = subprocess.run(["make", "-s", f"-j{os.cpu_count()}", "-C", HERE, "all",
                          f"CC={compiler()}"], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-8000:]


@pytest.mark.parametrize("name", TESTS)
def test_c(built, name):
    out = subprocess.run([BUILD / name, SEED], capture_output=True, text=True)
    print(out.stdout, out.stderr)
    if out.returncode == 77:
        pytest.skip(out.stdout.strip())
    assert out.returncode == 0, out.stdout + out.stderr[-8000:]


def test_the_library_has_no_global_state(built):
    """No writable data and no constructor: nothing that two callers could share."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    out = subprocess.run([nm, BUILD / "libovlm.a"], check=True, capture_output=True, text=True)
    rows = [line.split() for line in out.stdout.splitlines() if len(line.split()) == 3]
    assert len(rows) > 100
    writable = {name for _, kind, name in rows if kind in "bBcCdDgGsS"}
    assert writable - WRITABLE == set()


def test_public_symbols_are_ours(built):
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    out = subprocess.run([nm, "-g", "--defined-only", BUILD / "libovlm.a"], check=True,
                         capture_output=True, text=True)
    names = {line.split()[2] for line in out.stdout.splitlines() if len(line.split()) == 3}
    header = (HERE.parents[1] / "csrc" / "ovlm.h").read_text()
    strangers = {name for name in names
                 if name.startswith("ovlm_") and f"{name}(" not in header
                 and not any(f"{name}(" in path.read_text()
                             for path in (HERE.parents[1] / "csrc").glob("*/*.h"))}
    assert strangers == set(), "global, yet no header declares them"
