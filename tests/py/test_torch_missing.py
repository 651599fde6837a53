"""orchvlm.torch where PyTorch is not installed."""
import subprocess
import sys

import pytest


@pytest.mark.parametrize("how", ("import orchvlm.torch", "import orchvlm; orchvlm.torch",
                                 "from orchvlm.torch import Balancer"))
def test_a_clear_error(how):
    code = f"import sys; sys.modules['torch'] = None\n{how}"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                         env={"PYTHONPATH": ":".join(p for p in sys.path if p)})
    assert out.returncode == 1
    last = out.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: orchvlm.torch needs PyTorch") and "install torch" in last
