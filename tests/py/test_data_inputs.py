"""Inputs: what is refused, and that taking samples out and packing them again changes nothing."""
import os
import secrets

import numpy as np
import pytest

import orchvlm
from orchvlm import Inputs

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", secrets.randbits(32)))
COLUMNS = ("input_ids", "cu_seqlens", "position_ids", "labels", "weights", "pixels", "grid_thw",
           "mel", "mel_lengths", "grid_sample", "mel_sample")


def drawn(rng, n=None):
    """Random inputs of n samples, some empty, with images and sounds in some."""
    n = rng.integers(1, 6) if n is None else n
    lengths = rng.integers(0, 9, n)
    tokens = int(lengths.sum())
    grids = [rng.integers(1, 4, 3) for _ in range(rng.integers(0, 5))]
    sounds = rng.integers(1, 6, rng.integers(0, 4))
    ids = rng.integers(0, 50, tokens)
    return Inputs(
        ids, np.concatenate([[0], np.cumsum(lengths)]),
        rng.integers(0, 9, (3, tokens)).astype(np.float32),
        np.where(rng.random(tokens) < 0.5, ids, -100), rng.random(tokens).astype(np.float32),
        rng.standard_normal((sum(int(g.prod()) for g in grids), 12)).astype(np.float32),
        np.array(grids).reshape(-1, 3).astype(int), rng.standard_normal((sounds.sum(), 5)), sounds,
        np.sort(rng.integers(0, n, len(grids))), np.sort(rng.integers(0, n, len(sounds))))


def assert_same(a, b):
    for name in COLUMNS:
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None) == (right is None), name
        if left is not None:
            assert left.dtype == right.dtype and np.array_equal(left, right), name


def test_taking_apart_and_packing_again_is_the_same():
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    for _ in range(200):
        whole = drawn(rng)
        assert_same(Inputs.concatenate([whole[b] for b in range(len(whole))]), whole)
        assert_same(whole[:], whole)
        order = rng.permutation(len(whole))
        assert_same(whole[order], Inputs.concatenate([whole[int(b)] for b in order]))
        back = np.argsort(order)
        assert_same(whole[order][back], whole)


def test_a_sample_takes_its_own_items_along():
    """Against plain loops over rows."""
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    for _ in range(50):
        whole = drawn(rng)
        b = int(rng.integers(len(whole)))
        part = whole[b]
        rows, mels, row, frame = [], [], 0, 0
        for grid, owner in zip(whole.grid_thw.tolist(), whole.grid_sample.tolist()):
            for _ in range(grid[0] * grid[1] * grid[2]):
                if owner == b:
                    rows.append(whole.pixels[row])
                row += 1
        for length, owner in zip(whole.mel_lengths.tolist(), whole.mel_sample.tolist()):
            for _ in range(length):
                if owner == b:
                    mels.append(whole.mel[frame])
                frame += 1
        assert np.array_equal(part.pixels, np.array(rows).reshape(-1, 12))
        assert np.array_equal(part.mel, np.array(mels).reshape(-1, 5))
        start, end = whole.cu_seqlens[b:b + 2]
        assert np.array_equal(part.input_ids, whole.input_ids[start:end])


def test_targets_are_counted_as_the_shifted_loss_does():
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    for _ in range(50):
        whole = drawn(rng)
        count = 0
        for b in range(len(whole)):
            labels = whole[b].labels.tolist()
            count += sum(label != -100 for label in labels[1:])
        assert whole.n_target_tokens == count


def test_bytes_stay_bytes_and_views_stay_views():
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)
    inputs = Inputs([1], pixels=pixels, grid_thw=[[1, 2, 2]])
    assert inputs.pixels.dtype == np.uint8 and np.shares_memory(inputs.pixels, pixels)
    with pytest.raises(ValueError):
        inputs.pixels[0, 0] = 1
    assert pixels.flags.writeable


