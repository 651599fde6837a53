"""Pictures: against transformers' own processor, against plain loops, and against bad files."""
import io
import os
import secrets
import struct
import zlib

import numpy as np
import pytest

from orchvlm import data
from orchvlm.data.images import MOST_PIXELS

Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
SEED = int(os.environ.get("ORCHVLM_TEST_SEED", secrets.randbits(32)))


def encoded(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def noise(rng, height, width, channels=3):
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


# ---------------------------------------------------------------- sizes

def test_sizes_obey_their_rule():
    """Multiples of the factor, within bounds where the aspect ratio allows, nearly the same shape.
    """
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    for _ in range(2000):
        height, width = (int(v) for v in np.exp(rng.uniform(0, 9, 2)))
        factor = int(rng.choice([4, 28, 32]))
        low, high = factor**2 * 4, factor**2 * int(rng.integers(200, 2000))
        least = int(rng.integers(2))
        if max(height, width) > 200 * min(height, width):
            with pytest.raises(ValueError, match="aspect ratio"):
                data.smart_resize(height, width, factor, low, high, least)
            continue
        rows, columns = data.smart_resize(height, width, factor, low, high, least)
        assert rows % factor == columns % factor == 0 and min(rows, columns) >= factor
        assert rows * columns <= max(high, factor * max(rows, columns))
        assert rows * columns >= low or least
        if height >= factor and width >= factor and 4 * low <= height * width <= high / 4:
            assert abs(rows - height) <= factor / 2 and abs(columns - width) <= factor / 2


def test_seed_rule_by_hand():
    rule = data.ImageRule.seed()
    assert rule.size(100, 100) == (112, 112)
    assert rule.size(10, 300) == (28, 308)            # at least one multiple
    assert rule.size(10, 10) == (56, 56)              # four tokens at least
    rows, columns = rule.size(5000, 4000)
    assert rows * columns <= 5120 * 784 and (rows, columns) == (2240, 1792)


@pytest.mark.parametrize("arguments, error", [
    ((0, 5, 28, 1, 9), ValueError), ((5, 5, 0, 1, 9), ValueError), ((5, 5, 28, 9, 1), ValueError),
    ((5.0, 5, 28, 1, 9), TypeError), ((True, 5, 28, 1, 9), TypeError),
    ((2**50, 5, 28, 1, 9), ValueError)])
def test_sizes_refused(arguments, error):
    with pytest.raises(error):
        data.smart_resize(*arguments)


# ---------------------------------------------------------------- patches

def by_loops(frames, p, m, s, mean, std):
    """The patch order, spelled out."""
    n, height, width, _ = frames.shape
    rows = []
    for t in range(n // s):
        for token_row in range(height // (p * m)):
            for token_column in range(width // (p * m)):
                for i in range(m):
                    for j in range(m):
                        y, x = (token_row * m + i) * p, (token_column * m + j) * p
                        block = frames[t * s:(t + 1) * s, y:y + p, x:x + p].astype(np.float64)
                        values = (block / 255 - mean) / std
                        rows.append([values[f, r, c, channel] for channel in range(3)
                                     for f in range(s) for r in range(p) for c in range(p)])
    return np.array(rows)


@pytest.mark.parametrize("p, m, s", [(4, 2, 2), (3, 2, 1), (2, 1, 3), (2, 3, 1)])
def test_patch_order(p, m, s):
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    mean, std = (0.48, 0.45, 0.4), (0.26, 0.25, 0.27)
    rule = data.ImageRule(p, m, s, min_pixels=1, mean=mean, std=std)
    height, width = p * m * int(rng.integers(1, 4)), p * m * int(rng.integers(1, 4))
    frames = rng.integers(0, 256, (2 * s, height, width, 3), dtype=np.uint8)
    rows, grid = rule.patches(frames)
    assert grid == (2, height // p, width // p) and rows.dtype == np.float32
    np.testing.assert_allclose(rows, by_loops(frames, p, m, s, mean, std), atol=1e-6)
    raw, _ = data.ImageRule(p, m, s, min_pixels=1, dtype="uint8").patches(frames)
    assert raw.dtype == np.uint8
    np.testing.assert_allclose(raw, np.round(by_loops(frames, p, m, s, 0, 1) * 255))


def test_equal_to_transformers():
    """The same image through the processor that Qwen2-VL and Qwen3-VL use, on Pillow."""
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl",
                                 reason="needs transformers with a Pillow processor")
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    for patch, mean, std in ((16, [.5] * 3, [.5] * 3),
                             (14, [0.48145466, 0.4578275, 0.40821073],
                              [0.26862954, 0.26130258, 0.27577711])):
        low, high = 4 * (2 * patch)**2, 200 * (2 * patch)**2
        theirs = module.Qwen2VLImageProcessorPil(
            patch_size=patch, image_mean=mean, image_std=std,
            size={"shortest_edge": low, "longest_edge": high})
        ours = data.ImageRule(patch, min_pixels=low, max_pixels=high, mean=mean, std=std)
        for _ in range(12):
            height, width = (int(v) for v in np.exp(rng.uniform(2.5, 6.5, 2)))
            image = Image.fromarray(noise(rng, height, width))
            want = theirs(image, return_tensors="np")
            rows, grid = ours(data.load_image(image))
            assert list(grid) == want["image_grid_thw"][0].tolist()
            assert np.abs(rows - want["pixel_values"]).max() <= 1e-5


@pytest.mark.parametrize("fields", [
    {"patch_size": 0}, {"resample": "lanczos"}, {"dtype": "float16"}, {"std": (0, 1, 1)},
    {"mean": (1, 2)}, {"min_pixels": 10, "max_pixels": 5},
    {"dtype": "uint8", "mean": (0.48, 0.46, 0.41)}, {"dtype": "uint8", "std": (0.5, 0.5, 0.4)}])
def test_rules_refused(fields):
    with pytest.raises(ValueError, match="ImageRule"):
        data.ImageRule(**fields)


# ---------------------------------------------------------------- files

def test_alpha_on_white():
    print("seed", SEED)
    rgba = noise(np.random.default_rng(SEED), 9, 7, 4)
    alpha = rgba[:, :, 3:] / 255
    want = rgba[:, :, :3] * alpha + 255 * (1 - alpha)
    for source in (rgba, encoded(Image.fromarray(rgba)), encoded(Image.fromarray(rgba), "WEBP",
                                                                lossless=True, exact=True)):
        assert np.abs(data.load_image(source) - want).max() <= 1.01


def test_a_frame_holds_what_is_not_transparent():
    """In the middle, as large as it fits, from every kind of source; nothing bleeds in from
    colours that nobody sees."""
    rng = np.random.default_rng(SEED)
    print("seed", SEED)
    for _ in range(20):
        height, width = rng.integers(1, 40, 2)
        top, left, bottom, right = rng.integers(0, 30, 4)
        clear = np.zeros((height, width, 4), np.uint8)
        clear[...] = 200, 30, 60, 255
        clear = np.pad(clear, ((top, bottom), (left, right), (0, 0)))
        framed = data.load_image(encoded(Image.fromarray(clear)), frame=24)
        assert np.array_equal(framed, data.load_image(clear, frame=24))
        assert framed.shape == (24, 24, 3)
        long, short = 24, max(1, round(24 * min(height, width) / max(height, width)))
        seen = (framed != 255).any(-1)
        rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
        assert (len(rows), len(columns)) == ((long, short) if height >= width else (short, long))
        assert abs(rows[0] - (23 - rows[-1])) <= 1 and abs(columns[0] - (23 - columns[-1])) <= 1
        assert (framed[seen] == (200, 30, 60)).all()


def test_frames_of_pictures_without_transparency():
    """Nothing is cut, of any mode; one that is all transparent is white."""
    for image in (Image.new("L", (20, 10), 7), Image.new("P", (20, 10)), Image.new("1", (20, 10)),
                  Image.fromarray(np.full((10, 20), 700, np.uint16))):
        framed = data.load_image(image, frame=40)
        assert framed.shape == (40, 40, 3)
        assert (framed[:10] == 255).all() and (framed[30:] == 255).all()
        assert (framed[10:30] < 10).all()
    assert (data.load_image(np.zeros((5, 9, 4), np.uint8), frame=8) == 255).all()
    with pytest.raises(data.DataError, match="floating point"):
        data.load_image(encoded(Image.new("F", (3, 2)), "TIFF"), frame=8)
    for frame in (0, 2**31, 5.0):
        with pytest.raises(ValueError, match="frame"):
            data.load_image(np.zeros((5, 9, 4), np.uint8), frame=frame)


def test_grey_and_alpha():
    pair = np.array([[[0, 255], [0, 0]]], np.uint8)
    assert data.load_image(pair).tolist() == [[[0] * 3, [255] * 3]]


def test_palettes_with_and_without_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    assert data.load_image(encoded(image)).tolist() == [[[255, 0, 0], [0, 0, 255]]]
    assert data.load_image(encoded(image, transparency=0)).tolist() == [
        [[255, 255, 255], [0, 0, 255]]]
    assert data.load_image(encoded(image, "GIF")).tolist() == [[[255, 0, 0], [0, 0, 255]]]


def test_sixteen_bits_are_scaled_and_not_clipped():
    deep = np.array([[0, 257 * 100, 65535]], np.uint16)
    for source in (deep, encoded(Image.fromarray(deep)), encoded(Image.fromarray(deep), "TIFF")):
        assert data.load_image(source)[:, :, 0].tolist() == [[0, 100, 255]]


def test_exif_orientation():
    picture = np.zeros((4, 8, 3), np.uint8)
    picture[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    upright = data.load_image(encoded(Image.fromarray(picture), "PNG", exif=exif))
    assert upright.shape == (8, 4, 3) and upright[:4].min() == 255 and upright[4:].max() == 0


def test_other_modes():
    for mode in ("1", "L", "CMYK"):
        kind = "TIFF" if mode == "CMYK" else "PNG"
        assert data.load_image(encoded(Image.new(mode, (3, 2)), kind)).shape == (2, 3, 3)
    with pytest.raises(data.DataError, match="floating point"):
        data.load_image(encoded(Image.new("F", (3, 2)), "TIFF"))


def test_animations_are_refused_as_pictures():
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with pytest.raises(data.DataError, match="animation of 2"):
        data.load_image(content)


def bomb(width, height):
    """A PNG that claims this size in a few bytes."""
    def chunk(tag, body):
        return (struct.pack(">I", len(body)) + tag + body
                + struct.pack(">I", zlib.crc32(tag + body)))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0,
                                                             0))
            + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(8193, 8193), (60_000, 60_000), (2**31 - 1, 2**31 - 1),
                                  (MOST_PIXELS + 1, 1)])
def test_bombs_are_refused_before_they_go_off(size):
    with pytest.raises(data.DataError, match="2\\^26|broken"):
        data.load_image(bomb(*size))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow speaks of broken tags
def test_broken_files():
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    image = Image.fromarray(noise(rng, 40, 40))
    contents = [encoded(image, kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF",
                                                  "PPM")]
    for content in contents:
        with pytest.raises(data.DataError):
            data.load_image(content[:len(content) // 3])
    for _ in range(300):
        content = bytearray(contents[rng.integers(len(contents))])
        for _ in range(rng.integers(1, 6)):
            content[rng.integers(len(content))] = rng.integers(256)
        try:
            assert data.load_image(bytes(content)).dtype == np.uint8
        except data.DataError:
            pass


def test_no_pictures():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    for content in (b"", b"hello", postscript):
        with pytest.raises(data.DataError, match="no picture in a known format"):
            data.load_image(content)
    with pytest.raises(data.DataError, match="No such file"):
        data.load_image("no/such/file.png")
    with pytest.raises(data.DataError, match="fetched"):
        data.load_image("https://example.org/cat.png")
    for wrong in (3, None, object(), [1]):
        with pytest.raises(TypeError, match="picture must be"):
            data.load_image(wrong)
    for array in (np.zeros((2, 2)), np.zeros((2, 2, 5), np.uint8), np.zeros((0, 3, 3), np.uint8),
                  np.zeros(4, np.uint8)):
        with pytest.raises((TypeError, data.DataError)):
            data.load_image(array)


def test_data_addresses():
    import base64
    content = encoded(Image.new("RGB", (2, 2), "red"))
    address = "data:image/png;base64," + base64.b64encode(content).decode()
    assert data.load_image(address)[0, 0].tolist() == [255, 0, 0]
    for wrong in ("data:image/png;base64,@@", "data:image/png,abc", "data:"):
        with pytest.raises(data.DataError):
            data.load_image(wrong)


def test_missing_pillow_is_named(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install pillow, or .*orchvlm\[data\]"):
        data.load_image(b"")
