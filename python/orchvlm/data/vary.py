"""The same pictures, seen a little differently each time."""
import numpy as np

from .assets import need
from .images import load_image
from .mixture import shuffled

WHITE = (255, 255, 255)


class Endless:
    """Samples of a data set without end, each of its media of one kind varied anew: item k depends
    on the data set, the seed and k alone, and every sample comes once in each pass."""

    medium = None  # of the message parts that _vary(rng, source) is for

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
        turn, place = divmod(int(index), len(self._data))
        if self._order[0] != turn:
            self._order = turn, shuffled(len(self._data), self.seed, turn)
        sample = self._data[int(self._order[1][place])]
        rng = np.random.default_rng([self.seed, int(index)])
        return {**sample, "messages": [self._message(rng, message)
                                       for message in sample["messages"]]}

    def _message(self, rng, message):
        medium = self.medium
        if not isinstance(message.get("content"), list):
            return message
        return {**message, "content": [
            {**part, medium: self._vary(rng, part[medium])} if part.get("type") == medium
            and medium in part else part for part in message["content"]]}

    def __repr__(self):
        return f"<{type(self).__name__}: {self._data!r}, seed {self.seed}>"


class Varied(Endless):
    """Samples of a data set without end, their pictures moved, scaled, turned and tinted at random.

    For small data sets whose answers do not depend on where in a picture something is, nor on
    exact colours: what a model sees in the next pass is not what it saw in the last.

    Parameters
    ----------
    dataset : sequence of dict
        With messages, as :func:`read_messages` takes them.
    seed : int
        Every seed is another sequence.
    shift, zoom, turn : float
        At most this share of a side, this share larger or smaller, so many degrees.
    tint : float
        At most this share more or less brightness, contrast and saturation.
    grey : float
        How often a picture loses its colours, 0 to 1.

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

    def __init__(self, dataset, seed=0, *, shift=0.1, zoom=0.2, turn=12.0, tint=0.3, grey=0.1):
        super().__init__(dataset, seed)
        most = {"shift": 0.5, "zoom": 0.9, "turn": 180, "tint": 1, "grey": 1}
        given = {"shift": shift, "zoom": zoom, "turn": turn, "tint": tint, "grey": grey}
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number; got {type(value).__name__}")
            if not 0 <= value <= most[name]:
                raise ValueError(f"{name} must be in 0 .. {most[name]}; got {value}")
        self._most = given

    def _vary(self, rng, source):
        need("PIL", "pillow")
        from PIL import Image, ImageEnhance
        image = Image.fromarray(load_image(source))
        most, (width, height) = self._most, image.size
        scale = (1 + most["zoom"]) ** rng.uniform(-1, 1)
        angle = rng.uniform(-1, 1) * most["turn"]
        dx, dy = (rng.uniform(-1, 1) * most["shift"] * side for side in (width, height))
        # From a place in the new picture to the one that is seen there: about the middle.
        cos, sin = np.cos(np.radians(angle)) / scale, np.sin(np.radians(angle)) / scale
        x, y = width / 2 + dx, height / 2 + dy
        back = (cos, -sin, width / 2 - cos * x + sin * y, sin, cos, height / 2 - sin * x - cos * y)
        image = image.transform((width, height), Image.Transform.AFFINE, back,
                                Image.Resampling.BILINEAR, fillcolor=WHITE)
        for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = change(image).enhance(1 + rng.uniform(-1, 1) * most["tint"])
        if rng.random() < most["grey"]:
            image = image.convert("L").convert("RGB")
        return np.asarray(image)
