"""Balancing inside someone else's PyTorch training loop: :class:`Balancer`, and what wraps it.

The only part of orchvlm that imports torch; ``import orchvlm`` does not load it.

Any encoder: :class:`Balancer`. A vision tower of Hugging Face's Qwen-VL family under the Trainer,
DDP or FSDP: :func:`balance_tower`, one line. VeOmni calls an object before and after its vision
tower when ``encoder_data_balance`` is on; this one takes its place (VeOmni itself is not among the
tests, as no release of it can be installed)::

    class DataBalance:
        def __init__(self, visual, group, cost):
            self.balancer = orchvlm.torch.Balancer(visual, group, cost)
            self.unit = visual.spatial_merge_unit

        def balance_data(self, pixel_values, grid_thw, data_type="image"):
            frames, patches = grid_thw[:, 0], grid_thw.prod(-1)
            self.plan = self.balancer.plan(patches, out_lengths=patches // self.unit,
                                           squares=patches.double()**2 / frames)
            side = math.isqrt(self.unit)
            return (self.balancer.apply(pixel_values, blank=pixel_values[:1].expand(self.unit, -1)),
                    self.balancer.apply(grid_thw, rows="item",
                                        blank=grid_thw.new_tensor([[1, side, side]])))

        def data_bridge(self, hidden_state, deepstack_feature_lists, require_grad=True):
            hidden, *extra = self.balancer.restore([hidden_state, *deepstack_feature_lists],
                                                   plan=self.plan)
            return hidden, extra

    inner = model.model
    inner.encoder_data_balance = DataBalance(inner.visual, data_parallel_group, cost)

with ``loss = inner.encoder_data_balance.balancer.anchor(loss)`` before each backward pass.
"""
try:
    import torch as _torch
except ImportError as error:
    raise ImportError("orchvlm.torch needs PyTorch, which is not installed here; install torch, "
                      "or use orchvlm.balance, which needs NumPy only") \
        from error
if not _torch.distributed.is_available():
    raise ImportError("orchvlm.torch needs torch.distributed, which this build of PyTorch leaves "
                      "out; install a build with it")

from .balancer import Balancer  # noqa: E402
from .huggingface import balance_tower  # noqa: E402
from .placing import BalancePlan, BalanceReport, Moved  # noqa: E402

__all__ = ["BalancePlan", "BalanceReport", "Balancer", "Moved", "balance_tower"]
