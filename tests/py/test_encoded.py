"""Pictures that travel as files, and are decoded where they are encoded: the bits of eager reading.
"""
import io
import os
import random
import threading
import zlib
from dataclasses import replace
from hashlib import sha256
from itertools import islice

import numpy as np
import pytest

import orchvlm
from orchvlm import comm, data
from orchvlm.data import encoded as files
from orchvlm.orchestrator import Orchestrator
from orchvlm.passes import OneRank
from orchvlm.routing import Balance
from model_cases import grads_of
from rank_cases import RandomPlans, compare

Image = pytest.importorskip("PIL.Image")
SEED = int(os.environ.get("ORCHVLM_TEST_SEED", random.randrange(2**31)))
CONFIG = orchvlm.preset("tiny")
RULE = {"min_pixels": 32 * 32, "max_pixels": 3 * 64 * 64}


@pytest.fixture(autouse=True)
def told():
    print("seed", SEED)


def picture(rng, kind):
    """A file with this peculiarity."""
    height, width = rng.integers(20, 120, 2)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    image, options = Image.fromarray(pixels), {"format": "PNG"}
    if kind in ("jpeg", "turned jpeg", "cmyk", "webp", "turned webp", "turned png"):
        options["format"] = {"cmyk": "JPEG"}.get(kind, kind.split()[-1].upper())
    if "turned" in kind:
        exif = Image.Exif()
        exif[0x0112] = int(rng.integers(1, 9))
        options["exif"] = exif
    if kind == "cmyk":
        image = image.convert("CMYK")
    if kind in ("palette", "clear palette"):
        image = image.quantize(int(rng.integers(2, 200)))
        if kind == "clear palette":
            options["transparency"] = 0
    if kind == "alpha":
        image.putalpha(Image.fromarray(pixels[:, :, 0]))
    if kind == "deep":
        image = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
    if kind in ("gif", "bmp"):
        options["format"] = kind.upper()
    stream = io.BytesIO()
    image.save(stream, **options)
    return stream.getvalue()


KINDS = ("png", "jpeg", "turned jpeg", "turned png", "webp", "turned webp", "cmyk", "palette",
         "clear palette", "alpha", "deep", "gif", "bmp")
LAZY = KINDS[:-2]  # others are decoded where they are read


def asked(*sources, answer="Yes."):
    return {"messages": [
        {"role": "user", "content": [{"type": "image", "image": one} for one in sources]
         + [{"type": "text", "text": "Well?"}]}, {"role": "assistant", "content": answer}]}


def drawn(rng, n, kinds=(*KINDS, "array", "none")):
    """Samples with pictures of all kinds, some in memory, some without any."""
    def one():
        kind = str(rng.choice(kinds))
        return rng.integers(0, 256, (40, 70, 3), dtype=np.uint8) if kind == "array" else \
            picture(rng, kind)
    return [asked(*(one() for _ in range(rng.integers(0, 3)))) for _ in range(n)]


def spoilt(rng):
    """A PNG whose pixels cannot be unpacked; its header and its checksums are right."""
    content = bytearray(picture(rng, "png"))
    start = content.index(b"IDAT") + 4
    size = int.from_bytes(content[start - 8:start - 4], "big")
    content[start + 2:start + 40] = bytes(38)
    content[start + size:start + size + 4] = zlib.crc32(
        content[start - 4:start + size]).to_bytes(4, "big")
    return bytes(content)


def processor(**changes):
    return data.Processor.from_config(CONFIG.values, **{**RULE, **changes})


class Eager:
    """Knows nothing of files."""

    def __init__(self, inner):
        self.inner = inner

    def one(self, sample):
        return self.inner.one(sample)


def loader(samples, group, eager=False, tokens=400, **changes):
    made = processor(**changes)
    return data.RankLoader(data.Mixture([samples], seed=SEED), Eager(made) if eager else made,
                           tokens, group, too_long="skip")


# ---------------------------------------------------------------- one picture

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ("uint8", "float32"))
def test_a_file_gives_the_bits_of_eager_reading(kind, dtype):
    rng = np.random.default_rng([SEED, KINDS.index(kind)])
    made = processor(dtype=dtype)
    for _ in range(3):
        sample = asked(picture(rng, kind))
        wanted, got = made.one(sample), made.one(sample, encoded=True)
        assert (got.encoded is not None) == (kind in LAZY)
        assert got.n_patches == wanted.n_patches and repr(got) == repr(wanted)
        assert got.encoded is None or len(got.pixels) == 0
        same(got.decoded(), wanted)


def same(got, wanted):
    for name, value in vars(wanted).items():
        other = getattr(got, name)
        assert (value is None) == (other is None), name
        assert value is None or (value.dtype == other.dtype and np.array_equal(value, other)), name


