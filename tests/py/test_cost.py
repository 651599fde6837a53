"""Costs, their fit (scipy as oracle) and their derivation from a model's configuration."""
import math
import os
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import orchvlm
from orchvlm import BatchCost, Cluster, SequenceCost, fit, from_model

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", time.time_ns() % 2**32))


@pytest.fixture
def rng():
    print(f"ORCHVLM_TEST_SEED={SEED}")
    return np.random.default_rng(SEED)


# ---------------------------------------------------------------- BatchCost, SequenceCost

FINITE = st.floats(0, 1e6)


@settings(max_examples=200, deadline=None)
@given(st.tuples(*[FINITE] * 6), st.lists(st.integers(0, 10**6), max_size=20), st.booleans())
def test_batch_cost_is_its_formula(coefficients, lengths, with_squares):
    linear, quadratic, padded_linear, padded_quadratic, per_item, fixed = coefficients
    squares = [length * 7.0 for length in lengths] if with_squares else None
    n, longest = len(lengths), max(lengths, default=0)
    q = sum(squares) if with_squares else sum(x * x for x in lengths)
    want = (fixed + per_item * n + linear * sum(lengths) + quadratic * q
            + padded_linear * n * longest + padded_quadratic * n * longest**2) if n else 0.0
    assert BatchCost(*coefficients)(lengths, squares) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("heads", [0, 12])
def test_sequence_cost_is_its_formula(rng, heads):
    comm = {1: 0.0, 3: 1e-6, 8: 2e-6, 12: 5e-6}
    cost = SequenceCost(3e-10, 2e-5, 0.25, comm, heads=heads)
    for degree in comm:
        s = rng.integers(0, 10**5, 9)
        share = math.ceil(heads / degree) / heads if heads else 1 / degree
        want = .25 + sum(3e-10 * x * x * share + (2e-5 + comm[degree]) * x / degree
                         for x in s.tolist())
        assert cost(s, degree) == pytest.approx(want, rel=1e-12)
        assert cost([], degree) == 0.0


def test_rings_cost_what_the_last_row_has():
    """Ten ranks of 6 heads are two rows of five; seven are seven of one."""
    comm, s = {4: 1e-6, 7: 2e-6, 10: 3e-6}, 1000
    cost = SequenceCost(1e-9, 2e-5, 0.25, comm, heads=6, ring=5e-6)
    for degree, share, steps in ((4, 2 / 6, 0), (7, 13 / 49, 6), (10, 2 / 6 * 3 / 4, 1)):
        want = .25 + 1e-9 * s * s * share + (2e-5 + comm[degree] + 5e-6 * steps) * s / degree
        assert cost([s], degree) == pytest.approx(want, rel=1e-12)
    plan = orchvlm.plan_sequences([300, 200, 100], 10, cost)
    plan.check()
    again = orchvlm.SequencePlan.from_bytes(plan.to_bytes())
    assert again.cost == cost and again.digest == plan.digest
    rows = [([n] * k, d, cost([n] * k, d), None) for n in (10, 1000) for k in (1, 3) for d in comm]
    fitted, error, _ = fit(rows, heads=6, rings=True)
    assert abs(error).max() < 1e-8 and fitted.ring == 0.0
    assert fitted.comm[10] - fitted.comm[4] == pytest.approx(7e-6)  # the ring is in it


def test_flexsp_constants():
    cost = SequenceCost.flexsp_gpt7b(n_gpus=64)
    assert int(cost.tokens_per_gpu) == 5992
    assert list(cost.comm) == [1, 2, 4, 8, 16, 32, 64] and cost.heads == 64
    # attention and the rest cost the same at about 35.9K tokens
    assert cost.linear / cost.quadratic == pytest.approx(35_874, rel=1e-4)
    # 16 MiB-per-token all-to-all volume over 96.5 GB/s, as the published code computes it
    assert cost.comm[8] == pytest.approx(1e-3 * 16 * 32 * 4096 / 2**20 / 96.5)
    for name, billions in (("7b", 7.12), ("13b", 13.1), ("30b", 31.5)):
        model = getattr(SequenceCost, f"flexsp_gpt{name}")(n_gpus=64)
        assert model.memory_fixed * 64 / 16 / 2**30 == pytest.approx(billions, rel=.01)
    assert list(SequenceCost.flexsp_gpt30b(n_gpus=3).comm) == [1, 2]


