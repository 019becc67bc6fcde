"""Pictures of an EAD profile; they need matplotlib, the extra "plot"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dex_jax.evaluation.planner.ead_profile import EAD, GridProfile, Profile
from dex_jax.io.whole_files import write_whole
from dex_jax.plot.charts import speedup_by_k
from dex_jax.plot.figures import INK, new_figure, png


def figures(profile: Profile) -> dict[str, Any]:
    """The pictures of a profile.

    Returns:
      Matplotlib Figures: "ead", the share of tokens by earliest available depth; "speedup", depth-side speedups by K
      beside what bounds them.

    Raises:
      DexError: no matplotlib.
    """
    grids = sorted(profile.grids, key=lambda grid: grid.stages)
    return {"ead": _ead(profile.groups or {"all": profile.ead}), "speedup": _speedup(profile.ead, grids)}


def draw(profile: Profile, folder: str | Path) -> list[Path]:
    """Writes the pictures of a profile as PNG files into a folder; returns the files.

    Raises:
      DexError: no matplotlib, or a folder that cannot be written.
    """
    files = []
    for name, figure in figures(profile).items():
        files.append(Path(folder) / f"{name}.png")
        write_whole(files[-1], png(figure))
    return files


def _ead(groups: dict[str, EAD]) -> Any:
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    width = 0.8 / len(groups)
    for number, (name, ead) in enumerate(groups.items()):
        at = np.arange(len(ead.depths)) + (number - (len(groups) - 1) / 2) * width
        axes.bar(at, ead.share, width, label=f"{name}, mean {ead.mean:.1f}")
    depths = next(iter(groups.values())).depths
    axes.set_xticks(np.arange(len(depths)), [str(depth) for depth in depths])
    axes.set_xlabel("depth")
    axes.set_ylabel("share of tokens first available here")
    axes.legend()
    return figure


def _speedup(ead: EAD, grids: list[GridProfile]) -> Any:
    series = {
        "EAD rounded up to the grid": {grid.stages: grid.resolution_bound for grid in grids},
        "teacher-forced ticks, DECS": {grid.stages: grid.depth_side_speedup for grid in grids},
        "the loop itself": {grid.stages: grid.real.depth_side_speedup for grid in grids if grid.real is not None},
    }
    figure = speedup_by_k({name: speedups for name, speedups in series.items() if speedups})
    (axes,) = figure.axes
    axes.axhline(ead.oracle_speedup, color=INK, linewidth=0.8, linestyle="--", label="oracle: L over mean EAD")
    axes.legend(frameon=False, fontsize=9)
    return figure
