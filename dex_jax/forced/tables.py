"""Figures of trained exits as people read them: tables, and a picture of a training run."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dex_jax.errors import DexError
from dex_jax.evaluation.exit_metrics import ExitFigures
from dex_jax.plot.figures import new_figure
from dex_jax.tables import markdown


def tables(groups: Mapping[str, ExitFigures]) -> str:
    """Markdown, readable as it is: for each group one table by depth, then one by K, then what holds for all exits.

    Args:
      groups: name -> figures, as `exit_metrics.grouped_figures` returns them.
    """
    return "\n\n".join(f"**{name}**\n\n{_group_tables(figures)}" for name, figures in groups.items())


def plot_agreement(
    records: Sequence[Mapping[str, Any]], path: str | os.PathLike, *, group: str | None = None, along: str = "step"
) -> None:
    """Draws agreement by depth over training into a PNG.

    Args:
      records: of evaluations, as metrics.jsonl of a run holds them: {"step", ..., "groups": {name: figures}}; a later
        one of a step replaces an earlier one.
      path: of the PNG.
      group: whose figures; None is "mean" where records have it, else their first.
      along: which number of the records goes along the horizontal axis.

    Raises:
      DexError: no matplotlib, no records, a group or number that a record lacks, or a file that cannot be written.
    """
    points = _points(records, group, along)
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    across = sorted(points)
    depths = sorted({depth for by_depth in points.values() for depth in by_depth})
    for number, depth in enumerate(depths):
        shade = number / max(1, len(depths) - 1)
        # A training that went on with other depths leaves gaps.
        height = [points[x].get(depth, math.nan) for x in across]
        axes.plot(across, height, color=(0.1 + 0.8 * shade, 0.3, 0.9 - 0.8 * shade), marker=".", label=f"depth {depth}")
    axes.set_xlabel(along)
    axes.set_ylabel("top-1 agreement with the final layer")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    target = Path(path)
    try:
        figure.savefig(target, format="png")
    except OSError as error:
        raise DexError(f"the picture cannot be written to {target}: {error.strerror or error}") from error


def _points(records: Sequence[Mapping[str, Any]], group: str | None, along: str) -> dict[float, dict[int, float]]:
    """Number along the axis -> depth -> agreement."""
    if not records:
        raise DexError("there is nothing to draw: give at least one record of an evaluation")
    names = list(records[0].get("groups", {}))
    name = group or ("mean" if "mean" in names else next(iter(names), "mean"))
    found: dict[float, dict[int, float]] = {}
    for number, record in enumerate(records, 1):
        figures = record.get("groups", {}).get(name)
        if figures is None or not isinstance(record.get(along), (int, float)):
            raise DexError(f"record {number} has no figures of {name!r} or no {along!r}: draw what all records have")
        found[record[along]] = dict(zip(figures["depths"], figures["agreement"], strict=True))
    return found


def _group_tables(figures: ExitFigures) -> str:
    by_depth = [
        [str(depth), f"{agreement:.3f}", f"{divergence:.3f}", f"{error:.3f}", f"{ead:.3f}"]
        for depth, agreement, divergence, error, ead in zip(
            figures.depths,
            figures.agreement,
            figures.divergence,
            figures.calibration_error,
            figures.ead,
            strict=False,
        )
    ]
    parts = [markdown(["depth", "agreement", "KL (nats)", "calibration error", "EAD here"], by_depth)]
    if figures.agreement_own:
        own = [[str(depth), str(previous), f"{share:.3f}"] for depth, previous, share in figures.agreement_own]
        parts.append(markdown(["depth", "previous position at depth", "agreement"], own))
    by_grid = [
        [
            str(grid.explorers),
            _number(grid.depth_side_speedup, 2),
            _number(grid.ticks_per_token, 2),
            " ".join(f"{share:.2f}" for share in grid.coverage),
        ]
        for grid in figures.grids
    ]
    parts.append(markdown(["K", "depth-side speedup", "ticks per token", "coverage with DECS"], by_grid))
    parts.append(
        f"{figures.tokens} tokens of {figures.texts} texts; {figures.ead[-1]:.3f} of them no trained depth gives; "
        f"the draft vocabulary holds {figures.draft_share:.3f}; off greedy {figures.off_greedy:.4f}."
    )
    return "\n\n".join(parts)


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
