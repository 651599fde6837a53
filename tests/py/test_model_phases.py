"""The phases one by one, slopes of hidden states and logits, taps, shared memory, traces."""
import gc
import json
import os
import signal
import threading
import time

import numpy as np
import pytest

import orchvlm
from model_cases import (IMAGE, MANY, VIDEO, draw_config, draw_model, draw_samples,
                         draw_seed_config, grads_of, pack, slope_near)

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", time.time_ns() % 2**31))
FAMILIES = {"dense": (draw_config, False), "softmax experts": (draw_config, True),
            "seed": (draw_seed_config, False), "sigmoid experts": (draw_seed_config, True)}
families = pytest.mark.parametrize("family", FAMILIES)
devices = pytest.mark.parametrize("device", ("cpu", "async"))


@pytest.fixture(autouse=True)
def seed():
    print(f"ORCHVLM_TEST_SEED={SEED}")


def draw(family, number=0, samples=3, images=True, **options):
    """(model, inputs, generator); with at least one image where images are wanted."""
    for attempt in range(99):
        rng = np.random.default_rng([SEED, number, attempt])
        drawer, sparse = FAMILIES[family]
        config = drawer(rng, sparse)
        inputs = pack(draw_samples(rng, config, samples))
        if not images or inputs.grid_thw is not None:
            break
    model = draw_model([SEED, number], config, **{"threads": 1, **options})
    return model, inputs, rng


def text_of(inputs):
    """The inputs without their images."""
    return orchvlm.Inputs(**{**vars(inputs), "pixels": None, "grid_thw": None,
                             "grid_sample": None})


def same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def assert_close(got, wanted, tolerance):
    total = np.sqrt(sum(float((g ** 2).sum()) for g in wanted.values()))
    for name, one in wanted.items():
        error = np.linalg.norm(got[name] - one)
        assert error <= tolerance * (np.linalg.norm(one) + 1e-3 * total), (name, error)


def step(model, inputs, **options):
    model.zero_grad()
    out = model.forward(inputs, **options)
    model.backward()
    return out, grads_of(model)


def labelled_rows(inputs):
    """Rows of the hidden states that predict a label, and those labels."""
    labels = inputs.labels[1:].copy()
    labels[inputs.cu_seqlens[1:-1][inputs.cu_seqlens[1:-1] < inputs.n_tokens] - 1] = -100
    rows = np.flatnonzero(labels != -100)
    return rows, labels[rows]


def cross_entropy(logits, labels):
    """(mean loss, its slope), in double."""
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    p = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
    at = np.arange(len(labels))
    loss = -np.log(p[at, labels]).mean()
    p[at, labels] -= 1
    return loss, p / len(labels)


# ---------------------------------------------------------------- the phases add up

@families
@devices
def test_phases_are_the_forward(family, device):
    """encode, decode and a loss of one's own: the forward's loss and every gradient."""
    model, inputs, _ = draw(family, device=device)
    out, wanted = step(model, inputs)
    model.zero_grad()
    features, extra = model.encode("vision", inputs)
    hidden = model.decode(text_of(inputs), features, extra)
    rows, labels = labelled_rows(inputs)
    assert hidden.shape == (inputs.n_tokens, model.config.text["hidden_size"])
    coefficient = model.config.text.get("router_aux_loss_coef", 0.0)
    loss, dlogits = cross_entropy(model.logits(rows), labels)
    assert abs(loss + coefficient * out.aux_loss - out.loss) <= 2e-6 * max(1, out.loss)
    model.encode_backward(*model.backward(dlogits=dlogits, rows=rows))
    assert_close(grads_of(model), wanted, 1e-5)


@families
@devices
def test_given_features_are_the_images(family, device):
    """The same bits whether a forward encodes or is given what an encode found."""
    model, inputs, _ = draw(family, 1, device=device)
    taps = [0, model.config.text["num_hidden_layers"]]
    out, wanted = step(model, inputs, taps=taps)
    model.zero_grad()
    features, extra = model.encode("vision", inputs.pixels, inputs.grid_thw)
    again = model.forward(text_of(inputs), features=features, extra=extra, taps=taps)
    assert again.loss == out.loss
    same(again.hidden_states, out.hidden_states)
    np.testing.assert_array_equal(model.decode(inputs, features, extra), out.hidden_states[taps[1]])
    model.forward(text_of(inputs), features=features, extra=extra)
    model.encode_backward(*model.backward())
    same(grads_of(model), wanted)


