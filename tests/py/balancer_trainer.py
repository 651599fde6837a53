"""The recipe of `balance_tower` inside the Trainer of `transformers`, on every rank."""
import os
import tempfile

import numpy as np
import torch
from transformers import Trainer, TrainingArguments

from balancer_checks import everyone, near
from model_cases import draw_config
from oracle_cases import build, draw_batch
from orchvlm.torch import balance_tower


def in_a_trainer(rank, size, seed):
    """Some steps of training end at the same weights, balanced and not."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
                   "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    config = draw_config(np.random.default_rng(seed), sparse=False)
    samples, more = [], 0
    while len(samples) < 4 * size:  # every fourth one without a picture
        batch = draw_batch(np.random.default_rng([*seed, more]), config, samples=1)[1]
        more += 1
        pictures = {"pixel_values", "pixel_values_videos"} & set(batch)
        if (batch["labels"][:, 1:] != -100).any() and bool(pictures) == (len(samples) % 4 != 0):
            samples.append(batch)
    ends = []
    for balanced in (False, True):
        model = build(config, np.random.default_rng(seed))
        args = TrainingArguments(
            tempfile.mkdtemp(), use_cpu=True, per_device_train_batch_size=1, max_steps=6, seed=1,
            gradient_accumulation_steps=2, optim="sgd", learning_rate=0.05, report_to=[],
            save_strategy="no", logging_steps=1, disable_tqdm=True, remove_unused_columns=False)
        trainer = Trainer(model, args, train_dataset=samples, data_collator=lambda few: few[0])
        if balanced:
            balancer = balance_tower(trainer.model, gpus_per_node=2)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        ends.append((losses, {name: p.detach().clone() for name, p in model.named_parameters()}))
    (plain, wanted), (got, weights) = ends
    assert len(got) == 6 and np.allclose(got, plain, rtol=1e-4), (got, plain)
    start = dict(build(config, np.random.default_rng(seed)).named_parameters())
    moved = 0
    for name, weight in weights.items():
        near(weight, wanted[name], 1e-4)
        moved += not torch.equal(weight, start[name])
    assert moved >= 0.8 * len(weights)  # the slope of some may be below what a float32 holds
    assert len(set(everyone(balancer.last_plan.digest))) == 1
