"""Seed1.5-VL's parts, exact against `transformers`: tower, pooling, adapter, routing, experts."""
import os
import time

import numpy as np
import pytest

pytest.importorskip("torch", reason="the oracle needs torch and transformers")
pytest.importorskip("transformers", reason="the oracle needs torch and transformers")

from model_cases import draw_model, draw_samples, draw_seed_config, grads_of, pack  # noqa: E402
from oracle_cases import compare_grads  # noqa: E402
from seed_oracle import SeedOracle  # noqa: E402

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", time.time_ns() % 2**31))
DRAWS = int(os.environ.get("ORCHVLM_ORACLE_DRAWS", "3"))


def draw(seed, sparse, device):
    for attempt in range(50):
        rng = np.random.default_rng([seed, attempt])
        config = draw_seed_config(rng, sparse)
        text = config["text_config"]
        text["attention_bias"] = False  # with it the decoder there has none on its output
        if sparse:
            text["shared_expert_intermediate_size"] = (
                int(rng.integers(1, 3)) * text["moe_intermediate_size"])
            text["norm_topk_prob"] = bool(rng.random() < 0.6)
        config["vision_config"]["hidden_act"] = str(rng.choice(
            ["quick_gelu", "gelu", "gelu_pytorch_tanh"]))
        model = draw_model([seed, attempt], config, device=device)
        oracle = SeedOracle(config, model.state_dict())
        inputs = pack(draw_samples(rng, config))
        if oracle.routing_margin(inputs) >= 1e-4:
            return model, oracle, inputs
    raise AssertionError("no draw with a clear routing")


@pytest.mark.parametrize("device", ("cpu", "async"))
@pytest.mark.parametrize("sparse", (False, True), ids=("dense", "moe"))
@pytest.mark.parametrize("number", range(DRAWS))
def test_logits_loss_and_gradients(number, sparse, device):
    print(f"ORCHVLM_TEST_SEED={SEED + number}")
    model, oracle, inputs = draw(SEED + number, sparse, device)
    loss, logits = oracle.loss_and_logits(inputs)
    loss.backward()
    got = model.forward(inputs)
    mine = model.logits(np.arange(inputs.n_tokens))
    wanted = logits.detach().numpy()
    assert np.linalg.norm(mine - wanted) <= 1e-5 * np.linalg.norm(wanted)
    assert abs(got.loss - float(loss)) <= 1e-6 * max(1.0, float(loss))
    model.backward()
    grads = grads_of(model)
    compare_grads(grads, {name: oracle.gradient(name) for name in grads})
