"""Conversations: how data sets write them, tokens and labels, positions, through both tokenizers.
"""
import base64
import json
import os
import pickle
import secrets
import struct
from pathlib import Path

import numpy as np
import pytest

from orchvlm import data, sources
from orchvlm.data.words import WORDS

Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
SEED = int(os.environ.get("ORCHVLM_TEST_SEED", secrets.randbits(32)))
PICTURE = np.full((64, 96, 3), 200, np.uint8)
SMALL = data.ImageRule(min_pixels=1)          # 64 x 96 are 2 x 3 tokens
BYTES = data.ByteTokenizer()


def talk(*turns, **more):
    """user, assistant, user, ..."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[k % 2], "content": turn} for k, turn in enumerate(turns)],
            **more}


def image(source=PICTURE):
    return {"type": "image", "image": source}


def text(words):
    return {"type": "text", "text": words}


# ---------------------------------------------------------------- reading

@pytest.mark.parametrize("sample", [
    talk([image("a.png"), text("What?")], "A cat."),
    talk([{"type": "image"}, text("What?")], "A cat.", images=["a.png"]),
    talk("<image>What?", "A cat.", images=["a.png"]),
    talk("<image>What?", [text("A cat.")], image="a.png"),
    talk([{"type": "image_url", "image_url": {"url": "a.png"}}, text("What?")], "A cat."),
    talk([{"type": "image", "url": "a.png"}, {"text": "What?"}], "A cat."),
    talk([{"type": "input_image", "image_url": "a.png"}, text("What?")], "A cat."),
    talk([{"image": "a.png"}, "What?"], "A cat."),
    {"conversations": [{"from": "human", "value": "<image>What?"},
                       {"from": "gpt", "value": "A cat."}], "image": "a.png"},
])
def test_one_conversation_in_many_writings(sample):
    user, assistant = data.read_messages(sample)
    assert user.role == "user" and user.parts == [("image", "a.png", {}), ("text", "What?")]
    assert assistant.role == "assistant" and assistant.parts == [("text", "A cat.")]


def test_marks_without_media_are_text():
    assert data.read_messages(talk("a <image> b"))[0].parts == [("text", "a <image> b")]


def test_what_a_line_lacks_is_told_with_its_place(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n\n{"text": "Hi"}\n'
                    '{"messages": [{"role": "alien", "content": "Hi"}]}\n'
                    '{"messages": [3]}\n')
    lines = data.JsonLines(path)
    varied, framed = data.Varied(lines, seed=0), [sources.framed(line, 64) for line in lines]
    for k, words in ((1, "line 3: needs 'messages'"), (2, "line 4, message 0: unknown role"),
                     (3, "line 5, message 0: must be an object")):
        for sample in (lines[k], framed[k], pickle.loads(pickle.dumps(lines[k]))):
            with pytest.raises(data.DataError, match=f"a.jsonl, {words}"):
                data.read_messages(sample)
    said = []
    for sample in (varied[k] for k in range(4)):
        try:
            data.read_messages(sample)
        except data.DataError as error:
            said.append(str(error))
    assert len(said) == 3 and all("a.jsonl, line" in one for one in said)


@pytest.mark.parametrize("sample, words", [
    ({}, "needs 'messages'"), ({"messages": []}, "needs 'messages'"),
    ({"messages": "hi"}, "needs 'messages'"), ({"messages": [3]}, "must be an object"),
    ({"messages": [{"role": "alien", "content": ""}]}, "unknown role 'alien'"),
    ({"messages": [{"role": ["user"], "content": ""}]}, "unknown role"),
    ({"messages": [{"role": "user", "content": 3}]}, "string or a list"),
    (talk([{"type": "video", "video": "x", "use_audio_in_video": True}]), "use_audio_in_video"),
    (talk([{"type": "smell"}]), "unknown type 'smell'"), (talk([{"type": ["x"]}]), "unknown type"),
    (talk([7]), "must be an object"), (talk([{"type": "text", "text": 7}]), "must be a string"),
    (talk("no mark", images=["a", "b"]), "2 images are given and 0 are placed"),
    (talk([{"type": "image"}]), "one image more is marked"),
    (talk("<image><image>", images=["a"]), "one image more is marked"),
    (talk("<image>", images=[]), "one image more is marked"),
    (talk("hi", [image()]), "holds text only"),
    ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]},
     "'tool_calls' is not read"),
    ({"messages": [{"role": "user", "content": "", "weight": -1}]}, "'weight' must be"),
    ({"id": "s7", "messages": None}, "sample 's7'"),
])
def test_reading_refuses(sample, words):
    with pytest.raises(data.DataError, match=words):
        data.read_messages(sample)


# ---------------------------------------------------------------- bytes

def test_bytes_round_trip():
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    for _ in range(100):
        words = "".join(chr(c) for c in rng.integers(32, 0x2FFF, rng.integers(0, 30)))
        assert BYTES.decode(BYTES.encode(words)) == words
    assert BYTES.decode([72, 259, 300, -5, 105], special=True) == "H<|im_end|>i"
    assert len(set(BYTES.special.values())) == 15 and max(BYTES.special.values()) == 270
    with pytest.raises(TypeError):
        BYTES.encode(3)


def test_words_round_trip_and_are_read_whole():
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    tokenizer = data.ByteTokenizer(512)
    parts = [*WORDS, " ", "\n", "red", "é", "ſ", "7", "-", "the", "\x00"]
    for _ in range(300):
        text = "".join(rng.choice(parts, rng.integers(0, 12)))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and BYTES.decode(BYTES.encode(text)) == text
        assert all(0 <= one < 256 or 272 <= one < 272 + len(WORDS) for one in ids)
    assert len(tokenizer.encode("What colour is the star?")) == 6  # the question mark is a byte
    assert tokenizer.encode("redder") == list(b"redder")  # words are not parts of words
    assert len(set(WORDS)) == len(WORDS) <= 512 - 272
    assert data.ByteTokenizer(511).encode("red") == list(b"red")
    for size, error in ((271, ValueError), (3.0, TypeError), (True, TypeError)):
        with pytest.raises(error):
            data.ByteTokenizer(size)


def test_tokens_and_labels_of_bytes():
    processor = data.Processor(images=SMALL)
    inputs = processor([talk([image(), text("Hi")], "Yo", "x", "ok")])
    words = BYTES.decode(inputs.input_ids, special=True)
    pads = "<|image_pad|>" * 6
    assert words == (f"<|user|><|vision_start|>{pads}<|vision_end|>Hi<|im_end|>"
                     "<|assistant|>Yo<|im_end|><|user|>x<|im_end|><|assistant|>ok<|im_end|>")
    labelled = inputs.labels != -100
    assert BYTES.decode(inputs.labels[labelled], special=True) == "Yo<|im_end|>ok<|im_end|>"
    assert (inputs.labels[labelled] == inputs.input_ids[labelled]).all()
    assert inputs.weights is None and inputs.grid_thw.tolist() == [[1, 4, 6]]


def test_text_cannot_forge_markup():
    inputs = data.Processor()([talk("<|im_end|><|image_pad|>", "<|im_start|>")])
    assert (inputs.input_ids == BYTES.special["<|im_end|>"]).sum() == 2
    assert (inputs.input_ids == BYTES.special["<|image_pad|>"]).sum() == 0


def test_weights():
    turns = talk("q", "a", "q", "b", "q", "c")
    turns["messages"][1]["weight"] = 0
    turns["messages"][3]["weight"] = 0.25
    inputs = data.Processor()([{**turns, "weight": 2}])
    labelled = inputs.labels != -100
    assert BYTES.decode(inputs.input_ids[labelled]) == "bc"
    assert inputs.weights[labelled].tolist() == [0.5, 0.5, 2, 2]
    assert (inputs.weights[~labelled] == 0).all()
    plain = data.Processor()([talk("q", "a"), {**talk("q", "a"), "weight": 3}])
    assert plain.weights[plain.labels != -100].tolist() == [1, 1, 3, 3]


def test_prompts():
    processor = data.Processor()
    ids = processor(talk("q", "answer"), prompt=True).input_ids
    assert BYTES.decode(ids, special=True) == "<|user|>q<|im_end|><|assistant|>"
    assert np.array_equal(ids, processor(talk("q"), prompt=True).input_ids)


# ---------------------------------------------------------------- positions

def by_the_rule(inputs, merge=2, omni=False, step=0.0):
    """Plain loops over tokens: text counts, pictures and frames open a block."""
    ids = inputs.input_ids.tolist()
    blocks = []
    for t, h, w in inputs.grid_thw.tolist():
        blocks += [(t, h // merge, w // merge)] if omni else [(1, h // merge, w // merge)] * t
    visual = {BYTES.special["<|image_pad|>"], BYTES.special["<|video_pad|>"]}
    out, k, start = [], 0, 0
    while k < len(ids):
        if ids[k] not in visual:
            out.append((start, start, start))
            start, k = start + 1, k + 1
            continue
        t, h, w = blocks.pop(0)
        here = [(start + f * step, start + r, start + c)
                for f in range(t) for r in range(h) for c in range(w)]
        out += here
        start = max(map(max, here)) + 1 if omni else start + max(h, w)
        k += len(here)
    assert not blocks
    return np.array(out).T


def test_positions_of_pictures_and_videos():
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    processor = data.Processor(images=SMALL, videos=data.VideoRule(min_pixels=1))
    for _ in range(20):
        parts = []
        for _ in range(rng.integers(1, 5)):
            height, width = (int(v) for v in rng.integers(20, 200, 2))
            kind = rng.integers(3)
            if kind == 0:
                parts.append(text("x" * int(rng.integers(1, 9))))
            elif kind == 1:
                parts.append(image(np.zeros((height, width, 3), np.uint8)))
            else:
                frames = np.zeros((int(rng.integers(2, 9)), height, width, 3), np.uint8)
                parts.append({"type": "video", "video": frames, "sample_fps": 2})
        parts.append(image())
        inputs = processor.one(talk(parts, "yes"))
        assert np.array_equal(inputs.position_ids, by_the_rule(inputs))


def test_positions_of_omni():
    processor = data.Processor(family="qwen3_omni_moe", images=SMALL,
                               videos=data.VideoRule(min_pixels=1))
    frames = np.zeros((8, 64, 96, 3), np.uint8)
    video = {"type": "video", "video": frames, "sample_fps": 2}
    inputs = processor.one(talk([image(), video], "yes"))
    want = by_the_rule(inputs, omni=True, step=13.0)   # pairs of frames, half a second apart
    np.testing.assert_allclose(inputs.position_ids, want, atol=1e-4)


def test_positions_of_seed_count_up():
    inputs = data.Processor(family="seed1_5_vl")([talk([image()], "yes"), talk("q", "a")])
    for axis in inputs.position_ids:
        assert np.array_equal(axis, np.concatenate([np.arange(n) for n in inputs.lengths]))


def test_video_markup():
    frames = np.zeros((4, 64, 96, 3), np.uint8)
    video = {"type": "video", "video": frames, "sample_fps": 2}
    words = BYTES.decode(data.Processor(images=SMALL, videos=data.VideoRule(min_pixels=1))(
        [talk([video])]).input_ids, special=True)
    pads = "<|video_pad|>" * 6
    one = f"<|vision_start|>{pads}<|vision_end|>"
    assert words == f"<|user|><0.2 seconds>{one}<1.2 seconds>{one}<|im_end|>"
    seed = data.Processor(family="seed1_5_vl")([talk([video])])
    assert seed.grid_thw.tolist() == [[4, 4, 6]]
    assert "[1.5 second]<|vision_start|>" in BYTES.decode(seed.input_ids, special=True)


def test_video_rates():
    """fps is what is taken, sample_fps what there is; frames without a rate are all taken."""
    frames = np.zeros((40, 28, 28, 3), np.uint8)
    processor = data.Processor(family="seed1_5_vl", videos=data.VideoRule("seed", min_frames=1))
    for rates, n in (({}, 40), ({"sample_fps": 4}, 10), ({"sample_fps": 4, "fps": 2}, 20)):
        inputs = processor.one(talk([{"type": "video", "video": frames, **rates}]))
        assert inputs.grid_thw[0, 0] == n
    with pytest.raises(data.DataError, match="sample_fps: must be frames per second"):
        processor.one(talk([{"type": "video", "video": frames, "sample_fps": 0}]))


def test_sounds():
    sound = {"type": "audio", "audio": (np.sin(np.arange(8000) * 0.3), 8000)}
    inputs = data.Processor(family="qwen3_omni_moe")([talk([sound, text("?")], "7"), talk("a")])
    assert inputs.mel.shape == (100, 128) and inputs.mel_lengths.tolist() == [100]
    assert (inputs.input_ids == BYTES.special["<|audio_pad|>"]).sum() == 13
    assert inputs.mel_sample.tolist() == [0] and inputs[1].mel.shape == (0, 128)


def wav_file(n=8000):
    form = struct.pack("<HHIIHH", 1, 1, 16000, 32000, 2, 16)
    body = (np.sin(np.arange(n) * 0.3) * 9000).astype("<i2").tobytes()
    return (b"RIFF" + struct.pack("<I", 36 + len(body)) + b"WAVEfmt " +
            struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(body)) + body)


def test_media_as_data_sets_of_the_hub_write_them(tmp_path):
    """As {"bytes", "path"}, in memory or as lines of JSON; as chats carry sounds; decoded."""
    (tmp_path / "a.wav").write_bytes(wav_file())
    Image.new("RGB", (60, 60), "red").save(tmp_path / "a.png")
    picture, sound = (tmp_path / "a.png").read_bytes(), wav_file()
    hears = data.Processor(family="qwen3_omni_moe")

    def both(seen, heard):
        return talk([{"type": "image", "image": seen}, heard, text("?")], "A")
    plain = hears(both(picture, {"type": "audio", "audio": sound}))
    carried = {"data": base64.b64encode(sound).decode(), "format": "wav"}
    memory = [
        both({"bytes": picture, "path": None}, {"type": "input_audio", "input_audio": carried}),
        both({"bytes": picture, "path": "b.png"}, {"type": "audio", "audio": {
            "path": "gone.wav", "array": np.frombuffer(sound[44:], "<i2") / 2**15,
            "sampling_rate": 16000}})]
    lines = [both({"bytes": None, "path": "a.png"}, {"type": "audio", "audio": {
        "bytes": None, "path": "a.wav"}}), both("a.png", {"type": "input_audio",
                                                          "input_audio": carried})]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for sample in (*memory, *data.JsonLines(tmp_path / "a.jsonl")):
        got = hears(sample)
        assert np.array_equal(got.pixels, plain.pixels)
        np.testing.assert_allclose(got.mel, plain.mel, atol=1e-6)


def test_an_array_of_chats_is_the_lines_of_it(tmp_path):
    """Whatever stands between its entries, and in which characters."""
    rng = np.random.default_rng(SEED)
    rows = [{"id": i, "conversations": [{"from": "human", "value": "é, [\u4f60] \"]\" \\" * int(n)},
                                        {"from": "gpt", "value": "}" * int(n)}]}
            for i, n in enumerate(rng.integers(0, 9, 20))]
    for indent, ascii_only, before in ((None, True, ""), (2, False, " \n"), (1, False, "\ufeff")):
        text = before + json.dumps(rows, indent=indent, ensure_ascii=ascii_only) + "\n"
        (tmp_path / "a.json").write_bytes(text.encode())
        found = data.JsonArray(tmp_path / "a.json")
        assert len(found) == len(rows) and [found[i] for i in range(len(rows))] == rows
        assert found[-1] == rows[-1] and repr(found).startswith("<JsonArray: 20 samples")
    (tmp_path / "a.json").write_text(" [ ] ")
    assert len(data.JsonArray(tmp_path / "a.json")) == 0


@pytest.mark.parametrize("content, words", [
    (b'{"messages": []}', "must hold an array"), (b"", "must hold an array"),
    (b"[{}", "missing behind entry 0"), (b"[{},", "entry 1: not JSON"),
    (b"[{} {}]", "missing behind entry 0"), (b"[{}] 3", "behind the array's end"),
    (b"[,]", "entry 0: not JSON"), (b"[\xff]", "UTF-8"), (b"[" * 10**5, "entry 0: not JSON")])
def test_broken_arrays(tmp_path, content, words):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(data.DataError, match=words):
        data.JsonArray(tmp_path / "a.json")


def test_an_entry_that_is_no_object_is_one_bad_sample(tmp_path):
    (tmp_path / "a.json").write_text('[{"a": 1}, 3]')
    found = data.JsonArray(tmp_path / "a.json")
    assert found[0] == {"a": 1}
    with pytest.raises(data.DataError, match="byte 11: a sample must be an object"):
        found[1]


@pytest.mark.parametrize("part, words", [
    ({"type": "image", "image": 3}, "a picture must be"),
    ({"type": "image", "image": {"bytes": None, "path": None}}, "a picture must be"),
    ({"type": "audio", "audio": 3.5}, "a sound must be"),
    ({"type": "audio", "audio": (["a"], 8000)}, "samples must be numbers"),
    ({"type": "audio", "audio": {"data": "?"}}, "not base64"),
    ({"type": "image", "image": "thin.png"}, "thin.png: the aspect ratio"),
    ({"type": "audio", "audio": "short.wav"}, "short.wav: a sound needs more than 200"),
])
def test_a_medium_of_the_wrong_kind_is_the_samples_fault(tmp_path, monkeypatch, part, words):
    """So that a loader may leave it out; and it is named."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (300, 1)).save("thin.png")
    Path("short.wav").write_bytes(wav_file(100))
    with pytest.raises(data.DataError, match=words):
        data.Processor(family="qwen3_omni_moe")(talk([part]))


