"""Pictures: from any common file to the patches that a vision encoder takes."""
import io
import math
from dataclasses import dataclass

import numpy as np

from .._numbers import reals, whole_number
from .assets import DataError, as_asset, need

MOST_PIXELS = 1 << 26        # of a file before it is decoded; more is taken for a bomb
_CLEAR = 16                  # alpha, of 255, up to which a pixel counts as not there
MOST_FRAME = 1 << 13         # pixels along its side
MOST_RATIO = 200             # of the longer to the shorter side
# Formats whose decoders run in process and read no other file (EPS would start Ghostscript).
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")


def smart_resize(height, width, factor, min_pixels, max_pixels, least=0):
    """The size of a picture whose sides are multiples of ``factor`` and whose area is in bounds.

    Each side goes to its nearest multiple.  Above ``max_pixels`` both shrink by
    ``sqrt(height * width / max_pixels)`` and round down; below ``min_pixels`` both grow alike and
    round up.

    Parameters
    ----------
    height, width : int
        Pixels, >= 1, neither more than 200 times the other.
    factor : int
        Pixels that one token covers along a side: patch size times merge size.
    min_pixels, max_pixels : int
        Bounds of the area.
    least : int
        Sides are at least this many multiples before the area is looked at: 1 is the rule of
        Seed1.5-VL, 0 that of Qwen (there a side may round to nothing, and the lower bound mends
        it).

    Returns
    -------
    (int, int)
        Height and width.

    Raises
    ------
    TypeError
        An argument that is no integer.
    ValueError
        A side below 1, an aspect ratio above 200, bounds that exclude each other.

    Examples
    --------
    >>> import orchvlm
    >>> orchvlm.data.smart_resize(100, 333, 28, 3136, 10**6)
    (112, 336)
    """
    names = ("height", "width", "factor", "min_pixels", "max_pixels", "least")
    for name, value in zip(names, (height, width, factor, min_pixels, max_pixels, least)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name} must be an integer; got {type(value).__name__}")
        if not 0 <= value <= 2**40:
            raise ValueError(f"{name} must be in 0 .. 2^40; got {value}")
    if min(height, width, factor, max_pixels) < 1 or max_pixels < min_pixels:
        raise ValueError("sides, factor and max_pixels must be >= 1 and min_pixels <= max_pixels; "
                         f"got {height}x{width}, {factor}, {min_pixels} .. {max_pixels}")
    if max(height, width) > MOST_RATIO * min(height, width):
        raise ValueError(f"the aspect ratio of {width}x{height} is above {MOST_RATIO}")
    floor = least * factor
    rows = max(floor, round(height / factor) * factor)
    columns = max(floor, round(width / factor) * factor)
    if rows * columns > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        rows = max(factor, math.floor(height / beta / factor) * factor)
        columns = max(factor, math.floor(width / beta / factor) * factor)
    elif rows * columns < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * beta / factor) * factor
        columns = math.ceil(width * beta / factor) * factor
    return rows, columns


def load_image(source, name="image", frame=None):
    """A picture as RGB bytes, upright, on white.

    Parameters
    ----------
    source : path, bytes, Asset, PIL.Image.Image or uint8 or uint16 array
        Files: PNG, JPEG, GIF, BMP, WebP, TIFF, PPM.  Arrays: rows, columns and none, 1, 2 (grey
        and alpha), 3 or 4 (colours and alpha) channels.
    name : str
        What messages call it.
    frame : int, optional
        The picture is cut to what is not transparent and put, as large as it fits, into the middle
        of a white square of so many pixels along a side.

    Returns
    -------
    uint8[height, width, 3]

    Raises
    ------
    TypeError
        A source of another kind.
    ValueError
        A frame out of 1 to 8192.
    DataError
        A file that is broken, animated, of another format, or above 2^26 pixels.
    ImportError
        Pillow is not installed.

    Notes
    -----
    The EXIF orientation is applied, alpha is composited on white, 16-bit grey is scaled to 8 bits
    (Pillow alone would clip it).  Size limits are looked at before anything is decoded.

    Examples
    --------
    >>> import numpy as np, orchvlm
    >>> clear = np.zeros((2, 2, 4), np.uint8)
    >>> orchvlm.data.load_image(clear)[0, 0]
    array([255, 255, 255], dtype=uint8)
    """
    need("PIL", "pillow")
    from PIL import Image
    if frame is not None:
        frame = whole_number(frame, "frame", 1, MOST_FRAME)
    if isinstance(source, np.ndarray):
        return _rgb(_image_of(source, name), name, frame)
    if isinstance(source, Image.Image):
        return _rgb(source, name, frame)
    asset = as_asset(source, name)
    if asset is None:
        raise TypeError(f"{name}: a picture must be a path, bytes, an array or a PIL image; got "
                        f"{type(source).__name__}")
    return _rgb(open_image(asset.read(), asset.name), asset.name, frame)


