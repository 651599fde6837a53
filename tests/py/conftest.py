"""What all tests share."""
import os
import signal

import pytest

# A shell starts background jobs with SIGINT ignored, and their children inherit that; the tests of
# Ctrl-C need it as a terminal gives it, here and in what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

#: Of tests that fork this process.
forks = pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason=(
    "a thread that is just ending may hold AddressSanitizer's allocator, for good in a fork"))
