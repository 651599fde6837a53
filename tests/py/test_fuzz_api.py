"""Junk for every public function: only TypeError, ValueError, MemoryError or orchvlm.Error may come
out, and never a crash or a hang.

ORCHVLM_FUZZ_EXAMPLES sets how many calls each function gets (default 60; 100000 takes an hour)."""
import inspect
import math
import os
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import orchvlm
from orchvlm import Batch, BatchCost, Cluster, Items, Route, SequenceCost, _core, demo
from orchvlm.policies import POLICIES

EXAMPLES = int(os.environ.get("ORCHVLM_FUZZ_EXAMPLES", "60"))
# Fresh junk in every run, on machines that call themselves CI too; a failure prints its blob.
FUZZ = settings(max_examples=EXAMPLES, deadline=None, derandomize=False, print_blob=True,
                suppress_health_check=list(HealthCheck))
FAIR = (TypeError, ValueError, MemoryError, orchvlm.Error)

INTEGERS = st.one_of(
    st.integers(-3, 40), st.sampled_from([2**31, 2**53, 2**62, 2**63 - 1, 2**63, -2**63, 10**30]))
NUMBERS = st.one_of(INTEGERS, st.floats(), st.sampled_from([0.0, 1.0, 1e300, math.inf, math.nan]))
SCALARS = st.one_of(NUMBERS, st.none(), st.booleans(), st.text(max_size=5), st.binary(max_size=5),
                    st.complex_numbers(), st.sampled_from([object(), type, np.float32(2),
                                                           np.int8(3), np.array(4), ...]))
DTYPES = ["i8", "i4", "u8", "u1", "f8", "f4", "f2", "?", "c16", "O", "U3", "M8[s]", ">i8"]


@st.composite
def arrays(draw):
    shape = draw(st.sampled_from([(0,), (1,), (3,), (7,), (30,), (2, 3), (), (0, 2)]))
    rng = np.random.default_rng(draw(st.integers(0, 99)))  # element by element would be slow
    array = rng.integers(-5, 5001, shape)
    try:
        array = array.astype(draw(st.sampled_from(DTYPES)))
    except (ValueError, TypeError):
        pass
    return array[::-1] if array.ndim and draw(st.booleans()) else array


LISTS = st.one_of(st.lists(st.integers(0, 9000), max_size=12), st.lists(NUMBERS, max_size=5),
                  st.lists(SCALARS, max_size=4),
                  st.lists(st.lists(INTEGERS, max_size=3), max_size=3))
COSTS = st.sampled_from([
    BatchCost(linear=1.0), BatchCost(padded_quadratic=1.0, fixed=2.0), BatchCost(),
    SequenceCost(1e-9, 1e-4), SequenceCost.flexsp_gpt7b(n_gpus=8),
    SequenceCost(0, 1, comm={1: 0, 3: .5}, memory_per_token=1, memory_limit=100, heads=4)])
KEYS = st.one_of(st.sampled_from(["llm", "vision", "hidden_size"]),
                 SCALARS.filter(lambda x: x.__hash__ is not None))
MAPPINGS = st.dictionaries(KEYS, st.one_of(SCALARS, COSTS), max_size=4)
CLUSTERS = st.sampled_from([Cluster.preset("h100", 2, 4), Cluster(1, 1, 1, 1, 1, 1)])
JUNK = st.one_of(SCALARS, arrays(), LISTS, COSTS, MAPPINGS, CLUSTERS)

COLUMNS = st.lists(st.integers(-1, 9) | st.sampled_from([2**31, 2**53, 2**62, 2**63 - 1, -2**63]),
                   min_size=3, max_size=3)

# Junk in one argument of a step must meet a batch and costs that go together.
BATCHES = st.one_of(
    st.just(Batch([5, 9, 2], [5, 9, 2], [0, 1, 0], {"vision": Items(
        [0, 2], [1, 0], [8, 4], [2, 1], [9, 9], out_bytes_per_token=4.0)})),
    st.just(Batch([], [], [], {"vision": Items([], [], [], [], [])})),
    st.builds(lambda text, rank, *columns: Batch(text, [1, 2, 3], rank, {"vision": Items(
        *columns, out_bytes_per_token=1e300)}), *[COLUMNS] * 7))
STEP_COSTS = st.sampled_from([
    {"vision": BatchCost(linear=1e-3), "llm": BatchCost(linear=1.0, fixed=.5)},
    {"vision": BatchCost(padded_quadratic=1e300), "llm": SequenceCost(1e-9, 1e-4)}])
PHASES = st.sampled_from(["llm", "vision"])


def spoilt(config):
    """A configuration with at most one field, at the top or in a part of it, that is junk."""
    parts = [key for key, value in config.items() if isinstance(value, dict)]
    value = SCALARS | st.sampled_from([2**31 - 1, 1e-320]) | LISTS
    top = st.builds(lambda key, junk: {**config, key: junk}, st.sampled_from([
        *config, "num_experts", "thinker_config", "mlp_only_layers", "head_dim"]), value)
    inner = [st.builds(lambda key, junk, part=part: {**config, part: {**config[part], key: junk}},
                       st.sampled_from([*config[part], "mlp_ratio", "window_size"]), value)
             for part in parts]
    return st.one_of(st.just(config), top, *inner)


SCHEDULERS = st.builds(SimpleNamespace, total_hdp_gpus=st.integers(-1, 9) | SCALARS.filter(
    lambda x: small(x)), max_seq_len_per_rank=st.sampled_from([100, 1e-320, 10**400]) | SCALARS)