@families
def test_slopes_of_features_and_hidden_states(family):
    """Finite differences in double precision, of a random loss of the hidden states."""
    model, inputs, rng = draw(family, 2, samples=2, device="ref", dtype="float64")
    coefficient = model.config.text.get("router_aux_loss_coef", 0.0)
    features, extra = model.encode("vision", inputs)
    assert features.dtype == np.float64
    weights = rng.standard_normal((inputs.n_tokens, features.shape[1]))

    def loss(features, extra):
        hidden = model.decode(inputs, features, extra, training=False)
        return (weights * hidden).sum() + coefficient * model._core.output(False, False)[1]
    model.decode(inputs, features, extra)
    dfeatures, dextra = model.backward(dhidden=weights)
    assert (dextra is None) == (extra is None)
    for which, gradient in enumerate((dfeatures, dextra)):
        if gradient is None:
            continue
        direction = rng.standard_normal(gradient.shape)
        wanted = (gradient * direction).sum()

        def at(h):
            moved = [features, extra]
            moved[which] = moved[which] + h * direction
            return loss(*moved)
        slope = slope_near(at, wanted)
        assert abs(slope - wanted) <= 1e-6 * np.linalg.norm(gradient) * np.linalg.norm(direction)


@families
def test_slopes_of_the_encoder(family):
    model, inputs, rng = draw(family, 3, samples=1, device="ref", dtype="float64")
    features, extra = model.encode("vision", inputs)
    dfeatures = rng.standard_normal(features.shape)
    dextra = None if extra is None else rng.standard_normal(extra.shape)
    model.encode_backward(dfeatures, dextra)
    name = "model.visual.blocks.0.norm1.weight"
    gradient, weight = np.array(model.grads[name]), model.parameters[name]
    direction, sums = rng.standard_normal(weight.shape), []
    for h in (1e-5, -2e-5):
        weight += h * direction
        f, e = model.encode("vision", inputs, training=False)
        sums.append((f * dfeatures).sum() + (0 if e is None else (e * dextra).sum()))
    slope = (sums[0] - sums[1]) / 2e-5
    assert abs(slope - gradient @ direction) <= 1e-5 * np.linalg.norm(gradient) * np.linalg.norm(
        direction)


def test_each_phase_keeps_its_own():
    """An encode between a decode and its backward changes nothing, nor the other way around."""
    model, inputs, rng = draw("dense", 4)
    other = pack(draw_samples(rng, model.config.values, 4))
    features, extra = model.encode("vision", inputs)
    hidden = model.decode(inputs, features, extra)
    d = rng.standard_normal(hidden.shape)
    wanted = model.backward(dhidden=d)
    model.encode_backward(*wanted)
    grads = grads_of(model)
    model.zero_grad()
    model.encode("vision", inputs)
    model.logprobs(orchvlm.Inputs(input_ids=[7] * 500, labels=[7] * 500), training=False)
    model.decode(inputs, features, extra)
    model.encode_backward(*wanted)
    if other.grid_thw is not None:
        model.encode("vision", other)
    for got, one in zip(model.backward(dhidden=d), wanted):
        np.testing.assert_array_equal(got, one)
    same(grads_of(model), grads)


# ---------------------------------------------------------------- slopes

@families
@devices
def test_a_loss_of_everything(family, device):
    """Slopes of log-probabilities, entropies, hidden states and logits add up."""
    model, inputs, rng = draw(family, 5, device=device)
    values = dict(model.config.values, text_config=dict(model.config.text))
    if model.config.sparse:  # the balance loss would count once per part
        values["text_config"]["router_aux_loss_coef"] = 0.0
        state = model.state_dict()
        model = orchvlm.Model(values, device=device, threads=1)
        model.load_state_dict(state)
    T, width, vocab = inputs.n_tokens, model.config.text["hidden_size"], values["text_config"][
        "vocab_size"]
    rows = rng.integers(0, T, 5)
    rows[1] = rows[0]  # twice
    slopes = {"dlogprobs": rng.standard_normal(T), "dentropy": rng.standard_normal(T),
              "dhidden": rng.standard_normal((T, width)),
              "dlogits": rng.standard_normal((5, vocab))}

    def grads(*names):
        model.zero_grad()
        model.logprobs(inputs, entropy=True)
        given = {name: slopes[name] for name in names}
        model.backward(**given, rows=rows if "dlogits" in names else None)
        return grads_of(model)
    whole, parts = grads(*slopes), [grads(name) for name in slopes]
    assert_close(whole, {n: sum(part[n] for part in parts) for n in whole}, 2e-5)
    assert all(any(g.any() for g in part.values()) for part in parts)
    empty = model.logprobs(inputs) and model.backward(
        dlogits=np.zeros((0, vocab)), rows=np.zeros(0, int))
    assert empty is None