def open_image(content, name):
    """A PIL image of bytes, its header read and its size checked, its pixels not yet decoded."""
    from PIL import Image, UnidentifiedImageError
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise DataError(f"{name}: no picture in a known format ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise DataError(f"{name}: its header claims more pixels than 2^26: refused") from None
    except Exception as error:  # decoders raise whatever they like on broken bytes
        raise DataError(f"{name}: broken picture ({_reason(error)})") from None
    _check_size(image, name)
    return image


def _check_size(image, name):
    width, height = image.size
    if width < 1 or height < 1:
        raise DataError(f"{name}: a picture of {width}x{height} pixels holds nothing")
    if width * height > MOST_PIXELS:
        raise DataError(f"{name}: {width}x{height} pixels are more than 2^26: refused as a "
                        "decompression bomb; make it smaller")


def _reason(error):
    return (str(error).partition("\n")[0] or type(error).__name__)[:100]


def _image_of(array, name):
    from PIL import Image
    if array.dtype == np.uint16:
        array = np.round(array / 257).astype(np.uint8)
    if array.dtype != np.uint8:
        raise TypeError(f"{name}: an array of pixels must be uint8 or uint16; got {array.dtype}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or array.ndim == 3 and 2 <= array.shape[2] <= 4):
        raise DataError(f"{name}: an array of pixels must have shape (height, width) or (height, "
                        f"width, 1 to 4); got {array.shape}")
    if 0 in array.shape:
        raise DataError(f"{name}: a picture of shape {array.shape} holds nothing")
    return Image.fromarray(np.ascontiguousarray(array))


def _rgb(image, name, frame=None):
    """Decoded, upright, on white."""
    from PIL import ImageOps
    _check_size(image, name)
    try:
        if getattr(image, "n_frames", 1) > 1:
            raise DataError(f"{name}: an animation of {image.n_frames} pictures; give it as a "
                            "video, or one of its pictures")
        image = ImageOps.exif_transpose(image)
        if frame is not None:
            image = _framed(image, frame, name)
        return np.asarray(to_rgb(image, name))
    except DataError:
        raise
    except Exception as error:  # decoders raise whatever they like on broken bytes
        raise DataError(f"{name}: broken picture ({_reason(error)})") from None


def _framed(image, side, name):
    """Cut to what is not transparent, in the middle of a square."""
    from PIL import Image
    if _has_alpha(image):
        image = image.convert("RGBA")
        seen = image.getchannel("A").point(lambda alpha: 255 * (alpha > _CLEAR)).getbbox()
        image = image.crop(seen) if seen else image
    elif image.mode not in ("RGB", "L"):
        image = to_rgb(image, name)
    share = side / max(image.size)
    size = [max(1, round(length * share)) for length in image.size]
    # Colours behind full transparency are arbitrary and must not bleed in: resize weighs by alpha.
    image = image.resize(size, Image.Resampling.BICUBIC)
    square = Image.new("RGBA", (side, side), (255, 255, 255, 255))
    square.alpha_composite(image.convert("RGBA"), tuple((side - length) // 2 for length in size))
    return square


def _has_alpha(image):
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def to_rgb(image, name):
    """An RGB image: alpha on white, 16 bits scaled, palettes resolved."""
    from PIL import Image
    mode = image.mode
    if mode.startswith("I;16") or mode == "I":
        deep = np.asarray(image).astype(np.int64)
        if deep.size and not 0 <= deep.min() <= deep.max() <= 65535:
            raise DataError(f"{name}: grey values {deep.min()} .. {deep.max()} are no 16-bit grey")
        return Image.fromarray(np.round(deep / 257).astype(np.uint8)).convert("RGB")
    if mode == "F":
        raise DataError(f"{name}: grey values in floating point have no white; give 8 or 16 bits")
    if _has_alpha(image):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if mode == "RGB" else image.convert("RGB")


@dataclass(frozen=True)
class ImageRule:
    """How pictures become patches.

    Parameters
    ----------
    patch_size : int
        Pixels of a patch along a side.
    merge_size : int
        Patches of a token along a side.
    temporal_size : int
        Frames in a patch; a still picture fills them all.
    min_pixels, max_pixels : int
        Bounds of the area after resizing.
    mean, std : (float, float, float)
        Colours are divided by 255, less the mean, divided by std.
    resample : str
        ``"bicubic"`` or ``"bilinear"``, both widened when they shrink, as Pillow does.
    least : int
        See :func:`smart_resize`.
    dtype : str
        ``"float32"``, or ``"uint8"`` for colours that the model normalises, with mean and std of
        0.5: a quarter of the bytes.

    Raises
    ------
    TypeError
        A size that is no integer.
    ValueError
        A size below 1, an unknown filter or dtype, bytes with another mean or std than 0.5.

    Examples
    --------
    >>> import numpy as np, orchvlm
    >>> rule = orchvlm.data.ImageRule.seed()
    >>> rows, grid = rule(np.zeros((60, 80, 3), np.uint8))
    >>> rows.shape, grid
    ((24, 588), (1, 4, 6))
    """

    patch_size: int = 16
    merge_size: int = 2
    temporal_size: int = 2
    min_pixels: int = 65_536
    max_pixels: int = 16_777_216
    mean: tuple = (0.5, 0.5, 0.5)
    std: tuple = (0.5, 0.5, 0.5)
    resample: str = "bicubic"
    least: int = 0
    dtype: str = "float32"

    def __post_init__(self):
        for name in ("patch_size", "merge_size", "temporal_size", "min_pixels", "max_pixels"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise TypeError(f"ImageRule.{name} must be an integer; got "
                                f"{type(value).__name__}")
            if not 1 <= value <= 2**40:
                raise ValueError(f"ImageRule.{name} must be in 1 .. 2^40; got {value}")
        if self.resample not in ("bicubic", "bilinear"):
            raise ValueError(f"ImageRule.resample must be 'bicubic' or 'bilinear'; got "
                             f"{self.resample!r}")
        if self.dtype not in ("float32", "uint8"):
            raise ValueError(f"ImageRule.dtype must be 'float32' or 'uint8'; got {self.dtype!r}")
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"ImageRule.min_pixels must be at most max_pixels, {self.max_pixels};"
                             f" got {self.min_pixels}")
        for name in ("mean", "std"):
            values = reals(getattr(self, name), f"ImageRule.{name}")
            if values.shape != (3,) or not np.isfinite(values).all() or (
                    name == "std" and values.min() <= 0):
                raise ValueError(f"ImageRule.{name} must be three finite numbers"
                                 f"{' above 0' if name == 'std' else ''}; got "
                                 f"{getattr(self, name)!r:.60}")
            object.__setattr__(self, name, tuple(values.tolist()))
        if self.dtype == "uint8" and {*self.mean, *self.std} != {0.5}:
            raise ValueError("ImageRule.dtype 'uint8' leaves it to the model to normalise, with "
                             f"mean and std of 0.5; got mean {self.mean}, std {self.std}: use "
                             "dtype='float32'")

    @classmethod
    def seed(cls, **changes):
        """The rule of Seed1.5-VL: patches of 14, the nearest multiple of 28, 4 to 5,120 tokens.

        Parameters
        ----------
        **changes : int or str
            Other fields of :class:`ImageRule`.

        Returns
        -------
        ImageRule

        Notes
        -----
        The report states bilinear resizing; it does not state mean and std, for which 0.5 is a
        choice, as the open models have it.
        """
        return cls(**{"patch_size": 14, "temporal_size": 1, "min_pixels": 4 * 28 * 28,
                      "max_pixels": 5120 * 28 * 28, "resample": "bilinear", "least": 1, **changes})

    @property
    def factor(self):
        """int : pixels of a token along a side."""
        return self.patch_size * self.merge_size

    def none(self):
        """The patches of no picture.

        Returns
        -------
        array[0, values]
        """
        return np.empty((0, 3 * self.temporal_size * self.patch_size**2), self.dtype)

    def tokens(self, grid):
        """Tokens of a picture or video.

        Parameters
        ----------
        grid : (int, int, int)
            Frames, rows and columns of patches.

        Returns
        -------
        int
        """
        return int(grid[0]) * int(grid[1]) * int(grid[2]) // self.merge_size**2

    def size(self, height, width, max_pixels=None, min_pixels=None):
        """Height and width after resizing.

        Parameters
        ----------
        height, width : int
            Pixels before.
        max_pixels, min_pixels : int, optional
            Tighter bounds, for the frames of a video.

        Returns
        -------
        (int, int)
        """
        most = self.max_pixels if max_pixels is None else max_pixels
        fewest = min(self.min_pixels if min_pixels is None else min_pixels, most)
        return smart_resize(height, width, self.factor, fewest, most, self.least)

    def __call__(self, picture, name="image"):
        """The patches of one picture.

        Parameters
        ----------
        picture : uint8[height, width, 3]
            As :func:`load_image` returns it.
        name : str
            What messages call it.

        Returns
        -------
        (array[P, values], (int, int, int))
            Rows and the grid.

        Raises
        ------
        DataError
            An aspect ratio above 200.
        """
        try:
            size = self.size(*picture.shape[:2])
        except ValueError as error:
            raise DataError(f"{name}: {error}") from None
        return self.patches(np.repeat(self.resized(picture, size)[None], self.temporal_size, 0))

    def resized(self, picture, size):
        """A picture brought to (height, width).

        Parameters
        ----------
        picture : uint8[height, width, 3]
            Pixels before.
        size : (int, int)
            Height and width after.

        Returns
        -------
        uint8[height, width, 3]
        """
        need("PIL", "pillow")
        from PIL import Image
        if picture.shape[:2] == tuple(size):
            return picture
        filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
        image = Image.fromarray(np.ascontiguousarray(picture))
        return np.asarray(image.resize((size[1], size[0]), filters[self.resample]))

    def patches(self, frames):
        """Rows of patches, those of one token side by side.

        Parameters
        ----------
        frames : uint8[frames, height, width, 3]
            Sides are multiples of :attr:`factor`, frames one of ``temporal_size``.

        Returns
        -------
        (array[P, values], (int, int, int))
            Rows in the order (frame, token row, token column, row in token, column in token), each
            with its values in the order (channel, frame in patch, row, column); and the grid.
        """
        p, m, s = self.patch_size, self.merge_size, self.temporal_size
        n, height, width, _ = frames.shape
        grid = (n // s, height // p, width // p)
        blocks = frames.reshape(grid[0], s, grid[1] // m, m, p, grid[2] // m, m, p, 3)
        rows = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
        rows = np.ascontiguousarray(rows).reshape(-1, 3, s * p * p)
        if self.dtype == "uint8":
            return rows.reshape(len(rows), -1), grid
        # A table of the 256 values of each channel: exact, and one look-up per value.
        levels = np.arange(256, dtype=np.float64) / 255
        table = (levels[None] - np.array(self.mean)[:, None]) / np.array(self.std)[:, None]
        table = table.astype(np.float32)
        out = np.empty(rows.shape, np.float32)
        for channel in range(3):
            out[:, channel] = table[channel][rows[:, channel]]
        return out.reshape(len(out), -1), grid
