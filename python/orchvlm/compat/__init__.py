"""Drop-in replacements for the planners inside other trainers: same signatures and guarantees.

``get_seqlen_balanced_partitions`` has verl's interface, ``get_groups_and_subsamples`` that of
Megatron-Core's scheduler. Nothing of those projects is needed or imported.
"""
from importlib import import_module

_HOME = {"get_seqlen_balanced_partitions": "verl", "get_groups_and_subsamples": "megatron"}
__all__ = sorted(_HOME)


def __getattr__(name):
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
