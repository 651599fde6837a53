"""Plots of plans and simulations; they need matplotlib (``pip install matplotlib``)."""
import numpy as np

from ._files import check_png, write_whole
from ._numbers import reals
from .tables import format_count

# Colour-blind safe (Okabe-Ito); one colour per thing in every plot.
_PHASE_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
_LLM, _EXPOSED, _IDLE = "#333B4F", "#D55E00", "#DDE1E7"
_BEFORE, _AFTER = "#B8BFCC", "#0072B2"


def _figure(width, height, path):
    """A figure; where it cannot be drawn or written, that is said before any work."""
    if path is not None:
        check_png(path, "path")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plots need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.set_facecolor("white")
    return figure


def _tidy(axes):
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=3)
    axes.set_axisbelow(True)


def _finish(figure, path):
    if path is not None:
        write_whole(path, lambda stream: figure.savefig(stream, format="png", dpi=120))
    return figure


def _phase_colour(phases):
    encoders = [p for p in phases if p != "llm"]
    colour = {p: _PHASE_COLOURS[i % len(_PHASE_COLOURS)] for i, p in enumerate(encoders)}
    return {**colour, "llm": _LLM}


def plot_loads(before, after, path=None, bounds=None):
    """Load of every rank, as sampled and as planned, one row per phase.

    Parameters
    ----------
    before, after : dict
        Phase -> float64[N], load of each rank (seconds, or whatever the cost counts).
    path : str or Path, optional
        PNG to write.
    bounds : dict, optional
        Phase -> certified lower bound on the largest load, drawn as a line.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ImportError
        matplotlib is not installed.
    TypeError
        Loads that are no numbers, or masked.
    ValueError
        ``before`` and ``after`` name different phases, loads that are not one finite row, or a
        ``path`` that does not end in .png.

    Examples
    --------
    >>> import numpy as np
    >>> from orchvlm.plots import plot_loads
    >>> figure = plot_loads({"llm": np.array([3.0, 1.0])}, {"llm": np.array([2.0, 2.0])})
    """
    if set(before) != set(after):
        raise ValueError(f"before has phases {sorted(before)}, after {sorted(after)}")
    before, after = _checked("before", before), _checked("after", after)
    figure = _figure(9, 0.7 + 1.9 * len(before), path)
    _draw_phases(figure, before, after, bounds or {})
    return _finish(figure, path)


def _checked(name, loads):
    """{phase: float64[N]}"""
    checked = {phase: reals(row, f"{name}[{phase!r}]") for phase, row in loads.items()}
    for phase, row in checked.items():
        if row.ndim != 1 or not np.isfinite(row).all():
            raise ValueError(f"{name}[{phase!r}] must be one finite load per rank; got "
                             f"{row!r:.60}")
    return checked


def _draw_phases(figure, before, after, bounds):
    """A row of two panels per phase."""
    grid = figure.subplots(len(before), 2, sharey="row", sharex=True, squeeze=False)
    for place, (row, phase) in enumerate(zip(grid, before)):
        for axes, loads, colour, name in ((row[0], before[phase], _BEFORE, "as sampled"),
                                          (row[1], after[phase], _AFTER, "planned")):
            _draw_loads(axes, loads, colour)
            if place == 0:
                axes.set_title(name, fontsize=11)
            if place == len(grid) - 1:
                axes.set_xlabel("rank")
        if phase in bounds:
            row[1].axhline(bounds[phase], color=_EXPOSED, linewidth=1, label="proven bound")
            row[1].legend(loc="upper right", frameon=False, fontsize=8)
        row[0].set_ylabel(f"{phase}\nload")


def _draw_loads(axes, loads, colour):
    """One panel: bars for few ranks, a filled outline for many."""
    _tidy(axes)
    edges = np.arange(len(loads) + 1) - 0.5
    axes.stairs(loads, edges, fill=True, color=colour)
    mean = loads.mean() if len(loads) else 0.0
    imbalance = loads.max() / mean if mean > 0 else 1.0
    axes.axhline(mean, color="#555B66", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0)
    axes.text(0.01, 0.96, f"max / mean = {imbalance:.3f}", transform=axes.transAxes, va="top",
              fontsize=8, bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1})


