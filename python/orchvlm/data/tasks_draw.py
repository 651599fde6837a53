"""How each kind of task is drawn: ``draw(rng, difficulty, max_side)`` returns the picture, the
question, the answer and what else the verifier needs."""
import math

COLOURS = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 96, 200),
           "yellow": (240, 200, 20), "purple": (140, 70, 180), "orange": (250, 125, 20),
           "black": (25, 25, 25), "grey": (140, 140, 140)}
SHAPES = ("circle", "square", "triangle", "cross", "star")
PAPERS = ((255, 255, 255), (246, 244, 236), (232, 240, 248), (238, 246, 232))
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"  # no I, O, 0 and 1, which the font draws alike
WORDS = ("Save", "Open", "Close", "Print", "Back", "Next", "Help", "Send", "Copy", "Paste", "Undo",
         "Login", "Delete", "Share", "Search", "Play", "Stop", "Edit", "Add", "Cancel")
FINE = 2  # pictures are drawn this much larger and shrunk: Pillow's shapes have hard edges


class Canvas:
    """A picture under way, in pixels of the finished one."""

    def __init__(self, width, height, paper):
        from PIL import Image, ImageDraw
        self.width, self.height = width, height
        self._image = Image.new("RGB", (width * FINE, height * FINE), paper)
        self._draw = ImageDraw.Draw(self._image)

    def done(self):
        """The finished picture: uint8[height, width, 3]."""
        import numpy as np
        from PIL import Image
        return np.asarray(self._image.resize((self.width, self.height), Image.Resampling.BOX))

    def box(self, left, top, right, bottom, fill=None, outline=None, radius=0):
        """A rectangle, its corners rounded."""
        edges = [v * FINE for v in (left, top, right, bottom)]
        self._draw.rounded_rectangle(edges, radius * FINE, fill, outline, width=FINE)

    def polygon(self, points, fill):
        """A filled polygon."""
        self._draw.polygon([(x * FINE, y * FINE) for x, y in points], fill)

    def circle(self, x, y, r, fill):
        """A filled circle."""
        self._draw.ellipse([v * FINE for v in (x - r, y - r, x + r, y + r)], fill)

    def shape(self, name, x, y, r, fill):
        """A shape about (x, y) that fits into the circle of radius r."""
        if name == "circle":
            self.circle(x, y, r, fill)
        elif name == "square":
            s = 0.82 * r
            self.polygon([(x - s, y - s), (x + s, y - s), (x + s, y + s), (x - s, y + s)], fill)
        elif name == "cross":
            t = 0.3 * r
            self.polygon([(x - r, y - t), (x + r, y - t), (x + r, y + t), (x - r, y + t)], fill)
            self.polygon([(x - t, y - r), (x + t, y - r), (x + t, y + r), (x - t, y + r)], fill)
        else:
            corners = {"triangle": (3, 1.0), "star": (5, 0.42)}[name]
            self.polygon(_wheel(x, y, r, *corners), fill)

    def text(self, x, y, words, size, fill, anchor="mm"):
        """A line of text with its middle (or another anchor) at (x, y)."""
        self._draw.text((x * FINE, y * FINE), words, fill, _font(size), anchor=anchor)

    def text_width(self, words, size):
        """How wide a line of text is."""
        return self._draw.textlength(words, _font(size)) / FINE

    def region(self, left, top, right, bottom):
        """A box in pixels as whole numbers from 0 to 999."""
        return [*self.place(left, top), *self.place(right, bottom)]

    def place(self, x, y):
        """A point in pixels as whole numbers from 0 to 999."""
        return [min(999, max(0, round(v / side * 999)))
                for v, side in ((x, self.width), (y, self.height))]


def _font(size):
    from PIL import ImageFont
    font = ImageFont.load_default(size * FINE)
    if not hasattr(font, "getmask2") or not hasattr(font, "font_variant"):
        raise ImportError("tasks with text need a Pillow with FreeType; its wheels have it")
    return font


