"""The costs of ticks by their number of rows, measured on the device at hand and kept between processes.

A plain tick, of one row without drafts, does what a step of AR does, and is timed alone: a few at the start of a
process's first text, and a few again as texts go on. Of all others only the time of several together is known. A Kalman
filter estimates each cost in plain ticks, with its uncertainty, from such sums. Only these ratios are kept, so a load
that slows everything down does no harm.

Letters: C row counts that a tick may choose from; M = C + 1 costs, the last one of drafting a level.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import statistics
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dex_jax.decoding.dex.row_choice import NEVER, usual_costs
from dex_jax.errors import DexError
from dex_jax.io.whole_files import cache_folder, write_whole
from dex_jax.nn import few_rows

PLAIN_TICKS, SOON, LATER = 6, 12, 128
"""Number of plain ticks that are timed at a time, and of other ticks after which they are timed again: at first SOON,
as the first timing of a process takes in what happens once, and LATER when there are three."""

SAMPLES = 3
"""Number of the latest timings of plain ticks whose median is taken."""

OWN, PRICE = 0.2, 1.0
"""Relative standard deviations before the first tick: of each cost alone, and of everything together that costs more
than a plain tick does."""

DRIFT = 0.01
"""The share of these deviations that every update adds."""

NOISE, OUTLIER = 0.15, 3.0
"""The relative standard deviation of a measured time, and the number of deviations at which an error is clipped."""

FORGETTING = 0.01
"""The share by which every update moves a cost that was not paid back to the usual one, so that it is tried again."""

WORTH_KEEPING = 0.03
"""The least relative change of a cost for which the costs are written to the file again."""


class TickCosts:
    """The measured seconds of a plain tick, and the estimated costs of all ticks in plain ones.

    Attributes:
      shares: [M] float64, of a tick of each row count, ascending, and of drafting a level, in plain ticks.
      sums: what drafts were worth in the text before, by field of RowChoice; empty before any has ended.
      call_seconds: of a call of the device that runs no tick, which every timing of ticks takes in.
    """

    def __init__(self, counts: tuple[int, ...], key: str = "", stored: Any = None):
        """Start from `stored`, the entry of `key` in the file of costs, or from the usual costs if it is not valid."""
        self.key, self._usual = key, np.array(usual_costs(counts))
        self._stored = np.array(stored) if _are_costs(stored, len(self._usual)) else self._usual
        self.shares = self._stored.copy()
        self._unsure = self._covariance(1.0)
        self._plain: collections.deque[float] = collections.deque(maxlen=SAMPLES)
        self.call_seconds = 0.0
        self.sums: dict[str, float] = {}
        self._length = 0  # of the cache of the texts that are timed
        self._since = 0  # ticks after the last timing of plain ones

    @property
    def plain_seconds(self) -> float | None:
        """The seconds of a plain tick, None before any was timed."""
        return statistics.median_low(self._plain) if self._plain else None

    @property
    def due(self) -> bool:
        """True if it is time to time plain ticks."""
        return not self._plain or self._since >= (SOON if len(self._plain) < 3 else LATER)

    def begin(self, length: int) -> None:
        """Begin a text in a cache of `length` positions; its plain ticks take longer than those of shorter ones."""
        if length != self._length:
            self._length = length
            self._plain.clear()

    def learn(self, ran: np.ndarray, seconds: float) -> None:
        """Update the costs by a call that took `seconds`; `ran` [M] says how often each cost was paid."""
        seconds = max(seconds - self.call_seconds, seconds / 2)  # a busy machine may take long for a call without ticks
        if not np.any(ran[:-1]) or not seconds > 0:
            return
        if not np.any(ran[1:]):
            self._plain.append(seconds / ran[0])
            self._since = 0
            return
        self._since += int(ran[:-1].sum())
        plain = self.plain_seconds
        if plain is None:
            return
        self.shares += FORGETTING * (ran == 0) * (self._usual - self.shares)
        self._unsure += self._covariance(DRIFT)
        expected = ran @ self.shares
        variance = ran @ self._unsure @ ran + (NOISE * expected) ** 2
        most = OUTLIER * math.sqrt(variance)
        gain = self._unsure @ ran / variance
        self.shares = np.maximum(self.shares + gain * np.clip(seconds / plain - expected, -most, most), 1e-4)
        self._unsure -= np.outer(gain, gain) * variance

    def relative(self) -> np.ndarray:
        """Return the costs in plain ticks, [M] float32; more rows never cost less."""
        return np.append(np.maximum.accumulate(np.maximum(self.shares[:-1], 1)), self.shares[-1]).astype(np.float32)

    def of_plain_ticks(self) -> np.ndarray:
        """Return costs [M] float32 at which every tick is a plain one."""
        return np.where(np.arange(len(self.shares)) == 0, 1, NEVER).astype(np.float32)

    def keep(self) -> None:
        """Write the costs for later processes if they have changed; where nothing can be written, those learn anew."""
        if not self.key or np.all(np.abs(self.shares - self._stored) < WORTH_KEEPING * self._stored):
            return
        self._stored = self.shares.copy()
        with contextlib.suppress(DexError):
            write_whole(
                costs_file(), json.dumps(_read(costs_file()) | {self.key: self.shares.tolist()}, indent=1) + "\n"
            )

    def _covariance(self, share: float) -> np.ndarray:
        """Return the covariance [M, M] of costs that vary by `share` of OWN and PRICE; a plain tick's does not."""
        more = self.shares - np.append(np.ones(len(self.shares) - 1), 0)
        # A drafted level may cost a hundredth of a tick, or, by a draft model, half of one.
        own = OWN * np.append(self.shares[:-1], 1)
        more[0] = own[0] = 0
        return share**2 * (np.diag(own**2) + PRICE**2 * np.outer(more, more))


_LEARNT: dict[str, TickCosts] = {}
"""The costs that this process has learnt, by key."""


def costs_of(counts: tuple[int, ...], *about: Any) -> TickCosts:
    """Return the costs of ticks with these row counts; they also depend on the repr of `about`."""
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = (device.platform, device.device_kind, f"{cores} cores", f"jax {jax.__version__}", few_rows.version())
    key = " ".join((*machine, f"{zlib.crc32(repr((counts, about)).encode()):08x}"))
    if key not in _LEARNT:
        _LEARNT[key] = TickCosts(counts, key, _read(costs_file()).get(key))
    return _LEARNT[key]


def costs_file() -> Path:
    """Return the path of the costs, a JSON object by key: $DEX_JAX_TICK_COSTS, or one in the user's cache folder."""
    named = os.environ.get("DEX_JAX_TICK_COSTS")
    return Path(named) if named else cache_folder() / "tick_costs.json"


def _read(file: Path) -> dict[str, Any]:
    """Return the costs that a file holds, by key; none where it is missing or damaged."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _are_costs(stored: Any, count: int) -> bool:
    numbers = isinstance(stored, list) and all(isinstance(share, float) and 0 < share < 1e4 for share in stored)
    return numbers and len(stored) == count and stored[0] == 1
