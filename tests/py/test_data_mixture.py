"""Mixtures and packs: frequencies, order, and that a stopped run goes on as if it had not."""
import json
import os
import secrets
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from orchvlm import CommError, Inputs, comm, data

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", secrets.randbits(32)))


class Endless:
    def __getitem__(self, index):
        return f"endless {index}"


class Again:
    """Can be read again and again, from the start only, as tar shards can."""

    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return (f"again {k}" for k in range(self.n))


def sources():
    return [[f"list {k}" for k in range(7)], Endless(), Again(5)]


def test_weights_are_frequencies():
    print("seed", SEED)
    mixture = data.Mixture(sources(), [1, 2, 5], seed=SEED)
    seen = Counter(next(mixture).split()[0] for _ in range(8000))
    for name, share in (("list", 1 / 8), ("endless", 2 / 8), ("again", 5 / 8)):
        assert abs(seen[name] / 8000 - share) < 6 * np.sqrt(share * (1 - share) / 8000)


def test_every_pass_sees_every_sample_once():
    print("seed", SEED)
    mixture = data.Mixture([list(range(50))], seed=SEED)
    passes = [[next(mixture) for _ in range(50)] for _ in range(3)]
    assert all(sorted(one) == list(range(50)) for one in passes)
    assert passes[0] != passes[1] != passes[2] and passes[0] != list(range(50))
    ordered = data.Mixture([list(range(5))], shuffle=False)
    assert list(islice(ordered, 7)) == [0, 1, 2, 3, 4, 0, 1]


def test_the_order_is_pinned():
    """The same on every machine and for ever: runs are resumed on other machines."""
    assert list(islice(data.Mixture([list("abcdefgh")], seed=7), 8)) == list("gdeachfb")
    assert list(islice(data.Mixture([["a"], ["b"], ["c"]], [1, 1, 2], seed=7), 12)) == list(
        "caabcccccbca")


def test_seeds_differ():
    def first(seed):
        return list(islice(data.Mixture([list(range(30))], seed=seed), 30))
    assert first(1) == first(1) != first(2)


@pytest.mark.parametrize("stop", [0, 1, 17, 400])
def test_a_stopped_mixture_goes_on(stop):
    print("seed", SEED)
    whole = list(islice(data.Mixture(sources(), [1, 2, 5], seed=SEED), 500))
    before = data.Mixture(sources(), [1, 2, 5], seed=SEED)
    assert list(islice(before, stop)) == whole[:stop]
    state = json.loads(json.dumps(before.state_dict()))
    after = data.Mixture(sources(), [1, 2, 5], seed=SEED)
    after.load_state_dict(state)
    assert list(islice(after, 500 - stop)) == whole[stop:]


def test_generators_end_and_cannot_go_on():
    mixture = data.Mixture([iter("abc")])
    assert list(mixture) == ["a", "b", "c"] and mixture.state_dict()["parts"] == [3]
    other = data.Mixture([iter("abc")])
    other.load_state_dict(mixture.state_dict())
    with pytest.raises(data.DataError, match="cannot be read again"):
        next(other)


@pytest.mark.parametrize("arguments, error, words", [
    (([],), ValueError, "not empty"), (([[]],), data.DataError, "is empty"),
    (([3],), TypeError, "sequence or iterable"), (([[1]], [0]), ValueError, "above 0"),
    (([[1]], [1, 2]), ValueError, "1 finite numbers"), (([[1]], ["a"]), TypeError, "numbers"),
    (([[1], [2]], [1e308, 1e308]), ValueError, "finite"), (([[1]], None, 1.5), TypeError, "seed"),
    (([Again(0)],), data.DataError, "exhausted after 0")])
def test_mixtures_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        next(data.Mixture(*arguments))


def test_the_state_of_another_mixture_is_refused():
    mixture = data.Mixture([[1, 2], [3]], [1, 2])
    good = mixture.state_dict()
    for change in ({"seed": 9}, {"weights": [1, 1]}, {"sizes": [2, 2]}, {"parts": [0]},
                   {"parts": [1, 0]}, {"parts": [-1, 1]}, {"drawn": 3}):
        with pytest.raises(ValueError, match="state"):
            mixture.load_state_dict({**good, **change})
    with pytest.raises(ValueError, match="state of another mixture"):
        mixture.load_state_dict(None)


# ---------------------------------------------------------------- packs

