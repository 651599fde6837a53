"""Plots: whole PNG files, right contents, nothing left behind on failure."""
import builtins
from types import SimpleNamespace

import numpy as np
import pytest

import orchvlm
from orchvlm import BatchCost, Cluster, demo, plots
from orchvlm._files import write_whole

matplotlib = pytest.importorskip("matplotlib", reason="plots are optional")

PNG = b"\x89PNG\r\n\x1a\n"


def sequence_plan():
    """Two micro-batches on 8 GPUs: 4 + 2 + 2, then 8."""
    def group(first, degree, time):
        return SimpleNamespace(first_gpu=first, degree=degree, time=time)

    return SimpleNamespace(time=3.0, bound=2.5, micro_batches=[
        SimpleNamespace(groups=[group(0, 4, 1.0), group(4, 2, .8), group(6, 2, .9)]),
        SimpleNamespace(groups=[group(0, 8, 2.0)])])


def loads():
    rng = np.random.default_rng(0)
    return {p: rng.random(64) for p in ("vision", "llm")}, {p: np.full(64, .5)
                                                           for p in ("vision", "llm")}


@pytest.fixture(scope="module")
def simulation():
    costs = {"vision": BatchCost(1.0), "audio": BatchCost(1.0), "llm": BatchCost(1.0)}
    return orchvlm.simulate(demo.batch(8, 4), Cluster.preset("h100"), costs)


def is_whole(path):
    data = path.read_bytes()
    return data.startswith(PNG) and b"IEND" in data[-12:] and 3000 < len(data) < 400_000


def test_every_plot_writes_a_png(tmp_path, simulation):
    before, after = loads()
    plots.plot_loads(before, after, tmp_path / "loads.png", {"llm": .49})
    plots.plot_groups(sequence_plan(), 8, tmp_path / "groups.png")
    plots.plot_plans(before, after, {}, sequence_plan(), 8, tmp_path / "plans.png")
    simulation.plot(tmp_path / "simulation.png")
    plots.plot_timeline(simulation, ["sampled", "orchvlm"], tmp_path / "timeline.png")
    for name in ("loads", "groups", "plans", "simulation", "timeline"):
        assert is_whole(tmp_path / f"{name}.png"), name
    assert len(list(tmp_path.iterdir())) == 5


def step_plan(llm):
    costs = {"vision": BatchCost(1e-6), "audio": BatchCost(1e-6, fixed=0.5), "llm": BatchCost(
        1e-6, 1e-10) if llm == "balance" else orchvlm.SequenceCost(1e-10, 1e-6)}
    return orchvlm.plan_step(demo.batch(8, 4), Cluster.preset("h100"), costs, llm=llm,
                             work_limit=100, time_limit=None)


@pytest.mark.parametrize("llm", ["balance", "sequence_parallel"])
def test_plans_plot_themselves(tmp_path, llm):
    step = step_plan(llm)
    step.plot(tmp_path / "step.png")
    assert is_whole(tmp_path / "step.png")
    panels = [axes for axes in step.plot().axes if axes.get_ylabel().endswith("load")]
    assert len(panels) == 2 + (llm == "balance")
    before, after, bounds = step._loads()
    for name, plan in step.phases.items():
        assert before[name].max() == pytest.approx(plan.sampled_time)
        assert after[name].max() <= plan.time * (1 + 1e-12) and bounds[name] == plan.bound
    if llm == "sequence_parallel":
        assert step.llm.plot().axes[0].get_ylabel() == "GPU"
        step.llm.plot(tmp_path / "groups.png")
        assert is_whole(tmp_path / "groups.png")
    part = orchvlm.balance([5, 4, 3], 2)
    part.plot(tmp_path / "part.png")
    assert is_whole(tmp_path / "part.png") and len(part.plot().axes) == 2


def test_html_of_phases_and_batches():
    step = step_plan("balance")
    html = step.llm._repr_html_()
    assert html.startswith("<table>") and "llm" in html and str(len(step.llm.rank)) in html
    html = step.batch._repr_html_()
    assert "vision" in html and str(int(step.batch.language_lengths.sum())) in html
    assert str(step.batch.normalizer) in html and "0 samples" in orchvlm.Batch([], [], []) \
        ._repr_html_()


def test_loads_are_labelled():
    axes = plots.plot_loads(*loads(), bounds={"llm": .49}).axes
    assert [a.get_title() for a in axes] == ["as sampled", "planned", "", ""]
    assert [a.get_xlabel() for a in axes] == ["", "", "rank", "rank"]
    assert axes[3].get_legend() is not None and axes[1].get_legend() is None


def test_groups_are_drawn_where_they_run():
    axes = plots.plot_groups(sequence_plan(), 8).axes[0]
    boxes = [(round(p.get_x(), 6), p.get_y(), round(p.get_width(), 6), p.get_height())
             for p in axes.patches]
    assert (0, 0, 1.0, 8) in boxes  # the grey behind the first micro-batch
    assert (0, 4, .8, 2) in boxes and (1.0, 0, 2.0, 8) in boxes
    assert "2.500 s" in axes.get_title()


def test_bars_are_as_long_as_steps(simulation):
    axes = simulation.plot().axes[0]
    for y, result in enumerate(simulation.results.values()):
        width = sum(p.get_width() for p in axes.patches if abs(p.get_y() + .34 - y) < .01)
        assert width == pytest.approx(result.step_s.mean())


def test_empty_loads_and_plans():
    plots.plot_loads({"llm": np.zeros(3)}, {"llm": np.zeros(3)})
    plots.plot_groups(SimpleNamespace(time=0.0, bound=0.0, micro_batches=[]), 8)


def test_mismatched_phases():
    with pytest.raises(ValueError, match="phases"):
        plots.plot_loads({"llm": np.ones(1)}, {"vision": np.ones(1)})


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "old"
    path.write_bytes(b"old")

    def fail(stream):
        stream.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    write_whole(path, lambda stream: stream.write(b"new"))
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o400


def test_without_matplotlib(monkeypatch):
    real = builtins.__import__

    def absent(name, *more, **named):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *more, **named)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        plots.plot_loads({"llm": np.ones(1)}, {"llm": np.ones(1)})
