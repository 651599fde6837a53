"""What ``orchvlm init`` does."""
import copy
from pathlib import Path

from .building import picture_rule
from .cli import CommandError
from .configs import ModelConfig, preset
from .model import Model
from .recipes import FIRST_STD
from .run_keys import toml_value
from .sources import texts

_VOCABULARY = 4096
# Keys of a configuration, and the special token that each is the number of.
_IDS = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
        "audio_token_id": "<|audio_pad|>", "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>", "audio_start_token_id": "<|audio_start|>",
        "audio_end_token_id": "<|audio_end|>"}


def _changed(values, changes):
    """The configuration with ``a.b=value`` applied; a table must be there already."""
    values = copy.deepcopy(values)
    for change in changes:
        name, equals, text = change.partition("=")
        *path, last = name.split(".")
        table = values
        for key in path:
            table = table.get(key) if isinstance(table, dict) else None
        if not equals or not isinstance(table, dict):
            raise CommandError(f"--set {change[:60]}: must be KEY=VALUE, with a key of config.json "
                               "such as vision_config.depth")
        table[last] = toml_value(text)
    return values


def _processor(arguments, values, folder):
    """What makes a new model's inputs; a tokenizer that is learned sets the vocabulary."""
    from .data import Processor, learn_tokenizer
    if not arguments.data:
        if arguments.vocab_size is not None or arguments.kinds:
            raise CommandError("--vocab-size and --kinds are about a tokenizer that is learned: "
                               "name its texts by --data")
        return Processor.from_config(values, **picture_rule(arguments.max_pixels))
    said = {"files": arguments.data, "kinds": arguments.kinds}
    tokenizer = learn_tokenizer(texts(said), arguments.vocab_size or _VOCABULARY, folder)
    values["text_config"]["vocab_size"] = tokenizer.vocab_size
    values |= {key: tokenizer.special[name] for key, name in _IDS.items() if key in values}
    return Processor.from_config(values, tokenizer, **picture_rule(arguments.max_pixels))


def init(arguments):
    """``orchvlm init``"""
    folder = Path(arguments.folder)
    if (folder / "config.json").exists():
        raise CommandError(f"{folder} holds a model already; name another folder")
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"{folder} is a file; name a folder")
    values = _changed(preset(arguments.preset).values, arguments.set)
    ModelConfig(values)  # says what does not go together before anything is written
    processor = _processor(arguments, values, folder)
    std = FIRST_STD.get(arguments.preset, 0.02) if arguments.std is None else arguments.std
    model = Model.from_config(ModelConfig(values), arguments.seed, std=std)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    print(f"{model!r}; {processor.tokenizer!r}; {folder}/")
    return 0
