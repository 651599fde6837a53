"""Varied pictures: the same for the same number, others for another, and the question as it was."""
import numpy as np
import pytest

import orchvlm
from orchvlm import data

pytest.importorskip("PIL", reason="pictures need Pillow")


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
    still = data.Varied([sample(gradient())], shift=0, zoom=0, turn=0, tint=0, grey=0)
    assert np.array_equal(picture_of(still[5]), gradient())
    grey = picture_of(data.Varied([sample(gradient())], shift=0, zoom=0, turn=0, tint=0, grey=1)[0])
    assert (grey[..., 0] == grey[..., 2]).all() and grey.std() > 1


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
    for name, value in (("shift", 2), ("zoom", -1), ("turn", float("nan")), ("grey", 1.5)):
        with pytest.raises(ValueError, match=name):
            data.Varied([{}], **{name: value})
    with pytest.raises(IndexError):
        data.Varied([{}])[-1]
    assert orchvlm.data.Varied is data.Varied
