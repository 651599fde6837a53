"""Routes on arrays whose rows carry their own name: (item, row)."""
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import orchvlm

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", np.random.SeedSequence().entropy % 2**32))
print(f"seed {SEED}")


def layout(rng, lengths, n_ranks, whole):
    """The same rows held in another way: one (item, row) array per rank."""
    held = [[] for _ in range(n_ranks)]
    pieces = []
    for item, length in enumerate(lengths):
        cuts = [0, length] if whole else sorted({0, length, *rng.integers(0, length + 1, 3)})
        pieces += [(item, a, b) for a, b in zip(cuts, cuts[1:]) if b > a]
    for p in rng.permutation(len(pieces)):
        item, a, b = pieces[p]
        held[rng.integers(n_ranks)] += [(item, row) for row in range(a, b)]
    return [np.array(rows, np.int64).reshape(-1, 2) for rows in held]


def route_between(before, after, n_ranks):
    """One piece per row, from the definition."""
    where = {tuple(name): (rank, row) for rank, rows in enumerate(before)
             for row, name in enumerate(rows)}
    pieces = [(*name, 1, *where[tuple(name)][:1], rank, where[tuple(name)][1], row)
              for rank, rows in enumerate(after) for row, name in enumerate(rows)]
    columns = np.array(pieces, np.int64).reshape(-1, 7).T
    return orchvlm.Route(*columns, n_ranks)


def same(left, right):
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("round_", range(40))
def test_composed_equals_one_after_the_other(round_):
    rng = np.random.default_rng([SEED, round_])
    n_ranks = int(rng.integers(1, 17))
    lengths = rng.integers(0, 9, rng.integers(0, 30))
    x, y, z = (layout(rng, lengths, n_ranks, whole) for whole in (True, round_ % 2, False))
    first, second = route_between(x, y, n_ranks), route_between(y, z, n_ranks)
    both = first.compose(second)
    assert same(first.apply(x), y)
    assert same(both.apply(x), second.apply(first.apply(x)))
    assert same(both.apply(x), z)
    assert same(both.invert().apply(z), x)
    assert both.invert().invert() == both
    identity = both.compose(both.invert())
    assert same(identity.apply(x), x)
    assert np.array_equal(identity.source, identity.destination)
    third = route_between(z, x, n_ranks)
    left, right = first.compose(second).compose(third), first.compose(second.compose(third))
    assert same(left.apply(x), right.apply(x))


def test_counts_are_what_moves():
    rng = np.random.default_rng(SEED)
    x, y = (layout(rng, [5, 3, 8, 1], 4, False) for _ in range(2))
    route = route_between(x, y, 4)
    counted = np.zeros((4, 4), np.int64)
    where = {tuple(name): rank for rank, rows in enumerate(x) for name in rows}
    for rank, rows in enumerate(y):
        for name in rows:
            counted[where[tuple(name)], rank] += 1
    assert np.array_equal(route.counts, counted)
    for rank in range(4):
        assert np.array_equal(route.send_counts(rank), counted[rank])
        assert np.array_equal(route.receive_counts(rank), counted[:, rank])
    assert np.array_equal(route.source_rows, counted.sum(1))
    assert np.array_equal(route.destination_rows, counted.sum(0))


def test_apply_moves_any_dtype_and_trailing_shape():
    route = orchvlm.Route([0, 1], [0, 0], [2, 1], [1, 0], [0, 0], [0, 0], [0, 2], 2)
    for dtype in (np.float32, np.int8, "S3"):
        arrays = [np.ones((1, 2, 3), dtype), np.zeros((2, 2, 3), dtype)]
        out = route.apply(arrays)
        assert [a.shape for a in out] == [(3, 2, 3), (0, 2, 3)] and out[0].dtype == arrays[0].dtype


def test_apply_refuses_wrong_arrays():
    route = orchvlm.Route([0], [0], [2], [1], [0], [0], [0], 2)
    with pytest.raises(ValueError, match="one per rank, 2; got 1"):
        route.apply([np.zeros(0)])
    with pytest.raises(ValueError, match=r"arrays\[1\] must have 2 rows"):
        route.apply([np.zeros(0), np.zeros(3)])
    with pytest.raises(ValueError, match=r"arrays\[1\] has rows"):
        route.apply([np.zeros((0, 4)), np.zeros((2, 3))])
    with pytest.raises(ValueError, match=r"arrays\[0\] must have 0 rows"):
        route.apply([np.float64(1), np.zeros(2)])


@pytest.mark.parametrize("damage, message", [
    ({"destination": [0, 5]}, "ranks are 0 to 1"),
    ({"n_rows": [1, 0]}, "0 rows"),
    ({"receive_row": [0, 2]}, "row 1 is next"),
    ({"send_row": [0, 1]}, "leaves from row"),
    ({"send_row": [0, -1]}, "leaves from row -1"),
    ({"first_row": [0, -3]}, "first row -3"),
    ({"item": [0, -1]}, "item -1"),
    ({"n_ranks": 0}, "n_ranks >= 1"),
    ({"source": [0]}, "source must have 2 elements"),
])
def test_bad_routes_are_refused(damage, message):
    good = dict(item=[0, 1], first_row=[0, 0], n_rows=[1, 1], source=[0, 1], destination=[0, 0],
                send_row=[0, 0], receive_row=[0, 1], n_ranks=2)
    orchvlm.Route(**good)
    with pytest.raises(ValueError, match=message):
        orchvlm.Route(**{**good, **damage})
    with pytest.raises(TypeError, match="item must hold integers"):
        orchvlm.Route(**{**good, "item": [0.0, 1.0]})


def test_routes_that_do_not_meet():
    a = orchvlm.Route([0], [0], [2], [0], [1], [0], [0], 2)
    with pytest.raises(ValueError, match="do not compose"):
        a.compose(a)
    other_item = orchvlm.Route([1], [0], [2], [1], [0], [0], [0], 2)
    with pytest.raises(ValueError, match="do not compose"):
        a.compose(other_item)
    with pytest.raises(ValueError, match="2 ranks, then 3"):
        a.compose(orchvlm.Route([0], [0], [2], [1], [0], [0], [0], 3))
    with pytest.raises(TypeError, match="must be a Route"):
        a.compose("b")


def test_a_route_of_nothing():
    nothing = orchvlm.Route([], [], [], [], [], [], [], 3)
    assert nothing.compose(nothing.invert()) == nothing and len(nothing) == 0
    assert [len(a) for a in nothing.apply([np.zeros((0, 2))] * 3)] == [0, 0, 0]
    assert "0 rows" in repr(nothing) and "<table>" in nothing._repr_html_()


COLUMN = st.lists(st.one_of(st.integers(-2, 5), st.sampled_from([2**62, -2**63, 2**63 - 1])),
                  min_size=2, max_size=2)


@settings(max_examples=300, deadline=None)
@given(columns=st.lists(COLUMN, min_size=7, max_size=7), n_ranks=st.integers(-1, 4))
def test_any_integers_make_a_route_or_an_error(columns, n_ranks):
    try:
        route = orchvlm.Route(*columns, n_ranks)
    except ValueError:
        return
    if route.n_rows.sum() < 100:
        arrays = [np.arange(rows) for rows in route.source_rows]
        assert same(route.invert().apply(route.apply(arrays)), arrays)
