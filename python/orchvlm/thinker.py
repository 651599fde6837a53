"""Qwen3-Omni's thinker on the hub: its configuration inside a whole model's, and the names and
layouts of its weights in files."""
import re

#: Ours, and the file's; in this order.
_NAMES = ((r"^model\.visual\.deepstack_merger_list\.", "visual.merger_list."),
          (r"^model\.visual\.", "visual."), (r"^model\.audio_tower\.", "audio_tower."),
          (r"^model\.language_model\.", "model."))
_MERGER = ((".norm.", ".ln_q."), (".linear_fc1.", ".mlp.0."), (".linear_fc2.", ".mlp.2."))
_OTHER_PARTS = ("talker.", "code2wav.")


def thinker_values(values):
    """The thinker's configuration: itself, or out of a whole Qwen3-Omni's."""
    inner = values.get("thinker_config")
    if values.get("model_type") != "qwen3_omni_moe" or not isinstance(inner, dict):
        return values
    return {**inner, "model_type": "qwen3_omni_moe_thinker"}


def file_name(name):
    """A parameter's name in files, experts aside."""
    for pattern, other in _NAMES:
        name = re.sub(pattern, other, name)
    if name.startswith(("visual.merger.", "visual.merger_list.")):
        for ours, theirs in _MERGER:
            name = name.replace(ours, theirs)
    return name


def file_parts(name, shape):
    """Where a parameter lies in files: [(name, index)].

    With an index it is a part of the parameter, and lies transposed: files hold a matrix [out, in]
    per expert and product, the core [experts, in, out] with gate and up side by side.
    """
    stem, _, last = file_name(name).rpartition(".")
    if last not in ("gate_up_proj", "down_proj") or not stem.endswith("mlp.experts"):
        return [(file_name(name), None)]
    if last == "down_proj":
        return [(f"{stem}.{e}.down_proj.weight", (e,)) for e in range(shape[0])]
    half = shape[2] // 2
    return [(f"{stem}.{e}.{word}_proj.weight", (e, slice(None), part))
            for e in range(shape[0])
            for word, part in (("gate", slice(0, half)), ("up", slice(half, None)))]


def plain_name(name):
    """A stored tensor's name without the prefix that it has in a whole Qwen3-Omni; None for the
    parts that speak."""
    return None if name.startswith(_OTHER_PARTS) else name.removeprefix("thinker.")
