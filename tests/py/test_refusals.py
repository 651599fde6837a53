"""Arguments that are refused before any work: counts that would take gigabytes or hours, figures
that overflow, parts of the wrong kind.  Each names its argument."""
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

import orchvlm
from orchvlm import Batch, BatchCost, Cluster, Items, SequenceCost, data, demo, plots
from orchvlm.data.video import open_video
from orchvlm.reading import read_lengths
from orchvlm.tables import format_bytes

CLUSTER = Cluster.preset("h100", 1, 2)
NO_ROUTE = orchvlm.Route(*[[]] * 7, n_ranks=2)
LINEAR, GROUPS = BatchCost(linear=1.0), SequenceCost(1e-9, 1e-3)
CONFIG = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
          "intermediate_size": 128, "vocab_size": 1000}
EXPERTS = {**CONFIG, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def simulate(batch=None, **change):
    batch = Batch([5, 5], [5, 5], [0, 1]) if batch is None else batch
    costs = {**{name: LINEAR for name in batch.phases}, "llm": LINEAR}
    return orchvlm.simulate(**{"batches": batch, "cluster": CLUSTER, "costs": costs,
                               "policies": ("sampled",), **change})


def with_items(*columns):
    return Batch([5, 5], [5, 5], [0, 1], {"vision": Items(*([value] for value in columns))})


def schedule(n_gpus, limit):
    return orchvlm.compat.get_groups_and_subsamples(
        SimpleNamespace(total_hdp_gpus=n_gpus, max_seq_len_per_rank=limit), [(1, 5)])


REFUSED = [
    (partial(orchvlm.balance, [1, 2], 2**62, size=[1, 1], capacity=5), ValueError, "n_ranks"),
    (partial(orchvlm.plan_sequences, [3], 2, GROUPS, micro_batches=2**31), ValueError,
     "micro_batches"),
    (partial(orchvlm.SequencePlan, [1] * 6, "flex", [np.zeros(1, np.int64)] * 6 + [1, 1, 7, 1, 1]),
     TypeError, "from_bytes"),
    (partial(orchvlm.StepPlan, b"abcd", {}, [1] * 8), TypeError, "from_bytes"),
    (partial(simulate, with_items(7, 0, 4, 2, 9)), ValueError, "sample"),
    (partial(simulate, with_items(-1, 0, 4, 2, 9)), ValueError, "sample"),
    (partial(simulate, with_items(0, 0, -4, 2, 9)), ValueError, "length"),
    (partial(simulate, with_items(0, 0, 4, 2**53, 9)), ValueError, "out_tokens"),
    (partial(simulate, Batch([-1, 5], [5, 5], [0, 1])), ValueError, "text_tokens"),
    (partial(simulate, Batch([2**52, 2**52], [5, 5], [0, 1])), ValueError, "text_tokens"),
    (partial(simulate, flops={"llm": 3}), TypeError, "flops"),
    (partial(simulate, flops="llm"), TypeError, "flops"),
    (partial(simulate, parameters={"llm": 10**400}), ValueError, "parameters"),
    (partial(simulate, parameters={"llm": -1}), ValueError, "parameters"),
    (partial(simulate, policies=()), ValueError, "policies"),
    (partial(simulate, costs={"llm": 5}), TypeError, "SequenceCost or BatchCost"),
    (partial(simulate, costs={"llm": LINEAR, None: LINEAR}), ValueError, "unknown phases"),
    (partial(orchvlm.from_model, {"thinker_config": 5}, CLUSTER), TypeError, "thinker_config"),
    (partial(orchvlm.from_model, CONFIG, Cluster(1, 1, 1, 1e-10, 1, 1), efficiency=5e-324),
     ValueError, "efficiency"),
    (partial(schedule, 2.5, 100), TypeError, "total_hdp_gpus"),
    (partial(schedule, float("inf"), 100), TypeError, "total_hdp_gpus"),
    (partial(schedule, 2, 10**400), ValueError, "max_seq_len_per_rank"),
    (partial(schedule, 2, 0), ValueError, "max_seq_len_per_rank"),
    (partial(NO_ROUTE.send_counts, 2), ValueError, "rank"),
    (partial(NO_ROUTE.receive_counts, 0.5), TypeError, "rank"),
    (partial(read_lengths, "lengths.csv", per_unit=float("nan")), ValueError, "per_unit"),
    (partial(read_lengths, "lengths.csv", per_unit=-1), ValueError, "per_unit"),
    *((partial(data.ImageRule, std=std), error, "std") for std, error in (
        (10**400, ValueError), ((1, 10**400, 1), ValueError), ((1, 2, 1j), TypeError),
        (np.ones(3, complex), TypeError), (np.ma.array([1., 2, 3]), TypeError),
        (("a", "b", "c"), TypeError), ([1, [2, 3]], TypeError))),
    (partial(data.Clip, [np.zeros((2, 2, 3), np.uint8)], np.zeros(1, complex)), data.DataError,
     "times"),
    (partial(open_video, [], 10**400), ValueError, "fps"),
    *((partial(data.Mixture, [["a"], ["b"]], weights), error, "weights") for weights, error in (
        (np.ones(2, complex), TypeError), ([1, 10**400], ValueError))),
    (partial(orchvlm.balance, [2**64, 5], 2), ValueError, "lengths holds a value above 2\\^63"),
    (partial(orchvlm.balance, [5, "a"], 2), TypeError, "lengths must hold integers"),
    (partial(orchvlm.balance, [2**64, None], 2), TypeError, "lengths must hold integers"),
    (partial(orchvlm.balance, np.zeros(0, complex), 2), TypeError, "lengths"),
    (partial(orchvlm.balance, [5], 2, slack=np.complex64(1)), TypeError, "slack"),
    (partial(orchvlm.balance, [5], 2, slack=np.array(1j)), TypeError, "slack"),
    (partial(Batch, [2**70], [5], [0]), ValueError, "text_tokens holds a value above 2\\^63"),
    *((partial(orchvlm.plan_sequences, [3], 2, GROUPS, degrees=degrees), TypeError,
       "degrees must be a sequence") for degrees in (64, "8", np.array(8), {8: 1})),
    (partial(orchvlm.Planner, 5, CLUSTER, {}), TypeError, "batches"),
    (partial(orchvlm.Planner, [], None, {}), TypeError, "cluster"),
    (partial(orchvlm.Planner, [], CLUSTER, 5), TypeError, "costs"),
    (partial(orchvlm.Planner, [], CLUSTER, {}, work=5), TypeError, "no option 'work'"),
    (partial(orchvlm.Planner, [], CLUSTER, {}, relabel="max"), ValueError, "relabel"),
    *((partial(orchvlm.compat.get_seqlen_balanced_partitions, lengths, 2, False), error,
       "seqlen_list") for lengths, error in ((5, ValueError), ([1, 2.5], TypeError),
                                             ([1, -2], ValueError), ([1, 2**64], ValueError))),
    *((partial(orchvlm.compat.get_groups_and_subsamples, SimpleNamespace(
        total_hdp_gpus=2, max_seq_len_per_rank=100), pairs), error, "sample_id_seqlens")
      for pairs, error in ((5, TypeError), ([1, 2], TypeError), ([([], 5)], TypeError),
                           ([(1, 2.5)], TypeError), ([(1, 0)], ValueError),
                           ([(1, 500)], ValueError))),
    *((partial(plots.plot_loads, {"llm": before}, {"llm": np.ones(2)}), error, "before")
      for before, error in ((np.ma.array([1., 2]), TypeError), (["a", "b"], TypeError),
                            ([1, np.nan], ValueError), (3, ValueError))),
    *((partial(plots.plot_loads, {"llm": [1]}, {"llm": [1]}, path), error, word)
      for path, error, word in (("no/x.png", OSError, "no such folder"), (".", OSError, "folder"),
                                ("x.pdf", ValueError, ".png"))),
    (partial(BatchCost, np.complex128(1)), TypeError, "BatchCost.linear"),
    (partial(BatchCost, np.ones(1)), TypeError, "BatchCost.linear"),
    (partial(Items, *[np.zeros(0, complex)] * 5), TypeError, "Items.sample"),
    (partial(Items, *[[]] * 5, squares=np.zeros(0, complex)), TypeError, "Items.squares"),
    (partial(Items, *[[]] * 5, out_bytes_per_token=np.complex64(1)), TypeError,
     "out_bytes_per_token"),
    (partial(orchvlm.fit, [([1, 2], np.complex64(1))]), TypeError, r"measurements\[0\]"),
    (partial(orchvlm.fit, [([1, 2], 10**400)]), ValueError, r"measurements\[0\]"),
    *((partial(orchvlm.schedule, "linear", peak, 5), ValueError, "peak") for peak in (
        np.complex64(1), np.float16("inf"), 10**400)),
    (partial(simulate, Batch([5, 5], [5, 5], [0, 0], {"vision": Items(
        [0, 1], [0, 0], [4, 4], [2, 2], [9, 9], out_bytes_per_token=1e300)}), cluster=Cluster(
            1, 2, 1e9, 1e9, 5e-324, 5e-324), policies=("veomni",)), ValueError, "bandwidth"),
]


@pytest.mark.parametrize("call, error, word", REFUSED)
@pytest.mark.filterwarnings("error")
def test_refused_before_any_work(call, error, word):
    with pytest.raises(error, match=word):
        call()


@pytest.mark.parametrize("change, error, word", [
    ({"n_gpus": 2**40}, ValueError, "n_gpus"),
    ({"lengths": np.array([2**63 + 5], np.uint64)}, ValueError, "lengths"),
    ({"lengths": 5}, ValueError, "lengths"),
    ({"time_limit": float("nan")}, ValueError, "time_limit")])
def test_milp_refuses(change, error, word):
    pytest.importorskip("scipy")
    with pytest.raises(error, match=word):
        orchvlm.plan_sequences_milp(**{"lengths": [3, 4], "n_gpus": 2, "cost": GROUPS, **change})


def test_extremes_that_are_served():
    assert simulate(memory={"llm": (1e-320, 0)})["sampled"].step_s[0] > 0
    assert format_bytes(float("inf")) == "inf PiB"
    vision = {"hidden_size": 1280, "num_hidden_layers": 2, "patch_size": 14}
    counts = [orchvlm.from_model({**CONFIG, "vision_config": {**vision, "mlp_ratio": ratio}},
                                 CLUSTER).parameters for ratio in (4, np.array(4, np.uint8))]
    assert counts[0] == counts[1]
    assert schedule(2, np.int64(100))[1] == [[[1], [1]]]


def test_many_layers_are_counted_at_once():
    few, many = (orchvlm.from_model({**EXPERTS, "num_hidden_layers": n, "first_k_dense_replace": 3,
                                     "decoder_sparse_step": 2}, CLUSTER).parameters["llm"]
                 for n in (10, 10 + 2**30))
    assert many > few * 2**20


def test_the_demos_model_needs_no_more_than_its_phases():
    model = orchvlm.from_model(CONFIG, CLUSTER)
    assert set(demo.recomputed(model, CONFIG).memory) == {"llm"}