def _wheel(x, y, r, corners, inner):
    """A polygon of so many corners, the points between them drawn in to inner * r."""
    steps = corners * (2 if inner < 1 else 1)
    points = []
    for k in range(steps):
        angle = 2 * math.pi * k / steps - math.pi / 2
        length = r if inner == 1 or k % 2 == 0 else inner * r
        points.append((x + length * math.cos(angle), y + length * math.sin(angle)))
    return points


def _tail(rng, low, high, slope=0.45):
    """A whole number with a long tail: half of them below low * 2**slope."""
    return min(high, int(low * (1 - rng.random())**-slope))


def _canvas(rng, max_side, low=56):
    low = min(low, max_side)
    side = _tail(rng, low, max_side)
    other = min(max_side, max(low, int(side * rng.choice((0.75, 1, 1, 1.25)))))
    return Canvas(side, other, rng.choice(PAPERS))


def _many(rng, low, high, difficulty):
    """Few things mostly; up to ``high`` where difficulty is 1."""
    most = low + (high - low) * difficulty
    return min(high, low + int((most - low + 1) * rng.random()**1.5))


def _cells(rng, canvas, n, reading=False):
    """n places that do not touch, (x, y, radius); ``reading``: row by row, from left to right."""
    columns = max(1, round(math.sqrt(n * canvas.width / canvas.height)))
    rows = math.ceil(n / columns)
    while True:
        cells = [(c, r) for r in range(rows) for c in range(columns)]
        if len(cells) >= n + (n > 1):  # one stays free, so that the rest do not look like a grid
            break
        rows, columns = (rows + 1, columns) if rows <= columns else (rows, columns + 1)
    wide, high = canvas.width / columns, canvas.height / rows
    out = []
    chosen = rng.sample(cells, n)
    if reading:
        chosen.sort(key=lambda cell: (cell[1], cell[0]))
    for c, r in chosen:
        # Neighbours never touch, nor do their smoothed edges.
        radius = min(min(wide, high) * rng.uniform(0.28, 0.44), min(wide, high) / 2 - 1)
        free = radius + max(0.08 * radius, 1)
        x = c * wide + rng.uniform(free, wide - free)
        # What is read in one row is side by side: none is wholly above another.
        most = min(high / 2 - free, radius / 2) if reading else high / 2 - free
        y = (r + 0.5) * high + rng.uniform(-most, most)
        out.append((x, y, radius))
    return out


def _things(rng, n, distinct):
    """Shapes with colours; ``distinct`` pairs, or any."""
    pairs = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    return rng.sample(pairs, n) if distinct else [rng.choice(pairs) for _ in range(n)]


