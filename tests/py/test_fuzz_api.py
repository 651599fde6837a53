"""Junk for every public function: only TypeError, ValueError, MemoryError or orchvlm.Error may come
out, and never a crash or a hang.

Most arguments of a call make sense and some are junk, so that junk gets past the first check.
ORCHVLM_FUZZ_EXAMPLES sets how many calls each function gets (default 1000; 100000 take some
minutes).  Plain draws, without shrinking, are a hundred times faster than a library's."""
import inspect
import math
import os
import random
import time
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest

import orchvlm
from orchvlm import Batch, BatchCost, Cluster, Items, Route, SequenceCost, _core, demo
from orchvlm.policies import POLICIES
from model_cases import draw_config, draw_model
from omni_cases import draw_omni_config

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", time.time_ns() % 2**32))
EXAMPLES = int(os.environ.get("ORCHVLM_FUZZ_EXAMPLES", "1000"))
FAIR = (TypeError, ValueError, MemoryError, orchvlm.Error)
if any(find_spec(package) is None for package in ("PIL", "tokenizers", "jinja2")):
    FAIR = (*FAIR, ImportError)  # what needs them says so

# ---------------------------------------------------------------- junk

CORNERS = [2**31 - 1, 2**31, 2**53, 2**62, 2**63 - 1, 2**63, -2**63, 10**30, 10**400]
FLOATS = [0.0, -0.0, 0.5, 1.0, -1.0, 3.7, 5e-324, 1e-320, 1e300, -1e300, math.inf, -math.inf,
          math.nan]
ODD = [None, True, False, "", "flex", "\0", b"", b"abcd", 1j, object(), type, ..., np.float32(2),
       np.int8(3), np.array(4), np.uint64(2**64 - 1), np.bool_(True), np.datetime64("2020", "s")]
DTYPES = ["i8", "i4", "u8", "u1", "f8", "f4", "f2", "?", "c16", "O", "U3", "M8[s]", ">i8"]
SHAPES = [(0,), (1,), (2,), (3,), (7,), (30,), (2, 3), (), (0, 2)]


def integer(rng):
    return rng.choice(CORNERS) if rng.random() < 0.3 else rng.randint(-3, 40)


def number(rng):
    kind = rng.random()
    return integer(rng) if kind < 0.5 else rng.choice(FLOATS) if kind < 0.8 else rng.gauss(0, 9)


def scalar(rng):
    return number(rng) if rng.random() < 0.5 else rng.choice(ODD)


def array(rng):
    shape, dtype = rng.choice(SHAPES), rng.choice(DTYPES)
    flat = [rng.randint(-5, 5000) for _ in range(math.prod(shape))]
    if dtype in ("f8", "i8") and rng.random() < 0.3:
        flat = [rng.choice(FLOATS if dtype == "f8" else CORNERS[:5]) for _ in flat]
    made = np.array(flat, None if flat else "i8").reshape(shape).astype(dtype)
    return made[::-1] if made.ndim and rng.random() < 0.5 else made


def some(rng, draw, most):
    return [draw(rng) for _ in range(rng.randint(0, most))]


def listed(rng):
    return rng.choice([
        lambda: some(rng, lambda r: r.randint(0, 9000), 12), lambda: some(rng, number, 5),
        lambda: some(rng, scalar, 4), lambda: some(rng, lambda r: some(r, integer, 3), 3)])()


def mapping(rng):
    keys = ["llm", "vision", "hidden_size", 3, None, "", 1.5]
    return {rng.choice(keys): rng.choice([scalar, cost])(rng) for _ in range(rng.randint(0, 4))}


def junk(rng):
    return rng.choice([scalar, scalar, array, array, listed, cost, mapping, cluster])(rng)


# ---------------------------------------------------------------- sense

COSTS = [BatchCost(linear=1.0), BatchCost(padded_quadratic=1.0, fixed=2.0), BatchCost(),
         SequenceCost(1e-9, 1e-4), SequenceCost.flexsp_gpt7b(n_gpus=8),
         SequenceCost(0, 1, comm={1: 0, 3: .5}, memory_per_token=1, memory_limit=100, heads=4)]
PHASE_COSTS = [
    {"vision": BatchCost(linear=1e-3), "llm": BatchCost(linear=1.0, fixed=.5)},
    {"vision": BatchCost(padded_quadratic=1e300), "llm": SequenceCost(1e-9, 1e-4)}]