@devices
def test_hidden_slopes_equal_those_of_logits(device):
    """dhidden = dlogits W, but for the head's own gradient."""
    model, inputs, rng = draw("dense", 6, device=device)
    if model.config.tied:
        config = dict(model.config.values, tie_word_embeddings=False)
        model = draw_model(1, config, threads=1, device=device)
    d = rng.standard_normal((inputs.n_tokens, model.config.text["vocab_size"])).astype("f4")
    model.forward(inputs)
    model.backward(dlogits=d, rows=np.arange(inputs.n_tokens))
    wanted = grads_of(model)
    model.zero_grad()
    model.forward(inputs)
    model.backward(dhidden=d @ np.array(model.parameters["lm_head.weight"]))
    got = grads_of(model)
    assert not got.pop("lm_head.weight").any() and wanted.pop("lm_head.weight").any()
    assert_close(got, wanted, 1e-5)


def test_a_forward_alone_changes_no_gradient():
    """Whatever it computes on the way for its backward."""
    model, inputs, _ = draw("seed", 7)
    _, wanted = step(model, inputs)
    model.forward(inputs)
    same(grads_of(model), wanted)
    model.zero_grad()
    model.backward()
    same(grads_of(model), wanted)
    model.freeze("lm_head.*" if not model.config.tied else "*embed_tokens*")
    _, frozen = step(model, inputs)
    assert_close(frozen, {n: wanted[n] for n in frozen}, 1e-6)
    assert len(frozen) == len(wanted) - 1


# ---------------------------------------------------------------- taps

@families
@devices
def test_taps(family, device):
    model, inputs, _ = draw(family, 8, device=device)
    depth, blocks = model.config.text["num_hidden_layers"], model.config.vision["depth"]
    out = model.forward(inputs, taps=range(depth + 1), vision_taps=[0, blocks, 0])
    assert list(out.hidden_states) == list(range(depth + 1))
    assert list(out.vision_states) == [0, blocks]
    patches, width = len(inputs.pixels), model.config.vision["hidden_size"]
    assert all(s.shape == (patches, width) for s in out.vision_states.values())
    eager = model.forward(inputs, training=False, taps=[depth, 1], vision_taps=[blocks])
    for entry in (1, depth):
        np.testing.assert_array_equal(eager.hidden_states[entry], out.hidden_states[entry])
    np.testing.assert_array_equal(eager.vision_states[blocks], out.vision_states[blocks])
    text = inputs.input_ids < IMAGE
    table = np.array(model.parameters["model.language_model.embed_tokens.weight"])
    np.testing.assert_array_equal(out.hidden_states[0][text], table[inputs.input_ids[text]])
    head = table if model.config.tied else np.array(model.parameters["lm_head.weight"])
    np.testing.assert_allclose(model.logits([0, 1]), out.hidden_states[depth][:2] @ head.T,
                               rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- refusals, threads, Ctrl-C

def test_bad_phases_are_refused():
    model, inputs, _ = draw("dense", 9)
    features, extra = model.encode("vision", inputs)
    text = orchvlm.Inputs(input_ids=[7, 8], labels=[7, 8])
    width, vocab = features.shape[1], model.config.text["vocab_size"]
    for call, words in (
            (lambda: model.encode("audio", inputs), "modality"),
            (lambda: model.encode("vision", text), "no images"),
            (lambda: model.encode("vision", inputs, inputs.grid_thw), "grid_thw"),
            (lambda: model.encode("vision", inputs.pixels, [[1, 1, 1]]), "rows"),
            (lambda: model.encode("vision", inputs, checkpoint="half"), "checkpoint"),
            (lambda: model.decode(inputs), "no features"),
            (lambda: model.decode(text, features, extra), "tokens wait"),
            (lambda: model.decode(inputs, features[:, 1:], extra), "features"),
            (lambda: model.decode(inputs, features, None if extra is not None else features[None]),
             "extra"),
            (lambda: model.decode(text, None, features[None]), "extra"),
            (lambda: model.forward(inputs, taps=[-1]), "taps"),
            (lambda: model.forward(inputs, taps=[99]), "taps"),
            (lambda: model.forward(text, vision_taps=[0]), "vision_taps"),
            (lambda: model.forward(inputs, vision_taps=[99]), "taps")):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="pixels"):
        model.encode("vision", inputs.pixels)
    model.encode("vision", inputs)
    with pytest.raises(ValueError, match="dfeatures"):
        model.encode_backward(features[1:])
    model.encode_backward(features)
    with pytest.raises(ValueError, match="once"):
        model.encode_backward(features)
    for prepare, options, words in (
            (model.decode, {}, "no loss"), (model.decode, {"dlogprobs": [0, 0]}, "decode"),
            (model.decode, {"dhidden": np.zeros((3, width))}, "dhidden"),
            (model.decode, {"dhidden": np.zeros((2, width + 1))}, "dhidden"),
            (model.decode, {"dlogits": np.zeros((1, vocab))}, "rows"),
            (model.decode, {"dlogits": np.zeros((1, vocab)), "rows": [2]}, "rows"),
            (model.decode, {"dlogits": np.zeros((1, vocab)), "rows": [0, 1]}, "dlogits"),
            (model.forward, {"rows": [0]}, "dlogits")):
        prepare(text)
        with pytest.raises(ValueError, match=words):
            model.backward(**options)
    model.decode(text, training=False)
    with pytest.raises(ValueError, match="training"):
        model.backward(dhidden=np.zeros((2, width)))
    model.forward(inputs)  # its encoder's activations go
    model.encode("vision", inputs)
    with pytest.raises(ValueError, match="once"):
        model.backward()


