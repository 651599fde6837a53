"""``orchvlm init`` and what it stands on: learned tokenizers, processors that are saved."""
import json
import os
import time
import zipfile

import numpy as np
import pytest

import orchvlm
from orchvlm import data
from orchvlm.cli import main
from orchvlm.training import checkpoints

pytest.importorskip("PIL", reason="pictures need Pillow")
pytest.importorskip("tokenizers", reason="tokenizers are learned by tokenizers")
pytest.importorskip("jinja2", reason="chat templates need Jinja2")
SEED = int(os.environ.get("ORCHVLM_TEST_SEED", time.time_ns() % 2**31))
NAMES = ["red apple", "red house", "green apple", "green house", "été", "日本"]
PICTURE = np.zeros((56, 56, 3), np.uint8)


@pytest.fixture(autouse=True)
def seed():
    print(f"ORCHVLM_TEST_SEED={SEED}")


def asked(picture=PICTURE, answer=None):
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
    return {"messages": [{"role": "user", "content": parts},
                         *([{"role": "assistant", "content": answer}] if answer else [])]}


@pytest.fixture
def pack(tmp_path):
    """A zip of named pictures; one of its records is of another split."""
    import io

    from PIL import Image
    path = tmp_path / "named.zip"
    with zipfile.ZipFile(path, "w") as out:
        lines = []
        for k, name in enumerate([*NAMES, "secret"]):
            file = io.BytesIO()
            Image.new("RGB", (40 + k, 40), (40 * k, 90, 10)).save(file, "PNG")
            out.writestr(f"{k}.png", file.getvalue())
            lines.append(json.dumps({"image": f"{k}.png", "caption": name, "category": "",
                                     "split": "test" if name == "secret" else "train"}))
        out.writestr("records.jsonl", "\n".join(lines))
    return path