PLAIN = [Batch([5, 9, 2], [5, 9, 2], [0, 1, 0], {"vision": Items(
    [0, 2], [1, 0], [8, 4], [2, 1], [9, 9], out_bytes_per_token=4.0)}),
    Batch([], [], [], {"vision": Items([], [], [], [], [])})]
COUNTED = orchvlm.from_model(demo.MODEL_9B, Cluster.preset("h100"))
ROUTE = Route([1, 0], [0, 0], [1, 1], [1, 0], [0, 1], [0, 0], [0, 0], 2)


def cost(rng):
    return rng.choice(COSTS)


def cluster(rng):
    return rng.choice([Cluster.preset("h100", 2, 4), Cluster(1, 1, 1, 1, 1, 1),
                       Cluster(1, 3, 1e300, 1e-300, 5e-324, 1e300)])


def batch(rng):
    if rng.random() < 0.7:
        return rng.choice(PLAIN)
    wild = rng.random() < 0.5
    text, rank, *columns = (
        [integer(rng) if wild and rng.random() < 0.2 else rng.randint(0, most) for _ in range(3)]
        for most in (9, 1, 2, 9, 9, 3, 9))
    try:
        return Batch(text, [1, 2, 3], rank, {"vision": Items(
            *columns, out_bytes_per_token=rng.choice([0, 4.0, 1e300]))})
    except FAIR:
        return PLAIN[0]


def configuration(rng):
    """One that counts, but for at most one field, at the top or in a part, that is junk."""
    config = dict(demo.MODEL_9B)
    where = rng.choice([config, config, "vision_config", "audio_config"])
    if isinstance(where, str):
        config[where] = where = dict(config[where])
    if rng.random() < 0.8:
        extra = ["num_experts", "num_experts_per_tok", "thinker_config", "mlp_only_layers",
                 "head_dim", "mlp_ratio", "window_size", "text_config", "layer_types"]
        where[rng.choice([*where, *extra])] = rng.choice([junk, integer])(rng)
    return config


def scheduler(rng):
    limits = [100, 9000, 1e-320, 10**400, np.int64(99)]
    return SimpleNamespace(
        total_hdp_gpus=rng.randint(1, 9) if rng.random() < 0.7 else bounded(rng, 100),
        max_seq_len_per_rank=rng.choice(limits) if rng.random() < 0.8 else scalar(rng))


def measurements(rng):
    def row(wide):
        lengths = [rng.randint(1, 99) for _ in range(rng.randint(1, 4))]
        figures = [number(rng) if rng.random() < 0.1 else rng.uniform(.1, 9) for _ in range(2)]
        return (lengths, rng.randint(1, 3), *figures) if wide else (lengths, figures[0])
    wide = rng.random() < 0.5
    return [row(wide) for _ in range(rng.randint(1, 5))]


def by_phase(draw):
    return lambda rng: {phase: draw(rng) for phase in ("vision", "llm") if rng.random() < 0.6}


def matrix(rng):
    values = np.array([[rng.uniform(-2, 2) for _ in range(4)] for _ in range(3)])
    return values.astype(rng.choice(["f4", "f8"]))


# A good value for each parameter name: junk in one argument should meet sense in the others.
MODEL = draw_model(0, draw_omni_config(np.random.default_rng(5)), threads=1)
ADAPTED = draw_model(0, draw_config(np.random.default_rng(5), False), threads=1)
PATCH_VALUES = int(np.prod(MODEL.parameters["model.visual.patch_embed.proj.weight"].shape[1:]))
INPUTS = [orchvlm.Inputs(input_ids=[7, 8, 9], labels=[7, 8, 9]), orchvlm.Inputs(input_ids=[]),
          orchvlm.Inputs(input_ids=[6, 5, 5, 7], labels=[-100, -100, -100, 7], mel_lengths=[9],
                         mel=np.zeros((9, MODEL.config.audio["num_mel_bins"]))),
          orchvlm.Inputs(input_ids=[1, 3, 9], cu_seqlens=[0, 2, 3], grid_thw=[[1, 2, 2]],
                         labels=[1, -100, 9], pixels=np.zeros((4, PATCH_VALUES), np.uint8)),
          orchvlm.Inputs(input_ids=[9, 300], labels=[9, 400])]
WIDTH, VOCAB = MODEL.config.text["hidden_size"], MODEL.config.text["vocab_size"]
STACKED = len(MODEL.config.vision["deepstack_visual_indexes"])


