"""How far a part of a study has come, for a Display."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from dex_jax.progress import duration


class Standing(NamedTuple):
    """How far a part of a study has come, for a Display.

    Attributes:
      what: the part.
      share: 0 to 1.
      seconds_left: None while there is nothing to go by.
      logged: whether it is worth a line of a log.
    """

    what: str
    share: float
    seconds_left: float | None
    logged: bool

    def describe(self) -> str:
        """One line."""
        left = "" if self.seconds_left is None else f", {duration(self.seconds_left)} left"
        return f"{self.what}: {self.share:.0%}{left}"


class Pace:
    """Shows how far a part of a study has come, and how long the rest takes at this pace.

    Args:
      notify: told a Standing whenever something was added.
      total: of the amounts that will be added.
      what: the part.
    """

    def __init__(self, notify: Callable[[Any], None], total: int, what: str):
        self.notify, self.total, self.what = notify, total, what
        self.done = self.made = 0
        self.begin = self.logged = time.monotonic()

    def add(self, amount: int, made: bool = True) -> None:
        """So much more is there; `made` where it took this process time."""
        self.done += amount
        self.made += amount if made else 0
        now = time.monotonic()
        left = (now - self.begin) / self.made * (self.total - self.done) if self.made else None
        log = now - self.logged > 10 or self.done == self.total
        self.logged = now if log else self.logged
        self.notify(Standing(self.what, self.done / max(self.total, 1), left, log and made))
