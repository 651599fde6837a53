"""Mixing data sets by weight and packing their samples, so that a run can go on where it stopped.
"""
import hashlib
import math
import warnings
from inspect import signature

import numpy as np

from .._numbers import real
from ..inputs import Inputs
from .assets import DataError

MASK = 2**64 - 1
_MOST_RECENT = 1 << 16  # more than any step and what is read ahead of it
MOST_SKIPPED = 1000  # samples in a row: so many are no accident, but a wrong folder or format


def _mixed(*numbers):
    """64 bits from integers: the same on every machine, and for every version of NumPy."""
    text = ",".join(str(int(number)) for number in numbers).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def shuffled(n, *key):
    """A permutation of 0 .. n - 1 that depends on the key alone."""
    words = np.random.PCG64(np.random.SeedSequence([k & MASK for k in key])).random_raw(n)
    return np.argsort(words, kind="stable")


def count_samples(data):
    """How many different samples a data set has: its length, or what its ``n_samples()`` says;
    None where nobody knows."""
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, dict):
        return len(data)
    count = getattr(data, "n_samples", None)
    return count() if callable(count) else None


class _Part:
    """One data set of a mixture, and how far it has been read."""

    def __init__(self, data, number, seed, shuffle):
        self.data, self.number, self.seed = data, number, seed
        self.drawn = 0
        self.shuffle = shuffle
        self.indexed = hasattr(data, "__getitem__") and not isinstance(data, dict)
        if not self.indexed and not hasattr(data, "__iter__"):
            raise TypeError(f"datasets[{number}] must be a sequence or iterable of samples; got "
                            f"{type(data).__name__}")
        self.size = len(data) if self.indexed and hasattr(data, "__len__") else None
        if self.size == 0:
            raise DataError(f"datasets[{number}] is empty: {data!r:.200}")
        self._epoch, self._order, self._stream = None, None, None
        self._recent = {}  # of a stream: where the k-th sample drawn of it stands

    def next(self, read=True):
        k, self.drawn = self.drawn, self.drawn + 1
        if not self.indexed:
            return self._streamed(k)
        if not read:
            return None
        if self.size is None:
            return self.data[k]
        epoch, place = divmod(k, self.size)
        if not self.shuffle:
            return self.data[place]
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = shuffled(self.size, self.seed, self.number, epoch)
        return self.data[int(self._order[place])]

    def place(self, k, orders):
        """Index of the k-th sample drawn of it; ``orders`` keeps what was worked out."""
        if self.size is None:
            return k
        epoch, place = divmod(k, self.size)
        if not self.shuffle:
            return place
        if (self.number, epoch) not in orders:
            orders[self.number, epoch] = shuffled(self.size, self.seed, self.number, epoch)
        return int(orders[self.number, epoch][place])

    def name(self, k, orders):
        """Of the k-th sample drawn of it: file and line where the data set tells, else a number."""
        place = self.place(k, orders)
        tell = getattr(self.data, "where_of", None) if self.indexed else None
        where = tell(place) if callable(tell) else self._recent.get(k)
        return where or f"datasets[{self.number}][{place}]"

    def _streamed(self, k):
        try:
            return self._drawn(k)
        finally:
            self._recent[k] = getattr(self._stream, "where", None)
            self._recent.pop(k - _MOST_RECENT, None)

    def _drawn(self, k):
        if self._stream is None:  # from the start, or from where an earlier run stopped
            self._stream = self._opened(k)
        for again in range(2):
            for sample in self._stream:
                return sample
            if again:
                break
            if self._stream is self.data:  # a generator: there is no second pass
                self.drawn = k
                raise StopIteration
            self._stream = iter(self.data)
        raise DataError(f"datasets[{self.number}] is exhausted after {k} samples, and gives none "
                        "when it is read again")

    def _opened(self, skip):
        """What is left behind ``skip`` samples, over as many passes as that takes."""
        if skip and iter(self.data) is self.data:
            raise DataError(f"datasets[{self.number}] is an iterator, which cannot be read again "
                            f"to go on behind sample {skip}; give something that can")
        while True:
            stream, seen = iter(self.data), 0
            while seen < skip:
                try:
                    next(stream)
                except StopIteration:
                    break
                except DataError:  # it was drawn as well
                    pass
                seen += 1
            if seen == skip:
                return stream
            if not seen:
                raise DataError(f"datasets[{self.number}] is empty")
            skip -= seen