def test_a_frozen_encoder_has_no_backward_to_run():
    model, inputs, _ = draw("dense", 10)
    model.freeze("model.visual.*")
    features, extra = model.encode("vision", inputs)
    model.encode_backward(features, extra)
    assert not any(name.startswith("model.visual") for name in model.grads)


def test_no_features_at_all():
    model, _, _ = draw("dense", 11)
    text = orchvlm.Inputs(input_ids=[7, 8, 9])
    width = model.config.text["hidden_size"]
    layers = len(model.config.vision["deepstack_visual_indexes"])
    wanted = model.decode(text)
    assert model.backward(dhidden=wanted) is None
    none = np.zeros((0, width)), np.zeros((layers, 0, width)) if layers else None
    np.testing.assert_array_equal(model.decode(text, *none), wanted)
    dfeatures, dextra = model.backward(dhidden=wanted)
    assert dfeatures.shape == (0, width) and (dextra is None) == (not layers)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@devices
def test_bfloat16_phases_are_near(device, dtype):
    exact, inputs, rng = draw("seed", 12)
    model, _, _ = draw("seed", 12, device=device, dtype=dtype)
    taps = [0, exact.config.text["num_hidden_layers"]]
    features, extra = exact.encode("vision", inputs)
    wanted = exact.decode(inputs, features, extra)
    d = rng.standard_normal(wanted.shape)
    slope, _ = exact.backward(dhidden=d)
    ours, _ = model.encode("vision", inputs)
    hidden = model.decode(inputs, ours)
    got, _ = model.backward(dhidden=d)
    tolerance = 0.05 if dtype == "bfloat16" else 1e-4
    for one, two in ((ours, features), (hidden, wanted), (got, slope)):
        assert one.dtype == np.float32
        assert np.linalg.norm(one - two) <= tolerance * np.linalg.norm(two)
    states = model.forward(inputs, taps=taps).hidden_states
    np.testing.assert_array_equal(states[taps[1]], hidden)


def busy():
    """A model at work in another thread."""
    model = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=0, threads=1)
    ids = np.arange(MANY) % 250
    return model, orchvlm.Inputs(input_ids=ids, labels=ids)


