"""Balance of experts over a step's whole batch: exact, lagged, and by corrections."""
import os
import time

import numpy as np
import pytest

import orchvlm
from model_cases import FIRST_TEXT, draw_config, draw_model, draw_seed_config, grads_of
from orchvlm.routing import Balance
from orchvlm.training import read_metrics
from test_training import Packs, losses

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", time.time_ns() % 2**31))


@pytest.fixture(autouse=True)
def seed():
    print(f"ORCHVLM_TEST_SEED={SEED}")


def draw(number, drawer=draw_config, **change):
    """(model, generator) with experts, and a balance loss that counts."""
    rng = np.random.default_rng([SEED, number])
    config = drawer(rng, True)
    groups = {"n_group": 1, "topk_group": 1} if drawer is draw_seed_config else {}
    config["text_config"] |= {"router_aux_loss_coef": 0.5, "num_experts": 8,
                              "num_experts_per_tok": 2, **groups, **change}
    return draw_model([SEED, number], config, threads=1), rng


def texts(model, rng, n):
    ids = [rng.integers(FIRST_TEXT, model.config.text["vocab_size"], rng.integers(3, 25))
           .astype(np.int32) for _ in range(n)]
    return [orchvlm.Inputs(input_ids=i, labels=i) for i in ids]


def stepped(model, packs, monkeypatch, tmp_path, **settings):
    """(rows, gradients of the last step) of a run of one step per `micro_batches` packs."""
    size = settings.get("micro_batches", 1)
    config = orchvlm.TrainingConfig(steps=len(packs) // size, lr=0.0, min_lr=0.0, warmup=0,
                                    **settings)
    trainer = orchvlm.Trainer(model, Packs(packs), config, tmp_path)
    grads, original = [], trainer.optimizer.step

    def noted(rate):
        grads.append(grads_of(model))
        return original(rate)
    monkeypatch.setattr(trainer.optimizer, "step", noted)
    rows = list(trainer.run())
    return rows, grads[-1] if grads else None, trainer


def close(got, wanted, tolerance=1e-5):
    total = np.sqrt(sum(float((g ** 2).sum()) for g in wanted.values()))
    for name, one in wanted.items():
        error = np.linalg.norm(got[name] - one)
        assert error <= tolerance * (np.linalg.norm(one) + 1e-2 * total), (name, error)


@pytest.mark.parametrize("size", (2, 3, 6))
@pytest.mark.parametrize("drawer", (draw_config, draw_seed_config))
def test_exact_is_one_whole_batch(size, drawer, monkeypatch, tmp_path):
    model, rng = draw(size, drawer)
    packs = texts(model, rng, 6)
    groups = np.array_split(np.arange(6), size)
    cut = [orchvlm.Inputs.concatenate([packs[i] for i in group]) for group in groups]
    parts, got, _ = stepped(model, cut, monkeypatch, tmp_path / "a", micro_batches=size)
    whole, wanted, _ = stepped(model, [orchvlm.Inputs.concatenate(packs)], monkeypatch,
                               tmp_path / "b")
    close(got, wanted)
    for key in ("loss", "aux_loss", "grad_norm"):
        assert parts[0][key] == pytest.approx(whole[0][key], rel=1e-5)
    assert parts[0]["expert_load"] == whole[0]["expert_load"]
    assert parts[0]["routing_seconds"] > 0 == whole[0]["routing_seconds"]
    # Each part by its own counts would be another gradient.
    model.zero_grad()
    for pack in cut:
        model.forward(pack, normalizer=whole[0]["targets"])
        model.backward()
    with pytest.raises(AssertionError):
        close(grads_of(model), wanted)


def plain_aux(counts, rows, scores, score_rows):
    """E sum f_e P_e."""
    return len(counts) * float((counts / rows * scores / score_rows).sum())


def test_lagged_takes_the_counts_of_the_step_before(monkeypatch, tmp_path):
    model, rng = draw(10)
    packs = texts(model, rng, 4)
    first, second = packs[:2], packs[2:]
    rows, got, _ = stepped(model, packs, monkeypatch, tmp_path, micro_batches=2, aux="lagged")
    assert rows[0]["routing_seconds"] > 0 == rows[1]["routing_seconds"]  # nothing before the first
    counts, before = map(sum, zip(*(model.route(pack) for pack in first)))
    now = sum(model.route(pack)[1] for pack in second)
    # The loss is linear in the counts: with those of one expert alone it tells that one's scores.
    scores = np.zeros(len(counts))
    for e in range(len(counts)):
        alone = np.zeros(len(counts), np.int64)
        alone[e] = 1
        scores[e] = sum(model.forward(pack, router_counts=(alone, 1), training=False).aux_loss
                        for pack in second) / len(counts)
    assert rows[1]["aux_loss"] == pytest.approx(plain_aux(counts, before, scores, now), rel=1e-9)
    model.zero_grad()
    total = rows[1]["targets"]
    for pack in second:
        model.forward(pack, normalizer=total,
                      router_counts=(counts, (before * now) ** 0.5))
        model.backward()
    close(got, grads_of(model), 1e-7)


