"""The figure of the lattice over ticks, drawn from a trace."""

from __future__ import annotations

import io
from typing import Any

from dex_jax.decoding.trace import Trace, TracedNode
from dex_jax.errors import DexError
from dex_jax.lattice import DRAFTED
from dex_jax.plot.colors import FINAL_HEX, darker, depth_hex

TICKS = 26
"""Number of ticks that are drawn by default, as many as fit a page."""

INK, FAINT = "#22262e", "#c9ced6"
_DEAD, _CROSS = "#e4e7ec", "#a9b0bb"
_CLIMB = 3.6  # inches
_TICK = 0.4  # inches

_Nodes = dict[int, TracedNode]
"""The nodes by their index in `Trace.nodes`."""


def lattice(trace: Trace, ticks: tuple[int, int] | None = None) -> Any:
    """Draw which nodes there were, how deep they got, and what commits and collapses did, tick by tick.

    Every node climbs from depth 0 by one stage a tick. Lines that lived on have the colour of the exit that first gave
    their token, which stands at their foot; pale ones died in a collapse. Where the root reaches the last depth (dot),
    its logits decide the next token: that stands above, in the colour of its own line, which began to climb earlier
    if an exit was right. Dotted lines are commits.

    Args:
      trace: from `dex_jax.trace` or `dex_jax.watch`.
      ticks: the first and the last one to draw; None is the first 26.

    Returns:
      A matplotlib Figure.

    Raises:
      DexError: no tick to draw, or no matplotlib.
    """
    first, last = ticks or (0, min(trace.ticks, TICKS))
    last = min(last, trace.ticks)
    if not 0 <= first < last:
        raise DexError(f"there is nothing to draw from tick {first} to {last}: the trace has {trace.ticks} ticks")
    nodes = {i: node for i, node in enumerate(trace.nodes) if node.born <= last and node.ended >= first}
    commits = [node for node in trace.roots if node.rooted is not None and first < node.rooted <= last]
    if trace.ticks <= last and len(trace.tokens) > 1:
        commits = [*commits, _final(trace)]
    figure = _new_figure(1.8 + (last - first) * _TICK, _CLIMB + 0.9)
    climb = figure.subplots()
    _draw_climb(climb, trace, nodes, commits, last)
    _legend(figure, trace)
    climb.set_xlim(first - 0.9, last + 1.1)
    climb.set_xlabel("tick")
    climb.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _new_figure(width: float, height: float) -> Any:
    """Make an empty Figure, in inches, that notebooks show; it is not pyplot's, so nobody has to close it."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DexError("pictures need matplotlib: pip install matplotlib") from error

    class Picture(Figure):
        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png")
            return file.getvalue()

    figure = Picture(figsize=(width, height), layout="constrained", facecolor="white", dpi=110)
    FigureCanvasAgg(figure)
    return figure


def _quieten(axes: Any) -> None:
    """Hide the frame above and to the right, and make ticks faint."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(color=FAINT, labelcolor=INK, labelsize=8)
    axes.set_axisbelow(True)


def _final(trace: Trace) -> TracedNode:
    """Return the last token as a node, though it ends the sequence and never enters the lattice."""
    position = trace.nodes[0].position + len(trace.tokens) - 1
    return TracedNode(trace.tokens[-1], position, None, trace.exits[-1], trace.ticks, trace.ticks, trace.ticks)


def _color(node: TracedNode, trace: Trace) -> str:
    return FINAL_HEX if node.born == 0 else depth_hex(node.born_at, trace.stages)


def _draw_climb(axes: Any, trace: Trace, nodes: _Nodes, commits: list[TracedNode], last: int) -> None:
    _quieten(axes)
    heights, top = (0, *trace.depths), trace.depths[-1]
    for depth in trace.depths:
        axes.axhline(depth, color=FAINT, linewidth=0.6, zorder=0)
    for node in sorted(nodes.values(), key=lambda node: node.rooted is not None):
        done = node.ended - node.born
        across = [node.born + stage for stage in range(done + 1)]
        up = heights[: done + 1]
        if node.rooted is None:
            axes.plot(across, up, color=_DEAD, linewidth=1.6, zorder=1)
            axes.plot(across[-1], up[-1], marker="x", markersize=4, color=_CROSS, zorder=2)
            continue
        color = _color(node, trace)
        axes.plot(across, up, color=color, linewidth=3, solid_capstyle="round", zorder=3)
        axes.plot(across[0], up[0], marker="o", markersize=5, color=color, zorder=4)
        if done == trace.stages:
            axes.plot(across[-1], up[-1], marker="o", markersize=7, color=INK, zorder=5)
    chosen = [node for node in nodes.values() if node.rooted is not None and node.born < last]
    for born in sorted({node.born for node in chosen}):
        _words(axes, trace, [node for node in chosen if node.born == born], (born, 0), -9)
    for tick in sorted({node.rooted or 0 for node in commits}):
        axes.axvline(tick, color=FAINT, linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
        _words(axes, trace, [node for node in commits if node.rooted == tick], (tick, top), 9)
    axes.set_yticks([-0.16 * top, *heights[1:], 1.16 * top], ["proposed", *map(str, trace.depths), "emitted"])
    axes.set_ylabel("depth (layers)")
    axes.set_ylim(-0.34 * top, 1.36 * top)
    axes.spines["left"].set_bounds(0, top)
    axes.tick_params(axis="y", length=0)


def _words(axes: Any, trace: Trace, path: list[TracedNode], at: tuple[float, float], above: int) -> None:
    """Write the tokens of a path in the colour of its last one, `above` points over a point, leaning to save room.

    A path of more than one node holds drafts, which begin and are committed together.
    """
    path = sorted(path, key=lambda node: node.position)
    words, color = " ".join(_label(trace, node.token) for node in path), darker(_color(path[-1], trace))
    leaning: dict[str, Any] = {"ha": "left", "va": "bottom"} if above > 0 else {"ha": "right", "va": "top"}
    style = leaning | {"rotation": 35, "rotation_mode": "anchor", "color": color, "fontsize": 11, "fontweight": "bold"}
    axes.annotate(words, at, (0, above), textcoords="offset points", **style)


def _legend(figure: Any, trace: Trace) -> None:
    from matplotlib.lines import Line2D

    def line(color: str, name: str, **more: Any) -> Any:
        return Line2D([], [], color=color, label=name, **({"linewidth": 3} | more))

    drafts = any(node.born_at == DRAFTED for node in trace.nodes)
    handles = [
        *([line(depth_hex(DRAFTED, trace.stages), "drafted")] if drafts else []),
        *(line(depth_hex(k, trace.stages), f"{'given by ' * (k == 1)}exit {k}") for k in range(1, trace.stages)),
        line(FINAL_HEX, "the final layer only"),
        line(_CROSS, "died in a collapse", marker="x", markersize=5, linewidth=1.2),
        line(INK, "commit", marker="o", markersize=6, linewidth=0),
    ]
    columns = min(len(handles), int(figure.get_figwidth() / 1.3))
    options = {"frameon": False, "fontsize": 9.5, "handlelength": 1.5, "columnspacing": 1.6}
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, **options)


def _label(trace: Trace, token: int) -> str:
    text = trace.labels[token].strip(" ").replace("\n", "↵").replace("\t", "⇥").replace("$", r"\$")
    if not text:
        return "␣"
    return text if len(text) <= 14 else text[:13] + "…"
