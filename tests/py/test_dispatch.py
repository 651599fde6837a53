"""Dispatchers over threads and processes: rows that carry (rank, item, row), bit for bit."""
import os
import threading

import numpy as np
import pytest

import orchvlm
from conftest import forks
from orchvlm import Batch, BatchCost, Cluster, CommError, Dispatcher, Items, Route, SequenceCost

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", np.random.SeedSequence().entropy % 2**32))
print(f"ORCHVLM_TEST_SEED={SEED}")
run = orchvlm.comm.run_threads


def draw_plan(rng, n_ranks, groups, compose):
    """A plan of random samples, some without images, some ranks without samples."""
    n = int(rng.integers(1, 25))
    text = rng.integers(1, 20, n)
    taken = np.zeros(n, np.int64)
    phases = {}
    for name in ("vision", "audio")[:rng.integers(0, 3)]:
        sample = rng.integers(0, n, rng.integers(0, 30))
        out = rng.integers(0, 9, len(sample))
        positions = []
        for s, tokens in zip(sample, out):
            positions.append(int(taken[s]))
            taken[s] += tokens
        phases[name] = Items(sample=sample, position=positions, out_tokens=out,
                             length=rng.integers(0, 30, len(out)),
                             bytes=rng.integers(0, 999, len(out)), out_bytes_per_token=8)
    batch = Batch(text_tokens=text, target_tokens=text, phases=phases,
                  source_rank=rng.integers(0, max(1, n_ranks - 1), n))
    cluster = Cluster(1, n_ranks, 80e9, 1e15, 300e9, 25e9)
    longest = float((text + taken).max())
    llm = BatchCost(linear=1e-3) if not groups else SequenceCost(
        1e-6, 1e-3, memory_per_token=1.0, memory_limit=longest + 64, comm={1: 0.0, 2: 1e-5})
    costs = {**{name: BatchCost(linear=1e-3) for name in phases}, "llm": llm}
    return orchvlm.plan_step(batch, cluster, costs, compose=compose, work_limit=50, seed=0,
                             time_limit=None, pad_to=int(rng.integers(1, 4)) if groups else 1,
                             llm="sequence_parallel" if groups else "balance")


def rows_before(route, rank, width=3):
    """(rank, item, row) of every row that a rank holds, and a constant for wider rows."""
    rows = np.zeros((route.source_rows[rank], width))
    for p in np.flatnonzero(route.source == rank):
        at, n = route.send_row[p], route.n_rows[p]
        rows[at:at + n, 0], rows[at:at + n, 1] = rank, route.item[p]
        rows[at:at + n, 2] = route.first_row[p] + np.arange(n)
    return rows


def rows_after(route, rank, places=None, length=None):
    """The same of every row that it is to hold."""
    places = route.receive_row if places is None else places
    rows = np.zeros((route.destination_rows[rank] if length is None else length, 3))
    for p in np.flatnonzero(route.destination == rank):
        at, n = places[p], route.n_rows[p]
        rows[at:at + n, 0], rows[at:at + n, 1] = route.source[p], route.item[p]
        rows[at:at + n, 2] = route.first_row[p] + np.arange(n)
    return rows


def reach(route, places, rank):
    mine = route.destination == rank
    return int((places[mine] + route.n_rows[mine]).max(initial=0))


def follow(comm, step):
    """Every route of a plan at one rank, by itself and at once with the others."""
    dispatcher, trips = Dispatcher(comm, threads=1 + comm.rank % 2), []
    for name, route in step.routes.items():
        places = step.places.get(name)
        rows = None if places is None else reach(route, places, comm.rank) + 2
        way = dispatcher.prepare(route, places, rows)
        x, want = rows_before(route, comm.rank), rows_after(route, comm.rank, places, rows)
        for dtype in (np.float64, np.int32, np.float32):
            y = way.apply(x.astype(dtype))
            assert y.dtype == dtype
            np.testing.assert_array_equal(y, want)
        np.testing.assert_array_equal(way.reverse(y), x)
        # two arrays of other dtypes and shapes in one transfer, which others overlap
        trips.append((way.start([x.astype(np.int16), np.repeat(x, 4, 1).reshape(-1, 4, 3)]), want))
    for at in np.random.default_rng(comm.rank).permutation(len(trips)):
        first, second = trips[at][0].wait()
        np.testing.assert_array_equal(first, trips[at][1])
        np.testing.assert_array_equal(second, np.repeat(trips[at][1], 4, 1).reshape(-1, 4, 3))


