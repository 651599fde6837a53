"""verl's ``get_seqlen_balanced_partitions``."""
import numpy as np

from ..balancing import balance
from ..batch import integers
from ..sequences import _integer


def get_seqlen_balanced_partitions(seqlen_list, k_partitions, equal_size):
    """Split sequences into partitions whose sums of lengths are as equal as possible.

    The signature and the guarantees of verl's function: no partition is empty, indices within a
    partition ascend, and every caller that passes the same arguments gets the same answer, so each
    rank may compute it by itself.

    Minimises the largest sum over the partitions; with `equal_size` all partitions also have the
    same number of sequences.

    Parameters
    ----------
    seqlen_list : sequence of int, shape (n,)
        Lengths, or workloads, >= 0.
    k_partitions : int
        Number of partitions, 1 <= k_partitions <= n.
    equal_size : bool
        Every partition gets ``n / k_partitions`` sequences; n must be a multiple.

    Returns
    -------
    list of list of int
        ``k_partitions`` lists of indices.

    Raises
    ------
    TypeError
        An argument has the wrong type.
    ValueError
        Fewer sequences than partitions; n is no multiple of `k_partitions` with `equal_size`; a
        negative length.

    Notes
    -----
    The better of longest-first and Karmarkar-Karp differencing (both with the wanted counts), then
    search (see :func:`orchvlm.balance`): the largest sum is never above that of Karmarkar-Karp.
    No clock is involved.

    References
    ----------
    .. [1] Karmarkar, Karp, "The differencing method of set partitioning", 1982.

    Examples
    --------
    >>> from orchvlm.compat import get_seqlen_balanced_partitions
    >>> get_seqlen_balanced_partitions([8, 7, 6, 5, 4], 2, equal_size=False)
    [[0, 1], [2, 3, 4]]
    >>> get_seqlen_balanced_partitions([9, 1, 5, 5], 2, equal_size=True)
    [[0, 1], [2, 3]]
    """
    lengths = integers(seqlen_list, "seqlen_list")
    n = len(lengths)
    if n and lengths.min() < 0:
        raise ValueError(f"seqlen_list[{lengths.argmin()}] must be >= 0; got {lengths.min()}")
    k_partitions = _integer(k_partitions, "k_partitions")
    if k_partitions > n:
        raise ValueError(f"k_partitions must be between 1 and the number of sequences, {n}; "
                         f"got {k_partitions}")
    if equal_size and n % k_partitions != 0:
        raise ValueError(f"equal_size needs a multiple of k_partitions = {k_partitions} sequences; "
                         f"got {n}")
    each = n // k_partitions if equal_size else None
    # Differencing counts k/4 + 1 steps per sequence and may take half; the rest is for the search.
    work = n * (k_partitions + 4) + 600_000
    p = balance(lengths, k_partitions, min_items=each or 1, max_items=each, work_limit=work)
    return [part.tolist() for part in np.split(p.order, p.splits[1:-1])]