class Mixture:
    """Samples of several data sets, each drawn as often as its weight says.

    Parameters
    ----------
    datasets : list
        Sequences (shuffled anew in every pass), sequences without end (``tasks``: taken in order),
        or iterables that can be read again (tar shards: in order).
    weights : list of float, optional
        Relative frequencies, above 0; by default how many samples the data sets have (their
        lengths, or what a method ``n_samples`` of theirs says) where that is known of all, else
        equal.
    seed : int
        Every seed is another order.
    shuffle : bool
        Shuffle sequences.

    Raises
    ------
    TypeError
        A data set that is neither a sequence nor an iterable.
    ValueError
        No data set, weights that are not above 0 or of another number.

    Notes
    -----
    Which data set the k-th sample comes from depends on the seed and k alone, and which of its
    samples on how often it was drawn before: on no rank, no clock and no number of workers.
    :meth:`state_dict` holds k and the counts; loading it continues with the very next sample.

    Examples
    --------
    >>> import orchvlm
    >>> mixture = orchvlm.data.Mixture([["a", "b"], ["x"]], weights=[3, 1], seed=1)
    >>> first = [next(mixture) for _ in range(8)]
    >>> state = mixture.state_dict()
    >>> more = [next(mixture) for _ in range(8)]
    >>> mixture.load_state_dict(state)
    >>> more == [next(mixture) for _ in range(8)], sorted(set(first))
    (True, ['a', 'b', 'x'])
    """

    def __init__(self, datasets, weights=None, seed=0, shuffle=True):
        if not isinstance(datasets, (list, tuple)) or not datasets:
            raise ValueError("datasets must be a list that is not empty; got "
                             f"{type(datasets).__name__}")
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
            raise TypeError(f"seed must be an integer; got {type(seed).__name__}")
        self.seed = int(seed)
        self._parts = [_Part(data, k, self.seed, bool(shuffle)) for k, data in enumerate(datasets)]
        if weights is None:
            weights = self._by_length()
        try:
            self.weights = [real(weight, "weights") for weight in weights]
        except TypeError:
            raise TypeError(f"weights must be numbers; got {weights!r:.60}") from None
        if len(self.weights) != len(datasets) or not all(
                0 < weight < math.inf for weight in self.weights):
            raise ValueError(f"weights must be {len(datasets)} finite numbers above 0; got "
                             f"{self.weights}")
        whole = sum(self.weights)
        if not 0 < whole < math.inf:
            raise ValueError("the weights' sum must be finite")
        self._ends = np.cumsum(self.weights) / whole
        self.drawn = 0

    def _by_length(self):
        """Weights where none are given; of a single data set nobody counts."""
        sizes = [1] if len(self._parts) == 1 else [count_samples(p.data) for p in self._parts]
        if 0 in sizes:
            number = sizes.index(0)
            raise DataError(f"datasets[{number}] is empty: {self._parts[number].data!r:.200}")
        if None not in sizes:
            return sizes
        if any(sizes):
            number = sizes.index(None)
            warnings.warn(f"nobody knows how many samples datasets[{number}] has: all "
                          f"{len(sizes)} data sets are drawn equally often; weights say otherwise",
                          stacklevel=3)
        return [1] * len(sizes)

    def __iter__(self):
        return self

    def __next__(self):
        return self._draw(True)

    def skip(self):
        """Passes over the next sample, which is not read where its data set is a sequence; whether
        it can be used is for another one to find.

        Raises
        ------
        StopIteration
            There is none.
        """
        try:
            self._draw(False)
        except DataError:
            pass

    def _part(self, k):
        """Which data set the k-th sample is of."""
        share = _mixed(self.seed, k) / 2**64
        return min(int(np.searchsorted(self._ends, share, "right")), len(self._parts) - 1)

    def names(self, before, after):
        """Which samples were drawn between two states.

        Parameters
        ----------
        before, after : dict
            From :meth:`state_dict`.

        Returns
        -------
        list of str
            In the order in which they were drawn: file and line, or member, where the data set
            tells by a method ``where_of(index)``, or its stream by ``where``; of others
            ``datasets[1][7]``, and of what is read in one stream, the place in it.
        """
        drawn, names, orders = list(before["parts"]), [], {}
        for k in range(before["drawn"], after["drawn"]):
            part = self._part(k)
            names.append(self._parts[part].name(drawn[part], orders))
            drawn[part] += 1
        return names

    def _draw(self, read):
        part = self._parts[self._part(self.drawn)]
        try:
            sample = part.next(read)
        except DataError:  # of this one alone; all ranks go on with the one behind it
            self.drawn += 1
            raise
        self.drawn += 1
        return sample

    def state_dict(self):
        """What a later run needs to go on.

        Returns
        -------
        dict
            Of numbers and lists, fit for JSON.
        """
        return {"seed": self.seed, "weights": list(self.weights), "drawn": self.drawn,
                "parts": [part.drawn for part in self._parts],
                "sizes": [part.size for part in self._parts]}

    def load_state_dict(self, state):
        """Goes on where another mixture of the same data sets stopped.

        Parameters
        ----------
        state : dict
            From :meth:`state_dict`.

        Raises
        ------
        ValueError
            The state of another mixture: other data sets, weights or seed.
        """
        here = self.state_dict()
        for key in ("seed", "weights", "sizes"):
            if not isinstance(state, dict) or state.get(key) != here[key]:
                have = state.get(key) if isinstance(state, dict) else state
                raise ValueError(f"this is the state of another mixture: its {key} "
                                 f"{have!r:.60}, here {here[key]}")
        counts = state.get("parts")
        if not isinstance(counts, list) or len(counts) != len(self._parts) or not all(
                type(count) is int and count >= 0 for count in counts) or (
                    sum(counts) != state.get("drawn")):
            raise ValueError(f"the counts {counts!r:.60} of this state do not add up")
        for part, count in zip(self._parts, counts):
            part.drawn, part._stream = count, None
        self.drawn = state["drawn"]


