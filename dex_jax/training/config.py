"""The settings of one training run, whatever is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from msgspec import Meta

from dex_jax.config import Positive
from dex_jax.foreign import check_fields

MAY_CHANGE = ("steps", "minutes", "keep", "checkpoint_every", "eval_every", "log_every")
"""Fields that a resumed run may change: how long it trains, and what it keeps and writes on the way."""


Count = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
BelowOne = Annotated[float, Meta(ge=0, lt=1)]
"""The type of beta1 and beta2: with 1 the optimizer would never move."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The settings of the optimizer, the length of a training, its checkpoints and its log; a step is one batch.

    Attributes:
      steps: training ends after so many steps.
      minutes: training ends earlier after so many minutes of this process and those that it resumes; None for no such
        end.
      batch: rows of a batch, B.
      learning_rate: the peak. The rate rises linearly over the warm-up and stays below a cosine to the end of training.
      warmup_steps: steps of the warm-up.
      final_rate: the learning rate at the end, as a share of its peak.
      weight_decay: of AdamW, on matrices only.
      beta1, beta2, epsilon: of AdamW.
      clip_norm: gradients of a larger global norm are scaled down to it; None for no clipping.
      checkpoint_every: steps between checkpoints.
      keep: number of checkpoints that stay; older ones are deleted.
      eval_every: steps between evaluations; None evaluates at the end only.
      log_every: steps between lines of the journal, and of the progress where there is no terminal.
      seed: of the initial parameters, the order of the texts and what is sampled.
      dtype: of the frozen model. Parameters in training are always float32.
    """

    steps: Count = 10_000
    minutes: Positive | None = None
    batch: Count = 32
    learning_rate: Positive = 1e-3
    warmup_steps: NotNegative = 100
    final_rate: Share = 0.1
    weight_decay: Annotated[float, Meta(ge=0, le=1e30)] = 0.01
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.99
    epsilon: Positive = 1e-8
    clip_norm: Positive | None = 1.0
    checkpoint_every: Count = 500
    keep: Count = 2
    eval_every: Count | None = 1000
    log_every: Count = 20
    seed: NotNegative = 0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self):
        check_fields(self)

    def conflicts(self, earlier: Mapping[str, Any]) -> list[str]:
        """Return the fields that may not change and differ from those of an earlier training, as "name was X, is Y".

        A field that `earlier` lacks counts as its default.
        """
        found = []
        for field in dataclasses.fields(self):
            before, now = earlier.get(field.name, field.default), getattr(self, field.name)
            if field.name not in MAY_CHANGE and before != now:
                found.append(f"{field.name} was {before}, is {now}")
        return found
