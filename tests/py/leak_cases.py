"""Calls the extension again and again and looks for what does not come back.

Run by test_leaks.py, and alone by any interpreter (a debug build counts references exactly):

    python tests/py/leak_cases.py [CASE...]

Three counters per case, each over windows of many calls: blocks of Python's allocator, traced bytes
of NumPy's arrays, and the resident size.  A leak grows in every window; caches settle in the first.
"""
import gc
import resource
import sys
import tracemalloc

import numpy as np

import orchvlm
from orchvlm import BatchCost, SequenceCost, _core

WINDOWS, CALLS = 6, 200
LENGTHS = np.arange(1, 200, dtype=np.int64) * 37 % 5000 + 1
COST = BatchCost(linear=1.0, quadratic=1e-4)
SEQUENCE = SequenceCost.flexsp_gpt7b(n_gpus=8)
SMALL = SequenceCost(1e-9, 1e-4, comm={1: 0, 2: 1e-6, 4: 2e-6}, memory_per_token=1,
                     memory_limit=9000)
ROWS = [([100] * n, 0.1 * n) for n in range(1, 9)]


def must_fail(function, *args, **options):
    try:
        function(*args, **options)
    except (TypeError, ValueError, orchvlm.Error):
        return
    raise AssertionError(f"{function} accepted {args} {options}")


def plan():
    return orchvlm.plan_sequences(LENGTHS[:12], 4, SMALL, work_limit=0, time_limit=None)


FEATURES = np.ones((3, 2))
SEGMENTS = (np.array([0, 1, 2, 3]), np.zeros(3, np.int32), np.ones(3))
CONFIG = orchvlm.preset("tiny").values
CONFIG["vision_config"] |= {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48,
                            "out_hidden_size": 32, "adapter_hidden_size": 32}
