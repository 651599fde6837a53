"""Drawn tasks: the same for ever, right by their pixels, and verifiers that cannot be fooled."""
import os
import secrets
from collections import Counter

import numpy as np
import pytest

from orchvlm import data
from orchvlm.data.tasks_draw import COLOURS, KINDS
from orchvlm.data.verify import iou

Image = pytest.importorskip("PIL.Image", reason="tasks are drawn with Pillow")
SEED = int(os.environ.get("ORCHVLM_TEST_SEED", secrets.randbits(32)))


def parts(sample):
    picture, question = sample["messages"][0]["content"]
    return picture["image"], question["text"]


def test_a_sample_depends_on_its_number_alone():
    tasks, again = data.Tasks(seed=5), data.Tasks(seed=5)
    for k in (9, 3, 9, 0):
        assert np.array_equal(parts(tasks[k])[0], parts(again[k])[0])
        assert tasks[k]["answer"] == again[k]["answer"]
    other = data.Tasks(seed=6)
    assert any(tasks[k]["answer"] != other[k]["answer"] for k in range(20))


def test_splits_share_no_drawing():
    def drawings(split):
        tasks = data.Tasks(seed=1, split=split)
        return {parts(tasks[k])[0].tobytes() for k in range(200)}
    train, test = drawings("train"), drawings("test")
    assert len(train) > 190 and not train & test


PINNED = [("colour", "black"), ("count", "1"), ("count", "2"), ("puzzle", "2 3"),
          ("puzzle", "2 1"), ("count", "5")]


def test_kinds_and_answers_are_pinned():
    """Figures of one run must mean the same in the next: whoever changes a kind says so here."""
    tasks = data.Tasks(seed=0, kinds=["colour", "count", "puzzle"])
    assert [(tasks[k]["kind"], tasks[k]["answer"]) for k in range(6)] == PINNED


@pytest.mark.parametrize("difficulty, max_side", [(0, 56), (0.3, 224), (1, 224), (1, 600)])
def test_every_kind_can_be_drawn_and_answers_itself(difficulty, max_side):
    print("seed", SEED)
    for kind in KINDS:
        tasks = data.Tasks(SEED, [kind], difficulty=difficulty, max_side=max_side)
        for k in range(40):
            sample = tasks[k]
            picture, question = parts(sample)
            assert picture.dtype == np.uint8 and picture.shape[2] == 3
            low, high = min(picture.shape[:2]), max(picture.shape[:2])
            # Screens are never lower than 64 pixels' worth of buttons, texts never below 56.
            assert low >= min(56, max_side) and high <= max(max_side, 56), (kind, picture.shape)
            assert question and sample["answer"] and sample["kind"] == kind
            assert data.score(sample, sample["answer"]) > 0.99
            assert data.score(sample, "no idea") == 0
            assert (picture != picture[0, 0]).any()


def test_sizes_have_long_tails():
    tasks = data.Tasks(seed=SEED)
    sides = np.array([max(parts(tasks[k])[0].shape) for k in range(400)])
    assert np.median(sides) < 110 and sides.max() > 200
    words = data.Tasks(seed=SEED, kinds=["read"], difficulty=1.0)
    lengths = np.array([len(words[k]["answer"]) for k in range(400)])
    assert np.median(lengths) <= 3 and lengths.max() >= 12


def test_long_kinds_have_long_tails_and_answer_themselves():
    """Pictures and words of most are few, of some many; the answers are of what is there."""
    print("seed", SEED)
    counts = {}
    for kind in ("album", "frames", "story"):
        tasks, counts[kind] = data.Tasks(SEED, [kind], difficulty=0.5, max_side=56), []
        for k in range(120):
            sample = tasks[k]
            *pictures, question = sample["messages"][0]["content"]
            assert data.score(sample, sample["answer"]) == 1 > data.score(sample, "no idea")
            assert all(max(part["image"].shape[:2]) <= 56 for part in pictures)
            said = {"album": sample["answer"].split("; "), "frames": sample["answer"].split(", "),
                    "story": question["text"].split(". ")}[kind]
            assert len(said) - (kind == "story") == (len(pictures) or len(said) - 1)
            counts[kind].append(len(said))
            if kind == "album":
                assert len(pictures) == int(question["text"].split()[3])
            elif kind == "story":
                asked = question["text"].split()[-1].rstrip("?")
                assert f"{asked} has {sample['answer']}." in question["text"] and not pictures
    for found in counts.values():
        assert np.median(found) < 20 and max(found) > 3 * np.median(found)
    assert set("album frames story".split()) & set(KINDS) == set()  # none of the kinds by default


