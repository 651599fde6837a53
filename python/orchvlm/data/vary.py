"""The same pictures, seen a little differently each time."""
import numpy as np

from .._numbers import whole_number
from .assets import Record, need
from .images import MOST_FRAME, load_image
from .mixture import shuffled

WHITE = (255, 255, 255)
_MOST = {"shift": 0.5, "zoom": 0.9, "stretch": 0.9, "turn": 180}  # all others 1
_LIGHT = (0.299, 0.587, 0.114)   # of a colour's grey, ITU-R BT.601
_MOST_HUE = np.pi / 6
_FINER = 1.5  # times as fine as what is made of it may a picture be that is looked at bilinearly
_MOST_KEPT_BYTES = 1 << 28


class Endless:
    """Samples of a data set without end, each of its media of one kind varied anew: item k depends
    on the data set, the seed and k alone, and every sample comes once in each pass."""

    medium = None  # of the message parts that _vary(rng, source, where) is for

    def __init__(self, dataset, seed=0):
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise TypeError(f"dataset must be a sequence of samples; got {type(dataset).__name__}")
        if not len(dataset):
            raise ValueError("dataset must not be empty")
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
            raise TypeError(f"seed must be an integer; got {type(seed).__name__}")
        if seed < 0:
            raise ValueError(f"seed must be >= 0; got {seed}")
        self._data, self.seed, self._order = dataset, int(seed), (None, None)

    def __getitem__(self, index):
        if isinstance(index, bool) or not isinstance(index, (int, np.integer)):
            raise TypeError(f"a sample's number must be an integer; got {type(index).__name__}")
        if index < 0:
            raise IndexError(f"samples are numbered from 0; got {index}")
        number = self._number(int(index))
        sample = self._data[number]
        rng = np.random.default_rng([self.seed, int(index)])
        if not isinstance(sample.get("messages"), list):  # whoever reads it says so
            return sample
        return Record.like(sample, {**sample, "messages": [
            self._message(rng, message, (number, k))
            for k, message in enumerate(sample["messages"])]})

    def _number(self, index):
        """Which sample of the data set."""
        turn, place = divmod(index, len(self._data))
        kept, order = self._order  # of one moment: names are asked for beside the drawing
        if kept != turn:
            order = shuffled(len(self._data), self.seed, turn)
            self._order = turn, order
        return int(order[place])

    def n_samples(self):
        """How many different samples there are.

        Returns
        -------
        int
        """
        return len(self._data)

    def where_of(self, index):
        """What messages call a sample.

        Parameters
        ----------
        index : int

        Returns
        -------
        str or None
            As the data set has it.
        """
        tell = getattr(self._data, "where_of", None)
        return tell(self._number(index)) if callable(tell) else None

    def _message(self, rng, message, where):
        medium = self.medium
        if not isinstance(message, dict) or not isinstance(message.get("content"), list):
            return message
        return {**message, "content": [
            {**part, medium: self._vary(rng, part[medium], (*where, k))}
            if isinstance(part, dict) and part.get("type") == medium and medium in part else part
            for k, part in enumerate(message["content"])]}

    def __repr__(self):
        return f"<{type(self).__name__}: {self._data!r}, seed {self.seed}>"


