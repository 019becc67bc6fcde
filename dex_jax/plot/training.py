"""A picture of a training run: how agreement grows by depth."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from dex_jax.errors import DexError
from dex_jax.io.whole_files import write_whole
from dex_jax.plot.figures import new_figure, png


def plot_agreement(records: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Draws agreement by depth over training into a PNG.

    Args:
      records: of evaluations, as metrics.jsonl of a run holds them: {"step", ..., "groups": {name: figures}}; a later
        one of a step replaces an earlier one. Drawn is the group "mean" where there is one, else the first.
      path: of the PNG.

    Raises:
      DexError: no matplotlib, no records, a record without the group or a step, or a file that cannot be written.
    """
    points = _points(records)
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    across = sorted(points)
    depths = sorted({depth for by_depth in points.values() for depth in by_depth})
    for number, depth in enumerate(depths):
        shade = number / max(1, len(depths) - 1)
        # A training that went on with other depths leaves gaps.
        height = [points[x].get(depth, math.nan) for x in across]
        axes.plot(across, height, color=(0.1 + 0.8 * shade, 0.3, 0.9 - 0.8 * shade), marker=".", label=f"depth {depth}")
    axes.set_xlabel("step")
    axes.set_ylabel("top-1 agreement with the final layer")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    write_whole(path, png(figure))


def _points(records: Sequence[Mapping[str, Any]]) -> dict[int, dict[int, float]]:
    """Step -> depth -> agreement."""
    if not records:
        raise DexError("there is nothing to draw: give at least one record of an evaluation")
    names = list(records[0].get("groups", {}))
    name = "mean" if "mean" in names else next(iter(names), "mean")
    found: dict[int, dict[int, float]] = {}
    for number, record in enumerate(records, 1):
        figures = record.get("groups", {}).get(name)
        if figures is None or not isinstance(record.get("step"), int):
            raise DexError(f"record {number} has no step or no figures of {name!r}: draw what all records have")
        found[record["step"]] = dict(zip(figures["depths"], figures["agreement"], strict=True))
    return found
