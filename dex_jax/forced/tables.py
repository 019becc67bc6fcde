"""Figures of trained exits as tables that people read."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dex_jax.forced.figures import ExitFigures
from dex_jax.tables import markdown


def tables(groups: Mapping[str, ExitFigures]) -> str:
    """Figures of groups as markdown, readable as it is: one table by depth, one by K, then what holds for all exits."""
    return "\n\n".join(f"**{name}**\n\n{_group_tables(figures)}" for name, figures in groups.items())


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
