"""How far a training run has come, for a Display."""

from __future__ import annotations

from typing import NamedTuple

from dex_jax.progress import duration


class Progress(NamedTuple):
    """How far training has come.

    Attributes:
      step, steps: done, and to do in all.
      tokens: learnt from so far.
      tokens_per_second: since this process's first step, with data, checkpoints and evaluations; None at that step.
      loss: mean of the journal's last line, or the first one known; None before there is one.
      share: of the training that is done, 0 to 1.
      seconds_left: None while there is nothing to go by.
      logged: whether this step has a line in the journal.
    """

    step: int
    steps: int
    tokens: int
    tokens_per_second: float | None
    loss: float | None
    share: float
    seconds_left: float | None
    logged: bool

    def describe(self) -> str:
        """One line without a newline."""
        loss = "" if self.loss is None else f", loss {self.loss:.4f}"
        left = "" if self.seconds_left is None else f", {duration(self.seconds_left)} left"
        speed = "" if self.tokens_per_second is None else f", {_amount(self.tokens_per_second)} tokens/s"
        return f"step {self.step}/{self.steps}, {_amount(self.tokens)} tokens{speed}{loss}{left}"


def _amount(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
