"""The costs of ticks by their number of rows, learnt on the device at hand and kept between processes.

Only the time of several ticks together is measured. A Kalman filter estimates each cost, with its uncertainty, from
such sums. Ticks need only the ratios of costs, and only ratios are kept, so a load that slows everything down does no
harm.

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

from dex_jax.decoding.dex.row_choice import usual_costs
from dex_jax.errors import DexError
from dex_jax.io.whole_files import cache_folder, write_whole
from dex_jax.nn import few_rows

OWN, PRICE = 0.2, 1.0
"""Relative standard deviations before the first tick: of each cost alone, and of everything together that costs more
than a tick of one row does."""

DRIFT, COMMON_DRIFT = 0.01, 0.2
"""The share of these deviations that every update adds, and the relative deviation of all costs together, as other
programs come and go."""

NOISE, OUTLIER = 0.15, 3.0
"""The relative standard deviation of a measured time, and the number of deviations at which an error is clipped."""

FORGETTING = 0.01
"""The share by which every update moves a cost that was not paid back to the usual one, so that it is tried again."""

WORTH_KEEPING = 0.03
"""The least relative change of a cost for which the costs are written to the file again."""


class TickCosts:
    """Estimated seconds of ticks, which every update corrects.

    Attributes:
      seconds: [M] float64, of a tick of each row count, ascending, and of drafting a level; None before any update.
    """

    def __init__(self, counts: tuple[int, ...], key: str = "", stored: Any = None):
        """Start from `stored`, the entry of `key` in the file of costs, or from the usual costs if it is not valid."""
        self.key, self._usual = key, np.array(usual_costs(counts))
        self._stored = np.array(stored) if _are_costs(stored, len(self._usual)) else self._usual
        self.seconds: np.ndarray | None = None
        self._unsure = np.zeros((len(self._stored),) * 2)

    def learn(self, ran: np.ndarray, seconds: float) -> None:
        """Update the estimates by ticks that took `seconds` together; `ran` [M] says how often each cost was paid."""
        if not np.any(ran[:-1]) or not seconds > 0:
            return
        if self.seconds is None:
            self.seconds = self._stored * seconds / (ran @ self._stored)
            self._unsure = self._covariance(1.0)
        self.seconds += FORGETTING * (ran == 0) * (self._usual * self.seconds[0] - self.seconds)
        self._unsure += self._covariance(DRIFT)
        expected = ran @ self.seconds
        variance = ran @ self._unsure @ ran + (NOISE * expected) ** 2
        most = OUTLIER * math.sqrt(variance)
        gain = self._unsure @ ran / variance
        self.seconds = np.maximum(self.seconds + gain * np.clip(seconds - expected, -most, most), 1e-9)
        self._unsure -= np.outer(gain, gain) * variance

    def relative(self) -> np.ndarray:
        """Return the costs relative to that of a tick of one row: [M] float32; more rows never cost less."""
        share = self._stored if self.seconds is None else self.seconds / self.seconds[0]
        return np.append(np.maximum.accumulate(np.maximum(share[:-1], 1)), share[-1]).astype(np.float32)

    def keep(self) -> None:
        """Write the costs for later processes if they have changed; where nothing can be written, those learn anew."""
        if not self.key or self.seconds is None:
            return
        share = self.seconds / self.seconds[0]
        if np.all(np.abs(share - self._stored) < WORTH_KEEPING * self._stored):
            return
        self._stored = share
        with contextlib.suppress(DexError):
            write_whole(costs_file(), json.dumps(_read(costs_file()) | {self.key: share.tolist()}, indent=1) + "\n")

    def _covariance(self, share: float) -> np.ndarray:
        """Return the covariance [M, M] of costs that vary by `share` of OWN and PRICE, and together by COMMON_DRIFT."""
        assert self.seconds is not None
        more = self.seconds - np.append(np.full(len(self.seconds) - 1, self.seconds[0]), 0)
        # A drafted level may cost a hundredth of a tick, or, by a draft model, half of one.
        own = OWN * np.append(self.seconds[:-1], self.seconds[0])
        apart = np.diag(own**2) + PRICE**2 * np.outer(more, more)
        return share**2 * apart + COMMON_DRIFT**2 * np.outer(self.seconds, self.seconds)


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
    return (
        isinstance(stored, list) and len(stored) == count and all(isinstance(s, float) and 0 < s < 1e4 for s in stored)
    )
