"""Numbers that callers give."""
import math
import sys

import numpy as np


def finite_number(value, name, low, high=math.inf):
    """The float, or ValueError with the argument's name."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or \
            not low <= value <= min(high, sys.float_info.max):
        raise ValueError(f"{name} must be a finite number in [{low}, {high}]; got {value!r}")
    return float(value)
