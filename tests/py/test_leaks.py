"""No call leaks, whether it succeeds or fails.  Each case runs in a process of its own."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from leak_cases import CASES, leaks

SCRIPT = Path(__file__).with_name("leak_cases.py")


@pytest.mark.parametrize("case", sorted(CASES))
def test_nothing_leaks(case):
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("a sanitizer's quarantine looks like a leak")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    out = subprocess.run([sys.executable, SCRIPT, case], capture_output=True, text=True,
                         env=environment)
    assert out.returncode == 0, out.stdout + out.stderr


def test_the_counters_see_a_leak():
    quiet = [(0.0, 0.0, 0)] * 6
    assert leaks(quiet) == []
    assert leaks([(5.0, 900.0, 10**6)] * 2 + quiet[2:]) == []  # a cache that filled
    assert "1.00 objects" in leaks([(1.0, 0.0, 0)] * 6)[0]
    assert "64 traced bytes" in leaks([(0.0, 64.0, 0)] * 6)[0]
    assert "resident" in leaks([(0.0, 0.0, 200 * 4096)] * 6)[0]
