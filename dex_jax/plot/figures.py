"""Where matplotlib is imported, and how all figures look."""

from __future__ import annotations

import functools
import io
from typing import Any

from dex_jax.errors import DexError

INK, FAINT = "#22262e", "#c9ced6"


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure, in inches: no pyplot, so nothing to close. DexError: matplotlib is not installed."""
    return _figure_class()(figsize=(width, height), layout="constrained", facecolor="white", dpi=110)


@functools.cache
def _figure_class() -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DexError("pictures need matplotlib: pip install matplotlib") from error

    class Picture(Figure):
        """A Figure that notebooks show without pyplot."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            FigureCanvasAgg(self)

        def _repr_png_(self) -> bytes:
            return png(self)

    return Picture


def png(figure: Any, **options: Any) -> bytes:
    """The figure as a PNG file; options as of its `savefig`."""
    file = io.BytesIO()
    figure.savefig(file, format="png", **options)
    return file.getvalue()


def quiet_axes(axes: Any) -> None:
    """Takes away what is not read: the frame above and to the right, heavy ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(color=FAINT, labelcolor=INK, labelsize=8)
    axes.set_axisbelow(True)