def test_tokens_per_gpu_at_the_edges():
    assert SequenceCost(0, 1).tokens_per_gpu == math.inf
    assert SequenceCost(0, 1, memory_fixed=5, memory_limit=5, memory_per_token=1
                        ).tokens_per_gpu == 0.0


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, 10**400])
def test_bad_coefficients(value):
    for name in BatchCost.__dataclass_fields__:
        with pytest.raises(ValueError, match=f"BatchCost.{name}"):
            BatchCost(**{name: value})
    for name in ("quadratic", "linear", "fixed", "memory_per_token", "memory_fixed"):
        with pytest.raises(ValueError, match=f"SequenceCost.{name}"):
            SequenceCost(**{"quadratic": 0, "linear": 0, name: value})
    with pytest.raises(ValueError, match=r"comm\[4\]"):
        SequenceCost(0, 0, comm={4: value})


@pytest.mark.parametrize("value", ["1", None, True, [1.0], 1j])
def test_coefficients_of_a_wrong_type(value):
    with pytest.raises(TypeError, match="BatchCost.linear must be a number"):
        BatchCost(linear=value)


@pytest.mark.parametrize("arguments, error, words", [
    (dict(comm={}), ValueError, "1 to 64 degrees"),
    (dict(comm={0: 0.0}), ValueError, "degree"),
    (dict(comm={1.5: 0.0}), TypeError, "degree must be an integer"),
    (dict(comm={d: 0.0 for d in range(1, 66)}), ValueError, "1 to 64 degrees"),
    (dict(comm=[1.0]), TypeError, "must map degrees"),
    (dict(comm={16: 0.0}, heads=12), ValueError, "a head cannot be split"),
    (dict(ring=-1.0), ValueError, "ring"), (dict(ring="1"), TypeError, "ring"),
    (dict(heads=2**20 + 1, ring=0.0), ValueError, "at most 2\\^20 with ring"),
    (dict(heads=-1), ValueError, "heads"),
    (dict(heads=1.0), TypeError, "heads must be an integer"),
    (dict(memory_limit=math.nan), ValueError, "memory_limit"),
    (dict(memory_limit=-1), ValueError, "memory_limit"),
])
def test_bad_sequence_costs(arguments, error, words):
    with pytest.raises(error, match=words):
        SequenceCost(1e-9, 1e-4, **arguments)


def test_bad_lengths():
    cost, sequence = BatchCost(linear=1), SequenceCost(0, 1)
    for call in (cost, lambda lengths: sequence(lengths, 1)):
        with pytest.raises(TypeError, match="lengths must hold integers"):
            call([1.5])
        with pytest.raises(ValueError, match=r"lengths\[1\] must be >= 0; got -3"):
            call([1, -3])
        with pytest.raises(ValueError, match="one-dimensional"):
            call([[1]])
    with pytest.raises(ValueError, match="squares must have 2 elements; got 1"):
        cost([1, 2], squares=[1.0])
    with pytest.raises(ValueError, match=r"squares\[0\] must be >= 0"):
        cost([1], squares=[-1.0])
    with pytest.raises(ValueError, match="degree 2 has no entry"):
        sequence([1], 2)


def test_costs_compare_and_hash():
    assert BatchCost(linear=2) == BatchCost(linear=2.0) != BatchCost(linear=3)
    assert len({SequenceCost(0, 1, comm={2: 0, 1: 0}), SequenceCost(0, 1, comm={1: 0, 2: 0})}) == 1
    with pytest.raises(AttributeError):
        BatchCost().linear = 1


