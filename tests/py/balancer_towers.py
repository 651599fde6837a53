"""Balanced vision towers of `transformers` against the same towers unbalanced, on every rank."""
import numpy as np
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLConfig,
                          Qwen2VLForConditionalGeneration)
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

import orchvlm
from balancer_checks import Merger, draw_merging, loss_of, near, summed_gradients
from model_cases import IDS, draw_config
from oracle_cases import build, draw_batch
from orchvlm.torch import Balancer, balance_tower


def draw_tower(rng):
    """One of three families, with random sizes; returns it and the width of a patch."""
    heads, patch, frames = int(rng.integers(1, 4)), int(rng.integers(2, 5)), int(rng.integers(1, 3))
    sizes = dict(depth=int(rng.integers(2, 4)), num_heads=heads, in_channels=3, patch_size=patch,
                 spatial_merge_size=2, temporal_patch_size=frames,
                 attn_implementation=str(rng.choice(["eager", "sdpa"])))
    width = heads * 4 * int(rng.integers(2, 5))
    out, middle = int(rng.integers(9, 30)), int(rng.integers(9, 40))
    kind = int(rng.integers(0, 3))
    if kind == 0:
        tower = qwen3.Qwen3VLVisionModel(qwen3.Qwen3VLVisionConfig(
            hidden_size=width, out_hidden_size=out, intermediate_size=middle,
            num_position_embeddings=int(rng.integers(3, 8))**2,
            deepstack_visual_indexes=[0, 1][:int(rng.integers(0, 3))], **sizes))
    elif kind == 1:
        tower = qwen2.Qwen2VisionTransformerPretrainedModel(qwen2.Qwen2VLVisionConfig(
            embed_dim=width, hidden_size=out, mlp_ratio=2, **sizes))
    else:
        tower = qwen2_5.Qwen2_5_VisionTransformerPretrainedModel(qwen2_5.Qwen2_5_VLVisionConfig(
            hidden_size=width, out_hidden_size=out, intermediate_size=middle,
            window_size=4 * patch, fullatt_block_indexes=[1], **sizes))
    return tower.double().train(), 3 * frames * patch**2


def draw_pictures(rng, width, none):
    """(pixels, grid) of images and clips of all sizes."""
    n = 0 if none else int(rng.integers(0, 6))
    grid = np.stack([rng.integers(1, 3, n), 2 * rng.integers(1, 5, n), 2 * rng.integers(1, 5, n)],
                    axis=1)
    return (torch.from_numpy(rng.standard_normal((int(grid.prod(1).sum()), width))),
            torch.from_numpy(grid))


def outputs_of(out):
    return [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]


def towers(rank, size, seed):
    """Features, DeepStack features, losses and gradients equal those of the tower alone."""
    shared, rng = np.random.default_rng(seed), np.random.default_rng([*seed, rank])
    for step in range(6):
        torch.manual_seed(seed[0] + step)
        tower, width = draw_tower(shared)
        balancer = Balancer(tower, cost=orchvlm.BatchCost(linear=1.0, quadratic=0.01))
        # The last rank never has a picture; once only rank 0 has, so that some rank gets a blank.
        pixels, grid = draw_pictures(rng, width, none=rank == size - 1 > 0 or step == 2 and rank)
        patches = grid.prod(1)
        plan = balancer.plan(patches, out_lengths=patches // 4,
                             squares=grid[:, 0] * grid[:, 1:].prod(1)**2)
        x = balancer.apply(pixels, blank=torch.zeros(4, width, dtype=torch.float64))
        at = balancer.apply(grid, rows="item", blank=torch.tensor([[1, 2, 2]]))
        assert plan.blank == (len(plan.here) == 0) and len(x) == max(4, at.prod(1).sum())
        got = balancer.restore(outputs_of(tower(x, grid_thw=at)))
        weights = [torch.from_numpy(rng.standard_normal(y.shape)) for y in got]

        wanted = outputs_of(tower(pixels, grid_thw=grid)) if len(grid) else []
        for y, want in zip(got, wanted, strict=len(grid) > 0):
            near(y.detach(), want.detach(), 1e-10)
        loss = loss_of(wanted, weights) if len(grid) else torch.zeros(())
        if len(grid):
            loss.backward()
        reference = summed_gradients(tower)
        balanced = loss_of(got, weights)
        assert abs(float(balanced) - float(loss)) <= 1e-9 * abs(float(loss)) + 1e-12
        balancer.anchor(balanced).backward()
        for name, gradient in summed_gradients(tower).items():
            near(gradient, reference[name], 1e-9)


