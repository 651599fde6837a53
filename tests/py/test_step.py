"""Step plans on random batches: every row simulated on arrays that carry its name, both modes."""
import os

import numpy as np
import pytest

import orchvlm
from orchvlm import reports

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", np.random.SeedSequence().entropy % 2**32))
print(f"seed {SEED}")
ROUNDS = range(24)


def draw_items(rng, n, taken, many):
    """Items of one phase at free positions; `taken` holds each sample's next free token."""
    k = int(rng.integers(0, many * n + 1)) if n else 0
    sample = rng.integers(0, n, k) if n else np.zeros(0, np.int64)
    out = rng.integers(0, 9, k)
    position = np.zeros(k, np.int64)
    for i in rng.permutation(k):
        position[i] = taken[sample[i]] + rng.integers(0, 3)
        taken[sample[i]] = position[i] + out[i]
    return sample, position, rng.integers(0, 20, k), out, rng.integers(0, 5000, k)


def draw_batch(rng, n_ranks, least_text=0):
    n = int(rng.integers(0, 6 * n_ranks))
    taken = np.zeros(n, np.int64)
    drawn = [draw_items(rng, n, taken, many) for many in (2, 1, 0)]
    in_items = np.zeros(n, np.int64)
    phases = {}
    for name, (sample, position, length, out, size) in zip(("vision", "audio", "smell"), drawn):
        np.add.at(in_items, sample, out)
        squares = rng.random(len(sample)) * 50 if rng.integers(2) else None
        phases[name] = orchvlm.Items(sample, position, length, out, size, squares,
                                     out_bytes_per_token=float(rng.integers(0, 100)))
    text = taken - in_items + rng.integers(least_text, 30, n)
    source = rng.integers(0, n_ranks, n) if rng.integers(3) else np.zeros(n, np.int64)
    return orchvlm.Batch(text, text, source, phases)


def draw_cost(rng, padded=True):
    names = ["linear", "quadratic", "per_item", "fixed"]
    names += ["padded_linear", "padded_quadratic"] * padded
    return orchvlm.BatchCost(**{name: float(rng.random()) * bool(rng.integers(2))
                                for name in names})


