"""Samples: where they come from, and how they become :class:`orchvlm.Inputs`.

Pictures need Pillow, ``tokenizer.json`` needs tokenizers, chat templates need Jinja2 and films need
PyAV: ``pip install 'orchvlm[data]'``, and ``[video]`` for the last.  Nothing of it is imported
before it is used.
"""
from importlib import import_module

_HOME = {
    "Asset": "assets", "DataError": "assets", "NoRecordsError": "assets",
    "ImageRule": "images", "load_image": "images", "smart_resize": "images",
    "VideoRule": "video", "Clip": "video", "sample_frames": "video",
    "read_wav": "audio", "resample": "audio", "log_mel": "audio", "audio_tokens": "audio",
    "load_sound": "audio",
    "ByteTokenizer": "tokenizer", "HubTokenizer": "tokenizer", "learn_tokenizer": "learned",
    "read_messages": "chat",
    "Processor": "processor",
    "JsonArray": "datasets", "JsonLines": "datasets", "TarShards": "shards",
    "ZipPack": "packs", "load_pack": "packs",
    "Mixture": "mixture", "Loader": "mixture", "RankLoader": "rank_loader",
    "Varied": "vary",
    "VariedSounds": "vary_sounds",
    "Tasks": "tasks", "contact_sheet": "sheet", "score": "verify",
}
__all__ = sorted(_HOME)


def __getattr__(name):
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'orchvlm.data' has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