def test_frames_say_where_the_shape_is():
    tasks = data.Tasks(SEED, ["frames"], max_side=56)
    for k in range(20):
        *pictures, _ = tasks[k]["messages"][0]["content"]
        for part, place in zip(pictures, tasks[k]["answer"].split(", ")):
            picture = part["image"].astype(int)
            _, columns = np.nonzero(np.abs(picture - picture[0, 0]).sum(axis=2) > 150)
            assert ("left", "middle", "right")[int(3 * columns.mean() / 56)] == place


def near(picture, name):
    """Where a picture has a colour, but for the blend at edges."""
    return (np.abs(picture.astype(int) - COLOURS[name]) <= 12).all(axis=2)


def test_colours_by_pixels():
    """With one shape, the only colour of the palette in the picture is the answer."""
    tasks = data.Tasks(SEED, ["colour"], difficulty=0)
    for k in range(60):
        picture, _ = parts(tasks[k])
        areas = {name: near(picture, name).sum() for name in COLOURS}
        assert max(areas, key=areas.get) == tasks[k]["answer"]


def edges_of(mask):
    """Top, left, bottom and right of what is marked."""
    rows, columns = np.nonzero(mask)
    return rows.min(), columns.min(), rows.max() + 1, columns.max() + 1


def test_shapes_by_pixels():
    """How much of its box the asked colour fills tells squares and circles from the rest."""
    tasks = data.Tasks(SEED, ["shape"], difficulty=0.5)
    for k in range(80):
        picture, question = parts(tasks[k])
        wanted = near(picture, question.split()[4])
        top, left, bottom, right = edges_of(wanted)
        filled = wanted[top:bottom, left:right].mean()
        seen = "square" if filled > 0.9 else "circle" if filled > 0.66 else "another"
        answer = tasks[k]["answer"]
        if "grey" in question and filled < 0.66:  # the edges of black shapes are grey, too
            continue
        assert seen == (answer if answer in ("square", "circle") else "another"), k


def test_descriptions_are_in_reading_order():
    tasks = data.Tasks(SEED, ["describe"], difficulty=0.6)
    checked = 0
    for k in range(1000):
        if checked == 20:
            break
        picture, _ = parts(tasks[k])
        names = [thing.split()[0] for thing in tasks[k]["answer"].split(", ")]
        if len(set(names)) < len(names) or "grey" in names:
            continue
        areas = {name: near(picture, name).sum() for name in COLOURS if name != "grey"}
        assert {name for name in areas if areas[name] > 30} <= set(names)
        assert all(areas[name] > 5 for name in names)  # a small star is nearly all edge
        places = [edges_of(near(picture, name)) for name in names]
        for (top, left, bottom, right), after in zip(places, places[1:]):
            assert after[1] >= right - 1 or after[0] >= bottom - 1, (k, names)
            assert after[2] > top
        checked += len(names) > 1
    assert checked == 20


def test_counts_by_pixels():
    """Connected areas of the asked colour, or of anything where all shapes are asked for."""
    ndimage = pytest.importorskip("scipy.ndimage", reason="scipy counts connected areas")
    tasks = data.Tasks(SEED, ["count"], difficulty=0.6)
    checked = 0
    for k in range(150):
        picture, question = parts(tasks[k])
        what = question.split()[2]
        if what == "shapes?":  # whatever is not paper
            paper = np.median(picture[0], axis=0)
            wanted = (np.abs(picture - paper) > 60).any(axis=2)
        elif what in COLOURS and what != "grey":  # black edges blend to grey
            wanted = near(picture, what)
        else:
            continue
        labels, n = ndimage.label(wanted, np.ones((3, 3)))
        found = sum((labels == area).sum() >= 12 for area in range(1, n + 1))
        assert str(found) == tasks[k]["answer"], (k, question)
        checked += 1
    assert checked > 60