@pytest.mark.parametrize("round_", range(8))
def test_plans(round_):
    rng = np.random.default_rng([SEED, round_])
    n_ranks = (1, 2, 4, 3, 2, 8, 4, 6)[round_]
    groups = round_ % 2 == 0
    run(n_ranks, follow, draw_plan(rng, n_ranks, groups, bool(rng.integers(2))))


def two_steps(comm, step, composed):
    dispatcher = Dispatcher(comm)
    for name in step.batch.phases:
        first, second = step.routes[f"{name}->source"], step.routes[f"{name}->llm"]
        features = np.random.default_rng([SEED, comm.rank]).random(
            (first.source_rows[comm.rank], 5)).astype(np.float32)
        by_way = dispatcher.prepare(second).apply(dispatcher.prepare(first).apply(features))
        for route in (first.compose(second), composed.routes[f"{name}->llm"]):
            way = dispatcher.prepare(route)
            at_once = way.apply(features)
            assert at_once.tobytes() == by_way.tobytes()
            assert way.reverse(at_once).tobytes() == features.tobytes()


@pytest.mark.parametrize("round_", range(4))
def test_composed_is_two_steps(round_):
    """Straight from the encoder to the tokens' ranks: the bits that go by way of the source."""
    rng = np.random.default_rng([SEED, 100, round_])
    step = draw_plan(rng, (2, 4, 8, 4)[round_], round_ % 2 == 1, False)
    options = {**step._options, "compose": True}
    composed = orchvlm.StepPlan._restore(
        step._problem()[0], options, step._decisions(), step._sequence_fields,
        [before for name, (before, _) in step.traffic.items() if "->source" not in name],
        [(r.before, r.value, r.bound, r.status == "optimal", r.cut_short, r.work)
         for r in step.relabelling.values()], step.cut_short)
    run(step.cluster.n_gpus, two_steps, step, composed)


# ---------------------------------------------------------------- items of several widths

def send_bytes(comm, route, sizes, blobs):
    """Every item's bytes where its rows go."""
    way = Dispatcher(comm).prepare(route.in_bytes(sizes))
    held = [p for p in np.lexsort((route.send_row, route.source)) if route.source[p] == comm.rank]
    got = way.apply(np.frombuffer(b"".join(blobs[route.item[p]] for p in held), np.uint8))
    wanted = [p for p in range(len(route)) if route.destination[p] == comm.rank]
    assert got.tobytes() == b"".join(blobs[route.item[p]] for p in wanted)
    np.testing.assert_array_equal(
        way.reverse(got), np.frombuffer(b"".join(blobs[route.item[p]] for p in held), np.uint8))


@pytest.mark.parametrize("round_", range(4))
def test_raw_items_of_any_size(round_):
    """One of them larger than all others together."""
    rng = np.random.default_rng([SEED, 200, round_])
    step = draw_plan(rng, 4, False, True)
    for items in step.batch.phases.values():
        sizes = rng.integers(0, 500, len(items.length))
        if len(sizes):
            sizes[rng.integers(len(sizes))] = 700_001
        name = next(n for n, i in step.batch.phases.items() if i is items)
        run(4, send_bytes, step.routes[name], sizes, [rng.bytes(int(s)) for s in sizes])


def test_bytes_that_do_not_divide_travel_whole():
    split = Route([0, 0], [0, 1], [1, 1], [0, 0], [0, 1], [0, 1], [0, 0], 2)
    assert split.in_bytes([6]).counts.tolist() == [[3, 3], [0, 0]]
    with pytest.raises(ValueError, match=r"item_bytes\[0\] is 7 for 2 rows that travel in pieces"):
        split.in_bytes([7])
    with pytest.raises(ValueError, match="carries item 0 of 0"):
        split.in_bytes([])
    with pytest.raises(TypeError, match="item_bytes must hold integers"):
        split.in_bytes([6.5])


# ---------------------------------------------------------------- rows that go to several places

def draw_spread(rng, n_ranks):
    columns, source_rows = [], rng.integers(1, 9, n_ranks)
    for rank in range(n_ranks):
        received = 0
        for _ in range(rng.integers(0, 8)):
            source = int(rng.integers(n_ranks))
            at = int(rng.integers(source_rows[source]))
            n = int(rng.integers(1, source_rows[source] - at + 1))
            columns.append((source, at, n, source, rank, at, received))
            received += n
    return Route(*np.array(columns, np.int64).reshape(-1, 7).T, n_ranks, source_rows=source_rows)


