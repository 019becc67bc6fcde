"""How far a part of a study has come, for a Display."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from dex_jax.progress import Standing


class Pace:
    """Shows how far a part of a study has come, and how long the rest takes at this pace.

    `notify` is told a Standing whenever something was added; `total` is the sum of all that will be.
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
        self.notify(
            Standing(
                f"{self.what}: {self.done / max(self.total, 1):.0%}", self.done / max(self.total, 1), left, log and made
            )
        )