@pytest.mark.parametrize("kind", ["point", "box"])
def test_places_by_pixels(kind):
    """The region is the box about the pixels of the asked colour, where no other has it."""
    tasks = data.Tasks(SEED, [kind], difficulty=0.5)
    checked = 0
    for k in range(100):
        picture, question = parts(tasks[k])
        colour = question.removesuffix(".").split()[-2]
        wanted = near(picture, colour)
        rows, columns = np.nonzero(wanted)
        height, width = wanted.shape
        left, top, right, bottom = tasks[k]["region"]
        edges = np.array([left * width, top * height, right * width, bottom * height]) / 999
        found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        if ((found - edges) * (1, 1, -1, -1) < -2).any():  # another shape has the colour too
            continue
        assert np.abs(found - edges).max() <= 4  # tips are thin, and blend into the paper
        checked += 1
    assert checked > 30


def test_puzzles_by_pixels():
    """The cell that differs most from the others' mean is the answer, nearly always: the grid
    itself is guessed."""
    tasks = data.Tasks(SEED, ["puzzle"], difficulty=0.6)
    checked = wrong = 0
    for k in range(80):
        picture, _ = parts(tasks[k])
        row, column = (int(v) for v in tasks[k]["answer"].split())
        best = None
        for rows in range(max(2, row), 8):
            for columns in range(max(2, column), 8):
                if picture.shape[0] < 2 * rows or picture.shape[1] < 2 * columns:
                    continue
                high, wide = picture.shape[0] // rows, picture.shape[1] // columns
                cells = np.stack([picture[int(r * picture.shape[0] / rows):][:high,
                                          int(c * picture.shape[1] / columns):][:, :wide]
                                  for r in range(rows) for c in range(columns)]).astype(float)
                off = np.abs(cells - np.median(cells, axis=0)).mean(axis=(1, 2, 3))
                others = np.delete(off, off.argmax())
                contrast = off.max() / (others.max() + 1)
                if rows * columns > 4 and (best is None or contrast > best[0]):
                    best = contrast, divmod(int(off.argmax()), columns)
        if best is not None and best[0] > 3:
            wrong += best[1] != (row - 1, column - 1)
            checked += 1
    assert checked > 20 and wrong <= 0.1 * checked


def test_charts_by_pixels():
    """Bars of one colour: their heights have the answers' order."""
    tasks = data.Tasks(SEED, ["chart"], difficulty=0.3)
    checked = 0
    for k in range(80):
        picture, question = parts(tasks[k])
        if not question.startswith("Which"):
            continue
        areas = {name: near(picture, name).sum() for name in COLOURS
                 if name not in ("black", "grey")}  # the edges of black bars are grey
        name = max(areas, key=areas.get)
        if areas[name] < 60:
            continue
        filled = near(picture, name)[:-16, 18:]
        tallest = int(filled.sum(axis=0).argmax())
        bars = np.flatnonzero(np.diff(np.concatenate([[0], filled.any(axis=0), [0]])) == 1)
        assert tasks[k]["answer"] == "ABCDEFGH"[int(np.searchsorted(bars, tallest, "right")) - 1]
        checked += 1
    assert checked > 8


def test_kinds_do_not_follow_numbers():
    tasks = data.Tasks(seed=SEED)
    for step in (2, 8):
        seen = Counter(tasks[k]["kind"] for k in range(0, 200 * step, step))
        assert len(seen) == len(KINDS) and max(seen.values()) < 70


@pytest.mark.parametrize("fields, error", [
    ({"seed": 1.5}, TypeError), ({"kinds": []}, ValueError), ({"kinds": ["song"]}, ValueError),
    ({"kinds": "read"}, ValueError), ({"split": "dev"}, ValueError),
    ({"difficulty": 2}, ValueError), ({"difficulty": "hard"}, TypeError),
    ({"max_side": 10}, ValueError),
    ({"max_side": 100.0}, TypeError)])