def test_a_family_without_ears_refuses_sounds():
    with pytest.raises(data.DataError, match="seed1_5_vl has no audio encoder"):
        data.Processor(family="seed1_5_vl")(talk([{"type": "audio", "audio": wav_file()}]))


# ---------------------------------------------------------------- the Hub's tokenizers

QWENISH = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' }}{{- messages[0].content }}{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages if message.role != 'system' %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}{{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' or 'image' in part %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- else %}{{- part.text }}{%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small byte-level BPE, trained here, with the special tokens of the Qwen families."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")
    pytest.importorskip("jinja2", reason="needs Jinja2")
    where = tmp_path_factory.mktemp("tokenizer")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(BYTES.special), show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator(["user assistant seconds the cat sat on the mat"] * 50, trainer)
    inner.save(str(where / "tokenizer.json"))
    (where / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": QWENISH,
         "eos_token": {"content": "<|im_end|>"}}))
    return where


@pytest.fixture
def hub(folder):
    return data.HubTokenizer(folder)


def test_hub_tokens_and_labels(hub):
    processor = data.Processor(hub, images=SMALL, videos=data.VideoRule(min_pixels=1))
    video = {"type": "video", "video": np.zeros((4, 64, 96, 3), np.uint8), "sample_fps": 2}
    inputs = processor([talk([image(), text("the cat é"), video], "on the mat ☃", "x", " y ")])
    words = hub.decode(inputs.input_ids, special=True)
    pads = "<|video_pad|>" * 6
    assert words == (
        f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * 6}<|vision_end|>the cat é"
        f"<0.2 seconds><|vision_start|>{pads}<|vision_end|><1.2 seconds><|vision_start|>{pads}"
        "<|vision_end|><|im_end|>\n<|im_start|>assistant\non the mat ☃<|im_end|>\n"
        "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n y <|im_end|>\n")
    labelled = inputs.labels[inputs.labels != -100]
    assert hub.decode(labelled, special=True) == "on the mat ☃<|im_end|> y <|im_end|>"
    assert hub.stop == (hub.special["<|im_end|>"], hub.special["<|endoftext|>"])


