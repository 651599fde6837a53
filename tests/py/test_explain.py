"""What a run is foretold is what it takes: memory by arena, FLOPs, the plan."""
from math import prod

import pytest

import orchvlm
from orchvlm.cli import main
from orchvlm.explain import foretell

pytest.importorskip("PIL")


def told(folder, **sections):
    return {**sections, "data": {"tokens": 400}, "output": {"folder": str(folder)},
            "training": {"steps": 1, **sections.get("training", {})},
            "ranks": {"threads": 1, **sections.get("ranks", {})}}


def held(trainer):
    """Bytes by arena on this rank, as explained ones are called."""
    memory, shard = trainer.model.memory(), trainer.model.shard
    kept = {**memory, "buffers": 0} if shard is None else shard.memory()
    return {"weights": kept["weights"], "gradients and state": kept["training"],
            "buffers": kept["buffers"], "activations": memory["activations"],
            "workspace": memory["workspace"]}


@pytest.mark.parametrize("ranks, sections", [
    (1, {}), (1, {"lora": {"r": 3}}), (2, {"ranks": {"tokens": 90}}),
    (2, {"model": {"preset": "tiny-moe"}}),
    (2, {"training": {"freeze": ["model.visual.blocks.*", "model.visual.patch*"]}}),
    (3, {"ranks": {"shard": "fsdp"}, "training": {"checkpoint": "full"}})])
def test_a_run_takes_what_it_was_foretold(tmp_path, ranks, sections):
    config = told(tmp_path, **sections)
    run = orchvlm.RunConfig(config, {"ranks": {"n": ranks}})
    seen = foretell(run)
    assert list(tmp_path.iterdir()) == []

    def work(comm):
        trainer = orchvlm.Trainer.from_config(config, comm)
        (row,) = trainer.fit()
        rows = trainer.model._list
        return held(trainer), row, (sum(prod(r[2]) for r in rows), sum(
            prod(r[2]) for r in trainer.model._core.parameters() if r[3]))
    results = orchvlm.comm.run_threads(ranks, work) if ranks > 1 else [work(None)]
    assert (seen.parameters, seen.trained) == results[0][2]
    for foretold, (taken, row, _) in zip(seen.memory, results):
        assert row["tokens"] == seen.batch.n_tokens
        assert row["tflops"] * row["seconds"] == pytest.approx(seen.flops / 1e12, rel=1e-6)
        for arena, size in taken.items():
            assert foretold[arena] == pytest.approx(size, rel=0.08), arena
    if ranks > 1:  # the plan is the run's
        row = results[0][1]
        assert seen.imbalance == {name: row[f"{name}_planned"] for name in ("vision", "llm")}


def test_the_average_is_counted(tmp_path):
    plain, averaged = (foretell(orchvlm.RunConfig(told(tmp_path, training=more), {
        "ranks": {"n": 1}})) for more in ({}, {"ema": 0.9}))
    assert averaged.memory[0]["average"] == 4 * plain.trained and not plain.memory[0]["average"]


def test_nothing_is_made(tmp_path, capsys):
    """Of a model that no machine here could hold."""
    out = tmp_path / "run"
    assert main(["train", "--preset", "seed1.5-vl", "--explain", "--out", str(out), "--ranks", "8",
                 "--threads", "1", "--tokens", "500", "--steps", "5", "--set",
                 "ranks.shard=fsdp", "--set", "model.dtype=bfloat16"]) == 0
    said = capsys.readouterr().out
    for words in ('model.preset            "seed1.5-vl"', "command line", "--set",
                  "199,964,414,208 parameters", "activations", "a step takes", "5 steps",
                  "largest load over mean: vision 1."):
        assert words in said, words
    assert not out.exists()


def test_of_files_and_of_a_model_of_ones_own(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    model = orchvlm.Model.from_config(orchvlm.preset("tiny"), threads=1)
    model.save_pretrained(tmp_path / "model")
    assert main(["train", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "a.jsonl"),
                 "--tokens", "99", "--minutes", "2", "--explain", "--ranks", "1"]) == 0
    said = capsys.readouterr().out
    assert "4,427,328 parameters, 4,427,328 of them trained" in said and "2 minutes about" in said