def add_up(comm, route, gradients):
    way = Dispatcher(comm, threads=2).prepare(route)
    y = way.apply(rows_before(route, comm.rank))
    np.testing.assert_array_equal(y, rows_after(route, comm.rank))
    uses = np.zeros(way.source_rows, int)
    for p in np.flatnonzero(route.source == comm.rank):
        uses[route.send_row[p]:route.send_row[p] + route.n_rows[p]] += 1
    assert way.sums == bool((uses > 1).any())
    for dtype in (np.float32, np.float64):
        want = np.zeros((route.source_rows[comm.rank], 6), dtype)
        seen = np.zeros(len(want), bool)
        for p in np.flatnonzero(route.source == comm.rank):  # in the route's order
            rows = gradients[route.destination[p]].astype(dtype)
            for r in range(route.n_rows[p]):
                at, row = route.send_row[p] + r, rows[route.receive_row[p] + r]
                want[at] = want[at] + row if seen[at] else row
                seen[at] = True
        mine = gradients[comm.rank].astype(dtype)
        assert way.reverse(mine).tobytes() == want.tobytes()
        assert way.start_reverse([mine, mine]).wait()[1].tobytes() == want.tobytes()


@pytest.mark.parametrize("round_", range(6))
def test_sums_in_the_order_of_the_route(round_):
    rng = np.random.default_rng([SEED, 300, round_])
    route = draw_spread(rng, (1, 2, 3, 4, 5, 3)[round_])
    gradients = [rng.standard_normal((rows, 6)) * 10.0**rng.integers(-6, 6, (rows, 6))
                 for rows in route.destination_rows]
    run(route.n_ranks, add_up, route, gradients)


def test_spread_routes():
    """Row 0 goes to both ranks, row 1 to none."""
    route = Route([0, 0], [0, 0], [1, 1], [0, 0], [0, 1], [0, 0], [0, 0], 2, source_rows=[2, 0])
    assert route.source_rows.tolist() == [2, 0] and route.counts.tolist() == [[1, 1], [0, 0]]
    arrays = [np.array([7, 8]), np.zeros(0, int)]
    assert [rows.tolist() for rows in route.apply(arrays)] == [[7], [7]]
    for what, call in (("inverse", route.invert), ("composition", lambda: route.compose(route)),
                       ("bytes", lambda: route.in_bytes([1]))):
        with pytest.raises(ValueError, match=f"no {what}: its rows may leave several times"):
            call()
    assert route != Route([0, 0], [0, 0], [1, 1], [0, 0], [0, 1], [0, 0], [0, 0], 2,
                          source_rows=[3, 0])
    for rows, message in (([0, 0], "leaves from row 0, with 1 rows, of 0"), ([2], "2 elements")):
        with pytest.raises(ValueError, match=message):
            Route([0, 0], [0, 0], [1, 1], [0, 0], [0, 1], [0, 0], [0, 0], 2, source_rows=rows)


def test_bfloat16_is_added_in_float32():
    """Both rows that arrive came from row 0; row 1 stays behind."""
    route = Route([0, 0], [0, 0], [1, 1], [0, 0], [0, 0], [0, 0], [0, 1], 1, source_rows=[2])
    half = np.array([[0x3F80, 0xC049], [0x3B81, 0x4049]], np.uint16)  # 1, -pi; 0.0039, pi

    def work(comm):
        way = Dispatcher(comm).prepare(route)
        with pytest.raises(ValueError, match="float32, float64 or bfloat16; got uint8"):
            way.reverse(half)
        with pytest.raises(ValueError, match="dtype must be 'bfloat16' or left out; got 'float16'"):
            way.reverse(half, dtype="float16")
        return way.reverse(half, dtype="bfloat16")

    sums = (half.astype(np.uint32) << 16).view(np.float32).sum(0).view(np.uint32)
    rounded = (sums + 0x7FFF + (sums >> 16 & 1)) >> 16  # to nearest even
    assert run(1, work)[0].tolist() == [rounded.tolist(), [0, 0]]


# ---------------------------------------------------------------- arguments, failures, memory

