"""How far a study has come, and how long the rest takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from dex_jax.progress import Standing

QUIET_SECONDS = 10.0
"""Between two lines of a log."""


class Pace:
    """Tells how far a study has come, and guesses the time left from what amounts of each kind have taken so far.

    `planned` holds how much there will be of each kind; `notify` is told a Standing whenever something was added.
    """

    def __init__(self, planned: dict[str, int], notify: Callable[[Any], None]):
        self.planned, self.notify = planned, notify
        self.done = dict.fromkeys(planned, 0)
        self.made = dict.fromkeys(planned, 0)
        self.spent = dict.fromkeys(planned, 0.0)
        self.last = self.told = time.monotonic()

    def skip(self, kind: str, amount: int) -> None:
        """So much is there that an earlier call has made."""
        self.done[kind] += amount
        self.last = time.monotonic()

    def add(self, kind: str, amount: int, what: str) -> None:
        """So much was made since the last call, in doing `what`."""
        now = time.monotonic()
        self.done[kind] += amount
        self.made[kind] += amount
        self.spent[kind] += now - self.last
        share = sum(self.done.values()) / max(sum(self.planned.values()), 1)
        log = now - self.told > QUIET_SECONDS or share >= 1
        self.last, self.told = now, now if log else self.told
        self.notify(Standing(f"{what}: {share:.0%}", share, self._left(), log))

    def _left(self) -> float:
        """Seconds; a kind that has not begun is taken to be as fast as the others."""
        overall = sum(self.spent.values()) / max(sum(self.made.values()), 1)
        paces = {kind: self.spent[kind] / made if made else overall for kind, made in self.made.items()}
        return sum(max(0, planned - self.done[kind]) * paces[kind] for kind, planned in self.planned.items())
