"""Seed1.5-VL from parts of `transformers`: ERNIE-4.5-VL's vision tower, AvgPool2d and two linear
layers, GLM-4.5's decoder (sigmoid routing in groups with a correction, shared experts)."""
import numpy as np
import torch
from transformers import Ernie4_5_VLMoeConfig, Glm4MoeConfig, Glm4MoeForCausalLM
from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import (
    Ernie4_5_VLMoeVisionTransformerPretrainedModel)

VISUAL, LANGUAGE = "model.visual.", "model.language_model."


def _tower(v):
    config = Ernie4_5_VLMoeConfig(vision_config={
        "depth": v["depth"], "hidden_size": v["hidden_size"], "num_heads": v["num_heads"],
        "hidden_act": v["hidden_act"], "intermediate_size": v["intermediate_size"],
        "in_channels": 3, "patch_size": v["patch_size"], "spatial_merge_size": 2,
        "rms_norm_eps": 1e-6}).vision_config
    config._attn_implementation = "eager"
    return Ernie4_5_VLMoeVisionTransformerPretrainedModel(config).float()


def _decoder(t, tied):
    shared = t.get("shared_expert_intermediate_size") or 0
    sparse = bool(t.get("num_experts"))
    config = Glm4MoeConfig(
        **{key: t[key] for key in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
            "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "attention_bias",
            "hidden_act", "use_qk_norm")},
        rope_parameters={"partial_rotary_factor": 1.0, **t["rope_parameters"]},
        tie_word_embeddings=tied, n_routed_experts=t.get("num_experts") or 2,
        num_experts_per_tok=t.get("num_experts_per_tok", 1), n_group=t.get("n_group", 1),
        topk_group=t.get("topk_group", 1), norm_topk_prob=t.get("norm_topk_prob", True),
        moe_intermediate_size=t.get("moe_intermediate_size", 4),
        n_shared_experts=shared // t["moe_intermediate_size"] if sparse else 1,
        routed_scaling_factor=t.get("routed_scaling_factor", 1.0),
        first_k_dense_replace=t["first_k_dense_replace"] if sparse else t["num_hidden_layers"],
        pad_token_id=None)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return Glm4MoeForCausalLM(config).float()


class SeedOracle:
    """loss_and_logits(inputs); parameters by this library's names."""

    def __init__(self, config, state):
        self.tower = _tower(config["vision_config"])
        self.decoder = _decoder(config["text_config"], config["tie_word_embeddings"])
        v, width = config["vision_config"], config["text_config"]["hidden_size"]
        self.adapter = torch.nn.Sequential(
            torch.nn.Linear(v["hidden_size"], v["adapter_hidden_size"]), torch.nn.GELU(),
            torch.nn.Linear(v["adapter_hidden_size"], width))
        self.visual = (config["image_token_id"], config["video_token_id"])
        self.shapes = {name: array.shape for name, array in state.items()}
        for name, array in state.items():
            there = self._find(name)
            with torch.no_grad():
                there.copy_(torch.from_numpy(self._turned(name, array)).reshape(there.shape))

    def _find(self, name):
        if name.startswith(VISUAL + "merger."):
            part, kind = name[len(VISUAL + "merger."):].split(".")
            return getattr(self.adapter[{"linear_fc1": 0, "linear_fc2": 2}[part]], kind)
        if name.startswith(VISUAL):
            module, rest = self.tower, name[len(VISUAL):].replace("linear_fc", "fc")
        else:
            module, rest = self.decoder, name.replace(LANGUAGE, "model.")
        return {**dict(module.named_parameters()), **dict(module.named_buffers())}[rest]

    @staticmethod
    def _turned(name, array):
        turn = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
        return np.ascontiguousarray(array.transpose(0, 2, 1) if turn else array)

    def gradient(self, name):
        found = self._find(name).grad
        if found is None:
            return np.zeros(self.shapes[name], np.float32)
        shape = self.shapes[name]
        if len(shape) == 3:  # experts
            return found.numpy().transpose(0, 2, 1)
        return found.numpy().reshape(shape)

    def _features(self, inputs):
        if inputs.grid_thw is None:
            return torch.zeros(0, self.adapter[2].out_features)
        grid = torch.from_numpy(inputs.grid_thw.astype(np.int64))
        hidden = self.tower(torch.from_numpy(inputs.pixels.copy()), grid).last_hidden_state
        pooled, at = [], 0
        for t, h, w in grid.tolist():
            blocks = hidden[at:at + t * h * w].view(t, h // 2, w // 2, 2, 2, -1)
            image = blocks.permute(0, 5, 1, 3, 2, 4).reshape(t, -1, h, w)
            pooled.append(torch.nn.AvgPool2d(2)(image).permute(0, 2, 3, 1).flatten(0, 2))
            at += t * h * w
        return self.adapter(torch.cat(pooled))

    def loss_and_logits(self, inputs):
        features, at, logits, loss = self._features(inputs), 0, [], 0.0
        for first, last in zip(inputs.cu_seqlens, inputs.cu_seqlens[1:]):
            ids = torch.from_numpy(inputs.input_ids[first:last].astype(np.int64))
            spots = torch.isin(ids, torch.tensor(self.visual))
            embedded = self.decoder.model.embed_tokens(ids).clone()
            embedded[spots] = features[at:at + int(spots.sum())]
            at += int(spots.sum())
            position = torch.from_numpy(inputs.position_ids[:1, first:last].astype(np.int64))
            out = self.decoder(inputs_embeds=embedded[None], position_ids=position,
                               attention_mask=torch.ones_like(position), use_cache=False).logits[0]
            labels = torch.from_numpy(inputs.labels[first:last].astype(np.int64))
            loss = loss + torch.nn.functional.cross_entropy(out[:-1], labels[1:],
                                                            reduction="sum", ignore_index=-100)
            logits.append(out)
        return loss / max(1, inputs.n_target_tokens), torch.cat(logits)

    def routing_margin(self, inputs):
        """Smallest distance between what any choice takes and what it leaves."""
        margins = [1.0]
        for module in self.decoder.modules():
            if type(module).__name__ == "Glm4MoeTopkRouter":
                module.register_forward_hook(lambda m, i, o: margins.extend(_margins(m, i[0])))
        with torch.no_grad():
            self.loss_and_logits(inputs)
        for module in self.decoder.modules():
            module._forward_hooks.clear()
        return min(margins)


def _gap(scores, k):
    ordered = scores.sort(dim=-1, descending=True).values
    return 1.0 if k == scores.shape[-1] else float((ordered[:, k - 1] - ordered[:, k]).min())


def _margins(router, x):
    x = x.reshape(-1, router.hidden_dim).float()
    score = (x @ router.weight.T).sigmoid() + router.e_score_correction_bias
    groups = score.view(len(score), router.num_group, -1)
    sums = groups.topk(2, dim=-1).values.sum(dim=-1)
    chosen = torch.zeros_like(sums).scatter_(1, sums.topk(router.topk_group).indices, 1).bool()
    open_to = score.masked_fill(~chosen.repeat_interleave(groups.shape[-1], 1), -1e9)
    return _gap(sums, router.topk_group), _gap(open_to, router.top_k)
