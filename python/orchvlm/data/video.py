"""Videos: which frames, at which size, with which time beside them."""
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .._numbers import real, reals
from .assets import DataError, as_asset, need
from .images import MOST_PIXELS, load_image, open_image, to_rgb

LEVELS = (640, 512, 384, 256, 160, 128)  # tokens per frame, section 4 of the Seed1.5-VL report
BUDGET = 81_920                          # visual tokens of a video, same place
MOST_FRAMES = 1 << 20                    # of a file or folder; more is a mistake or an attack
FRAME_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def sample_frames(n_frames, duration_s, fps=1.0, budget=BUDGET, levels=LEVELS, least=16):
    """Dynamic Frame-Resolution Sampling: the frames of a video and the tokens of each.

    ``n = min(max(ceil(duration * fps), least), n_frames)`` frames are spread evenly; the highest
    level L with ``n * L <= budget`` is taken; when even the lowest is too much, ``budget // L``
    frames are spread evenly instead.

    Parameters
    ----------
    n_frames : int
        Frames that the video has.
    duration_s : float
        Its length in seconds.
    fps : float
        Frames per second that are wanted: 1 by default, 2 for fine motion, 5 for counting and
        tracking.
    budget : int
        Visual tokens of the whole video; timestamps do not count (a choice: the report does not
        say).
    levels : sequence of int
        Tokens per frame, in descending order.
    least : int
        Frames of a short video, as far as it has them.

    Returns
    -------
    (int64[n], int)
        Indices of the frames, and the most tokens of each.

    Raises
    ------
    TypeError
        An argument that is no number.
    ValueError
        No frame, a length or rate that is no positive number, levels out of order.

    References
    ----------
    Seed1.5-VL technical report (arXiv 2505.07062), section 4, and its published client for the
    order of the steps.

    Examples
    --------
    >>> import orchvlm
    >>> frames, tokens = orchvlm.data.sample_frames(n_frames=9000, duration_s=300.0)
    >>> len(frames), tokens
    (300, 256)
    """
    for name, value in (("n_frames", n_frames), ("budget", budget), ("least", least)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name} must be an integer; got {type(value).__name__}")
        if not 1 <= value <= 2**40:
            raise ValueError(f"{name} must be in 1 .. 2^40; got {value}")
    for name, value in (("duration_s", duration_s), ("fps", fps)):
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
            raise TypeError(f"{name} must be a number; got {type(value).__name__}")
        if isinstance(value, (complex, np.complexfloating)) or not 0 <= value <= 1e9:
            raise ValueError(f"{name} must be in 0 .. 1e9; got {value}")
    n_frames, budget, least = int(n_frames), int(budget), int(least)  # whatever their width
    if fps == 0:
        raise ValueError("fps must be above 0")
    levels = _levels(levels)
    n = min(max(math.ceil(duration_s * fps), least), n_frames)
    level = next((level for level in levels if n * level <= budget), levels[-1])
    n = min(n, max(1, budget // level))
    if n > MOST_FRAMES:
        raise ValueError(f"{n} frames are more than {MOST_FRAMES}; ask for fewer")
    return np.linspace(0, n_frames - 1, n).round().astype(np.int64), level


def _levels(levels):
    try:
        levels = [int(level) for level in levels]
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"levels must be integers; got {levels!r:.60}") from None
    if not levels or levels != sorted(levels, reverse=True) or levels[-1] < 1:
        raise ValueError(f"levels must descend and be >= 1; got {levels}")
    return levels


@dataclass(frozen=True, eq=False)
class Clip:
    """The frames of a video that were taken, with their times.

    Parameters
    ----------
    frames : list of uint8[height, width, 3]
        One size for all.
    times_s : float64[n]
        When each is shown.

    Raises
    ------
    DataError
        No frame, frames of several sizes, times that do not match.

    Examples
    --------
    >>> import numpy as np, orchvlm
    >>> orchvlm.data.Clip([np.zeros((8, 8, 3), np.uint8)], [0.0]).times_s
    array([0.])
    """

    frames: list
    times_s: np.ndarray

    def __post_init__(self):
        try:
            frames = [np.asarray(frame) for frame in self.frames]
            times = reals(self.times_s, "times_s")
        except (TypeError, ValueError):
            raise DataError("Clip: frames must be arrays and times numbers") from None
        if not frames or times.shape != (len(frames),) or not np.isfinite(times).all():
            raise DataError(f"Clip: {len(frames)} frames need as many finite times; got "
                            f"{times.shape}")
        shapes = {frame.shape for frame in frames}
        if len(shapes) > 1 or frames[0].ndim != 3 or frames[0].shape[2] != 3:
            raise DataError(f"Clip: frames must all have one shape (height, width, 3); got "
                            f"{sorted(shapes)[:3]}")
        object.__setattr__(self, "frames", frames)
        object.__setattr__(self, "times_s", times)


class Source:
    """A video before its frames are chosen: how many there are, how long it is, and a reader."""

    def __init__(self, n_frames, duration_s, read, name):
        if not 1 <= n_frames <= MOST_FRAMES:
            raise DataError(f"{name}: {n_frames} frames; 1 to {MOST_FRAMES} can be used")
        self.n_frames, self.duration_s, self.name, self._read = n_frames, duration_s, name, read

    def clip(self, indices):
        """The frames at these indices as a :class:`Clip`."""
        return self._read(np.asarray(indices))


def open_video(source, fps=None, name="video"):
    """A video as frames that can be chosen from.

    Parameters
    ----------
    source : path, Asset, bytes, list of pictures, or uint8[frames, height, width, 3]
        A folder of pictures (in the order of their names), an animated GIF, PNG or WebP, or any
        file that PyAV reads where that is installed; a :class:`Clip` for frames with times.
    fps : float, optional
        Frames per second of a folder, list or array; 1 by default.
    name : str
        What messages call it.

    Returns
    -------
    Source

    Raises
    ------
    DataError
        A file that is broken, too long or of an unknown kind; a folder without pictures.
    """
    rate = 1.0 if fps is None else real(fps, f"{name}: fps")
    if not 0 < rate <= 1e6:
        raise DataError(f"{name}: fps must be in 0 .. 1e6; got {rate}")
    if isinstance(source, Clip):
        times = source.times_s
        step = float(np.diff(times).mean()) if len(times) > 1 else 0.0
        return Source(len(times), float(times[-1] - times[0]) + step, lambda i: Clip(
            [source.frames[k] for k in i], times[i]), name)
    if isinstance(source, np.ndarray) and source.ndim == 4 or isinstance(source, (list, tuple)):
        return _listed(list(source), rate, name)
    asset = as_asset(source, name)
    if asset is None:
        raise DataError(f"{name}: a video must be a path, bytes, a list of pictures or an array of "
                        f"four dimensions; got {type(source).__name__}")
    if asset.path is not None and Path(asset.path).is_dir():
        return _listed(_frames_of(Path(asset.path), asset.name), rate, asset.name)
    content = asset.read()
    if content[:4] in (b"GIF8", b"\x89PNG") or content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return _animation(content, asset.name)
    return _film(content, asset.name)


def _frames_of(folder, name):
    """The pictures of a folder, none of them a link out of it."""
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in FRAME_SUFFIXES)
    for file in files:
        if not file.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"{name}: {file.name[:80]!r} is a link out of the folder")
    return files