def plot_groups(plan, n_gpus, path=None):
    """Timeline of sequence-parallel groups: GPUs upwards, micro-batches one after the other.

    Parameters
    ----------
    plan : SequencePlan
        Of :func:`orchvlm.plan_sequences`.
    n_gpus : int
        N, GPUs of the cluster.
    path : str or Path, optional
        PNG to write.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    figure = _figure(10, 4.2, path)
    _draw_groups(figure.subplots(), plan, n_gpus)
    return _finish(figure, path)


def _draw_groups(axes, plan, n_gpus):
    """Rectangles degree x time in a common frame; grey is idle."""
    from matplotlib import colormaps
    from matplotlib.patches import Patch, Rectangle
    _tidy(axes)
    degrees = sorted({g.degree for m in plan.micro_batches for g in m.groups})
    shades = colormaps["viridis"](np.linspace(0.92, 0.12, max(len(degrees), 2)))
    colour = {d: shades[i] for i, d in enumerate(degrees)}
    start = 0.0
    for index, micro in enumerate(plan.micro_batches):
        width = max((g.time for g in micro.groups), default=0.0)
        axes.add_patch(Rectangle((start, 0), width, n_gpus, facecolor=_IDLE, edgecolor="none"))
        for group in micro.groups:
            axes.add_patch(Rectangle((start, group.first_gpu), group.time, group.degree,
                                     facecolor=colour[group.degree], edgecolor="white",
                                     linewidth=0.4))
        axes.axvline(start + width, color="white", linewidth=1.5)
        if width > 0.03 * plan.time:
            axes.text(start + width / 2, n_gpus * 1.015, str(index + 1), ha="center",
                      va="bottom", fontsize=8, color="#555B66")
        start += width
    axes.axvline(plan.bound, color=_EXPOSED, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_xlim(0, max(start, plan.bound) * 1.005 if start > 0 else 1)
    axes.set_ylim(0, n_gpus)
    axes.set_xlabel("seconds")
    axes.set_ylabel("GPU")
    axes.set_title(f"{format_count(len(plan.micro_batches), 'micro-batch')}, "
                   f"{plan.time:.3f} s; no plan is faster than {plan.bound:.3f} s (dashed)",
                   fontsize=10, pad=16)
    handles = [Patch(facecolor=colour[d], label=str(d)) for d in degrees]
    handles.append(Patch(facecolor=_IDLE, label="idle"))
    axes.legend(handles=handles, title="degree", loc="center left", bbox_to_anchor=(1.0, 0.5),
                frameon=False, fontsize=8, title_fontsize=8)


def plot_plans(before, after, bounds, plan, n_gpus, path=None):
    """A step plan above, a sequence plan below: :func:`plot_loads` and :func:`plot_groups`.

    Parameters
    ----------
    before, after, bounds : dict
        As for :func:`plot_loads`.
    plan, n_gpus
        As for :func:`plot_groups`.
    path : str or Path, optional
        PNG to write.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    loads = 0.7 + 1.7 * len(before)
    before, after = _checked("before", before), _checked("after", after)
    figure = _figure(10, loads + 4.2, path)
    upper, lower = figure.subfigures(2, 1, height_ratios=(loads, 4.2))
    _draw_phases(upper, before, after, bounds)
    _draw_groups(lower.subplots(), plan, n_gpus)
    return _finish(figure, path)


def plot_simulation(simulation, path=None):
    """Where the GPUs' time goes under each policy: stacked bars as long as the step.

    Parameters
    ----------
    simulation : Simulation
        Of :func:`orchvlm.simulate`.
    path : str or Path, optional
        PNG to write.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    names = list(simulation.results)
    figure = _figure(10, 0.9 + 0.48 * len(names), path)
    axes = figure.subplots()
    _tidy(axes)
    colour = _phase_colour(simulation.phases)
    longest = max(simulation[name].step_s.mean() for name in names)
    used = {}
    for y, name in enumerate(names):
        result, left = simulation[name], 0.0
        step_s = result.step_s.mean()
        for label, share, fill in _segments(result, simulation.phases, colour):
            if share > 0:
                bar = axes.barh(y, share * step_s, left=left, color=fill, height=0.68)
                used.setdefault(label, bar)
            left += share * step_s
        words = f" {simulation.speedup(name):.2f}x"
        if result.mfu is not None:
            words += f", MFU {100 * result.mfu:.1f} %"
        axes.text(left, y, words, va="center", fontsize=8.5)
    axes.set_yticks(range(len(names)), [simulation[name].title for name in names])
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.2)
    axes.set_xlabel("seconds per step")
    axes.legend(used.values(), used.keys(), loc="lower right", frameon=False, fontsize=8.5)
    return _finish(figure, path)


def _segments(result, phases, colour):
    """(label, share, colour) from left to right; they sum to 1."""
    compute = [(p, result.busy.get(p, 0.0), colour[p]) for p in phases]
    waiting = sum(result.idle.get(p, 0.0) for p in phases)
    return [*compute, ("exposed exchange", result.exposed, _EXPOSED), ("waiting", waiting, _IDLE)]


def plot_timeline(simulation, names, path=None):
    """What every rank does during one step, one panel per policy, on a common time axis.

    Parameters
    ----------
    simulation : Simulation
        Of :func:`orchvlm.simulate`.
    names : sequence of str
        Policies to show.
    path : str or Path, optional
        PNG to write.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ImportError
        matplotlib is not installed.
    KeyError
        A policy that was not simulated.
    """
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Patch
    figure = _figure(10, 0.8 + 1.5 * len(names), path)
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    colour = _phase_colour(simulation.phases)
    for axes, name in zip(panels, names):
        _tidy(axes)
        axes.axvspan(0, simulation[name].step_s[0], color=_IDLE, linewidth=0)
        for phase, kind, start, end in simulation[name].timeline:
            fill = colour.get(phase, _EXPOSED)
            rank = np.arange(len(start))
            corners = np.stack([np.stack([start, rank], -1), np.stack([end, rank], -1),
                                np.stack([end, rank + 1], -1), np.stack([start, rank + 1], -1)], 1)
            axes.add_collection(PolyCollection(corners, facecolor=fill, edgecolor="none",
                                               alpha=0.62 if kind == "backward" else 1.0))
        axes.set_ylim(0, simulation.cluster.n_gpus)
        axes.set_ylabel("rank")
        axes.set_title(simulation[name].title, fontsize=9, loc="left")
    panels[-1].set_xlim(0, max(simulation[name].step_s[0] for name in names))
    panels[-1].set_xlabel("seconds (dark: forward, light: backward, grey: waiting)")
    handles = [Patch(facecolor=colour[p], label=p) for p in simulation.phases]
    handles.append(Patch(facecolor=_EXPOSED, label="exchange"))
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False,
                  fontsize=8.5)
    return _finish(figure, path)