# ---------------------------------------------------------------- Cluster

def test_cluster():
    cluster = Cluster.preset("a100_40g", nodes=2, gpus_per_node=4)
    assert (cluster.n_gpus, cluster.memory_bytes, cluster.peak_flops) == (8, 40e9, 312e12)
    assert list(cluster.node_of(np.arange(8))) == [0, 0, 0, 0, 1, 1, 1, 1]
    for name in ("h100", "h200", "a100_40g", "a100_80g", "h800", "b200"):
        one = Cluster.preset(name)
        assert one.intra_bandwidth > one.inter_bandwidth > 1e9 and one.n_gpus == 8
    for name in ("H100", "", None, 3):
        with pytest.raises(ValueError, match="unknown preset"):
            Cluster.preset(name)
    with pytest.raises(ValueError, match="nodes must be in"):
        Cluster.preset("h100", nodes=0)
    with pytest.raises(TypeError, match="nodes must be an integer"):
        Cluster.preset("h100", nodes=2.0)
    with pytest.raises(ValueError, match="at most 2"):
        Cluster.preset("h100", nodes=2**30, gpus_per_node=8)
    with pytest.raises(ValueError, match="peak_flops must be positive"):
        Cluster(1, 1, 1, 0, 1, 1)


# ---------------------------------------------------------------- fit

def batch_columns(rows):
    return np.array([[sum(x), sum(v * v for v in x), len(x) * max(x), len(x) * max(x)**2, len(x),
                      1] for x, _ in rows], float)


def test_fit_agrees_with_scipy(rng):
    nnls = pytest.importorskip("scipy.optimize").nnls
    names = list(BatchCost.__dataclass_fields__)
    for _ in range(50):
        terms = [name for name in names if rng.random() < .7] or ["linear"]
        rows = [(rng.integers(1, 5000, rng.integers(1, 9)).tolist(), float(t))
                for t in rng.uniform(.01, 10, rng.integers(1, 40))]
        seconds = np.array([t for _, t in rows])
        columns = batch_columns(rows)[:, [names.index(t) for t in terms]] / seconds[:, None]
        scale = np.linalg.norm(columns, axis=0)
        _, best = nnls(columns / scale, np.ones(len(rows)))
        cost, error, memory = fit(rows, terms=terms)
        assert memory is None
        assert np.linalg.norm(error) == pytest.approx(best, rel=1e-7, abs=1e-7)
        predicted = np.array([cost(lengths) for lengths, _ in rows])
        np.testing.assert_allclose(predicted / seconds - 1, error, atol=1e-9)
        assert all(getattr(cost, name) == 0 for name in names if name not in terms)


def test_fit_recovers_flexsp(rng):
    truth = SequenceCost.flexsp_gpt7b(n_gpus=64)
    rows = []
    for degree in truth.comm:
        for _ in range(12):
            lengths = rng.integers(100, 20_000, rng.integers(1, 12))
            per_gpu = truth.memory_fixed + truth.memory_per_token * lengths.sum() / degree
            rows.append((lengths, degree, truth(lengths, degree), per_gpu))
    cost, error, bytes_error = fit(rows, heads=64)
    assert np.abs(error).max() < 1e-8 and np.abs(bytes_error).max() < 1e-8
    for name in ("quadratic", "linear", "fixed", "memory_per_token", "memory_fixed"):
        assert getattr(cost, name) == pytest.approx(getattr(truth, name), rel=1e-5)
    assert list(cost.comm) == list(truth.comm)
    np.testing.assert_allclose(list(cost.comm.values()), list(truth.comm.values()), rtol=1e-4,
                               atol=1e-12)
    noisy = [(x, d, t * rng.uniform(.95, 1.05), None) for x, d, t, _ in rows]
    cost, error, bytes_error = fit(noisy, heads=64)
    assert np.abs(error).max() < .25 and bytes_error is None and cost.memory_limit == math.inf


