"""A page that plays a decode: the lattice over ticks, and the text that grows below it."""

from __future__ import annotations

import dataclasses
import html
import json
import os
from pathlib import Path

from dex_jax.decoding.trace import Trace
from dex_jax.errors import DexError
from dex_jax.io.whole_files import write_whole
from dex_jax.lattice import DRAFTED
from dex_jax.plot.colors import depth_hex
from dex_jax.plot.text import exit_names

HEIGHT = 760
"""Height of the page in a notebook, in pixels."""


@dataclasses.dataclass(frozen=True)
class Player:
    """One HTML page without outside resources, which a notebook shows.

    Attributes:
      page: the page, a whole document.
    """

    page: str

    def save(self, path: str | os.PathLike) -> None:
        """Write the page to a file, or raise DexError and leave what was there."""
        write_whole(path, self.page)

    def _repr_html_(self) -> str:
        # In a frame, as the page has scripts and styles, and notebooks run neither in what they show.
        shown = html.escape(self.page)
        return f'<iframe srcdoc="{shown}" style="width:100%;height:{HEIGHT}px;border:0"></iframe>'


def player(trace: Trace) -> Player:
    """Return a page that plays a decode tick by tick.

    Nodes stand in a column for their position and a lane for their depth, in the colour of the exit that proposed them;
    lines lead to their parents. Space plays, the arrow keys go a tick back and forth, and a node under the mouse tells
    its token, its exit and the probability that the exit gave it. Committed text grows below, coloured by exit.

    Args:
      trace: from `dex_jax.trace` or `dex_jax.watch`.

    Raises:
      DexError: the trace has no tick.

    Examples:
      >>> dex_jax.plot.player(dex_jax.trace(lm, "Why is the sky blue?")).save("sky.html")   # doctest: +SKIP
    """
    if not trace.nodes:
        raise DexError("there is nothing to play: the trace has no tick")
    names = exit_names(trace.depths, any(node.born_at == DRAFTED for node in trace.nodes))
    rooted = [node.rooted or 0 for node in trace.roots]
    data = {
        "depths": trace.depths,
        "ticks": trace.ticks,
        "exits": trace.exits,
        "pieces": trace.pieces,
        # The tick of every token; the last one ends the sequence and never becomes the root.
        "committed": (rooted + [trace.ticks] * len(trace.tokens))[: len(trace.tokens)],
        "labels": trace.labels,
        "names": {number: name for name, number in names},
        "colors": [depth_hex(number, trace.stages) for number in range(trace.stages + 1)],
        "nodes": [
            (
                node.token,
                node.position,
                -1 if node.parent is None else node.parent,
                node.born_at,
                node.born,
                node.ended,
                -1 if node.rooted is None else node.rooted,
                round(node.probability, 3),
            )
            for node in trace.nodes
        ],
    }
    template = Path(__file__).with_name("player.html").read_text(encoding="utf-8")
    # A "</script>" in the text would end the data.
    return Player(template.replace("DATA", json.dumps(data, separators=(",", ":")).replace("</", "<\\/"), 1))
