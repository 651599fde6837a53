"""JSON lines, tar shards and zip packs: what is in them, what they must not reach, and junk."""
import base64
import io
import json
import os
import secrets
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchvlm import comm, data
from orchvlm.data.assets import check_name

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", secrets.randbits(32)))
JUNK_RUNS = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as pack:
        for name, content in members:
            pack.writestr(name, content)
    return path


# ---------------------------------------------------------------- JSON lines

def test_lines_and_their_files(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"picture")
    path = write_lines(
        tmp_path / "a.jsonl",
        {"messages": [{"role": "user", "content": [
            {"type": "image", "image": "pictures/a.png"}, {"type": "text", "text": "image"}]}]},
        {"messages": [{"role": "user", "content": "<image>"}], "images": ["pictures/a.png"]},
        {"conversations": [{"from": "human", "value": "<image>"}], "image": "pictures/a.png"},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {
            "url": "data:image/png;base64," + base64.b64encode(b"picture").decode()}}]}]})
    lines = data.JsonLines(path)
    assert len(lines) == 4
    for sample in lines:
        source = next(part[1] for part in data.read_messages(sample)[0].parts
                      if part[0] == "image")
        assert isinstance(source, data.Asset) and source.read() == b"picture"


def test_empty_lines_and_marks(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"k": 1}\r\n\n  \n{"k": 2}')
    lines = data.JsonLines(path)
    assert [sample["k"] for sample in lines] == [1, 2] and lines[-1]["k"] == 2
    with pytest.raises(IndexError):
        lines[2]


@pytest.mark.parametrize("name", [
    "../secret", "/etc/passwd", "a/../../secret", "..\\secret", "C:/secret", "C:secret", "a\0b", "",
    "link", "linked/secret", "missing.png", "http://example.org/a.png", "file:///etc/passwd",
    "ftp://x/y"])
def test_no_way_out(tmp_path, name):
    (tmp_path / "secret").write_text("s")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "linked").symlink_to(tmp_path)
    path = write_lines(root / "a.jsonl", {"messages": [], "image": name},
                       {"messages": [{"role": "user", "content": [{"image": name}]}]})
    for k in range(2):
        with pytest.raises(data.DataError, match="line"):
            data.JsonLines(path)[k]


@pytest.mark.parametrize("line, words", [
    ("{", "line 1: not JSON"), ("[1]", "line 1: a sample must be an object; got list"),
    ("[" * 100_000, "not JSON"), ('{"a": NaN', "not JSON")])
def test_bad_lines(tmp_path, line, words):
    path = tmp_path / "a.jsonl"
    path.write_text(line)
    with pytest.raises(data.DataError, match=words):
        data.JsonLines(path)[0]


def test_missing_files(tmp_path):
    for reader in (data.JsonLines, data.TarShards, data.ZipPack):
        for path in (tmp_path / "none", tmp_path, "a\0b"):
            with pytest.raises(data.DataError):
                reader(path)
        with pytest.raises(TypeError):
            reader(3)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["user", "assistant", "text", "image", "a.png", "data:x;base64,AA=="]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "type", "text", "image", "url", "image_url", "messages",
                         "conversations", "from", "value", "images", "weight", "fps", "x"]), inner,
        max_size=4), max_leaves=12)


@JUNK_RUNS
@given(VALUES, st.binary(max_size=40))
def test_junk_in_lines(tmp_path_factory, value, tail):
    pytest.importorskip("PIL", reason="pictures need Pillow")
    path = tmp_path_factory.mktemp("junk") / "a.jsonl"
    turns = {"messages": value if isinstance(value, list) else [value]}
    path.write_bytes(json.dumps(value).encode() + b"\n" + json.dumps(turns).encode() + b"\n" + tail)
    try:
        for sample in data.JsonLines(path):
            data.Processor().one(sample)
    except data.DataError:
        pass


# ---------------------------------------------------------------- tar shards

def test_shards(tmp_path):
    talk = {"messages": [{"role": "user", "content": [{"type": "image", "image": "png"}]},
                         {"role": "assistant", "content": "x"}]}
    write_tar(tmp_path / "0.tar", [("a/1.png", b"P"), ("a/1.txt", b" a cat\n"), ("a/2.json",
              json.dumps(talk).encode()), ("a/2.png", b"Q")])
    write_tar(tmp_path / "1.tar.gz", [("3.wav", b"W"), ("3.txt", b"seven")], "w:gz")
    shards = data.TarShards([tmp_path / "0.tar", tmp_path / "1.tar.gz"], question="Say.")
    samples = list(shards)
    assert [sample["id"] for sample in samples] == ["a/1", "a/2", "3"]
    user, assistant = data.read_messages(samples[0])
    assert user.parts[0][0] == "image" and user.parts[0][1].read() == b"P"
    assert user.parts[1] == ("text", "Say.") and assistant.parts == [("text", "a cat")]
    assert data.read_messages(samples[1])[0].parts[0][1].read() == b"Q"
    assert data.read_messages(samples[2])[0].parts[0][0] == "audio"
    assert [s["id"] for s in shards.stream(2)] == ["3"] and list(shards.stream(9)) == []
    assert len(list(data.TarShards(str(tmp_path / "*.tar*")))) == 3