def test_tasks_refused(fields, error):
    with pytest.raises(error):
        data.Tasks(**fields)
    with pytest.raises(IndexError):
        data.Tasks()[-1]
    with pytest.raises(TypeError):
        data.Tasks()["a"]


# ---------------------------------------------------------------- verifiers

@pytest.mark.parametrize("sample, said, want", [
    ({"check": "exact", "answer": "A cat"}, ' a  CAT. ', 1),
    ({"check": "exact", "answer": "cat"}, "a cat", 0),
    ({"check": "exact", "answer": "cat"}, "<think>dog</think> cat", 1),
    ({"check": "exact", "answer": "cat"}, "<think>cat</think> dog", 0),
    ({"check": "number", "answer": "7"}, "There are 7 of them.", 1),
    ({"check": "number", "answer": "7"}, "7 or 8", 0),
    ({"check": "number", "answer": "7"}, "seven", 0),
    ({"check": "number", "answer": "7"}, "7.0", 1),
    ({"check": "point", "region": [10, 20, 30, 40]}, "10 40", 1),
    ({"check": "point", "region": [10, 20, 30, 40]}, "(31, 30)", 0),
    ({"check": "point", "region": [10, 20, 30, 40]}, "<point>20 30</point>", 1),
    ({"check": "point", "region": [10, 20, 30, 40]}, "20", 0),
    ({"check": "box", "region": [0, 0, 10, 10]}, "0 0 10 10", 1),
    ({"check": "box", "region": [0, 0, 10, 10]}, "[5, 0, 15, 10]", 1 / 3),
    ({"check": "box", "region": [0, 0, 10, 10]}, "10 10 0 0", 0),
    ({"check": "box", "region": [0, 0, 10, 10]}, "0 0 10", 0),
])
def test_scores(sample, said, want):
    assert data.score(sample, said) == pytest.approx(want)


def test_overlap_against_pixels():
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    for _ in range(200):
        boxes = rng.integers(0, 30, (2, 4))
        grids = np.zeros((2, 30, 30), bool)
        for grid, (left, top, right, bottom) in zip(grids, boxes):
            grid[top:bottom, left:right] = True
        whole = (grids[0] | grids[1]).sum()
        want = (grids[0] & grids[1]).sum() / whole if whole else 0
        assert iou(*boxes.tolist()) == pytest.approx(want)


@pytest.mark.parametrize("sample", [{}, {"check": "exact"}, {"check": "exact", "answer": 3},
                                    {"check": "number", "answer": "x"}, {"check": "point"},
                                    {"check": "box", "region": [1, 2, 3]},
                                    {"check": "box", "region": [1, 2, 3, float("nan")]},
                                    {"check": ["exact"], "answer": "a"}])
def test_scores_refused(sample):
    with pytest.raises(data.DataError):
        data.score(sample, "x")


def test_contact_sheets(tmp_path):
    tasks = data.Tasks(seed=2)
    samples = [tasks[k] for k in range(5)]
    path = tmp_path / "sheet.png"
    sheet = data.contact_sheet(samples, path, columns=3, said=[s["answer"] for s in samples])
    assert sheet.size == (3 * 170, 2 * 216) and Image.open(path).size == sheet.size
    assert data.contact_sheet([{"messages": [{"role": "user", "content": "no ☃ picture"}]}]).size
    for arguments, error in ((([],), ValueError), ((samples, None, 0), ValueError),
                             ((samples, None, "2"), TypeError),
                             ((samples, None, 2, ["a"]), ValueError)):
        with pytest.raises(error):
            data.contact_sheet(*arguments)


def test_tasks_go_through_every_family():
    tasks = data.Tasks(seed=1)
    for family in ("qwen3_vl", "seed1_5_vl"):
        images = None if family == "seed1_5_vl" else data.ImageRule(min_pixels=1024)
        processor = data.Processor(family=family, images=images)
        loader = data.Loader(data.Mixture([tasks]), processor, 512)
        pack = next(loader)
        assert pack.n_tokens <= 512 and len(pack) == len(pack.grid_thw)
