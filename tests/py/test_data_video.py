"""Videos: Dynamic Frame-Resolution Sampling by hand and by loops, folders, animations, films."""
import io
import math
import os
import secrets

import numpy as np
import pytest

from orchvlm import data
from orchvlm.data.video import BUDGET, LEVELS, clip_size, open_video, pair_times

Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
SEED = int(os.environ.get("ORCHVLM_TEST_SEED", secrets.randbits(32)))


# ---------------------------------------------------------------- which frames

@pytest.mark.parametrize("seconds, fps, n, level", [
    (4, 1, 16, 640),        # short: sixteen frames
    (128, 1, 128, 640),     # 128 * 640 = 81,920: just fits
    (129, 1, 129, 512),
    (160, 1, 160, 512),
    (161, 1, 161, 384),
    (320, 1, 320, 256),
    (512, 1, 512, 160),
    (640, 1, 640, 128),
    (641, 1, 640, 128),     # even the lowest level is too much: 640 frames
    (36_000, 1, 640, 128),
    (100, 2, 200, 384),
    (100, 5, 500, 160),
])
def test_levels_by_hand(seconds, fps, n, level):
    frames, tokens = data.sample_frames(30 * seconds, float(seconds), fps)
    assert (len(frames), tokens) == (n, level)
    assert frames[0] == 0 and frames[-1] == 30 * seconds - 1 and (np.diff(frames) > 0).all()


def test_sampling_keeps_its_promises():
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    for _ in range(500):
        have = int(rng.integers(1, 50_000))
        seconds, fps = float(np.exp(rng.uniform(-2, 9))), float(rng.choice([0.5, 1, 2, 5]))
        budget = int(rng.integers(128, 2 * BUDGET))
        frames, tokens = data.sample_frames(have, seconds, fps, budget)
        assert len(frames) * tokens <= budget and tokens in LEVELS
        assert 0 <= frames.min() and frames.max() <= have - 1
        wanted = min(max(math.ceil(seconds * fps), 16), have)
        higher = [level for level in LEVELS if level > tokens]
        assert all(wanted * level > budget for level in higher), "a higher level would have fitted"
        assert len(frames) == wanted or tokens == LEVELS[-1]


@pytest.mark.parametrize("arguments, error", [
    ((0, 1.0), ValueError), ((5, -1.0), ValueError), ((5, math.nan), ValueError),
    ((5, 1.0, 0), ValueError), ((5.5, 1.0), TypeError), ((5, "1"), TypeError),
    ((5, 1.0, 1, 10, (128, 640)), ValueError), ((5, 1.0, 1, 10, ()), ValueError),
    ((5, 1.0, 1, 10, "ab"), TypeError), ((10**9, 1e9, 1, 2**40), ValueError)])
def test_sampling_refuses(arguments, error):
    with pytest.raises(error):
        data.sample_frames(*arguments)


def test_times_of_pairs():
    assert pair_times([0, .5, 1, 1.5], 2).tolist() == [0.25, 1.25]
    assert pair_times([0, .5, 1], 2).tolist() == [0.25, 1.0]   # the last one is repeated
    assert pair_times([0, .5, 1], 1).tolist() == [0, .5, 1]


# ---------------------------------------------------------------- patches of videos

def film(n, height=60, width=90):
    return np.stack([np.full((height, width, 3), k, np.uint8) for k in range(n)])


def test_seed_videos():
    rule, images = data.VideoRule("seed"), data.ImageRule.seed(dtype="uint8")
    rows, grid, times = rule(open_video(film(20), fps=10), images)
    assert grid == (16, 4, 6) and rows.shape == (16 * 24, 588)
    picked = np.linspace(0, 19, 16).round()
    assert rows[::24, 0].tolist() == picked.tolist()
    np.testing.assert_allclose(times, picked / 10)
    assert rule.stamp(times[1]) == "[0.1 second]"


def test_seed_frames_keep_to_their_level():
    rule, images = data.VideoRule("seed", budget=16 * 130), data.ImageRule.seed()
    _, grid, _ = rule(open_video(film(16, 600, 900)), images)
    assert grid[0] == 16 and 100 <= images.tokens((1, *grid[1:])) <= 128


