"""The event engine against a naive loop, and the step simulator against hand-made cases."""
import os
import time

import numpy as np
import pytest

import orchvlm
from orchvlm import BatchCost, Cluster, SequenceCost, _core, demo, policies, step_graph

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", time.time_ns() % 2**32))
FAST = 1e30  # bytes/s: transfers take no time


@pytest.fixture
def rng(record_property):
    print(f"ORCHVLM_TEST_SEED={SEED}")
    return np.random.default_rng(SEED)


def cluster(nodes=1, per_node=2, intra=FAST, inter=FAST):
    return Cluster(nodes, per_node, 80e9, 1e12, intra, inter)


# ------------------------------------------------------------ engine


def csr(lists):
    start = np.cumsum([0, *map(len, lists)])
    return start, np.array([x for one in lists for x in one], np.int64)


def naive(duration, before, use):
    """Looks at every task again and again: ends, then starts, then one arrival, then time."""
    n = len(duration)
    state, start, end = ["new"] * n, [0.0] * n, [0.0] * n
    queue, now = [], 0.0
    while "done" not in state or any(s != "done" for s in state):
        if n == 0:
            break
        moved = False
        for t in range(n):
            if state[t] == "runs" and end[t] <= now:
                state[t], moved = "done", True
        for place, t in enumerate(queue):
            older = [q for q in queue[:place] if state[q] != "done"]
            if state[t] == "waits" and not any(set(use[t]) & set(use[q]) for q in older):
                state[t], start[t], end[t], moved = "runs", now, now + duration[t], True
        if moved:
            continue
        ready = [t for t in range(n) if state[t] == "new"
                 and all(state[b] == "done" for b in before[t])]
        if ready:
            state[ready[0]] = "waits"
            queue.append(ready[0])
            continue
        now = min(end[t] for t in range(n) if state[t] == "runs")
    return start, end


def test_engine_equals_naive_loop(rng):
    for _ in range(300):
        n, resources = int(rng.integers(0, 25)), int(rng.integers(1, 6))
        duration = rng.integers(0, 4, n).astype(float)
        names = rng.permutation(n)  # dependencies need not point backwards
        before = [[] for _ in range(n)]
        for i in range(n):
            before[names[i]] = [int(names[j]) for j in range(i) if rng.random() < .15]
        use = [[r for r in range(resources) if rng.random() < .3] for _ in range(n)]
        start, end, cause, busy, total = _core.simulate(duration, *csr(before), *csr(use),
                                                        resources)
        expected = naive(duration, before, use)
        assert (start.tolist(), end.tolist()) == tuple(expected)
        assert total == max(expected[1], default=0.0)
        assert busy.tolist() == [sum(duration[t] for t in range(n) if r in use[t])
                                 for r in range(resources)]
        for t in range(n):
            assert start[t] == (end[cause[t]] if cause[t] >= 0 else 0.0)


@pytest.mark.parametrize("change, word", [
    (dict(duration=[np.nan, 1]), "duration"), (dict(duration=[-1.0, 1]), "duration"),
    (dict(before_start=[0, 0, 2]), "before_start"), (dict(before=[5]), "before"),
    (dict(use_start=[0, 1]), "use_start"), (dict(use=[0, 1]), "use"),
    (dict(before=[1]), "cycle"), (dict(use=[0.5, 0]), "use"), (dict(n=-1), "n_resources"),
    (dict(n=2.0), "n_resources"),
])
def test_engine_refuses(change, word):
    good = dict(duration=[1.0, 1.0], before_start=[0, 0, 1], before=[0], use_start=[0, 1, 2],
                use=[0, 0], n=1)
    _core.simulate(*good.values())
    with pytest.raises((ValueError, TypeError), match=word):
        _core.simulate(*(good | change).values())


# ------------------------------------------------------------ traffic and micro-batches


def test_traffic_by_hand():
    machine = cluster(nodes=2, per_node=2, intra=10.0, inter=1.0)
    exchange = policies.Exchange("x", np.array([0, 0, 0, 3, 1]), np.array([0, 1, 2, 1, 3]),
                                 np.array([99.0, 20.0, 3.0, 4.0, 1.0]))
    traffic = step_graph.measure_traffic(exchange, machine)
    # 0 sends 20 inside (2 s) and 3 across (3 s); 1 gets 20 inside, 4 across, sends 1 across
    assert traffic.seconds.tolist() == [3.0, 4.0, 3.0, 4.0]
    assert (traffic.intra_bytes, traffic.inter_bytes) == (20.0, 8.0)