class Varied(Endless):
    """Samples of a data set without end, their pictures moved, scaled, turned, tinted and partly
    hidden at random.

    For small data sets whose answers do not depend on where in a picture something is, nor on
    exact colours: what a model sees in the next pass is not what it saw in the last.

    Parameters
    ----------
    dataset : sequence of dict
        With messages, as :func:`read_messages` takes them.
    seed : int
        Every seed is another sequence.
    shift, zoom, stretch, turn : float
        At most this share of a side, this share larger or smaller, this share wider or higher, so
        many degrees.
    tint : float
        At most this share more or less brightness, contrast and saturation.
    hue, grey, hide : float
        How often, 0 to 1, colours are turned by up to 30 degrees, colours are lost, and a
        rectangle of 15 to 45 % of each side is covered by a colour.
    pixels : int, optional
        A picture with more is shrunk to so many, which is faster than to shrink it afterwards; up
        to 256 MiB of such pictures stay in memory from one pass to the next.
    frame : int, optional
        As for :func:`load_image`, before anything is varied; with it ``pixels`` has no meaning.

    Raises
    ------
    TypeError
        A data set that is no sequence, figures that are no numbers.
    ValueError
        An empty data set, a figure out of range.

    Notes
    -----
    Sample ``i`` depends on the data set, the seed and i alone; every sample comes once in each
    ``len(dataset)``.  What turns into a picture from outside is white.

    Examples
    --------
    >>> import numpy as np, orchvlm
    >>> picture = np.zeros((32, 32, 3), np.uint8)
    >>> cat = {"messages": [
    ...     {"role": "user", "content": [{"type": "image", "image": picture},
    ...                                  {"type": "text", "text": "What is this?"}]},
    ...     {"role": "assistant", "content": "cat"}]}
    >>> varied = orchvlm.data.Varied([cat], seed=1)
    >>> picture = varied[7]["messages"][0]["content"][0]["image"]
    >>> picture.shape, varied[7]["messages"][1]["content"]
    ((32, 32, 3), 'cat')
    """

    medium = "image"

    def __init__(self, dataset, seed=0, *, shift=0.12, zoom=0.25, stretch=0.2, turn=12.0, tint=0.4,
                 hue=0.3, grey=0.1, hide=0.2, pixels=None, frame=None):
        super().__init__(dataset, seed)
        given = {"shift": shift, "zoom": zoom, "stretch": stretch, "turn": turn, "tint": tint,
                 "hue": hue, "grey": grey, "hide": hide}
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number; got {type(value).__name__}")
            if not 0 <= value <= _MOST.get(name, 1):
                raise ValueError(f"{name} must be in 0 .. {_MOST.get(name, 1)}; got {value}")
        self._most, self._pixels, self._frame = given, pixels, frame
        self._kept, self._kept_bytes = {}, 0
        for name, value in (("pixels", pixels), ("frame", frame)):
            if value is not None:
                whole_number(value, name, 1, 2**26 if name == "pixels" else MOST_FRAME // 2)

    def _vary(self, rng, source, where):
        image = self._moved(rng, *self._read(source, where))
        if any(self._most[name] for name in ("tint", "hue", "grey")):
            image = image.convert("RGB", self._colours(rng, image))
        picture = np.asarray(image)
        return self._hidden(rng, picture) if rng.random() < self._most["hide"] else picture

    def _read(self, source, where):
        """A picture, no finer than it is of use, and the size of what is made of it; of shrunk
        ones both are kept, for the next pass."""
        need("PIL", "pillow")
        from PIL import Image
        if where in self._kept:
            return self._kept[where]
        frame = self._frame
        image = Image.fromarray(load_image(source, frame=frame and round(_FINER * frame)))
        if frame:
            size = frame, frame
        elif self._pixels is None:
            return image, image.size
        else:
            size = _within(image.size, self._pixels)
            finer = _within(image.size, _FINER ** 2 * self._pixels)
            if finer != image.size:  # bilinear looks at more would leave out pixels
                image = image.resize(finer, Image.Resampling.BOX)
        if self._kept_bytes < _MOST_KEPT_BYTES:
            self._kept[where] = image, size
            self._kept_bytes += 3 * image.width * image.height
        return image, size

    def _moved(self, rng, image, size):
        """Scaled, stretched, turned and shifted, by one bilinear look at each pixel."""
        from PIL import Image
        (width, height), most = size, self._most
        scale = (1 + most["zoom"]) ** rng.uniform(-1, 1)
        wider = (1 + most["stretch"]) ** (rng.uniform(-1, 1) / 2)
        angle = np.radians(rng.uniform(-1, 1) * most["turn"])
        dx, dy = (rng.uniform(-1, 1) * most["shift"] * side for side in (width, height))
        # From a place in the new picture to the one that is seen there: about the middle.
        finer_x, finer_y = image.width / width, image.height / height
        cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
        a, b = cos / wider * finer_x, -sin / wider * finer_x
        d, e = sin * wider * finer_y, cos * wider * finer_y
        x, y = width / 2 + dx, height / 2 + dy
        back = (a, b, image.width / 2 - a * x - b * y, d, e, image.height / 2 - d * x - e * y)
        return image.transform((width, height), Image.Transform.AFFINE, back,
                               Image.Resampling.BILINEAR, fillcolor=WHITE)

    def _colours(self, rng, image):
        """What new colours are of old ones: three rows of three factors and a summand."""
        most = self._most
        bright, contrast, saturation = 1 + rng.uniform(-1, 1, 3) * most["tint"]
        if rng.random() < most["grey"]:
            saturation = 0
        grey = np.tile(_LIGHT, (3, 1))
        matrix = grey + (np.eye(3) - grey) * saturation
        if rng.random() < most["hue"]:
            matrix = _turned(rng.uniform(-1, 1) * _MOST_HUE) @ matrix
        # About the mean of all values, which takes the picture itself.
        mean = (matrix @ np.asarray(image).reshape(-1, 3).mean(0)).mean()
        summand = np.full((3, 1), bright * (1 - contrast) * mean)
        return tuple(np.hstack([bright * contrast * matrix, summand]).ravel().tolist())

    @staticmethod
    def _hidden(rng, picture):
        """With a rectangle of one colour on it."""
        height, width = (max(1, int(side * rng.uniform(0.15, 0.45))) for side in picture.shape[:2])
        row = rng.integers(0, picture.shape[0] - height + 1)
        column = rng.integers(0, picture.shape[1] - width + 1)
        picture = picture.copy()
        picture[row:row + height, column:column + width] = rng.integers(0, 256, 3)
        return picture


def _within(size, pixels):
    """(width, height) of at most so many pixels, of the same shape."""
    width, height = size
    share = min(1, (pixels / (width * height)) ** 0.5)
    return max(1, int(width * share)), max(1, int(height * share))


def _turned(angle):
    """The rotation of colours about the axis of greys (Rodrigues)."""
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3 ** 0.5
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
