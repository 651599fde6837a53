"""What torch and `transformers` made of tiny models, kept in files: the same comparison as in
test_oracle.py where neither is installed."""
import json
import struct
from pathlib import Path

import numpy as np
import pytest

import orchvlm
from model_cases import grads_of
from oracle_cases import compare_grads
from orchvlm.checkpoint import SafeTensors

FILES = sorted((Path(__file__).parents[1] / "fixtures").glob("*.safetensors"))


def read(path):
    """(configuration, {name: array})"""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    file = SafeTensors(path)
    return (json.loads(json.loads(raw[8:8 + length])["__metadata__"]["config"]),
            {name: file.read(name) for name in file.tensors})


def part(tensors, prefix):
    return {n[len(prefix):]: a for n, a in tensors.items() if n.startswith(prefix)}


def test_the_fixtures_are_here_and_small():
    assert len(FILES) == 4 and sum(f.stat().st_size for f in FILES) <= 2 << 20


@pytest.mark.parametrize("device", ("cpu", "async", "ref"))
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_logits_loss_and_gradients(path, device):
    config, tensors = read(path)
    model = orchvlm.Model(config, device=device)
    model.load_state_dict(part(tensors, "weight/"))
    inputs = orchvlm.Inputs(**part(tensors, "input/"))
    out = model.forward(inputs)
    logits, loss = tensors["logits"], float(tensors["loss"][0])
    got = model.logits(np.arange(inputs.n_tokens))
    assert np.linalg.norm(got - logits) <= 1e-5 * np.linalg.norm(logits)
    assert abs(out.loss - loss) <= 1e-6 * max(1.0, loss)
    model.backward()
    ours, wanted = grads_of(model), part(tensors, "grad/")
    assert ours.keys() == wanted.keys()
    compare_grads(ours, wanted)