def _listed(pictures, rate, name):
    def read(indices):
        frames = [load_image(pictures[i], f"{name}, frame {i}") for i in indices]
        return Clip(frames, indices / rate)
    return Source(len(pictures), len(pictures) / rate, read, name)


def _animation(content, name):
    """A GIF, PNG or WebP whose pictures have durations of their own."""
    need("PIL", "pillow")
    image = open_image(content, name)
    n = getattr(image, "n_frames", 1)
    if n * image.size[0] * image.size[1] > 64 * MOST_PIXELS:
        raise DataError(f"{name}: {n} pictures of {image.size[0]}x{image.size[1]}: refused as a "
                        "decompression bomb")
    try:
        lengths = []
        for k in range(min(n, MOST_FRAMES)):
            image.seek(k)
            lengths.append(max(float(image.info.get("duration", 0) or 100), 1.0) / 1000)
    except Exception as error:  # decoders raise whatever they like on broken bytes
        raise DataError(f"{name}: broken animation ({str(error)[:80]})") from None
    starts = np.cumsum([0.0, *lengths])

    def read(indices):
        frames = []
        for k in indices:
            try:
                image.seek(int(k))
                frames.append(np.asarray(to_rgb(image.copy(), name)))
            except Exception as error:  # as above
                raise DataError(f"{name}: broken animation ({str(error)[:80]})") from None
        return Clip(frames, starts[indices])
    return Source(n, float(starts[-1]), read, name)