SWAP = Route([1, 0], [0, 0], [1, 1], [1, 0], [0, 1], [0, 0], [0, 0], 2)
STAY = Route([0, 0], [0, 1], [2, 1], [0, 0], [0, 0], [0, 2], [0, 2], 1)


def alone(fn):
    """On one rank, which sends 3 rows to itself, row 2 to row 3 of 4."""
    run(1, lambda comm: fn(Dispatcher(comm).prepare(STAY, [0, 3], 4)))


def test_rows_where_nothing_arrives():
    def work(way):
        assert (way.source_rows, way.destination_rows, way.stay) == (3, 4, 3)
        assert (way.sent, way.received, way.sums) == (0, 0, False)
        assert "3 rows to 4, 0 sent, 0 received, 3 stay" in repr(way)
        assert way.apply(np.array([5, 6, 7])).tolist() == [5, 6, 0, 7]
        out = np.full(4, 9)
        assert way.apply(np.array([5, 6, 7]), out=out) is out and out.tolist() == [5, 6, 9, 7]
        outs = [np.full(4, 9), np.full((4, 0), 1.0)]
        got = way.apply([np.array([5, 6, 7]), np.zeros((3, 0))], out=outs)
        assert got[0] is outs[0] and got[1] is outs[1] and outs[0].tolist() == [5, 6, 9, 7]
        assert way.reverse(np.array([1, 2, 3, 4])).tolist() == [1, 2, 4]
        assert way.apply([]) == []
        trip = way.start(np.array([5, 6, 7])[::1])
        assert trip.wait() is trip.wait()
        assert way.apply(np.arange(6).reshape(2, 3).T).tolist() == [[0, 3], [1, 4], [0, 0], [2, 5]]
    alone(work)


@pytest.mark.parametrize("arrays, out, error, message", [
    (np.zeros(4), None, ValueError, r"arrays must have 3 rows; got shape \(4,\)"),
    ([np.zeros(3), np.zeros(2)], None, ValueError, r"arrays\[1\] must have 3 rows"),
    (np.float64(1), None, ValueError, "at least one dimension"),
    (np.array(["a", "b", "c"]), None, TypeError, "array of numbers"),
    (np.ma.array([1, 2, 3], mask=[0, 1, 0]), None, TypeError, "masked"),
    (np.zeros(3), np.zeros(3), ValueError, r"out must be .* of shape \(4,\)"),
    (np.zeros(3), np.zeros(4, np.float32), TypeError, "out must be an array of float64"),
    (np.zeros((3, 2)), np.zeros((4, 3)), ValueError, r"of shape \(4, 2\)"),
    (np.zeros((3, 2)), np.zeros((2, 4)).T, ValueError, "C-contiguous"),
    (np.zeros(3), [np.zeros(4)], TypeError, "got list"),
    ([np.zeros(3)], [np.zeros(4)] * 2, ValueError, "out must be 1 arrays; got 2"),
    (BUFFER := np.zeros(7), None, ValueError, "3 rows"),
    (BUFFER[:3], BUFFER[2:6], ValueError, "out overlaps an array that is sent"),
])
def test_refused_arrays(arrays, out, error, message):
    def work(way):
        with pytest.raises(error, match=message):
            way.apply(arrays, out)
    alone(work)


def test_refused_preparations():
    with pytest.raises(TypeError, match="comm must be an orchvlm.comm.Comm; got NoneType"):
        Dispatcher(None)
    with pytest.raises(TypeError, match="comes from Dispatcher.prepare"):
        orchvlm.Dispatch(None, None)

    def work(comm):
        dispatcher = Dispatcher(comm)
        for arguments, error, message in (
                ((SWAP,), ValueError, "route has 2 ranks; comm has 1"),
                ((None,), TypeError, "route must be a Route; got NoneType"),
                ((STAY, [0]), ValueError, "places must have 2 elements; got 1"),
                ((STAY, [0.5, 3]), TypeError, "places must hold integers"),
                ((STAY, [0, 1]), ValueError, r"place\[1\] is 1; places ascend"),
                ((STAY, [0, 4], 4), ValueError, "rows before and 4 after; the route takes 3 and 5"),
                ((STAY, None, -1), ValueError, "destination_rows")):
            with pytest.raises(error, match=message):
                dispatcher.prepare(*arguments)
        for threads in (-1, 2000):
            with pytest.raises(ValueError, match="threads"):
                Dispatcher(comm, threads)
    run(1, work)