def states(*shapes):
    """Arrays that may be hidden states, features or their gradients, of these shapes."""
    return lambda rng: np.full(rng.choice(shapes), rng.choice([0.0, 1.0, -3.5]), rng.choice(
        ["f4", "f8"]))


GOOD = {
    "lengths": lambda r: some(r, lambda q: q.randint(1, 3000), 12),
    "seqlen_list": lambda r: [r.randint(1, 3000) for _ in range(r.randint(6, 12))],
    "n_ranks": lambda r: r.randint(1, 5), "n_gpus": lambda r: r.randint(1, 9),
    "k_partitions": lambda r: r.randint(1, 4), "equal_size": lambda r: r.random() < 0.5,
    "cost": cost, "cluster": cluster, "work_limit": lambda r: r.randint(0, 300),
    "time_limit": lambda r: 0.02, "seed": lambda r: r.randint(0, 9), "n": lambda r: r.randint(0, 9),
    "policy": lambda r: r.choice(["flex", "static", "homogeneous", "chunked"]),
    "batch": batch, "batches": batch, "costs": lambda r: r.choice(PHASE_COSTS),
    "relabel": lambda r: r.choice([None, "sum", "minmax"]),
    "llm": lambda r: r.choice(["balance", "balance", "sequence_parallel"]),
    "policies": lambda r: r.sample(sorted(POLICIES), 2),
    "memory": by_phase(lambda r: (1e-320, 0) if r.random() < .3 else (number(r), number(r))),
    "flops": by_phase(cost), "parameters": by_phase(number), "config": configuration,
    "model": lambda r: COUNTED, "scheduler": scheduler, "measurements": measurements,
    "sample_id_seqlens": lambda r: [(i, r.randint(1, 999)) for i in range(r.randint(0, 6))],
    "name": lambda r: r.choice(["h100", "code_bytes"]), "degree": lambda r: 1,
    "inputs": lambda r: r.choice(INPUTS), "normalizer": lambda r: r.uniform(1, 9),
    "checkpoint": lambda r: r.choice(["none", "selective", "full"]),
    "rows": lambda r: some(r, lambda q: q.randint(0, 2), 3), "stop": lambda r: [3],
    "modality": lambda r: "vision", "taps": lambda r: [0, 1], "vision_taps": lambda r: [1],
    "features": states((1, WIDTH)), "dfeatures": states((1, WIDTH)),
    "extra": states((STACKED, 1, WIDTH)), "dextra": states((STACKED, 1, WIDTH)),
    "dhidden": states((3, WIDTH)), "dlogits": states((1, VOCAB), (2, VOCAB), (0, VOCAB)),
    "dlogprobs": states((3,)), "dentropy": states((3,)), "grad": lambda r: r.random() < 0.5,
    "max_version": lambda r: (1, 0), "dl_device": lambda r: (1, 0), "copy": lambda r: False,
    "top_k": lambda r: r.randint(1, 99), "top_p": lambda r: r.uniform(0.01, 1),
    "temperature": lambda r: r.uniform(0, 2),
    "router_counts": lambda r: ([1] * MODEL.config.text["num_experts"], 16),
    **{name: matrix for name in ("image", "text", "student", "teacher", "feature", "weight")},
    "masked": lambda r: [True, False, True], "total": lambda r: r.uniform(1, 9),
    "bias": lambda r: r.uniform(-9, 9), "offset": lambda r: r.randint(0, 1),
    "tokens": lambda r: [[r.randint(0, 2)] for _ in range(3)], "documents": lambda r: [[0, 1], [2]],
    "vocabulary": lambda r: r.randint(1, 9), "frequency": lambda r: [0.5, 1.0, 0.0],
    "match": lambda r: r.choice([["*_proj"], ["*.q_proj", "*"], ["*attn*"]]),
    "r": lambda r: r.randint(1, 4), "alpha": number, "decay": lambda r: r.random(),
    "counts": lambda r: np.ones(MODEL.layer_counts().shape, np.int64),
    "rate": lambda r: r.random(), "route": lambda r: r.choice([LOOP, ROUTE]),
    "arrays": lambda r: np.zeros((3, 2)), "gradients": lambda r: [np.zeros(3), np.zeros((3, 2))],
    "rng": lambda r: np.random.default_rng(0), "samples_per_rank": lambda r: r.randint(1, 4),
}
# What bounds the work stays small or invalid: a valid 2^31 ranks, or 40 s, are only slow.
BOUNDED = {"work_limit": 100, "time_limit": 0.1, "n_ranks": 100, "n_gpus": 100,
           "k_partitions": 100, "n": 100, "max_new_tokens": 3}
