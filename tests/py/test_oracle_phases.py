"""The phases against `transformers`: features, what DeepStack adds, hidden states of every layer,
and the gradients that cross from the decoder to the encoder."""
import os
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle needs torch and transformers")
pytest.importorskip("transformers", reason="the oracle needs torch and transformers")

import orchvlm  # noqa: E402
from model_cases import IMAGE, VIDEO  # noqa: E402
from oracle_cases import compare_grads, grads_of, state_of  # noqa: E402
from test_oracle import draw  # noqa: E402

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", time.time_ns() % 2**31))
DRAWS = int(os.environ.get("ORCHVLM_ORACLE_DRAWS", "3"))
DEVICES = ("cpu", "async")
sparsities = pytest.mark.parametrize("sparse", (False, True), ids=("dense", "moe"))


def draw_pictures(seed, sparse):
    """(config, torch model, inputs, its arguments, mask) of a batch with an image or a video."""
    for more in range(50):
        drawn = draw(seed + 1000 * more, sparse)
        if drawn[2].grid_thw is not None:
            return drawn
    raise AssertionError("no draw with a picture")


class Crossing:
    """What a forward of the torch model hands from the encoder to the decoder, with gradients.

    It encodes images and videos in two calls; here they are put in order of appearance."""

    def __init__(self, model, inputs):
        self.calls, self.hidden = [], []
        visual = model.model.visual
        visual.register_forward_hook(self._keep)
        ids = inputs.input_ids
        kinds = ids[np.isin(ids, (IMAGE, VIDEO))]
        first = np.flatnonzero(np.concatenate([kinds == IMAGE, kinds == VIDEO]))
        self.order = np.argsort(first % len(kinds))  # theirs: all images, then all videos

    def _keep(self, module, arguments, output):
        for tensor in (output.pooler_output, *output.deepstack_features):
            tensor.retain_grad()
        self.calls.append((output.pooler_output, *output.deepstack_features))

    def rows(self, of):
        """[features, extra of layer 0, ...] in order of appearance."""
        return [torch.cat([of(call[k]) for call in self.calls])[self.order].detach().numpy()
                for k in range(len(self.calls[0]))]


def near(got, wanted, tolerance=1e-5):
    assert np.linalg.norm(got - wanted) <= tolerance * np.linalg.norm(wanted) + 1e-12


@pytest.mark.parametrize("device", DEVICES)
@sparsities
@pytest.mark.parametrize("number", range(DRAWS))
def test_what_crosses_between_the_phases(number, sparse, device):
    print("seed", SEED + number)
    config, model, inputs, theirs, mask = draw_pictures(SEED + number, sparse)
    ours = orchvlm.Model(config, device=device)
    ours.load_state_dict(state_of(model))
    crossing = Crossing(model, inputs)
    wanted = model(**theirs, output_hidden_states=True)
    wanted.loss.backward()
    features, extra = ours.encode("vision", inputs)
    found = [features, *(extra if extra is not None else ())]
    for got, one in zip(found, crossing.rows(lambda t: t), strict=True):
        near(got, one)
    depth = config["text_config"]["num_hidden_layers"]
    out = ours.forward(inputs, features=features, extra=extra, taps=range(depth + 1))
    for entry in range(depth + 1):
        near(out.hidden_states[entry], wanted.hidden_states[entry].detach().numpy()[mask])
    assert abs(out.loss - float(wanted.loss)) <= 1e-6 * max(1.0, abs(float(wanted.loss)))
    dfeatures, dextra = ours.backward()
    slopes = [dfeatures, *(dextra if dextra is not None else ())]
    for got, one in zip(slopes, crossing.rows(lambda t: t.grad), strict=True):
        near(got, one)
    ours.encode_backward(dfeatures, dextra)
    compare_grads({name: ours.grads[name] for name in ours.grads}, grads_of(model))


@sparsities
@pytest.mark.parametrize("number", range(DRAWS))
def test_a_loss_of_hidden_states_and_logits(number, sparse):
    """decode, then slopes of both at once, as torch's autograd has them."""
    print("seed", SEED + number)
    config, model, inputs, theirs, mask = draw_pictures(SEED + 500 + number, sparse)
    config = dict(config, text_config=dict(config["text_config"]))
    if sparse:  # its loss is not of the head's input
        config["text_config"]["router_aux_loss_coef"] = 0.0
    ours = orchvlm.Model(config)
    ours.load_state_dict(state_of(model))
    theirs.pop("output_router_logits", None)
    wanted = model(**theirs, output_hidden_states=True)
    rng = np.random.default_rng(SEED + number)
    T = inputs.n_tokens
    rows = rng.choice(T, min(T, 4), replace=False)
    dhidden = rng.standard_normal((T, config["text_config"]["hidden_size"])).astype("f4")
    dlogits = rng.standard_normal((len(rows), config["text_config"]["vocab_size"])).astype("f4")
    flat = torch.from_numpy(mask)
    ((wanted.hidden_states[-1][flat] * torch.from_numpy(dhidden)).sum()
     + (wanted.logits[flat][rows] * torch.from_numpy(dlogits)).sum()).backward()
    hidden = ours.decode(inputs, *ours.encode("vision", inputs))
    near(hidden, wanted.hidden_states[-1].detach().numpy()[mask])
    near(ours.logits(rows), wanted.logits[flat][rows].detach().numpy())
    ours.encode_backward(*ours.backward(dhidden=dhidden, dlogits=dlogits, rows=rows))
    compare_grads({name: ours.grads[name] for name in ours.grads}, grads_of(model))


def test_hidden_states_of_the_tower():
    config, model, inputs, theirs, mask = draw_pictures(SEED + 900, False)
    ours = orchvlm.Model(config)
    ours.load_state_dict(state_of(model))
    depth = config["vision_config"]["depth"]
    with torch.no_grad():
        wanted = model.model.visual(torch.from_numpy(np.array(inputs.pixels)),
                                    torch.from_numpy(np.array(inputs.grid_thw, np.int64)),
                                    output_hidden_states=True).hidden_states
    states = ours.forward(inputs, training=False, vision_taps=range(depth + 1)).vision_states
    for entry in range(depth + 1):
        near(states[entry], wanted[entry].numpy())