def link(name, target, kind=tarfile.SYMTYPE):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return name, member


@pytest.mark.parametrize("member, words", [
    (("../1.png", b"x"), "leaves its folder"), (("/1.png", b"x"), "leaves its folder"),
    (link("1.png", "/etc/passwd"), "link or device"),
    (link("1.png", "0.txt", tarfile.LNKTYPE), "link or device"),
    (link("1.png", "", tarfile.FIFOTYPE), "link or device"),
    (("nosuffix", b"x"), "stem and suffix"), (("1.bin", b"x"), "neither a .json"),
    (("1.json", b"{"), "not JSON"),
    (("1.json", b'{"messages": [], "image": "../2.png"}'), "leaves its folder"),
    (("1.json", b'{"messages": [], "image": "2.jpg"}'), "no member '2.jpg'"),
])
def test_shards_refuse(tmp_path, member, words):
    path = write_tar(tmp_path / "a.tar", [member])
    with pytest.raises(data.DataError, match=words):
        list(data.TarShards(path))


def test_behind_a_bad_sample_shards_go_on(tmp_path):
    """One that cannot be used costs none of those behind it, here, over ranks, or resumed."""
    bad = [("2.png", b"P"), ("3.json", b"{"), link("4.png", "/etc/passwd"), ("5/nosuffix", b"")]
    members = [("1.txt", b"one"), *bad, ("._6.txt", b"\0"), ("6.txt", b"six"), ("7.txt", b"seven")]
    write_tar(tmp_path / "a.tar", members)
    (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:700])  # in 2.png's header
    write_tar(tmp_path / "c.tar", [("8.txt", b"eight")])
    shards = data.TarShards(str(tmp_path / "*.tar"))

    def ids(stream):
        found = []
        while True:
            try:
                found.append(next(stream)["id"])
            except data.DataError as error:
                found.append(str(error).partition(": ")[2][:14])
            except StopIteration:
                return found
    whole = ids(iter(shards))
    assert [one for one in whole if len(one) == 1] == ["1", "6", "7", "8"] and len(whole) == 9
    assert whole[1].startswith("neither") and whole[-2].startswith("broken archive")
    for skip in range(11):
        assert ids(shards.stream(skip)) == whole[skip:]

    def read(group, resumed_at=None):
        source, processor = data.Mixture([shards]), data.Processor(family="seed1_5_vl")
        limits = (7,) if group is None else (7, group)  # one sample in a pack
        kind = data.Loader if group is None else data.RankLoader
        loader, seen = kind(source, processor, *limits, too_long="skip"), []
        for k in range(12):
            if k == resumed_at:
                state, again = loader.state_dict(), data.Mixture([shards])
                loader = kind(again, processor, *limits, too_long="skip")
                loader.load_state_dict(state)
            seen.append(next(loader).input_ids.tolist())
        return seen
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = read(None)
        assert [bytes(i for i in ids if i < 256).decode() for ids in alone[:5]] == [
            "one", "six", "seven", "eight", "one"]
        assert all(read(None, k) == alone for k in range(12))
        two = comm.run_threads(2, read)
    assert [a + b for a, b in zip(*two)] == alone


def test_a_shard_that_claims_too_much(tmp_path):
    member = tarfile.TarInfo("1.png")
    member.size = 2**40
    (tmp_path / "a.tar").write_bytes(member.tobuf() + b"x" * 512)
    with pytest.raises(data.DataError, match="at most"):
        list(data.TarShards(tmp_path / "a.tar"))


@JUNK_RUNS
@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), max_size=8),
       st.integers(0, 6000), st.sampled_from(["w", "w:gz", "w:xz", "w:bz2"]))
def test_junk_in_shards(tmp_path_factory, changes, cut, mode):
    path = tmp_path_factory.mktemp("junk") / "a.tar"
    write_tar(path, [("1.png", b"P" * 700), ("1.txt", b"a"), ("2.txt", b"b" * 600)], mode)
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    path.write_bytes(bytes(content[:max(1, cut)]))
    try:
        for sample in data.TarShards(path):
            data.read_messages(sample)
    except data.DataError:
        pass


