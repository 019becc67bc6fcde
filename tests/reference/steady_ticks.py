"""A clock by which every tick takes as long, for tests of ticks that choose their rows by what they cost."""

from __future__ import annotations

from typing import Any

from dex_jax.decoding.session import Session


def steady_seconds(session: Session, ticks: int, prices: Any) -> tuple[Any, float]:
    """Stand for `Session._seconds`: a call takes a millisecond, and so does each of its ticks.

    Measured costs differ between machines, and on a busy one a call without ticks may take longer than one with some.
    """
    return session._run(ticks, prices), 1e-3 * (1 + ticks)