def draw_problem(rng, groups, padded=True):
    per_node = int(rng.choice([1, 2, 4, 8]))
    nodes = int(rng.integers(1, 17 // per_node + 1))
    n_ranks = nodes * per_node
    batch = draw_batch(rng, n_ranks, least_text=1 if groups else 0)
    cluster = orchvlm.Cluster(nodes, per_node, 1000.0, 1e12, 1e6, 1e5)
    costs = {name: draw_cost(rng, padded) for name in batch.phases}
    longest = int(batch.language_lengths.max(initial=1))
    memory = {}
    if groups:
        degrees = [d for d in (1, 2, 3, 4, 8, 16) if d <= n_ranks]
        room = max(longest, int(batch.language_lengths.sum() / n_ranks / rng.integers(1, 4)))
        pad_to = int(rng.integers(1, 5))
        costs["llm"] = orchvlm.SequenceCost(
            quadratic=1e-3, linear=1e-2, fixed=.05, comm={d: 1e-3 * (d > 1) for d in degrees},
            memory_per_token=1.0, memory_limit=room + 16 * pad_to)
        options = {"llm": "sequence_parallel", "pad_to": pad_to}
    else:
        costs["llm"], options = draw_cost(rng, padded), {}
        if rng.integers(2):
            memory["llm"] = (1000.0 / (longest + int(rng.integers(0, 40))), 0.0)
    for name, items in batch.phases.items():
        if rng.integers(2):
            room = int(items.length.max(initial=1)) + int(rng.integers(0, 30))
            memory[name] = (900.0 / room, 100.0)
    options |= {"memory": memory, "compose": bool(rng.integers(2)),
                "relabel": [None, "sum", "minmax"][rng.integers(3)],
                "slack": [None, 0.002, 0.5][rng.integers(3)], "seed": int(rng.integers(100)),
                "work_limit": int(rng.choice([0, 1000])), "time_limit": None}
    return batch, cluster, costs, options


def plans(rng, groups, **more):
    batch, cluster, costs, options = draw_problem(rng, groups)
    return batch, cluster, options, orchvlm.plan_step(batch, cluster, costs, **options, **more)


def rows_at_source(n_ranks, rank, counts):
    """Rows (item, row) of whole items at each rank, in the order of the items."""
    held = [[] for _ in range(n_ranks)]
    for item, count in enumerate(counts):
        held[rank[item]] += [(item, row) for row in range(count)]
    return [np.array(rows, np.int64).reshape(-1, 2) for rows in held]


def groups_of(step):
    """(first rank, degree, samples) of every group, by micro-batch."""
    if isinstance(step.llm, orchvlm.SequencePlan):
        return [(g.first_gpu, g.degree, g.items) for m in step.llm.micro_batches for g in m.groups]
    return [(rank, 1, np.flatnonzero((step.llm.rank == rank) & (step.llm.micro_batch == m)))
            for m in range(step.llm.micro_batches) for rank in range(step.cluster.n_gpus)]


def token_axes(step, pad_to):
    """Per rank, what stands at each token: (phase or "text", item, row), or None for padding."""
    batch = step.batch
    axes = [[] for _ in range(step.cluster.n_gpus)]
    for first, degree, samples in groups_of(step):
        packed = []
        for sample in samples:
            tokens = [None] * int(batch.language_lengths[sample])
            for name, items in batch.phases.items():
                for k in np.flatnonzero(items.sample == sample):
                    for row in range(items.out_tokens[k]):
                        tokens[items.position[k] + row] = (name, int(k), row)
            row = 0
            for at, token in enumerate(tokens):
                if token is None:
                    tokens[at] = ("text", int(sample), row)
                    row += 1
            packed += tokens
        shard = -(-len(packed) // (degree * pad_to)) * pad_to
        cuts = [len(packed) * q // degree for q in range(degree + 1)]
        for q, (begin, end) in enumerate(zip(cuts, cuts[1:])):
            axes[first + q] += packed[begin:end] + [None] * (shard - (end - begin))
    return axes


def expected_arrivals(axes, kind):
    return [np.array([token[1:] for token in axis if token and token[0] == kind],
                     np.int64).reshape(-1, 2) for axis in axes]


def same(left, right):
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("round_", ROUNDS)
def test_every_row_arrives_where_its_token_is(round_, groups):
    rng = np.random.default_rng([SEED, round_, groups])
    batch, cluster, options, step = plans(rng, groups)
    n_ranks = cluster.n_gpus
    axes = token_axes(step, options.get("pad_to", 1))
    text = rows_at_source(n_ranks, batch.source_rank, batch.text_tokens)
    assert same(step.routes["text"].apply(text), expected_arrivals(axes, "text"))
    for name, items in batch.phases.items():
        plan, home = step.phases[name], batch.source_rank[items.sample]
        raw = rows_at_source(n_ranks, home, items.length)
        arrived = step.routes[name].apply(raw)
        order = np.lexsort((np.arange(len(items)), items.out_tokens > 0, items.position,
                            items.sample, plan.micro_batch))
        encoded = []
        for rank in range(n_ranks):
            mine = [k for k in order if plan.rank[k] == rank]
            wanted = [(k, row) for k in mine for row in range(items.length[k])]
            assert arrived[rank].tolist() == [list(pair) for pair in wanted]
            encoded.append(np.array([(k, row) for k in mine for row in range(items.out_tokens[k])],
                                    np.int64).reshape(-1, 2))
        if not options["compose"]:
            encoded = step.routes[f"{name}->source"].apply(encoded)
            assert same(encoded, rows_at_source(n_ranks, home, items.out_tokens))
        delivered = step.routes[f"{name}->llm"].apply(encoded)
        assert same(delivered, expected_arrivals(axes, name))
        assert same(step.routes[f"{name}->llm"].invert().apply(delivered), encoded)


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("round_", ROUNDS)
def test_places_tile_the_token_axes(round_, groups):
    rng = np.random.default_rng([SEED, 1, round_, groups])
    batch, _, options, step = plans(rng, groups)
    axes = token_axes(step, options.get("pad_to", 1))
    found = [[None] * len(axis) for axis in axes]
    for name in ("text", *batch.phases):
        route = name if name == "text" else f"{name}->llm"
        pieces = step.routes[route]
        for item, first, rows, rank, place in zip(pieces.item, pieces.first_row, pieces.n_rows,
                                                  pieces.destination, step.places[route]):
            for row in range(rows):
                assert found[rank][place + row] is None
                found[rank][place + row] = (name, item, first + row)
    assert found == axes


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("round_", ROUNDS)
def test_composed_is_the_two_routes_in_one(round_, groups):
    rng = np.random.default_rng([SEED, 2, round_, groups])
    batch, cluster, costs, options = draw_problem(rng, groups)
    options |= {"compose": True, "relabel": None}
    one = orchvlm.plan_step(batch, cluster, costs, **options)
    two = orchvlm.plan_step(batch, cluster, costs, **{**options, "compose": False})
    assert f"{next(iter(batch.phases))}->source" not in one.routes
    for name in batch.phases:
        composed = two.routes[f"{name}->source"].compose(two.routes[f"{name}->llm"])
        assert composed == one.routes[f"{name}->llm"]
        assert np.array_equal(one.places[f"{name}->llm"], two.places[f"{name}->llm"])


def loads_of(cost, plan, length, squares, n_ranks):
    """[M, N] seconds, from the definition."""
    squares = length.astype(float)**2 if squares is None else squares
    loads = np.zeros((plan.micro_batches, n_ranks))
    for m in range(plan.micro_batches):
        for rank in range(n_ranks):
            mine = (plan.rank == rank) & (plan.micro_batch == m)
            if mine.any():
                longest, count = length[mine].max(), mine.sum()
                loads[m, rank] = (
                    cost.fixed + cost.per_item * count + cost.linear * length[mine].sum()
                    + cost.quadratic * squares[mine].sum()
                    + count * longest * (cost.padded_linear + cost.padded_quadratic * longest))
    return loads


@pytest.mark.parametrize("round_", ROUNDS)
def test_times_memory_and_sums(round_):
    rng = np.random.default_rng([SEED, 3, round_])
    batch, cluster, options, step = plans(rng, groups=False)
    bandwidth = (cluster.intra_bandwidth, cluster.inter_bandwidth)
    total = exposed = 0.0
    work = {name: (items.length, items.squares) for name, items in batch.phases.items()}
    for name, (length, squares) in {**work, "llm": (batch.language_lengths, None)}.items():
        plan = step.llm if name == "llm" else step.phases[name]
        loads = loads_of(step.costs[name], plan, length, squares, cluster.n_gpus)
        assert np.allclose(loads.sum(0), plan.loads) and np.isclose(loads.max(1).sum(), plan.time)
        assert plan.bound <= plan.time * (1 + 1e-12)
        total += plan.time
        per_token, fixed = options["memory"].get(name, (0.0, 0.0))
        for m in range(plan.micro_batches):
            mine = plan.micro_batch == m
            used = np.bincount(plan.rank[mine], length[mine], minlength=cluster.n_gpus)
            assert (fixed + per_token * used).max(initial=0) <= cluster.memory_bytes * (1 + 1e-9)
    for name, items in batch.phases.items():
        for route in (f"{name}->source", f"{name}->llm"):
            if route not in step.routes:
                continue
            r = step.routes[route]
            seconds = worst = 0.0
            for inside, speed in zip((True, False), bandwidth):
                node = r.source // cluster.gpus_per_node == r.destination // cluster.gpus_per_node
                used = (node == inside) & (r.source != r.destination)
                size = r.n_rows[used] * items.out_bytes_per_token
                for end in (r.source, r.destination):
                    most = np.bincount(end[used], size, minlength=1).max(initial=0)
                    seconds = max(seconds, most / speed)
                    worst = worst if inside else max(worst, most)
            after = step.traffic[route][1]
            assert np.isclose(after.seconds, seconds) and np.isclose(after.worst_bytes, worst)
            exposed += 2 * seconds
    assert np.isclose(step.exposed, exposed) and np.isclose(step.time, total + exposed)
    assert step.bound <= step.time * (1 + 1e-12)


class _OneMicroBatch:
    """Just enough of a PhasePlan for loads_of."""

    micro_batches = 1

    def __init__(self, rank):
        self.rank, self.micro_batch = rank, np.zeros(len(rank), np.int64)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("round_", range(12))
def test_bound_is_below_the_best_of_all_assignments(round_, padded):
    """Every assignment to ranks and micro-batches that fits, of up to five items.  Padded costs:
    those with at most the plan's micro-batches, as more may save padding."""
    rng = np.random.default_rng([SEED, 4, round_, padded])
    n, n_ranks = int(rng.integers(1, 6)), int(rng.integers(1, 3))
    length = rng.integers(1, 10, n)
    room = int(length.max() + rng.integers(0, 6))
    cost = draw_cost(rng, padded)
    batch = orchvlm.Batch(length, length, np.zeros(n, np.int64))
    cluster = orchvlm.Cluster(1, n_ranks, float(room), 1e12, 1e6, 1e5)
    step = orchvlm.plan_step(batch, cluster, {"llm": cost}, memory={"llm": (1.0, 0.0)},
                             time_limit=None)
    best, fewest = np.inf, n
    cells = np.stack(np.meshgrid(*[np.arange(n_ranks * 3)] * n, indexing="ij"), -1).reshape(-1, n)
    for where in cells:
        rank, micro = where % n_ranks, where // n_ranks
        if np.bincount(where, length).max() > room:
            continue
        used = np.unique(micro)
        fewest = min(fewest, len(used))
        if padded and len(used) > step.llm.micro_batches:
            continue
        seconds = 0.0
        for m in used:
            mine = micro == m
            seconds += loads_of(cost, _OneMicroBatch(rank[mine]), length[mine], None, n_ranks).max()
        best = min(best, seconds)
    assert step.llm.bound <= best * (1 + 1e-9)
    if fewest <= 3:
        assert step.llm.micro_batches >= fewest


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("round_", range(12))
def test_relabelling_never_changes_loads(round_, groups):
    rng = np.random.default_rng([SEED, 5, round_, groups])
    batch, cluster, costs, options = draw_problem(rng, groups)
    made = {mode: orchvlm.plan_step(batch, cluster, costs, **{**options, "relabel": mode})
            for mode in (None, "sum", "minmax")}
    for mode in ("sum", "minmax"):
        for name, plan in made[mode].phases.items():
            assert np.array_equal(np.sort(plan.loads), np.sort(made[None].phases[name].loads))
            assert plan.time == made[None].phases[name].time
        assert made[mode].llm.time == made[None].llm.time
        for name, relabelled in made[mode].relabelling.items():
            assert relabelled.bound <= relabelled.value * (1 + 1e-12)
            assert relabelled.value <= relabelled.before
        for name in made[mode].traffic:
            assert made[mode].traffic[name][0] == made[None].traffic[name][0]


def test_fractions_of_a_byte_are_rounded_and_not_dropped():
    """One row of 0.6 bytes is a byte in all sums, also on its way between encoder and language."""
    rng = np.random.default_rng([SEED, 12])
    n = 64
    ones, zeros = np.ones(n, np.int64), np.zeros(n, np.int64)
    text = rng.integers(1, 50, n)
    items = orchvlm.Items(np.arange(n), zeros, rng.integers(1, 50, n), ones, zeros,
                          out_bytes_per_token=0.6)
    cost = orchvlm.BatchCost(linear=1.0)
    step = orchvlm.plan_step(orchvlm.Batch(text, text, zeros, {"vision": items}),
                             orchvlm.Cluster(2, 1, 1e9, 1e12, 1e6, 1e5),
                             {"vision": cost, "llm": cost}, relabel="sum", slack=None,
                             work_limit=1000, time_limit=None)
    crossing = step.phases["vision"].rank != step.llm.rank
    assert crossing.any() and step.relabelling["vision"].before > 0


def test_fractions_of_a_byte_move_groups_to_their_node():
    """One sample, one rank, one node each: by the sum, every group can be where its row is."""
    rng = np.random.default_rng([SEED, 13])
    n = 16
    ones, zeros = np.ones(n, np.int64), np.zeros(n, np.int64)
    items = orchvlm.Items(np.arange(n), zeros, ones, ones, zeros, out_bytes_per_token=0.6)
    batch = orchvlm.Batch(9 * ones, ones, rng.permutation(n), {"vision": items})
    costs = {"vision": orchvlm.BatchCost(linear=1.0),
             "llm": orchvlm.SequenceCost(quadratic=0.0, linear=1.0, comm={1: 0.0})}
    step = orchvlm.plan_step(batch, orchvlm.Cluster(n, 1, 1e9, 1e12, 1e6, 1e5), costs,
                             llm="sequence_parallel", relabel="sum", compose=False,
                             work_limit=1000, time_limit=None)
    assert step.llm.time == 10
    assert step.traffic["vision->llm"][1].cross_bytes == 0


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("round_", range(8))
def test_deterministic_and_checked(round_, groups):
    rng = np.random.default_rng([SEED, 6, round_, groups])
    batch, cluster, costs, options = draw_problem(rng, groups)
    one, two = (orchvlm.plan_step(batch, cluster, costs, **options) for _ in range(2))
    assert one.digest == two.digest and not one.cut_short
    one.check()
    warm = orchvlm.plan_step(batch, cluster, costs, **options, warm_start=one)
    warm.check()


def test_homes_keep_bytes_where_they_are():
    rng = np.random.default_rng(SEED)
    n_ranks, n = 16, 640
    length = rng.integers(50, 100, n)
    vision = orchvlm.Items(np.arange(n), np.zeros(n, np.int64), length, length, length * 10,
                           out_bytes_per_token=10)
    batch = orchvlm.Batch(np.zeros(n, np.int64), length, np.repeat(np.arange(n_ranks), 40),
                          {"vision": vision})
    cluster = orchvlm.Cluster(4, 4, 80e9, 1e15, 3e11, 5e10)
    costs = {"vision": orchvlm.BatchCost(linear=1.0), "llm": orchvlm.BatchCost(linear=1.0)}
    near, far = (orchvlm.plan_step(batch, cluster, costs, slack=slack, time_limit=None)
                 for slack in (0.01, None))
    assert near.phases["vision"].imbalance <= 1.011
    crossing = [step.traffic["vision"][1].cross_bytes for step in (near, far)]
    assert crossing[0] < 0.3 * crossing[1]


def test_empty_things():
    cluster = orchvlm.Cluster(2, 2, 80e9, 1e15, 3e11, 5e10)
    none = np.zeros(0, np.int64)
    sp = orchvlm.SequenceCost(quadratic=0.0, linear=1.0, comm={1: 0.0, 2: 0.1})
    empty = orchvlm.Items(none, none, none, none, none)
    for cost, llm in ((orchvlm.BatchCost(linear=1.0), "balance"), (sp, "sequence_parallel")):
        for batch in (orchvlm.Batch([], [], []), orchvlm.Batch([], [], [], {"vision": empty}),
                      orchvlm.Batch([5], [5], [3], {"vision": empty})):
            costs = {"llm": cost, **{name: orchvlm.BatchCost(linear=1.0) for name in batch.phases}}
            step = orchvlm.plan_step(batch, cluster, costs, llm=llm)
            step.check()
            assert step.time == pytest.approx(0 if not len(batch) else step.llm.time)
            assert len(batch) or (step.gap == 0 and step.time == 0)
            assert orchvlm.StepPlan.from_bytes(step.to_bytes()).digest == step.digest
            assert "step" in str(step.report())


def test_report_units():
    assert [reports._seconds(s) for s in (0, 2e-7, 9.9e-5, 1e-4, 1.5)] == [
        "0 s", "0.2 us", "99 us", "0.1 ms", "1.5 s"]
    assert [reports._percent(g) for g in (0, 3e-14, 0.01)] == ["0 %", "0 %", "1 %"]


def test_report_says_before_and_after():
    step = plans(np.random.default_rng(3), False)[-1]
    report = step.report()
    text = str(report)
    assert all(name in text for name in (*step.batch.phases, "llm", "text", "vision->llm"))
    assert "exposed" in text and f"{step.llm.imbalance:.4f}" in text
    assert "<table>" in step._repr_html_() and "StepPlan" in repr(step)
    assert text.count("before") > 2 and "ahead of the step" in text
    assert "between nodes<br>after" in step._repr_html_()
    for thing in (step.batch, step.llm, step.routes["text"], *step.batch.phases.values()):
        assert repr(thing).startswith("<")


def test_repr_counts_in_english():
    cluster = orchvlm.Cluster(1, 1, 80e9, 1e15, 300e9, 25e9)
    step = orchvlm.plan_step(orchvlm.Batch([2], [2], [0]), cluster,
                             {"llm": orchvlm.BatchCost(linear=1.0)})
    assert "1 item on 1 rank, 1 micro-batch, " in repr(step.llm)
