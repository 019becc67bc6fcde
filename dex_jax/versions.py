"""Versions of jax and flax that fail together, or that compute wrongly: said before either is imported."""

from __future__ import annotations

import importlib.metadata
import re
import sys

OLDEST_FLAX = {(0, 9): (0, 12, 1), (0, 11): (0, 12, 7), (0, 11, 1): (0, 12, 9), (0, 11, 2): (0, 12, 10)}
"""From each of these versions of jax on, the oldest flax that can be imported beside it. (How old a jax may be for a
flax stands in flax's own metadata, which pip goes by.)"""

MISCOMPILES = (0, 10, 2)
"""jax issues 39103 and 39352: results on CPUs are wrong without a word; `dex_jax.selfcheck` tries both."""


def conflict(jax: str, flax: str) -> str | None:
    """One sentence on what to install where these two versions fail together, else None.

    Examples:
      >>> conflict("0.11.2", "0.12.9")
      "flax 0.12.9 cannot be imported beside jax 0.11.2: pip install 'flax>=0.12.10'"
      >>> conflict("0.10.1", "0.12.8")
    """
    needed = [oldest for since, oldest in OLDEST_FLAX.items() if _numbers(jax) >= since]
    if not needed or _numbers(flax) >= max(needed):
        return None
    return f"flax {flax} cannot be imported beside jax {jax}: pip install 'flax>={'.'.join(map(str, max(needed)))}'"


def check_versions() -> None:
    """An ImportError where the installed jax and flax fail together; a jax that miscompiles is a warning on stderr."""
    try:
        jax, flax = (importlib.metadata.version(name) for name in ("jax", "flax"))
    except importlib.metadata.PackageNotFoundError:
        return  # Importing them says which is missing.
    if problem := conflict(jax, flax):
        raise ImportError(problem)
    if _numbers(jax) == MISCOMPILES:
        print(
            f"warning: jax {jax} computes wrongly on CPUs (jax issue 39103): pip install 'jax!={jax}'", file=sys.stderr
        )


def _numbers(version: str) -> tuple[int, ...]:
    """ "0.12.0.1" -> (0, 12, 0, 1); what follows the numbers, as in "0.11.2.dev3" or "0.12.9rc1", is left out."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()