# ---------------------------------------------------------------- zip packs

def test_packs(tmp_path):
    records = "".join(json.dumps({"image": f"i/{k}.png", "split": "train" if k else "test"}) + "\n"
                      for k in range(4))
    path = write_zip(tmp_path / "a.zip", [("in/records.jsonl", records)] + [
        (f"in/i/{k}.png", f"picture {k}") for k in range(4)])
    pack = data.ZipPack(path, "in/records.jsonl", split="train")
    assert len(pack) == 3 and pack[0]["image"].read() == b"picture 1"
    assert pack.record(0) == {"image": "i/1.png", "split": "train"}
    named = data.ZipPack(path, "in/records.jsonl", convert=lambda record: record["image"].name)
    assert list(named) == [f"i/{k}.png" for k in range(4)]
    with pytest.raises(IndexError):
        pack[3]


@pytest.mark.parametrize("members, words", [
    ([("x", "y")], "no member 'records.jsonl'"), ([("records.jsonl", "{")], "line 1: not JSON"),
    ([("records.jsonl", '{"image": "../a"}')], "leaves its folder"),
    ([("records.jsonl", '{"image": "a"}')], "no member 'a'")])
def test_packs_refuse(tmp_path, members, words):
    path = write_zip(tmp_path / "a.zip", members)
    with pytest.raises(data.DataError, match=words):
        data.ZipPack(path)[0]["image"].read()


@JUNK_RUNS
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
       st.integers(0, 500))
def test_junk_in_packs(tmp_path_factory, changes, cut):
    path = tmp_path_factory.mktemp("junk") / "a.zip"
    write_zip(path, [("records.jsonl", '{"image": "a.png"}\n'), ("a.png", "p" * 200)])
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    path.write_bytes(bytes(content[:max(200, cut)]))
    try:
        for sample in data.ZipPack(path):
            sample["image"].read()
    except (data.DataError, KeyError):  # a changed letter can make another key
        pass
    except AttributeError:              # or another name for the picture: then it is a string
        assert isinstance(sample["image"], (str, int, type(None)))