def in_data_parallel(rank, size, seed):
    """Inside DistributedDataParallel, over steps of an optimizer; a rank has nothing, ever."""
    rng = np.random.default_rng([*seed, rank])
    plain, module = Merger(seed[0]), Merger(seed[0])
    wrapped = DistributedDataParallel(module)
    balancer = Balancer(wrapped)
    slow, fast = (torch.optim.SGD(m.parameters(), lr=1e-3) for m in (plain, module))
    for _ in range(4):
        lengths, x, scale, weights = draw_merging(rng, rank, size, none=[size - 1] if size > 1
                                                  else [])
        loss_of(plain(x, scale, lengths), weights).backward()
        gradients = summed_gradients(plain)
        for name, p in plain.named_parameters():
            p.grad = gradients[name] / size  # the mean over ranks, as the wrapper takes
        slow.step()
        slow.zero_grad()

        balancer.plan(lengths, out_lengths=lengths // 4)
        loss = balancer.anchor(loss_of(balancer(x, scale, lengths), weights))
        loss.backward()
        fast.step()
        fast.zero_grad()
    for p, want in zip(module.parameters(), plain.parameters()):
        near(p.detach(), want.detach(), 1e-9)


def draw_older_model(config, rng, seed):
    """A Qwen2.5-VL or Qwen2-VL that takes the images of a Qwen3-VL of `config`."""
    vision = config["vision_config"]
    text = {"vocab_size": config["text_config"]["vocab_size"], "hidden_size": 24,
            "intermediate_size": int(rng.integers(9, 40)), "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}}
    sizes = {"depth": 2, "num_heads": 2, "patch_size": vision["patch_size"],
             "temporal_patch_size": vision["temporal_patch_size"], "spatial_merge_size": 2}
    torch.manual_seed(seed)
    if rng.random() < 0.5:
        return Qwen2VLForConditionalGeneration(Qwen2VLConfig(
            text_config=text, vision_config=sizes | dict(embed_dim=16, hidden_size=24, mlp_ratio=2),
            **IDS))
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=text, vision_config=sizes | dict(
            hidden_size=16, out_hidden_size=24, intermediate_size=20, fullatt_block_indexes=[1],
            window_size=4 * vision["patch_size"]), **IDS))


def draw_model_and_batch(seed, rank, size, step):
    """The same model on all ranks, each rank's own batch; the last one never has a picture."""
    rng = np.random.default_rng([*seed, step])
    config = draw_config(rng, sparse=False)
    model = build(config, rng) if step < 3 else draw_older_model(config, rng, seed[0] + step)
    for more in range(200):
        batch = draw_batch(np.random.default_rng([*seed, step, rank, more]), config, samples=2)[1]
        kinds = {"pixel_values", "pixel_values_videos"} & set(batch)
        # Some step has no picture at all, some no video anywhere.
        if (not kinds if rank == size - 1 > 0 or step == 1 else
                kinds <= {"pixel_values"} if step > 1 else True):
            break
    for name in ("pixel_values", "pixel_values_videos"):
        if name in batch:
            batch[name] = batch[name].double()
    return model.double().train(), batch, batch.pop("labels")


def loss_from(logits, labels):
    """A sum over the global batch, divided by what all ranks count together."""
    targets = (labels[:, 1:] != -100).sum()
    dist.all_reduce(targets)
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / targets.clamp(1)


