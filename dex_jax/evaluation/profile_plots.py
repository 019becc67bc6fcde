"""Pictures of an EAD profile; they need matplotlib, the extra "plots"."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dex_jax.errors import DexError
from dex_jax.evaluation.ead_profile import Profile


def draw(profile: Profile, folder: str | Path) -> list[Path]:
    """Draws EAD by depth, speedups by K and ticks per token by rows as PNG files into a folder.

    Returns:
      The files.

    Raises:
      DexError: no matplotlib, or a folder that cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DexError("pictures need matplotlib: pip install dex_jax[plots]") from error

    figures = {}
    figures["ead"] = figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    groups = profile.groups or {"all": profile.ead}
    width = 0.8 / len(groups)
    for number, (name, ead) in enumerate(groups.items()):
        at = np.arange(len(ead.depths)) + (number - (len(groups) - 1) / 2) * width
        axes.bar(at, ead.share, width, label=f"{name}, mean {ead.mean:.1f}")
    axes.set_xticks(np.arange(len(profile.ead.depths)), [str(depth) for depth in profile.ead.depths])
    axes.set_xlabel("depth")
    axes.set_ylabel("share of tokens first available here")
    axes.legend()

    figures["speedup"] = figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    grids = sorted(profile.grids, key=lambda grid: grid.stages)
    across = [grid.stages for grid in grids]
    axes.axhline(profile.ead.oracle_speedup, color="grey", linestyle="--", label="oracle: L over mean EAD")
    axes.plot(across, [grid.resolution_bound for grid in grids], marker=".", label="EAD rounded up to the grid")
    axes.plot(across, [grid.depth_side_speedup for grid in grids], marker="o", label="teacher-forced ticks, DECS")
    real = [grid for grid in grids if grid.real is not None]
    if real:
        height = [grid.real.depth_side_speedup for grid in real if grid.real is not None]
        axes.plot([grid.stages for grid in real], height, "x", label="the loop itself")
    axes.set_xlabel("K")
    axes.set_ylabel("depth-side speedup")
    axes.legend()

    figures["rows"] = figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for grid in grids:
        rows = [capped.rows for capped in grid.capped]
        above = [capped.ticks_per_token / grid.ticks_per_token - 1 for capped in grid.capped]
        axes.plot(rows, above, marker=".", label=f"K = {grid.stages}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("rows a stage")
    axes.set_ylabel("ticks above those of rows that never prune")
    axes.legend()

    files = []
    for name, figure in figures.items():
        file = Path(folder) / f"{name}.png"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            FigureCanvasAgg(figure).print_png(file)
        except OSError as error:
            raise DexError(f"the picture cannot be written to {file}: {error.strerror or error}") from error
        files.append(file)
    return files