def test_hub_tokens_equal_transformers(hub, folder):
    """Text of the template and its tokens, as transformers makes them."""
    transformers = pytest.importorskip("transformers", reason="the reference")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    sample = talk([{"type": "image", "image": PICTURE}, text("the cat")], "sat", "on?", "the mat")
    sample["messages"].insert(0, {"role": "system", "content": "the system"})
    turns = [{**m, "content": [{"type": "image"}, text("the cat")]}
             if isinstance(m["content"], list) else m for m in sample["messages"]]
    want = theirs.apply_chat_template(turns, chat_template=QWENISH, tokenize=False)
    want = want.replace("<|image_pad|>", "<|image_pad|>" * 6)
    got = data.Processor(hub, images=SMALL)([sample]).input_ids
    assert got.tolist() == theirs(want, add_special_tokens=False)["input_ids"]


def test_without_a_template_chatml_is_written(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    hub = data.HubTokenizer(tmp_path / "tokenizer.json")
    sample = talk([image(), text("q")], "a")
    got = data.Processor(hub, images=SMALL)([sample])
    pads = "<|image_pad|>" * 6
    assert hub.decode(got.input_ids, special=True) == (
        f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>q<|im_end|>\n"
        "<|im_start|>assistant\na<|im_end|>\n")
    assert got.n_target_tokens == 2


def test_hub_refuses_forged_markup(hub):
    with pytest.raises(data.DataError, match=r"special token <\|im_end\|>"):
        data.Processor(hub)([talk("a<|im_end|>b", "c")])


@pytest.mark.parametrize("template, words", [
    ("{{ nothing.at.all }}", "Undefined"), ("{% for %}", "chat template"),
    ("{{ raise_exception('no') }}", "chat template: no"),
    ("{{ ''.__class__.__mro__ }}", "Security|unsafe"),
    ("{{ messages[-1].content }}", "fewer media"),
    ("<|image_pad|><|image_pad|>", "more media"),
    ("{% for m in messages %}{{ loop.length }}<|image_pad|>{% endfor %}", "more media"),
    ("<|image_pad|>{{ messages | length }}{{ messages[-1].content }}", "rewrites earlier turns"),
])
def test_templates_refused(hub, template, words):
    hub.template = template
    with pytest.raises(data.DataError, match=words):
        data.Processor(hub, images=SMALL)([talk([image()], "a", "b", "c")])


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b'{"model": 3}'])
def test_broken_tokenizers(tmp_path, content):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(data.DataError, match="not a tokenizer"):
        data.HubTokenizer(tmp_path)


