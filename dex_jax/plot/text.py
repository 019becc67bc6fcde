"""The text of an output, coloured by the exit that first gave each token."""

from __future__ import annotations

import dataclasses
import html
import io

from rich.console import Console
from rich.text import Text

from dex_jax.decoding.output import Output
from dex_jax.decoding.plan import Plan
from dex_jax.plot.colors import depth_hex, depth_style

COLUMNS = 100
"""The number of columns of the terminal in an SVG."""

_BOX = "font-family:ui-sans-serif,system-ui,sans-serif;line-height:1.75;max-width:56em;margin:.4em 0"
_CHIP = "border-radius:.2em;padding:.1em .08em"
_LEGEND = "font-size:85%;margin-bottom:.6em"


@dataclasses.dataclass(frozen=True)
class DepthText:
    """Coloured text, as HTML that a notebook shows and with escape codes that `print` shows.

    Attributes:
      html: one `<div>`, legend first; the mouse on a token shows its exit.
      terminal: lines with 256-colour escape codes, legend last.
    """

    html: str
    terminal: str

    def svg(self, title: str = "") -> str:
        """Return the text as an SVG picture of a terminal."""
        console = Console(record=True, file=io.StringIO(), width=COLUMNS, force_jupyter=False, highlight=False)
        *texts, names = self.terminal.splitlines()
        console.print(Text.from_ansi("\n".join([*texts, "", names])))
        return console.export_svg(title=title)

    def _repr_html_(self) -> str:
        return self.html

    def __str__(self) -> str:
        return self.terminal


def depth_text(out: Output) -> DepthText:
    """Colour every token of an output by the exit that first gave it, green for early to red for late.

    Tokens that the final layer or the prefill gave itself stay plain. Drafted tokens have a colour of their own.

    Args:
      out: from `dex_jax.generate`, any method; token ids are shown where the model has no tokenizer.
    """
    plan = out.stats.plan
    rows = [
        list(zip(out.pieces(row), out.stats.exits[row, :length].tolist(), strict=True))
        for row, length in enumerate(out.lengths.tolist())
    ]
    return DepthText(_html(rows, plan), _terminal(rows, plan))


def exit_names(depths: tuple[int, ...], drafted: bool) -> list[tuple[str, int]]:
    """Return (name, exit) of every colour, for exit depths x_1 < ... < x_K."""
    *early, last = enumerate(depths, 1)
    return [
        *([("drafted", 0)] if drafted else []),
        *((f"exit {number} (depth {depth})", number) for number, depth in early),
        (f"final layer (depth {last[1]})", last[0]),
    ]


def _html(rows: list[list[tuple[str, int]]], plan: Plan) -> str:
    names = {number: name for name, number in exit_names(plan.depths, plan.drafts is not None)}

    def chip(piece: str, exit_number: int) -> str:
        # A tint on the word alone: most tokens begin with the space before it.
        space, word = piece[: len(piece) - len(piece.lstrip(" "))], piece.lstrip(" ")
        text = html.escape(word).replace("\n", "<br>")
        title = names.get(exit_number, "prefill")
        if depth_style(exit_number, plan.stages) == "default":
            return f'{space}<span title="{title}">{text}</span>'
        # A tint, so that it can be read on white and on black.
        tint = depth_hex(exit_number, plan.stages) + "66"
        return f'{space}<span title="{title}" style="background:{tint};{_CHIP}">{text}</span>'

    names_shown = " &nbsp;".join(
        chip(name, number) for name, number in exit_names(plan.depths, plan.drafts is not None)
    )
    texts = [
        f'<div style="white-space:pre-wrap;margin-bottom:.8em">{"".join(chip(*token) for token in row)}</div>'
        for row in rows
    ]
    return f'<div style="{_BOX}"><div style="{_LEGEND}">{names_shown}</div>{"".join(texts)}</div>'


def _terminal(rows: list[list[tuple[str, int]]], plan: Plan) -> str:
    file = io.StringIO()
    # In a notebook rich would show the text at once, beside the page.
    console = Console(
        file=file, force_terminal=True, force_jupyter=False, color_system="256", highlight=False, soft_wrap=True
    )
    last = [(f"{name}  ", number) for name, number in exit_names(plan.depths, plan.drafts is not None)]
    for row in [*rows, last]:
        line = [(piece, depth_style(number, plan.stages)) for piece, number in row]
        console.print(Text.assemble(*line))
    return file.getvalue().rstrip("\n")
