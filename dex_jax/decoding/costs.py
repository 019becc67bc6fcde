"""Costs of ticks on the device at hand, by their rows: learnt from the ticks that run, and kept between processes.

The time of a few ticks is what each of them cost, added up. A Kalman filter takes such sums apart: it holds what each
cost is believed to be, and how sure that is. Only how costs compare matters to ticks, and only that is kept, so load
that slows everything down spoils nothing.

Letters: C row counts that a tick may choose from; M = C + 1 costs, the last one of drafting a level.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dex_jax.decoding.dex.pace import usual_costs
from dex_jax.errors import DexError
from dex_jax.io.whole_files import cache_folder, write_whole
from dex_jax.nn import few_rows

OWN, PRICE = 0.2, 1.0
"""Standard deviations, as shares, of what is believed before the first tick: of each cost by itself, and of all that
more than a row costs."""

DRIFT, COMMON_DRIFT = 0.01, 0.2
"""The share of those deviations that comes anew with every update, and the deviation of all costs together, as other
programs come and go."""

NOISE, OUTLIER = 0.15, 3.0
"""The standard deviation of the time of an update, as a share of it, and how many of them count at most."""

FORGETTING = 0.01
"""The share by which, at every update, a cost that was not paid goes back to what is usual: so it is tried again."""

WORTH_KEEPING = 0.03
"""Costs are written when one of them has moved by such a share since."""


class TickCosts:
    """Seconds of ticks as they are believed to be, corrected by every update.

    Attributes:
      seconds: [M] float64, of a tick of each row count, ascending, and of drafting a level; None before any update.
    """

    def __init__(self, counts: tuple[int, ...], key: str = "", kept: Any = None):
        """`kept` is what `key` has in the file of costs, whatever that is."""
        self.key, self._usual = key, np.array(usual_costs(counts))
        self._kept = np.array(kept) if _are_costs(kept, len(self._usual)) else self._usual
        self.seconds: np.ndarray | None = None
        self._unsure = np.zeros((len(self._kept),) * 2)

    def learn(self, ran: np.ndarray, seconds: float) -> None:
        """Takes in that ticks took so many `seconds`, of which `ran` [M] says how often each cost was to be paid."""
        if not np.any(ran[:-1]) or not seconds > 0:
            return
        if self.seconds is None:
            self.seconds = self._kept * seconds / (ran @ self._kept)
            self._unsure = self._spread(1.0)
        self.seconds += FORGETTING * (ran == 0) * (self._usual * self.seconds[0] - self.seconds)
        self._unsure += self._spread(DRIFT)
        expected = ran @ self.seconds
        variance = ran @ self._unsure @ ran + (NOISE * expected) ** 2
        most = OUTLIER * math.sqrt(variance)
        gain = self._unsure @ ran / variance
        self.seconds = np.maximum(self.seconds + gain * np.clip(seconds - expected, -most, most), 1e-9)
        self._unsure -= np.outer(gain, gain) * variance

    def relative(self) -> np.ndarray:
        """[M] float32, costs in those of a tick of one row; more rows never cost less."""
        share = self._kept if self.seconds is None else self.seconds / self.seconds[0]
        return np.append(np.maximum.accumulate(np.maximum(share[:-1], 1)), share[-1]).astype(np.float32)

    def keep(self) -> None:
        """Writes what is believed for later processes, if it is news; where nothing can be written, they learn anew."""
        if not self.key or self.seconds is None:
            return
        share = self.seconds / self.seconds[0]
        if np.all(np.abs(share - self._kept) < WORTH_KEEPING * self._kept):
            return
        self._kept = share
        with contextlib.suppress(DexError):
            write_whole(costs_file(), json.dumps(_read(costs_file()) | {self.key: share.tolist()}, indent=1) + "\n")

    def _spread(self, share: float) -> np.ndarray:
        """The covariance of costs that vary by a `share` of OWN and PRICE, and all together by COMMON_DRIFT."""
        assert self.seconds is not None
        more = self.seconds - np.append(np.full(len(self.seconds) - 1, self.seconds[0]), 0)
        # A drafted level may cost a hundredth of a tick, or, by a draft model, half of one.
        own = OWN * np.append(self.seconds[:-1], self.seconds[0])
        apart = np.diag(own**2) + PRICE**2 * np.outer(more, more)
        return share**2 * apart + COMMON_DRIFT**2 * np.outer(self.seconds, self.seconds)


_LEARNT: dict[str, TickCosts] = {}
"""Costs that this process has learnt, by key."""


def costs_of(counts: tuple[int, ...], *about: Any) -> TickCosts:
    """The costs of ticks with these row counts; `about` is all else that they depend on, by its repr."""
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = (device.platform, device.device_kind, f"{cores} cores", f"jax {jax.__version__}", few_rows.version())
    key = " ".join((*machine, f"{zlib.crc32(repr((counts, about)).encode()):08x}"))
    if key not in _LEARNT:
        _LEARNT[key] = TickCosts(counts, key, _read(costs_file()).get(key))
    return _LEARNT[key]


def costs_file() -> Path:
    """The file of costs, a JSON object by device and model: $DEX_JAX_TICK_COSTS, or among the user's caches."""
    named = os.environ.get("DEX_JAX_TICK_COSTS")
    return Path(named) if named else cache_folder() / "tick_costs.json"


def _read(file: Path) -> dict[str, Any]:
    """Return the costs that a file keeps, none where it is missing or damaged."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _are_costs(kept: Any, count: int) -> bool:
    return isinstance(kept, list) and len(kept) == count and all(isinstance(s, float) and 0 < s < 1e4 for s in kept)