@pytest.mark.parametrize("what", ("encode", "decode", "backward", "profile", "tensor"))
def test_a_busy_model_refuses(what, tmp_path):
    model, inputs = busy()
    image = np.zeros((16, 588), np.uint8), [[1, 4, 4]]
    short = orchvlm.Inputs(input_ids=[5, 6])

    def profile():
        with orchvlm.profile(tmp_path / "trace.json"):
            pass
    call = {"encode": lambda: model.encode("vision", *image),
            "decode": lambda: model.decode(short), "profile": profile,
            "backward": lambda: model.backward(dhidden=np.zeros((0, 192))),
            "tensor": lambda: model.tensor("lm_head.weight" if not model.config.tied else
                                           "model.language_model.norm.weight").__dlpack__()}[what]
    refused = []

    def attempt(function):
        try:
            function()
        except RuntimeError as error:
            refused.append(str(error))
        except ValueError:  # a backward before the forward had begun
            pass
    thread = threading.Thread(target=attempt,
                              args=(lambda: model.forward(inputs, training=False),))
    thread.start()
    while thread.is_alive() and not refused:  # whichever of the two comes second
        attempt(call)
    thread.join()
    assert refused and "busy" in refused[0]
    model.decode(short)


@pytest.mark.skipif(not hasattr(signal, "raise_signal") or os.name != "posix",
                    reason="needs POSIX signals")