@pytest.mark.parametrize("aux", ("exact", "lagged", "bias"))
def test_resumed_is_uninterrupted(aux, monkeypatch, tmp_path):
    def made(folder):
        model, rng = draw(20, draw_seed_config)
        config = orchvlm.TrainingConfig(steps=6, lr=3e-3, warmup=0, micro_batches=2, aux=aux,
                                        bias_rate=0.25)
        return orchvlm.Trainer(model, Packs(texts(model, rng, 12)), config, folder)
    whole = made(tmp_path / "whole")
    rows = list(whole.run())
    first = made(tmp_path / "parts")
    for row in first.run():
        if row["step"] == 3:
            break
    second = made(tmp_path / "parts")
    assert second.resume() == 3
    again = list(second.run())
    assert losses(again) == losses(rows[3:])
    assert [r["aux_loss"] for r in again] == [r["aux_loss"] for r in rows[3:]]
    for name, values in whole.model.state_dict().items():
        assert (second.model.parameters[name] == values).all(), name
    assert [r["step"] for r in read_metrics(tmp_path / "parts" / "metrics.jsonl")] == [
        1, 2, 3, 4, 5, 6]


def test_state_that_does_not_fit_changes_nothing():
    model, _ = draw(21, draw_seed_config)
    balance = Balance(model, "lagged", 0.0)
    experts = model.config.text["num_experts"]
    good = {"counts": list(range(experts)), "rows": 7}
    balance.load_state_dict(good)
    for counts in ([1] * (experts + 1), [], 5):
        with pytest.raises(ValueError, match=f"the model's {experts} experts; got shape"):
            balance.load_state_dict({"counts": counts, "rows": 1})
        assert balance.state_dict() == good


def test_corrections_move_against_the_counts(monkeypatch, tmp_path):
    model, rng = draw(30, draw_seed_config, num_hidden_layers=4)
    packs = texts(model, rng, 4)
    names = [n for n in model.parameters if n.endswith("e_score_correction_bias")]
    before = {n: np.array(model.parameters[n]) for n in names}
    counts = 0
    for pack in packs:
        out = model.forward(pack, training=False)
        layers = model.layer_counts()
        assert layers.shape == (3, model.config.text["num_experts"])  # the first layer is dense
        assert (layers.sum(axis=1) == pack.n_tokens * model.config.text["num_experts_per_tok"]
                ).all() and (layers.sum(axis=0) == out.router_counts).all()
        counts = counts + layers
    (row,), _, _ = stepped(model, packs, monkeypatch, tmp_path, micro_batches=4, aux="bias",
                           bias_rate=0.125)
    assert row["aux_loss"] == 0
    for name, one in zip(names, counts):
        step = np.float32(0.125) * np.sign(one.mean() - one).astype(np.float32)
        np.testing.assert_array_equal(model.parameters[name], before[name] + step)


def test_corrections_even_out(monkeypatch, tmp_path):
    """On one batch, again and again, the fullest expert loses most of what it has too much."""
    model, rng = draw(31, draw_seed_config)
    pack = orchvlm.Inputs.concatenate(texts(model, rng, 20))
    rows, _, _ = stepped(model, [pack] * 60, monkeypatch, tmp_path, aux="bias", bias_rate=0.02)
    assert rows[-1]["expert_load"] - 1 < 0.7 * (rows[0]["expert_load"] - 1)


def test_a_step_that_is_skipped_corrects_nothing(monkeypatch, tmp_path):
    model, rng = draw(32, draw_seed_config)
    model.parameters["model.language_model.norm.weight"][0] = np.nan
    before = model.state_dict()
    (row,), _, _ = stepped(model, texts(model, rng, 1), monkeypatch, tmp_path, aux="bias")
    assert row["skipped"]
    for name, values in before.items():
        np.testing.assert_array_equal(model.parameters[name], values)


def test_what_is_refused(tmp_path):
    model, rng = draw(40)
    with pytest.raises(ValueError, match="aux"):
        orchvlm.TrainingConfig(aux="inexact")
    with pytest.raises(ValueError, match="bias_rate"):
        orchvlm.TrainingConfig(bias_rate=-1.0)
    with pytest.raises(ValueError, match="sigmoid"):
        orchvlm.Trainer(model, Packs([]), orchvlm.TrainingConfig(aux="bias"), tmp_path)
    with pytest.raises(ValueError, match="sigmoid"):
        model.correct_routers(model.layer_counts(), 1e-3)
    dense = draw_model(SEED, draw_config(rng, False))
    for call in (dense.layer_counts, lambda: dense.route(texts(dense, rng, 1)[0])):
        with pytest.raises(ValueError, match="no experts"):
            call()
    corrected, _ = draw(41, draw_seed_config)
    layers, experts = corrected.layer_counts().shape
    for wrong in (np.zeros(experts, np.int64), np.full((layers, experts), -1),
                  np.full((layers, experts), 2**50)):
        with pytest.raises(ValueError, match="counts"):
            corrected.correct_routers(wrong, 1e-3)
