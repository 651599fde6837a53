"""Recipes: how the paper's model and the presets are trained."""
from dataclasses import dataclass

from .training import TrainingConfig


@dataclass
class Recipe(TrainingConfig):
    """A training configuration with the packs that it is meant for.

    Parameters
    ----------
    sequence_length : int
        Tokens of a pack: the ``max_tokens`` of its :class:`orchvlm.data.Loader`.

    Attributes
    ----------
    micro_batches : int
        Packs of a step over all ranks, one after the other on one.
    batch_tokens : int
        Of a step, at most.
    """

    sequence_length: int = 32768

    @property
    def batch_tokens(self):
        """int : tokens of a step, at most."""
        return self.micro_batches * self.sequence_length


def recipe(stage):
    """The training stages of Seed1.5-VL.

    Parameters
    ----------
    stage : {"stage0", "stage1", "stage2", "sft"}
        Adapter alignment, pre-training on 32,768 tokens, on 131,072, supervised fine-tuning.

    Returns
    -------
    Recipe
        A :class:`TrainingConfig` with ``sequence_length`` and ``batch_tokens``: 8.4M tokens a step,
        71M, 71M and 16 sequences, in as many ``micro_batches``.  Steps follow from the report's
        tokens and batches.  Stage 2 goes on with the optimizer's state of stage 1.

    Raises
    ------
    ValueError
        No such stage.

    References
    ----------
    Seed1.5-VL Technical Report, tables 4 and section 4.1.

    Examples
    --------
    >>> import orchvlm
    >>> stage = orchvlm.recipe("stage0")
    >>> stage.lr, stage.sequence_length, stage.micro_batches, stage.batch_tokens
    (0.000252, 32768, 256, 8388608)
    """
    frozen = ("model.visual.patch_embed.*", "model.visual.blocks.*", "model.visual.ln.*",
              "model.language_model.*", "lm_head.*")
    short, long = 32768, 131072
    stages = {
        "stage0": dict(steps=1907, lr=2.52e-4, min_lr=4.50e-5, warmup=100, freeze=frozen,
                       sequence_length=short, micro_batches=256),
        "stage1": dict(steps=42074, lr=5.22e-5, min_lr=5.22e-6, warmup=500,
                       sequence_length=short, micro_batches=2176),
        "stage2": dict(steps=3366, lr=5.22e-6, min_lr=5.22e-6, warmup=0, schedule="constant",
                       sequence_length=long, micro_batches=544),
        "sft": dict(steps=6250, lr=2e-5, min_lr=2e-6, warmup=625, freeze=frozen[:3],
                    sequence_length=long, micro_batches=16)}
    if stage not in stages:
        raise ValueError(f"stage must be one of {', '.join(stages)}; got {stage!r}")
    return Recipe(**stages[stage])


#: The embedded tasks as the small presets learn them: easy drawings of 56 x 56 pixels.
TASKS = {"kinds": ["colour", "shape", "count", "describe"], "difficulty": 0.1, "max_side": 56}

_STARTS = {"tiny": {"lr": 5e-4, "tokens": 2048, "minutes": 10.0},
           "tiny-moe": {"lr": 1e-3, "tokens": 2048, "minutes": 10.0},
           "tiny-omni": {"lr": 7e-4, "tokens": 1024, "minutes": 10.0},
           "long": {"lr": 1e-3, "tokens": 8192, "minutes": 5.0},
           "small": {"lr": 6e-4, "tokens": 4096, "minutes": 120.0}}
#: What else a preset says by default: pictures, frames and texts of very different lengths, over
#: ranks of which groups take the long ones.
PRESET_KEYS = {"long": {
    "data.kinds": ["album", "frames", "story"], "data.difficulty": 0.5, "ranks.n": 4,
    "ranks.language": "auto", "ranks.tokens": 2560, "evaluation.samples": 20}}
#: Deviation of the first weights: about 1 / sqrt(width), with which small models learn sooner than
#: with the 0.02 of large ones.
FIRST_STD = {"tiny": 0.06, "long": 0.08, "tiny-moe": 0.06, "tiny-omni": 0.06, "small": 0.04}
_OTHERS = {"lr": 1e-4, "tokens": 4096, "minutes": 60.0}


def starting_point(preset=None):
    """Where ``orchvlm train`` starts from when nothing else is said.

    Parameters
    ----------
    preset : str, optional
        Name of a preset; None for a model that is trained further.

    Returns
    -------
    dict
        ``lr``, ``tokens`` per step and ``minutes``.
    """
    return dict(_STARTS.get(preset, _OTHERS))
