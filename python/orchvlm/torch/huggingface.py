"""The vision towers of Hugging Face's Qwen-VL family, balanced in place: :func:`balance_tower`."""
import dataclasses
import sys

import torch

from ..cost import BatchCost, Cluster
from ..model_cost import from_model
from .balancer import Balancer

_KINDS = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))
# What a collator may have computed ahead of the pictures that were here.
_AHEAD = {"cu_seqlens", "max_seqlen", "position_ids", "window_index", "cu_window_seqlens",
          "interp_indices", "interp_weights"}


def balance_tower(model, group=None, cost=None, **options):
    """Balances the vision tower of a model of ``transformers``, whoever trains it.

    Hooks do it; weights, names and checkpoints stay as they are, and a rank without pictures takes
    part by itself. In training mode only: in evaluation mode every rank encodes its own.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With a ``visual`` tower that takes ``(hidden_states, grid_thw)`` and a ``language_model``:
        Qwen2-VL, Qwen2.5-VL, Qwen3-VL and their relatives. Before DDP or FSDP wrap it.
    group : torch.distributed.ProcessGroup, optional
        As for :class:`Balancer`.
    cost : BatchCost or callable, optional
        As for :class:`Balancer`. Default: FLOPs, counted from the model's configuration.
    **options : keyword arguments
        Of :class:`Balancer`.

    Returns
    -------
    Balancer
        ``balancer.last_plan.report()`` says what the last plan did.

    Raises
    ------
    TypeError
        The model has no such tower.
    ValueError, orchvlm.CommError
        As for :class:`Balancer`.

    Notes
    -----
    The tower's ``last_hidden_state`` is left out of its output, as the language model needs only
    the merged rows. All ranks run the model equally often.

    What one rank raises up to its decoder, the others raise, too, naming it; behind that, or where
    sharded wrappers wait for each other's weights, it is for the process group to end the wait.

    Samples stay on their ranks, and with them losses and token counts; gradients are those of the
    unbalanced run up to rounding, once they are reduced over the ranks.

    Examples
    --------
    A Trainer needs one line more; started by ``torchrun``, on every rank::

        model = AutoModelForImageTextToText.from_pretrained("Qwen/Qwen3-VL-2B-Instruct")
        args = TrainingArguments("run", remove_unused_columns=False)
        trainer = Trainer(model, args, train_dataset=samples, data_collator=collate)
        orchvlm.torch.balance_tower(trainer.model)   # TrainingArguments joined the ranks
        trainer.train()

    >>> import orchvlm.torch, torch
    >>> orchvlm.torch.balance_tower(torch.nn.Linear(2, 2))
    Traceback (most recent call last):
    TypeError: model must have modules `visual` and `language_model`, as Qwen2-VL to Qwen3-VL have;
    got Linear
    """
    parts = next((m for m in model.modules() if {"visual", "language_model"} <= set(m._modules)),
                 None)
    if parts is None:
        raise TypeError("model must have modules `visual` and `language_model`, as Qwen2-VL to "
                        f"Qwen3-VL have;\ngot {type(model).__name__}")
    if cost is None:
        cost = from_model(model.config.to_dict(), Cluster.preset("h100")).flops["vision"]
    balancer = Balancer(parts.visual, group, cost, **options)
    hooks = _Hooks(balancer, parts.visual)
    parts.register_forward_pre_hook(hooks.before_model, with_kwargs=True)
    parts.register_forward_hook(hooks.after_model, always_call=True)
    parts.visual.register_forward_pre_hook(hooks.before_tower, with_kwargs=True)
    parts.visual.register_forward_hook(hooks.after_tower)
    parts.language_model.register_forward_pre_hook(hooks.before_decoder, with_kwargs=True)
    return balancer


class _Hooks:
    """What happens in a forward of the model, in the same order on every rank.

    All pictures travel before it, features after each call of the tower. Calls are numbered: one
    rank's images and another's clips may share one. What a rank has no call for, it encodes right
    before the decoder. Between the exchanges sharded wrappers gather weights, in every rank alike.
    """

    def __init__(self, balancer, tower):
        self._balancer, self._tower, self._tell = balancer, tower, balancer._ranks.tell
        self._waiting = []  # (plan, pixels, grid) of the calls to come
        self._plan = None  # of the call under way
        self._met = True  # no exchange is left in this forward

    def before_model(self, parts, args, kwargs):
        if not self._tower.training:
            return
        self._met = False
        given = [[kwargs[name] for name in kind] for kind in _KINDS
                 if kwargs.get(kind[0]) is not None]
        device = next(x for x in kwargs.values() if isinstance(x, torch.Tensor)).device
        config = self._tower.config
        width = config.in_channels * config.temporal_patch_size * config.patch_size**2
        nothing = torch.zeros(0, width, device=device), torch.zeros(0, 3, dtype=torch.int64,
                                                                    device=device)
        calls = [self._sent(*pictures) for pictures in [*given, nothing, nothing][:len(_KINDS)]]
        # A step without pictures runs the tower all the same, on a blank, so that wrappers find
        # all weights used; otherwise calls for which no rank has any are left out.
        self._waiting = [call for call in calls if len(call[0].rank)] or calls[:1]

    def _sent(self, pixels, grid):
        """A plan for pictures of (frames, rows, columns) patches, and those to encode here."""
        frames, per_frame = grid[:, 0], grid[:, 1] * grid[:, 2]
        patches, side = frames * per_frame, self._tower.spatial_merge_size
        counted = isinstance(self._balancer.cost, BatchCost)  # else a function of the lengths
        squares = frames * per_frame.double()**2 if counted else None  # attention is per frame
        plan = self._balancer.plan(patches, squares=squares, out_lengths=patches // side**2)
        pixels = pixels.to(self._tower.dtype)
        blank = pixels.new_zeros(side**2, pixels.shape[1])  # the smallest picture that it takes
        return (plan, self._balancer.apply(pixels, blank=blank, plan=plan),
                self._balancer.apply(grid, rows="item", blank=grid.new_tensor([[1, side, side]]),
                                     plan=plan))

    def before_tower(self, tower, args, kwargs):
        if not tower.training:
            return None
        self._plan, pixels, grid = self._waiting.pop(0)
        drop = {*_AHEAD, "hidden_states", "grid_thw"}
        return (pixels,), {"grid_thw": grid} | {name: value for name, value in kwargs.items()
                                                if name not in drop}

    def after_tower(self, tower, args, output):
        if not tower.training:
            return None
        extra = list(getattr(output, "deepstack_features", None) or [])
        features, *extra = self._balancer.restore([output.pooler_output, *extra], plan=self._plan)
        if extra:
            output = dataclasses.replace(output, deepstack_features=extra)
        left_out = [name for name in ("last_hidden_state", "hidden_states", "attentions")
                    if hasattr(output, name)]
        return dataclasses.replace(output, pooler_output=features, **dict.fromkeys(left_out))

    def before_decoder(self, decoder, args, kwargs):
        if not self._tower.training:
            return None
        while self._waiting:  # other ranks have pictures where this one has none
            self._tower(None, grid_thw=None)
        self._balancer.meet()  # features that do not fit the text were refused before this
        self._met = True
        # All that follows depends on the embeddings, and in the backward pass comes before them.
        embeds = self._balancer.anchor(kwargs["inputs_embeds"])
        return args, {**kwargs, "inputs_embeds": embeds}

    def after_model(self, parts, args, output):
        error = sys.exc_info()[1]  # of the forward that this hook follows, or ends
        if error is not None and not self._met:
            self._tell(error)
        self._met = True