def whole_models(rank, size, seed):
    """A Qwen3-VL with a balanced tower: images, clips, text; each here and not there."""
    for step in range(5):
        model, batch, labels = draw_model_and_batch(seed, rank, size, step)
        wanted = model(**batch).logits
        loss = loss_from(wanted, labels)
        loss.backward()
        reference = summed_gradients(model)

        balancer = balance_tower(model, gpus_per_node=2)
        got = model(**batch).logits
        near(got.detach(), wanted.detach(), 1e-9)
        balanced = loss_from(got, labels)
        near(balanced.detach(), loss.detach(), 1e-9)
        balanced.backward()
        for name, gradient in summed_gradients(model).items():
            near(gradient, reference[name], 1e-8)
        assert balancer.last_plan.report().imbalance_after >= 1
        model.eval()
        with torch.no_grad():
            if rank == 0:  # alone
                near(model(**batch).logits, wanted.detach(), 1e-9)


def whole_models_that_fail(rank, size, seed):
    """An error anywhere before the decoder of one rank raises on all, naming it; then it works."""
    drawn = (draw_model_and_batch(seed, 0, size, step) for step in range(2, 99))
    model, batch, _ = next(one for one in drawn if "image_grid_thw" in one[1])
    bad, tower, merger = seed[0] % size, model.model.visual, model.model.visual.merger
    balancer = balance_tower(model)

    def refuses(*words, **changed):
        try:
            model(**(batch | changed if rank == bad else batch))
        except Exception as error:
            words = words if rank == bad else (*words, f"rank {bad} of the group refused")
            assert rank == bad or type(error) is orchvlm.CommError, repr(error)
            assert all(word in str(error) for word in words), (words, repr(error))
        else:
            raise AssertionError(f"{words}: nothing was raised")
    grid = batch["image_grid_thw"]
    refuses("index 2 is out of bounds", image_grid_thw=grid[:, :2])
    refuses("mage features", pixel_values=batch["pixel_values"].repeat(2, 1),
            image_grid_thw=grid.repeat(2, 1))  # more than the text has places for
    refuses("NoneType", image_grid_thw=None)
    hook = merger.register_forward_pre_hook(lambda *_: 1 / 0) if rank == bad else None
    refuses("division by zero")
    if hook is not None:
        hook.remove()
    balancer.cost = lambda lengths: 1 / 0 if rank == bad else lengths
    refuses("division by zero")
    balancer.cost = lambda lengths: lengths
    assert torch.isfinite(model(**batch).logits).all()


def whole_models_in_data_parallel(rank, size, seed):
    """The same inside DistributedDataParallel, whichever way it looks for unused parameters."""
    for step in range(4):
        model, batch, labels = draw_model_and_batch(seed, rank, size, step)
        loss_from(model(**batch).logits, labels).backward()
        reference = summed_gradients(model)
        balance_tower(model)
        wrapped = DistributedDataParallel(model, find_unused_parameters=step % 2 == 0)
        loss_from(wrapped(**batch).logits, labels).backward()
        for name, p in model.named_parameters():
            near(torch.zeros_like(p) if p.grad is None else p.grad * size, reference[name], 1e-8)


def whole_models_sharded(rank, size, seed):
    """The same with weights sharded over the ranks and gathered layer by layer."""
    mesh = init_device_mesh("cpu", (size,))
    for step in range(3):
        model, batch, labels = draw_model_and_batch(seed, rank, size, step)
        loss_from(model(**batch).logits, labels).backward()
        reference = summed_gradients(model)
        balance_tower(model)
        tower, decoder = model.model.visual, model.model.language_model
        for part in (*tower.blocks, *decoder.layers, tower, model):
            fully_shard(part, mesh=mesh)
        loss_from(model(**batch).logits, labels).backward()
        for name, p in model.named_parameters():
            near(torch.zeros(p.shape, dtype=p.dtype) if p.grad is None else
                 p.grad.full_tensor() * size, reference[name], 1e-8)
