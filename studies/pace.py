"""How far a study has come, and how long the rest takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from dex_jax.progress import Standing

QUIET_SECONDS = 10.0
"""Between two lines of a log."""


class Pace:
    """Tells how far a study has come; `planned` is how much there is of each kind, `notify` is told a Standing.

    The time left follows from what amounts of each kind have taken so far; kinds that have not begun are left out.
    """

    def __init__(self, planned: dict[str, int], notify: Callable[[Any], None]):
        self.left, self.notify = dict(planned), notify
        self.all = max(sum(planned.values()), 1)
        self.made: dict[str, tuple[int, float]] = {}
        self.last = self.told = time.monotonic()

    def skip(self, kind: str, amount: int) -> None:
        """So much is there that an earlier call has made."""
        self.left[kind] -= amount
        self.last = time.monotonic()

    def add(self, kind: str, amount: int, what: str) -> None:
        """So much was made since the last call, in doing `what`."""
        now, (made, spent) = time.monotonic(), self.made.get(kind, (0, 0.0))
        self.left[kind] -= amount
        self.made[kind] = (made + amount, spent + now - self.last)
        share = 1 - sum(self.left.values()) / self.all
        log = now - self.told > QUIET_SECONDS or share >= 1
        self.last, self.told = now, now if log else self.told
        seconds = sum(self.left[kind] * spent / made for kind, (made, spent) in self.made.items())
        self.notify(Standing(f"{what}: {share:.0%}", share, seconds, log))