CONFIG["text_config"] |= {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48,
                          "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
ADAPTED = orchvlm.Model(CONFIG, threads=1)


def averaged():
    ema = orchvlm.EMA(ADAPTED)
    ema.update()
    with ema.swap():
        must_fail(ema.update)
    ema.close()


ENGINE = ([1.0, 2.0, 0.5], [0, 0, 1, 3], [0, 0, 1], [0, 1, 2, 3], [0, 1, 0], 2)

def model():
    """A tiny model, made once, with its inputs and what an encode gave."""
    if not MADE:
        from model_cases import draw_config, draw_model
        config = draw_config(np.random.default_rng(5), True)
        made = draw_model(0, config, threads=1)
        patch = int(np.prod(made.parameters["model.visual.patch_embed.proj.weight"].shape[1:]))
        inputs = orchvlm.Inputs(input_ids=[1, 3, 5], labels=[1, 3, 5], grid_thw=[[1, 2, 2]],
                                pixels=np.zeros((4, patch), np.float32))
        MADE.append((made, inputs, made.encode("vision", inputs)))
    return MADE[0]


def phases():
    made, inputs, given = model()
    made.encode("vision", inputs)
    hidden = made.decode(inputs, *given)
    made.encode_backward(*made.backward(
        dhidden=hidden, rows=[0], dlogits=made.logits([0])))
    made.forward(inputs, taps=[0], vision_taps=[1])
    made.backward()


def phase_errors():
    made, inputs, (features, extra) = model()
    must_fail(made.encode, "vision", inputs, checkpoint="x")
    must_fail(made.decode, inputs)
    must_fail(made.decode, inputs, features[:, 1:], extra)
    must_fail(made.forward, inputs, taps=[99])
    must_fail(made.encode_backward, features[:, 1:])
    made.decode(inputs, features, extra)
    must_fail(made.backward)
    must_fail(made.backward, dlogits=features, rows=[0])
    must_fail(made._core.tap, False, 9)


def exports():
    made, _, _ = model()
    tensor = made.tensor("model.language_model.norm.weight")
    np.from_dlpack(tensor), tensor.__dlpack__(), tensor.__dlpack__(max_version=(1, 0))
    np.from_dlpack(made.tensor("model.language_model.norm.weight", grad=True))
    made._core.trace_start()
    made.forward(model()[1], training=False)
    made._core.trace_stop()


def transfers():
    route = orchvlm.Route([0, 0], [0, 0], [1, 1], [0, 0], [0, 0], [0, 0], [0, 1], 1,
                          source_rows=[2])
    comm = orchvlm.comm.Comm(_core.comm_self())
    way = orchvlm.Dispatcher(comm, threads=2).prepare(route, [0, 2], 4)
    way.reverse(way.apply(FEATURES[:2]))
    way.start_reverse([FEATURES[[0, 1, 2, 0]], FEATURES[[0, 1, 2, 0]]]).wait()
    way.start(FEATURES[:2])  # dropped, until the communicator closes
    must_fail(way.apply, FEATURES)
    must_fail(way.reverse, np.zeros(4, np.int64))
    must_fail(way._core.wait, comm._core, None)
    must_fail(way._core.move, None, (), (), 0, 0, 0)
    must_fail(orchvlm.Dispatcher(comm).prepare, route, [0, 0])
    comm.close()


def shared_tokens():
    made, inputs, (features, extra) = model()
    comm = orchvlm.comm.Comm(_core.comm_self())
    group = orchvlm.sequence_parallel.SequenceGroup(comm)
    part = group.shard(inputs)
    made.forward(part, 1.0, features=features, extra=extra)
    must_fail(made.forward, part, features=features, extra=extra)
    must_fail(made._core.forward, *[None] * 22, comm._core)
    must_fail(_core.SequenceGroup, made._core)
    made.backward()
    comm.close()
    must_fail(made.forward, part, 1.0, features=features, extra=extra)
    must_fail(_core.SequenceGroup, comm._core)


def communicate(group):
    with group.dup() as twin, group.split(group.rank) as alone:
        twin.all_gather(np.arange(3))
        twin.all_to_all_start(np.arange(2), [1, 1]).wait()
        twin.all_reduce_start(np.ones(3))
        alone.reduce_scatter(np.ones(3))
        twin.barrier()


def comm_errors():
    group = orchvlm.comm.init()
    must_fail(group.all_gather, np.zeros(3), [4])
    must_fail(group.all_reduce, np.zeros(3), "mean")
    must_fail(group._core.all_to_all, np.zeros(3), [24], np.zeros(3), [23], False)
    must_fail(group._core.all_gather, np.zeros(3), np.zeros(3), [8], True)
    must_fail(group._core.wait, 1)
    must_fail(_core.comm_threads, 2, (1, 2))
    must_fail(_core.comm_local, "/no/such/folder/x", 0, 2, (1.0, 1.0, 0.0, 0))
    must_fail(_core.comm_mpi, ("libno_such_mpi.so",), 0)
    must_fail(_core.comm_python, object(), 1, 1)
    broken = orchvlm.comm.Comm(_core.comm_python(Broken(), 0, 1))
    must_fail(broken.barrier)
    group.abort("enough")
    must_fail(group.barrier)


class Broken:
    rank, size = 0, 1

    def abort(self, message):
        pass

    def close(self):
        pass


MADE = []
CASES = {
    "comm": lambda: orchvlm.comm.run_threads(2, communicate),
    "comm_errors": comm_errors, "transfers": transfers, "shared_tokens": shared_tokens,
    "phases": phases, "phase_errors": phase_errors, "exports": exports,
    "simulate": lambda: _core.simulate(*ENGINE),
    "simulate_errors": lambda: (must_fail(_core.simulate, *ENGINE[:5], -1),
                                must_fail(_core.simulate, *ENGINE[:5], "x"),
                                must_fail(_core.simulate, *ENGINE[:2], [0, 0, 2], *ENGINE[3:]),
                                must_fail(_core.simulate, *ENGINE[:4], [0, 9, 0], 2),
                                must_fail(_core.simulate, [-1.0] * 3, *ENGINE[1:])),
    "bound": lambda: (orchvlm.sequence_bound(LENGTHS[:12], 4, SMALL, work_limit=0),
                      must_fail(orchvlm.sequence_bound, [0], 4, SMALL)),
    "batch_cost": lambda: COST(LENGTHS, LENGTHS * 2.0),
    "sequence_cost": lambda: SEQUENCE(LENGTHS, 8),
    "cost_errors": lambda: (must_fail(COST, [-1]), must_fail(COST, "x"), must_fail(COST, [[1]]),
                            must_fail(COST, [1], [1.0, 2.0]), must_fail(SEQUENCE, [1], 3),
                            must_fail(_core.batch_cost_load, 1, [1], None)),
    "fit": lambda: orchvlm.fit(ROWS),
    "fit_sequences": lambda: orchvlm.fit([(x, 8, t, t * 1e9) for x, t in ROWS], heads=64),
    "fit_errors": lambda: (must_fail(orchvlm.fit, [([-1], 1.0)]),
                           must_fail(orchvlm.fit, [([1], 0.0)]),
                           must_fail(_core.sequence_cost_fit, [0, 1], [1], [1.0], None, None, 0,
                                     [1])),
    "backend_errors": lambda: (must_fail(_core.backend_info, "/nowhere.so"),
                               must_fail(_core.backend_info, 3),
                               must_fail(_core.backend_probe, "/nowhere.so", "x")),
    "balance": lambda: orchvlm.balance(LENGTHS, 8, COST, work_limit=500).order,
    "balance_options": lambda: orchvlm.balance(
        LENGTHS, 4, COST, size=LENGTHS, home=LENGTHS % 4, speed=[1.0, 2.0, 1.0, 1.0],
        keep_together=LENGTHS % 50, base_load=[1.0] * 4, work_limit=100).splits,
    "balance_errors": lambda: (must_fail(orchvlm.balance, [-1], 2, COST),
                               must_fail(orchvlm.balance, [1], 0, COST),
                               must_fail(orchvlm.balance, [1.5], 1, COST),
                               must_fail(orchvlm.balance, [9], 1, COST, size=[9], capacity=1)),
    "plan_sequences": lambda: plan().check(),
    "plan_bytes": lambda: orchvlm.SequencePlan.from_bytes(plan().to_bytes()),
    "plan_errors": lambda: (must_fail(orchvlm.plan_sequences, [10**7], 8, SEQUENCE),
                            must_fail(orchvlm.plan_sequences, [1], 0, SEQUENCE),
                            must_fail(orchvlm.plan_sequences, [-1], 8, SEQUENCE),
                            must_fail(orchvlm.SequencePlan.from_bytes, b"not a plan")),
    "losses": lambda: (orchvlm.losses.masked_cosine(FEATURES, FEATURES, FEATURES[:, 0] > 1),
                       orchvlm.losses.siglip(FEATURES, FEATURES, 1.0, 0.0, threads=1),
                       orchvlm.losses.superclass(FEATURES, FEATURES, [[0]] * 3, threads=1)),
    "losses_errors": lambda: (
        must_fail(_core.siglip, FEATURES, FEATURES[:2], 0, 1.0, 0.0, 1.0, 1, None),
        must_fail(_core.siglip, FEATURES, FEATURES, 0, 1.0, 0.0, -1.0, 1, None),
        must_fail(_core.superclass, FEATURES, FEATURES, *SEGMENTS, 0.0, 1, None),
        must_fail(_core.masked_cosine, FEATURES, FEATURES[0], None, 1.0)),
    "adapters": lambda: (ADAPTED.add_lora(r=1, match=["*q_proj"]), ADAPTED.merge_lora(),
                         must_fail(ADAPTED.add_lora), ADAPTED.remove_lora(),
                         must_fail(ADAPTED.add_lora, match=["*embed*"])),
    "average": lambda: (averaged(), must_fail(orchvlm.EMA, ADAPTED, 2.0)),
}
#: Cases whose calls reach no NumPy object, so that a debug interpreter can count them exactly:
#: NumPy from a wheel does not report its references.
EXACT = {"backend_errors"}


def resident_bytes():
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def measure(function, exact):
    """Growth per window of (blocks or references per call, traced bytes per call, resident)."""
    for _ in range(CALLS):
        function()
    growth = []
    tracemalloc.start(1)
    for _ in range(WINDOWS):
        gc.collect()
        before = (sys.gettotalrefcount() if exact else sys.getallocatedblocks(),
                  tracemalloc.get_traced_memory()[0], resident_bytes())
        for _ in range(CALLS):
            function()
        gc.collect()
        after = (sys.gettotalrefcount() if exact else sys.getallocatedblocks(),
                 tracemalloc.get_traced_memory()[0], resident_bytes())
        growth.append(((after[0] - before[0]) / CALLS, (after[1] - before[1]) / CALLS,
                       after[2] - before[2]))
    tracemalloc.stop()
    return growth


def leaks(growth):
    """Words on what grew in each of the last windows; the quietest window tells a leak from a cache
    that still fills.  What leaks does so once per call, and no object is smaller than 24 bytes;
    the C heap moves by a few pages."""
    counts, traced, resident = zip(*growth[2:])
    found = []
    if min(counts) > 0.5:
        found.append(f"{min(counts):.2f} objects per call")
    if min(traced) >= 24:
        found.append(f"{min(traced):.0f} traced bytes per call")
    if min(resident) > 4 * resource.getpagesize():
        found.append(f"{min(resident) / CALLS:.0f} resident bytes per call")
    return found


def main(names):
    bad = 0
    debug = hasattr(sys, "gettotalrefcount")
    for name in names or CASES:
        exact = debug and name in EXACT
        if debug and not exact and names == []:
            continue
        try:
            found = leaks(measure(CASES[name], exact))
        except ImportError as error:
            print(f"{name}: not here: {error}")
            continue
        bad += bool(found)
        print(f"{name}: {', '.join(found) or 'nothing leaks'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
