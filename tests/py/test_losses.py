"""Pre-training losses: their formulas, their slopes, and batches in parts."""
import os
import time

import numpy as np
import pytest

from orchvlm import losses

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", time.time_ns() % 2**31))
DTYPES = ("float64", "float32")


@pytest.fixture(autouse=True)
def seed():
    print(f"ORCHVLM_TEST_SEED={SEED}")


@pytest.fixture
def rng():
    return np.random.default_rng(SEED)


def captions(rng, n, vocabulary):
    """Of different lengths, one empty, one with repeats."""
    drawn = [rng.integers(0, vocabulary, rng.integers(1, 9)) for _ in range(n)]
    drawn[0], drawn[-1] = drawn[0][:0], np.array([3, 3, 1, 3])
    return drawn


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def plain_masked_cosine(student, teacher, masked):
    return float((1 - (unit(student) * unit(teacher)).sum(axis=1))[masked].mean())


def plain_siglip(image, text, scale, bias):
    logits = scale * unit(image) @ unit(text).T + bias
    z = 2 * np.eye(*logits.shape) - 1
    return float(np.logaddexp(0, -z * logits).sum() / len(text))


def plain_superclass(feature, weight, tokens, frequency):
    logits = feature @ weight.T
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    target = np.zeros_like(logits)
    for row, one in zip(target, tokens):
        row[one] = frequency[one]
        row /= max(row.sum(), 1e-300)
    return float(-(target * logp).sum() / len(feature))


def slope_along(function, arrays, which, direction, h=1e-5):
    values = []
    for step in (h, -h):
        moved = list(arrays)
        moved[which] = arrays[which] + step * direction
        values.append(function(*moved))
    return (values[0] - values[1]) / (2 * h)


