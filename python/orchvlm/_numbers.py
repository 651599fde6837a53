"""Numbers from callers: what is no real number, or too large for a float, is refused by name."""
import math
import sys

import numpy as np


def refuse_masked(value, name):
    """The value; a masked array is refused, as nothing here would look at its mask."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be ignored; pass its "
                        "compressed() or filled() values")
    return value


def real(value, name):
    """The float of one real number; infinities and NaN pass.

    A complex number is refused by its kind: its ``__float__`` would drop the imaginary part.
    """
    refuse_masked(value, name)
    if isinstance(value, (bool, np.bool_, str, bytes)) or not hasattr(value, "__float__") or (
            np.iscomplexobj(value) or np.ndim(value) > 0):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite; got an integer above 1e308") from None


def reals(value, name):
    """A new float64 array of real numbers, of whatever shape."""
    try:
        array = np.array(refuse_masked(value, name))
    except ValueError:  # rows of several lengths
        raise TypeError(f"{name} must be an array of numbers; got {value!r:.60}") from None
    if array.dtype.kind == "O":  # whole numbers too large for int64, or no numbers
        array = np.array([real(one, name) for one in array.flat]).reshape(array.shape)
    elif array.dtype.kind not in "iuf":
        raise TypeError(f"{name} must hold numbers; got dtype {array.dtype}")
    return array.astype(np.float64, copy=False)


def finite_number(value, name, low, high=math.inf):
    """The float, or ValueError with the argument's name."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or \
            np.iscomplexobj(value) or not low <= (number := real(value, name)) <= \
            min(high, sys.float_info.max):
        raise ValueError(f"{name} must be a finite number in [{low}, {high}]; got {value!r:.60}")
    return number


def whole_number(value, name, least, most=2**63 - 1):
    """The int, or ValueError with the argument's name."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or \
            not least <= value <= most:
        bounds = f">= {least}" if most >= 2**63 - 1 else f"in [{least}, {most}]"
        raise ValueError(f"{name} must be a whole number {bounds}; got {value!r:.60}")
    return int(value)
