"""Charts of studies: shares of tokens by depth, and what more explorers bring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dex_jax.decoding.output import Output
from dex_jax.errors import DexError
from dex_jax.plot.colors import SERIES, depth_hex
from dex_jax.plot.figures import FAINT, INK, new_figure, quiet_axes

Speedups = Mapping[int, float] | Sequence[Output]


def draw_shares(axes: Any, depths: Sequence[int], shares: Sequence[float]) -> None:
    """A bar for each depth, 0 being that of drafts, as high as its share of tokens."""
    quiet_axes(axes)
    first = 0 if depths[0] == 0 else 1
    colors = [depth_hex(number, len(depths) + first - 1) for number in range(first, len(depths) + first)]
    axes.bar(range(len(depths)), shares, color=colors, width=0.78)
    for place, share in enumerate(shares):
        axes.annotate(f"{share:.0%}", (place, share), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    axes.set_xticks(range(len(depths)), [str(depth) for depth in depths])
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")


def speedup_by_k(series: Mapping[str, Speedups]) -> Any:
    """Depth-side speedup against the number of explorers, one line for each entry.

    Depth-side speedup is what K explorers on K devices would bring if heads and communication were free. It is at least
    1 by construction, so only the distance between lines says anything.

    Args:
      series: name -> {K: speedup}, or name -> outputs of `dex_jax.generate` with different numbers of explorers;
        outputs of the same K are taken together.

    Returns:
      A matplotlib Figure.

    Raises:
      DexError: nothing to draw, or outputs without ticks; no matplotlib.
    """
    lines = {name: _by_explorers(speedups) for name, speedups in series.items()}
    if not any(lines.values()):
        raise DexError("there is nothing to draw: give at least one speedup")
    figure = new_figure(5.6, 3.6)
    axes = figure.add_subplot()
    quiet_axes(axes)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    for number, (name, speedups) in enumerate(lines.items()):
        places = sorted(speedups)
        color = SERIES[number % len(SERIES)]
        heights = [speedups[k] for k in places]
        axes.plot(places, heights, marker="o", markersize=5, linewidth=2, color=color, label=name)
        end = (places[-1], heights[-1])
        axes.annotate(f"{heights[-1]:.2f}", end, (6, -3), textcoords="offset points", fontsize=8, color=INK)
    axes.set_xticks(sorted({k for speedups in lines.values() for k in speedups}))
    axes.set_xlabel("explorers K")
    axes.set_ylabel("depth-side speedup over AR")
    axes.set_ylim(bottom=0.9)
    axes.margins(x=0.09)
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    return figure


def _by_explorers(speedups: Speedups) -> dict[int, float]:
    if isinstance(speedups, Mapping):
        return {int(k): float(value) for k, value in speedups.items()}
    tokens: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for out in speedups:
        if out.stats.ticks is None:
            raise DexError("an output without ticks has no speedup: leave it out")
        stages = out.stats.schedule.stages
        tokens[stages] = tokens.get(stages, 0) + int((out.lengths - 1).sum())
        ticks[stages] = ticks.get(stages, 0) + int(out.stats.ticks.sum())
    return {k: k * tokens[k] / ticks[k] for k in tokens if ticks[k]}