SLOW = {"plan_sequences_milp": 20, "comm.run_processes": 100, "comm.run_threads": 4,
        "demo.batch": 10, "Model().generate": 10,
        **{f"Model().{name}": 5 for name in ("forward", "logprobs", "encode", "decode")}
        }  # so many times fewer calls


def bounded(rng, most):
    while True:
        value = scalar(rng)
        if value is None and most < 1:
            continue  # no limit at all
        numeric = isinstance(value, (int, float, np.number, np.ndarray))
        if not numeric or not value > most:
            return value


# ---------------------------------------------------------------- the public functions

DISPATCHER = orchvlm.Dispatcher(orchvlm.comm.Comm(_core.comm_self()))
LOOP = Route([0, 1], [0, 0], [2, 1], [0, 0], [0, 0], [0, 2], [0, 2], 1)
TENSOR = MODEL.tensor("model.language_model.norm.weight")
SKIP = {"Planner"}  # a thread that plans ahead: its own tests
if find_spec("scipy") is None:
    SKIP.add("plan_sequences_milp")
for package, name in (("torch", "comm.from_torch"), ("mpi4py", "comm.from_mpi4py")):
    if find_spec(package) is None:
        SKIP.add(name)


def adapted(r=8, alpha=16.0, match=("*_proj",), seed=0, rslora=False):
    """Adds adapters and takes them away."""
    ADAPTED.add_lora(r, alpha, match, seed, rslora=rslora)
    ADAPTED.remove_lora()


METHODS = {"BatchCost()": BatchCost(1.0, 2.0, 3.0), "SequenceCost()": SequenceCost(1.0, 2.0),
           **{f"Model().{name}": getattr(MODEL, name)
              for name in ("forward", "logprobs", "backward", "logits", "generate", "encode",
                           "decode", "encode_backward", "tensor", "load_state_dict", "freeze",
                           "route", "correct_routers", "flops", "memory")},
           "Tensor().__dlpack__": TENSOR.__dlpack__,
           "Model().add_lora": adapted,
           "AdamW().step": orchvlm.AdamW(MODEL, 1e-3).step,
           "AdamW().load_state_dict": orchvlm.AdamW(MODEL, 1e-3).load_state_dict,
           **{f"Route.{name}": getattr(ROUTE, name)
              for name in ("compose", "apply", "in_bytes", "send_counts", "receive_counts")},
           "Dispatcher().prepare": DISPATCHER.prepare,
           **{f"Dispatch().{name}": getattr(DISPATCHER.prepare(LOOP), name)
              for name in ("apply", "reverse", "start", "start_reverse")}}

# What a protocol asks for beside the usual.
PROTOCOL = {"Tensor().__dlpack__": (BufferError,), "Model().tensor": (KeyError,),
            "replay": (OSError,)}


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
                    if f"{name}.{member}" not in SKIP and callable(getattr(value, member)):
                        yield f"{name}.{member}", getattr(value, member)
                except ImportError:
                    continue
        elif name not in SKIP and not (inspect.isclass(value) and issubclass(value, Exception)):
            yield name, value
            for key in ("from_bytes", "preset"):
                if hasattr(value, key):
                    yield f"{name}.{key}", getattr(value, key)


FUNCTIONS = {**dict(callables()), **METHODS}


def draw_arguments(rng, parameters):
    """Arguments as they should be, junk, or left out, in shares that differ from call to call."""
    if parameters is None:
        return [junk(rng)], {}
    spoilt, given = rng.choice([0.0, 0.05, 0.3]), rng.choice([0.1, 0.5])
    positional, keywords = [], {}
    for parameter in parameters:
        name, most = parameter.name, BOUNDED.get(parameter.name)
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or (
                parameter.default is not parameter.empty and rng.random() > given
                and name not in ("work_limit", "time_limit")):
            continue
        if name in GOOD and rng.random() >= spoilt:
            value = GOOD[name](rng)
        else:
            value = junk(rng) if most is None else bounded(rng, most)
        if parameter.kind is parameter.POSITIONAL_ONLY:
            positional.append(value)
        else:
            keywords[name] = value
    return positional, keywords