def test_micro_batches_hold_the_limit(rng):
    for _ in range(50):
        n, ranks = int(rng.integers(1, 60)), int(rng.integers(1, 6))
        length = rng.integers(1, 50, n)
        rank = rng.integers(0, ranks, n)
        limit = int(rng.integers(length.max(), 200))
        bins, micro = policies.split_into_micro_batches(rank, length, limit, ranks)
        fill = np.zeros((ranks, bins), int)
        np.add.at(fill, (rank, micro), length)
        assert fill.max() <= limit
        least = -(-np.bincount(rank, weights=length).max() // limit)
        assert least <= bins <= 2 * least


def test_too_long_for_a_gpu():
    with pytest.raises(ValueError, match="60 tokens"):
        policies.split_into_micro_batches(np.zeros(1, int), np.array([60]), 50, 1)


def test_load_per_rank_equals_cost(rng):
    length = rng.integers(1, 99, 40)
    rank = rng.integers(0, 5, 40)
    for cost in (BatchCost(2.0, .5), BatchCost(1, 0, 3, .25, 7, 11)):
        got = policies.load_per_rank(cost, rank, length, length.astype(float)**2, 6)
        for r in range(6):
            s = length[rank == r].astype(float)
            n, longest = len(s), s.max(initial=0)
            expected = (cost.fixed + cost.per_item * n + cost.linear * s.sum()
                        + cost.quadratic * (s**2).sum() + cost.padded_linear * n * longest
                        + cost.padded_quadratic * n * longest**2) if n else 0.0
            assert got[r] == pytest.approx(expected, rel=1e-12)


def test_relabelling_keeps_bytes_inside(rng):
    """Composed and relabelled moves what is composed only, with fewer bytes between nodes."""
    machine = cluster(nodes=4, per_node=2)
    batch = small_batch(rng, ranks=8, samples=8)
    sim = orchvlm.simulate(batch, machine, COSTS, policies=("detour", "orchmllm"))
    detour, composed = sim["detour"], sim["orchmllm"]
    assert composed.step_s[0] == pytest.approx(detour.step_s[0], rel=1e-9)
    assert composed.inter_bytes < detour.inter_bytes


# ------------------------------------------------------------ steps


def small_batch(rng, ranks=4, samples=6):
    n = ranks * samples
    phases = {}
    for name in ("vision", "audio"):
        k = int(rng.integers(1, 2 * n))
        sample = np.sort(rng.integers(0, n, k))
        out = rng.integers(1, 9, k)
        first = np.searchsorted(sample, sample)
        position = np.cumsum(out) - out - (np.cumsum(out) - out)[first]
        phases[name] = orchvlm.Items(sample=sample, position=position, length=4 * out,
                                     out_tokens=out, bytes=100 * out, out_bytes_per_token=8)
    # audio tokens lie behind the vision tokens of a sample
    shift = np.bincount(phases["vision"].sample, phases["vision"].out_tokens, n).astype(np.int64)
    audio = phases["audio"]
    phases["audio"] = orchvlm.Items(
        sample=audio.sample, position=audio.position + shift[audio.sample], length=audio.length,
        out_tokens=audio.out_tokens, bytes=audio.bytes, out_bytes_per_token=8)
    text = rng.integers(1, 30, n)
    return orchvlm.Batch(text_tokens=text, target_tokens=text,
                         source_rank=np.repeat(np.arange(ranks), samples), phases=phases)


COSTS = {"vision": BatchCost(linear=.5, quadratic=.01), "audio": BatchCost(linear=.2),
         "llm": BatchCost(linear=1.0, quadratic=.001)}
PER_RANK = tuple(name for name in policies.POLICIES if not name.startswith("sp_"))


def placer(batch, machine, costs=COSTS, memory=None):
    return policies.Placer(batch, machine, costs, memory or {}, 100, 0, 200_000, None)


def test_time_is_the_sum_of_maxima_and_transfers(rng):
    """With sharded parameters a closed form exists: every stage ends for all at once, except that
    an exchange runs into the compute behind it."""
    for slow in (FAST, 50.0):
        machine = cluster(nodes=2, per_node=2, intra=slow, inter=slow / 4)
        batch = small_batch(rng)
        sim = orchvlm.simulate(batch, machine, COSTS, policies=PER_RANK)
        for name in PER_RANK:
            place = placer(batch, machine).place(policies.POLICIES[name])
            lone = upper = sum(m.max() for s in place.seconds.values() for m in s)
            moves = [step_graph.measure_traffic(e, machine).seconds.max()
                     for e in sum(place.after.values(), [])]
            upper += 2 * sum(moves)
            upper += sum(step_graph.measure_traffic(e, machine).seconds.max()
                         for e in [*sum(place.before.values(), []), *place.ahead])
            step_s = sim[name].step_s[0]
            assert lone * (1 - 1e-12) <= step_s <= upper * (1 + 1e-12)
            if slow == FAST:
                assert step_s == pytest.approx(lone, rel=1e-12)


def test_a_planned_step_takes_as_long_as_its_plan_says():
    """plan_step's own time and bound, and the simulated step, which may begin a phase on one rank
    while another is still receiving."""
    machine = Cluster.preset("h100", nodes=8)
    model = demo.recomputed(orchvlm.from_model(demo.MODEL_84B, machine), demo.MODEL_84B)
    batch = demo.batch(64, 8, seed=7)
    limits = dict(work_limit=20_000, time_limit=None)
    plan = orchvlm.plan_step(batch, machine, model.costs, memory=model.memory, **limits)
    sim = orchvlm.simulate(batch, machine, model.costs, memory=model.memory,
                           policies=("orchvlm",), **limits)
    step_s = sim["orchvlm"].step_s[0]
    assert plan.bound * (1 - 1e-9) <= step_s <= plan.time * (1 + 1e-9)


def test_a_planned_step_runs_the_micro_batches_of_its_plan(rng):
    """With free transfers the simulated time is the plan's, micro-batch by micro-batch."""
    machine = Cluster(1, 3, 1000.0, 1e15, 1e30, 1e30)
    for _ in range(10):
        batch = small_batch(rng, ranks=3)
        memory = {"llm": (1000.0 / (batch.language_lengths.max() + int(rng.integers(0, 9))), 0.0)}
        limits = dict(memory=memory, work_limit=int(rng.integers(0, 300)), time_limit=None)
        plan = orchvlm.plan_step(batch, machine, COSTS, **limits)
        sim = orchvlm.simulate(batch, machine, COSTS, policies=("orchvlm",), **limits)
        assert sim["orchvlm"].step_s[0] == pytest.approx(plan.time, rel=1e-9)


def test_shares_add_up_and_no_rank_is_busier_than_the_step(rng):
    machine = cluster(nodes=2, per_node=2, intra=1000.0, inter=100.0)
    batch = small_batch(rng)
    for sharded in (True, False):
        sim = orchvlm.simulate(batch, machine, COSTS, parameters={"llm": 1000, "vision": 50},
                               sharded=sharded, policies=PER_RANK)
        for name, result in sim.results.items():
            total = sum(result.busy.values()) + sum(result.idle.values())
            assert total == pytest.approx(1.0, abs=1e-9), name
            assert min(result.idle.values()) >= -1e-12
            busy = sum(end - start for _, _, start, end in result.timeline)
            assert (busy <= result.step_s[0] * (1 + 1e-12)).all()


def test_barriers_only_cost(rng):
    machine = cluster(nodes=2, per_node=2)
    batch = small_batch(rng)
    loose = orchvlm.simulate(batch, machine, COSTS, sharded=False, policies=PER_RANK)
    tight = orchvlm.simulate(batch, machine, COSTS, sharded=True, policies=PER_RANK)
    for name in PER_RANK:
        assert loose[name].step_s[0] <= tight[name].step_s[0] * (1 + 1e-12)
    # nothing is exchanged as sampled: without barriers a rank never waits before the end
    place = placer(batch, machine).place(policies.POLICIES["sampled"])
    per_rank = sum(m for s in place.seconds.values() for m in s)
    assert loose["sampled"].step_s[0] == pytest.approx(per_rank.max(), rel=1e-12)


def test_planning_is_never_slower_where_transfers_are_free(rng):
    machine = cluster(nodes=2, per_node=4)
    for _ in range(5):
        batch = small_batch(rng, ranks=8, samples=8)
        sim = orchvlm.simulate(batch, machine, COSTS, policies=("sampled", "prebalanced",
                                                                "detour", "orchvlm"))
        slack = 1.003  # plan_step keeps bytes at home within 0.2 % of the best load
        for name in ("sampled", "prebalanced", "detour"):
            assert sim["orchvlm"].step_s[0] <= slack * sim[name].step_s[0]


def test_parameter_traffic_hides_until_it_does_not():
    lengths, costs = np.array([10, 10]), {"llm": BatchCost(linear=1.0)}
    machine = cluster(per_node=2, intra=1.0)
    times = {count: orchvlm.simulate(lengths, machine, costs, parameters={"llm": count},
                                     policies=("sampled",))["sampled"].step_s[0]
             for count in (0, 3, 4)}
    # a gather moves 2 bytes * count / 2 ranks: count seconds.  Forward 10/3 s, backward 20/3 s
    # beside two such.  3: hidden.  4: 4 s forward, 8 s backward.
    assert times == pytest.approx({0: 10.0, 3: 10.0, 4: 12.0})


def test_planning_hides_behind_the_step():
    costs = {"llm": BatchCost(linear=1.0)}
    for planning_s, step_s in ((0.5, 1.0), (3.0, 3.0)):
        sim = orchvlm.simulate(np.array([1, 1]), cluster(), costs, planning_s=planning_s,
                               policies=("sampled",))
        assert sim["sampled"].step_s[0] == step_s


def test_mfu_by_hand():
    sim = orchvlm.simulate(np.array([4, 2]), cluster(), {"llm": BatchCost(linear=1.0)},
                           flops={"llm": BatchCost(linear=1e12, quadratic=1e11)},
                           policies=("sampled",))
    # 6e12 + (16 + 4)e11 FLOPs in 4 s on two GPUs of 1e12
    assert sim["sampled"].mfu == pytest.approx(8e12 / 8e12)


def test_speedup_and_batches():
    lengths = [np.array([5, 1, 1, 1]), np.array([1, 1, 1, 5])]
    sim = orchvlm.simulate(lengths, cluster(), {"llm": BatchCost(linear=1.0)},
                           policies=("sampled", "detour"))
    assert sim["sampled"].step_s.tolist() == [6.0, 6.0]
    assert sim.speedup("detour") == pytest.approx(1.2)
    assert "1.20x" in repr(sim) and "<table>" in sim._repr_html_()
    assert sim.as_dict()["policies"]["detour"]["speedup"] == pytest.approx(1.2)
    with pytest.raises(KeyError, match="veomni"):
        sim["veomni"]


def test_nothing_to_do_takes_no_time():
    machine, costs = cluster(nodes=2, per_node=2), {"llm": BatchCost(linear=1.0, fixed=1.0)}
    sim = orchvlm.simulate(np.zeros(0, np.int64), machine, costs, flops=costs)
    assert list(sim.results) == ["sampled", "prebalanced", "orchvlm"]
    for result in sim.results.values():
        assert result.step_s.tolist() == [0.0] and result.mfu is None
    assert "as sampled" in repr(sim)


def test_fewer_samples_than_ranks():
    sim = orchvlm.simulate(np.array([3]), cluster(nodes=2, per_node=4),
                           {"llm": BatchCost(linear=1.0)})
    assert all(r.step_s.tolist() == [3.0] for r in sim.results.values())
    assert sim["orchvlm"].idle["llm"] == pytest.approx(7 / 8)


def test_deterministic():
    machine = Cluster.preset("h100", nodes=2)
    one, two = (orchvlm.simulate(demo.batch(16, 4, seed=5), machine, COSTS) for _ in range(2))
    assert one.as_dict() == two.as_dict()


@pytest.mark.parametrize("change, error, word", [
    (dict(batches=[]), ValueError, "at least one"),
    (dict(batches=np.ones(3)), TypeError, "integers"),
    (dict(costs={}), ValueError, "llm"),
    (dict(costs={"llm": BatchCost(1.0), "smell": BatchCost(1.0)}), ValueError, "smell"),
    (dict(flops={"taste": BatchCost(1.0)}), ValueError, "taste"),
    (dict(policies=("magic",)), ValueError, "magic"),
    (dict(policies=("sp_flex",)), TypeError, "SequenceCost"),
    (dict(backward=-1), ValueError, "backward"),
    (dict(planning_s=np.nan), ValueError, "planning_s"),
    (dict(memory={"llm": (1e9, 79.5e9)}), ValueError, "memory"),
    (dict(memory={"llm": (1e10, 0)}), ValueError, "fit in a GPU"),
    (dict(memory=[1]), TypeError, "memory must be a dict"),
    (dict(memory={"llm": 3}), TypeError, "bytes_per_token"),
    (dict(memory={"smell": (1, 1)}), ValueError, "smell"),
    (dict(context="long"), TypeError, "context"), (dict(backward="2"), TypeError, "backward"),
])
def test_refuses(change, error, word):
    good = dict(batches=np.array([9, 2]), cluster=cluster(), costs={"llm": BatchCost(1.0)},
                policies=("sampled",))
    orchvlm.simulate(**good)
    with pytest.raises(error, match=word):
        orchvlm.simulate(**(good | change))


def test_source_outside_the_cluster():
    with pytest.raises(ValueError, match="source_rank"):
        orchvlm.simulate(demo.batch(4, 1), cluster(), COSTS)


# ------------------------------------------------------------ sequence-parallel language phase


def test_sequence_policies():
    lengths = demo.wikipedia_lengths(256, seed=2)
    machine = Cluster.preset("a100_40g", nodes=8)
    cost = SequenceCost.flexsp_gpt7b(n_gpus=64)
    sim = orchvlm.simulate(lengths, machine, {"llm": cost})
    assert list(sim.results) == ["sp_run", "sp_static", "sp_homogeneous", "sp_chunked", "sp_flex"]
    assert sim["sp_static"].step_s[0] <= sim["sp_run"].step_s[0] * (1 + 1e-12)
    plan = orchvlm.plan_sequences(lengths, 64, cost, policy="static")
    assert sim["sp_static"].step_s[0] == pytest.approx(plan.time, rel=1e-9)
    assert sim["sp_flex"].step_s[0] <= sim["sp_static"].step_s[0] * (1 + 1e-12)


def test_the_run_decides_the_fixed_degree():
    cost = SequenceCost.flexsp_gpt7b(n_gpus=64)  # 5,992 tokens per GPU
    machine = Cluster.preset("a100_40g", nodes=8)
    short, long = np.full(64, 5000), np.array([100_000, 5000])
    alone, both = (orchvlm.simulate(b, machine, {"llm": cost}, policies=("sp_run",))["sp_run"]
                   for b in ([short], [short, long]))
    for degree, result in ((1, alone), (32, both)):
        plan = orchvlm.plan_sequences(short, 64, cost, policy="static", degrees=[degree])
        assert result.step_s[0] == pytest.approx(plan.time, rel=1e-9)
    told = orchvlm.simulate(short, machine, {"llm": cost}, policies=("sp_run",), context=100_000)
    assert told["sp_run"].step_s[0] == both.step_s[0]
    with pytest.raises(ValueError, match="context = 10"):
        orchvlm.simulate(short, machine, {"llm": cost}, context=10)
    with pytest.raises(ValueError, match="fits no degree"):
        orchvlm.simulate(np.array([9_000_000]), machine, {"llm": cost}, policies=("sp_run",))


def test_outputs_reach_their_shards(rng):
    """Rows of encoder outputs per (source, GPU), against a walk over single tokens."""
    machine = cluster(nodes=2, per_node=4)
    cost = SequenceCost(quadratic=1e-4, linear=1.0, comm={1: 0, 2: .1, 4: .2, 8: .3},
                        memory_per_token=1.0, memory_limit=200.0)
    batch = small_batch(rng, ranks=8, samples=4)
    tokens = batch.language_lengths
    plan = orchvlm.plan_sequences(tokens, 8, cost, gpus_per_node=4)
    gpu_of = {}
    for micro in plan.micro_batches:
        for g in micro.groups:
            shard = -(-int(sum(tokens[i] for i in g.items)) // g.degree)
            packed = [(int(i), t) for i in g.items for t in range(tokens[i])]
            gpu_of.update({token: g.first_gpu + at // shard for at, token in enumerate(packed)})
    for items in batch.phases.values():
        rank = rng.integers(0, 8, len(items.sample))
        source, target, rows = policies._shard_pieces(plan, tokens, items, rank)
        got, expected = np.zeros((2, 8, 8))
        np.add.at(got, (source, target), rows)
        for k in range(len(items.sample)):
            for t in range(items.out_tokens[k]):
                expected[rank[k], gpu_of[int(items.sample[k]), int(items.position[k]) + t]] += 1
        assert (got == expected).all()
    costs = COSTS | {"llm": cost}
    sim = orchvlm.simulate(batch, machine, costs, policies=("sp_static", "sp_flex"))
    assert sim["sp_flex"].step_s[0] > 0


# ------------------------------------------------------------ demo lengths


def test_demo_models_have_their_sizes():
    for config, size in ((demo.MODEL_84B, 84e9), (demo.MODEL_9B, 9e9)):
        counted = orchvlm.from_model(config, Cluster.preset("h100", nodes=8))
        assert sum(counted.parameters.values()) == pytest.approx(size, rel=.03)
    assert demo.model_for(Cluster.preset("h100", nodes=8))[0] == "84B"
    assert demo.model_for(Cluster.preset("h100", nodes=1))[0] == "9B"
    with pytest.raises(ValueError, match="do not fit"):
        demo.model_for(Cluster.preset("a100_40g", nodes=1, gpus_per_node=1))


def test_demo_follows_its_quantiles():
    rng = np.random.default_rng(0)
    for name, table in demo.QUANTILES.items():
        drawn = demo.draw(name, 200_000, rng)
        for share, value in table:
            if .01 <= share <= .99:
                below, through = (drawn < value * .97).mean(), (drawn <= value * 1.03).mean()
                assert below - .01 <= share <= through + .01, (name, share)


def test_demo_batch_is_consistent():
    batch = demo.batch(8, 16, seed=1)
    tokens = batch.language_lengths
    used = np.array(batch.text_tokens)
    for items in batch.phases.values():
        assert (items.position >= 0).all() and (items.length > 0).all()
        assert (items.position + items.out_tokens <= tokens[items.sample]).all()
        assert (items.squares <= items.length.astype(float)**2).all()
        np.add.at(used, items.sample, items.out_tokens)
    assert (used == tokens).all()
    again = demo.batch(8, 16, seed=1)
    assert (again.text_tokens == batch.text_tokens).all()


def test_demo_makes_no_numpy_strings(monkeypatch):
    """Making one swallows a KeyboardInterrupt that arrives at that moment."""
    kinds, add = [], demo._add_sample
    monkeypatch.setattr(demo, "_add_sample", lambda kind, *rest: kinds.append(kind) or add(
        kind, *rest))
    demo.batch(4, 2)
    assert len(kinds) == 8 and all(type(kind) is str for kind in kinds)


def test_demo_refuses_sizes_before_any_work():
    rng = np.random.default_rng(0)
    for call, error, words in (
            (lambda: demo.batch(0, 1), ValueError, "n_ranks"),
            (lambda: demo.batch(4, 2**62), ValueError, "samples_per_rank"),
            (lambda: demo.batch(2**30, 2**30), ValueError, "samples_per_rank"),
            (lambda: demo.batch(4, 2.5), TypeError, "samples_per_rank"),
            (lambda: demo.batch(4, 2, seed=-1), ValueError, "seed"),
            (lambda: demo.batch(4, 2, hidden="wide"), TypeError, "hidden"),
            (lambda: demo.wikipedia_lengths(2**62), ValueError, "wikipedia_lengths.n"),
            (lambda: demo.wikipedia_lengths(9, longest=float("nan")), TypeError, "longest"),
            (lambda: demo.wikipedia_lengths(9, longest=38), ValueError, "longest"),
            (lambda: demo.draw("dreams", 1, rng), ValueError, "unknown distribution"),
            (lambda: demo.draw("code_bytes", 2**40, rng), ValueError, "draw.n"),
            (lambda: demo.draw("code_bytes", 1, 0), TypeError, "rng")):
        with pytest.raises(error, match=words):
            call()


def test_recomputed_refuses_another_models_config():
    model = orchvlm.from_model(demo.MODEL_9B, cluster())
    with pytest.raises(TypeError, match="vision_config"):
        demo.recomputed(model, {"hidden_size": 8, "num_hidden_layers": 2})
    grouped = orchvlm.from_model(demo.MODEL_9B, cluster(), llm="sequence_parallel")
    with pytest.raises(TypeError, match="BatchCost"):
        demo.recomputed(grouped, demo.MODEL_9B)