@pytest.mark.parametrize("what", ("encode", "decode", "encode_backward", "backward"))
def test_control_c_stops_a_phase(what):
    model, inputs = busy()
    pixels, grid = np.zeros((MANY // 144 * 144, 588), np.uint8), [[1, 36, MANY // 144 * 4]]
    features = None
    if what == "encode_backward":
        features, _ = model.encode("vision", pixels, grid)
    elif what == "backward":
        slopes = model.decode(inputs)
    call = {"encode": lambda: model.encode("vision", pixels, grid),
            "decode": lambda: model.decode(inputs),
            "encode_backward": lambda: model.encode_backward(features),
            "backward": lambda: model.backward(dhidden=slopes)}[what]
    timer = threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        call()
        time.sleep(5)  # a machine that was done before: the signal comes now
    timer.join()
    model.zero_grad()
    short = orchvlm.Inputs(input_ids=[5, 6, 7], labels=[5, 6, 7])
    fresh, _ = busy()
    same(step(fresh, short)[1], step(model, short)[1])


# ---------------------------------------------------------------- DLPack

def test_tensors_share_their_memory():
    model, inputs, _ = draw("seed", 13)
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    weight = np.from_dlpack(model.tensor(name))
    assert weight.shape == model.parameters[name].shape and weight.dtype == np.float32
    weight[0, 0] = 5.0
    assert model.parameters[name][0, 0] == 5.0
    step(model, inputs)
    grad = np.from_dlpack(model.tensor(name, grad=True))
    np.testing.assert_array_equal(grad, model.grads[name])
    with pytest.raises(RuntimeError, match="in use"):
        model.freeze("*")
    del grad
    capsule = model.tensor(name, grad=True).__dlpack__()  # dropped without a taker
    del capsule
    held = model.tensor(name, grad=True)
    model.freeze("*")
    with pytest.raises(BufferError, match="gone"):
        held.__dlpack__()
    with pytest.raises(KeyError, match="not trained"):
        model.tensor(name, grad=True)
    with pytest.raises(KeyError, match="nothing"):
        model.tensor("nothing")
    wanted, shape = float(weight[1, 1]), weight.shape
    del model
    gc.collect()
    assert weight[1, 1] == wanted and weight.shape == shape  # the memory outlives the name


def test_what_dlpack_cannot_have_is_refused():
    model, _, _ = draw("dense", 14)
    tensor = model.tensor("model.language_model.norm.weight")
    assert tensor.__dlpack_device__() == (1, 0) and "float32" in repr(tensor)
    for options in ({"copy": True}, {"stream": 3}, {"dl_device": (2, 0)}):
        with pytest.raises(BufferError):
            tensor.__dlpack__(**options)
    far, _, _ = draw("dense", 14, device="async")
    with pytest.raises(BufferError, match="async"):
        far.tensor("model.language_model.norm.weight").__dlpack__()


def test_what_is_written_into_a_copy_is_not_lost_in_silence():
    """Weights in bfloat16 come as copies; gradients, in float32, where they lie."""
    model, inputs, _ = draw("dense", 15, dtype="bfloat16")
    name = "model.language_model.norm.weight"
    with pytest.raises(ValueError, match="read-only"):
        model.parameters[name][0] = 5.0
    model.forward(inputs)
    model.backward()
    model.grads[name][0] = 5.0
    assert model.grads[name][0] == 5.0
    state = model.state_dict()
    state[name][...] = 2.0
    model.load_state_dict(state)
    assert (model.parameters[name] == 2).all()


def test_bfloat16_reaches_torch():
    torch = pytest.importorskip("torch", reason="bfloat16 needs a library that has it")
    model, inputs, _ = draw("dense", 15, dtype="bfloat16")
    for name in ("model.language_model.embed_tokens.weight", "model.visual.blocks.0.attn.qkv.bias"):
        tensor = torch.from_dlpack(model.tensor(name))
        assert tensor.dtype == torch.bfloat16
        np.testing.assert_array_equal(tensor.float().numpy(), model.parameters[name])
        tensor[...] = 0.5
        assert (model.parameters[name] == 0.5).all()
    step(model, inputs)
    grad = torch.from_dlpack(model.tensor(name, grad=True))
    assert grad.dtype == torch.float32 and model.tensor(name, grad=True).dtype == "float32"
    np.testing.assert_array_equal(grad.numpy(), model.grads[name])


# ---------------------------------------------------------------- traces

@devices
def test_a_trace_shows_the_step(device, tmp_path):
    model, inputs, _ = draw("softmax experts", 16, device=device)
    optimizer = orchvlm.AdamW(model, 1e-3)
    _, wanted = step(model, inputs)
    path = tmp_path / "trace.json"
    with orchvlm.profile(path):
        _, got = step(model, inputs)
        optimizer.step()
        other = orchvlm.Model(model.config, threads=1, device=device)  # made meanwhile
        other.decode(orchvlm.Inputs(input_ids=[7, 8]), training=False)
        with pytest.raises(RuntimeError, match="another profile"):
            with orchvlm.profile(tmp_path / "second.json"):
                pass
    same(got, wanted)
    model.forward(inputs)  # not in it any more
    with open(path) as file:
        events = json.load(file)["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = [event for event in events if event["ph"] == "X"]
    assert sorted(names.values()) == sorted([repr(model), repr(other)])
    mine = [e for e in spans if names[e["tid"]] == repr(model) and e["tid"] == spans[0]["tid"]]
    phases = [e["name"] for e in mine if e["cat"] == "phase"]
    assert phases == ["encode vision", "decode", "loss", "loss backward", "decode backward",
                      "encode vision backward", "optimizer"]
    depth = model.config.text["num_hidden_layers"]
    for name in ("decoder layer", "decoder layer backward"):
        assert {f"{name} {i}" for i in range(depth)} <= {e["name"] for e in mine}
    assert {"attention fwd", "attention bwd", "head fwd", "adamw fwd"} <= {
        e["name"] for e in mine if e["cat"] == "op"}
    assert all(e["dur"] >= 0 and e["ts"] >= 0 for e in spans)
    assert [e["ts"] for e in mine] == sorted(e["ts"] for e in mine)
    check_nesting(mine)


def check_nesting(spans):
    """Every span lies in or beside every other; phases hold layers, and those operations."""
    rank, open_spans, slack = {"phase": 0, "layer": 1, "op": 2}, [], 1e-3
    for span in spans:
        while open_spans and open_spans[-1]["ts"] + open_spans[-1]["dur"] <= span["ts"] + slack:
            open_spans.pop()
        if open_spans:
            outer = open_spans[-1]
            assert span["ts"] + span["dur"] <= outer["ts"] + outer["dur"] + slack
            assert rank[outer["cat"]] < rank[span["cat"]], (outer, span)
        else:
            assert span["cat"] == "phase", span
        open_spans.append(span)


def test_a_trace_of_generation(tmp_path):
    model, inputs, _ = draw("dense", 18)
    with orchvlm.profile(tmp_path / "trace.json"):
        model.generate(inputs, 2, stop=[IMAGE, VIDEO])
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    check_nesting(spans)
    assert [e["name"] for e in spans if e["cat"] == "phase"][:3] == [
        "encode vision", "decode", "logits"]


def test_a_trace_of_what_went_wrong(tmp_path):
    model, _, _ = draw("dense", 17)
    with pytest.raises(ValueError, match="input_ids"):
        with orchvlm.profile(tmp_path / "trace.json"):
            model.forward(orchvlm.Inputs(input_ids=[10**6]))
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"] == []
    for path, kind in ((tmp_path / "no" / "where.json", OSError), (3, TypeError)):
        with pytest.raises(kind):
            with orchvlm.profile(path):
                pass
    with orchvlm.profile(tmp_path / "trace.json"):  # none is left on
        pass