class Lengths:
    """A processor whose samples are lengths; patches are half of them."""

    def one(self, n):
        if n < 0:
            raise data.DataError("broken")
        rows = max(1, n // 2)
        return Inputs(np.full(n, n), pixels=np.zeros((rows, 1)), grid_thw=[[1, 1, rows]])


def draws(seed, n=300):
    return np.random.default_rng(seed).integers(1, 40, n).tolist()


def loader(limit=None, **options):
    return data.Loader(data.Mixture([draws(SEED)], seed=3), Lengths(), 60, limit, **options)


def test_packs_keep_to_the_budget_and_lose_nothing():
    print("seed", SEED)
    order = list(islice(data.Mixture([draws(SEED)], seed=3), 300))
    for limit in (None, 25):
        packs, seen = loader(limit), []
        last = 10**9
        while len(seen) < 290:
            pack = next(packs)
            assert pack.n_tokens <= 60 and (limit is None or len(pack.pixels) <= limit)
            first = int(pack.lengths[0])
            assert last + first > 60 or limit is not None, "it would have fitted before"
            last = pack.n_tokens
            seen += pack.lengths.tolist()
        assert seen[:290] == order[:290]


@pytest.mark.parametrize("stop", [0, 1, 13])
def test_a_stopped_loader_goes_on(stop):
    print("seed", SEED)
    whole = [pack.lengths.tolist() for pack in islice(loader(), 30)]
    before = loader()
    for _ in range(stop):
        next(before)
    after = loader()
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert [pack.lengths.tolist() for pack in islice(after, 30 - stop)] == whole[stop:]


def test_samples_that_fit_nowhere():
    source = [5, 100, -1, 7]
    def packs(**options):
        return data.Loader(data.Mixture([source], shuffle=False), Lengths(), 12, **options)
    strict = packs()
    with pytest.raises(data.DataError, match="fits into no pack of 12"):
        next(strict)
    lenient = packs(too_long="skip")
    assert next(lenient).lengths.tolist() == [5, 7] and lenient.skipped == 2
    # The sample in waiting stands behind two more that were skipped.
    state = lenient.state_dict()
    assert next(lenient).lengths.tolist() == [5, 7]
    lenient.load_state_dict(state)
    assert next(lenient).lengths.tolist() == [5, 7]


def test_data_of_which_nothing_can_be_used_end():
    """They do not spin; a sample now and then that can be used is enough to go on."""
    packs = data.Loader(data.Mixture([[100]]), Lengths(), 12, too_long="skip")
    with pytest.warns(UserWarning, match="left out: a sample of 100 tokens"), \
            pytest.raises(data.DataError, match="1,000 samples in a row.*the last: a sample of"):
        next(packs)
    for ranks in (1, 2):
        with pytest.warns(UserWarning), pytest.raises(
                CommError, match="1,000 samples in a row cannot be used; the last here: a"):
            comm.run_threads(ranks, lambda group: next(data.RankLoader(
                data.Mixture([[100]]), Lengths(), 12, group, too_long="skip")))
        # A while without any that can be used is no end.
        rare = comm.run_threads(ranks, lambda group: next(data.RankLoader(
            data.Mixture([[100] * 100 + [5]], shuffle=False), Lengths(), 5, group,
            too_long="skip")))
        assert sum(pack.n_tokens for pack in rare) == 5
    rare = data.Loader(data.Mixture([[100] * 999 + [5]], shuffle=False), Lengths(), 5,
                       too_long="skip")
    with pytest.warns(UserWarning) as told:
        assert [next(rare).lengths.tolist() for _ in range(2)] == [[5], [5]]
    assert len(told) == 1 and rare.skipped >= 1998
    with pytest.raises(data.DataError, match=r"datasets\[1\] is empty: \(\)"):
        data.Mixture([[1], ()])


def test_the_last_pack_of_a_generator():
    packs = data.Loader(data.Mixture([iter([30, 20, 20])]), Lengths(), 60)
    assert [pack.lengths.tolist() for pack in packs] == [[30, 20], [20]]


@pytest.mark.parametrize("change, error", [
    ({"max_tokens": 0}, ValueError), ({"max_tokens": 1.5}, TypeError),
    ({"too_long": "x"}, ValueError), ({"max_patches": 0}, ValueError),
    ({"source": [1]}, TypeError), ({"processor": 3}, TypeError)])
def test_loaders_refused(change, error):
    fields = {"source": data.Mixture([[1]]), "processor": Lengths(), "max_tokens": 5, **change}
    with pytest.raises(error):
        data.Loader(**fields)


class Holed:
    """Texts of which every third cannot be read."""

    def __len__(self):
        return 10

    def __getitem__(self, k):
        if k % 3 == 1:
            raise data.DataError(f"text {k} is broken")
        return {"messages": [{"role": "user", "content": f"text {k}"},
                             {"role": "assistant", "content": "a" * (k + 1)}]}


def packs(kind, comm, n=8):
    processor = data.Processor(family="seed1_5_vl")
    source = data.Mixture([Holed(), Holed()], seed=SEED)
    made = data.Loader(source, processor, 90, too_long="skip") if kind == "one" else \
        data.RankLoader(source, processor, 90, comm, too_long="skip")
    ids = [sorted(tuple(one.input_ids) for one in (pack[k] for k in range(len(pack))))
           for pack in islice(made, n)]
    return ids, made.state_dict()


@pytest.mark.parametrize("ranks", (1, 2, 3))
def test_what_a_data_set_cannot_read_is_left_out(ranks):
    """By the loader that may, alike on any number of ranks; by the other it ends the run."""
    (wanted, state), = comm.run_threads(1, lambda group: packs("one", group))
    got = comm.run_threads(ranks, lambda group: packs("ranks", group))
    for k, pack in enumerate(wanted):
        assert sorted(sum((rank[0][k] for rank in got), [])) == pack
    assert state["skipped"] > 3 and all(rank[1] == state for rank in got)
    with pytest.raises(data.DataError, match="broken"):
        list(islice(data.Loader(data.Mixture([Holed()], seed=SEED),
                                data.Processor(family="seed1_5_vl"), 90), 9))