class Loader:
    """Packs samples into :class:`orchvlm.Inputs` up to a budget of tokens.

    Parameters
    ----------
    source : Mixture
        Where samples come from.
    processor : Processor
        What makes inputs of them.
    max_tokens : int
        Tokens of a pack; whole samples are taken, in order, until the next does not fit.
    max_patches : int, optional
        Patches of a pack, besides.
    too_long : str
        ``"raise"`` or ``"skip"`` a sample that fits into no pack, and ones that cannot be used.

    Raises
    ------
    TypeError
        A source without state.
    ValueError
        A budget below 1, an unknown word for ``too_long``.

    Notes
    -----
    :attr:`skipped` counts the samples left out; a warning says what is wrong with the first, and a
    thousand in a row end it with what is wrong with the last.  The state is that of the source
    before the first sample of the next pack, so that a resumed run yields the very same packs.

    Examples
    --------
    >>> import orchvlm
    >>> from orchvlm import data
    >>> source = data.Mixture([data.Tasks(seed=0)])
    >>> loader = data.Loader(source, data.Processor(family="seed1_5_vl"), max_tokens=256)
    >>> next(loader).n_tokens <= 256
    True
    """

    def __init__(self, source, processor, max_tokens, max_patches=None, too_long="raise"):
        for name in ("__next__", "state_dict", "load_state_dict"):
            if not hasattr(source, name):
                raise TypeError(f"source must be a Mixture; got {type(source).__name__}")
        if not callable(getattr(processor, "one", None)):
            raise TypeError(f"processor must be a Processor; got {type(processor).__name__}")
        for name, value in (("max_tokens", max_tokens), ("max_patches", max_patches)):
            if name == "max_patches" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise TypeError(f"{name} must be an integer; got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be >= 1; got {value}")
        if too_long not in ("raise", "skip"):
            raise ValueError(f"too_long must be 'raise' or 'skip'; got {too_long!r}")
        self._source, self.processor = source, processor
        self.max_tokens, self.max_patches, self.too_long = max_tokens, max_patches, too_long
        self.skipped, self._told = 0, False
        # A processor that changes the pixels of what another makes knows nothing of files.
        self._how = {"encoded": True} if "encoded" in signature(processor.one).parameters else {}
        self._waiting = None                 # the sample that did not fit into the last pack
        self._state = source.state_dict()    # before it
        self._skipped_before = 0             # and how many were skipped up to there

    def __iter__(self):
        return self

    def __next__(self):
        dropped = 0
        while dropped < MOST_SKIPPED:
            pack = self._pack()
            used = self._usable(pack)
            if used:
                return Inputs.concatenate(used)
            dropped += len(pack)
        raise DataError(f"of {dropped:,} samples in a row no picture can be decoded")

    def _usable(self, pack):
        """The samples whose pictures can be decoded.  Others keep their room in the pack: what is
        in one depends on headers alone, so that it is the same where several ranks decode."""
        used = []
        for sample in pack:
            try:
                used.append(sample.decoded())
            except DataError as error:
                if self.too_long == "raise":
                    raise
                self._warn(error)
                self.skipped, self._skipped_before = self.skipped + 1, self._skipped_before + 1
        return used

    def _pack(self):
        """The samples of the next pack."""
        pack, tokens, patches = [], 0, 0
        while True:
            if self._waiting is None:
                self._waiting = self._next_fitting(bool(pack))
            if self._waiting is None:
                break
            new_tokens, new_patches = sample_extent(self._waiting)
            if pack and (tokens + new_tokens > self.max_tokens or self.max_patches is not None
                         and patches + new_patches > self.max_patches):
                break
            pack.append(self._waiting)
            self._waiting = None
            tokens, patches = tokens + new_tokens, patches + new_patches
        return pack

    def _next_fitting(self, may_end):
        """The next sample that fits an empty pack; None at the source's end, behind others."""
        in_a_row = 0
        while True:
            self._state, self._skipped_before = self._source.state_dict(), self.skipped
            try:
                return self._fitting(next(self._source))
            except StopIteration:
                if may_end:
                    return None
                raise
            except DataError as error:
                if self.too_long == "raise":
                    raise
                self._warn(error)
                self.skipped += 1
                in_a_row += 1
                if in_a_row == MOST_SKIPPED:
                    raise DataError(f"{in_a_row:,} samples in a row cannot be used; the last: "
                                    f"{error}") from None

    def _warn(self, error):
        """Says why the first sample is left out."""
        if not self._told:
            warnings.warn(f"a sample that cannot be used is left out: {error}", stacklevel=2)
            self._told = True

    def _fitting(self, sample):
        inputs = self.processor.one(sample, **self._how)
        tokens, patches = sample_extent(inputs)
        if tokens > self.max_tokens or patches > (self.max_patches or math.inf):
            raise DataError(f"a sample of {tokens} tokens and {patches} patches fits into no pack "
                            f"of {self.max_tokens} tokens"
                            + (f" and {self.max_patches} patches" if self.max_patches else ""))
        return inputs

    def state_dict(self):
        """What a later run needs to go on with the next pack.

        Returns
        -------
        dict
        """
        if self._waiting is None:
            return {"source": self._source.state_dict(), "skipped": self.skipped}
        return {"source": self._state, "skipped": self._skipped_before}

    def names(self, before, after):
        """Which samples were drawn between two states, those that were left out among them.

        Parameters
        ----------
        before, after : dict
            From :meth:`state_dict`.

        Returns
        -------
        list of str
            As :meth:`Mixture.names` has them.
        """
        return self._source.names(before["source"], after["source"])

    def load_state_dict(self, state):
        """Goes on where another loader of the same source stopped.

        Parameters
        ----------
        state : dict
            From :meth:`state_dict`.

        Raises
        ------
        ValueError
            The state of another source.
        """
        if not isinstance(state, dict) or type(state.get("skipped")) is not int:
            raise ValueError("not the state of a Loader: 'source' and 'skipped' are wanted")
        self._source.load_state_dict(state.get("source"))
        self.skipped, self._waiting = state["skipped"], None


def sample_extent(inputs):
    """(tokens, patches)"""
    return inputs.n_tokens, inputs.n_patches