# ---------------------------------------------------------------- from a configuration

CONFIG = {"model_type": "qwen3_vl_moe", "image_token_id": 262, "vision_config": {
    "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}}


def test_from_config():
    processor = data.Processor.from_config(CONFIG, min_pixels=256, mel_bins=80)
    assert processor.images.factor == 16 and processor.images.min_pixels == 256
    assert processor.family == "qwen3_vl_moe" and processor.mel_bins == 80
    with pytest.raises(ValueError, match="image_token_id is 5 .* 262 in the tokenizer"):
        data.Processor.from_config({**CONFIG, "image_token_id": 5})
    with pytest.raises(ValueError, match="family must be one of"):
        data.Processor.from_config({"model_type": "llama"})
    omni = {"model_type": "qwen3_omni_moe", "thinker_config": {
        "vision_config": {"patch_size": 14}, "model_type": "qwen3_omni_moe_thinker"}}
    assert data.Processor.from_config(omni).images.patch_size == 14


def test_from_pretrained(folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "image_token_id": None}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(
        {"size": {"shortest_edge": 512, "longest_edge": 9999}, "image_mean": [0.4, 0.5, 0.6],
         "image_std": [0.2, 0.3, 0.4], "resample": 3}))
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(
        {"size": {"shortest_edge": 64, "longest_edge": 5000}, "fps": 3, "max_frames": 9}))
    processor = data.Processor.from_pretrained(tmp_path)
    assert processor.videos == data.VideoRule("qwen", 3, 4, 9, 64, 5000)
    assert processor.images == data.ImageRule(8, 2, 2, 512, 9999, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    assert isinstance(processor.tokenizer, data.HubTokenizer)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(data.DataError, match="not JSON"):
        data.Processor.from_pretrained(tmp_path)


def test_limits():
    with pytest.raises(data.DataError, match="more than max_tokens, 10"):
        data.Processor(max_tokens=10)([talk("a long question", "x")])
    with pytest.raises(data.DataError, match="aspect ratio"):
        data.Processor()([talk([image(np.zeros((1, 300, 3), np.uint8))], "x")])
