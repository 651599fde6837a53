"""A vision encoder under the pre-training losses: gradients through the tower, batches in parts."""
import os
import time

import numpy as np
import pytest

import orchvlm
from model_cases import draw_config, draw_model, draw_seed_config, grads_of, slope_along
from orchvlm import losses

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", time.time_ns() % 2**31))
GRIDS = np.array([[1, 4, 2], [1, 2, 2], [1, 2, 6], [1, 4, 4]], np.int32)  # patches
TOKENS = GRIDS.prod(axis=1) // 4


@pytest.fixture(autouse=True)
def seed():
    print(f"ORCHVLM_TEST_SEED={SEED}")


def draw(drawer, **options):
    """(model, pixels of each image, generator)"""
    rng = np.random.default_rng(SEED)
    config = drawer(rng, False)
    model = draw_model(SEED, config, threads=1, **options)
    vision = config["vision_config"]
    values = 3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    return model, [rng.standard_normal((n, values)).astype("f4") for n in GRIDS.prod(axis=1)], rng


def encoded(model, pixels, which, **options):
    return model.encode("vision", np.concatenate([pixels[i] for i in which]), GRIDS[which],
                        **options)[0]


def pooled(features, which):
    ends = np.cumsum(TOKENS[which])
    return np.stack([features[e - n:e].mean(axis=0) for e, n in zip(ends, TOKENS[which])])


def spread(dimage, which):
    return np.repeat(dimage / TOKENS[which][:, None], TOKENS[which], axis=0)


def paired(model, pixels, text, which):
    """The pairs' loss of some images against all texts; adds their gradients."""
    features = encoded(model, pixels, which)
    loss, dimage, *_ = losses.siglip(pooled(features, which), text, 5.0, -2.0,
                                     offset=int(which[0]), threads=1)
    model.encode_backward(spread(dimage, which))
    return loss


@pytest.mark.parametrize("backend", ["cpu", "async"])
def test_on_the_model_s_backend(backend):
    """Bit for bit as on a CPU backend of their own; on memory that only the device reads, too."""
    rng = np.random.default_rng(SEED)
    model = draw_model(SEED, draw_config(rng, False), threads=1, device=backend)
    image, text = (rng.standard_normal((n, 6)).astype("f4") for n in (3, 5))
    for loss in (lambda **place: losses.siglip(image, text, 5.0, -2.0, offset=1, **place),
                 lambda **place: losses.superclass(image, text, [[0, 2], [], [4]], **place)):
        for want, got in zip(loss(threads=1), loss(model=model)):
            np.testing.assert_array_equal(got, want)
    with pytest.raises(TypeError, match="model"):
        losses.siglip(image, text, 5.0, -2.0, model="cpu")
    wide = text.astype("f8")  # what the device cannot compute is refused, not computed wrongly
    for loss in (lambda: losses.siglip(wide, wide, 5.0, -2.0, model=model),
                 lambda: losses.superclass(wide, wide, [[0]] * len(wide), model=model)):
        with pytest.raises(ValueError, match="float64"):
            loss()
    assert np.isfinite(losses.siglip(text, text, 5.0, -2.0, model=model)[0])  # usable as before


def classified(model, pixels, weight, which):
    features = encoded(model, pixels, which)
    tokens = [[i, 2 * i + 1] for i in which]
    loss, dfeature, _ = losses.superclass(pooled(features, which), weight, tokens,
                                          total=len(GRIDS), threads=1)
    model.encode_backward(spread(dfeature, which))
    return loss


def modelled(model, pixels, teacher, which):
    """Masked features of merged tokens, whose pixels are 0."""
    rows = np.repeat(np.arange(len(GRIDS)), TOKENS)
    masked = np.arange(len(rows)) % 4 != 0
    features = encoded(model, pixels, which)
    mine = np.isin(rows, which)
    loss, slope = losses.masked_cosine(features, teacher[mine], masked[mine],
                                       total=float(masked.sum()))
    model.encode_backward(slope)
    return loss


LOSSES = {"siglip": (paired, len(GRIDS)), "superclass": (classified, 9),
          "masked": (modelled, int(TOKENS.sum()))}
ALL = np.arange(len(GRIDS))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("drawer", (draw_config, draw_seed_config))
def test_gradients_are_the_slopes_of_the_loss(drawer, name):
    model, pixels, rng = draw(drawer, device="ref", dtype="float64")
    run, rows = LOSSES[name]
    target = rng.standard_normal((rows, model.config.text["hidden_size"]))
    model.zero_grad()
    run(model, pixels, target, ALL)
    grads = {n: g for n, g in grads_of(model).items()
             if n.startswith("model.visual.") and "deepstack" not in n}
    total = np.sqrt(sum(float((g ** 2).sum()) for g in grads.values()))
    assert total > 0
    for parameter in rng.choice(sorted(grads), 8, replace=False):
        slope, wanted = slope_along(model, parameter, grads[parameter],
                                    lambda: run(model, pixels, target, ALL), rng)
        assert abs(slope - wanted) <= 1e-6 * total, parameter


@pytest.mark.parametrize("name", LOSSES)
def test_parts_of_a_batch_are_the_whole(name):
    """Encoded and scored image by image against all texts: one batch's loss and gradient."""
    model, pixels, rng = draw(draw_seed_config)
    run, rows = LOSSES[name]
    target = rng.standard_normal((rows, model.config.text["hidden_size"])).astype("f4")
    model.zero_grad()
    loss = run(model, pixels, target, ALL)
    wanted = grads_of(model)
    model.zero_grad()
    parts = sum(run(model, pixels, target, ALL[i:j]) for i, j in ((0, 1), (1, 3), (3, 4)))
    assert parts == pytest.approx(loss, rel=1e-5)
    total = np.sqrt(sum(float((g ** 2).sum()) for g in wanted.values()))
    for parameter, got in grads_of(model).items():
        assert np.linalg.norm(got - wanted[parameter]) <= 1e-5 * total, parameter


def test_it_learns_its_pairs():
    model, pixels, rng = draw(draw_seed_config)
    text = rng.standard_normal((len(GRIDS), model.config.text["hidden_size"])).astype("f4")
    model.freeze("model.language_model.*", *(["lm_head.*"] if not model.config.tied else []))
    opt = orchvlm.AdamW(model, lr=1e-2, weight_decay=0.0)
    seen = []
    for _ in range(30):
        model.zero_grad()
        seen.append(paired(model, pixels, text, ALL))
        opt.step()
    assert seen[-1] < 0.5 * seen[0]
