"""``orchvlm pretrain`` and what it stands on: the classifier over places, runs, the command."""
import io
import json
import os
import time
import zipfile

import numpy as np
import pytest

import orchvlm
from orchvlm import data
from orchvlm.cli import main
from orchvlm.pretraining import Classes, PlacesHead, Pretraining, PretrainingConfig, _bins
from orchvlm.training import checkpoints, read_metrics

Image = pytest.importorskip("PIL.Image")
SEED = int(os.environ.get("ORCHVLM_TEST_SEED", time.time_ns() % 2**31))
GRID = np.array([[1, 4, 4], [1, 2, 6], [2, 2, 2], [1, 6, 4]], np.int32)  # patches
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 160, 0), "black": (0, 0, 0)}


@pytest.fixture(autouse=True)
def seed():
    print(f"ORCHVLM_TEST_SEED={SEED}")


def drawn():
    """{caption: picture}: one colour above the other, so that places matter."""
    return {f"{a} over {b}": np.repeat(np.array([[COLOURS[a]], [COLOURS[b]]], np.uint8),
                                       28, axis=0).repeat(56, axis=1)
            for a in COLOURS for b in COLOURS if a != b}


def samples():
    return [{"messages": [
        {"role": "user", "content": [{"type": "image", "image": picture},
                                     {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": caption}], "answer": caption}
        for caption, picture in drawn().items()]


def begin(folder, steps=4, **options):
    model = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=1, std=0.06, threads=1)
    processor = data.Processor.from_config(model.config.values)
    config = PretrainingConfig(**{"steps": steps, "batch": 6, "warmup": 2, "save_every": 0,
                                  "lr": 1e-3, **options})
    return Pretraining(model, samples(), processor, config, folder)


# ---------------------------------------------------------------- the classifier


def test_bins_are_the_means_of_even_parts():
    """Against torch's rule for adaptive pooling, written out cell by cell."""
    rng = np.random.default_rng(SEED)
    for rows, columns, places in rng.integers(1, 8, (20, 3)).tolist():
        cells = rng.standard_normal((rows, columns))
        got = (_bins(rows, columns, places) @ cells.ravel()).reshape(places, places)
        for i in range(places):
            for j in range(places):
                part = cells[i * rows // places:int(np.ceil((i + 1) * rows / places)),
                             j * columns // places:int(np.ceil((j + 1) * columns / places))]
                assert got[i, j] == pytest.approx(part.mean(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("places", (1, 2, 3))
def test_gradients_of_the_classifier_are_the_slopes_of_its_loss(places):
    rng = np.random.default_rng(SEED)
    head = PlacesHead(9, 5, places, 2, seed=SEED)
    head.weight = rng.standard_normal(head.weight.shape)
    features = rng.standard_normal((GRID.prod(1).sum() // 4, 5))
    targets, frequency = [[0, 3], [8], [1, 2, 4], []], rng.uniform(0.5, 2, 9)

    def loss():
        return head.loss(features, GRID, targets, frequency, threads=1)
    _, dfeatures = loss()
    for array, slopes in ((features, dfeatures), (head.weight, head.grad.copy())):
        along, step = rng.standard_normal(array.shape), 1e-5
        array += step * along
        above = loss()[0]
        array -= 2 * step * along
        below = loss()[0]
        array += step * along
        wanted = (above - below) / (2 * step)
        # The epsilon beside the deviation is left out of the gradient: 1e-5 of it.
        assert abs(np.vdot(slopes, along) - wanted) <= 5e-5 * np.linalg.norm(
            slopes) * np.linalg.norm(along)


def test_adam_is_that_of_the_book():
    rng = np.random.default_rng(SEED)
    head = PlacesHead(3, 2, 1, 1)
    weight = head.weight.astype(np.float64)
    first, second = np.zeros_like(weight), np.zeros_like(weight)
    for t in range(1, 6):
        head.grad = rng.standard_normal(weight.shape).astype("f4")
        first = 0.9 * first + 0.1 * head.grad
        second = 0.95 * second + 0.05 * head.grad.astype(np.float64) ** 2
        weight = weight * (1 - 0.01 * 0.1) - 0.01 * (first / (1 - 0.9 ** t)) / (
            np.sqrt(second / (1 - 0.95 ** t)) + 1e-8)
        head.step(0.01, (0.9, 0.95), 0.1)
    np.testing.assert_allclose(head.weight, weight, rtol=1e-4, atol=1e-6)


def test_classes_are_captions_and_words():
    classes = Classes(["red cat", "red dog", "red dog", "cat"])
    assert classes.captions == ["cat", "red cat", "red dog"] and len(classes) == 6
    assert classes.of("red dog") == [2, 5, 4] and classes.of("a red bird") == [5]
    assert classes.frequency[5] < classes.frequency[2]  # "red" says less than "red dog"
    with pytest.raises(ValueError, match="no caption"):
        Classes([])


# ---------------------------------------------------------------- runs


def test_it_learns_and_leaves_the_decoder_as_it_was(tmp_path):
    run = begin(tmp_path, steps=60, batch=12, warmup=10)
    before = {name: np.array(a) for name, a in run.model.parameters.items()}
    losses = [row["loss"] for row in run.run()]
    assert np.mean(losses[-5:]) < 0.7 * losses[0], losses
    for name, array in run.model.parameters.items():
        assert np.array_equal(array, before[name]) != name.startswith("model.visual."), name
    left = orchvlm.Model.from_pretrained(checkpoints(tmp_path)[-1][1], threads=1)
    for name, array in run.model.parameters.items():
        assert np.array_equal(left.parameters[name], array), name


def test_stopped_and_resumed_it_is_the_very_run(tmp_path):
    whole = begin(tmp_path / "whole")
    wanted = [row["loss"] for row in whole.run()]
    part = begin(tmp_path / "part")
    for row in part.run():
        if row["step"] == 2:
            break  # as Ctrl-C does: a checkpoint of the last whole step stays
    again = begin(tmp_path / "part")
    assert again.resume() == 2
    list(again.run())
    assert [row["loss"] for row in read_metrics(tmp_path / "part" / "metrics.jsonl")] == wanted
    assert np.array_equal(again.head.weight, whole.head.weight)
    for name, array in whole.model.parameters.items():
        assert np.array_equal(again.model.parameters[name], array), name


def test_another_runs_state_is_refused(tmp_path):
    list(begin(tmp_path, steps=1).run())
    with pytest.raises(ValueError, match="no classifier of these captions and places"):
        begin(tmp_path, places=1).resume()


def test_what_has_no_caption_or_picture_is_refused(tmp_path):
    model = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=1)
    processor = data.Processor.from_config(model.config.values)
    config = PretrainingConfig(steps=1, batch=2)
    with pytest.raises(ValueError, match="needs its caption"):
        Pretraining(model, [{"messages": []}], processor, config, tmp_path)
    with pytest.raises(TypeError, match="PretrainingConfig"):
        Pretraining(model, samples(), processor, orchvlm.TrainingConfig(), tmp_path)
    bare = [{"messages": [{"role": "user", "content": "Hi"}], "answer": "Hi"}]
    with pytest.raises(data.DataError, match="one picture"):
        list(Pretraining(model, bare, processor, config, tmp_path).run())
    with pytest.raises(ValueError, match="places"):
        PretrainingConfig(places=0)


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    path = tmp_path_factory.mktemp("pack") / "signs.zip"
    with zipfile.ZipFile(path, "w") as stream:
        records = []
        for i, (caption, picture) in enumerate(drawn().items()):
            png = io.BytesIO()
            Image.fromarray(picture).save(png, "PNG")
            stream.writestr(f"{i}.png", png.getvalue())
            records += [json.dumps({"image": f"{i}.png", "caption": caption, "split": split,
                                    "category": "emoji"}) for split in ("train", "val", "test")]
        stream.writestr("records.jsonl", "\n".join(records))
    return str(path)


def test_two_commands_from_a_zip(pack, tmp_path, capsys, monkeypatch):
    tower, run = str(tmp_path / "vit"), str(tmp_path / "run")
    few = ["--data", pack, "--kinds", "emoji", "--set", "data.frame=56", "--threads", "1"]
    first = ["pretrain", "--steps", "2", "--batch", "4", "--out", tower, *few]
    assert main(first) == 0
    out, err = capsys.readouterr()
    assert "12 pictures, 12 captions, 4 a step; 2 steps" in out and "step 2  100 %" in err
    assert "% of 12 held-out captions" in out
    assert main(first) == 2 and "--resume goes on" in capsys.readouterr().err
    assert main(["pretrain", "--resume", "--steps", "3", "--out", tower]) == 0
    assert [row["step"] for row in read_metrics(tmp_path / "vit" / "metrics.jsonl")] == [1, 2, 3]
    assert main(["train", "--model", tower, "--steps", "1", "--tokens", "100", "--ranks", "1",
                 "--set", 'training.groups=[{match="model.visual.*", lr=1e-5}]', "--samples", "1",
                 "--out", run, *few]) == 0
    assert main(["eval", run, "--samples", "2", "--threads", "1"]) == 0
    Image.new("RGB", (300, 100)).save(tmp_path / "wide.png")
    for folder, tokens in ((run, 4), (str(tmp_path / "other"), 44)):  # framed as its run's
        if folder != run:
            orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=0).save_pretrained(folder)
        seen = []
        monkeypatch.setattr(orchvlm.Model, "generate", lambda self, inputs, *a, seen=seen, **k: (
            seen.append(int((inputs.input_ids == 262).sum())), [[65]])[1])
        assert main(["generate", folder, "--image", str(tmp_path / "wide.png"), "What?"]) == 0
        assert seen == [tokens]


def test_refusals_of_the_command(pack, tmp_path, capsys):
    for words, said in ((["--out", str(tmp_path)], "--data names"),
                        (["--resume", "--out", str(tmp_path)], "no run to resume"),
                        (["--data", pack, "--kinds", "digits"], "no member"),
                        (["--data", str(tmp_path / "no.zip")], "no readable zip file")):
        assert main(["pretrain", *words]) == 2
        assert said in capsys.readouterr().err


def test_what_cannot_be_read_is_told(pack, tmp_path, capsys):
    """A broken picture among them is left out, and the run says so at its end."""
    record = {"image": "broken.png", "caption": "nothing", "split": "train", "category": "emoji"}
    broken = str(tmp_path / "broken.zip")
    with zipfile.ZipFile(pack) as old, zipfile.ZipFile(broken, "w") as new:
        records = old.read("records.jsonl").decode()
        for name in set(old.namelist()) - {"records.jsonl"}:
            new.writestr(name, old.read(name))
        new.writestr("broken.png", b"no picture")
        new.writestr("records.jsonl", records + "\n" + json.dumps(record))
    assert main(["pretrain", "--steps", "4", "--batch", "6", "--data", broken, "--kinds", "emoji",
                 "--max-pixels", "3136", "--threads", "1", "--out", str(tmp_path / "run")]) == 0
    assert "samples could not be used and were left out" in capsys.readouterr().err
