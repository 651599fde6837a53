"""Arrays that several ranks saved in pieces, put together again on any number of ranks."""
import numpy as np


def piece(first, n, shape):
    """How the place of a piece is saved: first element, their number, the shape of the whole."""
    return np.array([first, n, *shape], np.int64)


def _places(states):
    """{key: [(first, n, shape, state)]} of all arrays; whole ones need no place."""
    found = {}
    for state in states:
        for key in state:
            name, _, label = key.rpartition("/")
            if label == "piece" or key == "step":
                continue
            if f"{name}/piece" in state:
                first, n, *shape = np.asarray(state[f"{name}/piece"]).tolist()
            else:
                shape = np.shape(state[key])
                first, n = 0, int(np.prod(shape))
            found.setdefault(key, []).append((first, n, tuple(shape), state))
    return found


def joined(wanted, states, what):
    """Elements [first, first + n) of saved arrays, flat.

    Parameters
    ----------
    wanted : dict of str to (first, n, shape, dtype)
        By key, "NAME/LABEL"; also of arrays of which nothing is needed here.
    states : list of mapping
        What one or several ranks saved; arrays are read only where needed.
    what : str
        For messages.

    Returns
    -------
    dict

    Raises
    ------
    ValueError
        What is missing, surplus or mis-shaped, by name.
    """
    found = _places(states)
    odd = sorted(set(wanted) ^ set(found))
    if odd:
        raise ValueError(f"{what}: {odd[0]} is missing or surplus ({len(odd)} such)")
    return {key: _assembled(key, *place, found[key], what) for key, place in wanted.items()}


def _assembled(key, first, n, shape, dtype, pieces, what):
    for _, _, have, _ in pieces:
        if have != tuple(shape):
            raise ValueError(f"{what}: {key} has shape {have}; needed {tuple(shape)}")
    out, end = np.empty(n, dtype), first
    for start, count, _, state in sorted(pieces, key=lambda one: one[:2]):
        low, high = max(end, start), min(first + n, start + count)
        if start > end or low >= high:
            continue
        values = np.asarray(state[key]).reshape(-1)
        if len(values) != count:
            raise ValueError(f"{what}: {key} has {len(values)} elements of {count}")
        out[low - first:high - first] = values[low - start:high - start]
        end = high
    if end < first + n:
        raise ValueError(f"{what}: {key} is missing from element {end} on; give the states of all "
                         "ranks that saved one")
    return out