def test_a_zip_bomb_stops_at_what_it_claims(tmp_path):
    path = write_zip(tmp_path / "a.zip", [("records.jsonl", '{"image": "a.png"}'),
                                          ("a.png", b"\0" * 100_000)])
    content = path.read_bytes()
    lying = content.replace((100_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    path.write_bytes(lying)
    with pytest.raises(data.DataError, match="broken|holds more"):
        data.ZipPack(path)[0]["image"].read()


@given(st.text(st.sampled_from("ab./\\:\0 "), max_size=10))
def test_names_stay_below_their_folder(name):
    try:
        checked = check_name(name, "here")
    except data.DataError:
        return
    whole = os.path.normpath(os.path.join("/some/where", checked))
    assert whole.startswith("/some/where") and "\\" not in checked


# ---------------------------------------------------------------- the known packs

def converted(tmp_path, kind, folder, record, files=()):
    path = write_zip(tmp_path / "p.zip", [(f"{folder}records.jsonl", json.dumps(record) + "\n"),
                                          *((folder + name, body) for name, body in files)])
    return data.load_pack(path, kind)[0]


def test_adapters(tmp_path):
    sample = converted(tmp_path, "captions", "", {"image": "a", "caption": "cat", "category": "x"})
    assert (sample["answer"], sample["kind"]) == ("cat", "emoji")
    sample = converted(tmp_path, "nlvr", "nlvr/", {"image": "a", "sentence": "There is one.",
                                                   "label": False, "caption": "box"})
    assert sample["answer"] == "false" and "There is one." in str(sample["messages"])
    sample = converted(tmp_path, "digits", "fsdd/", {"audio": "a.wav", "text": "nine"},
                       [("a.wav", b"W")])
    assert data.read_messages(sample)[0].parts[0][1].read() == b"W"
    assert data.score(sample, "Nine.") == 1
    with pytest.raises(data.DataError, match="without 'caption'"):
        converted(tmp_path, "captions", "", {"image": "a"})
    with pytest.raises(ValueError, match="kind must be one of"):
        data.load_pack(tmp_path / "p.zip", "songs")
    with pytest.raises(data.DataError, match="no record of split 'dev'"):
        data.load_pack(tmp_path / "p.zip", "captions", "dev")


PACKS = os.path.join(os.path.dirname(__file__), "..", "..", "..", "shared", "data", "packs")


@pytest.mark.skipif(not os.path.isdir(PACKS), reason="the training packs are not here")
@pytest.mark.parametrize("file, kind, sizes", [
    ("emoji_flags_screens.zip", "captions", {"train": 5043, "val": 202, "test": 429}),
    ("nlvr_fsdd.zip", "nlvr", {"train": 5922, "test": 1980}),
    ("nlvr_fsdd.zip", "nlvr_captions", {"train": 5922, "test": 1980}),
    ("nlvr_fsdd.zip", "digits", {"train": 2700, "test": 300})])
def test_the_real_packs(file, kind, sizes):
    pytest.importorskip("PIL", reason="pictures need Pillow")
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    family = "qwen3_omni_moe" if kind == "digits" else "seed1_5_vl"
    processor = data.Processor(family=family)
    for split, size in sizes.items():
        pack = data.load_pack(os.path.join(PACKS, file), kind, split)
        assert len(pack) == size
        for k in rng.choice(size, 12, replace=False).tolist():
            inputs = processor.one(pack[k])
            assert inputs.n_target_tokens == len(pack[k]["answer"].encode()) + 1
            record = pack.record(k)
            if kind == "digits":
                assert abs(inputs.mel_lengths[0] / 100 - record["seconds"]) <= 0.011
            else:
                want = processor.images.size(record["h"], record["w"])
                assert inputs.grid_thw.tolist() == [[1, want[0] // 14, want[1] // 14]]


# ---------------------------------------------------------------- together


@pytest.fixture
def four(tmp_path):
    """40 lines, a shard of 5 samples of which one is broken, a pack of 10: paths."""
    shard = [(f"{k}.txt" if k != 3 else f"{k}.png", b"a cat") for k in range(5)]
    words = {"messages": [{"role": "assistant", "content": "yes"}]}
    text = json.dumps(words) + "\n"
    (tmp_path / "a.jsonl").write_text("\n" + text * 40)
    return [str(path) for path in (tmp_path / "a.jsonl", write_tar(tmp_path / "b.tar", shard),
                                   write_zip(tmp_path / "c.zip", [("records.jsonl", text * 10)]))]


@pytest.mark.parametrize("weights, wanted", [(None, [40, 10, 5]), ([2, 1, 4], [2, 4, 1])])
def test_a_shard_counts_as_what_it_holds(four, weights, wanted):
    """Lines, packs, shards; given weights go by the entries of files."""
    from orchvlm.sources import training_source
    said = {"files": four, "kinds": None, "weights": weights, "max_pixels": None, "frame": None}
    mixture = training_source(said, 0)
    named = {name: weight for name, weight in zip("a.jsonl c.zip b.tar".split(), wanted)}
    sets = {name: weight for part, weight in zip(mixture._parts, mixture.weights)
            for name in named if name in repr(vars(part.data))}
    assert sets == named


def test_weights_of_a_folder_are_shared(four, tmp_path):
    from orchvlm.sources import training_source
    said = {"files": [four[0], str(tmp_path)], "kinds": None, "weights": [11, 55],
            "max_pixels": None, "frame": None}
    assert training_source(said, 0).weights == pytest.approx([11, 40, 10, 5])


def test_lengths_that_nobody_knows_are_told():
    class Unknown:
        def __iter__(self):
            return iter("x")
    with pytest.warns(UserWarning, match=r"how many samples datasets\[1\] has: all 2 data sets"):
        assert data.Mixture([["a"] * 9, Unknown()]).weights == [1, 1]


def test_samples_are_named_by_where_they_stand(four):
    """As errors name them: what was read says so itself."""
    sets = [data.JsonLines(four[0]), data.TarShards(four[1]),
            data.Varied(data.ZipPack(four[2]), 3), ["x"] * 7]
    mixture = data.Mixture(sets, weights=[1, 1, 1, 1], seed=SEED % 2**20)
    print("seed", SEED)
    before, wanted = mixture.state_dict(), []
    for k in range(400):  # all samples of all sets
        try:
            sample = next(mixture)
            wanted.append(getattr(sample, "where", sample))
        except data.DataError as error:
            wanted.append(str(error).partition(":")[0])
    found = mixture.names(before, mixture.state_dict())
    for name, want in zip(found, wanted, strict=True):
        if isinstance(want, dict):  # of a caption
            assert name == f"{four[1]}, {want['id']}"
        else:
            assert name == want or want == "x" and name.startswith("datasets[3][")
    assert f"{four[1]}, 3" in found and any(", line 4" in name for name in found)
