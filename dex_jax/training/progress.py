"""How far a training run has come, for a person: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from typing import NamedTuple, Protocol

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bars


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


class Shown(Protocol):
    """What a Display can show: a share of the whole, 0 to 1, one line, and whether it is worth a line of a log."""

    @property
    def share(self) -> float: ...  # noqa: D102

    @property
    def logged(self) -> bool: ...  # noqa: D102

    def describe(self) -> str: ...  # noqa: D102


class Display:
    """Shows progress and lines of text on stderr; what `train` notifies unless told otherwise.

    Args:
      console: where to; None is stderr.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._bars: Bars | None = None

    def __call__(self, event: str | Shown) -> None:
        """Shows an event."""
        if isinstance(event, str):
            self.console.print(event, markup=False)
        elif self.console.is_terminal:
            self._draw(event)
        elif event.logged:
            self.console.print(event.describe(), markup=False)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _draw(self, event: Shown) -> None:
        if self._bars is None:
            columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}", markup=False))
            self._bars = Bars(*columns, console=self.console, refresh_per_second=4)
            self._bars.add_task("", total=1.0)
            self._bars.start()
        self._bars.update(self._bars.task_ids[0], completed=event.share, description=event.describe())


def _amount(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds for people."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