def _film(content, name):
    """Whatever PyAV reads.  Frames are counted first: containers often do not know."""
    import io
    av = need("av", "av", "video")

    def frames():
        try:
            with av.open(io.BytesIO(content)) as container:
                if not container.streams.video:
                    raise DataError(f"{name}: no picture track in it")
                stream = container.streams.video[0]
                for k, frame in enumerate(container.decode(stream)):
                    if k >= MOST_FRAMES or frame.width * frame.height > MOST_PIXELS:
                        raise DataError(f"{name}: more than {MOST_FRAMES} frames, or frames above "
                                        "2^26 pixels")
                    yield frame
        except av.error.FFmpegError as error:
            raise DataError(f"{name}: cannot be decoded ({str(error)[:80]})") from None
        except (ValueError, EOFError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{name}: cannot be decoded ({str(error)[:80]})") from None

    times = np.array([k if frame.time is None else frame.time for k, frame in enumerate(frames())])
    if not len(times):
        raise DataError(f"{name}: no picture in it")
    step = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.04

    def read(indices):
        wanted, found = set(indices.tolist()), {}
        for k, frame in enumerate(frames()):
            if k in wanted:
                found[k] = frame.to_ndarray(format="rgb24")
        return Clip([found[k] for k in indices.tolist()], times[indices] - times[0])
    return Source(len(times), float(times[-1] - times[0] + step), read, name)


def pair_times(times_s, size):
    """Time of each group of ``size`` frames: the mean of its first and last one's.

    Parameters
    ----------
    times_s : float64[n]
        Seconds; the last is repeated to fill a group.
    size : int
        Frames of a group.

    Returns
    -------
    float64[n]
        One time per group.
    """
    times = reals(times_s, "times_s")
    times = np.concatenate([times, np.repeat(times[-1:], -len(times) % size)])
    return (times[::size] + times[size - 1::size]) / 2


@dataclass(frozen=True)
class VideoRule:
    """How videos become patches and timestamps.

    Parameters
    ----------
    style : str
        ``"seed"``: Dynamic Frame-Resolution Sampling, one group per frame, ``[1.5 second]`` before
        each.  ``"qwen"``: frames at ``fps``, ``<1.5 seconds>`` before each group of
        ``temporal_size``, one size for all within the bounds of the whole video.
    fps : float, optional
        Frames per second; by default 1 for Seed and 2 for Qwen.
    min_frames, max_frames : int, optional
        By default 16 and what the budget allows, or 4 and 768.
    min_pixels, max_pixels : int
        Qwen: bounds of frames x height x width.
    budget : int
        Seed: visual tokens of a video.

    Raises
    ------
    ValueError
        An unknown style, a rate or count out of range.

    Examples
    --------
    >>> import orchvlm
    >>> orchvlm.data.VideoRule("seed").stamp(1.5)
    '[1.5 second]'
    """

    style: str = "qwen"
    fps: float = None
    min_frames: int = None
    max_frames: int = None
    min_pixels: int = 4096
    max_pixels: int = 25_165_824
    budget: int = BUDGET

    def __post_init__(self):
        if self.style not in ("seed", "qwen"):
            raise ValueError(f"VideoRule.style must be 'seed' or 'qwen'; got {self.style!r}")
        seed = self.style == "seed"
        for name, default, most in (("fps", 1.0 if seed else 2.0, 1e6),
                                    ("min_frames", 16 if seed else 4, MOST_FRAMES),
                                    ("max_frames", MOST_FRAMES if seed else 768, MOST_FRAMES),
                                    ("min_pixels", None, 2**50), ("max_pixels", None, 2**50),
                                    ("budget", None, 2**40)):
            value = getattr(self, name)
            value = default if value is None else value
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not (
                    0 < value <= most):
                raise ValueError(f"VideoRule.{name} must be in 0 .. {most}; got {value!r}")
            object.__setattr__(self, name, value)

    def stamp(self, time_s):
        """The text before a frame or group.

        Parameters
        ----------
        time_s : float
            Seconds.

        Returns
        -------
        str
        """
        words = "[{:.1f} second]" if self.style == "seed" else "<{:.1f} seconds>"
        return words.format(time_s)

    def __call__(self, source, images, fps=None):
        """The patches of a video.

        Parameters
        ----------
        source : Source
            From :func:`open_video`.
        images : ImageRule
            Patch sizes, filter and colours.
        fps : float, optional
            Another rate than the rule's, for this video.

        Returns
        -------
        (array[P, values], (int, int, int), float64[n])
            Rows, the grid, and the time of each group.

        Raises
        ------
        DataError
            Frames that cannot be read or have an aspect ratio above 200.
        """
        fps = self.fps if fps is None else fps
        try:
            if self.style == "seed":
                clip, size = self._seed(source, images, fps)
            else:
                clip, size = self._qwen(source, images, fps)
        except DataError:
            raise
        except ValueError as error:
            raise DataError(f"{source.name}: {error}") from None
        s = images.temporal_size
        frames = [images.resized(frame, size) for frame in clip.frames]
        frames += [frames[-1]] * (-len(frames) % s)
        rows, grid = images.patches(np.stack(frames))
        return rows, grid, pair_times(clip.times_s, s)

    def _seed(self, source, images, fps):
        indices, level = sample_frames(source.n_frames, source.duration_s, fps, self.budget,
                                       least=self.min_frames)
        if len(indices) > self.max_frames:
            indices = indices[np.linspace(0, len(indices) - 1, self.max_frames).round().astype(int)]
        clip = source.clip(indices)
        most = min(level * images.factor**2, images.max_pixels)
        return clip, images.size(*clip.frames[0].shape[:2], max_pixels=most)

    def _qwen(self, source, images, fps):
        rate = source.n_frames / source.duration_s if source.duration_s > 0 else fps
        n = int(source.n_frames / rate * fps)
        n = min(max(n, self.min_frames), self.max_frames, source.n_frames)
        indices = np.linspace(0, source.n_frames - 1, n).round().astype(np.int64)
        clip = source.clip(indices)
        height, width = clip.frames[0].shape[:2]
        return clip, clip_size(n, height, width, images.factor, images.temporal_size,
                               self.min_pixels, self.max_pixels)


def clip_size(n, height, width, factor, temporal, min_pixels, max_pixels):
    """Qwen's rule for frames: as for pictures, with the area times the number of frames bounded.

    Parameters
    ----------
    n : int
        Frames.
    height, width : int
        Pixels of a frame.
    factor, temporal : int
        Pixels of a token along a side, frames of a group.
    min_pixels, max_pixels : int
        Bounds of frames x height x width.

    Returns
    -------
    (int, int)
        Height and width.

    Raises
    ------
    DataError
        An aspect ratio above 200.
    """
    if min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) > 200 * min(height, width):
        raise DataError(f"video: the aspect ratio of {width}x{height} is above 200")
    rows, columns = (round(side / factor) * factor for side in (height, width))
    groups = max(1, round(n / temporal)) * temporal
    if groups * rows * columns > max_pixels:
        beta = math.sqrt(n * height * width / max_pixels)
        rows, columns = (max(factor, math.floor(side / beta / factor) * factor)
                         for side in (height, width))
    elif groups * rows * columns < min_pixels:
        beta = math.sqrt(min_pixels / (n * height * width))
        rows, columns = (math.ceil(side * beta / factor) * factor for side in (height, width))
    return rows, columns