def test_qwen_videos():
    rule, images = data.VideoRule("qwen"), data.ImageRule(dtype="uint8")
    rows, grid, times = rule(open_video(film(9, 64, 96), fps=3), images)
    assert grid == (3, 4, 6)                     # 6 frames of 9: two a second
    assert times.tolist() == pytest.approx([(0 + 2) / 6, (3 + 5) / 6, (6 + 8) / 6])
    first = rows.reshape(3, 24, 3, 2, 16, 16)[:, 0, 0, :, 0, 0]
    assert first.tolist() == [[0, 2], [3, 5], [6, 8]]
    rows, grid, times = rule(open_video(film(5, 64, 96), fps=2), images)
    first = rows.reshape(3, 24, 3, 2, 16, 16)[:, 0, 0, :, 0, 0]
    assert first.tolist() == [[0, 1], [2, 3], [4, 4]] and times[-1] == 2.0
    assert rule.stamp(0.25) == "<0.2 seconds>"


def test_qwen_size_keeps_to_the_whole_videos_bounds():
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    for _ in range(500):
        n = 2 * int(rng.integers(1, 300))
        height, width = (int(v) for v in rng.integers(300, 2000, 2))
        rows, columns = clip_size(n, height, width, 32, 2, 4096, 25_165_824)
        assert rows % 32 == columns % 32 == 0 and n * rows * columns <= 25_165_824


# ---------------------------------------------------------------- sources

def test_folders_are_read_in_order(tmp_path):
    for k in (2, 0, 1):
        Image.fromarray(np.full((28, 28, 3), 9 * k, np.uint8)).save(tmp_path / f"{k:03}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    source = open_video(tmp_path, fps=4)
    assert source.n_frames == 3 and source.duration_s == 0.75
    clip = source.clip([0, 2])
    assert [frame[0, 0, 0] for frame in clip.frames] == [0, 18]
    assert clip.times_s.tolist() == [0, 0.5]


def test_folders_keep_to_themselves(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (folder / "1.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(data.DataError, match="link out of the folder"):
        open_video(folder)


def test_animations_have_their_own_times():
    frames = [Image.fromarray(np.full((8, 8, 3), 60 * k, np.uint8)) for k in range(4)]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:],
                   duration=[100, 200, 300, 50])
    source = open_video(out.getvalue())
    assert source.n_frames == 4
    clip = source.clip([1, 3])
    assert clip.times_s.tolist() == pytest.approx([0.1, 0.6])
    assert [int(frame[0, 0, 0]) for frame in clip.frames] == [60, 180]


def test_films():
    av = pytest.importorskip("av", reason="films need PyAV")
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for k in range(20):
            picture = np.full((48, 64, 3), 10 * k, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    source = open_video(out.getvalue())
    assert source.n_frames == 20 and source.duration_s == pytest.approx(2.0, abs=0.01)
    clip = source.clip(np.array([0, 10, 19]))
    assert clip.times_s.tolist() == pytest.approx([0, 1.0, 1.9], abs=0.01)
    assert all(abs(int(frame[20, 20, 0]) - want) <= 8
               for frame, want in zip(clip.frames, (0, 100, 190)))
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    for content in (out.getvalue()[:200], rng.bytes(500), b""):
        with pytest.raises(data.DataError):
            open_video(content)


@pytest.mark.parametrize("source", [3, None, [], np.zeros((3, 3)), {}])
def test_no_videos(source):
    with pytest.raises(data.DataError):
        open_video(source).clip([0])


def test_clips_and_rules_refused(tmp_path):
    with pytest.raises(data.DataError, match="0 frames"):
        open_video(tmp_path)
    picture = np.zeros((8, 8, 3), np.uint8)
    for frames, times in (([], []), ([picture], [0, 1]), ([picture, picture[:4]], [0, 1]),
                          ([picture], [math.nan])):
        with pytest.raises(data.DataError, match="Clip"):
            data.Clip(frames, times)
    for fields in ({"style": "x"}, {"fps": 0}, {"budget": -1}, {"max_frames": "many"}):
        with pytest.raises(ValueError, match="VideoRule"):
            data.VideoRule(**fields)
