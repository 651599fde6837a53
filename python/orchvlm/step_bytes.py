"""A step plan as bytes: its inputs and its decisions; everything else follows from them."""
import numpy as np

from . import _bytes
from .batch import BATCH_COLUMNS, ITEM_COLUMNS, Batch, Items
from .cost import BatchCost, Cluster, SequenceCost
from .step import _KIND, _RELABEL

_CLUSTER = ("memory_bytes", "peak_flops", "intra_bandwidth", "inter_bandwidth")
_SEQUENCES = ("micro_start", "degree", "first_gpu", "group_start", "item", "group_time")
_TRAFFIC = 5


def dump(step):
    """Bytes of a :class:`StepPlan`.

    Parameters
    ----------
    step : StepPlan

    Returns
    -------
    bytes
    """
    batch, cluster, options = step.batch, step.cluster, step._options
    arrays = {f"batch.{name}": getattr(batch, name) for name in BATCH_COLUMNS}
    scalars = [batch.text_bytes_per_token, *(getattr(cluster, name) for name in _CLUSTER),
               -1.0 if options["slack"] is None else options["slack"]]
    arrays["scalars"] = np.array(scalars)
    for p, (name, items) in enumerate(batch.phases.items()):
        arrays |= {f"phase{p}.{column}": getattr(items, column) for column in ITEM_COLUMNS}
        if items.squares is not None:
            arrays[f"phase{p}.squares"] = items.squares
        arrays[f"phase{p}.scalars"] = np.array([
            items.out_bytes_per_token, *step.costs[name]._astuple(),
            *step.memory.get(name, (-1.0, -1.0))])
    decisions = step._decisions()
    for p, (rank, micro, n_micro, bound) in enumerate(decisions):
        arrays |= {f"plan{p}.rank": rank, f"plan{p}.micro": micro,
                   f"plan{p}.n_micro": np.array([n_micro]), f"plan{p}.bound": np.array([bound])}
    llm = step._sequence_fields
    header = {"phases": list(batch.phases), "nodes": cluster.nodes,
              "gpus_per_node": cluster.gpus_per_node, "relabel": options["relabel"],
              "compose": options["compose"], "pad_to": int(options["pad_to"]),
              "seed": int(options["seed"]), "cut_short": bool(step.cut_short),
              "groups": llm is not None}
    _dump_language(step, llm, arrays, header)
    before = [traffic[0] for traffic in step.traffic.values()]
    arrays["traffic"] = np.array(before)
    named = step.relabelling.values()
    arrays["names"] = np.array([[r.before, r.value, r.bound] for r in named]).reshape(-1, 3)
    arrays["names.work"] = np.array([[r.status == "optimal", r.cut_short, r.work]
                                     for r in named], np.int64).reshape(-1, 3)
    return _bytes.pack(_KIND, arrays, header)


def _dump_language(step, fields, arrays, header):
    cost = step.costs["llm"]
    if fields is None:
        arrays["llm.scalars"] = np.array([*cost._astuple(), *step.memory.get("llm", (-1., -1.))])
        return
    *scalars, heads, _, _, degrees, comm = cost._astuple()
    arrays |= {"llm.scalars": np.array(scalars), "llm.degrees": degrees, "llm.comm": comm}
    arrays |= {f"groups.{name}": array for name, array in zip(_SEQUENCES, fields)}
    arrays["groups.scalars"] = np.array(fields[6:8])
    header |= {"heads": int(heads), "groups_status": int(fields[8]),
               "groups_cut_short": bool(fields[9]), "groups_work": int(fields[10])}
    if cost.ring is not None:
        header["ring"] = cost.ring


class _Reader:
    """Arrays and header of untrusted bytes, each asked for with its type and shape."""

    def __init__(self, data):
        self.arrays, self.header = _bytes.unpack(_KIND, data)

    def array(self, name, dtype, shape=None):
        array = self.arrays.pop(name, None)
        if array is None or array.dtype != dtype or (
                array.ndim != 1 if shape is None else array.shape != shape):
            raise ValueError(f"not valid plan bytes: array {name!r} is missing or misshapen")
        return array

    def integers(self, name):
        return self.array(name, np.int64)

    def floats(self, name, *shape):
        return self.array(name, np.float64, shape or None)

    def value(self, name, kind):
        value = self.header.pop(name, None)
        if type(value) is not kind:
            raise ValueError(f"not valid plan bytes: {name!r} is missing or no {kind.__name__}")
        return value

    def done(self):
        if self.arrays or self.header:
            raise ValueError("not valid plan bytes: unknown content "
                             f"{sorted([*self.arrays, *self.header])[:3]}")


