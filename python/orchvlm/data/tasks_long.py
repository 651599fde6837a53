"""Drawn tasks of very different lengths: many pictures, many frames, long texts.

Each has ``draw(rng, difficulty, max_side)`` as :mod:`orchvlm.data.tasks_draw` does; of pictures a
list.
"""
import math

from .tasks_draw import COLOURS, LETTERS, PAPERS, SHAPES, Canvas, describe

_GRID = ("left", "middle", "right")


def _length(rng, median, sigma, most):
    """A whole number in 1 .. most, log-normal."""
    return max(1, min(int(most), round(rng.lognormvariate(math.log(median), sigma))))


def album(rng, difficulty, max_side):
    """All shapes of all pictures."""
    n = _length(rng, 3, 0.9, 8 + 64 * difficulty)
    drawn = [describe(rng, difficulty, max_side) for _ in range(n)]
    answer = "; ".join(answer for _, _, answer, _ in drawn)
    return [picture for picture, *_ in drawn], f"Describe the pictures, {n} in all.", answer, {}


def frames(rng, difficulty, max_side):
    """Where is a shape in each frame?"""
    n = _length(rng, 5, 0.9, 12 + 96 * difficulty)
    paper, shape, name = rng.choice(PAPERS), rng.choice(SHAPES), rng.choice(list(COLOURS))
    side, column = min(56, max_side), rng.randrange(3)
    pictures, places = [], []
    for _ in range(n):
        canvas = Canvas(side, side, paper)
        canvas.shape(shape, (column + 0.5) * side / 3, rng.uniform(0.2, 0.8) * side, 0.14 * side,
                     COLOURS[name])
        pictures.append(canvas.done())
        places.append(_GRID[column])
        column = min(2, max(0, column + rng.choice((-1, 0, 1))))
    return pictures, f"Where is the {shape}, frame by frame?", ", ".join(places), {}


def story(rng, difficulty, max_side):
    """Who has what, in a long text without pictures."""
    n = _length(rng, 12, 1.4, 20 + 900 * difficulty)
    names = rng.sample([a + b + c for a in LETTERS for b in LETTERS for c in LETTERS], n)
    told = {name: str(rng.randrange(100)) for name in names}
    text = " ".join(f"{name} has {number}." for name, number in told.items())
    asked = rng.choice(names)
    return [], f"{text} What has {asked}?", told[asked], {}


LONG_KINDS = {"album": album, "frames": frames, "story": story}