def check_slopes(rng, function, arrays, slopes, tolerance=1e-6):
    """Against differences of the plain formula along random directions."""
    for which, slope in enumerate(slopes):
        for _ in range(3):
            direction = rng.standard_normal(np.shape(arrays[which]))
            got = float((np.asarray(slope, np.float64) * direction).sum())
            wanted = slope_along(function, arrays, which, direction)
            scale = np.linalg.norm(slope) * np.linalg.norm(direction)
            assert abs(got - wanted) <= tolerance * (scale + 1), (which, got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_cosine(rng, dtype):
    student, teacher = rng.standard_normal((2, 37, 19))
    masked = rng.random(37) < 0.75
    loss, slope = losses.masked_cosine(student.astype(dtype), teacher.astype(dtype), masked)
    exact = dtype == "float64"
    assert loss == pytest.approx(plain_masked_cosine(student, teacher, masked),
                                 rel=1e-12 if exact else 1e-5)
    assert slope.dtype == dtype and not slope[~masked].any()
    check_slopes(rng, lambda s: plain_masked_cosine(s, teacher, masked), [student], [slope],
                 1e-8 if exact else 1e-5)
    half = masked.sum() / 2
    assert losses.masked_cosine(student, teacher, masked, total=half)[0] == pytest.approx(
        2 * losses.masked_cosine(student, teacher, masked)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale, bias", ((10.0, -10.0), (1.3, 0.4), (-2.0, 3.0)))
def test_siglip(rng, dtype, scale, bias):
    image, text = rng.standard_normal((2, 23, 17))
    text += 0.5 * image
    loss, dimage, dtext, dscale, dbias = losses.siglip(
        image.astype(dtype), text.astype(dtype), scale, bias, threads=1)
    exact = dtype == "float64"
    assert loss == pytest.approx(plain_siglip(image, text, scale, bias),
                                 rel=1e-12 if exact else 1e-5)
    assert dimage.dtype == dtext.dtype == dtype
    check_slopes(rng, plain_siglip, [image, text, scale, bias], [dimage, dtext, dscale, dbias],
                 1e-8 if exact else 2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_siglip_in_parts_is_the_whole(rng, dtype):
    """However many parts: losses and gradients add up, and rows of dimage are one part's."""
    image, text = rng.standard_normal((2, 40, 8)).astype(dtype)
    whole = losses.siglip(image, text, 8.0, -5.0)
    cuts = np.sort(rng.integers(0, 41, 4))
    got = [0.0, [], 0.0, 0.0, 0.0]
    for low, high in zip([0, *cuts], [*cuts, 40]):
        part = losses.siglip(image[low:high], text, 8.0, -5.0, offset=int(low))
        for k, value in enumerate(part):
            got[k] = got[k] + ([value] if k == 1 else value)
    got[1] = np.concatenate(got[1])
    for a, b in zip(got, whole):
        np.testing.assert_allclose(a, b, rtol=0, atol=(1e-13 if dtype == "float64" else 2e-6)
                                   * max(1, np.abs(b).max()))


def test_siglip_of_many_is_done_in_blocks():
    """More pairs than a block holds; far apart, so that nothing may overflow."""
    rng = np.random.default_rng(SEED)
    image, text = rng.standard_normal((2, 1700, 4)).astype(np.float32)
    loss, dimage, *_ = losses.siglip(image, text, 200.0, -100.0)
    assert loss == pytest.approx(plain_siglip(image.astype(float), text.astype(float), 200.0,
                                              -100.0), rel=1e-4)
    assert np.isfinite(dimage).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_superclass(rng, dtype):
    feature, weight = rng.standard_normal((11, 7)), rng.standard_normal((29, 7))
    tokens, frequency = captions(rng, 11, 29), rng.random(29) + 0.1
    loss, dfeature, dweight = losses.superclass(feature.astype(dtype), weight.astype(dtype),
                                                tokens, frequency, threads=2)
    exact = dtype == "float64"
    assert loss == pytest.approx(plain_superclass(feature, weight, tokens, frequency),
                                 rel=1e-12 if exact else 1e-5)
    assert dfeature.dtype == dweight.dtype == dtype and not dfeature[0].any()
    check_slopes(rng, lambda f, w: plain_superclass(f, w, tokens, frequency), [feature, weight],
                 [dfeature, dweight], 1e-8 if exact else 2e-5)
    parts = [losses.superclass(feature[a:b].astype(dtype), weight.astype(dtype), tokens[a:b],
                               frequency, total=11) for a, b in ((0, 4), (4, 11))]
    assert sum(part[0] for part in parts) == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(sum(part[2] for part in parts), dweight, atol=1e-6)


def test_superclass_in_blocks(rng):
    feature, weight = rng.standard_normal((60, 3)), rng.standard_normal((70000, 3))
    tokens = captions(rng, 60, 70000)
    loss, dfeature, dweight = losses.superclass(feature.astype("f4"), weight.astype("f4"), tokens)
    assert loss == pytest.approx(plain_superclass(feature, weight, tokens, np.ones(70000)),
                                 rel=1e-5)
    assert np.abs(dweight.sum(axis=0)).max() < 1e-4  # softmax and target both sum to 1


def test_inverse_frequency(rng):
    tokens = captions(rng, 30, 12)
    held = np.array([sum(c in one for one in tokens) for c in range(12)])
    np.testing.assert_allclose(losses.inverse_frequency(tokens, 12),
                               np.maximum(0, np.log(30 / (1 + held))))


def test_torch_says_the_same(rng):
    torch = pytest.importorskip("torch", reason="torch is not here")
    functional = torch.nn.functional
    image, text = (torch.tensor(a, requires_grad=True) for a in rng.standard_normal((2, 9, 5)))
    logits = 4 * functional.normalize(image) @ functional.normalize(text).T - 2
    loss = -functional.logsigmoid((2 * torch.eye(9) - 1) * logits).sum() / 9
    loss.backward()
    got = losses.siglip(image.detach().numpy(), text.detach().numpy(), 4.0, -2.0)
    assert got[0] == pytest.approx(loss.item(), rel=1e-12)
    np.testing.assert_allclose(got[1], image.grad.numpy(), atol=1e-13)
    np.testing.assert_allclose(got[2], text.grad.numpy(), atol=1e-13)
    image.grad = None
    masked = rng.random(9) < 0.6
    masked[0] = True
    loss = (1 - functional.cosine_similarity(image, text.detach()))[masked].mean()
    loss.backward()
    got = losses.masked_cosine(image.detach().numpy(), text.detach().numpy(), masked)
    assert got[0] == pytest.approx(loss.item(), rel=1e-12)
    np.testing.assert_allclose(got[1], image.grad.numpy(), atol=1e-13)
    image.grad = None
    weight = torch.tensor(rng.standard_normal((12, 5)), requires_grad=True)
    tokens, frequency = captions(rng, 9, 12), rng.random(12) + 0.1
    target = torch.zeros(9, 12, dtype=torch.float64)
    for row, one in zip(target, tokens):
        row[one] = torch.tensor(frequency[one])
        row /= row.sum().clamp(min=1e-300)
    loss = functional.cross_entropy(image @ weight.T, target, reduction="sum") / 9
    loss.backward()
    got = losses.superclass(image.detach().numpy(), weight.detach().numpy(), tokens, frequency)
    assert got[0] == pytest.approx(loss.item(), rel=1e-12)
    np.testing.assert_allclose(got[1], image.grad.numpy(), atol=1e-13)
    np.testing.assert_allclose(got[2], weight.grad.numpy(), atol=1e-13)


def test_what_is_refused(rng):
    x = rng.standard_normal((4, 3))
    with pytest.raises(TypeError, match="masked"):
        losses.masked_cosine(x, x, np.ones(4))
    for call, words in (
            (lambda: losses.masked_cosine(x, x[:3], np.ones(4, bool)), "teacher"),
            (lambda: losses.masked_cosine(x * np.nan, x, np.ones(4, bool)), "finite"),
            (lambda: losses.siglip(x, x[:3], 1.0, 0.0), "text"),
            (lambda: losses.siglip(x[:2], x, 1.0, 0.0, offset=3), "offset"),
            (lambda: losses.siglip(x, x[:, :2], 1.0, 0.0), "columns"),
            (lambda: losses.siglip(x[0], x, 1.0, 0.0), "matrix"),
            (lambda: losses.siglip(x, x, np.inf, 0.0), "scale"),
            (lambda: losses.siglip(x, x, 1.0, 0.0, total=0), "total"),
            (lambda: losses.superclass(x, x, [[0]] * 3), "tokens"),
            (lambda: losses.superclass(x, x, [[4]] * 4), "tokens"),
            (lambda: losses.superclass(x, x[:, :2], [[0]] * 4), "columns"),
            (lambda: losses.superclass(x, x, [[0]] * 4, -np.ones(4)), "frequency"),
            (lambda: losses.inverse_frequency([[5]], 5), "tokens")):
        with pytest.raises(ValueError, match=words):
            call()
    empty = losses.siglip(x[:0], x, 1.0, 0.0, offset=4)
    assert empty[0] == 0 and empty[1].shape == (0, 3) and not empty[2].any()
    assert losses.superclass(x[:0], x, [])[0] == 0
    assert losses.masked_cosine(x, x, np.zeros(4, bool))[0] == 0
