"""Builds the C core alone, without Python, and runs its tests."""
import os
import re
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


def symbols(*options):
    """Of the library, a dict each; section by name."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    out = subprocess.run([nm, "--format=sysv", *options, BUILD / "libovlm.a"], check=True,
                         capture_output=True, text=True)
    rows = [[cell.strip() for cell in line.split("|")] for line in out.stdout.splitlines()]
    found = [{"name": row[0], "section": row[6]} for row in rows if len(row) == 7]
    assert len(found) > 100
    return found


def test_the_library_has_no_global_state(built):
    """No writable data: nothing that two callers could share.  Tables of addresses are constant
    once they are loaded (.data.rel.ro)."""
    writable = {symbol["name"] for symbol in symbols()
                if re.match(r"\.(data|bss|tbss|tdata|sdata|sbss)(?!\.rel\.ro)", symbol["section"])
                or symbol["section"] == "*COM*"}
    assert {name.split(".")[0] for name in writable} - WRITABLE == set()


def test_public_symbols_are_ours(built):
    """Global means declared in a header, as the preprocessor leaves it."""
    source = HERE.parents[1] / "csrc"
    headers = sorted(path for path in source.rglob("*.h")
                     if path.parent.name not in ("pymod",) and not path.stem.endswith("_code"))
    includes = "".join(f'#include "{path.relative_to(source)}"\n' for path in headers)
    command = [compiler(), "-E", "-P", f"-I{source}", "-D_POSIX_C_SOURCE=200809L",
               "-DOVLM_TEST_HOOKS", "-x", "c", "-"]
    out = subprocess.run(command, input=includes, check=True, capture_output=True, text=True)
    declared = set(re.findall(r"\bovlm_\w+", out.stdout))
    names = {symbol["name"] for symbol in symbols("-g", "--defined-only")}
    strangers = {name for name in names if name.startswith("ovlm_")} - declared
    assert strangers == set(), "global, yet no header declares them"
