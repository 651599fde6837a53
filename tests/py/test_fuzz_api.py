"""Junk for every public function: only TypeError, ValueError, MemoryError or orchvlm.Error may come
out, and never a crash or a hang.

ORCHVLM_FUZZ_EXAMPLES sets how many calls each function gets (default 60; 100000 takes an hour)."""
import inspect
import math
import os
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import orchvlm
from orchvlm import BatchCost, Cluster, SequenceCost, _core

EXAMPLES = int(os.environ.get("ORCHVLM_FUZZ_EXAMPLES", "60"))
FAIR = (TypeError, ValueError, MemoryError, orchvlm.Error)
if any(find_spec(package) is None for package in ("PIL", "tokenizers", "jinja2")):
    FAIR = (*FAIR, ImportError)  # what needs them says so

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
    values = draw(st.lists(st.integers(-5, 5000), min_size=60, max_size=60))
    array = np.array(values[:math.prod(shape)]).reshape(shape)
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

# Junk in one argument of a step must meet a batch and costs that go together.
BATCHES = st.sampled_from([
    orchvlm.Batch([5, 9, 2], [5, 9, 2], [0, 1, 0], {"vision": orchvlm.Items(
        [0, 2], [1, 0], [8, 4], [2, 1], [9, 9], out_bytes_per_token=4.0)}),
    orchvlm.Batch([], [], [], {"vision": orchvlm.Items([], [], [], [], [])})])
STEP_COSTS = st.just({"vision": BatchCost(linear=1e-3), "llm": BatchCost(linear=1.0, fixed=.5)})

# A good value for each parameter name: junk in one argument should meet sense in the others.
GOOD = {
    "lengths": st.lists(st.integers(1, 3000), max_size=12), "n_ranks": st.integers(1, 5),
    "seqlen_list": st.lists(st.integers(1, 3000), min_size=6, max_size=12),
    "k_partitions": st.integers(1, 4), "equal_size": st.booleans(), "n_gpus": st.integers(1, 9),
    "cost": COSTS, "cluster": CLUSTERS, "work_limit": st.integers(0, 300),
    "time_limit": st.just(0.05), "seed": st.integers(0, 9), "policy": st.sampled_from(
        ["flex", "static", "homogeneous", "chunked"]), "n": st.integers(0, 9),
    "batch": BATCHES, "batches": BATCHES, "costs": STEP_COSTS,
    "relabel": st.sampled_from([None, "sum", "minmax"]), "llm": st.just("balance"),
}
BOUNDED = {"work_limit", "time_limit", "n_ranks", "n_gpus", "k_partitions", "n"}
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


FUNCTIONS = dict(callables())


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
            # What bounds the work stays small or invalid: a valid 2^62 ranks is only slow.
            good = SCALARS.filter(small) if name in BOUNDED else JUNK
        value = data.draw(good)
        if parameter.kind is parameter.POSITIONAL_ONLY:
            positional.append(value)
        else:
            keywords[name] = value
    return positional, keywords


def small(value):
    return not isinstance(value, (int, float, np.number)) or not value > 100


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
@settings(max_examples=EXAMPLES, deadline=None, derandomize=False,
          suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_junk(name, data):
    positional, keywords = draw_arguments(data, FUNCTIONS[name])
    try:
        FUNCTIONS[name](*positional, **keywords)
    except FAIR:
        pass


CORE = {name: value for name, value in vars(_core).items() if inspect.isbuiltin(value)}


@pytest.mark.parametrize("name", sorted(CORE))
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(arguments=st.lists(JUNK, max_size=24))
def test_junk_at_the_c_boundary(name, arguments):
    """The C functions have private signatures, but junk must not crash them either."""
    try:
        CORE[name](*arguments)
    except FAIR:
        pass
