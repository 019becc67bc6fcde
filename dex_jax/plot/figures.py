"""Where matplotlib is imported, and how all figures look."""

from __future__ import annotations

from typing import Any

from dex_jax.errors import DexError

INK, FAINT = "#22262e", "#c9ced6"


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure of so many inches; no pyplot, so nothing to close and no backend to choose.

    Raises:
      DexError: no matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DexError("pictures need matplotlib: pip install 'dex-jax[plot]'") from error
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white", dpi=110)
    FigureCanvasAgg(figure)
    return figure


def quiet_axes(axes: Any) -> None:
    """Takes away what is not read: the frame above and to the right, heavy ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(color=FAINT, labelcolor=INK, labelsize=8)
    axes.set_axisbelow(True)