# A good value for each parameter name: junk in one argument should meet sense in the others.
GOOD = {
    "lengths": st.lists(st.integers(1, 3000), max_size=12), "n_ranks": st.integers(1, 5),
    "seqlen_list": st.lists(st.integers(1, 3000), min_size=6, max_size=12),
    "k_partitions": st.integers(1, 4), "equal_size": st.booleans(), "n_gpus": st.integers(1, 9),
    "cost": COSTS, "cluster": CLUSTERS, "work_limit": st.integers(0, 300),
    "time_limit": st.just(0.05), "seed": st.integers(0, 9), "policy": st.sampled_from(
        ["flex", "static", "homogeneous", "chunked"]), "n": st.integers(0, 9),
    "batch": BATCHES, "batches": BATCHES, "costs": STEP_COSTS,
    "relabel": st.sampled_from([None, "sum", "minmax"]), "llm": st.sampled_from(
        ["balance", "sequence_parallel"]),
    "policies": st.lists(st.sampled_from(sorted(POLICIES)), max_size=2),
    "memory": st.dictionaries(PHASES, st.tuples(NUMBERS, NUMBERS) | st.just((1e-320, 0))),
    "flops": st.dictionaries(PHASES, COSTS), "parameters": st.dictionaries(PHASES, NUMBERS),
    "config": spoilt(demo.MODEL_9B), "model": st.just(orchvlm.from_model(
        demo.MODEL_9B, Cluster.preset("h100"))),
    "scheduler": SCHEDULERS, "sample_id_seqlens": st.lists(st.tuples(INTEGERS, st.integers(1, 99))),
    "measurements": st.lists(st.tuples(LISTS, NUMBERS), max_size=4) | st.lists(
        st.tuples(st.lists(st.integers(1, 99)), st.integers(1, 3), st.floats(1e-3, 9), NUMBERS)),
    "name": st.sampled_from(["h100", "code_bytes"]), "rng": st.just(np.random.default_rng(0)),
    "degree": st.just(1),
}
# What bounds the work stays small or invalid: a valid 2^62 ranks, or 40 s, are only slow.
BOUNDED = {"work_limit": 100, "time_limit": 0.1, "n_ranks": 100, "n_gpus": 100,
           "k_partitions": 100, "n": 100, "nodes": 100, "gpus_per_node": 100}
ROUTE = Route([1, 0], [0, 0], [1, 1], [1, 0], [0, 1], [0, 0], [0, 0], 2)
METHODS = {"BatchCost()": BatchCost(1.0, 2.0, 3.0), "SequenceCost()": SequenceCost(1.0, 2.0),
           **{f"Route.{name}": getattr(ROUTE, name)
              for name in ("compose", "apply", "send_counts", "receive_counts")}}
SKIP = {"Planner"}  # a thread that plans ahead: its own tests
if find_spec("scipy") is None:
    SKIP.add("plan_sequences_milp")


def callables():
    for name in orchvlm.__all__:
        try:
            value = getattr(orchvlm, name)
        except ImportError:  # test_docs.py reports it
            continue
        if inspect.ismodule(value):
            own = [key for key, member in vars(value).items() if not key.startswith("_")
                   and getattr(member, "__module__", None) == value.__name__]
            for member in getattr(value, "__all__", own):
                try:
                    if callable(getattr(value, member)):
                        yield f"{name}.{member}", getattr(value, member)
                except ImportError:
                    continue
        elif name not in SKIP and not (inspect.isclass(value) and issubclass(value, Exception)):
            yield name, value
            for key in ("from_bytes", "preset"):
                if hasattr(value, key):
                    yield f"{name}.{key}", getattr(value, key)


FUNCTIONS = {**dict(callables()), **METHODS}


def draw_arguments(data, function):
    """Keyword arguments: some as they should be, some junk, some left out."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return [data.draw(JUNK)], {}
    positional, keywords = [], {}
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        name = parameter.name
        required = parameter.default is parameter.empty
        kind = data.draw(st.integers(0, 3))
        if not required and kind < 2 and name not in ("work_limit", "time_limit"):
            continue
        good = GOOD.get(name, JUNK)
        if kind == 3 or name not in GOOD:
            most = BOUNDED.get(name)
            good = JUNK if most is None else SCALARS.filter(lambda x, most=most: small(x, most))
        value = data.draw(good)
        if parameter.kind is parameter.POSITIONAL_ONLY:
            positional.append(value)
        else:
            keywords[name] = value
    return positional, keywords


def small(value, most=100):
    if value is None:  # no limit at all
        return most >= 1
    return not isinstance(value, (int, float, np.number, np.ndarray)) or not value > most


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
@FUZZ
@given(data=st.data())
def test_junk(name, data):
    positional, keywords = draw_arguments(data, FUNCTIONS[name])
    try:
        FUNCTIONS[name](*positional, **keywords)
    except FAIR:
        pass


CORE = {name: value for name, value in vars(_core).items() if inspect.isbuiltin(value)}


@pytest.mark.parametrize("name", sorted(CORE))
@FUZZ
@given(arguments=st.lists(JUNK, max_size=24))
def test_junk_at_the_c_boundary(name, arguments):
    """The C functions have private signatures, but junk must not crash them either."""
    try:
        CORE[name](*arguments)
    except FAIR:
        pass
