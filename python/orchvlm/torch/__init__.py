"""Balancing inside someone else's PyTorch training loop: :class:`Balancer`, and what wraps it.

The only part of orchvlm that imports torch; ``import orchvlm`` does not load it.
"""
try:
    import torch as _torch
except ImportError as error:
    raise ImportError("orchvlm.torch needs PyTorch, which is not installed here; install torch "
                      "(version 2.4 or newer), or use orchvlm.balance, which needs NumPy only") \
        from error
if not _torch.distributed.is_available():
    raise ImportError("orchvlm.torch needs torch.distributed, which this build of PyTorch leaves "
                      "out; install a build with it")

from .balancer import Balancer  # noqa: E402
from .huggingface import balance_tower  # noqa: E402
from .placing import BalancePlan, BalanceReport, Moved  # noqa: E402

__all__ = ["BalancePlan", "BalanceReport", "Balancer", "Moved", "balance_tower"]
