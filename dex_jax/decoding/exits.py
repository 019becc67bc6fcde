"""Which exit heads a generation uses."""

from __future__ import annotations

import sys

from dex_jax.decoding.methods import Schedule
from dex_jax.errors import DexError


def resolve_exits(exits: str, schedule: Schedule) -> str | None:
    """The source of the exits 1..K-1 of a schedule, None when there are none (K = 1).

    "shared" is the model's own final norm and unembedding at every depth and needs no training. "default" is what ships
    for the model; as nothing ships yet it means "shared".

    Raises:
      DexError: anything else.
    """
    if exits not in ("default", "shared"):
        raise DexError(f'exits must be "default" or "shared", not {exits!r}: this version has no trained exits')
    return None if schedule.stages == 1 else "shared"


def say_exits(exits: str, source: str | None) -> None:
    """One line on stderr where what runs is not what the word promises."""
    if exits == "default" and source == "shared":
        print('no trained exits ship with this model: exits="shared" is used', file=sys.stderr)
