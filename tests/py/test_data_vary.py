"""Varied pictures: the same for the same number, others for another, and the question as it was."""
import numpy as np
import pytest

import orchvlm
from orchvlm import data

Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
NOTHING = dict.fromkeys(("shift", "zoom", "stretch", "turn", "tint", "hue", "grey", "hide"), 0)


def sample(picture, answer="cat"):
    return {"id": answer, "messages": [
        {"role": "user", "content": [{"type": "image", "image": picture},
                                     {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": answer}]}


def picture_of(row):
    return row["messages"][0]["content"][0]["image"]


def gradient(height=40, width=56):
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 5, columns * 4, rows + columns], -1).astype(np.uint8)


def test_the_same_number_gives_the_same_and_another_gives_another():
    source = [sample(gradient()), sample(255 - gradient(), "dog")]
    one, again, other = data.Varied(source, 3), data.Varied(source, 3), data.Varied(source, 4)
    for k in (0, 1, 5, 1000):
        assert np.array_equal(picture_of(one[k]), picture_of(again[k]))
        assert not np.array_equal(picture_of(one[k]), picture_of(other[k]))
    assert not np.array_equal(picture_of(one[0]), picture_of(one[2]))
    assert picture_of(source[0]).tobytes() == gradient().tobytes()  # what was given stays


def test_every_sample_once_per_pass():
    source = [sample(gradient(), str(k)) for k in range(7)]
    varied = data.Varied(source, 1)
    passes = [[varied[7 * p + k]["messages"][1]["content"] for k in range(7)] for p in range(3)]
    assert all(sorted(one) == [str(k) for k in range(7)] for one in passes)
    assert passes[0] != passes[1] or passes[1] != passes[2]


def test_nothing_asked_nothing_changed():
    still = data.Varied([sample(gradient())], **NOTHING)
    assert np.array_equal(picture_of(still[5]), gradient())
    grey = picture_of(data.Varied([sample(gradient())], **NOTHING | {"grey": 1})[0])
    assert (grey[..., 0] == grey[..., 2]).all() and grey.std() > 1
    assert np.abs(grey[..., 0] - gradient() @ [0.299, 0.587, 0.114]).max() <= 1


def test_turned_colours_keep_their_grey_axis():
    """A rotation about (1, 1, 1): the sum of the three stays, and so does their length."""
    picture = np.random.default_rng(3).integers(90, 160, (20, 30, 3)).astype(np.uint8)
    varied = data.Varied([sample(picture)], **NOTHING | {"hue": 1})
    turned = [picture_of(varied[k]).astype(float) for k in range(4)]
    for got in turned:
        assert np.abs(got.sum(-1) - picture.sum(-1, dtype=float)).max() <= 2
        lengths = [np.linalg.norm(p.astype(float), axis=-1) for p in (got, picture)]
        assert np.abs(lengths[0] - lengths[1]).max() <= 2
    assert max(np.abs(got - picture).max() for got in turned) > 5


def test_a_hidden_rectangle_is_of_one_colour():
    varied = data.Varied([sample(gradient())], **NOTHING | {"hide": 1})
    for k in range(8):
        picture = picture_of(varied[k])
        changed = (picture != gradient()).any(-1)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        inside = picture[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1].reshape(-1, 3)
        assert (inside == inside[0]).all()
        assert 0.01 < changed.mean() <= 0.45 ** 2 + 0.01


def test_a_framed_picture_is_varied_in_its_frame():
    """Nothing varied: the frame of load_image, but for one more look at each pixel."""
    clear = np.dstack([gradient(), np.full((40, 56), 255, np.uint8)])
    clear = np.pad(clear, ((30, 10), (5, 60), (0, 0)))
    picture = picture_of(data.Varied([sample(clear)], frame=42, **NOTHING)[0])
    assert picture.shape == (42, 42, 3)
    framed = data.load_image(clear, frame=42).astype(float)
    assert np.abs(picture - framed).mean() < 4
    assert (picture[:4] == 255).all() and (picture[8:34] != 255).any(-1).all()


def test_pictures_are_no_larger_than_asked():
    """Shrunk to so many pixels, and the same when they come from memory."""
    source = [sample(gradient(90, 200)), sample(gradient(20, 30))]
    varied = data.Varied(source, 5, pixels=1800)
    first = {k: picture_of(varied[k]) for k in range(4)}
    assert {p.shape for p in first.values()} == {(28, 63, 3), (20, 30, 3)}
    fresh = data.Varied(source, 5, pixels=1800)
    assert all(np.array_equal(picture_of(fresh[k]), first[k]) for k in reversed(range(4)))
    still = picture_of(data.Varied([sample(gradient(90, 200))], pixels=1800, **NOTHING)[0])
    small = np.asarray(Image.fromarray(gradient(90, 200)).resize((63, 28), Image.BOX), float)
    assert np.abs(still - small).mean() < 6


def test_it_feeds_a_mixture_that_goes_on_where_it_stopped():
    def fresh():
        return data.Mixture([data.Varied([sample(gradient(), str(k)) for k in range(3)], 2)])
    first, second = fresh(), fresh()
    for _ in range(4):
        next(first)
    second.load_state_dict(first.state_dict())
    assert np.array_equal(picture_of(next(first)), picture_of(next(second)))


@pytest.mark.parametrize("arguments, kind", [
    ((5,), TypeError), (([],), ValueError), (([{}], 0.5), TypeError), (([{}], True), TypeError),
    (([{}], -1), ValueError)])
def test_refusals(arguments, kind):
    with pytest.raises(kind):
        data.Varied(*arguments)
    for name, value in (("shift", 2), ("zoom", -1), ("turn", float("nan")), ("grey", 1.5),
                        ("stretch", 1), ("hide", 1.5), ("pixels", 0), ("frame", 0)):
        with pytest.raises(ValueError, match=name):
            data.Varied([{}], **{name: value})
    with pytest.raises(IndexError):
        data.Varied([{}])[-1]
    assert orchvlm.data.Varied is data.Varied
