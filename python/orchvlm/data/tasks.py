"""Visual tasks with exact answers, drawn when they are asked for: nothing to download."""
import hashlib
import random

from .assets import need
from .tasks_draw import KINDS
from .tasks_long import LONG_KINDS

SPLITS = ("train", "val", "test")
_ALL = {**KINDS, **LONG_KINDS}
SMALL, LARGE = 56, 224  # pixels: the least side of a picture, and the greatest by default


class Tasks:
    """Questions about drawn pictures, without end.

    ``read`` (what does it say?), ``colour``, ``shape`` and ``count`` (of shapes), ``describe`` (all
    of them, in reading order), ``point`` and ``box`` (where is a shape?), ``chart`` (bars),
    ``puzzle`` (the odd one out) and ``screen`` (where to click).  Places are whole numbers from 0
    to 999 along each side.  Three more have lengths with long tails: ``album`` (what is on all of
    the pictures?), ``frames`` (where does a shape go, picture by picture?) and ``story`` (who has
    what, in a text without pictures).

    Parameters
    ----------
    seed : int
        Every seed is another sequence.
    kinds : sequence of str, optional
        By default all but ``album``, ``frames`` and ``story``.
    split : str
        ``train``, ``val`` or ``test``: three sequences that share no drawing.
    difficulty : float
        0 to 1: how long texts are, how many shapes, bars, cells and buttons there can be.
    max_side : int
        Pixels of the longer side at most, 56 to 2,048.

    Raises
    ------
    TypeError
        A seed that is no integer, a difficulty that is no number.
    ValueError
        An unknown kind or split, a figure out of range.

    Notes
    -----
    Sample ``i`` depends on seed, split, kinds, difficulty and i alone.  It is what
    :func:`read_messages` takes, with ``kind``, ``check``, ``answer`` and, where a place is asked
    for, ``region``, as :func:`score` wants them.  Half the pictures have sides below 80 pixels and
    a few are as large as allowed, and so with the length of texts and the number of things.

    Text is drawn with Pillow's built-in font, so that another version of it can give other pixels.

    Examples
    --------
    >>> import orchvlm
    >>> tasks = orchvlm.data.Tasks(seed=7, kinds=["count"])
    >>> sample = tasks[0]
    >>> sample["messages"][0]["content"][1]["text"], sample["answer"]
    ('How many shapes?', '4')
    """

    def __init__(self, seed=0, kinds=None, split="train", difficulty=0.3, max_side=LARGE):
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an integer; got {type(seed).__name__}")
        if isinstance(difficulty, bool) or not isinstance(difficulty, (int, float)):
            raise TypeError(f"difficulty must be a number; got {type(difficulty).__name__}")
        if isinstance(max_side, bool) or not isinstance(max_side, int):
            raise TypeError(f"max_side must be an integer; got {type(max_side).__name__}")
        kinds = list(KINDS) if kinds is None else kinds
        if not isinstance(kinds, (list, tuple)) or not kinds or not all(
                isinstance(kind, str) and kind in _ALL for kind in kinds):
            raise ValueError(f"kinds must be some of {', '.join(_ALL)}; got {kinds!r:.60}")
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r:.40}")
        if not 0 <= difficulty <= 1:
            raise ValueError(f"difficulty must be in 0 .. 1; got {difficulty}")
        if not SMALL <= max_side <= 2048:
            raise ValueError(f"max_side must be in {SMALL} .. 2048; got {max_side}")
        self.seed, self.kinds, self.split = seed, tuple(kinds), split
        self.difficulty, self.max_side = float(difficulty), max_side

    def __getitem__(self, index):
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"a task's number must be an integer; got {type(index).__name__}")
        if index < 0:
            raise IndexError(f"tasks are numbered from 0; got {index}")
        need("PIL", "pillow")
        name = f"{self.split}/{self.seed}/{index}"
        text = f"{name}/{','.join(self.kinds)}/{self.difficulty}/{self.max_side}"
        rng = random.Random(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))
        kind = rng.choice(self.kinds)  # no cycle: kinds must not follow ranks
        drawn, question, answer, more = _ALL[kind](rng, self.difficulty, self.max_side)
        parts = [{"type": "image", "image": picture}
                 for picture in (drawn if isinstance(drawn, list) else [drawn])]
        parts.append({"type": "text", "text": question})
        return {"id": name, "kind": kind, "answer": answer, "check": "exact", **more,
                "messages": [{"role": "user", "content": parts},
                             {"role": "assistant", "content": answer}]}

    def __repr__(self):
        return f"<Tasks: {', '.join(self.kinds)}; {self.split}, seed {self.seed}>"