def test_fit_cannot_tell_apart():
    """One item per row: per_item and fixed are the same column; one of them gets all."""
    cost, error, _ = fit([([n], 1.0 + n) for n in (1, 5, 9)])
    assert np.abs(error).max() < 1e-9
    assert cost.per_item + cost.fixed == pytest.approx(1) and 0 in (cost.per_item, cost.fixed)


@pytest.mark.parametrize("rows, error, words", [
    ([], ValueError, "at least one row"),
    (3, TypeError, "sequence of tuples"),
    ([3], TypeError, "sequence of tuples"),
    ([([1], 1.0, 2.0, 3.0, 4.0)], TypeError, "got 5 values"),
    ([([1], 1.0, "a")], TypeError, r"measurements\[0\]: squares must be an array of numbers"),
    ([([1, 2], 1.0, [2.0])], ValueError, "squares must be one per length, 2"),
    ([([1], 1.0, [-2.0])], ValueError, "squares must be in"),
    ([([1], 1.0, [float("nan")])], ValueError, r"squares\[0\] is not finite"),
    ([([1], 1.0, [2.0]), ([1], 1.0)], ValueError, "must not mix"),
    ([([1], 1.0), ([1], 1, 1.0, None)], ValueError, "must not mix"),
    ([([], 1.0)], ValueError, r"measurements\[0\]: lengths must be one-dimensional and not empty"),
    ([([1], 1.0), ([1.5], 1.0)], TypeError, r"measurements\[1\]: lengths must be integers"),
    ([([-1], 1.0)], ValueError, "length below 0"),
    ([([2**63], 1.0)], ValueError, "above"),
    ([([1], 0.0)], ValueError, "seconds must be in"),
    ([([1], math.nan)], ValueError, "seconds"),
    ([([1], "1")], TypeError, "seconds must be a number"),
    ([([1], 10**400)], ValueError, "finite"),
    ([([1], 0, 1.0, None)], ValueError, "degree"),
    ([([1], 1, 1.0, None), ([1], 1, 1.0, 5.0)], ValueError, "in all rows"),
    ([([1], 1, 1.0, 0.5)], ValueError, "bytes must be in"),
])
def test_bad_measurements(rows, error, words):
    with pytest.raises(error, match=words):
        fit(rows)


def test_bad_fit_options():
    rows = [([1], 1.0)]
    with pytest.raises(ValueError, match="unknown term 'cubic'"):
        fit(rows, terms=("cubic",))
    with pytest.raises(ValueError, match="at least one"):
        fit(rows, terms=())
    with pytest.raises(TypeError, match="not one string"):
        fit(rows, terms="linear")
    with pytest.raises(ValueError, match="heads is for"):
        fit(rows, heads=4)
    with pytest.raises(ValueError, match="above heads"):
        fit([([1], 8, 1.0, None)], heads=4)
    with pytest.raises(ValueError, match="65 different degrees"):
        fit([([1], degree, 1.0, None) for degree in range(1, 66)])


# ---------------------------------------------------------------- from_model

QWEN = dict(hidden_size=2048, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
            intermediate_size=11008, vocab_size=151936, tie_word_embeddings=True)
QWEN_VISION = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16,
                   hidden_act="silu", out_hidden_size=2048, patch_size=14, spatial_merge_size=2,
                   temporal_patch_size=2, window_size=112, fullatt_block_indexes=[7, 15, 23, 31])
QWEN_MOE = dict(hidden_size=2048, num_hidden_layers=48, num_attention_heads=32,
                num_key_value_heads=4, head_dim=128, intermediate_size=6144,
                moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
                vocab_size=151936)
H200 = Cluster.preset("h200", nodes=8)