def init(capsys, *arguments):
    code = main(["init", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out + err


# ---------------------------------------------------------------- tokenizers


def test_a_learned_tokenizer_gives_every_text_back(tmp_path):
    """Of random Unicode too: bytes are its alphabet."""
    tokenizer = data.learn_tokenizer(NAMES * 3, 320, tmp_path)
    assert 271 < tokenizer.vocab_size <= 320
    rng = np.random.default_rng(SEED)
    for _ in range(50):
        codes = rng.integers(1, 0xd800, 12)
        text = "".join(map(chr, codes)).replace("<", "")
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("green house")) <= 2
    assert tokenizer.special["<|im_end|>"] in tokenizer.stop


def test_a_turn_is_as_short_as_with_the_built_in_tokenizer(tmp_path):
    tokenizer = data.learn_tokenizer(NAMES, 320, tmp_path)
    learned = data.Processor(tokenizer, "seed1_5_vl").one(asked(answer="red house"))
    built_in = data.Processor(family="seed1_5_vl").one(asked(answer="red house"))
    extra = [len(inputs.input_ids) - len(said.encode("What is this?")) -
             len(said.encode("red house")) for inputs, said in
             ((learned, tokenizer), (built_in, data.ByteTokenizer()))]
    assert extra[0] == extra[1]
    labels = [int(t) for t in learned.labels if t >= 0]
    assert tokenizer.decode(labels[:-1]) == "red house"
    assert labels[-1] == tokenizer.special["<|im_end|>"]


def test_what_cannot_be_learned_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocab_size"):
        data.learn_tokenizer(NAMES, 100, tmp_path)
    with pytest.raises(data.DataError, match="no text"):
        data.learn_tokenizer([], 300, tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- processors


@pytest.mark.parametrize("family", ["tiny", "tiny-omni"])
def test_a_saved_processor_is_read_as_it_was(tmp_path, family):
    config = orchvlm.preset(family)
    config_file = tmp_path / "config.json"
    config_file.write_text(json.dumps(config.values))
    saved = data.Processor.from_config(config.values, min_pixels=56 * 56, max_pixels=10_000,
                                       mean=(0.4, 0.5, 0.6), resample="bicubic")
    saved.save_pretrained(tmp_path)
    read = data.Processor.from_pretrained(tmp_path)
    assert read.images == saved.images and read.videos == saved.videos
    picture = np.random.default_rng(SEED).integers(0, 256, (90, 70, 3)).astype(np.uint8)
    one, other = saved.one(asked(picture)), read.one(asked(picture))
    assert np.array_equal(one.pixels, other.pixels)
    assert np.array_equal(one.input_ids, other.input_ids)


def test_the_rule_of_films_is_kept(tmp_path):
    config = orchvlm.preset("tiny-omni")
    config.save(tmp_path)
    videos = data.VideoRule("qwen", fps=1.5, max_frames=32, max_pixels=10**6)
    data.Processor.from_config(config.values, videos=videos).save_pretrained(tmp_path)
    assert data.Processor.from_pretrained(tmp_path).videos == videos


class OwnTokenizer:
    """What a processor asks for, and no more."""

    vocab_size, template, stop = 272, None, (259,)
    special = data.ByteTokenizer().special

    @staticmethod
    def encode(text):
        return list(text.encode())


class OwnProcessor:
    """What a loader asks for, and no more."""

    @staticmethod
    def one(sample):
        return orchvlm.Inputs(input_ids=[1, 2, 3], labels=[1, 2, 3])


@pytest.mark.parametrize("processor, names", [
    (data.Processor(OwnTokenizer(), "seed1_5_vl"), ["preprocessor_config.json"]),
    (OwnProcessor(), [])])
def test_parts_of_ones_own_are_saved_as_far_as_they_can_be(tmp_path, processor, names):
    model = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=0, threads=1)
    loader = data.Loader(data.Mixture([[asked(answer="red house")]]), processor, 64)
    trainer = orchvlm.Trainer(model, loader, orchvlm.TrainingConfig(steps=1), tmp_path)
    list(trainer.run())
    ((_, checkpoint),) = checkpoints(tmp_path)
    assert [path.name for path in checkpoint.glob("*preprocessor*")] == names


def test_a_checkpoint_holds_what_makes_its_inputs(tmp_path):
    """A model that comes with a tokenizer leaves with it, and pictures keep their rule."""
    tokenizer = data.learn_tokenizer(NAMES, 300, tmp_path / "tokenizer")
    config = orchvlm.preset("tiny").values
    config["text_config"]["vocab_size"] = tokenizer.vocab_size
    config["image_token_id"] = tokenizer.special["<|image_pad|>"]
    config["video_token_id"] = tokenizer.special["<|video_pad|>"]
    processor = data.Processor.from_config(config, tokenizer, max_pixels=56 * 56)
    model = orchvlm.Model.from_config(config, seed=0, threads=1)
    loader = data.Loader(data.Mixture([[asked(answer="red house")]]), processor, 64)
    settings = orchvlm.TrainingConfig(steps=1, save_every=1)
    trainer = orchvlm.Trainer(model, loader, settings, tmp_path / "run")
    list(trainer.run())
    ((_, checkpoint),) = checkpoints(tmp_path / "run")
    read = data.Processor.from_pretrained(checkpoint)
    assert read.images == processor.images
    assert read.tokenizer.encode("green apple") == tokenizer.encode("green apple")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (checkpoint / name).read_bytes() == (tmp_path / "tokenizer" / name).read_bytes()


# ---------------------------------------------------------------- the command


def test_a_model_is_made_and_trains_on(tmp_path, pack, capsys):
    base, run = tmp_path / "base", tmp_path / "run"
    code, said = init(capsys, base, "--set", "vision_config.depth=1", "--set",
                      "text_config.num_hidden_layers=1", "--data", pack, "--kinds", "emoji",
                      "--vocab-size", 300, "--max-pixels", 3136, "--seed", 3)
    assert code == 0 and "HubTokenizer" in said, said
    config = json.loads((base / "config.json").read_text())
    assert config["vision_config"]["depth"] == config["text_config"]["num_hidden_layers"] == 1
    processor = data.Processor.from_pretrained(base)
    assert config["text_config"]["vocab_size"] == processor.tokenizer.vocab_size
    assert len(processor.tokenizer.encode("red house")) < len("red house")
    assert "secret" not in (base / "tokenizer.json").read_text()
    code = main(["train", "--model", str(base), "--data", str(pack), "--kinds", "emoji",
                 "--steps", "2", "--tokens", "64", "--samples", "1", "--threads", "1", "--ranks",
                 "1", "--out", str(run)])
    assert code == 0, capsys.readouterr().err
    assert data.Processor.from_pretrained(checkpoints(run)[-1][1]).images.max_pixels == 3136


def test_the_same_seed_makes_the_same_model(tmp_path, capsys):
    folders = [tmp_path / name for name in "abc"]
    for folder, number in zip(folders, (1, 1, 2)):
        assert init(capsys, folder, "--seed", number)[0] == 0
    one, same, other = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert one == same != other


def test_texts_of_samples_that_cannot_be_read_are_left_out(tmp_path):
    """In lines and in a shard, which go on behind them."""
    import io
    import tarfile

    from orchvlm.sources import texts
    good = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant",
                                                              "content": "two"}]}
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(map(json.dumps, (good, {"messages": 3}, good))))
    shard = tmp_path / "b.tar"
    with tarfile.open(shard, "w") as tar:
        for name, content in (("1.txt", b"three"), ("../2.txt", b"never"), ("3.txt", b"four")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
            if name[0].isdigit():
                image = tarfile.TarInfo(f"{name[0]}.png")
                tar.addfile(image, io.BytesIO(b""))
    said = list(texts({"files": [lines, shard], "kinds": None}))
    assert said[:4] == ["one", "two"] * 2
    assert "three" in said and "four" in said and "never" not in said


@pytest.mark.parametrize("arguments, says", [
    (["--set", "vision_config.depths=2"], "depths"), (["--set", "depth"], "KEY=VALUE"),
    (["--set", "no.such=1"], "KEY=VALUE"), (["--vocab-size", "300"], "--data"),
    (["--data", "nothing.zip"], "no such file")])
def test_refusals(tmp_path, capsys, arguments, says):
    code, said = init(capsys, tmp_path / "base", *arguments)
    assert code == 2 and says in said and len(said.strip().splitlines()) == 1, said
    assert not (tmp_path / "base").exists()


def test_a_model_is_not_overwritten(tmp_path, capsys):
    assert init(capsys, tmp_path / "base")[0] == 0
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    code, said = init(capsys, tmp_path / "base", "--seed", 5)
    assert code == 2 and "holds a model" in said
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before