def attempt(name, function, positional, keywords):
    try:
        function(*positional, **keywords)
    except (*FAIR, *PROTOCOL.get(name, ())):
        pass
    except Exception as error:
        raise AssertionError(f"{name}(*{positional!r}, **{keywords!r}) raised {error!r}; "
                             f"ORCHVLM_TEST_SEED={SEED} repeats it") from error


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_junk(name):
    print(f"ORCHVLM_TEST_SEED={SEED}")
    rng, function = random.Random(f"{SEED} {name}"), FUNCTIONS[name]
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:
        parameters = None
    for _ in range(EXAMPLES // SLOW.get(name, 1)):
        attempt(name, function, *draw_arguments(rng, parameters))


# ---------------------------------------------------------------- the C boundary

CORE = {name: value for name, value in vars(_core).items() if inspect.isbuiltin(value)}


def record(monkeypatch):
    """Calls of the C functions that sensible calls of the public ones make: name -> arguments."""
    calls = {name: [] for name in CORE}

    def recorder(name):
        def call(*arguments):
            calls[name].append(arguments)
            return CORE[name](*arguments)
        return call

    limits, pair = {"work_limit": 50, "time_limit": 0.02}, Cluster.preset("h100", 1, 2)
    with monkeypatch.context() as patch:
        for name in CORE:
            patch.setattr(_core, name, recorder(name))
        for llm, costs in zip(("balance", "sequence_parallel"), PHASE_COSTS):
            orchvlm.StepPlan.from_bytes(orchvlm.plan_step(
                PLAIN[0], pair, {**costs, "vision": COSTS[0]}, llm=llm,
                **limits).to_bytes())
        orchvlm.balance([3, 4, 5], 2, COSTS[1], squares=[9, 16, 25.], size=[1, 2, 3], capacity=9,
                        home=[0, 1, 1], base_load=[0, 1.0], speed=[1, 2.0], node_size=1, **limits)
        orchvlm.balance([3, 4], 2, [1.0, 2.0], keep_together=[0, 1], pinned=[-1, 0],
                        max_items=2, **limits)
        plan = orchvlm.plan_sequences([9, 5], 4, COSTS[4], **limits)
        orchvlm.plan_sequences([9, 4], 4, COSTS[4], warm_start=plan, **limits)
        plan.check()
        orchvlm.sequence_bound([9, 5], 4, COSTS[4], **limits)
        orchvlm.bucket_lengths([3, 4, 5], 2), orchvlm.blast_lengths([3, 4, 5], 2)
        ROUTE.compose(ROUTE.invert()), Route(*ROUTE._fields())
        orchvlm.simulate(PLAIN[0], pair, {"vision": COSTS[0], "llm": COSTS[0]},
                         policies=("orchmllm",), **limits)
        COSTS[0]([1, 2], [1.0, 4.0]), COSTS[4]([1, 2], 2)
        x = np.ones((3, 2))
        orchvlm.losses.masked_cosine(x, x, [True, False, True])
        orchvlm.losses.siglip(x, x, 1.0, 0.0, threads=1)
        orchvlm.losses.superclass(x, x, [[0], [1, 2], []], threads=1)
        orchvlm.fit([([1, 2], 1.0), ([3], 2.0)]), orchvlm.fit([([1, 2], 1, 1.0, 9.0)])
    return calls


def spoil(rng, value):
    """The value with one part of it replaced by junk."""
    if isinstance(value, (tuple, list)) and len(value) and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return (*value[:at], spoil(rng, value[at]), *value[at + 1:])
    if isinstance(value, np.ndarray) and value.size and rng.random() < 0.6:
        value = value.copy()
        odd = rng.choice(FLOATS if value.dtype.kind == "f" else [-1, 0, 1, 5, 2**53, 2**62, -2**63])
        value.flat[rng.randrange(value.size)] = np.array(odd).astype(value.dtype)  # may wrap
        return value
    while True:  # counts that only take gigabytes are left out
        made = junk(rng)
        if not (isinstance(made, (int, float)) and 100 < made < 2**53):
            return made


@pytest.mark.parametrize("name", sorted(CORE))
def test_junk_at_the_c_boundary(name, monkeypatch):
    """The C functions have private signatures, but junk must not crash them either."""
    print(f"ORCHVLM_TEST_SEED={SEED}")
    rng, known = random.Random(f"{SEED} {name}"), record(monkeypatch)[name]
    for _ in range(EXAMPLES):
        if known and rng.random() < 0.9:
            arguments = spoil(rng, rng.choice(known))
        else:
            arguments = [junk(rng) for _ in range(rng.randrange(24))]
        attempt(name, CORE[name], arguments if isinstance(arguments, (tuple, list)) else (), {})