@pytest.mark.parametrize("change, error, words", [
    ({"input_ids": [1.5]}, TypeError, "input_ids must hold integers"),
    ({"input_ids": [-1]}, ValueError, "the least is -1"),
    ({"input_ids": [2**31]}, ValueError, "must fit int32"),
    ({"cu_seqlens": [0, 2, 1, 3]}, ValueError, "must rise from 0"),
    ({"cu_seqlens": [0, 2]}, ValueError, "must rise from 0"),
    ({"cu_seqlens": []}, ValueError, "must rise from 0"),
    ({"labels": [1, 2]}, ValueError, "must have 3 elements"),
    ({"labels": [1, 2, -7]}, ValueError, "got -7"),
    ({"weights": [1, 2, -1]}, ValueError, "weights must be >= 0"),
    ({"weights": [1, 2, np.nan]}, ValueError, "must be finite"),
    ({"weights": [1, 2, 1e39]}, ValueError, "float32 cannot hold"),
    ({"position_ids": np.zeros((2, 3))}, ValueError, r"shape \(3, 3\)"),
    ({"pixels": np.zeros((4, 6))}, ValueError, "belong together"),
    ({"grid_thw": [[1, 2, 2]]}, ValueError, "belong together"),
    ({"pixels": np.zeros((4, 6)), "grid_thw": [[1, 2, 3]]}, ValueError, "must have 6 rows"),
    ({"pixels": np.zeros((4, 6)), "grid_thw": [[1, 0, 4]]}, ValueError, "must be >= 1"),
    ({"pixels": np.zeros((4, 6)), "grid_thw": [1, 2, 2]}, ValueError, r"shape \(n, 3\)"),
    ({"pixels": np.zeros((4, 6), int), "grid_thw": [[1, 2, 2]]}, TypeError, "uint8 or float32"),
    ({"pixels": np.zeros((4, 6)), "grid_thw": [[1, 2, 2]], "grid_sample": [1]}, ValueError,
     "within 0 .. 0"),
    ({"pixels": np.zeros((1, 6)), "grid_thw": [[2**20, 2**20, 2**20]]}, ValueError, "rows"),
    ({"mel": np.zeros((4, 6)), "mel_lengths": [3]}, ValueError, "must have 3 rows"),
    ({"mel": np.zeros((4, 6)), "mel_lengths": [4, 0]}, ValueError, "must be >= 1"),
    ({"mel_sample": [0]}, ValueError, "needs mel_lengths"),
])
def test_refused(change, error, words):
    with pytest.raises(error, match=words):
        Inputs(**{"input_ids": [1, 2, 3], **change})


def test_owners_may_be_unknown_until_samples_are_taken():
    inputs = Inputs([1, 2], [0, 1, 2], pixels=np.zeros((4, 6)), grid_thw=[[1, 2, 2]])
    with pytest.raises(ValueError, match="grid_sample"):
        inputs[0]
    assert Inputs.concatenate([inputs, inputs]).grid_sample is None


def test_indices_and_parts_are_checked():
    inputs = Inputs([1, 2], [0, 1, 2])
    for which in (2, -3, [0, 2]):
        with pytest.raises(IndexError):
            inputs[which]
    with pytest.raises(TypeError):
        inputs[[0.5]]
    with pytest.raises(TypeError, match="got int"):
        Inputs.concatenate([3])
    assert len(Inputs.concatenate([])) == 0
    other = Inputs([1], pixels=np.zeros((4, 6), np.uint8), grid_thw=[[1, 2, 2]])
    with pytest.raises(ValueError, match="differ in dtype"):
        Inputs.concatenate([other, Inputs([1], pixels=np.zeros((4, 6)), grid_thw=[[1, 2, 2]])])


def test_weights_of_one_where_a_part_has_none():
    both = Inputs.concatenate([Inputs([1], weights=[0.5]), Inputs([2])])
    assert both.weights.tolist() == [0.5, 1.0]


def test_it_shows_itself():
    inputs = drawn(np.random.default_rng(1))
    assert "samples" in repr(inputs) and "<table>" in inputs._repr_html_()
    assert orchvlm.Inputs is Inputs