def read(rng, difficulty, max_side):
    """What does it say?"""
    n = min(3 + round(21 * difficulty), _tail(rng, 1, 24, 0.9))
    words = "".join(rng.choice(LETTERS) for _ in range(n))
    size = rng.randint(16, 26)
    scratch = Canvas(1, 1, PAPERS[0])
    width = math.ceil(scratch.text_width(words, size)) + 12
    while width > max_side and size > 9:
        size -= 1
        width = math.ceil(scratch.text_width(words, size)) + 12
    if width > max_side:
        words = words[:max(1, n * (max_side - 12) // width)]
        width = math.ceil(scratch.text_width(words, size)) + 12
    canvas = Canvas(max(56, width), max(56, size + rng.randint(8, 24)), rng.choice(PAPERS))
    spare_x, spare_y = (canvas.width - width) / 2, (canvas.height - size - 6) / 2
    ink = COLOURS[rng.choice([name for name in COLOURS if name != "yellow"])]
    canvas.text(canvas.width / 2 + rng.uniform(-spare_x, spare_x),
                canvas.height / 2 + rng.uniform(-spare_y, spare_y), words, size, ink)
    return canvas.done(), "What does it say?", words, {}


def _draw(canvas, things, cells):
    for (shape, name), (x, y, r) in zip(things, cells):
        canvas.shape(shape, x, y, r, COLOURS[name])


def colour(rng, difficulty, max_side):
    """What colour is the ...?"""
    canvas = _canvas(rng, max_side)
    shapes = rng.sample(SHAPES, _many(rng, 1, len(SHAPES), difficulty))
    things = [(shape, rng.choice(list(COLOURS))) for shape in shapes]
    _draw(canvas, things, _cells(rng, canvas, len(things)))
    return canvas.done(), f"What colour is the {things[0][0]}?", things[0][1], {}


def shape(rng, difficulty, max_side):
    """What shape is the ... one? (a colour)"""
    canvas = _canvas(rng, max_side)
    names = rng.sample(list(COLOURS), _many(rng, 1, 5, difficulty))
    things = [(rng.choice(SHAPES), name) for name in names]
    _draw(canvas, things, _cells(rng, canvas, len(things)))
    return canvas.done(), f"What shape is the {things[0][1]} one?", things[0][0], {}


def describe(rng, difficulty, max_side):
    """All shapes, row by row, from left to right."""
    canvas = _canvas(rng, max_side)
    things = _things(rng, _many(rng, 1, 5, difficulty), distinct=False)
    _draw(canvas, things, _cells(rng, canvas, len(things), reading=True))
    answer = ", ".join(f"{name} {shape}" for shape, name in things)
    return canvas.done(), "Describe the picture.", answer, {}


def count(rng, difficulty, max_side):
    """How many ... are there?"""
    n = _many(rng, 1, 20, difficulty)
    canvas = _canvas(rng, max_side, 56 if n < 7 else 84)
    things = _things(rng, n, distinct=False)
    _draw(canvas, things, _cells(rng, canvas, n))
    asked_shape, asked_colour = rng.choice(things)
    what = rng.choice(("shapes", f"{asked_colour} shapes", _plural(asked_shape)))
    found = sum(what == "shapes" or what == f"{name} shapes" or what == _plural(shape)
                for shape, name in things)
    return canvas.done(), f"How many {what}?", str(found), {"check": "number"}


def _plural(shape):
    return shape + ("es" if shape.endswith("s") else "s")


def _find(rng, difficulty, max_side):
    """A canvas with distinct things on it, and one of them."""
    n = _many(rng, 1, 10, difficulty)
    canvas = _canvas(rng, max_side, 56 if n < 5 else 84)
    things = _things(rng, n, distinct=True)
    cells = _cells(rng, canvas, n)
    _draw(canvas, things, cells)
    return canvas, f"{things[0][1]} {things[0][0]}", cells[0], things[0][0]


def point(rng, difficulty, max_side):
    """Point to the ...: any place inside is right."""
    canvas, what, (x, y, r), shape = _find(rng, difficulty, max_side)
    edges = _edges(shape, x, y, r)
    answer = " ".join(map(str, canvas.place(x, y)))
    return canvas.done(), f"Point to the {what}.", answer, {
        "check": "point", "region": canvas.region(*edges)}


def box(rng, difficulty, max_side):
    """Box the ...: intersection over union counts."""
    canvas, what, (x, y, r), shape = _find(rng, difficulty, max_side)
    region = canvas.region(*_edges(shape, x, y, r))
    return canvas.done(), f"Box the {what}.", " ".join(map(str, region)), {
        "check": "box", "region": region}


def _edges(shape, x, y, r):
    """The smallest box about a shape."""
    if shape == "square":
        return x - 0.82 * r, y - 0.82 * r, x + 0.82 * r, y + 0.82 * r
    if shape in ("triangle", "star"):
        points = _wheel(x, y, r, *{"triangle": (3, 1.0), "star": (5, 0.42)}[shape])
        return (min(p[0] for p in points), min(p[1] for p in points),
                max(p[0] for p in points), max(p[1] for p in points))
    return x - r, y - r, x + r, y + r


def chart(rng, difficulty, max_side):
    """How high is a bar, or which is highest?"""
    n = _many(rng, 2, 8, difficulty)
    low = min(max_side, 84 + 12 * max(0, n - 4))
    canvas = _canvas(rng, max_side, low)
    most = rng.choice((5, 10, 10))
    # Two highest bars would leave the question open.
    values = rng.sample(range(1, most + 1), n) if n <= most else [
        rng.randint(1, most) for _ in range(n)]
    left, bottom, top = 18, canvas.height - 15, 8
    step = (canvas.width - left - 4) / n
    for value in range(0, most + 1, 1 if most == 5 else 2):
        y = bottom - (bottom - top) * value / most
        canvas.box(left - 2, y, canvas.width - 2, y, outline=(205, 205, 205))
        canvas.text(left - 4, y, str(value), 9, (60, 60, 60), "rm")
    names = "ABCDEFGH"[:n]
    ink = COLOURS[rng.choice(list(COLOURS))]
    for k, (name, value) in enumerate(zip(names, values)):
        x = left + (k + 0.5) * step
        canvas.box(x - 0.34 * step, bottom - (bottom - top) * value / most, x + 0.34 * step,
                   bottom, ink)
        canvas.text(x, canvas.height - 7, name, 10, (20, 20, 20))
    canvas.box(left - 2, bottom, canvas.width - 2, bottom, outline=(20, 20, 20))
    if values.count(max(values)) == 1 and rng.random() < 0.4:
        return canvas.done(), "Which bar is highest?", names[values.index(max(values))], {}
    k = rng.randrange(n)
    return canvas.done(), f"How high is bar {names[k]}?", str(values[k]), {"check": "number"}


def puzzle(rng, difficulty, max_side):
    """Which cell of a grid is unlike the others?"""
    rows, columns = (_many(rng, 2, 7, difficulty) for _ in range(2))
    cell = max(56 / min(rows, columns), _tail(rng, 18, 40))
    cell = min(cell, max_side / max(rows, columns))
    canvas = Canvas(max(56, int(cell * columns)), max(56, int(cell * rows)), rng.choice(PAPERS))
    wide, high = canvas.width / columns, canvas.height / rows
    odd = rng.randrange(rows), rng.randrange(columns)
    shape, other = rng.sample(SHAPES, 2)
    name, other_name = rng.sample(list(COLOURS), 2)
    by_shape = rng.random() < 0.5
    for r in range(rows):
        for c in range(columns):
            this = (r, c) == odd
            canvas.shape(other if this and by_shape else shape, (c + 0.5) * wide, (r + 0.5) * high,
                         0.4 * min(wide, high),
                         COLOURS[other_name if this and not by_shape else name])
    answer = f"{odd[0] + 1} {odd[1] + 1}"
    return canvas.done(), "Odd one: row, column?", answer, {}


def screen(rng, difficulty, max_side):
    """Where to click?"""
    n = _many(rng, 1, 12, difficulty)
    columns = 1 if n < 3 else 2 if n < 7 else 3
    rows = math.ceil(n / columns)
    width = min(max_side, max(84, columns * 60 + rng.randint(0, 30)))
    height = min(max_side, max(64, 18 + rows * 26 + rng.randint(0, 30)))
    canvas = Canvas(width, height, (236, 238, 241))
    bar = COLOURS[rng.choice(("blue", "green", "purple", "black", "grey"))]
    canvas.box(0, 0, width, 13, bar)
    for k in range(3):
        canvas.circle(7 + 9 * k, 6.5, 2.6, (255, 255, 255))
    words = rng.sample(WORDS, n)
    wide, high = width / columns, (height - 14) / rows
    regions = []
    for k, word in enumerate(words):
        across = min(wide - 6, max(canvas.text_width(word, 11) + 10, rng.uniform(0.5, 0.9) * wide))
        down = min(high - 4, rng.uniform(18, 24))
        x = (k % columns) * wide + rng.uniform(across / 2 + 2, wide - across / 2 - 2)
        y = 14 + (k // columns) * high + rng.uniform(down / 2 + 1, high - down / 2 - 1)
        edges = x - across / 2, y - down / 2, x + across / 2, y + down / 2
        ink, fill = rng.choice((((20, 20, 20), (255, 255, 255)), ((255, 255, 255), bar)))
        canvas.box(*edges, fill, (120, 120, 120), radius=3)
        canvas.text(x, y, word, 11, ink)
        regions.append((edges, (x, y)))
    edges, middle = regions[0]
    answer = " ".join(map(str, canvas.place(*middle)))
    return canvas.done(), f"Click {words[0]}.", answer, {
        "check": "point", "region": canvas.region(*edges)}


KINDS = {"read": read, "colour": colour, "shape": shape, "describe": describe, "count": count,
         "point": point, "box": box, "chart": chart, "puzzle": puzzle, "screen": screen}