def test_published_sizes():
    """Parameters against what the models' cards and papers say."""
    small = from_model({"text_config": QWEN, "vision_config": QWEN_VISION}, H200)
    assert small.parameters["llm"] == pytest.approx(3.086e9, rel=1e-3)
    assert small.parameters["vision"] == pytest.approx(.6685e9, rel=2e-3)
    moe = from_model(QWEN_MOE, H200)
    assert moe.parameters["llm"] == pytest.approx(30.53e9, rel=1e-3)
    # 3.3 B active with the embedding, which costs no FLOPs
    assert moe.flops["llm"].linear / 6 == pytest.approx(3.353e9 - 151936 * 2048, rel=2e-3)
    # Seed-ViT: 27 layers, 1280 wide, two-matrix MLP: 531.59 M without biases, and the adapter
    seed = from_model(QWEN | {"vision_config": dict(depth=27, hidden_size=1280, num_heads=20,
                                                    patch_size=14)}, H200)
    assert seed.parameters["vision"] - 1280 * 2048 - 2048**2 == 531_594_240


def test_flops_by_hand():
    model = from_model(QWEN, H200)
    s, T = 4096, 32768
    weights = 36 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 11008) + 2048 * 151936
    attention = 36 * 3 * 2 * 2048 * s * T  # three passes, QK^T and PV, half of the pairs
    assert model.flops["llm"]([s] * (T // s)) == pytest.approx(6 * weights * T + attention)
    costs = from_model(QWEN, H200, efficiency=.25).costs["llm"]
    assert costs([s]) - costs.fixed == pytest.approx(model.flops["llm"]([s]) / (.25 * 989.5e12))


def test_vision_attends_within_images_and_windows():
    model = from_model(QWEN | {"vision_config": QWEN_VISION}, H200)
    plain = {k: v for k, v in QWEN_VISION.items() if "att" not in k and k != "window_size"}
    full = from_model(QWEN | {"vision_config": plain}, H200)
    assert full.flops["vision"].quadratic == 3 * 4 * 1280 * 32
    assert model.flops["vision"].quadratic == 3 * 4 * 1280 * 4
    assert model.flops["vision"].linear - full.flops["vision"].linear == pytest.approx(
        3 * 4 * 1280 * 64 * 28)
    video = full.flops["vision"]
    assert video([400], squares=[4 * 100.0**2]) == pytest.approx(video([100] * 4))


def test_audio_is_counted_per_input_frame():
    whisper = dict(d_model=1280, encoder_layers=32, encoder_attention_heads=20,
                   encoder_ffn_dim=5120, num_mel_bins=128)
    model = from_model(QWEN | {"audio_config": whisper}, H200)
    assert model.parameters["audio"] == pytest.approx(637e6, rel=.01)  # Whisper large's encoder
    cost, flops = model.costs["audio"], model.flops["audio"]
    assert cost.padded_linear == pytest.approx(
        3 * 2 * 3 * 1280 * (128 + 640) / (.5 * 989.5e12))
    assert flops.quadratic == 3 * 4 * 1280 * 32 / 4


def test_sequence_parallel_cost():
    model = from_model(QWEN_MOE, H200, llm="sequence_parallel")
    cost, balanced = model.costs["llm"], from_model(QWEN_MOE, H200).costs["llm"]
    assert list(cost.comm) == [1, 2, 4, 8, 16, 32] and cost.heads == 32
    assert (cost.linear, cost.quadratic) == (balanced.linear, balanced.quadratic)
    assert list(cost.comm.values()) == sorted(cost.comm.values()) and cost.comm[1] == 0
    assert cost.comm[16] > 4 * cost.comm[8]  # the cliff between nodes
    token_bytes = 48 * 2 * 2 * (2 * 32 + 2 * 8) * 128
    assert cost.comm[8] == pytest.approx(token_bytes * 7 / 8 / 450e9)
    assert cost.comm[16] == pytest.approx(48 * 4 * (64 + 32) * 128 * .5 / 50e9)
    assert cost.memory_fixed == pytest.approx(16 * model.parameters["llm"] / 64)
    assert 0 < cost.tokens_per_gpu < 1e6
    # minimum set of the dense model: 61,440 bytes per token and layer
    assert from_model(QWEN, H200).memory["llm"][0] == 36 * 61_440
    one = from_model(QWEN, Cluster.preset("h200", 1, 1), llm="sequence_parallel").costs["llm"]
    assert list(one.comm) == [1] and one.fixed == 0


def test_experts_over_gpus():
    """Rows to experts and back, twice, of the part that goes to others; fewer weights gathered."""
    one, shared = (from_model(QWEN_MOE, H200, experts=e).costs["llm"] for e in (1, 16))
    values = 48 * 8 * 2048  # layers, experts of a token, width
    assert shared.linear - one.linear == pytest.approx(
        4 * 2 * values * max(7 / 16 / 450e9, 8 / 16 / 50e9))
    assert shared.quadratic == one.quadratic
    expert_bytes = 3 * 2 * 3 * 2048 * 768 * 128  # three times bf16, of a layer
    assert one.fixed - shared.fixed == pytest.approx(expert_bytes * 15 / 16 / min(450e9, 8 * 50e9))
    for experts, words in ((3, "experts must divide"), (0, "experts must be a whole"),
                           (True, "experts must be a whole")):
        with pytest.raises(ValueError, match=words):
            from_model(QWEN_MOE, H200, experts=experts)
    with pytest.raises(ValueError, match="8 GPUs, but the model has 0 experts"):
        from_model(QWEN, H200, experts=8)


@pytest.mark.parametrize("change, error, words", [
    (dict(hidden_size=None), ValueError, "config lacks hidden_size"),
    (dict(num_hidden_layers=0), ValueError, "num_hidden_layers must be in"),
    (dict(vocab_size=1.5), TypeError, "vocab_size must be an integer"),
    (dict(num_experts=4), ValueError, r"lacks num_experts_per_tok \(or moe_topk\)"),
    (dict(num_experts=4, num_experts_per_tok=5), ValueError, "5 of 4 experts"),
    (dict(kv_lora_rank=512), ValueError, "latent attention"),
    (dict(layer_types=["sliding_attention"]), ValueError, "sliding_attention"),
    (dict(layer_types="full_attention"), TypeError, "layer_types must be a list"),
    (dict(vision_config=3), TypeError, "vision_config must be a mapping"),
    (dict(vision_config={}), ValueError, r"vision_config lacks embed_dim \(or hidden_size\)"),
    (dict(vision_config=dict(hidden_size=8, depth=1, patch_size=2, mlp_ratio="4")), TypeError,
     "mlp_ratio"),
])
def test_bad_configurations(change, error, words):
    with pytest.raises(error, match=words):
        from_model(QWEN | change, H200)


def test_bad_model_options():
    with pytest.raises(TypeError, match="to_dict"):
        from_model(object(), H200)
    with pytest.raises(TypeError, match="must be a Cluster"):
        from_model(QWEN, "h200")
    with pytest.raises(ValueError, match="llm must be"):
        from_model(QWEN, H200, llm="pipeline")
    for efficiency in (0, -1, 1.5, math.nan):
        with pytest.raises(ValueError, match="efficiency"):
            from_model(QWEN, H200, efficiency=efficiency)


def test_sparse_layers_as_configurations_name_them():
    def parameters(**change):
        return from_model(QWEN_MOE | change, H200).parameters["llm"]
    layer = (parameters() - parameters(num_hidden_layers=47))
    dense = 3 * 2048 * 6144 + (layer - 3 * 2048 * 128 * 768 - 2048 * 128)
    assert parameters(mlp_only_layers=[3]) == parameters() - layer + dense
    assert parameters(first_k_dense_replace=2) == parameters() - 2 * (layer - dense)
    assert parameters(decoder_sparse_step=2) == parameters() - 24 * (layer - dense)
    assert parameters(shared_expert_intermediate_size=100) == parameters() + 48 * 3 * 2048 * 100
    assert orchvlm.from_model is from_model