def test_a_rank_that_fails_or_has_another_route():
    def fail(comm):
        way = Dispatcher(comm).prepare(SWAP)
        return way.apply(np.zeros(1 + comm.rank))

    with pytest.raises(CommError, match="rank 1 failed: ValueError: arrays must have 1 rows"):
        run(2, fail, silent_s=5)

    def differ(comm):
        other = Route([0, 1], [0, 0], [1, 1], [0, 1], [0, 1], [0, 0], [0, 0], 2)
        Dispatcher(comm).prepare(SWAP if comm.rank else other).apply(np.zeros(1))

    with pytest.raises(CommError):
        run(2, differ, silent_s=5)


def test_dropped_and_closed_trips():
    """Arrays and scratch outlive a transfer that nobody waits for."""
    def drop(comm):
        way = Dispatcher(comm).prepare(SWAP)
        for _ in range(20):
            way.start(np.full((1, 5000), comm.rank))
        kept = way.start(np.full(1, comm.rank))
        del way
        assert kept.wait()[0] == 1 - comm.rank
        return kept

    for trip in run(2, drop):
        trip.wait()  # it was waited for

    def close(comm):
        trip = Dispatcher(comm).prepare(SWAP).start(np.zeros(1))
        trip.wait()
        late = Dispatcher(comm).prepare(SWAP).start(np.zeros(1))
        comm.barrier()
        comm.close()
        with pytest.raises(ValueError, match="closed"):
            late.wait()
    run(2, close)


def test_one_thread_at_a_time():
    """A communicator in use refuses; a dup and a dispatcher of its own do not."""
    def work(comm):
        second, errors = comm.dup(), []

        def prefetch():
            try:
                way = Dispatcher(second).prepare(SWAP)
                for k in range(50):
                    assert way.apply(np.array([k + comm.rank])) == k + 1 - comm.rank
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=prefetch)
        thread.start()
        way = Dispatcher(comm).prepare(SWAP)
        for k in range(50):
            assert way.apply(np.array([-k - comm.rank])) == -k - (1 - comm.rank)
        thread.join()
        assert not errors
    run(2, work)


def test_the_core_refuses_junk():
    """Private calls with one argument spoilt: an exception, or a transfer that is right."""
    rng = np.random.default_rng([SEED, 500])
    junk = [None, -1, 2**70, 0.5, "x", (), (None,), (np.zeros(3),), (np.zeros((3, 2)),), [],
            object(), (np.zeros(3, ">f8"),), (np.array([None] * 3),), (np.zeros(8)[::2][:3],),
            (np.float64(1),), (np.zeros(12, np.int8)[1:9].view(np.float32)[:2],),
            (np.zeros((3, 0)),)]

    def work(way):
        core, comm = way._core, way._comm._core
        locked = np.zeros(4)
        locked.flags.writeable = False
        for _ in range(2000):
            good = [comm, (np.arange(3.0),), (np.zeros(4),), 0, False, bool(rng.integers(2))]
            at = rng.integers(len(good))
            good[at] = junk[rng.integers(len(junk))] if rng.integers(9) else (locked,)
            try:
                done = core.move(*good)
                if done is not None:
                    core.wait(comm, done)
            except (TypeError, ValueError):
                continue
            assert at > 2 or good[2][0].shape[1:] == good[1][0].shape[1:]
        for arguments in ((), (comm,), (comm, None), (None, None), (comm, comm)):
            with pytest.raises((TypeError, ValueError)):
                core.wait(*arguments)
    alone(work)


def exchange(comm, route, seed):
    rows = np.random.default_rng([seed, comm.rank]).random((route.source_rows[comm.rank], 300))
    way = Dispatcher(comm, threads=2).prepare(route)
    assert way.reverse(way.apply(rows)).tobytes() == rows.tobytes()
    return way.start(rows).wait()


@forks
def test_processes():
    step = draw_plan(np.random.default_rng([SEED, 400]), 3, False, True)
    route = step.routes["text"]
    got = orchvlm.comm.run_processes(3, exchange, route, SEED, start="fork")
    want = route.apply([np.random.default_rng([SEED, r]).random((route.source_rows[r], 300))
                        for r in range(3)])
    for a, b in zip(got, want, strict=True):
        assert a.tobytes() == b.tobytes()