def _load_phase(reader, p):
    columns = {column: reader.integers(f"phase{p}.{column}") for column in ITEM_COLUMNS}
    squares = reader.floats(f"phase{p}.squares") if f"phase{p}.squares" in reader.arrays else None
    out_bytes, *cost, per_token, fixed = reader.floats(f"phase{p}.scalars", 9).tolist()
    items = Items(**columns, squares=squares, out_bytes_per_token=out_bytes)
    return items, BatchCost(*cost), (per_token, fixed)


def _load_language(reader, groups):
    """(cost, memory, fields of the groups or None)"""
    if not groups:
        *cost, per_token, fixed = reader.floats("llm.scalars", 8).tolist()
        return BatchCost(*cost), (per_token, fixed), None
    quadratic, linear, fixed, per_token, memory_fixed, limit = \
        reader.floats("llm.scalars", 6).tolist()
    degrees = reader.integers("llm.degrees").tolist()
    comm = reader.floats("llm.comm", len(degrees)).tolist()
    cost = SequenceCost(quadratic=quadratic, linear=linear, fixed=fixed,
                        comm=dict(zip(degrees, comm)), memory_per_token=per_token,
                        memory_fixed=memory_fixed, memory_limit=limit,
                        heads=reader.value("heads", int), ring=reader.header.pop("ring", None))
    arrays = [reader.array(f"groups.{name}", np.float64 if name == "group_time" else np.int64)
              for name in _SEQUENCES]
    time, bound = reader.floats("groups.scalars", 2).tolist()
    return cost, (-1.0, -1.0), (
        *arrays, time, bound, reader.value("groups_status", int),
        reader.value("groups_cut_short", bool), reader.value("groups_work", int))


def _load_problem(reader):
    """(problem, options, decisions, groups)"""
    names = reader.value("phases", list)
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError("not valid plan bytes: phases are not distinct names")
    text_bytes, *figures, slack = reader.floats("scalars", 2 + len(_CLUSTER)).tolist()
    cluster = Cluster(reader.value("nodes", int), reader.value("gpus_per_node", int), *figures)
    phases, costs, memory = {}, {}, {}
    for p, name in enumerate(names):
        phases[name], costs[name], memory[name] = _load_phase(reader, p)
    costs["llm"], memory["llm"], groups = _load_language(reader, reader.value("groups", bool))
    batch = Batch(*(reader.integers(f"batch.{name}") for name in BATCH_COLUMNS), phases=phases,
                  text_bytes_per_token=text_bytes)
    relabel = reader.header.pop("relabel", "")
    if relabel not in _RELABEL:
        raise ValueError(f"not valid plan bytes: relabel is {str(relabel)[:20]!r}")
    options = {"relabel": relabel, "slack": slack if slack >= 0 else None,
               "compose": reader.value("compose", bool), "pad_to": reader.value("pad_to", int),
               "seed": reader.value("seed", int)}
    decisions = tuple((reader.integers(f"plan{p}.rank"), reader.integers(f"plan{p}.micro"),
                       int(reader.array(f"plan{p}.n_micro", np.int64, (1,))[0]),
                       float(reader.floats(f"plan{p}.bound", 1)[0]))
                      for p in range(len(names) + 1))
    memory = {name: pair for name, pair in memory.items() if pair != (-1.0, -1.0)}
    return (batch, cluster, costs, memory), options, decisions, groups


def load(kind, data):
    """The plan in bytes that :func:`dump` made.

    Parameters
    ----------
    kind : type
        :class:`StepPlan`.
    data : bytes-like
        Untrusted.

    Returns
    -------
    StepPlan

    Raises
    ------
    TypeError, ValueError
        As :meth:`StepPlan.from_bytes`.
    """
    reader = _Reader(data)
    problem, options, decisions, groups = _load_problem(reader)
    names = 0 if options["relabel"] is None else len(problem[0].phases) + (groups is None)
    n_routes = 1 + (2 if options["compose"] else 3) * len(problem[0].phases)
    before = reader.floats("traffic", n_routes, _TRAFFIC)
    named = reader.floats("names", names, 3)
    work = reader.array("names.work", np.int64, (names, 3))
    cut_short = reader.value("cut_short", bool)
    reader.done()
    relabelled = [(*sums, int(optimal == 1), bool(cut), steps)
                  for sums, (optimal, cut, steps) in zip(named.tolist(), work.tolist())]
    return kind._restore(problem, options, decisions, groups, before.tolist(), relabelled,
                         cut_short)