@pytest.mark.parametrize("texts", (False, True))
def test_what_a_png_says_behind_its_pixels(texts):
    """An orientation there turns it, too: only whole pictures tell, and they are decoded."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.new("RGB", (60, 90), "red").save(stream, "PNG", exif=exif)
    content = stream.getvalue()
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start:start + 4], "big")
    chunk, rest = content[start:end], content[:start] + content[end:]
    moved = rest[:-12] + chunk + rest[-12:] if texts else rest
    assert files.upright_size(content, "a") == (60, 90)
    assert files.upright_size(moved, "a") == (None if texts else (90, 60))
    made = processor()
    same(made.one(asked(moved), encoded=True).decoded(), made.one(asked(moved)))


def test_refusals():
    rng = np.random.default_rng(SEED)
    made = processor()
    with pytest.raises(data.DataError, match="no picture"):
        made.one(asked(b"nothing"), encoded=True)
    long = io.BytesIO()
    Image.new("L", (1000, 2)).save(long, "PNG")
    with pytest.raises(data.DataError, match="aspect ratio"):
        made.one(asked(long.getvalue()), encoded=True)
    cut = picture(rng, "png")
    cut = cut[:len(cut) // 2]  # a PNG's end is looked at before it travels
    with pytest.raises(data.DataError, match="broken"):
        made.one(asked(cut), encoded=True)
    good = made.one(asked(picture(rng, "png")), encoded=True)
    with pytest.raises(ValueError, match=r"inputs\.decoded"):
        orchvlm.Model.from_config(CONFIG, seed=0, threads=1).forward(good)
    with pytest.raises(data.DataError, match="broken picture"):
        made.one(asked(spoilt(rng)), encoded=True).decoded()
    for wrong, kind in (([b""], data.DataError), ([b"\xff\xff\xff\xff{}"], data.DataError),
                        ([b"\2\0\0\0{}"], data.DataError), ([b"", b""], ValueError),
                        ([3], TypeError), (b"abc", TypeError)):
        with pytest.raises(kind):
            orchvlm.Inputs(**{**vars(good), "encoded": wrong}).decoded()
    with pytest.raises(ValueError, match="needs grid_thw"):
        orchvlm.Inputs(input_ids=[1], encoded=[b"a"])
    with pytest.raises(ValueError, match="one frame"):
        orchvlm.Inputs(**{**vars(good), "grid_thw": [[2, 2, 2]]})
    other = orchvlm.Inputs(**{**vars(good), "grid_thw": good.grid_thw + [[0, 2, 0]]})
    with pytest.raises(data.DataError, match="header"):
        other.decoded()


def test_packs_are_cut_and_joined():
    rng = np.random.default_rng(SEED)
    made, samples = processor(), drawn(rng, 12)
    lazy = orchvlm.Inputs.concatenate([made.one(one, encoded=True) for one in samples])
    eager = made(samples)
    same(lazy.decoded(), eager)
    order = rng.permutation(12)[:7]
    same(lazy[order].decoded(), eager[order])
    same(lazy[order][2].decoded(), eager[order][2])


# ---------------------------------------------------------------- over ranks

def items_of(prepared):
    """By round what this rank encodes, and the tokens that it is for."""
    return [({name: (rows.dtype.str, sha256(rows).hexdigest(), sizes.tolist())
              for name, (rows, sizes) in one.items.items()},
             [part.pack.input_ids.tolist() for part in one.micro]) for one in prepared.rounds]


@pytest.mark.parametrize("ranks", (2, 3, 4))
def test_ranks_get_the_bits_of_eager_reading(ranks, monkeypatch):
    """Under plans drawn at random; and a rank decodes what it encodes, and nothing else."""
    rng = np.random.default_rng([SEED, ranks])
    samples = drawn(rng, 30)
    decoded, counts = files.decode, {}

    def counting(item):
        counts[threading.get_ident()] = counts.get(threading.get_ident(), 0) + 1
        return decoded(item)
    monkeypatch.setattr(files, "decode", counting)

    def work(group, eager):
        ranked = RandomPlans(orchvlm.Model.from_config(CONFIG, seed=0, threads=1), group)
        ranked.seed = [SEED, ranks]
        source, found = loader(samples, group, eager), []
        for _ in range(2):
            batch = next(source)
            counts[threading.get_ident()] = 0
            prepared = ranked.prepare(batch)
            plan = prepared.rounds[0].plan.phases["vision"]
            own = counts[threading.get_ident()]
            same(ranked.inputs(prepared), batch.decoded())
            here = sum(item is not None for item in batch.encoded or ())
            found.append((items_of(prepared), own, int((plan.rank == group.rank).sum()), here,
                          prepared.normalizer))
        return found
    eager = comm.run_threads(ranks, work, True)
    lazy = comm.run_threads(ranks, work, False)
    for batch in range(2):
        for rank in range(ranks):
            bits, _, _, none, weight = eager[rank][batch]
            assert none == 0 and lazy[rank][batch][0] == bits
            assert lazy[rank][batch][4] == weight
        done = [lazy[rank][batch][1] for rank in range(ranks)]
        assert sum(done) == sum(lazy[rank][batch][3] for rank in range(ranks)) > 0
        assert all(own <= lazy[rank][batch][2] for rank, own in enumerate(done))


def test_a_rank_decodes_what_the_plan_gives_it(monkeypatch):
    """All pictures are files, so that both counts are the same."""
    rng = np.random.default_rng(SEED)
    samples = [asked(*(picture(rng, "jpeg") for _ in range(rng.integers(1, 3))))
               for _ in range(20)]
    decoded, counts = files.decode, {}

    def counting(item):
        counts[threading.get_ident()] = counts.get(threading.get_ident(), 0) + 1
        return decoded(item)
    monkeypatch.setattr(files, "decode", counting)

    def work(group):
        counts[threading.get_ident()] = 0
        ranked = RandomPlans(orchvlm.Model.from_config(CONFIG, seed=0, threads=1), group)
        ranked.seed = SEED
        plan = ranked.prepare(next(loader(samples, group))).rounds[0].plan.phases["vision"]
        return counts[threading.get_ident()], int((plan.rank == group.rank).sum())
    for own, planned in comm.run_threads(3, work):
        assert own == planned


@pytest.mark.parametrize("ranks", (2, 3))
def test_gradients_over_rounds(ranks):
    """Of encoded pictures in rounds as of decoded ones on one rank."""
    rng = np.random.default_rng([SEED, 7])
    samples, made = drawn(rng, 8), processor()

    def model():
        return orchvlm.Model.from_config(CONFIG, seed=3, threads=1)

    def work(group):
        held, mine = model(), samples[group.rank::group.size]
        ranked = Orchestrator(held, group)
        batch = orchvlm.Inputs.concatenate([made.one(one, encoded=True) for one in mine])
        ranked._rounds = InTwo()
        ranked.model.zero_grad()
        prepared = ranked.prepare(batch)
        ran = ranked.run(prepared, Balance(held, "exact", 0.0, ranked.total))
        ranked.reduce_gradients()
        return (float(ranked.total(np.array([ran.loss]))[0]), len(prepared.rounds),
                {name: np.array(g, np.float64) for name, g in ranked.shard.gradients().items()})
    alone = model()
    alone.zero_grad()
    ran = OneRank(alone, 1).run([made(samples)], Balance(alone, "exact", 0.0), "none")
    for loss, rounds, gradients in comm.run_threads(ranks, work):
        assert rounds == 2
        compare((loss, gradients), (ran.loss, grads_of(alone)))


class InTwo:
    """In place of the search for rounds that fit."""

    tokens = 1 << 20

    @staticmethod
    def of(batch, sizes, dtype, plan, limited=()):
        from orchvlm.rounds import dealt, taken
        return [taken(batch, sizes, some, plan) for some in dealt(batch, 2)]


# ---------------------------------------------------------------- broken bodies

@pytest.mark.parametrize("ranks", (1, 2, 3, 4))
def test_broken_bodies_are_left_out_and_counted(ranks):
    """The batch is the one without them; no rank waits for another; the run goes on."""
    rng = np.random.default_rng([SEED, ranks])
    good = drawn(rng, 9, KINDS)
    bad = [asked(spoilt(rng), answer="Never.") for _ in range(3)]
    samples = [*good, *bad]

    def work(group):
        ranked = Orchestrator(orchvlm.Model.from_config(CONFIG, seed=0, threads=1), group)
        source, seen = loader(samples, group, tokens=4000), []
        states = [source.state_dict()]
        batch = ranked.make(source)
        states.append(source.state_dict())
        mine = ranked.inputs(batch)
        seen += [tuple(mine[k].input_ids.tolist()) for k in range(len(mine))]
        again = loader(samples, group, tokens=4000)
        again.load_state_dict(states[-1])
        return (seen, batch.normalizer, source.skipped, again.skipped,
                sum(len(one.plan.batch) for one in batch.rounds))
    with pytest.warns(UserWarning, match="image: broken picture"):
        found = comm.run_threads(ranks, work)
    drawn_all = list(islice(data.Mixture([samples], seed=SEED), 2000))
    made, wanted, skipped, tokens = processor(), [], 0, 0
    for sample in drawn_all:
        one = made.one(sample, encoded=True)
        if tokens + one.n_tokens > 4000:
            break
        tokens += one.n_tokens
        if sample["messages"][1]["content"] == "Never.":
            skipped += 1
        else:
            wanted.append(one)
    assert skipped
    assert sorted(sum((rank[0] for rank in found), [])) == sorted(
        tuple(one.input_ids.tolist()) for one in wanted)
    weight = sum(one.n_target_tokens for one in wanted)
    for rank in found:
        assert rank[1:] == (weight, skipped, skipped, len(wanted))


def test_a_loader_that_may_not_skip_ends_on_all_ranks():
    rng = np.random.default_rng(SEED)
    samples = [asked(spoilt(rng))]

    def work(group):
        ranked = Orchestrator(orchvlm.Model.from_config(CONFIG, seed=0, threads=1), group)
        source = data.RankLoader(data.Mixture([samples]), processor(), 400, group)
        for call in (lambda: ranked.make(source), lambda: ranked.prepare(next(source))):
            with pytest.raises(ValueError, match="broken picture|another rank"):
                call()
        return True
    assert comm.run_threads(3, work) == [True] * 3


@pytest.mark.parametrize("what", ("header", "rows", "bytes"))
def test_another_rule_on_one_rank_is_an_error_on_all(what):
    """Whoever decodes the picture; and no loader may skip it."""
    rng = np.random.default_rng(SEED)
    sample = asked(picture(rng, "png"))

    def work(group):
        made = processor()
        mine = made.one(sample, encoded=True)
        if group.rank == 1 and what == "bytes":
            mine = processor(dtype="uint8").one(sample, encoded=True)
        elif group.rank == 1:
            film = replace(made.images, temporal_size=2)
            item, _ = files.encode(sample["messages"][0]["content"][0]["image"], "image", film)
            rows = mine.pixels if what == "header" else mine.pixels[:, ::2]
            mine = orchvlm.Inputs(**{**vars(mine), "pixels": rows.copy(), "encoded": [item]})
        ranked = RandomPlans(orchvlm.Model.from_config(CONFIG, seed=0, threads=1), group)
        ranked.seed = SEED
        with pytest.raises(ValueError, match="use one rule on all ranks") as caught:
            ranked.prepare(mine, refused=lambda *told: None)
        return str(caught.value)
    found = set(comm.run_threads(3, work))
    assert len(found) == 1 and "rank 1" in found.pop()


def test_nothing_but_broken_bodies_ends(monkeypatch):
    monkeypatch.setattr("orchvlm.orchestrator._MOST_REFUSED", 3)
    rng = np.random.default_rng(SEED)
    samples = [asked(spoilt(rng))]

    def work(group):
        ranked = Orchestrator(orchvlm.Model.from_config(CONFIG, seed=0, threads=1), group)
        source = loader(samples, group)
        with pytest.raises(ValueError, match="3 global batches"):
            ranked.make(source)
        return source.skipped
    with pytest.warns(UserWarning, match="left out"):
        one, other = comm.run_threads(2, work)
    assert one == other > 3


def test_a_run_over_ranks_and_one_that_goes_on(tmp_path):
    """With broken bodies among the samples: losses as of eager reading, and resumed ones the same
    bits."""
    rng = np.random.default_rng([SEED, 11])
    good = drawn(rng, 12, LAZY)
    samples = [*good, asked(spoilt(rng))]

    def run(group, folder, steps, eager=False, some=samples, goes_on=False):
        trainer = orchvlm.Trainer(
            orchvlm.Model.from_config(CONFIG, seed=0, threads=1), loader(some, group, eager),
            orchvlm.TrainingConfig(steps=steps, warmup=1, schedule="constant"), tmp_path / folder,
            group)
        if goes_on:
            trainer.resume()
        return [row["loss"] for row in trainer.run()], trainer.loader.skipped
    wanted, _ = comm.run_threads(2, run, "eager", 4, True, good)[0]
    got, _ = comm.run_threads(2, run, "lazy", 4, False, good)[0]
    assert got == pytest.approx(wanted, rel=1e-4)
    with pytest.warns(UserWarning, match="left out"):
        whole = comm.run_threads(2, run, "whole", 4)
        first = comm.run_threads(2, run, "parts", 2)
        rest = comm.run_threads(2, run, "parts", 4, False, samples, True)
    assert whole[0] == whole[1] and whole[0][1] > 0
    assert first[0][0] + rest[0][0] == whole[0][0] and rest[0][1] == whole[0][1]
